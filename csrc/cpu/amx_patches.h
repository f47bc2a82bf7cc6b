// Where the pixels of a range lie, in the image itself or in zero-padded copies of pieces of it.
#pragma once

#include "amx_words.h"

namespace torch_naiveconv::TNC_ISA {

// The phase of the inputs that tap k connects with outputs, and the distance of these.
inline int64_t phase_of(const Axis& a, int64_t k) {
  const int64_t rest = (k * a.dilation - a.pad) % a.stride;
  return rest < 0 ? rest + a.stride : rest;
}
inline int64_t merged_shift(const Axis& a, int64_t k) {
  return (phase_of(a, k) + a.pad - k * a.dilation) / a.stride;
}

// All stride phases of an input gradient together: one pixel of the grid is a block of inputs, one
// of each phase, and the taps of all of them read near it. `taps` only says how far.
inline GridAxis merged_axis(const Axis& a) {
  GridAxis g;
  g.count = up(a.in, a.stride);
  g.step = a.stride;
  g.image_size = a.out;
  g.shift_step = 1;
  int64_t last = INT64_MIN;
  g.first_shift = INT64_MAX;
  for (int64_t k = 0; k < a.kernel; ++k) {
    g.first_shift = least(g.first_shift, merged_shift(a, k));
    last = most(last, merged_shift(a, k));
  }
  g.taps = last - g.first_shift + 1;
  return g;
}

// The pixels of a grid are numbered (n, d, h, w). A range of them is cut into pieces that are boxes
// of the grid, or nearly: where it crosses from one row, plane or sample into the next, whichever
// is the smallest that holds a whole range.
struct Pieces {
  int64_t unit;       // a piece ends at its multiples
  int64_t count;      // at most so many in a range
  int64_t extent[3];  // and so many positions on each axis

  Pieces(const GridAxis (&grid)[3], int64_t most_pixels) {
    const int64_t row = grid[2].count, plane = row * grid[1].count, all = plane * grid[0].count;
    unit = row >= most_pixels ? row : plane >= most_pixels ? plane : all;
    count = up(most_pixels, unit) + 1;
    extent[2] = least(row, unit == row ? most_pixels : row);
    extent[1] = unit == row ? 1 : least(grid[1].count, up(most_pixels, row) + 1);
    extent[0] = unit == row || unit == plane ? 1 : least(grid[0].count, up(most_pixels, plane) + 1);
  }
  int64_t end(int64_t first, int64_t last) const { return least(last, (first / unit + 1) * unit); }
};

// The box around the pixels [first, last) of one sample.
inline Box box_around(const GridAxis (&grid)[3], int64_t first, int64_t last) {
  Box box;
  int64_t lower = first, upper = last - 1, size = grid[0].count * grid[1].count * grid[2].count;
  lower %= size;
  upper %= size;
  bool whole = false;
  for (int a = 0; a < 3; ++a) {
    size /= grid[a].count;
    box.from[a] = whole ? 0 : lower / size;
    box.to[a] = whole ? grid[a].count : upper / size + 1;
    whole = whole || box.size(a) > 1;
    lower %= size;
    upper %= size;
  }
  return box;
}

// Where a pixel and a term read: in the image itself, or in a patch, which is a zero-padded copy of
// some channels of each piece, row after row. In a patch neighbouring pixels of a row are always
// neighbours: a row with a stride is laid out as the rows of its phases.
struct Layout {
  bool patched;
  int64_t channel = 0;                   // distance of channels
  int64_t pixel[3] = {0, 0, 1};          // distance of neighbouring pixels on each axis
  int64_t axis[3] = {0, 0, 1};           // distance of neighbouring positions
  int64_t first_shift[3] = {0, 0, 0};    // that of position 0
  int64_t pitch[3] = {1, 1, 1};          // of the image's positions that are kept
  int64_t phases = 1, phase_length = 0;  // of a row

  // The image itself.
  Layout(const GridAxis (&grid)[3], const int64_t* image_stride) : patched(false) {
    channel = image_stride[1];
    for (int a = 0; a < 2; ++a) {
      axis[a] = image_stride[a + 2];
      pixel[a] = axis[a] * grid[a].image_step;
    }
  }
  // Patches of pieces.
  Layout(const GridAxis (&grid)[3], const Pieces& pieces) : patched(true) {
    int64_t size[3];
    for (int a = 0; a < 3; ++a) {
      first_shift[a] = grid[a].least_shift();
      if (grid[a].taps == 1) pitch[a] = grid[a].image_step;
      size[a] = length(grid[a], a, pieces.extent[a]);
    }
    phases = grid[2].image_step / pitch[2];
    phase_length = up(size[2], phases);
    axis[1] = phases * phase_length;
    axis[0] = axis[1] * size[1];
    for (int a = 0; a < 2; ++a) pixel[a] = axis[a] * (grid[a].image_step / pitch[a]);
    // An odd number of cache lines apart, so that channels do not crowd one set of the cache, and
    // with slack for the last vector.
    channel = (up(axis[0] * size[0] + 31, 32) | 1) * 32;
  }
  // Positions that so many pixels read.
  int64_t length(const GridAxis& grid, int a, int64_t pixels) const {
    return (pixels - 1) * (grid.image_step / pitch[a]) +
           (grid.most_shift() - grid.least_shift()) / pitch[a] + 1;
  }
  int64_t tap(int a, int64_t shift) const {
    const int64_t i = (shift - first_shift[a]) / pitch[a];
    return a == 2 ? i % phases * phase_length + i / phases : i * axis[a];
  }
};

// Can runs be read from the image itself?
inline bool readable_in_place(const GridAxis (&grid)[3], const int64_t* image_stride) {
  bool yes = image_stride[4] == 1 && grid[2].image_step == 1;
  for (int a = 0; a < 3; ++a) yes = yes && !grid[a].reads_padding();
  for (int i = 0; i < 5; ++i) yes = yes && image_stride[i] >= 0;
  return yes;
}

// Fills the patch of one piece, row after row: zeros are written too far, and what follows writes
// again.
inline void fill_patch(BFloat16* patch, const Layout& layout, const GridAxis (&grid)[3],
                       const Box& pixels, const BFloat16* image, const int64_t* image_stride,
                       int64_t channels) {
  int64_t from[3], size[3], inner[3], outer[3];  // [inner, outer): what lies in the image
  for (int a = 0; a < 3; ++a) {
    const int64_t pitch = layout.pitch[a];
    from[a] = pixels.from[a] * grid[a].image_step + layout.first_shift[a];
    size[a] = layout.length(grid[a], a, pixels.size(a));
    inner[a] = least(size[a], from[a] < 0 ? up(-from[a], pitch) : 0);
    outer[a] = grid[a].image_size <= from[a] ? 0 : up(grid[a].image_size - from[a], pitch);
    outer[a] = most(inner[a], least(outer[a], size[a]));
  }
  const int64_t word = layout.pitch[2] * image_stride[4], stride = word * layout.phases;
  const int64_t row_step = layout.pitch[1] * image_stride[3];
  const bool channels_innermost = image_stride[1] == 1 && stride != 1;
  const int64_t together = channels_innermost ? channels : 1;    // channels
  const auto of_phase = [&](int64_t positions, int64_t phase) {  // mostly there is one: no division
    return layout.phases == 1 ? positions : up(positions - phase, layout.phases);
  };
  for (int64_t c = 0; c < channels; c += together)
    for (int64_t d = 0; d < size[0]; ++d) {
      BFloat16* row_to = patch + c * layout.channel + d * layout.axis[0];
      const BFloat16* row = image + c * image_stride[1] +
                            (from[0] + d * layout.pitch[0]) * image_stride[2] +
                            from[1] * image_stride[3] + from[2] * image_stride[4];
      const bool plane_inside = d >= inner[0] && d < outer[0];
      for (int64_t h = 0; h < size[1]; ++h, row_to += layout.axis[1], row += row_step) {
        if (!plane_inside || h < inner[1] || h >= outer[1]) {
          for (int64_t i = 0; i < together; ++i)
            zero_roughly(row_to + i * layout.channel, layout.axis[1]);
          continue;
        }
        for (int64_t phase = 0; phase < least(layout.phases, size[2]); ++phase) {
          BFloat16* const to = row_to + phase * layout.phase_length;
          const int64_t length = of_phase(size[2], phase);
          const int64_t begin = of_phase(inner[2], phase), end = of_phase(outer[2], phase);
          const BFloat16* const first = row + phase * word + begin * stride;
          if (channels_innermost) {
            for (int64_t i = 0; i < channels; ++i) {
              zero_roughly(to + i * layout.channel, begin);
              zero_roughly(to + i * layout.channel + end, length - end);
            }
            transpose_words(to + begin, layout.channel, first, stride, end - begin, channels);
          } else {
            // The same row of the next channel.
            for (int64_t i = begin; i < end; i += 32)
              prefetch(row + image_stride[1] + phase * word + i * stride);
            if (stride == 1) {
              copy_padded(to, first - begin, begin, end, length);
              continue;
            }
            zero_roughly(to, begin);
            copy_words(to + begin, first, stride, end - begin);
            zero_roughly(to + end, length - end);
          }
        }
      }
    }
}

// Calls visit(sample, box, piece) for the pieces of [first, last).
template <class Visit>
void each_piece(const GridAxis (&grid)[3], const Pieces& pieces, int64_t first, int64_t last,
                const Visit& visit) {
  const int64_t sample = grid[0].count * grid[1].count * grid[2].count;
  for (int64_t piece = 0; first < last; ++piece) {
    const int64_t end = pieces.end(first, last);
    // Several planes are one piece; several samples never are.
    visit(first / sample, box_around(grid, first, end), piece);
    first = end;
  }
}

// Neighbouring pixels that become columns (or terms): those `some` of 32, at their number from
// `at`.
struct Run {
  int64_t at;
  uint32_t some;
};

// Adds `length` columns from `column` on, which begin at `at`, to the runs [first, last).
inline void add_run(Run* run, int32_t first, int32_t& last, int64_t column, int64_t length,
                    int64_t at) {
  const uint32_t some = ~uint32_t{0} >> (depth - length) << column;
  if (first < last && run[last - 1].at == at - column)
    run[last - 1].some |= some;
  else
    run[last++] = {at - column, some};
}

// Finds the runs of [first, last), each 32 pixels' from first_run[i] to first_run[i + 1]. Calls
// visit(pixel, length, sample, position) for pieces of them.
template <class Visit>
void find_runs(const GridAxis (&grid)[3], const Pieces& pieces, const Layout& layout,
               int64_t sample_stride, int64_t piece_length, int64_t first, int64_t last, Run* run,
               int32_t* first_run, const Visit& visit) {
  int64_t number = first;
  int32_t runs = 0;
  each_piece(grid, pieces, first, last, [&](int64_t n, const Box& box, int64_t piece) {
    const int64_t end = pieces.end(number, last);
    int64_t at[3], rest = number;
    for (int a = 2; a >= 0; --a) at[a] = rest % grid[a].count, rest /= grid[a].count;
    while (number < end) {
      const int64_t pixel = number - first, column = pixel % depth;
      const int64_t length = least(least(grid[2].count - at[2], depth - column), end - number);
      int64_t from = layout.patched ? piece * piece_length : n * sample_stride;
      for (int a = 0; a < 3; ++a)
        from += (at[a] - (layout.patched ? box.from[a] : 0)) * layout.pixel[a];
      if (column == 0) first_run[pixel / depth] = runs;
      add_run(run, first_run[pixel / depth], runs, column, length, from);
      visit(pixel, length, n, at);
      number += length;
      at[2] += length;
      for (int a = 2; a > 0 && at[a] == grid[a].count; --a) at[a] = 0, ++at[a - 1];
    }
  });
  first_run[up(last - first, depth)] = runs;
}

}  // namespace torch_naiveconv::TNC_ISA
