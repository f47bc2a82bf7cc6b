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
  enum Kind { rows, row_groups, adjacent, permuted, scattered };

  Kind kind;
  int64_t first, blocks, planes, channel_stride, w_stride;
  int64_t offset[most_blocks * L];  // of each lane's first channel; unused lanes repeat another's
  int last_count;                   // lanes in use of the last block
  // row_groups and permuted: channels that a block, and the last one, reads; for each plane the
  // lanes' channels in that span.
  int span = 1, last_span = 1;
  int32_t index[L][L];

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
    for (int64_t l = 0; l < blocks * L; ++l)
      offset[l] = l < count ? (first * L + l) / group * planes * channel_stride : offset[0];
    const auto source = [&](int64_t l) { return (first * L + l) / group * planes; };
    const int64_t reach = source(least(count, L) - 1) + planes - source(0);
    if (channel_stride == 1 && group == 1 && planes == 1)
      kind = adjacent;
    else if (w_stride == 1)
      kind = planes > 1 && reach <= L ? row_groups : rows;
    else if (channel_stride == 1 && reach <= L)
      kind = permuted;
    else
      kind = scattered;
    if (kind == permuted || kind == row_groups) {
      span = static_cast<int>(reach);
      last_span = static_cast<int>(source(count - 1) + planes - source((blocks - 1) * L));
      for (int64_t j = 0; j < planes; ++j)
        for (int64_t l = 0; l < L; ++l)
          index[j][l] = static_cast<int32_t>(l < count ? source(l) - source(0) + j : 0);
    }
  }

  // panel[block][plane][i][lane] = row[channel of (block, plane, lane)][i * w_stride], i < n.
  // What lies `ahead` is fetched next: the processor itself does not see it coming where the pieces
  // of memory are short. `room`: short rows may be filled up with +0 to a vector of pixels.
  void fetch(const T* row, int64_t n, E* panel, int64_t block_pitch, int64_t plane_pitch,
             int64_t ahead, bool room = false) const {
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
    } else if (kind == row_groups) {
      for (int64_t b = 0; b < blocks; ++b) {
        int64_t lane[L];
        const int64_t last = (b + 1 < blocks ? span : last_span) - 1;
        for (int64_t l = 0; l < L; ++l) lane[l] = offset[b * L] + least(l, last) * channel_stride;
        fetch_groups(row, lane, n, room, ahead, panel + b * block_pitch, plane_pitch);
      }
    } else {
      for (int64_t b = 0; b < blocks; ++b)
        for (int64_t j = 0; j < planes; ++j) {
          const T* const plane = row + j * channel_stride;
          const int64_t* const lane = offset + b * L;
          E* const to = panel + b * block_pitch + j * plane_pitch;
          if (kind == rows)
            fetch_rows(plane, lane, n, room, ahead, to);
          else
            for (int64_t i = 0; i < n; ++i)
              for (int l = 0; l < L; ++l)
                V::load(plane + i * w_stride + lane[l], 1).store(to + i * L + l, 1);
        }
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

  // The rows row[lane[l] + i], i < n, transposed: put(i, pixel). What lies `ahead` is fetched. With
  // `room` short rows are filled up with +0 to a whole vector of pixels.
  template <class Put>
  static TNC_INLINE void each_pixel(const T* row, const int64_t* lane, int64_t n, bool room,
                                    int64_t ahead, const Put& put) {
    for (int64_t next = 0; next < n; next += L) {
      const int64_t i = least(next, most(n - L, 0));  // the last may overlap the one before
      const int m = static_cast<int>(least(L, n - i));
      V block[L];
      if (m == L) {
#pragma GCC unroll 16
        for (int l = 0; l < L; ++l) {
          block[l] = V::load(row + lane[l] + i);
          prefetch(row + lane[l] + i + ahead);
        }
      } else {
#pragma GCC unroll 16
        for (int l = 0; l < L; ++l) {
          block[l] = V::load(row + lane[l] + i, m);
          prefetch(row + lane[l] + i + ahead);
        }
      }
      V::transpose(block);
      if (m == L || room) {
#pragma GCC unroll 16
        for (int q = 0; q < L; ++q) put(i + q, block[q]);
      } else {
#pragma GCC unroll 16
        for (int q = 0; q < L; ++q)
          if (q < m) put(i + q, block[q]);
      }
    }
  }

  // Not inlined: the compiler would keep the addresses of all lanes in registers that it has not.
  __attribute__((noinline)) static void fetch_rows(const T* row, const int64_t* lane, int64_t n,
                                                   bool room, int64_t ahead, E* panel) {
    each_pixel(row, lane, n, room, ahead,
               [&](int64_t i, V x) __attribute__((always_inline)) { x.store(panel + i * L); });
  }
  __attribute__((noinline)) void fetch_groups(const T* row, const int64_t* lane, int64_t n,
                                              bool room, int64_t ahead, E* panel,
                                              int64_t plane_pitch) const {
    each_pixel(row, lane, n, room, ahead, [&](int64_t i, V x) __attribute__((always_inline)) {
      for (int64_t j = 0; j < planes; ++j)
        x.permute(index[j]).store(panel + j * plane_pitch + i * L);
    });
  }
};

// A row of the panel: from `row` on the columns [left, right), else +0.
template <class T>
void fill_row(const PanelShape& shape, const ChannelLanes<T>& lanes, const T* row, int64_t left,
              int64_t right, int64_t columns, int64_t ahead, bool room, Total<T>* panel) {
  using V = Vec<Total<T>>;
  for (int64_t b = 0; b < lanes.blocks; ++b)
    for (int64_t j = 0; j < shape.planes; ++j) {
      Total<T>* const to = panel + b * shape.block_pitch() + j * shape.plane_pitch();
      for (int64_t i = 0; i < left; ++i) V::zero().store(to + i * V::lanes);
      for (int64_t i = right; i < columns; ++i) V::zero().store(to + i * V::lanes);
    }
  lanes.fetch(row, right - left, panel + left * V::lanes, shape.block_pitch(), shape.plane_pitch(),
              ahead, room);
}

// Fills it with what the written positions of a chunk may read; outside the tensor +0.
template <class T>
void fill_panel(const PanelShape& shape, const ChannelLanes<T>& lanes, const RawView& view,
                int64_t n, const MapAxis* axis, const Chunk& chunk, Total<T>* panel) {
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
      fill_row(shape, lanes,
               inside ? sample + sd * view.stride[2] + sh * view.stride[3] +
                            (first[2] + left) * view.stride[4]
                      : nullptr,
               inside ? left : need[2], inside ? right : need[2], need[2], view.stride[3], false,
               panel + d * shape.slice_pitch() + h * shape.row_pitch());
    }
}

}  // namespace torch_naiveconv::TNC_ISA
