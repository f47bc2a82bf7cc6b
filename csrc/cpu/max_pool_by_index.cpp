// What row "generic" does one output at a time: the gradient of long windows, and the gather.
// Every window looks up the one input that it chose. Planes (several channels of one image) go side
// by side, so that the additions to one input, which wait for each other, do not make all wait.
#include <algorithm>
#include <vector>

#include "max_pool.h"
#include "parallel.h"

namespace torch_naiveconv {
namespace {

template <class Visit>
void with_index_type(IndexType type, Visit visit) {
  switch (type) {
    case IndexType::uint8: return visit(uint8_t{});
    case IndexType::int16: return visit(int16_t{});
    case IndexType::int32: return visit(int32_t{});
    case IndexType::int64: return visit(int64_t{});
  }
}

int64_t place(const RawView& v, int64_t n, int64_t c, int64_t d, int64_t h, int64_t w) {
  return n * v.stride[0] + c * v.stride[1] + d * v.stride[2] + h * v.stride[3] + w * v.stride[4];
}

// A tap's distance from the first one of its window.
struct Distance {
  int64_t d, h, w, flat;
};

// From the index of a window to the tap it names.
class Taps {
 public:
  Taps(const PoolShape& s, IndexKind kind) : flat_(kind == IndexKind::flat) {
    const Axis &d = s.axis[0], &h = s.axis[1], &w = s.axis[2];
    for (int64_t kd = 0; kd < d.kernel; ++kd)
      for (int64_t kh = 0; kh < h.kernel; ++kh)
        for (int64_t kw = 0; kw < w.kernel; ++kw) {
          const int64_t id = kd * d.dilation, ih = kh * h.dilation, iw = kw * w.dilation;
          distances_.push_back({id, ih, iw, s.flat_of(id, ih, iw)});
        }
    if (!flat_) return;
    number_.assign(static_cast<size_t>(distances_.back().flat) + 1, -1);
    for (size_t k = 0; k < distances_.size(); ++k) {
      int32_t& number = number_[static_cast<size_t>(distances_[k].flat)];
      ambiguous_ = ambiguous_ || number >= 0;
      number = static_cast<int32_t>(k);
    }
  }

  // Two taps of one window at the same flat distance: a window wider than the input.
  bool ambiguous() const { return ambiguous_; }

  // `base`: the flat position of the window's first tap. Null: the index names no tap.
  const Distance* find(int64_t index, int64_t base) const {
    if (flat_) {
      const uint64_t relative = static_cast<uint64_t>(index) - static_cast<uint64_t>(base);
      if (relative >= number_.size()) return nullptr;
      index = number_[relative];
    }
    return static_cast<uint64_t>(index) < distances_.size() ? &distances_[index] : nullptr;
  }

 private:
  std::vector<Distance> distances_;
  std::vector<int32_t> number_;
  bool flat_, ambiguous_ = false;
};

// ---- scatter ------------------------------------------------------------------------------------

// Rows [begin, end) of the input, rows of all its planes of depth counted together, in the channels
// from `channel` on.
struct Band {
  int64_t n, channel, begin, end;
};

template <class T>
Total<T> sum_of(Total<T> sum, T x) {
  if constexpr (is_half_type<T>) {
    return sum + widen(x);
  } else if constexpr (std::is_floating_point_v<T>) {
    return sum + x;
  } else {
    return static_cast<T>(static_cast<uint64_t>(sum) + static_cast<uint64_t>(x));
  }
}
template <class T>
T result_of(Total<T> sum) {
  if constexpr (is_half_type<T>) {
    return narrow<T>(sum);
  } else {
    return canonical(sum);
  }
}

template <int planes, class T, class Index>
void scatter_band(const PoolProblem& p, const Taps& taps, const Band& band, Total<T>* sums) {
  const PoolShape& s = p.shape;
  const Axis &d = s.axis[0], &h = s.axis[1], &w = s.axis[2];
  const auto* grad = static_cast<const T*>(p.output.data);
  const auto* index = static_cast<const Index*>(p.index.data);
  const int64_t grad_plane = p.output.stride[1], index_plane = p.index.stride[1];
  const int64_t low = band.begin * w.in, size = (band.end - band.begin) * w.in;
  std::fill_n(sums, size * planes, Total<T>(0));

  const int64_t od_end = d.last_output((band.end - 1) / h.in) + 1;
  for (int64_t od = d.first_output(band.begin / h.in); od < od_end; ++od) {
    const bool one_plane = band.begin / h.in == (band.end - 1) / h.in;
    const int64_t oh_end = one_plane ? h.last_output((band.end - 1) % h.in) + 1 : h.out;
    for (int64_t oh = one_plane ? h.first_output(band.begin % h.in) : 0; oh < oh_end; ++oh) {
      const int64_t id = d.input_of(od, 0), ih = h.input_of(oh, 0);
      const T* const grad_row = grad + place(p.output, band.n, band.channel, od, oh, 0);
      const Index* const index_row = index + place(p.index, band.n, band.channel, od, oh, 0);
      for (int64_t ow = 0; ow < w.out; ++ow) {
        const int64_t iw = w.input_of(ow, 0), base = s.flat_of(id, ih, iw);
        for (int plane = 0; plane < planes; ++plane) {
          const int64_t stored =
              static_cast<int64_t>(index_row[ow * p.index.stride[4] + plane * index_plane]);
          const Distance* const tap = taps.find(stored, base);
          if (!tap || !d.holds_input(id + tap->d) || !h.holds_input(ih + tap->h) ||
              !w.holds_input(iw + tap->w))
            continue;
          const int64_t position = base + tap->flat - low;
          if (position < 0 || position >= size) continue;
          Total<T>& sum = sums[position * planes + plane];
          sum = sum_of<T>(sum, grad_row[ow * p.output.stride[4] + plane * grad_plane]);
        }
      }
    }
  }

  T* const input = static_cast<T*>(p.input.data);
  for (int64_t row = band.begin; row < band.end; ++row, sums += w.in * planes)
    for (int plane = 0; plane < planes; ++plane) {
      T* const to = input + place(p.input, band.n, band.channel + plane, row / h.in, row % h.in, 0);
      const int64_t step = p.input.stride[4];
      for (int64_t iw = 0; iw < w.in; ++iw) to[iw * step] = result_of<T>(sums[iw * planes + plane]);
    }
}

template <class T, class Index>
void scatter(const PoolProblem& p, const Taps& taps) {
  const PoolShape& s = p.shape;
  const Axis& h = s.axis[1];
  constexpr int side = 8;  // planes that go side by side
  const int64_t rows = s.axis[0].in * h.in, groups = (s.channels + side - 1) / side;
  // Bands that stay in the second cache, and are long against the windows that reach into them.
  const int64_t reach = (h.kernel - 1) * h.dilation + 1;
  const int64_t band =
      std::clamp<int64_t>(std::max(int64_t{1} << 18, reach * 4 * s.axis[2].in * side) /
                              (s.axis[2].in * side * int64_t(sizeof(Total<T>))),
                          1, rows);
  const int64_t bands = (rows + band - 1) / band;
  parallel_for(s.batch * groups * bands, 1 + 8192 / (s.outputs() * side / bands + 1),
               FloatEnvironment::gradual, [&](int64_t begin, int64_t end) {
                 std::vector<Total<T>> sums(band * s.axis[2].in * side);
                 for (int64_t task = begin; task < end; ++task) {
                   const int64_t plane = task / bands;
                   Band b{plane / groups, plane % groups * side, task % bands * band, 0};
                   b.end = std::min(b.begin + band, rows);
                   if (b.channel + side <= s.channels)
                     scatter_band<side, T, Index>(p, taps, b, sums.data());
                   else
                     for (; b.channel < s.channels; ++b.channel)
                       scatter_band<1, T, Index>(p, taps, b, sums.data());
                 }
               });
}

// ---- gather -------------------------------------------------------------------------------------

template <class T, class Index>
void gather(const PoolProblem& p, const Taps& taps) {
  const PoolShape& s = p.shape;
  const Axis &d = s.axis[0], &h = s.axis[1], &w = s.axis[2];
  const auto* input = static_cast<const T*>(p.input.data);
  const auto* index = static_cast<const Index*>(p.index.data);
  auto* output = static_cast<T*>(p.output.data);
  const int64_t size = s.inputs();
  const int64_t* const in_stride = p.input.stride;
  const bool linear = in_stride[3] == w.in * in_stride[4] && in_stride[2] == h.in * in_stride[3];
  parallel_for(s.batch * s.channels * d.out * h.out, 1 + 8192 / (w.out + 1),
               FloatEnvironment::gradual, [&](int64_t begin, int64_t end) {
                 for (int64_t row = begin; row < end; ++row) {
                   // Rows of neighbouring channels one after another: they share cache lines when
                   // channels are innermost, and it does no harm when they are not.
                   const Position o = Position::of(row, d.out, h.out, 1, s.channels);
                   const int64_t n = o.n, od = o.c, oh = o.d, c = o.w;
                   const T* const plane = input + n * in_stride[0] + c * in_stride[1];
                   for (int64_t ow = 0; ow < w.out; ++ow) {
                     const Index stored = index[place(p.index, n, c, od, oh, ow)];
                     int64_t flat = static_cast<int64_t>(stored);
                     if (p.kind == IndexKind::offset) {
                       const Distance* const tap = taps.find(flat, 0);
                       const int64_t base =
                           s.flat_of(d.input_of(od, 0), h.input_of(oh, 0), w.input_of(ow, 0));
                       flat = tap && stored != static_cast<Index>(-1) ? base + tap->flat : -1;
                     }
                     T value = zero<T>();
                     if (flat >= 0 && flat < size) {
                       if (linear) {
                         value = plane[flat * in_stride[4]];
                       } else {
                         const Position i = Position::of(flat, 1, d.in, h.in, w.in);
                         value =
                             plane[i.d * in_stride[2] + i.h * in_stride[3] + i.w * in_stride[4]];
                       }
                     }
                     output[place(p.output, n, c, od, oh, ow)] = value;
                   }
                 }
               });
}

}  // namespace

bool run_pool_by_index(const PoolProblem& p) {
  constexpr int64_t limit = int64_t{1} << 20;
  const PoolShape& s = p.shape;
  if (p.ties > Ties::last || s.taps() > limit || s.taps() < 1) return false;
  if (p.kind == IndexKind::flat && p.direction == PoolDirection::scatter &&
      s.flat_of((s.axis[0].kernel - 1) * s.axis[0].dilation,
                (s.axis[1].kernel - 1) * s.axis[1].dilation,
                (s.axis[2].kernel - 1) * s.axis[2].dilation) > limit)
    return false;
  const Taps taps(s, p.direction == PoolDirection::scatter ? p.kind : IndexKind::offset);
  if (taps.ambiguous()) return false;
  with_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_index_type(p.index_type, [&](auto zero_index) {
      using Index = decltype(zero_index);
      p.direction == PoolDirection::scatter ? scatter<T, Index>(p, taps)
                                            : gather<T, Index>(p, taps);
    });
  });
  return true;
}

}  // namespace torch_naiveconv
