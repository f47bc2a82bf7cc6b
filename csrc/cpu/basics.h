// What all convolution kernels are made of: whole numbers, memory, prefetches, constants.
#pragma once

namespace torch_naiveconv::TNC_ISA {

TNC_INLINE int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }
TNC_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
TNC_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// How many chains a group of terms has, and whether subnormals are flushed in them.
template <class T>
constexpr int chains_of = is_half_type<T> ? 2 : 1;
template <class T>
constexpr FloatEnvironment::Mode environment_of =
    is_half_type<T> ? FloatEnvironment::flush : FloatEnvironment::gradual;

// Are neighbouring vectors joined faster than a vector that crosses lines is loaded?
template <class V, class = void>
constexpr bool joins_windows = false;
template <class V>
constexpr bool joins_windows<V, decltype(void(V::template window<1>(V{}, V{})))> = true;

template <class T>
TNC_INLINE T widened(T x) {
  return x;
}
TNC_INLINE float widened(BFloat16 x) { return widen(x); }
TNC_INLINE float widened(Half x) { return widen(x); }

// what(k) with the constants k < n.
template <int n, class What>
TNC_INLINE void with_constants(const What& what) {
  [&]<int... k>(std::integer_sequence<int, k...>) __attribute__((always_inline)) {
    (what(std::integral_constant<int, k>{}), ...);
  }(std::make_integer_sequence<int, n>{});
}

TNC_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
TNC_INLINE void prefetch_near(const void* p) { __builtin_prefetch(p, 0, 3); }
TNC_INLINE void prefetch_to_write(const void* p) { __builtin_prefetch(p, 1, 3); }
// `vecs` vectors V of elements that lie as T.
template <int vecs, class V, class T>
TNC_INLINE void prefetch_row(const T* row) {
#pragma GCC unroll 8
  for (int line = 0; line < vecs * V::lanes * int{sizeof(T)}; line += 64)
    prefetch(row + line / sizeof(T));
}

constexpr int64_t worthwhile_products = 50000;  // multiply-adds for which a thread is woken

// Memory that only grows, one for each use and thread. take() hands out aligned pieces of it.
class Arena {
 public:
  Arena() = default;
  ~Arena() { std::free(data_); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // Forgets what was taken; makes room for `bytes` (the sum of bytes_for of all pieces).
  void reset(size_t bytes) {
    used_ = 0;
    if (bytes <= size_) return;
    std::free(data_);
    size_ = (bytes + 4095) / 4096 * 4096;
    data_ = static_cast<char*>(std::aligned_alloc(4096, size_));
    if (data_ == nullptr) {
      size_ = 0;
      throw std::bad_alloc();
    }
  }
  template <class T>
  static constexpr size_t bytes_for(int64_t count) {
    return (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64;
  }
  template <class T>
  T* take(int64_t count) {
    T* const piece = reinterpret_cast<T*>(data_ + used_);
    used_ += bytes_for<T>(count);
    return piece;
  }

 private:
  char* data_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

inline Arena& plan_arena() {  // tables that the tasks of one call share
  static thread_local Arena arena;
  return arena;
}
inline Arena& task_arena() {  // what one task works in
  static thread_local Arena arena;
  return arena;
}

}  // namespace torch_naiveconv::TNC_ISA
