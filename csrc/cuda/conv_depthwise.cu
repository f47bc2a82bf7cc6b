// Row "depthwise" of the CUDA convolution table: one input channel a group, and the bias gradient
// of any convolution. The kernels' bodies, and which one runs: depthwise.h.
#include "depthwise.h"
#include "rows.h"

namespace torch_naiveconv {
namespace {

bool run(const ConvProblem& p, Device& device) {
  Launcher launcher{device};
  return launch_depthwise(p, launcher);
}

}  // namespace

const CudaConvRow cuda_conv_depthwise{"depthwise", run};

}  // namespace torch_naiveconv
