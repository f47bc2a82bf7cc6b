// What max-pooling needs of a vector: lanes that are compared and chosen, never computed, so a
// NaN keeps its payload and -0 its sign. Included inside a row's namespace and target region, after
// `vector_bytes` and `Masked` of that row.
//
// There are four lane types. Every element type is carried in one of them without loss and in the
// order of the specification: 16-bit floats in float, narrow integers in int32.

inline int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
using Lane =
    std::conditional_t<std::is_same_v<T, double>, double,
                       std::conditional_t<sizeof(T) == 8, int64_t,
                                          std::conditional_t<is_float_type<T>, float, int32_t>>>;

// The integer as wide as a lane: masks, and the index that travels with a value.
template <class L>
using LaneIndex = std::conditional_t<sizeof(L) == 8, int64_t, int32_t>;

template <class L>
struct VecOf {
  typedef L type __attribute__((vector_size(vector_bytes)));
};
template <class L>
using Vec = typename VecOf<L>::type;
template <class L>
using VecIndex = Vec<LaneIndex<L>>;
template <class L>
constexpr int lanes = vector_bytes / int(sizeof(L));

template <class L>
inline Vec<L> load(const L* from) {
  Vec<L> v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}
template <class L>
inline void store(L* to, Vec<L> v) {
  __builtin_memcpy(to, &v, sizeof(v));
}

template <class L>
using Places = std::make_integer_sequence<int, lanes<L>>;

template <class L, int... i>
inline Vec<L> broadcast(L x, std::integer_sequence<int, i...>) {
  return Vec<L>{(void(i), x)...};
}
template <class L>
inline Vec<L> broadcast(L x) {
  return broadcast(x, Places<L>{});
}

template <class L, int... i>
inline Vec<L> iota(std::integer_sequence<int, i...>) {
  return Vec<L>{L(i)...};
}
// Lane i holds i.
template <class L>
inline Vec<L> iota() {
  return iota<L>(Places<L>{});
}

template <int odd, class V, int... i>
inline V every_second(V a, V b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, (2 * i + odd)...);
}
// Elements 0, 2, 4 ... of a and b behind each other, or 1, 3, 5 ...
template <class L>
inline Vec<L> evens(Vec<L> a, Vec<L> b) {
  return every_second<0>(a, b, Places<L>{});
}
template <class L>
inline Vec<L> odds(Vec<L> a, Vec<L> b) {
  return every_second<1>(a, b, Places<L>{});
}

template <int odd, int block, class V, int... i>
inline V blockwise(V a, V b, std::integer_sequence<int, i...>) {
  constexpr int size = sizeof...(i), half = block / 2;
  return __builtin_shufflevector(
      a, b, (i / block * block + i % half * 2 + odd + (i % block >= half ? size : 0))...);
}
template <int block, class V, int... i>
inline V in_order(V v, std::integer_sequence<int, i...>) {
  constexpr int size = sizeof...(i), half = block / 2, pairs = size / 2;
  return __builtin_shufflevector(v, v, (i % pairs / half * block + i / pairs * half + i % half)...);
}
// evens and odds with the lanes in another order, the same for both, which in_order ends: inside
// blocks of 16 bytes that is one instruction.
template <int odd, class L>
inline Vec<L> every_second_blockwise(Vec<L> a, Vec<L> b) {
  return blockwise<odd, 16 / int(sizeof(L))>(a, b, Places<L>{});
}
template <class L>
inline Vec<L> in_order(Vec<L> v) {
  return in_order<16 / int(sizeof(L))>(v, Places<L>{});
}

template <int half, class V, int... i>
inline V interleaved(V a, V b, std::integer_sequence<int, i...>) {
  constexpr int size = sizeof...(i);
  return __builtin_shufflevector(a, b, (half * size / 2 + i / 2 + i % 2 * size)...);
}
// a[0], b[0], a[1], b[1] ...: the first half of it, and the second.
template <class L>
inline Vec<L> zip_low(Vec<L> a, Vec<L> b) {
  return interleaved<0>(a, b, Places<L>{});
}
template <class L>
inline Vec<L> zip_high(Vec<L> a, Vec<L> b) {
  return interleaved<1>(a, b, Places<L>{});
}

// The specification's `wins` for lanes: all ones where `next` takes the place of `best`.
template <bool last, class L>
inline VecIndex<L> wins(Vec<L> next, Vec<L> best) {
  VecIndex<L> mask;
  if constexpr (last)
    mask = next >= best;
  else
    mask = next > best;
  if constexpr (std::is_floating_point_v<L>) mask |= next != next;
  return mask;
}

// Which of the places first ... first + lanes lie in [0, size)?
template <class L>
inline VecIndex<L> inside(int64_t first, int64_t size) {
  const VecIndex<L> place = iota<LaneIndex<L>>() + LaneIndex<L>(first);
  return (place >= 0) & (place < LaneIndex<L>(size));
}
// row[first ... first + lanes), with `pad` for what lies outside [0, size).
template <class L>
inline Vec<L> load_clipped(const L* row, int64_t first, int64_t size, L pad) {
  return Masked::load(row + first, inside<L>(first, size), broadcast(pad));
}
// Writes of row[first ... first + lanes) what lies in [0, size).
template <class L>
inline void store_clipped(L* row, int64_t first, int64_t size, Vec<L> v) {
  if (first >= 0 && first + lanes<L> <= size)
    store(row + first, v);
  else
    Masked::store(row + first, inside<L>(first, size), v);
}

constexpr int64_t line_bytes = 64;  // of the caches

// Tensors are walked in several streams at once, in short rows or pixels: the processor's own
// prefetching finds such streams late and begins anew in every page. What comes a page later is
// asked for, for each of the next `bytes` that are read or written. (Not inlined, it would be a
// function without effects.)
[[gnu::always_inline]] inline void prefetch(const void* from, int64_t bytes) {
  constexpr int64_t page = 4096;
  const char* const first = static_cast<const char*>(from) + page;
  for (int64_t at = 0; at < bytes; at += line_bytes) __builtin_prefetch(first + at);
}

// ---- elements to lanes and back -----------------------------------------------------------------

template <class T>
inline Lane<T> to_lane(T x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return bits_as<float>(uint32_t{x.bits} << 16);
  } else if constexpr (std::is_same_v<T, Half>) {
    // The bits as the upper half of a float keep the order; a NaN is made one of the float's and
    // carries its bits below.
    const uint32_t high = uint32_t{x.bits} << 16;
    const bool nan = (high & 0x7fffffffu) > 0x7c000000u;
    return bits_as<float>(high | (nan ? 0x7f800000u | x.bits : 0u));
  } else if constexpr (std::is_same_v<T, uint32_t>) {
    return static_cast<int32_t>(x ^ 0x80000000u);
  } else if constexpr (std::is_same_v<T, uint64_t>) {
    return static_cast<int64_t>(x ^ 0x8000000000000000u);
  } else {
    return x;
  }
}
template <class T>
inline T from_lane(Lane<T> lane) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return {static_cast<uint16_t>(bits_as<uint32_t>(lane) >> 16)};
  } else if constexpr (std::is_same_v<T, Half>) {
    const uint32_t bits = bits_as<uint32_t>(lane);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return {static_cast<uint16_t>(nan ? bits : bits >> 16)};
  } else if constexpr (std::is_same_v<T, uint32_t>) {
    return static_cast<uint32_t>(lane) ^ 0x80000000u;
  } else if constexpr (std::is_same_v<T, uint64_t>) {
    return static_cast<uint64_t>(lane) ^ 0x8000000000000000u;
  } else {
    return static_cast<T>(lane);
  }
}
template <class T>
constexpr bool is_lane_type = std::is_same_v<T, Lane<T>>;
