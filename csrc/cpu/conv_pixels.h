// Forward and grad_input as a packed product whose rows are pixels. Start reading at
// multiply_images; conv_dense.h says what plays which part.
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

// The terms of some pixels, group after group and chain after chain.
struct Part {
  Stretch stretch[3];
  int32_t* start = nullptr;   // of each group
  int32_t* length = nullptr;  // of each chain of each group
  Term* term = nullptr;
  int64_t last_group;  // that has terms
};

// A grid, all its terms as the panels hold them, and its parts. The stride phases of a call, which
// have the same image_step and differ in count by at most one, may share a patch.
struct Phase {
  GridAxis grid[3];
  int32_t* start = nullptr;  // of each group
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
  int64_t lane_stride, channel_stride,
      group_stride;  // in the weight: per lane, image channel, group
  const S* bias;
  int64_t batch, groups, image_channels, lanes;  // the last two within one group
  int64_t kernel[3];
};

// Few channels would leave most of a vector empty: then rather have vectors of pixels. So would an
// odd vector of channels leave registers: fewer than 8 chains wait for themselves. And vectors of
// what lies side by side in the result are stored as they are.
template <class S>
bool has_vectors_of_pixels(const Images<S>& call, const GridAxis (&grid)[3]) {
  using T = typename Kind<S>::T;
  using Size = TileSize<T, Kind<S>::chains>;
  constexpr int L = Vec<T>::lanes;
  const int64_t vecs = up(call.lanes, L), pixels = grid[2].count;
  const int64_t tiles = up(vecs, most_vecs<T, Kind<S>::chains>());
  int64_t slots = 0;
  for (int64_t i = 0; i < tiles; ++i)
    slots += most(Size::rows * (cut_at(vecs, tiles, i + 1) - cut_at(vecs, tiles, i)), 8);
  const double channels_used = double(call.lanes * Size::rows) / double(slots * L);
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
  return pixels_used * (1 + 4 / terms) > (crowded ? 0.95 : 1.05) * channels_used;
}

// What the patch of a box holds of an axis: what any of the phases reads, of which pixel j reads
// from j * step + first_shift to j * step + last_shift. No padding if the axis is cut there, and
// only every hop-th position if a stride steps over the others.
struct Reach {
  int64_t count = 0, step = 1, hop = 1, image_size = 1, first_shift = 0, last_shift = 0;
  bool padding = false, is_cut = false;

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

// The product of one tile of lanes for all rows of a box, `rows[i]` of part i: the groups from g0
// to g1 on top of the totals of the earlier ones. `finish` takes the totals of a part's last group.
template <class S, class T>
void multiply_lanes(const Images<S>& call, const Phase& phase, const S* weight, LaneTile tile,
                    int64_t g0, int64_t g1, bool wide, bool apart, int64_t step,
                    const T* const* row, const int64_t* rows, T* panel, T* total,
                    const Finish<T>* finish) {
  using K = Kind<S>;
  const int64_t pitch = (wide ? tile.lanes : tile.vecs) * Vec<T>::lanes;
  for (int64_t g = g0; g < g1; ++g) {
    const int32_t* const lane = phase.lane + phase.start[g];
    const int64_t n = phase.start[g + 1] - phase.start[g];
    if (n == 0 && g > 0) continue;
    const int32_t* const start = phase.start + g;
    pack_panel(panel, wide ? tile.lanes : tile.vecs * Vec<T>::lanes, tile.lanes, weight,
               call.lane_stride, lane, n, step, phase.lane + start[1],
               g + 1 < g1 ? start[2] - start[1] : 0);
    const T* const* from = row;
    T* to = total;
    Finish<T> here = finish ? *finish : Finish<T>{};
    for (int64_t i = 0; i < phase.parts; ++i) {
      const Part& part = phase.part[i];
      const Term* const terms = part.term + part.start[g];
      const int32_t* const length = part.length + g * K::chains;
      const Finish<T>* const closes = finish && g == part.last_group ? &here : nullptr;
      if (rows[i] == 0 || (g > 0 && part.start[g] == part.start[g + 1])) {
      } else if (wide) {
        multiply_vectors<T, K::chains>(from, rows[i], terms, length, panel, tile.lanes, to, g > 0,
                                       closes);
      } else {
        multiply_rows<T, K::chains>(from, rows[i], terms, length, panel, tile.vecs, to, g > 0,
                                    apart, closes);
      }
      here.position += rows[i];
      from += rows[i];
      to += rows[i] * pitch;
    }
  }
}

// Stores the totals of multiply_vectors like store_rows: `pixels` elements of each vector, pixel
// after pixel to_pixel apart, lanes to_channel apart.
template <class T, int Chains, class S>
bool store_vectors(const T* total, int64_t vectors, int lanes, const T* bias, S* target,
                   const int64_t* position, int64_t to_channel, int64_t to_pixel, int pixels) {
  using V = Vec<T>;
  constexpr int L = V::lanes;
  auto special = is_special(V::zero());
  each_wide_run<T, Chains>(lanes, vectors, [&](Tiles<T>, int64_t v, int64_t tiles, int vecs) {
    for (; tiles > 0; --tiles, v += vecs)
      for (int i = 0; i < lanes; ++i) {
        const V b = V::broadcast(bias[i]);
        for (int j = 0; j < vecs; ++j) {
          const V sum = V::load(total + (v * lanes + i * vecs + j) * L) + b;
          special = V::either(special, is_special(sum));
          S* const to = target + i * to_channel + position[v + j];
          if (to_pixel == 1 && pixels == L) {
            canonical(sum).store(to);
          } else if (to_pixel == 1) {
            canonical(sum).store(to, pixels);
          } else {
            S values[L];
            canonical(sum).store(values);
            for (int l = 0; l < pixels; ++l) to[l * to_pixel] = values[l];
          }
        }
      }
  });
  return V::any(special);
}

// Rows of the result that the stride phases along w fill in turns.
struct Interleaved {
  int64_t per_row;        // vectors of each phase
  int64_t last_elements;  // of the result, in the last vectors of a row
};

// Stores the totals of multiply_vectors for `Phases` phases, phase after phase `apart` in memory:
// their pixels take turns in the result.
template <int Phases, class T, int Chains, class S>
bool store_interleaved(const T* total, int64_t apart, int64_t vectors, int lanes, const T* bias,
                       S* target, const int64_t* position, int64_t to_channel,
                       const Interleaved& row) {
  using V = Vec<T>;
  constexpr int L = V::lanes;
  auto special = is_special(V::zero());
  each_wide_run<T, Chains>(lanes, vectors, [&](Tiles<T>, int64_t v, int64_t tiles, int vecs) {
    for (; tiles > 0; --tiles, v += vecs)
      for (int j = 0; j < vecs; ++j) {
        const bool is_last = (v + j + 1) % row.per_row == 0;
        const int64_t elements = is_last ? row.last_elements : Phases * L;
        for (int i = 0; i < lanes; ++i) {
          const T* const from = total + (v * lanes + i * vecs + j) * L;
          const V b = V::broadcast(bias[i]);
          V part[Phases], result[Phases];
          for (int k = 0; k < Phases; ++k) {
            const V sum = V::load(from + k * apart) + b;
            special = V::either(special, is_special(sum));
            part[k] = canonical(sum);
          }
          if constexpr (Phases == 2) {
            V::merge(part[0], part[1], result[0], result[1]);
          } else {
            V even[2], odd[2];
            V::merge(part[0], part[2], even[0], even[1]);
            V::merge(part[1], part[3], odd[0], odd[1]);
            V::merge(even[0], odd[0], result[0], result[1]);
            V::merge(even[1], odd[1], result[2], result[3]);
          }
          S* const to = target + i * to_channel + position[v + j];
          for (int k = 0; k < Phases; ++k) {
            const int64_t rest = elements - k * L;
            if (rest >= L)
              result[k].store(to + k * L);
            else if (rest > 0)
              result[k].store(to + k * L, static_cast<int>(rest));
          }
        }
      }
  });
  return V::any(special);
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
                (rows - rest + (rest > 0 ? most(rest, 4) : 0));
      }
  return cost;
}

// Which axes to cut at the padding: those where that saves some of the work, or `all` that can be.
// Vectors of pixels are not cut; shorter runs along w cost a little more to store.
template <class S>
void choose_cuts(const Images<S>& call, const GridAxis (&grid)[3], bool wide, bool all,
                 Cut (&cut)[3]) {
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
        (!all && double(after) > (a == 2 ? 0.95 : 0.98) * double(before)))
      cut[a] = Cut(axis);
    else
      before = after;
  }
}

// Writes the pixels of the grids: of one, or of the stride phases of one call. Returns false to
// decline; `special` becomes true if an infinity or a NaN was written. With `may_cut`, products
// with padding may be left out, which is exact unless a weight is not finite.
template <class S>
bool multiply_images(const Images<S>& call, const GridAxis (*grid)[3], int phases, bool may_cut,
                     bool& special) {
  using K = Kind<S>;
  using T = typename K::T;
  using Size = TileSize<T, K::chains>;
  constexpr int L = Vec<T>::lanes;
  const int64_t all_taps = call.kernel[0] * call.kernel[1] * call.kernel[2];
  const bool wide = has_vectors_of_pixels(call, grid[0]);
  const int64_t lane_vecs = up(call.lanes, L);
  int64_t terms = 0, most_taps = 0;
  for (int i = 0; i < phases; ++i) {
    const int64_t taps = grid[i][0].taps * grid[i][1].taps * grid[i][2].taps;
    terms += call.image_channels * taps;
    most_taps = most(most_taps, taps);
  }
  Cut cut[3] = {Cut(grid[0][0]), Cut(grid[0][1]), Cut(grid[0][2])};
  // What lies side by side are the terms of a pixel: then rows can be read in place, unless the
  // pixels lie so far apart that their lines crowd few sets of the first cache.
  const bool terms_in_place =
      std::is_same_v<S, T> && phases == 1 && call.image_stride[1] == 1 && !wide;
  bool taps_in_place = terms_in_place && all_taps > 1 &&
                       std::llabs(call.image_stride[4]) * int64_t{sizeof(S)} <= pixel_bytes;
  if (may_cut && phases == 1) choose_cuts(call, grid[0], wide, taps_in_place, cut);
  for (int a = 0; a < 3; ++a)
    taps_in_place = taps_in_place && (cut[a].count > 1 || !grid[0][a].reads_padding());
  if (may_cut && phases == 1 && !taps_in_place) choose_cuts(call, grid[0], wide, false, cut);
  const Reach reach[3] = {Reach(grid, phases, 0, cut[0].count > 1),
                          Reach(grid, phases, 1, cut[1].count > 1),
                          Reach(grid, phases, 2, cut[2].count > 1)};
  const int64_t pixels = reach[0].count * reach[1].count * reach[2].count;

  // Cut the pixels into boxes of about rows_of_task, or half of them if the channels of one group
  // fill a patch; the lanes where that is not enough to share.
  const int64_t threads = thread_count();
  const int64_t work = call.batch * call.groups * pixels * terms * call.lanes;
  int64_t lane_blocks = 1;
  if (!wide && call.batch * pixels * call.groups < threads * rows_of_task / 2 &&
      work > work_of_task)
    lane_blocks = least(threads, up(lane_vecs, Size::vecs));
  const int64_t channels_in_group = least(call.image_channels, (K::group - 1) / all_taps + 2);
  const int64_t pixels_of_patch = patch_bytes / (int64_t{sizeof(T)} * channels_in_group);
  int64_t target = least(rows_of_task, most(rows_of_task / 2, pixels_of_patch));
  if (phases > 1)
    target = least(target, most(64, phase_bytes / (int64_t{sizeof(T)} * call.lanes * phases)));
  const bool channels_last = call.image_stride[1] == 1 && call.image_stride[4] != 1;
  if (channels_last && all_taps > 1) {  // some channels are read at a time, but lines hold more
    const int64_t pixel =
        call.image_channels * int64_t{sizeof(S)} * reach[0].step * reach[1].step * reach[2].step;
    target = least(target, most(source_bytes / pixel, rows_of_task / 4));
  }
  const int64_t wanted = up(threads, lane_blocks * call.groups);
  if (wanted > 1) target = least(target, most(up(call.batch * pixels, wanted), 32));
  int64_t part[4] = {call.batch, 1, 1, 1};  // pieces of n, d, h, w
  if (pixels <= target) {
    part[0] = up(call.batch, most(target / most(pixels, 1), 1));
  } else {
    int64_t inner = pixels;
    for (int a = 0; a < 3 && inner > target; ++a) {
      const int64_t slice = inner / reach[a].count;
      part[a + 1] = slice >= target ? reach[a].count : up(reach[a].count, target / slice);
      inner = slice;
    }
  }
  const int64_t boxes = part[0] * part[1] * part[2] * part[3];
  const int64_t box_samples = up(call.batch, part[0]);
  int64_t patch_size[3], box_rows = box_samples;
  for (int a = 0; a < 3; ++a) {
    const int64_t count = up(reach[a].count, part[a + 1]);
    box_rows *= a == 2 && wide ? up(count, L) : count;
    patch_size[a] = reach[a].most_size(count);
  }

  // Does a row point into the image or into a patch? What a single tap reads serves no other tap,
  // so it is not worth a copy where pixels, or the terms of a pixel, lie side by side.
  const bool pixels_in_place =
      call.image_stride[4] == 1 && (!wide || reach[2].count >= part[3] * L);
  // Whole images without padding that stay in the cache are as good as a copy.
  const bool whole_images =
      pixels_in_place && boxes == part[0] &&
      box_samples * std::llabs(call.image_stride[0]) * int64_t{sizeof(T)} <= patch_bytes;
  const bool tap_in_place =
      (all_taps == 1 || whole_images) && reach[2].step == 1 && (pixels_in_place || terms_in_place);
  bool patched = is_half_type<S> || phases > 1 || !(tap_in_place || taps_in_place);
  int64_t extent = call.image_channels * std::llabs(call.image_stride[1]);
  for (int a = 0; a < 3; ++a) {
    patched = patched || reach[a].padding;
    extent += patch_size[a] * reach[a].hop * std::llabs(call.image_stride[a + 2]);
  }
  patched = patched || extent > INT32_MAX;
  // Vectors of few channels' pixels, whose terms lie side by side, are turned in registers.
  const bool turned = wide && std::is_same_v<S, T> && all_taps == 1 && phases == 1 &&
                      !reach[0].padding && !reach[1].padding && !reach[2].padding &&
                      call.image_stride[1] == 1 && call.lanes <= rows_turned &&
                      call.image_channels % L == 0 &&
                      (call.image_channels <= K::group || call.image_channels % K::group == 0) &&
                      extent <= INT32_MAX && reach[2].count >= part[3] * L;
  patched = patched && !turned;
  // Does each row read lines of its own?
  const bool apart =
      !patched && terms_in_place && std::llabs(call.image_stride[4]) * int64_t{sizeof(S)} >= 64;
  const int64_t plane =
      box_samples * patch_size[0] * patch_size[1] * patch_size[2] * int64_t{sizeof(T)};
  const int64_t patch_channels =
      least(call.image_channels, most(patch_bytes / plane, channels_in_group));
  // Vectors of pixels that a stride of 2 steps through: every second element of a row side by side.
  const bool halves = wide && reach[2].step == 2 && reach[2].hop == 1;
  PatchLayout layout;
  if (patched) {
    layout = channels_last && !wide ? PatchLayout::by_pixel(patch_channels, patch_size)
                                    : PatchLayout::of(patch_channels, patch_size, halves);
    if (layout.elements > INT32_MAX / 2 || layout.channel * call.image_channels > INT32_MAX)
      return false;
  } else {
    layout.channel = call.image_stride[1];
    for (int a = 0; a < 3; ++a) layout.axis[a] = call.image_stride[a + 2];
  }
  const bool one_chunk = turned || patch_channels == call.image_channels;

  // The terms.
  const int64_t groups = up(call.image_channels * all_taps, K::group);
  const int64_t parts = cut[0].count * cut[1].count * cut[2].count;
  const int64_t terms_of_parts =
      phases > 1 ? terms : call.image_channels * cut[0].taps() * cut[1].taps() * cut[2].taps();
  constexpr size_t rounding = Arena::bytes_for<char>(64);  // of one piece more
  Arena& plan = plan_arena();
  plan.reset(Arena::bytes_for<Phase>(phases) + Arena::bytes_for<int32_t>(terms) +
             Arena::bytes_for<Term>(terms_of_parts) +
             phases * (Arena::bytes_for<Part>(parts) + rounding) +
             phases * (parts + 1) *
                 (Arena::bytes_for<int32_t>(groups + 1) + rounding +
                  Arena::bytes_for<int32_t>(groups * K::chains)) +
             Arena::bytes_for<int32_t>(call.image_channels * all_taps) +
             3 * Arena::bytes_for<int64_t>(most_taps));
  Phase* const phase = plan.take<Phase>(phases);
  int32_t* const packed = plan.take<int32_t>(call.image_channels * all_taps);
  Taps taps(plan, most_taps);
  int64_t first_shift[3] = {0, 0, 0};
  for (int a = 0; a < 3 && patched; ++a) first_shift[a] = reach[a].first_shift;
  for (int i = 0; i < phases; ++i) {
    Phase& p = phase[i];
    for (int a = 0; a < 3; ++a) {
      p.grid[a] = grid[i][a];
      if (phases > 1) cut[a] = Cut(p.grid[a]);
    }
    const Cut whole[3] = {Cut(p.grid[0]), Cut(p.grid[1]), Cut(p.grid[2])};
    taps.list(call, p.grid, {whole[0].stretch[0], whole[1].stretch[0], whole[2].stretch[0]},
              first_shift, layout);
    p.start = plan.take<int32_t>(groups + 1);
    p.lane = plan.take<int32_t>(call.image_channels * taps.count);
    int32_t* const length = plan.take<int32_t>(groups);
    each_term<1>(call, taps, groups, p.start, length,
                 [&](int64_t t, int64_t channel, int64_t tap, int64_t number) {
                   p.lane[t] =
                       static_cast<int32_t>(channel * call.channel_stride + taps.in_weight[tap]);
                   packed[number] = static_cast<int32_t>(t - p.start[number / K::group]);
                 });
    p.parts = 0;
    p.part = plan.take<Part>(parts);
    for (int d = 0; d < cut[0].count; ++d)
      for (int h = 0; h < cut[1].count; ++h)
        for (int w = 0; w < cut[2].count; ++w) {
          Part& part = p.part[p.parts++];
          const Stretch* const s[3] = {&cut[0].stretch[d], &cut[1].stretch[h], &cut[2].stretch[w]};
          for (int a = 0; a < 3; ++a) part.stretch[a] = *s[a];
          taps.list(call, p.grid, part.stretch, first_shift, layout);
          part.start = plan.take<int32_t>(groups + 1);
          part.length = plan.take<int32_t>(groups * K::chains);
          part.term = plan.take<Term>(call.image_channels * taps.count);
          each_term<K::chains>(
              call, taps, groups, part.start, part.length,
              [&](int64_t t, int64_t channel, int64_t tap, int64_t number) {
                part.term[t] = {static_cast<int32_t>(channel * layout.channel + taps.in_image[tap]),
                                packed[number]};
              });
          part.last_group = 0;
          for (int64_t g = 1; g < groups; ++g)
            if (part.start[g] < part.start[g + 1]) part.last_group = g;
        }
  }

  // Phases of few channels along w are stored together.
  const int64_t stride = phase[0].grid[2].step;
  const bool interleaves = wide && call.target_stride[4] == 1 && (stride == 2 || stride == 4) &&
                           phases >= stride && phase[stride - 1].grid[2].first == stride - 1;
  const int at_once = interleaves ? static_cast<int>(stride) : 1;  // phases

  int64_t row_step[3], hop[3];  // from pixel to pixel, in the image or the patch
  for (int a = 0; a < 3; ++a) {
    hop[a] = reach[a].hop;
    row_step[a] = reach[a].step / (patched ? hop[a] : 1) * layout.axis[a];
    if (a == 2 && halves) row_step[a] = 1;
  }
  // What lies side by side in the weight: the taps of a channel, or the channels of a tap.
  const int64_t step = call.channel_stride == 1 ? most_taps : 1;
  const int64_t tasks = call.groups * lane_blocks * boxes;
  parallel_for(
      tasks, most(1, work_of_task * tasks / most(work, 1)), K::mode,
      [&](int64_t begin, int64_t end) {
        Arena& arena = task_arena();
        const int64_t most_lanes = wide ? call.lanes : up(lane_vecs, lane_blocks) * L;
        // Of a row; they are kept from chunk to chunk, else only those of one tile of lanes.
        const int64_t all_totals = wide ? call.lanes * L : most_lanes;
        const int64_t totals_of_tile = L * (wide ? Size::rows : Size::vecs);
        const int64_t totals_of_phase =
            box_rows * (one_chunk ? least(all_totals, totals_of_tile) : all_totals);
        const int64_t total_size = totals_of_phase * (one_chunk ? at_once : phases);
        const int64_t panel_size = K::group * (wide ? Size::rows : L * Size::vecs);
        const int64_t patch_elements = patched ? box_samples * layout.elements + L : 0;
        const int64_t bias_size = up(most_lanes, L) * L;
        arena.reset(Arena::bytes_for<T>(total_size) + Arena::bytes_for<T>(panel_size) +
                    Arena::bytes_for<T>(patch_elements) + Arena::bytes_for<T>(bias_size) +
                    Arena::bytes_for<const T*>(box_rows * phases) +
                    Arena::bytes_for<int64_t>(box_rows * phases) +
                    Arena::bytes_for<int64_t>(phases * parts));
        T* const totals = arena.take<T>(total_size);
        T* const panel = arena.take<T>(panel_size);
        T* const patch = arena.take<T>(patch_elements);
        T* const bias = arena.take<T>(bias_size);
        const T** const row = arena.take<const T*>(box_rows * phases);
        int64_t* const position = arena.take<int64_t>(box_rows * phases);
        int64_t* const rows_of = arena.take<int64_t>(phases * parts);
        bool task_special = false;

        for (int64_t task = begin; task < end; ++task) {
          const int64_t box_index = task % boxes;
          const int64_t lane_block = task / boxes % lane_blocks;
          const int64_t group = task / boxes / lane_blocks;
          int64_t rest = box_index, lower[4], upper[4];
          for (int a = 3; a >= 0; --a) {
            const int64_t count = a ? reach[a - 1].count : call.batch;
            lower[a] = cut_at(count, part[a], rest % part[a]);
            upper[a] = cut_at(count, part[a], rest % part[a] + 1);
            rest /= part[a];
          }
          const S* const image = call.image + group * call.image_channels * call.image_stride[1];
          int64_t next = 0;
          Box box;
          int64_t shift = 0;  // of a row's pointer, where the box begins later than its reads would
          for (int a = 0; a < 3; ++a) {
            box.from[a] = reach[a].from(lower[a + 1]);
            box.to[a] = most(reach[a].to(upper[a + 1]), box.from[a]);
            shift += (lower[a + 1] * reach[a].step + reach[a].first_shift - box.from[a]) *
                     layout.axis[a];
          }

          // The rows of each part of each phase, and where they will be stored.
          for (int64_t i = 0; i < phases * parts; ++i) {
            const GridAxis(&grid_of)[3] = phase[i / parts].grid;
            const Part& part_of = phase[i / parts].part[i % parts];
            int64_t from_pixel[3], to_pixel[3];
            for (int a = 0; a < 3; ++a) {
              from_pixel[a] = most(lower[a + 1], part_of.stretch[a].from);
              to_pixel[a] = least(upper[a + 1], part_of.stretch[a].to);
            }
            // A phase with a pixel less has it nevertheless; it is not stored.
            if (at_once > 1) to_pixel[2] = upper[3];
            if (i % parts == 0) next = i / parts * box_rows;
            const int64_t first = next, width = to_pixel[2] - from_pixel[2];
            for (int64_t n = lower[0]; n < upper[0]; ++n)
              for (int64_t d = from_pixel[0]; d < to_pixel[0]; ++d)
                for (int64_t h = from_pixel[1]; h < to_pixel[1]; ++h) {
                  const int64_t at[3] = {d, h, from_pixel[2]};
                  int64_t to = n * call.target_stride[0];
                  int64_t from =
                      patched ? (n - lower[0]) * layout.elements + shift : n * call.image_stride[0];
                  for (int a = 0; a < 3; ++a) {
                    to += (grid_of[a].first + at[a] * grid_of[a].step) * call.target_stride[a + 2];
                    from += (at[a] - (patched ? lower[a + 1] : 0)) * row_step[a];
                  }
                  const T* pointer = patched ? patch : reinterpret_cast<const T*>(image);
                  pointer += from;
                  for (int64_t w = 0; w < width; w += wide ? L : 1) {
                    // The last vector of a row that is not a multiple overlaps the one before.
                    if (wide && w + L > width) w = most(width - L, 0);
                    row[next] = pointer + w * row_step[2];
                    position[next++] = to + w * grid_of[2].step * call.target_stride[4];
                  }
                }
            rows_of[i] = next - first;
          }

          const LaneBlock<T, K::chains> block(call.lanes, lane_block, lane_blocks);
          const int64_t tiles = wide ? up(call.lanes, Size::rows) : block.tiles;
          int64_t chunk_channel = 0;  // what channel the row pointers stand at
          for (int64_t g0 = 0; g0 < groups;) {
            // A chunk: the groups whose channels fit into the patch.
            int64_t g1 = groups;
            if (!one_chunk) {
              const int64_t first_channel = g0 * K::group / all_taps;
              g1 = most(g0 + 1, (first_channel + patch_channels) * all_taps / K::group);
              if (first_channel + patch_channels >= call.image_channels) g1 = groups;
              g1 = least(g1, groups);
              const int64_t move = (first_channel - chunk_channel) * layout.channel;
              for (int64_t r = 0; r < phases * box_rows && patched; ++r) row[r] -= move;
              chunk_channel = first_channel;
            }
            if (patched) {
              const int64_t channels =
                  least(up(g1 * K::group, all_taps), call.image_channels) - chunk_channel;
              const int64_t image_size[3] = {reach[0].image_size, reach[1].image_size,
                                             reach[2].image_size};
              for (int64_t n = lower[0]; n < upper[0]; ++n)
                copy_patch(patch + (n - lower[0]) * layout.elements, layout,
                           image + n * call.image_stride[0] + chunk_channel * call.image_stride[1],
                           call.image_stride[1], call.image_stride + 2, image_size, box, hop,
                           channels);
            }
            for (int i = 0; i < phases; i += at_once) {
              int64_t rows = 0;
              for (int64_t j = 0; j < parts; ++j) rows += rows_of[i * parts + j];
              T* total = totals + (one_chunk ? 0 : i * totals_of_phase);
              for (int64_t j = 0; j < tiles && rows > 0; ++j) {
                LaneTile tile;
                if (wide) {
                  tile.first = cut_at(call.lanes, tiles, j);
                  tile.lanes = static_cast<int>(cut_at(call.lanes, tiles, j + 1) - tile.first);
                  tile.vecs = 0;
                } else {
                  tile = block.tile(j);
                }
                const int64_t channel = group * call.lanes + tile.first;
                for (int64_t l = 0; l < up(tile.lanes, L) * L; ++l) {
                  bias[l] = call.bias && l < tile.lanes ? widened(call.bias[channel + l]) : T(0);
                  if (!is_half_type<S>) bias[l] += T(0);  // +0 instead of -0
                }
                S* const to = call.target + channel * call.target_stride[1];
                const int64_t to_channel = call.target_stride[1];
                const int64_t* to_row = position + i * box_rows;
                const GridAxis& row_axis = phase[i].grid[2];
                const int64_t to_pixel = row_axis.step * call.target_stride[4];
                const int64_t width = least(upper[3], row_axis.count) - lower[3];
                const int pixels = static_cast<int>(least(width, L));
                Finish<T> finish;
                bool finishes = false;  // where vectors lie side by side in the result
                if constexpr (std::is_same_v<S, T>) {
                  finishes = !turned && (wide ? to_pixel == 1 : to_channel == 1);
                  finish = {to,           to_row, to_channel, bias, wide ? pixels : tile.lanes,
                            &task_special};
                }
                const S* const weight =
                    call.weight + group * call.group_stride + tile.first * call.lane_stride;
                if constexpr (std::is_same_v<S, T>)
                  if (turned) {
                    const T* filter[rows_turned];
                    for (int l = 0; l < tile.lanes; ++l) filter[l] = weight + l * call.lane_stride;
                    each_wide_run<T, 1>(
                        tile.lanes, rows, [&](Tiles<T>, int64_t v, int64_t run, int vecs) {
                          for (int64_t k = 0; k < run * vecs; ++k)
                            turned_of<T>(tile.lanes)(
                                filter, call.channel_stride,
                                row[v + k] + phase->part->term->in_place, row_step[2],
                                L * row_step[2], groups, call.image_channels / groups,
                                total + ((v + k / vecs * vecs) * tile.lanes + k % vecs) * L,
                                vecs * L, false);
                        });
                  }
                for (int k = i; k < i + at_once && !turned; ++k)
                  multiply_lanes(call, phase[k], weight, tile, g0, g1, wide, apart, step,
                                 row + k * box_rows, rows_of + k * parts, panel,
                                 total + (k - i) * totals_of_phase, finishes ? &finish : nullptr);
                if (g1 < groups || finishes) {
                } else if (at_once > 1) {
                  int64_t size = 0;  // of the result's rows
                  for (int k = i; k < i + at_once; ++k) size += phase[k].grid[2].count;
                  const int64_t last = lower[3] + most(width - L, 0);  // pixel of the last vector
                  const Interleaved order{up(width, L),
                                          least(at_once * pixels, size - last * at_once)};
                  const auto store = at_once == 2 ? store_interleaved<2, T, K::chains, S>
                                                  : store_interleaved<4, T, K::chains, S>;
                  task_special |= store(total, totals_of_phase, rows, tile.lanes, bias, to, to_row,
                                        to_channel, order);
                } else if (wide) {
                  const T* from = total;
                  for (int64_t k = 0; k < parts; ++k) {
                    const int64_t some = rows_of[i * parts + k];
                    task_special |= store_vectors<T, K::chains>(
                        from, some, tile.lanes, bias, to, to_row, to_channel, to_pixel, pixels);
                    from += some * tile.lanes * L;
                    to_row += some;
                  }
                } else {
                  task_special |=
                      store_rows(total, rows, tile.vecs, tile.lanes, bias, to, to_row, to_channel);
                }
                if (!one_chunk) total += rows * (wide ? tile.lanes : tile.vecs) * L;
              }
            }
            g0 = g1;
          }
        }
        if (task_special) __atomic_store_n(&special, true, __ATOMIC_RELAXED);
      });
  return true;
}

// Writes the bias, or +0, to every pixel of a grid: the result where no tap meets the image.
template <class S>
void store_bias(const Images<S>& call, const GridAxis (&grid)[3]) {
  using T = typename Kind<S>::T;
  constexpr int L = Vec<T>::lanes;
  const int64_t channels = call.groups * call.lanes, width = grid[2].count;
  const int64_t planes = grid[0].count * grid[1].count;
  Arena& plan = plan_arena();
  plan.reset(Arena::bytes_for<S>(channels) + 2 * Arena::bytes_for<T>(up(channels, L) * L));
  S* const value = plan.take<S>(channels);
  T* const bias = plan.take<T>(up(channels, L) * L);
  T* const total = plan.take<T>(up(channels, L) * L);
  {
    FloatEnvironment environment(Kind<S>::mode);
    zero_run(total, channels);
    zero_run(bias, channels);
    for (int64_t c = 0; c < channels && call.bias; ++c) bias[c] = widened(call.bias[c]);
    const int64_t start = 0;
    store_rows(total, 1, static_cast<int>(up(channels, L)), static_cast<int>(channels), bias, value,
               &start, 1);
  }
  parallel_for(call.batch * planes, up(16384, width * channels), Kind<S>::mode,
               [&](int64_t begin, int64_t end) {
                 const int64_t to_channel = call.target_stride[1];
                 const int64_t to_pixel = grid[2].step * call.target_stride[4];
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t d = i % planes / grid[1].count, h = i % grid[1].count;
                   S* const row = call.target + i / planes * call.target_stride[0] +
                                  (grid[0].first + d * grid[0].step) * call.target_stride[2] +
                                  (grid[1].first + h * grid[1].step) * call.target_stride[3] +
                                  grid[2].first * call.target_stride[4];
                   if (to_channel == 1)
                     for (int64_t w = 0; w < width; ++w)
                       __builtin_memcpy(row + w * to_pixel, value,
                                        static_cast<size_t>(channels) * sizeof(S));
                   else if (to_pixel == 1)  // known to the compiler
                     for (int64_t c = 0; c < channels; ++c)
                       for (int64_t w = 0; w < width; ++w) row[c * to_channel + w] = value[c];
                   else
                     for (int64_t c = 0; c < channels; ++c)
                       for (int64_t w = 0; w < width; ++w)
                         row[c * to_channel + w * to_pixel] = value[c];
                 }
               });
}

}  // namespace torch_naiveconv::TNC_ISA
