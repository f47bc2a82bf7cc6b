// From torch tensors to the views and shapes of the kernels: the lift to 3-D, memory formats, and
// the few checks that keep a hand-made call from reading out of bounds. Shared by the CPU and the
// CUDA library; arguments proper are checked in Python (functional.py).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/implementation.h"

namespace torch_naiveconv {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// A `str` argument. Read through its handle: converting it to std::string leaks in torch 2.11-2.13.
class Name {
 public:
  explicit Name(StringHandle handle) : handle_(handle) {}
  ~Name() { torch_delete_string(handle_); }
  Name(const Name&) = delete;
  Name& operator=(const Name&) = delete;

  const char* c_str() const {
    const char* data = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle_, &data));
    return data;
  }
  bool operator==(const char* other) const { return std::strcmp(c_str(), other) == 0; }

 private:
  StringHandle handle_;
};

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::Double: return DType::float64;
    case ScalarType::Half: return DType::float16;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Char: return DType::int8;
    case ScalarType::Short: return DType::int16;
    case ScalarType::Int: return DType::int32;
    case ScalarType::Long: return DType::int64;
    case ScalarType::Byte: return DType::uint8;
    case ScalarType::UInt16: return DType::uint16;
    case ScalarType::UInt32: return DType::uint32;
    case ScalarType::UInt64: return DType::uint64;
    case ScalarType::Bool: return DType::boolean;
    default: STD_TORCH_CHECK(false, "torch_naiveconv: unsupported dtype"); return DType::float32;
  }
}
inline bool is_half(DType dtype) { return dtype == DType::float16 || dtype == DType::bfloat16; }

// The type of a kept total: Total<T> of spec/types.h.
inline ScalarType total_type(const Tensor& t) {
  return is_half(dtype_of(t)) ? ScalarType::Float : t.scalar_type();
}

// ---- memory formats ---------------------------------------------------------------------------

// Strides exactly those of a dense tensor, sizes of 1 included (torch leaves those free): so a
// one-channel image keeps the format it was given. Python's ops.is_channels_last says the same.
inline bool has_strides_of(const Tensor& t, bool channels_last) {
  const auto sizes = t.sizes(), strides = t.strides();
  const int64_t dim = t.dim();
  int64_t expected = 1;
  if (channels_last) {
    if (strides[1] != 1) return false;
    expected = sizes[1];
  }
  for (int64_t i = dim - 1; i >= 0; --i) {
    if (channels_last && i == 1) continue;
    if (strides[i] != expected) return false;
    expected *= sizes[i];
  }
  return true;
}

inline bool is_channels_last(const Tensor& t) {
  return t.dim() >= 4 && has_strides_of(t, true) && !has_strides_of(t, false);
}

// The tensor itself if it is dense in either format (3-D: also with channels innermost), else a
// contiguous copy: kernels never see overlapping or expanded memory.
inline Tensor dense(const Tensor& t) {
  if (t.is_contiguous() || has_strides_of(t, true)) return t;
  return torch::stable::contiguous(t);
}

// Allocated through the C shim: a third of the cost of a dispatched `empty`, which small calls
// feel.
// The system hands fresh memory out page by page, as it is first written; for a large tensor that
// takes longer than the arithmetic that fills it. Large pages make it a few hundred times fewer.
inline void ask_for_large_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t page = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end =
      (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / page * page;
  if (bytes >= int64_t{4} << 20 && begin < end)
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

inline Tensor new_tensor(const Tensor& like, const Ints& sizes, bool channels_last,
                         std::optional<ScalarType> dtype = std::nullopt) {
  const size_t dim = sizes.size();
  Ints strides(dim);
  channels_last = channels_last && dim >= 4;
  int64_t next = 1;
  if (channels_last) {
    strides[1] = 1;
    next = sizes[1];
  }
  for (size_t i = dim; i-- > 0;) {
    if (channels_last && i == 1) continue;
    strides[i] = next;
    next *= channels_last || sizes[i] > 0 ? sizes[i] : 1;
  }
  const auto type = torch::stable::detail::to<int32_t>(
      torch::stable::detail::from(dtype ? *dtype : like.scalar_type()));
  int32_t device_type = 0, device_index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(dim), sizes.data(),
                                                         strides.data(), type, device_type,
                                                         device_index, &handle));
  const Tensor tensor(handle);
  if (device_type == aoti_torch_device_type_cpu())
    ask_for_large_pages(tensor.data_ptr(),
                        tensor.numel() * static_cast<int64_t>(tensor.element_size()));
  return tensor;
}

// ---- the lift to 3-D --------------------------------------------------------------------------

// 1-D and 2-D tensors become 3-D by unit axes in front of their spatial ones.
inline RawView view_of(const Tensor& t) {
  RawView view;
  view.data = t.data_ptr();
  const auto strides = t.strides();
  const int64_t dim = t.dim();
  view.stride[0] = strides[0];
  view.stride[1] = strides[1];
  for (int64_t i = 2; i < dim; ++i) view.stride[5 - dim + i] = strides[i];
  return view;
}

inline int64_t spatial_dims(const Tensor& t) {
  const int64_t dims = t.dim() - 2;
  STD_TORCH_CHECK(dims >= 1 && dims <= 3,
                  "torch_naiveconv: expected a 3-D, 4-D or 5-D tensor, got ", t.dim(), "-D");
  return dims;
}

inline bool in_range(int64_t value, int64_t least) {
  return value >= least && value <= (int64_t{1} << 48);
}

// How a window moves: a stride, a (before, after) pair of padding and a dilation for each axis.
struct Geometry {
  int64_t dims;
  const int64_t *stride, *padding, *dilation;

  // The three end to end, behind `ahead` other numbers.
  Geometry(int64_t dims, const Ints& all, int64_t ahead = 0)
      : dims(dims),
        stride(all.data() + ahead),
        padding(stride + dims),
        dilation(padding + 2 * dims) {
    STD_TORCH_CHECK(all.size() == static_cast<size_t>(ahead + 4 * dims),
                    "torch_naiveconv: expected ", ahead + 4 * dims,
                    " numbers: ", ahead > 0 ? "kernel sizes, " : "",
                    "strides, paddings and dilations");
  }
};

// Axes from the sizes of the tensors themselves: whatever the geometry says, a position outside of
// them is padding and is never read.
inline void lift(Axis (&axes)[3], const int64_t* in, const int64_t* out, const int64_t* kernel,
                 const Geometry& geometry) {
  const int64_t dims = geometry.dims;
  for (int64_t i = 0; i < dims; ++i) {
    Axis& axis = axes[3 - dims + i];
    axis.in = in[i];
    axis.out = out[i];
    axis.kernel = kernel[i];
    axis.stride = geometry.stride[i];
    axis.dilation = geometry.dilation[i];
    axis.pad = geometry.padding[2 * i];
    STD_TORCH_CHECK(in_range(axis.in, 0) && in_range(axis.out, 0) && in_range(axis.kernel, 0) &&
                        in_range(axis.stride, 1) && in_range(axis.dilation, 1) &&
                        in_range(axis.pad, 0) && axis.kernel <= INT64_MAX / 4 / axis.dilation &&
                        axis.out <= INT64_MAX / 4 / axis.stride,
                    "torch_naiveconv: sizes out of range on spatial axis ", i);
  }
}

// out = floor((in + before + after - dilation * (kernel - 1) - 1) / stride) + 1
inline int64_t conv_output_size(int64_t in, int64_t kernel, int64_t stride, int64_t before,
                                int64_t after, int64_t dilation) {
  const int64_t room = in + before + after - dilation * (kernel - 1) - 1;
  return room < 0 ? 0 : room / stride + 1;
}

}  // namespace torch_naiveconv
