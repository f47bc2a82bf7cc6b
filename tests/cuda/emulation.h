// A thread block on the host, for the kernels that are written against csrc/cuda/block.h.
// Each phase runs thread by thread in a chosen order, and copies land at once or at the barrier:
// results that depend on either betray a missing barrier.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

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

}  // namespace torch_naiveconv
