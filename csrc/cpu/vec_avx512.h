// Vec<float> and Vec<double> on AVX-512: see vec_generic.h for the contract of each function.
#pragma once

namespace torch_naiveconv::TNC_ISA {

template <class T>
struct Vec;

// What `settled` makes of a number by its class, from the lowest: a NaN the canonical one, zero +0.
constexpr int settling = 0x11111800;

template <>
struct Vec<float> {
  static constexpr int lanes = 16;
  static constexpr int registers = 32;
  static constexpr bool stores_apart = true;
  using Mask = __mmask16;
  __m512 v;

  static TNC_INLINE Mask first(int n) { return static_cast<Mask>((1u << n) - 1); }

  static TNC_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
  static TNC_INLINE Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
  static TNC_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static TNC_INLINE Vec load(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  static TNC_INLINE Vec load(const Half* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static TNC_INLINE Vec load(const Half* p, int n) {
    return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p))};
  }
  static TNC_INLINE Vec load(const BFloat16* p) {
    return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static TNC_INLINE Vec load(const BFloat16* p, int n) {
    return widened(_mm256_maskz_loadu_epi16(first(n), p));
  }
  static TNC_INLINE Vec pairs(const BFloat16* even, const BFloat16* odd) {
    const __m512i low =
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even)));
    return {_mm512_or_ps(_mm512_castsi512_ps(low), load(odd).v)};
  }

  // 32 words: all from memory, or `some` of them and the others from `rest`.
  using Words = __m512i;
  static TNC_INLINE Words load_words(const BFloat16* p) { return _mm512_loadu_si512(p); }
  static TNC_INLINE Words merge_words(Words rest, uint32_t some, const BFloat16* p) {
    return _mm512_mask_loadu_epi16(rest, some, p);
  }
  static TNC_INLINE Words load_halves(const BFloat16* p, const BFloat16* q) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
  static TNC_INLINE void store_words(Words words, BFloat16* p) { _mm512_storeu_si512(p, words); }
  static TNC_INLINE void store_words(Words words, uint32_t some, BFloat16* p) {
    _mm512_mask_storeu_epi16(p, some, words);
  }
  // Pairs of 32 words, as interleaving leaves them: four to `first`, four to `second`, in turn. Of
  // 32 numbers that took turns so, those in order from number i on.
  static TNC_INLINE void weave(Words even, Words odd, float* first, float* second) {
    _mm512_storeu_si512(first, _mm512_unpacklo_epi16(even, odd));
    _mm512_storeu_si512(second, _mm512_unpackhi_epi16(even, odd));
  }
  static TNC_INLINE Vec unwoven(const float* first, const float* second, int i) {
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i order = _mm512_add_epi32(low, _mm512_set1_epi32(i / 2));
    return {_mm512_permutex2var_ps(_mm512_loadu_ps(first), order, _mm512_loadu_ps(second))};
  }
  // The sums of all of them and x in order, rounded; `nan` tells of NaNs.
  static TNC_INLINE Words unwoven_sums(const float* first, const float* second, Vec x, Mask& nan) {
    static constexpr uint16_t order[] = {0,  2,  4,  6,  1,  3,  5,  7,  8,  10, 12,
                                         14, 9,  11, 13, 15, 16, 18, 20, 22, 17, 19,
                                         21, 23, 24, 26, 28, 30, 25, 27, 29, 31};
    const Vec a = load(first) + x, b = load(second) + x;
    nan = either(nan, either(is_nan(a), is_nan(b)));
    return _mm512_permutexvar_epi16(_mm512_loadu_si512(order), words_in_turns(a, b));
  }

  TNC_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  TNC_INLINE void store(float* p, int n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  // p[2 * i] = lane i, for i < n; what lies between is not touched.
  TNC_INLINE void store_apart(float* p, int n) const {
    const __m512i low = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    const uint32_t every_second = 0x55555555u >> (2 * (lanes - n));
    _mm512_mask_storeu_ps(p, static_cast<Mask>(every_second), _mm512_permutexvar_ps(low, v));
    _mm512_mask_storeu_ps(p + lanes, static_cast<Mask>(every_second >> lanes),
                          _mm512_permutexvar_ps(high, v));
  }
  TNC_INLINE void store(Half* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves());
  }
  TNC_INLINE void store(Half* p, int n) const { _mm256_mask_storeu_epi16(p, first(n), halves()); }
  TNC_INLINE void store(BFloat16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), brains());
  }
  TNC_INLINE void store(BFloat16* p, int n) const {
    _mm256_mask_storeu_epi16(p, first(n), brains());
  }

  // See pack.h. A pair of rounded halves is one word of the result.
  friend TNC_INLINE void store_in_turns(Vec even, Vec odd, BFloat16* p, int64_t n) {
    const Words words = words_in_turns(even, odd);
    if (n >= 2 * lanes)
      store_words(words, p);
    else
      store_words(words, (1u << n) - 1, p);
  }

  friend TNC_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend TNC_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend TNC_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  friend TNC_INLINE Vec in_register(Vec a) {
    asm("" : "+v"(a.v));
    return a;
  }

  friend TNC_INLINE Mask greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
  friend TNC_INLINE Mask is_nan(Vec a) { return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q); }
  static TNC_INLINE Mask either(Mask a, Mask b) { return static_cast<Mask>(a | b); }
  static TNC_INLINE bool any(Mask m) { return m != 0; }
  static TNC_INLINE Vec select(Mask m, Vec yes, Vec no) {
    return {_mm512_mask_blend_ps(m, no.v, yes.v)};
  }
  friend TNC_INLINE Vec canonical(Vec a) {
    return select(is_nan(a), {_mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000))}, a);
  }
  friend TNC_INLINE Vec settled(Vec a) {
    const __m512 nan = _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000));
    return {_mm512_fixupimm_ps(nan, a.v, _mm512_set1_epi32(settling), 0)};
  }

  TNC_INLINE Vec permute(const int32_t* lane) const {
    return {_mm512_permutexvar_ps(_mm512_loadu_si512(lane), v)};
  }
  template <int n>
  static TNC_INLINE Vec window(Vec a, Vec b) {
    if constexpr (n == 0) return a;
    return {_mm512_castsi512_ps(
        _mm512_alignr_epi32(_mm512_castps_si512(b.v), _mm512_castps_si512(a.v), n))};
  }
  static TNC_INLINE void split(Vec a, Vec b, Vec& even, Vec& odd) {
    const __m512i e = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    even.v = _mm512_permutex2var_ps(a.v, e, b.v);
    odd.v = _mm512_permutex2var_ps(a.v, _mm512_add_epi32(e, _mm512_set1_epi32(1)), b.v);
  }
  static TNC_INLINE void merge(Vec even, Vec odd, Vec& a, Vec& b) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    a.v = _mm512_permutex2var_ps(even.v, first, odd.v);
    b.v = _mm512_permutex2var_ps(even.v, _mm512_add_epi32(first, _mm512_set1_epi32(8)), odd.v);
  }
  static TNC_INLINE void transpose(Vec (&r)[lanes]) {
    __m512 a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 2) {
      a[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
      a[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {  // b[i + k]: column 4 * block + k of rows i..i+3
      b[i] = _mm512_shuffle_ps(a[i], a[i + 2], 0x44);
      b[i + 1] = _mm512_shuffle_ps(a[i], a[i + 2], 0xee);
      b[i + 2] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0x44);
      b[i + 3] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {  // 128-bit blocks: rows 0, 4, 8, 12 of column 4 * block + k
      const __m512 even01 = _mm512_shuffle_f32x4(b[k], b[4 + k], 0x88);
      const __m512 odd01 = _mm512_shuffle_f32x4(b[k], b[4 + k], 0xdd);
      const __m512 even23 = _mm512_shuffle_f32x4(b[8 + k], b[12 + k], 0x88);
      const __m512 odd23 = _mm512_shuffle_f32x4(b[8 + k], b[12 + k], 0xdd);
      r[k].v = _mm512_shuffle_f32x4(even01, even23, 0x88);
      r[8 + k].v = _mm512_shuffle_f32x4(even01, even23, 0xdd);
      r[4 + k].v = _mm512_shuffle_f32x4(odd01, odd23, 0x88);
      r[12 + k].v = _mm512_shuffle_f32x4(odd01, odd23, 0xdd);
    }
  }

 private:
  static TNC_INLINE Vec widened(__m256i bits) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
  }
  TNC_INLINE __m256i halves() const {
    return _mm512_cvtps_ph(canonical(*this).v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  TNC_INLINE __m512i rounded() const {  // to the upper halves; the lower ones are anything
    const __m512i u = _mm512_castps_si512(v);
    const __m512i even = _mm512_and_epi32(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(u, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff)));
    return _mm512_mask_blend_epi32(is_nan(*this), up, _mm512_set1_epi32(0x7fc00000));
  }
  // Rounded, a pair a word: the even one below.
  static TNC_INLINE Words words_in_turns(Vec even, Vec odd) {
    const __m512i low = _mm512_srli_epi32(even.rounded(), 16);
    return _mm512_mask_blend_epi16(0x55555555, odd.rounded(), low);
  }
  TNC_INLINE __m256i brains() const {
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded(), 16));
  }
};

template <>
struct Vec<double> {
  static constexpr int lanes = 8;
  static constexpr int registers = 32;
  static constexpr bool stores_apart = true;
  using Mask = __mmask8;
  __m512d v;

  static TNC_INLINE Mask first(int n) { return static_cast<Mask>((1u << n) - 1); }

  static TNC_INLINE Vec zero() { return {_mm512_setzero_pd()}; }
  static TNC_INLINE Vec broadcast(double x) { return {_mm512_set1_pd(x)}; }
  static TNC_INLINE Vec load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static TNC_INLINE Vec load(const double* p, int n) {
    return {_mm512_maskz_loadu_pd(first(n), p)};
  }
  TNC_INLINE void store(double* p) const { _mm512_storeu_pd(p, v); }
  TNC_INLINE void store(double* p, int n) const { _mm512_mask_storeu_pd(p, first(n), v); }
  TNC_INLINE void store_apart(double* p, int n) const {
    const __m512i low = _mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3);
    const __m512i high = _mm512_add_epi64(low, _mm512_set1_epi64(4));
    const uint32_t every_second = 0x5555u >> (2 * (lanes - n));
    _mm512_mask_storeu_pd(p, static_cast<Mask>(every_second), _mm512_permutexvar_pd(low, v));
    _mm512_mask_storeu_pd(p + lanes, static_cast<Mask>(every_second >> lanes),
                          _mm512_permutexvar_pd(high, v));
  }

  friend TNC_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_pd(a.v, b.v)}; }
  friend TNC_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_pd(a.v, b.v)}; }
  friend TNC_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
  friend TNC_INLINE Vec in_register(Vec a) {
    asm("" : "+v"(a.v));
    return a;
  }

  friend TNC_INLINE Mask greater(Vec a, Vec b) { return _mm512_cmp_pd_mask(a.v, b.v, _CMP_GT_OQ); }
  friend TNC_INLINE Mask is_nan(Vec a) { return _mm512_cmp_pd_mask(a.v, a.v, _CMP_UNORD_Q); }
  static TNC_INLINE Mask either(Mask a, Mask b) { return static_cast<Mask>(a | b); }
  static TNC_INLINE bool any(Mask m) { return m != 0; }
  static TNC_INLINE Vec select(Mask m, Vec yes, Vec no) {
    return {_mm512_mask_blend_pd(m, no.v, yes.v)};
  }
  friend TNC_INLINE Vec canonical(Vec a) {
    return select(is_nan(a), {_mm512_castsi512_pd(_mm512_set1_epi64(0x7ff8000000000000))}, a);
  }
  friend TNC_INLINE Vec settled(Vec a) {
    const __m512d nan = _mm512_castsi512_pd(_mm512_set1_epi64(0x7ff8000000000000));
    return {_mm512_fixupimm_pd(nan, a.v, _mm512_set1_epi64(settling), 0)};
  }

  TNC_INLINE Vec permute(const int32_t* lane) const {
    const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lane));
    return {_mm512_permutexvar_pd(_mm512_cvtepi32_epi64(narrow), v)};
  }
  template <int n>
  static TNC_INLINE Vec window(Vec a, Vec b) {
    if constexpr (n == 0) return a;
    return {_mm512_castsi512_pd(
        _mm512_alignr_epi64(_mm512_castpd_si512(b.v), _mm512_castpd_si512(a.v), n))};
  }
  static TNC_INLINE void split(Vec a, Vec b, Vec& even, Vec& odd) {
    const __m512i e = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14);
    even.v = _mm512_permutex2var_pd(a.v, e, b.v);
    odd.v = _mm512_permutex2var_pd(a.v, _mm512_add_epi64(e, _mm512_set1_epi64(1)), b.v);
  }
  static TNC_INLINE void merge(Vec even, Vec odd, Vec& a, Vec& b) {
    const __m512i first = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
    a.v = _mm512_permutex2var_pd(even.v, first, odd.v);
    b.v = _mm512_permutex2var_pd(even.v, _mm512_add_epi64(first, _mm512_set1_epi64(4)), odd.v);
  }
  static TNC_INLINE void transpose(Vec (&r)[lanes]) {
    __m512d a[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {  // a[i + k]: column 2 * block + k of rows i, i+1
      a[i] = _mm512_unpacklo_pd(r[i].v, r[i + 1].v);
      a[i + 1] = _mm512_unpackhi_pd(r[i].v, r[i + 1].v);
    }
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k) {
      const __m512d even01 = _mm512_shuffle_f64x2(a[k], a[2 + k], 0x88);
      const __m512d odd01 = _mm512_shuffle_f64x2(a[k], a[2 + k], 0xdd);
      const __m512d even23 = _mm512_shuffle_f64x2(a[4 + k], a[6 + k], 0x88);
      const __m512d odd23 = _mm512_shuffle_f64x2(a[4 + k], a[6 + k], 0xdd);
      r[k].v = _mm512_shuffle_f64x2(even01, even23, 0x88);
      r[4 + k].v = _mm512_shuffle_f64x2(even01, even23, 0xdd);
      r[2 + k].v = _mm512_shuffle_f64x2(odd01, odd23, 0x88);
      r[6 + k].v = _mm512_shuffle_f64x2(odd01, odd23, 0xdd);
    }
  }
};

}  // namespace torch_naiveconv::TNC_ISA
