// What every vector row of the convolution table runs: the kernels made for a shape, in the order
// in which they are asked. Each returns false to decline. So does the row if a task may have
// flushed subnormals in another way than the contract's (another call's task counts too: that costs
// time, no bits).
#pragma once

#include "conv_dense.h"
#include "conv_depthwise.h"
#include "conv_grad_bias.h"

namespace torch_naiveconv::TNC_ISA {

inline bool run_kernels(const ConvProblem& p) {
  if (p.direction == Direction::grad_bias) return conv_grad_bias(p);
  bool shows = false;
  with_float_type(p.dtype,
                  [&](auto tag) { shows = shows_sign_of_zero<typename decltype(tag)::type>(p); });
  if (shows) return false;
  return conv_depthwise(p) || run_dense(p);
}

inline bool run(const ConvProblem& p) {
  const int64_t doubtful = FloatEnvironment::doubtful_tasks();
  return run_kernels(p) && FloatEnvironment::doubtful_tasks() == doubtful;
}

}  // namespace torch_naiveconv::TNC_ISA
