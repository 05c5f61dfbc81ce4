// The buffer's bookkeeping on the CPU: tree, slots, histogram and rows behind one lock, a call a batch.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "fixed_point.hpp"
#include "fork_mutex.hpp"
#include "philox.hpp"
#include "priority_tree.hpp"
#include "ring_slots.hpp"

namespace kdfast {

struct PriorityRule {
  double alpha, eps, scale;
};

// Where the state lies; every pointer stays its owner's. Sizes: leaves, delta, generation, labels [capacity],
// sums [layout.sums], meta [kMetaWords], class_counts [classes], order [capacity] (null: not
// first-in-first-out, or nothing is ever inserted), rows [capacity * row_bytes] or null.
struct ReplayState {
  uint32_t* leaves;
  uint64_t* sums;
  float* delta;
  uint32_t* generation;
  int32_t* labels;
  int64_t* meta;
  int64_t* class_counts;
  int32_t* order;
  uint8_t* rows;
};

// A copy of one of the state's arrays.
struct ReplayCopy {
  std::unique_ptr<uint8_t[]> data;
  int64_t bytes = 0;
};

struct SampleOut {
  uint8_t* rows;  // may be null
  int64_t* labels;
  int64_t* index;
  int64_t* generation;
  float* weight;
  float* probability;
};

// Rows come out as float(x) * gain[channel] + bias[channel] when `gain` is given (uint8 rows only).
struct Normalize {
  const float* gain = nullptr;
  const float* bias = nullptr;
  int64_t channels = 0;
};

KDFAST_SIMD static void normalize_row(const uint8_t* row, int64_t count, float gain, float bias, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(row[i]) * gain + bias;
}

class ReplayCore {
 public:
  ReplayCore(int64_t capacity, int64_t row_bytes, int64_t classes, Eviction policy, PriorityRule rule,
             bool strict, const ReplayState& state)
      : state_(state),
        layout_(capacity),
        tree_(layout_, state.leaves, state.sums),
        histogram_(classes, state.class_counts),
        slots_(policy, tree_, histogram_, state.meta, state.generation, state.labels, state.order),
        row_bytes_(row_bytes),
        rule_(rule),
        strict_(strict) {}

  // Insert rows one after another. `source` may be null (bookkeeping alone); `labels` null: unlabelled;
  // `priority` null: the running maximum. Nothing is written when an argument is refused.
  void add(int64_t count, const uint8_t* source, const int64_t* labels, const float* priority,
           int64_t* index) {
    const std::lock_guard<ForkMutex> lock(mutex_);
    if (labels != nullptr) check_labels(count, labels);
    if (priority != nullptr && strict_) check_finite(count, priority);
    const float fallback = running_max();
    delta_.resize(count);
    for (int64_t i = 0; i < count; ++i) {
      const bool given = priority != nullptr && std::isfinite(priority[i]);
      if (priority != nullptr && !given) ++state_.meta[kNonFinite];
      delta_[i] = given ? std::fabs(priority[i]) : fallback;
    }
    quantise(count, delta_.data());
    for (int64_t i = 0; i < count; ++i) {
      const int64_t slot = slots_.allocate();
      insert(slot, labels == nullptr ? kUnlabelled : static_cast<int32_t>(labels[i]), delta_[i], quantum_[i]);
      count_clipping(i);
      if (source != nullptr)
        std::memcpy(state_.rows + slot * row_bytes_, source + i * row_bytes_, row_bytes_);
      index[i] = slot;
    }
  }

  void sample(int64_t count, double beta, bool stratified, const Normalize& normalize, const SampleOut& out) {
    const std::lock_guard<ForkMutex> lock(mutex_);
    const uint64_t total = tree_.total();
    if (total == 0) throw std::invalid_argument("sample: the buffer is empty; extend() it first");
    uniform_.resize(count);
    target_.resize(count);
    quantum_.resize(count);
    uint64_t& step = reinterpret_cast<uint64_t&>(state_.meta[kStep]);
    philox_draws(static_cast<uint64_t>(state_.meta[kSeed]), step++, count, uniform_.data());
    draw_targets(total, count, stratified, uniform_.data(), target_.data());
    tree_.find(count, target_.data(), out.index);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t slot = out.index[i];
      quantum_[i] = tree_.leaf(slot);
      out.generation[i] = state_.generation[slot];
      out.labels[i] = state_.labels[slot];
    }
    importance(quantum_.data(), count, static_cast<double>(total), static_cast<double>(state_.meta[kLive]),
               beta, out.weight, out.probability);
    if (out.rows != nullptr) gather(count, out.index, normalize, out.rows);
  }

  // Re-score rows. Skipped and counted: rows overwritten since (when `generation` is given), priorities that
  // are not finite. Of duplicates the last counts, or with `largest` the largest.
  void update(int64_t count, const int64_t* index, const float* priority, const int64_t* generation,
              bool largest) {
    const std::lock_guard<ForkMutex> lock(mutex_);
    for (int64_t i = 0; i < count; ++i) {
      tree_.check(index[i]);
      if (generation == nullptr && tree_.leaf(index[i]) == 0)
        throw std::invalid_argument("index: got " + std::to_string(index[i]) + ", which is an empty slot");
    }
    if (strict_) check_finite(count, priority);
    quantise(count, priority);
    if (largest) order_by_size(count, index, priority);
    for (int64_t k = 0; k < count; ++k) {
      const int64_t i = largest ? order_[k] : k;
      const int64_t slot = index[i];
      if (generation != nullptr && (tree_.leaf(slot) == 0 || state_.generation[slot] != generation[i])) {
        ++state_.meta[kStale];
      } else if (!std::isfinite(priority[i])) {
        ++state_.meta[kNonFinite];
      } else {
        const float magnitude = std::fabs(priority[i]);
        tree_.set(slot, quantum_[i]);
        state_.delta[slot] = magnitude;
        slots_.touched(slot);
        raise_max(magnitude);
        count_clipping(i);
      }
    }
  }

  // Empty these slots; slots that are empty already are left so.
  void remove(int64_t count, const int64_t* index) {
    const std::lock_guard<ForkMutex> lock(mutex_);
    for (int64_t i = 0; i < count; ++i) tree_.check(index[i]);
    const int64_t before = state_.meta[kLive];
    for (int64_t i = 0; i < count; ++i)
      if (tree_.leaf(index[i]) != 0) evict(index[i]);
    if (state_.meta[kLive] != before) slots_.vacated(count, index);
  }

  // Recompute all sums, and everything that is derived from the shared state.
  void rebuild() {
    const std::lock_guard<ForkMutex> lock(mutex_);
    tree_.rebuild();
    slots_.rebuild();
  }

  // Copies of these arrays, all of one moment. "rows" stops at the last slot in use.
  std::vector<ReplayCopy> copy(const std::vector<std::string>& names) const {
    std::vector<ReplayCopy> copies;
    copies.reserve(names.size());
    const std::lock_guard<ForkMutex> lock(mutex_);
    for (const std::string& name : names) {
      const auto [data, bytes] = array(name);
      // Not value-initialised: these are overwritten, and may be the size of the buffer.
      copies.push_back({std::unique_ptr<uint8_t[]>(new uint8_t[bytes]), bytes});
      if (bytes > 0) std::memcpy(copies.back().data.get(), data, bytes);
    }
    return copies;
  }

  // Replace everything by `source`, of which `rows` rows are there. The caller has checked that it is
  // consistent.
  void load(const ReplayState& source, int64_t rows) {
    const std::lock_guard<ForkMutex> lock(mutex_);
    const int64_t capacity = layout_.capacity;
    std::copy_n(source.leaves, capacity, state_.leaves);
    std::copy_n(source.sums, layout_.sums, state_.sums);
    std::copy_n(source.delta, capacity, state_.delta);
    std::copy_n(source.generation, capacity, state_.generation);
    std::copy_n(source.labels, capacity, state_.labels);
    std::copy_n(source.meta, int64_t{kMetaWords}, state_.meta);
    if (histogram_.classes() > 0) std::copy_n(source.class_counts, histogram_.classes(), state_.class_counts);
    if (rows * row_bytes_ > 0) std::memcpy(state_.rows, source.rows, rows * row_bytes_);
    slots_.replaced();
  }

  int64_t word(int position) const {
    if (position < 0 || position >= kMetaWords) throw std::out_of_range("no such word");
    const std::lock_guard<ForkMutex> lock(mutex_);
    return state_.meta[position];
  }

  bool consistent() {
    const std::lock_guard<ForkMutex> lock(mutex_);
    return tree_.consistent();
  }

  int64_t derived_bytes() const {
    const std::lock_guard<ForkMutex> lock(mutex_);
    return slots_.bytes();
  }

 private:
  std::pair<const void*, int64_t> array(const std::string& name) const {
    const int64_t capacity = layout_.capacity;
    if (name == "leaves") return {state_.leaves, capacity * 4};
    if (name == "sums") return {state_.sums, layout_.sums * 8};
    if (name == "delta") return {state_.delta, capacity * 4};
    if (name == "generation") return {state_.generation, capacity * 4};
    if (name == "labels") return {state_.labels, capacity * 4};
    if (name == "meta") return {state_.meta, kMetaWords * 8};
    if (name == "class_counts") return {state_.class_counts, histogram_.classes() * 8};
    if (name != "rows") throw std::invalid_argument("no array is called '" + name + "'");
    int64_t used = capacity;
    while (used > 0 && tree_.leaf(used - 1) == 0) --used;
    return {state_.rows, used * row_bytes_};
  }

  void check_labels(int64_t count, const int64_t* labels) const {
    const int64_t most = histogram_.classes() > 0 ? histogram_.classes() : int64_t{1} << 31;
    for (int64_t i = 0; i < count; ++i)
      if (labels[i] < 0 || labels[i] >= most)
        throw std::invalid_argument("labels: got " + std::to_string(labels[i]) + " in row " +
                                    std::to_string(i) + ", accepted: 0 to " + std::to_string(most - 1));
  }

  static void check_finite(int64_t count, const float* priority) {
    for (int64_t i = 0; i < count; ++i)
      if (!std::isfinite(priority[i]))
        throw std::invalid_argument("priority: got " + std::to_string(priority[i]) + " in row " +
                                    std::to_string(i) + ", accepted: finite values (strict=True)");
  }

  float running_max() const {
    if (state_.meta[kMaxPriority] < 0) return 1.0F;
    const uint32_t bits = static_cast<uint32_t>(state_.meta[kMaxPriority]);
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

  // Bits of non-negative floats order as the floats do, so that the GPU can take an integer maximum.
  void raise_max(float magnitude) {
    uint32_t bits;
    std::memcpy(&bits, &magnitude, sizeof bits);
    state_.meta[kMaxPriority] = std::max(state_.meta[kMaxPriority], int64_t{bits});
  }

  void quantise(int64_t count, const float* delta) {
    mass_.resize(count);
    quantum_.resize(count);
    fixed_masses(delta, count, rule_.alpha, rule_.eps, rule_.scale, mass_.data());
    fixed_round(mass_.data(), count, quantum_.data());
  }

  void count_clipping(int64_t i) {
    state_.meta[kSaturated] += mass_[i] >= kQuantumMax + 0.5;
    state_.meta[kFloored] += mass_[i] < 0.5;
  }

  void insert(int64_t slot, int32_t label, float delta, uint32_t quantum) {
    if (tree_.leaf(slot) != 0) {
      evict(slot);
      ++state_.meta[kEvicted];
    }
    state_.labels[slot] = label;
    state_.generation[slot] = static_cast<uint32_t>(state_.meta[kInserted]++);
    state_.delta[slot] = delta;
    tree_.set(slot, quantum);
    histogram_.add(label);
    ++state_.meta[kLive];
    raise_max(delta);
    slots_.inserted(slot);
  }

  void evict(int64_t slot) {
    slots_.removed(slot);
    histogram_.remove(state_.labels[slot]);
    tree_.set(slot, 0);
    --state_.meta[kLive];
  }

  void gather(int64_t count, const int64_t* index, const Normalize& normalize, uint8_t* out) const {
    if (normalize.gain == nullptr) {
      // The start of a random row misses every cache, and the hardware only sees the row once it is under
      // way: two rows ahead and 16 lines make the loop a fifth faster than bare copies of the same rows.
      const int64_t lines = std::min<int64_t>((row_bytes_ + 63) / 64, 16);
      for (int64_t i = 0; i < count; ++i) {
        if (i + 2 < count) {
          const uint8_t* ahead = state_.rows + index[i + 2] * row_bytes_;
          for (int64_t line = 0; line < lines; ++line) __builtin_prefetch(ahead + 64 * line);
        }
        std::memcpy(out + i * row_bytes_, state_.rows + index[i] * row_bytes_, row_bytes_);
      }
      return;
    }
    const int64_t plane = row_bytes_ / normalize.channels;
    float* values = reinterpret_cast<float*>(out);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < normalize.channels; ++c)
        normalize_row(state_.rows + index[i] * row_bytes_ + c * plane, plane, normalize.gain[c],
                      normalize.bias[c], values + i * row_bytes_ + c * plane);
  }

  // Ascending priorities within each slot, so that the last write of a slot is its largest.
  void order_by_size(int64_t count, const int64_t* index, const float* priority) {
    order_.resize(count);
    for (int64_t i = 0; i < count; ++i) order_[i] = i;
    const auto size = [priority](int64_t i) {
      return std::isfinite(priority[i]) ? std::fabs(priority[i]) : -1.0F;
    };
    std::sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) {
      return std::make_tuple(index[a], size(a), a) < std::make_tuple(index[b], size(b), b);
    });
  }

  ReplayState state_;
  TreeLayout layout_;
  PriorityTree tree_;
  ClassHistogram histogram_;
  RingSlots slots_;
  int64_t row_bytes_;
  PriorityRule rule_;
  bool strict_;
  mutable ForkMutex mutex_;
  std::vector<uint64_t> uniform_, target_;
  std::vector<uint32_t> quantum_;
  std::vector<double> mass_;
  std::vector<float> delta_;
  std::vector<int64_t> order_;
};

}  // namespace kdfast
