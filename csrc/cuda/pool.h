// Max-pooling in 32-bit arithmetic, up to four neighbours of a row a thread: forward, and its
// gradient as a gather over the windows of an input. The order of comparisons and additions is the
// specification's (spec/max_pool.h). Bodies for the device and for the host tests.
#pragma once

#include <algorithm>

#include "../cpu/max_pool.h"
#include "divider.h"

namespace torch_naiveconv {

struct PoolAxis {
  int in, out, kernel, stride, dilation, pad;
  Divider by_stride, by_dilation;

  TNC_HD int ceil_by_dilation(int n) const {
    return static_cast<int>(by_dilation.quotient(static_cast<uint32_t>(n + dilation - 1)));
  }
};

// The elements of a dense tensor in the order of its memory: channels fastest in channels_last.
struct PoolElements {
  Divider channels, size[3];
  bool channels_last;
  int64_t count;

  TNC_HD void split(uint32_t flat, int& n, int& c, int (&x)[3]) const {
    if (channels_last) c = static_cast<int>(channels.take(flat));
    x[2] = static_cast<int>(size[2].take(flat));
    x[1] = static_cast<int>(size[1].take(flat));
    x[0] = static_cast<int>(size[0].take(flat));
    if (!channels_last) c = static_cast<int>(channels.take(flat));
    n = static_cast<int>(flat);
  }
};

struct PoolPlan {
  PoolProblem problem;
  PoolAxis axis[3];
  PoolElements elements;  // of the tensor that is written
  bool whole_outputs;     // scatter: may four outputs and their indices be read at once?
};

// The written tensor, and a sample of every tensor, within 31 bits?
inline bool fits(const PoolProblem& p) {
  constexpr int64_t most = int64_t{1} << 29;
  const PoolShape& s = p.shape;
  double elements = static_cast<double>(s.batch) * static_cast<double>(s.channels);
  double taps = 1;
  for (int a = 0; a < 3; ++a) {
    const Axis& axis = s.axis[a];
    if (axis.in >= most || axis.out >= most || axis.kernel >= most || axis.stride >= most ||
        axis.dilation >= most || axis.pad >= most ||
        axis.in + axis.pad + axis.out * axis.stride + axis.kernel * axis.dilation >= most)
      return false;
    elements *= static_cast<double>(p.direction == PoolDirection::scatter ? axis.in : axis.out);
    taps *= static_cast<double>(axis.kernel);
  }
  const double limit = static_cast<double>(most);
  return elements < limit && taps < limit && static_cast<double>(s.inputs()) < limit &&
         static_cast<double>(s.channels) * static_cast<double>(s.inputs()) < 4 * limit &&
         static_cast<double>(s.channels) * static_cast<double>(s.outputs()) < 4 * limit &&
         static_cast<double>(s.batch) < limit && static_cast<double>(s.channels) < limit;
}

// A thread writes `run` neighbours along w.
inline PoolPlan make_plan(const PoolProblem& p, int run) {
  const bool scatter = p.direction == PoolDirection::scatter;
  PoolPlan plan{};
  plan.problem = p;
  plan.elements.channels = Divider(p.shape.channels);
  plan.elements.channels_last = (scatter ? p.input : p.output).stride[1] == 1;
  plan.elements.count = p.shape.batch * p.shape.channels;
  for (int a = 0; a < 3; ++a) {
    const Axis& axis = p.shape.axis[a];
    plan.axis[a] = {static_cast<int>(axis.in),
                    static_cast<int>(axis.out),
                    static_cast<int>(axis.kernel),
                    static_cast<int>(axis.stride),
                    static_cast<int>(axis.dilation),
                    static_cast<int>(axis.pad),
                    Divider(axis.stride),
                    Divider(axis.dilation)};
    int64_t size = scatter ? axis.in : axis.out;
    if (a == 2) size = (size + run - 1) / run;
    plan.elements.size[a] = Divider(size);
    plan.elements.count *= size;
  }
  return plan;
}

TNC_HD int64_t load_index(IndexType type, const void* data, int64_t at) {
  switch (type) {
    case IndexType::uint8: return static_cast<const uint8_t*>(data)[at];
    case IndexType::int16: return static_cast<const int16_t*>(data)[at];
    case IndexType::int32: return static_cast<const int32_t*>(data)[at];
    default: return static_cast<const int64_t*>(data)[at];
  }
}

inline int64_t index_bytes(IndexType type) { return int64_t{1} << static_cast<int>(type); }

// A plane of a tensor; offsets within it are 32 bits wide.
template <class T>
struct Plane {
  T* data;
  int stride[3];

  TNC_HD Plane(const RawView& view, int n, int c)
      : data(static_cast<T*>(view.data) + (n * view.stride[0] + c * view.stride[1])),
        stride{static_cast<int>(view.stride[2]), static_cast<int>(view.stride[3]),
               static_cast<int>(view.stride[4])} {}
  TNC_HD int at(int d, int h, int w) const { return d * stride[0] + h * stride[1] + w * stride[2]; }
};

// Does a run of elements along w stand at an aligned address of the tensor, wherever it begins?
inline bool holds_runs(const RawView& view, int64_t width, int64_t element_size, int run) {
  bool whole = view.stride[4] == 1 && width % run == 0;
  for (int axis = 0; axis < 4; ++axis) whole = whole && view.stride[axis] % run == 0;
  return whole &&
         reinterpret_cast<uintptr_t>(view.data) % static_cast<size_t>(run * element_size) == 0;
}

template <class T, int count>
struct alignas(sizeof(T) * count) PoolRun {
  T x[count];
};

template <int run>
TNC_HD void store_indices(const RawView& view, IndexType type, const int (&at)[5],
                          const int64_t (&index)[run]) {
  const auto as = [&](auto tag) {
    using Index = typename decltype(tag)::type;
    PoolRun<Index, run> values;
    TNC_UNROLL
    for (int r = 0; r < run; ++r) values.x[r] = static_cast<Index>(index[r]);
    const Plane<Index> plane(view, at[0], at[1]);
    *reinterpret_cast<PoolRun<Index, run>*>(plane.data + plane.at(at[2], at[3], at[4])) = values;
  };
  switch (type) {
    case IndexType::uint8: as(Tag<uint8_t>{}); break;
    case IndexType::int16: as(Tag<int16_t>{}); break;
    case IndexType::int32: as(Tag<int32_t>{}); break;
    case IndexType::int64: as(Tag<int64_t>{}); break;
  }
}

// A window along w that kernels are compiled for: without dilation, ties "first". Width 0: any.
template <int window_width, int window_stride, int window_pad>
struct Window {
  static constexpr int width = window_width, stride = window_stride, pad = window_pad;
};
using AnyWindow = Window<0, 1, 0>;

TNC_HD bool is_inside(int i, int size) {
  return static_cast<uint32_t>(i) < static_cast<uint32_t>(size);
}

// `run` neighbouring outputs of a row a thread; what they read of a row of the input is read once,
// by aligned vectors. Any window: one output.
template <class T, class W, int run>
struct PoolForward {
  PoolPlan plan;

  // Taps of an axis that lie inside the input, for the window that starts at `start`.
  TNC_HD static void clip(const PoolAxis& axis, int start, int& first, int& last) {
    first = start < 0 ? axis.ceil_by_dilation(-start) : 0;
    last = start < axis.in ? axis.ceil_by_dilation(axis.in - start) : 0;
    if (last > axis.kernel) last = axis.kernel;
  }

  TNC_HD void operator()(int64_t thread) const {
    const PoolProblem& p = plan.problem;
    int n, c, o[3], start[3], first[3], last[3];
    plan.elements.split(static_cast<uint32_t>(thread), n, c, o);
    o[2] *= run;
    TNC_UNROLL
    for (int a = 0; a < 3; ++a) {
      start[a] = o[a] * plan.axis[a].stride - plan.axis[a].pad;
      clip(plan.axis[a], start[a], first[a], last[a]);
    }
    const Plane<const T> input(p.input, n, c);
    T best[run];
    int offset[run];
    const bool rows_exist = first[0] < last[0] && first[1] < last[1];
    const int first_row = (first[0] * plan.axis[1].kernel + first[1]) * plan.axis[2].kernel;
    // What lies in the padding counts as the lowest value after the first tap that exists: it
    // never wins.
    TNC_UNROLL
    for (int r = 0; r < run; ++r) {
      const int begin = start[2] + r * W::stride, tap = begin < 0 ? -begin : 0;
      best[r] = lowest<T>();
      offset[r] = W::width > 0 && rows_exist && tap < W::width && begin + tap < plan.axis[2].in
                      ? first_row + tap
                      : -1;
    }
    for (int kd = first[0]; kd < last[0]; ++kd)
      for (int kh = first[1]; kh < last[1]; ++kh) {
        const T* const row = input.data + input.at(start[0] + kd * plan.axis[0].dilation,
                                                   start[1] + kh * plan.axis[1].dilation, 0);
        const int row_offset = (kd * plan.axis[1].kernel + kh) * plan.axis[2].kernel;
        if constexpr (W::width > 0)
          scan(row, start[2], row_offset, best, offset);
        else
          scan(row + start[2] * input.stride[2], input.stride[2] * plan.axis[2].dilation,
               row_offset, first[2], last[2], best[0], offset[0]);
      }
    const Plane<T> output(p.output, n, c);
    *reinterpret_cast<PoolRun<T, run>*>(output.data + output.at(o[0], o[1], o[2])) = run_of(best);
    if (p.kind == IndexKind::none) return;
    int64_t index[run];
    TNC_UNROLL
    for (int r = 0; r < run; ++r)
      index[r] = p.kind == IndexKind::flat ? p.shape.flat_of_offset(offset[r], o[0], o[1], o[2] + r)
                                           : offset[r];
    store_indices<run>(p.index, p.index_type, {n, c, o[0], o[1], o[2]}, index);
  }

 private:
  // The inputs that a run reads of a row begin `lead` after the aligned vector that holds them.
  static constexpr int lead = (4 - W::pad % 4) % 4;
  static constexpr int vectors = (lead + (run - 1) * W::stride + W::width + 3) / 4;
  static_assert(W::width == 0 || run * W::stride % 4 == 0, "each run begins alike");

  TNC_HD static PoolRun<T, run> run_of(const T (&x)[run]) {
    PoolRun<T, run> values;
    TNC_UNROLL
    for (int r = 0; r < run; ++r) values.x[r] = x[r];
    return values;
  }

  TNC_HD void scan(const T* row, int start, int row_offset, T (&best)[run],
                   int (&offset)[run]) const {
    T x[4 * vectors];
    TNC_UNROLL
    for (int v = 0; v < vectors; ++v) {
      const int at = start - lead + 4 * v;  // the width is a multiple of four: all inside or none
      PoolRun<T, 4> values{lowest<T>(), lowest<T>(), lowest<T>(), lowest<T>()};
      if (is_inside(at, plan.axis[2].in))
        values = *reinterpret_cast<const PoolRun<T, 4>*>(row + at);
      TNC_UNROLL
      for (int i = 0; i < 4; ++i) x[4 * v + i] = values.x[i];
    }
    TNC_UNROLL
    for (int r = 0; r < run; ++r) {
      TNC_UNROLL
      for (int kw = 0; kw < W::width; ++kw) {
        const T value = x[lead + r * W::stride + kw];
        const bool won = wins(value, best[r], Ties::first);
        best[r] = won ? value : best[r];
        offset[r] = won ? row_offset + kw : offset[r];
      }
    }
  }
  TNC_HD void scan(const T* row, int step, int row_offset, int first, int last, T& best,
                   int& offset) const {
    for (int kw = first; kw < last; ++kw) {
      const T value = row[kw * step];
      if (offset < 0 || wins(value, best, plan.problem.ties)) {
        best = value;
        offset = row_offset + kw;
      }
    }
  }
};

// The gradient of `run` neighbouring inputs of a row a thread: each window that spans one of them
// says which one it chose, in ascending order of windows. A known window, with indices that are
// bytes: which inputs of the run a window spans is known too. Any window: one input.
template <class T, class W, int run>
struct PoolScatter {
  PoolPlan plan;

  // The outputs whose windows span input i are first ... last.
  TNC_HD static void span(const PoolAxis& axis, int i, int& first, int& last) {
    const int padded = i + axis.pad, beyond = padded - (axis.kernel - 1) * axis.dilation;
    first = beyond <= 0 ? 0
                        : static_cast<int>(axis.by_stride.quotient(
                              static_cast<uint32_t>(beyond + axis.stride - 1)));
    last = static_cast<int>(axis.by_stride.quotient(static_cast<uint32_t>(padded)));
    if (last >= axis.out) last = axis.out - 1;
  }

  // The tap with which output o reads the input at `padded` = i + pad, or -1.
  TNC_HD static int tap_of(const PoolAxis& axis, int padded, int o) {
    const int distance = padded - o * axis.stride;
    if (axis.dilation == 1) return distance;
    const int k = static_cast<int>(axis.by_dilation.quotient(static_cast<uint32_t>(distance)));
    return k * axis.dilation == distance ? k : -1;
  }

  TNC_HD void operator()(int64_t thread) const {
    const PoolProblem& p = plan.problem;
    int n, c, i[3], first[3], last[3];
    plan.elements.split(static_cast<uint32_t>(thread), n, c, i);
    i[2] *= run;
    TNC_UNROLL
    for (int a = 0; a < (W::width > 0 ? 2 : 3); ++a) span(plan.axis[a], i[a], first[a], last[a]);
    const Plane<const T> output(p.output, n, c);
    const Plane<const uint8_t> bytes(p.index, n, c);  // where indices are bytes
    PlainSum<T> sum[run];
    for (int od = first[0]; od <= last[0]; ++od) {
      const int kd = tap_of(plan.axis[0], i[0] + plan.axis[0].pad, od);
      if (kd < 0) continue;
      for (int oh = first[1]; oh <= last[1]; ++oh) {
        const int kh = tap_of(plan.axis[1], i[1] + plan.axis[1].pad, oh);
        if (kh < 0) continue;
        const int row_offset = (kd * plan.axis[1].kernel + kh) * plan.axis[2].kernel;
        if constexpr (W::width > 0) {
          gather(output.data + output.at(od, oh, 0), bytes.data + bytes.at(od, oh, 0), row_offset,
                 i[2] / W::stride, sum);
        } else {
          const int64_t row = n * p.index.stride[0] + c * p.index.stride[1] +
                              od * p.index.stride[2] + oh * p.index.stride[3];
          for (int ow = first[2]; ow <= last[2]; ++ow) {
            const int kw = tap_of(plan.axis[2], i[2] + plan.axis[2].pad, ow);
            if (kw < 0) continue;
            const int own = p.kind == IndexKind::flat
                                ? (i[0] * plan.axis[1].in + i[1]) * plan.axis[2].in + i[2]
                                : row_offset + kw;
            if (load_index(p.index_type, p.index.data, row + ow * p.index.stride[4]) == own)
              sum[0].add(output.data[output.at(od, oh, ow)]);
          }
        }
      }
    }
    PoolRun<T, run> values;
    TNC_UNROLL
    for (int r = 0; r < run; ++r) values.x[r] = sum[r].result();
    const Plane<T> input(p.input, n, c);
    *reinterpret_cast<PoolRun<T, run>*>(input.data + input.at(i[0], i[1], i[2])) = values;
  }

 private:
  // Window `at` + k begins at input k * stride - pad of the run; those for k in [begin, end) span
  // it.
  static constexpr int begin = -((W::width - 1 - W::pad) / W::stride);
  static constexpr int end = (run - 1 + W::pad) / W::stride + 1;
  static_assert(W::width == 0 || run % W::stride == 0, "each run begins alike");
  static constexpr bool aligned = run / W::stride == 4;  // is `at` a multiple of four?

  TNC_HD void gather(const T* gradient, const uint8_t* index, int row_offset, int at,
                     PlainSum<T> (&sum)[run]) const {
    T g[end - begin];
    int tap[end - begin];
    const bool whole = aligned && plan.whole_outputs && is_inside(at, plan.axis[2].out);
    if (whole) {
      const auto four = *reinterpret_cast<const PoolRun<T, 4>*>(gradient + at);
      const auto taps = *reinterpret_cast<const PoolRun<uint8_t, 4>*>(index + at);
      TNC_UNROLL
      for (int k = 0; k < 4; ++k) {
        if (k >= end) continue;
        g[k - begin] = four.x[k];
        tap[k - begin] = taps.x[k] - row_offset;
      }
    }
    TNC_UNROLL
    for (int k = begin; k < end; ++k) {
      if (whole && k >= 0 && k < 4) continue;
      const bool exists = is_inside(at + k, plan.axis[2].out);
      g[k - begin] = exists ? gradient[at + k] : zero<T>();
      tap[k - begin] = (exists ? index[at + k] : 255) - row_offset;  // 255: no tap
    }
    TNC_UNROLL
    for (int k = begin; k < end; ++k) {
      TNC_UNROLL
      for (int r = 0; r < run; ++r) {
        const int own = r - (k * W::stride - W::pad);
        if (own >= 0 && own < W::width && tap[k - begin] == own) sum[r].add(g[k - begin]);
      }
    }
  }
};

// ---- max-unpooling -----------------------------------------------------------------------------

// The last writer of a position owns it. First every input offers its number to the position that
// it names (a maximum, so the order of the offers does not matter), then values are copied. An
// index outside of the plane names nothing.

TNC_HD void offer(int* owner, int number) {
#ifdef __CUDA_ARCH__
  atomicMax(owner, number);
#else
  if (*owner < number) *owner = number;
#endif
}
TNC_HD void offer(long long* owner, long long number) {
#ifdef __CUDA_ARCH__
  atomicMax(owner, number);
#else
  if (*owner < number) *owner = number;
#endif
}

// Where input `flat` writes among all planes' outputs, or -1.
TNC_HD int64_t unpool_target(const UnpoolProblem& p, int64_t flat) {
  const int64_t index = p.indices[flat];
  return index >= 0 && index < p.outputs ? flat / p.inputs * p.outputs + index : -1;
}

template <class Number>
struct UnpoolOwners {
  UnpoolProblem p;
  Number* owner;  // one for each output, -1 at first
  TNC_HD void operator()(int64_t flat) const {
    const int64_t target = unpool_target(p, flat);
    if (target >= 0) offer(&owner[target], static_cast<Number>(flat % p.inputs));
  }
};

template <class T, class Number>
struct UnpoolForward {
  UnpoolProblem p;
  const Number* owner;
  TNC_HD void operator()(int64_t flat) const {
    const Number number = owner[flat];
    static_cast<T*>(p.output)[flat] =
        number < 0 ? T(0) : static_cast<const T*>(p.input)[flat / p.outputs * p.inputs + number];
  }
};

template <class T, class Number>
struct UnpoolGather {
  UnpoolProblem p;
  const Number* owner;
  TNC_HD void operator()(int64_t flat) const {
    const int64_t target = unpool_target(p, flat);
    static_cast<T*>(p.input)[flat] = target >= 0 && owner[target] == flat % p.inputs
                                         ? static_cast<const T*>(p.output)[target]
                                         : T(0);
  }
};

template <class Number>
struct UnpoolClear {
  Number* owner;
  TNC_HD void operator()(int64_t flat) const { owner[flat] = -1; }
};

// ---- which kernel ------------------------------------------------------------------------------

template <class Body, class Launcher>
void launch_pool(const PoolProblem& p, int run, Launcher& launcher, bool whole_outputs = false) {
  PoolPlan plan = make_plan(p, run);
  plan.whole_outputs = whole_outputs;
  launcher.each(plan.elements.count, Body{plan});
}

// Calls visit with the window along w, if there are kernels for it; the common ones, and those of
// spatial pyramids. Returns whether it did.
template <class Visit>
bool with_window(const Axis& w, const Visit& visit) {
  const auto is = [&](auto window) {
    using W = decltype(window);
    if (w.kernel != W::width || w.stride != W::stride || w.pad != W::pad || w.dilation != 1)
      return false;
    return visit(window);
  };
  return is(Window<2, 2, 0>{}) || is(Window<3, 2, 1>{}) || is(Window<3, 1, 1>{}) ||
         is(Window<4, 4, 0>{}) || is(Window<5, 1, 2>{}) || is(Window<9, 1, 4>{}) ||
         is(Window<13, 1, 6>{});
}

template <class T, class W, int run, class Launcher>
bool forward_runs(const PoolProblem& p, Launcher& launcher) {
  if constexpr (run * W::stride % 4 == 0 && (run <= 4 || W::width == 2)) {
    const Axis& w = p.shape.axis[2];
    const bool whole =
        holds_runs(p.output, w.out, sizeof(T), run) &&
        (p.kind == IndexKind::none || holds_runs(p.index, w.out, index_bytes(p.index_type), run));
    if (whole) launch_pool<PoolForward<T, W, run>>(p, run, launcher);
    return whole;
  }
  return false;
}

template <class T, class Launcher>
void pool_forward(const PoolProblem& p, Launcher& launcher) {
  if constexpr (is_float_type<T>)
    if (p.ties == Ties::first && holds_runs(p.input, p.shape.axis[2].in, sizeof(T), 4) &&
        with_window(p.shape.axis[2], [&](auto window) {
          using W = decltype(window);
          return forward_runs<T, W, 8>(p, launcher) || forward_runs<T, W, 4>(p, launcher) ||
                 forward_runs<T, W, 2>(p, launcher);
        }))
      return;
  launch_pool<PoolForward<T, AnyWindow, 1>>(p, 1, launcher);
}

template <class T, class W, int run, class Launcher>
bool scatter_runs(const PoolProblem& p, Launcher& launcher) {
  const Axis& w = p.shape.axis[2];
  if (!holds_runs(p.input, w.in, sizeof(T), run)) return false;
  const bool whole = holds_runs(p.output, w.out, sizeof(T), 4) && holds_runs(p.index, w.out, 1, 4);
  launch_pool<PoolScatter<T, W, run>>(p, run, launcher, whole);
  return true;
}

template <class T, class Launcher>
void pool_scatter(const PoolProblem& p, Launcher& launcher) {
  if constexpr (is_float_type<T>)
    if (p.index_type == IndexType::uint8 && p.kind == IndexKind::offset &&
        p.output.stride[4] == 1 && p.index.stride[4] == 1 &&
        with_window(p.shape.axis[2], [&](auto window) {
          using W = decltype(window);
          return scatter_runs<T, W, 8>(p, launcher) || scatter_runs<T, W, 4>(p, launcher);
        }))
      return;
  launch_pool<PoolScatter<T, AnyWindow, 1>>(p, 1, launcher);
}

// Returns false to decline.
template <class Launcher>
bool launch_runs(const PoolProblem& p, Launcher& launcher) {
  if (p.direction == PoolDirection::gather || p.ties > Ties::last || !fits(p)) return false;
  with_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p.direction == PoolDirection::forward)
      pool_forward<T>(p, launcher);
    else
      pool_scatter<T>(p, launcher);
  });
  return true;
}

// Values are only copied: a type of the same size will do.
template <class Visit>
void with_copied_type(DType dtype, const Visit& visit) {
  with_type(dtype, [&](auto tag) {
    constexpr size_t size = sizeof(typename decltype(tag)::type);
    if constexpr (size == 1)
      visit(Tag<uint8_t>{});
    else if constexpr (size == 2)
      visit(Tag<uint16_t>{});
    else if constexpr (size == 4)
      visit(Tag<uint32_t>{});
    else
      visit(Tag<uint64_t>{});
  });
}

template <class T, class Number, class Launcher>
void unpool(const UnpoolProblem& p, Launcher& launcher) {
  const int64_t outputs = p.planes * p.outputs;
  auto* owner =
      static_cast<Number*>(launcher.allocate(outputs * static_cast<int64_t>(sizeof(Number))));
  launcher.each(outputs, UnpoolClear<Number>{owner});
  launcher.each(p.planes * p.inputs, UnpoolOwners<Number>{p, owner});
  if (p.transpose)
    launcher.each(p.planes * p.inputs, UnpoolGather<T, Number>{p, owner});
  else
    launcher.each(outputs, UnpoolForward<T, Number>{p, owner});
}

template <class Launcher>
void launch_unpool(const UnpoolProblem& p, Launcher& launcher) {
  with_copied_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p.inputs <= INT32_MAX)
      unpool<T, int>(p, launcher);
    else
      unpool<T, long long>(p, launcher);
  });
}

}  // namespace torch_naiveconv
