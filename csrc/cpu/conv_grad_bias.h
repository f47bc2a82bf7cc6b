// The bias gradient: per channel a sum over pixels, in the groups and chains of the weight gradient
// of an input that is 1 everywhere. Lanes are channels; several groups of a sample, which are
// independent sums until they are folded in their order, run side by side.
#pragma once

#include "conv_depthwise.h"

namespace torch_naiveconv::TNC_ISA {

constexpr int side_by_side = 4;  // groups: enough to hide the latency of an add

// total += the groups of `count` pixels, the last perhaps not full.
template <class T>
TNC_INLINE Vec<Total<T>> fold_pixels(const Total<T>* pixel, int64_t count, Vec<Total<T>> total) {
  using V = Vec<Total<T>>;
  constexpr int chains = chains_of<T>, length = group_length<T>;
  V chain[side_by_side][chains];
#pragma GCC unroll 4
  for (int g = 0; g < side_by_side; ++g)
#pragma GCC unroll 2
    for (int c = 0; c < chains; ++c) chain[g][c] = V::zero();
  if (count == side_by_side * length) {
    for (int i = 0; i < length; i += chains)
#pragma GCC unroll 4
      for (int g = 0; g < side_by_side; ++g)
#pragma GCC unroll 2
        for (int c = 0; c < chains; ++c)
          chain[g][c] = chain[g][c] + V::load(pixel + (g * length + i + c) * V::lanes);
#pragma GCC unroll 4
    for (int g = 0; g < side_by_side; ++g) total = total + sum_of(chain[g]);
    return total;
  }
  for (int64_t i = 0; i < count; ++i) {
    V& link = chain[0][i % chains];
    link = link + V::load(pixel + i * V::lanes);
    if ((i + 1) % length != 0 && i + 1 < count) continue;
    total = total + sum_of(chain[0]);
    for (int c = 0; c < chains; ++c) chain[0][c] = V::zero();
  }
  return total;
}

template <class T>
bool grad_bias(const ConvProblem& p) {
  using E = Total<T>;
  using V = Vec<E>;
  constexpr int L = V::lanes;
  constexpr int64_t full = side_by_side * group_length<T>;  // pixels of a panel
  const ConvShape& s = p.shape;
  const int64_t* const stride = p.output.stride;
  const E* const earlier = static_cast<const E*>(p.total);

  // Rows as long as the strides allow: a contiguous sample is one row.
  int64_t width = s.axis[2].out, height = s.axis[1].out, depth = s.axis[0].out;
  if (stride[3] == width * stride[4] || height == 1) {
    width *= height, height = 1;
    if (stride[2] == width * stride[4] || depth == 1) width *= depth, depth = 1;
  }
  const auto work = [&](int64_t begin, int64_t end) {
    Arena& arena = task_arena();
    arena.reset(Arena::bytes_for<E>(full * L));
    E* const panel = arena.take<E>(full * L);
    for (int64_t block = begin; block < end; ++block) {
      const int used = static_cast<int>(least(L, s.out_channels - block * L));
      const ChannelLanes<T> lanes(p.output, 1, 1, s.out_channels, block, 1);
      E sums[L] = {};
      for (int l = 0; earlier && l < used; ++l) sums[l] = earlier[block * L + l];
      V total = V::load(sums);
      for (int64_t n = 0; n < s.batch; ++n) {
        int64_t held = 0;
        for (int64_t d = 0; d < depth; ++d)
          for (int64_t h = 0; h < height; ++h) {
            const T* const row = static_cast<const T*>(p.output.data) + n * stride[0] +
                                 d * stride[2] + h * stride[3];
            for (int64_t w = 0; w < width;) {
              const int64_t piece = least(width - w, full - held);
              lanes.fetch(row + w * stride[4], piece, panel + held * L, 0, 0, full * stride[4]);
              w += piece;
              held += piece;
              if (held == full) total = fold_pixels<T>(panel, full, total), held = 0;
            }
          }
        total = fold_pixels<T>(panel, held, total);
      }
      total.store(sums);
      for (int l = 0; l < used; ++l)
        put_total<T>(sums[l], p.keep_total, p.weight.data, block * L + l);
    }
  };
  const int64_t blocks = up(s.out_channels, L);
  parallel_for(blocks, 1 + worthwhile_products / (s.batch * s.outputs() * L + 1), environment_of<T>,
               work);
  return true;
}

inline bool conv_grad_bias(const ConvProblem& p) {
  bool taken = false;
  with_float_type(p.dtype, [&](auto tag) { taken = grad_bias<typename decltype(tag)::type>(p); });
  return taken;
}

}  // namespace torch_naiveconv::TNC_ISA
