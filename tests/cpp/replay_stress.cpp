// The C++ core under sanitizers: threads that share a buffer, random operations against a rebuild, and a
// snapshot decoder fed with damaged files. Exits 0 when all holds; a sanitizer ends the process otherwise.
#include <cstdio>
#include <random>
#include <thread>

#include "replay_core.hpp"
#include "snapshot.hpp"

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
  std::vector<uint8_t> rows = std::vector<uint8_t>(kCapacity * kRowBytes);

  Memory() { meta[kMaxPriority] = -1; }

  ReplayState state() {
    return {leaves.data(), sums.data(), delta.data(),  generation.data(),
            labels.data(), meta.data(), counts.data(), rows.data()};
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

bool stress(Eviction policy) {
  Memory memory;
  ReplayCore core(kCapacity, kRowBytes, kClasses, policy, {0.6, 1e-6, 4194304.0}, false, memory.state());
  std::vector<std::thread> threads;
  for (unsigned seed = 0; seed < 4; ++seed) threads.emplace_back(work, std::ref(core), seed, 400);
  for (std::thread& thread : threads) thread.join();
  uint64_t total = 0;
  int64_t live = 0, counted = 0;
  for (uint32_t leaf : memory.leaves) total += leaf, live += leaf != 0;
  for (int64_t count : memory.counts) counted += count;
  return core.consistent() && total == memory.sums[0] && live == memory.meta[kLive] && counted == live;
}

// Damaged, spliced and extended files, half of them with a header checksum that fits.
bool fuzz() {
  std::mt19937 random(1);
  std::vector<std::vector<uint8_t>> contents = {{1, 2, 3}, {}, std::vector<uint8_t>(500, 7)};
  std::vector<Section> sections;
  for (const auto& content : contents)
    sections.push_back({"part" + std::to_string(sections.size()), content.data(), content.size()});
  std::vector<uint8_t> whole = snapshot_head(sections);
  for (const Section& section : sections) {
    whole.resize(detail::aligned(whole.size()), 0);
    whole.insert(whole.end(), section.data, section.data + section.size);
  }
  if (decode_snapshot(whole.data(), whole.size()).size() != 3) return false;
  const uint64_t table_end = kSnapshotHeader + 3 * kSnapshotEntry;
  for (int round = 0; round < 100000; ++round) {
    std::vector<uint8_t> bytes = whole;
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

int main() {
  for (Eviction policy : {Eviction::kFifo, Eviction::kLowest, Eviction::kClassBalanced})
    if (!stress(policy)) return std::puts("inconsistent after the threads"), 1;
  if (!fuzz()) return std::puts("the snapshot did not come back"), 1;
  return 0;
}
