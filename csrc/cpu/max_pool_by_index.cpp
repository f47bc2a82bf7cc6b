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

// ---- scatter ------------------------------------------------------------------------------------

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

// Some planes of one image: element (position, plane) lies at position * step + plane * pitch.
template <class T>
struct Planes {
  T* data;
  int64_t step, pitch;

  // body(pointer, step, count) for runs of `positions` in all planes, along the shorter step.
  template <class Body>
  void runs(int64_t positions, int64_t planes, const Body& body) const {
    using One = std::integral_constant<int64_t, 1>;
    if (pitch == 1)
      for (int64_t i = 0; i < positions; ++i) body(data + i * step, One{}, planes);
    else if (step == 1)
      for (int64_t plane = 0; plane < planes; ++plane) body(data + plane * pitch, One{}, positions);
    else
      for (int64_t plane = 0; plane < planes; ++plane) body(data + plane * pitch, step, positions);
  }
};

template <class T, class Index, bool flat>
class Scatter {
 public:
  Scatter(const PoolProblem& problem) : p_(problem), s_(problem.shape) {
    const Axis &d = s_.axis[0], &h = s_.axis[1], &w = s_.axis[2];
    if (!flat)
      for (int64_t kd = 0; kd < d.kernel; ++kd)
        for (int64_t kh = 0; kh < h.kernel; ++kh)
          for (int64_t kw = 0; kw < w.kernel; ++kw)
            distance_.push_back(s_.flat_of(kd * d.dilation, kh * h.dilation, kw * w.dilation));
    if (sizeof(Index) == 1) distance_.resize(256, nowhere);  // any index is an entry

    const int64_t* const stride = p_.input.stride;
    const bool linear = stride[3] == w.in * stride[4] && stride[2] == h.in * stride[3];
    in_place_ = linear && std::is_same_v<T, Total<T>>;
    // Channels innermost: many, a run of memory. Else a few planes side by side, so that the
    // additions to one input, which wait for each other, do not make all wait.
    channels_last_ = stride[1] == 1 && s_.channels > 1 && p_.output.stride[1] == 1;
    side_ = channels_last_ ? std::min<int64_t>(s_.channels, 64) : 4;
    groups_ = (s_.channels + side_ - 1) / side_;
    // Bands of rows that stay in the second cache, and are long against the windows' reach.
    rows_ = d.in * h.in;
    const int64_t row = w.in * side_ * int64_t(sizeof(Total<T>));
    const int64_t reach = (h.kernel - 1) * h.dilation + 1;
    band_ = std::clamp<int64_t>(std::max((int64_t{1} << 18) / row, 4 * reach), 1, rows_);
    bands_ = (rows_ + band_ - 1) / band_;
  }

  void run() const {
    parallel_for(s_.batch * groups_ * bands_, 1 + 8192 / (s_.outputs() * side_ / bands_ + 1),
                 FloatEnvironment::gradual, [&](int64_t begin, int64_t end) {
                   std::vector<Total<T>> sums;
                   if (!in_place_) sums.resize(static_cast<size_t>(band_ * s_.axis[2].in * side_));
                   for (int64_t task = begin; task < end; ++task) {
                     const int64_t plane = task / bands_;
                     Band b;
                     b.n = plane / groups_, b.channel = plane % groups_ * side_;
                     b.planes = std::min(side_, s_.channels - b.channel);
                     b.begin = task % bands_ * band_;
                     b.end = std::min(b.begin + band_, rows_);
                     scatter(b, sums.data());
                   }
                 });
  }

 private:
  static constexpr int64_t nowhere = int64_t{1} << 60;

  // Rows [begin, end) of the input, those of all depths counted together, in some channels.
  struct Band {
    int64_t n, channel, planes, begin, end;
  };

  void scatter(const Band& b, Total<T>* buffer) const {
    const Axis &d = s_.axis[0], &h = s_.axis[1], &w = s_.axis[2];
    const int64_t size = (b.end - b.begin) * w.in;
    T* const input =
        static_cast<T*>(p_.input.data) + b.n * p_.input.stride[0] + b.channel * p_.input.stride[1];
    Planes<Total<T>> sums{buffer, side_, 1};
    if constexpr (std::is_same_v<T, Total<T>>)
      if (in_place_)
        sums = {input + b.begin * w.in * p_.input.stride[4], p_.input.stride[4],
                p_.input.stride[1]};
    sums.runs(size, b.planes, [](Total<T>* run, auto step, int64_t count) {
      for (int64_t i = 0; i < count; ++i) run[i * step] = Total<T>(0);
    });

    const int64_t first = b.begin / h.in, last = (b.end - 1) / h.in;  // planes of depth
    for (int64_t od = d.first_output(first); od <= d.last_output(last); ++od) {
      const int64_t begin = first == last ? h.first_output(b.begin % h.in) : 0;
      const int64_t end = first == last ? h.last_output((b.end - 1) % h.in) + 1 : h.out;
      for (int64_t oh = begin; oh < end; ++oh) add_row(b, od, oh, sums, size);
    }

    if (in_place_) {
      if constexpr (std::is_floating_point_v<T>)
        sums.runs(size, b.planes, [](T* run, auto step, int64_t count) {
          int64_t nans = 0;
          for (int64_t i = 0; i < count; ++i) nans += run[i * step] != run[i * step];
          if (nans == 0) return;
          for (int64_t i = 0; i < count; ++i) run[i * step] = canonical(run[i * step]);
        });
      return;
    }
    for (int64_t row = b.begin; row < b.end; ++row)
      for (int64_t iw = 0; iw < w.in; ++iw)
        for (int64_t plane = 0; plane < b.planes; ++plane)
          input[place(p_.input, 0, plane, row / h.in, row % h.in, iw)] = result_of<T>(
              sums.data[((row - b.begin) * w.in + iw) * sums.step + plane * sums.pitch]);
  }

  // The windows of one row of outputs.
  void add_row(const Band& b, int64_t od, int64_t oh, const Planes<Total<T>>& sums,
               int64_t size) const {
    const Axis& w = s_.axis[2];
    const T* const grad =
        static_cast<const T*>(p_.output.data) + place(p_.output, b.n, b.channel, od, oh, 0);
    const Index* const index =
        static_cast<const Index*>(p_.index.data) + place(p_.index, b.n, b.channel, od, oh, 0);
    const int64_t low = b.begin * w.in;
    const int64_t base =
        s_.flat_of(s_.axis[0].input_of(od, 0), s_.axis[1].input_of(oh, 0), w.input_of(0, 0)) - low;
    const int64_t* const distances = distance_.data();
    const uint64_t taps = distance_.size();
    const RawView &g = p_.output, &x = p_.index;
    // Steps along the row and pitches between planes: 1 as a constant where it is one.
    const auto add = [&](auto planes, auto g_step, auto g_pitch, auto x_step, auto x_pitch,
                         auto to_step, auto to_pitch) {
      for (int64_t ow = 0; ow < w.out; ++ow)
        for (int64_t plane = 0; plane < planes; ++plane) {
          const Index chosen = index[ow * x_step + plane * x_pitch];
          int64_t position;
          if constexpr (flat) {
            position =
                static_cast<int64_t>(static_cast<uint64_t>(chosen) - static_cast<uint64_t>(low));
          } else {
            if (sizeof(Index) > 1 && static_cast<uint64_t>(chosen) >= taps) continue;
            position = base + ow * w.stride + distances[chosen];
          }
          if (static_cast<uint64_t>(position) >= static_cast<uint64_t>(size)) continue;
          Total<T>& sum = sums.data[position * to_step + plane * to_pitch];
          sum = sum_of<T>(sum, grad[ow * g_step + plane * g_pitch]);
        }
    };
    using One = std::integral_constant<int64_t, 1>;
    using Four = std::integral_constant<int64_t, 4>;
    if (b.planes == 4 && g.stride[4] == 1 && x.stride[4] == 1 && sums.step == 1)
      add(Four{}, One{}, g.stride[1], One{}, x.stride[1], One{}, sums.pitch);
    else if (g.stride[1] == 1 && x.stride[1] == 1 && sums.pitch == 1)
      add(b.planes, g.stride[4], One{}, x.stride[4], One{}, sums.step, One{});
    else
      add(b.planes, g.stride[4], g.stride[1], x.stride[4], x.stride[1], sums.step, sums.pitch);
  }

  const PoolProblem& p_;
  const PoolShape& s_;
  std::vector<int64_t> distance_;  // flat, by the offset of a tap
  bool in_place_, channels_last_;
  int64_t side_, groups_, rows_, band_, bands_;
};

// ---- gather -------------------------------------------------------------------------------------

template <class T, class Index>
void gather(const PoolProblem& p) {
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
                     if (p.kind == IndexKind::offset)
                       flat = stored != static_cast<Index>(-1) && flat < s.taps()
                                  ? s.flat_of_offset(flat, od, oh, ow)
                                  : -1;
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
  constexpr int64_t limit = int64_t{1} << 40;
  if (p.ties > Ties::last || p.shape.taps() < 1 || p.shape.taps() > limit) return false;
  with_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_index_type(p.index_type, [&](auto index) {
      using Index = decltype(index);
      if (p.direction == PoolDirection::scatter)
        p.kind == IndexKind::flat ? Scatter<T, Index, true>(p).run()
                                  : Scatter<T, Index, false>(p).run();
      else
        gather<T, Index>(p);
    });
  });
  return true;
}

}  // namespace torch_naiveconv
