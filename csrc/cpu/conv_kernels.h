// What every vector row of the convolution table runs: the kernels made for a shape, in the order
// in which they are asked. Each returns false to decline.
#pragma once

#include "conv_dense.h"
#include "conv_depthwise.h"
#include "conv_grad_bias.h"

namespace torch_naiveconv::TNC_ISA {

inline bool run(const ConvProblem& p) {
  if (p.direction == Direction::grad_bias) return conv_grad_bias(p);
  return conv_depthwise(p) || run_dense(p);
}

}  // namespace torch_naiveconv::TNC_ISA
