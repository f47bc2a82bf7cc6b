// THE SPECIFICATION of convolution and its three gradients: each element by itself.
// Start reading here. The loops below are the order of every addition; OrderedSum (arithmetic.h)
// says how that order is cut into groups and rounded; Axis (shape.h) says which element a tap
// reads. Every kernel of this package, on every device, returns the bits of these functions.
#pragma once

#include "arithmetic.h"
#include "shape.h"

namespace torch_naiveconv {

// Padding is data with the value +0.
template <class T>
TNC_HD T padded_input_at(const ConvShape& s, View<const T> input, int64_t n, int64_t c, int64_t d,
                         int64_t h, int64_t w) {
  const bool inside =
      s.axis[0].holds_input(d) && s.axis[1].holds_input(h) && s.axis[2].holds_input(w);
  return inside ? input.at(n, c, d, h, w) : zero<T>();
}

// output[n, oc, od, oh, ow]: terms in the order (ic, kd, kh, kw) of one filter.
template <class T>
TNC_HD T conv_output_at(const ConvShape& s, View<const T> input, View<const T> weight,
                        const T* bias, int64_t n, int64_t oc, int64_t od, int64_t oh, int64_t ow) {
  const int64_t first_channel = oc / s.group_out() * s.group_in();
  OrderedSum<T> sum;
  for (int64_t ic = 0; ic < s.group_in(); ++ic)
    for (int64_t kd = 0; kd < s.axis[0].kernel; ++kd)
      for (int64_t kh = 0; kh < s.axis[1].kernel; ++kh)
        for (int64_t kw = 0; kw < s.axis[2].kernel; ++kw)
          sum.step(padded_input_at(s, input, n, first_channel + ic, s.axis[0].input_of(od, kd),
                                   s.axis[1].input_of(oh, kh), s.axis[2].input_of(ow, kw)),
                   weight.at(oc, ic, kd, kh, kw));
  return sum.result(bias ? bias[oc] : zero<T>());
}

// grad_input[n, c, id, ih, iw]: terms in the order (oc, kd, kh, kw) of the channel's group.
// A tap that meets no output keeps its number and adds nothing. The bias is that of the
// transposed convolution, which is this map.
template <class T>
TNC_HD T conv_grad_input_at(const ConvShape& s, View<const T> grad_output, View<const T> weight,
                            const T* bias, int64_t n, int64_t c, int64_t id, int64_t ih,
                            int64_t iw) {
  const int64_t group = c / s.group_in(), ic = c % s.group_in();
  OrderedSum<T> sum;
  for (int64_t oc = group * s.group_out(); oc < (group + 1) * s.group_out(); ++oc)
    for (int64_t kd = 0; kd < s.axis[0].kernel; ++kd)
      for (int64_t kh = 0; kh < s.axis[1].kernel; ++kh)
        for (int64_t kw = 0; kw < s.axis[2].kernel; ++kw) {
          const int64_t od = s.axis[0].output_of(id, kd);
          const int64_t oh = s.axis[1].output_of(ih, kh);
          const int64_t ow = s.axis[2].output_of(iw, kw);
          if (od >= 0 && oh >= 0 && ow >= 0)
            sum.step(grad_output.at(n, oc, od, oh, ow), weight.at(oc, ic, kd, kh, kw));
          else
            sum.skip();
        }
  return sum.result(bias ? bias[c] : zero<T>());
}

// The sum behind grad_weight[oc, ic, kd, kh, kw]: per sample the terms (od, oh, ow), padding being
// data as in the forward pass; groups start afresh at each sample; `earlier` is the total of the
// samples before the first.
template <class T>
TNC_HD OrderedSum<T> conv_grad_weight_at(const ConvShape& s, View<const T> grad_output,
                                         View<const T> input, Total<T> earlier, int64_t oc,
                                         int64_t ic, int64_t kd, int64_t kh, int64_t kw) {
  const int64_t channel = oc / s.group_out() * s.group_in() + ic;
  OrderedSum<T> sum(earlier);
  for (int64_t n = 0; n < s.batch; ++n) {
    for (int64_t od = 0; od < s.axis[0].out; ++od)
      for (int64_t oh = 0; oh < s.axis[1].out; ++oh)
        for (int64_t ow = 0; ow < s.axis[2].out; ++ow)
          sum.step(grad_output.at(n, oc, od, oh, ow),
                   padded_input_at(s, input, n, channel, s.axis[0].input_of(od, kd),
                                   s.axis[1].input_of(oh, kh), s.axis[2].input_of(ow, kw)));
    sum.cut();
  }
  return sum;
}

// The sum behind grad_bias[oc]: the weight gradient of an input that is 1 everywhere.
template <class T>
TNC_HD OrderedSum<T> conv_grad_bias_at(const ConvShape& s, View<const T> grad_output,
                                       Total<T> earlier, int64_t oc) {
  OrderedSum<T> sum(earlier);
  for (int64_t n = 0; n < s.batch; ++n) {
    for (int64_t od = 0; od < s.axis[0].out; ++od)
      for (int64_t oh = 0; oh < s.axis[1].out; ++oh)
        for (int64_t ow = 0; ow < s.axis[2].out; ++ow)
          sum.step(grad_output.at(n, oc, od, oh, ow), one<T>());
    sum.cut();
  }
  return sum;
}

}  // namespace torch_naiveconv
