// Row "naive" of the convolution table: the specification, one element after another, threads
// over the elements. What everything else is compared with.
#include "../spec/conv.h"

#include "conv.h"
#include "parallel.h"

namespace torch_naiveconv {
namespace {

// Multiply-adds below which a thread is not worth waking, shared among the elements of a call.
int64_t grain_of(int64_t terms) { return 1 + 20000 / (terms + 1); }

template <class T>
void forward(const ConvProblem& p) {
  const ConvShape& s = p.shape;
  const auto input = p.input.as<const T>(), weight = p.weight.as<const T>();
  const auto output = p.output.as<T>();
  const auto* bias = static_cast<const T*>(p.bias);
  parallel_for(s.batch * s.out_channels * s.outputs(), grain_of(s.group_in() * s.taps()),
               FloatEnvironment::gradual, [&](int64_t begin, int64_t end) {
                 for (int64_t flat = begin; flat < end; ++flat) {
                   const Position o = Position::of(flat, s.out_channels, s.axis[0].out,
                                                   s.axis[1].out, s.axis[2].out);
                   output.at(o.n, o.c, o.d, o.h, o.w) =
                       conv_output_at(s, input, weight, bias, o.n, o.c, o.d, o.h, o.w);
                 }
               });
}

template <class T>
void grad_input(const ConvProblem& p) {
  const ConvShape& s = p.shape;
  const auto grad_output = p.output.as<const T>(), weight = p.weight.as<const T>();
  const auto grad_input = p.input.as<T>();
  const auto* bias = static_cast<const T*>(p.bias);
  parallel_for(s.batch * s.in_channels * s.inputs(), grain_of(s.group_out() * s.taps()),
               FloatEnvironment::gradual, [&](int64_t begin, int64_t end) {
                 for (int64_t flat = begin; flat < end; ++flat) {
                   const Position i =
                       Position::of(flat, s.in_channels, s.axis[0].in, s.axis[1].in, s.axis[2].in);
                   grad_input.at(i.n, i.c, i.d, i.h, i.w) =
                       conv_grad_input_at(s, grad_output, weight, bias, i.n, i.c, i.d, i.h, i.w);
                 }
               });
}

// Stores a finished sum: rounded to T, or the total itself.
template <class T>
void store(OrderedSum<T> sum, bool keep_total, void* data, int64_t offset) {
  if (keep_total)
    static_cast<Total<T>*>(data)[offset] = sum.total();
  else
    static_cast<T*>(data)[offset] = sum.result(zero<T>());
}

template <class T>
void grad_weight(const ConvProblem& p) {
  const ConvShape& s = p.shape;
  const auto grad_output = p.output.as<const T>(), input = p.input.as<const T>();
  const auto* total = static_cast<const Total<T>*>(p.total);
  parallel_for(s.out_channels * s.group_in() * s.taps(), grain_of(s.batch * s.outputs()),
               FloatEnvironment::gradual, [&](int64_t begin, int64_t end) {
                 for (int64_t flat = begin; flat < end; ++flat) {
                   const Position k = Position::of(flat, s.group_in(), s.axis[0].kernel,
                                                   s.axis[1].kernel, s.axis[2].kernel);
                   const auto sum =
                       conv_grad_weight_at(s, grad_output, input, total ? total[flat] : Total<T>(0),
                                           k.n, k.c, k.d, k.h, k.w);
                   const auto& stride = p.weight.stride;
                   store<T>(sum, p.keep_total, p.weight.data,
                            k.n * stride[0] + k.c * stride[1] + k.d * stride[2] + k.h * stride[3] +
                                k.w * stride[4]);
                 }
               });
}

template <class T>
void grad_bias(const ConvProblem& p) {
  const ConvShape& s = p.shape;
  const auto grad_output = p.output.as<const T>();
  const auto* total = static_cast<const Total<T>*>(p.total);
  parallel_for(s.out_channels, grain_of(s.batch * s.outputs()), FloatEnvironment::gradual,
               [&](int64_t begin, int64_t end) {
                 for (int64_t oc = begin; oc < end; ++oc)
                   store<T>(conv_grad_bias_at(s, grad_output, total ? total[oc] : Total<T>(0), oc),
                            p.keep_total, p.weight.data, oc);
               });
}

bool run(const ConvProblem& p) {
  with_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    switch (p.direction) {
      case Direction::forward: return forward<T>(p);
      case Direction::grad_input: return grad_input<T>(p);
      case Direction::grad_weight: return grad_weight<T>(p);
      case Direction::grad_bias: return grad_bias<T>(p);
    }
  });
  return true;
}

// This file, too, is built with FMA instructions on x86.
bool has_fma() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("fma");
#else
  return true;
#endif
}

}  // namespace

extern const ConvRow conv_naive;
const ConvRow conv_naive{"naive", has_fma, run, nullptr};

}  // namespace torch_naiveconv
