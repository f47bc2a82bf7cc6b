// Which tiles of depthwise_tiles.h cover the rows and columns of a phase.
#pragma once

#include "depthwise_tiles.h"

namespace torch_naiveconv::TNC_ISA {

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
  PlaneTileFunction<T> two_planes = nullptr;                // of a vector each, if that is faster

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
    const int64_t row_vecs = up(columns, L);
    const int widest =
        static_cast<int>(way == PlaneWay::slide && row_vecs == 4 ? 2 : least(row_vecs, 3));
    // Chains wait for each other where few are under way.
    if (way == PlaneWay::roll && kernel * widest * chains_of<T> < 5) way = PlaneWay::slide;
    int64_t best = INT64_MAX;
    for (const int some : TNC_ISA::tile_rows) {  // the loads of a tile grow slower than its rows
      const int64_t cost = up(rows, some) * (some + 1);
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
    if constexpr (chains_of<T> == 1)
      if (takes_two_planes(way, kernel, columns))
        two_planes = step < 0 ? roll_strip<T, 5, -1, 1, 2> : roll_strip<T, 5, 1, 1, 2>;
  }

  // Five chains of one plane wait for each other, as many of two do not.
  static bool takes_two_planes(PlaneWay way, int64_t kernel, int64_t columns) {
    return way == PlaneWay::roll && kernel == 5 && columns <= L && chains_of<T> == 1;
  }

  // One row of tiles. `tile` has everything but `last` and `lanes`, at the row's first column.
  TNC_INLINE void run(const PlanePhase<T>& phase, int64_t columns, PlaneTile<T> tile) const {
    const int64_t vecs = up(columns, L);
    for (int64_t v = 0; v < vecs;) {
      const int64_t some = next(vecs - v);
      tile.last = (some - 1) * L;
      tile.lanes = static_cast<int>(least(columns - v * L - tile.last, L));
      if (!joins_windows<Vec<Total<T>>> && tile.lanes < L && columns >= L) {
        tile.last = columns - L - v * L;
        tile.lanes = L;
      }
      (phase.planes == 2 ? two_planes : function[some])(phase, tile);
      v += some;
      tile.source += some * L;
      tile.out += some * L * parts;
      tile.ahead += some * L;
    }
  }
};

}  // namespace torch_naiveconv::TNC_ISA
