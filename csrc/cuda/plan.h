// From a convolution to launches of the tiled kernel: which tile, which phases, and whether groups
// are split over blocks. All of it decides who computes, never how, and depends on the problem's
// shape only. Host code without CUDA: the tests run it with an emulated device.
#pragma once

#include <algorithm>

#include "tile.h"

namespace torch_naiveconv {

// Few tiles of a long reduction do not fill a device: their groups are then dealt to more blocks.
// The workspace costs a write and a read of each group's value. The figures are what was best on a
// device of 132 multiprocessors; the rule may not ask which device it is, but bits do not depend on
// it.
struct SplitRule {
  int64_t few_blocks = 264;
  int64_t few_groups = 4;
  int64_t wanted_blocks = 2112;
  int64_t workspace_bytes = int64_t{256} << 20;
};

// Do the lanes 4 i to 4 i + 3 always lie side by side in C, aligned as one access wants them?
template <class T>
bool runs_are_whole(const TileLaunch& launch, const Phase& phase) {
  const Lowering& l = launch.lowering;
  const Side& lanes = phase.lanes;
  const int64_t d = lanes.digits.size[0].divisor, h = lanes.digits.size[1].divisor,
                w = lanes.digits.size[2].divisor;
  const auto whole = [](int64_t n) { return n % 4 == 0; };
  const bool rows = whole(w) && whole(lanes.other[0]) && whole(lanes.other[1]);
  const bool planes =
      whole(d * h * w) && (h == 1 || lanes.other[1] == w) && (d == 1 || lanes.other[0] == h * w);
  return lanes.other[2] == 1 && (rows || planes) && whole(lanes.other_first) &&
         whole(lanes.other_outer) && whole(l.c_row) && whole(l.c_group) &&
         reinterpret_cast<uintptr_t>(l.c) % alignof(Run<T, 4>) == 0;
}

template <class Config, bool dealt, class Launcher>
void launch_blocks(const TileLaunch& launch, int64_t count, Launcher& launcher) {
  if (launch.problem.direction == Direction::grad_weight)
    launcher.template blocks<TileBlock<Config, dealt, true>>(launch, count);
  else
    launcher.template blocks<TileBlock<Config, dealt, false>>(launch, count);
}

// Launcher: allocate(bytes), each(count, body), blocks<Kernel>(launch, count).
template <class Config, class Launcher>
void launch_tiles(const ConvProblem& p, const SplitRule& rule, Launcher& launcher) {
  using T = typename Config::Element;
  const int64_t phases = phase_count(p);
  TileLaunch launch{};
  launch.problem = p;
  launch.lowering = lower(p);
  launch.splits = 1;
  Lowering& l = launch.lowering;
  const int64_t row_tiles = ceil_div(l.rows, Config::rows);
  for (int64_t first = 0; first < phases; first += max_phases) {
    l.phases = 0;
    int64_t tiles = 0;
    launch.slots = 0;
    launch.whole_runs = true;
    for (int64_t i = first; i < phases && i < first + max_phases; ++i) {
      Phase phase = make_phase(p, i, group_length<T>, Config::block_terms);
      if (phase.lane_count == 0) continue;
      phase.first_tile = static_cast<int>(tiles);
      launch.whole_runs = launch.whole_runs && runs_are_whole<T>(launch, phase);
      tiles += ceil_div(phase.lane_count, Config::lanes);
      phase.first_slot = launch.slots;
      launch.slots += phase.chain.period_blocks * Config::block_terms;
      l.phase[l.phases++] = phase;
    }
    const int64_t blocks = tiles * row_tiles * l.groups;
    if (blocks == 0) continue;
    if (p.direction != Direction::grad_weight) {
      const int64_t slots = l.groups * row_tiles * launch.slots;
      launch.packed = launcher.allocate(slots * Config::rows *
                                        static_cast<int64_t>(sizeof(typename Config::Value)));
      launcher.each(slots * Pack<Config>::runs, Pack<Config>{launch, Divider(launch.slots)});
    }
    const Chain& chain = l.phase[0].chain;
    const int64_t groups = static_cast<int64_t>(chain.periods) * chain.groups;
    if (phases > 1 || groups < rule.few_groups || chain.period_blocks == 0 ||
        blocks >= rule.few_blocks) {
      launch_blocks<Config, false>(launch, blocks, launcher);
      continue;
    }
    const int64_t results = flat_result(l, l.groups, 0, 0);
    const int64_t group_bytes = results * static_cast<int64_t>(sizeof(Total<T>));
    const int64_t chunk = std::clamp<int64_t>(rule.workspace_bytes / group_bytes, 1, groups);
    launch.workspace = launcher.allocate(chunk * group_bytes);
    auto* running =
        static_cast<Total<T>*>(chunk < groups ? launcher.allocate(group_bytes) : nullptr);
    for (int64_t group = 0; group < groups; group += chunk) {
      launch.first_group = static_cast<int>(group);
      launch.last_group = static_cast<int>(std::min(group + chunk, groups));
      launch.splits = static_cast<int>(std::min<int64_t>(launch.last_group - launch.first_group,
                                                         ceil_div(rule.wanted_blocks, blocks)));
      launch_blocks<Config, true>(launch, blocks * launch.splits, launcher);
      launcher.each(results, Fold<T>{launch, running, group == 0, launch.last_group == groups},
                    few_threads);
    }
  }
}

// The tiles there are. Each one computes any problem of its type, but for kernels too large for
// masks: those are for Any. Costs: of one result in percent of Large's.
template <class T>
struct Tiles {  // float16 and bfloat16: two chains a result
  using Large = Tile<T, 64, 64, 8, 4, 8>;
  using Flat = Tile<T, 8, 128, 2, 4, 8>;
  using Slim = Large;
  static constexpr int flat_cost = 150, slim_cost = 100, thin_cost = 220;
  using Thin = Tile<T, 4, 512, 4, 4, 8, false, true>;
  using Any = Tile<T, 64, 64, 8, 4, 8, false, false, LocatedSpot>;
};
template <>
struct Tiles<float> {
  using Large = Tile<float, 64, 64, 8, 4, 16, true>;
  using Flat = Tile<float, 32, 128, 8, 4, 16, true>;
  using Slim = Tile<float, 64, 32, 4, 4, 16, true>;
  static constexpr int flat_cost = 107, slim_cost = 120, thin_cost = 220;
  using Thin = Tile<float, 4, 512, 4, 4, 8, false, true>;
  using Any = Tile<float, 64, 64, 8, 4, 16, true, false, LocatedSpot>;
};
template <>
struct Tiles<double> {
  using Large = Tile<double, 64, 64, 4, 4, 8>;
  using Flat = Tile<double, 8, 128, 2, 4, 8>;
  using Slim = Large;
  static constexpr int flat_cost = 150, slim_cost = 100, thin_cost = 220;
  using Thin = Tile<double, 4, 256, 4, 2, 8, false, true>;
  using Any = Tile<double, 64, 64, 4, 4, 8, false, false, LocatedSpot>;
};

template <class T, class Launcher>
void launch_best_tiles(const ConvProblem& p, Launcher& launcher) {
  using All = Tiles<T>;
  const SplitRule rule;
  const ConvShape& s = p.shape;
  const int64_t rows = p.direction == Direction::grad_input ? s.group_in() : s.group_out();
  const int64_t lanes = p.direction == Direction::forward      ? s.batch * s.outputs()
                        : p.direction == Direction::grad_input ? s.batch * s.inputs()
                                                               : s.group_in() * s.taps();
  // What a tile has beyond the rows and lanes there are costs as much.
  const auto cost = [&](auto tile, int64_t percent) {
    using Config = decltype(tile);
    return ceil_div(rows, Config::rows) * Config::rows * ceil_div(lanes, Config::lanes) *
           Config::lanes * percent;
  };
  const int64_t large = cost(typename All::Large{}, 100);
  const int64_t flat = cost(typename All::Flat{}, All::flat_cost);
  const int64_t slim = cost(typename All::Slim{}, All::slim_cost);
  const int64_t thin = cost(typename All::Thin{}, All::thin_cost);
  const int64_t least = std::min({large, flat, slim, thin});
  if (!fits_masks(p))
    launch_tiles<typename All::Any>(p, rule, launcher);
  else if (least == large)
    launch_tiles<typename All::Large>(p, rule, launcher);
  else if (least == flat)
    launch_tiles<typename All::Flat>(p, rule, launcher);
  else if (least == slim)
    launch_tiles<typename All::Slim>(p, rule, launcher);
  else
    launch_tiles<typename All::Thin>(p, rule, launcher);
}

// Are packed weights countable in 31 bits, two at a time, with what pads their rows and terms?
inline bool fits_packed(const ConvProblem& p) {
  const ConvShape& s = p.shape;
  if (p.direction == Direction::grad_weight) return true;
  const bool forward = p.direction == Direction::forward;
  const double rows = static_cast<double>((forward ? s.group_out() : s.group_in()) + 64);
  const double terms = static_cast<double>((forward ? s.group_in() : s.group_out()) * s.taps());
  return static_cast<double>(s.groups) * rows * (terms + 16 * max_phases) < 4294967296.0;
}

// Returns false to decline: other types, and sizes beyond the index arithmetic.
template <class Launcher>
bool launch_tiled(const ConvProblem& p, Launcher& launcher) {
  if (p.direction == Direction::grad_bias || p.dtype > DType::bfloat16 || !fits(p) ||
      !fits_packed(p))
    return false;
  with_float_type(p.dtype,
                  [&](auto tag) { launch_best_tiles<typename decltype(tag)::type>(p, launcher); });
  return true;
}

}  // namespace torch_naiveconv
