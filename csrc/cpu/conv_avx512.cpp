// Row "avx512" of the convolution table: everything after the target switch is built for it.
#include "kernels.h"

#if defined(__x86_64__)

static bool can_run() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}

#if defined(__clang__)
#pragma clang attribute push(                                                         \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")
#endif

#define TNC_ISA avx512
#include "vec_avx512.h"

#include "conv_kernels.h"
#include "fma_peak.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace torch_naiveconv {
extern const ConvRow conv_avx512;
const ConvRow conv_avx512{"avx512", can_run, avx512::run, avx512::multiply_adds};
}  // namespace torch_naiveconv

#endif
