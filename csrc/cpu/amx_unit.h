// The matrix unit of conv_amx.h: tiles of totals over groups of terms, and the question whether a
// unit computes what the specification says.
#pragma once

#include "conv_dense.h"

namespace torch_naiveconv::TNC_ISA {

constexpr int side = 16;   // rows and columns of a tile of totals
constexpr int depth = 32;  // terms of a group
constexpr int64_t tile_words = side * depth;
constexpr int64_t tile_totals = side * side;

// Rows of 32 consecutive terms, wherever they lie: distances in elements between rows, tiles of 16
// rows, and groups.
struct RowTiles {
  const BFloat16* data;
  int64_t row, tile, group;
};

// Columns of 32 terms, packed: tiles at a distance; `kept` groups of a tile lie side by side, and
// the next ones take their places.
struct ColumnTiles {
  const BFloat16* data;
  int64_t tile, kept;
};

// The tiles i, j of `totals` (a grid of tiles, `pitch` tiles a row) over `groups` groups of terms.
// The unit keeps 2 x 2 of them, or 1 x 4: fewer would wait for each other. pack(g, place)
// is called a group ahead, so that its stores are done when they are loaded.
template <class Unit, int Rows, int Columns, class Pack>
void multiply_tiles(const RowTiles& rows, const ColumnTiles& columns, int64_t groups, float* totals,
                    int64_t pitch, bool resume, const Pack& pack) {
  pack(0, 0);
  Unit::fence();
  const auto each_total = [&](const auto& visit) {
    with_constants<Rows * Columns>(
        [&](auto i) { visit(i, totals + (i / Columns * pitch + i % Columns) * tile_totals); });
  };
  each_total([&](auto i, const float* total) {
    if (resume)
      Unit::template load_total<i>(total);
    else
      Unit::template zero_total<i>();
  });
  const BFloat16* a = rows.data;
  const int64_t row_bytes = rows.row * int64_t{sizeof(BFloat16)};
  for (int64_t g = 0, place = 0; g < groups; ++g, a += rows.group) {
    const BFloat16* const b = columns.data + place * tile_words;
    place = place + 1 < columns.kept ? place + 1 : 0;
    if (g + 1 < groups) pack(g + 1, place);
    Unit::template load_rows<0>(a, row_bytes);
    with_constants<Columns>([&](auto j) {
      Unit::template load_columns<j>(b + j * columns.tile);
      Unit::template multiply<j, 0, j>();
    });
    if constexpr (Rows == 2) {
      Unit::template load_rows<1>(a + rows.tile, row_bytes);
      with_constants<Columns>([&](auto j) { Unit::template multiply<Columns + j, 1, j>(); });
    }
    // A processor that has stored no tile for half a microsecond takes long to store the next one.
    if (g % 8 == 7) Unit::template store_total<0>(totals);
  }
  each_total([&](auto i, float* total) { Unit::template store_total<i>(total); });
  Unit::fence();
}
template <class Unit, class Pack>
void multiply_tiles(int64_t row_tiles, int64_t column_tiles, const RowTiles& rows,
                    const ColumnTiles& columns, int64_t groups, float* totals, int64_t pitch,
                    bool resume, const Pack& pack) {
  const auto multiply = row_tiles == 2      ? column_tiles == 2 ? multiply_tiles<Unit, 2, 2, Pack>
                                                                : multiply_tiles<Unit, 2, 1, Pack>
                        : column_tiles == 4 ? multiply_tiles<Unit, 1, 4, Pack>
                        : column_tiles == 3 ? multiply_tiles<Unit, 1, 3, Pack>
                        : column_tiles == 2 ? multiply_tiles<Unit, 1, 2, Pack>
                                            : multiply_tiles<Unit, 1, 1, Pack>;
  multiply(rows, columns, groups, totals, pitch, resume, pack);
}
// Columns that are packed already.
struct NoPack {
  void operator()(int64_t, int64_t) const {}
};

// Does the unit compute what the specification says? Asked once, before it is trusted: operands of
// ordinary size, products about the smallest normal number, results that are tiny before or after
// rounding, infinities and NaNs. The sign of a zero total does not count (see above).
template <class Unit>
bool unit_is_exact() {
  FloatEnvironment environment(FloatEnvironment::gradual);
  Unit unit;
  uint64_t state = 1;
  const auto random = [&state] {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 33);
  };
  constexpr int kinds = 5, trials = 8;
  for (int trial = 0; trial < kinds * trials; ++trial) {
    const bool swap = trial / kinds % 2;
    const auto draw = [&](bool left) -> BFloat16 {
      const uint32_t r = random(), sign = r & 0x8000u, mantissa = r & 0x7fu, pick = r >> 16 & 15;
      uint32_t exponent = 124 + pick % 8;
      if (trial % kinds == 1) exponent = pick == 0 ? 0 : 60 + pick % 8;
      if (trial % kinds == 2) {  // 2^-63, 2^-75, 2^-76: sums just below 2^-126
        static constexpr uint32_t edge[] = {64, 64, 52, 51};
        exponent = edge[pick % 4];
        if (pick > 3) return {static_cast<uint16_t>(sign | exponent << 7)};
      }
      if (trial % kinds == 3 && pick < 2 && (r >> 20 & 15) == 0) exponent = pick == 0 ? 255 : 0;
      if (trial % kinds == 4) exponent = left != swap ? pick % 2 : 140;  // subnormals that count
      return {static_cast<uint16_t>(sign | exponent << 7 | mantissa)};
    };
    alignas(64) BFloat16 a[side][depth], b[depth / 2][side][2];
    alignas(64) float total[side][side], earlier[side][side];
    for (auto& row : a)
      for (BFloat16& x : row) x = draw(true);
    for (auto& pair : b)
      for (auto& column : pair)
        for (BFloat16& x : column) x = draw(false);
    for (int r = 0; r < side; ++r)
      for (int c = 0; c < side; ++c) {
        const float x = operand(draw(true)), y = operand(draw(false));
        earlier[r][c] = total[r][c] = trial % 3 ? flushed(x * y) : 0.0f;
      }
    const RowTiles rows{a[0], depth, 0, 0};
    multiply_tiles<Unit, 1, 1>(rows, {b[0][0], 0, 1}, 1, total[0], 1, true, NoPack{});
    for (int r = 0; r < side; ++r)
      for (int c = 0; c < side; ++c) {
        PairedSum<BFloat16> sum(earlier[r][c]);
        for (int t = 0; t < depth; ++t) sum.step(a[r][t], b[t / 2][c][t % 2]);
        const float expected = sum.total(), x = flushed_add(total[r][c], 0.0f);
        const float found = x == x ? x : bits_as<float>(uint32_t{0x7fc00000u});
        if (bits_as<uint32_t>(found) != bits_as<uint32_t>(expected)) return false;
      }
  }
  return true;
}

}  // namespace torch_naiveconv::TNC_ISA
