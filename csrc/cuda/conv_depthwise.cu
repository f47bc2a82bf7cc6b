// Row "depthwise" of the CUDA convolution table: one input channel a group, and the bias gradient
// of any convolution. The kernels' bodies: depthwise.h.
#include "depthwise.h"
#include "rows.h"

namespace torch_naiveconv {
namespace {

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

template <class T>
void run_groups(const ConvProblem& p, Device& device) {
  const GroupPlan plan = make_group_plan(p, group_length<T>);
  const int64_t values = p.shape.batch * plan.groups * plan.elements;
  auto* workspace =
      static_cast<Total<T>*>(device.allocate(values * static_cast<int64_t>(sizeof(Total<T>))));
  if (p.direction == Direction::grad_bias)
    launch_each(device, plan.threads, GroupSums<T, true>{plan, workspace});
  else
    launch_each(device, plan.threads, GroupSums<T, false>{plan, workspace});
  launch_each(device, plan.elements, FoldGroups<T>{plan, workspace});
}

bool run(const ConvProblem& p, Device& device) {
  const ConvShape& s = p.shape;
  constexpr int64_t most = int64_t{1} << 29;
  if (p.dtype > DType::bfloat16) return false;
  if (p.direction == Direction::grad_bias) {
    if (s.batch * s.out_channels >= most || s.outputs() >= most ||
        s.batch * s.out_channels * ceil_div(s.outputs(), 32) >= most)
      return false;
  } else {
    const bool one_filter = s.group_out() == 1;
    if (s.group_in() != 1 || (p.direction == Direction::grad_input && !one_filter)) return false;
    if (!fits(p) || s.batch * s.in_channels * s.inputs() >= most ||
        s.batch * s.out_channels * s.outputs() >= most || s.taps() > 1024 ||
        s.batch * s.out_channels * ceil_div(s.outputs(), 32) * s.taps() >= most)
      return false;
  }
  with_float_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p.direction == Direction::grad_weight || p.direction == Direction::grad_bias)
      return run_groups<T>(p, device);
    const DepthwisePlan plan = make_depthwise_plan(p);
    with_kernel<T>(s, [&](auto width, auto stride) {
      if (p.direction == Direction::forward)
        launch_each(device, plan.threads, DepthwiseForward<T, width(), stride()>{plan});
      else
        launch_each(device, plan.threads, DepthwiseGradInput<T, width(), stride()>{plan});
    });
  });
  return true;
}

}  // namespace

const CudaConvRow cuda_conv_depthwise{"depthwise", run};

}  // namespace torch_naiveconv
