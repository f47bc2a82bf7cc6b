// Moving operands to where the microkernel wants them, and totals to where the caller wants them:
// panels of lanes, zero-padded patches of an image, transposed stores. Widens 16-bit elements.
#pragma once

namespace torch_naiveconv::TNC_ISA {

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
  static size_t bytes_for(int64_t count) {
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

template <class T>
TNC_INLINE T widened(T x) {
  return x;
}
TNC_INLINE float widened(BFloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float wide;
  __builtin_memcpy(&wide, &bits, 4);
  return wide;
}
TNC_INLINE float widened(Half x) {
  float wide[Vec<float>::lanes];
  Vec<float>::load(&x, 1).store(wide);
  return wide[0];
}

// dst[i] = src[i * stride]
template <class T, class S>
TNC_INLINE void copy_run(T* dst, const S* src, int64_t stride, int64_t n) {
  using V = Vec<T>;
  int64_t i = 0;
  if (stride == 1) {
    for (; i + V::lanes <= n; i += V::lanes) V::load(src + i).store(dst + i);
    if (i < n) V::load(src + i, static_cast<int>(n - i)).store(dst + i, static_cast<int>(n - i));
  } else {
    for (; i < n; ++i) dst[i] = widened(src[i * stride]);
  }
}

template <class T>
TNC_INLINE void zero_run(T* dst, int64_t n) {
  if (n > 0) std::memset(dst, 0, static_cast<size_t>(n) * sizeof(T));
}

// panel[t][j] = src[j * lane_stride + offset[t]] for t < terms, j < lanes; +0 up to vecs vectors.
template <class T, class S>
void pack_panel(T* panel, int vecs, int lanes, const S* src, int64_t lane_stride,
                const int32_t* offset, int64_t terms) {
  using V = Vec<T>;
  constexpr int L = V::lanes;
  const int64_t pitch = int64_t{vecs} * L;
  if (lane_stride == 1) {
    for (int64_t t = 0; t < terms; ++t, panel += pitch) {
      const S* const from = src + offset[t];
      int j = 0;
      for (; j + L <= lanes; j += L) V::load(from + j).store(panel + j);
      if (j < lanes) {
        V::load(from + j, lanes - j).store(panel + j);
        j += L;
      }
      for (; j < pitch; j += L) V::zero().store(panel + j);
    }
    return;
  }
  for (int64_t t = 0; t < terms;) {
    int run = 1;  // terms that lie side by side in memory
    while (run < L && t + run < terms && offset[t + run] == offset[t] + run) ++run;
    for (int j = 0; j < pitch; j += L) {
      const int some = lanes - j < L ? (lanes - j > 0 ? lanes - j : 0) : L;
      const S* const from = src + j * lane_stride + offset[t];
      if (run >= L / 4) {
        V block[L];
        if (run == L && some == L) {
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) block[i] = V::load(from + i * lane_stride);
        } else {
          for (int i = 0; i < L; ++i)
            block[i] = i < some ? V::load(from + i * lane_stride, run) : V::zero();
        }
        V::transpose(block);
        if (run == L) {
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) block[i].store(panel + (t + i) * pitch + j);
        } else {
          for (int i = 0; i < run; ++i) block[i].store(panel + (t + i) * pitch + j);
        }
      } else {
        for (int i = 0; i < run; ++i) {
          T* const to = panel + (t + i) * pitch + j;
          for (int l = 0; l < some; ++l) to[l] = widened(from[l * lane_stride + i]);
          for (int l = some; l < L; ++l) to[l] = T(0);
        }
      }
    }
    t += run;
  }
}

// dst[position[r] + j * lane_stride] = canonical(total[r][j] + bias[j]), rounded to D, for j <
// lanes; bias has whole vectors. Says whether a NaN was among them.
template <class D, class T>
bool store_rows(const T* total, int64_t rows, int vecs, int lanes, const T* bias, D* dst,
                const int64_t* position, int64_t lane_stride) {
  using V = Vec<T>;
  constexpr int L = V::lanes;
  const int64_t pitch = int64_t{vecs} * L;
  bool nan = false;
  if (lane_stride == 1) {
    for (int64_t r = 0; r < rows; ++r)
      for (int j = 0; j < lanes; j += L) {
        const V sum = V::load(total + r * pitch + j) + V::load(bias + j);
        nan |= V::any(is_nan(sum));
        if (j + L <= lanes)
          canonical(sum).store(dst + position[r] + j);
        else
          canonical(sum).store(dst + position[r] + j, lanes - j);
      }
    return nan;
  }
  for (int64_t r = 0; r < rows;) {
    int run = 1;  // rows that lie side by side in memory
    while (run < L && r + run < rows && position[r + run] == position[r] + run) ++run;
    for (int j = 0; j < lanes; j += L) {
      const V b = V::load(bias + j);
      V block[L];
      for (int i = 0; i < L; ++i) {
        block[i] = (i < run ? V::load(total + (r + i) * pitch + j) : V::zero()) + b;
        nan |= V::any(is_nan(block[i]));
        block[i] = canonical(block[i]);
      }
      D* const to = dst + position[r] + j * lane_stride;
      const int some = lanes - j < L ? lanes - j : L;
      if (run >= 2) {
        V::transpose(block);
        for (int i = 0; i < some; ++i) {
          if (run == L)
            block[i].store(to + i * lane_stride);
          else
            block[i].store(to + i * lane_stride, run);
        }
      } else {
        D row[L];
        block[0].store(row);
        for (int i = 0; i < some; ++i) to[i * lane_stride] = row[i];
      }
    }
    r += run;
  }
  return nan;
}

}  // namespace torch_naiveconv::TNC_ISA
