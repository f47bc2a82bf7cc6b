// Launching on the caller's stream. Nothing here waits for the device.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

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

// What the plans (plan.h, depthwise.h, pool.h) need of a device. The host tests have their own.
struct Launcher {
  Device& device;

  void* allocate(int64_t bytes) { return device.allocate(bytes); }

  // body(i) for i in [0, count), a thread each.
  template <class Body>
  void each(int64_t count, const Body& body) {
    if (count <= 0) return;
    const int64_t blocks = (count + 255) / 256, most = INT32_MAX;
    const auto grid = static_cast<unsigned int>(blocks < most ? blocks : most);
    each_element<<<grid, 256, 0, device.stream>>>(body, count);
    device.check(cudaGetLastError());
  }
};

#endif  // __CUDACC__

}  // namespace torch_naiveconv
