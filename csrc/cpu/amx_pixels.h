// forward and grad_input: channels are the rows and pixels the columns, or the other way round.
#pragma once

#include "amx_weights.h"

namespace torch_naiveconv::TNC_ISA {

// Columns are packed from rows of pixels. Rows that do not end in the middle of a tile are cheaper,
// so a short row that nearly fills its tiles is taken to fill them.
inline bool rows_fill_tiles(int64_t width) {
  const int64_t columns = up(width, side) * side;
  return width < 2 * side && 4 * columns <= 5 * width;
}

// Writes the pixels of one grid for the channels that the weights are of. Returns false to decline;
// `nan` becomes true if a NaN was written.
template <class Unit>
bool multiply_grid(const Images<BFloat16>& call, const GridAxis (&exact)[3], const Axis* merged,
                   const Weights& weights, const MatrixLimits& limits, bool& nan) {
  const int64_t taps = call.kernel[0] * call.kernel[1] * call.kernel[2];
  const int64_t groups = up(call.image_channels * taps, depth);
  GridAxis grid[3] = {exact[0], exact[1], exact[2]};
  const int64_t width = exact[2].count;
  int64_t image_end = (call.image_channels - 1) * call.image_stride[1];  // of a sample
  for (int a = 0; a < 3; ++a) image_end += (grid[a].image_size - 1) * call.image_stride[a + 2];
  const bool in_place = readable_in_place(exact, call.image_stride) && image_end <= INT32_MAX;
  if (rows_fill_tiles(width) && up(weights.rows, side) <= 4 && !in_place)
    grid[2].count = up(width, side) * side;
  const int64_t pixels = call.batch * grid[0].count * grid[1].count * grid[2].count;
  const int64_t row_tiles = up(weights.rows, side);
  const int64_t threads = thread_count();

  // Boxes of pixels that share a patch; the terms in chunks, if not all channels' patches fit. In a
  // box strips of two tiles or more, that share packed columns.
  const int64_t bytes_of_group = depth * int64_t{sizeof(BFloat16)};
  const int64_t sharing = up(threads, weights.groups);  // boxes, equally
  int64_t box_pixels = up(pixels, up(up(pixels, limits.most_pixels), sharing) * sharing);
  box_pixels = up(box_pixels, 2 * side) * 2 * side;
  int64_t chunk, chunk_channels, piece_length;
  for (;; box_pixels = 4 * side) {
    const Pieces pieces(grid, box_pixels);
    const Layout patch(grid, pieces);
    chunk = least(groups, most(1, limits.panel_bytes / (2 * side * bytes_of_group)));
    for (;; chunk = up(chunk, 2)) {
      chunk_channels = least(call.image_channels, up(chunk * depth - 1, taps) + 1);
      piece_length = patch.channel * chunk_channels;
      if (chunk == 1 ||
          pieces.count * piece_length * int64_t{sizeof(BFloat16)} <= limits.patch_bytes)
        break;
    }
    if (patch.channel * call.image_channels > INT32_MAX ||
        pieces.count * piece_length > INT32_MAX / 8)
      return false;
    if (chunk == groups || chunk * depth >= 8 * taps || box_pixels <= 4 * side) break;
  }
  const int64_t boxes = up(pixels, box_pixels);
  int64_t row_blocks = 1;
  if (boxes * weights.groups < threads)
    row_blocks = least(up(threads, boxes * weights.groups), up(row_tiles, 2));

  // If two tiles of rows are all, columns are used once, as soon as they are packed: a few groups
  // of them are kept. Else they are kept for a strip of tiles.
  const int64_t group_bytes = side * bytes_of_group;  // of a tile
  const int64_t block_tiles = up(row_tiles, row_blocks);
  const bool used_once = block_tiles <= 2;
  const int64_t strip_bytes = row_tiles * chunk * group_bytes <= limits.cached_bytes
                                  ? limits.strip_bytes
                                  : limits.panel_bytes;
  const int64_t strip_tiles =
      used_once ? 4
                : most(2, least(box_pixels / side, strip_bytes / (group_bytes * chunk) / 2 * 2));
  const int64_t kept_groups =
      used_once ? least(chunk, most(2, limits.first_cache_bytes / (strip_tiles * group_bytes)))
                : chunk;
  const int64_t pitch = chunk < groups ? box_pixels / side : 4;
  const Pieces pieces(grid, box_pixels);
  const Layout layout = in_place ? Layout(grid, call.image_stride) : Layout(grid, pieces);

  // The offsets of the terms; -1 for those that these pixels have not.
  Arena& plan = plan_arena();
  plan.reset(Arena::bytes_for<int32_t>(groups * depth));
  int32_t* const offset = plan.take<int32_t>(groups * depth);
  for (int64_t t = 0; t < groups * depth; ++t) offset[t] = -1;
  int64_t tap_count[3];
  for (int a = 0; a < 3; ++a) tap_count[a] = merged ? merged[a].kernel : grid[a].taps;
  for (int64_t d = 0; d < tap_count[0]; ++d)
    for (int64_t h = 0; h < tap_count[1]; ++h)
      for (int64_t w = 0; w < tap_count[2]; ++w) {
        const int64_t tap[3] = {d, h, w};
        int64_t number = 0, at = 0;
        for (int a = 0; a < 3; ++a) {
          const int64_t shift = merged ? merged_shift(merged[a], tap[a]) : grid[a].shift(tap[a]);
          number = number * call.kernel[a] + (merged ? tap[a] : grid[a].tap(tap[a]));
          at += layout.tap(a, shift);
        }
        for (int64_t c = 0; c < call.image_channels; ++c)
          offset[c * taps + number] = static_cast<int32_t>(c * layout.channel + at);
      }

  int64_t whole = 0;  // the first so many groups, of which all terms exist
  while (whole < groups * depth && offset[whole] >= 0) ++whole;
  whole /= depth;

  const bool along_rows = !merged && grid[2].step * call.target_stride[4] == 1;

  const int64_t tasks = weights.groups * row_blocks * boxes;
  parallel_for(tasks, 1, FloatEnvironment::flush, [&](int64_t begin, int64_t end) {
    Arena& arena = task_arena();
    const int64_t panel_size = strip_tiles * kept_groups * tile_words + tile_words;
    const int64_t patch_size = in_place ? 0 : pieces.count * piece_length + tile_words;
    const int64_t total_size = (chunk < groups ? block_tiles : 2) * pitch * tile_totals + side;
    arena.reset(
        Arena::bytes_for<BFloat16>(panel_size) + Arena::bytes_for<BFloat16>(patch_size) +
        Arena::bytes_for<float>(total_size) + 2 * Arena::bytes_for<Run>(box_pixels) +
        2 * Arena::bytes_for<int32_t>(box_pixels / depth + 1) +
        Arena::bytes_for<int64_t>(box_pixels) + Arena::bytes_for<float>(block_tiles * side) +
        Arena::bytes_for<int64_t>(block_tiles * side) +
        Arena::bytes_for<uint8_t>(block_tiles * side) + Arena::bytes_for<uint8_t>(box_pixels));
    BFloat16* const panel = arena.take<BFloat16>(panel_size);
    BFloat16* const patches = arena.take<BFloat16>(patch_size);
    float* const totals = arena.take<float>(total_size);
    Run* const run = arena.take<Run>(box_pixels);
    int32_t* const first_run = arena.take<int32_t>(box_pixels / depth + 1);
    Run* const target_run = arena.take<Run>(box_pixels);
    int32_t* const first_target = arena.take<int32_t>(box_pixels / depth + 1);
    int64_t* const position = arena.take<int64_t>(box_pixels);
    float* const bias = arena.take<float>(block_tiles * side);
    int64_t* const channel_at = arena.take<int64_t>(block_tiles * side);
    uint8_t* const row_bits = arena.take<uint8_t>(block_tiles * side);
    uint8_t* const column_bits = arena.take<uint8_t>(box_pixels);
    bool task_nan = false;
    Unit unit(row_tiles == 1 ? static_cast<int>(weights.rows) : side);

    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % boxes * box_pixels, last = least(pixels, first + box_pixels);
      const int64_t row_block = task / boxes % row_blocks;
      const int64_t group = weights.first_group + task / boxes / row_blocks;
      const int64_t tile0 = cut_at(row_tiles, row_blocks, row_block);
      const int64_t tile1 = cut_at(row_tiles, row_blocks, row_block + 1);
      const int64_t rows = least(weights.rows, tile1 * side) - tile0 * side;
      const int64_t tiles = 2 * up(last - first, 2 * side);
      const BFloat16* const image = call.image + group * call.image_channels * call.image_stride[1];
      for (int64_t r = 0; r < rows; ++r) {
        int64_t channel = group * call.lanes + weights.first, rest = tile0 * side + r;
        channel_at[r] = row_bits[r] = 0;
        if (merged != nullptr) {
          const int64_t inside = rest % weights.beside;
          rest /= weights.beside;
          channel += rest % call.lanes;
          rest = rest / call.lanes * weights.beside + inside;
          int64_t phase[3];
          for (int a = 2; a >= 0; --a) phase[a] = rest % merged[a].stride, rest /= merged[a].stride;
          for (int a = 0; a < 3; ++a) {
            channel_at[r] += phase[a] * call.target_stride[a + 2];
            if ((exact[a].count - 1) * exact[a].step + phase[a] >= merged[a].in)
              row_bits[r] |= static_cast<uint8_t>(1 << a);
          }
        } else {
          channel += rest;
        }
        bias[r] = call.bias ? widened(call.bias[channel]) : 0.0f;
        channel_at[r] += channel * call.target_stride[1];
      }

      int32_t target_runs = 0;
      find_runs(grid, pieces, layout, call.image_stride[0], piece_length, first, last, run,
                first_run, [&](int64_t pixel, int64_t length, int64_t n, const int64_t* where) {
                  int64_t to = n * call.target_stride[0];
                  for (int a = 0; a < 3; ++a)
                    to += (grid[a].first + where[a] * grid[a].step) * call.target_stride[a + 2];
                  const int edge = (where[0] + 1 == grid[0].count) | (where[1] + 1 == grid[1].count)
                                                                         << 1;
                  const int64_t column = pixel % depth, some = least(length, width - where[2]);
                  if (column == 0) first_target[pixel / depth] = target_runs;
                  if (some > 0)
                    add_run(target_run, first_target[pixel / depth], target_runs, column, some, to);
                  for (int64_t i = 0; i < length; ++i) {
                    position[pixel + i] = to + i * grid[2].step * call.target_stride[4];
                    column_bits[pixel + i] =
                        static_cast<uint8_t>(edge | (where[2] + i + 1 == width) << 2);
                  }
                });

      first_target[tiles / 2] = target_runs;

      for (int64_t g0 = 0; g0 < groups; g0 += chunk) {
        const int64_t g1 = least(groups, g0 + chunk);
        const int64_t c0 = g0 * depth / taps;
        const int64_t c1 = least(call.image_channels, up(g1 * depth, taps));
        if (!in_place)
          each_piece(grid, pieces, first, last, [&](int64_t n, const Box& box, int64_t piece) {
            fill_patch(patches + piece * piece_length, layout, grid, box,
                       image + n * call.image_stride[0] + c0 * call.image_stride[1],
                       call.image_stride, c1 - c0);
          });
        const BFloat16* const source = in_place ? image : patches;
        const int64_t origin = in_place ? 0 : -c0 * layout.channel;
        RowTiles of_rows = weights.tiles;
        of_rows.data += (group - weights.first_group) * weights.group + g0 * of_rows.group;
        for (int64_t j0 = 0, j1; j0 < tiles; j0 = j1) {
          j1 = used_once ? tiles : least(tiles, j0 + strip_tiles);
          for (int64_t i = tile0, some_tiles = 2; i < tile1; i += some_tiles) {
            some_tiles = least(2, tile1 - i);
            const int64_t step = 4 / some_tiles;
            for (int64_t j = j0; j < j1; j += step) {
              const int64_t column_tiles = least(step, j1 - j);
              BFloat16* const columns =
                  panel + (used_once ? 0 : (j - j0) * kept_groups * tile_words);
              float* const total =
                  totals + (chunk < groups ? (i - tile0) * pitch + j : 0) * tile_totals;
              RowTiles from = of_rows;
              from.data += i * of_rows.tile;
              const ColumnTiles from_columns{columns, kept_groups * tile_words, kept_groups};
              const auto multiply = [&](const auto& pack) {
                multiply_tiles<Unit>(some_tiles, column_tiles, from, from_columns, g1 - g0, total,
                                     pitch, g0 > 0, pack);
              };
              const int64_t pairs = column_tiles / 2;
              const Run *begin[2], *end[2];
              for (int64_t y = 0; y < 2; ++y) {
                const int32_t* const of_pair = first_run + j / 2 + least(y, pairs - 1);
                begin[y] = run + of_pair[0], end[y] = run + of_pair[1];
              }
              if (i > tile0)
                multiply(NoPack{});
              else
                with_gather(
                    std::max(gather_of(begin[0], end[0]), gather_of(begin[1], end[1])),
                    [&](auto n) {
                      const Gather<n> gather[] = {{begin[0], end[0]}, {begin[1], end[1]}};
                      multiply([&](int64_t g, int64_t place) __attribute__((always_inline)) {
                        for (int64_t y = 0; y < pairs; ++y)
                          pack_columns(columns + (2 * y * kept_groups + place) * tile_words,
                                       from_columns.tile, gather[y], source, origin,
                                       offset + (g0 + g) * depth, g0 + g < whole);
                      });
                    });
              if (g1 < groups) continue;
              for (int64_t x = 0; x < some_tiles && along_rows; ++x)
                for (int64_t y = 0; y < pairs; ++y) {
                  const int64_t r = (i + x - tile0) * side;
                  const float* const pair = total + (x * pitch + 2 * y) * tile_totals;
                  const int32_t* const of_pair = first_target + j / 2 + y;
                  task_nan |=
                      store_runs(pair, pair + tile_totals, static_cast<int>(least(rows - r, side)),
                                 bias + r, call.target, channel_at + r, target_run + of_pair[0],
                                 target_run + of_pair[1]);
                }
              if (along_rows) continue;
              for (int64_t x = 0; x < some_tiles; ++x)
                for (int64_t y = 0; y < column_tiles; ++y) {
                  const int64_t r = (i + x - tile0) * side, c = (j + y) * side;
                  const int some_rows = static_cast<int>(least(rows - r, side));
                  const int64_t in_row = (first + c) % grid[2].count;
                  const int64_t end = grid[2].count == width ? side : width - in_row;
                  const int columns = static_cast<int>(least(least(end, side), last - first - c));
                  if (columns <= 0) continue;
                  const float* const pair = total + (x * pitch + y / 2 * 2) * tile_totals;
                  const auto tile = [&](int r, int c) {
                    return Vec<float>::unwoven(pair + r * side, pair + tile_totals + r * side,
                                               static_cast<int>(y % 2) * side + c);
                  };
                  task_nan |= merged ? store_phases(tile, some_rows, columns, bias + r, call.target,
                                                    channel_at + r, position + c, row_bits + r,
                                                    column_bits + c, weights.beside)
                                     : store_tile(tile, some_rows, columns, bias + r, call.target,
                                                  channel_at + r, position + c);
                }
            }
          }
        }
      }
    }
    if (task_nan) __atomic_store_n(&nan, true, __ATOMIC_RELAXED);
  });
  return true;
}

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

template <class Unit>
void multiply_pixels(const Images<BFloat16>& call, const GridAxis (&grid)[3], bool& nan) {
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

  // Pixels of the whole image at one distance are read in place.
  int64_t dense = call.image_stride[4];
  bool in_place = terms % depth == 0;
  for (int a = 2; a >= 0; dense *= grid[a--].count)
    in_place = in_place && grid[a].image_step == 1 && grid[a].count == grid[a].image_size &&
               (grid[a].count == 1 || call.image_stride[a + 2] == dense);
  in_place = in_place && (call.batch == 1 || call.image_stride[0] == dense);

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
  for (int64_t group = 0; group < call.groups; group += group_step)
    for (int64_t row = 0; row < call.lanes; row += row_step) {
      const Weights weights = by_pixels
                                  ? Weights{}
                                  : weights_of(call, group, group_step, row,
                                               least(row_step, call.lanes - row), merged, beside);
      if (merge) {
        const GridAxis grid[3] = {merged_axis(s.axis[0]), merged_axis(s.axis[1]),
                                  merged_axis(s.axis[2])};
        if (!multiply_grid<Unit>(call, grid, merged, weights, limits, nan)) return false;
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
              if (group == 0 && row == 0) multiply_pixels<Unit>(call, grid, nan);
            } else if (!multiply_grid<Unit>(call, grid, nullptr, weights, limits, nan)) {
              return false;
            }
          }
    }
  return true;
}

}  // namespace torch_naiveconv::TNC_ISA
