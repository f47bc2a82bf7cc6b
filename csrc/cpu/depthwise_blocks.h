// Forward and grad_input of few channels per group, lanes are channels. Start reading at
// map_blocks, at the end.
//
//   chain[pixel] = fma(panel[pixel + tap], weight[tap], chain[pixel])
#pragma once

#include "depthwise_lanes.h"

namespace torch_naiveconv::TNC_ISA {

// acc[i] += the `length` taps at source + i * step. Sliding along the row, a vector is loaded once
// for all the taps of all the pixels that read it.
template <class V, int pixels, int length, class S, class E>
TNC_INLINE void add_run(V (&acc)[pixels], const S* source, int64_t step, const E* weights) {
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
                         int64_t step, Out* out, int64_t out_step, int lanes) {
  using V = Vec<Total<T>>;
  const auto run = [&](V(&acc)[pixels], int32_t c) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int i = 0; i < pixels; ++i) acc[i] = V::zero();
    const MapRun* const end = lists.runs + lists.chain_end[c];
    for (const MapRun* r = lists.runs + (c ? lists.chain_end[c - 1] : 0); r < end; ++r) {
      const Total<T>* const from = source + r->source;
      const Total<T>* const w = weights + r->weight;
      const auto add = [&](auto length) __attribute__((always_inline)) {
        add_run<V, pixels, length.value>(acc, from, step, w);
      };
      if constexpr (chains_of<T> == 2)
        add(std::integral_constant<int, 1>{});
      else if (r->length == 3)
        add(std::integral_constant<int, 3>{});
      else if (r->length == 4)
        add(std::integral_constant<int, 4>{});
      else if (r->length == 5)
        add(std::integral_constant<int, 5>{});
      else if (V::registers == 32 && r->length == 7)
        add(std::integral_constant<int, 7>{});
      else
        add(std::integral_constant<int, 1>{});
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
    const V result = result_of<T>(total[i] + bias);
    if (lanes == V::lanes)
      result.store(out + i * out_step);
    else
      result.store(out + i * out_step, lanes);
  }
}

// tile(n) with the constant n for as many tiles of up to 8 as make `count`.
template <class Tile>
TNC_INLINE void in_tiles(int64_t count, const Tile& tile) {
  for (; count >= 8; count -= 8) tile(std::integral_constant<int, 8>{});
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

// A row of `count` positions of a phase, in several blocks of channels.
template <class T>
struct BlockRow {
  int64_t count, phase, blocks;
  int last_lanes;  // of the last block
  const Total<T>*weights, *bias, *source;
  int64_t weights_pitch, source_pitch;  // from block to block
  int64_t source_step;                  // from position to position
};

// The blocks follow each other in `out`.
template <class T, class Out>
void map_row(const TermLists& lists, const BlockRow<T>& row, Out* out, int64_t out_step) {
  using V = Vec<Total<T>>;
  const int32_t begin = lists.phase_begin[row.phase], end = lists.phase_begin[row.phase + 1];
  const Total<T>* source = row.source;
  int64_t source_step = row.source_step;
  if (lists.backwards) {
    source += (row.count - 1) * source_step, source_step = -source_step;
    out += (row.count - 1) * out_step, out_step = -out_step;
  }
  in_tiles(row.count, [&](auto pixels) __attribute__((always_inline)) {
    for (int64_t b = 0; b < row.blocks; ++b)
      map_tile<T, pixels.value>(lists, begin, end, row.weights + b * row.weights_pitch,
                                V::load(row.bias + b * V::lanes), source + b * row.source_pitch,
                                source_step, out + b * V::lanes, out_step,
                                b + 1 == row.blocks ? row.last_lanes : V::lanes);
    source += pixels.value * source_step;
    out += pixels.value * out_step;
  });
}

template <class T>
bool map_blocks(const ConvProblem& p) {
  using E = Total<T>;
  using Lanes = ChannelLanes<T>;
  constexpr int L = Vec<E>::lanes;
  const ConvShape& s = p.shape;
  const bool transposed = p.direction == Direction::grad_input;
  const int64_t group = transposed ? s.group_in() : s.group_out();  // written channels of a group
  const int64_t planes = transposed ? s.group_out() : s.group_in();
  const int64_t channels = transposed ? s.in_channels : s.out_channels;
  const int64_t blocks = up(channels, L);
  if (group >= L) return false;
  const RawView& source = transposed ? p.output : p.input;
  const RawView& written = transposed ? p.input : p.output;
  const bool direct = written.stride[1] == 1;  // results go where they belong, a pixel a vector

  MapAxis axis[3];
  for (int a = 0; a < 3; ++a) axis[a] = MapAxis::of(s.axis[a], transposed);
  const int64_t phases[3] = {axis[0].phases(), axis[1].phases(), axis[2].phases()};
  const int64_t phase_count = phases[0] * phases[1] * phases[2], numbers = planes * s.taps();
  const int64_t together = direct ? least(Lanes::together(source, group), blocks) : 1;
  PanelShape panel{together, planes, {}, L};
  Chunks chunks;
  if (phase_count > 4096 || numbers > 1 << 16 ||
      !choose_chunks(axis, sizeof(E), panel_bytes, widest_map_chunk, chunks, panel))
    return false;

  Arena& plan = plan_arena();
  plan.reset(Arena::bytes_for<E>(blocks * numbers * L) + Arena::bytes_for<E>(blocks * L) +
             TermLists::bytes_for<T>(numbers, phase_count));
  E* const weights = plan.take<E>(blocks * numbers * L);
  E* const bias = plan.take<E>(blocks * L);
  TermLists lists = TermLists::take<T>(plan, numbers, phase_count);
  if (!pack_weights<T>(p, channels, group, planes, L, false, weights) && transposed) return false;
  for (int64_t c = 0; c < blocks * L; ++c)
    bias[c] = p.bias && c < channels ? widened(static_cast<const T*>(p.bias)[c]) : E(0);
  list_terms<T>(
      axis, phases, panel, true,
      [&](int64_t phase, int64_t k) { return axis[2].shift(phase, k) * L; }, lists);

  const int64_t teams = up(blocks, together);
  const auto work = [&](int64_t begin, int64_t end) {
    Arena& arena = task_arena();
    arena.reset(Arena::bytes_for<E>(panel.size()) + Arena::bytes_for<E>(chunks.size[2] * L));
    E* const values = arena.take<E>(panel.size());
    E* const staged = arena.take<E>(chunks.size[2] * L);
    for (int64_t piece = begin; piece < end; ++piece) {
      const Chunk chunk = chunks.chunk(piece / teams % chunks.total());
      const int64_t n = piece / teams / chunks.total();
      const int64_t first = piece % teams * together, count = least(together, blocks - first);
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
          for (int64_t i = 0; i < least(period, chunk.size[2]); ++i) {
            const int64_t w = chunk.begin[2] + i;
            const auto run = [&](auto* out, int64_t out_step, int last_lanes) {
              const BlockRow<T> positions{.count = up(chunk.size[2] - i, period),
                                          .phase = row_phase + w % period,
                                          .blocks = count,
                                          .last_lanes = last_lanes,
                                          .weights = weights + first * numbers * L,
                                          .bias = bias + first * L,
                                          .source = row + axis[2].base(w) * L,
                                          .weights_pitch = numbers * L,
                                          .source_pitch = panel.block_pitch(),
                                          .source_step = axis[2].step * L};
              map_row(lists, positions, out + i * out_step, period * out_step);
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

}  // namespace torch_naiveconv::TNC_ISA
