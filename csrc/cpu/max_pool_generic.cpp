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

#include "pool_blend.h"

// Loads and stores of the lanes whose mask is all ones; other memory is not touched.
struct Masked : Blended {
  template <class L, class Mask, class V>
  static V load(const L* from, Mask mask, V otherwise) {
    for (int i = 0; i < vector_bytes / int(sizeof(L)); ++i)
      if (mask[i]) otherwise[i] = from[i];
    return otherwise;
  }
  // Rare, and not to be prepared where it is not needed.
  template <class L, class Mask, class V>
  [[gnu::noinline]] static void store(L* to, Mask mask, V v) {
    for (int i = 0; i < vector_bytes / int(sizeof(L)); ++i)
      if (mask[i]) to[i] = v[i];
  }

  template <class L, class V>
  static V in_register(V v) {
    return v;
  }

  // As many choices of windows as there are lanes, or the first `count` of them; a tap in all. Lane
  // i of a vector holds byte i where it lies in the word of all bytes.
  template <class L>
  using Word = std::conditional_t<sizeof(L) == 4, uint32_t, uint16_t>;
  template <class L>
  static Wide<L> bytes_of(Word<L> word) {
    constexpr bool big = __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__;
    Wide<L> byte{};
    for (int i = 0; i < int(sizeof(word)); ++i)
      byte[i] = int64_t{0xff} << 8 * (big ? int(sizeof(word)) - 1 - i : i);
    return (Wide<L>{} + static_cast<decltype(Wide<L>{}[0] + 0)>(word)) & byte;
  }
  template <class L>
  static Wide<L> choices(const uint8_t* from) {
    Word<L> word;
    __builtin_memcpy(&word, from, sizeof(word));
    return bytes_of<L>(word);
  }
  template <class L>
  static Wide<L> choices(const uint8_t* from, int64_t count) {
    uint8_t bytes[sizeof(Word<L>)] = {};
    for (int64_t i = 0; i < count; ++i) bytes[i] = from[i];
    return choices<L>(bytes);
  }
  template <class L>
  static Wide<L> choice(int64_t tap) {
    return bytes_of<L>(static_cast<Word<L>>(tap * 0x01010101));
  }
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
