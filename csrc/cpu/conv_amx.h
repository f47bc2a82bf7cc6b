// bfloat16 convolution on a matrix unit whose one instruction is the contract's 16-bit group:
//
//   total[r][c] += even + odd,   even = the chain over a[r][2k] * b[k][c][0],   k = 0 .. 15
//                                odd  = the chain over a[r][2k + 1] * b[k][c][1]
//
// for tiles of 16 x 16 totals, from 16 rows of 32 terms (a) and 16 pairs of terms of 16 columns
// (b). So a tile of totals stays in the unit while all groups of terms go by, and the kernel only
// brings the operands into that form:
//
//                rows             columns         terms, in the contract's order
//   forward      output channels  output pixels   (ic, kd, kh, kw)
//   grad_input   input channels   input pixels    (oc, kd, kh, kw), one stride phase at a time
//   grad_weight  (ic, taps)       output channels (od, oh, ow) of one sample, sample after sample
//
// Where a group has fewer than 32 terms, and where a term does not exist, operands are +0: that
// adds +0 to a chain, so it can only turn a chain or a total of -0 into +0, which no result shows
// unless the bias is -0 (shows_sign_of_zero).
//
// The unit is a parameter: MatrixUnit in conv_amx.cpp, or an emulation in the tests. Start reading
// at run_matrix_unit, at the end.
#pragma once

#include "conv_dense.h"

namespace torch_naiveconv::TNC_ISA {

constexpr int side = 16;   // rows and columns of a tile of totals
constexpr int depth = 32;  // terms of a group
constexpr int64_t tile_words = side * depth;
constexpr int64_t tile_totals = side * side;

// What a call is declined for, and how much a task works on at a time. Tests make them small.
struct MatrixLimits {
  int64_t least_channels = 8;     // that the tiles would be filled with
  int64_t least_work = 200000;    // multiply-adds
  int64_t panel_bytes = 1 << 20;  // packed operand of a task
  int64_t patch_bytes = 1 << 20;  // zero-padded copy of a piece of the image
  int64_t weight_bytes = 8 << 20;
  int64_t most_pixels = 1024;
};

inline Arena& weight_arena() {
  static thread_local Arena arena;
  return arena;
}

// ---- the unit
// ------------------------------------------------------------------------------------

// Rows of 32 consecutive terms, wherever they lie: distances in elements between rows, tiles of 16
// rows, and groups.
struct RowTiles {
  const BFloat16* data;
  int64_t row, tile, group;
};

// The tiles i, j of `totals` (a grid of tiles, `pitch` tiles a row) over `groups` groups of terms.
template <class Unit, int Rows, int Columns>
void multiply_tiles(const RowTiles& rows, const BFloat16* columns, int64_t column_tile,
                    int64_t groups, float* totals, int64_t pitch, bool resume) {
  Unit::fence();
  const auto each_total = [&](const auto& visit) {
    visit(Tag<std::integral_constant<int, 0>>{}, totals);
    if constexpr (Columns == 2) visit(Tag<std::integral_constant<int, 1>>{}, totals + tile_totals);
    if constexpr (Rows == 2)
      visit(Tag<std::integral_constant<int, 2>>{}, totals + pitch * tile_totals);
    if constexpr (Rows == 2 && Columns == 2)
      visit(Tag<std::integral_constant<int, 3>>{}, totals + (pitch + 1) * tile_totals);
  };
  each_total([&](auto tag, const float* total) {
    constexpr int i = decltype(tag)::type::value;
    if (resume)
      Unit::template load_total<i>(total);
    else
      Unit::template zero_total<i>();
  });
  const BFloat16* a = rows.data;
  const int64_t row_bytes = rows.row * int64_t{sizeof(BFloat16)};
  for (int64_t g = 0; g < groups; ++g, a += rows.group, columns += tile_words) {
    Unit::template load_rows<0>(a, row_bytes);
    Unit::template load_columns<0>(columns);
    Unit::template multiply<0>();
    if constexpr (Columns == 2) {
      Unit::template load_columns<1>(columns + column_tile);
      Unit::template multiply<1>();
    }
    if constexpr (Rows == 2) {
      Unit::template load_rows<1>(a + rows.tile, row_bytes);
      Unit::template multiply<2>();
    }
    if constexpr (Rows == 2 && Columns == 2) Unit::template multiply<3>();
  }
  each_total([&](auto tag, float* total) {
    Unit::template store_total<decltype(tag)::type::value>(total);
  });
  Unit::fence();
}
template <class Unit>
void multiply_tiles(bool two_rows, bool two_columns, const RowTiles& rows, const BFloat16* columns,
                    int64_t column_tile, int64_t groups, float* totals, int64_t pitch,
                    bool resume) {
  const auto multiply =
      two_rows ? (two_columns ? multiply_tiles<Unit, 2, 2> : multiply_tiles<Unit, 2, 1>)
               : (two_columns ? multiply_tiles<Unit, 1, 2> : multiply_tiles<Unit, 1, 1>);
  multiply(rows, columns, column_tile, groups, totals, pitch, resume);
}

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
    multiply_tiles<Unit, 1, 1>(rows, b[0][0], 0, 1, total[0], 1, true);
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

// ---- 16-bit words
// ----------------------------------------------------------------------------------

// to[j][i] = from[i][j] of 8 x 8 words.
TNC_INLINE void transpose_words(BFloat16* to, int64_t to_row, const BFloat16* from,
                                int64_t from_row) {
  __m128i a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    a[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * from_row));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // rows i and i + 4: three such steps are a transposition
    b[2 * i] = _mm_unpacklo_epi16(a[i], a[i + 4]);
    b[2 * i + 1] = _mm_unpackhi_epi16(a[i], a[i + 4]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = _mm_unpacklo_epi16(b[i], b[i + 4]);
    a[2 * i + 1] = _mm_unpackhi_epi16(b[i], b[i + 4]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    b[2 * i] = _mm_unpacklo_epi16(a[i], a[i + 4]);
    b[2 * i + 1] = _mm_unpackhi_epi16(a[i], a[i + 4]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * to_row), b[i]);
}

// to[j][i] = from[i][j] for i < rows, j < columns.
inline void transpose_words(BFloat16* to, int64_t to_row, const BFloat16* from, int64_t from_row,
                            int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; i += 8)
    for (int64_t j = 0; j < columns; j += 8) {
      const int64_t i1 = least(i + 8, rows), j1 = least(j + 8, columns);
      if (i1 - i == 8 && j1 - j == 8) {
        transpose_words(to + j * to_row + i, to_row, from + i * from_row + j, from_row);
      } else {
        for (int64_t x = i; x < i1; ++x)
          for (int64_t y = j; y < j1; ++y) to[y * to_row + x] = from[x * from_row + y];
      }
    }
}

// Calls visit(first, length) for pieces of n words, length a constant. Runs are short, so the last
// vector overlaps the one before.
template <class Visit>
TNC_INLINE void in_vectors(int64_t n, const Visit& visit) {
  const auto pieces_of = [&](auto length) {
    int64_t i = 0;
    for (; i + length < n; i += length) visit(i, length);
    visit(n - length, length);
  };
  if (n >= 16) return pieces_of(std::integral_constant<int64_t, 16>{});
  if (n >= 8) return pieces_of(std::integral_constant<int64_t, 8>{});
  if (n >= 4) return pieces_of(std::integral_constant<int64_t, 4>{});
  if (n >= 2) visit(0, std::integral_constant<int64_t, 2>{});
  if (n % 2 == 1) visit(n - 1, std::integral_constant<int64_t, 1>{});
}
TNC_INLINE void copy_words(BFloat16* to, const BFloat16* from, int64_t n) {
  in_vectors(n, [&](int64_t i, auto length) {
    __builtin_memcpy(static_cast<void*>(to + i), from + i, length * sizeof(BFloat16));
  });
}
TNC_INLINE void zero_words(BFloat16* to, int64_t n) {
  in_vectors(n, [&](int64_t i, auto length) {
    static constexpr BFloat16 zeros[16] = {};
    __builtin_memcpy(static_cast<void*>(to + i), zeros, length * sizeof(BFloat16));
  });
}

// to[i] = from[i * stride]
inline void copy_words(BFloat16* to, const BFloat16* from, int64_t stride, int64_t n) {
  if (stride == 1) return copy_words(to, from, n);
  int64_t i = 0;
  if (stride == 2)
    for (; i + 9 <= n; i += 8) {  // reads 16 words, one more than it wants
      const auto even = [&](int64_t at) {
        const __m128i pair = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + at));
        return _mm_srai_epi32(_mm_slli_epi32(pair, 16), 16);
      };
      const __m128i words = _mm_packs_epi32(even(2 * i), even(2 * i + 8));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), words);
    }
  for (; i < n; ++i) to[i] = from[i * stride];
}

// ---- pixels: where those of a range lie
// ------------------------------------------------------------

// The pixels of a grid are numbered (n, d, h, w). A range of them is cut into pieces that are boxes
// of the grid, or nearly: where it crosses from one row, plane or sample into the next, whichever
// is the smallest that holds a whole range.
struct Pieces {
  int64_t unit;       // a piece ends at its multiples
  int64_t count;      // at most so many in a range
  int64_t extent[3];  // and so many positions on each axis

  Pieces(const GridAxis (&grid)[3], int64_t most_pixels) {
    const int64_t row = grid[2].count, plane = row * grid[1].count, all = plane * grid[0].count;
    unit = row >= most_pixels ? row : plane >= most_pixels ? plane : all;
    count = up(most_pixels, unit) + 1;
    extent[2] = least(row, unit == row ? most_pixels : row);
    extent[1] = unit == row ? 1 : least(grid[1].count, up(most_pixels, row) + 1);
    extent[0] = unit == row || unit == plane ? 1 : least(grid[0].count, up(most_pixels, plane) + 1);
  }
  int64_t end(int64_t first, int64_t last) const { return least(last, (first / unit + 1) * unit); }
};

// The box around the pixels [first, last) of one sample.
inline Box box_around(const GridAxis (&grid)[3], int64_t first, int64_t last) {
  Box box;
  int64_t lower = first, upper = last - 1, size = grid[0].count * grid[1].count * grid[2].count;
  lower %= size;
  upper %= size;
  bool whole = false;
  for (int a = 0; a < 3; ++a) {
    size /= grid[a].count;
    box.from[a] = whole ? 0 : lower / size;
    box.to[a] = whole ? grid[a].count : upper / size + 1;
    whole = whole || box.size(a) > 1;
    lower %= size;
    upper %= size;
  }
  return box;
}

// Where a pixel and a term read: in the image itself, or in a patch, which is a zero-padded copy of
// some channels of each piece, row after row. In a patch neighbouring pixels of a row are always
// neighbours: a row with a stride is laid out as the rows of its phases.
struct Layout {
  bool patched;
  int64_t channel = 0;                   // distance of channels
  int64_t pixel[3] = {0, 0, 1};          // distance of neighbouring pixels on each axis
  int64_t axis[3] = {0, 0, 1};           // distance of neighbouring positions
  int64_t first_shift[3] = {0, 0, 0};    // that of position 0
  int64_t pitch[3] = {1, 1, 1};          // of the image's positions that are kept
  int64_t phases = 1, phase_length = 0;  // of a row

  // The image itself.
  Layout(const GridAxis (&grid)[3], const int64_t* image_stride) : patched(false) {
    channel = image_stride[1];
    for (int a = 0; a < 2; ++a) {
      axis[a] = image_stride[a + 2];
      pixel[a] = axis[a] * grid[a].image_step;
    }
  }
  // Patches of pieces.
  Layout(const GridAxis (&grid)[3], const Pieces& pieces) : patched(true) {
    int64_t size[3];
    for (int a = 0; a < 3; ++a) {
      first_shift[a] = grid[a].least_shift();
      if (grid[a].taps == 1) pitch[a] = grid[a].image_step;
      size[a] = length(grid[a], a, pieces.extent[a]);
    }
    phases = grid[2].image_step / pitch[2];
    phase_length = up(size[2], phases);
    axis[1] = phases * phase_length;
    axis[0] = axis[1] * size[1];
    for (int a = 0; a < 2; ++a) pixel[a] = axis[a] * (grid[a].image_step / pitch[a]);
    // An odd number of cache lines apart, so that channels do not crowd one set of the cache.
    channel = (up(axis[0] * size[0], 32) | 1) * 32;
  }
  // Positions that so many pixels read.
  int64_t length(const GridAxis& grid, int a, int64_t pixels) const {
    return (pixels - 1) * (grid.image_step / pitch[a]) +
           (grid.most_shift() - grid.least_shift()) / pitch[a] + 1;
  }
  int64_t tap(int a, int64_t shift) const {
    const int64_t i = (shift - first_shift[a]) / pitch[a];
    return a == 2 ? i % phases * phase_length + i / phases : i * axis[a];
  }
};

// Can vectors be read from the image itself, but for the end of its memory?
inline bool readable_in_place(const GridAxis (&grid)[3], const int64_t* image_stride) {
  bool yes = image_stride[4] == 1 && grid[2].image_step == 1;
  for (int a = 0; a < 3; ++a) yes = yes && !grid[a].reads_padding();
  for (int i = 0; i < 5; ++i) yes = yes && image_stride[i] >= 0;
  return yes;
}

// Fills the patch of one piece.
inline void fill_patch(BFloat16* patch, const Layout& layout, const GridAxis (&grid)[3],
                       const Box& pixels, const BFloat16* image, const int64_t* image_stride,
                       int64_t channels) {
  int64_t from[3], size[3], inner[3], outer[3];  // [inner, outer): what lies in the image
  for (int a = 0; a < 3; ++a) {
    const int64_t pitch = layout.pitch[a];
    from[a] = pixels.from[a] * grid[a].image_step + layout.first_shift[a];
    size[a] = layout.length(grid[a], a, pixels.size(a));
    inner[a] = least(size[a], from[a] < 0 ? up(-from[a], pitch) : 0);
    outer[a] = grid[a].image_size <= from[a] ? 0 : up(grid[a].image_size - from[a], pitch);
    outer[a] = most(inner[a], least(outer[a], size[a]));
  }
  const int64_t word = layout.pitch[2] * image_stride[4], stride = word * layout.phases;
  const bool channels_innermost = image_stride[1] == 1 && stride != 1;
  for (int64_t phase = 0; phase < least(layout.phases, size[2]); ++phase) {
    const int64_t length = up(size[2] - phase, layout.phases);
    const int64_t row_begin = up(inner[2] - phase, layout.phases);
    const int64_t row_end = up(outer[2] - phase, layout.phases);
    for (int64_t c = 0; c < (channels_innermost ? 1 : channels); ++c)
      for (int64_t d = 0; d < size[0]; ++d)
        for (int64_t h = 0; h < size[1]; ++h) {
          BFloat16* const to = patch + c * layout.channel + d * layout.axis[0] +
                               h * layout.axis[1] + phase * layout.phase_length;
          const bool inside = d >= inner[0] && d < outer[0] && h >= inner[1] && h < outer[1];
          const int64_t begin = inside ? row_begin : 0, end = inside ? row_end : 0;
          const BFloat16* const row = image + c * image_stride[1] +
                                      (from[0] + d * layout.pitch[0]) * image_stride[2] +
                                      (from[1] + h * layout.pitch[1]) * image_stride[3] +
                                      from[2] * image_stride[4] + phase * word;
          for (int64_t i = 0; i < (channels_innermost ? channels : 1); ++i) {
            zero_words(to + i * layout.channel, begin);
            zero_words(to + i * layout.channel + end, length - end);
          }
          if (!channels_innermost)  // the same row of the next channel
            for (int64_t i = begin; i < end; i += 32) prefetch(row + image_stride[1] + i * stride);
          if (channels_innermost)
            transpose_words(to + begin, layout.channel, row + begin * stride, stride, end - begin,
                            channels);
          else
            copy_words(to + begin, row + begin * stride, stride, end - begin);
        }
  }
}

// Calls visit(sample, box, piece) for the pieces of [first, last).
template <class Visit>
void each_piece(const GridAxis (&grid)[3], const Pieces& pieces, int64_t first, int64_t last,
                const Visit& visit) {
  const int64_t sample = grid[0].count * grid[1].count * grid[2].count;
  for (int64_t piece = 0; first < last; ++piece) {
    const int64_t end = pieces.end(first, last);
    // Several planes are one piece; several samples never are.
    visit(first / sample, box_around(grid, first, end), piece);
    first = end;
  }
}

// Neighbouring pixels of a row that become neighbouring columns (or terms) of a tile.
struct Run {
  int64_t at;
  int32_t column, length;
};

// Calls visit(pixel, length, at, position) for runs that end at multiples of `width` from `first`.
template <class Visit>
void each_run(const GridAxis (&grid)[3], const Pieces& pieces, const Layout& layout,
              int64_t sample_stride, int64_t piece_length, int64_t first, int64_t last,
              int64_t width, const Visit& visit) {
  int64_t number = first;
  each_piece(grid, pieces, first, last, [&](int64_t n, const Box& box, int64_t piece) {
    const int64_t end = pieces.end(number, last);
    int64_t at[3], rest = number;
    for (int a = 2; a >= 0; --a) at[a] = rest % grid[a].count, rest /= grid[a].count;
    while (number < end) {
      const int64_t to_edge = width - (number - first) % width;
      const int64_t length = least(least(grid[2].count - at[2], to_edge), end - number);
      int64_t from = layout.patched ? piece * piece_length : n * sample_stride;
      for (int a = 0; a < 3; ++a)
        from += (at[a] - (layout.patched ? box.from[a] : 0)) * layout.pixel[a];
      visit(number - first, length, from, n, at);
      number += length;
      at[2] += length;
      for (int a = 2; a > 0 && at[a] == grid[a].count; --a) at[a] = 0, ++at[a - 1];
    }
  });
}

// ---- operands and results
// ---------------------------------------------------------------------------

// The columns of one tile: `pairs` pairs of terms of 16 pixels. Each run is written as 16 columns;
// those too many are written again by the next run, or by the next row, or are not used.
inline void pack_columns(BFloat16* to, const Run* run, const Run* run_end, const BFloat16* source,
                         int64_t origin, const int32_t* offset, int64_t pairs) {
  using V = Vec<float>;
  static constexpr BFloat16 none[side] = {};
  for (int64_t k = 0; k < pairs; ++k, to += 2 * side) {
    const int32_t even = offset[2 * k], odd = offset[2 * k + 1];
    for (const Run* r = run; r < run_end; ++r) {
      const BFloat16* const a = even < 0 ? none : source + (origin + even + r->at);
      const BFloat16* const b = odd < 0 ? none : source + (origin + odd + r->at);
      float* const pair = reinterpret_cast<float*>(to) + r->column;
      for (int i = 0; i < side; i += V::lanes) V::pairs(a + i, b + i).store(pair + i);
    }
  }
}

// The rows of one tile and one group: 32 pixels of `rows` taps.
inline void pack_rows(BFloat16* to, const Run* run, const Run* run_end, const BFloat16* source,
                      const int64_t* offset, int64_t rows, int64_t terms) {
  for (int64_t r = 0; r < rows; ++r, to += depth) {
    for (const Run* i = run; i < run_end; ++i)
      copy_words(to + i->column, source + (offset[r] + i->at), depth);
    if (terms < depth) zero_words(to + terms, depth - terms);
  }
}

// The columns of one tile from its columns' consecutive terms: pairs of words are transposed.
inline void pack_transposed(BFloat16* to, const BFloat16* from, int64_t column) {
  using V = Vec<float>;
  constexpr int L = V::lanes;
  for (int i = 0; i < side; i += L)
    for (int j = 0; j < side; j += L) {
      V block[L];
#pragma GCC unroll 16
      for (int k = 0; k < L; ++k)
        block[k] = V::load(reinterpret_cast<const float*>(from + (i + k) * column) + j);
      V::transpose(block);
#pragma GCC unroll 16
      for (int k = 0; k < L; ++k) block[k].store(reinterpret_cast<float*>(to) + (j + k) * side + i);
    }
}

// Stores of 16-bit elements canonicalise by themselves.
template <class D>
TNC_INLINE Vec<float> stored_as(Vec<float> x) {
  if constexpr (is_half_type<D>) return x;
  return canonical(x);
}

// to[row_at[r] + column_at[c]] = canonical(total[r][c] + bias[r]), rounded to D. Says whether a NaN
// was among them. `total` has room for a vector behind its end.
template <class D>
bool store_tile(const float* total, int rows, int columns, const float* bias, D* to,
                const int64_t* row_at, const int64_t* column_at) {
  using V = Vec<float>;
  constexpr int L = V::lanes;
  auto nan = is_nan(V::zero());
  if (columns > 1 && run_length(column_at, columns) >= 2) {  // rows lie along the memory
    int length[side], runs = 0;
    for (int c = 0; c < columns; c += length[runs++])
      length[runs] = run_length(column_at + c, columns - c);
    for (int r = 0; r < rows; ++r, total += side) {
      const V b = V::broadcast(bias[r]);
      int c = 0;
      for (int i = 0; i < runs; ++i)
        for (const int end = c + length[i]; c < end; c += L) {
          const V sum = V::load(total + c) + b;
          nan = V::either(nan, is_nan(sum));
          D* const at = to + row_at[r] + column_at[c];
          if (end - c >= L) {
            stored_as<D>(sum).store(at);
          } else {
            stored_as<D>(sum).store(at, end - c);
            c = end;
            break;
          }
        }
    }
    return V::any(nan);
  }
  D rounded[side][side], turned[side][side];
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < side; c += L) {
      const V sum = V::load(total + r * side + c) + V::broadcast(bias[r]);
      nan = V::either(nan, is_nan(sum));
      stored_as<D>(sum).store(rounded[r] + c);
    }
  if constexpr (is_half_type<D>) {
    if (run_length(row_at, rows) == rows) {  // columns lie along the memory
      transpose_words(turned[0], side, rounded[0], side, side, side);
      for (int c = 0; c < columns; ++c)
        copy_words(to + row_at[0] + column_at[c], turned[c], 1, rows);
      return V::any(nan);
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < columns; ++c) to[row_at[r] + column_at[c]] = rounded[r][c];
  return V::any(nan);
}

// ---- forward, grad_input
// ------------------------------------------------------------------------------

// The weights of rows [first, first + rows) of some groups of channels, tile by tile: packed, or in
// place if that is how they lie.
struct Weights {
  int64_t first_group, groups, first, rows;
  RowTiles tiles;     // of the first group
  int64_t group = 0;  // distance of groups
};

inline Weights weights_of(const Images<BFloat16>& call, int64_t first_group, int64_t groups,
                          int64_t first, int64_t rows) {
  const int64_t taps = call.kernel[0] * call.kernel[1] * call.kernel[2];
  const int64_t terms = call.image_channels * taps, tiles = up(rows, side);
  const int64_t term_groups = up(terms, depth);
  Arena& arena = weight_arena();
  arena.reset(Arena::bytes_for<int64_t>(terms) +
              Arena::bytes_for<BFloat16>(groups * tiles * term_groups * tile_words));
  int64_t* const at = arena.take<int64_t>(terms);
  int64_t t = 0;
  bool in_place = rows % side == 0 && terms % depth == 0;
  bool consecutive = true;
  for (int64_t c = 0; c < call.image_channels; ++c)
    for (int64_t d = 0; d < call.kernel[0]; ++d)
      for (int64_t h = 0; h < call.kernel[1]; ++h)
        for (int64_t w = 0; w < call.kernel[2]; ++w, ++t) {
          at[t] = c * call.channel_stride + d * call.weight_stride[2] + h * call.weight_stride[3] +
                  w * call.weight_stride[4];
          consecutive = consecutive && at[t] == t;
        }
  const BFloat16* const weight =
      call.weight + first_group * call.group_stride + first * call.lane_stride;
  if (in_place && consecutive)
    return {first_group,
            groups,
            first,
            rows,
            {weight, call.lane_stride, side * call.lane_stride, depth},
            call.group_stride};
  BFloat16* const packed = arena.take<BFloat16>(groups * tiles * term_groups * tile_words);
  parallel_for(groups * tiles, up(1 << 16, term_groups * tile_words), FloatEnvironment::flush,
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t row0 = i % tiles * side, count = least(rows - row0, side);
                   const BFloat16* const from =
                       weight + i / tiles * call.group_stride + row0 * call.lane_stride;
                   BFloat16* to = packed + i * term_groups * tile_words;
                   for (int64_t t0 = 0; t0 < terms; t0 += depth, to += tile_words) {
                     const int64_t some = least(terms - t0, depth);
                     if (count < side || some < depth) zero_words(to, tile_words);
                     int64_t r = 0;
                     if (call.lane_stride == 1 && some % 8 == 0)
                       for (; r + 8 <= count; r += 8)
                         for (int64_t k = 0; k < some; k += 8) {
                           BFloat16 block[8][8];
                           for (int j = 0; j < 8; ++j)
                             copy_words(block[j], from + r + at[t0 + k + j], 1, 8);
                           transpose_words(to + r * depth + k, depth, block[0], 8);
                         }
                     int length[depth], runs = 0;  // terms side by side in memory
                     for (int64_t k = 0; k < some; k += length[runs++])
                       length[runs] = run_length(at + t0 + k, some - k);
                     for (; r < count; ++r) {
                       const BFloat16* const row = from + r * call.lane_stride;
                       int64_t k = 0;
                       if (runs == some)
                         for (; k < some; ++k) to[r * depth + k] = row[at[t0 + k]];
                       for (int i = 0; k < some; k += length[i++])
                         copy_words(to + r * depth + k, row + at[t0 + k], length[i]);
                     }
                   }
                 }
               });
  return {first_group,
          groups,
          first,
          rows,
          {packed, depth, term_groups * tile_words, tile_words},
          tiles * term_groups * tile_words};
}

// Writes the pixels of one grid for the channels that the weights are of. Returns false to decline;
// `nan` becomes true if a NaN was written.
template <class Unit>
bool multiply_grid(const Images<BFloat16>& call, const GridAxis (&grid)[3], const Weights& weights,
                   const MatrixLimits& limits, bool& nan) {
  const int64_t taps = call.kernel[0] * call.kernel[1] * call.kernel[2];
  const int64_t groups = up(call.image_channels * taps, depth);
  const int64_t pixels = call.batch * grid[0].count * grid[1].count * grid[2].count;
  const int64_t row_tiles = up(weights.rows, side);
  const int64_t threads = thread_count();

  // Boxes of pixels; the groups of terms in chunks, if not all of them fit.
  const int64_t bytes_of_group = depth * int64_t{sizeof(BFloat16)};
  int64_t box_pixels = least(limits.panel_bytes / (groups * bytes_of_group), limits.most_pixels);
  box_pixels = least(box_pixels, up(pixels, up(threads, weights.groups)));
  box_pixels = up(most(box_pixels, 1), 2 * side) * 2 * side;
  int64_t chunk, chunk_channels, piece_length;
  for (;; box_pixels = 4 * side) {
    const Pieces pieces(grid, box_pixels);
    const Layout patch(grid, pieces);
    chunk = least(groups, most(1, limits.panel_bytes / (box_pixels * bytes_of_group)));
    for (;; chunk = up(chunk, 2)) {
      chunk_channels = least(call.image_channels, up(chunk * depth - 1, taps) + 1);
      piece_length = patch.channel * chunk_channels;
      if (chunk == 1 ||
          pieces.count * piece_length * int64_t{sizeof(BFloat16)} <= limits.patch_bytes)
        break;
    }
    if (patch.channel * call.image_channels > INT32_MAX ||
        pieces.count * piece_length > INT32_MAX / 8)
      return false;
    if (chunk == groups || box_pixels <= 4 * side) break;
  }
  const Pieces pieces(grid, box_pixels);
  const Layout patch(grid, pieces), image_itself(grid, call.image_stride);

  // The last element of the image's memory, and the offsets of the terms in both layouts; -1 for
  // those that these pixels have not.
  bool in_place = readable_in_place(grid, call.image_stride);
  int64_t image_end = (call.batch - 1) * call.image_stride[0] +
                      (call.groups * call.image_channels - 1) * call.image_stride[1] + 1;
  for (int a = 0; a < 3; ++a) image_end += (grid[a].image_size - 1) * call.image_stride[a + 2];
  in_place = in_place && image_end <= INT32_MAX;
  Arena& plan = plan_arena();
  plan.reset(2 * Arena::bytes_for<int32_t>(groups * depth));
  int32_t* const patch_offset = plan.take<int32_t>(groups * depth);
  int32_t* const image_offset = plan.take<int32_t>(groups * depth);
  for (int64_t t = 0; t < groups * depth; ++t) patch_offset[t] = image_offset[t] = -1;
  int64_t most_offset = 0;
  for (int64_t d = 0; d < grid[0].taps; ++d)
    for (int64_t h = 0; h < grid[1].taps; ++h)
      for (int64_t w = 0; w < grid[2].taps; ++w) {
        const int64_t tap[3] = {d, h, w};
        int64_t number = 0, in_patch = 0, in_image = 0;
        for (int a = 0; a < 3; ++a) {
          const int64_t shift = grid[a].shift(tap[a]);
          number = number * call.kernel[a] + grid[a].tap(tap[a]);
          in_patch += patch.tap(a, shift);
          if (in_place) in_image += image_itself.tap(a, shift);
        }
        for (int64_t c = 0; c < call.image_channels; ++c) {
          patch_offset[c * taps + number] = static_cast<int32_t>(c * patch.channel + in_patch);
          if (!in_place) continue;
          const int64_t offset = c * image_itself.channel + in_image;
          image_offset[c * taps + number] = static_cast<int32_t>(offset);
          most_offset = most(most_offset, offset);
        }
      }

  const int64_t boxes = up(pixels, box_pixels);
  int64_t row_blocks = 1;
  if (boxes * weights.groups < threads)
    row_blocks = least(up(threads, boxes * weights.groups), up(row_tiles, 2));
  const int64_t tasks = weights.groups * row_blocks * boxes;
  parallel_for(tasks, 1, FloatEnvironment::flush, [&](int64_t begin, int64_t end) {
    Arena& arena = task_arena();
    const int64_t most_tiles = box_pixels / side;
    const int64_t block_tiles = up(row_tiles, row_blocks);
    const int64_t panel_size = most_tiles * chunk * tile_words + tile_words;
    const int64_t patch_size = pieces.count * piece_length + tile_words;
    const int64_t total_size = (chunk < groups ? block_tiles * most_tiles : 4) * tile_totals + side;
    arena.reset(Arena::bytes_for<BFloat16>(panel_size) + Arena::bytes_for<BFloat16>(patch_size) +
                Arena::bytes_for<float>(total_size) + Arena::bytes_for<Run>(box_pixels) +
                Arena::bytes_for<int32_t>(most_tiles + 1) + Arena::bytes_for<int64_t>(box_pixels) +
                Arena::bytes_for<float>(block_tiles * side) +
                Arena::bytes_for<int64_t>(block_tiles * side));
    BFloat16* const panel = arena.take<BFloat16>(panel_size);
    BFloat16* const patches = arena.take<BFloat16>(patch_size);
    float* const totals = arena.take<float>(total_size);
    Run* const run = arena.take<Run>(box_pixels);
    int32_t* const first_run = arena.take<int32_t>(most_tiles + 1);
    int64_t* const position = arena.take<int64_t>(box_pixels);
    float* const bias = arena.take<float>(block_tiles * side);
    int64_t* const channel_at = arena.take<int64_t>(block_tiles * side);
    bool task_nan = false;
    Unit unit;

    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % boxes * box_pixels, last = least(pixels, first + box_pixels);
      const int64_t row_block = task / boxes % row_blocks;
      const int64_t group = weights.first_group + task / boxes / row_blocks;
      const int64_t tile0 = cut_at(row_tiles, row_blocks, row_block);
      const int64_t tile1 = cut_at(row_tiles, row_blocks, row_block + 1);
      const int64_t rows = least(weights.rows, tile1 * side) - tile0 * side;
      const int64_t tiles = up(last - first, side);
      const BFloat16* const image = call.image + group * call.image_channels * call.image_stride[1];
      const int64_t channel0 = group * call.lanes + weights.first + tile0 * side;
      for (int64_t r = 0; r < rows; ++r) {
        bias[r] = call.bias ? widened(call.bias[channel0 + r]) : 0.0f;
        channel_at[r] = (channel0 + r) * call.target_stride[1];
      }

      // The runs of the pixels, in the image itself unless a vector could reach beyond its memory.
      const auto find_runs = [&](const Layout& layout) {
        int64_t runs = 0, most_at = 0;
        each_run(grid, pieces, layout, call.image_stride[0], piece_length, first, last, side,
                 [&](int64_t pixel, int64_t length, int64_t at, int64_t n, const int64_t* where) {
                   if (pixel % side == 0) first_run[pixel / side] = static_cast<int32_t>(runs);
                   run[runs++] = {at, static_cast<int32_t>(pixel % side),
                                  static_cast<int32_t>(length)};
                   most_at = most(most_at, at);
                   int64_t to = n * call.target_stride[0];
                   for (int a = 0; a < 3; ++a)
                     to += (grid[a].first + where[a] * grid[a].step) * call.target_stride[a + 2];
                   for (int64_t i = 0; i < length; ++i)
                     position[pixel + i] = to + i * grid[2].step * call.target_stride[4];
                 });
        first_run[tiles] = static_cast<int32_t>(runs);
        return most_at;
      };
      bool here = in_place;
      if (here)
        here = find_runs(image_itself) + most_offset + side +
                   group * call.image_channels * call.image_stride[1] <=
               image_end;
      if (!here) find_runs(patch);

      for (int64_t g0 = 0; g0 < groups; g0 += chunk) {
        const int64_t g1 = least(groups, g0 + chunk);
        const int64_t c0 = g0 * depth / taps;
        const int64_t c1 = least(call.image_channels, up(g1 * depth, taps));
        if (!here)
          each_piece(grid, pieces, first, last, [&](int64_t n, const Box& box, int64_t piece) {
            fill_patch(patches + piece * piece_length, patch, grid, box,
                       image + n * call.image_stride[0] + c0 * call.image_stride[1],
                       call.image_stride, c1 - c0);
          });
        const BFloat16* const source = here ? image : patches;
        const int64_t origin = here ? 0 : -c0 * patch.channel;
        const int32_t* const offset = here ? image_offset : patch_offset;
        const int64_t column_tile = (g1 - g0) * tile_words;
        for (int64_t j = 0; j < tiles; ++j)
          pack_columns(panel + j * column_tile, run + first_run[j], run + first_run[j + 1], source,
                       origin, offset + g0 * depth, (g1 - g0) * depth / 2);

        RowTiles of_rows = weights.tiles;
        of_rows.data += (group - weights.first_group) * weights.group + g0 * of_rows.group;
        for (int64_t i = tile0; i < tile1; i += 2)
          for (int64_t j = 0; j < tiles; j += 2) {
            const bool two_rows = i + 1 < tile1, two_columns = j + 1 < tiles;
            const int64_t pitch = chunk < groups ? most_tiles : 2;
            float* const total =
                totals + (chunk < groups ? (i - tile0) * pitch + j : 0) * tile_totals;
            RowTiles from = of_rows;
            from.data += i * of_rows.tile;
            multiply_tiles<Unit>(two_rows, two_columns, from, panel + j * column_tile, column_tile,
                                 g1 - g0, total, pitch, g0 > 0);
            if (g1 < groups) continue;
            for (int64_t x = 0; x <= two_rows; ++x)
              for (int64_t y = 0; y <= two_columns; ++y) {
                const int64_t r = (i + x - tile0) * side, c = (j + y) * side;
                task_nan |= store_tile(total + (x * pitch + y) * tile_totals,
                                       static_cast<int>(least(rows - r, side)),
                                       static_cast<int>(least(last - first - c, side)), bias + r,
                                       call.target, channel_at + r, position + c);
              }
          }
      }
    }
    if (task_nan) __atomic_store_n(&nan, true, __ATOMIC_RELAXED);
  });
  return true;
}

// All grids of a call: one, or the stride phases of grad_input.
template <class Unit>
bool multiply_grids(const Images<BFloat16>& call, const ConvShape& s, bool forward,
                    const MatrixLimits& limits, bool& nan) {
  const int64_t terms = call.image_channels * call.kernel[0] * call.kernel[1] * call.kernel[2];
  const int64_t row_bytes = up(terms, depth) * depth * int64_t{sizeof(BFloat16)};
  const int64_t most_rows = limits.weight_bytes / row_bytes / (2 * side) * 2 * side;
  if (most_rows == 0) return false;
  const bool all = call.groups * up(call.lanes, side) * side <= most_rows;
  const int64_t group_step = all ? call.groups : 1;
  const int64_t row_step = least(call.lanes, least(most_rows, 2048));
  const int64_t phases[3] = {forward ? 1 : least(s.axis[0].stride, s.axis[0].in),
                             forward ? 1 : least(s.axis[1].stride, s.axis[1].in),
                             forward ? 1 : least(s.axis[2].stride, s.axis[2].in)};
  for (int64_t group = 0; group < call.groups; group += group_step)
    for (int64_t row = 0; row < call.lanes; row += row_step) {
      const Weights weights =
          weights_of(call, group, group_step, row, least(row_step, call.lanes - row));
      for (int64_t d = 0; d < phases[0]; ++d)
        for (int64_t h = 0; h < phases[1]; ++h)
          for (int64_t w = 0; w < phases[2]; ++w) {
            const int64_t phase[3] = {d, h, w};
            GridAxis grid[3];
            for (int a = 0; a < 3; ++a)
              grid[a] = forward ? forward_axis(s.axis[a]) : gradient_axis(s.axis[a], phase[a]);
            if (grid[0].taps * grid[1].taps * grid[2].taps == 0) {
              if (group == 0 && row == 0) store_bias(call, grid);
            } else if (!multiply_grid<Unit>(call, grid, weights, limits, nan)) {
              return false;
            }
          }
    }
  return true;
}

// ---- grad_weight
// ----------------------------------------------------------------------------------------

// The gradient of `channels` output channels at the pixels [first, first + terms) of a sample, as
// the columns of one tile; +0 where there is none.
inline void pack_gradient(BFloat16* to, const BFloat16* grad, const int64_t* grad_stride,
                          const Axis (&axis)[3], bool consecutive, int64_t channels, int64_t first,
                          int64_t terms) {
  BFloat16 column[side][depth];
  if (consecutive && channels == side && terms == depth)
    return pack_transposed(to, grad + first * grad_stride[4], grad_stride[1]);
  int64_t at[3], rest = first;
  for (int a = 2; a >= 0; --a) at[a] = rest % axis[a].out, rest /= axis[a].out;
  zero_words(column[0], tile_words);
  BFloat16 row[depth][side] = {};
  for (int64_t t = 0; t < terms; ++t) {
    const BFloat16* const from =
        grad + at[0] * grad_stride[2] + at[1] * grad_stride[3] + at[2] * grad_stride[4];
    if (grad_stride[1] == 1)
      copy_words(row[t], from, 1, channels);
    else
      for (int64_t c = 0; c < channels; ++c) column[c][t] = from[c * grad_stride[1]];
    for (int a = 2; a >= 0 && ++at[a] == axis[a].out; --a) at[a] = 0;
  }
  if (grad_stride[1] != 1) return pack_transposed(to, column[0], depth);
  using V = Vec<float>;
  for (int k = 0; k < depth / 2; ++k)
    for (int i = 0; i < side; i += V::lanes)
      V::pairs(row[2 * k] + i, row[2 * k + 1] + i)
          .store(reinterpret_cast<float*>(to) + k * side + i);
}

template <class Unit>
bool multiply_taps(const ConvProblem& p, const MatrixLimits& limits) {
  const ConvShape& s = p.shape;
  const int64_t pixels = s.outputs(), taps = s.taps();
  const int64_t* const image_stride = p.input.stride;
  const int64_t* const grad_stride = p.output.stride;
  const int64_t* const weight_stride = p.weight.stride;
  const GridAxis grid[3] = {forward_axis(s.axis[0]), forward_axis(s.axis[1]),
                            forward_axis(s.axis[2])};
  const int64_t threads = thread_count();

  // Blocks of the gradient, some input channels x some output channels, whose operands for a chunk
  // of pixels and whose totals fit the second cache.
  constexpr int64_t usual_groups = 16;
  const int64_t group_bytes = depth * int64_t{sizeof(BFloat16)};
  int64_t block_channels =
      most(1, least(s.group_in(), limits.panel_bytes / (usual_groups * group_bytes) / taps));
  const int64_t chunk =
      most(1, least(least(2 * usual_groups, up(pixels, depth)),
                    limits.panel_bytes / (group_bytes * up(block_channels * taps, side) * side)));
  const Pieces pieces(grid, chunk * depth);
  const Layout patch(grid, pieces), image_itself(grid, image_stride);
  const int64_t patch_words = pieces.count * patch.channel;
  if (patch_words > INT32_MAX / 8) return false;
  block_channels = most(
      1, least(block_channels, limits.patch_bytes / (patch_words * int64_t{sizeof(BFloat16)})));
  int64_t channel_blocks = up(s.group_in(), block_channels);
  const int64_t most_filters = least(
      512, limits.patch_bytes / (block_channels * taps * int64_t{sizeof(float)}) / side * side);
  int64_t filter_blocks = up(s.group_out(), most(most_filters, side));
  if (s.groups * channel_blocks * filter_blocks < threads)
    channel_blocks = least(s.group_in(), up(threads, s.groups * filter_blocks));
  if (s.groups * channel_blocks * filter_blocks < threads)
    filter_blocks = least(up(s.group_out(), side), up(threads, s.groups * channel_blocks));
  block_channels = up(s.group_in(), channel_blocks);
  const int64_t filter_tiles = up(s.group_out(), side);

  const bool in_place = readable_in_place(grid, image_stride);
  int64_t image_end = (s.batch - 1) * image_stride[0] + (s.in_channels - 1) * image_stride[1] + 1;
  for (int a = 0; a < 3; ++a) image_end += (s.axis[a].in - 1) * image_stride[a + 2];
  bool consecutive = grad_stride[4] == 1;  // the pixels of a channel of the gradient
  consecutive = consecutive && (s.axis[1].out == 1 || grad_stride[3] == s.axis[2].out);
  consecutive =
      consecutive && (s.axis[0].out == 1 || grad_stride[2] == s.axis[1].out * s.axis[2].out);

  const int64_t tasks = s.groups * channel_blocks * filter_blocks;
  parallel_for(tasks, 1, FloatEnvironment::flush, [&](int64_t begin, int64_t end) {
    const int64_t most_rows = up(block_channels * taps, side) * side;
    const int64_t most_columns = up(filter_tiles, filter_blocks) * side;
    const int64_t piece_length = patch.channel * block_channels;
    const int64_t row_size = (most_rows + side) * chunk * depth;
    const int64_t column_size = most_columns * chunk * depth;
    const int64_t patch_size = pieces.count * piece_length + tile_words;
    const int64_t total_size = most_rows * most_columns + side;
    Arena& arena = task_arena();
    arena.reset(Arena::bytes_for<BFloat16>(row_size) + Arena::bytes_for<BFloat16>(column_size) +
                Arena::bytes_for<BFloat16>(patch_size) + Arena::bytes_for<float>(total_size) +
                3 * Arena::bytes_for<int64_t>(most_rows) + Arena::bytes_for<float>(side) +
                Arena::bytes_for<int64_t>(most_columns) + Arena::bytes_for<Run>(chunk * depth) +
                Arena::bytes_for<int32_t>(chunk + 1));
    BFloat16* const rows_panel = arena.take<BFloat16>(row_size);
    BFloat16* const columns_panel = arena.take<BFloat16>(column_size);
    BFloat16* const patches = arena.take<BFloat16>(patch_size);
    float* const totals = arena.take<float>(total_size);
    int64_t* const patch_offset = arena.take<int64_t>(most_rows);
    int64_t* const image_offset = arena.take<int64_t>(most_rows);
    int64_t* const row_at = arena.take<int64_t>(most_rows);
    float* const no_bias = arena.take<float>(side);
    int64_t* const column_at = arena.take<int64_t>(most_columns);
    Run* const run = arena.take<Run>(chunk * depth);
    int32_t* const first_run = arena.take<int32_t>(chunk + 1);
    for (int i = 0; i < side; ++i) no_bias[i] = 0;
    Unit unit;

    for (int64_t task = begin; task < end; ++task) {
      const int64_t channel_block = task % channel_blocks;
      const int64_t filter_block = task / channel_blocks % filter_blocks;
      const int64_t group = task / channel_blocks / filter_blocks;
      const int64_t channel0 = cut_at(s.group_in(), channel_blocks, channel_block);
      const int64_t channel1 = cut_at(s.group_in(), channel_blocks, channel_block + 1);
      const int64_t filter0 = cut_at(filter_tiles, filter_blocks, filter_block) * side;
      const int64_t filter1 =
          least(s.group_out(), cut_at(filter_tiles, filter_blocks, filter_block + 1) * side);
      const int64_t rows = (channel1 - channel0) * taps, row_tiles = up(rows, side);
      const int64_t columns = filter1 - filter0, column_tiles = up(columns, side);
      const int64_t image_at = (group * s.group_in() + channel0) * image_stride[1];
      const BFloat16* const grad = static_cast<const BFloat16*>(p.output.data) +
                                   (group * s.group_out() + filter0) * grad_stride[1];

      int64_t r = 0, most_offset = 0;
      for (int64_t c = 0; c < channel1 - channel0; ++c)
        for (int64_t d = 0; d < s.axis[0].kernel; ++d)
          for (int64_t h = 0; h < s.axis[1].kernel; ++h)
            for (int64_t w = 0; w < s.axis[2].kernel; ++w, ++r) {
              const int64_t tap[3] = {d, h, w};
              patch_offset[r] = c * patch.channel;
              image_offset[r] = c * image_itself.channel;
              row_at[r] = (channel0 + c) * weight_stride[1];
              for (int a = 0; a < 3; ++a) {
                patch_offset[r] += patch.tap(a, grid[a].shift(tap[a]));
                if (in_place) image_offset[r] += image_itself.tap(a, grid[a].shift(tap[a]));
                row_at[r] += tap[a] * weight_stride[a + 2];
              }
              most_offset = most(most_offset, image_offset[r]);
            }
      for (int64_t c = 0; c < columns; ++c)
        column_at[c] = (group * s.group_out() + filter0 + c) * weight_stride[0];

      // The totals begin with the earlier ones.
      for (int64_t i = 0; i < row_tiles * column_tiles * tile_totals; ++i) totals[i] = 0;
      if (p.total != nullptr) {
        const float* const earlier = static_cast<const float*>(p.total);
        for (int64_t c = 0; c < columns; ++c)
          for (int64_t i = 0; i < rows; ++i) {
            const int64_t filter = group * s.group_out() + filter0 + c;
            totals[(i / side * column_tiles + c / side) * tile_totals + i % side * side +
                   c % side] = flushed(earlier[filter * s.group_in() * taps + channel0 * taps + i]);
          }
      }

      for (int64_t n = 0; n < s.batch; ++n)
        for (int64_t first = 0; first < pixels; first += chunk * depth) {
          const int64_t last = least(pixels, first + chunk * depth);
          const int64_t groups = up(last - first, depth);
          const BFloat16* const image =
              static_cast<const BFloat16*>(p.input.data) + image_at + n * image_stride[0];
          const auto find_runs = [&](const Layout& layout) {
            int64_t runs = 0, most_at = 0;
            each_run(grid, pieces, layout, image_stride[0], piece_length, first, last, depth,
                     [&](int64_t pixel, int64_t length, int64_t at, int64_t, const int64_t*) {
                       if (pixel % depth == 0)
                         first_run[pixel / depth] = static_cast<int32_t>(runs);
                       run[runs++] = {at, static_cast<int32_t>(pixel % depth),
                                      static_cast<int32_t>(length)};
                       most_at = most(most_at, at);
                     });
            first_run[groups] = static_cast<int32_t>(runs);
            return most_at;
          };
          bool here = in_place;
          if (here)
            here = find_runs(image_itself) + most_offset + depth + image_at + n * image_stride[0] <=
                   image_end;
          if (!here) {
            find_runs(patch);
            each_piece(grid, pieces, first, last, [&](int64_t, const Box& box, int64_t piece) {
              fill_patch(patches + piece * piece_length, patch, grid, box, image, image_stride,
                         channel1 - channel0);
            });
          }

          for (int64_t i = 0; i < row_tiles; ++i)
            for (int64_t g = 0; g < groups; ++g)
              pack_rows(rows_panel + (i * groups + g) * tile_words, run + first_run[g],
                        run + first_run[g + 1], here ? image : patches,
                        (here ? image_offset : patch_offset) + i * side,
                        least(rows - i * side, side), least(last - first - g * depth, depth));
          for (int64_t j = 0; j < column_tiles; ++j)
            for (int64_t g = 0; g < groups; ++g)
              pack_gradient(columns_panel + (j * groups + g) * tile_words,
                            grad + n * grad_stride[0] + j * side * grad_stride[1], grad_stride,
                            s.axis, consecutive, least(columns - j * side, side), first + g * depth,
                            least(last - first - g * depth, depth));

          const int64_t column_tile = groups * tile_words;
          for (int64_t i = 0; i < row_tiles; i += 2)
            for (int64_t j = 0; j < column_tiles; j += 2) {
              const RowTiles from{rows_panel + i * column_tile, depth, column_tile, tile_words};
              multiply_tiles<Unit>(i + 1 < row_tiles, j + 1 < column_tiles, from,
                                   columns_panel + j * column_tile, column_tile, groups,
                                   totals + (i * column_tiles + j) * tile_totals, column_tiles,
                                   true);
            }
        }

      for (int64_t i = 0; i < row_tiles; ++i)
        for (int64_t j = 0; j < column_tiles; ++j) {
          const float* const total = totals + (i * column_tiles + j) * tile_totals;
          const int some_rows = static_cast<int>(least(rows - i * side, side));
          const int some_columns = static_cast<int>(least(columns - j * side, side));
          if (p.keep_total)
            store_tile(total, some_rows, some_columns, no_bias, static_cast<float*>(p.weight.data),
                       row_at + i * side, column_at + j * side);
          else
            store_tile(total, some_rows, some_columns, no_bias,
                       static_cast<BFloat16*>(p.weight.data), row_at + i * side,
                       column_at + j * side);
        }
    }
  });
  return true;
}

// ---- a call
// -----------------------------------------------------------------------------------------------

template <class Unit>
bool run_matrix_unit(const ConvProblem& p, const MatrixLimits& limits) {
  const ConvShape& s = p.shape;
  const bool forward = p.direction == Direction::forward;
  if (p.dtype != DType::bfloat16 || p.direction == Direction::grad_bias || s.batch == 0 ||
      s.outputs() == 0 || s.inputs() == 0 || s.taps() == 0)
    return false;
  if (least(s.group_out(), p.direction == Direction::grad_weight ? s.group_in() * s.taps()
                           : forward ? s.group_in() * s.taps()
                                     : s.group_in()) < most(limits.least_channels, 1))
    return false;
  if (s.batch * s.outputs() * s.taps() * s.group_in() * s.out_channels < limits.least_work)
    return false;
  if (p.direction == Direction::grad_weight) return multiply_taps<Unit>(p, limits);

  if (shows_sign_of_zero<BFloat16>(p)) return false;
  const RawView& image = forward ? p.input : p.output;
  const RawView& target = forward ? p.output : p.input;
  const int64_t filter = p.weight.stride[0], channel = p.weight.stride[1];
  const Images<BFloat16> call{static_cast<const BFloat16*>(image.data),
                              image.stride,
                              static_cast<BFloat16*>(target.data),
                              target.stride,
                              static_cast<const BFloat16*>(p.weight.data),
                              p.weight.stride,
                              forward ? filter : channel,
                              forward ? channel : filter,
                              filter * s.group_out(),
                              static_cast<const BFloat16*>(p.bias),
                              s.batch,
                              s.groups,
                              forward ? s.group_in() : s.group_out(),
                              forward ? s.group_out() : s.group_in(),
                              {s.axis[0].kernel, s.axis[1].kernel, s.axis[2].kernel}};
  bool nan = false;
  if (!multiply_grids<Unit>(call, s, forward, limits, nan)) return false;
  // As in dense_grad_input: where a tap meets no output the weight was multiplied by +0, which is
  // the term that does not exist unless the weight is not finite.
  const int64_t size[5] = {s.out_channels, s.group_in(), s.axis[0].kernel, s.axis[1].kernel,
                           s.axis[2].kernel};
  return forward || !nan || all_finite<BFloat16>(p.weight, size);
}

}  // namespace torch_naiveconv::TNC_ISA
