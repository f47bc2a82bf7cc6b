// Forward and grad_input of few written channels with a 3x3 kernel of stride 1 that keeps the size:
// the gradient of an image, or a layer that makes one. Lanes are pixels of a row. Start reading at
// SlidingProduct::run_task.
//
// Plane after plane of the image adds its terms to the chains of a band of rows, which stay in the
// first cache. So each plane is read in place and in long runs, and a vector of it is loaded once
// for all the rows that read it; its neighbours' pixels are joined to it in registers, or zeros
// beyond the border.
#pragma once

#include <cstring>

#include "conv_grids.h"

namespace torch_naiveconv::TNC_ISA {

constexpr int sliding_kernel = 3, sliding_taps = sliding_kernel * sliding_kernel;
// At most: of 16-bit types, with two chains, more would leave one vector in a tile.
constexpr int sliding_lanes(int chains) { return chains == 1 ? 3 : 1; }
// Of a tile: its chains leave registers for a row that is read.
constexpr int sliding_rows(int64_t lanes) { return lanes == 3 ? 3 : 4; }
constexpr int sliding_vecs(int64_t lanes, int chains) { return (lanes == 1 ? 4 : 2) / chains; }

template <class S>
constexpr bool can_slide = joins_windows<Vec<typename Kind<S>::T>>;

// A band, and the rows that it reads, both in the order in which the taps come to them.
template <class S, class T>
struct SlidingBand {
  const S* source[6];
  T* chain[2];                     // of the even taps, and of the odd ones if there are two
  int64_t chain_step, chain_lane;  // from row to row, from lane to lane
  int64_t width;
  const T* weight;  // tap after tap, the lanes of each
  int64_t ahead;    // from a source to what is fetched meanwhile
};

// chain[row][pixel] = fma(source[row + tap][pixel + tap], weight[tap], chain[row][pixel]) for all
// taps in order, which is from right to left if Step is -1. Edge: the image ends before or behind
// the columns that are read.
template <class S, int Step, int Lanes, int Vecs, bool Edge, class T>
TNC_INLINE void slide_columns(const SlidingBand<S, T>& band, int64_t column) {
  using V = Vec<T>;
  constexpr int L = V::lanes, K = sliding_kernel, rows = sliding_rows(Lanes);
  constexpr int chains = Kind<S>::chains;
  V chain[rows][Lanes][Vecs][chains];
  const auto each = [&](const auto& use) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
      for (int l = 0; l < Lanes; ++l)
#pragma GCC unroll 4
        for (int c = 0; c < Vecs; ++c)
#pragma GCC unroll 2
          for (int q = 0; q < chains; ++q)
            use(chain[i][l][c][q],
                band.chain[q] + i * band.chain_step + l * band.chain_lane + column + c * L);
  };
  each([](V& sum, const T* from) __attribute__((always_inline)) { sum = V::load(from); });
#pragma GCC unroll 8
  for (int u = 0; u < rows + K - 1; ++u) {
    const S* const from = band.source[u] + column;
    V whole[Vecs + 2];
#pragma GCC unroll 8
    for (int c = -1; c <= Vecs; ++c) {
      if constexpr (Edge) {
        const int64_t some = c < 0 ? column : most(band.width - column - c * L, 0);
        whole[c + 1] = V::load(from + c * L, static_cast<int>(least(some, L)));
      } else {
        whole[c + 1] = V::load(from + c * L);
      }
    }
    if (Step < 0 ? u < rows : u >= K - 1)  // the rows below
      prefetch_row<Vecs, V>(from + band.ahead);
    with_constants<K>([&](auto kw) __attribute__((always_inline)) {
      constexpr int shift = Step < 0 ? K - 1 - kw.value : kw.value;
      V x[Vecs];
#pragma GCC unroll 4
      for (int c = 0; c < Vecs; ++c) {
        if constexpr (shift == 0)
          x[c] = V::template window<L - 1>(whole[c], whole[c + 1]);
        else
          x[c] = V::template window<shift - 1>(whole[c + 1], whole[c + 2]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < rows; ++i) {
        const int kh = u - i, number = kh * K + kw.value;
        if (kh < 0 || kh >= K) continue;
#pragma GCC unroll 4
        for (int l = 0; l < Lanes; ++l) {
          const V tap = V::broadcast(band.weight[number * Lanes + l]);
#pragma GCC unroll 4
          for (int c = 0; c < Vecs; ++c) {
            V& sum = chain[i][l][c][number % chains];
            sum = fma(x[c], tap, sum);
          }
        }
      }
    });
  }
  each([](const V& sum, T* to) __attribute__((always_inline)) { sum.store(to); });
}

template <class S, int Step, int Lanes, int Vecs, class T>
TNC_INLINE void slide_band(const SlidingBand<S, T>& band, int64_t column, int64_t vectors) {
  constexpr int L = Vec<T>::lanes;
  for (; vectors >= Vecs; vectors -= Vecs, column += Vecs * L) {
    if (column == 0 || column + (Vecs + 1) * L > band.width)
      slide_columns<S, Step, Lanes, Vecs, true>(band, column);
    else
      slide_columns<S, Step, Lanes, Vecs, false>(band, column);
  }
  if constexpr (Vecs > 1) slide_band<S, Step, Lanes, Vecs / 2>(band, column, vectors);
}

// One call: its plan, which the threads share, and what a task does. A task is a band of a slice,
// all lanes.
template <class S>
class SlidingProduct {
  using K = Kind<S>;
  using T = typename K::T;
  using V = Vec<T>;
  static constexpr int L = V::lanes;

 public:
  SlidingProduct(const Images<S>& call, const GridAxis (&grid)[3])
      : call_(call),
        grid_(grid),
        width_(grid[2].count),
        planes_(call.image_channels * grid[0].taps),
        columns_(up(width_, L) * L),
        slices_(call.batch * call.groups * grid[0].count),
        rows_(sliding_rows(call.lanes)),
        bands_(up(grid[1].count, rows_)) {}

  bool takes() const {
    for (int a = 0; a < 3; ++a) {
      const GridAxis& axis = grid_[a];
      if (axis.taps != call_.kernel[a] || axis.step != 1 || axis.image_step != 1) return false;
    }
    const GridAxis &h = grid_[1], &w = grid_[2];
    return h.taps == sliding_kernel && w.taps == sliding_kernel && std::llabs(w.shift_step) == 1 &&
           h.shift_step == w.shift_step && w.least_shift() == -1 && w.count == w.image_size &&
           call_.lanes <= sliding_lanes(K::chains) && call_.image_stride[4] == 1 &&
           call_.target_stride[4] == 1 && has_vectors_of_pixels(call_, grid_) &&
           (1 + K::chains) * sums() * int64_t{sizeof(T)} <= total_bytes;
  }

  // Says whether an infinity or a NaN was written.
  bool run() {
    pack_weights();
    return run_tasks<K>(
        slices_ * bands_,
        slices_ * grid_[1].count * columns_ * call_.lanes * planes_ * sliding_taps,
        [&] { return workspace(); }, [&](int64_t task, Workspace& w) { run_task(task, w); });
  }

 private:
  struct Workspace {
    T* chain[2];
    T* total;
    bool special = false;
  };
  struct Place {  // of a task
    int64_t group, slice, row, rows;
    const S* image;
    S* target;
  };
  int64_t sums() const { return call_.lanes * rows_ * columns_; }  // of a band

  // Plane after plane, tap after tap, the lanes of each.
  void pack_weights() {
    const int64_t* const stride = call_.weight_stride;
    const int64_t weights = call_.groups * planes_ * sliding_taps * call_.lanes;
    Arena& plan = plan_arena();
    plan.reset(Arena::bytes_for<T>(weights) + Arena::bytes_for<S>(columns_));
    weight_ = plan.take<T>(weights);
    zeros_ = plan.take<S>(columns_);
    std::memset(zeros_, 0, columns_ * sizeof(S));
    T* to = weight_;
    for (int64_t g = 0; g < call_.groups; ++g)
      for (int64_t c = 0; c < call_.image_channels; ++c)
        for (int64_t d = 0; d < call_.kernel[0]; ++d)
          for (int64_t h = 0; h < sliding_kernel; ++h)
            for (int64_t w = 0; w < sliding_kernel; ++w)
              for (int64_t l = 0; l < call_.lanes; ++l)
                *to++ = widened(call_.weight[g * call_.group_stride + c * call_.channel_stride +
                                             l * call_.lane_stride + d * stride[2] + h * stride[3] +
                                             w * stride[4]]);
  }

  Workspace workspace() const {
    Arena& arena = task_arena();
    arena.reset((1 + K::chains) * Arena::bytes_for<T>(sums()));
    Workspace w;
    for (int q = 0; q < K::chains; ++q) w.chain[q] = arena.take<T>(sums());
    w.total = arena.take<T>(sums());
    return w;
  }

  void run_task(int64_t task, Workspace& w) const {
    const Place place = place_of(task);
    for (int q = 0; q < K::chains; ++q) zero_run(w.chain[q], sums());
    zero_run(w.total, sums());
    for (int64_t plane = 0; plane < planes_; ++plane) {
      const int64_t first = plane * sliding_taps, last = first + sliding_taps;
      for (int64_t t = first, end; t < last; t = end) {
        end = least(last, (t / K::group + 1) * K::group);
        multiply_taps(place, w, plane, t - first, end - first);
        if (end % K::group == 0 || end == planes_ * sliding_taps) close_group(w);
      }
    }
    store(place, w);
  }

  Place place_of(int64_t task) const {
    const int64_t band = task % bands_, slice = task / bands_ % grid_[0].count;
    const int64_t group = task / bands_ / grid_[0].count % call_.groups;
    const int64_t sample = task / bands_ / grid_[0].count / call_.groups;
    Place p{group, slice, band * rows_, 0, call_.image, call_.target};
    p.rows = least(rows_, grid_[1].count - p.row);
    p.image +=
        sample * call_.image_stride[0] + group * call_.image_channels * call_.image_stride[1];
    p.target += sample * call_.target_stride[0] + group * call_.lanes * call_.target_stride[1] +
                slice * call_.target_stride[2] + p.row * call_.target_stride[3];
    return p;
  }

  // The taps [first, last) of a plane: where the end of a group cuts them, the weights of the
  // others are +0, which adds nothing to a chain if the image is finite. Planes beyond the border
  // are zeros as well, not left out: a weight that is not finite is to show.
  void multiply_taps(const Place& place, Workspace& w, int64_t plane, int64_t first,
                     int64_t last) const {
    const int64_t depth = place.slice + grid_[0].shift(plane % grid_[0].taps);
    const bool inside = depth >= 0 && depth < grid_[0].image_size;
    const S* const image = inside ? place.image + plane / grid_[0].taps * call_.image_stride[1] +
                                        depth * call_.image_stride[2]
                                  : nullptr;
    const T* weight = weight_ + (place.group * planes_ + plane) * sliding_taps * call_.lanes;
    T some[sliding_taps * sliding_lanes(K::chains)];
    if (last - first < sliding_taps) {
      for (int64_t i = 0; i < sliding_taps * call_.lanes; ++i)
        some[i] = first * call_.lanes <= i && i < last * call_.lanes ? weight[i] : T(0);
      weight = some;
    }
    const int64_t next_channel = plane / grid_[0].taps + 1 < call_.image_channels;
    // The number of a plane's first term is odd in every other one.
    T* const even = w.chain[plane % K::chains];
    T* const odd = w.chain[(plane + 1) % K::chains];
    slide_of()(*this, place, even, odd, image, weight, next_channel * call_.image_stride[1]);
  }

  template <int Step, int Lanes>
  static void slide(const SlidingProduct& p, const Place& place, T* even, T* odd, const S* image,
                    const T* weight, int64_t ahead) {
    constexpr int rows = sliding_rows(Lanes), sources = rows + sliding_kernel - 1;
    const int64_t first = Step < 0 ? (rows - 1) * p.columns_ : 0;
    SlidingBand<S, T> band{
        {},   {even + first, odd + first}, Step * p.columns_, rows * p.columns_, p.width_, weight,
        ahead};
    for (int u = 0; u < sources; ++u) {
      const int64_t at = place.row + p.grid_[1].least_shift() + (Step < 0 ? sources - 1 - u : u);
      const bool inside = image != nullptr && at >= 0 && at < p.grid_[1].image_size;
      band.source[u] = inside ? image + at * p.call_.image_stride[3] : p.zeros_;
    }
    slide_band<S, Step, Lanes, sliding_vecs(Lanes, K::chains)>(band, 0, p.columns_ / L);
  }
  template <int Lanes = 1>
  auto slide_of() const {
    if constexpr (Lanes < sliding_lanes(K::chains))
      if (call_.lanes > Lanes) return slide_of<Lanes + 1>();
    return grid_[2].shift_step < 0 ? slide<-1, Lanes> : slide<1, Lanes>;
  }

  void close_group(Workspace& w) const {
    for (int64_t i = 0; i < sums(); i += L) {
      V group = V::load(w.chain[0] + i);
      if constexpr (K::chains == 2) group = group + V::load(w.chain[1] + i);
      (V::load(w.total + i) + group).store(w.total + i);
      for (int q = 0; q < K::chains; ++q) V::zero().store(w.chain[q] + i);
    }
  }

  void store(const Place& place, Workspace& w) const {
    Results<V> results;
    for (int64_t l = 0; l < call_.lanes; ++l) {
      const V bias =
          V::broadcast(call_.bias ? widened(call_.bias[place.group * call_.lanes + l]) : T(0));
      for (int64_t y = 0; y < place.rows; ++y) {
        const T* const total = w.total + (l * rows_ + y) * columns_;
        S* const to = place.target + l * call_.target_stride[1] + y * call_.target_stride[3];
        for (int64_t x = 0; x < width_; x += L) {
          const V result = results.of(V::load(total + x) + bias);
          if (x + L <= width_)
            result.store(to + x);
          else
            result.store(to + x, static_cast<int>(width_ - x));
        }
      }
    }
    w.special |= results.any_special();
  }

  const Images<S>& call_;
  const GridAxis (&grid_)[3];
  const int64_t width_, planes_;
  const int64_t columns_;                // of the chains: whole vectors
  const int64_t slices_, rows_, bands_;  // rows of a band, bands of a slice
  T* weight_;
  S* zeros_;
};

// Returns false to decline, also after the fact: if an infinity or a NaN came out, an operand that
// met a +0 may not have been finite.
template <class S>
bool multiply_sliding(const Images<S>& call, const GridAxis (&grid)[3]) {
  SlidingProduct<S> product(call, grid);
  return product.takes() && !product.run();
}

}  // namespace torch_naiveconv::TNC_ISA
