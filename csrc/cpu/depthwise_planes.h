// Forward and grad_input of few channels per group where rows lie contiguously (NCHW): lanes are
// neighbouring pixels of a row. Start reading at map_planes, at the end.
//
// The planes that a group reads are copied, zero-padded and widened, into a panel
// [source channel][d][h][w]; every tap of a pixel is then a fixed distance away, and a vector of
// pixels one unaligned load:
//
//   chain[pixel] = fma(panel[pixel + tap], weight[tap], chain[pixel])
//
// A forward stride along w would read every second pixel; the panel's rows are split into the
// pixels of each remainder instead. The phases of a strided grad_input are computed apart and
// merged row by row.
#pragma once

#include "depthwise_tiling.h"

namespace torch_naiveconv::TNC_ISA {

constexpr int64_t planes_bytes = 48 << 10;  // of a panel: about the L1 cache

// to[row][i] = from[row][i]; n elements of which the last vectors may overlap.
template <class T>
void widen_rows(const T* from, int64_t from_pitch, int64_t rows, int64_t n, Total<T>* to,
                int64_t to_pitch) {
  using V = Vec<Total<T>>;
  constexpr int L = V::lanes;
  if (n < L) {
    for (; rows > 0; --rows, from += from_pitch, to += to_pitch)
      V::load(from, static_cast<int>(n)).store(to, static_cast<int>(n));
    return;
  }
  for (; rows > 0; --rows, from += from_pitch, to += to_pitch) {
    for (int64_t i = 0; i < n - L; i += L) V::load(from + i).store(to + i);
    V::load(from + n - L).store(to + n - L);
  }
}

// to[row][p % step * part + p / step] = from[row][p - begin], begin <= p < end.
template <class T>
void split_rows(const T* from, int64_t from_pitch, int64_t rows, int64_t begin, int64_t end,
                int64_t step, int64_t part, Total<T>* to, int64_t to_pitch) {
  using V = Vec<Total<T>>;
  constexpr int L = V::lanes;
  if (step == 1) return widen_rows(from, from_pitch, rows, end - begin, to + begin, to_pitch);
  const int64_t n = end - begin;
  for (; rows > 0; --rows, from += from_pitch, to += to_pitch) {
    const auto put = [&](int64_t p, V a, V b) __attribute__((always_inline)) {
      V even, odd;
      V::split(a, b, even, odd);
      if (p % 2 != 0) std::swap(even, odd);
      even.store(to + (p + 1) / 2);
      odd.store(to + part + p / 2);
    };
    if (step > 2) {
      for (int64_t p = begin; p < end; ++p)
        to[p % step * part + p / step] = widened(from[p - begin]);
    } else if (n >= 2 * L) {
      const auto move = [&](int64_t i) __attribute__((always_inline)) {
        put(begin + i, V::load(from + i), V::load(from + i + L));
      };
      for (int64_t i = 0; i < n - 2 * L; i += 2 * L) move(i);
      move(n - 2 * L);
    } else if (n > L) {  // the zeros behind a row fall on padding or on what is written next
      put(begin, V::load(from), V::load(from + L, static_cast<int>(n - L)));
    } else {
      put(begin, V::load(from, static_cast<int>(n)), V::zero());
    }
  }
}

// to[i * parts + q] = from[q * pitch + i] for the `n` elements of `to`.
template <class T>
TNC_INLINE void merge_run(const T* from, int64_t pitch, int64_t parts, int64_t n, T* to) {
  using V = Vec<Total<T>>;
  constexpr int L = V::lanes;
  int64_t done = 0;
  if (parts == 2 && n >= 2 * L) {
    const auto move = [&](int64_t i) {
      V a, b;
      V::merge(V::load(from + i), V::load(from + pitch + i), a, b);
      a.store(to + 2 * i);
      b.store(to + 2 * i + L);
    };
    const int64_t pairs = n / 2;
    for (int64_t i = 0; i < pairs - L; i += L) move(i);
    move(pairs - L);
    done = 2 * pairs;
  }
  for (; done < n; ++done) to[done] = from[done % parts * pitch + done / parts];
}

// What suits the kernel best, of `numbers` terms.
template <class T>
PlaneWay way_of(const ConvShape& s, const MapAxis (&axis)[3], const Chunks& chunks, int64_t numbers,
                bool transposed) {
  const int64_t kernel = axis[1].kernel, stride = s.axis[2].stride;
  bool square = kernel == axis[2].kernel && (kernel == 3 || kernel == 5 || kernel == 7);
  for (int a = 0; a < 3; ++a)
    square = square && s.axis[a].stride == (a > 0 ? stride : 1) && s.axis[a].dilation == 1;
  if (axis[2].period == 2 && chunks.count[2] == 1 && axis[2].written % 2 == 0) {
    const bool doubled = square && kernel < 7 && numbers == kernel * kernel &&
                         chunks.count[1] == 1 && axis[1].pad % 2 == axis[2].pad % 2;
    return doubled ? PlaneWay::doubled : PlaneWay::pairs;
  }
  if (square && stride == 1 && numbers == kernel * kernel) return PlaneWay::roll;
  if (square && stride <= (transposed ? 1 : 2) && kernel < 7 && numbers <= group_length<T>)
    return PlaneWay::slide;
  // One phase is not enough: of a stride longer than the image it need not meet all taps.
  const bool all_meet = axis[0].period == 1 && axis[1].period == 1 && axis[2].period == 1;
  const bool neighbours = joins_windows<Vec<Total<T>>> && all_meet && axis[2].step == 1 &&
                          axis[2].dilation == 1 && axis[2].kernel > 4;
  return neighbours ? PlaneWay::sweep : PlaneWay::list;
}

template <class T>
bool map_planes(const ConvProblem& p) {
  using E = Total<T>;
  constexpr int L = Vec<E>::lanes;
  const ConvShape& s = p.shape;
  const bool transposed = p.direction == Direction::grad_input;
  const int64_t group = transposed ? s.group_in() : s.group_out();  // written channels of a group
  const int64_t planes = transposed ? s.group_out() : s.group_in();
  const int64_t channels = transposed ? s.in_channels : s.out_channels;
  const RawView& source = transposed ? p.output : p.input;
  const RawView& written = transposed ? p.input : p.output;
  MapAxis axis[3];
  for (int a = 0; a < 3; ++a) axis[a] = MapAxis::of(s.axis[a], transposed);
  const int64_t phases[3] = {axis[0].phases(), axis[1].phases(), axis[2].phases()};
  const int64_t phase_count = phases[0] * phases[1] * phases[2], numbers = planes * s.taps();
  const int64_t period_h = axis[1].period, period_w = axis[2].period, step_w = axis[2].step;
  if (group >= L || source.stride[4] != 1 || written.stride[4] != 1) return false;
  if ((axis[2].written + period_w - 1) / period_w * 2 <= L) return false;  // too few lanes used
  PanelShape panel{1, planes, {}, 1};
  Chunks chunks;
  if (phase_count > 4096 || numbers > 1 << 16 ||
      !choose_chunks(axis, sizeof(E), planes_bytes, INT64_MAX, chunks, panel))
    return false;
  int64_t part = (panel.extent[2] + step_w - 1) / step_w;  // of a row, of one remainder
  if constexpr (joins_windows<Vec<E>>) part = up(part, L) * L;
  panel.extent[2] = part * step_w;

  Arena& plan = plan_arena();
  plan.reset(Arena::bytes_for<E>(channels * numbers) +
             TermLists::bytes_for<T>(numbers, phase_count) + Arena::bytes_for<int32_t>(numbers));
  E* const weights = plan.take<E>(channels * numbers);
  int32_t* const tap_rows = plan.take<int32_t>(numbers);
  TermLists lists = TermLists::take<T>(plan, numbers, phase_count);
  const bool finite = pack_weights<T>(p, channels, group, planes, 1, false, weights);
  if (transposed && !finite) return false;
  const int64_t nearest = least(axis[2].numerator(0), axis[2].numerator(axis[2].kernel - 1));
  list_terms<T>(
      axis, phases, panel, false,
      [&](int64_t phase, int64_t k) {
        if (step_w == 1) return axis[2].shift(phase, k);
        const int64_t distance = axis[2].numerator(k) - nearest;
        return distance % step_w * part + distance / step_w;
      },
      lists);
  const int64_t kernel = axis[1].kernel;
  const int64_t stride = s.axis[2].stride, tap_row_count = numbers / axis[2].kernel;
  for (int64_t r = 0; r < tap_row_count; ++r) {
    const int64_t kd = r / kernel % axis[0].kernel, kh = r % kernel;
    tap_rows[r] = static_cast<int32_t>(r / kernel / axis[0].kernel * panel.plane_pitch() +
                                       axis[0].shift(0, kd) * panel.slice_pitch() +
                                       axis[1].shift(0, kh) * panel.row_pitch() +
                                       (step_w == 1 ? nearest : 0));
  }
  const PlaneWay way = way_of<T>(s, axis, chunks, numbers, transposed);
  const bool doubled = way == PlaneWay::doubled, pairs = doubled || way == PlaneWay::pairs;
  const bool upwards = transposed && (way == PlaneWay::slide ||
                                      way == PlaneWay::roll);  // the order in which taps read rows

  const auto work = [&](int64_t begin, int64_t end) {
    const int64_t staged_pitch = chunks.size[2] / period_w + 1 + L;
    // Before the panel L elements may be read that are not used, and 2 * L behind it.
    const int64_t panel_size = panel.size() + 3 * L;
    Arena& arena = task_arena();
    arena.reset(Arena::bytes_for<E>(panel_size) + Arena::bytes_for<T>(period_w * 7 * staged_pitch));
    E* const values = arena.take<E>(panel_size) + L;
    T* const staged = arena.take<T>(period_w * 7 * staged_pitch);
    PlanePhase<T> phase{lists, 0, 0, nullptr, E(0), tap_rows, tap_row_count, axis[2].kernel, part};
    PlaneTiling<T> tiling;
    int64_t number = begin % chunks.total(), g = begin / chunks.total() % s.groups;
    int64_t n = begin / chunks.total() / s.groups;
    int64_t cleared_for = -1;
    Chunk chunk;
    int64_t first[3], from[3], to[3];  // what a panel holds, and what of that lies in the tensor
    for (int64_t piece = begin; piece < end; ++piece) {
      if (number != cleared_for) {  // the padding stays clear from one plane to the next
        std::memset(values - L, 0, panel_size * sizeof(E));
        cleared_for = number;
        chunk = chunks.chunk(number);
        for (int a = 0; a < 3; ++a) {
          first[a] = axis[a].first_source(chunk.begin[a]);
          from[a] = most(first[a], 0);
          to[a] = least(first[a] + axis[a].source_extent(chunk.size[a]), axis[a].source);
        }
      }
      const T* const plane = static_cast<const T*>(source.data) + n * source.stride[0] +
                             g * planes * source.stride[1] + from[2];
      if (from[2] < to[2])
        for (int64_t j = 0; j < planes; ++j)
          for (int64_t d = from[0]; d < to[0]; ++d)
            split_rows(
                plane + j * source.stride[1] + d * source.stride[2] + from[1] * source.stride[3],
                source.stride[3], to[1] - from[1], from[2] - first[2], to[2] - first[2], step_w,
                part,
                values + j * panel.plane_pitch() + (d - first[0]) * panel.slice_pitch() +
                    (from[1] - first[1]) * panel.row_pitch(),
                panel.row_pitch());
      // For strips: source rows in the order of the taps, without the padding if that adds nothing.
      int64_t first_row = 0, end_row = panel.extent[1];
      if (finite) {
        first_row = upwards ? first[1] + panel.extent[1] - to[1] : from[1] - first[1];
        end_row = upwards ? first[1] + panel.extent[1] - from[1] : to[1] - first[1];
        first_row = least(first_row, kernel - 1);
        end_row = most(end_row, first_row);
      }
      const T* const ahead = chunks.total() == 1 ? plane + planes * source.stride[1]
                                                 : plane + to[1] * source.stride[3];
      for (int64_t c = g * group; c < (g + 1) * group; ++c) {
        phase.weights = weights + c * numbers;
        phase.bias = p.bias ? widened(static_cast<const T*>(p.bias)[c]) : E(0);
        for (int64_t d = 0; d < chunk.size[0]; ++d)
          for (int64_t qh = 0; qh < (doubled ? 1 : least(period_h, chunk.size[1])); ++qh) {
            const int64_t rows =
                doubled ? chunk.size[1] : (chunk.size[1] - qh + period_h - 1) / period_h;
            const int64_t at_d = chunk.begin[0] + d, at_h = chunk.begin[1] + qh;
            const E* const slice = values + (axis[0].base(at_d) - first[0]) * panel.slice_pitch();
            T* const result = static_cast<T*>(written.data) + n * written.stride[0] +
                              c * written.stride[1] + at_d * written.stride[2] +
                              chunk.begin[2] * written.stride[4];
            const int64_t of_row =
                (at_d % axis[0].period * phases[1] + at_h % period_h) * phases[2];
            const int64_t columns =
                (chunk.size[2] + period_w - 1) / period_w;  // of a phase, or 1 more
            if (tiling.rows != rows || tiling.columns != columns)
              tiling = PlaneTiling<T>(rows, columns, way, kernel,
                                      doubled      ? axis[1].pad % 2
                                      : transposed ? -1
                                                   : stride);
            const int64_t some = tiling.tile_rows;
            for (int64_t next = 0; next < rows; next += some) {
              const int64_t row = least(next, rows - some);  // the last may overlap the one before
              for (int64_t qw = 0; qw < (pairs ? 1 : least(period_w, chunk.size[2])); ++qw) {
                const int64_t at_w = chunk.begin[2] + qw;
                const int64_t q = of_row + at_w % period_w;
                phase.chain = lists.phase_begin[q];
                phase.last_chain = lists.phase_begin[q + 1];
                if (pairs) {
                  phase.odd_chain = phase.last_chain;
                  phase.odd_last_chain = lists.phase_begin[q + 2];
                }
                const int64_t lead = upwards ? row + some - 1 : row;
                PlaneTile<T> tile;
                tile.source =
                    slice +
                    (axis[1].base(at_h) + lead * axis[1].step - first[1]) * panel.row_pitch() +
                    (step_w == 1 ? axis[2].base(at_w) - first[2] : 0);
                if (doubled) tile.source += axis[1].pad / 2 * panel.row_pitch() + axis[2].pad / 2;
                tile.source_step = (upwards                  ? -1
                                    : way == PlaneWay::slide ? 1
                                                             : axis[1].step) *
                                   panel.row_pitch();
                if (period_w == 1 || pairs) {
                  tile.out = result + (at_h + lead * period_h) * written.stride[3];
                  tile.out_step = (upwards ? -1 : doubled ? 1 : period_h) * written.stride[3];
                } else {
                  tile.out = staged + qw * 7 * staged_pitch;
                  tile.out_step = staged_pitch;
                }
                tile.rows = rows;
                tile.first = first_row;
                tile.end = end_row;
                tile.ahead = ahead;
                if (way == PlaneWay::slide) tile.ahead += row * axis[1].step * source.stride[3];
                tile.ahead_step = source.stride[3];
                tile.ahead_plane = source.stride[1];
                tile.next_out = written.stride[1];
                tiling.run(phase, (chunk.size[2] - qw + period_w - 1) / period_w, tile);
              }
              if (period_w > 1 && !pairs)
                for (int64_t i = 0; i < some; ++i)
                  merge_run(staged + i * staged_pitch, 7 * staged_pitch, period_w, chunk.size[2],
                            result + (at_h + (row + i) * period_h) * written.stride[3]);
            }
          }
      }
      if (++number == chunks.total()) number = 0, ++g;
      if (g == s.groups) g = 0, ++n;
    }
  };
  const int64_t products = chunks.size[0] * chunks.size[1] * chunks.size[2] * group * numbers;
  parallel_for(s.batch * s.groups * chunks.total(), 1 + worthwhile_products / (products + 1),
               environment_of<T>, work);
  return true;
}

}  // namespace torch_naiveconv::TNC_ISA
