// The weights of forward and grad_input, as rows.
#pragma once

#include "amx_tiles.h"

namespace torch_naiveconv::TNC_ISA {

// What a call is declined for, and how much a task works on at a time. Tests make them small.
struct MatrixLimits {
  int64_t least_channels = 8;           // that the tiles would be filled with, or
  int64_t least_width = 32;             // pixels of a row and
  int64_t least_terms = 256;            // of a pixel
  int64_t least_work = 200000;          // multiply-adds
  int64_t most_touching_taps = 8;       // of windows that do not overlap
  int64_t panel_bytes = 1 << 20;        // packed operand of a task
  int64_t cached_bytes = 3 << 19;       // weights that stay in a second cache; the panel is then
  int64_t strip_bytes = 128 << 10;      // no larger, and where few rows share it
  int64_t first_cache_bytes = 8 << 10;  // a tile waits long for lines that left the first cache
  int64_t patch_bytes = 1 << 20;        // zero-padded copy of a piece of the image
  int64_t weight_bytes = 8 << 20;
  int64_t most_pixels = 1024;
};

inline Arena& weight_arena() {
  static thread_local Arena arena;
  return arena;
}

// The weights of rows [first, first + rows) of some groups of channels: packed row by row, or in
// place if that is how they lie.
struct Weights {
  int64_t first_group, groups, first, rows;
  RowTiles tiles;     // of the first group
  int64_t group = 0;  // distance of groups
  int beside = 1;     // rows that are phases along w of one channel
};

// Writes the terms of one row, of `channels` channels that have their taps at tap_at.
inline void pack_row(BFloat16* to, const BFloat16* from, int64_t channels, int64_t channel_stride,
                     const int64_t* tap_at, int64_t taps) {
  const int64_t step = taps > 1 ? tap_at[1] - tap_at[0] : 1;
  bool even = step > 0;
  for (int64_t k = 0; k < taps; ++k) even = even && tap_at[k] == k * step;
  if (even && step == 1 && taps > 1) {
    for (int64_t c = 0; c < channels; ++c)
      copy_words(to + c * taps, from + c * channel_stride, taps);
  } else if (even && channel_stride == 1) {
    transpose_words(to, taps, from, step, taps, channels);
  } else {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t k = 0; k < taps; ++k) to[c * taps + k] = from[c * channel_stride + tap_at[k]];
  }
}

// `merged`: the axes of a call whose stride phases are rows, outside of the channels but for
// `beside` phases along w inside.
inline Weights weights_of(const Images<BFloat16>& call, int64_t first_group, int64_t groups,
                          int64_t first, int64_t lanes, const Axis* merged, int beside) {
  const int64_t taps = call.kernel[0] * call.kernel[1] * call.kernel[2];
  const int64_t terms = call.image_channels * taps, term_groups = up(terms, depth);
  int64_t phases = 1;
  for (int a = 0; a < 3 && merged; ++a) phases *= merged[a].stride;
  const int64_t rows = lanes * phases, tiles = up(rows, side);
  // An odd number of cache lines apart.
  const int64_t pitch = (term_groups | 1) * depth, group = tiles * side * pitch;
  Arena& arena = weight_arena();
  arena.reset(Arena::bytes_for<int64_t>(taps) + Arena::bytes_for<int32_t>(taps) +
              Arena::bytes_for<BFloat16>(groups * group));
  int64_t* const tap_at = arena.take<int64_t>(taps);
  int32_t* const tap_phase = arena.take<int32_t>(taps);
  int64_t k = 0;
  bool in_place = rows % side == 0 && terms % depth == 0 && phases == 1;
  in_place = in_place && (call.image_channels == 1 || call.channel_stride == taps);
  for (int64_t d = 0; d < call.kernel[0]; ++d)
    for (int64_t h = 0; h < call.kernel[1]; ++h)
      for (int64_t w = 0; w < call.kernel[2]; ++w, ++k) {
        tap_at[k] =
            d * call.weight_stride[2] + h * call.weight_stride[3] + w * call.weight_stride[4];
        in_place = in_place && tap_at[k] == k;
        if (merged != nullptr)
          tap_phase[k] = static_cast<int32_t>(
              (phase_of(merged[0], d) * merged[1].stride + phase_of(merged[1], h)) *
                  merged[2].stride +
              phase_of(merged[2], w));
      }
  const BFloat16* const weight =
      call.weight + first_group * call.group_stride + first * call.lane_stride;
  if (in_place)
    return {first_group,
            groups,
            first,
            rows,
            {weight, call.lane_stride, side * call.lane_stride, depth},
            call.group_stride};

  BFloat16* const packed = arena.take<BFloat16>(groups * group);
  const bool turned = call.lane_stride == 1 && phases == 1 &&
                      (taps == 1 || tap_at[1] * taps == call.channel_stride);
  parallel_for(groups * tiles, up(1 << 16, side * pitch), FloatEnvironment::flush,
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t row0 = i % tiles * side, count = least(rows - row0, side);
                   const BFloat16* const from = weight + i / tiles * call.group_stride;
                   BFloat16* const to = packed + i * side * pitch;
                   if (count < side) zero_words(to, side * pitch);
                   for (int64_t r = 0; r < count; ++r)
                     zero_words(to + r * pitch + terms, pitch - terms);
                   if (phases > 1) {
                     zero_words(to, side * pitch);
                     for (int64_t r = 0; r < count; ++r) {
                       const int64_t row = row0 + r, lane = row / beside % lanes;
                       const int64_t phase = row / beside / lanes * beside + row % beside;
                       for (int64_t k = 0; k < taps; ++k) {
                         if (tap_phase[k] != phase) continue;
                         for (int64_t c = 0; c < call.image_channels; ++c)
                           to[r * pitch + c * taps + k] =
                               from[lane * call.lane_stride + c * call.channel_stride + tap_at[k]];
                       }
                     }
                   } else if (turned) {
                     const int64_t step = taps == 1 ? call.channel_stride : tap_at[1];
                     transpose_words(to, pitch, from + row0, step, terms, count);
                   } else {
                     for (int64_t r = 0; r < count; ++r)
                       pack_row(to + r * pitch, from + (row0 + r) * call.lane_stride,
                                call.image_channels, call.channel_stride, tap_at, taps);
                   }
                 }
               });
  return {first_group, groups, first, rows, {packed, pitch, side * pitch, depth}, group, beside};
}

}  // namespace torch_naiveconv::TNC_ISA
