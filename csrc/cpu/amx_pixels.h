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
  if (rows_fill_tiles(width) && up(weights.rows, side) <= 4 &&
      !readable_in_place(exact, call.image_stride))
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
  const int64_t group_bytes = side * bytes_of_group;  // of a tile
  const bool few_rows = row_tiles <= 3;               // do not pay for columns in a second cache
  const int64_t few_tiles = row_tiles == 1 ? 4 : 2;
  const int64_t packed_groups =
      few_rows ? least(chunk, most(1, limits.first_cache_bytes / (few_tiles * group_bytes)))
               : chunk;
  const int64_t strip_bytes = few_rows ? limits.first_cache_bytes
                              : row_tiles * chunk * group_bytes <= limits.cached_bytes
                                  ? limits.strip_bytes
                                  : limits.panel_bytes;
  const int64_t strip_tiles =
      most(few_rows ? few_tiles : 2,
           least(box_pixels / side, strip_bytes / (group_bytes * packed_groups) / 2 * 2));
  const bool weaves = groups >= row_tiles;  // or it costs more than it saves
  const bool keeps_totals = packed_groups < groups;
  const int64_t pitch = chunk < groups ? box_pixels / side : keeps_totals ? strip_tiles : 4;
  const Pieces pieces(grid, box_pixels);
  const Layout patch(grid, pieces), image_itself(grid, call.image_stride);

  // The last element of the image's memory, and the offsets of the terms in both layouts; -1 for
  // those that these pixels have not.
  bool in_place = readable_in_place(grid, call.image_stride);
  int64_t image_end = (call.batch - 1) * call.image_stride[0] +
                      (call.groups * call.image_channels - 1) * call.image_stride[1] + 1;
  for (int a = 0; a < 3; ++a) image_end += (grid[a].image_size - 1) * call.image_stride[a + 2];
  in_place = in_place && image_end <= INT32_MAX;
  Arena& plan = plan_arena();
  plan.reset(2 * Arena::bytes_for<int32_t>(groups * depth));
  int32_t* const patch_offset = plan.take<int32_t>(groups * depth);
  int32_t* const image_offset = plan.take<int32_t>(groups * depth);
  for (int64_t t = 0; t < groups * depth; ++t) patch_offset[t] = image_offset[t] = -1;
  int64_t most_offset = 0;
  int64_t tap_count[3];
  for (int a = 0; a < 3; ++a) tap_count[a] = merged ? merged[a].kernel : grid[a].taps;
  for (int64_t d = 0; d < tap_count[0]; ++d)
    for (int64_t h = 0; h < tap_count[1]; ++h)
      for (int64_t w = 0; w < tap_count[2]; ++w) {
        const int64_t tap[3] = {d, h, w};
        int64_t number = 0, in_patch = 0, in_image = 0;
        for (int a = 0; a < 3; ++a) {
          const int64_t shift = merged ? merged_shift(merged[a], tap[a]) : grid[a].shift(tap[a]);
          number = number * call.kernel[a] + (merged ? tap[a] : grid[a].tap(tap[a]));
          in_patch += patch.tap(a, shift);
          if (in_place) in_image += image_itself.tap(a, shift);
        }
        for (int64_t c = 0; c < call.image_channels; ++c) {
          patch_offset[c * taps + number] = static_cast<int32_t>(c * patch.channel + in_patch);
          if (!in_place) continue;
          const int64_t offset = c * image_itself.channel + in_image;
          image_offset[c * taps + number] = static_cast<int32_t>(offset);
          most_offset = most(most_offset, offset);
        }
      }

  int64_t all_exist = 0;  // the first so many terms
  while (all_exist < groups * depth && patch_offset[all_exist] >= 0) ++all_exist;

  const int64_t boxes = up(pixels, box_pixels);
  int64_t row_blocks = 1;
  if (boxes * weights.groups < threads)
    row_blocks = least(up(threads, boxes * weights.groups), up(row_tiles, 2));
  const int64_t tasks = weights.groups * row_blocks * boxes;
  parallel_for(tasks, 1, FloatEnvironment::flush, [&](int64_t begin, int64_t end) {
    Arena& arena = task_arena();
    const int64_t most_tiles = box_pixels / side;
    const int64_t block_tiles = up(row_tiles, row_blocks);
    const int64_t panel_size = strip_tiles * packed_groups * tile_words + tile_words;
    const int64_t patch_size = pieces.count * piece_length + tile_words;
    const int64_t total_size = (keeps_totals ? block_tiles : 2) * pitch * tile_totals + side;
    arena.reset(Arena::bytes_for<BFloat16>(panel_size) + Arena::bytes_for<BFloat16>(patch_size) +
                Arena::bytes_for<float>(total_size) + Arena::bytes_for<Run>(box_pixels) +
                Arena::bytes_for<int32_t>(most_tiles + 1) + Arena::bytes_for<int64_t>(box_pixels) +
                Arena::bytes_for<float>(block_tiles * side) +
                Arena::bytes_for<int64_t>(block_tiles * side) +
                Arena::bytes_for<uint8_t>(block_tiles * side) +
                Arena::bytes_for<uint8_t>(box_pixels) + Arena::bytes_for<uint8_t>(most_tiles));
    BFloat16* const panel = arena.take<BFloat16>(panel_size);
    BFloat16* const patches = arena.take<BFloat16>(patch_size);
    float* const totals = arena.take<float>(total_size);
    Run* const run = arena.take<Run>(box_pixels);
    int32_t* const first_run = arena.take<int32_t>(most_tiles + 1);
    int64_t* const position = arena.take<int64_t>(box_pixels);
    float* const bias = arena.take<float>(block_tiles * side);
    int64_t* const channel_at = arena.take<int64_t>(block_tiles * side);
    uint8_t* const row_bits = arena.take<uint8_t>(block_tiles * side);
    uint8_t* const column_bits = arena.take<uint8_t>(box_pixels);
    uint8_t* const woven = arena.take<uint8_t>(most_tiles);
    bool task_nan = false;
    Unit unit;

    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % boxes * box_pixels, last = least(pixels, first + box_pixels);
      const int64_t row_block = task / boxes % row_blocks;
      const int64_t group = weights.first_group + task / boxes / row_blocks;
      const int64_t tile0 = cut_at(row_tiles, row_blocks, row_block);
      const int64_t tile1 = cut_at(row_tiles, row_blocks, row_block + 1);
      const int64_t rows = least(weights.rows, tile1 * side) - tile0 * side;
      const int64_t tiles = up(last - first, side);
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

      // The runs of the pixels, in the image itself unless a vector could reach beyond its memory.
      const auto find_runs = [&](const Layout& layout) {
        int64_t runs = 0, most_at = 0;
        each_run(grid, pieces, layout, call.image_stride[0], piece_length, first, last, side,
                 [&](int64_t pixel, int64_t length, int64_t at, int64_t n, const int64_t* where) {
                   if (pixel % side == 0) first_run[pixel / side] = static_cast<int32_t>(runs);
                   Run* const before = run + runs - 1;
                   if (pixel % side != 0 && before->at + before->length == at)
                     before->length += static_cast<int32_t>(length);
                   else
                     run[runs++] = {at, static_cast<int32_t>(pixel % side),
                                    static_cast<int32_t>(length)};
                   most_at = most(most_at, at);
                   int64_t to = n * call.target_stride[0];
                   for (int a = 0; a < 3; ++a)
                     to += (grid[a].first + where[a] * grid[a].step) * call.target_stride[a + 2];
                   const int edge =
                       (where[0] + 1 == grid[0].count) | (where[1] + 1 == grid[1].count) << 1;
                   for (int64_t i = 0; i < length; ++i) {
                     position[pixel + i] = to + i * grid[2].step * call.target_stride[4];
                     column_bits[pixel + i] =
                         static_cast<uint8_t>(edge | (where[2] + i + 1 == width) << 2);
                   }
                 });
        first_run[tiles] = static_cast<int32_t>(runs);
        return most_at;
      };
      bool here = in_place;
      if (here)
        here = find_runs(image_itself) + most_offset + 2 * side +
                   group * call.image_channels * call.image_stride[1] <=
               image_end;
      if (!here) find_runs(patch);
      for (int64_t j = 0; j < tiles; ++j) {
        const Run *const a = run + first_run[j], *const b = run + first_run[least(j + 1, tiles)];
        woven[j] = weaves && j % 2 == 0 && j + 1 < tiles && b - a == 1 &&
                   run + first_run[j + 2] - b == 1 && b->length == side && b->at == a->at + side;
      }

      for (int64_t g0 = 0; g0 < groups; g0 += chunk) {
        const int64_t g1 = least(groups, g0 + chunk);
        const int64_t c0 = g0 * depth / taps;
        const int64_t c1 = least(call.image_channels, up(g1 * depth, taps));
        if (!here)
          each_piece(grid, pieces, first, last, [&](int64_t n, const Box& box, int64_t piece) {
            fill_patch(patches + piece * piece_length, patch, grid, box,
                       image + n * call.image_stride[0] + c0 * call.image_stride[1],
                       call.image_stride, c1 - c0);
          });
        const BFloat16* const source = here ? image : patches;
        const int64_t origin = here ? 0 : -c0 * patch.channel;
        const int32_t* const offset = here ? image_offset : patch_offset;
        RowTiles of_rows = weights.tiles;
        of_rows.data += (group - weights.first_group) * weights.group;
        for (int64_t j0 = 0; j0 < tiles; j0 += strip_tiles)
          for (int64_t h0 = g0; h0 < g1; h0 += packed_groups) {
            const int64_t j1 = least(tiles, j0 + strip_tiles), h1 = least(g1, h0 + packed_groups);
            const int64_t column_tile = (h1 - h0) * tile_words;
            // Whole groups, and a last one that is not.
            const int64_t whole = most(h0, least(h1, all_exist / depth));
            for (int64_t h = h0, next = whole; h < h1; h = next, next = h1)
              for (int64_t j = j0; j < j1; ++j) {
                BFloat16* const to = panel + (j - j0) * column_tile + (h - h0) * tile_words;
                const int64_t pairs = (next - h) * depth / 2;
                const Run* const first_of = run + first_run[j];
                if (woven[j])
                  pack_woven(to, column_tile, source, origin + first_of->at, offset + h * depth,
                             pairs, next == whole),
                      ++j;
                else
                  pack_columns(to, first_of, run + first_run[j + 1], source, origin,
                               offset + h * depth, pairs, next == whole);
              }
            for (int64_t i = tile0, some_tiles = 2; i < tile1; i += some_tiles) {
              some_tiles = least(2, tile1 - i);
              const int64_t step = 4 / some_tiles;
              for (int64_t j = j0; j < j1; j += step) {
                const int64_t column_tiles = least(step, j1 - j);
                float* const total =
                    totals +
                    (keeps_totals ? (i - tile0) * pitch + j - (chunk < groups ? 0 : j0) : 0) *
                        tile_totals;
                RowTiles from = of_rows;
                from.data += i * of_rows.tile + h0 * of_rows.group;
                multiply_tiles<Unit>(some_tiles, column_tiles, from, panel + (j - j0) * column_tile,
                                     column_tile, h1 - h0, total, pitch, h0 > 0);
                if (h1 < groups) continue;
                for (int64_t x = 0; x < some_tiles; ++x)
                  for (int64_t y = 0; y < column_tiles; y += 2)
                    if (woven[j + y]) {
                      float* const tile = total + (x * pitch + y) * tile_totals;
                      unweave_totals(tile, tile + tile_totals);
                    }
                for (int64_t x = 0; x < some_tiles; ++x)
                  for (int64_t y = 0; y < column_tiles; ++y) {
                    const int64_t r = (i + x - tile0) * side, c = (j + y) * side;
                    const int some_rows = static_cast<int>(least(rows - r, side));
                    const int64_t in_row = (first + c) % grid[2].count;
                    const int64_t end = grid[2].count == width ? last - first - c : width - in_row;
                    const int columns = static_cast<int>(least(end, side));
                    const float* const tile = total + (x * pitch + y) * tile_totals;
                    task_nan |= merged ? store_phases(tile, some_rows, columns, bias + r,
                                                      call.target, channel_at + r, position + c,
                                                      row_bits + r, column_bits + c, weights.beside)
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
          multiply_tiles<Unit>(row_tiles, column_tiles, from,
                               columns + (group * tiles + j) * groups * tile_words,
                               groups * tile_words, groups, totals, step, false);
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
