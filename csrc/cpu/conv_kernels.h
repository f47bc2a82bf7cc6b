// What every vector row of the convolution table runs: the kernels made for a shape, in the order
// in which they are asked. Each returns false to decline. So does the row if a task may have
// flushed subnormals in another way than the contract's (another call's task counts too: that costs
// time, no bits).
#pragma once

#include "conv_dense.h"
#include "conv_depthwise.h"
#include "conv_grad_bias.h"

namespace torch_naiveconv::TNC_ISA {

// Does the sign of a zero total show? The kernels may add +0 where the contract adds nothing, and
// the other way round. In flushed arithmetic a total can be -0, and that plus a bias of -0 is -0.
template <class S>
bool shows_sign_of_zero(const ConvProblem& p) {
  const S* const bias = static_cast<const S*>(p.bias);
  if (!is_half_type<S> || bias == nullptr) return false;
  const bool forward = p.direction == Direction::forward;
  bool shows = false;
  for (int64_t c = 0; c < (forward ? p.shape.out_channels : p.shape.in_channels); ++c) {
    uint16_t bits;
    __builtin_memcpy(&bits, bias + c, sizeof(bits));
    const uint16_t exponent = std::is_same_v<S, BFloat16> ? 0x7f80 : 0x7fff;  // and mantissa
    shows = shows || ((bits & 0x8000u) != 0 && (bits & exponent) == 0);
  }
  return shows;
}

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
