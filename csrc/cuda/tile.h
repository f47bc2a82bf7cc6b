// The tiled kernel: one block computes a tile of C = A * B (lowering.h) from shared memory, eight
// terms at a time, the next eight on their way. Start reading at compute_tile. The body runs on the
// device and, block by block, in the host tests.
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

// ---- a tile ------------------------------------------------------------------------------------

// Rows x Lanes results a block, RowsEach x LanesEach a thread; a warp is 4 x 8 threads.
template <class ElementType, int Rows, int Lanes, int RowsEach, int LanesEach>
struct Tile {
  using Element = ElementType;
  using Value = typename Arithmetic<Element>::Value;
  static constexpr int rows = Rows, lanes = Lanes;
  static constexpr int rows_each = RowsEach, lanes_each = LanesEach;
  static constexpr int threads = Rows / RowsEach * (Lanes / LanesEach);
  static constexpr int block_terms = 8;  // of a stage
  static constexpr int window = 16;      // stages whose terms are tabulated at a time
  static constexpr int warps_across = Lanes / (8 * LanesEach);
  // A thread's rows and lanes come in runs of up to four neighbours, which one load fetches.
  static constexpr int row_run = RowsEach < 4 ? RowsEach : 4;
  static constexpr int lane_run = LanesEach < 4 ? LanesEach : 4;
  static constexpr int a_loads = (Rows * block_terms + threads - 1) / threads;
  static constexpr int b_loads = Lanes * block_terms / threads;
  static_assert(threads % 32 == 0 && threads % Lanes == 0 && threads % block_terms == 0,
                "each thread loads one lane of B and one term of A");
  static_assert(Rows % (4 * RowsEach) == 0 && Lanes % (8 * LanesEach) == 0, "whole warps");

  TNC_HD static int row_of(int thread, int i) {
    const int warp = thread / 32, ty = thread % 32 / 8;
    return warp / warps_across * (4 * RowsEach) + i / row_run * (4 * row_run) + ty * row_run +
           i % row_run;
  }
  TNC_HD static int lane_of(int thread, int j) {
    const int warp = thread / 32, tx = thread % 8;
    return warp % warps_across * (8 * LanesEach) + j / lane_run * (8 * lane_run) + tx * lane_run +
           j % lane_run;
  }

  struct alignas(16) TermOfB {
    int offset, coordinate[3];
  };
  struct TermOfA {
    int offset, odd;  // offset -1: this slot holds no term
  };
  struct alignas(16) Shared {
    // The padding keeps the transposing stores of A free of bank conflicts.
    alignas(16) Value a[2][block_terms][Rows + 16 / sizeof(Value)];
    alignas(16) Value b[2][block_terms][Lanes];
    TermOfB term_b[2][window * block_terms];
    TermOfA term_a[2][window * block_terms];
  };

  // What a thread keeps between phases.
  struct Thread {
    typename Arithmetic<Element>::Chain chain[RowsEach][LanesEach];
    Total<Element> total[RowsEach][LanesEach];
    const Element* a;  // the row of its first load of A
    const Element* b;  // the lane that it loads of B
    int coordinate[3];
  };
};

// A run of values, fetched from shared memory by as few loads as its alignment allows.
template <class Value, int count>
struct alignas(sizeof(Value) * count < 16 ? sizeof(Value) * count : 16) Run {
  Value x[count];
};

// What one launch computes. Without a workspace a block folds its groups itself; with one, the
// groups [first_group, last_group) are dealt to `splits` blocks a tile, each value of a group goes
// to the workspace [group][row][lane], and Fold adds them up in order.
struct TileLaunch {
  ConvProblem problem;
  Lowering lowering;
  int first_group, last_group, splits;
  void* workspace;
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

// There the specification computes the result again. Rare, so kept out of the kernels' registers.
template <class T>
TNC_COLD void settle(const TileLaunch& launch, const Phase& phase, int group, int row, int lane) {
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

template <class Config>
struct TileKernel {
  using T = typename Config::Element;
  using Value = typename Config::Value;
  using Thread = typename Config::Thread;
  using Shared = typename Config::Shared;
  using Sum = Arithmetic<T>;

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

  // The thread's row of A and lane of B, and sums that are empty or go on from an earlier total.
  TNC_HD void start(Thread& me, int thread) const {
    me.a = static_cast<const T*>(l.a) + piece.group * l.a_group +
           (piece.row + thread / Config::block_terms) * l.a_row;
    const int lane = piece.lane + thread % Config::lanes;
    const Place place = phase.lanes.at(static_cast<uint32_t>(lane), l.b_stride);
    me.b = static_cast<const T*>(l.b) + piece.group * l.b_group + place.offset;
    TNC_UNROLL
    for (int axis = 0; axis < 3; ++axis)
      me.coordinate[axis] = lane < phase.lane_count ? place.coordinate[axis] : far_outside;
    const auto* earlier = static_cast<const Total<T>*>(l.total);
    TNC_UNROLL
    for (int i = 0; i < Config::rows_each; ++i) {
      const int row = piece.row + Config::row_of(thread, i);
      TNC_UNROLL
      for (int j = 0; j < Config::lanes_each; ++j) {
        const int at = piece.lane + Config::lane_of(thread, j);
        me.chain[i][j] = {};
        me.total[i][j] = earlier != nullptr && row < l.rows && at < phase.lane_count
                             ? earlier[flat_result(l, piece.group, row, at)]
                             : Total<T>(0);
      }
    }
  }

  // Tabulates the terms of a window of stages.
  TNC_HD void tabulate(int window, int thread) const {
    constexpr int entries = Config::window * Config::block_terms;
    for (int entry = thread; entry < entries; entry += Config::threads) {
      const int block = piece.block + window * Config::window + entry / Config::block_terms;
      typename Config::TermOfA a{-1, 0};
      typename Config::TermOfB b{0, {far_outside, far_outside, far_outside}};
      if (block < piece.last_block) {
        int period;
        const int term = phase.chain.term_at(block, entry % Config::block_terms, period);
        if (term >= 0) {
          const uint32_t flat = static_cast<uint32_t>(period * phase.term_period + term);
          const Place place = phase.terms.at(flat, l.b_stride);
          a = {static_cast<int>(place.other), phase.is_odd(flat)};
          b = {static_cast<int>(place.offset),
               {place.coordinate[0], place.coordinate[1], place.coordinate[2]}};
        }
      }
      shared.term_a[window & 1][entry] = a;
      shared.term_b[window & 1][entry] = b;
    }
  }

  // Starts the copies of one stage.
  template <class Block>
  TNC_HD void load(Block& block, const Thread& me, int stage, int thread) const {
    const int buffer = stage & 1, window = stage / Config::window & 1;
    const int first = stage % Config::window * Config::block_terms;
    constexpr int row_step = Config::threads / Config::block_terms;
    constexpr int slot_step = Config::threads / Config::lanes;
    const int slot_of_a = thread % Config::block_terms, row = thread / Config::block_terms;
    const typename Config::TermOfA term_a = shared.term_a[window][first + slot_of_a];
    TNC_UNROLL
    for (int i = 0; i < Config::a_loads; ++i) {
      if (row + i * row_step >= Config::rows) break;  // more threads than elements of A
      const bool valid = term_a.offset >= 0 && piece.row + row + i * row_step < l.rows;
      fetch(block, &shared.a[buffer][slot_of_a][row + i * row_step],
            me.a + (i * row_step * l.a_row + term_a.offset), valid);
    }
    const int lane = thread % Config::lanes;
    TNC_UNROLL
    for (int i = 0; i < Config::b_loads; ++i) {
      const int slot = thread / Config::lanes + i * slot_step;
      const typename Config::TermOfB term = shared.term_b[window][first + slot];
      const bool valid = inside(me.coordinate[0] + term.coordinate[0], l.b_size[0]) &&
                         inside(me.coordinate[1] + term.coordinate[1], l.b_size[1]) &&
                         inside(me.coordinate[2] + term.coordinate[2], l.b_size[2]);
      fetch(block, &shared.b[buffer][slot][lane], me.b + term.offset, valid);
    }
  }

  TNC_HD static bool inside(int coordinate, int size) {
    return static_cast<unsigned int>(coordinate) < static_cast<unsigned int>(size);
  }

  template <class Block>
  TNC_HD static void fetch(Block& block, Value* target, const T* source, bool valid) {
    if constexpr (std::is_same_v<T, Value>)
      block.copy(target, source, valid);
    else
      *target = valid ? Sum::load(*source) : Value(0);
  }

  // The next eight terms of every sum of this thread.
  TNC_HD void step(Thread& me, int stage, int thread) const {
    const int buffer = stage & 1;
    // The steps of the 16-bit types are long: unrolled eight times they would outgrow the cache.
    TNC_UNROLL_IF(sizeof(T) != 2)
    for (int slot = 0; slot < Config::block_terms; ++slot) {
      Value a[Config::rows_each], b[Config::lanes_each];
      read<Config::row_run>(a, shared.a[buffer][slot],
                            [&](int i) { return Config::row_of(thread, i); });
      read<Config::lane_run>(b, shared.b[buffer][slot],
                             [&](int j) { return Config::lane_of(thread, j); });
      bool odd = false;
      if constexpr (is_half_type<T>)
        odd = shared
                  .term_a[stage / Config::window & 1]
                         [stage % Config::window * Config::block_terms + slot]
                  .odd != 0;
      if (odd) {
        steps(me, a, b, true);
      } else {
        steps(me, a, b, false);
      }
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
    auto* workspace = static_cast<Total<T>*>(launch.workspace);
    TNC_UNROLL
    for (int i = 0; i < Config::rows_each; ++i) {
      TNC_UNROLL
      for (int j = 0; j < Config::lanes_each; ++j) {
        const Total<T> value = Sum::value(me.chain[i][j]);
        me.chain[i][j] = {};
        if (workspace == nullptr) {
          me.total[i][j] = Sum::fold(me.total[i][j], value);
        } else {
          const int row = piece.row + Config::row_of(thread, i);
          const int lane = piece.lane + Config::lane_of(thread, j);
          if (row < l.rows && lane < phase.lane_count)
            workspace[flat_result(l, workspace_group * l.groups + piece.group, row, lane)] = value;
        }
      }
    }
  }

  // Stores this thread's results, `run` neighbours at a time. Returns whether padding may show in
  // any.
  template <int run>
  TNC_HD bool store(const Thread& me, int thread) const {
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
        store_results<T, run>(launch, piece.group, row, c_offset, &me.total[i][j]);
        TNC_UNROLL
        for (int r = 0; r < run; ++r)
          doubtful =
              doubtful || padding_may_show<T>(me.total[i][j + r], bias_of<T>(l, piece.group, row));
      }
    }
    return doubtful;
  }

  TNC_HD void finish(const Thread& me, int thread) const {
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
};

template <class Config, class Block>
TNC_HD void compute_tile(Block& block, const TileLaunch& launch, typename Config::Shared& shared,
                         int64_t index) {
  using Thread = typename Config::Thread;
  const TileKernel<Config> kernel(launch, shared, index);
  const Piece& piece = kernel.piece;
  const Chain& chain = kernel.phase.chain;
  const int stages = piece.last_block - piece.block;
  int in_period = 0, in_group = 0;  // blocks done
  if (stages > 0) {
    in_period = piece.block % chain.period_blocks;
    in_group = in_period % chain.group_blocks;
  }
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
  for (int stage = 0; stage < stages; ++stage) {
    const bool period_ends = ++in_period == chain.period_blocks;
    const bool group_ends = ++in_group == chain.group_blocks || period_ends;
    block.each([&](int thread, Thread& me) {
      if (stage + 1 < stages) kernel.load(block, me, stage + 1, thread);
      if (stage % Config::window == 0) kernel.tabulate(stage / Config::window + 1, thread);
      kernel.step(me, stage, thread);
      if (group_ends) kernel.cut(me, workspace_group, thread);
    });
    if (group_ends) {
      in_group = 0;
      ++workspace_group;
    }
    if (period_ends) in_period = 0;
    block.barrier();
  }
  if (launch.workspace == nullptr)
    block.each([&](int thread, Thread& me) { kernel.finish(me, thread); });
}

// total + value[0] + value[stride] + ..., left to right, many values on their way at a time.
template <class T>
TNC_HD Total<T> fold_groups(Total<T> total, const Total<T>* values, int64_t stride, int64_t count) {
  constexpr int batch = 16;
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
