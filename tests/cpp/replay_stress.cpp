// The C++ core under sanitizers: eight threads that share a buffer and write, copy, save and replace it, a
// shared tree, forks while threads work, and a snapshot decoder fed with damaged files. Exits 0 when all
// holds; a sanitizer ends the process otherwise.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <numeric>
#include <random>
#include <thread>

#include "replay_core.hpp"
#include "shared_tree.hpp"
#include "snapshot_file.hpp"

using namespace kdfast;

namespace {

constexpr int64_t kCapacity = 700, kRowBytes = 24, kClasses = 5, kBatch = 64;

struct Memory {
  TreeLayout layout{kCapacity};
  std::vector<uint32_t> leaves = std::vector<uint32_t>(kCapacity);
  std::vector<uint64_t> sums = std::vector<uint64_t>(layout.sums);
  std::vector<float> delta = std::vector<float>(kCapacity);
  std::vector<uint32_t> generation = std::vector<uint32_t>(kCapacity);
  std::vector<int32_t> labels = std::vector<int32_t>(kCapacity, -1);
  std::vector<int64_t> meta = std::vector<int64_t>(kMetaWords);
  std::vector<int64_t> counts = std::vector<int64_t>(kClasses);
  std::vector<int32_t> order = std::vector<int32_t>(kCapacity);
  std::vector<uint8_t> rows = std::vector<uint8_t>(kCapacity * kRowBytes);

  Memory() {
    meta[kMaxPriority] = meta[kPendingMax] = -1;
    std::iota(order.begin(), order.end(), 0);
  }

  ReplayState state() {
    return {leaves.data(), sums.data(),   delta.data(), generation.data(), labels.data(),
            meta.data(),   counts.data(), order.data(), rows.data()};
  }
};

void work(ReplayCore& core, unsigned seed, int rounds) {
  std::mt19937 random(seed);
  std::vector<uint8_t> rows(kBatch * kRowBytes);
  std::vector<float> normalized(kBatch * kRowBytes), priority(kBatch), weight(kBatch), probability(kBatch);
  std::vector<int64_t> labels(kBatch), index(kBatch), generation(kBatch);
  const std::vector<float> gain(3, 0.1F), bias(3, -1.0F);
  for (int round = 0; round < rounds; ++round) {
    for (int64_t i = 0; i < kBatch; ++i) {
      priority[i] = random() % 50 == 0 ? NAN : static_cast<float>(random() % 1000) * 0.01F;
      labels[i] = static_cast<int64_t>(random() % kClasses);
    }
    const int64_t count = 1 + random() % kBatch;
    core.add(count, rows.data(), labels.data(), round % 3 ? priority.data() : nullptr, index.data());
    const Normalize normalize = round % 2 ? Normalize{gain.data(), bias.data(), 3} : Normalize{};
    auto* out = round % 2 ? reinterpret_cast<uint8_t*>(normalized.data()) : rows.data();
    core.sample(kBatch, 0.4, round % 3 != 0, normalize,
                {out, labels.data(), index.data(), generation.data(), weight.data(), probability.data()});
    core.update(kBatch, index.data(), priority.data(), generation.data(), round % 2);
    if (round % 16 == 0) core.remove(4, index.data());
    if (round % 64 == 0) core.rebuild();
  }
}

// What copies of one moment must be: the root is the sum of the leaves, and as many are live as are counted.
bool whole(const std::vector<ReplayCopy>& copies) {
  const auto* leaves = reinterpret_cast<const uint32_t*>(copies[0].data.get());
  const auto* sums = reinterpret_cast<const uint64_t*>(copies[1].data.get());
  const auto* meta = reinterpret_cast<const int64_t*>(copies[2].data.get());
  uint64_t total = 0;
  int64_t live = 0;
  for (int64_t slot = 0; slot < kCapacity; ++slot) total += leaves[slot], live += leaves[slot] != 0;
  return total == sums[0] && live == meta[kLive];
}

// Reads everything while others write, and now and then puts a copy back.
void look(ReplayCore& core, const std::string& path, std::atomic<bool>& good, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    std::vector<ReplayCopy> all =
        core.copy({"leaves", "sums", "meta", "delta", "generation", "labels", "class_counts", "rows"});
    if (!whole(all)) good = false;
    if (core.word(kLive) < 0 || core.derived_bytes() < 0 || !core.consistent()) good = false;
    std::vector<Section> sections;
    for (const ReplayCopy& copy : all)
      sections.push_back(
          {"part" + std::to_string(sections.size()), copy.data.get(), static_cast<uint64_t>(copy.bytes)});
    if (round % 8 == 0) {
      write_snapshot(path, sections);
      SnapshotFile file(path);
      std::vector<uint8_t> bytes(file.size());
      file.read(bytes.data());
      if (decode_snapshot(bytes.data(), bytes.size()).size() != all.size()) good = false;
    }
    if (round % 32 == 5) {
      ReplayState state{};
      state.leaves = reinterpret_cast<uint32_t*>(all[0].data.get());
      state.sums = reinterpret_cast<uint64_t*>(all[1].data.get());
      state.meta = reinterpret_cast<int64_t*>(all[2].data.get());
      state.delta = reinterpret_cast<float*>(all[3].data.get());
      state.generation = reinterpret_cast<uint32_t*>(all[4].data.get());
      state.labels = reinterpret_cast<int32_t*>(all[5].data.get());
      state.class_counts = reinterpret_cast<int64_t*>(all[6].data.get());
      state.rows = all[7].data.get();
      core.load(state, all[7].bytes / kRowBytes);
    }
  }
}

bool stress(Eviction policy, const std::string& folder) {
  Memory memory;
  ReplayCore core(kCapacity, kRowBytes, kClasses, policy, {0.6, 1e-6, 4194304.0}, false, memory.state());
  std::atomic<bool> good{true};
  std::vector<std::thread> threads;
  for (unsigned seed = 0; seed < 5; ++seed) threads.emplace_back(work, std::ref(core), seed, 400);
  for (const char* name : {"/one", "/one", "/two"})
    threads.emplace_back(look, std::ref(core), folder + name, std::ref(good), 200);
  for (std::thread& thread : threads) thread.join();
  uint64_t total = 0;
  int64_t live = 0, counted = 0;
  for (uint32_t leaf : memory.leaves) total += leaf, live += leaf != 0;
  for (int64_t count : memory.counts) counted += count;
  if (policy == Eviction::kFifo) {
    std::vector<int32_t> slots = memory.order;
    std::sort(slots.begin(), slots.end());
    for (int32_t slot = 0; slot < kCapacity; ++slot)
      if (slots[slot] != slot) return false;
  }
  return good && core.consistent() && total == memory.sums[0] && live == memory.meta[kLive] &&
         counted == live;
}

// One tree, eight threads.
bool share_tree() {
  SharedTree tree(3000);
  std::vector<std::thread> threads;
  for (unsigned seed = 0; seed < 8; ++seed)
    threads.emplace_back([&tree, seed] {
      std::mt19937 random(seed);
      for (int round = 0; round < 300; ++round) {
        std::vector<int64_t> slot(1 + random() % 200);
        std::vector<uint32_t> quantum(slot.size());
        for (size_t i = 0; i < slot.size(); ++i) {
          slot[i] = random() % 3000;
          quantum[i] = 1 + random() % 1000;
        }
        tree.set(static_cast<int64_t>(slot.size()), slot.data(), quantum.data());
        tree.sample(static_cast<int64_t>(slot.size()), seed, round, round % 2, slot.data());
        const uint64_t first = 0;
        tree.find(1, &first, slot.data());
        if (tree.leaves().size() != 3000 || tree.sums().empty() || tree.total() == 0) std::abort();
      }
    });
  for (std::thread& thread : threads) thread.join();
  return tree.consistent();
}

// Children forked while other threads are inside find free locks and whole state.
bool fork_while_working() {
  Memory memory;
  ReplayCore core(kCapacity, kRowBytes, kClasses, Eviction::kLowest, {0.6, 1e-6, 4194304.0}, false,
                  memory.state());
  std::vector<std::thread> threads;
  for (unsigned seed = 0; seed < 3; ++seed) threads.emplace_back(work, std::ref(core), seed, 300);
  bool good = true;
  for (int round = 0; round < 30; ++round) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(20);  // a child that hangs is ended, and not by exit code 0
      const bool fine = whole(core.copy({"leaves", "sums", "meta"})) && core.consistent();
      _exit(fine ? 0 : 1);
    }
    int status = 1;
    waitpid(child, &status, 0);
    good = good && status == 0;
  }
  for (std::thread& thread : threads) thread.join();
  return good && core.consistent();
}

// Damaged, spliced and extended files, half of them with a header checksum that fits.
bool fuzz() {
  std::mt19937 random(1);
  std::vector<std::vector<uint8_t>> contents = {{1, 2, 3}, {}, std::vector<uint8_t>(500, 7)};
  std::vector<Section> sections;
  for (const auto& content : contents)
    sections.push_back({"part" + std::to_string(sections.size()), content.data(), content.size()});
  std::vector<uint8_t> intact = snapshot_head(sections);
  for (const Section& section : sections) {
    intact.resize(detail::aligned(intact.size()), 0);
    intact.insert(intact.end(), section.data, section.data + section.size);
  }
  if (decode_snapshot(intact.data(), intact.size()).size() != 3) return false;
  const uint64_t table_end = kSnapshotHeader + 3 * kSnapshotEntry;
  for (int round = 0; round < 100000; ++round) {
    std::vector<uint8_t> bytes = intact;
    const bool header_only = random() % 2;
    for (unsigned k = 0; k <= random() % 4; ++k)
      bytes[random() % (header_only ? table_end : bytes.size())] = static_cast<uint8_t>(random());
    if (header_only) {
      const uint64_t crc = Crc64::of(bytes.data(), table_end);
      std::memcpy(bytes.data() + table_end, &crc, 8);
    }
    bytes.resize(random() % 4 ? bytes.size() : random() % (bytes.size() + 100));
    bytes.shrink_to_fit();  // so that a read past the end is seen
    try {
      for (const Section& section : decode_snapshot(bytes.data(), bytes.size()))
        if (section.size && Crc64::of(section.data, section.size) == 0) std::puts("");
    } catch (const SnapshotError&) {
    }
  }
  return true;
}

}  // namespace

int main(int count, char** arguments) {
  const std::string folder = count > 1 ? arguments[1] : ".";
  for (Eviction policy : {Eviction::kFifo, Eviction::kLowest, Eviction::kClassBalanced})
    if (!stress(policy, folder)) return std::puts("inconsistent after the threads"), 1;
  if (!share_tree()) return std::puts("the tree is inconsistent after the threads"), 1;
  if (!fork_while_working()) return std::puts("a forked child hung, or found half a state"), 1;
  if (!fuzz()) return std::puts("the snapshot did not come back"), 1;
  return 0;
}
