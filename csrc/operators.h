// The operators from tensor to problem, for any device. Start reading at conv. Each library that
// registers them (ops.cpp, cuda/ops.cpp) defines the three functions below, which run a problem on
// the device of `result`.
#pragma once

#include "cpu/conv.h"
#include "cpu/max_pool.h"
#include "tensor.h"

namespace torch_naiveconv {
namespace {

void run(const ConvProblem& problem, const Name& impl, const Tensor& result);
void run(const PoolProblem& problem, const Name& impl, const Tensor& result);
void run(const UnpoolProblem& problem, const Tensor& result);

// ---- convolution --------------------------------------------------------------------------------

ConvProblem conv_problem(Direction direction, const Tensor& input_like, int64_t batch,
                         int64_t in_channels, int64_t out_channels, int64_t groups) {
  STD_TORCH_CHECK(groups >= 1 && in_channels % groups == 0 && out_channels % groups == 0,
                  "torch_naiveconv: ", groups, " groups do not divide ", in_channels, " and ",
                  out_channels, " channels");
  ConvProblem problem;
  problem.direction = direction;
  problem.dtype = dtype_of(input_like);
  STD_TORCH_CHECK(problem.dtype != DType::boolean, "torch_naiveconv: no convolution of bool");
  problem.shape.batch = batch;
  problem.shape.in_channels = in_channels;
  problem.shape.out_channels = out_channels;
  problem.shape.groups = groups;
  return problem;
}

// Pointers of another device must not reach a kernel.
void check_device(const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(a.device() == b.device(), "torch_naiveconv: tensors are on different devices");
}

void check_alike(const Tensor& a, const Tensor& b) {
  check_device(a, b);
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type(), "torch_naiveconv: dtypes differ");
  STD_TORCH_CHECK(a.dim() == b.dim(), "torch_naiveconv: ranks differ: ", a.dim(), " and ", b.dim());
}

// A per-channel vector as the kernels read it: contiguous, of the given type and length.
Tensor channel_vector(const Tensor& t, const Tensor& like, int64_t length, ScalarType dtype) {
  check_device(t, like);
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == length && t.scalar_type() == dtype,
                  "torch_naiveconv: expected a vector of ", length, " of the tensors' type");
  return torch::stable::contiguous(t);
}

Tensor conv(const Tensor& input_any, const Tensor& weight_any, std::optional<Tensor> bias,
            const Ints& geometry_list, int64_t groups, StringHandle impl_handle) {
  const Name impl(impl_handle);
  check_alike(input_any, weight_any);
  const Tensor input = dense(input_any), weight = dense(weight_any);
  const Geometry geometry(spatial_dims(input), geometry_list);
  const int64_t out_channels = weight.size(0);
  ConvProblem problem =
      conv_problem(Direction::forward, input, input.size(0), input.size(1), out_channels, groups);
  STD_TORCH_CHECK(weight.size(1) == problem.shape.group_in(), "torch_naiveconv: weight has ",
                  weight.size(1), " channels, input has ", problem.shape.group_in(), " a group");
  Ints sizes{input.size(0), out_channels};
  for (int64_t i = 0; i < geometry.dims; ++i) {
    const int64_t stride = geometry.stride[i], dilation = geometry.dilation[i];
    const int64_t before = geometry.padding[2 * i], after = geometry.padding[2 * i + 1];
    STD_TORCH_CHECK(
        in_range(stride, 1) && in_range(dilation, 1) && in_range(before, 0) && in_range(after, 0),
        "torch_naiveconv: sizes out of range on spatial axis ", i);
    sizes.push_back(
        conv_output_size(input.size(2 + i), weight.size(2 + i), stride, before, after, dilation));
  }
  Tensor output = new_tensor(input, sizes, is_channels_last(input));
  lift(problem.shape.axis, input.sizes().data() + 2, sizes.data() + 2, weight.sizes().data() + 2,
       geometry);
  if (output.numel() == 0) return output;
  problem.input = view_of(input);
  problem.weight = view_of(weight);
  problem.output = view_of(output);
  if (bias) {
    bias = channel_vector(*bias, input, out_channels, input.scalar_type());
    problem.bias = bias->data_ptr();
  }
  run(problem, impl, output);
  return output;
}

Tensor conv_grad_input(const Tensor& grad_any, const Tensor& weight_any, std::optional<Tensor> bias,
                       const Ints& input_size, const Ints& geometry_list, int64_t groups,
                       StringHandle impl_handle) {
  const Name impl(impl_handle);
  check_alike(grad_any, weight_any);
  const Tensor grad_output = dense(grad_any), weight = dense(weight_any);
  const Geometry geometry(spatial_dims(grad_output), geometry_list);
  STD_TORCH_CHECK(static_cast<int64_t>(input_size.size()) == geometry.dims,
                  "torch_naiveconv: input_size of the wrong length");
  const int64_t in_channels = weight.size(1) * groups;
  ConvProblem problem = conv_problem(Direction::grad_input, grad_output, grad_output.size(0),
                                     in_channels, weight.size(0), groups);
  STD_TORCH_CHECK(grad_output.size(1) == weight.size(0), "torch_naiveconv: gradient has ",
                  grad_output.size(1), " channels, weight has ", weight.size(0), " filters");
  Ints sizes{grad_output.size(0), in_channels};
  sizes.insert(sizes.end(), input_size.begin(), input_size.end());
  lift(problem.shape.axis, sizes.data() + 2, grad_output.sizes().data() + 2,
       weight.sizes().data() + 2, geometry);
  Tensor grad_input = new_tensor(grad_output, sizes, is_channels_last(grad_output));
  if (grad_input.numel() == 0) return grad_input;
  problem.input = view_of(grad_input);
  problem.weight = view_of(weight);
  problem.output = view_of(grad_output);
  if (bias) {
    bias = channel_vector(*bias, grad_output, in_channels, grad_output.scalar_type());
    problem.bias = bias->data_ptr();
  }
  run(problem, impl, grad_input);
  return grad_input;
}

Tensor conv_grad_weight(const Tensor& grad_any, const Tensor& input_any,
                        std::optional<Tensor> total, const Ints& kernel_size,
                        const Ints& geometry_list, int64_t groups, bool channels_last,
                        StringHandle impl_handle) {
  const Name impl(impl_handle);
  check_alike(grad_any, input_any);
  const Tensor grad_output = dense(grad_any), input = dense(input_any);
  const Geometry geometry(spatial_dims(input), geometry_list);
  STD_TORCH_CHECK(static_cast<int64_t>(kernel_size.size()) == geometry.dims,
                  "torch_naiveconv: kernel_size of the wrong length");
  STD_TORCH_CHECK(grad_output.size(0) == input.size(0), "torch_naiveconv: batches differ");
  ConvProblem problem = conv_problem(Direction::grad_weight, input, input.size(0), input.size(1),
                                     grad_output.size(1), groups);
  Ints sizes{grad_output.size(1), problem.shape.group_in()};
  sizes.insert(sizes.end(), kernel_size.begin(), kernel_size.end());
  lift(problem.shape.axis, input.sizes().data() + 2, grad_output.sizes().data() + 2,
       sizes.data() + 2, geometry);
  problem.keep_total = total.has_value();
  Tensor grad_weight =
      new_tensor(input, sizes, channels_last, total ? total_type(input) : input.scalar_type());
  if (total) {
    check_device(*total, input);
    STD_TORCH_CHECK(total->numel() == grad_weight.numel() && total->dim() == grad_weight.dim() &&
                        total->scalar_type() == grad_weight.scalar_type(),
                    "torch_naiveconv: total must have the weight's shape and the total's type");
    total = torch::stable::contiguous(*total);
    problem.total = total->data_ptr();
  }
  if (grad_weight.numel() == 0) return grad_weight;
  problem.input = view_of(input);
  problem.weight = view_of(grad_weight);
  problem.output = view_of(grad_output);
  run(problem, impl, grad_weight);
  return grad_weight;
}

Tensor conv_grad_bias(const Tensor& grad_any, std::optional<Tensor> total,
                      StringHandle impl_handle) {
  const Name impl(impl_handle);
  const Tensor grad_output = dense(grad_any);
  const int64_t channels = grad_output.size(1), dims = spatial_dims(grad_output);
  ConvProblem problem =
      conv_problem(Direction::grad_bias, grad_output, grad_output.size(0), 0, channels, 1);
  for (int64_t i = 0; i < dims; ++i) {
    problem.shape.axis[3 - dims + i].in = grad_output.size(2 + i);
    problem.shape.axis[3 - dims + i].out = grad_output.size(2 + i);
  }
  problem.keep_total = total.has_value();
  Tensor grad_bias = new_tensor(grad_output, {channels}, false,
                                total ? total_type(grad_output) : grad_output.scalar_type());
  if (total) {
    total = channel_vector(*total, grad_output, channels, total_type(grad_output));
    problem.total = total->data_ptr();
  }
  if (channels == 0) return grad_bias;
  problem.weight.data = grad_bias.data_ptr();
  problem.output = view_of(grad_output);
  run(problem, impl, grad_bias);
  return grad_bias;
}

// ---- max-pooling --------------------------------------------------------------------------------

Ties ties_of(const Name& name) {
  if (name == "first") return Ties::first;
  if (name == "last") return Ties::last;
  if (name == "all") return Ties::all;
  STD_TORCH_CHECK(name == "split", "torch_naiveconv: ties must be first, last, all or split, not '",
                  name.c_str(), "'");
  return Ties::split;
}

// The smallest type that holds every offset of a window and -1 (as its largest value if unsigned).
std::pair<IndexType, ScalarType> offset_type(int64_t taps) {
  if (taps <= 255) return {IndexType::uint8, ScalarType::Byte};
  if (taps <= 32767) return {IndexType::int16, ScalarType::Short};
  STD_TORCH_CHECK(taps <= INT32_MAX, "torch_naiveconv: a window of ", taps, " taps");
  return {IndexType::int32, ScalarType::Int};
}

PoolProblem pool_problem(PoolDirection direction, const Tensor& input_like, const Tensor* output,
                         const Ints& in, const Ints& out, const Ints& window) {
  const int64_t dims = spatial_dims(input_like);
  const Geometry geometry(dims, window, dims);
  STD_TORCH_CHECK(static_cast<int64_t>(in.size()) == dims && in.size() == out.size(),
                  "torch_naiveconv: sizes of the wrong length");
  PoolProblem problem;
  problem.direction = direction;
  problem.dtype = dtype_of(input_like);
  problem.shape.batch = input_like.size(0);
  problem.shape.channels = input_like.size(1);
  lift(problem.shape.axis, in.data(), out.data(), window.data(), geometry);
  if (output)
    STD_TORCH_CHECK(output->size(0) == input_like.size(0) && output->size(1) == input_like.size(1),
                    "torch_naiveconv: batch or channels differ");
  return problem;
}

Ints sizes_of(const Tensor& t, int64_t from) {
  const auto sizes = t.sizes();
  return Ints(sizes.begin() + from, sizes.end());
}

Ints pooled_size(const Tensor& like, const Ints& spatial) {
  Ints sizes{like.size(0), like.size(1)};
  sizes.insert(sizes.end(), spatial.begin(), spatial.end());
  return sizes;
}

std::tuple<Tensor, Tensor> max_pool(const Tensor& input_any, const Ints& window,
                                    const Ints& output_size, StringHandle ties_handle,
                                    StringHandle indices_handle, StringHandle impl_handle) {
  const Name ties(ties_handle), indices(indices_handle), impl(impl_handle);
  const Tensor input = dense(input_any);
  PoolProblem problem =
      pool_problem(PoolDirection::forward, input, nullptr, sizes_of(input, 2), output_size, window);
  problem.ties = ties_of(ties);
  problem.kind = indices == "none"     ? IndexKind::none
                 : indices == "offset" ? IndexKind::offset
                                       : IndexKind::flat;
  STD_TORCH_CHECK(problem.kind != IndexKind::flat || indices == "flat",
                  "torch_naiveconv: indices must be none, offset or flat");
  STD_TORCH_CHECK(problem.kind == IndexKind::none || problem.ties <= Ties::last,
                  "torch_naiveconv: a window with several winners has no index");
  const bool channels_last = is_channels_last(input);
  const Ints sizes = pooled_size(input, output_size);
  Tensor output = new_tensor(input, sizes, channels_last);
  ScalarType index_dtype = ScalarType::Long;
  problem.index_type = IndexType::int64;
  if (problem.kind != IndexKind::flat)
    std::tie(problem.index_type, index_dtype) = offset_type(problem.shape.taps());
  Tensor index = problem.kind == IndexKind::none
                     ? new_tensor(input, {0}, false, index_dtype)
                     : new_tensor(input, sizes, channels_last, index_dtype);
  if (output.numel() == 0) return {output, index};
  problem.input = view_of(input);
  problem.output = view_of(output);
  if (problem.kind != IndexKind::none) problem.index = view_of(index);
  run(problem, impl, output);
  return {output, index};
}

// How `index` records the choices: flat positions (int64), offsets, or the pooled input itself.
// Returns the tensor as the kernels read it.
Tensor set_index(PoolProblem& problem, const Tensor& index_any, const Tensor& like,
                 const Name& ties, const Ints& expected_size) {
  check_device(index_any, like);
  problem.ties = ties_of(ties);
  const Tensor index = dense(index_any);
  STD_TORCH_CHECK(sizes_of(index, 0) == expected_size,
                  "torch_naiveconv: index has the wrong shape");
  if (problem.ties > Ties::last) {
    STD_TORCH_CHECK(dtype_of(index) == problem.dtype, "torch_naiveconv: dtypes differ");
  } else {
    problem.kind = IndexKind::offset;
    switch (index.scalar_type()) {
      case ScalarType::Byte: problem.index_type = IndexType::uint8; break;
      case ScalarType::Short: problem.index_type = IndexType::int16; break;
      case ScalarType::Int: problem.index_type = IndexType::int32; break;
      default:
        STD_TORCH_CHECK(index.scalar_type() == ScalarType::Long,
                        "torch_naiveconv: index must be uint8, int16, int32 or int64");
        problem.index_type = IndexType::int64;
        problem.kind = IndexKind::flat;
    }
    const int64_t taps = problem.shape.taps();  // kernels list them for every value of a byte
    STD_TORCH_CHECK(
        problem.kind == IndexKind::flat || problem.index_type >= offset_type(taps).first,
        "torch_naiveconv: index is ", index.scalar_type() == ScalarType::Byte ? "uint8" : "int16",
        ", too small for a window of ", taps, " taps: pass ", taps <= 32767 ? "int16" : "int32");
  }
  problem.index = view_of(index);
  return index;
}

Tensor max_pool_scatter(const Tensor& grad_any, const Tensor& index_any, const Ints& input_size,
                        const Ints& window, StringHandle ties_handle, StringHandle impl_handle) {
  const Name ties(ties_handle), impl(impl_handle);
  const Tensor grad_output = dense(grad_any);
  PoolProblem problem = pool_problem(PoolDirection::scatter, grad_output, nullptr, input_size,
                                     sizes_of(grad_output, 2), window);
  const Ints sizes = pooled_size(grad_output, input_size);
  const bool by_value = ties_of(ties) > Ties::last;
  const Tensor index =
      set_index(problem, index_any, grad_output, ties, by_value ? sizes : sizes_of(grad_output, 0));
  Tensor grad_input = new_tensor(grad_output, sizes, is_channels_last(grad_output));
  if (grad_input.numel() == 0) return grad_input;
  problem.input = view_of(grad_input);
  problem.output = view_of(grad_output);
  run(problem, impl, grad_input);
  return grad_input;
}

Tensor max_pool_gather(const Tensor& input_any, const Tensor& index_any, const Ints& output_size,
                       const Ints& window, StringHandle ties_handle, StringHandle impl_handle) {
  const Name ties(ties_handle), impl(impl_handle);
  const Tensor input = dense(input_any);
  PoolProblem problem =
      pool_problem(PoolDirection::gather, input, nullptr, sizes_of(input, 2), output_size, window);
  const Ints sizes = pooled_size(input, output_size);
  const bool by_value = ties_of(ties) > Ties::last;
  const Tensor index =
      set_index(problem, index_any, input, ties, by_value ? sizes_of(input, 0) : sizes);
  Tensor output = new_tensor(input, sizes, is_channels_last(input));
  if (output.numel() == 0) return output;
  problem.input = view_of(input);
  problem.output = view_of(output);
  run(problem, impl, output);
  return output;
}

// ---- max-unpooling ------------------------------------------------------------------------------

Tensor unpool(bool transpose, const Tensor& read, const Tensor& indices_any,
              const Ints& written_size) {
  const Tensor source = torch::stable::contiguous(read);
  const Tensor indices = torch::stable::contiguous(indices_any);
  check_device(source, indices);
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long,
                  "torch_naiveconv: indices must be int64");
  Tensor written = new_tensor(source, pooled_size(source, written_size), false);
  const Tensor& pooled = transpose ? written : source;
  STD_TORCH_CHECK(sizes_of(pooled, 0) == sizes_of(indices, 0),
                  "torch_naiveconv: indices have the wrong shape");
  UnpoolProblem problem;
  problem.transpose = transpose;
  problem.dtype = dtype_of(source);
  problem.planes = source.size(0) * source.size(1);
  if (problem.planes == 0) return written;
  problem.inputs = pooled.numel() / problem.planes;
  problem.outputs = (transpose ? source : written).numel() / problem.planes;
  problem.input = pooled.data_ptr();
  problem.output = (transpose ? source : written).data_ptr();
  problem.indices = static_cast<const int64_t*>(indices.data_ptr());
  run(problem, written);
  return written;
}

Tensor max_unpool(const Tensor& input, const Tensor& indices, const Ints& output_size) {
  return unpool(false, input, indices, output_size);
}
Tensor max_unpool_gather(const Tensor& grad_output, const Tensor& indices) {
  return unpool(true, grad_output, indices, sizes_of(indices, 2));
}

template <class Library>
void register_operators(Library& m) {
  m.impl("conv", TORCH_BOX(&conv));
  m.impl("conv_grad_input", TORCH_BOX(&conv_grad_input));
  m.impl("conv_grad_weight", TORCH_BOX(&conv_grad_weight));
  m.impl("conv_grad_bias", TORCH_BOX(&conv_grad_bias));
  m.impl("max_pool", TORCH_BOX(&max_pool));
  m.impl("max_pool_scatter", TORCH_BOX(&max_pool_scatter));
  m.impl("max_pool_gather", TORCH_BOX(&max_pool_gather));
  m.impl("max_unpool", TORCH_BOX(&max_unpool));
  m.impl("max_unpool_gather", TORCH_BOX(&max_unpool_gather));
}

}  // namespace
}  // namespace torch_naiveconv
