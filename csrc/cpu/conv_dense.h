// Convolution as a packed implicit matrix product: total[row][lane] = sum over terms of
// row operand x lane operand. What plays which part:
//
//                rows            lanes            terms, in the contract's order
//   forward      output pixels   output channels  (ic, kd, kh, kw)
//   grad_input   input pixels    input channels   (oc, kd, kh, kw), one stride phase at a time
//   grad_weight  (ic, taps)      output channels  (od, oh, ow) of one sample, sample after sample
//
// Rows are never packed: the microkernel reads a row through a pointer and one offset per term that
// all rows share, so a window, a stride and a dilation cost nothing. They point into the image
// itself or, where a tap can meet padding or the elements are 16-bit, into a zero-padded copy (a
// patch) of the few channels in work. Lanes come from panels of one group of terms.
//
// Start reading at run_dense, at the end; multiply_images and multiply_windows are the loops.
#pragma once

#include "pack.h"

#include "microkernel.h"

namespace torch_naiveconv::TNC_ISA {

constexpr int64_t patch_bytes = 1 << 20;  // of a task's patch, unless one group needs more
constexpr int64_t total_bytes = 1 << 20;  // of a task's totals
constexpr int64_t rows_of_task = 1024;    // pixels that share a packed panel
constexpr int64_t work_of_task = 50000;   // multiply-adds below which a thread is not worth waking

// The type that products of S are kept in, how many chains a group has, and its length.
template <class S>
struct Kind {
  using T = std::conditional_t<is_half_type<S>, float, S>;
  static constexpr int chains = is_half_type<S> ? 2 : 1;
  static constexpr int64_t group = is_half_type<S> ? 32 : 128;
  static constexpr FloatEnvironment::Mode mode =
      is_half_type<S> ? FloatEnvironment::flush : FloatEnvironment::gradual;
};

// [0, count) cut into `pieces` of nearly equal length: the first element of piece i.
TNC_INLINE int64_t cut_at(int64_t count, int64_t pieces, int64_t i) { return count * i / pieces; }

// ---- lanes: channels in tiles of whole vectors ----------------------------------------------

// Lanes [first, first + lanes) of a block of channels, `vecs` vectors.
struct LaneTile {
  int64_t first;
  int lanes, vecs;
};

// A block is some whole vectors of the lanes, cut into tiles that are as equal as can be.
template <class T, int Chains>
struct LaneBlock {
  static constexpr int L = Vec<T>::lanes;
  int64_t first_vec, vecs, lanes_in_all, tiles;

  LaneBlock(int64_t lanes, int64_t block, int64_t blocks) : lanes_in_all(lanes) {
    const int64_t all = up(lanes, L);
    first_vec = cut_at(all, blocks, block);
    vecs = cut_at(all, blocks, block + 1) - first_vec;
    tiles = up(vecs, TileSize<T, Chains>::vecs);
  }
  LaneTile tile(int64_t i) const {
    const int64_t from = cut_at(vecs, tiles, i), to = cut_at(vecs, tiles, i + 1);
    const int64_t first = (first_vec + from) * L;
    return {first, static_cast<int>(least(lanes_in_all - first, (to - from) * L)),
            static_cast<int>(to - from)};
  }
};

// ---- patches: zero-padded copies of a box of an image -----------------------------------------

struct Box {  // positions [from, to) on each axis; may reach outside the image
  int64_t from[3], to[3];
  int64_t size(int axis) const { return to[axis] - from[axis]; }
};

// How a patch lies in memory: channels apart or innermost, as in the image it is copied from.
struct PatchLayout {
  int64_t channel = 1, axis[3] = {0, 0, 0};
  int64_t elements = 0;  // for one sample

  static PatchLayout of(int64_t channels, const int64_t (&size)[3], bool channels_innermost) {
    PatchLayout p;
    if (channels_innermost) {
      p.axis[2] = channels;
      p.axis[1] = p.axis[2] * size[2];
      p.axis[0] = p.axis[1] * size[1];
      p.elements = p.axis[0] * size[0];
    } else {
      p.axis[2] = 1;
      p.axis[1] = size[2];
      p.axis[0] = p.axis[1] * size[1];
      // An odd number of cache lines apart, so that channels do not crowd one set of the cache.
      p.channel = (up(p.axis[0] * size[0], 16) | 1) * 16;
      p.elements = p.channel * channels;
    }
    return p;
  }
};

// Copies `channels` channels of the box; what lies outside the image is +0.
template <class T, class S>
void copy_patch(T* patch, const PatchLayout& layout, const S* image, int64_t image_channel,
                const int64_t* image_axis, const int64_t (&image_size)[3], const Box& box,
                int64_t channels) {
  const bool channels_innermost = layout.channel == 1 && layout.axis[2] != 1;
  const int64_t width = box.size(2);
  const int64_t w0 = least(most(-box.from[2], 0), width);
  const int64_t w1 = most(w0, least(image_size[2] - box.from[2], width));
  const int64_t outer = channels_innermost ? 1 : channels;
  for (int64_t c = 0; c < outer; ++c)
    for (int64_t d = box.from[0]; d < box.to[0]; ++d)
      for (int64_t h = box.from[1]; h < box.to[1]; ++h) {
        T* const to = patch + c * layout.channel + (d - box.from[0]) * layout.axis[0] +
                      (h - box.from[1]) * layout.axis[1];
        const bool inside = d >= 0 && d < image_size[0] && h >= 0 && h < image_size[1];
        if (!inside) {
          zero_run(to, width * layout.axis[2]);
          continue;
        }
        const S* const from = image + c * image_channel + d * image_axis[0] + h * image_axis[1];
        zero_run(to, w0 * layout.axis[2]);
        if (!channels_innermost && image_axis[2] == 1)  // the same row of the next channel
          for (int64_t w = w0; w < w1; w += 64 / int64_t{sizeof(S)})
            prefetch(from + image_channel + box.from[2] + w);
        if (channels_innermost) {
          for (int64_t w = w0; w < w1; ++w)
            copy_run(to + w * layout.axis[2], from + (box.from[2] + w) * image_axis[2],
                     image_channel, channels);
        } else {
          copy_run(to + w0, from + (box.from[2] + w0) * image_axis[2], image_axis[2], w1 - w0);
        }
        zero_run(to + w1 * layout.axis[2], (width - w1) * layout.axis[2]);
      }
}

// ---- forward and grad_input: rows are pixels ----------------------------------------------------

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
      const Tile<T> tile = wide_tile_of<T, chains>(rows, vectors - v, vecs);
      for (int64_t g = 0; g < table.groups; ++g)
        tile(at + v, table.row + table.start[g], table.length + g * chains,
             panel + table.start[g] * rows, total, g > 0, at[least(v + vecs, vectors - 1)]);
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
  bool wide = grid[2].image_step == 1 && pixels_used > 1.25 * channels_used;
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
  for (int a = 0; a < 3; ++a) {
    box_count[a] = up(grid[a].count, part[a + 1]);
    box_rows *= box_count[a];
    patch_size[a] =
        (box_count[a] - 1) * grid[a].image_step + grid[a].most_shift() - grid[a].least_shift() + 1;
  }

  // Does a row point into the image or into a patch?
  bool patched = is_half_type<S>;
  int64_t reach = call.image_channels * std::llabs(call.image_stride[1]);
  for (int a = 0; a < 3; ++a) {
    patched = patched || grid[a].reads_padding();
    if (a == 2 && wide) patched = patched || call.image_stride[4] != 1 || grid[2].count < L;
    reach += patch_size[a] * std::llabs(call.image_stride[a + 2]);
  }
  patched = patched || reach > INT32_MAX;
  const int64_t channels_in_group = least(call.image_channels, (K::group - 1) / all_taps + 2);
  int64_t patch_channels = 0;
  PatchLayout layout;
  if (patched) {
    const int64_t plane =
        box_samples * patch_size[0] * patch_size[1] * patch_size[2] * int64_t{sizeof(T)};
    patch_channels = least(call.image_channels, most(patch_bytes / plane, channels_in_group));
    layout = PatchLayout::of(patch_channels, patch_size,
                             !wide && call.image_stride[1] == 1 && call.image_stride[4] != 1);
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
            wide ? Size::rows * Size::vecs * L
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
                  from +=
                      (at[a] - (patched ? lower[a + 1] : 0)) * grid[a].image_step * layout.axis[a];
                const T* pointer = patched ? patch : reinterpret_cast<const T*>(image);
                pointer += from;
                const int64_t width = upper[3] - lower[3];
                for (int64_t w = 0; w < width; w += wide ? L : 1) {
                  // The last vector of a row that is not a multiple overlaps the one before.
                  if (wide && w + L > width) w = most(width - L, 0);
                  row[rows] = pointer + w * grid[2].image_step * layout.axis[2];
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
                           call.image_stride[1], call.image_stride + 2, image_size, box, channels);
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
                           table.lane + table.start[g], n);
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

// Writes the bias, or +0, to every pixel of a grid that no tap connects with the image.
template <class S>
void store_no_terms(const Images<S>& call, const GridAxis (&grid)[3]) {
  using T = typename Kind<S>::T;
  const int64_t channels = call.groups * call.lanes;
  parallel_for(call.batch * channels, up(4096, grid[1].count * grid[2].count), Kind<S>::mode,
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t n = i / channels, c = i % channels;
                   const int64_t zero_position = 0;
                   T bias[Vec<T>::lanes] = {}, total[Vec<T>::lanes] = {};
                   if (call.bias) bias[0] = widened(call.bias[c]);
                   S value;
                   store_rows(total, 1, 1, 1, bias, &value, &zero_position, 1);
                   for (int64_t d = 0; d < grid[0].count; ++d)
                     for (int64_t h = 0; h < grid[1].count; ++h)
                       for (int64_t w = 0; w < grid[2].count; ++w)
                         call.target[n * call.target_stride[0] + c * call.target_stride[1] +
                                     (grid[0].first + d * grid[0].step) * call.target_stride[2] +
                                     (grid[1].first + h * grid[1].step) * call.target_stride[3] +
                                     (grid[2].first + w * grid[2].step) * call.target_stride[4]] =
                             value;
                 }
               });
}

// ---- grad_weight: rows are windows -----------------------------------------------------------

// A run of pixels [first, last) of one sample as boxes of the outputs: one box if that is small
// enough, else cut where it crosses from one plane or one row into the next.
struct Bands {
  int count = 0;
  struct Band {
    int64_t first, last;  // pixels
    Box outputs;
  } band[4];
  int64_t size[3] = {0, 0, 0};  // of the largest patch, on each axis

  Bands(const ConvShape& s, int64_t first, int64_t last, int64_t most_elements) {
    add(s, first, last);
    if (elements() <= most_elements) return;
    const int64_t row = s.axis[2].out, plane = row * s.axis[1].out;
    count = 0;
    for (int64_t& extent : size) extent = 0;
    const int64_t next_plane = (first / plane + 1) * plane;
    const bool two_planes = next_plane < last && last <= next_plane + plane;
    const int64_t middle = two_planes ? next_plane : last;
    add_rows(s, first, middle, row);
    if (two_planes) add_rows(s, middle, last, row);
  }
  int64_t elements() const { return count * size[0] * size[1] * size[2]; }

 private:
  void add_rows(const ConvShape& s, int64_t first, int64_t last, int64_t row) {
    const int64_t next_row = (first / row + 1) * row;
    if (next_row < last && last <= next_row + row) {
      add(s, first, next_row);
      add(s, next_row, last);
    } else {
      add(s, first, last);
    }
  }
  void add(const ConvShape& s, int64_t first, int64_t last) {
    Band& b = band[count++];
    b.first = first;
    b.last = last;
    int64_t lower = first, upper = last - 1, stride = s.outputs();
    for (int a = 0; a < 3; ++a) {
      stride /= s.axis[a].out;
      b.outputs.from[a] = lower / stride;
      b.outputs.to[a] = upper / stride + 1;
      lower %= stride;
      upper %= stride;
      if (b.outputs.size(a) > 1) lower = 0, upper = stride - 1;
      size[a] = most(size[a], (b.outputs.size(a) - 1) * s.axis[a].stride +
                                  (s.axis[a].kernel - 1) * s.axis[a].dilation + 1);
    }
  }
};

// One tap, no padding: then output and input play the same part in the weight gradient.
inline bool is_pointwise(const ConvShape& s) {
  bool yes = true;
  for (const Axis& a : s.axis)
    yes = yes && a.kernel == 1 && a.pad == 0 && a.input_of(a.out - 1, 0) < a.in;
  return yes;
}
inline ConvProblem swapped(const ConvProblem& p) {
  ConvProblem q = p;
  q.shape.in_channels = p.shape.out_channels;
  q.shape.out_channels = p.shape.in_channels;
  q.input = p.output;
  q.output = p.input;
  q.weight.stride[0] = p.weight.stride[1];
  q.weight.stride[1] = p.weight.stride[0];
  for (int a = 0; a < 3; ++a) {
    const int64_t out = p.shape.axis[a].out;
    q.shape.axis[a] = Axis{};
    q.shape.axis[a].in = q.shape.axis[a].out = out;
    q.output.stride[a + 2] *= p.shape.axis[a].stride;
  }
  return q;
}

template <class S>
bool dense_grad_weight(const ConvProblem& p, bool may_swap = true) {
  using K = Kind<S>;
  using T = typename K::T;
  constexpr int L = Vec<T>::lanes;
  constexpr int64_t chunk_groups = 2048 / K::group;
  const ConvShape& s = p.shape;
  const int64_t pixels = s.outputs(), taps = s.taps(), lane_vecs = up(s.group_out(), L);
  if (may_swap && p.total == nullptr && s.groups == 1 && is_pointwise(s)) {
    // Packing a vector of lanes costs about as much as 8 products.
    const int64_t swapped_vecs = up(s.in_channels, L);
    if (swapped_vecs * (8 + s.out_channels) < lane_vecs * (8 + s.in_channels))
      return dense_grad_weight<S>(swapped(p), false);
  }
  const int64_t* const image_stride = p.input.stride;
  const int64_t* const grad_stride = p.output.stride;
  const int64_t* const weight_stride = p.weight.stride;

  // Does a row point into the image or into a patch?
  bool patched = is_half_type<S>;
  int64_t image_reach = 0, grad_reach = 0;
  for (int a = 0; a < 3; ++a) {
    const Axis& axis = s.axis[a];
    patched = patched || axis.pad > 0 || axis.input_of(axis.out - 1, axis.kernel - 1) >= axis.in;
    image_reach += axis.in * std::llabs(image_stride[a + 2]);
    grad_reach += axis.out * std::llabs(grad_stride[a + 2]);
  }
  patched = patched || image_reach > INT32_MAX;
  if (grad_reach > INT32_MAX) return false;

  // Cut the gradient into blocks of input channels x lanes that fit the caches and feed all
  // threads. A block's patch must hold at least what one group reads.
  const int64_t threads = thread_count();
  const int64_t work = s.batch * pixels * taps * s.group_in() * s.out_channels;
  int64_t lane_blocks = up(lane_vecs * L, 256);
  if (work > work_of_task && s.groups < threads)
    lane_blocks = most(lane_blocks,
                       least(up(threads, s.groups), up(lane_vecs, TileSize<T, K::chains>::vecs)));
  const int64_t block_vecs = up(lane_vecs, lane_blocks);
  int64_t block_channels = total_bytes / (int64_t{sizeof(T)} * block_vecs * L * taps);
  if (patched) {
    const Bands worst(s, 0, least(pixels, K::group), 0);
    block_channels =
        least(block_channels, patch_bytes / (int64_t{sizeof(T)} * 2 * worst.elements()));
  }
  int64_t channel_blocks = up(s.group_in(), most(1, least(block_channels, s.group_in())));
  if (work > work_of_task)
    channel_blocks = most(channel_blocks, least(s.group_in(), up(threads, s.groups * lane_blocks)));
  block_channels = up(s.group_in(), channel_blocks);
  const int64_t most_rows = block_channels * taps;
  const int64_t patch_limit = patch_bytes / int64_t{sizeof(T)} / block_channels;

  const int64_t tasks = s.groups * lane_blocks * channel_blocks;
  parallel_for(
      tasks, most(1, work_of_task * tasks / most(work, 1)), K::mode,
      [&](int64_t begin, int64_t end) {
        Arena& arena = task_arena();
        // The largest patch of any chunk: at least one group's, else within the limit.
        int64_t patch_size = 0;
        if (patched) {
          for (int64_t g = 0; g * K::group < pixels; ++g) {
            const Bands bands(s, g * K::group, least(pixels, (g + 1) * K::group), patch_limit);
            patch_size = most(patch_size, bands.elements());
          }
          patch_size = (most(patch_size, patch_limit) + 64) * block_channels;
        }
        const int64_t total_size = most_rows * block_vecs * L;
        const int64_t panel_size = K::group * L * TileSize<T, K::chains>::vecs;
        const int64_t table_size = chunk_groups * K::group;
        arena.reset(Arena::bytes_for<T>(total_size) + Arena::bytes_for<T>(panel_size) +
                    Arena::bytes_for<T>(patch_size) + Arena::bytes_for<T>(block_vecs * L) +
                    Arena::bytes_for<const T*>(most_rows) + Arena::bytes_for<int64_t>(most_rows) +
                    2 * Arena::bytes_for<int32_t>(table_size));
        T* const totals = arena.take<T>(total_size);
        T* const panel = arena.take<T>(panel_size);
        T* const patch = arena.take<T>(patch_size);
        T* const no_bias = arena.take<T>(block_vecs * L);
        const T** const row = arena.take<const T*>(most_rows);
        int64_t* const position = arena.take<int64_t>(most_rows);
        int32_t* const row_offset = arena.take<int32_t>(table_size);
        int32_t* const lane_offset = arena.take<int32_t>(table_size);
        zero_run(no_bias, block_vecs * L);

        for (int64_t task = begin; task < end; ++task) {
          const int64_t channel_block = task % channel_blocks;
          const int64_t lane_block = task / channel_blocks % lane_blocks;
          const int64_t group = task / channel_blocks / lane_blocks;
          const LaneBlock<T, K::chains> block(s.group_out(), lane_block, lane_blocks);
          const int64_t channel0 = cut_at(s.group_in(), channel_blocks, channel_block);
          const int64_t channel1 = cut_at(s.group_in(), channel_blocks, channel_block + 1);
          const int64_t rows = (channel1 - channel0) * taps;
          const S* const image = static_cast<const S*>(p.input.data) +
                                 (group * s.group_in() + channel0) * image_stride[1];
          const S* const grad =
              static_cast<const S*>(p.output.data) + group * s.group_out() * grad_stride[1];

          // The totals begin with the earlier ones.
          const bool resumed = p.total != nullptr;
          if (resumed) {
            const T* const earlier = static_cast<const T*>(p.total);
            T* to = totals;
            for (int64_t i = 0; i < block.tiles; ++i) {
              const LaneTile tile = block.tile(i);
              for (int64_t r = 0; r < rows; ++r)
                for (int64_t j = 0; j < tile.vecs * L; ++j)
                  *to++ = j < tile.lanes
                              ? earlier[((group * s.group_out() + tile.first + j) * s.group_in() +
                                         channel0) *
                                            taps +
                                        r]
                              : T(0);
            }
          }

          for (int64_t n = 0; n < s.batch; ++n)
            for (int64_t first = 0; first < pixels;) {
              // A chunk: the groups whose windows fit into the patch.
              int64_t last = least(pixels, first + K::group);
              Bands bands(s, first, last, patch_limit);
              while (last < pixels && last - first < table_size) {
                const int64_t next = least(pixels, last + K::group);
                const Bands more(s, first, next, INT64_MAX);
                if (patched && more.elements() > patch_limit) break;
                bands = more;
                last = next;
              }

              PatchLayout layout;
              const S* const sample = image + n * image_stride[0];
              if (patched) {
                layout = PatchLayout::of(channel1 - channel0, bands.size,
                                         image_stride[1] == 1 && image_stride[4] != 1);
                const int64_t image_size[3] = {s.axis[0].in, s.axis[1].in, s.axis[2].in};
                for (int b = 0; b < bands.count; ++b) {
                  Box box;
                  for (int a = 0; a < 3; ++a) {
                    const Axis& axis = s.axis[a];
                    box.from[a] = axis.input_of(bands.band[b].outputs.from[a], 0);
                    box.to[a] = axis.input_of(bands.band[b].outputs.to[a] - 1, axis.kernel - 1) + 1;
                  }
                  copy_patch(patch + b * layout.elements, layout, sample, image_stride[1],
                             image_stride + 2, image_size, box, channel1 - channel0);
                }
              } else {
                layout.channel = image_stride[1];
                for (int a = 0; a < 3; ++a) layout.axis[a] = image_stride[a + 2];
              }

              // The rows: one tap of one channel each.
              const T* const origin = patched ? patch : reinterpret_cast<const T*>(sample);
              int64_t rows_so_far = 0;
              for (int64_t c = 0; c < channel1 - channel0; ++c)
                for (int64_t d = 0; d < s.axis[0].kernel; ++d)
                  for (int64_t h = 0; h < s.axis[1].kernel; ++h)
                    for (int64_t w = 0; w < s.axis[2].kernel; ++w)
                      row[rows_so_far++] = origin + c * layout.channel +
                                           d * s.axis[0].dilation * layout.axis[0] +
                                           h * s.axis[1].dilation * layout.axis[1] +
                                           w * s.axis[2].dilation * layout.axis[2];

              // The terms: pixels in order, in 16-bit groups the even ones first.
              for (int b = 0; b < bands.count; ++b) {
                const Bands::Band& band = bands.band[b];
                int64_t at[3], rest = band.first;
                for (int a = 2; a >= 0; --a) at[a] = rest % s.axis[a].out, rest /= s.axis[a].out;
                for (int64_t pixel = band.first; pixel < band.last; ++pixel) {
                  int64_t from = b * layout.elements, of = 0;
                  for (int a = 0; a < 3; ++a) {
                    from += (at[a] - (patched ? band.outputs.from[a] : 0)) * s.axis[a].stride *
                            layout.axis[a];
                    of += at[a] * grad_stride[a + 2];
                  }
                  int64_t t = pixel - first;
                  if (K::chains == 2) {
                    const int64_t start = t / K::group * K::group, number = t - start;
                    const int64_t terms = least(K::group, last - first - start);
                    t = start + number / 2 + (number % 2 ? up(terms, 2) : 0);
                  }
                  row_offset[t] = static_cast<int32_t>(from);
                  lane_offset[t] = static_cast<int32_t>(of);
                  for (int a = 2; a >= 0 && ++at[a] == s.axis[a].out; --a) at[a] = 0;
                }
              }

              T* total = totals;
              for (int64_t i = 0; i < block.tiles; ++i) {
                const LaneTile tile = block.tile(i);
                const S* const lanes = grad + n * grad_stride[0] + tile.first * grad_stride[1];
                for (int64_t t = 0; t < last - first; t += K::group) {
                  const int64_t terms = least(K::group, last - first - t);
                  int32_t length[max_chains] = {static_cast<int32_t>(up(terms, K::chains)),
                                                static_cast<int32_t>(terms / 2)};
                  pack_panel(panel, tile.vecs, tile.lanes, lanes, grad_stride[1], lane_offset + t,
                             terms);
                  if (t + K::group < last - first)
                    prefetch_panel(tile.lanes, lanes, grad_stride[1], lane_offset + t + K::group,
                                   least(K::group, last - first - t - K::group));
                  multiply_rows<T, K::chains>(row, rows, row_offset + t, length, panel, tile.vecs,
                                              total, resumed || n > 0 || first + t > 0);
                }
                total += rows * tile.vecs * L;
              }
              first = last;
            }

          int64_t r = 0;
          for (int64_t c = channel0; c < channel1; ++c)
            for (int64_t d = 0; d < s.axis[0].kernel; ++d)
              for (int64_t h = 0; h < s.axis[1].kernel; ++h)
                for (int64_t w = 0; w < s.axis[2].kernel; ++w)
                  position[r++] = c * weight_stride[1] + d * weight_stride[2] +
                                  h * weight_stride[3] + w * weight_stride[4];
          const T* total = totals;
          for (int64_t i = 0; i < block.tiles; ++i) {
            const LaneTile tile = block.tile(i);
            const int64_t base = (group * s.group_out() + tile.first) * weight_stride[0];
            if (p.keep_total)
              store_rows(total, rows, tile.vecs, tile.lanes, no_bias,
                         static_cast<T*>(p.weight.data) + base, position, weight_stride[0]);
            else
              store_rows(total, rows, tile.vecs, tile.lanes, no_bias,
                         static_cast<S*>(p.weight.data) + base, position, weight_stride[0]);
            total += rows * tile.vecs * L;
          }
        }
      });
  return true;
}

// ---- the three directions
// ------------------------------------------------------------------------

template <class S>
bool weights_are_finite(const ConvProblem& p) {
  using T = typename Kind<S>::T;
  const ConvShape& s = p.shape;
  const S* const weight = static_cast<const S*>(p.weight.data);
  const int64_t* const stride = p.weight.stride;
  for (int64_t oc = 0; oc < s.out_channels; ++oc)
    for (int64_t ic = 0; ic < s.group_in(); ++ic)
      for (int64_t d = 0; d < s.axis[0].kernel; ++d)
        for (int64_t h = 0; h < s.axis[1].kernel; ++h)
          for (int64_t w = 0; w < s.axis[2].kernel; ++w) {
            const T x = widened(weight[oc * stride[0] + ic * stride[1] + d * stride[2] +
                                       h * stride[3] + w * stride[4]]);
            if (!(x - x == T(0))) return false;
          }
  return true;
}

template <class S>
bool dense_forward(const ConvProblem& p) {
  const ConvShape& s = p.shape;
  const Images<S> call{static_cast<const S*>(p.input.data),
                       p.input.stride,
                       static_cast<S*>(p.output.data),
                       p.output.stride,
                       static_cast<const S*>(p.weight.data),
                       p.weight.stride,
                       p.weight.stride[0],
                       p.weight.stride[1],
                       p.weight.stride[0] * s.group_out(),
                       static_cast<const S*>(p.bias),
                       s.batch,
                       s.groups,
                       s.group_in(),
                       s.group_out(),
                       {s.axis[0].kernel, s.axis[1].kernel, s.axis[2].kernel}};
  const GridAxis grid[3] = {forward_axis(s.axis[0]), forward_axis(s.axis[1]),
                            forward_axis(s.axis[2])};
  bool nan;
  return multiply_images(call, grid, nan);
}

template <class S>
bool dense_grad_input(const ConvProblem& p) {
  const ConvShape& s = p.shape;
  const Images<S> call{static_cast<const S*>(p.output.data),
                       p.output.stride,
                       static_cast<S*>(p.input.data),
                       p.input.stride,
                       static_cast<const S*>(p.weight.data),
                       p.weight.stride,
                       p.weight.stride[1],
                       p.weight.stride[0],
                       p.weight.stride[0] * s.group_out(),
                       static_cast<const S*>(p.bias),
                       s.batch,
                       s.groups,
                       s.group_out(),
                       s.group_in(),
                       {s.axis[0].kernel, s.axis[1].kernel, s.axis[2].kernel}};
  bool nan = false;
  for (int64_t d = 0; d < least(s.axis[0].stride, s.axis[0].in); ++d)
    for (int64_t h = 0; h < least(s.axis[1].stride, s.axis[1].in); ++h)
      for (int64_t w = 0; w < least(s.axis[2].stride, s.axis[2].in); ++w) {
        const GridAxis grid[3] = {gradient_axis(s.axis[0], d), gradient_axis(s.axis[1], h),
                                  gradient_axis(s.axis[2], w)};
        if (grid[0].taps * grid[1].taps * grid[2].taps == 0)
          store_no_terms(call, grid);
        else if (!multiply_images(call, grid, nan))
          return false;
      }
  // Where a tap meets no output the loops multiplied the weight by +0: the term that does not
  // exist, unless the weight is not finite, and then a NaN came out.
  return !nan || weights_are_finite<S>(p);
}

inline bool run_dense(const ConvProblem& p) {
  if (p.shape.batch == 0 || p.shape.outputs() == 0 || p.shape.group_in() == 0 ||
      p.shape.group_out() == 0 || p.shape.inputs() == 0 || p.shape.taps() == 0)
    return false;
  bool done = false;
  with_float_type(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    switch (p.direction) {
      case Direction::forward: done = dense_forward<S>(p); return;
      case Direction::grad_input: done = dense_grad_input<S>(p); return;
      case Direction::grad_weight: done = dense_grad_weight<S>(p); return;
      case Direction::grad_bias: return;
    }
  });
  return done;
}

}  // namespace torch_naiveconv::TNC_ISA
