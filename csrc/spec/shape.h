// What a call looks like: one Axis per spatial dimension, 1-D and 2-D are 3-D with unit axes.
// The only place that relates output positions, taps and input positions.
#pragma once

#include "types.h"

namespace torch_naiveconv {

// `pad` is the padding before the first element; the padding after is implied by `out`.
struct Axis {
  int64_t in = 1, out = 1, kernel = 1, stride = 1, dilation = 1, pad = 0;

  // The input position that tap k of output o reads; outside [0, in) it lies in the padding.
  TNC_HD int64_t input_of(int64_t o, int64_t k) const { return o * stride - pad + k * dilation; }
  TNC_HD bool holds_input(int64_t i) const { return i >= 0 && i < in; }
  TNC_HD bool reads_padding() const {
    return !holds_input(input_of(0, 0)) || !holds_input(input_of(out - 1, kernel - 1));
  }

  // The output whose tap k reads input i, or -1.
  TNC_HD int64_t output_of(int64_t i, int64_t k) const {
    const int64_t distance = i + pad - k * dilation;
    if (distance < 0 || distance % stride != 0) return -1;
    const int64_t o = distance / stride;
    return o < out ? o : -1;
  }

  // The tap with which output o reads input i, or -1.
  TNC_HD int64_t tap_of(int64_t o, int64_t i) const {
    const int64_t distance = i + pad - o * stride;
    if (distance < 0 || distance % dilation != 0) return -1;
    const int64_t k = distance / dilation;
    return k < kernel ? k : -1;
  }

  // The input positions that `outputs` windows next to each other span.
  TNC_HD int64_t extent(int64_t outputs) const {
    return (outputs - 1) * stride + (kernel - 1) * dilation + 1;
  }

  // The outputs whose window spans input i are in [first_output, last_output].
  TNC_HD int64_t first_output(int64_t i) const {
    const int64_t distance = i + pad - (kernel - 1) * dilation;
    return distance <= 0 ? 0 : (distance + stride - 1) / stride;
  }
  TNC_HD int64_t last_output(int64_t i) const {
    const int64_t o = (i + pad) / stride;
    return o < out ? o : out - 1;
  }
};

struct ConvShape {
  int64_t batch = 0, in_channels = 0, out_channels = 0, groups = 1;
  Axis axis[3];  // depth, height, width

  TNC_HD int64_t group_in() const { return in_channels / groups; }    // weight.size(1)
  TNC_HD int64_t group_out() const { return out_channels / groups; }  // filters of one group
  TNC_HD int64_t taps() const { return axis[0].kernel * axis[1].kernel * axis[2].kernel; }
  TNC_HD int64_t inputs() const { return axis[0].in * axis[1].in * axis[2].in; }
  TNC_HD int64_t outputs() const { return axis[0].out * axis[1].out * axis[2].out; }
};

struct PoolShape {
  int64_t batch = 0, channels = 0;
  Axis axis[3];

  TNC_HD int64_t taps() const { return axis[0].kernel * axis[1].kernel * axis[2].kernel; }
  TNC_HD int64_t inputs() const { return axis[0].in * axis[1].in * axis[2].in; }
  TNC_HD int64_t outputs() const { return axis[0].out * axis[1].out * axis[2].out; }

  // Offset inside the window <-> taps <-> flat position in the input plane (what torch calls
  // indices).
  TNC_HD int64_t offset_of(int64_t kd, int64_t kh, int64_t kw) const {
    return (kd * axis[1].kernel + kh) * axis[2].kernel + kw;
  }
  TNC_HD int64_t flat_of(int64_t id, int64_t ih, int64_t iw) const {
    return (id * axis[1].in + ih) * axis[2].in + iw;
  }
  TNC_HD int64_t flat_of_offset(int64_t offset, int64_t od, int64_t oh, int64_t ow) const {
    if (offset < 0) return -1;
    const int64_t kw = offset % axis[2].kernel, rest = offset / axis[2].kernel;
    const int64_t kh = rest % axis[1].kernel, kd = rest / axis[1].kernel;
    return flat_of(axis[0].input_of(od, kd), axis[1].input_of(oh, kh), axis[2].input_of(ow, kw));
  }
};

// A strided 5-D tensor: (n, c, d, h, w), or (oc, ic, kd, kh, kw) for a weight. Strides in elements.
template <class T>
struct View {
  T* data = nullptr;
  int64_t stride[5] = {0, 0, 0, 0, 0};

  TNC_HD T& at(int64_t n, int64_t c, int64_t d, int64_t h, int64_t w) const {
    return data[n * stride[0] + c * stride[1] + d * stride[2] + h * stride[3] + w * stride[4]];
  }
};

// A position in (n, c, d, h, w), counted in that order with w fastest.
struct Position {
  int64_t n, c, d, h, w;
  TNC_HD static Position of(int64_t flat, int64_t C, int64_t D, int64_t H, int64_t W) {
    Position p;
    p.w = flat % W, flat /= W;
    p.h = flat % H, flat /= H;
    p.d = flat % D, flat /= D;
    p.c = flat % C;
    p.n = flat / C;
    return p;
  }
};

}  // namespace torch_naiveconv
