// The tiled kernel: one block computes a tile of C = A * B (lowering.h) from shared memory, a stage
// of terms at a time, the next stage on its way. Start reading at TileBlock::run. The body runs on
// the device and, block by block, in the host tests.
#pragma once

#include "../spec/conv.h"
#include "block.h"
#include "lowering.h"

namespace torch_naiveconv {

// ---- the contract's sum, taken apart: a chain of one group, and the fold of finished groups -----

template <class T>
struct Arithmetic {
  using Value = T;  // of an operand
  struct Chain {
    T sum = T(0);
  };
  TNC_HD static Value load(T x) { return x; }
  TNC_HD static void step(Chain& chain, Value a, Value b, bool) {
    chain.sum = fused(a, b, chain.sum);
  }
  TNC_HD static T value(const Chain& chain) { return chain.sum; }
  TNC_HD static T fold(T total, T group) { return total + group; }
};

template <class T>
struct PairedArithmetic {
  using Value = float;
  struct Chain {
    float even = 0.0f, odd = 0.0f;
  };
  TNC_HD static Value load(T x) { return operand(x); }
  TNC_HD static void step(Chain& chain, Value a, Value b, bool odd) {
    float& sum = odd ? chain.odd : chain.even;
    const float next = fused(a, b, sum);
    if constexpr (std::is_same_v<T, Half>) {
      sum = next;  // a multiple of 2^-48: there is nothing to flush
    } else {
      // flushed_fused, in the order that costs least here: its rare case last.
      const float size = next < 0.0f ? -next : next;
      if (size == smallest_normal)
        sum = flushed_fused(a, b, sum);
      else
        sum = size < smallest_normal ? signed_zero_of(next) : next;
    }
  }
  TNC_HD static float value(const Chain& chain) { return flushed_add(chain.even, chain.odd); }
  // An earlier total may be subnormal.
  TNC_HD static float fold(float total, float group) { return flushed_add(flushed(total), group); }
};
template <>
struct Arithmetic<Half> : PairedArithmetic<Half> {};
template <>
struct Arithmetic<BFloat16> : PairedArithmetic<BFloat16> {};

// A run of values, fetched from shared memory by as few loads as its alignment allows.
template <class Value, int count>
struct alignas(sizeof(Value) * count < 16 ? sizeof(Value) * count : 16) Run {
  Value x[count];
};

// ---- where a term or a lane stands in B, and whether two of them meet there
// ----------------------

// By masks: one instruction, for all but the largest kernels.
struct alignas(8) MaskedSpot {
  int offset;
  uint32_t mask;

  TNC_HD static MaskedSpot tap(const Place& place, const Misses& misses) {
    return {static_cast<int>(place.offset), misses.of_tap(place.digit)};
  }
  TNC_HD static MaskedSpot pixel(const Place& place, const Misses& misses) {
    return {static_cast<int>(place.offset), misses.of_pixel(place.coordinate)};
  }
  TNC_HD static MaskedSpot none() { return {0, Misses::nothing}; }
  TNC_HD bool meets(const MaskedSpot& other, const Misses&) const {
    return (mask & other.mask) == 0;
  }
};

// By coordinates: any kernel.
struct alignas(16) LocatedSpot {
  int offset, coordinate[3];

  TNC_HD static LocatedSpot tap(const Place& place, const Misses&) {
    return {static_cast<int>(place.offset),
            {place.coordinate[0], place.coordinate[1], place.coordinate[2]}};
  }
  TNC_HD static LocatedSpot pixel(const Place& place, const Misses& misses) {
    return tap(place, misses);
  }
  TNC_HD static LocatedSpot none() {
    constexpr int far = -(1 << 30);  // no partner brings it back into B
    return {0, {far, far, far}};
  }
  TNC_HD bool meets(const LocatedSpot& other, const Misses& misses) const {
    bool inside = true;
    TNC_UNROLL
    for (int a = 0; a < 3; ++a)
      inside = inside & (static_cast<uint32_t>(coordinate[a] + other.coordinate[a]) <
                         static_cast<uint32_t>(misses.size[a]));
    return inside;
  }
};

// ---- a tile ------------------------------------------------------------------------------------

// Rows x Lanes results a block, RowsEach x LanesEach a thread, `Terms` of the chains a stage.
// SharedTotals: in shared memory, not in registers, so that twice as many threads fit a
// multiprocessor. Direct, for few rows: a thread has all rows, and reads the lanes of B that are
// its own straight from memory.
template <class ElementType, int Rows, int Lanes, int RowsEach, int LanesEach, int Terms,
          bool SharedTotals = false, bool Direct = false, class SpotType = MaskedSpot>
struct Tile {
  using Spot = SpotType;
  using Element = ElementType;
  using Value = typename Arithmetic<Element>::Value;
  static constexpr int rows = Rows, lanes = Lanes;
  static constexpr int rows_each = RowsEach, lanes_each = LanesEach;
  static constexpr bool shared_totals = SharedTotals, direct = Direct;
  static constexpr int threads = rows / rows_each * (lanes / lanes_each);
  static constexpr int block_terms = Terms;
  static constexpr int window = 128 / block_terms;  // stages whose terms are tabulated at a time
  // A warp is 4 x 8 threads. Its rows and lanes come in runs of up to four neighbours, which one
  // load fetches.
  static constexpr int warp_rows = direct ? 1 : 4, warp_lanes = 32 / warp_rows;
  static constexpr int warps_across = lanes / (warp_lanes * lanes_each);
  static constexpr int row_run = rows_each < 4 ? rows_each : 4;
  static constexpr int lane_run = direct ? 1 : lanes_each < 4 ? lanes_each : 4;
  static constexpr int a_loads = (rows * block_terms + threads - 1) / threads;
  static constexpr int b_loads = direct ? 0 : lanes * block_terms / threads;
  static constexpr int own_lanes = direct ? lanes_each : 1;
  static_assert(threads % 32 == 0 && (direct || threads % lanes == 0) && threads % block_terms == 0,
                "each thread loads one lane of B and one term of A");
  static_assert(rows % (warp_rows * rows_each) == 0 && lanes % (warp_lanes * lanes_each) == 0,
                "whole warps");

  // Neighbouring threads share a row or a lane: so a warp's loads from shared memory take half the
  // time.
  TNC_HD static int row_of(int thread, int i) {
    if constexpr (direct) return i;
    const int warp = thread / 32, y = (thread & 1) + (thread % 32 / 16) * 2;
    return warp / warps_across * (warp_rows * rows_each) + i / row_run * (warp_rows * row_run) +
           y * row_run + i % row_run;
  }
  TNC_HD static int lane_of(int thread, int j) {
    if constexpr (direct) return thread + j * threads;
    const int warp = thread / 32, x = thread / 2 % 8;
    return warp % warps_across * (warp_lanes * lanes_each) +
           j / lane_run * (warp_lanes * lane_run) + x * lane_run + j % lane_run;
  }

  // Who has the total of a row and a lane, and where.
  struct Owner {
    int thread, run, at;
  };
  TNC_HD static Owner owner_of(int row, int lane) {
    constexpr int rows_across = warp_rows * row_run, lanes_across = warp_lanes * lane_run;
    constexpr int warp_height = warp_rows * rows_each, warp_width = warp_lanes * lanes_each;
    const int y = row % rows_across / row_run, x = lane % lanes_across / lane_run;
    const int i = row % warp_height / rows_across * row_run + row % row_run;
    const int j = lane % warp_width / lanes_across;
    const int warp = row / warp_height * warps_across + lane / warp_width;
    return {warp * 32 + (y & 1) + x * 2 + y / 2 * 16, i * (lanes_each / lane_run) + j,
            lane % lane_run};
  }

  struct TermOfA {
    int offset, odd;  // offset -1: this slot holds no term
  };
  // The padding keeps transposing stores free of bank conflicts.
  static constexpr int padding = 16 / static_cast<int>(sizeof(Value));
  // A copy of packed values of A.
  using Packed = Run<Value, padding>;
  struct alignas(16) Shared {
    alignas(16) Value a[2][block_terms][rows + padding];
    alignas(16) Value b[direct ? 1 : 2][block_terms][direct ? padding : lanes + padding];
    Spot term_b[2 * window * block_terms];
    TermOfA term_a[2 * window * block_terms];
    Spot lane_b[direct ? 1 : lanes];
    Run<Total<Element>, lane_run> total[shared_totals ? rows_each * (lanes_each / lane_run) : 1]
                                       [threads];
  };

  // What a thread keeps between phases.
  struct Thread {
    typename Arithmetic<Element>::Chain chain[rows_each][lanes_each];
    Run<Total<Element>, lane_run> total[shared_totals ? 1 : rows_each * (lanes_each / lane_run)];
    const Element* a;             // the row of its first load of A
    int rows_left;                // from that row on
    const Value* packed;          // its first copy of the first stage
    const Element* b[own_lanes];  // the lanes of B that it loads
    Spot lane[own_lanes];
  };
};

// What one launch computes. Without a workspace a block folds its groups itself; with one, the
// groups [first_group, last_group) are dealt to `splits` blocks a tile, each value of a group goes
// to the workspace [group][row][lane], and Fold adds them up in order.
struct TileLaunch {
  ConvProblem problem;
  Lowering lowering;
  int first_group, last_group, splits;
  void* workspace;
  // A of the forward pass and the input gradient, in the order in which it is copied: [group][tile
  // of rows][slot][row], the slots of a phase from its first_slot on, zeros where there is nothing.
  void* packed;
  int slots;        // of all phases
  bool whole_runs;  // may four neighbouring lanes be stored at once?
};

// A thread block's piece of it.
struct Piece {
  int phase, group, row, lane;  // first row and lane
  int block, last_block;        // of the chain
  int workspace_group;          // of its first group
};

template <class Config>
TNC_HD Piece piece_of(const TileLaunch& launch, int64_t index) {
  const Lowering& l = launch.lowering;
  Piece piece;
  const int row_tiles = (l.rows + Config::rows - 1) / Config::rows;
  // Rows first: blocks that run together share their part of B.
  piece.row = static_cast<int>(index % row_tiles) * Config::rows;
  index /= row_tiles;
  piece.group = static_cast<int>(index % l.groups);
  index /= l.groups;
  const int split = static_cast<int>(index % launch.splits);
  const int tile = static_cast<int>(index / launch.splits);
  piece.phase = 0;
  while (piece.phase + 1 < l.phases && tile >= l.phase[piece.phase + 1].first_tile) ++piece.phase;
  const Phase& phase = l.phase[piece.phase];
  piece.lane = (tile - phase.first_tile) * Config::lanes;
  const Chain& chain = phase.chain;
  piece.block = 0;
  piece.last_block = chain.periods * chain.period_blocks;
  piece.workspace_group = 0;
  if (launch.workspace != nullptr) {
    const int64_t groups = launch.last_group - launch.first_group;
    const int begin = static_cast<int>(groups * split / launch.splits);
    const int end = static_cast<int>(groups * (split + 1) / launch.splits);
    piece.block = chain.block_of_group(launch.first_group + begin);
    piece.last_block = chain.block_of_group(launch.first_group + end);
    piece.workspace_group = begin;
  }
  return piece;
}

// Where results of (group, row, lane) of phase 0 stand in a workspace, and earlier totals.
TNC_HD int64_t flat_result(const Lowering& l, int group, int row, int lane) {
  return (static_cast<int64_t>(group) * l.rows + row) * l.phase[0].lane_count + lane;
}

template <class T>
TNC_HD T bias_of(const Lowering& l, int group, int row) {
  const T* const biases = static_cast<const T*>(l.bias);
  return biases != nullptr ? biases[static_cast<int64_t>(group) * l.rows + row] : zero<T>();
}

// Adds the bias or +0, rounds, stores: `count` results side by side in C.
template <class T, int count>
TNC_HD void store_results(const TileLaunch& launch, int group, int row, int64_t c_offset,
                          const Total<T>* totals) {
  const Lowering& l = launch.lowering;
  const int64_t at = group * l.c_group + row * l.c_row + c_offset;
  if (launch.problem.keep_total) {
    for (int i = 0; i < count; ++i)
      static_cast<Total<T>*>(l.c)[at + i] = OrderedSum<T>(totals[i]).total();
    return;
  }
  const T bias = bias_of<T>(l, group, row);
  Run<T, count> run;
  TNC_UNROLL
  for (int i = 0; i < count; ++i) run.x[i] = OrderedSum<T>(totals[i]).result(bias);
  *reinterpret_cast<Run<T, count>*>(static_cast<T*>(l.c) + at) = run;
}

// Where the input gradient has no term the kernels add 0 * weight. Can it be seen? As a NaN, if the
// weight is not finite; and, since flushed arithmetic makes totals of -0, as the sign of a zero, if
// the bias is -0 too.
template <class T>
TNC_HD bool padding_may_show(Total<T> total, T bias) {
  if constexpr (is_half_type<T>)
    if (total == 0 && bits_as<uint32_t>(operand(bias)) == 0x80000000u) return true;
  return !(total == total);
}

// There the specification computes the result again.
template <class T>
TNC_HD void settle(const TileLaunch& launch, const Phase& phase, int group, int row, int lane) {
  const ConvProblem& p = launch.problem;
  int n, x[3];
  int64_t i[3];
  phase.lanes.digits.split(static_cast<uint32_t>(lane), n, x);
  TNC_UNROLL
  for (int a = 0; a < 3; ++a)
    i[a] = (phase.lanes.first[a] + x[a]) * p.shape.axis[a].stride + phase.residue[a] -
           p.shape.axis[a].pad;
  const int64_t channel = static_cast<int64_t>(group) * launch.lowering.rows + row;
  p.input.as<T>().at(n, channel, i[0], i[1], i[2]) =
      conv_grad_input_at(p.shape, p.output.as<const T>(), p.weight.as<const T>(),
                         static_cast<const T*>(p.bias), n, channel, i[0], i[1], i[2]);
}

// ---- the kernel --------------------------------------------------------------------------------

// `dealt`: groups are dealt to several blocks a tile, and their values go to a workspace.
// `by_term`: the weight gradient, where A is as large as B, and in both neighbouring terms are
// neighbours. Else A is a weight, and packed.
template <class Config, bool dealt, bool by_term>
struct TileKernel {
  using T = typename Config::Element;
  using Value = typename Config::Value;
  using Thread = typename Config::Thread;
  using Shared = typename Config::Shared;
  using Spot = typename Config::Spot;
  using Sum = Arithmetic<T>;
  static constexpr bool transposed = by_term && !Config::direct;  // copies of B

  const TileLaunch& launch;
  const Lowering& l;
  const Piece piece;
  const Phase& phase;
  Shared& shared;

  TNC_HD TileKernel(const TileLaunch& launch_, Shared& shared_, int64_t index)
      : launch(launch_),
        l(launch_.lowering),
        piece(piece_of<Config>(launch_, index)),
        phase(launch_.lowering.phase[piece.phase]),
        shared(shared_) {}

  // Where the thread's copies come from, and sums that are empty or go on from an earlier total.
  TNC_HD void start(Thread& me, int thread) const {
    if constexpr (by_term) {
      me.a = static_cast<const T*>(l.a) + piece.group * l.a_group +
             (piece.row + thread / Config::block_terms) * l.a_row;
      in_registers(me.a);
      me.rows_left = l.rows - piece.row - thread / Config::block_terms;
    } else {
      const int row_tiles = (l.rows + Config::rows - 1) / Config::rows;
      const int64_t slot =
          (static_cast<int64_t>(piece.group) * row_tiles + piece.row / Config::rows) *
              launch.slots +
          phase.first_slot + piece.block * Config::block_terms;
      me.packed =
          static_cast<const Value*>(launch.packed) + slot * Config::rows + thread * Config::padding;
      in_registers(me.packed);
    }
    const T* const b = static_cast<const T*>(l.b) + piece.group * l.b_group;
    TNC_UNROLL
    for (int own = 0; own < Config::own_lanes; ++own) {
      const int within = Config::direct ? Config::lane_of(thread, own) : thread % Config::lanes;
      const int lane = piece.lane + within;
      const Place place = phase.lanes.at(static_cast<uint32_t>(lane), l.b_stride);
      me.b[own] = transposed ? b : b + place.offset;
      in_registers(me.b[own]);
      if constexpr (by_term)
        me.lane[own] = lane < phase.lane_count ? Spot::tap(place, phase.misses) : Spot::none();
      else
        me.lane[own] = lane < phase.lane_count ? Spot::pixel(place, phase.misses) : Spot::none();
      if constexpr (transposed) shared.lane_b[within] = me.lane[own];
    }
    const auto* earlier = static_cast<const Total<T>*>(l.total);
    TNC_UNROLL
    for (int i = 0; i < Config::rows_each; ++i) {
      const int row = piece.row + Config::row_of(thread, i);
      TNC_UNROLL
      for (int j = 0; j < Config::lanes_each; ++j) {
        me.chain[i][j] = {};
        if constexpr (!dealt) {
          const int at = piece.lane + Config::lane_of(thread, j);
          total_at(me, thread, i, j) = earlier != nullptr && row < l.rows && at < phase.lane_count
                                           ? earlier[flat_result(l, piece.group, row, at)]
                                           : Total<T>(0);
        }
      }
    }
  }

  TNC_HD auto& total_run(Thread& me, int thread, int i, int j) const {
    const int run = i * (Config::lanes_each / Config::lane_run) + j / Config::lane_run;
    if constexpr (Config::shared_totals)
      return shared.total[run][thread];
    else
      return me.total[run];
  }
  TNC_HD Total<T>& total_at(Thread& me, int thread, int i, int j) const {
    return total_run(me, thread, i, j).x[j % Config::lane_run];
  }

  // Tabulates the terms of a window of stages.
  TNC_HD void tabulate(int window, int thread) const {
    constexpr int entries = Config::window * Config::block_terms;
    for (int entry = thread; entry < entries; entry += Config::threads) {
      const int block = piece.block + window * Config::window + entry / Config::block_terms;
      typename Config::TermOfA a{-1, 0};
      Spot b = Spot::none();
      if (block < piece.last_block) {
        int period;
        const int term = phase.chain.term_at(block, entry % Config::block_terms, period);
        if (term >= 0) {
          const uint32_t flat = static_cast<uint32_t>(period * phase.term_period + term);
          const Place place = phase.terms.at(flat, l.b_stride);
          a = {static_cast<int>(place.other), phase.is_odd(flat)};
          b = by_term ? Spot::pixel(place, phase.misses) : Spot::tap(place, phase.misses);
        }
      }
      const int at = (window & 1) * entries + entry;
      shared.term_a[at] = a;
      shared.term_b[at] = b;
    }
  }

  // Where the terms of a stage stand in the tables.
  TNC_HD static int first_term(int stage) {
    return stage * Config::block_terms & (2 * Config::window * Config::block_terms - 1);
  }

  // Starts the copies of one stage.
  template <class Block>
  TNC_HD void load(Block& block, const Thread& me, int stage, int thread) const {
    const int buffer = stage & 1, first = first_term(stage);
    if constexpr (by_term)
      load_a(block, me, buffer, first, thread);
    else
      load_packed(block, me, stage, thread);
    if constexpr (Config::b_loads > 0) load_b(block, me, buffer, first, thread);
  }

  template <class Block>
  TNC_HD void load_a(Block& block, const Thread& me, int buffer, int first, int thread) const {
    constexpr int step = Config::threads / Config::block_terms;
    const int slot = thread % Config::block_terms, row = thread / Config::block_terms;
    const typename Config::TermOfA term = shared.term_a[first + slot];
    TNC_UNROLL
    for (int i = 0; i < Config::a_loads; ++i) {
      if (Config::rows % step != 0 && row + i * step >= Config::rows) break;  // no row is left
      fetch(block, &shared.a[buffer][slot][row + i * step],
            me.a + (i * step * l.a_row + term.offset),
            (term.offset >= 0) & (i * step < me.rows_left));
    }
  }

  template <class Block>
  TNC_HD void load_packed(Block& block, const Thread& me, int stage, int thread) const {
    constexpr int each = Config::padding, copies = Config::rows * Config::block_terms / each;
    const Value* const from = me.packed + static_cast<int64_t>(stage) * (copies * each);
    TNC_UNROLL
    for (int first = 0; first < copies; first += Config::threads) {
      const int copy = first + thread;
      if (copies % Config::threads != 0 && copy >= copies) break;
      auto* const to = &shared.a[stage & 1][copy * each / Config::rows][copy * each % Config::rows];
      block.copy(reinterpret_cast<typename Config::Packed*>(to),
                 reinterpret_cast<const typename Config::Packed*>(from + first * each), true);
    }
  }

  // Spots are read ahead of the copies that need them, four at a time: more would not fit the
  // registers.
  template <class Block>
  TNC_HD void load_b(Block& block, const Thread& me, int buffer, int first, int thread) const {
    constexpr int batch = Config::b_loads < 4 ? Config::b_loads : 4;
    constexpr int step = Config::threads / Config::block_terms;
    const int slot = thread % Config::block_terms, lane = thread / Config::block_terms;
    Spot own = me.lane[0];
    if constexpr (transposed) own = shared.term_b[first + slot];
    TNC_UNROLL
    for (int i = 0; i < Config::b_loads; i += batch) {
      Spot other[batch];
      TNC_UNROLL
      for (int k = 0; k < batch; ++k)
        other[k] = transposed ? shared.lane_b[lane + (i + k) * step]
                              : shared.term_b[first + slot_of_b(thread, i + k)];
      TNC_UNROLL
      for (int k = 0; k < batch; ++k) {
        const bool valid = own.meets(other[k], phase.misses);
        if constexpr (transposed)
          fetch(block, &shared.b[buffer][slot][lane + (i + k) * step],
                me.b[0] + (own.offset + other[k].offset), valid);
        else
          fetch(block, &shared.b[buffer][slot_of_b(thread, i + k)][thread % Config::lanes],
                me.b[0] + other[k].offset, valid);
      }
    }
  }
  TNC_HD static int slot_of_b(int thread, int i) {
    return thread / Config::lanes + i * (Config::threads / Config::lanes);
  }

  template <class Block>
  TNC_HD static void fetch(Block& block, Value* target, const T* source, bool valid) {
    if constexpr (std::is_same_v<T, Value>)
      block.copy(target, source, valid);
    else
      *target = valid ? Sum::load(*source) : Value(0);
  }

  // The next terms of every sum of this thread. The operands of a slot are read a slot ahead.
  TNC_HD void step(Thread& me, int stage, int thread) const {
    constexpr int ahead = Config::direct || is_half_type<T> ? 0 : 1;
    Value a[ahead + 1][Config::rows_each], b[ahead + 1][Config::lanes_each];
    if (ahead > 0) operands(me, stage, 0, thread, a[0], b[0]);
    // The steps of the 16-bit types are long: unrolled they would outgrow the cache.
    TNC_UNROLL_IF(sizeof(T) != 2)
    for (int slot = 0; slot < Config::block_terms; ++slot) {
      const int now = slot & ahead, next = (slot + ahead) & ahead;
      if (slot + ahead < Config::block_terms)
        operands(me, stage, slot + ahead, thread, a[next], b[next]);
      bool odd = false;
      if constexpr (is_half_type<T>) odd = shared.term_a[first_term(stage) + slot].odd != 0;
      if (odd) {
        steps(me, a[now], b[now], true);
      } else {
        steps(me, a[now], b[now], false);
      }
    }
  }
  TNC_HD void operands(const Thread& me, int stage, int slot, int thread,
                       Value (&a)[Config::rows_each], Value (&b)[Config::lanes_each]) const {
    const int buffer = stage & 1;
    read<Config::row_run>(a, shared.a[buffer][slot],
                          [&](int i) { return Config::row_of(thread, i); });
    if constexpr (Config::direct) {
      const Spot term = shared.term_b[first_term(stage) + slot];
      TNC_UNROLL
      for (int j = 0; j < Config::lanes_each; ++j)
        b[j] = me.lane[j].meets(term, phase.misses) ? Sum::load(me.b[j][term.offset]) : Value(0);
    } else {
      read<Config::lane_run>(b, shared.b[buffer][slot],
                             [&](int j) { return Config::lane_of(thread, j); });
    }
  }
  TNC_HD static void steps(Thread& me, const Value (&a)[Config::rows_each],
                           const Value (&b)[Config::lanes_each], bool odd) {
    TNC_UNROLL
    for (int i = 0; i < Config::rows_each; ++i) {
      TNC_UNROLL
      for (int j = 0; j < Config::lanes_each; ++j) Sum::step(me.chain[i][j], a[i], b[j], odd);
    }
  }
  template <int run, int count, class At>
  TNC_HD static void read(Value (&values)[count], const Value* from, const At& at) {
    TNC_UNROLL
    for (int i = 0; i < count; i += run) {
      const auto loaded = *reinterpret_cast<const Run<Value, run>*>(from + at(i));
      TNC_UNROLL
      for (int k = 0; k < run; ++k) values[i + k] = loaded.x[k];
    }
  }

  // A group has ended: fold it, or leave it in the workspace.
  TNC_HD void cut(Thread& me, int workspace_group, int thread) const {
    constexpr int run = Config::lane_run;
    if constexpr (!dealt) {
      TNC_UNROLL
      for (int i = 0; i < Config::rows_each; ++i) {
        TNC_UNROLL
        for (int j = 0; j < Config::lanes_each; j += run) {
          auto& totals = total_run(me, thread, i, j);
          auto folded = totals;
          TNC_UNROLL
          for (int r = 0; r < run; ++r) {
            folded.x[r] = Sum::fold(folded.x[r], Sum::value(me.chain[i][j + r]));
            me.chain[i][j + r] = {};
          }
          totals = folded;
        }
      }
    } else {
      // Runs of lanes at once, unless they end amid one.
      if (phase.lane_count % Config::lane_run == 0)
        deal<Config::lane_run>(me, workspace_group, thread);
      else
        deal<1>(me, workspace_group, thread);
    }
  }

  template <int run>
  TNC_HD void deal(Thread& me, int workspace_group, int thread) const {
    auto* const workspace = static_cast<Total<T>*>(launch.workspace) +
                            flat_result(l, workspace_group * l.groups + piece.group, 0, 0);
    TNC_UNROLL
    for (int i = 0; i < Config::rows_each; ++i) {
      const int row = piece.row + Config::row_of(thread, i);
      TNC_UNROLL
      for (int j = 0; j < Config::lanes_each; j += run) {
        const int lane = piece.lane + Config::lane_of(thread, j);
        Run<Total<T>, run> values;
        TNC_UNROLL
        for (int r = 0; r < run; ++r) {
          values.x[r] = Sum::value(me.chain[i][j + r]);
          me.chain[i][j + r] = {};
        }
        if (row < l.rows && lane < phase.lane_count)
          *reinterpret_cast<Run<Total<T>, run>*>(
              workspace + (static_cast<int64_t>(row) * phase.lane_count + lane)) = values;
      }
    }
  }

  // Stores this thread's results, `run` neighbours at a time. Returns whether padding may show in
  // any.
  template <int run>
  TNC_HD bool store(Thread& me, int thread) const {
    bool doubtful = false;
    TNC_UNROLL
    for (int j = 0; j < Config::lanes_each; j += run) {
      const int lane = piece.lane + Config::lane_of(thread, j);
      if (lane >= phase.lane_count) continue;
      const int64_t c_offset = phase.lanes.at(static_cast<uint32_t>(lane), l.b_stride).other;
      TNC_UNROLL
      for (int i = 0; i < Config::rows_each; ++i) {
        const int row = piece.row + Config::row_of(thread, i);
        if (row >= l.rows) continue;
        store_results<T, run>(launch, piece.group, row, c_offset, &total_at(me, thread, i, j));
        TNC_UNROLL
        for (int r = 0; r < run; ++r)
          doubtful = doubtful || padding_may_show<T>(total_at(me, thread, i, j + r),
                                                     bias_of<T>(l, piece.group, row));
      }
    }
    return doubtful;
  }

  TNC_HD void finish(Thread& me, int thread) const {
    const bool doubtful =
        launch.whole_runs ? store<Config::lane_run>(me, thread) : store<1>(me, thread);
    if (launch.problem.direction != Direction::grad_input || !doubtful) return;
    for (int j = 0; j < Config::lanes_each; ++j)
      for (int i = 0; i < Config::rows_each; ++i) {
        const int lane = piece.lane + Config::lane_of(thread, j);
        const int row = piece.row + Config::row_of(thread, i);
        if (lane < phase.lane_count && row < l.rows)
          settle<T>(launch, phase, piece.group, row, lane);
      }
  }

  // The same from shared totals, where lanes are apart in C: neighbouring threads store
  // neighbouring lanes, whoever has summed them.
  TNC_HD void finish_by_lane(int thread) const {
    const int within = thread % Config::lanes, lane = piece.lane + within;
    if (lane >= phase.lane_count) return;
    const int64_t c_offset = phase.lanes.at(static_cast<uint32_t>(lane), l.b_stride).other;
    for (int i = thread / Config::lanes; i < Config::rows; i += Config::threads / Config::lanes) {
      const int row = piece.row + i;
      if (row >= l.rows) return;
      const typename Config::Owner owner = Config::owner_of(i, within);
      const Total<T> total = shared.total[owner.run][owner.thread].x[owner.at];
      store_results<T, 1>(launch, piece.group, row, c_offset, &total);
      if (launch.problem.direction == Direction::grad_input &&
          padding_may_show<T>(total, bias_of<T>(l, piece.group, row)))
        settle<T>(launch, phase, piece.group, row, lane);
    }
  }
};

// One block, from beginning to end.
template <class Config, bool dealt, bool by_term>
struct TileBlock {
  using Launch = TileLaunch;
  using Shared = typename Config::Shared;
  using Thread = typename Config::Thread;
  static constexpr int threads = Config::threads;
  // 512 threads have 128 registers each, 256 have 255.
  static constexpr bool small =
      Config::shared_totals || Config::direct || (dealt && !is_half_type<typename Config::Element>);
  static constexpr int together = (small ? 512 : 256) / threads;

  template <class Block>
  TNC_HD static void run(Block& block, const TileLaunch& launch, Shared& shared, int64_t index) {
    const TileKernel<Config, dealt, by_term> kernel(launch, shared, index);
    const Piece& piece = kernel.piece;
    const Chain& chain = kernel.phase.chain;
    const int stages = piece.last_block - piece.block;
    int in_period = stages > 0 ? piece.block % chain.period_blocks : 0;  // blocks done
    int workspace_group = piece.workspace_group;

    block.each([&](int thread, Thread& me) {
      kernel.start(me, thread);
      kernel.tabulate(0, thread);
    });
    block.barrier();
    block.each([&](int thread, Thread& me) {
      if (stages > 0) kernel.load(block, me, 0, thread);
    });
    block.barrier();
    for (int stage = 0; stage < stages;) {
      const int next_group = in_period + chain.group_blocks;
      const int group_end = next_group < chain.period_blocks ? next_group : chain.period_blocks;
      for (; in_period < group_end; ++in_period, ++stage) {
        block.each([&](int thread, Thread& me) {
          if (stage + 1 < stages) kernel.load(block, me, stage + 1, thread);
          if ((stage & (Config::window - 1)) == 0)
            kernel.tabulate(stage / Config::window + 1, thread);
          kernel.step(me, stage, thread);
        });
        block.barrier();
      }
      block.each([&](int thread, Thread& me) { kernel.cut(me, workspace_group, thread); });
      ++workspace_group;
      if (in_period == chain.period_blocks) in_period = 0;
    }
    if constexpr (!dealt && Config::shared_totals) {
      if (!launch.whole_runs) {
        block.barrier();
        block.each([&](int thread, Thread&) { kernel.finish_by_lane(thread); });
        return;
      }
    }
    if constexpr (!dealt) block.each([&](int thread, Thread& me) { kernel.finish(me, thread); });
  }
};

// Packs A for a launch: a few rows of one slot a thread, so that neighbouring threads read
// neighbouring terms.
template <class Config>
struct Pack {
  TileLaunch launch;
  Divider slots;

  static constexpr int each = Config::padding, runs = Config::rows / each;

  TNC_HD void operator()(int64_t flat) const {
    using T = typename Config::Element;
    const Lowering& l = launch.lowering;
    const int row_tiles = (l.rows + Config::rows - 1) / Config::rows;
    uint32_t rest = static_cast<uint32_t>(flat);
    const int slot_of_all = static_cast<int>(slots.take(rest));
    const int run = static_cast<int>(rest % runs), tile = static_cast<int>(rest / runs);
    const int first_row = tile % row_tiles * Config::rows + run * each;
    int number = 0;
    while (number + 1 < l.phases && slot_of_all >= l.phase[number + 1].first_slot) ++number;
    const Phase& phase = l.phase[number];
    const int slot = slot_of_all - phase.first_slot;
    int period;
    const int term =
        phase.chain.term_at(slot / Config::block_terms, slot % Config::block_terms, period);
    typename Config::Packed values;
    TNC_UNROLL
    for (int i = 0; i < each; ++i) values.x[i] = typename Config::Value(0);
    if (term >= 0) {
      const T* const from = static_cast<const T*>(l.a) + tile / row_tiles * l.a_group +
                            phase.terms.at(static_cast<uint32_t>(term), l.b_stride).other;
      TNC_UNROLL
      for (int i = 0; i < each; ++i)
        if (first_row + i < l.rows)
          values.x[i] = Arithmetic<T>::load(from[(first_row + i) * l.a_row]);
    }
    static_cast<typename Config::Packed*>(
        launch.packed)[(static_cast<int64_t>(tile) * launch.slots + slot_of_all) * runs + run] =
        values;
  }
};

// total + value[0] + value[stride] + ..., left to right, many values on their way at a time.
template <class T>
TNC_HD Total<T> fold_groups(Total<T> total, const Total<T>* values, int64_t stride, int64_t count) {
  constexpr int batch = 64;
  int64_t g = 0;
  for (; g + batch <= count; g += batch) {
    Total<T> loaded[batch];
    TNC_UNROLL
    for (int i = 0; i < batch; ++i) loaded[i] = values[(g + i) * stride];
    TNC_UNROLL
    for (int i = 0; i < batch; ++i) total = Arithmetic<T>::fold(total, loaded[i]);
  }
  for (; g < count; ++g) total = Arithmetic<T>::fold(total, values[g * stride]);
  return total;
}

// Threads of a block of folds: few, so that few results are spread over all multiprocessors.
constexpr int few_threads = 64;

// After a launch with a workspace: the next groups of one result added to its total in order. The
// totals between launches wait in `running`.
template <class T>
struct Fold {
  TileLaunch launch;
  Total<T>* running;
  bool first, last;

  TNC_HD void operator()(int64_t flat) const {
    const Lowering& l = launch.lowering;
    const Phase& phase = l.phase[0];
    const auto* workspace = static_cast<const Total<T>*>(launch.workspace);
    const auto* earlier = static_cast<const Total<T>*>(l.total);
    const Total<T> begin = !first               ? running[flat]
                           : earlier != nullptr ? earlier[flat]
                                                : Total<T>(0);
    const Total<T> total = fold_groups<T>(begin, workspace + flat, flat_result(l, l.groups, 0, 0),
                                          launch.last_group - launch.first_group);
    if (!last) {
      running[flat] = total;
      return;
    }
    const int lane = static_cast<int>(flat % phase.lane_count);
    const int64_t channel = flat / phase.lane_count;
    const int row = static_cast<int>(channel % l.rows), group = static_cast<int>(channel / l.rows);
    const int64_t c_offset = phase.lanes.at(static_cast<uint32_t>(lane), l.b_stride).other;
    store_results<T, 1>(launch, group, row, c_offset, &total);
    if (launch.problem.direction == Direction::grad_input &&
        padding_may_show<T>(total, bias_of<T>(l, group, row)))
      settle<T>(launch, phase, group, row, lane);
  }
};

}  // namespace torch_naiveconv
