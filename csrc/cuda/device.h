// Launching on the caller's stream. Nothing here waits for the device.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "block.h"

namespace torch_naiveconv {

// The stream of a call, and memory for it from torch's caching allocator (freed, in stream order,
// when the call returns). ops.cpp makes it.
class Device {
 public:
  cudaStream_t stream = nullptr;

  virtual void* allocate(int64_t bytes) = 0;
  virtual void check(cudaError_t error) = 0;  // throws

 protected:
  ~Device() = default;
};

#ifdef __CUDACC__

template <class Body>
__global__ void __launch_bounds__(256, 1)
    each_element(const __grid_constant__ Body body, int64_t count) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += step)
    body(i);
}

// A kernel of blocks: Kernel::threads, ::together (blocks on a multiprocessor), ::Shared, ::Thread,
// ::Launch (what all blocks know), and ::run(block, launch, shared, index of the block).
template <class Kernel>
__global__ void __launch_bounds__(Kernel::threads, Kernel::together)
    block_kernel(const __grid_constant__ typename Kernel::Launch launch) {
  extern __shared__ __align__(16) unsigned char memory[];
  DeviceBlock<typename Kernel::Thread> block;
  Kernel::run(block, launch, *reinterpret_cast<typename Kernel::Shared*>(memory), blockIdx.x);
}

// What the plans (plan.h, depthwise.h, pool.h) need of a device. The host tests have their own.
struct Launcher {
  Device& device;

  void* allocate(int64_t bytes) { return device.allocate(bytes); }

  // body(i) for i in [0, count), a thread each, in blocks of `threads`.
  template <class Body>
  void each(int64_t count, const Body& body, int threads = 256) {
    if (count <= 0) return;
    const int64_t blocks = (count + threads - 1) / threads, most = INT32_MAX;
    const auto grid = static_cast<unsigned int>(blocks < most ? blocks : most);
    each_element<<<grid, threads, 0, device.stream>>>(body, count);
    device.check(cudaGetLastError());
  }

  // `extra`: bytes of shared memory beyond Shared; with it no more than 48 KiB.
  template <class Kernel>
  void blocks(const typename Kernel::Launch& launch, int64_t count, int extra = 0) {
    static_assert(sizeof(launch) <= 32764, "what a kernel takes as parameters");
    static_assert(sizeof(typename Kernel::Shared) <= 48 << 10, "what a block has on any device");
    if (count <= 0) return;
    const int bytes = static_cast<int>(sizeof(typename Kernel::Shared)) + extra;
    const auto grid = static_cast<unsigned int>(count);
    block_kernel<Kernel><<<grid, Kernel::threads, bytes, device.stream>>>(launch);
    device.check(cudaGetLastError());
  }
};

#endif  // __CUDACC__

}  // namespace torch_naiveconv
