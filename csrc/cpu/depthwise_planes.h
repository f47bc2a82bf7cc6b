// Forward and grad_input of few channels per group where rows lie contiguously (NCHW): lanes are
// neighbouring pixels of a row. Start reading at PlaneMap::run_task.
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

#include "depthwise_tiling.h"

namespace torch_naiveconv::TNC_ISA {

constexpr int64_t planes_bytes = 48 << 10;  // of a panel: about the L1 cache

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

// What suits the kernel best, of `numbers` terms.
template <class T>
PlaneWay way_of(const ConvShape& s, const MapAxis (&axis)[3], const Chunks& chunks, int64_t numbers,
                bool transposed) {
  const int64_t kernel = axis[1].kernel, stride = s.axis[2].stride;
  bool square = kernel == axis[2].kernel && (kernel == 3 || kernel == 5 || kernel == 7);
  for (int a = 0; a < 3; ++a)
    square = square && s.axis[a].stride == (a > 0 ? stride : 1) && s.axis[a].dilation == 1;
  if (axis[2].period == 2 && chunks.count[2] == 1 && axis[2].written % 2 == 0) {
    const bool doubled = square && kernel < 7 && numbers == kernel * kernel &&
                         chunks.count[1] == 1 && axis[1].pad % 2 == axis[2].pad % 2;
    return doubled ? PlaneWay::doubled : PlaneWay::pairs;
  }
  if (square && stride == 1 && numbers == kernel * kernel) return PlaneWay::roll;
  if (square && stride <= (transposed ? 1 : 2) && kernel < 7 && numbers <= slide_terms<T>)
    return PlaneWay::slide;
  // One phase is not enough: of a stride longer than the image it need not meet all taps.
  const bool all_meet = axis[0].period == 1 && axis[1].period == 1 && axis[2].period == 1;
  const bool neighbours = joins_windows<Vec<Total<T>>> && all_meet && axis[2].step == 1 &&
                          axis[2].dilation == 1 && axis[2].kernel > 4;
  return neighbours ? PlaneWay::sweep : PlaneWay::list;
}

// One call: its plan, which the threads share, and what a task does. A task is some pieces, a chunk
// of a group's planes each; its steps, from run_task on, follow each other below.
template <class T>
class PlaneMap {
  using E = Total<T>;
  static constexpr int L = Vec<E>::lanes, most_tile_rows = 7;

 public:
  explicit PlaneMap(const ConvProblem& p)
      : p_(p),
        s_(p.shape),
        transposed_(p.direction == Direction::grad_input),
        group_(transposed_ ? s_.group_in() : s_.group_out()),
        planes_(transposed_ ? s_.group_out() : s_.group_in()),
        numbers_(planes_ * s_.taps()),
        source_(transposed_ ? p.output : p.input),
        written_(transposed_ ? p.input : p.output) {
    for (int a = 0; a < 3; ++a) {
      axis_[a] = MapAxis::of(s_.axis[a], transposed_);
      phases_[a] = axis_[a].phases();
    }
  }

  // False: left to the others.
  bool prepare() {
    if (group_ >= L || source_.stride[4] != 1 || written_.stride[4] != 1) return false;
    if (up(wide_.written, wide_.period) * 2 <= L) return false;  // too few lanes used
    if (phase_count() > 4096 || numbers_ > 1 << 16 ||
        !choose_chunks(axis_, sizeof(E), planes_bytes, INT64_MAX, chunks_, panel_))
      return false;
    part_ = up(panel_.extent[2], wide_.step);
    if constexpr (joins_windows<Vec<E>>) part_ = up(part_, L) * L;
    panel_.extent[2] = part_ * wide_.step;
    return list_all();
  }

  void run() const {
    const int64_t* const size = chunks_.size;
    const int64_t products = size[0] * size[1] * size[2] * group_ * numbers_;
    parallel_for(s_.batch * s_.groups * chunks_.total(), 1 + worthwhile_products / (products + 1),
                 environment_of<T>, [&](int64_t begin, int64_t end) { run_task(begin, end); });
  }

 private:
  // ---- the plan --------------------------------------------------------------------------------

  int64_t phase_count() const { return phases_[0] * phases_[1] * phases_[2]; }
  bool doubled() const { return way_ == PlaneWay::doubled; }
  bool pairs() const { return doubled() || way_ == PlaneWay::pairs; }

  // The weights, the terms of each phase, the rows that rows of taps read. False: a weight that is
  // not finite would be multiplied by padding that the contract leaves out.
  bool list_all() {
    const int64_t channels = transposed_ ? s_.in_channels : s_.out_channels;
    Arena& plan = plan_arena();
    plan.reset(Arena::bytes_for<E>(channels * numbers_) +
               TermLists::bytes_for<T>(numbers_, phase_count()) +
               Arena::bytes_for<int32_t>(numbers_));
    E* const weights = plan.take<E>(channels * numbers_);
    int32_t* const tap_rows = plan.take<int32_t>(numbers_);
    lists_ = TermLists::take<T>(plan, numbers_, phase_count());
    weights_ = weights;
    tap_rows_ = tap_rows;
    finite_ = pack_weights<T>(p_, channels, group_, planes_, 1, false, weights);
    if (transposed_ && !finite_) return false;
    const int64_t nearest = least(wide_.numerator(0), wide_.numerator(wide_.kernel - 1));
    list_terms<T>(
        axis_, phases_, panel_, false,
        [&](int64_t phase, int64_t k) {
          if (wide_.step == 1) return wide_.shift(phase, k);
          const int64_t distance = wide_.numerator(k) - nearest;
          return distance % wide_.step * part_ + distance / wide_.step;
        },
        lists_);
    const int64_t kernel = high_.kernel;
    for (int64_t r = 0; r < numbers_ / wide_.kernel; ++r) {
      const int64_t kd = r / kernel % axis_[0].kernel, kh = r % kernel;
      tap_rows[r] = static_cast<int32_t>(r / kernel / axis_[0].kernel * panel_.plane_pitch() +
                                         axis_[0].shift(0, kd) * panel_.slice_pitch() +
                                         high_.shift(0, kh) * panel_.row_pitch() +
                                         (wide_.step == 1 ? nearest : 0));
    }
    way_ = way_of<T>(s_, axis_, chunks_, numbers_, transposed_);
    upwards_ = transposed_ && (way_ == PlaneWay::slide || way_ == PlaneWay::roll);
    const bool whole = planes_ == 1 && group_ == 1 && chunks_.total() == 1;
    if (whole && PlaneTiling<T>::takes_two_planes(way_, high_.kernel, chunks_.size[2]))
      abreast_ = 2;
    return true;
  }

  // ---- a task ----------------------------------------------------------------------------------

  // What the pieces of a task share.
  struct Workspace {
    E* values;  // the panel
    T* staged;  // tiles of each phase along w
    int64_t staged_pitch;
    PlanePhase<T> phase;
    PlaneTiling<T> tiling;
    int64_t panel_pitch;  // from one plane's panel to the next one's
  };
  struct Piece {
    Chunk chunk;
    int64_t first[3], from[3], to[3];  // what a panel holds, and what of that lies in the tensor
    int64_t first_row, end_row;        // of the panel, that strips read
    const T* ahead;                    // what the next piece reads
  };

  void run_task(int64_t begin, int64_t end) const {
    const int64_t pitch = chunks_.size[2] / wide_.period + 1 + L;
    // Before the panel L elements may be read that are not used, and 2 * L behind it.
    const int64_t panel_pitch = panel_.size() + 2 * L;  // of two planes side by side
    const int64_t panel_size = abreast_ * panel_pitch + L;
    const int64_t staged_size = wide_.period * most_tile_rows * pitch + L;
    Arena& arena = task_arena();
    arena.reset(Arena::bytes_for<E>(panel_size) + Arena::bytes_for<T>(staged_size));
    E* const values = arena.take<E>(panel_size) + L;
    T* const staged = arena.take<T>(staged_size);
    const int64_t tap_row_count = numbers_ / wide_.kernel;
    Workspace w{values, staged,
                pitch,  {lists_, 0, 0, nullptr, {}, tap_rows_, tap_row_count, wide_.kernel, part_},
                {},     panel_pitch};
    const int64_t count = chunks_.total();
    int64_t number = begin % count, g = begin / count % s_.groups, n = begin / count / s_.groups;
    int64_t cleared_for = -1;
    Piece piece;
    for (int64_t i = begin; i < end;) {
      if (number != cleared_for) {  // the padding stays clear from one plane to the next
        std::memset(values - L, 0, panel_size * sizeof(E));
        cleared_for = number;
        piece = piece_of(number);
      }
      const T* const plane = static_cast<const T*>(source_.data) + n * source_.stride[0] +
                             g * planes_ * source_.stride[1] + piece.from[2];
      const int64_t some = least(least(abreast_, end - i), s_.groups - g);  // groups of one plane
      w.phase.planes = static_cast<int>(some);
      for (int64_t j = 0; j < some; ++j)
        fill_panel(piece, plane + j * source_.stride[1], values + j * panel_pitch);
      piece.ahead = count == 1 ? plane + some * planes_ * source_.stride[1]
                               : plane + piece.to[1] * source_.stride[3];
      for (int64_t c = g * group_; c < (g + 1) * group_; ++c) {
        w.phase.weights = weights_ + c * numbers_;
        for (int64_t j = 0; j < some; ++j)
          w.phase.bias[j] = p_.bias ? widened(static_cast<const T*>(p_.bias)[c + j]) : E(0);
        write_plane(piece,
                    static_cast<T*>(written_.data) + n * written_.stride[0] +
                        c * written_.stride[1] + piece.chunk.begin[2] * written_.stride[4],
                    w);
      }
      i += some;
      for (int64_t j = 0; j < some; ++j)
        if (++number == count) number = 0, ++g;
      if (g == s_.groups) g = 0, ++n;
    }
  }

  Piece piece_of(int64_t number) const {
    Piece piece;
    piece.chunk = chunks_.chunk(number);
    for (int a = 0; a < 3; ++a) {
      piece.first[a] = axis_[a].first_source(piece.chunk.begin[a]);
      piece.from[a] = most(piece.first[a], 0);
      piece.to[a] =
          least(piece.first[a] + axis_[a].source_extent(piece.chunk.size[a]), axis_[a].source);
    }
    // For strips: source rows in the order of the taps, without the padding if that adds nothing.
    piece.first_row = 0, piece.end_row = panel_.extent[1];
    if (finite_) {
      const int64_t from = piece.from[1] - piece.first[1], to = piece.to[1] - piece.first[1];
      piece.first_row = least(upwards_ ? panel_.extent[1] - to : from, high_.kernel - 1);
      piece.end_row = most(upwards_ ? panel_.extent[1] - from : to, piece.first_row);
    }
    return piece;
  }

  void fill_panel(const Piece& piece, const T* plane, E* values) const {
    const int64_t *const first = piece.first, *const from = piece.from, *const to = piece.to;
    const int64_t* const stride = source_.stride;
    if (from[2] >= to[2]) return;
    for (int64_t j = 0; j < planes_; ++j)
      for (int64_t d = from[0]; d < to[0]; ++d)
        split_rows(plane + j * stride[1] + d * stride[2] + from[1] * stride[3], stride[3],
                   to[1] - from[1], from[2] - first[2], to[2] - first[2], wide_.step, part_,
                   values + j * panel_.plane_pitch() + (d - first[0]) * panel_.slice_pitch() +
                       (from[1] - first[1]) * panel_.row_pitch(),
                   panel_.row_pitch());
  }

  // A piece of one channel, of which `target` is the first column.
  void write_plane(const Piece& piece, T* target, Workspace& w) const {
    const Chunk& chunk = piece.chunk;
    for (int64_t d = 0; d < chunk.size[0]; ++d)
      for (int64_t qh = 0; qh < (doubled() ? 1 : least(high_.period, chunk.size[1])); ++qh) {
        const int64_t rows = doubled() ? chunk.size[1] : up(chunk.size[1] - qh, high_.period);
        const int64_t columns = up(chunk.size[2], wide_.period);  // of a phase, or 1 more
        const int64_t step = doubled() ? high_.pad % 2 : transposed_ ? -1 : s_.axis[2].stride;
        if (w.tiling.rows != rows || w.tiling.columns != columns)
          w.tiling = PlaneTiling<T>(rows, columns, way_, high_.kernel, step);
        write_rows(piece, chunk.begin[0] + d, chunk.begin[1] + qh, rows, target, w);
      }
  }

  // The rows of a phase along h, of which the first is row at_h of slice at_d.
  void write_rows(const Piece& piece, int64_t at_d, int64_t at_h, int64_t rows, T* target,
                  Workspace& w) const {
    const Chunk& chunk = piece.chunk;
    const int64_t of_row = (at_d % axis_[0].period * phases_[1] + at_h % high_.period) * phases_[2];
    T* const result = target + at_d * written_.stride[2];
    const int64_t some = w.tiling.tile_rows;
    for (int64_t next = 0; next < rows; next += some) {
      const int64_t row = least(next, rows - some);  // the last may overlap the one before
      for (int64_t qw = 0; qw < (pairs() ? 1 : least(wide_.period, chunk.size[2])); ++qw) {
        const int64_t at_w = chunk.begin[2] + qw;
        const int32_t* const chains = lists_.phase_begin + of_row + at_w % wide_.period;
        w.phase.chain = chains[0];
        w.phase.last_chain = chains[1];
        if (pairs()) {
          w.phase.odd_chain = chains[1];
          w.phase.odd_last_chain = chains[2];
        }
        PlaneTile<T> tile = tile_of(piece, at_d, at_h, at_w, row, some, w.values);
        if (wide_.period == 1 || pairs()) {
          tile.out = result + (at_h + lead_of(row, some) * high_.period) * written_.stride[3];
          tile.out_step = (upwards_ ? -1 : doubled() ? 1 : high_.period) * written_.stride[3];
        } else {
          tile.out = w.staged + qw * most_tile_rows * w.staged_pitch;
          tile.out_step = w.staged_pitch;
        }
        tile.rows = rows;
        tile.source_plane = w.panel_pitch;
        tile.out_plane = written_.stride[1];
        tile.next_out = w.phase.planes * written_.stride[1];
        w.tiling.run(w.phase, up(chunk.size[2] - qw, wide_.period), tile);
      }
      if (wide_.period > 1 && !pairs()) {
        const auto merge = row_merge<T, T>(wide_.period);
        for (int64_t i = 0; i < some; ++i)
          merge(w.staged + i * w.staged_pitch, most_tile_rows * w.staged_pitch, wide_.period,
                chunk.size[2], result + (at_h + (row + i) * high_.period) * written_.stride[3]);
      }
    }
  }
  // The row that a tile of `some` rows begins with.
  int64_t lead_of(int64_t row, int64_t some) const { return upwards_ ? row + some - 1 : row; }

  // What a tile reads.
  PlaneTile<T> tile_of(const Piece& piece, int64_t at_d, int64_t at_h, int64_t at_w, int64_t row,
                       int64_t some, const E* values) const {
    PlaneTile<T> tile;
    tile.source =
        values + (axis_[0].base(at_d) - piece.first[0]) * panel_.slice_pitch() +
        (high_.base(at_h) + lead_of(row, some) * high_.step - piece.first[1]) * panel_.row_pitch() +
        (wide_.step == 1 ? wide_.base(at_w) - piece.first[2] : 0);
    if (doubled()) tile.source += high_.pad / 2 * panel_.row_pitch() + wide_.pad / 2;
    const int64_t step = upwards_ ? -1 : way_ == PlaneWay::slide ? 1 : high_.step;
    tile.source_step = step * panel_.row_pitch();
    tile.first = piece.first_row;
    tile.end = piece.end_row;
    tile.ahead = piece.ahead;
    if (way_ == PlaneWay::slide) tile.ahead += row * high_.step * source_.stride[3];
    tile.ahead_step = source_.stride[3];
    tile.ahead_plane = source_.stride[1];
    return tile;
  }

  const ConvProblem& p_;
  const ConvShape& s_;
  const bool transposed_;
  const int64_t group_, planes_;  // channels of a group that are written, and read
  const int64_t numbers_;         // terms
  const RawView &source_, &written_;
  MapAxis axis_[3];
  const MapAxis &high_ = axis_[1], &wide_ = axis_[2];
  int64_t phases_[3];
  Chunks chunks_;
  PanelShape panel_{1, planes_, {}, 1};
  int64_t part_;  // of a row, of one remainder
  const E* weights_;
  const int32_t* tap_rows_;
  TermLists lists_;
  bool finite_;
  PlaneWay way_;
  bool upwards_;         // the order in which taps read rows
  int64_t abreast_ = 1;  // planes side by side, each of a group of its own
};

template <class T>
bool map_planes(const ConvProblem& p) {
  PlaneMap<T> map(p);
  if (!map.prepare()) return false;
  map.run();
  return true;
}

}  // namespace torch_naiveconv::TNC_ISA
