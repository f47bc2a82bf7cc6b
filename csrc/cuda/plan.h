// From a convolution to launches of the tiled kernel: which tile, which phases, and whether groups
// are split over blocks. All of it decides who computes, never how, and depends on the problem's
// shape only. Host code without CUDA: the tests run it with an emulated device.
#pragma once

#include <algorithm>

#include "tile.h"

namespace torch_naiveconv {

// Few tiles of a long reduction do not fill a device: their groups are then dealt to more blocks.
// The workspace costs a write and a read of each group's value, so it is kept small enough for a
// cache.
struct SplitRule {
  int64_t few_blocks = 160;
  int64_t wanted_blocks = 528;
  int64_t workspace_bytes = int64_t{32} << 20;
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

// Launcher: allocate(bytes), each(count, body), tiles<Config>(launch, blocks).
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
    launch.whole_runs = true;
    for (int64_t i = first; i < phases && i < first + max_phases; ++i) {
      Phase phase = make_phase(p, i, group_length<T>, Config::block_terms);
      if (phase.lane_count == 0) continue;
      phase.first_tile = static_cast<int>(tiles);
      launch.whole_runs = launch.whole_runs && runs_are_whole<T>(launch, phase);
      tiles += ceil_div(phase.lane_count, Config::lanes);
      l.phase[l.phases++] = phase;
    }
    const int64_t blocks = tiles * row_tiles * l.groups;
    if (blocks == 0) continue;
    const Chain& chain = l.phase[0].chain;
    const int64_t groups = static_cast<int64_t>(chain.periods) * chain.groups;
    if (phases > 1 || groups < 2 || chain.period_blocks == 0 || blocks >= rule.few_blocks) {
      launcher.template tiles<Config>(launch, blocks);
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
      launcher.template tiles<Config>(launch, blocks * launch.splits);
      launcher.each(results, Fold<T>{launch, running, group == 0, launch.last_group == groups});
    }
  }
}

// The tiles there are. Each one computes any problem of its type.
template <class T>
struct Tiles {  // float16 and bfloat16: two chains a result
  using Large = Tile<T, 64, 64, 8, 4>;
  using Medium = Large;
  using Flat = Tile<T, 8, 128, 2, 4>;
  using Thin = Flat;
};
template <>
struct Tiles<float> {
  using Large = Tile<float, 128, 128, 8, 8>;
  using Medium = Tile<float, 64, 64, 8, 8>;
  using Flat = Tile<float, 32, 128, 4, 8>;
  using Thin = Tile<float, 8, 128, 2, 4>;
};
template <>
struct Tiles<double> {
  using Large = Tile<double, 64, 64, 4, 4>;
  using Medium = Large;
  using Flat = Tile<double, 8, 128, 2, 4>;
  using Thin = Flat;
};

constexpr int64_t enough_large = 264;  // fewer large tiles would leave many processors idle

template <class T, class Launcher>
void launch_best_tiles(const ConvProblem& p, Launcher& launcher) {
  const SplitRule rule;
  const ConvShape& s = p.shape;
  const int64_t rows = p.direction == Direction::grad_input ? s.group_in() : s.group_out();
  const int64_t lanes = p.direction == Direction::forward      ? s.batch * s.outputs()
                        : p.direction == Direction::grad_input ? s.batch * s.inputs()
                                                               : s.group_in() * s.taps();
  using Large = typename Tiles<T>::Large;
  const int64_t large = ceil_div(rows, Large::rows) * ceil_div(lanes, Large::lanes) * s.groups;
  if (rows <= Tiles<T>::Thin::rows)
    launch_tiles<typename Tiles<T>::Thin>(p, rule, launcher);
  else if (rows <= Tiles<T>::Flat::rows)
    launch_tiles<typename Tiles<T>::Flat>(p, rule, launcher);
  else if (rows > Large::rows / 2 && large >= enough_large)
    launch_tiles<Large>(p, rule, launcher);
  else
    launch_tiles<typename Tiles<T>::Medium>(p, rule, launcher);
}

// Returns false to decline: other types, and sizes beyond the index arithmetic.
template <class Launcher>
bool launch_tiled(const ConvProblem& p, Launcher& launcher) {
  if (p.direction == Direction::grad_bias || p.dtype > DType::bfloat16 || !fits(p)) return false;
  with_float_type(p.dtype,
                  [&](auto tag) { launch_best_tiles<typename decltype(tag)::type>(p, launcher); });
  return true;
}

}  // namespace torch_naiveconv
