// grad_weight of few channels per group, lanes are channels. Start reading at
// few_channels_grad_weight, at the end; depthwise channels_last tensors are read where they lie
// (InPlaceGradWeight), others through a panel (PanelGradWeight).
//
//   chain[tap] = fma(input[pixel + tap], grad[pixel], chain[tap])
#pragma once

#include "depthwise_lanes.h"

namespace torch_naiveconv::TNC_ISA {

// Memory that is read later and fetched meanwhile, little by little: more at once, and what is read
// now would have to wait.
struct Ahead {
  const char *at = nullptr, *end = nullptr;

  TNC_INLINE void fetch(int lines) {
    if (at >= end) return;
#pragma GCC unroll 8
    for (int i = 0; i < lines; ++i, at += 64) prefetch(at);
  }
};

// Some pixels of a row and what each row of taps reads for the first of them. `left` pixels, then
// `middle` and `right` ones; those at the sides read columns that lie in the padding.
template <class S>
struct PixelRow {
  const S* grad;
  const S* const* taps;
  int64_t left, middle, right;
  int64_t column;  // of the first pixel's first tap
  bool closes;     // a group of terms ends here, and its sum is added to the totals
};

// Rows of pixels, one after the other.
template <class S>
struct PixelRows {
  const PixelRow<S>* row;
  int64_t count, grad_pitch;
  int64_t channel;  // from the one to which the rows point
  // For the pixels at the sides: how far the next tap and the next pixel are, how many columns
  // there are.
  int64_t tap_columns, pixel_columns, width;
  int64_t number, end;  // of the first pixel and behind the last: two chains take turns
  bool begins;          // a group of terms, so that its chains start
  Ahead input_ahead, grad_ahead;
};

// acc[b][i % chains][r][k] += the products of `pixels` pixels, `stride` columns apart, for blocks
// of channels side by side; a vector is loaded once for all the pixels and taps that meet in it.
// Moves on to the next pixels.
template <class V, int stride, int pixels, int blocks, int chains, int rows, int taps, class S>
TNC_INLINE void add_pixels(V (&acc)[blocks][chains][rows][taps], const S*& grad, int64_t grad_pitch,
                           const S* (&from)[rows], int64_t pitch) {
  constexpr int columns = (pixels - 1) * stride + taps;
  V g[pixels][blocks];
#pragma GCC unroll 8
  for (int i = 0; i < pixels; ++i, grad += grad_pitch)
#pragma GCC unroll 2
    for (int b = 0; b < blocks; ++b) g[i][b] = V::load(grad + b * V::lanes);
#pragma GCC unroll 24
  for (int column = 0; column < columns; ++column)
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
      for (int b = 0; b < blocks; ++b) {
        V x = V::load(from[r] + b * V::lanes);
        if constexpr (pixels > 1) x = in_register(x);
#pragma GCC unroll 8
        for (int i = 0; i < pixels; ++i) {
          const int k = column - i * stride;
          if (k < 0 || k >= taps) continue;
          V& chain = acc[b][i % chains][r][k];
          chain = fma(x, g[i][b], chain);
        }
      }
      from[r] += pitch;
    }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) from[r] += (pixels * stride - columns) * pitch;
}

// After one pixel: the other chain's turn.
template <class V, int blocks, int chains, int rows, int taps>
TNC_INLINE void take_turns(V (&acc)[blocks][chains][rows][taps]) {
  if constexpr (chains == 2)
#pragma GCC unroll 2
    for (int b = 0; b < blocks; ++b)
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
        for (int k = 0; k < taps; ++k) std::swap(acc[b][0][r][k], acc[b][1][r][k]);
}

// The same for pixels whose taps may read the padding.
template <class V, int stride, int blocks, int chains, int rows, int taps, class S>
TNC_INLINE void add_side(V (&acc)[blocks][chains][rows][taps], const S*& grad,
                         const PixelRows<S>& pixels, int64_t count, int64_t& column,
                         const S* (&from)[rows], int64_t pitch) {
  for (; count > 0; --count, column += pixels.pixel_columns, grad += pixels.grad_pitch) {
    V g[blocks];
#pragma GCC unroll 2
    for (int b = 0; b < blocks; ++b) g[b] = V::load(grad + b * V::lanes);
#pragma GCC unroll 8
    for (int k = 0; k < taps; ++k) {
      const int64_t at = column + k * pixels.tap_columns;
      const bool there = at >= 0 && at < pixels.width;
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
        for (int b = 0; b < blocks; ++b) {
          const V x = there ? V::load(from[r] + k * pitch + b * V::lanes) : V::zero();
          acc[b][0][r][k] = fma(x, g[b], acc[b][0][r][k]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) from[r] += stride * pitch;
    take_turns(acc);
  }
}

// Where the sums of some rows of taps are kept: total[b * block_pitch + r * row_pitch + tap][lane],
// and, of each block, one chain after the other in the same way.
template <class E>
struct TapSums {
  E *total, *chain;
  int64_t row_pitch, block_pitch;
};

// The products of some rows of pixels with the rows of taps from `first` on: `rows` rows of `taps`
// taps, of which the first reads `shift` columns, or `offset` elements, further on.
template <int blocks, int chains, int stride, int rows, int taps, class S>
void tap_tile(PixelRows<S>& pixels, int64_t first, int64_t offset, int64_t shift, int64_t pitch,
              TapSums<Total<S>> sums) {
  using E = Total<S>;
  using V = Vec<E>;
  V acc[blocks][chains][rows][taps];
  const auto each = [&](const auto& what) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int b = 0; b < blocks; ++b)
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
        for (int k = 0; k < taps; ++k) what(b, r, k, r * sums.row_pitch + k * V::lanes);
  };
  // Where the chain is whose turn it is, and the other.
  const auto chain_of = [&](int64_t number, int b, int q) __attribute__((always_inline)) {
    return sums.chain + (b * chains + (number + q) % chains) * sums.block_pitch;
  };
#pragma GCC unroll 2
  for (int q = 0; q < chains; ++q)
    if (pixels.begins)
      each([&](int b, int r, int k, int64_t)
               __attribute__((always_inline)) { acc[b][q][r][k] = V::zero(); });
    else
      each([&](int b, int r, int k, int64_t at) __attribute__((always_inline)) {
        acc[b][q][r][k] = V::load(chain_of(pixels.number, b, q) + at);
      });
  for (const PixelRow<S>* row = pixels.row; row < pixels.row + pixels.count; ++row) {
    const S* from[rows];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) from[r] = row->taps[first + r] + offset;
    const S* grad = row->grad + pixels.channel;
    int64_t count = row->middle, column = row->column + shift;
    if (row->left > 0) add_side<V, stride>(acc, grad, pixels, row->left, column, from, pitch);
    const auto add = [&](auto pixels_at_once) __attribute__((always_inline)) {
      constexpr int some = pixels_at_once.value;
      constexpr int lines = some * blocks * V::lanes * sizeof(S) / 64;
      for (; count >= some; count -= some) {
        pixels.input_ahead.fetch(lines * stride * stride);
        pixels.grad_ahead.fetch(lines);
        add_pixels<V, stride, some>(acc, grad, pixels.grad_pitch, from, pitch);
      }
    };
    // As many pixels as leave room for their gradients; of stride 2 they share few columns.
    constexpr int sums_kept = blocks * chains * rows * taps, room = V::registers - 3 - sums_kept;
    if constexpr (stride == 1 && room >= 8 * blocks) add(std::integral_constant<int, 8>{});
    if constexpr (stride == 1 && room >= 4 * blocks) add(std::integral_constant<int, 4>{});
    add(std::integral_constant<int, 2>{});
    for (; count > 0; --count) {
      add_pixels<V, stride, 1>(acc, grad, pixels.grad_pitch, from, pitch);
      take_turns(acc);
    }
    if (row->right > 0) {
      column += row->middle * pixels.pixel_columns;
      add_side<V, stride>(acc, grad, pixels, row->right, column, from, pitch);
    }
    if (!row->closes) continue;
    each([&](int b, int r, int k, int64_t at) __attribute__((always_inline)) {
      E* const total = sums.total + b * sums.block_pitch + at;
      V chain[chains];
#pragma GCC unroll 2
      for (int q = 0; q < chains; ++q) chain[q] = acc[b][q][r][k], acc[b][q][r][k] = V::zero();
      (V::load(total) + sum_of(chain)).store(total);
    });
  }
  if (pixels.row[pixels.count - 1].closes) return;
#pragma GCC unroll 2
  for (int q = 0; q < chains; ++q)
    each([&](int b, int r, int k, int64_t at) __attribute__((always_inline)) {
      acc[b][q][r][k].store(chain_of(pixels.end, b, q) + at);
    });
}

// Tiles of `rows` x `taps` chains (twice as many if they take turns) that fit the registers, for
// the numbers of taps that occur in kernels; longer rows are cut.
constexpr int most_chains_of(int registers) { return registers == 32 ? 26 : 11; }

template <int blocks, int chains, int stride, int taps, int rows, class S>
TNC_INLINE void tap_rows(PixelRows<S>& pixels, int64_t first, int64_t row_count, int64_t offset,
                         int64_t shift, int64_t pitch, TapSums<Total<S>> sums) {
  if constexpr (rows > 0) {
    for (; row_count - first >= rows; first += rows) {
      tap_tile<blocks, chains, stride, rows, taps>(pixels, first, offset, shift, pitch, sums);
      sums.chain += rows * sums.row_pitch;
      sums.total += rows * sums.row_pitch;
    }
    tap_rows<blocks, chains, stride, taps, rows - 1>(pixels, first, row_count, offset, shift, pitch,
                                                     sums);
  }
}

// All `kernel` taps of `row_count` rows of taps: a tap's column is tap_pitch from the one before, a
// pixel's pixel_pitch.
template <int chains, int blocks = 1, class S>
void all_taps(PixelRows<S>& pixels, int64_t row_count, int64_t kernel, int64_t tap_pitch,
              int64_t pixel_pitch, Total<S>* total, Total<S>* chain, int64_t block_pitch) {
  using V = Vec<Total<S>>;
  constexpr int L = V::lanes, most = most_chains_of(V::registers) / (chains * blocks);
  int64_t k = 0;
  const auto rows_of = [&](auto stride, auto taps, int64_t pitch) __attribute__((always_inline)) {
    constexpr int fit = most / taps.value < 8 ? most / taps.value : 8;
    tap_rows<blocks, chains, stride.value, taps.value, fit>(
        pixels, 0, row_count, pixels.channel + k * tap_pitch, k * pixels.tap_columns, pitch,
        TapSums<Total<S>>{total + k * L, chain + k * L, kernel * L, block_pitch});
    k += taps.value;
  };
  const std::integral_constant<int, 1> one;
  const auto sliding = [&](auto stride) {
    while (kernel - k >= 7) rows_of(stride, std::integral_constant<int, 7>{}, tap_pitch);
    while (kernel - k >= 5) rows_of(stride, std::integral_constant<int, 5>{}, tap_pitch);
    while (kernel - k >= 3) rows_of(stride, std::integral_constant<int, 3>{}, tap_pitch);
  };
  if (pixel_pitch == tap_pitch)
    sliding(one);
  else if (pixel_pitch == 2 * tap_pitch)
    sliding(std::integral_constant<int, 2>{});
  while (k < kernel) rows_of(one, one, pixel_pitch);
}

// total += chain (16-bit types: even + odd); the chains start afresh.
template <class T>
void fold_chains(int64_t count, Total<T>* chain, Total<T>* total) {
  using V = Vec<Total<T>>;
  for (int64_t i = 0; i < count; i += V::lanes) {
    V group = V::load(chain + i);
    V::zero().store(chain + i);
    if constexpr (chains_of<T> == 2) {
      group = group + V::load(chain + count + i);
      V::zero().store(chain + count + i);
    }
    (V::load(total + i) + group).store(total + i);
  }
}

template <class T>
TNC_INLINE void put_total(Total<T> total, bool keep_total, void* data, int64_t offset) {
  using V = Vec<Total<T>>;
  const V result = canonical(V::broadcast(total) + V::zero());
  if (keep_total)
    result.store(static_cast<Total<T>*>(data) + offset, 1);
  else
    result.store(static_cast<T*>(data) + offset, 1);
}

// The totals of a block of channels from `first` on, of some term numbers: [number][lane].
template <class T>
void read_totals(const ConvProblem& p, int64_t first, int64_t number, int64_t numbers,
                 Total<T>* totals) {
  constexpr int L = Vec<Total<T>>::lanes;
  const int64_t terms = p.shape.group_in() * p.shape.taps();
  const auto* const earlier = static_cast<const Total<T>*>(p.total);
  for (int64_t i = 0; i < numbers * L; ++i) {
    const int64_t oc = first + i % L;
    totals[i] =
        earlier && oc < p.shape.out_channels ? earlier[oc * terms + number + i / L] : Total<T>(0);
  }
}
template <class T>
void write_totals(const ConvProblem& p, int64_t first, int64_t number, int64_t numbers,
                  const Total<T>* totals) {
  using V = Vec<Total<T>>;
  const int64_t* const stride = p.weight.stride;
  const Axis* const axis = p.shape.axis;
  const int64_t lanes = least(V::lanes, p.shape.out_channels - first);
  const auto write = [&](auto* data) {
    std::remove_pointer_t<decltype(data)> results[V::lanes];
    for (int64_t i = 0; i < numbers; ++i) {
      const Position k = Position::of(number + i, p.shape.group_in(), axis[0].kernel,
                                      axis[1].kernel, axis[2].kernel);
      const int64_t offset =
          first * stride[0] + k.c * stride[1] + k.d * stride[2] + k.h * stride[3] + k.w * stride[4];
      canonical(V::load(totals + i * V::lanes) + V::zero()).store(results);
      for (int64_t l = 0; l < lanes; ++l) data[offset + l * stride[0]] = results[l];
    }
  };
  if (p.keep_total)
    write(static_cast<Total<T>*>(p.weight.data));
  else
    write(static_cast<T*>(p.weight.data));
}

// Depthwise, channels_last, read in place: its plan, which the threads share, and what a task does.
// A task has some blocks of channels and goes over bands of rows, block by block; its steps, from
// run_task on, follow each other below.
template <class T>
class InPlaceGradWeight {
  using E = Total<T>;
  using V = Vec<E>;
  static constexpr int L = V::lanes, C = chains_of<T>;
  static constexpr int64_t G = group_length<T>;

 public:
  explicit InPlaceGradWeight(const ConvProblem& p)
      : p_(p),
        s_(p.shape),
        blocks_(up(s_.groups, L)),
        plane_rows_(deep_.kernel * high_.kernel),
        sums_(s_.taps() * L),
        rows_(deep_.out * high_.out),
        padding_(deep_.reads_padding() || high_.reads_padding()
                     ? (wide_.in - 1) * p.input.stride[4] + s_.groups
                     : 0),
        asks_(exceeds_caches<T>(p, 8 << 20)) {}

  bool fits() const {
    return s_.group_in() == 1 && s_.group_out() == 1 && p_.input.stride[1] == 1 &&
           p_.output.stride[1] == 1 && s_.groups >= L && blocks_ >= thread_count() &&
           plane_rows_ <= most_rows && padding_ * static_cast<int64_t>(sizeof(T)) <= panel_limit;
  }

  void run() {
    cut_rows();
    const int64_t products = s_.batch * s_.outputs() * sums_;
    parallel_for(blocks_, 1 + worthwhile_products / (products + 1), environment_of<T>,
                 [&](int64_t begin, int64_t end) { run_task(begin, end); });
  }

 private:
  // ---- the plan --------------------------------------------------------------------------------

  static constexpr int64_t most_rows = 64;  // of taps

  void cut_rows() {
    // As many as the second cache holds beside the next ones; if blocks share lines, as many as the
    // first one still has for the next block.
    const int64_t bytes = up(blocks_, thread_count()) * L * static_cast<int64_t>(sizeof(T));
    const int64_t pixels = L * sizeof(T) < 64 ? 128 : 2 * panel_bytes / bytes;
    band_ = (pixels - (high_.extent(1) - high_.stride) * wide_.in) /
            (high_.stride * wide_.in + wide_.out);
    band_ = most(1, least(band_, rows_));
    while (left_ < right_ && wide_.input_of(left_, 0) < 0) ++left_;
    while (right_ > left_ && wide_.input_of(right_ - 1, wide_.kernel - 1) >= wide_.in) --right_;
  }

  // ---- a task ----------------------------------------------------------------------------------

  struct Workspace {
    E *totals, *chains;
    T* zeros;  // a row in the padding
    // The pixels of a band, and what they read.
    PixelRow<T>* row_list;
    const T** taps;
  };

  void run_task(int64_t begin, int64_t end) const {
    const int64_t count = end - begin;
    const int64_t pieces = band_ + band_ * wide_.out / G + 1;  // rows are cut where a group ends
    Arena& arena = task_arena();
    arena.reset(Arena::bytes_for<E>(count * sums_) + Arena::bytes_for<E>(count * C * sums_) +
                Arena::bytes_for<T>(padding_) + Arena::bytes_for<PixelRow<T>>(pieces) +
                Arena::bytes_for<const T*>(pieces * plane_rows_));
    Workspace w;
    w.totals = arena.take<E>(count * sums_);
    w.chains = arena.take<E>(count * C * sums_);
    w.zeros = arena.take<T>(padding_);
    w.row_list = arena.take<PixelRow<T>>(pieces);
    w.taps = arena.take<const T*>(pieces * plane_rows_);
    std::memset(w.zeros, 0, padding_ * sizeof(T));
    for (int64_t b = 0; b < count; ++b)
      read_totals<T>(p_, channel(begin + b), 0, s_.taps(), w.totals + b * sums_);
    for (int64_t n = 0; n < s_.batch; ++n)
      for (int64_t first = 0; first < rows_; first += band_) {
        const int64_t last = least(first + band_, rows_);
        PixelRows<T> pixels = rows_of(n, first, last, w);
        const auto add = [&](auto blocks, int64_t b) {
          pixels.channel = channel(begin + b);
          if (asks_) fetch_next(n, first, last, begin + b, blocks.value, pixels);
          all_taps<C, blocks.value>(pixels, plane_rows_, wide_.kernel,
                                    wide_.dilation * p_.input.stride[4],
                                    wide_.stride * p_.input.stride[4], w.totals + b * sums_,
                                    w.chains + b * C * sums_, sums_);
        };
        int64_t b = 0;
        if constexpr (C == 1 && V::registers == 32)
          if (s_.taps() * 2 <= most_chains_of(V::registers))
            for (; b + 1 < count && (begin + b + 2) * L <= s_.groups; b += 2)
              add(std::integral_constant<int, 2>{}, b);
        for (; b < count; ++b) add(std::integral_constant<int, 1>{}, b);
      }
    for (int64_t b = 0; b < count; ++b)
      write_totals<T>(p_, channel(begin + b), 0, s_.taps(), w.totals + b * sums_);
  }
  int64_t channel(int64_t block) const { return least(block * L, s_.groups - L); }

  // Rows [first, last) of sample n, those of its channel 0.
  PixelRows<T> rows_of(int64_t n, int64_t first, int64_t last, const Workspace& w) const {
    const int64_t *const in = p_.input.stride, *const out = p_.output.stride;
    const T* const inputs = static_cast<const T*>(p_.input.data) + n * in[0];
    const T* const grads = static_cast<const T*>(p_.output.data) + n * out[0];
    PixelRows<T> pixels{};
    pixels.row = w.row_list;
    pixels.grad_pitch = out[4];
    pixels.tap_columns = wide_.dilation;
    pixels.pixel_columns = wide_.stride;
    pixels.width = wide_.in;
    pixels.number = first * wide_.out;
    pixels.end = last * wide_.out;
    pixels.begins = pixels.number % G == 0;
    const T** tap = w.taps;
    for (int64_t at = first, number = pixels.number; at < last; ++at) {
      const int64_t d = at / high_.out, h = at % high_.out;
      for (int64_t x = 0, next; x < wide_.out; x = next) {
        next = least(wide_.out, x + G - number % G);
        number += next - x;
        PixelRow<T>& row = w.row_list[pixels.count++];
        row.grad = grads + d * out[2] + h * out[3] + x * out[4];
        row.taps = tap;
        row.left = most(least(left_, next) - x, 0);
        row.middle = most(least(right_, next) - most(left_, x), 0);
        row.right = next - x - row.left - row.middle;
        row.column = wide_.input_of(x, 0);
        row.closes = number % G == 0 || number == s_.outputs();
        for (int64_t r = 0; r < plane_rows_; ++r) {
          const int64_t id = deep_.input_of(d, r / high_.kernel);
          const int64_t ih = high_.input_of(h, r % high_.kernel);
          const bool inside = deep_.holds_input(id) && high_.holds_input(ih);
          *tap++ = (inside ? inputs + id * in[2] + ih * in[3] : w.zeros) + row.column * in[4];
        }
      }
    }
    return pixels;
  }

  // What the next band reads first is fetched meanwhile, across the end of a sample too: a block's
  // share of it.
  void fetch_next(int64_t n, int64_t first, int64_t last, int64_t block, int64_t blocks,
                  PixelRows<T>& pixels) const {
    const auto share = [&](const RawView& view, int64_t columns, int64_t row, int64_t rows) {
      const T* const from = static_cast<const T*>(view.data) + n * view.stride[0] +
                            row * view.stride[3] + block * rows * columns * L;
      return Ahead{reinterpret_cast<const char*>(from),
                   reinterpret_cast<const char*>(from + blocks * rows * columns * L)};
    };
    const int64_t far = high_.input_of((last - 1) % high_.out, high_.kernel - 1) + 1 +
                        deep_.input_of((last - 1) / high_.out, deep_.kernel - 1) * high_.in;
    pixels.input_ahead = share(p_.input, wide_.in, most(0, least(far, deep_.in * high_.in)),
                               (last - first) * high_.stride);
    pixels.grad_ahead = share(p_.output, wide_.out, last, last - first);
  }

  const ConvProblem& p_;
  const ConvShape& s_;
  const Axis &deep_ = s_.axis[0], &high_ = s_.axis[1], &wide_ = s_.axis[2];
  const int64_t blocks_, plane_rows_;  // of channels; of taps
  const int64_t sums_;                 // of a block
  const int64_t rows_;                 // of pixels
  const int64_t padding_;              // elements of a row in it, if one is read
  const bool asks_;                    // ahead
  int64_t band_ = 1;                   // so many of them
  // The pixels of a row that read no padding lie between these.
  int64_t left_ = 0, right_ = wide_.out;
};

constexpr int64_t band_pixels = 512;   // whose rows a panel holds, if they fit
constexpr int64_t pixels_ahead = 256;  // of a row, fetched into the second cache

// One call through a panel: its plan, which the threads share, and what a task does. A task is a
// block of channels, or a part of its rows of taps; its steps, from run_team on, follow each other
// below.
template <class T>
class PanelGradWeight {
  using E = Total<T>;
  using Lanes = ChannelLanes<T>;
  static constexpr int L = Vec<E>::lanes;
  static constexpr int64_t G = group_length<T>;
  // Two chains take turns in a tile if it has the registers, else each has a pass of its own.
  static constexpr int C = Vec<E>::registers == 32 ? chains_of<T> : 1, passes = chains_of<T> / C;

 public:
  explicit PanelGradWeight(const ConvProblem& p)
      : p_(p),
        s_(p.shape),
        plane_rows_(deep_.kernel * high_.kernel),
        all_rows_(s_.group_in() * plane_rows_),
        blocks_(up(s_.out_channels, L)) {
    share_blocks();
    cut_bands();
  }

  bool fits() const { return panel_bytes_of() <= panel_limit; }

  void run() const {
    const int64_t products = s_.batch * s_.outputs() * L * all_rows_ * wide_.kernel / parts_;
    parallel_for(blocks_ * parts_, 1 + worthwhile_products / (products + 1), environment_of<T>,
                 [&](int64_t begin, int64_t end) {
                   const Workspace w = workspace();
                   while (begin < end) begin += run_team(begin, end, w);
                 });
  }

 private:
  // ---- the plan --------------------------------------------------------------------------------

  // Blocks in parts where they are few; a thread moves the blocks that it has side by side.
  void share_blocks() {
    const int64_t threads = thread_count();
    const auto rounds = [&] { return up(blocks_ * parts_, threads); };
    while (parts_ < least(all_rows_, 4) && rounds() * threads * 6 > blocks_ * parts_ * 7) ++parts_;
    if (parts_ == 1)
      together_ = least(
          least(Lanes::together(p_.input, s_.group_out()), Lanes::together(p_.output, 1)), blocks_);
  }

  // The panel holds the rows that a band of rows of pixels reads, row i in the place of row
  // i - extent; small slices it holds whole. Where one row is too long it holds a piece.
  void cut_bands() {
    panel_ = {together_, s_.group_in(), {deep_.extent(1), 0, 0}, L};
    band_ = least(most(band_pixels / wide_.out, 1), high_.out);
    width_ = wide_.out;
    int64_t pieces = 1;
    const auto bytes = [&] {
      panel_.extent[1] = high_.extent(band_);
      panel_.extent[2] = most(wide_.extent(width_), wide_.pad + L);
      return panel_bytes_of();
    };
    while (bytes() > panel_bytes && band_ > 1) --band_;
    while (bytes() > panel_bytes && width_ > 1) ++pieces, width_ = up(wide_.out, pieces);
    if (deep_.kernel > 1 && panel_.extent[1] < high_.in &&
        bytes() / panel_.extent[1] * high_.in <= panel_bytes)
      panel_.extent[1] = high_.in;
    grad_panel_ = {together_, 1, {1, 1, most(band_ * width_, L)}, L};
  }
  int64_t panel_bytes_of() const { return panel_.size() * static_cast<int64_t>(sizeof(E)); }

  // ---- a task ----------------------------------------------------------------------------------

  struct Workspace {
    E *values, *grads;      // the panels
    E* zeros;               // a row in the padding
    E *totals, *chains;     // of the blocks that are moved together
    int64_t *held, *place;  // the row that is there; where a row is in its slice of the panel
    // What each row of taps reads for a row of pixels, in the first plane of the first block (null:
    // padding), and for the pixels of a group.
    const E **read, **taps;
    PixelRow<E>* row_list;
  };
  // Blocks [first, first + count), and of each the rows of taps [r0, r1).
  struct Team {
    int64_t first, count, r0, r1;
    int64_t sums;  // of a block
    Lanes lanes, grad_lanes;
  };
  // Rows [h, h + rows) of slice d of sample n, `pixels` of each from w on.
  struct Band {
    int64_t n, d, h, rows, w, pixels;
  };

  Workspace workspace() const {
    const int64_t sums = together_ * all_rows_ * wide_.kernel * L;
    const int64_t slots = panel_.extent[0] * panel_.extent[1];
    Arena& arena = task_arena();
    arena.reset(
        Arena::bytes_for<E>(panel_.size()) + Arena::bytes_for<E>(panel_.row_pitch()) +
        Arena::bytes_for<E>(grad_panel_.size()) + Arena::bytes_for<E>(sums) +
        Arena::bytes_for<E>(chains_of<T> * sums) + Arena::bytes_for<int64_t>(slots) +
        Arena::bytes_for<int64_t>(high_.in) + Arena::bytes_for<const E*>(band_ * plane_rows_) +
        Arena::bytes_for<const E*>(band_ * all_rows_) + Arena::bytes_for<PixelRow<E>>(band_));
    Workspace w;
    w.values = arena.take<E>(panel_.size());
    w.zeros = arena.take<E>(panel_.row_pitch());
    w.grads = arena.take<E>(grad_panel_.size());
    w.totals = arena.take<E>(sums);
    w.chains = arena.take<E>(chains_of<T> * sums);
    w.held = arena.take<int64_t>(slots);
    w.place = arena.take<int64_t>(high_.in);
    w.read = arena.take<const E*>(band_ * plane_rows_);
    w.taps = arena.take<const E*>(band_ * all_rows_);
    w.row_list = arena.take<PixelRow<E>>(band_);
    std::memset(w.zeros, 0, panel_.row_pitch() * sizeof(E));
    for (int64_t ih = 0; ih < high_.in; ++ih) w.place[ih] = ih % panel_.extent[1];
    return w;
  }

  // As many tasks from `task` on as are moved together; returns their number.
  int64_t run_team(int64_t task, int64_t end, const Workspace& w) const {
    const int64_t first = task / parts_, part = task % parts_;
    const int64_t count = parts_ > 1 ? 1 : least(together_, end - task);
    const int64_t r0 = all_rows_ * part / parts_, r1 = all_rows_ * (part + 1) / parts_;
    const Team team{first,
                    count,
                    r0,
                    r1,
                    (r1 - r0) * wide_.kernel * L,
                    Lanes(p_.input, s_.group_out(), s_.group_in(), s_.out_channels, first, count),
                    Lanes(p_.output, 1, 1, s_.out_channels, first, count)};
    std::memset(w.chains, 0, count * chains_of<T> * team.sums * sizeof(E));
    for (int64_t b = 0; b < count; ++b)
      read_totals<T>(p_, (first + b) * L, r0 * wide_.kernel, team.sums / L,
                     w.totals + b * team.sums);
    for (int64_t n = 0; n < s_.batch; ++n) {
      for (int64_t i = 0; i < panel_.extent[0] * panel_.extent[1]; ++i) w.held[i] = -1;
      int64_t number = 0;  // of the sample's terms
      for (int64_t d = 0; d < deep_.out; ++d)
        for (int64_t h = 0; h < high_.out; h += band_)
          for (int64_t x = 0; x < wide_.out; x += width_) {
            const Band band{n, d, h, least(band_, high_.out - h), x, least(width_, wide_.out - x)};
            bring_inputs(team, band, w);
            bring_grads(team, band, w);
            const int64_t all = band.rows * band.pixels;
            for (int64_t done = 0, some; done < all; done += some, number += some) {
              some = least(all - done, G - number % G);
              add(team, done / band.pixels, done % band.pixels, band.pixels, number, some, w);
            }
          }
    }
    for (int64_t b = 0; b < count; ++b)
      write_totals<T>(p_, (first + b) * L, r0 * wide_.kernel, team.sums / L,
                      w.totals + b * team.sums);
    return count;
  }

  // What the pixels of a band read, unless it is there.
  void bring_inputs(const Team& team, const Band& band, const Workspace& w) const {
    const int64_t column = wide_.input_of(band.w, 0), columns = wide_.extent(band.pixels);
    const int64_t left = least(most(-column, 0), columns);
    const int64_t right = least(most(wide_.in - column, left), columns);
    const int64_t* const stride = p_.input.stride;
    const T* const inputs =
        static_cast<const T*>(p_.input.data) + band.n * stride[0] + (column + left) * stride[4];
    for (int64_t kd = 0; kd < deep_.kernel; ++kd) {
      const int64_t id = deep_.input_of(band.d, kd);
      const int64_t slice = id % panel_.extent[0] * panel_.extent[1];
      for (int64_t h = 0; h < band.rows; ++h)
        for (int64_t kh = 0; kh < high_.kernel; ++kh) {
          const E*& to = w.read[(h * deep_.kernel + kd) * high_.kernel + kh];
          const int64_t ih = high_.input_of(band.h + h, kh);
          to = nullptr;
          if (!deep_.holds_input(id) || !high_.holds_input(ih)) continue;
          const int64_t slot = slice + w.place[ih], row = (id * high_.in + ih) * wide_.out + band.w;
          E* const there = w.values + slot * panel_.row_pitch();
          to = there;
          if (w.held[slot] == row) continue;
          w.held[slot] = row;
          fill_row(panel_, team.lanes, inputs + id * stride[2] + ih * stride[3], left, right,
                   columns, ahead(p_.input, deep_.in, high_.in, wide_.in, band.n, id, ih), true,
                   there);
        }
    }
  }
  void bring_grads(const Team& team, const Band& band, const Workspace& w) const {
    const int64_t* const stride = p_.output.stride;
    const T* const outputs = static_cast<const T*>(p_.output.data) + band.n * stride[0] +
                             band.d * stride[2] + band.w * stride[4];
    const bool one_run = band.pixels == wide_.out && stride[3] == wide_.out * stride[4];
    const int64_t runs = one_run ? 1 : band.rows;
    const int64_t run = one_run ? band.rows * band.pixels : band.pixels;
    for (int64_t h = 0; h < runs; ++h)
      fill_row(grad_panel_, team.grad_lanes, outputs + (band.h + h) * stride[3], 0, run, run,
               ahead(p_.output, deep_.out, high_.out, wide_.out, band.n, band.d, band.h + h),
               one_run, w.grads + h * band.pixels * L);
  }
  // How far what is read some pixels later lies from row (d, h) of sample n.
  int64_t ahead(const RawView& view, int64_t slices, int64_t rows, int64_t pixels, int64_t n,
                int64_t d, int64_t h) const {
    int64_t step = most(pixels_ahead / pixels, 1), distance = 0;
    if (h + step >= rows) {
      step = least(h + step - rows, rows - 1) - h;
      if (d + 1 < slices)
        distance = view.stride[2];
      else if (n + 1 < s_.batch)
        distance = view.stride[0] - d * view.stride[2];
      else
        step = 0;
    }
    return distance + step * view.stride[3];
  }

  // The products of `some` pixels, with numbers from `number` on, of which the first is pixel
  // `from` of row `row` of the panel, whose rows have `pixels`.
  void add(const Team& team, int64_t row, int64_t from, int64_t pixels, int64_t number,
           int64_t some, const Workspace& w) const {
    const bool closes = (number + some) % G == 0 || number + some == s_.outputs();
    for (int64_t b = 0; b < team.count; ++b) {
      E* const total = w.totals + b * team.sums;
      E* const chains = w.chains + b * chains_of<T> * team.sums;
      for (int c = 0; c < passes; ++c) {
        PixelRows<E> group = rows_of(team, b, c, row, from, pixels, number, some, w);
        group.begins = passes == 1 && number % G == 0;
        w.row_list[group.count - 1].closes = passes == 1 && closes;
        all_taps<C>(group, team.r1 - team.r0, wide_.kernel, wide_.dilation * L,
                    passes * wide_.stride * L, total, chains + c * team.sums, team.sums);
      }
      if (passes > 1 && closes) fold_chains<T>(team.sums, chains, total);
    }
  }
  // The same pixels row by row, for block b and pass c.
  PixelRows<E> rows_of(const Team& team, int64_t b, int c, int64_t row, int64_t from,
                       int64_t pixels, int64_t number, int64_t some, const Workspace& w) const {
    PixelRows<E> group{};
    group.row = w.row_list;
    group.grad_pitch = passes * L;
    group.number = number;
    group.end = number + some;
    const E** tap = w.taps;
    for (int64_t done = 0; done < some; ++row, from = 0) {
      const int64_t piece = least(pixels - from, some - done);
      const int64_t at = from + (number + done + c) % passes;
      PixelRow<E>& one = w.row_list[group.count++];
      one = {};
      one.grad = w.grads + b * grad_panel_.block_pitch() + (row * pixels + at) * L;
      one.middle = up(from + piece - at, passes);
      one.taps = tap;
      const E* const* const read = w.read + row * plane_rows_;
      int64_t q = team.r0 % plane_rows_, plane = team.r0 / plane_rows_ * panel_.plane_pitch();
      for (int64_t r = team.r0; r < team.r1; ++r) {
        *tap++ = (read[q] ? read[q] + b * panel_.block_pitch() + plane : w.zeros) +
                 at * wide_.stride * L;
        if (++q == plane_rows_) q = 0, plane += panel_.plane_pitch();
      }
      done += piece;
    }
    return group;
  }

  const ConvProblem& p_;
  const ConvShape& s_;
  const Axis &deep_ = s_.axis[0], &high_ = s_.axis[1], &wide_ = s_.axis[2];
  const int64_t plane_rows_, all_rows_;  // rows of taps, of one plane and of all
  const int64_t blocks_;
  int64_t parts_ = 1, together_ = 1;
  PanelShape panel_, grad_panel_;
  int64_t band_, width_;  // rows, and pixels of a row, that the panels hold
};

template <class T>
bool few_channels_grad_weight(const ConvProblem& p) {
  using V = Vec<Total<T>>;
  const ConvShape& s = p.shape;
  const auto done = [](auto product) {
    if (!product.fits()) return false;
    product.run();
    return true;
  };
  if constexpr (chains_of<T> == 1 || V::registers == 32)
    if (done(InPlaceGradWeight<T>(p))) return true;
  if (s.group_out() >= V::lanes || s.group_in() * s.taps() > 1 << 13) return false;
  return done(PanelGradWeight<T>(p));
}

}  // namespace torch_naiveconv::TNC_ISA
