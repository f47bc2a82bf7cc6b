// What every vector row of the convolution table runs: the kernels made for a shape, in the order
// in which they are asked. Each returns false to decline.
#pragma once

#include "conv_dense.h"

namespace torch_naiveconv::TNC_ISA {

inline bool run(const ConvProblem& p) { return run_dense(p); }

}  // namespace torch_naiveconv::TNC_ISA
