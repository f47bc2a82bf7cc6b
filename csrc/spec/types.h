// The element types and their exact conversions. No torch, no libm: host and device.
// Part of the specification; start reading at conv.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#ifdef __CUDACC__
#define TNC_HD __host__ __device__ __forceinline__
#else
#define TNC_HD inline
#endif

namespace torch_naiveconv {

// 16-bit floats are storage only; arithmetic happens in float (see arithmetic.h).
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

enum class DType : int {
  float32,
  float64,
  float16,
  bfloat16,
  int8,
  int16,
  int32,
  int64,
  uint8,
  uint16,
  uint32,
  uint64,
  boolean,  // pooling only
};

template <class To, class From>
TNC_HD To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits_as keeps the size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

template <class T>
constexpr bool is_half_type = std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>;
template <class T>
constexpr bool is_float_type = std::is_floating_point_v<T> || is_half_type<T>;

// The type in which a sum of T is kept.
template <class T>
using Total = std::conditional_t<is_half_type<T>, float, T>;

// Every NaN that arithmetic produces is stored as this one; copies (max-pool) keep their payload.
template <class T>
TNC_HD T canonical_nan() {
  if constexpr (std::is_same_v<T, float>) {
    return bits_as<float>(uint32_t{0x7fc00000u});
  } else {
    return bits_as<double>(uint64_t{0x7ff8000000000000u});
  }
}

TNC_HD float widen(BFloat16 x) { return bits_as<float>(uint32_t{x.bits} << 16); }

// float16 has a 5-bit exponent, bias 15; every value, subnormals too, is a normal float32.
TNC_HD float widen(Half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t exponent = (x.bits >> 10) & 0x1fu;
  const uint32_t mantissa = x.bits & 0x3ffu;
  if (exponent == 0x1f) return bits_as<float>(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0) return bits_as<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
  // mantissa * 2^-24, exactly
  const float magnitude = static_cast<float>(mantissa) * bits_as<float>(uint32_t{103u << 23});
  return bits_as<float>(bits_as<uint32_t>(magnitude) | sign);
}

// Round to nearest, ties to even; overflow gives infinity; NaN gives the canonical one.
template <class T>
TNC_HD T narrow(float x);

template <>
TNC_HD BFloat16 narrow<BFloat16>(float x) {
  if (x != x) return {uint16_t{0x7fc0}};
  const uint32_t u = bits_as<uint32_t>(x);
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

template <>
TNC_HD Half narrow<Half>(float x) {
  if (x != x) return {uint16_t{0x7e00}};
  const uint32_t u = bits_as<uint32_t>(x);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude >= 0x47800000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 2^16 and up
  if (magnitude >= 0x38800000u) {  // normal, from 2^-14
    const uint32_t rebased = magnitude - (112u << 23);
    return {static_cast<uint16_t>(sign | ((rebased + 0xfffu + ((rebased >> 13) & 1u)) >> 13))};
  }
  // Subnormal: the result counts units of 2^-24.
  const uint32_t exponent = magnitude >> 23;
  if (exponent < 102) return {sign};  // below 2^-25: rounds to zero
  const uint32_t mantissa = (magnitude & 0x7fffffu) | 0x800000u;
  const uint32_t shift = 126 - exponent;  // 14..24
  const uint32_t units = mantissa >> shift;
  const uint32_t rest = mantissa & ((1u << shift) - 1);
  const uint32_t half = 1u << (shift - 1);
  const bool up = rest > half || (rest == half && (units & 1u));
  return {static_cast<uint16_t>(sign | (units + (up ? 1 : 0)))};
}

}  // namespace torch_naiveconv
