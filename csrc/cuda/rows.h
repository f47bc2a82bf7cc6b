// The tables of CUDA implementations, as those of the CPU (cpu/conv.h, cpu/max_pool.h): rows best
// first, naive last; a row declines by returning false.
#pragma once

#include "../cpu/conv.h"
#include "../cpu/max_pool.h"
#include "device.h"

namespace torch_naiveconv {

struct CudaConvRow {
  const char* name;
  bool (*run)(const ConvProblem&, Device&);
};
struct CudaPoolRow {
  const char* name;
  bool (*run)(const PoolProblem&, Device&);
};

extern const CudaConvRow cuda_conv_depthwise, cuda_conv_tiled, cuda_conv_naive;
extern const CudaPoolRow cuda_pool_runs, cuda_pool_naive;

// An index outside of [0, outputs) is dropped: to report it would mean waiting for the device.
void cuda_unpool(const UnpoolProblem& problem, Device& device);

}  // namespace torch_naiveconv
