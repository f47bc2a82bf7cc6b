// As many fused multiply-adds as a row's vectors can do, and nothing else: what the benchmark calls
// the machine's peak.
#pragma once

namespace torch_naiveconv::TNC_ISA {

// Returns the number of operations done, two an element.
template <class E>
double multiply_add_chains(int64_t rounds) {
  using V = Vec<E>;
  constexpr int chains = V::registers == 32 ? 24 : 12;  // latency times issue, and no spills
  V chain[chains];
  const V half = V::broadcast(E(0.5));
  for (int i = 0; i < chains; ++i) chain[i] = V::broadcast(E(i));
  for (int64_t r = 0; r < rounds; ++r)
#pragma GCC unroll 24
    for (int i = 0; i < chains; ++i) chain[i] = fma(chain[i], half, half);
  V sum = V::zero();
  for (int i = 0; i < chains; ++i) sum = sum + chain[i];
  E lanes[V::lanes];
  sum.store(lanes);
  // Every chain converges to 1. The test keeps the compiler from dropping the loop.
  return lanes[0] > 0 ? 2.0 * chains * V::lanes * static_cast<double>(rounds) : 0.0;
}

inline double multiply_adds(DType dtype, int64_t rounds) {
  return dtype == DType::float64 ? multiply_add_chains<double>(rounds)
                                 : multiply_add_chains<float>(rounds);
}

}  // namespace torch_naiveconv::TNC_ISA
