// Vec<float> and Vec<double> on AVX2 with FMA and F16C: see vec_generic.h for the contract of each
// function.
#pragma once

namespace torch_naiveconv::TNC_ISA {

template <class T>
struct Vec;

// The first n of 8 (or 4) lanes: a window into 8 ones and 8 zeros.
alignas(64) constexpr int32_t lane_window[16] = {-1, -1, -1, -1, -1, -1, -1, -1};

// 16-bit elements have no masked loads and stores: through a full vector on the stack.
template <class Narrow>
TNC_INLINE __m128i load_some(const Narrow* p, int n) {
  alignas(16) Narrow full[8] = {};
  for (int i = 0; i < n; ++i) full[i] = p[i];
  return _mm_load_si128(reinterpret_cast<const __m128i*>(full));
}
template <class Narrow>
TNC_INLINE void store_some(Narrow* p, __m128i bits, int n) {
  alignas(16) Narrow full[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(full), bits);
  for (int i = 0; i < n; ++i) p[i] = full[i];
}

template <>
struct Vec<float> {
  static constexpr int lanes = 8;
  static constexpr int registers = 16;
  static constexpr bool stores_apart = false;
  using Mask = __m256;
  __m256 v;

  static TNC_INLINE __m256i window(int n) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lane_window + 8 - n));
  }
  static TNC_INLINE Mask first(int n) { return _mm256_castsi256_ps(window(n)); }

  static TNC_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
  static TNC_INLINE Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
  static TNC_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static TNC_INLINE Vec load(const float* p, int n) { return {_mm256_maskload_ps(p, window(n))}; }
  static TNC_INLINE Vec load(const Half* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  static TNC_INLINE Vec load(const Half* p, int n) { return {_mm256_cvtph_ps(load_some(p, n))}; }
  static TNC_INLINE Vec load(const BFloat16* p) {
    return widened(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static TNC_INLINE Vec load(const BFloat16* p, int n) { return widened(load_some(p, n)); }
  static TNC_INLINE Vec pairs(const BFloat16* even, const BFloat16* odd) {
    const __m256i low =
        _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(even)));
    return {_mm256_or_ps(_mm256_castsi256_ps(low), load(odd).v)};
  }

  // As in vec_avx512.h, up to unwoven: here for the tests of conv_amx.h.
  struct Words {
    BFloat16 word[32];
  };
  static Words load_words(const BFloat16* p) { return merge_words({}, ~uint32_t{0}, p); }
  static Words merge_words(Words words, uint32_t some, const BFloat16* p) {
    for (int i = 0; i < 32; ++i)
      if (some >> i & 1) words.word[i] = p[i];
    return words;
  }
  static Words load_halves(const BFloat16* p, const BFloat16* q) {
    return merge_words(merge_words({}, 0xffff, p), 0xffff0000, q - 16);
  }
  static void store_words(const Words& words, uint32_t some, BFloat16* p) {
    for (int i = 0; i < 32; ++i)
      if (some >> i & 1) p[i] = words.word[i];
  }
  static void store_words(const Words& words, BFloat16* p) {
    __builtin_memcpy(static_cast<void*>(p), &words, sizeof(words));
  }
  static void weave(const Words& even, const Words& odd, float* first, float* second) {
    for (int i = 0; i < 32; ++i) {
      const BFloat16 pair[2] = {even.word[i], odd.word[i]};
      float* const to = (i % 8 < 4 ? first : second) + i / 8 * 4 + i % 4;
      __builtin_memcpy(static_cast<void*>(to), pair, sizeof(pair));
    }
  }
  static TNC_INLINE Vec unwoven(const float* first, const float* second, int i) {
    const __m128 low = _mm_loadu_ps(first + i / 2), high = _mm_loadu_ps(second + i / 2);
    return {_mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1)};
  }
  static Words unwoven_sums(const float* first, const float* second, Vec x, Mask& nan) {
    Words words;
    for (int i = 0; i < 32; i += lanes) {
      const Vec sum = unwoven(first, second, i) + x;
      nan = either(nan, is_nan(sum));
      sum.store(words.word + i);
    }
    return words;
  }

  TNC_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  // In pieces: a masked store is slow on AMD.
  TNC_INLINE void store(float* p, int n) const {
    if (n >= lanes) return store(p);
    __m128 rest = _mm256_castps256_ps128(v);
    if (n & 4) {
      _mm_storeu_ps(p, rest);
      rest = _mm256_extractf128_ps(v, 1);
      p += 4;
    }
    if (n & 2) {
      _mm_storel_pi(reinterpret_cast<__m64*>(p), rest);
      rest = _mm_movehl_ps(rest, rest);
      p += 2;
    }
    if (n & 1) _mm_store_ss(p, rest);
  }
  TNC_INLINE void store(Half* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves());
  }
  TNC_INLINE void store(Half* p, int n) const { store_some(p, halves(), n); }
  TNC_INLINE void store(BFloat16* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), brains());
  }
  TNC_INLINE void store(BFloat16* p, int n) const { store_some(p, brains(), n); }

  friend TNC_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend TNC_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend TNC_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  friend TNC_INLINE Vec in_register(Vec a) {
    asm("" : "+x"(a.v));
    return a;
  }

  friend TNC_INLINE Mask greater(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ); }
  friend TNC_INLINE Mask is_nan(Vec a) { return _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q); }
  static TNC_INLINE Mask either(Mask a, Mask b) { return _mm256_or_ps(a, b); }
  static TNC_INLINE bool any(Mask m) { return _mm256_movemask_ps(m) != 0; }
  static TNC_INLINE Vec select(Mask m, Vec yes, Vec no) {
    return {_mm256_blendv_ps(no.v, yes.v, m)};
  }
  friend TNC_INLINE Vec settled(Vec a) { return canonical(a + zero()); }
  friend TNC_INLINE Vec canonical(Vec a) {
    return select(is_nan(a), {_mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000))}, a);
  }

  TNC_INLINE Vec permute(const int32_t* lane) const {
    const __m256i index = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lane));
    return {_mm256_permutevar8x32_ps(v, index)};
  }
  static TNC_INLINE void split(Vec a, Vec b, Vec& even, Vec& odd) {
    const __m256 e = _mm256_shuffle_ps(a.v, b.v, 0x88), o = _mm256_shuffle_ps(a.v, b.v, 0xdd);
    even.v = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(e), 0xd8));
    odd.v = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(o), 0xd8));
  }
  static TNC_INLINE void merge(Vec even, Vec odd, Vec& a, Vec& b) {
    const __m256 lo = _mm256_unpacklo_ps(even.v, odd.v), hi = _mm256_unpackhi_ps(even.v, odd.v);
    a.v = _mm256_permute2f128_ps(lo, hi, 0x20);
    b.v = _mm256_permute2f128_ps(lo, hi, 0x31);
  }
  static TNC_INLINE void transpose(Vec (&r)[lanes]) {
    __m256 b[8];
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {  // b[i + k]: column 4 * block + k of rows i..i+3
      const __m256 lo0 = _mm256_unpacklo_ps(r[i].v, r[i + 1].v);
      const __m256 hi0 = _mm256_unpackhi_ps(r[i].v, r[i + 1].v);
      const __m256 lo1 = _mm256_unpacklo_ps(r[i + 2].v, r[i + 3].v);
      const __m256 hi1 = _mm256_unpackhi_ps(r[i + 2].v, r[i + 3].v);
      b[i] = _mm256_shuffle_ps(lo0, lo1, 0x44);
      b[i + 1] = _mm256_shuffle_ps(lo0, lo1, 0xee);
      b[i + 2] = _mm256_shuffle_ps(hi0, hi1, 0x44);
      b[i + 3] = _mm256_shuffle_ps(hi0, hi1, 0xee);
    }
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      r[k].v = _mm256_permute2f128_ps(b[k], b[4 + k], 0x20);
      r[4 + k].v = _mm256_permute2f128_ps(b[k], b[4 + k], 0x31);
    }
  }

 private:
  static TNC_INLINE Vec widened(__m128i bits) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
  }
  TNC_INLINE __m128i halves() const {
    return _mm256_cvtps_ph(canonical(*this).v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  TNC_INLINE __m128i brains() const {
    const __m256i u = _mm256_castps_si256(canonical(*this).v);
    const __m256i even = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(u, _mm256_add_epi32(even, _mm256_set1_epi32(0x7fff)));
    const __m256i rounded = _mm256_srli_epi32(up, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  }
};

template <>
struct Vec<double> {
  static constexpr int lanes = 4;
  static constexpr int registers = 16;
  static constexpr bool stores_apart = false;
  using Mask = __m256d;
  __m256d v;

  static TNC_INLINE __m256i window(int n) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lane_window + 8 - 2 * n));
  }
  static TNC_INLINE Mask first(int n) { return _mm256_castsi256_pd(window(n)); }

  static TNC_INLINE Vec zero() { return {_mm256_setzero_pd()}; }
  static TNC_INLINE Vec broadcast(double x) { return {_mm256_set1_pd(x)}; }
  static TNC_INLINE Vec load(const double* p) { return {_mm256_loadu_pd(p)}; }
  static TNC_INLINE Vec load(const double* p, int n) { return {_mm256_maskload_pd(p, window(n))}; }
  TNC_INLINE void store(double* p) const { _mm256_storeu_pd(p, v); }
  TNC_INLINE void store(double* p, int n) const {
    if (n >= lanes) return store(p);
    __m128d rest = _mm256_castpd256_pd128(v);
    if (n & 2) {
      _mm_storeu_pd(p, rest);
      rest = _mm256_extractf128_pd(v, 1);
      p += 2;
    }
    if (n & 1) _mm_store_sd(p, rest);
  }

  friend TNC_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_pd(a.v, b.v)}; }
  friend TNC_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_pd(a.v, b.v)}; }
  friend TNC_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
  friend TNC_INLINE Vec in_register(Vec a) {
    asm("" : "+x"(a.v));
    return a;
  }

  friend TNC_INLINE Mask greater(Vec a, Vec b) { return _mm256_cmp_pd(a.v, b.v, _CMP_GT_OQ); }
  friend TNC_INLINE Mask is_nan(Vec a) { return _mm256_cmp_pd(a.v, a.v, _CMP_UNORD_Q); }
  static TNC_INLINE Mask either(Mask a, Mask b) { return _mm256_or_pd(a, b); }
  static TNC_INLINE bool any(Mask m) { return _mm256_movemask_pd(m) != 0; }
  static TNC_INLINE Vec select(Mask m, Vec yes, Vec no) {
    return {_mm256_blendv_pd(no.v, yes.v, m)};
  }
  friend TNC_INLINE Vec settled(Vec a) { return canonical(a + zero()); }
  friend TNC_INLINE Vec canonical(Vec a) {
    return select(is_nan(a), {_mm256_castsi256_pd(_mm256_set1_epi64x(0x7ff8000000000000))}, a);
  }

  TNC_INLINE Vec permute(const int32_t* lane) const {
    alignas(32) double from[lanes];
    _mm256_store_pd(from, v);
    return {_mm256_setr_pd(from[lane[0]], from[lane[1]], from[lane[2]], from[lane[3]])};
  }
  static TNC_INLINE void split(Vec a, Vec b, Vec& even, Vec& odd) {
    const __m256d lo = _mm256_permute2f128_pd(a.v, b.v, 0x20);
    const __m256d hi = _mm256_permute2f128_pd(a.v, b.v, 0x31);
    even.v = _mm256_unpacklo_pd(lo, hi);
    odd.v = _mm256_unpackhi_pd(lo, hi);
  }
  static TNC_INLINE void merge(Vec even, Vec odd, Vec& a, Vec& b) {
    const __m256d lo = _mm256_unpacklo_pd(even.v, odd.v), hi = _mm256_unpackhi_pd(even.v, odd.v);
    a.v = _mm256_permute2f128_pd(lo, hi, 0x20);
    b.v = _mm256_permute2f128_pd(lo, hi, 0x31);
  }
  static TNC_INLINE void transpose(Vec (&r)[lanes]) {
    const __m256d lo0 = _mm256_unpacklo_pd(r[0].v, r[1].v);
    const __m256d hi0 = _mm256_unpackhi_pd(r[0].v, r[1].v);
    const __m256d lo1 = _mm256_unpacklo_pd(r[2].v, r[3].v);
    const __m256d hi1 = _mm256_unpackhi_pd(r[2].v, r[3].v);
    r[0].v = _mm256_permute2f128_pd(lo0, lo1, 0x20);
    r[1].v = _mm256_permute2f128_pd(hi0, hi1, 0x20);
    r[2].v = _mm256_permute2f128_pd(lo0, lo1, 0x31);
    r[3].v = _mm256_permute2f128_pd(hi0, hi1, 0x31);
  }
};

}  // namespace torch_naiveconv::TNC_ISA
