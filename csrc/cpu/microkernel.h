// The innermost loops of a packed product: a tile of rows x lanes over one group of terms.
//
//   chain[i][j] = fma(row[i][t], lane[j][t], chain[i][j])     for every term t of the group
//   total[i][j] = total[i][j] + chain[i][j]                   when the group is closed
//
// Rows are broadcast, lanes are vectors. One side is read in place: through a pointer each and one
// offset per term that all of them share, so it may be anything that is laid out alike, such as the
// window of a pixel. The other side is a panel, packed term after term; a tile may leave out some
// of them. Mostly the rows are in place and the panel holds lanes; in a Wide tile it is the other
// way round. The chains of a tile stay in registers for the whole group.
#pragma once

#include "basics.h"

namespace torch_naiveconv::TNC_ISA {

// Float and double close a group of one chain; the 16-bit types (computed in float) of two.
constexpr int max_chains = 2;

template <class T, int Chains>
struct TileSize {  // at most
  static constexpr int registers = Vec<T>::registers;
  static constexpr int vecs = registers == 32 ? 4 : 2;

  // The chains, the lanes and a row have to fit the registers. Of two chains the first waits in
  // memory, so that more sums go side by side; with 32 registers there are enough with both.
  static constexpr int rows_of(int some_vecs) {
    const int fit = (registers - 1 - some_vecs) / (some_vecs * (registers == 32 ? Chains : 1));
    return fit > 8 ? 8 : fit;
  }
  // Of a wide tile, and the vectors that go with a number of rows, so that the chains, all lanes
  // and a row, or all rows and a lane, fit the registers: a chain in memory that is added to would
  // halve the speed. The first of two waits there, unless the terms are too few.
  static constexpr int wide_rows = registers == 32 ? 8 : 6;
  static constexpr int wide_vecs(int rows) {
    const int all_lanes = (registers - 1) / (rows + 1);
    const int all_rows = (registers - 1 - rows) / rows;
    const int fit = all_lanes > all_rows ? all_lanes : all_rows;
    return fit > 8 ? 8 : fit;
  }
};

// Where a term is found: its offset from the pointers, and its number in the panel. One load gets
// both: a tile of one vector a row does nothing but wait for loads.
class Term {
 public:
  Term(int32_t in_place, int32_t packed)
      : both_(static_cast<int64_t>(uint64_t(packed) << 32 | uint32_t(in_place))) {}
  TNC_INLINE int64_t in_place() const { return static_cast<int32_t>(both_); }
  TNC_INLINE int64_t packed() const { return both_ >> 32; }

 private:
  int64_t both_;
};

// Where closed totals go at once: bias added, made canonical, stored in the result. The vectors of
// a tile must lie side by side there: its lanes, or the pixels of a wide tile. D is the result's
// type.
template <class T, class D = T>
struct Finish {
  D* target = nullptr;
  const int64_t* position = nullptr;  // of each pointer
  int64_t row_step = 0;               // of a wide tile's rows, or of lanes that are asked for
  const T* bias = nullptr;            // of each lane, or of each row of a wide tile; never -0
  int elements = 0;                   // of a row's vectors, or of each vector of a wide tile
  bool* special = nullptr;            // becomes true if an infinity or a NaN was stored
};

// What the chains of a tile are to its totals: all there is, a group more, or more terms of the
// only group, whose chains were left there.
enum class Group { first, next, same };

// What lies ahead and is asked for with each term: what it reads of a later tile; of rows apart,
// each in lines of its own, another one; the next group's panel, which follows this one where
// lanes are read in place; or, lane after lane, where the totals of this tile will be stored later.
enum class Asks { tile, row_apart, panel, result };

// The steps of a tile of one chain. multiply_tiles has its own: in calls its hot loop would lose
// registers.
template <class V, int Rows, int Vecs>
TNC_INLINE void zero_chains(V (&chain)[Rows][Vecs]) {
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < Vecs; ++j) chain[i][j] = V::zero();
}

// chain[i][j] = fma(row(i), lane(j), chain[i][j])
template <class V, int Rows, int Vecs, class RowOf, class LaneOf>
TNC_INLINE void add_term(V (&chain)[Rows][Vecs], const RowOf& row_of, const LaneOf& lane_of) {
  V lane[Vecs];
#pragma GCC unroll 8
  for (int j = 0; j < Vecs; ++j) lane[j] = lane_of(j);
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
    const V row = V::broadcast(row_of(i));
#pragma GCC unroll 8
    for (int j = 0; j < Vecs; ++j) chain[i][j] = fma(row, lane[j], chain[i][j]);
  }
}

// The total of a group: +0 + chain, or just the chain: it may be -0, and then the bias, which is
// not, makes it +0.
template <class V, class T>
TNC_INLINE V closed(const T* earlier, V chain, bool resume) {
  return resume ? V::load(earlier) + chain : chain;
}
// The same of two chains.
template <class V, class T>
TNC_INLINE V closed(const T* earlier, V even, V odd, bool resume) {
  return (resume ? V::load(earlier) : V::zero()) + (even + odd);
}
template <class V, class T, int Rows, int Vecs>
TNC_INLINE void close_group(const V (&chain)[Rows][Vecs], T* total, bool resume) {
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < Vecs; ++j, total += V::lanes)
      closed(total, chain[i][j], resume).store(total);
}

// Stores the sums of a tile, Whole or the elements that exist; `position` is that of its first
// pointer.
template <class T, class D, int Rows, int Vecs, bool Wide, bool Whole, class SumOf>
TNC_INLINE void store_tile(const int64_t* position, const Finish<T, D>& finish,
                           const SumOf& sum_of) {
  constexpr int L = Vec<T>::lanes;
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < Vecs; ++j) {
      D* const to =
          finish.target + (Wide ? position[j] + i * finish.row_step : position[i] + j * L);
      const int elements = finish.elements - (Wide ? 0 : j * L);
      if (Whole || elements >= L)
        sum_of(i, j).store(to);
      else
        sum_of(i, j).store(to, elements);
    }
}

// The sums of a tile among which is an infinity or a NaN, found in memory: rare, so they take no
// registers from the loops.
template <class T, class D>
__attribute__((noinline, cold)) void store_special(const T* sum, int rows, int vecs, bool wide,
                                                   const int64_t* position,
                                                   const Finish<T, D>& finish) {
  using V = Vec<T>;
  *finish.special = true;
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < vecs; ++j, sum += V::lanes) {
      const int64_t to = wide ? position[j] + i * finish.row_step : position[i] + j * V::lanes;
      const int elements = finish.elements - (wide ? 0 : j * V::lanes);
      canonical(V::load(sum)).store(finish.target + to, elements < V::lanes ? elements : V::lanes);
    }
}

// `tiles` of them, one below the other: their pointers follow in `in_place`, their rows in `total`,
// Rows x Vecs vectors a tile, unless `finish` takes them.
// `length[c]` terms of chain c, chain after chain. `last` is the last pointer of the whole work.
template <class T, class S, class D, int Chains, int Rows, int Vecs, bool Wide,
          Asks asks = Asks::tile>
void multiply_tiles(int64_t tiles, const S* const* in_place, const Term* terms,
                    const int32_t* length, const T* panel, T* total, Group group,
                    const S* const* last, const Finish<T, D>* finish) {
  using V = Vec<T>;
  constexpr int L = V::lanes;
  constexpr int pointers = Wide ? Vecs : Rows;
  // Two chains of few sums load as often as they multiply: of a patch, they ask for nothing.
  constexpr bool few = Chains == 2 && Rows * Vecs <= 12 && std::is_same_v<S, T>;
  constexpr bool all_lines = Wide && (Rows <= 2 || Vecs <= 4) && !few;
  constexpr int lines = few ? 0 : all_lines ? Vecs : Wide || Vecs > 1;  // that a term asks for
  const int64_t* position = finish ? finish->position : nullptr;
  const int far = all_lines && length[0] > 64 ? 1 : 2;  // tiles
  for (; tiles > 0; --tiles, in_place += pointers, total += Rows * Vecs * L) {
    const Term* term = terms;
    const S* const ahead = last - in_place > far * pointers ? in_place[far * pointers] : *last;
    const S* const* const rows_ahead =
        in_place + (last - in_place >= far * pointers + 7 ? far * pointers : 0);
    // Of four vectors two tiles in turns ask for two.
    const int64_t next_panel = (length[0] * Vecs + (Vecs > 2 ? tiles % 2 * 2 : 0)) * L;
    D* result = nullptr;
    int64_t to_lane = 0;
    if constexpr (asks == Asks::result) {
      result = finish->target + *position;
      to_lane = finish->row_step;
      position += pointers;
    } else if (!Wide && finish) {
      const int64_t* const next = position + (last - in_place > 3 * pointers ? 2 * pointers : 0);
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < Vecs; ++j) prefetch_to_write(finish->target + next[i] + j * L);
    }
    const S* at[pointers];
    V chain[Chains][Rows][Vecs];
#pragma GCC unroll 16
    for (int i = 0; i < pointers; ++i) at[i] = in_place[i];
#pragma GCC unroll 2
    for (int c = 0; c < Chains; ++c) {
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < Vecs; ++j)
          chain[c][i][j] =
              Chains == 1 && group == Group::same ? V::load(total + (i * Vecs + j) * L) : V::zero();
      for (int32_t n = length[c]; n > 0; --n) {
        const Term now = *term++;
        const int64_t o = now.in_place();
        const T* const packed = panel + now.packed() * (Wide ? Rows : Vecs * L);
        if constexpr (asks == Asks::row_apart) {
          prefetch_near(rows_ahead[n & 7] + o);
        } else if constexpr (asks == Asks::panel) {
#pragma GCC unroll 2
          for (int j = 0; j < (Vecs < 2 ? Vecs : 2); ++j) prefetch(packed + next_panel + j * L);
        } else if constexpr (asks == Asks::result) {
          prefetch_to_write(result);
          result += to_lane;
        } else {
#pragma GCC unroll 8
          for (int j = 0; j < lines; ++j) prefetch_near(ahead + o + j * L);
        }
        if constexpr (Wide && Rows < Vecs) {
          V row[Rows];
#pragma GCC unroll 16
          for (int i = 0; i < Rows; ++i) row[i] = V::broadcast(packed[i]);
#pragma GCC unroll 8
          for (int j = 0; j < Vecs; ++j) {
            const V lane = in_register(V::load(at[j] + o));
#pragma GCC unroll 16
            for (int i = 0; i < Rows; ++i) chain[c][i][j] = fma(row[i], lane, chain[c][i][j]);
          }
        } else {
          V lane[Vecs];
#pragma GCC unroll 8
          for (int j = 0; j < Vecs; ++j) {
            if constexpr (Wide)
              lane[j] = V::load(at[j] + o);
            else
              lane[j] = V::load(packed + j * L);
          }
#pragma GCC unroll 16
          for (int i = 0; i < Rows; ++i) {
            const V row = V::broadcast(Wide ? packed[i] : widened(at[i][o]));
#pragma GCC unroll 8
            for (int j = 0; j < Vecs; ++j) chain[c][i][j] = fma(row, lane[j], chain[c][i][j]);
          }
        }
      }
    }
    const auto total_of = [&](int i, int j) __attribute__((always_inline)) {
      const T* const earlier = total + (i * Vecs + j) * L;
      if constexpr (Chains == 2)
        return closed(earlier, chain[0][i][j], chain[1][i][j], group == Group::next);
      else
        return closed(earlier, chain[0][i][j], group == Group::next);
    };
    if (asks == Asks::result || finish == nullptr) {
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < Vecs; ++j) total_of(i, j).store(total + (i * Vecs + j) * L);
      continue;
    }
    V special[Vecs];  // NaN where an infinity or a NaN is among the sums
#pragma GCC unroll 8
    for (int j = 0; j < Vecs; ++j) special[j] = V::zero();
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < Vecs; ++j) {
        const V bias = Wide ? V::broadcast(finish->bias[i]) : V::load(finish->bias + j * L);
        chain[0][i][j] = total_of(i, j) + bias;
        special[j] = fma(chain[0][i][j], V::zero(), special[j]);
      }
#pragma GCC unroll 8
    for (int j = 1; j < Vecs; ++j) special[0] = special[0] + special[j];
    const auto sum_of = [&](int i, int j) __attribute__((always_inline)) { return chain[0][i][j]; };
    if (V::any(is_nan(special[0]))) {
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < Vecs; ++j) chain[0][i][j].store(total + (i * Vecs + j) * L);
      store_special(total, Rows, Vecs, Wide, position, *finish);
    } else if (finish->elements >= (Wide ? L : Vecs * L)) {
      store_tile<T, D, Rows, Vecs, Wide, true>(position, *finish, sum_of);
    } else {
      store_tile<T, D, Rows, Vecs, Wide, false>(position, *finish, sum_of);
    }
    position += pointers;
  }
}

template <class T, class S = T, class D = T>
using Tiles = void (*)(int64_t, const S* const*, const Term*, const int32_t*, const T*, T*, Group,
                       const S* const*, const Finish<T, D>*);

// The tile of `rows` x `vecs`, 1 <= rows <= TileSize::rows_of(vecs), 1 <= vecs <= TileSize::vecs.
// Whole tiles alone have a choice of what they ask for.
template <class T, int Chains, int Vecs = TileSize<T, Chains>::vecs,
          int Rows = TileSize<T, Chains>::rows_of(Vecs)>
TNC_INLINE Tiles<T> tile_of(int rows, int vecs, Asks asks) {
  using Size = TileSize<T, Chains>;
  if constexpr (Vecs > 1) {
    if (vecs < Vecs) return tile_of<T, Chains, Vecs - 1>(rows, vecs, asks);
  }
  if constexpr (Rows > 1) {
    if (rows < Rows) return tile_of<T, Chains, Vecs, Rows - 1>(rows, vecs, asks);
  }
  if constexpr (Chains == 1 && Rows == Size::rows_of(Vecs)) {
    if (asks == Asks::row_apart)
      return multiply_tiles<T, T, T, Chains, Rows, Vecs, false, Asks::row_apart>;
    if (asks == Asks::panel) return multiply_tiles<T, T, T, Chains, Rows, Vecs, false, Asks::panel>;
    if (asks == Asks::result)
      return multiply_tiles<T, T, T, Chains, Rows, Vecs, false, Asks::result>;
  }
  return multiply_tiles<T, T, T, Chains, Rows, Vecs, false>;
}

// The wide tile of `rows` rows and `vecs` vectors: TileSize::wide_vecs(rows), halved some times.
template <class T, class S, class D, int Chains, int Rows, int Vecs>
TNC_INLINE Tiles<T, S, D> wide_tile_within(int vecs) {
  if constexpr (Vecs > 1) {
    if (vecs < Vecs) return wide_tile_within<T, S, D, Chains, Rows, Vecs / 2>(vecs);
  }
  return multiply_tiles<T, S, D, Chains, Rows, Vecs, true>;
}
template <class T, class S, class D, int Chains, int Rows = TileSize<T, Chains>::wide_rows>
TNC_INLINE Tiles<T, S, D> wide_tile_of(int rows, int vecs) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return wide_tile_of<T, S, D, Chains, Rows - 1>(rows, vecs);
  }
  return wide_tile_within<T, S, D, Chains, Rows, TileSize<T, Chains>::wide_vecs(Rows)>(vecs);
}

// The tiles of `vecs` vectors that cover `rows` rows: use(number of tiles, their rows) for each run
// of equal ones.
template <class T, int Chains, class Use>
TNC_INLINE void each_row_tile(int64_t rows, int vecs, const Use& use) {
  const int step = TileSize<T, Chains>::rows_of(vecs);
  int64_t tiles = rows / step;
  int rest = static_cast<int>(rows % step);
  // A rest of so few chains would wait for itself: it and a whole tile become two halves.
  const bool halves = tiles > 0 && rest > 0 && rest * vecs < 8;
  if (halves) --tiles, rest += step;
  use(tiles, step);
  if (halves) use(1, (rest + 1) / 2);
  if (rest > 0) use(1, halves ? rest / 2 : rest);
}

// total[r] += the group, for all rows; total has `vecs` vectors a row. If it `asks` for the result,
// `finish` says where that is, else it takes the totals.
template <class T, int Chains>
void multiply_rows(const T* const* row, int64_t rows, const Term* terms, const int32_t* length,
                   const T* panel, int vecs, T* total, bool resume, Asks asks = Asks::tile,
                   const Finish<T>* finish = nullptr) {
  const T* const* const last = row + rows - 1;
  Finish<T> here = finish ? *finish : Finish<T>{};
  const Group group = resume ? Group::next : Group::first;
  each_row_tile<T, Chains>(rows, vecs, [&](int64_t tiles, int tile_rows) {
    const bool whole = tile_rows == TileSize<T, Chains>::rows_of(vecs);
    tile_of<T, Chains>(tile_rows, vecs, asks)(
        tiles, row, terms, length, panel, total, group, last,
        finish && (whole || asks != Asks::result) ? &here : nullptr);
    row += tiles * tile_rows;
    if (finish) here.position += tiles * tile_rows;
    total += tiles * tile_rows * vecs * Vec<T>::lanes;
  });
}

// The wide tiles of `rows` rows, at most `widest` vectors side by side, that cover `vectors` of
// them: use(first vector, number of tiles, their width) for each run of equal ones.
template <class T, int Chains, class Use>
TNC_INLINE void each_wide_run(int rows, int64_t vectors, int widest, const Use& use) {
  int vecs = TileSize<T, Chains>::wide_vecs(rows);
  for (int64_t v = 0; v < vectors;) {
    while (vecs > least(vectors - v, widest)) vecs /= 2;
    const int64_t tiles = (vectors - v) / vecs;
    use(v, tiles, vecs);
    v += tiles * vecs;
  }
}

// total += the group, for `vectors` vectors with a pointer each, in wide tiles; the tile that
// begins at vector v has its totals, rows x width, at v * rows vectors. `at_once` terms at a time,
// whose memory is read in so many runs; a group of more must be the only one.
template <class T, int Chains, class S, class D>
void multiply_vectors(const S* const* vector, int64_t vectors, const Term* terms,
                      const int32_t* length, const T* panel, int rows, T* total, bool resume,
                      int widest, int64_t at_once, const Finish<T, D>* finish) {
  Group group = resume ? Group::next : Group::first;
  int64_t left = length[0];
  do {
    const int32_t some[max_chains] = {static_cast<int32_t>(least(left, at_once)),
                                      Chains == 2 ? length[1] : 0};
    left -= some[0];
    const Finish<T, D>* const closes = left == 0 ? finish : nullptr;
    each_wide_run<T, Chains>(rows, vectors, widest, [&](int64_t v, int64_t tiles, int vecs) {
      Finish<T, D> rest = closes ? *closes : Finish<T, D>{};
      if (closes) rest.position += v;
      wide_tile_of<T, S, D, Chains>(rows, vecs)(tiles, vector + v, terms, some, panel,
                                                total + v * rows * Vec<T>::lanes, group,
                                                vector + vectors - 1, closes ? &rest : nullptr);
    });
    terms += some[0];
    group = Group::same;
  } while (left > 0);
}

// total[r] += `groups` groups of `terms` terms each, for one vector of lanes and so few rows that a
// panel would serve them badly: blocks of lanes are turned in registers instead. Term t is
// row[r][t * row_step] and lane[i * lane_stride + t]; whole vectors of terms. The totals of a row
// are `pitch` behind those of the row before. What lies `ahead` of a lane is asked for early.
template <class T, class S, int Chains, int Rows>
void multiply_turned(const T* const* row, int64_t row_step, const S* lane, int64_t lane_stride,
                     int64_t ahead, int64_t groups, int64_t terms, T* total, int64_t pitch,
                     bool resume) {
  using V = Vec<T>;
  constexpr int L = V::lanes;
  const T* at[Rows];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) at[r] = row[r];
  for (int64_t g = 0; g < groups; ++g, resume = true) {
    V chain[Rows][Chains];
    zero_chains(chain);
    for (int64_t t = 0; t < terms; t += L, lane += L) {
      V block[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        prefetch_near(lane + i * lane_stride + ahead);
        block[i] = V::load(lane + i * lane_stride);
      }
      V::transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i)
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) {
          V& sum = chain[r][i % Chains];
          sum = fma(V::broadcast(*at[r]), block[i], sum);
          at[r] += row_step;
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      T* const to = total + r * pitch;
      if constexpr (Chains == 2)
        closed(to, chain[r][0], chain[r][1], resume).store(to);
      else
        closed(to, chain[r][0], resume).store(to);
    }
  }
}

constexpr int rows_turned = 4;  // at most
template <class T, class S, int Chains>
TNC_INLINE auto turned_of(int64_t rows) {
  return rows == 1   ? multiply_turned<T, S, Chains, 1>
         : rows == 2 ? multiply_turned<T, S, Chains, 2>
         : rows == 3 ? multiply_turned<T, S, Chains, 3>
                     : multiply_turned<T, S, Chains, 4>;
}

// multiply_tiles for rows of `terms` terms side by side in memory (a multiple of 8), the rows
// `apart` from each other. Meanwhile the next tile's rows are asked for, after the last tile those
// of the terms behind these: each term asks for one row, so that every line is asked for in time.
template <class T, int Rows, int Vecs>
void multiply_runs(int64_t tiles, const T* first, int64_t apart, int64_t terms, const T* panel,
                   T* total, bool resume) {
  using V = Vec<T>;
  constexpr int L = V::lanes;
  for (int64_t tile = 0; tile < tiles; ++tile, total += Rows * Vecs * L) {
    const T* at[Rows];
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) at[i] = first + (tile * Rows + i) * apart;
    const int64_t ahead = tile + 1 < tiles ? Rows * apart : terms - tile * Rows * apart;
    V chain[Rows][Vecs];
    zero_chains(chain);
    const T* packed = panel;
    for (int64_t t = 0; t < terms; t += 8)
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k, packed += Vecs * L) {
        prefetch_near(at[k % Rows] + t + ahead);
        add_term(
            chain, [&](int i) __attribute__((always_inline)) { return at[i][t + k]; },
            [&](int j) __attribute__((always_inline)) { return V::load(packed + j * L); });
      }
    close_group(chain, total, resume);
  }
}

template <class T>
TNC_INLINE auto runs_of(int vecs) {
  using Size = TileSize<T, 1>;
  if constexpr (Size::vecs == 4) {
    if (vecs == 4) return multiply_runs<T, Size::rows_of(4), 4>;
    if (vecs == 3) return multiply_runs<T, Size::rows_of(3), 3>;
  }
  return vecs == 2 ? multiply_runs<T, Size::rows_of(2), 2> : multiply_runs<T, Size::rows_of(1), 1>;
}

// A tile of a group whose rows lie side by side, as its lanes do, both read in place: the channels
// of pixels a step apart. Meanwhile the lines of later pixels are asked for.
template <class T, int Rows, int Vecs>
void multiply_pixels(const T* rows, int64_t row_step, const T* lanes, int64_t lane_step,
                     int64_t terms, int64_t rows_ahead, int64_t lanes_ahead, T* total,
                     bool resume) {
  using V = Vec<T>;
  constexpr int L = V::lanes;
  V chain[Rows][Vecs];
  zero_chains(chain);
  for (; terms > 0; --terms, rows += row_step, lanes += lane_step) {
    prefetch(rows + rows_ahead);
#pragma GCC unroll 2
    for (int j = 0; j < (Vecs < 2 ? Vecs : 2); ++j) prefetch(lanes + lanes_ahead + j * L);
    add_term(
        chain, [&](int i) __attribute__((always_inline)) { return rows[i]; },
        [&](int j) __attribute__((always_inline)) { return V::load(lanes + j * L); });
  }
  close_group(chain, total, resume);
}

template <class T, int Vecs = TileSize<T, 1>::vecs, int Rows = TileSize<T, 1>::rows_of(Vecs)>
TNC_INLINE auto pixels_of(int rows, int vecs) {
  if constexpr (Vecs > 1) {
    if (vecs < Vecs) return pixels_of<T, Vecs - 1>(rows, vecs);
  }
  if constexpr (Rows > 1) {
    if (rows < Rows) return pixels_of<T, Vecs, Rows - 1>(rows, vecs);
  }
  return multiply_pixels<T, Rows, Vecs>;
}

}  // namespace torch_naiveconv::TNC_ISA
