// What goes into tiles and comes out of them: rows and columns packed from runs of pixels, totals
// rounded and stored.
#pragma once

#include "amx_patches.h"

namespace torch_naiveconv::TNC_ISA {

// The columns of one tile: `pairs` pairs of terms of 16 pixels. A term that these pixels have not
// has the offset -1. Every line is stored whole, if that can be: a tile waits long for one that is
// not.
inline void pack_columns(BFloat16* to, const Run* run, const Run* run_end, const BFloat16* source,
                         int64_t origin, const int32_t* offset, int64_t pairs, bool all_exist) {
  using V = Vec<float>;
  static constexpr BFloat16 none[side] = {};
  float* pair = reinterpret_cast<float*>(to);
  const int64_t first = origin + run->at;
  if (run_end - run == 1 && all_exist) {
    for (int64_t k = 0; k < pairs; ++k, pair += side)
      for (int i = 0; i < side; i += V::lanes)
        V::pairs(source + (first + i + offset[2 * k]), source + (first + i + offset[2 * k + 1]))
            .store(pair + i);
    return;
  }
  if (run_end - run <= 3) {
    int64_t at[3] = {};  // of the first column, if it were of the run
    uint32_t columns[3] = {};
    for (int64_t i = 0; i < run_end - run; ++i) {
      at[i] = origin + run[i].at - run[i].column;
      columns[i] = ((1u << run[i].length) - 1) << run[i].column;
    }
    for (int64_t k = 0; k < pairs; ++k, pair += side)
      if (columns[2] == 0)
        V::merge_pairs<2>(source, at, columns, offset[2 * k], offset[2 * k + 1], pair);
      else
        V::merge_pairs<3>(source, at, columns, offset[2 * k], offset[2 * k + 1], pair);
    return;
  }
  for (int64_t k = 0; k < pairs; ++k, pair += side) {
    const int64_t even = offset[2 * k], odd = offset[2 * k + 1];
    for (const Run* r = run; r < run_end; ++r) {
      const BFloat16* const a = even < 0 ? none : source + (origin + even + r->at);
      const BFloat16* const b = odd < 0 ? none : source + (origin + odd + r->at);
      for (int i = 0; i < side - r->column; i += V::lanes)
        V::pairs(a + i, b + i)
            .store(pair + r->column + i, static_cast<int>(least(side - r->column - i, V::lanes)));
    }
  }
}

// The columns of two tiles whose pixels are 32 neighbours: the tiles take turns after every four
// pixels, which is how vectors interleave.
inline void pack_woven(BFloat16* to, int64_t tile, const BFloat16* source, int64_t origin,
                       const int32_t* offset, int64_t pairs, bool all_exist) {
  static constexpr BFloat16 none[2 * side] = {};
  for (int64_t k = 0; k < pairs; ++k, to += 2 * side) {
    const int64_t even = offset[2 * k], odd = offset[2 * k + 1];
    Vec<float>::weave(all_exist || even >= 0 ? source + (origin + even) : none,
                      all_exist || odd >= 0 ? source + (origin + odd) : none,
                      reinterpret_cast<float*>(to), reinterpret_cast<float*>(to + tile));
  }
}
inline void unweave_totals(float* total, float* next) {
  for (int r = 0; r < side; ++r) Vec<float>::unweave(total + r * side, next + r * side);
}

// The rows of one tile and one group: 32 pixels of `rows` taps.
inline void pack_rows(BFloat16* to, const Run* run, const Run* run_end, const BFloat16* source,
                      const int64_t* offset, int64_t rows, int64_t terms) {
  if (terms == depth && run_end - run <= 3) {
    int64_t at[3] = {};  // of the first term, if it were of the run
    uint32_t some[3] = {};
    for (int64_t i = 0; i < run_end - run; ++i) {
      at[i] = run[i].at - run[i].column;
      some[i] = (~uint32_t{0} >> (depth - run[i].length)) << run[i].column;
    }
    for (int64_t r = 0; r < rows; ++r, to += depth)
      if (run_end - run == 1)
        copy_words(to, source + (offset[r] + at[0]), depth);
      else if (run_end - run == 2)
        Vec<float>::merge_words<2>(source + offset[r], at, some, to);
      else
        Vec<float>::merge_words<3>(source + offset[r], at, some, to);
    return;
  }
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

// rounded[r][c] = canonical(total[r][c] + bias[r]). Says whether a NaN was among them.
template <class D>
bool round_tile(D (&rounded)[side][side], const float* total, int rows, int columns,
                const float* bias) {
  using V = Vec<float>;
  auto nan = is_nan(V::zero());
  for (int c = 0; c < columns; c += V::lanes)
    for (int r = 0; r < rows; ++r) {
      const int some = columns - c < V::lanes ? columns - c : V::lanes;
      const V sum = V::load(total + r * side + c, some) + V::broadcast(bias[r]);
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

// to[j][i] = from[i][j] of a tile of totals
inline void transpose_tile(float* to, const float* from) {
  using V = Vec<float>;
  constexpr int L = V::lanes;
  for (int i = 0; i < side; i += L)
    for (int j = 0; j < side; j += L) {
      V block[L];
#pragma GCC unroll 16
      for (int k = 0; k < L; ++k) block[k] = V::load(from + (i + k) * side + j);
      V::transpose(block);
#pragma GCC unroll 16
      for (int k = 0; k < L; ++k) block[k].store(to + (j + k) * side + i);
    }
}

// to[row_at[r] + column_at[c]] = canonical(total[r][c] + bias[r]), rounded to D. Says whether a NaN
// was among them.
template <class D>
bool store_tile(const float* total, int rows, int columns, const float* bias, D* to,
                const int64_t* row_at, const int64_t* column_at) {
  using V = Vec<float>;
  constexpr int L = V::lanes;
  const int along_row = run_length(column_at, columns);
  if (along_row == side) {
    auto nan = is_nan(V::zero());
    for (int r = 0; r < rows; ++r, total += side)
      for (int c = 0; c < side; c += L) {
        const V sum = V::load(total + c) + V::broadcast(bias[r]);
        nan = V::either(nan, is_nan(sum));
        stored_as<D>(sum).store(to + row_at[r] + column_at[0] + c);
      }
    return V::any(nan);
  }
  if constexpr (is_half_type<D>) {
    if (rows > 1 && run_length(row_at, rows) == rows) {  // columns lie along the memory
      alignas(64) float turned[side * side];
      transpose_tile(turned, total);
      return store_rows_of_tile(turned, columns, rows, bias, to + row_at[0], column_at);
    }
  }
  alignas(64) D rounded[side][side];
  const bool nan = round_tile(rounded, total, rows, columns, bias);
  if constexpr (is_half_type<D>) {
    if (columns > 1 && along_row >= 2) {  // rows lie along the memory
      for (int c = 0, length = along_row; c < columns;
           c += length, length = run_length(column_at + c, columns - c))
        for (int r = 0; r < rows; ++r)
          copy_words(to + row_at[r] + column_at[c], rounded[r] + c, length);
      return nan;
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < columns; ++c) to[row_at[r] + column_at[c]] = rounded[r][c];
  return nan;
}

// The same, if the rows are stride phases: groups of `beside` rows lie side by side in memory, if
// that is not 1. A row and a column that have a bit in common do not meet: the input that would be
// there does not exist.
inline bool store_phases(const float* total, int rows, int columns, const float* bias, BFloat16* to,
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
