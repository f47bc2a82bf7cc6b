// Row "tiled" of the CUDA convolution table: the floating-point types, all three directions, any
// shape whose numbers fit 31 bits. Index arithmetic: lowering.h; the kernel: tile.h; which tile and
// how many blocks: plan.h.
#include "plan.h"
#include "rows.h"

namespace torch_naiveconv {
namespace {

template <class Config>
__global__ void __launch_bounds__(Config::threads, 256 / Config::threads)
    tile_kernel(const __grid_constant__ TileLaunch launch) {
  __shared__ typename Config::Shared shared;
  DeviceBlock<typename Config::Thread> block;
  compute_tile<Config>(block, launch, shared, blockIdx.x);
}

template <class T>
struct Fold {
  TileLaunch launch;
  Total<T>* running;
  bool first, last;
  __device__ void operator()(int64_t flat) const {
    fold_element<T>(launch, running, first, last, flat);
  }
};

struct Launcher {
  Device& device;

  void* allocate(int64_t bytes) { return device.allocate(bytes); }

  template <class Config>
  void tiles(const TileLaunch& launch, int64_t blocks) {
    static_assert(sizeof(TileLaunch) <= 4096, "the parameters of a kernel");
    tile_kernel<Config>
        <<<static_cast<unsigned int>(blocks), Config::threads, 0, device.stream>>>(launch);
    device.check(cudaGetLastError());
  }

  template <class T>
  void fold(const TileLaunch& launch, Total<T>* running, bool first, bool last, int64_t count) {
    launch_each(device, count, Fold<T>{launch, running, first, last});
  }
};

bool run(const ConvProblem& p, Device& device) {
  if (p.direction == Direction::grad_bias || p.dtype > DType::bfloat16 || !fits(p)) return false;
  Launcher launcher{device};
  with_float_type(p.dtype,
                  [&](auto tag) { run_tiled<typename decltype(tag)::type>(p, launcher); });
  return true;
}

}  // namespace

const CudaConvRow cuda_conv_tiled{"tiled", run};

}  // namespace torch_naiveconv
