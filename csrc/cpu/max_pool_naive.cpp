// Row "naive" of the pooling table: the specification, one element after another, threads over
// the elements; and max-unpooling, threads over the planes.
#include <atomic>
#include <vector>

#include "max_pool.h"
#include "parallel.h"

namespace torch_naiveconv {
namespace {

template <class Visit>
void with_index_type(IndexType type, Visit visit) {
  switch (type) {
    case IndexType::uint8: return visit(Tag<uint8_t>{});
    case IndexType::int16: return visit(Tag<int16_t>{});
    case IndexType::int32: return visit(Tag<int32_t>{});
    case IndexType::int64: return visit(Tag<int64_t>{});
  }
}

// Calls body(position) for every element of an (N, C, D, H, W) tensor.
template <class Body>
void for_each_element(const PoolShape& s, bool of_output, const Body& body) {
  const auto size = [&](int a) { return of_output ? s.axis[a].out : s.axis[a].in; };
  const int64_t D = size(0), H = size(1), W = size(2);
  parallel_for(s.batch * s.channels * D * H * W, 1 + 8000 / (s.taps() + 1),
               FloatEnvironment::gradual, [&](int64_t begin, int64_t end) {
                 for (int64_t flat = begin; flat < end; ++flat)
                   body(Position::of(flat, s.channels, D, H, W));
               });
}

template <class T>
void forward_at(const PoolProblem& p, Position o) {
  const PoolShape& s = p.shape;
  const Winner<T> best = max_pool_at(s, p.input.as<const T>(), p.ties, o.n, o.c, o.d, o.h, o.w);
  p.output.as<T>().at(o.n, o.c, o.d, o.h, o.w) = best.value;
  if (p.kind == IndexKind::none) return;
  const int64_t chosen =
      p.kind == IndexKind::flat ? s.flat_of_offset(best.offset, o.d, o.h, o.w) : best.offset;
  with_index_type(p.index_type, [&](auto tag) {
    using Index = typename decltype(tag)::type;
    p.index.as<Index>().at(o.n, o.c, o.d, o.h, o.w) = static_cast<Index>(chosen);
  });
}

template <class T>
void forward(const PoolProblem& p) {
  for_each_element(p.shape, true, [&](Position o) { forward_at<T>(p, o); });
}

template <class T>
void scatter(const PoolProblem& p) {
  const PoolShape& s = p.shape;
  const auto grad_output = p.output.as<const T>();
  const auto grad_input = p.input.as<T>();
  if (p.ties == Ties::all || p.ties == Ties::split) {
    const auto pooled = p.index.as<const T>();
    return for_each_element(s, false, [&](Position i) {
      grad_input.at(i.n, i.c, i.d, i.h, i.w) =
          max_pool_ties_scatter_at(s, grad_output, pooled, p.ties, i.n, i.c, i.d, i.h, i.w);
    });
  }
  with_index_type(p.index_type, [&](auto tag) {
    const auto index = p.index.as<const typename decltype(tag)::type>();
    for_each_element(s, false, [&](Position i) {
      grad_input.at(i.n, i.c, i.d, i.h, i.w) =
          max_pool_scatter_at(s, grad_output, index, p.kind, i.n, i.c, i.d, i.h, i.w);
    });
  });
}

template <class T>
void gather(const PoolProblem& p) {
  const PoolShape& s = p.shape;
  const auto input = p.input.as<const T>();
  const auto output = p.output.as<T>();
  if (p.ties == Ties::all || p.ties == Ties::split) {
    const auto pooled = p.index.as<const T>();
    return for_each_element(s, true, [&](Position o) {
      output.at(o.n, o.c, o.d, o.h, o.w) =
          max_pool_ties_gather_at(s, input, pooled, p.ties, o.n, o.c, o.d, o.h, o.w);
    });
  }
  with_index_type(p.index_type, [&](auto tag) {
    const auto index = p.index.as<const typename decltype(tag)::type>();
    for_each_element(s, true, [&](Position o) {
      output.at(o.n, o.c, o.d, o.h, o.w) =
          max_pool_gather_at(s, input, index, p.kind, o.n, o.c, o.d, o.h, o.w);
    });
  });
}

bool run(const PoolProblem& p) {
  with_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    switch (p.direction) {
      case PoolDirection::forward: return forward<T>(p);
      case PoolDirection::scatter: return scatter<T>(p);
      case PoolDirection::gather: return gather<T>(p);
    }
  });
  return true;
}

// False if an index lies outside of its plane; that plane is not written.
template <class T>
bool unpool(const UnpoolProblem& p) {
  auto* input = static_cast<T*>(p.input);
  auto* output = static_cast<T*>(p.output);
  std::atomic<bool> good{true};
  parallel_for(p.planes, 1 + 8000 / (p.inputs + p.outputs + 1), FloatEnvironment::gradual,
               [&](int64_t begin, int64_t end) {
                 std::vector<char> taken;
                 for (int64_t plane = begin; plane < end; ++plane) {
                   T* const in = input + plane * p.inputs;
                   T* const out = output + plane * p.outputs;
                   const int64_t* const indices = p.indices + plane * p.inputs;
                   bool inside = true;
                   for (int64_t j = 0; j < p.inputs; ++j)
                     inside &= static_cast<uint64_t>(indices[j]) < static_cast<uint64_t>(p.outputs);
                   if (!inside) {
                     good = false;
                   } else if (!p.transpose) {
                     for (int64_t i = 0; i < p.outputs; ++i) out[i] = zero<T>();
                     for (int64_t j = 0; j < p.inputs; ++j) out[indices[j]] = in[j];
                   } else {
                     // Only the last writer of a position gets its gradient: walking backwards,
                     // the first one met takes it.
                     taken.assign(static_cast<size_t>(p.outputs), 0);
                     for (int64_t j = p.inputs - 1; j >= 0; --j) {
                       in[j] = taken[indices[j]] ? zero<T>() : out[indices[j]];
                       taken[indices[j]] = 1;
                     }
                   }
                 }
               });
  return good;
}

}  // namespace

void max_pool_forward_at(const PoolProblem& p, Position output) {
  with_type(p.dtype, [&](auto tag) { forward_at<typename decltype(tag)::type>(p, output); });
}

bool run_unpool(const UnpoolProblem& p) {
  bool good = false;
  with_type(p.dtype, [&](auto tag) { good = unpool<typename decltype(tag)::type>(p); });
  return good;
}

extern const PoolRow pool_naive;
const PoolRow pool_naive{"naive", [] { return true; }, run};

}  // namespace torch_naiveconv
