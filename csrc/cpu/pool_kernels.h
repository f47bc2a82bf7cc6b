// The vector rows of the pooling table, written once for every instruction set: included, inside
// its target region, by max_pool_<row>.cpp, which has defined TNC_ISA, vector_bytes and Masked.
// Start reading at run(), at the end; then pool_forward.h, pool_scatter.h and pool_columns.h.
//
// Nothing here may be shared between the files that include it, hence the namespaces: the linker
// would keep one copy of a function, and it could be the one of the newest instruction set.

namespace torch_naiveconv {
namespace TNC_ISA {
namespace {

#include "pool_vec.h"

#include "pool_forward.h"

#include "pool_scatter.h"

#include "pool_columns.h"

// Indices travel in a lane as wide as the value's.
bool fits(const PoolProblem& p) {
  const PoolShape& s = p.shape;
  const int64_t limit = int64_t{1} << 30;
  int64_t span = 1;  // of a window, in the padded plane
  for (const Axis& a : s.axis) {
    const int64_t reach = a.extent(1);
    if (a.kernel < 1 || a.in >= limit || a.out >= limit || a.pad >= limit || a.stride >= limit ||
        reach >= limit || a.in + 2 * a.pad >= limit / span)
      return false;
    span *= a.in + 2 * a.pad;
    if (reach > a.in + 2 * a.pad) return false;
  }
  return true;
}

template <class L, class T>
bool forward(const PoolProblem& p) {
  const Codec<L> codec = Codec<L>::template of<T>(p.index_type);
  const bool last = p.ties == Ties::last;
  if (p.kind == IndexKind::none)
    last ? Forward<L, false, true>(p, codec).run() : Forward<L, false, false>(p, codec).run();
  else
    last ? Forward<L, true, true>(p, codec).run() : Forward<L, true, false>(p, codec).run();
  return true;
}

// Every input asks every window that reaches it, where those are few and stand as a kernel wants
// them. Others are left to the lookup of max_pool_by_index.cpp, which does one output after
// another: 25 windows are few for 16 lanes only.
template <class L, class T>
bool scatter(const PoolProblem& p) {
  int64_t windows = 1;  // that reach an input
  for (const Axis& a : p.shape.axis) {
    windows *= up(a.kernel, a.stride);
    // Two taps of one window may not have the same position in the plane.
    if (p.kind == IndexKind::flat && (a.kernel - 1) * a.dilation >= a.in) return false;
  }
  const SumCodec<L> codec = SumCodec<L>::template of<T>(p.index_type);
  if constexpr (lanes<L> == 16)
    if (Columns<5, L>::has_way(p)) return Columns<5, L>(p, codec).run(), true;
  // With channels innermost a window is a whole vector for each of its taps.
  const bool pixels = p.input.stride[1] == 1 && p.shape.channels >= lanes<L>;
  if (windows > std::max(pixels ? lanes<L> : 0, 9) || p.shape.taps() > 32) return false;
  if (!Scatter<L>::has_way(p)) return false;
  Scatter<L>(p, codec).run();
  return true;
}

bool run(const PoolProblem& p) {
  if (p.ties > Ties::last || !fits(p)) return false;
  bool done = false;
  with_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p.direction == PoolDirection::forward) done = forward<Lane<T>, T>(p);
    if (p.direction == PoolDirection::scatter) done = scatter<Lane<T>, T>(p);
  });
  return done;
}

}  // namespace
}  // namespace TNC_ISA
}  // namespace torch_naiveconv
