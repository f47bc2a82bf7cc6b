// grad_weight of few channels per group, lanes are channels. Start reading at
// few_channels_grad_weight, at the end.
//
//   chain[tap] = fma(panel[pixel + tap], grad[pixel], chain[tap])
#pragma once

#include "depthwise_lanes.h"

namespace torch_naiveconv::TNC_ISA {

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
  if (!choose_chunks(axis, sizeof(E), panel_bytes, INT64_MAX, true, chunks, panel)) return false;
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

}  // namespace torch_naiveconv::TNC_ISA
