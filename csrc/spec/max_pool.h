// THE SPECIFICATION of max-pooling, its gradient, and max-unpooling: each element by itself.
// Values are copied, never computed: a NaN keeps its payload and -0 its sign.
#pragma once

#include "arithmetic.h"
#include "shape.h"

namespace torch_naiveconv {

// Which of several equal maxima a window chooses. `first` is torch's rule. `all` and `split` choose
// every one: each gets the whole gradient, or an equal share of it.
enum class Ties : int { first, last, all, split };

template <class T>
TNC_HD bool is_nan(T x) {
  if constexpr (is_half_type<T>) {
    const float wide = widen(x);
    return wide != wide;
  } else {
    return x != x;
  }
}
template <class T>
TNC_HD bool greater(T a, T b) {
  if constexpr (is_half_type<T>) {
    return widen(a) > widen(b);
  } else {
    return a > b;
  }
}
template <class T>
TNC_HD bool equal(T a, T b) {
  if constexpr (is_half_type<T>) {
    return widen(a) == widen(b);
  } else {
    return a == b;
  }
}

// The value of a window that holds no tap at all: -inf, or the least integer.
template <class T>
TNC_HD T lowest() {
  if constexpr (std::is_same_v<T, Half>) {
    return Half{0xfc00};
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return BFloat16{0xff80};
  } else if constexpr (std::is_same_v<T, float>) {
    return bits_as<float>(uint32_t{0xff800000u});
  } else if constexpr (std::is_same_v<T, double>) {
    return bits_as<double>(uint64_t{0xfff0000000000000u});
  } else if constexpr (std::is_signed_v<T>) {
    return static_cast<T>(uint64_t{1} << (8 * sizeof(T) - 1));
  } else {
    return T(0);
  }
}

// Does `next` take the place of `best`? The last NaN of a window wins.
template <class T>
TNC_HD bool wins(T next, T best, Ties ties) {
  return greater(next, best) || is_nan(next) || (ties == Ties::last && equal(next, best));
}

// offset counts the taps of the window in (kd, kh, kw) order; -1: the window holds no tap.
template <class T>
struct Winner {
  T value;
  int64_t offset;
};

// The window of output (od, oh, ow), scanned in (kd, kh, kw) order over the taps that exist.
template <class T>
TNC_HD Winner<T> max_pool_at(const PoolShape& s, View<const T> input, Ties ties, int64_t n,
                             int64_t c, int64_t od, int64_t oh, int64_t ow) {
  Winner<T> best{lowest<T>(), -1};
  for (int64_t kd = 0; kd < s.axis[0].kernel; ++kd) {
    const int64_t id = s.axis[0].input_of(od, kd);
    if (!s.axis[0].holds_input(id)) continue;
    for (int64_t kh = 0; kh < s.axis[1].kernel; ++kh) {
      const int64_t ih = s.axis[1].input_of(oh, kh);
      if (!s.axis[1].holds_input(ih)) continue;
      for (int64_t kw = 0; kw < s.axis[2].kernel; ++kw) {
        const int64_t iw = s.axis[2].input_of(ow, kw);
        if (!s.axis[2].holds_input(iw)) continue;
        const T value = input.at(n, c, id, ih, iw);
        if (best.offset < 0 || wins(value, best.value, ties))
          best = {value, s.offset_of(kd, kh, kw)};
      }
    }
  }
  return best;
}

// Visit the windows that span input (id, ih, iw) in ascending (od, oh, ow) order, with the offset
// that this input has in each.
template <class Visit>
TNC_HD void for_each_window(const PoolShape& s, int64_t id, int64_t ih, int64_t iw, Visit visit) {
  for (int64_t od = s.axis[0].first_output(id); od <= s.axis[0].last_output(id); ++od) {
    const int64_t kd = s.axis[0].tap_of(od, id);
    if (kd < 0) continue;
    for (int64_t oh = s.axis[1].first_output(ih); oh <= s.axis[1].last_output(ih); ++oh) {
      const int64_t kh = s.axis[1].tap_of(oh, ih);
      if (kh < 0) continue;
      for (int64_t ow = s.axis[2].first_output(iw); ow <= s.axis[2].last_output(iw); ++ow) {
        const int64_t kw = s.axis[2].tap_of(ow, iw);
        if (kw >= 0) visit(od, oh, ow, s.offset_of(kd, kh, kw));
      }
    }
  }
}

// A plain sum in the accumulation type, from +0.
template <class T>
class PlainSum {
 public:
  TNC_HD void add(T x) {
    if constexpr (is_half_type<T>) {
      total_ = total_ + widen(x);
    } else if constexpr (std::is_floating_point_v<T>) {
      total_ = total_ + x;
    } else {
      total_ = static_cast<T>(static_cast<uint64_t>(total_) + static_cast<uint64_t>(x));
    }
  }
  // The share of one winner among `count`; integers divide towards zero.
  TNC_HD void add_share(T x, int64_t count) {
    if constexpr (is_half_type<T>) {
      total_ = total_ + widen(x) / static_cast<float>(count);
    } else if constexpr (std::is_floating_point_v<T>) {
      total_ = total_ + x / static_cast<T>(count);
    } else {
      using Wide = std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>;
      add(static_cast<T>(static_cast<Wide>(x) / static_cast<Wide>(count)));
    }
  }
  TNC_HD T result() const {
    if constexpr (is_half_type<T>) {
      return narrow<T>(total_);
    } else {
      return canonical(total_);
    }
  }

 private:
  Total<T> total_ = Total<T>(0);
};

// How a window's choice was recorded: its offset in the window, or the flat position in the plane.
enum class IndexKind : int { none, offset, flat };

// grad_input at one input: the gradients of the windows that chose it, in ascending order.
// This is the transpose of max_pool_gather_at.
template <class T, class Index>
TNC_HD T max_pool_scatter_at(const PoolShape& s, View<const T> grad_output, View<const Index> index,
                             IndexKind kind, int64_t n, int64_t c, int64_t id, int64_t ih,
                             int64_t iw) {
  PlainSum<T> sum;
  const int64_t flat = s.flat_of(id, ih, iw);
  for_each_window(s, id, ih, iw, [&](int64_t od, int64_t oh, int64_t ow, int64_t offset) {
    const int64_t own = kind == IndexKind::flat ? flat : offset;
    if (index.at(n, c, od, oh, ow) == static_cast<Index>(own))
      sum.add(grad_output.at(n, c, od, oh, ow));
  });
  return sum.result();
}

// The input that a window chose; +0 where it chose none or the index is out of range.
template <class T, class Index>
TNC_HD T max_pool_gather_at(const PoolShape& s, View<const T> input, View<const Index> index,
                            IndexKind kind, int64_t n, int64_t c, int64_t od, int64_t oh,
                            int64_t ow) {
  const Index stored = index.at(n, c, od, oh, ow);
  if (stored == static_cast<Index>(-1)) return zero<T>();
  int64_t flat = static_cast<int64_t>(stored);
  if (kind == IndexKind::offset) {
    if (flat >= s.taps()) return zero<T>();
    flat = s.flat_of_offset(flat, od, oh, ow);
  }
  const Position p = Position::of(flat, 1, s.axis[0].in, s.axis[1].in, s.axis[2].in);
  if (flat < 0 || p.n > 0) return zero<T>();
  return input.at(n, c, p.d, p.h, p.w);
}

// ---- ties "all" and "split": the choice is found again from the values --------------------------

template <class T>
TNC_HD bool ties_with(T value, T best) {
  return equal(value, best) || (is_nan(value) && is_nan(best));
}

// Visit the taps of a window that exist, in (kd, kh, kw) order.
template <class Visit>
TNC_HD void for_each_tap(const PoolShape& s, int64_t od, int64_t oh, int64_t ow, Visit visit) {
  for (int64_t kd = 0; kd < s.axis[0].kernel; ++kd)
    for (int64_t kh = 0; kh < s.axis[1].kernel; ++kh)
      for (int64_t kw = 0; kw < s.axis[2].kernel; ++kw) {
        const int64_t id = s.axis[0].input_of(od, kd);
        const int64_t ih = s.axis[1].input_of(oh, kh);
        const int64_t iw = s.axis[2].input_of(ow, kw);
        if (s.axis[0].holds_input(id) && s.axis[1].holds_input(ih) && s.axis[2].holds_input(iw))
          visit(id, ih, iw);
      }
}

template <class T>
TNC_HD int64_t count_ties(const PoolShape& s, View<const T> input, T best, int64_t n, int64_t c,
                          int64_t od, int64_t oh, int64_t ow) {
  int64_t count = 0;
  for_each_tap(s, od, oh, ow, [&](int64_t id, int64_t ih, int64_t iw) {
    count += ties_with(input.at(n, c, id, ih, iw), best) ? 1 : 0;
  });
  return count;
}

// grad_input at one input when every tied maximum gets the gradient (all) or its share (split).
template <class T>
TNC_HD T max_pool_ties_scatter_at(const PoolShape& s, View<const T> grad_output,
                                  View<const T> input, Ties ties, int64_t n, int64_t c, int64_t id,
                                  int64_t ih, int64_t iw) {
  PlainSum<T> sum;
  const T own = input.at(n, c, id, ih, iw);
  for_each_window(s, id, ih, iw, [&](int64_t od, int64_t oh, int64_t ow, int64_t) {
    const T best = max_pool_at(s, input, Ties::first, n, c, od, oh, ow).value;
    if (!ties_with(own, best)) return;
    const T grad = grad_output.at(n, c, od, oh, ow);
    if (ties == Ties::split)
      sum.add_share(grad, count_ties(s, input, best, n, c, od, oh, ow));
    else
      sum.add(grad);
  });
  return sum.result();
}

// Its transpose: the sum (all) or mean (split) of `values` over the tied maxima of a window.
template <class T>
TNC_HD T max_pool_ties_gather_at(const PoolShape& s, View<const T> values, View<const T> input,
                                 Ties ties, int64_t n, int64_t c, int64_t od, int64_t oh,
                                 int64_t ow) {
  const T best = max_pool_at(s, input, Ties::first, n, c, od, oh, ow).value;
  const int64_t count = ties == Ties::split ? count_ties(s, input, best, n, c, od, oh, ow) : 1;
  PlainSum<T> sum;
  for_each_tap(s, od, oh, ow, [&](int64_t id, int64_t ih, int64_t iw) {
    if (ties_with(input.at(n, c, id, ih, iw), best))
      sum.add_share(values.at(n, c, id, ih, iw), count);
  });
  return sum.result();
}

}  // namespace torch_naiveconv
