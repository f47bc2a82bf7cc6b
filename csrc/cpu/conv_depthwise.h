// Convolutions of few channels per group: depthwise, ResNeXt, small odd groups. Start reading at
// conv_depthwise, at the end.
//
// The lanes of a vector are channels of the tensor that is written, of as many groups as fit, so no
// lane is wasted however few channels a group has. Sources are first copied into a panel
// [source channel of the group][d][h][w][lane], zero-padded, in which lane l holds what its own
// group reads: NCHW is transposed on the way, channels_last copied, 16-bit types are widened. After
// that every tap of every direction is one aligned vector at a fixed distance:
//
//   forward, grad_input   chain[pixel] = fma(panel[pixel + tap], weight[tap], chain[pixel])
//   grad_weight           chain[tap]   = fma(panel[pixel + tap], grad[pixel], chain[tap])
//
// A strided grad_input is a set of stride-1 maps, one per phase (position modulo stride), each
// with the taps that meet it. Groups of terms and the two chains of 16-bit types are those of
// spec/arithmetic.h; the worker's floating-point environment does the flushing.
#pragma once

#include "pack.h"

namespace torch_naiveconv::TNC_ISA {

TNC_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
TNC_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
TNC_INLINE int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

template <class T>
constexpr int chains_of = is_half_type<T> ? 2 : 1;
template <class T>
constexpr FloatEnvironment::Mode environment_of =
    is_half_type<T> ? FloatEnvironment::flush : FloatEnvironment::gradual;

constexpr int64_t panel_bytes = 256 << 10;      // a panel's share of the L2 cache
constexpr int64_t panel_limit = 2 << 20;        // what a thread may take at most
constexpr int64_t widest_map_chunk = 128;       // pixels of a row, so that several rows fit
constexpr int64_t worthwhile_products = 50000;  // multiply-adds for which a thread is woken

// ---- lanes: which channels they stand for, and how those are moved
// -------------------------------

// Up to four blocks (vectors) of channels of the written tensor, and what they read in a tensor
// with `planes` channels for every `group` of them. channels_last memory is moved several blocks
// at a time: single vectors, a pixel apart, are more lines than the processor fetches ahead.
template <class T>
struct ChannelLanes {
  using E = Total<T>;
  using V = Vec<E>;
  static constexpr int L = V::lanes, most_blocks = 4;
  enum Kind { rows, adjacent, permuted, scattered };

  Kind kind;
  int64_t first, blocks, planes, channel_stride, w_stride;
  int64_t offset[most_blocks * L];  // of each lane's first channel; unused lanes repeat another's
  int last_count;                   // lanes in use of the last block
  int span = 1, last_span = 1;      // permuted: channels that a block, and the last one, reads
  int32_t index[L][L];              // permuted: for each plane the lanes' channels in that span

  // How many blocks are worth moving together.
  static int64_t together(const RawView& view, int64_t group) {
    return view.stride[1] == 1 && view.stride[4] != 1 && L % group == 0 ? most_blocks : 1;
  }

  ChannelLanes(const RawView& view, int64_t group, int64_t planes, int64_t channels, int64_t first,
               int64_t blocks)
      : first(first),
        blocks(blocks),
        planes(planes),
        channel_stride(view.stride[1]),
        w_stride(view.stride[4]),
        last_count(static_cast<int>(smaller(L, channels - (first + blocks - 1) * L))) {
    const int64_t count = (blocks - 1) * L + last_count;
    const int64_t base = first * L / group * planes;
    for (int64_t l = 0; l < blocks * L; ++l)
      offset[l] = l < count ? (first * L + l) / group * planes * channel_stride : offset[0];
    const int64_t last = (first * L + smaller(count, L) - 1) / group * planes + planes - 1;
    if (channel_stride == 1 && group == 1 && planes == 1)
      kind = adjacent;
    else if (w_stride == 1)
      kind = rows;
    else if (channel_stride == 1 && last - base < L)
      kind = permuted;
    else
      kind = scattered;
    if (kind == permuted) {
      span = static_cast<int>(last - base + 1);
      last_span = static_cast<int>(offset[count - 1] - offset[(blocks - 1) * L] + planes);
      for (int64_t j = 0; j < planes; ++j)
        for (int l = 0; l < L; ++l) index[j][l] = static_cast<int32_t>(offset[l] - offset[0] + j);
    }
  }

  // panel[block][plane][i][lane] = row[channel of (block, plane, lane)][i * w_stride], i < n.
  // What lies `ahead` is fetched next: the processor itself does not see it coming where the pieces
  // of memory are short.
  void fetch(const T* row, int64_t n, E* panel, int64_t block_pitch, int64_t plane_pitch,
             int64_t ahead) const {
    if (kind == adjacent) {
      for (int64_t i = 0; i < n; ++i) {
        const T* const from = row + offset[0] + i * w_stride;
        E* const to = panel + i * L;
        for (int64_t b = 0; b < blocks; ++b) prefetch(from + b * L + ahead);
        for (int64_t b = 0; b < blocks - 1; ++b) V::load(from + b * L).store(to + b * block_pitch);
        load_last(from + (blocks - 1) * L).store(to + (blocks - 1) * block_pitch);
      }
    } else if (kind == permuted) {
      for (int64_t i = 0; i < n; ++i)
        for (int64_t b = 0; b < blocks; ++b) {
          prefetch(row + offset[b * L] + i * w_stride + ahead);
          const V x =
              V::load(row + offset[b * L] + i * w_stride, b + 1 < blocks ? span : last_span);
          for (int64_t j = 0; j < planes; ++j)
            x.permute(index[j]).store(panel + b * block_pitch + j * plane_pitch + i * L);
        }
    } else {
      for (int64_t b = 0; b < blocks; ++b)
        for (int64_t j = 0; j < planes; ++j)
          fetch_plane(row + j * channel_stride, offset + b * L, n,
                      panel + b * block_pitch + j * plane_pitch);
    }
  }

  // row[channel of lane][i * w_stride] = panel[i][lane], rounded to T, for i < n; one block.
  void put(const E* panel, int64_t n, T* row) const {
    if (kind == rows) {
      for (int64_t i = 0; i < n; i += L) {
        const int m = static_cast<int>(smaller(L, n - i));
        V block[L];
#pragma GCC unroll 16
        for (int q = 0; q < L; ++q) block[q] = V::load(panel + (i + (q < m ? q : 0)) * L);
        V::transpose(block);
        if (m == L && last_count == L) {
#pragma GCC unroll 16
          for (int l = 0; l < L; ++l) block[l].store(row + offset[l] + i);
        } else {
#pragma GCC unroll 16
          for (int l = 0; l < L; ++l)
            if (l < last_count) block[l].store(row + offset[l] + i, m);
        }
      }
    } else {
      for (int64_t i = 0; i < n; ++i)
        for (int l = 0; l < last_count; ++l)
          V::load(panel + i * L + l, 1).store(row + i * w_stride + offset[l], 1);
    }
  }

 private:
  TNC_INLINE V load_last(const T* p) const {
    return last_count == L ? V::load(p) : V::load(p, last_count);
  }

  void fetch_plane(const T* row, const int64_t* lane, int64_t n, E* panel) const {
    if (kind == rows) {
      for (int64_t i = 0; i < n; i += L) {
        const int m = static_cast<int>(smaller(L, n - i));
        V block[L];
        if (m == L) {
#pragma GCC unroll 16
          for (int l = 0; l < L; ++l) block[l] = V::load(row + lane[l] + i);
        } else {
#pragma GCC unroll 16
          for (int l = 0; l < L; ++l) block[l] = V::load(row + lane[l] + i, m);
        }
        V::transpose(block);
        E* const to = panel + i * L;
        if (m == L) {
#pragma GCC unroll 16
          for (int q = 0; q < L; ++q) block[q].store(to + q * L);
        } else {
#pragma GCC unroll 16
          for (int q = 0; q < L; ++q)
            if (q < m) block[q].store(to + q * L);
        }
      }
    } else {
      for (int64_t i = 0; i < n; ++i)
        for (int l = 0; l < L; ++l)
          V::load(row + i * w_stride + lane[l], 1).store(panel + i * L + l, 1);
    }
  }
};

// ---- one axis of a map from a source to what is written
// ------------------------------------------

// Written position x reads, with tap k, source position (x * step + sign * (k * dilation - pad)) /
// period, if that division is exact. Forward: period 1. grad_input: step 1, sign -1.
struct MapAxis {
  int64_t written, source, kernel, step, period, sign, dilation, pad;

  static MapAxis of(const Axis& a, bool transposed) {
    return transposed ? MapAxis{a.in, a.out, a.kernel, 1, a.stride, -1, a.dilation, a.pad}
                      : MapAxis{a.out, a.in, a.kernel, a.stride, 1, 1, a.dilation, a.pad};
  }
  int64_t numerator(int64_t k) const { return sign * (k * dilation - pad); }
  int64_t phases() const { return smaller(period, written); }
  bool meets(int64_t phase, int64_t k) const { return (phase + numerator(k)) % period == 0; }
  // The distance from base(x) to the source position, the same for all x of a phase.
  int64_t shift(int64_t phase, int64_t k) const { return (phase + numerator(k)) / period; }
  int64_t base(int64_t x) const { return x / period * step; }

  // Source positions that the written range [begin, begin + n) may read.
  int64_t first_source(int64_t begin) const {
    return floor_div(begin * step + smaller(numerator(0), numerator(kernel - 1)), period);
  }
  int64_t source_extent(int64_t n) const {
    return ((n - 1) * step + (kernel - 1) * dilation) / period + (period > 1 ? 2 : 1);
  }
};

// ---- the panel: a chunk of source rows, [source channel][d][h][w][lane]
// ----------------------------

struct Chunk {
  int64_t begin[3], size[3];
};

// Numbers the chunks of at most `size` positions that cover a range of `whole`.
struct Chunks {
  int64_t whole[3], size[3], count[3];

  void cut() {
    for (int a = 0; a < 3; ++a) count[a] = (whole[a] + size[a] - 1) / size[a];
  }
  int64_t total() const { return count[0] * count[1] * count[2]; }
  Chunk chunk(int64_t i) const {
    const int64_t at[3] = {i / (count[2] * count[1]), i / count[2] % count[1], i % count[2]};
    Chunk b;
    for (int a = 0; a < 3; ++a) {
      b.begin[a] = at[a] * size[a];
      b.size[a] = smaller(size[a], whole[a] - b.begin[a]);
    }
    return b;
  }
};

// [block][source channel of the group][d][h][w][lane]
struct PanelShape {
  int64_t blocks, planes, extent[3], lanes;

  int64_t row_pitch() const { return extent[2] * lanes; }
  int64_t slice_pitch() const { return extent[1] * row_pitch(); }
  int64_t plane_pitch() const { return extent[0] * slice_pitch(); }
  int64_t block_pitch() const { return planes * plane_pitch(); }
  int64_t size() const { return blocks * block_pitch(); }
};

// Fills it with what the written positions of a chunk may read; outside the tensor +0.
template <class T>
void fill_panel(const PanelShape& shape, const ChannelLanes<T>& lanes, const RawView& view,
                int64_t n, const MapAxis* axis, const Chunk& chunk, Total<T>* panel) {
  using V = Vec<Total<T>>;
  int64_t first[3], need[3];
  for (int a = 0; a < 3; ++a) {
    first[a] = axis[a].first_source(chunk.begin[a]);
    need[a] = axis[a].source_extent(chunk.size[a]);
  }
  const int64_t left = smaller(larger(-first[2], 0), need[2]);
  const int64_t right = smaller(larger(axis[2].source - first[2], left), need[2]);
  const T* const sample = static_cast<const T*>(view.data) + n * view.stride[0];
  for (int64_t d = 0; d < need[0]; ++d)
    for (int64_t h = 0; h < need[1]; ++h) {
      const int64_t sd = first[0] + d, sh = first[1] + h;
      const bool inside = sd >= 0 && sd < axis[0].source && sh >= 0 && sh < axis[1].source;
      Total<T>* const row = panel + d * shape.slice_pitch() + h * shape.row_pitch();
      for (int64_t b = 0; b < lanes.blocks; ++b)
        for (int64_t j = 0; j < shape.planes; ++j) {
          Total<T>* const to = row + b * shape.block_pitch() + j * shape.plane_pitch();
          for (int64_t i = 0; i < (inside ? left : need[2]); ++i)
            V::zero().store(to + i * V::lanes);
          for (int64_t i = right; i < need[2]; ++i) V::zero().store(to + i * V::lanes);
        }
      if (inside)
        lanes.fetch(
            sample + sd * view.stride[2] + sh * view.stride[3] + (first[2] + left) * view.stride[4],
            right - left, row + left * V::lanes, shape.block_pitch(), shape.plane_pitch(),
            view.stride[3]);
    }
}

// ---- forward and grad_input
// ----------------------------------------------------------------------

// `length` taps, one after the other along w: distances in the panel and in the packed weights.
struct MapRun {
  int32_t source, weight, length;
};

// What the positions of one phase add up: runs of terms in chains, a chain (16-bit types: an even
// and an odd one) for each group that has a term.
struct TermLists {
  MapRun* runs;
  int32_t* chain_end;    // one per chain
  int32_t* phase_begin;  // first chain of each phase, and the end of the last
  bool sliding;          // tap k of pixel i and tap 0 of pixel i + k read the same vector
  bool backwards;        // ... counting pixels from right to left
};

constexpr int longest_run(int registers) { return registers == 32 ? 7 : 5; }

// acc[i] += the `length` taps at source + i * step. Sliding along the row, a vector is loaded once
// for all the taps of all the pixels that read it.
template <class V, class E, int pixels, int length>
TNC_INLINE void add_run(V (&acc)[pixels], const E* source, int64_t step, const E* weights) {
  V w[length];
#pragma GCC unroll 8
  for (int k = 0; k < length; ++k) w[k] = V::load(weights + k * V::lanes);
#pragma GCC unroll 16
  for (int u = 0; u < pixels + length - 1; ++u) {
    const V x = V::load(source + u * step);
#pragma GCC unroll 8
    for (int i = 0; i < pixels; ++i)
      if (i <= u && u - i < length) acc[i] = fma(x, w[u - i], acc[i]);
  }
}

// out[i] = bias + the sum over chains [chain, last), for `pixels` positions.
template <class T, int pixels, class Out>
TNC_INLINE void map_tile(const TermLists& lists, int32_t chain, int32_t last,
                         const Total<T>* weights, Vec<Total<T>> bias, const Total<T>* source,
                         int64_t source_step, Out* out, int64_t out_step, int lanes) {
  using V = Vec<Total<T>>;
  const auto run = [&](V(&acc)[pixels], int32_t c) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int i = 0; i < pixels; ++i) acc[i] = V::zero();
    const MapRun* const end = lists.runs + lists.chain_end[c];
    for (const MapRun* r = lists.runs + (c ? lists.chain_end[c - 1] : 0); r < end; ++r) {
      const Total<T>*const from = source + r->source, *const w = weights + r->weight;
      if constexpr (chains_of<T> == 1) {
        if (r->length == 3) {
          add_run<V, Total<T>, pixels, 3>(acc, from, source_step, w);
          continue;
        }
        if (r->length == 5) {
          add_run<V, Total<T>, pixels, 5>(acc, from, source_step, w);
          continue;
        }
        if (longest_run(V::registers) == 7 && r->length == 7) {
          add_run<V, Total<T>, pixels, 7>(acc, from, source_step, w);
          continue;
        }
      }
      add_run<V, Total<T>, pixels, 1>(acc, from, source_step, w);
    }
  };
  V total[pixels];
#pragma GCC unroll 8
  for (int i = 0; i < pixels; ++i) total[i] = V::zero();
  for (; chain < last; chain += chains_of<T>) {
    V acc[pixels];
    run(acc, chain);
    if constexpr (chains_of<T> == 2) {
      V odd[pixels];
      run(odd, chain + 1);
#pragma GCC unroll 8
      for (int i = 0; i < pixels; ++i) acc[i] = acc[i] + odd[i];
    }
#pragma GCC unroll 8
    for (int i = 0; i < pixels; ++i) total[i] = total[i] + acc[i];
  }
#pragma GCC unroll 8
  for (int i = 0; i < pixels; ++i) {
    const V result = canonical(total[i] + bias);
    if (lanes == V::lanes)
      result.store(out + i * out_step);
    else
      result.store(out + i * out_step, lanes);
  }
}

// A row of `count` positions of several blocks, which follow each other in `out`.
template <class T, class Out>
void map_row(int64_t count, const TermLists& lists, int64_t phase, const PanelShape& panel,
             int64_t blocks, int last_lanes, const Total<T>* weights, int64_t weights_pitch,
             const Total<T>* bias, const Total<T>* source, int64_t source_step, Out* out,
             int64_t out_step, int64_t out_pitch) {
  using V = Vec<Total<T>>;
  const int32_t begin = lists.phase_begin[phase], end = lists.phase_begin[phase + 1];
  if (lists.backwards) {
    source += (count - 1) * source_step, source_step = -source_step;
    out += (count - 1) * out_step, out_step = -out_step;
  }
  const auto tile = [&](auto pixels) __attribute__((always_inline)) {
    for (int64_t b = 0; b < blocks; ++b)
      map_tile<T, pixels.value>(lists, begin, end, weights + b * weights_pitch,
                                V::load(bias + b * V::lanes), source + b * panel.block_pitch(),
                                source_step, out + b * out_pitch, out_step,
                                b + 1 == blocks ? last_lanes : V::lanes);
    source += pixels.value * source_step;
    out += pixels.value * out_step;
    count -= pixels.value;
  };
  while (count >= 8) tile(std::integral_constant<int, 8>{});
  switch (count) {
    case 7: return tile(std::integral_constant<int, 7>{});
    case 6: return tile(std::integral_constant<int, 6>{});
    case 5: return tile(std::integral_constant<int, 5>{});
    case 4: return tile(std::integral_constant<int, 4>{});
    case 3: return tile(std::integral_constant<int, 3>{});
    case 2: return tile(std::integral_constant<int, 2>{});
    case 1: return tile(std::integral_constant<int, 1>{});
  }
}

// The lists of all phases. A tap that no position of a phase meets keeps its number.
template <class T>
void list_terms(const MapAxis* axis, const int64_t* phases, const PanelShape& panel,
                TermLists& lists) {
  int32_t count = 0, chain = 0;
  int64_t phase = 0;
  lists.phase_begin[0] = 0;
  lists.sliding = axis[2].period == 1 && axis[2].dilation == axis[2].step && chains_of<T> == 1;
  lists.backwards = lists.sliding && axis[2].sign < 0;
  const int64_t kernel[3] = {axis[0].kernel, axis[1].kernel, axis[2].kernel};
  const int64_t numbers = panel.planes * kernel[0] * kernel[1] * kernel[2];
  // How many terms from this one on are one run: it ends with the row of taps and with the group.
  const auto run_length = [&](int64_t number, int64_t end) -> int64_t {
    const int64_t most = smaller(kernel[2] - number % kernel[2], end - number);
    if (!lists.sliding || most < 3) return 1;
    return smaller((most - 1) / 2 * 2 + 1, longest_run(Vec<Total<T>>::registers));
  };
  for (int64_t qd = 0; qd < phases[0]; ++qd)
    for (int64_t qh = 0; qh < phases[1]; ++qh)
      for (int64_t qw = 0; qw < phases[2]; ++qw) {
        for (int64_t group = 0; group < numbers; group += group_length<T>) {
          const int64_t end = smaller(group + group_length<T>, numbers);
          const int32_t before = count;
          for (int parity = 0; parity < chains_of<T>; ++parity) {
            int64_t length = 1;
            for (int64_t number = group + parity; number < end; number += length * chains_of<T>) {
              const Position k =
                  Position::of(number, panel.planes, kernel[0], kernel[1], kernel[2]);
              length = run_length(number, end);
              if (!axis[0].meets(qd, k.d) || !axis[1].meets(qh, k.h) || !axis[2].meets(qw, k.w))
                continue;
              const int64_t source =
                  k.c * panel.plane_pitch() + axis[0].shift(qd, k.d) * panel.slice_pitch() +
                  axis[1].shift(qh, k.h) * panel.row_pitch() + axis[2].shift(qw, k.w) * panel.lanes;
              lists.runs[count++] = {static_cast<int32_t>(source),
                                     static_cast<int32_t>(number * panel.lanes),
                                     static_cast<int32_t>(length)};
            }
            lists.chain_end[chain + parity] = count;
          }
          if (count > before) chain += chains_of<T>;  // a group without terms adds nothing
        }
        lists.phase_begin[++phase] = chain;
      }
}

// The largest chunks of written positions whose panel fits: long rows first, then rows, then
// slices. `in_order`: chunks, one after the other, must be the positions in their order; so nothing
// but the first cut axis is longer than one. Returns false if not even one position's panel fits.
inline bool choose_chunks(const MapAxis* axis, int64_t element_bytes, bool in_order, Chunks& chunks,
                          PanelShape& panel) {
  const auto bytes = [&] {
    for (int a = 0; a < 3; ++a) panel.extent[a] = axis[a].source_extent(chunks.size[a]);
    return panel.size() * element_bytes;
  };
  for (int a = 0; a < 3; ++a) chunks.whole[a] = axis[a].written, chunks.size[a] = 1;
  if (bytes() > panel_limit) return false;
  for (int a = 2; a >= 0; --a) {
    int64_t low = 1, high = chunks.whole[a];
    if (a == 2 && !in_order) high = smaller(high, widest_map_chunk);
    if (in_order && a < 2 && chunks.count[a + 1] > 1) high = 1;
    while (low < high) {
      chunks.size[a] = (low + high + 1) / 2;
      if (bytes() <= panel_bytes)
        low = chunks.size[a];
      else
        high = chunks.size[a] - 1;
    }
    const int64_t pieces = (chunks.whole[a] + low - 1) / low;  // evenly: no sliver at the end
    chunks.size[a] = (chunks.whole[a] + pieces - 1) / pieces;
    chunks.count[a] = pieces;
  }
  bytes();
  return true;
}

// weights[block][term number][lane]; false if grad_input has a weight that is not finite: beyond
// the edge the panel has zeros where its definition has no term.
template <class T>
bool pack_weights(const ConvProblem& p, int64_t channels, int64_t group, int64_t planes,
                  Total<T>* weights) {
  using V = Vec<Total<T>>;
  constexpr int L = V::lanes;
  const bool transposed = p.direction == Direction::grad_input;
  const int64_t numbers = planes * p.shape.taps(), blocks = (channels + L - 1) / L;
  const int64_t* const stride = p.weight.stride;
  const Axis* const axis = p.shape.axis;
  for (int64_t c = 0; c < blocks * L; ++c) {
    Total<T>* to = weights + c / L * numbers * L + c % L;
    const int64_t own = smaller(c, channels - 1);  // lanes that are not used repeat the last
    const T* filter = static_cast<const T*>(p.weight.data);
    filter +=
        transposed ? own / group * planes * stride[0] + own % group * stride[1] : own * stride[0];
    for (int64_t j = 0; j < planes; ++j, filter += stride[transposed ? 0 : 1])
      for (int64_t kd = 0; kd < axis[0].kernel; ++kd)
        for (int64_t kh = 0; kh < axis[1].kernel; ++kh)
          for (int64_t kw = 0; kw < axis[2].kernel; ++kw, to += L)
            *to = widened(filter[kd * stride[2] + kh * stride[3] + kw * stride[4]]);
  }
  if (!transposed) return true;
  V finite = V::zero();  // x * 0 is NaN for infinities and NaN
  for (int64_t i = 0; i < blocks * numbers * L; i += L)
    finite = fma(V::load(weights + i), V::zero(), finite);
  return !V::any(is_nan(finite));
}

template <class T>
bool few_channels_map(const ConvProblem& p) {
  using E = Total<T>;
  using Lanes = ChannelLanes<T>;
  constexpr int L = Vec<E>::lanes;
  const ConvShape& s = p.shape;
  const bool transposed = p.direction == Direction::grad_input;
  const int64_t group = transposed ? s.group_in() : s.group_out();  // written channels of a group
  const int64_t planes = transposed ? s.group_out() : s.group_in();
  const int64_t channels = transposed ? s.in_channels : s.out_channels;
  const int64_t blocks = (channels + L - 1) / L;
  if (group >= L) return false;
  const RawView& source = transposed ? p.output : p.input;
  const RawView& written = transposed ? p.input : p.output;
  const bool direct = written.stride[1] == 1;  // results go where they belong, a pixel a vector

  MapAxis axis[3];
  for (int a = 0; a < 3; ++a) axis[a] = MapAxis::of(s.axis[a], transposed);
  const int64_t phases[3] = {axis[0].phases(), axis[1].phases(), axis[2].phases()};
  const int64_t phase_count = phases[0] * phases[1] * phases[2], numbers = planes * s.taps();
  const int64_t together = direct ? smaller(Lanes::together(source, group), blocks) : 1;
  PanelShape panel{together, planes, {}, L};
  Chunks chunks;
  if (phase_count > 4096 || numbers > 1 << 16 ||
      !choose_chunks(axis, sizeof(E), false, chunks, panel))
    return false;

  const int64_t most_chains = chains_of<T> * (numbers / group_length<T> + 1) * phase_count;
  Arena& plan = plan_arena();
  plan.reset(Arena::bytes_for<E>(blocks * numbers * L) + Arena::bytes_for<E>(blocks * L) +
             Arena::bytes_for<MapRun>(numbers) + Arena::bytes_for<int32_t>(most_chains) +
             Arena::bytes_for<int32_t>(phase_count + 1));
  E* const weights = plan.take<E>(blocks * numbers * L);
  E* const bias = plan.take<E>(blocks * L);
  TermLists lists;
  lists.runs = plan.take<MapRun>(numbers);
  lists.chain_end = plan.take<int32_t>(most_chains);
  lists.phase_begin = plan.take<int32_t>(phase_count + 1);
  if (!pack_weights<T>(p, channels, group, planes, weights)) return false;
  for (int64_t c = 0; c < blocks * L; ++c)
    bias[c] = p.bias && c < channels ? widened(static_cast<const T*>(p.bias)[c]) : E(0);
  list_terms<T>(axis, phases, panel, lists);

  const int64_t teams = (blocks + together - 1) / together;
  const auto work = [&](int64_t begin, int64_t end) {
    Arena& arena = task_arena();
    arena.reset(Arena::bytes_for<E>(panel.size()) + Arena::bytes_for<E>(chunks.size[2] * L));
    E* const values = arena.take<E>(panel.size());
    E* const staged = arena.take<E>(chunks.size[2] * L);
    for (int64_t piece = begin; piece < end; ++piece) {
      const Chunk chunk = chunks.chunk(piece / teams % chunks.total());
      const int64_t n = piece / teams / chunks.total();
      const int64_t first = piece % teams * together, count = smaller(together, blocks - first);
      const Lanes lanes(source, group, planes, channels, first, count);
      const Lanes written_lanes(written, 1, 1, channels, first, count);
      fill_panel<T>(panel, lanes, source, n, axis, chunk, values);
      const E* const origin = values - axis[0].first_source(chunk.begin[0]) * panel.slice_pitch() -
                              axis[1].first_source(chunk.begin[1]) * panel.row_pitch() -
                              axis[2].first_source(chunk.begin[2]) * L;
      const int64_t period = axis[2].period;
      for (int64_t d = chunk.begin[0]; d < chunk.begin[0] + chunk.size[0]; ++d)
        for (int64_t h = chunk.begin[1]; h < chunk.begin[1] + chunk.size[1]; ++h) {
          const E* const row =
              origin + axis[0].base(d) * panel.slice_pitch() + axis[1].base(h) * panel.row_pitch();
          T* const to = static_cast<T*>(written.data) + n * written.stride[0] +
                        d * written.stride[2] + h * written.stride[3] +
                        chunk.begin[2] * written.stride[4];
          const int64_t row_phase =
              (d % axis[0].period * phases[1] + h % axis[1].period) * phases[2];
          for (int64_t i = 0; i < smaller(period, chunk.size[2]); ++i) {
            const int64_t w = chunk.begin[2] + i;
            const auto run = [&](auto* out, int64_t out_step, int last_lanes) {
              map_row<T>((chunk.size[2] - i + period - 1) / period, lists, row_phase + w % period,
                         panel, count, last_lanes, weights + first * numbers * L, numbers * L,
                         bias + first * L, row + axis[2].base(w) * L, axis[2].step * L,
                         out + i * out_step, period * out_step, L);
            };
            if (direct)
              run(to + first * L, written.stride[4], written_lanes.last_count);
            else
              run(staged, L, L);
          }
          if (!direct) written_lanes.put(staged, chunk.size[2], to);
        }
    }
  };
  const int64_t products =
      chunks.size[0] * chunks.size[1] * chunks.size[2] * together * L * numbers;
  parallel_for(s.batch * chunks.total() * teams, 1 + worthwhile_products / (products + 1),
               environment_of<T>, work);
  return true;
}

// ---- grad_weight
// ---------------------------------------------------------------------------------

// chain[r][k] += the products of `count` pixels: rows of taps at distances row[r] in the panel, the
// taps of a row k_step apart.
template <class E, int rows, int taps>
void tap_tile(int64_t count, const E* grad, int64_t grad_step, const E* panel, const int64_t* row,
              int64_t k_step, int64_t panel_step, E* chain, int64_t chain_pitch) {
  using V = Vec<E>;
  V acc[rows][taps];
  const E* from[rows];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
    from[r] = panel + row[r];
#pragma GCC unroll 8
    for (int k = 0; k < taps; ++k) acc[r][k] = V::load(chain + r * chain_pitch + k * V::lanes);
  }
  for (int64_t i = 0; i < count; ++i) {
    const V g = V::load(grad);
    grad += grad_step;
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
      for (int k = 0; k < taps; ++k) acc[r][k] = fma(V::load(from[r] + k * k_step), g, acc[r][k]);
      from[r] += panel_step;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int k = 0; k < taps; ++k) acc[r][k].store(chain + r * chain_pitch + k * V::lanes);
}

// Tiles of `rows` x `taps` chains that fit the registers, for the numbers of taps that occur in
// kernels; longer rows are cut.
constexpr int most_chains_of(int registers) { return registers == 32 ? 28 : 12; }

template <class E, int taps, int rows>
TNC_INLINE void tap_rows(int64_t count, const E* grad, int64_t grad_step, const E* panel,
                         const int64_t* row, int64_t row_count, int64_t k_step, int64_t panel_step,
                         E* chain, int64_t chain_pitch) {
  if constexpr (rows > 0) {
    for (; row_count >= rows; row_count -= rows) {
      tap_tile<E, rows, taps>(count, grad, grad_step, panel, row, k_step, panel_step, chain,
                              chain_pitch);
      row += rows;
      chain += rows * chain_pitch;
    }
    tap_rows<E, taps, rows - 1>(count, grad, grad_step, panel, row, row_count, k_step, panel_step,
                                chain, chain_pitch);
  }
}

template <class E>
void all_taps(int64_t count, const E* grad, int64_t grad_step, const E* panel, const int64_t* row,
              int64_t row_count, int64_t kernel, int64_t k_step, int64_t panel_step, E* chain) {
  constexpr int L = Vec<E>::lanes, most = most_chains_of(Vec<E>::registers);
  const int64_t chain_pitch = kernel * L;
  int64_t k = 0;
  const auto rows_of = [&](auto taps) __attribute__((always_inline)) {
    constexpr int fit = most / taps.value < 8 ? most / taps.value : 8;
    tap_rows<E, taps.value, fit>(count, grad, grad_step, panel + k * k_step, row, row_count, k_step,
                                 panel_step, chain + k * L, chain_pitch);
    k += taps.value;
  };
  while (kernel - k >= 7) rows_of(std::integral_constant<int, 7>{});
  while (kernel - k >= 5) rows_of(std::integral_constant<int, 5>{});
  while (kernel - k >= 3) rows_of(std::integral_constant<int, 3>{});
  while (kernel - k >= 1) rows_of(std::integral_constant<int, 1>{});
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

template <class T>
bool few_channels_grad_weight(const ConvProblem& p) {
  using E = Total<T>;
  using Lanes = ChannelLanes<T>;
  constexpr int L = Vec<E>::lanes;
  constexpr int64_t G = group_length<T>;
  const ConvShape& s = p.shape;
  const int64_t planes = s.group_in(), kernel = s.axis[2].kernel;
  const int64_t plane_rows = s.axis[0].kernel * s.axis[1].kernel, all_rows = planes * plane_rows;
  const E* const earlier = static_cast<const E*>(p.total);
  if (s.group_out() >= L || all_rows * kernel > 1 << 13) return false;

  MapAxis axis[3], grad_axis[3];
  for (int a = 0; a < 3; ++a) {
    axis[a] = MapAxis::of(s.axis[a], false);
    grad_axis[a] = {axis[a].written, axis[a].written, 1, 1, 1, 1, 1, 0};
  }
  // A task is a block of channels, or a part of its rows of taps if there are few blocks; a thread
  // moves the blocks that it has side by side.
  const int64_t blocks = (s.out_channels + L - 1) / L, threads = thread_count();
  int64_t parts = 1;
  const auto rounds = [&] { return (blocks * parts + threads - 1) / threads; };
  while (parts < smaller(all_rows, 4) && rounds() * threads * 6 > blocks * parts * 7) ++parts;
  const int64_t together =
      parts > 1
          ? 1
          : smaller(smaller(Lanes::together(p.input, s.group_out()), Lanes::together(p.output, 1)),
                    blocks);
  PanelShape panel{together, planes, {}, L}, grad_panel{together, 1, {}, L};
  Chunks chunks;
  if (!choose_chunks(axis, sizeof(E), true, chunks, panel)) return false;
  for (int a = 0; a < 3; ++a) grad_panel.extent[a] = chunks.size[a];

  // The distance of each row of taps in the panel.
  Arena& plan = plan_arena();
  plan.reset(Arena::bytes_for<int64_t>(all_rows));
  int64_t* const row = plan.take<int64_t>(all_rows);
  for (int64_t r = 0; r < all_rows; ++r)
    row[r] = r / plane_rows * panel.plane_pitch() +
             r % plane_rows / s.axis[1].kernel * s.axis[0].dilation * panel.slice_pitch() +
             r % s.axis[1].kernel * s.axis[1].dilation * panel.row_pitch();

  const auto work = [&](int64_t begin, int64_t end) {
    const int64_t sums = all_rows * kernel * L;
    Arena& arena = task_arena();
    arena.reset(Arena::bytes_for<E>(panel.size()) + Arena::bytes_for<E>(grad_panel.size()) +
                Arena::bytes_for<E>(together * sums) +
                Arena::bytes_for<E>(together * chains_of<T> * sums));
    E* const values = arena.take<E>(panel.size());
    E* const grads = arena.take<E>(grad_panel.size());
    E* const totals = arena.take<E>(together * sums);
    E* const chains = arena.take<E>(together * chains_of<T> * sums);
    for (int64_t task = begin; task < end;) {
      const int64_t first = task / parts, part = task % parts;
      const int64_t team = parts > 1 ? 1 : smaller(together, end - task);
      task += team;
      const int64_t r0 = all_rows * part / parts, r1 = all_rows * (part + 1) / parts;
      const int64_t count = (r1 - r0) * kernel * L;  // sums of a block
      const Lanes lanes(p.input, s.group_out(), planes, s.out_channels, first, team);
      const Lanes grad_lanes(p.output, 1, 1, s.out_channels, first, team);
      std::memset(chains, 0, team * chains_of<T> * count * sizeof(E));
      for (int64_t i = 0; i < team * count; ++i) {
        const int64_t oc = (first + i / count) * L + i % L, number = r0 * kernel + i % count / L;
        totals[i] =
            earlier && oc < s.out_channels ? earlier[oc * all_rows * kernel + number] : E(0);
      }
      const auto fold = [&] {
        for (int64_t b = 0; b < team; ++b)
          fold_chains<T>(count, chains + b * chains_of<T> * count, totals + b * count);
      };
      for (int64_t n = 0; n < s.batch; ++n) {
        int64_t number = 0;  // of the sample's terms
        for (int64_t i = 0; i < chunks.total(); ++i) {
          const Chunk chunk = chunks.chunk(i);
          fill_panel<T>(panel, lanes, p.input, n, axis, chunk, values);
          fill_panel<T>(grad_panel, grad_lanes, p.output, n, grad_axis, chunk, grads);
          for (int64_t d = 0; d < chunk.size[0]; ++d)
            for (int64_t h = 0; h < chunk.size[1]; ++h) {
              const E* const grad_row =
                  grads + d * grad_panel.slice_pitch() + h * grad_panel.row_pitch();
              const E* const panel_row = values + axis[0].base(d) * panel.slice_pitch() +
                                         axis[1].base(h) * panel.row_pitch();
              for (int64_t w = 0; w < chunk.size[2];) {
                const int64_t piece = smaller(chunk.size[2] - w, G - number % G);
                for (int64_t b = 0; b < team; ++b)
                  for (int c = 0; c < chains_of<T>; ++c) {
                    const int64_t at = w + ((number + c) % chains_of<T>);
                    const int64_t pixels = (w + piece - at + chains_of<T> - 1) / chains_of<T>;
                    all_taps<E>(
                        pixels, grad_row + b * grad_panel.block_pitch() + at * L, chains_of<T> * L,
                        panel_row + b * panel.block_pitch() + axis[2].base(at) * L, row + r0,
                        r1 - r0, kernel, s.axis[2].dilation * L, chains_of<T> * axis[2].step * L,
                        chains + (b * chains_of<T> + c) * count);
                  }
                w += piece;
                number += piece;
                if (number % G == 0) fold();
              }
            }
        }
        if (number % G != 0) fold();
      }
      const int64_t* const ws = p.weight.stride;
      for (int64_t i = 0; i < team * count; ++i) {
        const int64_t oc = (first + i / count) * L + i % L, number = r0 * kernel + i % count / L;
        if (oc >= s.out_channels) continue;
        const Position k = Position::of(number, planes, s.axis[0].kernel, s.axis[1].kernel, kernel);
        put_total<T>(totals[i], p.keep_total, p.weight.data,
                     oc * ws[0] + k.c * ws[1] + k.d * ws[2] + k.h * ws[3] + k.w * ws[4]);
      }
    }
  };
  const int64_t products = s.batch * s.outputs() * L * all_rows * kernel / parts;
  parallel_for(blocks * parts, 1 + worthwhile_products / (products + 1), environment_of<T>, work);
  return true;
}

// ---- which problems are taken
// --------------------------------------------------------------------

inline bool conv_depthwise(const ConvProblem& p) {
  const ConvShape& s = p.shape;
  if (s.groups <= 1 || s.batch == 0 || s.group_in() == 0 || s.group_out() == 0 || s.inputs() == 0 ||
      s.outputs() == 0 || s.taps() == 0)
    return false;
  bool taken = false;
  with_float_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    taken = p.direction == Direction::grad_weight ? few_channels_grad_weight<T>(p)
                                                  : few_channels_map<T>(p);
  });
  return taken;
}

}  // namespace torch_naiveconv::TNC_ISA
