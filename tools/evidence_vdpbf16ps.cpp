// Evidence for the 16-bit rule of the contract: what the instruction VDPBF16PS computes here.
//
//   g++ -O1 -ffp-contract=off -mfma -mavx512f -mavx512bf16 tools/evidence_vdpbf16ps.cpp && ./a.out
//
// Random accumulators c and bfloat16 pairs (a0, a1), (b0, b1); counts the results that differ from
// each candidate, for operands of ordinary size and for exponents down to the subnormals.
#include <immintrin.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "../csrc/spec/arithmetic.h"

using namespace torch_naiveconv;

static uint64_t state = 1;
static uint32_t random_bits() {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>(state >> 32);
}
// A random sign, a random mantissa and an exponent in [low, high].
static float random_float(int low, int high, int mantissa_bits) {
  const uint32_t r = random_bits(), mantissa = random_bits() & 0x7fffffu;
  const uint32_t exponent = 127 + low + r % (high - low + 1);
  return bits_as<float>((r & 0x80000000u) | exponent << 23 |
                        (mantissa & ~((1u << (23 - mantissa_bits)) - 1)));
}
static BFloat16 bf16(float x) { return {static_cast<uint16_t>(bits_as<uint32_t>(x) >> 16)}; }

static float instruction(float c, const BFloat16 (&a)[2], const BFloat16 (&b)[2]) {
  uint32_t pair_a, pair_b;
  std::memcpy(&pair_a, a, 4);
  std::memcpy(&pair_b, b, 4);
  const __m512 r = _mm512_dpbf16_ps(_mm512_set1_ps(c), (__m512bh)_mm512_set1_epi32(pair_a),
                                    (__m512bh)_mm512_set1_epi32(pair_b));
  return _mm512_cvtss_f32(r);
}

struct Candidate {
  const char* name;
  float (*compute)(float c, float a0, float a1, float b0, float b1);
};
static const Candidate candidates[] = {
    {"fma(even), then fma(odd)",
     [](float c, float a0, float a1, float b0, float b1) {
       return flushed_fused(a1, b1, flushed_fused(a0, b0, c));
     }},
    {"fma(odd), then fma(even)",
     [](float c, float a0, float a1, float b0, float b1) {
       return flushed_fused(a0, b0, flushed_fused(a1, b1, c));
     }},
    {"c + (even + odd), each rounded: the contract's group of 2",
     [](float c, float a0, float a1, float b0, float b1) {
       return flushed_add(c, flushed_add(flushed_fused(a0, b0, 0), flushed_fused(a1, b1, 0)));
     }},
    {"c + (odd + even), the inner sum fused",
     [](float c, float a0, float a1, float b0, float b1) {
       return flushed_add(c, flushed_fused(a0, b0, flushed_fused(a1, b1, 0)));
     }},
};

static void compare(const char* what, int low, int high) {
  const int trials = 1000000;
  int differs[4] = {};
  for (int i = 0; i < trials; ++i) {
    const float c = random_float(std::max(2 * low, -126), 2 * high, 23);
    const BFloat16 a[2] = {bf16(random_float(low, high, 7)), bf16(random_float(low, high, 7))};
    const BFloat16 b[2] = {bf16(random_float(low, high, 7)), bf16(random_float(low, high, 7))};
    const uint32_t r = bits_as<uint32_t>(instruction(c, a, b));
    for (int k = 0; k < 4; ++k)
      differs[k] += r != bits_as<uint32_t>(candidates[k].compute(c, widen(a[0]), widen(a[1]),
                                                                 widen(b[0]), widen(b[1])));
  }
  std::printf("%s\n", what);
  for (int k = 0; k < 4; ++k)
    std::printf("  %8d of %d differ from %s\n", differs[k], trials, candidates[k].name);
}

int main() {
  if (!__builtin_cpu_supports("avx512bf16")) return std::puts("no VDPBF16PS here"), 1;
  compare("operands from 2^-4 to 2^4", -4, 3);
  compare("products about the smallest normal number", -64, -60);
}
