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

// The terms that exist, group after group and chain after chain.
struct Terms {
  int64_t groups = 0;
  int32_t* start = nullptr;   // of each group
  int32_t* length = nullptr;  // of each chain of each group
  int32_t* row = nullptr;     // offset from a row's pointer
  int32_t* lane = nullptr;    // offset in the weight
};

// A grid and its terms. The stride phases of one call have the same image_step and differ in count
// by at most one; where they share a patch it holds what any of them reads.
struct Phase {
  GridAxis grid[3];
  Terms terms;

  int64_t taps() const { return grid[0].taps * grid[1].taps * grid[2].taps; }
  int64_t pixels() const { return grid[0].count * grid[1].count * grid[2].count; }
};
constexpr int most_phases = 64;  // that share a patch

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

// Few channels would leave most of a vector empty: then rather have vectors of pixels. So would a
// single vector of channels leave most registers.
template <class S>
bool has_vectors_of_pixels(const Images<S>& call, const GridAxis (&grid)[3]) {
  constexpr int L = Vec<typename Kind<S>::T>::lanes;
  const int64_t vecs = up(call.lanes, L), pixels = grid[2].count;
  const double channels_used = double(call.lanes) / double(vecs * L) * (vecs == 1 ? 0.6 : 1.0);
  const double pixels_used = double(pixels) / double(up(pixels, L) * L);
  return grid[2].image_step == 1 && pixels_used > 1.25 * channels_used;
}

// The reads of all phases on one axis: of pixel j, from j * step + first_shift to j * step +
// last_shift. A patch leaves out what a stride steps over: it holds every hop-th position.
struct Reach {
  int64_t count = 0, step = 1, hop = 1, image_size = 1, first_shift = 0, last_shift = 0;
  bool padding = false;

  Reach(const Phase* phase, int phases, int axis) {
    for (int i = 0; i < phases; ++i) {
      const GridAxis& a = phase[i].grid[axis];
      count = most(count, a.count);
      first_shift = i == 0 ? a.least_shift() : least(first_shift, a.least_shift());
      last_shift = i == 0 ? a.most_shift() : most(last_shift, a.most_shift());
      padding = padding || a.reads_padding();
    }
    step = phase[0].grid[axis].image_step;
    image_size = phase[0].grid[axis].image_size;
    if (phases == 1 && phase[0].grid[axis].taps == 1) hop = step;
  }
  int64_t size(int64_t pixels) const {
    return (pixels - 1) * (step / hop) + last_shift - first_shift + 1;
  }
};

// Fills the table of a phase. A row's pointer stands at its first_shift on each axis.
template <class S>
void fill_terms(const Images<S>& call, Phase& phase, const PatchLayout& layout,
                const int64_t (&first_shift)[3], int64_t* tap_row, int64_t* tap_lane,
                int64_t* tap_number) {
  using K = Kind<S>;
  Terms& table = phase.terms;
  const int64_t taps = phase.taps();
  const int64_t all_taps = call.kernel[0] * call.kernel[1] * call.kernel[2];
  int64_t i = 0;
  for (int64_t d = 0; d < phase.grid[0].taps; ++d)
    for (int64_t h = 0; h < phase.grid[1].taps; ++h)
      for (int64_t w = 0; w < phase.grid[2].taps; ++w, ++i) {
        const int64_t tap[3] = {d, h, w};
        tap_row[i] = tap_lane[i] = tap_number[i] = 0;
        for (int a = 0; a < 3; ++a) {
          const GridAxis& axis = phase.grid[a];
          tap_row[i] += (axis.shift(tap[a]) - first_shift[a]) * layout.axis[a];
          tap_lane[i] += axis.tap(tap[a]) * call.weight_stride[a + 2];
          tap_number[i] = tap_number[i] * call.kernel[a] + axis.tap(tap[a]);
        }
      }
  int64_t channel = 0, t = 0;
  i = 0;
  for (int64_t g = 0; g < table.groups; ++g) {
    table.start[g] = static_cast<int32_t>(t);
    const int64_t channel0 = channel, i0 = i;
    for (int64_t chain = 0; chain < K::chains; ++chain) {
      const int64_t before = t;
      channel = channel0;
      i = i0;
      while (channel < call.image_channels) {
        const int64_t number = channel * all_taps + tap_number[i];
        if (number >= (g + 1) * K::group) break;
        if (K::chains == 1 || number % K::chains == chain) {
          table.row[t] = static_cast<int32_t>(channel * layout.channel + tap_row[i]);
          table.lane[t++] = static_cast<int32_t>(channel * call.channel_stride + tap_lane[i]);
        }
        if (++i == taps) i = 0, ++channel;
      }
      table.length[g * K::chains + chain] = static_cast<int32_t>(t - before);
    }
  }
  table.start[table.groups] = static_cast<int32_t>(t);
}

// The product of one tile of lanes, [first, first + lanes), for all rows of a box: the groups from
// g0 to g1 on top of the totals of the earlier ones.
template <class S, class T>
void multiply_lanes(const Images<S>& call, const Terms& table, const S* weight, LaneTile tile,
                    int64_t g0, int64_t g1, bool wide, int64_t step, const T* const* row,
                    int64_t rows, T* panel, T* total) {
  using K = Kind<S>;
  for (int64_t g = g0; g < g1; ++g) {
    const int32_t* const length = table.length + g * K::chains;
    const int32_t* const lane = table.lane + table.start[g];
    const int64_t n = table.start[g + 1] - table.start[g];
    if (n == 0 && g > 0) continue;
    if (wide) {
      for (int64_t t = 0; t < n; ++t)
        for (int64_t i = 0; i < tile.lanes; ++i)
          panel[t * tile.lanes + i] = widened(weight[i * call.lane_stride + lane[t]]);
      multiply_vectors<T, K::chains>(row, rows, table.row + table.start[g], length, panel,
                                     tile.lanes, total, g > 0);
    } else {
      pack_panel(panel, tile.vecs, tile.lanes, weight, call.lane_stride, lane, n, step);
      if (g + 1 < g1)
        prefetch_panel(tile.lanes, weight, call.lane_stride, table.lane + table.start[g + 1],
                       table.start[g + 2] - table.start[g + 1]);
      multiply_rows<T, K::chains>(row, rows, table.row + table.start[g], length, panel, tile.vecs,
                                  total, g > 0);
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
  auto nan = is_nan(V::zero());
  each_wide_run<T, Chains>(lanes, vectors, [&](Tiles<T>, int64_t v, int64_t tiles, int vecs) {
    for (; tiles > 0; --tiles, v += vecs)
      for (int i = 0; i < lanes; ++i) {
        const V b = V::broadcast(bias[i]);
        for (int j = 0; j < vecs; ++j) {
          const V sum = V::load(total + (v * lanes + i * vecs + j) * L) + b;
          nan = V::either(nan, is_nan(sum));
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
  return V::any(nan);
}

// Writes the pixels of the phases. Returns false to decline; `nan` becomes true if a NaN was
// written.
template <class S>
bool multiply_images(const Images<S>& call, Phase* phase, int phases, bool& nan) {
  using K = Kind<S>;
  using T = typename K::T;
  using Size = TileSize<T, K::chains>;
  constexpr int L = Vec<T>::lanes;
  const int64_t all_taps = call.kernel[0] * call.kernel[1] * call.kernel[2];
  const Reach reach[3] = {Reach(phase, phases, 0), Reach(phase, phases, 1),
                          Reach(phase, phases, 2)};
  const bool wide = has_vectors_of_pixels(call, phase[0].grid);
  const int64_t lane_vecs = up(call.lanes, L);
  const int64_t pixels = reach[0].count * reach[1].count * reach[2].count;
  int64_t terms = 0, most_taps = 0;
  for (int i = 0; i < phases; ++i) {
    terms += call.image_channels * phase[i].taps();
    most_taps = most(most_taps, phase[i].taps());
  }

  // Cut the pixels into boxes of about rows_of_task, the lanes where that is not enough to share.
  const int64_t threads = thread_count();
  const int64_t work = call.batch * call.groups * pixels * terms * call.lanes;
  int64_t lane_blocks = 1;
  if (!wide && call.batch * pixels * call.groups < threads * rows_of_task && work > work_of_task)
    lane_blocks = least(threads, up(lane_vecs, Size::vecs));
  int64_t target = rows_of_task;
  if (phases > 1)
    target = least(target, most(64, phase_bytes / (int64_t{sizeof(T)} * call.lanes * phases)));
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
    patch_size[a] = reach[a].size(count);
  }

  // Does a row point into the image or into a patch? In place, the terms of a row should lie side
  // by side: a patch is compact.
  bool patched = is_half_type<S> || phases > 1 || wide || call.image_stride[1] != 1 ||
                 all_taps > 1 || reach[2].step > 1;
  int64_t extent = call.image_channels * std::llabs(call.image_stride[1]);
  for (int a = 0; a < 3; ++a) {
    patched = patched || reach[a].padding;
    extent += patch_size[a] * reach[a].hop * std::llabs(call.image_stride[a + 2]);
  }
  patched = patched || extent > INT32_MAX;
  const int64_t channels_in_group = least(call.image_channels, (K::group - 1) / all_taps + 2);
  int64_t patch_channels = 0;
  PatchLayout layout;
  if (patched) {
    const int64_t plane =
        box_samples * patch_size[0] * patch_size[1] * patch_size[2] * int64_t{sizeof(T)};
    patch_channels = least(call.image_channels, most(patch_bytes / plane, channels_in_group));
    layout = PatchLayout::of(patch_channels, patch_size);
    if (layout.elements > INT32_MAX / 2 || layout.channel * call.image_channels > INT32_MAX)
      return false;
  } else {
    layout.channel = call.image_stride[1];
    for (int a = 0; a < 3; ++a) layout.axis[a] = call.image_stride[a + 2];
  }
  const bool one_chunk = !patched || patch_channels == call.image_channels;

  // The terms.
  const int64_t groups = up(call.image_channels * all_taps, K::group);
  Arena& plan = plan_arena();
  plan.reset(phases * (Arena::bytes_for<int32_t>(groups + 1) +
                       Arena::bytes_for<int32_t>(groups * K::chains)) +
             2 * (Arena::bytes_for<int32_t>(terms) + phases * Arena::bytes_for<int32_t>(0)) +
             3 * Arena::bytes_for<int64_t>(most_taps));
  int64_t* const tap_row = plan.take<int64_t>(most_taps);
  int64_t* const tap_lane = plan.take<int64_t>(most_taps);
  int64_t* const tap_number = plan.take<int64_t>(most_taps);
  int64_t first_shift[3] = {0, 0, 0};
  for (int a = 0; a < 3 && patched; ++a) first_shift[a] = reach[a].first_shift;
  for (int i = 0; i < phases; ++i) {
    Terms& table = phase[i].terms;
    table.groups = groups;
    table.start = plan.take<int32_t>(groups + 1);
    table.length = plan.take<int32_t>(groups * K::chains);
    table.row = plan.take<int32_t>(call.image_channels * phase[i].taps());
    table.lane = plan.take<int32_t>(call.image_channels * phase[i].taps());
    fill_terms(call, phase[i], layout, first_shift, tap_row, tap_lane, tap_number);
  }

  int64_t row_step[3], hop[3];  // from pixel to pixel, in the image or the patch
  for (int a = 0; a < 3; ++a) {
    hop[a] = reach[a].hop;
    row_step[a] = reach[a].step / (patched ? hop[a] : 1) * layout.axis[a];
  }
  // What lies side by side in the weight: the taps of a channel, or the channels of a tap.
  const int64_t step = call.channel_stride == 1 && K::chains == 1 ? most_taps : 1;
  const int64_t tasks = call.groups * lane_blocks * boxes;
  parallel_for(
      tasks, most(1, work_of_task * tasks / most(work, 1)), K::mode,
      [&](int64_t begin, int64_t end) {
        Arena& arena = task_arena();
        const int64_t most_lanes = wide ? call.lanes : up(lane_vecs, lane_blocks) * L;
        // Totals are kept from chunk to chunk, else only of one tile of lanes.
        const int64_t tile_lanes = wide ? Size::rows * L : Size::vecs * L;
        const int64_t totals_of_phase =
            box_rows * (one_chunk ? least(wide ? most_lanes * L : most_lanes, tile_lanes)
                                  : (wide ? most_lanes * L : most_lanes));
        const int64_t total_size = totals_of_phase * (one_chunk ? 1 : phases);
        const int64_t panel_size = K::group * (wide ? Size::rows : L * Size::vecs);
        const int64_t patch_elements = patched ? box_samples * layout.elements + L : 0;
        const int64_t bias_size = up(most_lanes, L) * L;
        arena.reset(Arena::bytes_for<T>(total_size) + Arena::bytes_for<T>(panel_size) +
                    Arena::bytes_for<T>(patch_elements) + Arena::bytes_for<T>(bias_size) +
                    Arena::bytes_for<const T*>(box_rows * phases) +
                    Arena::bytes_for<int64_t>(box_rows * phases));
        T* const totals = arena.take<T>(total_size);
        T* const panel = arena.take<T>(panel_size);
        T* const patch = arena.take<T>(patch_elements);
        T* const bias = arena.take<T>(bias_size);
        const T** const all_rows = arena.take<const T*>(box_rows * phases);
        int64_t* const all_positions = arena.take<int64_t>(box_rows * phases);
        bool task_nan = false;

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
          Box box;
          for (int a = 0; a < 3; ++a) {
            box.from[a] = lower[a + 1] * reach[a].step + reach[a].first_shift;
            box.to[a] = (upper[a + 1] - 1) * reach[a].step + reach[a].last_shift + 1;
          }

          // The rows of each phase, and where they will be stored.
          int64_t rows_of[most_phases];
          for (int i = 0; i < phases; ++i) {
            const GridAxis(&grid)[3] = phase[i].grid;
            int64_t limit[4];
            for (int a = 1; a < 4; ++a) limit[a] = least(upper[a], grid[a - 1].count);
            const T** const row = all_rows + i * box_rows;
            int64_t* const position = all_positions + i * box_rows;
            const int64_t width = limit[3] - lower[3];
            int64_t rows = 0;
            for (int64_t n = lower[0]; n < upper[0]; ++n)
              for (int64_t d = lower[1]; d < limit[1]; ++d)
                for (int64_t h = lower[2]; h < limit[2]; ++h) {
                  const int64_t at[3] = {d, h, lower[3]};
                  int64_t to = n * call.target_stride[0];
                  int64_t from =
                      patched ? (n - lower[0]) * layout.elements : n * call.image_stride[0];
                  for (int a = 0; a < 3; ++a) {
                    to += (grid[a].first + at[a] * grid[a].step) * call.target_stride[a + 2];
                    from += (at[a] - (patched ? lower[a + 1] : 0)) * row_step[a];
                  }
                  const T* pointer = patched ? patch : reinterpret_cast<const T*>(image);
                  pointer += from;
                  for (int64_t w = 0; w < width; w += wide ? L : 1) {
                    // The last vector of a row that is not a multiple overlaps the one before.
                    if (wide && w + L > width) w = most(width - L, 0);
                    row[rows] = pointer + w * row_step[2];
                    position[rows++] = to + w * grid[2].step * call.target_stride[4];
                  }
                }
            rows_of[i] = rows;
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
              for (int i = 0; i < phases; ++i)
                for (int64_t r = 0; r < rows_of[i]; ++r) all_rows[i * box_rows + r] -= move;
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
            for (int i = 0; i < phases; ++i) {
              const int64_t rows = rows_of[i];
              const T* const* const row = all_rows + i * box_rows;
              const int64_t* const position = all_positions + i * box_rows;
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
                multiply_lanes(
                    call, phase[i].terms,
                    call.weight + group * call.group_stride + tile.first * call.lane_stride, tile,
                    g0, g1, wide, step, row, rows, panel, total);
                if (g1 == groups) {
                  for (int64_t l = 0; l < up(tile.lanes, L) * L; ++l)
                    bias[l] = call.bias && l < tile.lanes ? widened(call.bias[channel + l]) : T(0);
                  S* const to = call.target + channel * call.target_stride[1];
                  if (wide)
                    task_nan |= store_vectors<T, K::chains>(
                        total, rows, tile.lanes, bias, to, position, call.target_stride[1],
                        phase[i].grid[2].step * call.target_stride[4],
                        static_cast<int>(
                            least(least(upper[3], phase[i].grid[2].count) - lower[3], L)));
                  else
                    task_nan |= store_rows(total, rows, tile.vecs, tile.lanes, bias, to, position,
                                           call.target_stride[1]);
                }
                if (!one_chunk) total += rows * (wide ? tile.lanes : tile.vecs) * L;
              }
            }
            g0 = g1;
          }
        }
        if (task_nan) __atomic_store_n(&nan, true, __ATOMIC_RELAXED);
      });
  return true;
}

// The same for one grid.
template <class S>
bool multiply_images(const Images<S>& call, const GridAxis (&grid)[3], bool& nan) {
  Phase phase{{grid[0], grid[1], grid[2]}, {}};
  return multiply_images(call, &phase, 1, nan);
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
                   else
                     for (int64_t c = 0; c < channels; ++c)
                       for (int64_t w = 0; w < width; ++w)
                         row[c * to_channel + w * to_pixel] = value[c];
                 }
               });
}

// ---- regions: parts of a grid in which every tap that is left reads inside of the image
// ----------

constexpr int64_t most_cut_taps = 7;  // on an axis that is cut

// An axis cut where the set of taps that read inside of the image changes.
struct Regions {
  int count = 0;
  GridAxis part[2 * most_cut_taps + 1];

  explicit Regions(const GridAxis& axis) {
    if (!axis.reads_padding()) {
      part[count++] = axis;
      return;
    }
    int64_t inside[most_cut_taps][2];  // [first, end) of each tap
    for (int64_t i = 0; i < axis.taps; ++i) {
      const int64_t shift = axis.shift(i);
      inside[i][0] = least(up(most(-shift, 0), axis.image_step), axis.count);
      inside[i][1] = least(up(most(axis.image_size - shift, 0), axis.image_step), axis.count);
    }
    for (int64_t from = 0, to; from < axis.count; from = to) {
      to = axis.count;
      GridAxis& region = part[count++];
      region = axis;
      region.first += from * axis.step;
      region.taps = 0;
      for (int64_t i = 0; i < axis.taps; ++i) {
        for (const int64_t cut : inside[i])
          if (cut > from) to = least(to, cut);
        if (inside[i][0] > from || inside[i][1] <= from || region.taps++ > 0) continue;
        region.first_tap = axis.tap(i);
        region.first_shift = axis.shift(i) + from * axis.image_step;
      }
      region.count = to - from;
    }
  }
};

// Do regions pay? Where there are few, and much less to multiply.
inline bool worth_cutting(const GridAxis (&grid)[3]) {
  double share = 1;  // of the products
  for (const GridAxis& axis : grid) {
    if (!axis.reads_padding()) continue;
    const bool slivers = axis.shift_step < 4 && axis.shift_step > -4;
    if (slivers || axis.taps > most_cut_taps) return false;
    const Regions regions(axis);
    int64_t inside = 0;
    for (int i = 0; i < regions.count; ++i) inside += regions.part[i].count * regions.part[i].taps;
    share *= double(inside) / double(axis.count * axis.taps);
  }
  return share < 0.75;
}

// multiply_images without the products that read padding.
template <class S>
bool multiply_regions(const Images<S>& call, const GridAxis (&grid)[3], bool& nan) {
  const Regions planes(grid[0]), rows(grid[1]), columns(grid[2]);
  for (int d = 0; d < planes.count; ++d)
    for (int h = 0; h < rows.count; ++h)
      for (int w = 0; w < columns.count; ++w) {
        const GridAxis part[3] = {planes.part[d], rows.part[h], columns.part[w]};
        if (part[0].taps * part[1].taps * part[2].taps == 0)
          store_bias(call, part);
        else if (!multiply_images(call, part, nan))
          return false;
      }
  return true;
}

}  // namespace torch_naiveconv::TNC_ISA
