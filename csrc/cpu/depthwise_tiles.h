// The tiles of depthwise_planes.h: some rows of vectors of pixels, whose chains stay in registers
// while they go through the terms of a channel. One kernel for each way in which they can:
//
//   list_tile     any list of terms, one by one
//   slide_tile    square kernels: a vector is loaded once for all the rows of a tile
//   roll_strip    square kernels of one plane: ... of a whole strip
//   double_strip  grad_input of stride 2: ... for all four phases
//   sweep_tile    long rows of taps: several from the same vectors
#pragma once

#include "depthwise_geometry.h"

namespace torch_naiveconv::TNC_ISA {

// What all tiles of a phase of a channel have in common.
template <class T>
struct PlanePhase {
  TermLists lists;
  int32_t chain, last_chain;
  const Total<T>* weights;  // by term number, of one plane after the other
  Total<T> bias[2];
  // Where taps slide along a row: where each row of taps (source channel, kd, kh) begins to read,
  // how many rows and taps a row, and the distance of a panel row's remainders.
  const int32_t* tap_rows;
  int64_t tap_row_count, row_taps, part;
  int planes = 1;                             // written ones side by side
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
  int64_t next_out;                 // from a written row to the one that is fetched meanwhile
  int64_t source_plane, out_plane;  // from one of two planes side by side to the other
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
  constexpr int L = Vec<Total<T>>::lanes;
  store_in_turns(even, odd, row + 2 * (c + 1 < vecs ? c * L : tile.last),
                 2 * (is_cut<T, vecs>(tile, c) ? tile.lanes : L));
}

template <class T, int rows, int vecs>
TNC_INLINE void store_plane_tile(const Vec<Total<T>> (&total)[rows][vecs],
                                 const PlanePhase<T>& phase, const PlaneTile<T>& tile) {
  using V = Vec<Total<T>>;
  const V bias = V::broadcast(phase.bias[0]);
  T* out = tile.out;
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i, out += tile.out_step)
#pragma GCC unroll 8
    for (int c = 0; c < vecs; ++c)
      store_plane_vector<T, vecs>(result_of<T>(total[i][c] + bias), tile, out, c);
}

// what(row, vector) for all of a tile.
template <int rows, int vecs, class What>
TNC_INLINE void each_vector(const What& what) {
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int c = 0; c < vecs; ++c) what(i, c);
}

// Any list of terms, one by one: of one phase, or of both of a stride of 2 along w, whose results
// alternate in a row.
template <class T, int phases, int rows, int vecs>
void list_tile(const PlanePhase<T>& phase, const PlaneTile<T>& tile) {
  using E = Total<T>;
  using V = Vec<E>;
  V total[phases][rows][vecs];
  const auto run = [&](V(&acc)[rows][vecs], int32_t chain) __attribute__((always_inline)) {
    each_vector<rows, vecs>([&](int i, int c)
                                __attribute__((always_inline)) { acc[i][c] = V::zero(); });
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
    each_vector<rows, vecs>([&](int i, int c)
                                __attribute__((always_inline)) { sum[i][c] = V::zero(); });
    for (; chain < last; chain += chains_of<T>) {
      V acc[rows][vecs];
      run(acc, chain);
      if constexpr (chains_of<T> == 2) {
        V odd[rows][vecs];
        run(odd, chain + 1);
        each_vector<rows, vecs>([&](int i, int c) __attribute__((always_inline)) {
          acc[i][c] = acc[i][c] + odd[i][c];
        });
      }
      each_vector<rows, vecs>(
          [&](int i, int c) __attribute__((always_inline)) { sum[i][c] = sum[i][c] + acc[i][c]; });
    }
  };
  sum(total[0], phase.chain, phase.last_chain);
  if constexpr (phases == 1) {
    store_plane_tile<T, rows, vecs>(total[0], phase, tile);
  } else {
    sum(total[1], phase.odd_chain, phase.odd_last_chain);
    const V bias = V::broadcast(phase.bias[0]);
    each_vector<rows, vecs>([&](int i, int c) __attribute__((always_inline)) {
      store_plane_pairs<T, vecs>(result_of<T>(total[0][i][c] + bias),
                                 result_of<T>(total[1][i][c] + bias), tile,
                                 tile.out + i * tile.out_step, c);
    });
  }
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

// The most terms of slide_tile, which knows where the first group ends: two groups of the short
// ones of 16-bit types, else one.
template <class T>
constexpr int64_t slide_terms = chains_of<T> * group_length<T>;

// A square kernel of dilation 1, of several source planes or of stride 2: a vector is loaded once
// for all the rows of the tile that read it. Each row still meets its taps in order.
template <class T, int kernel, int step, int rows, int vecs>
void slide_tile(const PlanePhase<T>& phase, const PlaneTile<T>& tile) {
  using E = Total<T>;
  using V = Vec<E>;
  constexpr int chains = chains_of<T>, row_step = step < 0 ? 1 : step;
  constexpr int cut_plane = group_length<T> / (kernel * kernel);
  constexpr int cut_tap = group_length<T> % (kernel * kernel);
  V acc[rows][vecs][chains], total[rows][vecs];
  each_vector<rows, vecs>([&](int i, int c) __attribute__((always_inline)) {
    for (int q = 0; q < chains; ++q) acc[i][c][q] = V::zero();
    total[i][c] = V::zero();
  });
  const E* w = phase.weights;
  const T* ahead = tile.ahead;
  const auto add_plane = [&](int64_t r, auto is_cut) __attribute__((always_inline)) {
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
            if (is_cut.value && number == cut_tap) {
              total[i][c] = V::zero() + sum_of(acc[i][c]);
              for (int q = 0; q < chains; ++q) acc[i][c][q] = V::zero();
            }
            V& chain = acc[i][c][number % chains];
            chain = fma(x[c], tap, chain);
          }
        }
      });
    }
  };
  for (int64_t r = 0; r < phase.tap_row_count; r += kernel, w += kernel * kernel) {
    if (chains == 2 && r == cut_plane * kernel)
      add_plane(r, std::true_type{});
    else
      add_plane(r, std::false_type{});
    ahead += tile.ahead_plane;
    if constexpr (chains == 2)  // the next plane's first term has an odd number, or again an even
      each_vector<rows, vecs>([&](int i, int c) __attribute__((always_inline)) {
        std::swap(acc[i][c][0], acc[i][c][1]);
      });
  }
  each_vector<rows, vecs>([&](int i, int c) __attribute__((always_inline)) {
    total[i][c] = total[i][c] + sum_of(acc[i][c]);
  });
  store_plane_tile<T, rows, vecs>(total, phase, tile);
}

// A square kernel of stride and dilation 1 that reads one plane: all the rows of a strip of `vecs`
// vectors. Source row u adds its taps to the `kernel` written rows u - kernel + 1 .. u, so that as
// many rows of chains are always under way; the oldest is then complete. Rows outside the tile are
// computed with them and dropped, source rows outside [tile.first, tile.end) add nothing. Two
// planes side by side, of one vector each, where the chains of one would wait for each other.
template <class T, int kernel, int step, int vecs, int planes = 1>
void roll_strip(const PlanePhase<T>& phase, const PlaneTile<T>& tile) {
  using E = Total<T>;
  using V = Vec<E>;
  static_assert(planes == 1 || vecs == 1, "a vector of each");
  constexpr int chains = chains_of<T>, abreast = planes * vecs;
  constexpr bool cut = kernel * kernel > group_length<T>;
  V acc[kernel][abreast][chains], total[kernel][abreast];
#pragma GCC unroll 8
  for (int i = 0; i < kernel; ++i)
#pragma GCC unroll 8
    for (int c = 0; c < abreast; ++c) {
      total[i][c] = V::zero();
#pragma GCC unroll 2
      for (int q = 0; q < chains; ++q) acc[i][c][q] = V::zero();
    }
  const auto fold = [&](int i, int c) __attribute__((always_inline)) {
    const V group = sum_of(acc[i][c]);
    for (int q = 0; q < chains; ++q) acc[i][c][q] = V::zero();
    return (cut ? total[i][c] : V::zero()) + group;
  };
  const V bias[2] = {V::broadcast(phase.bias[0]), V::broadcast(phase.bias[planes - 1])};
  const E* const next_weights = phase.weights + (planes - 1) * kernel * kernel;
  const E* row = tile.source + phase.tap_rows[0] + tile.first * tile.source_step;
  const T* ahead = tile.ahead;
  T* out = tile.out + (tile.first - kernel + 1) * tile.out_step;
  for (int64_t u = tile.first;; u += kernel)
#pragma GCC unroll 8
    for (int s = 0; s < kernel; ++s) {
      if (u + s < tile.end) {
        prefetch_row<vecs, V>(ahead);
        if (planes == 2) prefetch_row<vecs, V>(ahead + tile.ahead_plane);
        ahead += tile.ahead_step;
        using Row = PlaneRow<V, kernel, vecs, step, E>;
        const Row source(row, phase.part, tile.last);
        const Row next(planes == 2 ? row + tile.source_plane : row, phase.part, tile.last);
        with_constants<kernel>([&](auto kw) __attribute__((always_inline)) {
          V x[abreast];
#pragma GCC unroll 8
          for (int c = 0; c < vecs; ++c) x[c] = source.template read<kw.value>(c);
          if constexpr (planes == 2) x[1] = next.template read<kw.value>(0);
#pragma GCC unroll 8
          for (int kh = 0; kh < kernel; ++kh) {
            constexpr int length = group_length<T>;
            const int i = (s - kh + kernel) % kernel, number = kh * kernel + kw.value;
            const V tap[2] = {V::broadcast(phase.weights[number]),
                              V::broadcast(next_weights[number])};
#pragma GCC unroll 8
            for (int c = 0; c < abreast; ++c) {
              if (number > 0 && number % length == 0) total[i][c] = fold(i, c);
              V& chain = acc[i][c][number % length % chains];
              chain = fma(x[c], tap[planes == 2 ? c : 0], chain);
            }
          }
        });
        row += tile.source_step;
      }
      const int64_t done = u + s - kernel + 1;
      const int i = (s + 1) % kernel;
#pragma GCC unroll 8
      for (int c = 0; c < abreast; ++c) {
        const int plane = planes == 2 ? c : 0, vec = c - plane;
        const V result = result_of<T>(fold(i, c) + bias[plane]);
        if (cut) total[i][c] = V::zero();
        if (done < 0) continue;
        T* const to = out + plane * tile.out_plane;
        prefetch(to + tile.next_out + vec * V::lanes);
        store_plane_vector<T, vecs>(result, tile, to, vec);
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
  const V bias = V::broadcast(phase.bias[0]);
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
        for (int qw = 0; qw < 2; ++qw)
          both[qw] = result_of<T>((V::zero() + sum_of(acc[q][qw][c])) + bias);
        T* const to = out + q * tile.out_step;
        prefetch_row<2, V>(to + tile.next_out + 2 * c * V::lanes);
        store_plane_pairs<T, vecs>(both[0], both[1], tile, to, c);
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
          total[0][c] = total[0][c] + sum_of(acc[c]);
#pragma GCC unroll 2
          for (int q = 0; q < chains; ++q) acc[c][q] = V::zero();
        }
    }
  store_plane_tile<T, 1, vecs>(total, phase, tile);
}

}  // namespace torch_naiveconv::TNC_ISA
