// What goes into tiles and comes out of them: rows and columns packed from runs of pixels, totals
// rounded and stored.
#pragma once

#include "amx_patches.h"

namespace torch_naiveconv::TNC_ISA {

// 32 words: those of each run at their place from `from`. How many runs there are is known to the
// compiler, if they are few.
enum GatherOf { whole_run, two_halves, at_most_2, at_most_3, at_most_4, any_number };

template <int Of>
struct Gather {
  using V = Vec<float>;
  static constexpr int most_runs = Of == whole_run ? 1 : Of == two_halves ? 2 : Of;
  Run run[most_runs];

  Gather(const Run* first, const Run* last) {
    for (int r = 0; r < most_runs; ++r) run[r] = first + r < last ? first[r] : Run{first->at, 0};
  }
  TNC_INLINE V::Words operator()(const BFloat16* from) const {
    if constexpr (Of == whole_run) return V::load_words(from + run[0].at);
    if constexpr (Of == two_halves)
      return V::load_halves(from + run[0].at, from + (run[1].at + side));
    V::Words words{};
#pragma GCC unroll 4
    for (int r = 0; r < most_runs; ++r)
      words = V::merge_words(words, run[r].some, from + run[r].at);
    return words;
  }
};
template <>
struct Gather<any_number> {
  using V = Vec<float>;
  const Run *first, *last;

  Gather(const Run* run, const Run* run_end) : first(run), last(run_end) {}
  TNC_INLINE V::Words operator()(const BFloat16* from) const {
    V::Words words{};
    for (const Run* r = first; r < last; ++r) words = V::merge_words(words, r->some, from + r->at);
    return words;
  }
};
inline GatherOf gather_of(const Run* run, const Run* run_end) {
  constexpr uint32_t half = 0xffff;
  if (run->some == ~uint32_t{0}) return whole_run;
  if (run_end - run == 2 && run[0].some == half && run[1].some == half << side) return two_halves;
  return static_cast<GatherOf>(most(at_most_2, least(run_end - run, any_number)));
}
// Calls visit(of) with a constant.
template <class Visit>
void with_gather(GatherOf of, const Visit& visit) {
  if (of == whole_run) return visit(std::integral_constant<int, whole_run>{});
  if (of == two_halves) return visit(std::integral_constant<int, two_halves>{});
  if (of == at_most_2) return visit(std::integral_constant<int, at_most_2>{});
  if (of == at_most_3) return visit(std::integral_constant<int, at_most_3>{});
  if (of == at_most_4) return visit(std::integral_constant<int, at_most_4>{});
  visit(std::integral_constant<int, any_number>{});
}

// The columns of two tiles for a group: pairs of terms of 32 pixels, of which the tiles get four in
// turn, as vectors interleave them. Every line is stored whole: a tile waits long for one that is
// not. `all_exist`: else there are terms that these pixels have not, with the offset -1.
template <class Gather>
TNC_INLINE void pack_columns(BFloat16* to, int64_t tile, const Gather gather,
                             const BFloat16* source, int64_t origin, const int32_t* offset,
                             bool all_exist) {
  using V = Vec<float>;
  const auto pack = [&](const auto& words) {
#pragma GCC unroll 4
    for (int k = 0; k < depth; k += 2, to += 2 * side)
      V::weave(words(offset[k]), words(offset[k + 1]), reinterpret_cast<float*>(to),
               reinterpret_cast<float*>(to + tile));
  };
  if (all_exist)
    pack([&](int64_t at) { return gather(source + (origin + at)); });
  else
    pack([&](int64_t at) { return at < 0 ? V::Words{} : gather(source + (origin + at)); });
}

// The rows of one tile and one group: 32 pixels of `rows` taps.
inline void pack_rows(BFloat16* to, const Run* run, const Run* run_end, const BFloat16* source,
                      const int64_t* offset, int64_t rows) {
  with_gather(gather_of(run, run_end), [&](auto n) {
    const Gather<n> gather(run, run_end);
    for (int64_t r = 0; r < rows; ++r)
      Vec<float>::store_words(gather(source + offset[r]), to + r * depth);
  });
}

// to[j][i] = vector(i, j)[0]: a tile of 32-bit elements turned.
template <class Vectors>
void transpose_tile(float* to, const Vectors& vector) {
  using V = Vec<float>;
  constexpr int L = V::lanes;
  for (int i = 0; i < side; i += L)
    for (int j = 0; j < side; j += L) {
      V block[L];
#pragma GCC unroll 16
      for (int k = 0; k < L; ++k) block[k] = vector(i + k, j);
      V::transpose(block);
#pragma GCC unroll 16
      for (int k = 0; k < L; ++k) block[k].store(to + (j + k) * side + i);
    }
}

// The columns of one tile from its columns' consecutive terms: pairs of words are transposed.
inline void pack_transposed(BFloat16* to, const BFloat16* from, int64_t column) {
  transpose_tile(reinterpret_cast<float*>(to), [&](int i, int j) {
    return Vec<float>::load(reinterpret_cast<const float*>(from + i * column) + j);
  });
}

// Stores of 16-bit elements canonicalise by themselves.
template <class D>
TNC_INLINE Vec<float> stored_as(Vec<float> x) {
  if constexpr (is_half_type<D>) return x;
  return canonical(x);
}

// A tile of totals is given by a function: total(r, c) is the vector from there on.

// rounded[r][c] = canonical(total[r][c] + bias[r]). Says whether a NaN was among them.
template <class D, class Totals>
bool round_tile(D (&rounded)[side][side], const Totals& total, int rows, int columns,
                const float* bias) {
  using V = Vec<float>;
  auto nan = is_nan(V::zero());
  for (int c = 0; c < columns; c += V::lanes)
    for (int r = 0; r < rows; ++r) {
      const int some = columns - c < V::lanes ? columns - c : V::lanes;
      const V sum = V::select(V::first(some), total(r, c), V::zero()) + V::broadcast(bias[r]);
      nan = V::either(nan, is_nan(sum));
      stored_as<D>(sum).store(rounded[r] + c);
    }
  return V::any(nan);
}

// to[row_at[r] + c] = canonical(total[r][c] + bias[c]), rounded. Says whether a NaN was among them.
inline bool store_rows_of_tile(const float* total, int64_t rows, int64_t columns, const float* bias,
                               BFloat16* to, const int64_t* row_at) {
  using V = Vec<float>;
  auto nan = is_nan(V::zero());
  for (int64_t c = 0; c < columns; c += V::lanes) {
    const int some = static_cast<int>(least(columns - c, V::lanes));
    const V b = V::load(bias + c, some);
    for (int64_t r = 0; r < rows; ++r) {
      const V sum = V::load(total + r * side + c, some) + b;
      nan = V::either(nan, is_nan(sum));
      if (some == V::lanes)
        sum.store(to + row_at[r] + c);
      else
        sum.store(to + row_at[r] + c, some);
    }
  }
  return V::any(nan);
}

// to[row_at[r] + column_at[c]] = canonical(total[r][c] + bias[r]), rounded to D. Says whether a NaN
// was among them.
template <class D, class Totals>
bool store_tile(const Totals& total, int rows, int columns, const float* bias, D* to,
                const int64_t* row_at, const int64_t* column_at) {
  if constexpr (is_half_type<D>) {
    if (rows > 1 && run_length(row_at, rows) == rows) {  // columns lie along the memory
      alignas(64) float turned[side * side];
      transpose_tile(turned, total);
      return store_rows_of_tile(turned, columns, rows, bias, to + row_at[0], column_at);
    }
  }
  alignas(64) D rounded[side][side];
  const bool nan = round_tile(rounded, total, rows, columns, bias);
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < columns; ++c) to[row_at[r] + column_at[c]] = rounded[r][c];
  return nan;
}

// The same of two tiles that took turns, where columns lie along the memory: those of each run at
// their place from to + row_at[r].
inline bool store_runs(const float* first, const float* second, int rows, const float* bias,
                       BFloat16* to, const int64_t* row_at, const Run* run, const Run* run_end) {
  using V = Vec<float>;
  auto nan = is_nan(V::zero());
  for (int r = 0; r < rows; ++r, first += side, second += side) {
    const V::Words words = V::unwoven_sums(first, second, V::broadcast(bias[r]), nan);
    for (const Run* i = run; i < run_end; ++i)
      V::store_words(words, i->some, to + (row_at[r] + i->at));
  }
  return V::any(nan);
}

// The same, if the rows are stride phases: groups of `beside` rows lie side by side in memory, if
// that is not 1. A row and a column that have a bit in common do not meet: the input that would be
// there does not exist.
template <class Totals>
bool store_phases(const Totals& total, int rows, int columns, const float* bias, BFloat16* to,
                  const int64_t* row_at, const int64_t* column_at, const uint8_t* row_bits,
                  const uint8_t* column_bits, int beside) {
  using V = Vec<float>;
  uint8_t of_rows = 0, of_columns = 0;
  for (int r = 0; r < rows; ++r) of_rows |= row_bits[r];
  for (int c = 0; c < columns; ++c) of_columns |= column_bits[c];
  const bool all_meet = (of_rows & of_columns) == 0;
  if (beside == 1 && all_meet) return store_tile(total, rows, columns, bias, to, row_at, column_at);
  alignas(64) BFloat16 rounded[side][side];
  const bool nan = round_tile(rounded, total, rows, columns, bias);
  if (all_meet) {
    int length[side], runs = 0;
    for (int c = 0; c < columns; c += length[runs++])
      for (length[runs] = 1; c + length[runs] < columns; ++length[runs])
        if (column_at[c + length[runs]] != column_at[c] + length[runs] * beside) break;
    // Twice as long and half as many rows at a time, until it is one.
    alignas(64) BFloat16 merged[2][4 * side];
    const auto merge = [](BFloat16* to, const BFloat16* even, const BFloat16* odd, int words) {
      for (int c = 0; c < words; c += V::lanes)
        V::pairs(even + c, odd + c).store(reinterpret_cast<float*>(to) + c);
    };
    for (int r = 0; r < rows; r += beside) {
      if (beside == 4) {
        merge(merged[0], rounded[r], rounded[r + 2], side);
        merge(merged[0] + 2 * side, rounded[r + 1], rounded[r + 3], side);
        merge(merged[1], merged[0], merged[0] + 2 * side, 2 * side);
      } else if (runs == 1 && columns == side) {
        merge(to + row_at[r] + column_at[0], rounded[r], rounded[r + 1], side);
        continue;
      } else {
        merge(merged[1], rounded[r], rounded[r + 1], side);
      }
      for (int c = 0, i = 0; i < runs; c += length[i++])
        copy_words(to + row_at[r] + column_at[c], merged[1] + c * beside, length[i] * beside);
    }
    return nan;
  }
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < columns; ++c)
      if ((row_bits[r] & column_bits[c]) == 0) to[row_at[r] + column_at[c]] = rounded[r][c];
  return nan;
}

}  // namespace torch_naiveconv::TNC_ISA
