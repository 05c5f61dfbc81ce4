// Which slot the next row goes to, and which row that evicts.
//
// A row is known by (slot, generation): the generation is the running number of its insertion (mod 2^32), so
// it tells a row from those that had the slot before, and orders rows by age.
//
// All policies fill free slots first, the lowest first. First-in-first-out keeps all slots in a ring,
// `order`: from the head on the free ones, ascending, then the rows from the oldest to the newest. The next
// slot is always the head's, so that a GPU's programs can take theirs at once. Without removals `order` is
// the identity.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "class_histogram.hpp"
#include "priority_tree.hpp"

namespace kdfast {

// The words of the buffer's state that both devices read and write; kdfast/reference/replay/ and
// kernels/replay/ name the same positions.
enum Meta : int {
  kSeed,
  kStep,         // draws made so far
  kHead,         // fifo: position in `order` of the next slot; else: no free slot lies below this one
  kLive,         // rows held
  kInserted,     // rows ever inserted
  kMaxPriority,  // bits of the largest float32 |delta| seen, -1 before the first
  kPendingMax,   // the same for the insert under way (GPU)
  kTicket,       // programs of the launch under way that have finished (GPU)
  kNonFinite,    // from here on: counters that stats() reads
  kStale,
  kSaturated,
  kFloored,
  kOutOfRange,
  kBadLabel,
  kEmptySlot,
  kEvicted,
  kMetaWords,
};

enum class Eviction { kFifo, kLowest, kClassBalanced };

inline Eviction eviction_named(const std::string& name) {
  if (name == "fifo") return Eviction::kFifo;
  if (name == "lowest") return Eviction::kLowest;
  if (name == "class_balanced") return Eviction::kClassBalanced;
  throw std::invalid_argument("eviction: got '" + name + "', accepted: fifo, lowest, class_balanced");
}

class RingSlots {
 public:
  RingSlots(Eviction policy, const PriorityTree& tree, const ClassHistogram& histogram, int64_t* meta,
            const uint32_t* generation, const int32_t* labels, int32_t* order)
      : policy_(policy),
        tree_(tree),
        histogram_(histogram),
        meta_(meta),
        generation_(generation),
        labels_(labels),
        order_(order),
        capacity_(tree.layout().capacity) {
    rebuild();
  }

  // The slot for the next row: a free one while there is any, else the policy's victim.
  int64_t allocate() {
    if (policy_ == Eviction::kFifo) return order_[advance_head()];
    if (meta_[kLive] < capacity_) {
      while (tree_.leaf(meta_[kHead]) != 0) advance_head();
      return advance_head();
    }
    return policy_ == Eviction::kLowest ? lowest() : oldest_of_largest_class();
  }

  // A row of class `label` now lives in `slot`; its leaf, label and generation are written.
  void inserted(int64_t slot) {
    touched(slot);
    if (policy_ == Eviction::kClassBalanced) push(slot);
  }

  // The row in `slot` leaves; its label and generation are still there.
  void removed(int64_t slot) {
    touched(slot);
    if (policy_ == Eviction::kClassBalanced) unlink(slot);
  }

  // These slots were emptied on request, all at once.
  void vacated(int64_t count, const int64_t* slot) {
    if (policy_ == Eviction::kFifo) {
      std::vector<int32_t> rows;
      rows.reserve(meta_[kLive]);
      for (int64_t k = 0, at = meta_[kHead]; k < capacity_; ++k, at = after(at))
        if (tree_.leaf(order_[at]) != 0) rows.push_back(order_[at]);
      arrange(rows);
    } else {
      for (int64_t i = 0; i < count; ++i) meta_[kHead] = std::min(meta_[kHead], slot[i]);
    }
  }

  // The shared state was replaced as a whole.
  void replaced() {
    if (policy_ == Eviction::kFifo) {
      arrange(oldest_first<int32_t>());
    } else if (meta_[kLive] < capacity_) {
      int64_t free = 0;
      while (free + 1 < capacity_ && tree_.leaf(free) != 0) ++free;
      meta_[kHead] = std::min(meta_[kHead], free);
    }
    rebuild();
  }

  // The slot's priority has changed.
  void touched(int64_t slot) {
    if (policy_ == Eviction::kLowest) stale_[slot >> kFanoutBits] = 1;
  }

  // Derive everything that is not in the shared state from it: after a load, or when another device wrote it.
  void rebuild() {
    if (policy_ == Eviction::kLowest) {
      const int64_t blocks = (capacity_ + kFanout - 1) >> kFanoutBits;
      block_lowest_.assign(blocks, -1);
      stale_.assign(blocks, 1);
    } else if (policy_ == Eviction::kClassBalanced) {
      next_.assign(capacity_, -1);
      queue_.assign(histogram_.classes() + 1, Queue{});
      for (const int64_t slot : oldest_first<int64_t>()) push(slot);
    }
  }

  int64_t bytes() const {
    return static_cast<int64_t>(block_lowest_.size() * sizeof(int32_t) + stale_.size() +
                                next_.size() * sizeof(int32_t) + queue_.size() * sizeof(Queue));
  }

 private:
  struct Queue {
    int32_t head = -1, tail = -1;
    int64_t length = 0;
  };

  // Insertions since the row in `slot` came; right as long as that is below 2^32.
  uint32_t age(int64_t slot) const { return static_cast<uint32_t>(meta_[kInserted]) - generation_[slot]; }

  template <typename Slot>
  std::vector<Slot> oldest_first() const {
    std::vector<Slot> slots;
    slots.reserve(meta_[kLive]);
    for (int64_t slot = 0; slot < capacity_; ++slot)
      if (tree_.leaf(slot) != 0) slots.push_back(static_cast<Slot>(slot));
    std::sort(slots.begin(), slots.end(), [this](Slot a, Slot b) { return age(a) > age(b); });
    return slots;
  }

  int64_t after(int64_t position) const { return position + 1 == capacity_ ? 0 : position + 1; }

  int64_t advance_head() {
    const int64_t position = meta_[kHead];
    meta_[kHead] = after(position);
    return position;
  }

  // Write `order`: the free slots from the head on, then these rows.
  void arrange(const std::vector<int32_t>& rows) {
    int64_t at = meta_[kHead];
    for (int64_t slot = 0; slot < capacity_; ++slot) {
      if (tree_.leaf(slot) != 0) continue;
      order_[at] = static_cast<int32_t>(slot);
      at = after(at);
    }
    for (const int32_t slot : rows) {
      order_[at] = slot;
      at = after(at);
    }
  }

  bool goes_before(int64_t a, int64_t b) const {
    const uint32_t qa = tree_.leaf(a), qb = tree_.leaf(b);
    return qa != qb ? qa < qb : age(a) > age(b);
  }

  // The row of least priority, the oldest of equals. Minima are kept by block and renewed where priorities
  // moved.
  int64_t lowest() {
    int64_t best = -1;
    for (size_t block = 0; block < block_lowest_.size(); ++block) {
      if (stale_[block]) {
        const int64_t first = static_cast<int64_t>(block) << kFanoutBits;
        const int64_t last = std::min(first + kFanout, capacity_);
        int64_t winner = -1;
        for (int64_t slot = first; slot < last; ++slot)
          if (tree_.leaf(slot) != 0 && (winner < 0 || goes_before(slot, winner))) winner = slot;
        block_lowest_[block] = static_cast<int32_t>(winner);
        stale_[block] = 0;
      }
      const int64_t slot = block_lowest_[block];
      if (slot >= 0 && (best < 0 || goes_before(slot, best))) best = slot;
    }
    return best;
  }

  // Rows without a class share one queue of their own.
  Queue& queue_of(int64_t slot) {
    const int32_t label = labels_[slot];
    return queue_[histogram_.counts(label) ? label : histogram_.classes()];
  }

  // Among the longest queues, the one whose oldest row is oldest.
  int64_t oldest_of_largest_class() const {
    const Queue* best = nullptr;
    for (const Queue& queue : queue_) {
      if (queue.length == 0) continue;
      if (best == nullptr || queue.length > best->length ||
          (queue.length == best->length && age(queue.head) > age(best->head)))
        best = &queue;
    }
    return best->head;
  }

  void push(int64_t slot) {
    Queue& queue = queue_of(slot);
    next_[slot] = -1;
    if (queue.length++ == 0)
      queue.head = static_cast<int32_t>(slot);
    else
      next_[queue.tail] = static_cast<int32_t>(slot);
    queue.tail = static_cast<int32_t>(slot);
  }

  // Evicted rows are at the head of their queue; only a removal on request walks.
  void unlink(int64_t slot) {
    Queue& queue = queue_of(slot);
    int32_t before = -1;
    for (int32_t at = queue.head; at != slot; at = next_[at]) before = at;
    (before < 0 ? queue.head : next_[before]) = next_[slot];
    if (queue.tail == slot) queue.tail = before;
    --queue.length;
  }

  Eviction policy_;
  const PriorityTree& tree_;
  const ClassHistogram& histogram_;
  int64_t* meta_;
  const uint32_t* generation_;
  const int32_t* labels_;
  int32_t* order_;
  int64_t capacity_;
  std::vector<int32_t> block_lowest_;
  std::vector<uint8_t> stale_;
  std::vector<int32_t> next_;
  std::vector<Queue> queue_;
};

}  // namespace kdfast
