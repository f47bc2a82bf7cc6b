// grad_input where windows do not overlap: patch embeddings, and the transposed convolutions with
// stride = kernel that enlarge an image. Start reading at DisjointWindows::run_task.
//
// Every input belongs to one window, so with all taps of all input channels as rows, and windows as
// lanes, this is one product over the output channels; what it gives for a window then takes its
// places in the image:
//
//   sums[(ic, kd, kh, kw)][window] = sum over oc of weight[oc][ic, kd, kh, kw] * grad[oc][window]
//
// A group of the contract counts the other taps too, so it holds few terms of one (group length /
// taps), and a total is added to that often: chains and totals are both kept in registers.
#pragma once

#include "conv_grids.h"

namespace torch_naiveconv::TNC_ISA {

template <class T>
struct DisjointTile {  // chains, totals, vectors and a factor fill the registers
  static constexpr int rows = Vec<T>::registers == 32 ? 6 : 3;
  static constexpr int vecs = 2;
};

// sums[r * pitch + window] for Rows rows and Vecs vectors of windows. Output channel after output
// channel, `windows` holds their gradients and `panel` the weights of the rows.
template <class T, int Rows, int Vecs>
void multiply_disjoint(const T* windows, int64_t channels, int64_t group, const T* panel,
                       const T* bias, T* sums, int64_t pitch) {
  using V = Vec<T>;
  constexpr int L = V::lanes;
  V total[Rows][Vecs];
  zero_chains(total);
  while (channels > 0) {
    V chain[Rows][Vecs];
    const auto step = [&](const auto& add) __attribute__((always_inline)) {
      V x[Vecs];
#pragma GCC unroll 2
      for (int j = 0; j < Vecs; ++j) x[j] = V::load(windows + j * L);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const V factor = V::broadcast(panel[r]);
#pragma GCC unroll 2
        for (int j = 0; j < Vecs; ++j) chain[r][j] = add(factor, x[j], chain[r][j]);
      }
      windows += Vecs * L, panel += Rows;
    };
    // A chain begins with a product instead of an fma to +0: only the sign of a zero may differ,
    // and no total that began at +0 shows it.
    step([](V a, V b, V) __attribute__((always_inline)) { return a * b; });
    for (int64_t rest = least(group, channels) - 1; rest > 0; --rest)
      step([](V a, V b, V sum) __attribute__((always_inline)) { return fma(a, b, sum); });
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
      canonical(total[r][j] + V::broadcast(bias[r])).store(sums + r * pitch + j * L);
}

template <class T>
using DisjointProduct = void (*)(const T*, int64_t, int64_t, const T*, const T*, T*, int64_t);
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

// One call: its plan, which the threads share, and what a task does. A task is some windows of a
// sample for a block of input channels.
template <class T>
class DisjointWindows {
  using Tile = DisjointTile<T>;
  static constexpr int L = Vec<T>::lanes;
  static constexpr int64_t most_rows = 1024;
  static constexpr int64_t least_windows = 128;  // for which it pays to pack the weight
  static constexpr int64_t panel_bytes = 512 << 10, most_panel_bytes = 4 << 20;
  static constexpr int64_t sum_bytes = 256 << 10;

 public:
  explicit DisjointWindows(const ConvProblem& p)
      : p_(p),
        s_(p.shape),
        taps_(s_.taps()),
        group_(most(1, group_length<T> / taps_)),
        vectors_(up(s_.outputs(), L)) {
    const int64_t in_panel = panel_bytes / (column_bytes(s_) * taps_);
    channels_ = least(most(least(in_panel, most_rows / taps_), 1), s_.group_in());
    blocks_ = up(s_.group_in(), channels_);
    const int64_t tasks = s_.groups * blocks_ * s_.batch;
    const int64_t in_sums = sum_bytes / (channels_ * taps_ * L * int64_t{sizeof(T)});
    pieces_ = most(up(vectors_, most(in_sums, 8)), up(thread_count(), tasks));
    pieces_ = least(pieces_, most(vectors_ / 2, 1));  // one vector, the last, may be a part
    pitch_ = (up(vectors_, pieces_) | 1) * L;
  }

  // Do the windows touch each other, and do all of them, and the taps of all channels, lie side by
  // side?
  static bool serves(const ConvProblem& p) {
    const ConvShape& s = p.shape;
    const int64_t taps = s.taps();
    if (taps == 1 || taps > most_rows || (taps < group_length<T> && group_length<T> % taps != 0))
      return false;
    int64_t windows = 1, weights = 1;
    for (int a = 2; a >= 0; --a) {
      const Axis& axis = s.axis[a];
      const bool touch = axis.pad == 0 && axis.stride == axis.extent(1) &&
                         axis.stride == axis.kernel && axis.in == axis.out * axis.stride;
      if (!touch || (axis.out > 1 && p.output.stride[a + 2] != windows) ||
          (axis.kernel > 1 && p.weight.stride[a + 2] != weights))
        return false;
      windows *= axis.out, weights *= axis.kernel;
    }
    return (s.group_in() == 1 || p.weight.stride[1] == weights) && p.input.stride[4] == 1 &&
           windows >= L && s.batch * windows >= least_windows &&
           column_bytes(s) * taps <= most_panel_bytes;
  }

  void run() const {
    const int64_t tasks = s_.groups * blocks_ * s_.batch * pieces_;
    const int64_t products = s_.batch * s_.outputs() * s_.out_channels * s_.group_in() * taps_;
    parallel_for(tasks, most(1, worthwhile_products * tasks / most(products, 1)), environment_of<T>,
                 [&](int64_t begin, int64_t end) {
                   Workspace w = workspace();
                   for (int64_t task = begin; task < end; ++task) run_task(task, w);
                 });
  }

 private:
  static int64_t column_bytes(const ConvShape& s) {  // of a panel
    return s.group_out() * int64_t{sizeof(T)};
  }

  struct Workspace {
    T *panel, *grads, *sums, *bias;
    int64_t packed = -1;  // the block of channels in the panel
  };
  Workspace workspace() const {
    const int64_t rows = channels_ * taps_;
    Arena& arena = task_arena();
    arena.reset(Arena::bytes_for<T>(rows * s_.group_out()) + Arena::bytes_for<T>(rows) +
                Arena::bytes_for<T>(rows * pitch_ + L) +
                Arena::bytes_for<T>(Tile::vecs * L * s_.group_out()));
    Workspace w;
    w.panel = arena.take<T>(rows * s_.group_out());
    w.grads = arena.take<T>(Tile::vecs * L * s_.group_out());
    w.bias = arena.take<T>(rows);
    w.sums = arena.take<T>(rows * pitch_ + L);
    return w;
  }

  void run_task(int64_t task, Workspace& w) const {
    const int64_t block = task / (s_.batch * pieces_), n = task / pieces_ % s_.batch;
    const int64_t begin = cut_at(vectors_, pieces_, task % pieces_) * L;
    const int64_t end = least(cut_at(vectors_, pieces_, task % pieces_ + 1) * L, s_.outputs());
    const int64_t group = block / blocks_, first = cut_at(s_.group_in(), blocks_, block % blocks_);
    const int64_t channels = cut_at(s_.group_in(), blocks_, block % blocks_ + 1) - first;
    if (w.packed != block) pack(group, first, channels * taps_, w), w.packed = block;
    const T* const grads = static_cast<const T*>(p_.output.data) + n * p_.output.stride[0] +
                           group * s_.group_out() * p_.output.stride[1] + begin;
    multiply(grads, end - begin, channels * taps_, w);
    spread(n, group * s_.group_in() + first, channels, begin, end, w.sums);
  }

  // Tile after tile of rows, output channel after output channel.
  void pack(int64_t group, int64_t first, int64_t rows, const Workspace& w) const {
    const T* const weight = static_cast<const T*>(p_.weight.data) +
                            group * s_.group_out() * p_.weight.stride[0] +
                            first * p_.weight.stride[1];
    constexpr int R = Tile::rows;
    const int64_t whole = rows - rows % R, channels = s_.group_out();
    for (int64_t c = 0; c < channels; ++c) {
      const T* const from = weight + c * p_.weight.stride[0];
      T* to = w.panel + c * R;
      for (int64_t row = 0; row < whole; row += R, to += channels * R)
        __builtin_memcpy(to, from + row, R * sizeof(T));
      for (int64_t row = whole; row < rows; ++row)
        w.panel[whole * channels + c * (rows - whole) + row - whole] = from[row];
    }
    const T* const bias = static_cast<const T*>(p_.bias);
    const int64_t channel = group * s_.group_in() + first;
    for (int64_t row = 0; row < rows; ++row)
      w.bias[row] = bias ? bias[channel + row / taps_] + T(0) : T(0);  // +0 instead of -0
  }

  // The gradients of a tile's windows are copied, since channels that lie far apart may crowd few
  // sets of the first cache; meanwhile those of the next tile are asked for.
  void multiply(const T* grads, int64_t windows, int64_t rows, const Workspace& w) const {
    const int64_t channels = s_.group_out(), apart = p_.output.stride[1];
    for (int64_t i = 0, width; i < windows; i += width) {
      const int64_t vecs = least(Tile::vecs, least(up(windows - i, L), windows / L));
      width = vecs * L;
      i = least(i, windows - width);  // the last vector overlaps the one before it
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t k = 0; k < width; k += L) {
          const T* const from = grads + c * apart + i + k;
          prefetch_near(from + width);
          Vec<T>::load(from).store(w.grads + c * width + k);
        }
      for (int64_t row = 0; row < rows; row += Tile::rows)
        disjoint_product<T>(rows - row, vecs)(w.grads, channels, group_, w.panel + row * channels,
                                              w.bias + row, w.sums + row * pitch_ + i, pitch_);
    }
  }

  // The sums of windows [begin, end) to their inputs, of one row of windows after another.
  void spread(int64_t n, int64_t channel, int64_t channels, int64_t begin, int64_t end,
              const T* sums) const {
    const Axis &d = s_.axis[0], &h = s_.axis[1], &w = s_.axis[2];
    const int64_t* const stride = p_.input.stride;
    const RowMerge<T> merge = row_merge<T>(w.kernel);
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t at = begin, count; at < end; at += count) {
        const int64_t ow = at % w.out, oh = at / w.out % h.out, od = at / w.out / h.out;
        count = least(w.out - ow, end - at);
        for (int64_t kd = 0; kd < d.kernel; ++kd)
          for (int64_t kh = 0; kh < h.kernel; ++kh) {
            const int64_t row = ((c * d.kernel + kd) * h.kernel + kh) * w.kernel;
            T* const to = static_cast<T*>(p_.input.data) + n * stride[0] +
                          (channel + c) * stride[1] + d.input_of(od, kd) * stride[2] +
                          h.input_of(oh, kh) * stride[3] + w.input_of(ow, 0);
            merge(sums + row * pitch_ + at - begin, pitch_, w.kernel, count * w.kernel, to);
          }
      }
  }

  const ConvProblem& p_;
  const ConvShape& s_;
  const int64_t taps_, group_;         // of a window; terms of one tap in a group
  const int64_t vectors_;              // of the windows of a sample
  int64_t pieces_;                     // into which they are cut
  int64_t channels_, blocks_, pitch_;  // of a task; of a group; of the sums of one tap
};

}  // namespace torch_naiveconv::TNC_ISA
