// grad_weight of few channels per group, lanes are channels. Start reading at
// few_channels_grad_weight, at the end; depthwise channels_last tensors are read where they lie
// (grad_weight_in_place), others through a panel.
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
};

// Rows of pixels, at most a group of terms.
template <class S>
struct PixelRows {
  const PixelRow<S>* row;
  int64_t count, grad_pitch;
  // For the pixels at the sides: how far the next tap and the next pixel are, how many columns
  // there are.
  int64_t tap_columns, pixel_columns, width;
  int64_t number, end;  // of the first pixel and behind the last: two chains take turns
  // Does a group of terms begin or end here? Then its chains start, or are added to the totals.
  bool begins = false, ends = false;
  Ahead input_ahead, grad_ahead;
};

// acc[i % chains][r][k] += the products of `pixels` pixels, `stride` columns apart; a vector is
// loaded once for all the pixels and taps that meet in it. Moves on to the next pixels.
template <class V, int stride, int pixels, int chains, int rows, int taps, class S>
TNC_INLINE void add_pixels(V (&acc)[chains][rows][taps], const S*& grad, int64_t grad_pitch,
                           const S* (&from)[rows], int64_t pitch) {
  constexpr int columns = (pixels - 1) * stride + taps;
  V g[pixels];
#pragma GCC unroll 8
  for (int i = 0; i < pixels; ++i, grad += grad_pitch) g[i] = V::load(grad);
#pragma GCC unroll 24
  for (int column = 0; column < columns; ++column)
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      V x = V::load(from[r]);
      if constexpr (pixels > 1) x = in_register(x);
      from[r] += pitch;
#pragma GCC unroll 8
      for (int i = 0; i < pixels; ++i) {
        const int k = column - i * stride;
        if (k >= 0 && k < taps) acc[i % chains][r][k] = fma(x, g[i], acc[i % chains][r][k]);
      }
    }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) from[r] += (pixels * stride - columns) * pitch;
}

// After one pixel: the other chain's turn.
template <class V, int chains, int rows, int taps>
TNC_INLINE void take_turns(V (&acc)[chains][rows][taps]) {
  if constexpr (chains == 2)
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
      for (int k = 0; k < taps; ++k) std::swap(acc[0][r][k], acc[1][r][k]);
}

// The same for pixels whose taps may read the padding.
template <class V, int stride, int chains, int rows, int taps, class S>
TNC_INLINE void add_side(V (&acc)[chains][rows][taps], const S*& grad, const PixelRows<S>& pixels,
                         int64_t count, int64_t& column, const S* (&from)[rows], int64_t pitch) {
  for (; count > 0; --count, column += pixels.pixel_columns, grad += pixels.grad_pitch) {
    const V g = V::load(grad);
#pragma GCC unroll 8
    for (int k = 0; k < taps; ++k) {
      const int64_t at = column + k * pixels.tap_columns;
      const bool there = at >= 0 && at < pixels.width;
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r)
        acc[0][r][k] = fma(there ? V::load(from[r] + k * pitch) : V::zero(), g, acc[0][r][k]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) from[r] += stride * pitch;
    take_turns(acc);
  }
}

// With 16 registers a tile has none left for that; the chains are added up apart.
template <class V>
constexpr bool folds_in_tile = V::registers == 32;

// Where the sums of some rows of taps are kept: total[r * row_pitch + tap][lane], in the same way
// the first chain and, chain_pitch behind it, the second.
template <class E>
struct TapSums {
  E *total, *chain;
  int64_t row_pitch, chain_pitch;
};

// The products of some rows of pixels with the rows of taps from `first` on: `rows` rows of `taps`
// taps, of which the first reads `shift` columns, or `offset` elements, further on.
template <int chains, int stride, int rows, int taps, class S>
void tap_tile(PixelRows<S>& pixels, int64_t first, int64_t offset, int64_t shift, int64_t pitch,
              TapSums<Total<S>> sums) {
  using V = Vec<Total<S>>;
  V acc[chains][rows][taps];
  const auto each = [&](const auto& what) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
      for (int k = 0; k < taps; ++k) what(r, k, r * sums.row_pitch + k * V::lanes);
  };
  // Where the chain is whose turn it is, and the other.
  const auto chain_of = [&](int64_t number, int q) __attribute__((always_inline)) {
    return sums.chain + (number + q) % chains * sums.chain_pitch;
  };
#pragma GCC unroll 2
  for (int q = 0; q < chains; ++q)
    if (folds_in_tile<V> && pixels.begins) {
      each([&](int r, int k, int64_t) __attribute__((always_inline)) { acc[q][r][k] = V::zero(); });
    } else {
      const Total<S>* const chain = chain_of(pixels.number, q);
      each([&](int r, int k, int64_t at)
               __attribute__((always_inline)) { acc[q][r][k] = V::load(chain + at); });
    }
  for (const PixelRow<S>* row = pixels.row; row < pixels.row + pixels.count; ++row) {
    const S* from[rows];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) from[r] = row->taps[first + r] + offset;
    const S* grad = row->grad;
    int64_t count = row->middle, column = row->column + shift;
    if (row->left > 0) add_side<V, stride>(acc, grad, pixels, row->left, column, from, pitch);
    const auto add = [&](auto pixels_at_once) __attribute__((always_inline)) {
      constexpr int some = pixels_at_once.value, lines = some * V::lanes * sizeof(S) / 64;
      for (; count >= some; count -= some) {
        pixels.input_ahead.fetch(lines * stride * stride);
        pixels.grad_ahead.fetch(lines);
        add_pixels<V, stride, some>(acc, grad, pixels.grad_pitch, from, pitch);
      }
    };
    if constexpr (V::registers == 32 && chains * rows * taps <= 21)
      add(std::integral_constant<int, 8>{});
    add(std::integral_constant<int, 4>{});
    for (; count > 0; --count) {
      add_pixels<V, stride, 1>(acc, grad, pixels.grad_pitch, from, pitch);
      take_turns(acc);
    }
    if (row->right > 0) {
      column += row->middle * pixels.pixel_columns;
      add_side<V, stride>(acc, grad, pixels, row->right, column, from, pitch);
    }
  }
  if (folds_in_tile<V> && pixels.ends) {
    each([&](int r, int k, int64_t at) __attribute__((always_inline)) {
      V chain[chains];
#pragma GCC unroll 2
      for (int q = 0; q < chains; ++q) chain[q] = acc[q][r][k];
      (V::load(sums.total + at) + sum_of(chain)).store(sums.total + at);
    });
    return;
  }
#pragma GCC unroll 2
  for (int q = 0; q < chains; ++q) {
    Total<S>* const chain = chain_of(pixels.end, q);
    each([&](int r, int k, int64_t at)
             __attribute__((always_inline)) { acc[q][r][k].store(chain + at); });
  }
}

// Tiles of `rows` x `taps` chains (twice as many if they take turns) that fit the registers, for
// the numbers of taps that occur in kernels; longer rows are cut.
constexpr int most_chains_of(int registers) { return registers == 32 ? 26 : 11; }

template <int chains, int stride, int taps, int rows, class S>
TNC_INLINE void tap_rows(PixelRows<S>& pixels, int64_t first, int64_t row_count, int64_t offset,
                         int64_t shift, int64_t pitch, TapSums<Total<S>> sums) {
  if constexpr (rows > 0) {
    for (; row_count - first >= rows; first += rows) {
      tap_tile<chains, stride, rows, taps>(pixels, first, offset, shift, pitch, sums);
      sums.chain += rows * sums.row_pitch;
      sums.total += rows * sums.row_pitch;
    }
    tap_rows<chains, stride, taps, rows - 1>(pixels, first, row_count, offset, shift, pitch, sums);
  }
}

// All `kernel` taps of `row_count` rows of taps: a tap's column is tap_pitch from the one before, a
// pixel's pixel_pitch.
template <int chains, class S>
void all_taps(PixelRows<S>& pixels, int64_t row_count, int64_t kernel, int64_t tap_pitch,
              int64_t pixel_pitch, Total<S>* total, Total<S>* chain, int64_t chain_pitch) {
  using V = Vec<Total<S>>;
  constexpr int L = V::lanes, most = most_chains_of(V::registers) / chains;
  int64_t k = 0;
  const auto rows_of = [&](auto stride, auto taps, int64_t pitch) __attribute__((always_inline)) {
    constexpr int fit = most / taps.value < 8 ? most / taps.value : 8;
    tap_rows<chains, stride.value, taps.value, fit>(
        pixels, 0, row_count, k * tap_pitch, k * pixels.tap_columns, pitch,
        TapSums<Total<S>>{total + k * L, chain + k * L, kernel * L, chain_pitch});
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

// Depthwise, channels_last. A thread has some blocks of channels and goes over bands of rows, block
// by block. A row of taps that lies in the padding adds products of the gradient with +0: all its
// taps the same sum.
template <class T>
bool grad_weight_in_place(const ConvProblem& p) {
  using E = Total<T>;
  using V = Vec<E>;
  constexpr int L = V::lanes, C = chains_of<T>;
  constexpr int64_t G = group_length<T>, most_rows = 64;
  const ConvShape& s = p.shape;
  const RawView &input = p.input, &output = p.output;
  const Axis &deep = s.axis[0], &high = s.axis[1], &wide = s.axis[2];
  const int64_t channels = s.groups, blocks = (channels + L - 1) / L;
  const int64_t plane_rows = deep.kernel * high.kernel, sums = s.taps() * L;
  if (s.group_in() != 1 || s.group_out() != 1 || input.stride[1] != 1 || output.stride[1] != 1 ||
      channels < L || blocks < thread_count() || plane_rows > most_rows)
    return false;
  // Rows, as many as read few enough lines that the first cache still has them for the next block.
  const int64_t extent = (high.kernel - 1) * high.dilation + 1;
  const int64_t band =
      most(1, (128 - (extent - high.stride) * wide.in) / (high.stride * wide.in + wide.out));
  const int64_t rows = deep.out * high.out;

  const auto work = [&](int64_t begin, int64_t end) {
    const int64_t count = end - begin;
    Arena& arena = task_arena();
    arena.reset(Arena::bytes_for<E>(count * sums) + Arena::bytes_for<E>(count * C * sums) +
                Arena::bytes_for<int64_t>(band * (plane_rows + 1)));
    E* const totals = arena.take<E>(count * sums);
    E* const chains = arena.take<E>(count * C * sums);
    // For each row of the band where what each row of taps reads lies, or -1; last its gradient.
    int64_t* const offsets = arena.take<int64_t>(band * (plane_rows + 1));
    const auto channel = [&](int64_t b) { return least((begin + b) * L, channels - L); };
    std::memset(chains, 0, count * C * sums * sizeof(E));
    for (int64_t b = 0; b < count; ++b)
      read_totals<T>(p, channel(b), 0, s.taps(), totals + b * sums);
    // The pixels of a row that read no padding lie between `left` and `right`.
    int64_t left = 0, right = wide.out;
    while (left < right && wide.input_of(left, 0) < 0) ++left;
    while (right > left && wide.input_of(right - 1, wide.kernel - 1) >= wide.in) --right;

    for (int64_t n = 0; n < s.batch; ++n) {
      const T* const sample = static_cast<const T*>(input.data) + n * input.stride[0];
      const T* const grads = static_cast<const T*>(output.data) + n * output.stride[0];
      for (int64_t first = 0; first < rows; first += band) {
        const int64_t last = least(first + band, rows);
        // What the next band reads first is fetched meanwhile, across the end of a sample too.
        const int64_t far = high.input_of((last - 1) % high.out, high.kernel - 1) + 1 +
                            deep.input_of((last - 1) / high.out, deep.kernel - 1) * high.in;
        const T* const input_ahead =
            sample + most(0, least(far, deep.in * high.in)) * input.stride[3];
        const T* const grad_ahead = grads + last * output.stride[3];
        for (int64_t at = first; at < last; ++at) {
          const int64_t d = at / high.out, h = at % high.out;
          int64_t* const row = offsets + (at - first) * (plane_rows + 1);
          row[plane_rows] = d * output.stride[2] + h * output.stride[3];
          for (int64_t r = 0; r < plane_rows; ++r) {
            const int64_t id = deep.input_of(d, r / high.kernel);
            const int64_t ih = high.input_of(h, r % high.kernel);
            row[r] = deep.holds_input(id) && high.holds_input(ih)
                         ? id * input.stride[2] + ih * input.stride[3]
                         : -1;
          }
        }
        for (int64_t b = 0; b < count; ++b) {
          E *const chain = chains + b * C * sums, *const total = totals + b * sums;
          for (int64_t at = first; at < last; ++at) {
            const int64_t* const row = offsets + (at - first) * (plane_rows + 1);
            const T* const grad = grads + row[plane_rows] + channel(b);
            // A block's share of as many rows as this one is of the band.
            const auto share = [&](const T* ahead, int64_t rows, int64_t row, int64_t columns) {
              const T* const from =
                  ahead + (at - first) * rows * row + (begin + b) * rows * columns * L;
              return Ahead{reinterpret_cast<const char*>(from),
                           reinterpret_cast<const char*>(from + rows * columns * L)};
            };
            PixelRow<T> part;
            PixelRows<T> pixels;
            pixels.row = &part;
            pixels.count = 1;
            pixels.grad_pitch = output.stride[4];
            pixels.tap_columns = wide.dilation;
            pixels.pixel_columns = wide.stride;
            pixels.width = wide.in;
            pixels.input_ahead = share(input_ahead, high.stride, input.stride[3], wide.in);
            pixels.grad_ahead = share(grad_ahead, 1, output.stride[3], wide.out);
            int64_t number = at * wide.out;
            for (int64_t w = 0; w < wide.out;) {
              const int64_t next = least(wide.out, w + G - number % G);
              part.grad = grad + w * output.stride[4];
              part.left = most(least(left, next) - w, 0);
              part.middle = most(least(right, next) - most(left, w), 0);
              part.right = next - w - part.left - part.middle;
              part.column = wide.input_of(w, 0);
              pixels.number = number;
              pixels.end = number + next - w;
              const bool closes =
                  (number + next - w) % G == 0 || number + next - w == rows * wide.out;
              pixels.begins = folds_in_tile<V> && number % G == 0;
              pixels.ends = folds_in_tile<V> && closes;
              const T* const corner = sample + channel(b) + part.column * input.stride[4];
              V nothing[C];  // what the products with the padding add up to
              for (V& sum : nothing) sum = V::zero();
              bool summed = false;
              for (int64_t r = 0; r < plane_rows;) {
                int64_t run = 1;
                while (r + run < plane_rows && (row[r + run] < 0) == (row[r] < 0)) ++run;
                if (row[r] >= 0) {
                  const T* start[most_rows];
                  for (int64_t i = 0; i < run; ++i) start[i] = corner + row[r + i];
                  part.taps = start;
                  all_taps<C>(pixels, run, wide.kernel, wide.dilation * input.stride[4],
                              wide.stride * input.stride[4], total + r * wide.kernel * L,
                              chain + r * wide.kernel * L, sums);
                } else {
                  for (int64_t i = 0; i < next - w && !summed; ++i) {
                    V& sum = nothing[(number + i) % C];
                    sum = fma(V::load(part.grad + i * pixels.grad_pitch), V::zero(), sum);
                  }
                  summed = true;
                  for (int64_t i = r * wide.kernel; i < (r + run) * wide.kernel; ++i) {
                    V sum[C];
                    for (int q = 0; q < C; ++q) {
                      E* const at = chain + q * sums + i * L;
                      sum[q] = pixels.begins ? nothing[q] : V::load(at) + nothing[q];
                      sum[q].store(at);
                    }
                    E* const at = total + i * L;
                    if (pixels.ends) (V::load(at) + sum_of(sum)).store(at);
                  }
                }
                r += run;
              }
              if (!folds_in_tile<V> && closes) fold_chains<T>(sums, chain, total);
              number += next - w;
              w = next;
            }
          }
        }
      }
    }
    for (int64_t b = 0; b < count; ++b)
      write_totals<T>(p, channel(b), 0, s.taps(), totals + b * sums);
  };
  const int64_t products = s.batch * s.outputs() * sums;
  parallel_for(blocks, 1 + worthwhile_products / (products + 1), environment_of<T>, work);
  return true;
}

constexpr int64_t band_pixels = 512;   // whose rows a panel holds, if they fit
constexpr int64_t pixels_ahead = 256;  // of a row, fetched into the second cache

template <class T>
bool few_channels_grad_weight(const ConvProblem& p) {
  using E = Total<T>;
  using Lanes = ChannelLanes<T>;
  constexpr int L = Vec<E>::lanes;
  constexpr int64_t G = group_length<T>;
  const ConvShape& s = p.shape;
  const int64_t planes = s.group_in(), kernel = s.axis[2].kernel;
  const int64_t plane_rows = s.axis[0].kernel * s.axis[1].kernel, all_rows = planes * plane_rows;
  // Two chains take turns in a tile if it has the registers, else each has a pass of its own.
  constexpr int C = Vec<E>::registers == 32 ? chains_of<T> : 1, passes = chains_of<T> / C;
  if constexpr (C == chains_of<T>)
    if (grad_weight_in_place<T>(p)) return true;
  if (s.group_out() >= L || all_rows * kernel > 1 << 13) return false;

  // A task is a block of channels, or a part of its rows of taps if there are few blocks; a thread
  // moves the blocks that it has side by side.
  const int64_t blocks = (s.out_channels + L - 1) / L, threads = thread_count();
  int64_t parts = 1;
  const auto rounds = [&] { return (blocks * parts + threads - 1) / threads; };
  while (parts < least(all_rows, 4) && rounds() * threads * 6 > blocks * parts * 7) ++parts;
  const int64_t together =
      parts > 1
          ? 1
          : least(least(Lanes::together(p.input, s.group_out()), Lanes::together(p.output, 1)),
                  blocks);
  // The panel holds the rows that a band of rows of pixels reads, row i in the place of row
  // i - extent; small slices it holds whole. Where one row is too long it holds a piece.
  const Axis &deep = s.axis[0], &high = s.axis[1], &wide = s.axis[2];
  const auto extent = [](const Axis& a, int64_t pixels) {
    return (pixels - 1) * a.stride + (a.kernel - 1) * a.dilation + 1;
  };
  PanelShape panel{together, planes, {extent(deep, 1), 0, 0}, L};
  int64_t band = least(most(band_pixels / wide.out, 1), high.out), width = wide.out, pieces = 1;
  const auto bytes = [&] {
    panel.extent[1] = extent(high, band);
    panel.extent[2] = most(extent(wide, width), wide.pad + L);
    return panel.size() * static_cast<int64_t>(sizeof(E));
  };
  while (bytes() > panel_bytes && band > 1) --band;
  while (bytes() > panel_bytes && width > 1) width = (wide.out + pieces) / (pieces + 1), ++pieces;
  if (bytes() > panel_limit) return false;
  if (deep.kernel > 1 && panel.extent[1] < high.in &&
      bytes() / panel.extent[1] * high.in <= panel_bytes)
    panel.extent[1] = high.in;
  const PanelShape grad_panel{together, 1, {1, 1, most(band * width, L)}, L};
  // How far what is read some pixels later lies from row (d, h) of sample n.
  const auto ahead = [&](const RawView& view, int64_t slices, int64_t rows, int64_t pixels,
                         int64_t n, int64_t d, int64_t h) {
    int64_t step = most(pixels_ahead / pixels, 1), distance = 0;
    if (h + step >= rows) {
      step = least(h + step - rows, rows - 1) - h;
      if (d + 1 < slices)
        distance = view.stride[2];
      else if (n + 1 < s.batch)
        distance = view.stride[0] - d * view.stride[2];
      else
        step = 0;
    }
    return distance + step * view.stride[3];
  };

  const auto work = [&](int64_t begin, int64_t end) {
    const int64_t sums = all_rows * kernel * L, slots = panel.extent[0] * panel.extent[1];
    Arena& arena = task_arena();
    arena.reset(Arena::bytes_for<E>(panel.size()) + Arena::bytes_for<E>(panel.row_pitch()) +
                Arena::bytes_for<E>(grad_panel.size()) + Arena::bytes_for<E>(together * sums) +
                Arena::bytes_for<E>(together * chains_of<T> * sums) +
                Arena::bytes_for<int64_t>(slots) + Arena::bytes_for<int64_t>(high.in) +
                Arena::bytes_for<const E*>(band * plane_rows) +
                Arena::bytes_for<const E*>(band * all_rows) + Arena::bytes_for<PixelRow<E>>(band));
    E* const values = arena.take<E>(panel.size());
    E* const zeros = arena.take<E>(panel.row_pitch());  // a row in the padding
    E* const grads = arena.take<E>(grad_panel.size());
    E* const totals = arena.take<E>(together * sums);
    E* const chains = arena.take<E>(together * chains_of<T> * sums);
    int64_t* const held = arena.take<int64_t>(slots);     // the row that is there
    int64_t* const place = arena.take<int64_t>(high.in);  // of a row in its slice of the panel
    // What each row of taps reads for a row of pixels, in the first plane of the first block (null:
    // padding), and for the pixels of a group.
    const E** const read = arena.take<const E*>(band * plane_rows);
    const E** const taps = arena.take<const E*>(band * all_rows);
    PixelRow<E>* const row_list = arena.take<PixelRow<E>>(band);
    std::memset(zeros, 0, panel.row_pitch() * sizeof(E));
    for (int64_t ih = 0; ih < high.in; ++ih) place[ih] = ih % panel.extent[1];
    for (int64_t task = begin; task < end;) {
      const int64_t first = task / parts, part = task % parts;
      const int64_t team = parts > 1 ? 1 : least(together, end - task);
      task += team;
      const int64_t r0 = all_rows * part / parts, r1 = all_rows * (part + 1) / parts;
      const int64_t count = (r1 - r0) * kernel * L;  // sums of a block
      const Lanes lanes(p.input, s.group_out(), planes, s.out_channels, first, team);
      const Lanes grad_lanes(p.output, 1, 1, s.out_channels, first, team);
      std::memset(chains, 0, team * chains_of<T> * count * sizeof(E));
      const auto channel = [&](int64_t b) { return (first + b) * L; };
      for (int64_t b = 0; b < team; ++b)
        read_totals<T>(p, channel(b), r0 * kernel, count / L, totals + b * count);

      // Rows [h0, h0 + rows) of slice d, `pixels` of each from w0 on: what they read is brought
      // into the panels.
      const auto bring = [&](int64_t n, int64_t d, int64_t h0, int64_t rows, int64_t w0,
                             int64_t pixels) {
        const int64_t column = wide.input_of(w0, 0), columns = extent(wide, pixels);
        const int64_t left = least(most(-column, 0), columns);
        const int64_t right = least(most(wide.in - column, left), columns);
        const T* const inputs = static_cast<const T*>(p.input.data) + n * p.input.stride[0] +
                                (column + left) * p.input.stride[4];
        for (int64_t kd = 0; kd < deep.kernel; ++kd) {
          const int64_t id = deep.input_of(d, kd), slice = id % panel.extent[0] * panel.extent[1];
          for (int64_t h = 0; h < rows; ++h)
            for (int64_t kh = 0; kh < high.kernel; ++kh) {
              const E*& to = read[(h * deep.kernel + kd) * high.kernel + kh];
              const int64_t ih = high.input_of(h0 + h, kh);
              to = nullptr;
              if (!deep.holds_input(id) || !high.holds_input(ih)) continue;
              const int64_t slot = slice + place[ih], row = (id * high.in + ih) * wide.out + w0;
              E* const there = values + slot * panel.row_pitch();
              to = there;
              if (held[slot] == row) continue;
              held[slot] = row;
              fill_row(panel, lanes, inputs + id * p.input.stride[2] + ih * p.input.stride[3], left,
                       right, columns, ahead(p.input, deep.in, high.in, wide.in, n, id, ih), true,
                       there);
            }
        }
        const T* const outputs = static_cast<const T*>(p.output.data) + n * p.output.stride[0] +
                                 d * p.output.stride[2] + w0 * p.output.stride[4];
        const bool one_run =
            pixels == wide.out && p.output.stride[3] == wide.out * p.output.stride[4];
        const int64_t runs = one_run ? 1 : rows, run = one_run ? rows * pixels : pixels;
        for (int64_t h = 0; h < runs; ++h)
          fill_row(grad_panel, grad_lanes, outputs + (h0 + h) * p.output.stride[3], 0, run, run,
                   ahead(p.output, deep.out, high.out, wide.out, n, d, h0 + h), one_run,
                   grads + h * pixels * L);
      };
      // The products of `count` pixels, with numbers from `number` on, of which the first is pixel
      // w of row h of the panel.
      const auto add = [&](int64_t h, int64_t w, int64_t pixels, int64_t number, int64_t some,
                           bool closes) {
        for (int64_t b = 0; b < team; ++b)
          for (int c = 0; c < passes; ++c) {
            PixelRows<E> group{};
            group.row = row_list;
            const E** tap = taps;
            for (int64_t done = 0, row = h, from = w; done < some; ++row, from = 0) {
              const int64_t piece = least(pixels - from, some - done);
              const int64_t at = from + (number + done + c) % passes;
              PixelRow<E>& one = row_list[group.count++];
              one = {};
              one.grad = grads + b * grad_panel.block_pitch() + (row * pixels + at) * L;
              one.middle = (from + piece - at + passes - 1) / passes;
              one.taps = tap;
              const E* const* const row_read = read + row * plane_rows;
              int64_t q = r0 % plane_rows, plane = r0 / plane_rows * panel.plane_pitch();
              for (int64_t r = r0; r < r1; ++r) {
                *tap++ = (row_read[q] ? row_read[q] + b * panel.block_pitch() + plane : zeros) +
                         at * wide.stride * L;
                if (++q == plane_rows) q = 0, plane += panel.plane_pitch();
              }
              done += piece;
            }
            group.grad_pitch = passes * L;
            group.number = number;
            group.end = number + some;
            group.begins = folds_in_tile<Vec<E>> && number % G == 0;
            group.ends = folds_in_tile<Vec<E>> && closes;
            all_taps<C>(group, r1 - r0, kernel, wide.dilation * L, passes * wide.stride * L,
                        totals + b * count, chains + (b * chains_of<T> + c) * count, count);
          }
        if (!folds_in_tile<Vec<E>> && closes)
          for (int64_t b = 0; b < team; ++b)
            fold_chains<T>(count, chains + b * chains_of<T> * count, totals + b * count);
      };

      for (int64_t n = 0; n < s.batch; ++n) {
        for (int64_t i = 0; i < slots; ++i) held[i] = -1;
        int64_t number = 0;  // of the sample's terms
        for (int64_t d = 0; d < deep.out; ++d)
          for (int64_t h = 0; h < high.out; h += band)
            for (int64_t w = 0; w < wide.out; w += width) {
              const int64_t rows = least(band, high.out - h), pixels = least(width, wide.out - w);
              bring(n, d, h, rows, w, pixels);
              for (int64_t done = 0; done < rows * pixels;) {
                const int64_t some = least(rows * pixels - done, G - number % G);
                add(done / pixels, done % pixels, pixels, number, some,
                    (number + some) % G == 0 || number + some == s.outputs());
                done += some;
                number += some;
              }
            }
      }
      for (int64_t b = 0; b < team; ++b)
        write_totals<T>(p, channel(b), r0 * kernel, count / L, totals + b * count);
    }
  };
  const int64_t products = s.batch * s.outputs() * L * all_rows * kernel / parts;
  parallel_for(blocks * parts, 1 + worthwhile_products / (products + 1), environment_of<T>, work);
  return true;
}

}  // namespace torch_naiveconv::TNC_ISA
