// Row "avx2" of the convolution table: everything after the target switch is built for it.
#include "kernels.h"

#if defined(__x86_64__)

// Every processor with AVX2 has F16C, which older clangs cannot ask for.
static bool can_run() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define TNC_ISA avx2
#include "vec_avx2.h"

#include "conv_kernels.h"
#include "fma_peak.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace torch_naiveconv {
extern const ConvRow conv_avx2;
const ConvRow conv_avx2{"avx2", can_run, avx2::run, avx2::multiply_adds};
}  // namespace torch_naiveconv

#endif
