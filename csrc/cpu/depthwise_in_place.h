// Forward and grad_input of depthwise channels_last tensors: lanes are channels, and the source is
// read where it lies. Start reading at map_in_place.
//
// A task is a row of the result; it goes over it in tiles of up to 8 pixels, all channels of a tile
// before the next, so that memory is touched in its order. Rows of taps beyond the tensor are left
// out, which is exact for finite weights. Tiles at the ends of a row, which may read beyond it,
// copy what they read into a small zero-padded border first.
#pragma once

#include "depthwise_blocks.h"

namespace torch_naiveconv::TNC_ISA {

// Runs know their row of taps and their distance in pixels.
template <class T>
struct RowsSource {
  const T* const* row;  // of taps: what it reads at the tile's first pixel
  int64_t step, pixel;

  TNC_INLINE const T* of(const MapRun& r) const {
    return row[r.row] ? row[r.row] + r.source * pixel : nullptr;
  }
};

template <class T>
bool map_in_place(const ConvProblem& p) {
  using E = Total<T>;
  using V = Vec<E>;
  constexpr int L = V::lanes;
  constexpr int64_t widest_tile = 8, most_rows = 64;
  const ConvShape& s = p.shape;
  const bool transposed = p.direction == Direction::grad_input;
  const int64_t channels = s.groups, blocks = (channels + L - 1) / L, numbers = s.taps();
  const RawView& source = transposed ? p.output : p.input;
  const RawView& written = transposed ? p.input : p.output;
  MapAxis axis[3];
  for (int a = 0; a < 3; ++a) axis[a] = MapAxis::of(s.axis[a], transposed);
  const int64_t phases[3] = {axis[0].phases(), axis[1].phases(), axis[2].phases()};
  const int64_t phase_count = phases[0] * phases[1] * phases[2];
  const int64_t rows_of_taps = axis[0].kernel * axis[1].kernel;
  const int64_t reach = (axis[2].kernel - 1) * axis[2].dilation;
  if (s.group_in() != 1 || s.group_out() != 1 || source.stride[1] != 1 || written.stride[1] != 1 ||
      channels < L || axis[2].source < 5 * reach || axis[2].period > 1 ||
      rows_of_taps > most_rows || phase_count > 4096)
    return false;

  const int64_t most_chains = chains_of<T> * (numbers / group_length<T> + 1) * phase_count;
  Arena& plan = plan_arena();
  plan.reset(Arena::bytes_for<E>(blocks * numbers * L) + Arena::bytes_for<MapRun>(numbers) +
             Arena::bytes_for<int32_t>(most_chains) + Arena::bytes_for<int32_t>(phase_count + 1) +
             Arena::bytes_for<E>(channels));
  E* const weights = plan.take<E>(blocks * numbers * L);
  TermLists lists;
  lists.runs = plan.take<MapRun>(numbers);
  lists.chain_end = plan.take<int32_t>(most_chains);
  lists.phase_begin = plan.take<int32_t>(phase_count + 1);
  E* const bias = plan.take<E>(channels);
  if (!pack_weights<T>(p, channels, 1, 1, L, true, weights)) return false;
  for (int64_t c = 0; c < channels; ++c)
    bias[c] = p.bias ? widened(static_cast<const T*>(p.bias)[c]) : E(0);
  list_terms<T>(
      axis, phases, PanelShape{1, 1, {0, 0, 0}, L}, true,
      [&](int64_t phase, int64_t k) { return axis[2].shift(phase, k); }, lists);

  const int64_t period = axis[2].period, step = axis[2].step;
  const int64_t border_columns = (widest_tile - 1) * step + reach + 1;
  const auto work = [&](int64_t begin, int64_t end) {
    Arena& arena = task_arena();
    arena.reset(Arena::bytes_for<T>(rows_of_taps * border_columns * L));
    T* const border = arena.take<T>(rows_of_taps * border_columns * L);
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t h = piece % axis[1].written, d = piece / axis[1].written % axis[0].written;
      const int64_t n = piece / axis[1].written / axis[0].written;
      const int64_t qd = d % axis[0].period, qh = h % axis[1].period;
      const T* const sample = static_cast<const T*>(source.data) + n * source.stride[0];
      T* const to = static_cast<T*>(written.data) + n * written.stride[0] + d * written.stride[2] +
                    h * written.stride[3];
      const T* const ahead =  // the last row that the next row of the result reads
          sample + axis[0].base(d) * source.stride[2] +
          (axis[1].base(h) + axis[1].step +
           larger(axis[1].numerator(0), axis[1].numerator(axis[1].kernel - 1)) / axis[1].period) *
              source.stride[3];
      const T* row[most_rows];  // what each row of taps reads
      for (int64_t kd = 0; kd < axis[0].kernel; ++kd)
        for (int64_t kh = 0; kh < axis[1].kernel; ++kh) {
          const T*& start = row[kd * axis[1].kernel + kh];
          start = nullptr;
          if (!axis[0].meets(qd, kd) || !axis[1].meets(qh, kh)) continue;
          const int64_t at_d = axis[0].base(d) + axis[0].shift(qd, kd);
          const int64_t at_h = axis[1].base(h) + axis[1].shift(qh, kh);
          if (at_d >= 0 && at_d < axis[0].source && at_h >= 0 && at_h < axis[1].source)
            start = sample + at_d * source.stride[2] + at_h * source.stride[3];
        }
      for (int64_t qw = 0; qw < smaller(period, axis[2].written); ++qw) {
        const int64_t phase = (qd * phases[1] + qh) * phases[2] + qw;
        const int32_t chain = lists.phase_begin[phase], last = lists.phase_begin[phase + 1];
        // The columns that the taps of this phase read, from a pixel's base.
        int64_t nearest = INT64_MAX, farthest = INT64_MIN;
        for (int64_t k = 0; k < axis[2].kernel; ++k)
          if (axis[2].meets(qw, k)) {
            nearest = smaller(nearest, axis[2].shift(qw, k));
            farthest = larger(farthest, axis[2].shift(qw, k));
          }
        if (nearest > farthest) nearest = farthest = 0;
        const int64_t all = (axis[2].written - qw + period - 1) / period;
        int64_t left = 0, right = all;  // pixels between them read no padding
        while (left < all && axis[2].base(qw + left * period) + nearest < 0) ++left;
        while (right > left && axis[2].base(qw + (right - 1) * period) + farthest >= axis[2].source)
          --right;
        int64_t done = 0;
        const auto tile = [&](auto pixels) {
          constexpr int count = pixels.value;
          const int64_t base = axis[2].base(qw + done * period);
          const int64_t first = base + nearest, end = base + (count - 1) * step + farthest + 1;
          const bool inside = first >= 0 && end <= axis[2].source;
          const int64_t lead = lists.backwards ? count - 1 : 0;
          const int64_t sense = lists.backwards ? -1 : 1;
          const int64_t pixel = inside ? source.stride[4] : L;
          T* const out = to + (qw + (done + lead) * period) * written.stride[4];
          for (int64_t b = 0; b < blocks; ++b) {
            const int64_t channel = smaller(b * L, channels - L);
            if (channel * int64_t{sizeof(T)} % 64 == 0) {
              // The processor does not see rows coming that are read a few channels at a time.
              for (int64_t r = 0; r < axis[1].step; ++r)
                for (int64_t i = 0; i < count * step; ++i)
                  prefetch(ahead - r * source.stride[3] + (base + i) * source.stride[4] + channel);
              for (int i = 0; i < count; ++i)
                prefetch(out + channel + written.stride[3] * axis[1].period +
                         sense * i * period * written.stride[4]);
            }
            const T* start[most_rows];
            for (int64_t r = 0; r < rows_of_taps; ++r) {
              start[r] = nullptr;
              if (row[r] == nullptr) continue;
              if (inside) {
                start[r] = row[r] + channel + (base + lead * step) * pixel;
                continue;
              }
              T* const copy = border + r * border_columns * L;
              for (int64_t w = first; w < end; ++w) {
                const bool there = w >= 0 && w < axis[2].source;
                if (there)
                  std::memcpy(copy + (w - first) * L, row[r] + channel + w * source.stride[4],
                              L * sizeof(T));
                else
                  std::memset(static_cast<void*>(copy + (w - first) * L), 0, L * sizeof(T));
              }
              start[r] = copy + (lead * step - nearest) * L;
            }
            map_tile<T, count>(lists, chain, last, weights + b * numbers * L,
                               V::load(bias + channel),
                               RowsSource<T>{start, sense * step * pixel, pixel}, out + channel,
                               sense * period * written.stride[4], L);
          }
          done += count;
        };
        in_tiles(left, tile);
        in_tiles(right - left, tile);
        in_tiles(all - right, tile);
      }
    }
  };
  const int64_t products = axis[2].written * channels * numbers;
  parallel_for(s.batch * axis[0].written * axis[1].written,
               1 + worthwhile_products / (products + 1), environment_of<T>, work);
  return true;
}

}  // namespace torch_naiveconv::TNC_ISA
