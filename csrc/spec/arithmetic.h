// How a reduction is rounded: one ordered sum per element type (contract rules 1, 6, 8, 9, 10).
// Part of the specification; start reading at conv.h, which names the order of the terms.
//
// Every sum has the same four verbs:
//   step(a, b)    the next term is the product a * b
//   skip()        the next term does not exist; it keeps its number and adds nothing
//   cut()         close the current group (done by itself when the group is full)
//   result(bias)  close, add the bias last, round once
// and may start from an earlier total (the resume law of the weight gradient).
#pragma once

#include <cmath>

#include "types.h"

namespace torch_naiveconv {

// One rounding of the exact a * b + c.
TNC_HD float fused(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}
TNC_HD double fused(double a, double b, double c) {
#ifdef __CUDA_ARCH__
  return __fma_rn(a, b, c);
#else
  return __builtin_fma(a, b, c);
#endif
}

template <class T>
TNC_HD T canonical(T x) {
  if constexpr (std::is_floating_point_v<T>) {
    return x == x ? x : canonical_nan<T>();
  } else {
    return x;
  }
}

// Terms in a group. Kernels may rely on it as their block length.
template <class T>
constexpr int group_length = is_half_type<T> ? 32 : 128;

// ---- float32 and float64: groups of 128 terms, each one chain of fused steps from +0 ----------
template <class T>
class FusedSum {
 public:
  TNC_HD explicit FusedSum(T earlier = T(0)) : total_(earlier) {}

  TNC_HD void step(T a, T b) {
    chain_ = fused(a, b, chain_);
    skip();
  }
  TNC_HD void skip() {
    if (++terms_ == group_length<T>) cut();
  }
  TNC_HD void cut() {
    total_ = total_ + chain_;
    chain_ = T(0);
    terms_ = 0;
  }
  TNC_HD T total() {
    cut();
    return canonical(total_ + T(0));
  }
  TNC_HD T result(T bias) {
    cut();
    return canonical(total_ + bias);
  }

 private:
  T total_;
  T chain_ = T(0);
  int terms_ = 0;
};

// ---- float16 and bfloat16: groups of 32 terms, each two float32 chains, even and odd -----------
// All float32 steps flush results that are tiny after rounding (what x86 and its matrix unit do).

constexpr float smallest_normal = 1.17549435e-38f;  // 2^-126

// A signed zero for a subnormal bfloat16 operand, the value itself otherwise.
TNC_HD float operand(BFloat16 x) {
  return (x.bits & 0x7f80u) ? widen(x) : bits_as<float>(uint32_t{x.bits & 0x8000u} << 16);
}
TNC_HD float operand(Half x) { return widen(x); }

TNC_HD float signed_zero_of(float x) { return bits_as<float>(bits_as<uint32_t>(x) & 0x80000000u); }

TNC_HD float flushed(float x) {
  return (x < smallest_normal && x > -smallest_normal) ? signed_zero_of(x) : x;
}

// A sum of two floats that lands below the normal range is exact: no rounding to think about.
TNC_HD float flushed_add(float a, float b) { return flushed(a + b); }

TNC_HD float flushed_fused(float a, float b, float c) {
  const float r = fused(a, b, c);
  if (r != smallest_normal && r != -smallest_normal) return flushed(r);
  // Exactly +-2^-126: did gradual underflow round up what 24 bits would have kept below it?
  // The products of 16-bit types have at most 22 bits, so the double sum is exact where it matters.
  const double exact = static_cast<double>(a) * static_cast<double>(b) + static_cast<double>(c);
  const double edge = 1.1754943157898258e-38;  // 2^-126 - 2^-151
  return (exact < edge && exact > -edge) ? signed_zero_of(r) : r;
}

template <class T>
class PairedSum {
 public:
  TNC_HD explicit PairedSum(float earlier = 0.0f) : total_(flushed(earlier)) {}

  TNC_HD void step(T a, T b) {
    float& chain = (terms_ & 1) ? odd_ : even_;
    chain = flushed_fused(operand(a), operand(b), chain);
    skip();
  }
  TNC_HD void skip() {
    if (++terms_ == group_length<T>) cut();
  }
  TNC_HD void cut() {
    total_ = flushed_add(total_, flushed_add(even_, odd_));
    even_ = 0.0f;
    odd_ = 0.0f;
    terms_ = 0;
  }
  TNC_HD float total() {
    cut();
    return canonical(flushed_add(total_, 0.0f));
  }
  TNC_HD T result(T bias) {
    cut();
    return narrow<T>(flushed_add(total_, operand(bias)));
  }

 private:
  float total_;
  float even_ = 0.0f;
  float odd_ = 0.0f;
  int terms_ = 0;
};

// ---- integers: exact modulo 2^n, so the order is free -------------------------------------------
template <class T>
class ModularSum {
 public:
  TNC_HD explicit ModularSum(T earlier = T(0)) : total_(static_cast<uint64_t>(earlier)) {}

  TNC_HD void step(T a, T b) { total_ += static_cast<uint64_t>(a) * static_cast<uint64_t>(b); }
  TNC_HD void skip() {}
  TNC_HD void cut() {}
  TNC_HD T total() { return static_cast<T>(total_); }
  TNC_HD T result(T bias) { return static_cast<T>(total_ + static_cast<uint64_t>(bias)); }

 private:
  uint64_t total_;
};

template <class T>
using OrderedSum =
    std::conditional_t<is_half_type<T>, PairedSum<T>,
                       std::conditional_t<std::is_floating_point_v<T>, FusedSum<T>, ModularSum<T>>>;

template <class T>
TNC_HD T zero() {
  if constexpr (is_half_type<T>) {
    return T{0};
  } else {
    return T(0);
  }
}
template <class T>
TNC_HD T one() {
  if constexpr (std::is_same_v<T, Half>) {
    return Half{0x3c00};
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return BFloat16{0x3f80};
  } else {
    return T(1);
  }
}

}  // namespace torch_naiveconv
