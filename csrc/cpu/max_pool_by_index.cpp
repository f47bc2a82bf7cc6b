// What row "generic" does one output at a time: the gradient of long windows, and the gather.
// Every window looks up the one input that it chose. Planes (several channels of one image) go side
// by side, so that the additions to one input, which wait for each other, do not make all wait.
#include <algorithm>
#include <memory>
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

// Planes side by side, or pixels, are many short streams, which the processor's own prefetching
// does not follow: what comes soon is asked for ahead. (Not inlined, it would be a function without
// effects.)
template <class E>
[[gnu::always_inline]] inline void prefetch(const E* from, int64_t count) {
  constexpr int64_t line = 64 / int64_t(sizeof(E));
  for (int64_t i = 0; i < count; i += line) __builtin_prefetch(from + i);
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

constexpr int64_t abreast = 8;  // planes side by side

// What lies next to each other in so many planes, loaded at once where that can be: single loads
// are what limits the core here.
struct Bytes {
  uint64_t all;
  uint8_t operator[](int64_t plane) const { return static_cast<uint8_t>(all >> 8 * plane); }
};
template <class E>
inline auto together(const E* from) {
  if constexpr (std::is_same_v<E, float>) {
    typedef float Together __attribute__((vector_size(abreast * sizeof(float))));
    Together all;
    __builtin_memcpy(&all, from, sizeof(all));
    // Or the compiler would load them singly. A sum that began at +0 is not changed by it.
    return all + Together{};
  } else if constexpr (std::is_same_v<E, uint8_t>) {
    uint64_t all = 0;
    for (int64_t plane = 0; plane < abreast; ++plane) all |= uint64_t{from[plane]} << 8 * plane;
    return Bytes{all};
  } else {
    return from;
  }
}

// Sums are kept in a buffer of rows with their padding, so that every tap of every window has a
// place of its own: no test is needed at the borders, and what falls into the padding is dropped.
// The buffer travels through the plane with the windows and stays in the first cache.
template <class T, class Index, bool flat>
class Scatter {
 public:
  explicit Scatter(const PoolProblem& problem) : p_(problem), s_(problem.shape) {
    const Axis &d = s_.axis[0], &h = s_.axis[1], &w = s_.axis[2];
    images_ = s_.batch, planes_ = s_.channels;
    const auto one_list = [&](const RawView& v) { return v.stride[0] == planes_ * v.stride[1]; };
    channels_last_ = p_.input.stride[1] == 1 && p_.output.stride[1] == 1 &&
                     p_.index.stride[1] == 1 && planes_ > 1 && p_.input.stride[4] != 1;
    if (!channels_last_ && one_list(p_.input) && one_list(p_.output) && one_list(p_.index))
      planes_ *= images_, images_ = 1;
    side_ = channels_last_ ? std::min<int64_t>(planes_, 64) : abreast;
    groups_ = (planes_ + side_ - 1) / side_;

    // A padded row holds its planes one after another, or those of every position together. What
    // is behind its inputs is the padding before the next row's, too.
    const int64_t behind = padded_size(w) - w.pad - w.in;
    width_ = w.in + std::max(w.pad, behind), height_ = padded_size(h);
    rows_ = padded_size(d) * height_;
    step_ = channels_last_ ? side_ : 1, pitch_ = channels_last_ ? 1 : width_;
    row_ = width_ * side_, margin_ = (padded_size(w) - width_) * step_;
    span_ = (d.extent(1) - 1) * height_ + h.extent(1);
    room_ = (span_ - 1) * row_ + (w.extent(1) - 1) * step_ + 1;
    // Windows between two bands are visited twice: bands only where threads would have no plane.
    const int64_t tasks = images_ * groups_, threads = thread_count();
    band_ = threads == 1 || tasks >= 2 * threads ? rows_ : rows_ * tasks / (2 * threads);
    band_ = std::min(std::max(band_, 4 * span_), rows_);
    bands_ = (rows_ + band_ - 1) / band_;
    // Better a whole plane in the second cache than rows that are moved down in the first.
    const int64_t budget = (channels_last_ ? 262144 : 24576) / int64_t(sizeof(Total<T>));
    held_ = std::min(std::max(budget / row_, 2 * span_), bands_ == 1 ? rows_ : band_ + span_);
    clears_rows_ = channels_last_ && bands_ == 1 && held_ == rows_;
    list_entries();
  }

  // Is the padding small enough for a buffer?
  static bool fits(const PoolShape& s) {
    constexpr int64_t limit = int64_t{1} << 24;
    int64_t size = 1;
    for (const Axis& a : s.axis) {
      if (a.kernel > limit || a.stride > limit || a.dilation > limit || a.pad > limit) return false;
      const int64_t axis = padded_size(a);
      if (axis > 4 * a.in + 4096 || axis >= (int64_t{1} << 40) / size) return false;
      size *= axis;
    }
    return true;
  }

  void run() const {
    parallel_for(images_ * groups_ * bands_, 1 + 8192 / (s_.outputs() * side_ / bands_ + 1),
                 FloatEnvironment::gradual, [&](int64_t begin, int64_t end) {
                   const int64_t size = held_ * row_ + margin_;
                   const std::unique_ptr<Total<T>[]> buffer(new Total<T>[size]);
                   // The rows in front of the margin are cleared by each task, or when written.
                   const int64_t first = clears_rows_ ? 0 : size - margin_;
                   std::fill(buffer.get() + first, buffer.get() + size, Total<T>(0));
                   for (int64_t task = begin; task < end; ++task) {
                     const int64_t group = task / bands_;
                     Band b;
                     b.n = group / groups_, b.plane = group % groups_ * side_;
                     b.planes = std::min(side_, planes_ - b.plane);
                     b.begin = task % bands_ * band_;
                     b.end = std::min(b.begin + band_, rows_);
                     scatter(b, buffer.get());
                   }
                 });
  }

 private:
  // An offset of a byte needs no test: all 256 are listed.
  static constexpr bool byte = sizeof(Index) == 1 && !flat;

  // Padded rows [begin, end), those of all depths counted together, in some planes.
  struct Band {
    int64_t n, plane, planes, begin, end;
  };

  // Inputs with their padding, as far as windows go.
  static int64_t padded_size(const Axis& a) { return std::max(a.pad + a.in, a.extent(a.out)); }
  int64_t padded(int64_t d, int64_t h, int64_t w) const {
    return (d * height_ + h) * row_ + w * step_;
  }

  // Where an index points to: from the window's first tap, or from the first of the plane. With
  // offsets of a byte in NCHW, a list for every plane side by side.
  void list_entries() {
    const Axis &d = s_.axis[0], &h = s_.axis[1], &w = s_.axis[2];
    const int64_t lists = byte && !channels_last_ ? abreast : 1;
    entries_.assign(byte ? lists * 256 : flat ? s_.inputs() : s_.taps(), nowhere);
    int64_t* entry = entries_.data();
    if (flat) {
      for (int64_t id = 0; id < d.in; ++id)
        for (int64_t ih = 0; ih < h.in; ++ih)
          for (int64_t iw = 0; iw < w.in; ++iw)
            *entry++ = padded(id + d.pad, ih + h.pad, iw + w.pad);
      return;
    }
    for (int64_t kd = 0; kd < d.kernel; ++kd)
      for (int64_t kh = 0; kh < h.kernel; ++kh)
        for (int64_t kw = 0; kw < w.kernel; ++kw, ++entry)
          for (int64_t plane = 0; plane < lists; ++plane)
            entry[plane * 256] =
                padded(kd * d.dilation, kh * h.dilation, kw * w.dilation) + plane * pitch_;
  }

  void scatter(const Band& b, Total<T>* buffer) const {
    const Axis &d = s_.axis[0], &h = s_.axis[1];
    int64_t low = b.begin;  // the padded row that the buffer begins with
    const auto advance = [&](int64_t rows) {
      write_rows(b, low, low + rows, buffer);
      std::copy(buffer + rows * row_, buffer + held_ * row_, buffer);
      std::fill_n(buffer + (held_ - rows) * row_, rows * row_, Total<T>(0));
      low += rows;
    };
    bool empty = true;
    for (int64_t od = 0; od < d.out; ++od)
      for (int64_t oh = 0; oh < h.out; ++oh) {
        const int64_t first = od * d.stride * height_ + oh * h.stride;
        if (first + span_ <= b.begin) continue;
        if (first >= b.end) break;
        if (empty) {
          low = std::min(low, first);
          if (!clears_rows_) std::fill_n(buffer, held_ * row_, Total<T>(0));
          empty = false;
        }
        while (first + span_ > low + held_) advance(std::min(first - low, held_));
        add_row(b, od, oh, buffer + (first - low) * row_, first * row_);
      }
    if (empty && !clears_rows_) std::fill_n(buffer, held_ * row_, Total<T>(0));
    while (low < b.end) {
      write_rows(b, low, low + held_, buffer);
      low += held_;
      if (low < b.end) std::fill_n(buffer, held_ * row_, Total<T>(0));
    }
  }

  // Padded rows [begin, end) of the buffer, as far as they are inputs of the band.
  void write_rows(const Band& b, int64_t begin, int64_t end, Total<T>* from) const {
    const Axis &d = s_.axis[0], &h = s_.axis[1];
    const int64_t low = begin;
    begin = std::max(begin, b.begin), end = std::min(end, b.end);
    for (int64_t id = std::max<int64_t>(begin / height_ - d.pad, 0); id < d.in; ++id) {
      const int64_t top = (id + d.pad) * height_ + h.pad;
      const int64_t first = std::max(begin, top), last = std::min(end, top + h.in);
      if (top >= end) return;
      if (first < last) write_inputs(b, id, first - top, last - top, from + (first - low) * row_);
    }
  }

  // Rows [begin, end) of inputs, in NCHW plane after plane: one stream of stores at a time.
  void write_inputs(const Band& b, int64_t id, int64_t begin, int64_t end, Total<T>* from) const {
    const Axis& w = s_.axis[2];
    const RawView& view = p_.input;
    const int64_t pixel = view.stride[4];
    const auto write = [](T* __restrict to, const Total<T>* __restrict sums, int64_t count) {
      for (int64_t i = 0; i < count; ++i) to[i] = result_of<T>(sums[i]);
    };
    for (int64_t plane = 0; plane < (channels_last_ ? 1 : b.planes); ++plane) {
      T* to = static_cast<T*>(view.data) + place(view, b.n, b.plane + plane, id, begin, 0);
      Total<T>* sums = from + w.pad * step_ + plane * pitch_;
      for (int64_t ih = begin; ih < end; ++ih, to += view.stride[3], sums += row_) {
        if (channels_last_ ? b.planes == step_ && pixel == step_ : pixel == 1)
          write(to, sums, w.in * step_);
        else if (channels_last_)
          for (int64_t i = 0; i < w.in; ++i) write(to + i * pixel, sums + i * step_, b.planes);
        else
          for (int64_t i = 0; i < w.in; ++i) to[i * pixel] = result_of<T>(sums[i]);
        if (clears_rows_) std::fill_n(sums, w.in * step_, Total<T>(0));
      }
    }
  }

  // The windows of one row of outputs; `to` is the place of the first tap of the first of them,
  // `first` the same in the plane.
  void add_row(const Band& b, int64_t od, int64_t oh, Total<T>* to, int64_t first) const {
    const RawView &g = p_.output, &x = p_.index;
    const Axis& w = s_.axis[2];
    const T* const grad = static_cast<const T*>(g.data) + place(g, b.n, b.plane, od, oh, 0);
    const Index* const index =
        static_cast<const Index*>(x.data) + place(x, b.n, b.plane, od, oh, 0);
    const Lookup lookup{entries_.data(), entries_.size(), static_cast<uint64_t>(room_)};
    if (byte && !channels_last_ && b.planes == abreast && g.stride[4] == 1 && x.stride[4] == 1 &&
        g.stride[1] == x.stride[1])
      return add_abreast(lookup, grad, index, to, g.stride[1]);
    if (!channels_last_) return add_planes(lookup, b.planes, grad, index, to, first);
    for (int64_t ow = 0; ow < w.out; ++ow) {
      const T* const grads = grad + ow * g.stride[4];
      const Index* const indices = index + ow * x.stride[4];
      prefetch(grads + pixels_ahead * g.stride[4], b.planes);
      prefetch(indices + pixels_ahead * x.stride[4], b.planes);
      const int64_t step = ow * w.stride * step_;
      add_pixel(lookup, b.planes, grads, indices, to + step, first + step);
    }
  }

  // Adds to the sum that a window chose; `to` and `first` as above, for this window.
  struct Lookup {
    const int64_t* entries;
    uint64_t size, room;

    void add(T grad, Index index, Total<T>* to, int64_t first) const {
      const uint64_t entry = static_cast<uint64_t>(index);
      if (!byte && entry >= size) return;
      const int64_t behind = entries[entry] - (flat ? first : 0);
      if (flat ? static_cast<uint64_t>(behind) >= room : behind < 0) return;
      to[behind] = sum_of<T>(to[behind], grad);
    }
  };

  // A window in planes whose sums lie next to each other.
  void add_pixel(const Lookup& lookup, int64_t planes, const T* grad, const Index* index,
                 Total<T>* to, int64_t first) const {
    for (; planes >= abreast; planes -= abreast, grad += abreast, index += abreast, to += abreast) {
      const auto grads = together(grad);
      const auto choices = together(index);
#pragma GCC unroll 8
      for (int plane = 0; plane < abreast; ++plane)
        lookup.add(grads[plane], choices[plane], to + plane, first);
    }
    for (int64_t plane = 0; plane < planes; ++plane)
      lookup.add(grad[plane], index[plane], to + plane, first);
  }

  // A row of windows, planes side by side.
  void add_planes(const Lookup lookup, int64_t planes, const T* grad, const Index* index,
                  Total<T>* to, int64_t first) const {
    const int64_t windows = s_.axis[2].out, step = s_.axis[2].stride, pitch = pitch_;
    const int64_t g_step = p_.output.stride[4], g_pitch = p_.output.stride[1];
    const int64_t x_step = p_.index.stride[4], x_pitch = p_.index.stride[1];
    for (int64_t ow = 0; ow < windows; ++ow) {
#pragma GCC unroll 8
      for (int64_t plane = 0; plane < planes; ++plane)
        lookup.add(grad[plane * g_pitch], index[plane * x_pitch], to + plane * pitch, first);
      grad += g_step, index += x_step, to += step, first += step;
    }
  }

  // A row of windows with offsets of a byte, planes side by side. The compiler is not to see that
  // one distance is thrice the other: it would keep every multiple, and run out of registers.
  void add_abreast(const Lookup& lookup, const T* grad, const Index* index, Total<T>* to,
                   int64_t pitch) const {
    static_assert(abreast == 8, "as many are added below");
    const int64_t windows = s_.axis[2].out, step = s_.axis[2].stride;
    for (int64_t plane = abreast; plane < 2 * abreast; ++plane) {
      prefetch(grad + plane * pitch, windows);
      prefetch(index + plane * pitch, windows);
    }
    const T* grads = grad + 4 * pitch;
    const Index* indices = index + 4 * pitch;
    const int64_t thrice = 3 * pitch;
    for (int64_t ow = 0; ow < windows; ++ow, ++grad, ++index, ++grads, ++indices, to += step) {
      int64_t one = pitch, three = thrice;
      __asm__("" : "+r"(one), "+r"(three));
      const auto add = [&](int64_t list, const T* g, const Index* x) {
        Lookup{lookup.entries + list * 256, 256, lookup.room}.add(*g, *x, to, 0);
      };
      add(0, grad, index), add(1, grad + one, index + one);
      add(2, grad + 2 * one, index + 2 * one), add(3, grad + three, index + three);
      add(4, grads, indices), add(5, grads + one, indices + one);
      add(6, grads + 2 * one, indices + 2 * one), add(7, grads + three, indices + three);
    }
  }

  static constexpr int64_t nowhere = -1;
  static constexpr int64_t pixels_ahead = 4;

  const PoolProblem& p_;
  const PoolShape& s_;
  std::vector<int64_t> entries_;
  bool channels_last_;
  bool clears_rows_;  // when they are written and in the first cache, which a whole plane is not
  int64_t images_, planes_, side_, groups_;
  int64_t width_, height_, rows_, step_, pitch_, row_, margin_;  // of the padded plane
  int64_t span_, room_;          // rows, and places, that a row of windows and a window may add to
  int64_t held_, band_, bands_;  // rows of a buffer and of a task
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
  const bool linear =
      in_stride[3] == w.in * in_stride[4] && (d.in == 1 || in_stride[2] == h.in * in_stride[3]);
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
  bool done = true;
  with_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_index_type(p.index_type, [&](auto index) {
      using Index = decltype(index);
      const auto scatter = [&](auto flat) {
        using Map = Scatter<T, Index, decltype(flat)::value>;
        done = Map::fits(p.shape);
        if (done) Map(p).run();
      };
      if (p.direction == PoolDirection::gather)
        gather<T, Index>(p);
      else if (p.kind == IndexKind::flat)
        scatter(std::true_type{});
      else
        scatter(std::false_type{});
    });
  });
  return done;
}

}  // namespace torch_naiveconv
