// Moving operands to where the microkernel wants them, and totals to where the caller wants them:
// panels of lanes, zero-padded patches of an image, transposed stores. Widens 16-bit elements.
#pragma once

#include "basics.h"

namespace torch_naiveconv::TNC_ISA {

// zero_run, copy_run and copy_transposed write whole vectors: up to L - 1 elements behind the last.
// What belongs there is written later, or is slack.
template <class T>
TNC_INLINE void zero_run(T* dst, int64_t n) {
  const auto zero = in_register(Vec<T>::zero());  // or the compiler calls memset for a few elements
  for (int64_t i = 0; i < n; i += Vec<T>::lanes) zero.store(dst + i);
}

// dst[i] = src[i * stride]
template <class T, class S>
TNC_INLINE void copy_run(T* dst, const S* src, int64_t stride, int64_t n) {
  using V = Vec<T>;
  constexpr int L = V::lanes;
  int64_t i = 0;
  if (stride == 1) {
    for (; i + L <= n; i += L) V::load(src + i).store(dst + i);
    if (i < n) V::load(src + i, static_cast<int>(n - i)).store(dst + i);
    return;
  }
  if (stride == 2) {
    for (; i < n; i += L) {
      const int64_t rest = 2 * (n - i) - 1;  // the element behind the last one is never read
      V even, odd;
      if (rest >= 2 * L)
        V::split(V::load(src + 2 * i), V::load(src + 2 * i + L), even, odd);
      else
        V::split(V::load(src + 2 * i, static_cast<int>(least(rest, L))),
                 V::load(src + 2 * i + L, static_cast<int>(most(rest - L, 0))), even, odd);
      even.store(dst + i);
    }
    return;
  }
  for (; i < n; ++i) dst[i] = widened(src[i * stride]);
}

// even[i] = src[2 * i], odd[i] = src[2 * i + 1]
template <class T, class S>
void copy_halves(T* even, T* odd, const S* src, int64_t n) {
  using V = Vec<T>;
  constexpr int L = V::lanes;
  for (int64_t i = 0; i < n; i += 2 * L) {
    const int64_t rest = n - i;
    const V a = rest >= L ? V::load(src + i) : V::load(src + i, static_cast<int>(rest));
    const V b = rest >= 2 * L ? V::load(src + i + L)
                : rest > L    ? V::load(src + i + L, static_cast<int>(rest - L))
                              : V::zero();
    V halves[2];
    V::split(a, b, halves[0], halves[1]);
    halves[0].store(even + i / 2);
    halves[1].store(odd + i / 2);
  }
}

// to[c * to_channel + w] = from[w * from_pixel + c] for c < channels, w < pixels
template <class T, class S>
void copy_transposed(T* to, int64_t to_channel, const S* from, int64_t from_pixel, int64_t channels,
                     int64_t pixels) {
  using V = Vec<T>;
  constexpr int L = V::lanes;
  for (int64_t w = 0; w < pixels; w += L)
    for (int64_t c = 0; c < channels; c += L) {
      const int wide = static_cast<int>(least(L, pixels - w));
      const int deep = static_cast<int>(least(L, channels - c));
      for (int i = 0; i < L; ++i) prefetch(from + (w + L + i) * from_pixel + c);
      V block[L];
      if (wide == L && deep == L) {
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) block[i] = V::load(from + (w + i) * from_pixel + c);
        V::transpose(block);
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) block[i].store(to + (c + i) * to_channel + w);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i)
          block[i] = i < wide ? V::load(from + (w + i) * from_pixel + c, deep) : V::zero();
        V::transpose(block);
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i)
          if (i < deep) block[i].store(to + (c + i) * to_channel + w);
      }
    }
}

// How many of `limit` numbers, at most L, each `step` behind the one before, count up by `By`.
template <int L = 16, int By = 1, class Integer>
TNC_INLINE int run_length(const Integer* number, int64_t limit, int64_t step = 1) {
  if (step == 1 && limit == L) {  // mostly all of them do: a few vectors tell
    Integer difference = 0;
    for (int i = 0; i < L; ++i) difference |= number[i] ^ (number[0] + i * By);
    if (difference == 0) return L;
  }
  int n = 1;
  while (n < limit && number[n * step] == number[(n - 1) * step] + By) ++n;
  return n;
}

// panel[t][j] = src[j * lane_stride + offset[t]] for t < terms, j < lanes, at most 4 vectors; +0 up
// to j < pitch.
// Terms that are `step` apart may lie side by side in memory: the taps of a channel if that is 1,
// the channels of a tap if it is their number. Meanwhile the memory of the panel after this one,
// whose terms are `next` of next_src, is asked for, a few lines at a time: a burst of them would
// hold up the loads.
template <class T, class S>
void pack_panel(T* panel, int pitch, int lanes, const S* src, int64_t lane_stride,
                const int32_t* offset, int64_t terms, int64_t step, const S* next_src,
                const int32_t* next, int64_t next_terms) {
  using V = Vec<T>;
  constexpr int L = V::lanes;
  if (lane_stride == 1) {
    const auto copy = [&](auto vecs) __attribute__((always_inline)) {
      constexpr int last = (vecs.value - 1) * L;
      const int rest = lanes - last, padded = pitch - last < L ? pitch - last : L;
      for (int64_t t = 0; t < terms; ++t, panel += pitch) {
        const S* const from = src + offset[t];
        const S* const ahead = t < next_terms ? next_src + next[t] : from;
        prefetch_row<vecs.value, V>(ahead);
#pragma GCC unroll 4
        for (int j = 0; j < last; j += L) V::load(from + j).store(panel + j);
        const V x = rest == L ? V::load(from + last) : V::load(from + last, rest);
        x.store(panel + last, padded);
      }
    };
    switch (up(lanes, L)) {
      case 1: return copy(std::integral_constant<int, 1>{});
      case 2: return copy(std::integral_constant<int, 2>{});
      case 3: return copy(std::integral_constant<int, 3>{});
      default: return copy(std::integral_constant<int, 4>{});
    }
  }
  for (int j = 0; j < lanes; j += L) {
    const int some = lanes - j < L ? lanes - j : L;
    const int padded = pitch - j < L ? pitch - j : L;
    const S* const lane = src + j * lane_stride;
    for (int64_t first = 0; first < step; ++first) {
      int64_t left = up(terms - first, step);
      for (int64_t t = first; left > 0;) {
        const int run = run_length<L>(offset + t, least(left, L), step);
        const S* const from = lane + offset[t];
        T* const to = panel + t * pitch + j;
        const int64_t apart = step * pitch;
        for (int i = 0; i < some && t < next_terms; ++i)
          prefetch(next_src + (j + i) * lane_stride + next[t]);
        t += run * step;
        left -= run;
        if (run >= L / 4) {
          V block[L];
          if (run == L && some == L) {
#pragma GCC unroll 16
            for (int i = 0; i < L; ++i) block[i] = V::load(from + i * lane_stride);
            V::transpose(block);
#pragma GCC unroll 16
            for (int i = 0; i < L; ++i) block[i].store(to + i * apart);
          } else {
#pragma GCC unroll 16
            for (int i = 0; i < L; ++i)
              block[i] = i < some ? V::load(from + i * lane_stride, run) : V::zero();
            V::transpose(block);
#pragma GCC unroll 16
            for (int i = 0; i < L; ++i)
              if (i < run) block[i].store(to + i * apart, padded);
          }
        } else {
          for (int i = 0; i < run; ++i) {
            for (int l = 0; l < some; ++l) to[i * apart + l] = widened(from[l * lane_stride + i]);
            for (int l = some; l < padded; ++l) to[i * apart + l] = T(0);
          }
        }
      }
    }
  }
}

// The elements of n vectors, a power of 2, in turns: element i of each side by side.
template <int n, class V>
TNC_INLINE void interleave(V (&x)[n]) {
  if constexpr (n > 1) {
    V even[n / 2], odd[n / 2];
    for (int i = 0; i < n / 2; ++i) even[i] = x[2 * i], odd[i] = x[2 * i + 1];
    interleave<n / 2>(even);
    interleave<n / 2>(odd);
    for (int i = 0; i < n / 2; ++i) V::merge(even[i], odd[i], x[2 * i], x[2 * i + 1]);
  }
}

// The first `count` elements of two vectors in turns.
template <class V, class T>
TNC_INLINE void store_in_turns(V even, V odd, T* to, int64_t count) {
  constexpr int L = V::lanes;
  V first, second;
  V::merge(even, odd, first, second);
  if (count >= 2 * L) {
    first.store(to);
    second.store(to + L);
  } else {
    first.store(to, static_cast<int>(least(count, L)));
    if (count > L) second.store(to + L, static_cast<int>(count - L));
  }
}
// Of n vectors, a power of 2.
template <int n, class V, class T>
TNC_INLINE void store_in_turns(const V (&x)[n], T* to, int64_t count) {
  if constexpr (n == 1) {
    x[0].store(to, static_cast<int>(least(count, V::lanes)));
  } else {
    V even[n / 2], odd[n / 2];
    for (int i = 0; i < n / 2; ++i) even[i] = x[2 * i], odd[i] = x[2 * i + 1];
    interleave<n / 2>(even);
    interleave<n / 2>(odd);
    for (int i = 0; i < n / 2 && count > 0; ++i, to += 2 * V::lanes, count -= 2 * V::lanes)
      store_in_turns(even[i], odd[i], to, count);
  }
}

// Rows whose elements take turns: to[i * parts + k] = from[k * pitch + i], `count` elements of
// `to`. Up to a vector behind every row is read.
template <class T, class S>
using RowMerge = void (*)(const T* from, int64_t pitch, int64_t parts, int64_t count, S* to);
template <int parts, class T, class S>
void merge_rows(const T* from, int64_t pitch, int64_t, int64_t count, S* to) {
  using V = Vec<Total<T>>;
  for (int64_t at = 0; at < count; at += parts * V::lanes, from += V::lanes) {
    V x[parts];
    for (int k = 0; k < parts; ++k) x[k] = V::load(from + k * pitch);
    store_in_turns<parts>(x, to + at, count - at);
  }
}
template <class T, class S>
void merge_any_rows(const T* from, int64_t pitch, int64_t parts, int64_t count, S* to) {
  using V = Vec<Total<T>>;
  for (int64_t k = 0; k < parts; ++k)
    for (int64_t at = k; at < count; at += parts * V::lanes) {
      S some[V::lanes];
      V::load(from + k * pitch + at / parts).store(some);
      for (int i = 0; i < V::lanes && at + i * parts < count; ++i) to[at + i * parts] = some[i];
    }
}
template <class T, class S>
RowMerge<T, S> row_merge(int64_t parts) {
  return parts == 1    ? merge_rows<1, T, S>
         : parts == 2  ? merge_rows<2, T, S>
         : parts == 4  ? merge_rows<4, T, S>
         : parts == 8  ? merge_rows<8, T, S>
         : parts == 16 ? merge_rows<16, T, S>
                       : merge_any_rows<T, S>;
}

// Infinite or NaN, as the vector class's compares have it.
template <class V>
TNC_INLINE auto is_special(V x) {
  return is_nan(fma(x, V::zero(), V::zero()));
}

// The results of sums; remembers whether an infinity or a NaN was among them.
template <class V>
class Results {
 public:
  TNC_INLINE V of(V sum) {
    special_ = V::either(special_, is_special(sum));
    return canonical(sum);
  }
  TNC_INLINE bool any_special() const { return V::any(special_); }

 private:
  typename V::Mask special_{};
};

// Where totals are stored: row r, lane j at data[position[r] + j * to_lane].
template <class D, class T>
struct Target {
  D* data;
  const int64_t* position;
  int64_t to_lane;
  const T* bias;  // of each lane, whole vectors
  int lanes;
};

// store_rows for lanes that lie side by side.
template <class D, class T, class TotalOf>
bool store_lanes(int64_t rows, const Target<D, T> target, const TotalOf& total_of) {
  using V = Vec<T>;
  constexpr int L = V::lanes;
  constexpr int64_t ahead = 16;  // rows; a result line that is new to the caches is slow to come
  Results<V> results;
  for (int64_t r = 0; r < rows; ++r) {
    D* const to = target.data + target.position[r];
    prefetch_to_write(target.data + target.position[least(r + ahead, rows - 1)]);
    for (int j = 0; j < target.lanes; j += L) {
      const V result = results.of(V::load(total_of(r) + j) + V::load(target.bias + j));
      if (j + L <= target.lanes)
        result.store(to + j);
      else
        result.store(to + j, target.lanes - j);
    }
  }
  return results.any_special();
}

// Stores canonical(total[r][j] + bias[j]), rounded to D. With an `order`, totals of row r are
// total[order[r]]. Says whether an infinity or a NaN was among them.
template <class D, class T>
bool store_rows(const T* total, int64_t rows, int vecs, const Target<D, T> target,
                const int32_t* order = nullptr) {
  using V = Vec<T>;
  constexpr int L = V::lanes;
  const int64_t pitch = int64_t{vecs} * L;
  const auto total_of = [&](int64_t r) { return total + (order ? order[r] : r) * pitch; };
  if (target.to_lane == 1) return store_lanes(rows, target, total_of);
  const int64_t* const position = target.position;
  const int64_t to_lane = target.to_lane;
  Results<V> results;
  for (int j = 0; j < target.lanes; j += L) {
    const V b = V::load(target.bias + j);
    const int some = target.lanes - j < L ? target.lanes - j : L;
    for (int64_t r = 0; r < rows;) {
      const int run = run_length<L>(position + r, least(rows - r, L));  // side by side in memory
      const int64_t first = r;
      D* const to = target.data + position[r] + j * to_lane;
      r += run;
      if (run >= 2) {
        const D* const ahead = target.data + position[least(r + L, rows - 1)] + j * to_lane;
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) prefetch_to_write(ahead + i * to_lane);
        V block[L];
        if (run == L) {
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) {
            block[i] = results.of(V::load(total_of(first + i) + j) + b);
          }
        } else {
          for (int i = 0; i < L; ++i) {
            block[i] = results.of(i < run ? V::load(total_of(first + i) + j) + b : V::zero());
          }
        }
        V::transpose(block);
        if (run == L && some == L) {
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) block[i].store(to + i * to_lane);
        } else {
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i)
            if (i < some) block[i].store(to + i * to_lane, run);
        }
        continue;
      }
      if constexpr (std::is_same_v<D, T> && V::stores_apart) {  // the phases of a stride of 2
        const int apart = run_length<L, 2>(position + first, least(rows - first, L));
        if (apart >= 2) {
          const D* const ahead = target.data + position[least(first + L, rows - 1)] + j * to_lane;
          V block[L];
          for (int i = 0; i < L; ++i) {
            prefetch_to_write(ahead + i * to_lane);
            prefetch_to_write(ahead + i * to_lane + L);
            block[i] = results.of(i < apart ? V::load(total_of(first + i) + j) + b : V::zero());
          }
          V::transpose(block);
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i)
            if (i < some) block[i].store_apart(to + i * to_lane, apart);
          r = first + apart;
          continue;
        }
      }
      const V result = results.of(V::load(total_of(first) + j) + b);
      D row[L];
      result.store(row);
      for (int i = 0; i < some; ++i) to[i * to_lane] = row[i];
    }
  }
  return results.any_special();
}

}  // namespace torch_naiveconv::TNC_ISA
