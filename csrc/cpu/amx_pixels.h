// forward and grad_input on the matrix unit: which pixels and channels are rows and which columns.
// Start reading at multiply_grids.
#pragma once

#include "amx_grid.h"

namespace torch_naiveconv::TNC_ISA {

// A pixel's channels are its terms, in order and side by side: rows in place, or nearly.
inline bool has_pixels_as_rows(const Images<BFloat16>& call, const MatrixLimits& limits) {
  const int64_t weights =
      call.groups * up(call.lanes, side) * side * up(call.image_channels, depth);
  return call.kernel[0] * call.kernel[1] * call.kernel[2] == 1 && call.image_stride[1] == 1 &&
         call.target_stride[1] == 1 &&
         weights * depth * int64_t{sizeof(BFloat16)} <= limits.weight_bytes;
}

// Calls visit(i, where) for the pixels first + i of [first, last).
template <class Visit>
void each_pixel(const GridAxis (&grid)[3], int64_t first, int64_t last, const Visit& visit) {
  int64_t where[4], rest = first;
  for (int a = 2; a >= 0; --a) where[a + 1] = rest % grid[a].count, rest /= grid[a].count;
  where[0] = rest;
  for (int64_t i = 0; i < last - first; ++i) {
    visit(i, where);
    int a = 3;
    for (++where[3]; a > 0 && where[a] == grid[a - 1].count; --a) where[a] = 0, ++where[a - 1];
  }
}

// The channels of all groups as columns, tile after tile.
inline void pack_channels(const Images<BFloat16>& call, BFloat16* columns) {
  const int64_t terms = call.image_channels, groups = up(terms, depth);
  const int64_t tiles = up(call.lanes, side);
  parallel_for(
      call.groups * tiles, up(1 << 16, groups * tile_words), FloatEnvironment::flush,
      [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t lane = i % tiles * side, some_lanes = least(side, call.lanes - lane);
          const BFloat16* const from =
              call.weight + i / tiles * call.group_stride + lane * call.lane_stride;
          for (int64_t g = 0; g < groups; ++g) {
            const int64_t some = least(depth, terms - g * depth);
            BFloat16 column[side][depth] = {};
            if (call.lane_stride == 1)
              transpose_words(column[0], depth, from + g * depth * call.channel_stride,
                              call.channel_stride, some, some_lanes);
            else
              for (int64_t c = 0; c < some_lanes; ++c)
                copy_words(column[c], from + c * call.lane_stride + g * depth * call.channel_stride,
                           call.channel_stride, some);
            pack_transposed(columns + (i * groups + g) * tile_words, column[0], depth);
          }
        }
      });
}

// Are all pixels of the image at one distance, so that they can be read in place?
inline bool lie_evenly(const Images<BFloat16>& call, const GridAxis (&grid)[3]) {
  int64_t dense = call.image_stride[4];
  bool even = call.image_channels % depth == 0;
  for (int a = 2; a >= 0; dense *= grid[a--].count)
    even = even && grid[a].image_step == 1 && grid[a].count == grid[a].image_size &&
           (grid[a].count == 1 || call.image_stride[a + 2] == dense);
  return even && (call.batch == 1 || call.image_stride[0] == dense);
}

template <class Unit>
void multiply_pixel_rows(const Images<BFloat16>& call, const GridAxis (&grid)[3], bool& nan) {
  const int64_t terms = call.image_channels, groups = up(terms, depth);
  const int64_t tiles = up(call.lanes, side), padded = tiles * side;
  const int64_t pixels = call.batch * grid[0].count * grid[1].count * grid[2].count;

  // Columns, and the bias of each.
  const int64_t group_words = tiles * groups * tile_words;
  Arena& arena = weight_arena();
  arena.reset(Arena::bytes_for<BFloat16>(call.groups * group_words) +
              Arena::bytes_for<float>(call.groups * padded));
  BFloat16* const columns = arena.take<BFloat16>(call.groups * group_words);
  float* const bias = arena.take<float>(call.groups * padded);
  for (int64_t i = 0; i < call.groups * padded; ++i) {
    const int64_t group = i / padded, lane = i % padded;
    const bool has_bias = call.bias && lane < call.lanes;
    bias[i] = has_bias ? widened(call.bias[group * call.lanes + lane]) : 0.0f;
  }
  pack_channels(call, columns);

  const bool in_place = lie_evenly(call, grid);
  const int64_t pairs = up(pixels, 2 * side);
  parallel_for(pairs, 4, FloatEnvironment::flush, [&](int64_t begin, int64_t end) {
    const int64_t pitch = (groups | 1) * depth;
    Arena& task = task_arena();
    task.reset(Arena::bytes_for<BFloat16>(2 * side * pitch) +
               Arena::bytes_for<float>(4 * tile_totals + side));
    BFloat16* const rows = task.take<BFloat16>(2 * side * pitch);
    float* const totals = task.take<float>(4 * tile_totals + side);
    zero_words(rows, 2 * side * pitch);
    bool task_nan = false;
    Unit unit;
    for (int64_t pair = begin; pair < end; ++pair) {
      const int64_t first = pair * 2 * side, count = least(pixels - first, 2 * side);
      const int64_t row_tiles = up(count, side);
      int64_t image_at[2 * side], target_at[2 * side];
      each_pixel(grid, first, first + count, [&](int64_t i, const int64_t* where) {
        image_at[i] = where[0] * call.image_stride[0];
        target_at[i] = where[0] * call.target_stride[0];
        for (int a = 0; a < 3; ++a) {
          image_at[i] +=
              (where[a + 1] * grid[a].image_step + grid[a].shift(0)) * call.image_stride[a + 2];
          target_at[i] += (where[a + 1] * grid[a].step + grid[a].first) * call.target_stride[a + 2];
        }
      });
      const bool here = in_place && count == row_tiles * side;
      for (int64_t group = 0; group < call.groups; ++group) {
        const BFloat16* const image = call.image + group * terms;
        RowTiles from{rows, pitch, side * pitch, depth};
        if (here)
          from = {image + image_at[0], call.image_stride[4], side * call.image_stride[4], depth};
        for (int64_t i = 0; i < count && !here; ++i)
          copy_words(rows + i * pitch, image + image_at[i], terms);
        const int64_t step = 4 / row_tiles;
        for (int64_t j = 0; j < tiles; j += step) {
          const int64_t column_tiles = least(step, tiles - j);
          multiply_tiles<Unit>(
              row_tiles, column_tiles, from,
              {columns + (group * tiles + j) * groups * tile_words, groups * tile_words, groups},
              groups, totals, step, false, NoPack{});
          for (int64_t x = 0; x < row_tiles; ++x)
            for (int64_t y = 0; y < column_tiles; ++y)
              task_nan |= store_rows_of_tile(
                  totals + (x * step + y) * tile_totals, least(side, count - x * side),
                  least(side, call.lanes - (j + y) * side), bias + group * padded + (j + y) * side,
                  call.target + group * call.lanes + (j + y) * side, target_at + x * side);
        }
      }
    }
    if (task_nan) __atomic_store_n(&nan, true, __ATOMIC_RELAXED);
  });
}

// All grids of a call: one, or the stride phases of grad_input.
template <class Unit>
bool multiply_grids(const Images<BFloat16>& call, const ConvShape& s, bool forward,
                    const MatrixLimits& limits, bool& nan) {
  const int64_t terms = call.image_channels * call.kernel[0] * call.kernel[1] * call.kernel[2];
  const int64_t row_bytes = up(terms, depth) * depth * int64_t{sizeof(BFloat16)};
  const int64_t most_rows = limits.weight_bytes / row_bytes / (2 * side) * 2 * side;
  if (most_rows == 0) return false;
  // Stride phases that all have taps become rows of one grid.
  int64_t phase_count = 1;
  bool merge = !forward;
  for (int a = 0; a < 3; ++a) {
    phase_count *= s.axis[a].stride;
    for (int64_t phase = 0; merge && phase < s.axis[a].stride; ++phase)
      merge = phase < s.axis[a].in && gradient_axis(s.axis[a], phase).taps > 0;
  }
  merge = merge && phase_count > 1 &&
          call.groups * up(call.lanes * phase_count, side) * side <= most_rows;
  const Axis* const merged = merge ? s.axis : nullptr;
  const bool all = merge || call.groups * up(call.lanes, side) * side <= most_rows;
  const int64_t group_step = all ? call.groups : 1;
  const int64_t row_step = merge ? call.lanes : least(call.lanes, least(most_rows, 2048));
  const int64_t phases[3] = {forward ? 1 : least(s.axis[0].stride, s.axis[0].in),
                             forward ? 1 : least(s.axis[1].stride, s.axis[1].in),
                             forward ? 1 : least(s.axis[2].stride, s.axis[2].in)};
  // Phases along w lie side by side in memory.
  const int64_t along = s.axis[2].stride;
  const bool interleaved = merge && call.target_stride[4] == 1 && (along == 2 || along == 4);
  const int beside = interleaved ? static_cast<int>(along) : 1;
  bool by_pixels = has_pixels_as_rows(call, limits);
  for (int a = 0; a < 3; ++a) {
    const GridAxis axis = forward ? forward_axis(s.axis[a]) : gradient_axis(s.axis[a], 0);
    by_pixels = by_pixels && axis.taps == 1 && !axis.reads_padding();
  }
  const auto multiply = [&](const GridAxis(&grid)[3], const Weights& weights) {
    GridProduct<Unit> product(call, grid, merged, weights, limits);
    if (product.fits()) nan |= product.run();
    return product.fits();
  };
  for (int64_t group = 0; group < call.groups; group += group_step)
    for (int64_t row = 0; row < call.lanes; row += row_step) {
      const Weights weights = by_pixels
                                  ? Weights{}
                                  : weights_of(call, group, group_step, row,
                                               least(row_step, call.lanes - row), merged, beside);
      if (merge) {
        const GridAxis grid[3] = {merged_axis(s.axis[0]), merged_axis(s.axis[1]),
                                  merged_axis(s.axis[2])};
        if (!multiply(grid, weights)) return false;
        continue;
      }
      for (int64_t d = 0; d < phases[0]; ++d)
        for (int64_t h = 0; h < phases[1]; ++h)
          for (int64_t w = 0; w < phases[2]; ++w) {
            const int64_t phase[3] = {d, h, w};
            GridAxis grid[3];
            for (int a = 0; a < 3; ++a)
              grid[a] = forward ? forward_axis(s.axis[a]) : gradient_axis(s.axis[a], phase[a]);
            if (grid[0].taps * grid[1].taps * grid[2].taps == 0) {
              if (group == 0 && row == 0) store_bias(call, grid);
            } else if (by_pixels) {
              if (group == 0 && row == 0) multiply_pixel_rows<Unit>(call, grid, nan);
            } else if (!multiply(grid, weights)) {
              return false;
            }
          }
    }
  return true;
}

}  // namespace torch_naiveconv::TNC_ISA
