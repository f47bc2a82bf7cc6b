// bfloat16 convolution on a matrix unit whose one instruction is the contract's 16-bit group:
//
//   total[r][c] += even + odd,   even = the chain over a[r][2k] * b[k][c][0],   k = 0 .. 15
//                                odd  = the chain over a[r][2k + 1] * b[k][c][1]
//
// for tiles of 16 x 16 totals, from 16 rows of 32 terms (a) and 16 pairs of terms of 16 columns
// (b). So a tile of totals stays in the unit while all groups of terms go by, and the kernel only
// brings the operands into that form:
//
//                rows             columns         terms, in the contract's order
//   forward      output channels  output pixels   (ic, kd, kh, kw)
//   grad_input   input channels   input pixels    (oc, kd, kh, kw), rows for each stride phase
//   grad_weight  (ic, taps)       output channels (od, oh, ow) of one sample, sample after sample
//
// With one tap and channels_last, pixels are the rows and channels the columns.
//
// Where a group has fewer than 32 terms, and where a term does not exist, operands are +0: that
// adds +0 to a chain, so it can only turn a chain or a total of -0 into +0, which no result shows
// unless the bias is -0 (shows_sign_of_zero).
//
// The unit is a parameter: MatrixUnit in conv_amx.cpp, or an emulation in the tests. Start reading
// at run_matrix_unit.
#pragma once

#include "amx_pixels.h"
#include "amx_taps.h"

namespace torch_naiveconv::TNC_ISA {

template <class Unit>
bool run_matrix_unit(const ConvProblem& p, const MatrixLimits& limits) {
  const ConvShape& s = p.shape;
  const bool forward = p.direction == Direction::forward;
  if (p.dtype != DType::bfloat16 || p.direction == Direction::grad_bias || s.batch == 0 ||
      s.outputs() == 0 || s.inputs() == 0 || s.taps() == 0)
    return false;
  // What the tiles would be filled with. Tiles that few channels fill pay where they are cheaply
  // packed and have many terms.
  const int64_t rows = p.direction == Direction::grad_weight ? s.group_in() * s.taps()
                       : forward                             ? s.group_out()
                                                             : s.group_in();
  const int64_t others = p.direction == Direction::grad_weight ? s.group_out()
                         : forward                             ? s.group_in() * s.taps()
                                                               : s.group_out() * s.taps();
  const int64_t width = forward ? s.axis[2].out : up(s.axis[2].in, s.axis[2].stride);
  const bool pays = p.direction != Direction::grad_weight &&
                    (width >= limits.least_width || rows_fill_tiles(width)) &&
                    others >= limits.least_terms &&
                    (forward ? s.group_in() : s.group_out()) >= limits.least_channels;
  if (others < limits.least_channels || (rows < limits.least_channels && !pays)) return false;
  // Where windows touch, the unit would take a term or two of one tap at a time, and 30 zeros.
  if (p.direction == Direction::grad_input && s.taps() > limits.most_touching_taps &&
      DisjointWindows<BFloat16>::serves(p))
    return false;
  if (s.batch * s.outputs() * s.taps() * s.group_in() * s.out_channels < limits.least_work)
    return false;
  if (p.direction == Direction::grad_weight) {
    const TapProduct<Unit> product(p, limits);
    if (product.fits()) product.run();
    return product.fits();
  }

  if (shows_sign_of_zero<BFloat16>(p)) return false;
  bool nan = false;
  if (!multiply_grids<Unit>(images_of<BFloat16>(p), s, forward, limits, nan)) return false;
  // As in dense_grad_input: where a tap meets no output the weight was multiplied by +0, which is
  // the term that does not exist unless the weight is not finite. And where it belongs to another
  // stride phase, so was the gradient.
  return forward || !nan || (weight_is_finite<BFloat16>(p) && gradient_is_finite<BFloat16>(p));
}

}  // namespace torch_naiveconv::TNC_ISA
