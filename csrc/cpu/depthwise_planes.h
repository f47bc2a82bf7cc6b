// Forward and grad_input of few channels per group where rows lie contiguously (NCHW): lanes are
// neighbouring pixels of a row. Start reading at map_planes, at the end.
//
// The planes that a group reads are copied, zero-padded and widened, into a panel
// [source channel][d][h][w]; every tap of a pixel is then a fixed distance away, and a vector of
// pixels one unaligned load:
//
//   chain[pixel] = fma(panel[pixel + tap], weight[tap], chain[pixel])
//
// A forward stride along w would read every second pixel; the panel's rows are split into the
// pixels of each remainder instead. The phases of a strided grad_input are computed apart and
// merged row by row.
#pragma once

#include "depthwise_geometry.h"

namespace torch_naiveconv::TNC_ISA {

constexpr int64_t planes_bytes = 48 << 10;  // of a panel: about the L1 cache

// What all tiles of a phase of a channel have in common.
template <class T>
struct PlanePhase {
  TermLists lists;
  int32_t chain, last_chain;
  const Total<T>* weights;  // by term number
  Total<T> bias;
  // Where taps slide along a row: where each row of taps (source channel, kd, kh) begins to read,
  // how many rows and taps a row, and the distance of a panel row's remainders.
  const int32_t* tap_rows;
  int64_t tap_row_count, row_taps, part;
  int32_t odd_chain = 0, odd_last_chain = 0;  // pairs: of the other phase along w
};

// Some rows of some vectors. Where windows are joined all tiles begin at whole vectors, and a row's
// last one is stored in part; else it overlaps the one before.
template <class T>
struct PlaneTile {
  const Total<T>* source;
  T* out;
  int64_t source_step, out_step;  // from row to row
  int64_t last;                   // where a row's last vector begins
  int lanes;                      // how many lanes of it are stored
  // Of a strip:
  int64_t rows, first, end;  // written rows, source rows
  const T* ahead;            // what is read next, fetched meanwhile
  int64_t ahead_step, ahead_plane;
  int64_t next_out;  // from a written row to the one that is fetched meanwhile
};

template <class T>
using PlaneTileFunction = void (*)(const PlanePhase<T>&, const PlaneTile<T>&);

// Is vector c of the `vecs` of a row stored in part?
template <class T, int vecs>
TNC_INLINE bool is_cut(const PlaneTile<T>& tile, int c) {
  using V = Vec<Total<T>>;
  return (vecs == 1 || joins_windows<V>) && c + 1 == vecs && tile.lanes < V::lanes;
}

template <class T, int vecs>
TNC_INLINE void store_plane_vector(Vec<Total<T>> result, const PlaneTile<T>& tile, T* row, int c) {
  T* const to = row + (c + 1 < vecs ? c * Vec<Total<T>>::lanes : tile.last);
  if (is_cut<T, vecs>(tile, c))
    result.store(to, tile.lanes);
  else
    result.store(to);
}

// Of both phases of a stride of 2, whose results alternate in a row.
template <class T, int vecs>
TNC_INLINE void store_plane_pairs(Vec<Total<T>> even, Vec<Total<T>> odd, const PlaneTile<T>& tile,
                                  T* row, int c) {
  using V = Vec<Total<T>>;
  V low, high;
  V::merge(even, odd, low, high);
  T* const to = row + 2 * (c + 1 < vecs ? c * V::lanes : tile.last);
  if (is_cut<T, vecs>(tile, c)) {
    low.store(to, static_cast<int>(least(2 * tile.lanes, V::lanes)));
    high.store(to + V::lanes, static_cast<int>(most(2 * tile.lanes - V::lanes, 0)));
  } else {
    low.store(to);
    high.store(to + V::lanes);
  }
}

template <class T, int rows, int vecs>
TNC_INLINE void store_plane_tile(const Vec<Total<T>> (&total)[rows][vecs],
                                 const PlanePhase<T>& phase, const PlaneTile<T>& tile) {
  using V = Vec<Total<T>>;
  const V bias = V::broadcast(phase.bias);
  T* out = tile.out;
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i, out += tile.out_step)
#pragma GCC unroll 8
    for (int c = 0; c < vecs; ++c)
      store_plane_vector<T, vecs>(result_of<T>(total[i][c] + bias), tile, out, c);
}

// Any list of terms, one by one: of one phase, or of both of a stride of 2 along w, whose results
// alternate in a row.
template <class T, int phases, int rows, int vecs>
void list_tile(const PlanePhase<T>& phase, const PlaneTile<T>& tile) {
  using E = Total<T>;
  using V = Vec<E>;
  V total[phases][rows][vecs];
  const auto each = [](const auto& what) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
      for (int c = 0; c < vecs; ++c) what(i, c);
  };
  const auto run = [&](V(&acc)[rows][vecs], int32_t chain) __attribute__((always_inline)) {
    each([&](int i, int c) __attribute__((always_inline)) { acc[i][c] = V::zero(); });
    const MapRun* const end = phase.lists.runs + phase.lists.chain_end[chain];
    for (const MapRun* r = phase.lists.runs + (chain ? phase.lists.chain_end[chain - 1] : 0);
         r < end; ++r) {
      const E* from = tile.source + r->source;
      const V w = V::broadcast(phase.weights[r->weight]);
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i, from += tile.source_step)
#pragma GCC unroll 8
        for (int c = 0; c < vecs; ++c)
          acc[i][c] = fma(V::load(from + (c + 1 < vecs ? c * V::lanes : tile.last)), w, acc[i][c]);
    }
  };
  const auto sum = [&](V(&sum)[rows][vecs], int32_t chain,
                       int32_t last) __attribute__((always_inline)) {
    each([&](int i, int c) __attribute__((always_inline)) { sum[i][c] = V::zero(); });
    for (; chain < last; chain += chains_of<T>) {
      V acc[rows][vecs];
      run(acc, chain);
      if constexpr (chains_of<T> == 2) {
        V odd[rows][vecs];
        run(odd, chain + 1);
        each([&](int i, int c)
                 __attribute__((always_inline)) { acc[i][c] = acc[i][c] + odd[i][c]; });
      }
      each([&](int i, int c) __attribute__((always_inline)) { sum[i][c] = sum[i][c] + acc[i][c]; });
    }
  };
  sum(total[0], phase.chain, phase.last_chain);
  if constexpr (phases == 1) {
    store_plane_tile<T, rows, vecs>(total[0], phase, tile);
  } else {
    sum(total[1], phase.odd_chain, phase.odd_last_chain);
    const V bias = V::broadcast(phase.bias);
    each([&](int i, int c) __attribute__((always_inline)) {
      store_plane_pairs<T, vecs>(result_of<T>(total[0][i][c] + bias),
                                 result_of<T>(total[1][i][c] + bias), tile,
                                 tile.out + i * tile.out_step, c);
    });
  }
}

// what(k) with the constants k < n.
template <int n, class What>
TNC_INLINE void with_constants(const What& what) {
  [&]<int... k>(std::integer_sequence<int, k...>) __attribute__((always_inline)) {
    (what(std::integral_constant<int, k>{}), ...);
  }(std::make_integer_sequence<int, n>{});
}

// A row of the panel as a row of `kernel` taps reads it, for `vecs` vectors of pixels. `step`: from
// pixel to pixel; or -1: the taps go from right to left.
template <class V, int kernel, int vecs, int step, class E>
struct PlaneRow {
  static constexpr int parts = step > 1 ? step : 1;
  const E* row;  // the column furthest to the left
  int64_t part, last;
  V whole[parts][vecs + 1];

  TNC_INLINE PlaneRow(const E* row, int64_t part, int64_t last) : row(row), part(part), last(last) {
    if constexpr (joins_windows<V>)
#pragma GCC unroll 2
      for (int q = 0; q < parts; ++q)
#pragma GCC unroll 8
        for (int c = 0; c < vecs + (kernel > parts); ++c)
          whole[q][c] = V::load(row + q * part + c * V::lanes);
  }
  // What tap k reads for vector c.
  template <int k>
  TNC_INLINE V read(int c) const {
    constexpr int q = k % parts, shift = step < 0 ? kernel - 1 - k : k / parts;
    if constexpr (joins_windows<V>)
      return V::template window<shift>(whole[q][c], whole[q][c + 1]);
    else
      return V::load(row + q * part + shift + (c + 1 < vecs ? c * V::lanes : last));
  }
};

template <int vecs, class V, class T>
TNC_INLINE void prefetch_row(const T* row) {
#pragma GCC unroll 8
  for (int line = 0; line < vecs * V::lanes * int{sizeof(T)}; line += 64)
    prefetch(row + line / sizeof(T));
}

// A square kernel of dilation 1 and one group of terms, of several source planes or of stride 2: a
// vector is loaded once for all the rows of the tile that read it. Each row still meets its taps in
// order.
template <class T, int kernel, int step, int rows, int vecs>
void slide_tile(const PlanePhase<T>& phase, const PlaneTile<T>& tile) {
  using E = Total<T>;
  using V = Vec<E>;
  constexpr int chains = chains_of<T>, row_step = step < 0 ? 1 : step;
  V acc[rows][vecs][chains];
  const auto each = [](const auto& what) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
      for (int c = 0; c < vecs; ++c) what(i, c);
  };
  each([&](int i, int c) __attribute__((always_inline)) {
    for (int q = 0; q < chains; ++q) acc[i][c][q] = V::zero();
  });
  const E* w = phase.weights;
  const T* ahead = tile.ahead;
  for (int64_t r = 0; r < phase.tap_row_count; r += kernel, w += kernel * kernel) {
    const E* row = tile.source + phase.tap_rows[r];
#pragma GCC unroll 24
    for (int u = 0; u < (rows - 1) * row_step + kernel; ++u, row += tile.source_step) {
      prefetch_row<vecs, V>(ahead + u * tile.ahead_step);
      const PlaneRow<V, kernel, vecs, step, E> source(row, phase.part, tile.last);
      with_constants<kernel>([&](auto kw) __attribute__((always_inline)) {
        V x[vecs];
#pragma GCC unroll 8
        for (int c = 0; c < vecs; ++c) x[c] = source.template read<kw.value>(c);
#pragma GCC unroll 8
        for (int i = 0; i < rows; ++i) {
          const int kh = u - i * row_step, number = kh * kernel + kw.value;
          if (kh < 0 || kh >= kernel) continue;
          const V tap = V::broadcast(w[number]);
#pragma GCC unroll 8
          for (int c = 0; c < vecs; ++c) {
            V& chain = acc[i][c][number % chains];
            chain = fma(x[c], tap, chain);
          }
        }
      });
    }
    ahead += tile.ahead_plane;
    if constexpr (chains == 2)  // the next plane's first term has an odd number, or again an even
      each([&](int i, int c)
               __attribute__((always_inline)) { std::swap(acc[i][c][0], acc[i][c][1]); });
  }
  V total[rows][vecs];
  each([&](int i, int c) __attribute__((always_inline)) {
    total[i][c] = acc[i][c][0];
    if constexpr (chains == 2) total[i][c] = total[i][c] + acc[i][c][1];
    total[i][c] = V::zero() + total[i][c];
  });
  store_plane_tile<T, rows, vecs>(total, phase, tile);
}

// A square kernel of stride and dilation 1 that reads one plane: all the rows of a strip of `vecs`
// vectors. Source row u adds its taps to the `kernel` written rows u - kernel + 1 .. u, so that as
// many rows of chains are always under way; the oldest is then complete. Rows outside the tile are
// computed with them and dropped, source rows outside [tile.first, tile.end) add nothing.
template <class T, int kernel, int step, int vecs>
void roll_strip(const PlanePhase<T>& phase, const PlaneTile<T>& tile) {
  using E = Total<T>;
  using V = Vec<E>;
  constexpr int chains = chains_of<T>;
  constexpr bool cut = kernel * kernel > group_length<T>;
  V acc[kernel][vecs][chains], total[kernel][vecs];
#pragma GCC unroll 8
  for (int i = 0; i < kernel; ++i)
#pragma GCC unroll 8
    for (int c = 0; c < vecs; ++c) {
      total[i][c] = V::zero();
#pragma GCC unroll 2
      for (int q = 0; q < chains; ++q) acc[i][c][q] = V::zero();
    }
  const auto fold = [&](int i, int c) __attribute__((always_inline)) {
    V group = acc[i][c][0];
    if constexpr (chains == 2) group = group + acc[i][c][1];
    for (int q = 0; q < chains; ++q) acc[i][c][q] = V::zero();
    return (cut ? total[i][c] : V::zero()) + group;
  };
  const V bias = V::broadcast(phase.bias);
  const E* row = tile.source + phase.tap_rows[0] + tile.first * tile.source_step;
  const T* ahead = tile.ahead;
  T* out = tile.out + (tile.first - kernel + 1) * tile.out_step;
  for (int64_t u = tile.first;; u += kernel)
#pragma GCC unroll 8
    for (int s = 0; s < kernel; ++s) {
      if (u + s < tile.end) {
        prefetch_row<vecs, V>(ahead);
        ahead += tile.ahead_step;
        const PlaneRow<V, kernel, vecs, step, E> source(row, phase.part, tile.last);
        with_constants<kernel>([&](auto kw) __attribute__((always_inline)) {
          V x[vecs];
#pragma GCC unroll 8
          for (int c = 0; c < vecs; ++c) x[c] = source.template read<kw.value>(c);
#pragma GCC unroll 8
          for (int kh = 0; kh < kernel; ++kh) {
            constexpr int length = group_length<T>;
            const int i = (s - kh + kernel) % kernel, number = kh * kernel + kw.value;
            const V tap = V::broadcast(phase.weights[number]);
#pragma GCC unroll 8
            for (int c = 0; c < vecs; ++c) {
              if (number > 0 && number % length == 0) total[i][c] = fold(i, c);
              V& chain = acc[i][c][number % length % chains];
              chain = fma(x[c], tap, chain);
            }
          }
        });
        row += tile.source_step;
      }
      const int64_t done = u + s - kernel + 1;
      const int i = (s + 1) % kernel;
#pragma GCC unroll 8
      for (int c = 0; c < vecs; ++c) {
        const V result = result_of<T>(fold(i, c) + bias);
        if (cut) total[i][c] = V::zero();
        if (done < 0) continue;
        prefetch(out + tile.next_out + c * V::lanes);
        store_plane_vector<T, vecs>(result, tile, out, c);
      }
      if (done + 1 == tile.rows) return;
      out += tile.out_step;
    }
}

// grad_input of a square kernel of stride 2 and dilation 1 that reads one plane: all the rows of a
// strip of 2 * `vecs` vectors, two at a time. These are four phases; a vector of source pixels is
// loaded once for all of them. `odd`: is the padding odd?
template <class T, int kernel, int odd, int vecs>
void double_strip(const PlanePhase<T>& phase, const PlaneTile<T>& tile) {
  using E = Total<T>;
  using V = Vec<E>;
  constexpr int chains = chains_of<T>;
  // Tap k meets the phases q with an even q + odd - k, and reads the source position
  // (q + odd - k) / 2 further on.
  constexpr int lowest = (odd - kernel + 1) / 2, highest = (1 + odd) / 2;
  constexpr int reach = highest - lowest + 1;
  const V bias = V::broadcast(phase.bias);
  const E* row = tile.source;
  T* out = tile.out;
  for (int64_t y = 0; y < tile.rows; y += 2, row += tile.source_step, out += 2 * tile.out_step) {
    V acc[2][2][vecs][chains];
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q)
#pragma GCC unroll 8
      for (int c = 0; c < vecs; ++c)
#pragma GCC unroll 2
        for (V& chain : acc[q / 2][q % 2][c]) chain = V::zero();
    with_constants<reach>([&](auto down) __attribute__((always_inline)) {
      constexpr int u = highest - down.value;  // the taps ascend as the source rows descend
      const E* const from = row + u * tile.source_step;
      with_constants<reach>([&](auto left) __attribute__((always_inline)) {
        constexpr int shift = highest - left.value;
        V x[vecs];
#pragma GCC unroll 8
        for (int c = 0; c < vecs; ++c)
          x[c] = in_register(V::load(from + shift + (c + 1 < vecs ? c * V::lanes : tile.last)));
        with_constants<4>([&](auto phases) __attribute__((always_inline)) {
          constexpr int qh = phases.value / 2, qw = phases.value % 2;
          constexpr int kh = qh + odd - 2 * u, kw = qw + odd - 2 * shift;
          if constexpr (kh >= 0 && kh < kernel && kw >= 0 && kw < kernel) {
            constexpr int number = kh * kernel + kw;
            const V tap = V::broadcast(phase.weights[number]);
#pragma GCC unroll 8
            for (int c = 0; c < vecs; ++c) {
              V& chain = acc[qh][qw][c][number % chains];
              chain = fma(x[c], tap, chain);
            }
          }
        });
      });
    });
#pragma GCC unroll 2
    for (int q = 0; q < 2; ++q) {
      if (q == 1 && y + 1 == tile.rows) break;
#pragma GCC unroll 8
      for (int c = 0; c < vecs; ++c) {
        V both[2];
#pragma GCC unroll 2
        for (int qw = 0; qw < 2; ++qw) {
          V sum = acc[q][qw][c][0];
          if constexpr (chains == 2) sum = sum + acc[q][qw][c][1];
          both[qw] = result_of<T>((V::zero() + sum) + bias);
        }
        store_plane_pairs<T, vecs>(both[0], both[1], tile, out + q * tile.out_step, c);
      }
    }
  }
}

// Any kernel whose taps and pixels are neighbours along w, in one row: up to a vector of taps after
// the other, from the same vectors.
template <class T, int step, int vecs>
void sweep_tile(const PlanePhase<T>& phase, const PlaneTile<T>& tile) {
  using E = Total<T>;
  using V = Vec<E>;
  constexpr int chains = chains_of<T>, L = V::lanes;
  constexpr int64_t G = group_length<T>;
  const int64_t numbers = phase.tap_row_count * phase.row_taps;
  V acc[vecs][chains], total[1][vecs];
#pragma GCC unroll 8
  for (int c = 0; c < vecs; ++c) {
    total[0][c] = V::zero();
#pragma GCC unroll 2
    for (int q = 0; q < chains; ++q) acc[c][q] = V::zero();
  }
  int64_t number = 0;
  for (int64_t r = 0; r < phase.tap_row_count; ++r)
    for (int64_t k = 0, length; k < phase.row_taps; k += length) {
      length = least(least(phase.row_taps - k, L), G - number % G);
      const E* const from =
          tile.source + phase.tap_rows[r] + (step < 0 ? phase.row_taps - L - k : k);
      const E* const w = phase.weights + number;
      V whole[vecs + 1];
#pragma GCC unroll 9
      for (int c = 0; c <= vecs; ++c) whole[c] = V::load(from + c * L);
      with_constants<L>([&](auto constant) __attribute__((always_inline)) {
        constexpr int tap = constant.value, shift = step < 0 ? L - 1 - tap : tap;
        if (tap >= length) return;
        const V weight = V::broadcast(w[tap]);
#pragma GCC unroll 8
        for (int c = 0; c < vecs; ++c) {
          V& chain = acc[c][tap % chains];
          // In turns: either way alone is slower than the multiply-adds.
          const V x = c % 2 == 0 ? V::template window<shift>(whole[c], whole[c + 1])
                                 : V::load(from + c * L + shift);
          chain = fma(x, weight, chain);
        }
      });
      number += length;
      if (chains == 2 && length % 2 != 0)  // the next term has an odd number, or again an even one
#pragma GCC unroll 8
        for (int c = 0; c < vecs; ++c) std::swap(acc[c][0], acc[c][chains - 1]);
      if (number % G == 0 || number == numbers)
#pragma GCC unroll 8
        for (int c = 0; c < vecs; ++c) {
          V group = acc[c][0];
          if constexpr (chains == 2) group = group + acc[c][1];
          total[0][c] = total[0][c] + group;
#pragma GCC unroll 2
          for (int q = 0; q < chains; ++q) acc[c][q] = V::zero();
        }
    }
  store_plane_tile<T, 1, vecs>(total, phase, tile);
}

// What is made of the rows and columns of a phase.
enum class PlaneWay { list, pairs, doubled, sweep, slide, roll };

constexpr int tile_rows[] = {1, 2, 4, 5, 7};

constexpr bool tile_fits(int rows, int vecs, int registers) {
  return rows * vecs <= (registers == 32 ? 24 : 12);
}
// A sliding tile has its chains, the vectors of a row and its taps in registers.
template <class T>
constexpr bool slide_fits(int rows, int vecs) {
  return tile_fits(rows * chains_of<T>, vecs, Vec<Total<T>>::registers) &&
         (!joins_windows<Vec<Total<T>>> || rows * chains_of<T> * vecs <= 16);
}
template <class T>
constexpr int widest_strip(int kernel) {
  const int sums = chains_of<T> + (kernel * kernel > group_length<T>);
  const int fit = (Vec<Total<T>>::registers - 3) / (kernel * sums);
  return fit < 1 ? 1 : fit < 3 ? fit : 3;
}

template <class T, PlaneWay way, int kernel, int step, int rows, int vecs>
constexpr PlaneTileFunction<T> plane_tile() {
  constexpr int registers = Vec<Total<T>>::registers;
  if constexpr (way == PlaneWay::roll) {
    if constexpr (vecs <= widest_strip<T>(kernel)) return roll_strip<T, kernel, step, vecs>;
  } else if constexpr (way == PlaneWay::doubled) {
    if constexpr (4 * vecs * chains_of<T> <= registers / 2)
      return double_strip<T, kernel, step, vecs>;
  } else if constexpr (way == PlaneWay::sweep) {
    if constexpr (rows == 1) return sweep_tile<T, step, vecs>;
  } else if constexpr (way == PlaneWay::slide) {
    if constexpr (slide_fits<T>(rows, vecs)) return slide_tile<T, kernel, step, rows, vecs>;
  } else if constexpr (way == PlaneWay::pairs) {
    if constexpr (tile_fits(2 * rows, vecs, registers)) return list_tile<T, 2, rows, vecs>;
  } else {
    if constexpr (tile_fits(rows, vecs, registers)) return list_tile<T, 1, rows, vecs>;
  }
  return nullptr;
}

template <class T, PlaneWay way, int kernel, int step, int rows>
PlaneTileFunction<T> plane_tile(int64_t vecs) {
  switch (vecs) {
    case 1: return plane_tile<T, way, kernel, step, rows, 1>();
    case 2: return plane_tile<T, way, kernel, step, rows, 2>();
    case 3: return plane_tile<T, way, kernel, step, rows, 3>();
  }
  if constexpr (way == PlaneWay::sweep)
    if (vecs == 4) return plane_tile<T, way, kernel, step, rows, 4>();
  if constexpr ((way == PlaneWay::list || way == PlaneWay::sweep) && rows == 1) {
    if (vecs == 6) return plane_tile<T, way, kernel, step, rows, 6>();
    if (vecs == 8) return plane_tile<T, way, kernel, step, rows, 8>();
  }
  return nullptr;
}

template <class T, PlaneWay way, int kernel = 0, int step = 0>
PlaneTileFunction<T> plane_tile(int64_t rows, int64_t vecs) {
  if constexpr (way == PlaneWay::roll || way == PlaneWay::sweep || way == PlaneWay::doubled) {
    return plane_tile<T, way, kernel, step, 1>(vecs);
  } else {
    switch (rows) {
      case 1: return plane_tile<T, way, kernel, step, 1>(vecs);
      case 2: return plane_tile<T, way, kernel, step, 2>(vecs);
      case 4: return plane_tile<T, way, kernel, step, 4>(vecs);
      case 5: return plane_tile<T, way, kernel, step, 5>(vecs);
      case 7: return plane_tile<T, way, kernel, step, 7>(vecs);
    }
    return nullptr;
  }
}

template <class T, int step>
PlaneTileFunction<T> square_tile(PlaneWay way, int64_t kernel, int64_t rows, int64_t vecs) {
  if constexpr (joins_windows<Vec<Total<T>>>)
    if (way == PlaneWay::sweep)
      return plane_tile<T, PlaneWay::sweep, 0, (step < 0 ? -1 : 1)>(rows, vecs);
  if constexpr (step != 2)
    if (way == PlaneWay::roll)
      return kernel == 3   ? plane_tile<T, PlaneWay::roll, 3, step>(rows, vecs)
             : kernel == 5 ? plane_tile<T, PlaneWay::roll, 5, step>(rows, vecs)
                           : plane_tile<T, PlaneWay::roll, 7, step>(rows, vecs);
  return kernel == 3 ? plane_tile<T, PlaneWay::slide, 3, step>(rows, vecs)
                     : plane_tile<T, PlaneWay::slide, 5, step>(rows, vecs);
}

template <class T>
PlaneTileFunction<T> plane_tile(PlaneWay way, int64_t kernel, int64_t step, int64_t rows,
                                int64_t vecs) {
  if (way == PlaneWay::pairs) return plane_tile<T, PlaneWay::pairs>(rows, vecs);
  if (way == PlaneWay::list) return plane_tile<T, PlaneWay::list>(rows, vecs);
  if (way == PlaneWay::doubled)
    return kernel == 3 ? step == 0 ? plane_tile<T, PlaneWay::doubled, 3, 0>(rows, vecs)
                                   : plane_tile<T, PlaneWay::doubled, 3, 1>(rows, vecs)
           : step == 0 ? plane_tile<T, PlaneWay::doubled, 5, 0>(rows, vecs)
                       : plane_tile<T, PlaneWay::doubled, 5, 1>(rows, vecs);
  return step == 1    ? square_tile<T, 1>(way, kernel, rows, vecs)
         : step == -1 ? square_tile<T, -1>(way, kernel, rows, vecs)
                      : square_tile<T, 2>(way, kernel, rows, vecs);
}

// How `rows` x at most `columns` positions are covered.
template <class T>
struct PlaneTiling {
  static constexpr int L = Vec<Total<T>>::lanes;
  int64_t rows = 0, columns = 0, tile_rows = 1, parts = 1;  // parts: phases in a tile
  PlaneTileFunction<T> function[9] = {};                    // by the number of vectors

  // The next tile's vectors if `left` are left of a row; not all but one, which would then wait for
  // its own chains.
  int64_t next(int64_t left) const {
    int64_t some = least(left, 8);
    while (function[some] == nullptr) --some;
    if (left == some + 1)
      for (int64_t fewer = some - 1; fewer > 1; --fewer)
        if (function[fewer]) return fewer;
    return some;
  }

  PlaneTiling() = default;
  PlaneTiling(int64_t rows, int64_t columns, PlaneWay way, int64_t kernel, int64_t step)
      : rows(rows),
        columns(columns),
        parts(way == PlaneWay::pairs || way == PlaneWay::doubled ? 2 : 1) {
    const int64_t row_vecs = (columns + L - 1) / L;
    const int widest =
        static_cast<int>(way == PlaneWay::slide && row_vecs == 4 ? 2 : least(row_vecs, 3));
    // Chains wait for each other where few are under way.
    if (way == PlaneWay::roll && kernel * widest * chains_of<T> < 5) way = PlaneWay::slide;
    int64_t best = INT64_MAX;
    for (const int some : TNC_ISA::tile_rows) {  // the loads of a tile grow slower than its rows
      const int64_t cost = (rows + some - 1) / some * (some + 1);
      const bool fits = way == PlaneWay::slide ? slide_fits<T>(some, widest)
                                               : tile_fits(static_cast<int>(some * parts), widest,
                                                           Vec<Total<T>>::registers);
      if (some > rows || cost > best || !fits) continue;
      best = cost;
      tile_rows = some;
    }
    if (way == PlaneWay::roll || way == PlaneWay::doubled) tile_rows = rows;
    if (way == PlaneWay::sweep) tile_rows = 1;
    for (int64_t vecs = 1; vecs <= 8; ++vecs)
      function[vecs] = plane_tile<T>(way, kernel, step, tile_rows, vecs);
  }

  // One row of tiles. `tile` has everything but `last` and `lanes`, at the row's first column.
  TNC_INLINE void run(const PlanePhase<T>& phase, int64_t columns, PlaneTile<T> tile) const {
    const int64_t vecs = (columns + L - 1) / L;
    for (int64_t v = 0; v < vecs;) {
      const int64_t some = next(vecs - v);
      tile.last = (some - 1) * L;
      tile.lanes = static_cast<int>(least(columns - v * L - tile.last, L));
      if (!joins_windows<Vec<Total<T>>> && tile.lanes < L && columns >= L) {
        tile.last = columns - L - v * L;
        tile.lanes = L;
      }
      function[some](phase, tile);
      v += some;
      tile.source += some * L;
      tile.out += some * L * parts;
      tile.ahead += some * L;
    }
  }
};

// to[row][i] = from[row][i]; n elements of which the last vectors may overlap.
template <class T>
void widen_rows(const T* from, int64_t from_pitch, int64_t rows, int64_t n, Total<T>* to,
                int64_t to_pitch) {
  using V = Vec<Total<T>>;
  constexpr int L = V::lanes;
  if (n < L) {
    for (; rows > 0; --rows, from += from_pitch, to += to_pitch)
      V::load(from, static_cast<int>(n)).store(to, static_cast<int>(n));
    return;
  }
  for (; rows > 0; --rows, from += from_pitch, to += to_pitch) {
    for (int64_t i = 0; i < n - L; i += L) V::load(from + i).store(to + i);
    V::load(from + n - L).store(to + n - L);
  }
}

// to[row][p % step * part + p / step] = from[row][p - begin], begin <= p < end.
template <class T>
void split_rows(const T* from, int64_t from_pitch, int64_t rows, int64_t begin, int64_t end,
                int64_t step, int64_t part, Total<T>* to, int64_t to_pitch) {
  using V = Vec<Total<T>>;
  constexpr int L = V::lanes;
  if (step == 1) return widen_rows(from, from_pitch, rows, end - begin, to + begin, to_pitch);
  const int64_t n = end - begin;
  for (; rows > 0; --rows, from += from_pitch, to += to_pitch) {
    const auto put = [&](int64_t p, V a, V b) __attribute__((always_inline)) {
      V even, odd;
      V::split(a, b, even, odd);
      if (p % 2 != 0) std::swap(even, odd);
      even.store(to + (p + 1) / 2);
      odd.store(to + part + p / 2);
    };
    if (step > 2) {
      for (int64_t p = begin; p < end; ++p)
        to[p % step * part + p / step] = widened(from[p - begin]);
    } else if (n >= 2 * L) {
      const auto move = [&](int64_t i) __attribute__((always_inline)) {
        put(begin + i, V::load(from + i), V::load(from + i + L));
      };
      for (int64_t i = 0; i < n - 2 * L; i += 2 * L) move(i);
      move(n - 2 * L);
    } else if (n > L) {  // the zeros behind a row fall on padding or on what is written next
      put(begin, V::load(from), V::load(from + L, static_cast<int>(n - L)));
    } else {
      put(begin, V::load(from, static_cast<int>(n)), V::zero());
    }
  }
}

// to[i * parts + q] = from[q * pitch + i] for the `n` elements of `to`.
template <class T>
TNC_INLINE void merge_run(const T* from, int64_t pitch, int64_t parts, int64_t n, T* to) {
  using V = Vec<Total<T>>;
  constexpr int L = V::lanes;
  int64_t done = 0;
  if (parts == 2 && n >= 2 * L) {
    const auto move = [&](int64_t i) {
      V a, b;
      V::merge(V::load(from + i), V::load(from + pitch + i), a, b);
      a.store(to + 2 * i);
      b.store(to + 2 * i + L);
    };
    const int64_t pairs = n / 2;
    for (int64_t i = 0; i < pairs - L; i += L) move(i);
    move(pairs - L);
    done = 2 * pairs;
  }
  for (; done < n; ++done) to[done] = from[done % parts * pitch + done / parts];
}

template <class T>
bool map_planes(const ConvProblem& p) {
  using E = Total<T>;
  constexpr int L = Vec<E>::lanes;
  const ConvShape& s = p.shape;
  const bool transposed = p.direction == Direction::grad_input;
  const int64_t group = transposed ? s.group_in() : s.group_out();  // written channels of a group
  const int64_t planes = transposed ? s.group_out() : s.group_in();
  const int64_t channels = transposed ? s.in_channels : s.out_channels;
  const RawView& source = transposed ? p.output : p.input;
  const RawView& written = transposed ? p.input : p.output;
  MapAxis axis[3];
  for (int a = 0; a < 3; ++a) axis[a] = MapAxis::of(s.axis[a], transposed);
  const int64_t phases[3] = {axis[0].phases(), axis[1].phases(), axis[2].phases()};
  const int64_t phase_count = phases[0] * phases[1] * phases[2], numbers = planes * s.taps();
  const int64_t period_h = axis[1].period, period_w = axis[2].period, step_w = axis[2].step;
  if (group >= L || source.stride[4] != 1 || written.stride[4] != 1) return false;
  if ((axis[2].written + period_w - 1) / period_w * 2 <= L) return false;  // too few lanes used
  PanelShape panel{1, planes, {}, 1};
  Chunks chunks;
  if (phase_count > 4096 || numbers > 1 << 16 ||
      !choose_chunks(axis, sizeof(E), planes_bytes, INT64_MAX, chunks, panel))
    return false;
  int64_t part = (panel.extent[2] + step_w - 1) / step_w;  // of a row, of one remainder
  if constexpr (joins_windows<Vec<E>>) part = up(part, L) * L;
  panel.extent[2] = part * step_w;

  Arena& plan = plan_arena();
  plan.reset(Arena::bytes_for<E>(channels * numbers) +
             TermLists::bytes_for<T>(numbers, phase_count) + Arena::bytes_for<int32_t>(numbers));
  E* const weights = plan.take<E>(channels * numbers);
  int32_t* const tap_rows = plan.take<int32_t>(numbers);
  TermLists lists = TermLists::take<T>(plan, numbers, phase_count);
  const bool finite = pack_weights<T>(p, channels, group, planes, 1, false, weights);
  if (transposed && !finite) return false;
  const int64_t nearest = least(axis[2].numerator(0), axis[2].numerator(axis[2].kernel - 1));
  list_terms<T>(
      axis, phases, panel, false,
      [&](int64_t phase, int64_t k) {
        if (step_w == 1) return axis[2].shift(phase, k);
        const int64_t distance = axis[2].numerator(k) - nearest;
        return distance % step_w * part + distance / step_w;
      },
      lists);
  const int64_t kernel = axis[1].kernel;
  const int64_t stride = s.axis[2].stride, tap_row_count = numbers / axis[2].kernel;
  for (int64_t r = 0; r < tap_row_count; ++r) {
    const int64_t kd = r / kernel % axis[0].kernel, kh = r % kernel;
    tap_rows[r] = static_cast<int32_t>(r / kernel / axis[0].kernel * panel.plane_pitch() +
                                       axis[0].shift(0, kd) * panel.slice_pitch() +
                                       axis[1].shift(0, kh) * panel.row_pitch() +
                                       (step_w == 1 ? nearest : 0));
  }
  bool square = kernel == axis[2].kernel && (kernel == 3 || kernel == 5 || kernel == 7);
  for (int a = 0; a < 3; ++a)
    square = square && s.axis[a].stride == (a > 0 ? stride : 1) && s.axis[a].dilation == 1;
  const bool plain = square && stride <= (transposed ? 1 : 2);
  const bool pairs = period_w == 2 && chunks.count[2] == 1 && axis[2].written % 2 == 0;
  const bool neighbours = joins_windows<Vec<E>> && phase_count == 1 && step_w == 1 &&
                          axis[2].dilation == 1 && axis[2].kernel > 4;
  PlaneWay way = neighbours ? PlaneWay::sweep : PlaneWay::list;
  if (pairs && square && kernel < 7 && numbers == kernel * kernel && chunks.count[1] == 1 &&
      axis[1].pad % 2 == axis[2].pad % 2)
    way = PlaneWay::doubled;
  else if (pairs)
    way = PlaneWay::pairs;
  else if (plain && stride == 1 && numbers == kernel * kernel)
    way = PlaneWay::roll;
  else if (plain && kernel < 7 && numbers <= group_length<T>)
    way = PlaneWay::slide;
  const bool doubled = way == PlaneWay::doubled;
  const bool upwards = transposed && (way == PlaneWay::slide ||
                                      way == PlaneWay::roll);  // the order in which taps read rows

  const auto work = [&](int64_t begin, int64_t end) {
    const int64_t staged_pitch = chunks.size[2] / period_w + 1 + L;
    // Before the panel L elements may be read that are not used, and 2 * L behind it.
    const int64_t panel_size = panel.size() + 3 * L;
    Arena& arena = task_arena();
    arena.reset(Arena::bytes_for<E>(panel_size) + Arena::bytes_for<T>(period_w * 7 * staged_pitch));
    E* const values = arena.take<E>(panel_size) + L;
    T* const staged = arena.take<T>(period_w * 7 * staged_pitch);
    PlanePhase<T> phase{lists, 0, 0, nullptr, E(0), tap_rows, tap_row_count, axis[2].kernel, part};
    PlaneTiling<T> tiling;
    int64_t number = begin % chunks.total(), g = begin / chunks.total() % s.groups;
    int64_t n = begin / chunks.total() / s.groups;
    int64_t cleared_for = -1;
    Chunk chunk;
    int64_t first[3], from[3], to[3];  // what a panel holds, and what of that lies in the tensor
    for (int64_t piece = begin; piece < end; ++piece) {
      if (number != cleared_for) {  // the padding stays clear from one plane to the next
        std::memset(values - L, 0, panel_size * sizeof(E));
        cleared_for = number;
        chunk = chunks.chunk(number);
        for (int a = 0; a < 3; ++a) {
          first[a] = axis[a].first_source(chunk.begin[a]);
          from[a] = most(first[a], 0);
          to[a] = least(first[a] + axis[a].source_extent(chunk.size[a]), axis[a].source);
        }
      }
      const T* const plane = static_cast<const T*>(source.data) + n * source.stride[0] +
                             g * planes * source.stride[1] + from[2];
      if (from[2] < to[2])
        for (int64_t j = 0; j < planes; ++j)
          for (int64_t d = from[0]; d < to[0]; ++d)
            split_rows(
                plane + j * source.stride[1] + d * source.stride[2] + from[1] * source.stride[3],
                source.stride[3], to[1] - from[1], from[2] - first[2], to[2] - first[2], step_w,
                part,
                values + j * panel.plane_pitch() + (d - first[0]) * panel.slice_pitch() +
                    (from[1] - first[1]) * panel.row_pitch(),
                panel.row_pitch());
      // For strips: source rows in the order of the taps, without the padding if that adds nothing.
      int64_t first_row = 0, end_row = panel.extent[1];
      if (finite) {
        first_row = upwards ? first[1] + panel.extent[1] - to[1] : from[1] - first[1];
        end_row = upwards ? first[1] + panel.extent[1] - from[1] : to[1] - first[1];
        first_row = least(first_row, kernel - 1);
        end_row = most(end_row, first_row);
      }
      const T* const ahead = chunks.total() == 1 ? plane + planes * source.stride[1]
                                                 : plane + to[1] * source.stride[3];
      for (int64_t c = g * group; c < (g + 1) * group; ++c) {
        phase.weights = weights + c * numbers;
        phase.bias = p.bias ? widened(static_cast<const T*>(p.bias)[c]) : E(0);
        for (int64_t d = 0; d < chunk.size[0]; ++d)
          for (int64_t qh = 0; qh < (doubled ? 1 : least(period_h, chunk.size[1])); ++qh) {
            const int64_t rows =
                doubled ? chunk.size[1] : (chunk.size[1] - qh + period_h - 1) / period_h;
            const int64_t at_d = chunk.begin[0] + d, at_h = chunk.begin[1] + qh;
            const E* const slice = values + (axis[0].base(at_d) - first[0]) * panel.slice_pitch();
            T* const result = static_cast<T*>(written.data) + n * written.stride[0] +
                              c * written.stride[1] + at_d * written.stride[2] +
                              chunk.begin[2] * written.stride[4];
            const int64_t of_row =
                (at_d % axis[0].period * phases[1] + at_h % period_h) * phases[2];
            const int64_t columns =
                (chunk.size[2] + period_w - 1) / period_w;  // of a phase, or 1 more
            if (tiling.rows != rows || tiling.columns != columns)
              tiling = PlaneTiling<T>(rows, columns, way, kernel,
                                      doubled      ? axis[1].pad % 2
                                      : transposed ? -1
                                                   : stride);
            const int64_t some = tiling.tile_rows;
            for (int64_t next = 0; next < rows; next += some) {
              const int64_t row = least(next, rows - some);  // the last may overlap the one before
              for (int64_t qw = 0; qw < (pairs ? 1 : least(period_w, chunk.size[2])); ++qw) {
                const int64_t at_w = chunk.begin[2] + qw;
                const int64_t q = of_row + at_w % period_w;
                phase.chain = lists.phase_begin[q];
                phase.last_chain = lists.phase_begin[q + 1];
                if (pairs) {
                  phase.odd_chain = phase.last_chain;
                  phase.odd_last_chain = lists.phase_begin[q + 2];
                }
                const int64_t lead = upwards ? row + some - 1 : row;
                PlaneTile<T> tile;
                tile.source =
                    slice +
                    (axis[1].base(at_h) + lead * axis[1].step - first[1]) * panel.row_pitch() +
                    (step_w == 1 ? axis[2].base(at_w) - first[2] : 0);
                if (doubled) tile.source += axis[1].pad / 2 * panel.row_pitch() + axis[2].pad / 2;
                tile.source_step = (upwards                  ? -1
                                    : way == PlaneWay::slide ? 1
                                                             : axis[1].step) *
                                   panel.row_pitch();
                if (period_w == 1 || pairs) {
                  tile.out = result + (at_h + lead * period_h) * written.stride[3];
                  tile.out_step = (upwards ? -1 : doubled ? 1 : period_h) * written.stride[3];
                } else {
                  tile.out = staged + qw * 7 * staged_pitch;
                  tile.out_step = staged_pitch;
                }
                tile.rows = rows;
                tile.first = first_row;
                tile.end = end_row;
                tile.ahead = ahead;
                if (way == PlaneWay::slide) tile.ahead += row * axis[1].step * source.stride[3];
                tile.ahead_step = source.stride[3];
                tile.ahead_plane = source.stride[1];
                tile.next_out = written.stride[1];
                tiling.run(phase, (chunk.size[2] - qw + period_w - 1) / period_w, tile);
              }
              if (period_w > 1 && !pairs)
                for (int64_t i = 0; i < some; ++i)
                  merge_run(staged + i * staged_pitch, 7 * staged_pitch, period_w, chunk.size[2],
                            result + (at_h + (row + i) * period_h) * written.stride[3]);
            }
          }
      }
      if (++number == chunks.total()) number = 0, ++g;
      if (g == s.groups) g = 0, ++n;
    }
  };
  const int64_t products = chunks.size[0] * chunks.size[1] * chunks.size[2] * group * numbers;
  parallel_for(s.batch * s.groups * chunks.total(), 1 + worthwhile_products / (products + 1),
               environment_of<T>, work);
  return true;
}

}  // namespace torch_naiveconv::TNC_ISA
