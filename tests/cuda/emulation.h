// A thread block on the host, for the kernels that are written against csrc/cuda/block.h.
// Each phase runs thread by thread in a chosen order, and copies land at once or at the barrier:
// results that depend on either betray a missing barrier.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <limits>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "../../csrc/cpu/parallel.h"
#include "../../csrc/cuda/plan.h"

namespace torch_naiveconv {

struct Schedule {
  enum Order { ascending, descending, shuffled } order = ascending;
  bool copies_land_late = false;
};

template <class Thread>
class HostBlock {
 public:
  HostBlock(int threads, Schedule schedule) : threads_(threads), schedule_(schedule) {
    for (int i = 0; i < threads; ++i) order_.push_back(i);
    if (schedule.order == Schedule::descending) std::reverse(order_.begin(), order_.end());
  }

  template <class Body>
  void each(const Body& body) {
    if (schedule_.order == Schedule::shuffled)
      for (size_t i = order_.size() - 1; i > 0; --i)
        std::swap(order_[i], order_[random_() % (i + 1)]);
    for (const int thread : order_) body(thread, threads_[static_cast<size_t>(thread)]);
  }

  template <class T>
  void copy(T* shared, const T* source, bool valid) {
    const Copy copy{shared, valid ? source : nullptr, sizeof(T)};
    if (schedule_.copies_land_late)
      pending_.push_back(copy);
    else
      land(copy);
  }

  void barrier() {
    for (const Copy& copy : pending_) land(copy);
    pending_.clear();
  }

 private:
  struct Copy {
    void* target;
    const void* source;
    size_t size;
  };
  static void land(const Copy& copy) {
    if (copy.source)
      std::memcpy(copy.target, copy.source, copy.size);
    else
      std::memset(copy.target, 0, copy.size);
  }

  std::vector<Thread> threads_;
  std::vector<int> order_;
  std::vector<Copy> pending_;
  std::minstd_rand random_{1};
  Schedule schedule_;
};

// The launcher that the plans of csrc/cuda call, on the host.
struct HostLauncher {
  Schedule schedule;
  std::vector<std::unique_ptr<char[]>> memory = {};

  void* allocate(int64_t bytes) {
    memory.push_back(std::make_unique<char[]>(static_cast<size_t>(bytes)));
    std::memset(memory.back().get(), 0xff, static_cast<size_t>(bytes));  // NaN
    return memory.back().get();
  }

  template <class Body>
  void each(int64_t count, const Body& body, int = 0) {
    for (int64_t i = 0; i < count; ++i)
      body(schedule.order == Schedule::ascending ? i : count - 1 - i);
  }

  template <class Kernel>
  void blocks(const typename Kernel::Launch& launch, int64_t count, int extra = 0) {
    using Shared = typename Kernel::Shared;
    const size_t bytes = sizeof(Shared) + static_cast<size_t>(extra);
    const auto shared = std::make_unique<std::max_align_t[]>(bytes / sizeof(std::max_align_t) + 1);
    for (int64_t index = 0; index < count; ++index) {
      std::memset(static_cast<void*>(shared.get()), 0xff, bytes);
      HostBlock<typename Kernel::Thread> block(Kernel::threads, schedule);
      Kernel::run(block, launch, *reinterpret_cast<Shared*>(shared.get()), index);
    }
  }
};

template <class T>
T value_of(std::mt19937& random, int kind) {
  const uint64_t bits = (static_cast<uint64_t>(random()) << 32) | random();
  const bool special = kind > 0 && bits % 97 == 0;
  if constexpr (!is_float_type<T>) {
    return static_cast<T>(kind == 0 ? bits >> 20 : bits >> 20 & 3);
  } else {
    float x = static_cast<float>(static_cast<int32_t>(bits >> 20)) * 4.6566e-10f;
    if (kind == 2 && bits % 3 == 0) x *= 1e-38f;
    if (special) {
      constexpr float inf = std::numeric_limits<float>::infinity();
      constexpr float nan = std::numeric_limits<float>::quiet_NaN();
      const float values[] = {0.0f, -0.0f, 1e-45f, 3e38f, -3e38f, 1e-38f, inf, -inf, nan};
      x = values[(bits >> 9) % (kind == 3 ? 9 : 6)];
    }
    if constexpr (is_half_type<T>)
      return narrow<T>(x);
    else
      return static_cast<T>(x);
  }
}

// A dense tensor of (outer, channels, three axes) in either memory format.
template <class T>
struct Dense {
  std::vector<T> data;
  RawView view;

  Dense(const int64_t (&size)[5], bool channels_last) {
    const int order_last[] = {1, 4, 3, 2, 0}, order_first[] = {4, 3, 2, 1, 0};
    int64_t stride = 1;
    for (const int axis : channels_last ? order_last : order_first) {
      view.stride[axis] = stride;
      stride *= size[axis];
    }
    data.resize(static_cast<size_t>(stride));
    view.data = data.data();
  }
  void fill(std::mt19937& random, int kind) {
    for (T& x : data) x = value_of<T>(random, kind);
  }
};

// Reads in, kernel, stride, padding before and after, dilation of three axes.
inline void read_axes(std::istream& in, Axis (&axes)[3]) {
  for (Axis& axis : axes) {
    int64_t after = 0;
    in >> axis.in >> axis.kernel >> axis.stride >> axis.pad >> after >> axis.dilation;
    const int64_t room = axis.in + axis.pad + after - axis.dilation * (axis.kernel - 1) - 1;
    axis.out = room < 0 ? 0 : room / axis.stride + 1;
  }
}

// Runs agrees(stream of one line) for each line of stdin and echoes those that fail.
template <class Agrees>
int run_cases(const Agrees& agrees) {
  std::string line;
  int cases = 0, failures = 0;
  while (std::getline(std::cin, line)) {
    std::istringstream in(line);
    ++cases;
    if (agrees(in)) continue;
    ++failures;
    std::printf("differs: %s\n", line.c_str());
  }
  std::printf("%d cases, %d differ\n", cases, failures);
  return failures != 0 || cases == 0;
}

// Everything runs on the calling thread, whatever number a kernel is told to cut its work for.
// (Defined here: each driver includes this file once.)
inline int pretended_threads = 1;
void run_parallel(int64_t count, int64_t, ParallelBody body, void* context) {
  body(context, 0, count);
}
int thread_count() { return pretended_threads; }

}  // namespace torch_naiveconv
