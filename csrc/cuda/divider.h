// Division of 31-bit numbers by a divisor known to the host, as one multiplication.
#pragma once

#include "../spec/types.h"

#ifdef __CUDACC__
#define TNC_UNROLL _Pragma("unroll")  // so that arrays indexed in the loop stay in registers
#define TNC_PRAGMA(text) _Pragma(#text)
#define TNC_UNROLL_IF(condition) TNC_PRAGMA(unroll((condition) ? 64 : 1))
#else
#define TNC_UNROLL
#define TNC_UNROLL_IF(condition)
#endif

namespace torch_naiveconv {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// With l = ceil(log2(divisor)) and m = ceil(2^(31 + l) / divisor), n / divisor is
// n * m >> (31 + l) for every n < 2^31: the error of m is below 2^l, so n * m errs by less than
// 2^(31 + l), which is one unit of the quotient over `divisor` and cannot reach the next integer.
struct Divider {
  uint32_t divisor = 1, multiplier = 1u << 31, shift = 31;

  Divider() = default;
  // A divisor of 0 belongs to a size of 0, by which nothing is ever divided.
  explicit Divider(int64_t d) : divisor(d > 0 ? static_cast<uint32_t>(d) : 1) {
    uint32_t log = 0;
    while ((uint64_t{1} << log) < divisor) ++log;
    shift = 31 + log;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << shift) + divisor - 1) / divisor);
  }

  TNC_HD uint32_t quotient(uint32_t n) const {
    return static_cast<uint32_t>((static_cast<uint64_t>(n) * multiplier) >> shift);
  }
  // Returns n mod divisor and makes n its quotient.
  TNC_HD uint32_t take(uint32_t& n) const {
    const uint32_t q = quotient(n), rest = n - q * divisor;
    n = q;
    return rest;
  }
};

// A flat number as digits (outer, d, h, w), w fastest.
struct Digits {
  Divider size[3];

  Digits() = default;
  Digits(int64_t d, int64_t h, int64_t w) : size{Divider(d), Divider(h), Divider(w)} {}

  TNC_HD void split(uint32_t flat, int& outer, int (&x)[3]) const {
    x[2] = static_cast<int>(size[2].take(flat));
    x[1] = static_cast<int>(size[1].take(flat));
    x[0] = static_cast<int>(size[0].take(flat));
    outer = static_cast<int>(flat);
  }
};

}  // namespace torch_naiveconv
