// The CUDA pooling table: row "runs" (pool.h; forward and scatter wherever numbers fit 31 bits),
// row "naive" (the specification, one thread an element), and max-unpooling.
#include "pool.h"
#include "rows.h"

namespace torch_naiveconv {
namespace {

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
      output =
          max_pool_ties_gather_at(s, input, p.index.as<const T>(), p.ties, o.n, o.c, o.d, o.h, o.w);
      return;
    }
    with_index_type(p.index_type, [&](auto tag) {
      const auto index = p.index.as<const typename decltype(tag)::type>();
      output = max_pool_gather_at(s, input, index, p.kind, o.n, o.c, o.d, o.h, o.w);
    });
  }
};

bool run_naive(const PoolProblem& p, Device& device) {
  Launcher launcher{device};
  const PoolShape& s = p.shape;
  const int64_t planes = s.batch * s.channels;
  with_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    switch (p.direction) {
      case PoolDirection::forward: return launcher.each(planes * s.outputs(), NaiveForward<T>{p});
      case PoolDirection::scatter: return launcher.each(planes * s.inputs(), NaiveScatter<T>{p});
      case PoolDirection::gather: return launcher.each(planes * s.outputs(), NaiveGather<T>{p});
    }
  });
  return true;
}

bool run_runs(const PoolProblem& p, Device& device) {
  Launcher launcher{device};
  return launch_runs(p, launcher);
}

}  // namespace

const CudaPoolRow cuda_pool_runs{"runs", run_runs};
const CudaPoolRow cuda_pool_naive{"naive", run_naive};

void cuda_unpool(const UnpoolProblem& p, Device& device) {
  Launcher launcher{device};
  launch_unpool(p, launcher);
}

}  // namespace torch_naiveconv
