// Row "avx512" of the pooling table: everything after the target switch is built for it.
#include <algorithm>
#include <new>
#include <utility>
#include <vector>

#include "max_pool.h"
#include "parallel.h"

#if defined(__x86_64__)
#include <immintrin.h>

static bool can_run() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2")
#endif

#define TNC_ISA avx512
namespace torch_naiveconv {
namespace TNC_ISA {
namespace {
constexpr int vector_bytes = 64;

// Loads and stores of the lanes whose mask is all ones; other memory is not touched.
struct Masked {
  template <class L, class Mask, class V>
  static V load(const L* from, Mask mask, V otherwise) {
    if constexpr (sizeof(L) == 4)
      return (V)_mm512_mask_loadu_epi32((__m512i)otherwise, _mm512_movepi32_mask((__m512i)mask),
                                        from);
    else
      return (V)_mm512_mask_loadu_epi64((__m512i)otherwise, _mm512_movepi64_mask((__m512i)mask),
                                        from);
  }
  template <class L, class Mask, class V>
  static void store(L* to, Mask mask, V v) {
    if constexpr (sizeof(L) == 4)
      _mm512_mask_storeu_epi32(to, _mm512_movepi32_mask((__m512i)mask), (__m512i)v);
    else
      _mm512_mask_storeu_epi64(to, _mm512_movepi64_mask((__m512i)mask), (__m512i)v);
  }

  // The same vector: the compiler may not load it anew for each use.
  template <class L, class V>
  static V in_register(V v) {
    __asm__("" : "+v"(v));
    return v;
  }

  // As many choices of windows as there are lanes, a byte each, or the first `count` of them.
  template <class L>
  static __m128i choices(const uint8_t* from) {
    if constexpr (sizeof(L) == 4)
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    else
      return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  }
  template <class L>
  static __m128i choices(const uint8_t* from, int64_t count) {
    return _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << count) - 1), from);
  }
  template <class L>
  static __m128i choice(int64_t tap) {
    return _mm_set1_epi8(static_cast<char>(tap));
  }
  template <class L>
  static auto equal(__m128i a, __m128i b) {
    return static_cast<std::conditional_t<sizeof(L) == 4, __mmask16, __mmask8>>(
        _mm_cmpeq_epi8_mask(a, b));
  }

  // The sum with x added where a tap was chosen; x there, else 0.
  template <class L, class V, class Mask>
  static V add(V sum, Mask chosen, V x) {
    // In assembly, since compilers copy a sum that is named twice before each addition.
    if constexpr (std::is_same_v<L, float>) {
      __asm__("vaddps %2, %0, %0%{%1%}" : "+v"(sum) : "Yk"(chosen), "v"(x));
      return sum;
    } else if constexpr (std::is_same_v<L, double>) {
      __asm__("vaddpd %2, %0, %0%{%1%}" : "+v"(sum) : "Yk"(chosen), "v"(x));
      return sum;
    } else if constexpr (sizeof(L) == 4) {
      return (V)_mm512_mask_add_epi32((__m512i)sum, chosen, (__m512i)sum, (__m512i)x);
    } else {
      return (V)_mm512_mask_add_epi64((__m512i)sum, chosen, (__m512i)sum, (__m512i)x);
    }
  }
  template <class L, class V, class Mask>
  static V pick(Mask chosen, V x) {
    if constexpr (sizeof(L) == 4)
      return (V)_mm512_maskz_mov_epi32(chosen, (__m512i)x);
    else
      return (V)_mm512_maskz_mov_epi64(chosen, (__m512i)x);
  }

  template <class L, class V>
  static V replace_nan(V x, V other) {
    // By class of x, from the lowest: a quiet or signalling NaN keeps `other`, the rest is x.
    constexpr int table = 0x11111100;
    if constexpr (sizeof(L) == 4)
      return (V)_mm512_fixupimm_ps((__m512)other, (__m512)x, _mm512_set1_epi32(table), 0);
    else
      return (V)_mm512_fixupimm_pd((__m512d)other, (__m512d)x, _mm512_set1_epi64(table), 0);
  }
};
}  // namespace
}  // namespace TNC_ISA
}  // namespace torch_naiveconv

#include "pool_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace torch_naiveconv {
extern const PoolRow pool_avx512;
const PoolRow pool_avx512{"avx512", can_run, avx512::run};
}  // namespace torch_naiveconv

#endif
