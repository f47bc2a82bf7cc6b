// The operators: schemas, and the CPU library, which takes problems (operators.h) to its tables.
// Start reading at the schemas, at the end.
//
// Three convolution maps are closed under differentiation (each is bilinear, its derivatives are
// the other two), and so are gather and scatter of pooling: autograd.py needs nothing else.
#include <torch/csrc/stable/library.h>

#include "cpu/parallel.h"
#include "operators.h"

namespace torch_naiveconv {

void run_parallel(int64_t count, int64_t grain, ParallelBody body, void* context) {
  torch::stable::parallel_for(0, count, grain,
                              [=](int64_t begin, int64_t end) { body(context, begin, end); });
}
int thread_count() { return static_cast<int>(torch::stable::get_num_threads()); }

namespace {

void run(const ConvProblem& problem, const Name& impl, const Tensor&) {
  STD_TORCH_CHECK(run_conv(problem, impl.c_str()),
                  "torch_naiveconv: no CPU implementation called '", impl.c_str(),
                  "' can run on this machine");
}
void run(const PoolProblem& problem, const Name& impl, const Tensor&) {
  STD_TORCH_CHECK(run_pool(problem, impl.c_str()),
                  "torch_naiveconv: no CPU implementation called '", impl.c_str(),
                  "' can run on this machine");
}
void run(const UnpoolProblem& problem, const Tensor&) {
  STD_TORCH_CHECK(run_unpool(problem),
                  "max_unpool: found an index outside of the output plane, [0, ", problem.outputs,
                  "): pass the indices that max_pool returned, and the "
                  "output_size that it pooled");
}

// ---- what can run here --------------------------------------------------------------------------

// The rows of a table that this processor can run, best first, joined by commas.
template <class Row>
std::string names_of(const Row* const* rows, int count) {
  std::string names;
  for (int i = 0; i < count; ++i)
    if (rows[i]->can_run()) names += (names.empty() ? "" : ",") + std::string(rows[i]->name);
  return names;
}
std::string cpu_conv_rows() { return names_of(conv_rows, conv_row_count); }
double cpu_fma_peak(StringHandle impl_handle, bool float64) {
  const Name impl(impl_handle);
  return fma_peak(float64 ? DType::float64 : DType::float32, impl.c_str());
}
std::string cpu_pool_rows() { return names_of(pool_rows, pool_row_count); }

}  // namespace

// `padding` lists hold a (before, after) pair for each spatial axis, the other lists one number.
// A convolution's `geometry` is stride, padding and dilation end to end, a pooling's `window` its
// kernel_size and the same: a tiny call feels each list, and every SymInt in it. Windows may grow
// with the image; so 'same' padding of a convolution with a stride is the one thing whose numbers
// compilers take as fixed.
// `impl` is "auto" or the name of the first table row that may take the call.
STABLE_TORCH_LIBRARY(torch_naiveconv, m) {
  m.def(
      "conv(Tensor input, Tensor weight, Tensor? bias, int[] geometry, SymInt groups, "
      "str impl) -> Tensor");
  // bias: that of the transposed convolution, which is this map.
  m.def(
      "conv_grad_input(Tensor grad_output, Tensor weight, Tensor? bias, SymInt[] input_size, "
      "int[] geometry, SymInt groups, str impl) -> Tensor");
  // total: where the sum goes on from; with it the result is the total itself, not rounded to a
  // 16-bit type. channels_last: the memory format of the result.
  m.def(
      "conv_grad_weight(Tensor grad_output, Tensor input, Tensor? total, SymInt[] kernel_size, "
      "int[] geometry, SymInt groups, bool channels_last, str impl) -> Tensor");
  m.def("conv_grad_bias(Tensor grad_output, Tensor? total, str impl) -> Tensor");
  // indices: "none" (the second result is empty), "offset" (inside the window, smallest type) or
  // "flat" (int64 position in the input plane).
  m.def(
      "max_pool(Tensor input, SymInt[] window, SymInt[] output_size, str ties, str indices, "
      "str impl) -> (Tensor, Tensor)");
  // index: what max_pool returned; with ties "all" or "split" the pooled input itself.
  m.def(
      "max_pool_scatter(Tensor grad_output, Tensor index, SymInt[] input_size, SymInt[] window, "
      "str ties, str impl) -> Tensor");
  m.def(
      "max_pool_gather(Tensor input, Tensor index, SymInt[] output_size, SymInt[] window, "
      "str ties, str impl) -> Tensor");
  m.def("max_unpool(Tensor input, Tensor indices, SymInt[] output_size) -> Tensor");
  m.def("max_unpool_gather(Tensor grad_output, Tensor indices) -> Tensor");
  m.def("cpu_conv_rows() -> str");
  m.def("cpu_pool_rows() -> str");
  m.def("cpu_fma_peak(str impl, bool float64) -> float");  // operations a second, all threads
}

STABLE_TORCH_LIBRARY_IMPL(torch_naiveconv, CPU, m) { register_operators(m); }

STABLE_TORCH_LIBRARY_IMPL(torch_naiveconv, CompositeExplicitAutograd, m) {
  m.impl("cpu_conv_rows", TORCH_BOX(&cpu_conv_rows));
  m.impl("cpu_pool_rows", TORCH_BOX(&cpu_pool_rows));
  m.impl("cpu_fma_peak", TORCH_BOX(&cpu_fma_peak));
}

}  // namespace torch_naiveconv
