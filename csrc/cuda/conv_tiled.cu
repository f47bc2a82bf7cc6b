// Row "tiled" of the CUDA convolution table: the floating-point types, all three directions.
// Index arithmetic: lowering.h; the kernel: tile.h; which tile and how many blocks: plan.h.
#include "plan.h"
#include "rows.h"

namespace torch_naiveconv {
namespace {

bool run(const ConvProblem& p, Device& device) {
  Launcher launcher{device};
  return launch_tiled(p, launcher);
}

}  // namespace

const CudaConvRow cuda_conv_tiled{"tiled", run};

}  // namespace torch_naiveconv
