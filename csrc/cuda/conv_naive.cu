// Row "naive" of the CUDA convolution table: the specification, one thread an element.
#include "../spec/conv.h"

#include "rows.h"

namespace torch_naiveconv {
namespace {

template <class T>
struct Forward {
  ConvProblem p;
  __device__ void operator()(int64_t flat) const {
    const ConvShape& s = p.shape;
    const Position o =
        Position::of(flat, s.out_channels, s.axis[0].out, s.axis[1].out, s.axis[2].out);
    p.output.as<T>().at(o.n, o.c, o.d, o.h, o.w) =
        conv_output_at(s, p.input.as<const T>(), p.weight.as<const T>(),
                       static_cast<const T*>(p.bias), o.n, o.c, o.d, o.h, o.w);
  }
};

template <class T>
struct GradInput {
  ConvProblem p;
  __device__ void operator()(int64_t flat) const {
    const ConvShape& s = p.shape;
    const Position i = Position::of(flat, s.in_channels, s.axis[0].in, s.axis[1].in, s.axis[2].in);
    p.input.as<T>().at(i.n, i.c, i.d, i.h, i.w) =
        conv_grad_input_at(s, p.output.as<const T>(), p.weight.as<const T>(),
                           static_cast<const T*>(p.bias), i.n, i.c, i.d, i.h, i.w);
  }
};

// Stores a finished sum: rounded to T, or the total itself.
template <class T>
__device__ void store(OrderedSum<T> sum, bool keep_total, void* data, int64_t offset) {
  if (keep_total)
    static_cast<Total<T>*>(data)[offset] = sum.total();
  else
    static_cast<T*>(data)[offset] = sum.result(zero<T>());
}

template <class T>
struct GradWeight {
  ConvProblem p;
  __device__ void operator()(int64_t flat) const {
    const ConvShape& s = p.shape;
    const Position k =
        Position::of(flat, s.group_in(), s.axis[0].kernel, s.axis[1].kernel, s.axis[2].kernel);
    const auto* total = static_cast<const Total<T>*>(p.total);
    const auto sum =
        conv_grad_weight_at(s, p.output.as<const T>(), p.input.as<const T>(),
                            total ? total[flat] : Total<T>(0), k.n, k.c, k.d, k.h, k.w);
    const auto& stride = p.weight.stride;
    store<T>(
        sum, p.keep_total, p.weight.data,
        k.n * stride[0] + k.c * stride[1] + k.d * stride[2] + k.h * stride[3] + k.w * stride[4]);
  }
};

template <class T>
struct GradBias {
  ConvProblem p;
  __device__ void operator()(int64_t oc) const {
    const auto* total = static_cast<const Total<T>*>(p.total);
    store<T>(
        conv_grad_bias_at(p.shape, p.output.as<const T>(), total ? total[oc] : Total<T>(0), oc),
        p.keep_total, p.weight.data, oc);
  }
};

bool run(const ConvProblem& p, Device& device) {
  Launcher launcher{device};
  const ConvShape& s = p.shape;
  with_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    switch (p.direction) {
      case Direction::forward:
        return launcher.each(s.batch * s.out_channels * s.outputs(), Forward<T>{p});
      case Direction::grad_input:
        return launcher.each(s.batch * s.in_channels * s.inputs(), GradInput<T>{p});
      case Direction::grad_weight:
        return launcher.each(s.out_channels * s.group_in() * s.taps(), GradWeight<T>{p});
      case Direction::grad_bias: return launcher.each(s.out_channels, GradBias<T>{p});
    }
  });
  return true;
}

}  // namespace

const CudaConvRow cuda_conv_naive{"naive", run};

}  // namespace torch_naiveconv
