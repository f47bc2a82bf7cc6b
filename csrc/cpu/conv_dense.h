// Convolution as a packed implicit matrix product: total[row][lane] = sum over terms of
// row operand x lane operand. What plays which part:
//
//                rows            lanes            terms, in the contract's order
//   forward      output pixels   output channels  (ic, kd, kh, kw)
//   grad_input   input pixels    input channels   (oc, kd, kh, kw), of each stride phase
//   grad_weight  (ic, taps)      output channels  (od, oh, ow) of one sample, sample after sample
//
// Rows are never packed: the microkernel reads a row through a pointer and one offset per term that
// all rows share, so a window, a stride and a dilation cost nothing. They point into the image
// itself or, where a tap can meet padding or 16-bit elements serve more than one, into a
// zero-padded copy (a patch) of the few channels in work. Lanes come from panels of one group of
// terms.
//
// Start reading at run_dense, at the end; multiply_images (conv_pixels.h) and multiply_windows
// (conv_windows.h) are the loops; the other files have ways of their own for a few shapes.
#pragma once

#include "conv_disjoint.h"
#include "conv_pixels.h"
#include "conv_sliding.h"
#include "conv_tiny.h"
#include "conv_windows.h"

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

// Is no element infinite or NaN?
template <class S>
bool all_finite(const RawView& view, const int64_t (&size)[5]) {
  using T = typename Kind<S>::T;
  for (int64_t n = 0; n < size[0]; ++n)
    for (int64_t c = 0; c < size[1]; ++c)
      for (int64_t d = 0; d < size[2]; ++d)
        for (int64_t h = 0; h < size[3]; ++h) {
          const S* const row = static_cast<const S*>(view.data) + n * view.stride[0] +
                               c * view.stride[1] + d * view.stride[2] + h * view.stride[3];
          bool finite = true;
          for (int64_t w = 0; w < size[4]; ++w) {
            const T x = widened(row[w * view.stride[4]]);
            finite = finite & (x - x == T(0));
          }
          if (!finite) return false;
        }
  return true;
}

template <class S>
bool weight_is_finite(const ConvProblem& p) {
  const ConvShape& s = p.shape;
  return all_finite<S>(p.weight, {s.out_channels, s.group_in(), s.axis[0].kernel, s.axis[1].kernel,
                                  s.axis[2].kernel});
}
template <class S>
bool gradient_is_finite(const ConvProblem& p) {
  const ConvShape& s = p.shape;
  return all_finite<S>(p.output,
                       {s.batch, s.out_channels, s.axis[0].out, s.axis[1].out, s.axis[2].out});
}

template <class S>
bool dense_forward(const ConvProblem& p) {
  const ConvShape& s = p.shape;
  const Images<S> call = images_of<S>(p);
  const GridAxis grid[3] = {forward_axis(s.axis[0]), forward_axis(s.axis[1]),
                            forward_axis(s.axis[2])};
  bool special = false;
  if constexpr (can_be_tiny<S>)
    if (multiply_tiny(call, grid, special)) return true;
  if constexpr (can_slide<S>)
    if (multiply_sliding(call, grid)) return true;
  // Padding times an infinity or a NaN is a NaN: it may be left out only of finite weights. A
  // weight that is not finite shows, since each tap that is cut somewhere reads the image
  // elsewhere.
  if (!multiply_images(call, &grid, 1, true, special)) return false;
  return !special || weight_is_finite<S>(p) || multiply_images(call, &grid, 1, false, special);
}

// use(grid) for each stride phase that has taps, until it returns false.
template <class Use>
bool each_phase(const ConvShape& s, const Use& use) {
  for (int64_t d = 0; d < least(s.axis[0].stride, s.axis[0].in); ++d)
    for (int64_t h = 0; h < least(s.axis[1].stride, s.axis[1].in); ++h)
      for (int64_t w = 0; w < least(s.axis[2].stride, s.axis[2].in); ++w) {
        const GridAxis grid[3] = {gradient_axis(s.axis[0], d), gradient_axis(s.axis[1], h),
                                  gradient_axis(s.axis[2], w)};
        if (grid[0].taps * grid[1].taps * grid[2].taps > 0 && !use(grid)) return false;
      }
  return true;
}

template <class S>
bool dense_grad_input(const ConvProblem& p) {
  const ConvShape& s = p.shape;
  if (DisjointWindows<S>::serves(p) && !shows_sign_of_zero<S>(p))
    return DisjointWindows<S>(p).run(), true;
  const Images<S> call = images_of<S>(p);
  bool special = false;
  int64_t phases = 1;
  bool all_have_taps = true;
  for (const Axis& a : s.axis) {
    phases *= least(a.stride, a.in);
    for (int64_t phase = 0; phase < least(a.stride, a.in); ++phase)
      all_have_taps = all_have_taps && gradient_axis(a, phase).taps > 0;
  }
  const GridAxis first[3] = {gradient_axis(s.axis[0], 0), gradient_axis(s.axis[1], 0),
                             gradient_axis(s.axis[2], 0)};
  // Rows of two phases are stored together, as are vectors of pixels of more.
  const bool in_pairs = s.axis[2].stride == 2 && s.axis[2].in > 1 && p.input.stride[4] == 1;
  if (phases > 1 && phases <= most_phases && all_have_taps &&
      (in_pairs || has_vectors_of_pixels(call, first))) {
    GridAxis grids[most_phases][3];  // the phases read one patch
    int count = 0;
    each_phase(s, [&](const GridAxis(&grid)[3]) {
      for (int a = 0; a < 3; ++a) grids[count][a] = grid[a];
      ++count;
      return true;
    });
    if (!multiply_images(call, grids, count, false, special)) return false;
  } else {
    // The phases of as many samples take turns as stay in the caches while they are written.
    const int64_t sample = s.in_channels * s.inputs() * int64_t{sizeof(S)};
    const int64_t at_once = phases == 1 ? s.batch : thread_count() * most(phase_bytes / sample, 1);
    for (int64_t n = 0; n < s.batch; n += at_once) {
      Images<S> part = call;
      part.image += n * p.output.stride[0];
      part.target += n * p.input.stride[0];
      part.batch = least(at_once, s.batch - n);
      if (!all_have_taps) {
        GridAxis all[3];
        for (int a = 0; a < 3; ++a) all[a].count = s.axis[a].in;
        store_bias(part, all);
      }
      const bool done = each_phase(s, [&](const GridAxis(&grid)[3]) {
        if constexpr (can_be_tiny<S>)
          if (multiply_tiny(part, grid, special)) return true;
        if constexpr (can_slide<S>)
          if (multiply_sliding(part, grid)) return true;
        return multiply_images(part, &grid, 1, true, special);
      });
      if (!done) return false;
    }
  }
  // Where a tap meets no output the loops may have multiplied the weight by +0: the term that does
  // not exist, unless the weight is not finite, and then a NaN came out.
  return !special || weight_is_finite<S>(p);
}

// One tap, no padding: then output and input play the same part in the weight gradient.
inline bool is_pointwise(const ConvShape& s) {
  bool yes = true;
  for (const Axis& a : s.axis) yes = yes && a.kernel == 1 && !a.reads_padding();
  return yes;
}
inline ConvProblem swapped(const ConvProblem& p) {
  ConvProblem q = p;
  q.shape.in_channels = p.shape.out_channels;
  q.shape.out_channels = p.shape.in_channels;
  q.input = p.output;
  q.output = p.input;
  q.weight.stride[0] = p.weight.stride[1];
  q.weight.stride[1] = p.weight.stride[0];
  for (int a = 0; a < 3; ++a) {
    const int64_t out = p.shape.axis[a].out;
    q.shape.axis[a] = Axis{};
    q.shape.axis[a].in = q.shape.axis[a].out = out;
    q.output.stride[a + 2] *= p.shape.axis[a].stride;
  }
  return q;
}

// The share of the products that read padding; 0 if those of some output do nothing else.
inline double share_of_padding(const ConvShape& s) {
  double inside = 1;
  for (const Axis& a : s.axis) {
    int64_t all = 0;
    for (int64_t o = 0; o < a.out; ++o) {
      const int64_t before = all;
      for (int64_t k = 0; k < a.kernel; ++k) all += a.holds_input(a.input_of(o, k));
      if (all == before) return 0;
    }
    inside *= static_cast<double>(all) / static_cast<double>(a.out * a.kernel);
  }
  return 1 - inside;
}

template <class S>
bool dense_grad_weight(const ConvProblem& p) {
  constexpr int L = Vec<typename Kind<S>::T>::lanes;
  const ConvShape& s = p.shape;
  bool special = false;
  if (p.total != nullptr) return multiply_windows<S>(p, false, special);
  if (s.groups == 1 && is_pointwise(s)) {
    // Packing a vector of lanes costs about as much as 8 products; few rows, or one vector of lanes
    // only, are too few chains to hide the latency of an fma.
    const auto cost = [](int64_t lanes, int64_t rows) {
      const int64_t vecs = up(lanes, L);
      return vecs * 8 + (vecs == 1 ? 2 : vecs) * most(rows, 3);
    };
    const bool swap = cost(s.in_channels, s.out_channels) < cost(s.out_channels, s.in_channels);
    return multiply_windows<S>(swap ? swapped(p) : p, false, special);
  }
  // A product of padding and an infinity or a NaN is a NaN: it may be left out only of a finite
  // gradient. One that is not finite shows, since each output reads the image with some tap. Other
  // such products are zeros, which can change but the sign of a zero: totals get +0 at the end.
  // 16-bit types are copied to be widened in any case, and gain only by what is left out.
  if (s.group_in() < 16 || share_of_padding(s) <= (is_half_type<S> ? 0.04 : 0))
    return multiply_windows<S>(p, false, special);
  return (multiply_windows<S>(p, true, special) && (!special || gradient_is_finite<S>(p))) ||
         multiply_windows<S>(p, false, special);
}

// Joins axes of one tap whose pixels follow one another in both tensors, so that a 1x1 layer has
// one long row: there the last vector of a row, or of a box, counts for little.
inline ConvProblem joined(const ConvProblem& p) {
  ConvProblem q = p;
  Axis(&axis)[3] = q.shape.axis;
  const auto copies = [](const Axis& a) {
    return a.kernel == 1 && a.pad == 0 && a.stride == 1 && a.in == a.out;
  };
  for (int a = 1; a >= 0; --a) {
    const int64_t row = axis[2].out;
    if (!copies(axis[a]) || !copies(axis[2]) || p.input.stride[a + 2] != row * p.input.stride[4] ||
        p.output.stride[a + 2] != row * p.output.stride[4])
      break;
    axis[2].in = axis[2].out = axis[a].out * row;
    axis[a].in = axis[a].out = 1;
  }
  return q;
}

inline bool run_dense(const ConvProblem& p) {
  if (p.shape.batch == 0 || p.shape.outputs() == 0 || p.shape.group_in() == 0 ||
      p.shape.group_out() == 0 || p.shape.inputs() == 0 || p.shape.taps() == 0)
    return false;
  const ConvProblem q = joined(p);
  bool done = false;
  with_float_type(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    switch (p.direction) {
      case Direction::forward: done = dense_forward<S>(q); return;
      case Direction::grad_input: done = dense_grad_input<S>(q); return;
      case Direction::grad_weight: done = dense_grad_weight<S>(q); return;
      case Direction::grad_bias: return;
    }
  });
  return done;
}

}  // namespace torch_naiveconv::TNC_ISA
