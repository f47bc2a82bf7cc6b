// Row "avx2" of the pooling table: everything after the target switch is built for it.
#include <algorithm>
#include <new>
#include <utility>
#include <vector>

#include "max_pool.h"
#include "parallel.h"

#if defined(__x86_64__)
#include <immintrin.h>

static bool can_run() { return __builtin_cpu_supports("avx2"); }

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif

#define TNC_ISA avx2
namespace torch_naiveconv {
namespace TNC_ISA {
namespace {
constexpr int vector_bytes = 32;

#include "pool_blend.h"

// Loads and stores of the lanes whose mask is all ones; other memory is not touched.
struct Masked : Blended {
  template <class L, class Mask, class V>
  static V load(const L* from, Mask mask, V otherwise) {
    if constexpr (sizeof(L) == 4)
      return mask ? (V)_mm256_maskload_epi32(reinterpret_cast<const int*>(from), (__m256i)mask)
                  : otherwise;
    else
      return mask
                 ? (V)_mm256_maskload_epi64(reinterpret_cast<const long long*>(from), (__m256i)mask)
                 : otherwise;
  }
  template <class L, class Mask, class V>
  static void store(L* to, Mask mask, V v) {
    if constexpr (sizeof(L) == 4)
      _mm256_maskstore_epi32(reinterpret_cast<int*>(to), (__m256i)mask, (__m256i)v);
    else
      _mm256_maskstore_epi64(reinterpret_cast<long long*>(to), (__m256i)mask, (__m256i)v);
  }

  // The same vector: the compiler may not load it anew for each use.
  template <class L, class V>
  static V in_register(V v) {
    __asm__("" : "+x"(v));
    return v;
  }

  // As many choices of windows as there are lanes, or the first `count` of them; a tap in all.
  template <class L>
  static Wide<L> choices(const uint8_t* from) {
    if constexpr (sizeof(L) == 4)
      return (Wide<L>)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
    int32_t four;
    __builtin_memcpy(&four, from, sizeof(four));
    return (Wide<L>)_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
  }
  template <class L>
  static Wide<L> choices(const uint8_t* from, int64_t count) {
    uint8_t bytes[Types<L>::lanes] = {};
    for (int64_t i = 0; i < count; ++i) bytes[i] = from[i];
    return choices<L>(bytes);
  }
  template <class L>
  static Wide<L> choice(int64_t tap) {
    if constexpr (sizeof(L) == 4)
      return (Wide<L>)_mm256_set1_epi32(static_cast<int>(tap));
    else
      return (Wide<L>)_mm256_set1_epi64x(tap);
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
extern const PoolRow pool_avx2;
const PoolRow pool_avx2{"avx2", can_run, avx2::run};
}  // namespace torch_naiveconv

#endif
