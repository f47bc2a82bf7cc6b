// Depthwise convolution (one input channel a group) and the bias gradient: no tile would fill, so
// each thread sums by itself. Start reading at launch_depthwise, which sends contiguous float32 to
// depthwise_patch.h and depthwise_groups.h. Here is the rest, summed from memory. Forward and input
// gradient: four neighbours of a row a thread, with the specification's own sums. Weight and bias
// gradient: one group of terms a thread into a workspace [group][element], which FoldGroups adds up
// in order. Bodies for the device and for the host tests.
#pragma once

#include "../spec/max_pool.h"
#include "depthwise_groups.h"

namespace torch_naiveconv {

constexpr int depthwise_run = 4;  // results of a thread

struct DepthwisePlan {
  ConvProblem problem;
  // Results as (n, c, d, h, run of w), or with channels fastest.
  Divider channels, size[3], by_multiplier;
  bool channels_last;
  int64_t threads;

  struct Site {
    int n, c, d, h, w;
  };
  TNC_HD Site site_of(uint32_t flat) const {
    Site site;
    if (channels_last) site.c = static_cast<int>(channels.take(flat));
    site.w = static_cast<int>(size[2].take(flat)) * depthwise_run;
    site.h = static_cast<int>(size[1].take(flat));
    site.d = static_cast<int>(size[0].take(flat));
    if (!channels_last) site.c = static_cast<int>(channels.take(flat));
    site.n = static_cast<int>(flat);
    return site;
  }
};

inline DepthwisePlan make_depthwise_plan(const ConvProblem& p) {
  const ConvShape& s = p.shape;
  const bool forward = p.direction == Direction::forward;
  const int64_t channels = forward ? s.out_channels : s.in_channels;
  DepthwisePlan plan{};
  plan.problem = p;
  plan.channels = Divider(channels);
  plan.by_multiplier = Divider(s.group_out());
  plan.channels_last = (forward ? p.output : p.input).stride[1] == 1;
  plan.threads = s.batch * channels;
  for (int a = 0; a < 3; ++a) {
    int64_t size = forward ? s.axis[a].out : s.axis[a].in;
    if (a == 2) size = ceil_div(size, depthwise_run);
    plan.size[a] = Divider(size);
    plan.threads *= size;
  }
  return plan;
}

TNC_HD bool inside(int position, int64_t size) { return position >= 0 && position < size; }

// width > 0: kernels 1 x width x width without dilation, stride x stride; the loops unroll and a
// row of the input is read once for all four results. width 0: any kernel.
template <class T, int width, int stride>
struct DepthwiseForward {
  DepthwisePlan plan;

  TNC_HD void operator()(int64_t thread) const {
    const ConvProblem& p = plan.problem;
    const Axis(&axis)[3] = p.shape.axis;
    const auto o = plan.site_of(static_cast<uint32_t>(thread));
    const int channel = static_cast<int>(plan.by_multiplier.quotient(static_cast<uint32_t>(o.c)));
    const T* plane =
        static_cast<const T*>(p.input.data) + o.n * p.input.stride[0] + channel * p.input.stride[1];
    const T* filter = static_cast<const T*>(p.weight.data) + o.c * p.weight.stride[0];
    OrderedSum<T> sum[depthwise_run];
    const int kd_count = static_cast<int>(axis[0].kernel);
    const int kh_count = width > 0 ? width : static_cast<int>(axis[1].kernel);
    const int kw_count = width > 0 ? width : static_cast<int>(axis[2].kernel);
    for (int kd = 0; kd < (width > 0 ? 1 : kd_count); ++kd) {
      const int id = static_cast<int>(axis[0].input_of(o.d, kd));
      TNC_UNROLL_IF(width > 0)
      for (int kh = 0; kh < kh_count; ++kh) {
        const int ih = static_cast<int>(axis[1].input_of(o.h, kh));
        const bool row_exists = inside(id, axis[0].in) && inside(ih, axis[1].in);
        const T* row = plane + id * p.input.stride[2] + ih * p.input.stride[3];
        const T* taps = filter + kd * p.weight.stride[2] + kh * p.weight.stride[3];
        if constexpr (width > 0) {
          constexpr int reach = (depthwise_run - 1) * stride + width;
          const int first = o.w * stride - static_cast<int>(axis[2].pad);
          T x[reach];
          TNC_UNROLL
          for (int j = 0; j < reach; ++j)
            x[j] = row_exists && inside(first + j, axis[2].in)
                       ? row[(first + j) * p.input.stride[4]]
                       : zero<T>();
          TNC_UNROLL
          for (int kw = 0; kw < width; ++kw) {
            const T tap = taps[kw * p.weight.stride[4]];
            TNC_UNROLL
            for (int r = 0; r < depthwise_run; ++r) sum[r].step(x[r * stride + kw], tap);
          }
        } else {
          for (int kw = 0; kw < kw_count; ++kw) {
            const T tap = taps[kw * p.weight.stride[4]];
            TNC_UNROLL
            for (int r = 0; r < depthwise_run; ++r) {
              const int iw = static_cast<int>(axis[2].input_of(o.w + r, kw));
              sum[r].step(
                  row_exists && inside(iw, axis[2].in) ? row[iw * p.input.stride[4]] : zero<T>(),
                  tap);
            }
          }
        }
      }
    }
    const T bias = p.bias != nullptr ? static_cast<const T*>(p.bias)[o.c] : zero<T>();
    TNC_UNROLL
    for (int r = 0; r < depthwise_run; ++r)
      if (o.w + r < axis[2].out)
        p.output.as<T>().at(o.n, o.c, o.d, o.h, o.w + r) = sum[r].result(bias);
  }
};

// One filter a channel. width > 0 as above: taps that meet no output add 0 * weight, which is seen
// only as a NaN, and a NaN is computed again without them.
template <class T, int width, int stride>
struct DepthwiseGradInput {
  DepthwisePlan plan;

  // With `lead` the first m >= 0 for which first + m is a multiple of the stride.
  template <int lead>
  TNC_HD void steps(OrderedSum<T> (&sum)[depthwise_run], const T* row, bool row_exists, int first,
                    const T* taps) const {
    const ConvProblem& p = plan.problem;
    constexpr int reach = (depthwise_run + width - 2 - lead) / stride + 1;
    const int first_output = (first + lead) / stride;
    T x[reach];
    TNC_UNROLL
    for (int j = 0; j < reach; ++j)
      x[j] = row_exists && inside(first_output + j, p.shape.axis[2].out)
                 ? row[(first_output + j) * p.output.stride[4]]
                 : zero<T>();
    TNC_UNROLL
    for (int kw = 0; kw < width; ++kw) {
      const T tap = taps[kw * p.weight.stride[4]];
      TNC_UNROLL
      for (int r = 0; r < depthwise_run; ++r) {
        const int m = r + width - 1 - kw;
        if (m >= lead && (m - lead) % stride == 0)
          sum[r].step(x[m >= lead ? (m - lead) / stride : 0], tap);
        else
          sum[r].skip();
      }
    }
  }

  TNC_HD void operator()(int64_t thread) const {
    const ConvProblem& p = plan.problem;
    const Axis(&axis)[3] = p.shape.axis;
    const auto i = plan.site_of(static_cast<uint32_t>(thread));
    const T* plane =
        static_cast<const T*>(p.output.data) + i.n * p.output.stride[0] + i.c * p.output.stride[1];
    const T* filter = static_cast<const T*>(p.weight.data) + i.c * p.weight.stride[0];
    OrderedSum<T> sum[depthwise_run];
    if constexpr (width > 0) {
      const int first = i.w + static_cast<int>(axis[2].pad) - (width - 1);
      TNC_UNROLL
      for (int kh = 0; kh < width; ++kh) {
        const int distance = i.h + static_cast<int>(axis[1].pad) - kh;
        const int oh = distance / stride;
        const bool row_exists =
            distance >= 0 && oh * stride == distance && oh < axis[1].out && i.d < axis[0].out;
        const T* row = plane + i.d * p.output.stride[2] + oh * p.output.stride[3];
        const T* taps = filter + kh * p.weight.stride[3];
        if (stride == 2 && (first & 1) != 0)
          steps<stride - 1>(sum, row, row_exists, first, taps);
        else
          steps<0>(sum, row, row_exists, first, taps);
      }
    }
    const T bias = p.bias != nullptr ? static_cast<const T*>(p.bias)[i.c] : zero<T>();
    const auto grad_input = p.input.as<T>();
    TNC_UNROLL_IF(width > 0)
    for (int r = 0; r < depthwise_run; ++r) {
      if (i.w + r >= axis[2].in) continue;
      T& result = grad_input.at(i.n, i.c, i.d, i.h, i.w + r);
      if constexpr (width > 0) {
        result = sum[r].result(bias);
        if (!is_nan(result)) continue;
      }
      result = exact_sum(plane, filter, i.d, i.h, i.w + r).result(bias);
    }
  }

  // The specification's sum, in 32-bit arithmetic.
  TNC_HD OrderedSum<T> exact_sum(const T* plane, const T* filter, int id, int ih, int iw) const {
    const ConvProblem& p = plan.problem;
    const Axis(&axis)[3] = p.shape.axis;
    OrderedSum<T> sum;
    for (int kd = 0; kd < axis[0].kernel; ++kd)
      for (int kh = 0; kh < axis[1].kernel; ++kh) {
        const int od = output_of(axis[0], id, kd), oh = output_of(axis[1], ih, kh);
        const T* row = plane + od * p.output.stride[2] + oh * p.output.stride[3];
        const T* taps = filter + kd * p.weight.stride[2] + kh * p.weight.stride[3];
        for (int kw = 0; kw < axis[2].kernel; ++kw) {
          const int ow = output_of(axis[2], iw, kw);
          if (od >= 0 && oh >= 0 && ow >= 0)
            sum.step(row[ow * p.output.stride[4]], taps[kw * p.weight.stride[4]]);
          else
            sum.skip();
        }
      }
    return sum;
  }

  TNC_HD static int output_of(const Axis& axis, int i, int k) {
    const int distance = i + static_cast<int>(axis.pad) - k * static_cast<int>(axis.dilation);
    const int o = distance / static_cast<int>(axis.stride);
    return distance >= 0 && o * static_cast<int>(axis.stride) == distance && o < axis.out ? o : -1;
  }
};

// ---- weight and bias gradient: groups of terms into a workspace ---------------------------------

struct GroupPlan {
  ConvProblem problem;
  int groups;  // of one sample
  Divider by_groups, filters, kernel[3], by_multiplier, out[3];
  bool filters_fastest;
  int64_t elements, threads;
};

// Threads as (sample, group, filter, kd, kh, run of kw), or with filters fastest.
inline GroupPlan make_group_plan(const ConvProblem& p, int group_terms) {
  const ConvShape& s = p.shape;
  const bool bias = p.direction == Direction::grad_bias;
  GroupPlan plan{};
  plan.problem = p;
  plan.groups = static_cast<int>(ceil_div(s.outputs(), group_terms));
  plan.by_groups = Divider(plan.groups);
  plan.filters = Divider(s.out_channels);
  plan.by_multiplier = Divider(bias ? 1 : s.group_out());
  plan.filters_fastest = p.output.stride[1] == 1;
  plan.elements = s.out_channels * (bias ? 1 : s.group_in() * s.taps());
  plan.threads = s.batch * plan.groups * s.out_channels;
  for (int a = 0; a < 3; ++a) {
    int64_t size = bias ? 1 : s.axis[a].kernel;
    if (a == 2) size = ceil_div(size, depthwise_run);
    plan.kernel[a] = Divider(size);
    plan.threads *= size;
    plan.out[a] = Divider(s.axis[a].out);
  }
  return plan;
}

template <class T, bool bias>
struct GroupSums {
  GroupPlan plan;
  Total<T>* workspace;

  TNC_HD void operator()(int64_t thread) const {
    using Sum = Arithmetic<T>;
    const ConvProblem& p = plan.problem;
    const Axis(&axis)[3] = p.shape.axis;
    uint32_t flat = static_cast<uint32_t>(thread);
    int oc = 0;
    if (plan.filters_fastest) oc = static_cast<int>(plan.filters.take(flat));
    const int kw = static_cast<int>(plan.kernel[2].take(flat)) * depthwise_run;
    const int kh = static_cast<int>(plan.kernel[1].take(flat));
    const int kd = static_cast<int>(plan.kernel[0].take(flat));
    if (!plan.filters_fastest) oc = static_cast<int>(plan.filters.take(flat));
    const int group = static_cast<int>(plan.by_groups.take(flat));
    const int n = static_cast<int>(flat);

    int position = group * group_length<T>;
    const int outputs = static_cast<int>(p.shape.outputs());
    const int end = position + group_length<T> < outputs ? position + group_length<T> : outputs;
    uint32_t rest = static_cast<uint32_t>(position);
    int ow = static_cast<int>(plan.out[2].take(rest));
    int oh = static_cast<int>(plan.out[1].take(rest));
    int od = static_cast<int>(rest);
    const T* gradient =
        static_cast<const T*>(p.output.data) + n * p.output.stride[0] + oc * p.output.stride[1];
    const int channel = static_cast<int>(plan.by_multiplier.quotient(static_cast<uint32_t>(oc)));
    const T* input =
        static_cast<const T*>(p.input.data) + n * p.input.stride[0] + channel * p.input.stride[1];

    constexpr int run = bias ? 1 : depthwise_run;
    typename Sum::Chain chain[run];
    for (; position < end; ++position) {
      const auto g = Sum::load(
          gradient[od * p.output.stride[2] + oh * p.output.stride[3] + ow * p.output.stride[4]]);
      const bool odd = (position & 1) != 0;
      if constexpr (bias) {
        Sum::step(chain[0], g, typename Sum::Value(1), odd);
      } else {
        const int id = static_cast<int>(axis[0].input_of(od, kd));
        const int ih = static_cast<int>(axis[1].input_of(oh, kh));
        const bool row_exists = inside(id, axis[0].in) && inside(ih, axis[1].in);
        const T* row = input + id * p.input.stride[2] + ih * p.input.stride[3];
        TNC_UNROLL
        for (int r = 0; r < run; ++r) {
          const int iw = static_cast<int>(axis[2].input_of(ow, kw + r));
          const T x =
              row_exists && inside(iw, axis[2].in) ? row[iw * p.input.stride[4]] : zero<T>();
          Sum::step(chain[r], g, Sum::load(x), odd);
        }
      }
      if (++ow == axis[2].out) {
        ow = 0;
        if (++oh == axis[1].out) {
          oh = 0;
          ++od;
        }
      }
    }
    const int kernel_width = bias ? 1 : static_cast<int>(axis[2].kernel);
    const int kernel_height = bias ? 1 : static_cast<int>(axis[1].kernel);
    const int kernel_depth = bias ? 1 : static_cast<int>(axis[0].kernel);
    Total<T>* values =
        workspace + (static_cast<int64_t>(n) * plan.groups + group) * plan.elements +
        ((static_cast<int64_t>(oc) * kernel_depth + kd) * kernel_height + kh) * kernel_width + kw;
    TNC_UNROLL
    for (int r = 0; r < run; ++r)
      if (kw + r < kernel_width) values[r] = Sum::value(chain[r]);
  }
};

// Adds up the groups of one element and stores it.
template <class T>
struct FoldGroups {
  GroupPlan plan;
  const Total<T>* workspace;

  TNC_HD void operator()(int64_t flat) const {
    const ConvProblem& p = plan.problem;
    const auto* earlier = static_cast<const Total<T>*>(p.total);
    const Total<T> total =
        fold_groups<T>(earlier != nullptr ? earlier[flat] : Total<T>(0), workspace + flat,
                       plan.elements, p.shape.batch * plan.groups);
    int64_t at = flat;
    if (p.direction == Direction::grad_weight) {
      const Position k = Position::of(flat, p.shape.group_in(), p.shape.axis[0].kernel,
                                      p.shape.axis[1].kernel, p.shape.axis[2].kernel);
      const auto& stride = p.weight.stride;
      at = k.n * stride[0] + k.c * stride[1] + k.d * stride[2] + k.h * stride[3] + k.w * stride[4];
    }
    OrderedSum<T> sum(total);
    if (p.keep_total)
      static_cast<Total<T>*>(p.weight.data)[at] = sum.total();
    else
      static_cast<T*>(p.weight.data)[at] = sum.result(zero<T>());
  }
};

// ---- which kernel ------------------------------------------------------------------------------

// Calls visit with width and stride where there is an unrolled kernel for them, else with 0 and 1.
template <class T, class Visit>
void with_kernel(const ConvShape& s, const Visit& visit) {
  const Axis &d = s.axis[0], &h = s.axis[1], &w = s.axis[2];
  const bool square = d.kernel == 1 && d.stride == 1 && d.pad == 0 && h.kernel == w.kernel &&
                      h.stride == w.stride && h.dilation == 1 && w.dilation == 1;
  using Zero = std::integral_constant<int, 0>;
  using One = std::integral_constant<int, 1>;
  using Two = std::integral_constant<int, 2>;
  using Three = std::integral_constant<int, 3>;
  using Five = std::integral_constant<int, 5>;
  using Seven = std::integral_constant<int, 7>;
  if constexpr (std::is_same_v<T, float>) {
    if (square && w.stride == 1 && w.kernel == 3) return visit(Three{}, One{});
    if (square && w.stride == 1 && w.kernel == 5) return visit(Five{}, One{});
    if (square && w.stride == 1 && w.kernel == 7) return visit(Seven{}, One{});
    if (square && w.stride == 2 && w.kernel == 3) return visit(Three{}, Two{});
    if (square && w.stride == 2 && w.kernel == 5) return visit(Five{}, Two{});
  }
  visit(Zero{}, One{});
}

// Weight and bias gradient. Returns false to decline.
template <class T, class Launcher>
bool launch_groups(const ConvProblem& p, Launcher& launcher) {
  const GroupPlan plan = make_group_plan(p, group_length<T>);
  const int64_t values = p.shape.batch * plan.groups * plan.elements;
  auto* workspace =
      static_cast<Total<T>*>(launcher.allocate(values * static_cast<int64_t>(sizeof(Total<T>))));
  bool done = false;
  if constexpr (std::is_same_v<T, float>)
    done = (sums_patches(p) && launch_patch_groups(p, workspace, launcher)) ||
           launch_line_groups(p, workspace, launcher);
  if (!done && p.direction == Direction::grad_bias)
    launcher.each(plan.threads, GroupSums<T, true>{plan, workspace});
  else if (!done && p.shape.group_in() == 1)
    launcher.each(plan.threads, GroupSums<T, false>{plan, workspace});
  else if (!done)
    return false;
  launcher.each(plan.elements, FoldGroups<T>{plan, workspace}, few_threads);
  return true;
}

// Returns false to decline.
template <class Launcher>
bool launch_depthwise(const ConvProblem& p, Launcher& launcher) {
  const ConvShape& s = p.shape;
  constexpr int64_t most = int64_t{1} << 29;
  if (p.dtype > DType::bfloat16) return false;
  if (p.direction == Direction::grad_bias) {
    if (s.batch * s.out_channels >= most || s.outputs() >= most ||
        s.batch * s.out_channels * ceil_div(s.outputs(), 32) >= most)
      return false;
  } else {
    const bool one_filter = s.group_out() == 1 || p.direction != Direction::grad_input;
    if ((s.group_in() != 1 || !one_filter) && !sums_patches(p)) return false;
    if (!fits(p) || s.batch * s.in_channels * s.inputs() >= most ||
        s.batch * s.out_channels * s.outputs() >= most || s.taps() > 1024 ||
        s.batch * s.out_channels * ceil_div(s.outputs(), 32) * s.taps() >= most)
      return false;
  }
  bool done = true;
  with_float_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p.direction == Direction::grad_weight || p.direction == Direction::grad_bias) {
      done = launch_groups<T>(p, launcher);
      return;
    }
    if (is_depthwise(s) && has_planes(p) &&
        ((has_patches(p) && launch_patches(p, launcher)) || launch_lines(p, launcher)))
      return;
    const DepthwisePlan plan = make_depthwise_plan(p);
    with_kernel<T>(s, [&](auto width, auto stride) {
      if (p.direction == Direction::forward)
        launcher.each(plan.threads, DepthwiseForward<T, width(), stride()>{plan});
      else
        launcher.each(plan.threads, DepthwiseGradInput<T, width(), stride()>{plan});
    });
  });
  return done;
}

}  // namespace torch_naiveconv
