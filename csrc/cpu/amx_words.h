// Moving 16-bit words: copies, zeros, transpositions.
#pragma once

#include "amx_unit.h"

namespace torch_naiveconv::TNC_ISA {

// The 8 x 8 words from[i][j] as eight pieces to(j)[i].
template <class To>
TNC_INLINE void transpose_block(const BFloat16* from, int64_t from_row, const To& to) {
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
  for (int i = 0; i < 8; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(to(i)), b[i]);
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
  if (n >= 32) return pieces_of(std::integral_constant<int64_t, 32>{});
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
    static constexpr BFloat16 zeros[32] = {};
    __builtin_memcpy(static_cast<void*>(to + i), zeros, length * sizeof(BFloat16));
  });
}
// to[i] = from[i] for first <= i < last, which alone are read, and 0 for the others of n. Writes
// whole vectors: up to 31 words behind the last.
inline void copy_padded(BFloat16* to, const BFloat16* from, int64_t first, int64_t last,
                        int64_t n) {
  using V = Vec<float>;
  for (int64_t i = 0; i < n; i += 32) {
    const int64_t begin = most(first - i, 0), length = least(last - i, 32) - begin;
    const uint32_t some = length <= 0 ? 0 : ~uint32_t{0} >> (32 - length) << begin;
    V::store_words(V::merge_words(V::Words{}, some, from + i), to + i);
  }
}
inline void zero_roughly(BFloat16* to, int64_t n) { copy_padded(to, to, 0, 0, n); }

// to[j][i] = from[i][j] for i < rows, j < columns. Blocks at the ends overlap those before.
inline void transpose_words(BFloat16* to, int64_t to_row, const BFloat16* from, int64_t from_row,
                            int64_t rows, int64_t columns) {
  const int64_t some_rows = least(rows, 8), some_columns = least(columns, 8);
  const int64_t words = (rows - 1) * from_row + columns;
  for (int64_t j = 0; j < columns; j += 8)
    for (int64_t i = 0; i < rows; i += 8) {
      const int64_t i0 = least(i, rows - some_rows), j0 = least(j, columns - some_columns);
      const BFloat16* const block = from + i0 * from_row + j0;
      BFloat16* const turned = to + j0 * to_row + i0;
      // Few columns are read with what follows them, if that is the next rows.
      if (some_rows == 8 && (some_columns == 8 || (i0 + 7) * from_row + 8 <= words)) {
        BFloat16 unused[8];
        transpose_block(block, from_row,
                        [&](int y) { return y < some_columns ? turned + y * to_row : unused; });
        continue;
      }
      BFloat16 a[8][8], b[8][8];
      for (int64_t x = 0; x < some_rows; ++x) copy_words(a[x], block + x * from_row, some_columns);
      transpose_block(a[0], 8, [&](int y) { return b[y]; });
      for (int64_t y = 0; y < some_columns; ++y) copy_words(turned + y * to_row, b[y], some_rows);
    }
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

}  // namespace torch_naiveconv::TNC_ISA
