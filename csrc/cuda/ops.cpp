// The CUDA library: takes problems (../operators.h) to the tables of rows.h, on the current stream
// of the tensors' device. Loaded beside the CPU library, which declares the operators.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../operators.h"
#include "rows.h"

namespace torch_naiveconv {
namespace {

const CudaConvRow* const conv_rows[] = {&cuda_conv_depthwise, &cuda_conv_tiled, &cuda_conv_naive};
const CudaPoolRow* const pool_rows[] = {&cuda_pool_runs, &cuda_pool_naive};

// The one function needed of torch's own CUDA library. A torch to build with may lack that library;
// where torch has CUDA it is in the process already.
using CurrentStream = AOTITorchError (*)(int32_t device_index, void** stream);
CurrentStream current_stream() {
  static const auto function = []() -> CurrentStream {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) return nullptr;
    return reinterpret_cast<CurrentStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(function != nullptr, "torch_naiveconv: this torch has no CUDA");
  return function;
}

// A call: its device made current, its stream, and workspace that lives until the call returns (the
// caching allocator gives it to later work of the same stream only, so nothing has to wait).
class Call final : public Device {
 public:
  explicit Call(const Tensor& like) : like_(like), guard_(like.get_device_index()) {
    void* current = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(current_stream()(like.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
  void* allocate(int64_t bytes) override {
    const Ints size{bytes};
    memory_.push_back(torch::stable::new_empty(like_, Sizes(size.data(), 1), ScalarType::Byte));
    return memory_.back().data_ptr();
  }
  void check(cudaError_t error) override {
    STD_TORCH_CHECK(error == cudaSuccess,
                    "torch_naiveconv: a CUDA launch failed: ", cudaGetErrorString(error));
  }

 private:
  const Tensor& like_;
  torch::stable::accelerator::DeviceGuard guard_;
  std::vector<Tensor> memory_;
};

// Runs the first row that takes the problem, beginning with the one called impl ("auto": the top).
template <class Row, size_t count, class Problem>
void run_rows(const Row* const (&rows)[count], const Problem& problem, const Name& impl,
              const Tensor& result) {
  Call call(result);
  bool found = impl == "auto";
  for (const Row* row : rows) {
    found = found || impl == row->name;
    if (found && row->run(problem, call)) return;
  }
  STD_TORCH_CHECK(false, "torch_naiveconv: no CUDA implementation called '", impl.c_str(), "'");
}

void run(const ConvProblem& problem, const Name& impl, const Tensor& result) {
  run_rows(conv_rows, problem, impl, result);
}
void run(const PoolProblem& problem, const Name& impl, const Tensor& result) {
  run_rows(pool_rows, problem, impl, result);
}
void run(const UnpoolProblem& problem, const Tensor& result) {
  Call call(result);
  cuda_unpool(problem, call);
}

template <class Row, size_t count>
std::string names_of(const Row* const (&rows)[count]) {
  std::string names;
  for (const Row* row : rows) names += (names.empty() ? "" : ",") + std::string(row->name);
  return names;
}
std::string cuda_conv_rows() { return names_of(conv_rows); }
std::string cuda_pool_rows() { return names_of(pool_rows); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torch_naiveconv, m) {
  m.def("cuda_conv_rows() -> str");
  m.def("cuda_pool_rows() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(torch_naiveconv, CUDA, m) { register_operators(m); }

STABLE_TORCH_LIBRARY_IMPL(torch_naiveconv, CompositeExplicitAutograd, m) {
  m.impl("cuda_conv_rows", TORCH_BOX(&cuda_conv_rows));
  m.impl("cuda_pool_rows", TORCH_BOX(&cuda_pool_rows));
}

}  // namespace torch_naiveconv
