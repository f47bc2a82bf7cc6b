// grad_input where windows do not overlap: patch embeddings, and the transposed convolutions with
// stride = kernel that enlarge an image. Start reading at DisjointWindows::run_task.
//
// Every input belongs to one window, so this is one product over the output channels, of all taps
// of all input channels with all windows; what it gives for a window then takes its places in the
// image. What lies side by side in memory plays the lanes:
//
//   NCHW            sums[(ic, kd, kh, kw)][window]
//   channels_last   sums[window][(kd, kh, kw, ic)]
//                     = sum over oc of weight[oc][ic, kd, kh, kw] * grad[oc][window]
//
// A group of the contract counts the other taps too, so it holds few terms of one (group length /
// taps), and a total is added to that often: chains and totals are both kept in registers. With
// 16-bit elements these terms are all of one chain: the next is an even number of terms behind, or
// there is but one.
#pragma once

#include "conv_grids.h"

namespace torch_naiveconv::TNC_ISA {

template <class T>
struct DisjointTile {  // chains, totals, vectors and a factor fill the registers
  static constexpr int rows = Vec<T>::registers == 32 ? 6 : 3;
  static constexpr int vecs = 2;
};

// The bias of a row, or of a vector of lanes: a vector for each of them, by these numbers.
struct DisjointBias {
  int64_t of_row, of_lanes;
};

// sums[r * pitch + lane] for Rows rows and Vecs vectors of lanes: those of `columns` times those of
// `panel`, output channel after output channel.
template <class T, int Rows, int Vecs>
void multiply_disjoint(const T* columns, int64_t channels, int64_t group, const T* panel,
                       const T* bias, DisjointBias step, T* sums, int64_t pitch) {
  using V = Vec<T>;
  constexpr int L = V::lanes;
  V total[Rows][Vecs];
  zero_chains(total);
  while (channels > 0) {
    V chain[Rows][Vecs];
    const auto multiply = [&](const auto& add) __attribute__((always_inline)) {
      V x[Vecs];
#pragma GCC unroll 2
      for (int j = 0; j < Vecs; ++j) x[j] = V::load(columns + j * L);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const V factor = V::broadcast(panel[r]);
#pragma GCC unroll 2
        for (int j = 0; j < Vecs; ++j) chain[r][j] = add(factor, x[j], chain[r][j]);
      }
      columns += Vecs * L, panel += Rows;
    };
    // A chain begins with a product instead of an fma to +0: only the sign of a zero may differ,
    // and no total that began at +0 shows it.
    multiply([](V a, V b, V) __attribute__((always_inline)) { return a * b; });
    for (int64_t rest = least(group, channels) - 1; rest > 0; --rest)
      multiply([](V a, V b, V sum) __attribute__((always_inline)) { return fma(a, b, sum); });
    channels -= group;
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
      for (int j = 0; j < Vecs; ++j) total[r][j] = total[r][j] + chain[r][j];
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < Vecs; ++j)
      canonical(total[r][j] + V::load(bias + r * step.of_row + j * step.of_lanes))
          .store(sums + r * pitch + j * L);
}

template <class T>
using DisjointProduct = void (*)(const T*, int64_t, int64_t, const T*, const T*, DisjointBias, T*,
                                 int64_t);
template <class T, int Rows = DisjointTile<T>::rows, int Vecs = DisjointTile<T>::vecs>
TNC_INLINE DisjointProduct<T> disjoint_product(int64_t rows, int64_t vecs) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return disjoint_product<T, Rows - 1, Vecs>(rows, vecs);
  }
  if constexpr (Vecs > 1) {
    if (vecs < Vecs) return disjoint_product<T, Rows, Vecs - 1>(rows, vecs);
  }
  return multiply_disjoint<T, Rows, Vecs>;
}

// One call: its plan, which the threads share, and what a task does. A task is a block of rows
// times a piece of the lanes, of one sample in NCHW; the windows of all samples are one list in
// channels_last.
template <class S>
class DisjointWindows {
  using T = Total<S>;
  using Tile = DisjointTile<T>;
  static constexpr int L = Vec<T>::lanes;
  static constexpr int64_t most_rows = 1024;
  static constexpr int64_t long_chain = 16;      // terms of one tap in a group
  static constexpr int64_t least_windows = 128;  // for which it pays to pack the weight
  static constexpr int64_t panel_bytes = 512 << 10, most_panel_bytes = 4 << 20;
  static constexpr int64_t sum_bytes = 256 << 10;

 public:
  explicit DisjointWindows(const ConvProblem& p)
      : p_(p),
        s_(p.shape),
        nchw_(is_nchw(p)),
        taps_(s_.taps()),
        group_(most(1, group_length<S> / taps_)),
        samples_(nchw_ ? s_.batch : 1),
        unit_(nchw_ ? taps_ : 1),
        units_(nchw_ ? s_.group_in() : s_.batch * s_.outputs()),
        lanes_(nchw_ ? s_.outputs() : lanes_of_pixels(s_)) {
    const int64_t in_panel = least(panel_bytes / column_bytes(s_), most_rows);
    block_ = least(most(in_panel / unit_, 1), units_);
    blocks_ = up(units_, block_);
    const int64_t tasks = s_.groups * blocks_ * samples_, vectors = up(lanes_, L);
    const int64_t in_sums = sum_bytes / (block_ * unit_ * L * int64_t{sizeof(T)});
    pieces_ = most(up(vectors, most(in_sums, 8)), up(thread_count(), tasks));
    pieces_ = least(pieces_, most(vectors / 2, 1));  // one vector, the last, may be a part
    pitch_ = (up(vectors, pieces_) | 1) * L;
  }

  // Do the windows touch each other, and does what plays the lanes lie side by side? The stride
  // phases of channels_last keep no totals in registers: that is faster where chains are long.
  static bool serves(const ConvProblem& p) {
    const ConvShape& s = p.shape;
    const int64_t taps = s.taps(), windows = s.outputs();
    if (taps == 1 || taps > most_rows || (taps < group_length<S> && group_length<S> % taps != 0) ||
        s.batch * windows < least_windows || column_bytes(s) * taps > most_panel_bytes)
      return false;
    for (const Axis& a : s.axis)
      if (a.pad != 0 || a.stride != a.extent(1) || a.stride != a.kernel || a.in != a.out * a.stride)
        return false;
    if (is_nchw(p)) return windows >= L;
    return is_channels_last(p) && lanes_of_pixels(s) >= L && group_length<S> / taps < long_chain;
  }

  void run() const {
    const int64_t tasks = s_.groups * blocks_ * samples_ * pieces_;
    const int64_t products = s_.batch * s_.outputs() * s_.out_channels * s_.group_in() * taps_;
    parallel_for(tasks, most(1, worthwhile_products * tasks / most(products, 1)), environment_of<S>,
                 [&](int64_t begin, int64_t end) {
                   Workspace w = workspace();
                   for (int64_t task = begin; task < end; ++task) run_task(task, w);
                 });
  }

 private:
  static int64_t column_bytes(const ConvShape& s) {  // of a panel
    return s.group_out() * int64_t{sizeof(T)};
  }
  static int64_t lanes_of_pixels(const ConvShape& s) { return s.taps() * s.in_channels; }

  // Do the windows follow one another, and the taps? In steps of `windows` and `taps`, which become
  // the sizes of what all of them fill.
  static bool are_dense(const ConvProblem& p, int64_t& windows, int64_t& taps) {
    for (int a = 2; a >= 0; --a) {
      const Axis& axis = p.shape.axis[a];
      if ((axis.out > 1 && p.output.stride[a + 2] != windows) ||
          (axis.kernel > 1 && p.weight.stride[a + 2] != taps))
        return false;
      windows *= axis.out, taps *= axis.kernel;
    }
    return true;
  }
  // Do the windows of a channel, and the taps of all channels, lie side by side?
  static bool is_nchw(const ConvProblem& p) {
    int64_t windows = 1, taps = 1;
    return are_dense(p, windows, taps) && (p.shape.group_in() == 1 || p.weight.stride[1] == taps) &&
           p.input.stride[4] == 1;
  }
  // Do the channels of a window, the windows, and the channels of all taps?
  static bool is_channels_last(const ConvProblem& p) {
    const ConvShape& s = p.shape;
    int64_t windows = p.output.stride[4], taps = s.in_channels;
    const auto side_by_side = [](const RawView& v) { return v.stride[1] == 1; };
    return s.groups == 1 && are_dense(p, windows, taps) &&
           (s.batch == 1 || p.output.stride[0] == windows) &&
           (s.out_channels == 1 || side_by_side(p.output)) &&
           (s.in_channels == 1 || (side_by_side(p.weight) && side_by_side(p.input))) &&
           p.input.stride[4] == s.in_channels;
  }

  struct Workspace {
    T *panel, *columns, *sums, *bias;
    int64_t packed = -1;  // the block of rows in the panel
  };
  Workspace workspace() const {
    const int64_t rows = block_ * unit_, channels = s_.group_out();
    const int64_t panel = rows * channels + L, columns = Tile::vecs * L * channels;
    const int64_t sums = rows * pitch_ + L, bias = nchw_ ? rows * L : pitch_;
    Arena& arena = task_arena();
    arena.reset(Arena::bytes_for<T>(panel) + Arena::bytes_for<T>(columns) +
                Arena::bytes_for<T>(sums) + Arena::bytes_for<T>(bias));
    Workspace w;
    w.panel = arena.take<T>(panel);
    w.columns = arena.take<T>(columns);
    w.sums = arena.take<T>(sums);
    w.bias = arena.take<T>(bias);
    return w;
  }

  void run_task(int64_t task, Workspace& w) const {
    const int64_t block = task / (samples_ * pieces_), n = task / pieces_ % samples_;
    const int64_t group = block / blocks_, first = cut_at(units_, blocks_, block % blocks_);
    const int64_t units = cut_at(units_, blocks_, block % blocks_ + 1) - first;
    const int64_t vectors = up(lanes_, L), piece = task % pieces_;
    const int64_t begin = cut_at(vectors, pieces_, piece) * L;
    const int64_t lanes = least(cut_at(vectors, pieces_, piece + 1) * L, lanes_) - begin;
    const S* const grads = static_cast<const S*>(p_.output.data) + n * p_.output.stride[0] +
                           group * s_.group_out() * p_.output.stride[1];
    const S* const weight =
        static_cast<const S*>(p_.weight.data) + group * s_.group_out() * p_.weight.stride[0];
    if (nchw_) {
      const int64_t channel = group * s_.group_in() + first;
      if (w.packed != block) pack_weight(weight + first * p_.weight.stride[1], channel, units, w);
      multiply(grads + begin, p_.output.stride[1], lanes, units * taps_, w);
      spread_rows(n, channel, units, begin, begin + lanes, w.sums);
    } else {
      if (w.packed != block) pack_windows(grads + first * p_.output.stride[4], units, w.panel);
      for (int64_t i = 0; i < lanes; ++i) w.bias[i] = bias_of((begin + i) % s_.in_channels);
      multiply(weight + begin, p_.weight.stride[0], lanes, units, w);
      spread_pixels(first, units, begin, begin + lanes, w.sums);
    }
    w.packed = block;
  }

  T bias_of(int64_t channel) const {
    const S* const bias = static_cast<const S*>(p_.bias);
    return bias ? widened(bias[channel]) + T(0) : T(0);  // +0 instead of -0
  }

  // The rows of some channels. A panel holds tile after tile of rows, output channel after output
  // channel.
  void pack_weight(const S* weight, int64_t channel, int64_t channels, const Workspace& w) const {
    constexpr int R = Tile::rows;
    const int64_t rows = channels * taps_, whole = rows - rows % R, terms = s_.group_out();
    for (int64_t c = 0; c < terms; ++c) {
      const S* const from = weight + c * p_.weight.stride[0];
      T* to = w.panel + c * R;
      for (int64_t row = 0; row < whole; row += R, to += terms * R)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) to[r] = widened(from[row + r]);
      for (int64_t row = whole; row < rows; ++row)
        w.panel[whole * terms + c * (rows - whole) + row - whole] = widened(from[row]);
    }
    for (int64_t row = 0; row < rows; ++row)
      Vec<T>::broadcast(bias_of(channel + row / taps_)).store(w.bias + row * L);
  }
  // The rows of some windows.
  void pack_windows(const S* grads, int64_t windows, T* panel) const {
    const int64_t pixel = p_.output.stride[4], terms = s_.group_out();
    for (int64_t row = 0; row < windows; row += Tile::rows) {
      const int64_t rows = least(Tile::rows, windows - row);
      const S* const from = grads + row * pixel;
      T* const to = panel + row * terms;
      if constexpr (Tile::rows <= L)
        copy_transposed(to, rows, from, pixel, terms, rows);
      else
        for (int64_t c = 0; c < terms; ++c)
          for (int64_t r = 0; r < rows; ++r) to[c * rows + r] = widened(from[r * pixel + c]);
    }
  }

  // The lanes of a tile are copied, since terms that lie far apart may crowd few sets of the first
  // cache; meanwhile those of the next tile are asked for.
  void multiply(const S* from, int64_t apart, int64_t lanes, int64_t rows,
                const Workspace& w) const {
    const int64_t terms = s_.group_out();
    const DisjointBias step{nchw_ ? L : 0, nchw_ ? 0 : L};
    for (int64_t i = 0, width; i < lanes; i += width) {
      const int64_t vecs = least(Tile::vecs, least(up(lanes - i, L), lanes / L));
      width = vecs * L;
      i = least(i, lanes - width);  // the last vector overlaps the one before it
      for (int64_t c = 0; c < terms; ++c)
        for (int64_t k = 0; k < width; k += L) {
          const S* const columns = from + c * apart + i + k;
          prefetch_near(columns + width);
          Vec<T>::load(columns).store(w.columns + c * width + k);
        }
      for (int64_t row = 0; row < rows; row += Tile::rows)
        disjoint_product<T>(rows - row, vecs)(w.columns, terms, group_, w.panel + row * terms,
                                              w.bias + (nchw_ ? row * L : i), step,
                                              w.sums + row * pitch_ + i, pitch_);
    }
  }

  // The sums of windows [begin, end) to their inputs, of one row of windows after another.
  void spread_rows(int64_t n, int64_t channel, int64_t channels, int64_t begin, int64_t end,
                   const T* sums) const {
    const Axis &d = s_.axis[0], &h = s_.axis[1], &w = s_.axis[2];
    const auto merge = row_merge<T, S>(w.kernel);
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t at = begin, count; at < end; at += count) {
        count = least(w.out - at % w.out, end - at);
        for (int64_t kd = 0; kd < d.kernel; ++kd)
          for (int64_t kh = 0; kh < h.kernel; ++kh) {
            const int64_t row = ((c * d.kernel + kd) * h.kernel + kh) * w.kernel;
            merge(sums + row * pitch_ + at - begin, pitch_, w.kernel, count * w.kernel,
                  input_of(n, at, kd, kh) + (channel + c) * p_.input.stride[1]);
          }
      }
  }
  // The sums of lanes [begin, end) to their inputs: those of a row of taps lie side by side, and so
  // do those of the next window.
  void spread_pixels(int64_t first, int64_t windows, int64_t begin, int64_t end,
                     const T* sums) const {
    const Axis &h = s_.axis[1], &w = s_.axis[2];
    const int64_t size = w.kernel * s_.in_channels;
    const auto copy = row_merge<T, S>(1);
    for (int64_t row = 0, count; row < windows; row += count) {
      const int64_t n = (first + row) / s_.outputs(), at = (first + row) % s_.outputs();
      count = least(w.out - at % w.out, windows - row);
      for (int64_t lane = begin, some; lane < end; lane += some) {
        const int64_t taps = lane / size;
        some = least(size - lane % size, end - lane);
        S* to = input_of(n, at, taps / h.kernel, taps % h.kernel) + lane % size;
        for (int64_t i = row; i < row + count; ++i, to += size)
          copy(sums + i * pitch_ + lane - begin, 0, 1, some, to);
      }
    }
  }
  // Of window `at` of a sample, the first input in a row of taps, in channel 0.
  S* input_of(int64_t n, int64_t at, int64_t kd, int64_t kh) const {
    const Axis &d = s_.axis[0], &h = s_.axis[1], &w = s_.axis[2];
    const int64_t* const stride = p_.input.stride;
    const int64_t ow = at % w.out, oh = at / w.out % h.out, od = at / w.out / h.out;
    return static_cast<S*>(p_.input.data) + n * stride[0] + d.input_of(od, kd) * stride[2] +
           h.input_of(oh, kh) * stride[3] + w.input_of(ow, 0) * stride[4];
  }

  const ConvProblem& p_;
  const ConvShape& s_;
  const bool nchw_;                       // or channels_last
  const int64_t taps_, group_;            // of a window; terms of one tap in a group
  const int64_t samples_, unit_, units_;  // tasks apart; rows of a channel or window; of those
  const int64_t lanes_;
  int64_t block_, blocks_, pieces_, pitch_;  // units of a task; cuts; from row to row of sums
};

}  // namespace torch_naiveconv::TNC_ISA
