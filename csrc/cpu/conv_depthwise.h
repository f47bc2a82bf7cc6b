// Convolutions of few channels per group: depthwise, ResNeXt, small odd groups. conv_depthwise
// asks, in this order:
//
//   depthwise_strided.h      forward of stride 2 in NCHW (AVX-512): lanes are pixels of a row
//   depthwise_planes.h       forward, grad_input of NCHW: lanes are pixels of a row
//   depthwise_in_place.h     forward, grad_input of channels_last: lanes are channels
//   depthwise_blocks.h       forward, grad_input of the rest: lanes are channels
//   depthwise_grad_weight.h  lanes are channels
//
// A strided grad_input is a set of stride-1 maps, one per phase (position modulo stride), each
// with the taps that meet it. Groups of terms and the two chains of 16-bit types are those of
// spec/arithmetic.h; the worker's floating-point environment does the flushing.
#pragma once

#include "depthwise_blocks.h"
#include "depthwise_grad_weight.h"
#include "depthwise_in_place.h"
#include "depthwise_planes.h"
#include "depthwise_strided.h"

namespace torch_naiveconv::TNC_ISA {

inline bool conv_depthwise(const ConvProblem& p) {
  const ConvShape& s = p.shape;
  if (s.groups <= 1 || s.batch == 0 || s.group_in() == 0 || s.group_out() == 0 || s.inputs() == 0 ||
      s.outputs() == 0 || s.taps() == 0)
    return false;
  bool taken = false;
  with_float_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p.direction == Direction::grad_weight) {
      taken = few_channels_grad_weight<T>(p);
      return;
    }
    if constexpr (joins_windows<Vec<Total<T>>>) taken = map_strided<T>(p);
    taken = taken || map_planes<T>(p);
    if constexpr (chains_of<T> == 1 || Vec<Total<T>>::registers == 32)
      taken = taken || map_in_place<T>(p);
    taken = taken || map_blocks<T>(p);
  });
  return taken;
}

}  // namespace torch_naiveconv::TNC_ISA
