// Forward of a depthwise layer of stride 2 in NCHW, with vectors that can be shifted in registers
// (AVX-512): kernels of 3 and 5 with the padding that keeps the image's place. Start reading at
// map_strided, at the end.
//
// Rows are read where they lie, and split into the pixels of even and of odd columns in registers;
// what another tap reads is one of these, or the same one pixel to the side. Columns in the padding
// are the zeros with which a row is filled up to whole vectors.
#pragma once

#include "depthwise_tiles.h"

namespace torch_naiveconv::TNC_ISA {

template <class T, int kernel, int vecs>
void strided_plane(const ConvProblem& p, const T* source, const Total<T>* weights, Total<T> bias,
                   T* out) {
  using V = Vec<Total<T>>;
  constexpr int L = V::lanes, chains = chains_of<T>, pad = kernel / 2;
  const Axis &high = p.shape.axis[1], &wide = p.shape.axis[2];
  const int left = static_cast<int>(wide.in - (vecs - 1) * 2 * L);  // of the last two vectors
  const int cut = static_cast<int>(wide.out - (vecs - 1) * L);      // of the last result
  for (int64_t y = 0; y < high.out; ++y) {
    V acc[vecs][chains];
#pragma GCC unroll 4
    for (int c = 0; c < vecs; ++c)
      for (V& chain : acc[c]) chain = V::zero();
    with_constants<kernel>([&](auto kh) __attribute__((always_inline)) {
      const int64_t ih = high.input_of(y, kh.value);
      if (!high.holds_input(ih)) return;
      const T* const row = source + ih * p.input.stride[3];
      V half[2][vecs];  // the even columns, the odd ones
#pragma GCC unroll 4
      for (int c = 0; c < vecs; ++c) {
        const T* const from = row + c * 2 * L;
        const bool whole = c + 1 < vecs;
        V::split(whole ? V::load(from) : V::load(from, static_cast<int>(least(left, L))),
                 whole ? V::load(from + L) : V::load(from + L, static_cast<int>(most(left - L, 0))),
                 half[0][c], half[1][c]);
      }
      with_constants<kernel>([&](auto kw) __attribute__((always_inline)) {
        constexpr int odd = (kw.value + pad) % 2, side = (kw.value - pad - odd) / 2;
        constexpr int number = kh.value * kernel + kw.value;
        const V tap = V::broadcast(weights[number]);
#pragma GCC unroll 4
        for (int c = 0; c < vecs; ++c) {
          const V here = half[odd][c];
          V x = here;
          if constexpr (side < 0)
            x = V::template window<L - 1>(c > 0 ? half[odd][c - 1] : V::zero(), here);
          if constexpr (side > 0)
            x = V::template window<1>(here, c + 1 < vecs ? half[odd][c + 1] : V::zero());
          V& chain = acc[c][number % chains];
          chain = fma(x, tap, chain);
        }
      });
    });
#pragma GCC unroll 4
    for (int c = 0; c < vecs; ++c) {
      const V result = result_of<T>((V::zero() + sum_of(acc[c])) + V::broadcast(bias));
      T* const to = out + y * p.output.stride[3] + c * L;
      if (c + 1 < vecs)
        result.store(to);
      else
        result.store(to, cut);
    }
  }
}

template <class T>
bool map_strided(const ConvProblem& p) {
  using E = Total<T>;
  using V = Vec<E>;
  const ConvShape& s = p.shape;
  const Axis &deep = s.axis[0], &high = s.axis[1], &wide = s.axis[2];
  const int64_t kernel = wide.kernel, vecs = (wide.out + V::lanes - 1) / V::lanes;
  if (p.direction != Direction::forward || s.group_in() != 1 || p.input.stride[4] != 1 ||
      p.output.stride[4] != 1 || (kernel != 3 && kernel != 5) || high.kernel != kernel ||
      deep.in != 1 || deep.out != 1 || deep.kernel != 1 || vecs > 4 || wide.out * 2 <= V::lanes ||
      (wide.in + 2 * V::lanes - 1) / (2 * V::lanes) != vecs)
    return false;
  const auto keeps_place = [&](const Axis& a) {
    return a.stride == 2 && a.dilation == 1 && a.pad == kernel / 2;
  };
  if (!keeps_place(high) || !keeps_place(wide)) return false;
  Arena& plan = plan_arena();
  plan.reset(Arena::bytes_for<E>(s.out_channels * s.taps()));
  E* const weights = plan.take<E>(s.out_channels * s.taps());
  // Rows in the padding are left out: that is exact if they would add zeros.
  if (!pack_weights<T>(p, s.out_channels, s.group_out(), 1, 1, false, weights)) return false;

  const auto work = [&](auto kernel, auto vecs, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / s.out_channels, c = i % s.out_channels;
      strided_plane<T, kernel.value, vecs.value>(
          p,
          static_cast<const T*>(p.input.data) + n * p.input.stride[0] +
              c / s.group_out() * p.input.stride[1],
          weights + c * s.taps(), p.bias ? widened(static_cast<const T*>(p.bias)[c]) : E(0),
          static_cast<T*>(p.output.data) + n * p.output.stride[0] + c * p.output.stride[1]);
    }
  };
  const auto run = [&](auto kernel, auto vecs) {
    parallel_for(s.batch * s.out_channels, 1 + worthwhile_products / (s.outputs() * s.taps() + 1),
                 environment_of<T>,
                 [&](int64_t begin, int64_t end) { work(kernel, vecs, begin, end); });
  };
  const auto with_vecs = [&](auto kernel) {
    switch (vecs) {
      case 1: return run(kernel, std::integral_constant<int, 1>{});
      case 2: return run(kernel, std::integral_constant<int, 2>{});
      case 3: return run(kernel, std::integral_constant<int, 3>{});
      case 4: return run(kernel, std::integral_constant<int, 4>{});
    }
  };
  if (kernel == 3)
    with_vecs(std::integral_constant<int, 3>{});
  else
    with_vecs(std::integral_constant<int, 5>{});
  return true;
}

}  // namespace torch_naiveconv::TNC_ISA
