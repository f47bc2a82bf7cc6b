// Max-pooling in 32-bit arithmetic, four elements a thread: forward, and its gradient as a gather
// over the windows of an input. The order of comparisons and additions is the specification's
// (spec/max_pool.h). Bodies for the device and for the host tests.
#pragma once

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
};

// The written tensor and every plane within 31 bits?
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
         static_cast<double>(s.batch) < limit && static_cast<double>(s.channels) < limit;
}

inline PoolPlan make_plan(const PoolProblem& p) {
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
    const int64_t size = scatter ? axis.in : axis.out;
    plan.elements.size[a] = Divider(size);
    plan.elements.count *= size;
  }
  return plan;
}

TNC_HD void store_index(IndexType type, void* data, int64_t at, int64_t value) {
  switch (type) {
    case IndexType::uint8: static_cast<uint8_t*>(data)[at] = static_cast<uint8_t>(value); break;
    case IndexType::int16: static_cast<int16_t*>(data)[at] = static_cast<int16_t>(value); break;
    case IndexType::int32: static_cast<int32_t*>(data)[at] = static_cast<int32_t>(value); break;
    case IndexType::int64: static_cast<int64_t*>(data)[at] = value; break;
  }
}
// Does the stored index equal `value`, which is cast to its type first?
TNC_HD bool index_is(IndexType type, const void* data, int64_t at, int value) {
  switch (type) {
    case IndexType::uint8:
      return static_cast<const uint8_t*>(data)[at] == static_cast<uint8_t>(value);
    case IndexType::int16:
      return static_cast<const int16_t*>(data)[at] == static_cast<int16_t>(value);
    case IndexType::int32: return static_cast<const int32_t*>(data)[at] == value;
    default: return static_cast<const int64_t*>(data)[at] == value;
  }
}

TNC_HD int64_t offset_at(const RawView& view, int n, int c, int d, int h, int w) {
  return n * view.stride[0] + c * view.stride[1] + d * view.stride[2] + h * view.stride[3] +
         w * view.stride[4];
}

// Elements i, i + 256, i + 512, i + 768 of a run of 1024: neighbouring threads write neighbours.
template <class Body>
TNC_HD void for_four(int64_t thread, int64_t count, const Body& body) {
  const int64_t first = thread / 256 * 1024 + thread % 256;
  TNC_UNROLL
  for (int j = 0; j < 4; ++j)
    if (first + j * 256 < count) body(static_cast<uint32_t>(first + j * 256));
}
inline int64_t threads_for_four(int64_t count) { return (count + 1023) / 1024 * 256; }

template <class T>
struct PoolForward {
  PoolPlan plan;

  // Taps of an axis that lie inside the input, for the window that starts at `start`.
  TNC_HD static void clip(const PoolAxis& axis, int start, int& first, int& last) {
    first = start < 0 ? axis.ceil_by_dilation(-start) : 0;
    last = start < axis.in ? axis.ceil_by_dilation(axis.in - start) : 0;
    if (last > axis.kernel) last = axis.kernel;
  }

  TNC_HD void operator()(int64_t thread) const {
    for_four(thread, plan.elements.count, [&](uint32_t flat) { element(flat); });
  }

  TNC_HD void element(uint32_t flat) const {
    const PoolProblem& p = plan.problem;
    int n, c, o[3], start[3], first[3], last[3];
    plan.elements.split(flat, n, c, o);
    TNC_UNROLL
    for (int a = 0; a < 3; ++a) {
      start[a] = o[a] * plan.axis[a].stride - plan.axis[a].pad;
      clip(plan.axis[a], start[a], first[a], last[a]);
    }
    const T* plane = static_cast<const T*>(p.input.data) + offset_at(p.input, n, c, 0, 0, 0);
    const int64_t step = p.input.stride[4] * plan.axis[2].dilation;
    T best = lowest<T>();
    int offset = -1;
    for (int kd = first[0]; kd < last[0]; ++kd)
      for (int kh = first[1]; kh < last[1]; ++kh) {
        const T* row = plane + (start[0] + kd * plan.axis[0].dilation) * p.input.stride[2] +
                       (start[1] + kh * plan.axis[1].dilation) * p.input.stride[3] +
                       start[2] * p.input.stride[4];
        const int row_offset = (kd * plan.axis[1].kernel + kh) * plan.axis[2].kernel;
        for (int kw = first[2]; kw < last[2]; ++kw) {
          const T value = row[kw * step];
          if (offset < 0 || wins(value, best, p.ties)) {
            best = value;
            offset = row_offset + kw;
          }
        }
      }
    static_cast<T*>(p.output.data)[offset_at(p.output, n, c, o[0], o[1], o[2])] = best;
    if (p.kind == IndexKind::none) return;
    int64_t index = offset;
    if (p.kind == IndexKind::flat) index = p.shape.flat_of_offset(offset, o[0], o[1], o[2]);
    store_index(p.index_type, p.index.data, offset_at(p.index, n, c, o[0], o[1], o[2]), index);
  }
};

template <class T>
struct PoolScatter {
  PoolPlan plan;

  TNC_HD void operator()(int64_t thread) const {
    for_four(thread, plan.elements.count, [&](uint32_t flat) { element(flat); });
  }

  // The tap with which output o reads the input at `padded` = i + pad, or -1.
  TNC_HD static int tap_of(const PoolAxis& axis, int padded, int o) {
    const int distance = padded - o * axis.stride;
    if (axis.dilation == 1) return distance;
    const int k = static_cast<int>(axis.by_dilation.quotient(static_cast<uint32_t>(distance)));
    return k * axis.dilation == distance ? k : -1;
  }

  TNC_HD void element(uint32_t flat) const {
    const PoolProblem& p = plan.problem;
    int n, c, i[3], first[3], last[3];
    plan.elements.split(flat, n, c, i);
    TNC_UNROLL
    for (int a = 0; a < 3; ++a) {
      const PoolAxis& axis = plan.axis[a];
      const int padded = i[a] + axis.pad, beyond = padded - (axis.kernel - 1) * axis.dilation;
      first[a] = beyond <= 0 ? 0
                             : static_cast<int>(axis.by_stride.quotient(
                                   static_cast<uint32_t>(beyond + axis.stride - 1)));
      last[a] = static_cast<int>(axis.by_stride.quotient(static_cast<uint32_t>(padded)));
      if (last[a] >= axis.out) last[a] = axis.out - 1;
    }
    const int own_flat = static_cast<int>(p.shape.flat_of(i[0], i[1], i[2]));
    PlainSum<T> sum;
    for (int od = first[0]; od <= last[0]; ++od) {
      const int kd = tap_of(plan.axis[0], i[0] + plan.axis[0].pad, od);
      if (kd < 0) continue;
      for (int oh = first[1]; oh <= last[1]; ++oh) {
        const int kh = tap_of(plan.axis[1], i[1] + plan.axis[1].pad, oh);
        if (kh < 0) continue;
        for (int ow = first[2]; ow <= last[2]; ++ow) {
          const int kw = tap_of(plan.axis[2], i[2] + plan.axis[2].pad, ow);
          if (kw < 0) continue;
          const int own = p.kind == IndexKind::flat
                              ? own_flat
                              : (kd * plan.axis[1].kernel + kh) * plan.axis[2].kernel + kw;
          if (index_is(p.index_type, p.index.data, offset_at(p.index, n, c, od, oh, ow), own))
            sum.add(static_cast<const T*>(p.output.data)[offset_at(p.output, n, c, od, oh, ow)]);
        }
      }
    }
    static_cast<T*>(p.input.data)[offset_at(p.input, n, c, i[0], i[1], i[2])] = sum.result();
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

// Returns false to decline.
template <class Launcher>
bool launch_quads(const PoolProblem& p, Launcher& launcher) {
  if (p.direction == PoolDirection::gather || p.ties > Ties::last || !fits(p)) return false;
  const PoolPlan plan = make_plan(p);
  const int64_t threads = threads_for_four(plan.elements.count);
  with_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p.direction == PoolDirection::forward)
      launcher.each(threads, PoolForward<T>{plan});
    else
      launcher.each(threads, PoolScatter<T>{plan});
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
