// Few channels per group, lanes are channels: how a block of channels is moved between a tensor and
// a panel [source channel of the group][d][h][w][lane], zero-padded, in which lane l holds what its
// own group reads. NCHW is transposed on the way, channels_last copied, 16-bit types are widened.
#pragma once

#include "depthwise_geometry.h"

namespace torch_naiveconv::TNC_ISA {

// Up to four blocks (vectors) of channels of the written tensor, and what they read in a tensor
// with `planes` channels for every `group` of them. channels_last memory is moved several blocks
// at a time: single vectors, a pixel apart, are more lines than the processor fetches ahead.
template <class T>
struct ChannelLanes {
  using E = Total<T>;
  using V = Vec<E>;
  static constexpr int L = V::lanes, most_blocks = 4;
  enum Kind { rows, adjacent, permuted, scattered };

  Kind kind;
  int64_t first, blocks, planes, channel_stride, w_stride;
  int64_t offset[most_blocks * L];  // of each lane's first channel; unused lanes repeat another's
  int last_count;                   // lanes in use of the last block
  int span = 1, last_span = 1;      // permuted: channels that a block, and the last one, reads
  int32_t index[L][L];              // permuted: for each plane the lanes' channels in that span

  // How many blocks are worth moving together.
  static int64_t together(const RawView& view, int64_t group) {
    return view.stride[1] == 1 && view.stride[4] != 1 && L % group == 0 ? most_blocks : 1;
  }

  ChannelLanes(const RawView& view, int64_t group, int64_t planes, int64_t channels, int64_t first,
               int64_t blocks)
      : first(first),
        blocks(blocks),
        planes(planes),
        channel_stride(view.stride[1]),
        w_stride(view.stride[4]),
        last_count(static_cast<int>(least(L, channels - (first + blocks - 1) * L))) {
    const int64_t count = (blocks - 1) * L + last_count;
    const int64_t base = first * L / group * planes;
    for (int64_t l = 0; l < blocks * L; ++l)
      offset[l] = l < count ? (first * L + l) / group * planes * channel_stride : offset[0];
    const int64_t last = (first * L + least(count, L) - 1) / group * planes + planes - 1;
    if (channel_stride == 1 && group == 1 && planes == 1)
      kind = adjacent;
    else if (w_stride == 1)
      kind = rows;
    else if (channel_stride == 1 && last - base < L)
      kind = permuted;
    else
      kind = scattered;
    if (kind == permuted) {
      span = static_cast<int>(last - base + 1);
      last_span = static_cast<int>(offset[count - 1] - offset[(blocks - 1) * L] + planes);
      for (int64_t j = 0; j < planes; ++j)
        for (int l = 0; l < L; ++l) index[j][l] = static_cast<int32_t>(offset[l] - offset[0] + j);
    }
  }

  // panel[block][plane][i][lane] = row[channel of (block, plane, lane)][i * w_stride], i < n.
  // What lies `ahead` is fetched next: the processor itself does not see it coming where the pieces
  // of memory are short.
  void fetch(const T* row, int64_t n, E* panel, int64_t block_pitch, int64_t plane_pitch,
             int64_t ahead) const {
    if (kind == adjacent) {
      for (int64_t i = 0; i < n; ++i) {
        const T* const from = row + offset[0] + i * w_stride;
        E* const to = panel + i * L;
        for (int64_t b = 0; b < blocks; ++b) prefetch(from + b * L + ahead);
        for (int64_t b = 0; b < blocks - 1; ++b) V::load(from + b * L).store(to + b * block_pitch);
        load_last(from + (blocks - 1) * L).store(to + (blocks - 1) * block_pitch);
      }
    } else if (kind == permuted) {
      for (int64_t i = 0; i < n; ++i)
        for (int64_t b = 0; b < blocks; ++b) {
          prefetch(row + offset[b * L] + i * w_stride + ahead);
          const V x =
              V::load(row + offset[b * L] + i * w_stride, b + 1 < blocks ? span : last_span);
          for (int64_t j = 0; j < planes; ++j)
            x.permute(index[j]).store(panel + b * block_pitch + j * plane_pitch + i * L);
        }
    } else {
      for (int64_t b = 0; b < blocks; ++b)
        for (int64_t j = 0; j < planes; ++j)
          fetch_plane(row + j * channel_stride, offset + b * L, n,
                      panel + b * block_pitch + j * plane_pitch);
    }
  }

  // row[channel of lane][i * w_stride] = panel[i][lane], rounded to T, for i < n; one block.
  void put(const E* panel, int64_t n, T* row) const {
    if (kind == rows) {
      for (int64_t next = 0; next < n; next += L) {
        const int64_t i = least(next, most(n - L, 0));  // the last may overlap the one before
        const int m = static_cast<int>(least(L, n - i));
        V block[L];
#pragma GCC unroll 16
        for (int q = 0; q < L; ++q) block[q] = V::load(panel + (i + (q < m ? q : 0)) * L);
        V::transpose(block);
        if (m == L && last_count == L) {
#pragma GCC unroll 16
          for (int l = 0; l < L; ++l) block[l].store(row + offset[l] + i);
        } else {
#pragma GCC unroll 16
          for (int l = 0; l < L; ++l)
            if (l < last_count) block[l].store(row + offset[l] + i, m);
        }
      }
    } else {
      for (int64_t i = 0; i < n; ++i)
        for (int l = 0; l < last_count; ++l)
          V::load(panel + i * L + l, 1).store(row + i * w_stride + offset[l], 1);
    }
  }

 private:
  TNC_INLINE V load_last(const T* p) const {
    return last_count == L ? V::load(p) : V::load(p, last_count);
  }

  void fetch_plane(const T* row, const int64_t* lane, int64_t n, E* panel) const {
    if (kind == rows) {
      for (int64_t next = 0; next < n; next += L) {
        const int64_t i = least(next, most(n - L, 0));  // the last may overlap the one before
        const int m = static_cast<int>(least(L, n - i));
        V block[L];
        if (m == L) {
#pragma GCC unroll 16
          for (int l = 0; l < L; ++l) block[l] = V::load(row + lane[l] + i);
        } else {
#pragma GCC unroll 16
          for (int l = 0; l < L; ++l) block[l] = V::load(row + lane[l] + i, m);
        }
        V::transpose(block);
        E* const to = panel + i * L;
        if (m == L) {
#pragma GCC unroll 16
          for (int q = 0; q < L; ++q) block[q].store(to + q * L);
        } else {
#pragma GCC unroll 16
          for (int q = 0; q < L; ++q)
            if (q < m) block[q].store(to + q * L);
        }
      }
    } else {
      for (int64_t i = 0; i < n; ++i)
        for (int l = 0; l < L; ++l)
          V::load(row + i * w_stride + lane[l], 1).store(panel + i * L + l, 1);
    }
  }
};

// Fills it with what the written positions of a chunk may read; outside the tensor +0.
template <class T>
void fill_panel(const PanelShape& shape, const ChannelLanes<T>& lanes, const RawView& view,
                int64_t n, const MapAxis* axis, const Chunk& chunk, Total<T>* panel) {
  using V = Vec<Total<T>>;
  int64_t first[3], need[3];
  for (int a = 0; a < 3; ++a) {
    first[a] = axis[a].first_source(chunk.begin[a]);
    need[a] = axis[a].source_extent(chunk.size[a]);
  }
  const int64_t left = least(most(-first[2], 0), need[2]);
  const int64_t right = least(most(axis[2].source - first[2], left), need[2]);
  const T* const sample = static_cast<const T*>(view.data) + n * view.stride[0];
  for (int64_t d = 0; d < need[0]; ++d)
    for (int64_t h = 0; h < need[1]; ++h) {
      const int64_t sd = first[0] + d, sh = first[1] + h;
      const bool inside = sd >= 0 && sd < axis[0].source && sh >= 0 && sh < axis[1].source;
      Total<T>* const row = panel + d * shape.slice_pitch() + h * shape.row_pitch();
      for (int64_t b = 0; b < lanes.blocks; ++b)
        for (int64_t j = 0; j < shape.planes; ++j) {
          Total<T>* const to = row + b * shape.block_pitch() + j * shape.plane_pitch();
          for (int64_t i = 0; i < (inside ? left : need[2]); ++i)
            V::zero().store(to + i * V::lanes);
          for (int64_t i = right; i < need[2]; ++i) V::zero().store(to + i * V::lanes);
        }
      if (inside)
        lanes.fetch(
            sample + sd * view.stride[2] + sh * view.stride[3] + (first[2] + left) * view.stride[4],
            right - left, row + left * V::lanes, shape.block_pitch(), shape.plane_pitch(),
            view.stride[3]);
    }
}

}  // namespace torch_naiveconv::TNC_ISA
