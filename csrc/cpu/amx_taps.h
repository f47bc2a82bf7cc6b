// grad_weight: the taps of input channels are the rows and output channels the columns.
#pragma once

#include "amx_weights.h"

namespace torch_naiveconv::TNC_ISA {

// The gradient of `channels` output channels at the pixels [first, first + terms) of a sample, as
// the columns of one tile; +0 where there is none.
inline void pack_gradient(BFloat16* to, const BFloat16* grad, const int64_t* grad_stride,
                          const Axis (&axis)[3], bool consecutive, int64_t channels, int64_t first,
                          int64_t terms) {
  BFloat16 column[side][depth];
  if (consecutive && channels == side && terms == depth)
    return pack_transposed(to, grad + first * grad_stride[4], grad_stride[1]);
  int64_t at[3], rest = first;
  for (int a = 2; a >= 0; --a) at[a] = rest % axis[a].out, rest /= axis[a].out;
  zero_words(column[0], tile_words);
  BFloat16 row[depth][side] = {};
  for (int64_t t = 0; t < terms; ++t) {
    const BFloat16* const from =
        grad + at[0] * grad_stride[2] + at[1] * grad_stride[3] + at[2] * grad_stride[4];
    if (grad_stride[1] == 1)
      copy_words(row[t], from, 1, channels);
    else
      for (int64_t c = 0; c < channels; ++c) column[c][t] = from[c * grad_stride[1]];
    for (int a = 2; a >= 0 && ++at[a] == axis[a].out; --a) at[a] = 0;
  }
  if (grad_stride[1] != 1) return pack_transposed(to, column[0], depth);
  using V = Vec<float>;
  for (int k = 0; k < depth / 2; ++k)
    for (int i = 0; i < side; i += V::lanes)
      V::pairs(row[2 * k] + i, row[2 * k + 1] + i)
          .store(reinterpret_cast<float*>(to) + k * side + i);
}

template <class Unit>
bool multiply_taps(const ConvProblem& p, const MatrixLimits& limits) {
  const ConvShape& s = p.shape;
  const int64_t pixels = s.outputs(), taps = s.taps();
  const int64_t* const image_stride = p.input.stride;
  const int64_t* const grad_stride = p.output.stride;
  const int64_t* const weight_stride = p.weight.stride;
  const GridAxis grid[3] = {forward_axis(s.axis[0]), forward_axis(s.axis[1]),
                            forward_axis(s.axis[2])};
  const int64_t threads = thread_count();

  // Blocks of the gradient, some input channels x some output channels, whose operands for a chunk
  // of pixels and whose totals fit the second cache.
  constexpr int64_t usual_groups = 16;
  const int64_t panel_bytes = most(1, limits.panel_bytes / 2);  // there are two panels
  const int64_t group_bytes = depth * int64_t{sizeof(BFloat16)};
  int64_t block_channels =
      most(1, least(s.group_in(), panel_bytes / (usual_groups * group_bytes) / taps));
  const int64_t chunk =
      most(1, least(least(2 * usual_groups, up(pixels, depth)),
                    panel_bytes / (group_bytes * up(block_channels * taps, side) * side)));
  const Pieces pieces(grid, chunk * depth);
  const bool in_place = readable_in_place(grid, image_stride);
  const Layout patch(grid, pieces), layout = in_place ? Layout(grid, image_stride) : patch;
  const int64_t patch_words = pieces.count * patch.channel;
  if (patch_words > INT32_MAX / 8) return false;
  block_channels = most(
      1, least(block_channels, limits.patch_bytes / (patch_words * int64_t{sizeof(BFloat16)})));
  int64_t channel_blocks = up(s.group_in(), block_channels);
  const int64_t most_filters = least(
      512, limits.patch_bytes / (block_channels * taps * int64_t{sizeof(float)}) / side * side);
  int64_t filter_blocks = up(s.group_out(), most(most_filters, side));
  if (s.groups * channel_blocks * filter_blocks < threads)
    channel_blocks = least(s.group_in(), up(threads, s.groups * filter_blocks));
  if (s.groups * channel_blocks * filter_blocks < threads)
    filter_blocks = least(up(s.group_out(), side), up(threads, s.groups * channel_blocks));
  block_channels = up(s.group_in(), channel_blocks);
  const int64_t filter_tiles = up(s.group_out(), side);
  const bool taps_outside = weight_stride[1] == 1;  // so that rows lie along the memory

  bool consecutive = grad_stride[4] == 1;  // the pixels of a channel of the gradient
  consecutive = consecutive && (s.axis[1].out == 1 || grad_stride[3] == s.axis[2].out);
  consecutive =
      consecutive && (s.axis[0].out == 1 || grad_stride[2] == s.axis[1].out * s.axis[2].out);

  const int64_t tasks = s.groups * channel_blocks * filter_blocks;
  parallel_for(tasks, 1, FloatEnvironment::flush, [&](int64_t begin, int64_t end) {
    const int64_t most_rows = up(block_channels * taps, side) * side;
    const int64_t most_columns = up(filter_tiles, filter_blocks) * side;
    const int64_t piece_length = patch.channel * block_channels;
    const int64_t row_size = (most_rows + side) * chunk * depth;
    const int64_t column_size = most_columns * chunk * depth;
    const int64_t patch_size = pieces.count * piece_length + tile_words;
    const int64_t total_size = most_rows * most_columns + side;
    Arena& arena = task_arena();
    arena.reset(Arena::bytes_for<BFloat16>(row_size) + Arena::bytes_for<BFloat16>(column_size) +
                Arena::bytes_for<BFloat16>(patch_size) + Arena::bytes_for<float>(total_size) +
                2 * Arena::bytes_for<int64_t>(most_rows) + Arena::bytes_for<float>(side) +
                Arena::bytes_for<int64_t>(most_columns) + Arena::bytes_for<Run>(chunk * depth) +
                Arena::bytes_for<int32_t>(chunk + 1));
    BFloat16* const rows_panel = arena.take<BFloat16>(row_size);
    BFloat16* const columns_panel = arena.take<BFloat16>(column_size);
    BFloat16* const patches = arena.take<BFloat16>(patch_size);
    float* const totals = arena.take<float>(total_size);
    int64_t* const offset = arena.take<int64_t>(most_rows);
    int64_t* const row_at = arena.take<int64_t>(most_rows);
    float* const no_bias = arena.take<float>(side);
    int64_t* const column_at = arena.take<int64_t>(most_columns);
    Run* const run = arena.take<Run>(chunk * depth);
    int32_t* const first_run = arena.take<int32_t>(chunk + 1);
    for (int i = 0; i < side; ++i) no_bias[i] = 0;
    Unit unit;

    for (int64_t task = begin; task < end; ++task) {
      const int64_t channel_block = task % channel_blocks;
      const int64_t filter_block = task / channel_blocks % filter_blocks;
      const int64_t group = task / channel_blocks / filter_blocks;
      const int64_t channel0 = cut_at(s.group_in(), channel_blocks, channel_block);
      const int64_t channel1 = cut_at(s.group_in(), channel_blocks, channel_block + 1);
      const int64_t filter0 = cut_at(filter_tiles, filter_blocks, filter_block) * side;
      const int64_t filter1 =
          least(s.group_out(), cut_at(filter_tiles, filter_blocks, filter_block + 1) * side);
      const int64_t rows = (channel1 - channel0) * taps, row_tiles = up(rows, side);
      const int64_t columns = filter1 - filter0, column_tiles = up(columns, side);
      const int64_t image_at = (group * s.group_in() + channel0) * image_stride[1];
      const BFloat16* const grad = static_cast<const BFloat16*>(p.output.data) +
                                   (group * s.group_out() + filter0) * grad_stride[1];

      const int64_t channels = channel1 - channel0;
      const auto number_of = [&](int64_t r) {  // of a row, among the taps of the channels
        return taps_outside ? r % channels * taps + r / channels : r;
      };
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t c = number_of(r) / taps;
        int64_t rest = number_of(r) % taps;
        offset[r] = c * layout.channel;
        row_at[r] = (channel0 + c) * weight_stride[1];
        for (int a = 2; a >= 0; --a) {
          const int64_t tap = rest % s.axis[a].kernel;
          rest /= s.axis[a].kernel;
          offset[r] += layout.tap(a, grid[a].shift(tap));
          row_at[r] += tap * weight_stride[a + 2];
        }
      }
      for (int64_t c = 0; c < columns; ++c)
        column_at[c] = (group * s.group_out() + filter0 + c) * weight_stride[0];

      // The totals begin with the earlier ones.
      for (int64_t i = 0; i < row_tiles * column_tiles * tile_totals; ++i) totals[i] = 0;
      if (p.total != nullptr) {
        const float* const earlier = static_cast<const float*>(p.total);
        for (int64_t c = 0; c < columns; ++c)
          for (int64_t i = 0; i < rows; ++i) {
            const int64_t filter = group * s.group_out() + filter0 + c;
            totals[(i / side * column_tiles + c / side) * tile_totals + i % side * side +
                   c % side] =
                flushed(earlier[(filter * s.group_in() + channel0) * taps + number_of(i)]);
          }
      }

      for (int64_t n = 0; n < s.batch; ++n)
        for (int64_t first = 0; first < pixels; first += chunk * depth) {
          const int64_t last = least(pixels, first + chunk * depth);
          const int64_t groups = up(last - first, depth);
          const BFloat16* const image =
              static_cast<const BFloat16*>(p.input.data) + image_at + n * image_stride[0];
          find_runs(grid, pieces, layout, image_stride[0], piece_length, first, last, run,
                    first_run, [](int64_t, int64_t, int64_t, const int64_t*) {});
          if (!in_place)
            each_piece(grid, pieces, first, last, [&](int64_t, const Box& box, int64_t piece) {
              fill_patch(patches + piece * piece_length, patch, grid, box, image, image_stride,
                         channel1 - channel0);
            });

          for (int64_t i = 0; i < row_tiles; ++i)
            for (int64_t g = 0; g < groups; ++g)
              pack_rows(rows_panel + (i * groups + g) * tile_words, run + first_run[g],
                        run + first_run[g + 1], in_place ? image : patches, offset + i * side,
                        least(rows - i * side, side));
          for (int64_t j = 0; j < column_tiles; ++j)
            for (int64_t g = 0; g < groups; ++g)
              pack_gradient(columns_panel + (j * groups + g) * tile_words,
                            grad + n * grad_stride[0] + j * side * grad_stride[1], grad_stride,
                            s.axis, consecutive, least(columns - j * side, side), first + g * depth,
                            least(last - first - g * depth, depth));

          const int64_t column_tile = groups * tile_words;
          for (int64_t i = 0; i < row_tiles; i += 2)
            for (int64_t j = 0; j < column_tiles; j += 2) {
              const RowTiles from{rows_panel + i * column_tile, depth, column_tile, tile_words};
              multiply_tiles<Unit>(least(2, row_tiles - i), least(2, column_tiles - j), from,
                                   {columns_panel + j * column_tile, column_tile, groups}, groups,
                                   totals + (i * column_tiles + j) * tile_totals, column_tiles,
                                   true, NoPack{});
            }
        }

      for (int64_t i = 0; i < row_tiles; ++i)
        for (int64_t j = 0; j < column_tiles; ++j) {
          const float* const tile = totals + (i * column_tiles + j) * tile_totals;
          const auto total = [&](int r, int c) { return Vec<float>::load(tile + r * side + c); };
          const int some_rows = static_cast<int>(least(rows - i * side, side));
          const int some_columns = static_cast<int>(least(columns - j * side, side));
          if (p.keep_total)
            store_tile(total, some_rows, some_columns, no_bias, static_cast<float*>(p.weight.data),
                       row_at + i * side, column_at + j * side);
          else
            store_tile(total, some_rows, some_columns, no_bias,
                       static_cast<BFloat16*>(p.weight.data), row_at + i * side,
                       column_at + j * side);
        }
    }
  });
  return true;
}

}  // namespace torch_naiveconv::TNC_ISA
