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

// The box of a task by wide tiles: `vectors` vectors of `pixels` pixels each, read at `at` and
// stored at `position`; the weights of all terms go into `panel`. Says whether a NaN came out.
template <class S, class T>
bool multiply_wide(const Images<S>& call, const Terms& table, int64_t group, const T* const* at,
                   const int64_t* position, int64_t vectors, int pixels, int64_t pixel_stride,
                   T* panel, T* total) {
  using V = Vec<T>;
  constexpr int L = V::lanes, chains = Kind<S>::chains, most_rows = TileSize<T, chains>::rows;
  auto nan = is_nan(V::zero());
  const int64_t blocks = up(call.lanes, most_rows);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = cut_at(call.lanes, blocks, block);
    const int rows = static_cast<int>(cut_at(call.lanes, blocks, block + 1) - first);
    const S* const weight = call.weight + group * call.group_stride + first * call.lane_stride;
    for (int64_t t = 0; t < table.start[table.groups]; ++t)
      for (int i = 0; i < rows; ++i)
        panel[t * rows + i] = widened(weight[i * call.lane_stride + table.lane[t]]);
    int vecs = 0;
    for (int64_t v = 0; v < vectors; v += vecs) {
      const Tiles<T> tile = wide_tile_of<T, chains>(rows, vectors - v, vecs);
      for (int64_t g = 0; g < table.groups; ++g)
        tile(1, at + v, table.row + table.start[g], table.length + g * chains,
             panel + table.start[g] * rows, total, g > 0, at + vectors - 1);
      for (int i = 0; i < rows; ++i) {
        const int64_t channel = group * call.lanes + first + i;
        const V bias = V::broadcast(call.bias ? widened(call.bias[channel]) : T(0));
        for (int j = 0; j < vecs; ++j) {
          const V sum = V::load(total + (i * vecs + j) * L) + bias;
          nan = V::either(nan, is_nan(sum));
          S* const to = call.target + channel * call.target_stride[1] + position[v + j];
          if (pixel_stride == 1) {
            canonical(sum).store(to, pixels);
          } else {
            S values[L];
            canonical(sum).store(values);
            for (int l = 0; l < pixels; ++l) to[l * pixel_stride] = values[l];
          }
        }
      }
    }
  }
  return V::any(nan);
}

// Writes the pixels of one grid. Returns false to decline; `nan` becomes true if a NaN was written.
template <class S>
bool multiply_images(const Images<S>& call, const GridAxis (&grid)[3], bool& nan) {
  using K = Kind<S>;
  using T = typename K::T;
  constexpr int L = Vec<T>::lanes;
  const int64_t taps = grid[0].taps * grid[1].taps * grid[2].taps;
  const int64_t all_taps = call.kernel[0] * call.kernel[1] * call.kernel[2];
  const int64_t pixels = grid[0].count * grid[1].count * grid[2].count;
  const int64_t terms = call.image_channels * taps;

  // Cut the pixels into boxes of about rows_of_task, the lanes where that is not enough to share.
  const int64_t threads = thread_count();
  const int64_t lane_vecs = up(call.lanes, L);
  const int64_t work = call.batch * call.groups * pixels * terms * call.lanes;
  // Few channels would leave most of a vector empty: then rather have vectors of pixels.
  const double channels_used = double(call.lanes) / double(lane_vecs * L);
  const double pixels_used = double(grid[2].count) / double(up(grid[2].count, L) * L);
  // So would a single vector of channels leave most registers, and with few terms for each output
  // the transposed store costs as much as the products.
  const double tile_used = channels_used * (lane_vecs == 1 ? 0.6 : 1.0);
  const bool cheap_store = false;
  bool wide = grid[2].image_step == 1 && pixels_used > (cheap_store ? 0.8 : 1.25 * tile_used);
  int64_t lane_blocks = 1;
  if (!wide && call.batch * pixels * call.groups < threads * rows_of_task && work > work_of_task)
    lane_blocks = least(threads, up(lane_vecs, TileSize<T, K::chains>::vecs));
  int64_t target = rows_of_task;
  const int64_t wanted = up(threads, lane_blocks * call.groups);
  if (wanted > 1) target = least(target, most(up(call.batch * pixels, wanted), 32));
  int64_t part[4] = {call.batch, 1, 1, 1};  // pieces of n, d, h, w
  if (pixels <= target) {
    part[0] = up(call.batch, most(target / most(pixels, 1), 1));
  } else {
    int64_t inner = pixels;
    for (int a = 0; a < 3 && inner > target; ++a) {
      const int64_t slice = inner / grid[a].count;
      part[a + 1] = slice >= target ? grid[a].count : up(grid[a].count, target / slice);
      inner = slice;
    }
  }
  const int64_t boxes = part[0] * part[1] * part[2] * part[3];
  const int64_t box_samples = up(call.batch, part[0]);
  int64_t box_count[3], patch_size[3], box_rows = box_samples;
  int64_t hop[3];  // a patch leaves out what a stride steps over
  for (int a = 0; a < 3; ++a) hop[a] = grid[a].taps == 1 ? grid[a].image_step : 1;
  for (int a = 0; a < 3; ++a) {
    box_count[a] = up(grid[a].count, part[a + 1]);
    box_rows *= box_count[a];
    patch_size[a] = (box_count[a] - 1) * (grid[a].image_step / hop[a]) + grid[a].most_shift() -
                    grid[a].least_shift() + 1;
  }

  // Does a row point into the image or into a patch?
  bool patched = is_half_type<S>;
  int64_t reach = call.image_channels * std::llabs(call.image_stride[1]);
  for (int a = 0; a < 3; ++a) {
    patched = patched || grid[a].reads_padding();
    if (a == 2 && wide) patched = patched || call.image_stride[4] != 1 || grid[2].count < L;
    reach += patch_size[a] * hop[a] * std::llabs(call.image_stride[a + 2]);
  }
  // In place, the terms of a row should lie side by side: a patch is compact. But of many stride
  // phases with few products each would fill its own.
  const bool side_by_side = call.image_stride[1] == 1 && taps == 1 && grid[2].image_step == 1;
  const bool one_of_phases = wide && taps == 1 && grid[2].step > 1;
  patched = patched || reach > INT32_MAX || !(side_by_side || one_of_phases);
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

  // The terms.
  Terms table;
  table.groups = up(call.image_channels * all_taps, K::group);
  Arena& plan = plan_arena();
  plan.reset(Arena::bytes_for<int32_t>(table.groups + 1) +
             Arena::bytes_for<int32_t>(table.groups * K::chains) +
             2 * Arena::bytes_for<int32_t>(terms) + 3 * Arena::bytes_for<int64_t>(taps));
  table.start = plan.take<int32_t>(table.groups + 1);
  table.length = plan.take<int32_t>(table.groups * K::chains);
  table.row = plan.take<int32_t>(terms);
  table.lane = plan.take<int32_t>(terms);
  int64_t* const tap_row = plan.take<int64_t>(taps);
  int64_t* const tap_lane = plan.take<int64_t>(taps);
  int64_t* const tap_number = plan.take<int64_t>(taps);
  {
    int64_t i = 0;
    for (int64_t d = 0; d < grid[0].taps; ++d)
      for (int64_t h = 0; h < grid[1].taps; ++h)
        for (int64_t w = 0; w < grid[2].taps; ++w, ++i) {
          const int64_t tap[3] = {d, h, w};
          tap_row[i] = tap_lane[i] = tap_number[i] = 0;
          for (int a = 0; a < 3; ++a) {
            const int64_t shift = grid[a].shift(tap[a]) - (patched ? grid[a].least_shift() : 0);
            tap_row[i] += shift * layout.axis[a];
            tap_lane[i] += grid[a].tap(tap[a]) * call.weight_stride[a + 2];
            tap_number[i] = tap_number[i] * call.kernel[a] + grid[a].tap(tap[a]);
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

  int64_t row_step[3];  // from pixel to pixel
  for (int a = 0; a < 3; ++a) row_step[a] = grid[a].image_step / (patched ? hop[a] : 1);
  // What lies side by side in the weight: the taps of a channel, or the channels of a tap.
  const int64_t step = call.channel_stride == 1 && K::chains == 1 ? taps : 1;
  const bool one_chunk = !patched || patch_channels == call.image_channels;
  wide = wide && one_chunk;
  const int64_t tasks = call.groups * lane_blocks * boxes;
  parallel_for(
      tasks, most(1, work_of_task * tasks / most(work, 1)), K::mode,
      [&](int64_t begin, int64_t end) {
        using Size = TileSize<T, K::chains>;
        Arena& arena = task_arena();
        const int64_t most_vecs = up(lane_vecs, lane_blocks);
        const int64_t total_size =
            wide ? Vec<T>::registers * L
                 : box_rows * L * (one_chunk ? least(most_vecs, Size::vecs) : most_vecs);
        const int64_t panel_size = wide ? terms * Size::rows : K::group * L * Size::vecs;
        const int64_t patch_size_all = patched ? box_samples * layout.elements + L : 0;
        arena.reset(Arena::bytes_for<T>(total_size) + Arena::bytes_for<T>(panel_size) +
                    Arena::bytes_for<T>(patch_size_all) + Arena::bytes_for<T>(most_vecs * L) +
                    Arena::bytes_for<const T*>(box_rows) + Arena::bytes_for<int64_t>(box_rows));
        T* const totals = arena.take<T>(total_size);
        T* const panel = arena.take<T>(panel_size);
        T* const patch = arena.take<T>(patch_size_all);
        T* const bias = arena.take<T>(most_vecs * L);
        const T** const row = arena.take<const T*>(box_rows);
        int64_t* const position = arena.take<int64_t>(box_rows);
        bool task_nan = false;

        for (int64_t task = begin; task < end; ++task) {
          const int64_t box_index = task % boxes;
          const int64_t lane_block = task / boxes % lane_blocks;
          const int64_t group = task / boxes / lane_blocks;
          int64_t rest = box_index, lower[4], upper[4];
          for (int a = 3; a >= 0; --a) {
            const int64_t count = a ? grid[a - 1].count : call.batch;
            lower[a] = cut_at(count, part[a], rest % part[a]);
            upper[a] = cut_at(count, part[a], rest % part[a] + 1);
            rest /= part[a];
          }
          const LaneBlock<T, K::chains> block(call.lanes, lane_block, lane_blocks);
          const S* const image = call.image + group * call.image_channels * call.image_stride[1];
          S* const target_image = call.target + group * call.lanes * call.target_stride[1];

          // The rows, and where they will be stored.
          Box box;
          for (int a = 0; a < 3; ++a) {
            box.from[a] = lower[a + 1] * grid[a].image_step + grid[a].least_shift();
            box.to[a] = (upper[a + 1] - 1) * grid[a].image_step + grid[a].most_shift() + 1;
          }
          int64_t rows = 0;
          for (int64_t n = lower[0]; n < upper[0]; ++n)
            for (int64_t d = lower[1]; d < upper[1]; ++d)
              for (int64_t h = lower[2]; h < upper[2]; ++h) {
                const int64_t at[3] = {d, h, lower[3]};
                int64_t to = n * call.target_stride[0], from;
                for (int a = 0; a < 3; ++a)
                  to += (grid[a].first + at[a] * grid[a].step) * call.target_stride[a + 2];
                from = patched ? (n - lower[0]) * layout.elements : n * call.image_stride[0];
                for (int a = 0; a < 3; ++a)
                  from += (at[a] - (patched ? lower[a + 1] : 0)) * row_step[a] * layout.axis[a];
                const T* pointer = patched ? patch : reinterpret_cast<const T*>(image);
                pointer += from;
                const int64_t width = upper[3] - lower[3];
                for (int64_t w = 0; w < width; w += wide ? L : 1) {
                  // The last vector of a row that is not a multiple overlaps the one before.
                  if (wide && w + L > width) w = most(width - L, 0);
                  row[rows] = pointer + w * row_step[2] * layout.axis[2];
                  position[rows++] = to + w * grid[2].step * call.target_stride[4];
                }
              }

          int64_t chunk_channel = 0;  // what channel the row pointers stand at
          for (int64_t g0 = 0; g0 < table.groups;) {
            // A chunk: the groups whose channels fit into the patch.
            int64_t g1 = table.groups;
            if (!one_chunk) {
              const int64_t first_channel = g0 * K::group / all_taps;
              g1 = most(g0 + 1, (first_channel + patch_channels) * all_taps / K::group);
              if (first_channel + patch_channels >= call.image_channels) g1 = table.groups;
              g1 = least(g1, table.groups);
              const int64_t move = (first_channel - chunk_channel) * layout.channel;
              for (int64_t r = 0; r < rows; ++r) row[r] -= move;
              chunk_channel = first_channel;
            }
            if (patched) {
              const int64_t channels =
                  least(up(g1 * K::group, all_taps), call.image_channels) - chunk_channel;
              int64_t image_size[3] = {grid[0].image_size, grid[1].image_size, grid[2].image_size};
              for (int64_t n = lower[0]; n < upper[0]; ++n)
                copy_patch(patch + (n - lower[0]) * layout.elements, layout,
                           image + n * call.image_stride[0] + chunk_channel * call.image_stride[1],
                           call.image_stride[1], call.image_stride + 2, image_size, box, hop,
                           channels);
            }
            if (wide)
              task_nan |= multiply_wide(call, table, group, row, position, rows,
                                        static_cast<int>(least(upper[3] - lower[3], L)),
                                        grid[2].step * call.target_stride[4], panel, totals);
            int64_t tile_total = 0;
            for (int64_t i = 0; i < block.tiles && !wide; ++i) {
              const LaneTile tile = block.tile(i);
              T* const total = totals + (one_chunk ? 0 : tile_total);
              tile_total += rows * tile.vecs * L;
              const S* const weight =
                  call.weight + group * call.group_stride + tile.first * call.lane_stride;
              for (int64_t g = g0; g < g1; ++g) {
                const int32_t* const length = table.length + g * K::chains;
                const int64_t n = table.start[g + 1] - table.start[g];
                if (n == 0 && g > 0) continue;
                pack_panel(panel, tile.vecs, tile.lanes, weight, call.lane_stride,
                           table.lane + table.start[g], n, step);
                if (g + 1 < g1)
                  prefetch_panel(tile.lanes, weight, call.lane_stride,
                                 table.lane + table.start[g + 1],
                                 table.start[g + 2] - table.start[g + 1]);
                multiply_rows<T, K::chains>(row, rows, table.row + table.start[g], length, panel,
                                            tile.vecs, total, g > 0);
              }
              if (g1 == table.groups) {
                const int64_t channel = group * call.lanes + tile.first;
                for (int64_t j = 0; j < tile.vecs * L; ++j)
                  bias[j] = call.bias && j < tile.lanes ? widened(call.bias[channel + j]) : T(0);
                task_nan |= store_rows(total, rows, tile.vecs, tile.lanes, bias,
                                       target_image + tile.first * call.target_stride[1], position,
                                       call.target_stride[1]);
              }
            }
            g0 = g1;
          }
        }
        if (task_nan) __atomic_store_n(&nan, true, __ATOMIC_RELAXED);
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
