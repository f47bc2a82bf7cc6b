// The CUDA pooling table: row "quads" (pool.h; forward and scatter wherever numbers fit 31 bits),
// row "naive" (the specification, one thread an element), and max-unpooling.
#include "pool.h"
#include "rows.h"

namespace torch_naiveconv {
namespace {

bool run_quads(const PoolProblem& p, Device& device) {
  if (p.direction == PoolDirection::gather || p.ties > Ties::last || !fits(p)) return false;
  const PoolPlan plan = make_plan(p);
  const int64_t threads = threads_for_four(plan.elements.count);
  with_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p.direction == PoolDirection::forward)
      launch_each(device, threads, PoolForward<T>{plan});
    else
      launch_each(device, threads, PoolScatter<T>{plan});
  });
  return true;
}

template <class Visit>
__device__ void with_index_type(IndexType type, const Visit& visit) {
  switch (type) {
    case IndexType::uint8: return visit(Tag<uint8_t>{});
    case IndexType::int16: return visit(Tag<int16_t>{});
    case IndexType::int32: return visit(Tag<int32_t>{});
    case IndexType::int64: return visit(Tag<int64_t>{});
  }
}

template <class T>
struct NaiveForward {
  PoolProblem p;
  __device__ void operator()(int64_t flat) const {
    const PoolShape& s = p.shape;
    const Position o = Position::of(flat, s.channels, s.axis[0].out, s.axis[1].out, s.axis[2].out);
    const Winner<T> best = max_pool_at(s, p.input.as<const T>(), p.ties, o.n, o.c, o.d, o.h, o.w);
    p.output.as<T>().at(o.n, o.c, o.d, o.h, o.w) = best.value;
    if (p.kind == IndexKind::none) return;
    const int64_t index =
        p.kind == IndexKind::flat ? s.flat_of_offset(best.offset, o.d, o.h, o.w) : best.offset;
    with_index_type(p.index_type, [&](auto tag) {
      using Index = typename decltype(tag)::type;
      p.index.as<Index>().at(o.n, o.c, o.d, o.h, o.w) = static_cast<Index>(index);
    });
  }
};

template <class T>
struct NaiveScatter {
  PoolProblem p;
  __device__ void operator()(int64_t flat) const {
    const PoolShape& s = p.shape;
    const Position i = Position::of(flat, s.channels, s.axis[0].in, s.axis[1].in, s.axis[2].in);
    const auto grad_output = p.output.as<const T>();
    T& grad_input = p.input.as<T>().at(i.n, i.c, i.d, i.h, i.w);
    if (p.ties > Ties::last) {
      grad_input = max_pool_ties_scatter_at(s, grad_output, p.index.as<const T>(), p.ties, i.n, i.c,
                                            i.d, i.h, i.w);
      return;
    }
    with_index_type(p.index_type, [&](auto tag) {
      const auto index = p.index.as<const typename decltype(tag)::type>();
      grad_input = max_pool_scatter_at(s, grad_output, index, p.kind, i.n, i.c, i.d, i.h, i.w);
    });
  }
};

template <class T>
struct NaiveGather {
  PoolProblem p;
  __device__ void operator()(int64_t flat) const {
    const PoolShape& s = p.shape;
    const Position o = Position::of(flat, s.channels, s.axis[0].out, s.axis[1].out, s.axis[2].out);
    const auto input = p.input.as<const T>();
    T& output = p.output.as<T>().at(o.n, o.c, o.d, o.h, o.w);
    if (p.ties > Ties::last) {
      output = max_pool_ties_gather_at(s, input, p.index.as<const T>(), p.ties, o.n, o.c, o.d, o.h,
                                       o.w);
      return;
    }
    with_index_type(p.index_type, [&](auto tag) {
      const auto index = p.index.as<const typename decltype(tag)::type>();
      output = max_pool_gather_at(s, input, index, p.kind, o.n, o.c, o.d, o.h, o.w);
    });
  }
};

bool run_naive(const PoolProblem& p, Device& device) {
  const PoolShape& s = p.shape;
  const int64_t planes = s.batch * s.channels;
  with_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    switch (p.direction) {
      case PoolDirection::forward:
        return launch_each(device, planes * s.outputs(), NaiveForward<T>{p});
      case PoolDirection::scatter:
        return launch_each(device, planes * s.inputs(), NaiveScatter<T>{p});
      case PoolDirection::gather:
        return launch_each(device, planes * s.outputs(), NaiveGather<T>{p});
    }
  });
  return true;
}

// Values are only copied: a type of the same size will do.
template <class Visit>
void with_copied_type(DType dtype, const Visit& visit) {
  with_type(dtype, [&](auto tag) {
    constexpr size_t size = sizeof(typename decltype(tag)::type);
    if constexpr (size == 1)
      visit(Tag<uint8_t>{});
    else if constexpr (size == 2)
      visit(Tag<uint16_t>{});
    else if constexpr (size == 4)
      visit(Tag<uint32_t>{});
    else
      visit(Tag<uint64_t>{});
  });
}

template <class T, class Number>
void unpool(const UnpoolProblem& p, Device& device) {
  const int64_t bytes = p.planes * p.outputs * static_cast<int64_t>(sizeof(Number));
  auto* owner = static_cast<Number*>(device.allocate(bytes));
  device.check(cudaMemsetAsync(owner, 0xff, static_cast<size_t>(bytes), device.stream));  // -1
  launch_each(device, p.planes * p.inputs, UnpoolOwners<Number>{p, owner});
  if (p.transpose)
    launch_each(device, p.planes * p.inputs, UnpoolGather<T, Number>{p, owner});
  else
    launch_each(device, p.planes * p.outputs, UnpoolForward<T, Number>{p, owner});
}

}  // namespace

const CudaPoolRow cuda_pool_quads{"quads", run_quads};
const CudaPoolRow cuda_pool_naive{"naive", run_naive};

void cuda_unpool(const UnpoolProblem& p, Device& device) {
  with_copied_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p.inputs <= INT32_MAX)
      unpool<T, int>(p, device);
    else
      unpool<T, long long>(p, device);
  });
}

}  // namespace torch_naiveconv
