// How dense convolutions are cut into blocks that fit the caches: lane tiles, and patches, which
// are zero-padded copies of a box of an image.
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

}  // namespace torch_naiveconv::TNC_ISA
