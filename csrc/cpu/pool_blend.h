// Choices of windows for rows without mask registers: as wide as a lane, and the lanes that chose a
// tap blended. Included inside a row's namespace and target region, before `Masked`.

struct Blended {
  template <class L>
  struct Types {
    static constexpr int lanes = vector_bytes / int(sizeof(L));
    typedef std::conditional_t<sizeof(L) == 8, int64_t, int32_t> Wide
        __attribute__((vector_size(vector_bytes)));
  };
  template <class L>
  using Wide = typename Types<L>::Wide;

  // The lanes that chose a given tap.
  template <class L>
  static Wide<L> equal(Wide<L> a, Wide<L> b) {
    return a == b;
  }
  // The sum with x added there; x there, else 0. Adding +0 changes no sum that began at +0.
  template <class L, class V>
  static V add(V sum, Wide<L> chosen, V x) {
    return sum + (chosen ? x : V{});
  }
  template <class L, class V>
  static V pick(Wide<L> chosen, V x) {
    return chosen ? x : V{};
  }

  template <class L, class V>
  static V replace_nan(V x, V other) {
    return x == x ? x : other;
  }
};
