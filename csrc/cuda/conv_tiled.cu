// Row "tiled" of the CUDA convolution table: the floating-point types, all three directions.
// Index arithmetic: lowering.h; the kernel: tile.h; which tile and how many blocks: plan.h.
#include "plan.h"
#include "rows.h"

namespace torch_naiveconv {
namespace {

// 255 registers a thread: the sums of a tile live in them.
template <class Config>
__global__ void __launch_bounds__(Config::threads, 256 / Config::threads)
    tile_kernel(const __grid_constant__ TileLaunch launch) {
  __shared__ typename Config::Shared shared;
  DeviceBlock<typename Config::Thread> block;
  compute_tile<Config>(block, launch, shared, blockIdx.x);
}

struct TileLauncher : Launcher {
  template <class Config>
  void tiles(const TileLaunch& launch, int64_t blocks) {
    static_assert(sizeof(TileLaunch) <= 4096, "the parameters of a kernel");
    const auto grid = static_cast<unsigned int>(blocks);
    tile_kernel<Config><<<grid, Config::threads, 0, device.stream>>>(launch);
    device.check(cudaGetLastError());
  }
};

bool run(const ConvProblem& p, Device& device) {
  TileLauncher launcher{{device}};
  return launch_tiled(p, launcher);
}

}  // namespace

const CudaConvRow cuda_conv_tiled{"tiled", run};

}  // namespace torch_naiveconv
