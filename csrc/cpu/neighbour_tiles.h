// Tiles of one vector of lanes whose rows are neighbouring pixels. There a tile of microkernel.h
// would do nothing but load rows: one number for every multiply-add. Here a pixel is broadcast once
// for all the taps of a row of the kernel that read it.
#pragma once

#include "microkernel.h"

namespace torch_naiveconv::TNC_ISA {

// So many rows that their chains hide the latency of a multiply-add. With the lanes of a row of
// taps they fill more than 16 registers.
constexpr int neighbour_rows[] = {14, 12, 10, 8};
template <class T>
constexpr bool has_neighbour_tiles = Vec<T>::registers == 32;

// Neighbours in the order in which the taps move: of a grad_input, from right to left.
template <class T>
struct Neighbours {
  const T* pixel;           // where the first one points
  int64_t step;             // from pixel to pixel, and from tap to tap
  T* total;                 // of the first
  int64_t total_step;       // L or -L
  const int64_t* position;  // of the first in the result; the others follow as totals do
};

// chain[i] = fma(pixel[i + tap], lane[tap], chain[i]) for all terms of a group. Terms that follow
// each other in a row of `Taps` share their pixels; others go one by one.
template <class T, int Rows, int Taps>
void multiply_neighbours(int64_t tiles, Neighbours<T> n, const Term* terms, int32_t length,
                         const T* panel, bool resume, const Finish<T>* finish) {
  using V = Vec<T>;
  constexpr int L = V::lanes;
  const int64_t onward = n.total_step < 0 ? -1 : 1;
  for (; tiles > 0; --tiles, n.pixel += Rows * n.step, n.total += Rows * n.total_step) {
    V chain[Rows];
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) chain[i] = V::zero();
    for (int32_t t = 0; t < length;) {
      const T* pixel = n.pixel + terms[t].in_place();
      const T* const packed = panel + terms[t].packed() * L;
      const int32_t last = t + Taps - 1;
      if (last < length && terms[last].in_place() == terms[t].in_place() + (Taps - 1) * n.step &&
          terms[last].packed() == terms[t].packed() + Taps - 1) {
        V lane[Taps];
#pragma GCC unroll 8
        for (int k = 0; k < Taps; ++k) lane[k] = V::load(packed + k * L);
#pragma GCC unroll 24
        for (int p = 0; p < Rows + Taps - 1; ++p, pixel += n.step) {
          const V x = V::broadcast(*pixel);
#pragma GCC unroll 8
          for (int k = 0; k < Taps; ++k)
            if (0 <= p - k && p - k < Rows) chain[p - k] = fma(x, lane[k], chain[p - k]);
        }
        t += Taps;
      } else {
        const V lane = V::load(packed);
#pragma GCC unroll 16
        for (int i = 0; i < Rows; ++i, pixel += n.step)
          chain[i] = fma(V::broadcast(*pixel), lane, chain[i]);
        ++t;
      }
    }
    T* to = n.total;
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i, to += n.total_step) {
      chain[i] = closed(to, chain[i], resume);
      if (finish == nullptr) chain[i].store(to);
    }
    if (finish == nullptr) continue;
    const V bias = V::load(finish->bias);
    V special = V::zero();
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      chain[i] = chain[i] + bias;
      special = fma(chain[i], V::zero(), special);
    }
    const bool any_special = V::any(is_nan(special));
    if (any_special) *finish->special = true;
    const int64_t* position = n.position;
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i, position += onward) {
      const V sum = any_special ? canonical(chain[i]) : chain[i];
      if (finish->elements >= L)
        sum.store(finish->target + *position);
      else
        sum.store(finish->target + *position, finish->elements);
    }
    n.position = position;
  }
}

template <class T>
using NeighbourTiles = void (*)(int64_t, Neighbours<T>, const Term*, int32_t, const T*, bool,
                                const Finish<T>*);

// Of `rows` neighbours and rows of `taps`, 3, 5 or 7.
template <class T, int Taps = 3>
TNC_INLINE NeighbourTiles<T> neighbour_tiles_of(int rows, int64_t taps) {
  if constexpr (Taps < 7) {
    if (taps > Taps) return neighbour_tiles_of<T, Taps + 2>(rows, taps);
  }
  return rows == 14   ? multiply_neighbours<T, 14, Taps>
         : rows == 12 ? multiply_neighbours<T, 12, Taps>
         : rows == 10 ? multiply_neighbours<T, 10, Taps>
                      : multiply_neighbours<T, 8, Taps>;
}

// The rows of the tiles that suit image rows of `width` pixels, which tiles of microkernel.h
// complete; 0 if these alone do.
inline int neighbour_rows_of(int64_t width) {
  // In pixels of a tile here: of those alone one takes a fifth more, and less than eight wait for
  // their chains as long as eight.
  int best = 0;
  double least_cost = 1.2 * static_cast<double>(width);
  for (const int rows : neighbour_rows) {
    const int64_t rest = width % rows;
    const double cost =
        static_cast<double>(width - rest) + (rest ? 1.25 * static_cast<double>(most(rest, 8)) : 0);
    if (width >= rows && cost < least_cost) best = rows, least_cost = cost;
  }
  return best;
}

}  // namespace torch_naiveconv::TNC_ISA
