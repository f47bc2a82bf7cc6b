// What the rows of a product are where they are pixels (conv_pixels.h): grids of pixels that have
// the same taps, where an axis is cut at the padding, and the terms of each part. Start reading at
// GridAxis; choose_cuts, at the end, says what is cut.
#pragma once

#include "conv_blocks.h"

namespace torch_naiveconv::TNC_ISA {

// One axis of a grid of pixels that have the same taps: all outputs, or one stride phase of the
// inputs. Pixel j lies at first + j * step of the target; its tap number i is tap i * tap_step +
// first_tap of the kernel and reads the image at j * image_step + shift(i).
struct GridAxis {
  int64_t count = 0, first = 0, step = 1, image_step = 1, image_size = 1;
  int64_t taps = 0, first_tap = 0, tap_step = 1, first_shift = 0, shift_step = 0;

  int64_t tap(int64_t i) const { return first_tap + i * tap_step; }
  int64_t shift(int64_t i) const { return first_shift + i * shift_step; }
  int64_t least_shift() const { return least(shift(0), shift(taps - 1)); }
  int64_t most_shift() const { return most(shift(0), shift(taps - 1)); }
  bool reads_padding() const {
    return least_shift() < 0 || (count - 1) * image_step + most_shift() >= image_size;
  }
};

inline GridAxis forward_axis(const Axis& a) {
  GridAxis g;
  g.count = a.out;
  g.image_step = a.stride;
  g.image_size = a.in;
  g.taps = a.kernel;
  g.first_shift = -a.pad;
  g.shift_step = a.dilation;
  return g;
}

// Inputs phase, phase + stride, ...: those that the same taps connect with the outputs.
inline GridAxis gradient_axis(const Axis& a, int64_t phase) {
  GridAxis g;
  g.count = up(a.in - phase, a.stride);
  g.first = phase;
  g.step = a.stride;
  g.image_size = a.out;
  for (int64_t k = 0; k < a.kernel; ++k) {
    const int64_t distance = phase + a.pad - k * a.dilation;
    if (distance % a.stride != 0) continue;
    const int64_t shift = distance / a.stride;
    if (g.taps == 0) {
      g.first_tap = k;
      g.first_shift = shift;
    } else if (g.taps == 1) {
      g.tap_step = k - g.first_tap;
      g.shift_step = shift - g.first_shift;
    }
    ++g.taps;
  }
  return g;
}

// Pixels [from, to) of an axis, for which taps [tap, tap + taps) are multiplied.
struct Stretch {
  int64_t from, to, tap, taps;
};

// An axis cut where the set of taps that read inside of the image changes; or, left whole, one
// stretch that reads the padding too.
struct Cut {
  static constexpr int64_t most_taps = 7;  // of an axis that is cut
  int count = 1;
  Stretch stretch[2 * most_taps + 1];

  explicit Cut(const GridAxis& axis) { stretch[0] = {0, axis.count, 0, axis.taps}; }

  void at_padding(const GridAxis& axis) {
    count = 0;
    for (int64_t from = 0, to; from < axis.count; from = to) {
      to = axis.count;
      Stretch& s = stretch[count++];
      s.tap = s.taps = 0;
      for (int64_t i = 0; i < axis.taps; ++i) {
        const int64_t first = inside(axis, i, 0), end = inside(axis, i, axis.image_size);
        if (first > from) to = least(to, first);
        if (end > from) to = least(to, end);
        if (first <= from && from < end && s.taps++ == 0) s.tap = i;
      }
      s.from = from;
      s.to = to;
    }
  }
  int64_t taps() const {  // of all stretches
    int64_t sum = 0;
    for (int i = 0; i < count; ++i) sum += stretch[i].taps;
    return sum;
  }
  // Has every tap a pixel for which it reads inside of the image?
  static bool all_taps_inside(const GridAxis& axis) {
    bool all = true;
    for (int64_t i = 0; i < axis.taps; ++i)
      all = all && inside(axis, i, 0) < inside(axis, i, axis.image_size);
    return all;
  }

 private:
  // The first pixel for which a tap reads at `position` of the image or behind.
  static int64_t inside(const GridAxis& axis, int64_t tap, int64_t position) {
    return least(up(most(position - axis.shift(tap), 0), axis.image_step), axis.count);
  }
};

// The terms of some pixels of a grid, group after group and chain after chain.
struct Part {
  const GridAxis* grid = nullptr;  // of three axes
  Stretch stretch[3];
  int32_t* start = nullptr;   // of each group
  int32_t* length = nullptr;  // of each chain of each group
  Term* term = nullptr;
  int64_t last_group;  // that has terms
};

// The terms that the panels hold, and the parts that share these panels: those of one grid, or
// stride phases. Stride phases of a call, which have the same image_step and differ in count by at
// most one, may also share a patch.
struct PanelTerms {
  int64_t first = 0;         // so many are in the panels before
  int32_t* start = nullptr;  // of each group, and the end
  int32_t* lane = nullptr;   // offset in the weight
  Part* part = nullptr;
  int64_t parts = 0;
};
constexpr int most_phases = 64;  // that share a patch
constexpr int most_parts = 64;   // of a phase

// A call as the loops see it: the image is read by the rows, the target is written.
template <class S>
struct Images {
  const S* image;
  const int64_t* image_stride;  // n, c, d, h, w
  S* target;
  const int64_t* target_stride;
  const S* weight;
  const int64_t* weight_stride;
  int64_t lane_stride, channel_stride, group_stride;  // of the weight; the channel is the image's
  const S* bias;
  int64_t batch, groups, image_channels, lanes;  // the last two within one group
  int64_t kernel[3];
};
// Forward, or grad_input, whose image is the gradient.
template <class S>
Images<S> images_of(const ConvProblem& p) {
  const ConvShape& s = p.shape;
  const bool forward = p.direction == Direction::forward;
  const RawView &image = forward ? p.input : p.output, &target = forward ? p.output : p.input;
  const int64_t* const weight = p.weight.stride;
  return {.image = static_cast<const S*>(image.data),
          .image_stride = image.stride,
          .target = static_cast<S*>(target.data),
          .target_stride = target.stride,
          .weight = static_cast<const S*>(p.weight.data),
          .weight_stride = weight,
          .lane_stride = weight[forward ? 0 : 1],
          .channel_stride = weight[forward ? 1 : 0],
          .group_stride = weight[0] * s.group_out(),
          .bias = static_cast<const S*>(p.bias),
          .batch = s.batch,
          .groups = s.groups,
          .image_channels = forward ? s.group_in() : s.group_out(),
          .lanes = forward ? s.group_out() : s.group_in(),
          .kernel = {s.axis[0].kernel, s.axis[1].kernel, s.axis[2].kernel}};
}

// Few channels would leave most of a vector empty: then rather have vectors of pixels. And vectors
// of what lies side by side in the result are stored as they are.
template <class S>
bool has_vectors_of_pixels(const Images<S>& call, const GridAxis (&grid)[3]) {
  using T = typename Kind<S>::T;
  constexpr int L = Vec<T>::lanes;
  const int64_t pixels = grid[2].count;
  const double channels_used = double(call.lanes) / double(up(call.lanes, L) * L);
  const double pixels_used = double(pixels) / double(up(pixels, L) * L);
  if (grid[2].image_step > (call.image_stride[4] == 1 ? 2 : 1)) return false;
  if (call.target_stride[1] == 1) return pixels_used > 2 * channels_used;
  // Storing NCHW out of vectors of channels costs as much as four terms more.
  const double terms = double(call.image_channels * grid[0].taps * grid[1].taps * grid[2].taps);
  // Terms that are read in place (see below) a multiple of 256 bytes apart crowd a quarter of the
  // first cache's sets, or less: rather whole lines of each.
  const bool crowded = !is_half_type<S> && terms == double(call.image_channels) &&
                       grid[2].image_step == 1 && call.image_stride[4] == 1 &&
                       call.image_stride[1] * int64_t{sizeof(S)} % 256 == 0;
  // A single vector of channels is multiplied as fast as rows can be loaded, no faster.
  const bool narrow = call.lanes <= L && pixels >= 2 * L && grid[2].image_step == 1;
  return pixels_used * (1 + 4 / terms) > (narrow ? 0.84 : crowded ? 0.95 : 1.05) * channels_used;
}

// What the patch of a box holds of an axis: what any of the phases reads, of which pixel j reads
// from j * step + first_shift to j * step + last_shift. No padding if the axis is cut there, and
// only every hop-th position if a stride steps over the others.
struct Reach {
  int64_t count = 0, step = 1, hop = 1, image_size = 1, first_shift = 0, last_shift = 0;
  bool padding = false, is_cut = false;

  Reach() = default;
  Reach(const GridAxis (*grid)[3], int phases, int axis, bool cut) : is_cut(cut) {
    for (int i = 0; i < phases; ++i) {
      const GridAxis& a = grid[i][axis];
      count = most(count, a.count);
      first_shift = i == 0 ? a.least_shift() : least(first_shift, a.least_shift());
      last_shift = i == 0 ? a.most_shift() : most(last_shift, a.most_shift());
      padding = padding || (a.reads_padding() && !cut);
    }
    step = grid[0][axis].image_step;
    image_size = grid[0][axis].image_size;
    if (phases == 1 && grid[0][axis].taps == 1 && !cut) hop = step;
  }
  int64_t from(int64_t pixel) const {
    const int64_t at = pixel * step + first_shift;
    return is_cut ? most(at, 0) : at;
  }
  int64_t to(int64_t end_pixel) const {
    const int64_t at = (end_pixel - 1) * step + last_shift + 1;
    return is_cut ? least(at, image_size) : at;
  }
  int64_t most_size(int64_t pixels) const {
    const int64_t size = (pixels - 1) * (step / hop) + last_shift - first_shift + 1;
    return is_cut ? least(size, image_size) : size;
  }
};

// The taps of stretches of the three axes, in the contract's order.
struct Taps {
  int64_t count = 0;
  int64_t* number = nullptr;    // among all taps of the kernel
  int64_t* in_image = nullptr;  // offset from a row's pointer, which stands at first_shift
  int64_t* in_weight = nullptr;

  Taps(Arena& arena, int64_t limit)
      : number(arena.take<int64_t>(limit)),
        in_image(arena.take<int64_t>(limit)),
        in_weight(arena.take<int64_t>(limit)) {}
  template <class S>
  void list(const Images<S>& call, const GridAxis (&grid)[3], const Stretch (&stretch)[3],
            const int64_t (&first_shift)[3], const PatchLayout& layout) {
    count = 0;
    for (int64_t d = 0; d < stretch[0].taps; ++d)
      for (int64_t h = 0; h < stretch[1].taps; ++h)
        for (int64_t w = 0; w < stretch[2].taps; ++w, ++count) {
          const int64_t tap[3] = {stretch[0].tap + d, stretch[1].tap + h, stretch[2].tap + w};
          number[count] = in_image[count] = in_weight[count] = 0;
          for (int a = 0; a < 3; ++a) {
            number[count] = number[count] * call.kernel[a] + grid[a].tap(tap[a]);
            const int64_t at = grid[a].shift(tap[a]) - first_shift[a];
            const bool halves = a == 2 && layout.odd > 0;
            in_image[count] += halves ? at / 2 + at % 2 * layout.odd : at * layout.axis[a];
            in_weight[count] += grid[a].tap(tap[a]) * call.weight_stride[a + 2];
          }
        }
  }
};

// use(t, channel, tap, number) for term t of all, group after group and chain after chain. `number`
// is the contract's.
template <int Chains, class S, class Use>
void each_term(const Images<S>& call, const Taps& taps, int64_t groups, int32_t* start,
               int32_t* length, const Use& use) {
  using K = Kind<S>;
  const int64_t all_taps = call.kernel[0] * call.kernel[1] * call.kernel[2];
  int64_t channel = taps.count > 0 ? 0 : call.image_channels, tap = 0, t = 0;
  for (int64_t g = 0; g < groups; ++g) {
    start[g] = static_cast<int32_t>(t);
    const int64_t channel0 = channel, tap0 = tap;
    for (int64_t chain = 0; chain < Chains; ++chain) {
      const int64_t before = t;
      channel = channel0;
      tap = tap0;
      while (channel < call.image_channels) {
        const int64_t number = channel * all_taps + taps.number[tap];
        if (number >= (g + 1) * K::group) break;
        if (Chains == 1 || number % Chains == chain) use(t++, channel, tap, number);
        if (++tap == taps.count) tap = 0, ++channel;
      }
      length[g * Chains + chain] = static_cast<int32_t>(t - before);
    }
  }
  start[groups] = static_cast<int32_t>(t);
}

// What the products of cut axes cost, in rows x taps, if `samples` of them share a box. A tile of
// fewer than 4 rows takes as long: its chains wait for themselves.
inline int64_t cost_of(const Cut& d, const Cut& h, const Cut& w, int64_t samples, bool wide,
                       int64_t lanes, int64_t tile_rows) {
  int64_t cost = 0;
  for (int i = 0; i < d.count; ++i)
    for (int j = 0; j < h.count; ++j)
      for (int k = 0; k < w.count; ++k) {
        const int64_t width = w.stretch[k].to - w.stretch[k].from;
        const int64_t rows = samples * (d.stretch[i].to - d.stretch[i].from) *
                             (h.stretch[j].to - h.stretch[j].from) *
                             (wide ? up(width, lanes) : width);
        const int64_t rest = rows % tile_rows;
        cost += d.stretch[i].taps * h.stretch[j].taps * w.stretch[k].taps *
                (rows - rest + (rest > 0 ? most(rest, least(4, tile_rows)) : 0));
      }
  return cost;
}

// Which axes to cut at the padding: those where at most that share of the work is left. Vectors of
// pixels are not cut; shorter runs along w cost a little more to store.
template <class S>
void choose_cuts(const Images<S>& call, const GridAxis (&grid)[3], bool wide,
                 const double (&most_left)[3], Cut (&cut)[3]) {
  using T = typename Kind<S>::T;
  constexpr int chains = Kind<S>::chains, lanes = Vec<T>::lanes;
  const int tile_rows =
      TileSize<T, chains>::rows_of(LaneBlock<T, chains>(call.lanes, 0, 1).tile(0).vecs);
  const int64_t terms = call.image_channels * grid[0].taps * grid[1].taps * grid[2].taps;
  const int64_t pixels = grid[0].count * grid[1].count * grid[2].count;
  const int64_t samples = most(1, least(call.batch, rows_of_task / most(pixels, 1)));
  const auto cost = [&] {
    return cost_of(cut[0], cut[1], cut[2], samples, wide, lanes, tile_rows);
  };
  for (int a = 0; a < 3; ++a) cut[a] = Cut(grid[a]);
  int64_t before = cost();
  for (int a = 0; a < (wide ? 2 : 3); ++a) {
    const GridAxis& axis = grid[a];
    if (!axis.reads_padding() || axis.taps > Cut::most_taps || !Cut::all_taps_inside(axis))
      continue;
    cut[a].at_padding(axis);
    const int64_t after = cost();
    const int64_t parts = cut[0].count * cut[1].count * cut[2].count;
    if (parts > most_parts || parts * terms > 1 << 17 ||
        double(after) > most_left[a] * double(before))
      cut[a] = Cut(axis);
    else
      before = after;
  }
}

}  // namespace torch_naiveconv::TNC_ISA
