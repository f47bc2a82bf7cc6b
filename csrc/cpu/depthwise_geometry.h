// Few channels per group: which source positions a written position reads, how a tensor is cut into
// chunks, and the list of terms of each output. Shared by the kernels of conv_depthwise.h.
#pragma once

#include "pack.h"

namespace torch_naiveconv::TNC_ISA {

TNC_INLINE int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

// What a group adds to a total.
template <class V, int chains>
TNC_INLINE V sum_of(const V (&chain)[chains]) {
  if constexpr (chains == 2)
    return chain[0] + chain[1];
  else
    return chain[0];
}

// A result that is stored as T: narrowing makes every NaN canonical anyway.
template <class T, class V>
TNC_INLINE V result_of(V sum) {
  if constexpr (is_half_type<T>)
    return sum;
  else
    return canonical(sum);
}

constexpr int64_t panel_bytes = 256 << 10;  // a panel's share of the L2 cache
constexpr int64_t panel_limit = 2 << 20;    // what a thread may take at most
constexpr int64_t widest_map_chunk = 128;   // pixels of a row, so that several rows fit

// Are the input and output more than the `held` bytes that the caches between a core and the memory
// are taken to hold? What they hold is read no sooner if it is asked for ahead, and asking costs as
// much as reading.
template <class T>
bool exceeds_caches(const ConvProblem& p, int64_t held) {
  const ConvShape& s = p.shape;
  const int64_t elements = s.in_channels * s.inputs() + s.out_channels * s.outputs();
  return s.batch * elements * static_cast<int64_t>(sizeof(T)) > held;
}

// Written position x reads, with tap k, source position (x * step + sign * (k * dilation - pad)) /
// period, if that division is exact. Forward: period 1. grad_input: step 1, sign -1.
struct MapAxis {
  int64_t written, source, kernel, step, period, sign, dilation, pad;

  static MapAxis of(const Axis& a, bool transposed) {
    return transposed ? MapAxis{a.in, a.out, a.kernel, 1, a.stride, -1, a.dilation, a.pad}
                      : MapAxis{a.out, a.in, a.kernel, a.stride, 1, 1, a.dilation, a.pad};
  }
  int64_t numerator(int64_t k) const { return sign * (k * dilation - pad); }
  int64_t phases() const { return least(period, written); }
  bool meets(int64_t phase, int64_t k) const { return (phase + numerator(k)) % period == 0; }
  // The distance from base(x) to the source position, the same for all x of a phase.
  int64_t shift(int64_t phase, int64_t k) const { return (phase + numerator(k)) / period; }
  int64_t base(int64_t x) const { return x / period * step; }

  // Source positions that the written range [begin, begin + n) may read.
  int64_t first_source(int64_t begin) const {
    return floor_div(begin * step + least(numerator(0), numerator(kernel - 1)), period);
  }
  int64_t source_extent(int64_t n) const {
    return ((n - 1) * step + (kernel - 1) * dilation) / period + (period > 1 ? 2 : 1);
  }
};

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
      b.size[a] = least(size[a], whole[a] - b.begin[a]);
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

// `length` taps, one after the other along w: distances in the panel and in the packed weights.
struct MapRun {
  int32_t source, weight, length;
};

// Of so many taps in a row, how many are one run: those that the kernels add at a time.
template <class V>
constexpr int64_t taps_of_run(int64_t left) {
  if (left < 3) return 1;
  if (left <= 5 || (left == 7 && V::registers == 32)) return left;
  return left <= 8 ? (left + 1) / 2 : 5;
}

// What the positions of one phase add up: runs of terms in chains, a chain (16-bit types: an even
// and an odd one) for each group that has a term.
struct TermLists {
  MapRun* runs;
  int32_t* chain_end;    // one per chain
  int32_t* phase_begin;  // first chain of each phase, and the end of the last
  bool sliding;          // tap k of pixel i and tap 0 of pixel i + k read the same vector
  bool backwards;        // ... counting pixels from right to left

  // What the lists of `numbers` terms take of an arena.
  template <class T>
  static size_t bytes_for(int64_t numbers, int64_t phases) {
    return Arena::bytes_for<MapRun>(numbers) +
           Arena::bytes_for<int32_t>(chains<T>(numbers, phases)) +
           Arena::bytes_for<int32_t>(phases + 1);
  }
  template <class T>
  static TermLists take(Arena& arena, int64_t numbers, int64_t phases) {
    TermLists lists{};
    lists.runs = arena.take<MapRun>(numbers);
    lists.chain_end = arena.take<int32_t>(chains<T>(numbers, phases));
    lists.phase_begin = arena.take<int32_t>(phases + 1);
    return lists;
  }

 private:
  template <class T>
  static int64_t chains(int64_t numbers, int64_t phases) {  // at most
    return chains_of<T> * (numbers / group_length<T> + 1) * phases;
  }
};

// The lists of all phases. A tap that no position of a phase meets keeps its number. `column` gives
// the distance of a tap along w; `in_runs` joins terms to runs where the tile slides along w.
template <class T, class Column>
void list_terms(const MapAxis* axis, const int64_t* phases, const PanelShape& panel, bool in_runs,
                const Column& column, TermLists& lists) {
  int32_t count = 0, chain = 0;
  int64_t phase = 0;
  lists.phase_begin[0] = 0;
  lists.sliding =
      in_runs && axis[2].period == 1 && axis[2].dilation == axis[2].step && chains_of<T> == 1;
  lists.backwards = lists.sliding && axis[2].sign < 0;
  const int64_t kernel[3] = {axis[0].kernel, axis[1].kernel, axis[2].kernel};
  const int64_t numbers = panel.planes * kernel[0] * kernel[1] * kernel[2];
  // How many terms from this one on are one run: it ends with the row of taps and with the group.
  const auto run_length = [&](int64_t number, int64_t end) -> int64_t {
    const int64_t left = least(kernel[2] - number % kernel[2], end - number);
    return lists.sliding ? taps_of_run<Vec<Total<T>>>(left) : 1;
  };
  for (int64_t qd = 0; qd < phases[0]; ++qd)
    for (int64_t qh = 0; qh < phases[1]; ++qh)
      for (int64_t qw = 0; qw < phases[2]; ++qw) {
        for (int64_t group = 0; group < numbers; group += group_length<T>) {
          const int64_t end = least(group + group_length<T>, numbers);
          const int32_t before = count;
          for (int parity = 0; parity < chains_of<T>; ++parity) {
            int64_t length = 1;
            for (int64_t number = group + parity; number < end; number += length * chains_of<T>) {
              const Position k =
                  Position::of(number, panel.planes, kernel[0], kernel[1], kernel[2]);
              length = run_length(number, end);
              if (!axis[0].meets(qd, k.d) || !axis[1].meets(qh, k.h) || !axis[2].meets(qw, k.w))
                continue;
              const int64_t source = k.c * panel.plane_pitch() +
                                     axis[0].shift(qd, k.d) * panel.slice_pitch() +
                                     axis[1].shift(qh, k.h) * panel.row_pitch() + column(qw, k.w);
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

// The largest chunks of written positions whose panel has at most `budget` bytes, or is as small as
// it can be: long rows (at most `widest`) first, then rows, then slices. Returns false if not even
// one position's panel fits.
inline bool choose_chunks(const MapAxis* axis, int64_t element_bytes, int64_t budget,
                          int64_t widest, Chunks& chunks, PanelShape& panel) {
  const auto bytes = [&] {
    for (int a = 0; a < 3; ++a) panel.extent[a] = axis[a].source_extent(chunks.size[a]);
    return panel.size() * element_bytes;
  };
  for (int a = 0; a < 3; ++a) chunks.whole[a] = axis[a].written, chunks.size[a] = 1;
  if (bytes() > panel_limit) return false;
  for (int a = 2; a >= 0; --a) {
    int64_t low = 1, high = chunks.whole[a];
    if (a == 2) high = least(high, widest);
    while (low < high) {
      chunks.size[a] = (low + high + 1) / 2;
      if (bytes() <= budget)
        low = chunks.size[a];
      else
        high = chunks.size[a] - 1;
    }
    const int64_t pieces = up(chunks.whole[a], low);  // evenly: no sliver at the end
    chunks.size[a] = up(chunks.whole[a], pieces);
    chunks.count[a] = pieces;
  }
  bytes();
  return true;
}

// weights[block][term number][lane]; `shifted`: the last block ends with the last channel. Says
// whether all are finite: only then does a term whose source is +0 add nothing, and grad_input is
// undefined beyond the edge, where panels have +0.
template <class T>
bool pack_weights(const ConvProblem& p, int64_t channels, int64_t group, int64_t planes,
                  int64_t lanes, bool shifted, Total<T>* weights) {
  using E = Total<T>;
  const bool transposed = p.direction == Direction::grad_input;
  const int64_t numbers = planes * p.shape.taps(), blocks = up(channels, lanes);
  const int64_t* const stride = p.weight.stride;
  const Axis* const axis = p.shape.axis;
  bool finite = true;
  for (int64_t c = 0; c < blocks * lanes; ++c) {
    E* to = weights + c / lanes * numbers * lanes + c % lanes;
    const int64_t own =
        shifted && c / lanes == blocks - 1 ? channels - lanes + c % lanes : least(c, channels - 1);
    const T* filter = static_cast<const T*>(p.weight.data);
    filter +=
        transposed ? own / group * planes * stride[0] + own % group * stride[1] : own * stride[0];
    for (int64_t j = 0; j < planes; ++j, filter += stride[transposed ? 0 : 1])
      for (int64_t kd = 0; kd < axis[0].kernel; ++kd)
        for (int64_t kh = 0; kh < axis[1].kernel; ++kh)
          for (int64_t kw = 0; kw < axis[2].kernel; ++kw, to += lanes) {
            *to = widened(filter[kd * stride[2] + kh * stride[3] + kw * stride[4]]);
            finite = finite && *to - *to == E(0);
          }
  }
  return finite;
}

}  // namespace torch_naiveconv::TNC_ISA
