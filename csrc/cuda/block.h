// A thread block as the kernels see it: phases, in each of which every thread runs once, between
// barriers; and copies into shared memory that are sure to have landed only after the next barrier.
// On a device this is the hardware; the tests emulate the same interface on the host, thread by
// thread in several orders, with copies landing as early and as late as they may (tests/cuda).
#pragma once

#include "../spec/types.h"

namespace torch_naiveconv {

// Keeps the compiler from taking a pointer apart again, which costs more each time it is used.
template <class T>
TNC_HD void in_registers(T*& pointer) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+l"(pointer));
#endif
}

#ifdef __CUDACC__

template <class Thread>
class DeviceBlock {
 public:
  // body(thread index, what this thread keeps between phases)
  template <class Body>
  __device__ __forceinline__ void each(const Body& body) {
    body(static_cast<int>(threadIdx.x), thread_);
  }

  // Copies one element, or writes a zero; `source` is not read if it is not valid.
  template <class T>
  __device__ __forceinline__ void copy(T* shared, const T* source, bool valid) {
#if __CUDA_ARCH__ >= 800
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "what cp.async can copy");
    const unsigned int target = static_cast<unsigned int>(__cvta_generic_to_shared(shared));
    const int size = valid ? static_cast<int>(sizeof(T)) : 0;
    if constexpr (sizeof(T) == 16)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
                   "r"(size)
                   : "memory");
    else
      asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(target), "l"(source),
                   "n"(sizeof(T)), "r"(size)
                   : "memory");
#else
    *shared = valid ? *source : T{};
#endif
  }

  // All threads have arrived, and the copies that any of them has issued have landed.
  __device__ __forceinline__ void barrier() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
    __syncthreads();
  }

 private:
  Thread thread_;
};

#endif  // __CUDACC__

}  // namespace torch_naiveconv
