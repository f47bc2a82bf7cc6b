// Vec<T>: a handful of lanes of float or double. This is the portable version, and the contract
// of the others (vec_avx512.h, vec_avx2.h):
//
//   lanes, registers       width, and how many of them the processor has
//   zero, broadcast, load  load(p, n) reads the first n only, 0 <= n <= lanes; the rest are +0
//   store                  store(p, n) writes the first n only
//   load(const Half*), store(BFloat16*) ...   exact widening; one rounding to nearest even
//   fma(a, b, c)           one rounding of a * b + c
//   in_register(a)         a itself; else the compiler may load it anew for each use
//   Mask                   greater, is_nan, first(n), select(mask, yes, no), either, any
//   canonical              every NaN becomes the canonical one
//   settled                the same, and -0 becomes +0: the end of a sum that began with it
//   permute(lane)          result[i] = this[lane[i]]
//   window<n>(a, b)        the lanes from n on of a and then b (AVX-512 only)
//   transpose(r)           lanes x lanes
//   pairs(even, odd)       lane i holds the 16 bits even[i] and, above them, odd[i] (on x86 only:
//                          an operand of its matrix unit)
//   split, merge           2 x lanes numbers a, b into those of even and odd place, and back
//
// Subnormal operands and results are flushed or kept as FloatEnvironment says, which is the
// specification's meaning of float32 steps on 16-bit types.
#pragma once

namespace torch_naiveconv::TNC_ISA {

template <class T>
struct Vec {
  static constexpr int lanes = 16 / sizeof(T);
#if defined(__aarch64__)
  static constexpr int registers = 32;
  static constexpr bool stores_apart = false;
#else
  static constexpr int registers = 16;
  static constexpr bool stores_apart = false;
#endif
  typedef T Lanes __attribute__((vector_size(16)));
  typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> Mask
      __attribute__((vector_size(16)));
  Lanes v;

  static TNC_INLINE Mask first(int n) {
    Mask m;
    for (int i = 0; i < lanes; ++i) m[i] = i < n ? -1 : 0;
    return m;
  }

  static TNC_INLINE Vec zero() { return {Lanes{}}; }
  static TNC_INLINE Vec broadcast(T x) {
    Vec r;
    for (int i = 0; i < lanes; ++i) r.v[i] = x;
    return r;
  }
  static TNC_INLINE Vec load(const T* p) {
    Vec r;
    __builtin_memcpy(&r.v, p, sizeof(r.v));
    return r;
  }
  static TNC_INLINE Vec load(const T* p, int n) {
    Vec r = zero();
    for (int i = 0; i < n; ++i) r.v[i] = p[i];
    return r;
  }
  template <class Narrow>
  static TNC_INLINE Vec load(const Narrow* p) {
    return load(p, lanes);
  }
  template <class Narrow>
  static TNC_INLINE Vec load(const Narrow* p, int n) {
    Vec r = zero();
    for (int i = 0; i < n; ++i) r.v[i] = widen(p[i]);
    return r;
  }

  TNC_INLINE void store(T* p) const { __builtin_memcpy(p, &v, sizeof(v)); }
  TNC_INLINE void store(T* p, int n) const {
    for (int i = 0; i < n && i < lanes; ++i) p[i] = v[i];  // n <= lanes, which GCC does not see
  }
  template <class Narrow>
  TNC_INLINE void store(Narrow* p) const {
    store(p, lanes);
  }
  template <class Narrow>
  TNC_INLINE void store(Narrow* p, int n) const {
    for (int i = 0; i < n; ++i) p[i] = narrow<Narrow>(v[i]);
  }

  friend TNC_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
  friend TNC_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
  friend TNC_INLINE Vec fma(Vec a, Vec b, Vec c) {
    Vec r;
#pragma GCC unroll 4
    for (int i = 0; i < lanes; ++i) r.v[i] = fused(a.v[i], b.v[i], c.v[i]);
    return r;
  }
  friend TNC_INLINE Vec in_register(Vec a) { return a; }

  friend TNC_INLINE Mask greater(Vec a, Vec b) { return a.v > b.v; }
  friend TNC_INLINE Mask is_nan(Vec a) { return a.v != a.v; }
  static TNC_INLINE Mask either(Mask a, Mask b) { return a | b; }
  static TNC_INLINE bool any(Mask m) {
    bool found = false;
    for (int i = 0; i < lanes; ++i) found |= m[i] != 0;
    return found;
  }
  static TNC_INLINE Vec select(Mask m, Vec yes, Vec no) { return {m ? yes.v : no.v}; }
  friend TNC_INLINE Vec settled(Vec a) { return canonical(a + zero()); }
  friend TNC_INLINE Vec canonical(Vec a) {
    return select(is_nan(a), broadcast(canonical_nan<T>()), a);
  }

  TNC_INLINE Vec permute(const int32_t* lane) const {
    Vec r;
    for (int i = 0; i < lanes; ++i) r.v[i] = v[lane[i]];
    return r;
  }
  static TNC_INLINE void split(Vec a, Vec b, Vec& even, Vec& odd) {
    T both[2 * lanes];
    a.store(both);
    b.store(both + lanes);
    for (int i = 0; i < lanes; ++i) even.v[i] = both[2 * i], odd.v[i] = both[2 * i + 1];
  }
  static TNC_INLINE void merge(Vec even, Vec odd, Vec& a, Vec& b) {
    T both[2 * lanes];
    for (int i = 0; i < lanes; ++i) both[2 * i] = even.v[i], both[2 * i + 1] = odd.v[i];
    a = load(both);
    b = load(both + lanes);
  }
  static TNC_INLINE void transpose(Vec (&r)[lanes]) {
    Vec t[lanes];
    for (int i = 0; i < lanes; ++i)
      for (int j = 0; j < lanes; ++j) t[j].v[i] = r[i].v[j];
    for (int i = 0; i < lanes; ++i) r[i] = t[i];
  }
};

}  // namespace torch_naiveconv::TNC_ISA
