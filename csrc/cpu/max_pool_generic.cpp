// Row "generic" of the pooling table: 16-byte vectors, for any processor the library is built for.
#include <algorithm>
#include <new>
#include <utility>
#include <vector>

#include "max_pool.h"
#include "parallel.h"

#define TNC_ISA generic
namespace torch_naiveconv {
namespace TNC_ISA {
namespace {
constexpr int vector_bytes = 16;

// Loads and stores of the lanes whose mask is all ones; other memory is not touched.
struct Masked {
  template <class L, class Mask, class V>
  static V load(const L* from, Mask mask, V otherwise) {
    for (int i = 0; i < vector_bytes / int(sizeof(L)); ++i)
      if (mask[i]) otherwise[i] = from[i];
    return otherwise;
  }
  template <class L, class Mask, class V>
  static void store(L* to, Mask mask, V v) {
    for (int i = 0; i < vector_bytes / int(sizeof(L)); ++i)
      if (mask[i]) to[i] = v[i];
  }
  // As many bytes as there are lanes of 4 bytes.
  typedef int32_t Wide __attribute__((vector_size(vector_bytes)));
  static Wide widen(const uint8_t* from) { return Wide{from[0], from[1], from[2], from[3]}; }
};
}  // namespace
}  // namespace TNC_ISA
}  // namespace torch_naiveconv

#include "pool_kernels.h"

namespace torch_naiveconv {
static bool run_generic(const PoolProblem& p) {
  if (generic::run(p)) return true;
  return p.direction != PoolDirection::forward && run_pool_by_index(p);
}

extern const PoolRow pool_generic;
const PoolRow pool_generic{"generic", [] { return true; }, run_generic};
}  // namespace torch_naiveconv
