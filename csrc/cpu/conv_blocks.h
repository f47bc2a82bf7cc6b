// How dense convolutions are cut into blocks that fit the caches: lane tiles, and patches, which
// are zero-padded copies of a box of an image.
#pragma once

#include "microkernel.h"
#include "pack.h"

namespace torch_naiveconv::TNC_ISA {

// Of what a task reads of its image at a time, in a patch or in place, unless one group needs more.
constexpr int64_t patch_bytes = 192 << 10;
constexpr int64_t pixel_bytes = 1024;         // of a channels_last image that is read in place
constexpr int64_t source_bytes = 4 << 20;     // of a channels_last image that several patches read
constexpr int64_t total_bytes = 1 << 20;      // of a task's totals
constexpr int64_t box_total_bytes = 4 << 20;  // of those of a box of pixels
constexpr int64_t kept_bytes = 1 << 20;       // of the panels that a thread keeps
constexpr int64_t sum_bytes = 4 << 20;        // of the sums that a task keeps of its groups
constexpr int64_t phase_bytes = 1 << 20;      // of the samples whose stride phases take turns
constexpr int64_t phase_total_bytes = 256 << 10;  // of the totals of phases that share a patch
constexpr int64_t rows_of_task = 2048;            // pixels that share a packed panel, at most

// What a product of S is made with: the type of its totals, the chains of a group, its length.
template <class S>
struct Kind {
  using T = Total<S>;
  static constexpr int chains = chains_of<S>;
  static constexpr int64_t group = group_length<S>;
  static constexpr FloatEnvironment::Mode mode = environment_of<S>;
};

// Shares tasks between the threads, if the multiply-adds of all are `work` enough: each makes
// itself a workspace and calls run(task, workspace). Says whether a workspace became `special`.
template <class K, class Make, class Run>
bool run_tasks(int64_t tasks, int64_t work, const Make& make_workspace, const Run& run) {
  bool special = false;
  parallel_for(tasks, most(1, worthwhile_products * tasks / most(work, 1)), K::mode,
               [&](int64_t begin, int64_t end) {
                 auto workspace = make_workspace();
                 for (int64_t task = begin; task < end; ++task) run(task, workspace);
                 if (workspace.special) __atomic_store_n(&special, true, __ATOMIC_RELAXED);
               });
  return special;
}

// [0, count) cut into `pieces` of nearly equal length: the first element of piece i.
TNC_INLINE int64_t cut_at(int64_t count, int64_t pieces, int64_t i) { return count * i / pieces; }

// ---- lanes: channels in tiles of whole vectors ----------------------------------------------

// Lanes [first, first + lanes) of a block of channels, in `vecs` vectors.
struct LaneTile {
  int64_t first;
  int lanes, vecs;
};

// The widest tile: a panel of four vectors is 32 KB, and some first caches hold no more than that.
inline bool first_cache_is_large() {
#ifdef _SC_LEVEL1_DCACHE_SIZE
  static const bool large = sysconf(_SC_LEVEL1_DCACHE_SIZE) > 32 << 10;
  return large;
#else
  return false;
#endif
}
template <class T, int Chains>
int64_t most_vecs() {  // two chains have groups of 32 terms
  return least(TileSize<T, Chains>::vecs, Chains == 2 || first_cache_is_large() ? 4 : 3);
}

// A block is some whole vectors of the lanes, cut into tiles that are as equal as can be.
template <class T, int Chains>
struct LaneBlock {
  static constexpr int L = Vec<T>::lanes;
  int64_t first_vec, vecs, lanes_in_all, tiles;

  LaneBlock(int64_t lanes, int64_t block, int64_t blocks) : lanes_in_all(lanes) {
    const int64_t all = up(lanes, L);
    first_vec = cut_at(all, blocks, block);
    vecs = cut_at(all, blocks, block + 1) - first_vec;
    tiles = up(vecs, most_vecs<T, Chains>());
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

// How a patch lies in memory: mostly channel after channel, whatever the image's memory format.
struct PatchLayout {
  int64_t channel = 1, axis[3] = {0, 0, 0};
  int64_t odd = 0;       // if rows lie in halves: where the odd elements of a row begin
  int64_t elements = 0;  // for one sample

  bool operator==(const PatchLayout& other) const {
    return channel == other.channel && axis[0] == other.axis[0] && axis[1] == other.axis[1] &&
           axis[2] == other.axis[2] && odd == other.odd && elements == other.elements;
  }
  static PatchLayout of(int64_t channels, const int64_t (&size)[3], bool halves = false) {
    PatchLayout p;
    p.axis[2] = 1;
    p.odd = halves ? up(size[2], 2) + 16 : 0;  // with slack for a last vector that begins late
    p.axis[1] = halves ? 2 * p.odd : size[2];
    p.axis[0] = p.axis[1] * size[1];
    // An odd number of cache lines apart, so that channels do not crowd one set of the cache, and
    // with slack for the last vector.
    p.channel = (up(p.axis[0] * size[0] + 15, 16) | 1) * 16;
    p.elements = p.channel * channels;
    return p;
  }
  // Pixel after pixel, as channels_last has them. Of many channels, pixels too lie an odd number of
  // lines apart.
  static PatchLayout by_pixel(int64_t channels, const int64_t (&size)[3]) {
    PatchLayout p;
    p.axis[2] = channels < 16 ? channels : (up(channels, 16) | 1) * 16;
    p.axis[1] = p.axis[2] * size[2];
    p.axis[0] = p.axis[1] * size[1];
    p.elements = up(p.axis[0] * size[0] + 15, 16) * 16;
    return p;
  }
};

// Copies `channels` channels of the box, every hop-th position of each axis; what lies outside the
// image is +0.
template <class T, class S>
void copy_patch(T* patch, const PatchLayout& layout, const S* image, int64_t image_channel,
                const int64_t* image_axis, const int64_t (&image_size)[3], const Box& box,
                const int64_t (&hop)[3], int64_t channels) {
  const int64_t width = up(box.size(2), hop[2]);
  const int64_t w0 = least(up(most(-box.from[2], 0), hop[2]), width);
  const int64_t w1 = most(w0, least(up(most(image_size[2] - box.from[2], 0), hop[2]), width));
  const int64_t step = image_axis[2] * hop[2];
  if (layout.channel == 1) {
    const int64_t pitch = layout.axis[2];
    for (int64_t d = box.from[0], i = 0; d < box.to[0]; d += hop[0], ++i)
      for (int64_t h = box.from[1], j = 0; h < box.to[1]; h += hop[1], ++j) {
        T* const to = patch + i * layout.axis[0] + j * layout.axis[1];
        const bool inside = d >= 0 && d < image_size[0] && h >= 0 && h < image_size[1];
        const int64_t first = inside ? w0 : width, last = inside ? w1 : width;
        const S* const from =
            image + d * image_axis[0] + h * image_axis[1] + box.from[2] * image_axis[2] + w0 * step;
        zero_run(to, first * pitch);
        if (pitch == channels && step == channels) {
          copy_run(to + first * pitch, from, 1, (last - first) * channels);
        } else {
          for (int64_t w = first; w < last; ++w)
            copy_run(to + w * pitch, from + (w - first) * step, 1, channels);
        }
        zero_run(to + last * pitch, (width - last) * pitch);
      }
    return;
  }
  const bool transposed = image_channel == 1 && image_axis[2] != 1 && channels > 1;
  const int64_t at_once = transposed ? channels : 1;  // channels
  // What is asked for early: some KB further on.
  const int64_t copied = width * box.size(0) * box.size(1) * std::llabs(step) * int64_t{sizeof(S)};
  const int64_t ahead = most(4096 / most(copied, 1), 1) * image_channel;
  // Rows that follow each other in the image as they do in the patch are copied as one.
  const bool joined = step == 1 && w0 == 0 && w1 == width && hop[1] == 1 && layout.odd == 0 &&
                      image_axis[1] == width && layout.axis[1] == width;
  for (int64_t c = 0; c < channels; c += at_once)
    for (int64_t d = box.from[0], i = 0; d < box.to[0]; d += hop[0], ++i)
      for (int64_t h = box.from[1], j = 0, rows; h < box.to[1]; h += rows * hop[1], j += rows) {
        T* const to = patch + c * layout.channel + i * layout.axis[0] + j * layout.axis[1];
        const bool inside = d >= 0 && d < image_size[0] && h >= 0 && h < image_size[1] && w0 < w1;
        rows = joined && inside ? least(box.to[1], image_size[1]) - h : 1;
        if (!inside) {
          for (int64_t k = 0; k < at_once; ++k)
            zero_run(to + k * layout.channel, most(width, 2 * layout.odd));
          continue;
        }
        const S* const from = image + c * image_channel + d * image_axis[0] + h * image_axis[1] +
                              box.from[2] * image_axis[2] + w0 * step;
        if (w0 > 0)
          for (int64_t k = 0; k < at_once; ++k) zero_run(to + k * layout.channel, w0);
        if (layout.odd > 0) {
          zero_run(to + layout.odd, w0 / 2);
          copy_halves(w0 % 2 ? to + layout.odd + w0 / 2 : to + w0 / 2,
                      w0 % 2 ? to + up(w0, 2) : to + layout.odd + w0 / 2, from, w1 - w0);
          zero_run(to + up(w1, 2), up(width, 2) - up(w1, 2));
          zero_run(to + layout.odd + w1 / 2, width / 2 - w1 / 2);
          continue;
        }
        if (transposed) {
          copy_transposed(to + w0, layout.channel, from, step, channels, w1 - w0);
        } else {
          if (step == 1 || step == 2)  // the same row of a later channel
            for (int64_t w = 0; w < rows * (w1 - w0) * step; w += 64 / int64_t{sizeof(S)})
              prefetch(from + ahead + w);
          copy_run(to + w0, from, step, rows * (w1 - w0));
        }
        if (w1 < width)
          for (int64_t k = 0; k < at_once; ++k) zero_run(to + k * layout.channel + w1, width - w1);
      }
}

}  // namespace torch_naiveconv::TNC_ISA
