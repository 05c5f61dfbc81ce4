// Sum tree over fixed-point priorities: u32 leaves, u64 sums, fan-out 256 (three levels hold 16.7M slots).
//
// Integer sums are associative: whatever the order of the writes, the root is exactly the sum of the leaves,
// and every live leaf can be reached by some draw. A float tree loses both (fp32 over 10M items leaves 6 % of
// them unreachable). The layout is the GPU's, so either device can continue with the other's state.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace kdfast {

constexpr int kFanoutBits = 8;
constexpr int64_t kFanout = int64_t{1} << kFanoutBits;
constexpr int kMaxLevels = 4;
constexpr int64_t kMaxCapacity = int64_t{1} << 31;

// Where each level of sums lies. Level 1 sums 256 leaves each; level `levels` is the root, at offset 0.
struct TreeLayout {
  int64_t capacity = 0;
  int levels = 0;
  int64_t count[kMaxLevels + 1] = {};
  int64_t offset[kMaxLevels + 1] = {};
  int64_t sums = 0;

  explicit TreeLayout(int64_t slots) : capacity(slots) {
    if (slots < 1 || slots > kMaxCapacity)
      throw std::invalid_argument("capacity: got " + std::to_string(slots) + ", accepted: 1 to 2^31");
    count[0] = slots;
    do {
      ++levels;
      count[levels] = (count[levels - 1] + kFanout - 1) >> kFanoutBits;
    } while (count[levels] > 1);
    for (int level = levels; level >= 1; --level) {
      offset[level] = sums;
      sums += (count[level] + 1) & ~int64_t{1};  // keeps every level aligned to 16 bytes
    }
  }
};

// The tree over memory that somebody else owns (a torch tensor's, as a rule).
class PriorityTree {
 public:
  PriorityTree(const TreeLayout& layout, uint32_t* leaves, uint64_t* sums)
      : layout_(layout), leaves_(leaves), sums_(sums) {}

  const TreeLayout& layout() const { return layout_; }
  uint64_t total() const { return sums_[0]; }
  uint32_t leaf(int64_t slot) const { return leaves_[slot]; }

  void check(int64_t slot) const {
    if (slot < 0 || slot >= layout_.capacity)
      throw std::invalid_argument("index: got " + std::to_string(slot) + ", accepted: 0 to " +
                                  std::to_string(layout_.capacity - 1));
  }

  // `slot` must have been checked.
  void set(int64_t slot, uint32_t quantum) {
    const uint64_t delta = uint64_t{quantum} - leaves_[slot];  // modulo 2^64, as the GPU's atomics
    leaves_[slot] = quantum;
    for (int level = 1; level <= layout_.levels; ++level)
      sums_[layout_.offset[level] + (slot >> (kFanoutBits * level))] += delta;
  }

  void rebuild() {
    for (int level = 1; level <= layout_.levels; ++level) {
      const uint64_t* below = level == 1 ? nullptr : sums_ + layout_.offset[level - 1];
      for (int64_t node = 0; node < layout_.count[level]; ++node) {
        const int64_t first = node << kFanoutBits;
        const int64_t last = std::min(first + kFanout, layout_.count[level - 1]);
        uint64_t sum = 0;
        if (level == 1)
          for (int64_t i = first; i < last; ++i) sum += leaves_[i];
        else
          for (int64_t i = first; i < last; ++i) sum += below[i];
        sums_[layout_.offset[level] + node] = sum;
      }
    }
  }

  // Whether every stored sum is the sum of what lies under it.
  bool consistent() const {
    std::vector<uint64_t> fresh(layout_.sums, 0);
    PriorityTree(layout_, leaves_, fresh.data()).rebuild();
    for (int level = 1; level <= layout_.levels; ++level)
      for (int64_t node = 0; node < layout_.count[level]; ++node)
        if (fresh[layout_.offset[level] + node] != sums_[layout_.offset[level] + node]) return false;
    return true;
  }

  // Slots whose prefix interval holds each target: prefix(slot) <= target < prefix(slot + 1). All targets
  // must be below total(). On return `target` holds the offset inside the leaf. Ascending targets (stratified
  // draws) cost one sweep of each node they share; other orders are as correct, and slower.
  void find(int64_t count, uint64_t* target, int64_t* slot) const {
    for (int64_t i = 0; i < count; ++i) slot[i] = 0;
    for (int level = layout_.levels - 1; level >= 1; --level) {
      descend(sums_ + layout_.offset[level], layout_.count[level], count, target, slot);
    }
    if (layout_.capacity > kPrefetchAbove) {
      for (int64_t i = 0; i < count; ++i) {
        const char* block = reinterpret_cast<const char*>(leaves_ + (slot[i] << kFanoutBits));
        for (int line = 0; line < 16; ++line) __builtin_prefetch(block + 64 * line);
      }
    }
    descend(leaves_, layout_.capacity, count, target, slot);
  }

 private:
  // Beyond this many leaves (1 MB) they are not in a core's cache.
  static constexpr int64_t kPrefetchAbove = 262144;
  // Children summed before they are searched.
  static constexpr int kGroup = 8;

  // One level down: `slot` holds nodes on entry, their children on return. Groups are summed before they are
  // searched, which the compiler turns into vector adds.
  template <typename Mass>
  static void descend(const Mass* masses, int64_t size, int64_t count, uint64_t* target, int64_t* slot) {
    int64_t node = -1, child = 0;
    uint64_t passed = 0, previous = 0;  // mass of the node's children before `child`
    for (int64_t i = 0; i < count; ++i) {
      if (slot[i] != node || target[i] < previous) {
        node = slot[i];
        child = node << kFanoutBits;
        passed = 0;
      }
      previous = target[i];
      uint64_t rest = target[i] - passed;
      for (;;) {
        if (child % kGroup == 0 && child + kGroup <= size) {
          uint64_t sum = 0;
          for (int k = 0; k < kGroup; ++k) sum += masses[child + k];
          if (rest >= sum) {
            rest -= sum;
            child += kGroup;
            continue;
          }
        }
        if (rest < masses[child]) break;
        rest -= masses[child++];
      }
      passed = target[i] - rest;
      target[i] = rest;
      slot[i] = child;
    }
  }

  TreeLayout layout_;
  uint32_t* leaves_;
  uint64_t* sums_;
};

// Draw i's target. Stratified: uniform in the i-th of `count` equal parts of [0, total), bounds floor(i total
// / count), so the targets ascend. Independent: uniform in [0, total).
inline void draw_targets(uint64_t total, int64_t count, bool stratified, const uint64_t* uniform,
                         uint64_t* target) {
  const auto mulhi = [](uint64_t a, uint64_t b) {
    return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
  };
  if (!stratified) {
    for (int64_t i = 0; i < count; ++i) target[i] = mulhi(uniform[i], total);
    return;
  }
  const uint64_t n = static_cast<uint64_t>(count), whole = total / n, part = total % n;
  uint64_t low = 0;
  for (uint64_t i = 0; i < n; ++i) {
    const uint64_t high = (i + 1) * whole + (i + 1) * part / n;
    target[i] = low + mulhi(uniform[i], high - low);
    low = high;
  }
}

}  // namespace kdfast
