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
  // As many bytes as there are lanes of 4 bytes.
  static __m512i widen(const uint8_t* from) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
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
