// A priority tree that owns its memory and may be used by several threads.
#pragma once

#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "fork_mutex.hpp"
#include "philox.hpp"
#include "priority_tree.hpp"

namespace kdfast {

class SharedTree {
 public:
  explicit SharedTree(int64_t capacity)
      : layout_(capacity),
        leaves_(layout_.capacity),
        sums_(layout_.sums),
        tree_(layout_, leaves_.data(), sums_.data()) {}

  const TreeLayout& layout() const { return layout_; }
  int64_t bytes() const { return static_cast<int64_t>(leaves_.size() * 4 + sums_.size() * 8); }

  uint64_t total() const {
    const Lock lock(mutex_);
    return tree_.total();
  }

  std::vector<uint32_t> leaves() const {
    const Lock lock(mutex_);
    return leaves_;
  }

  std::vector<uint64_t> sums() const {
    const Lock lock(mutex_);
    return sums_;
  }

  // Nothing is written when a slot is refused.
  void set(int64_t count, const int64_t* slot, const uint32_t* quantum) {
    const Lock lock(mutex_);
    for (int64_t i = 0; i < count; ++i) tree_.check(slot[i]);
    for (int64_t i = 0; i < count; ++i) tree_.set(slot[i], quantum[i]);
  }

  void find(int64_t count, const uint64_t* target, int64_t* slot) const {
    std::vector<uint64_t> rest(target, target + count);
    const Lock lock(mutex_);
    for (const uint64_t value : rest)
      if (value >= tree_.total())
        throw std::invalid_argument("targets: got " + std::to_string(value) +
                                    ", accepted: below the total, " + std::to_string(tree_.total()));
    tree_.find(count, rest.data(), slot);
  }

  void sample(int64_t count, uint64_t seed, uint64_t step, bool stratified, int64_t* slot) const {
    std::vector<uint64_t> draws(count);
    philox_draws(seed, step, count, draws.data());
    const Lock lock(mutex_);
    if (tree_.total() == 0) throw std::invalid_argument("sample: the tree is empty");
    draw_targets(tree_.total(), count, stratified, draws.data(), draws.data());
    tree_.find(count, draws.data(), slot);
  }

  void rebuild() {
    const Lock lock(mutex_);
    tree_.rebuild();
  }

  bool consistent() const {
    const Lock lock(mutex_);
    return tree_.consistent();
  }

 private:
  using Lock = std::lock_guard<ForkMutex>;

  TreeLayout layout_;
  std::vector<uint32_t> leaves_;
  std::vector<uint64_t> sums_;
  PriorityTree tree_;
  mutable ForkMutex mutex_;
};

}  // namespace kdfast
