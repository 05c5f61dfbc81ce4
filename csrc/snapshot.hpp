// The snapshot file: named byte sections, each with its own checksum, written whole or not at all.
//
//   0   "KDFSNAP\0"   8  u32 version   12  u32 sections   16  u64 size of the file   24  the table
//   table entry: name, zero padded to 24 bytes; u64 offset; u64 length; u64 CRC-64 of the section
//   after the table: u64 CRC-64 of everything before it; then the sections, each aligned to 64, zeros between
//
// All numbers are little-endian. Every byte is under a checksum or must be zero, and a CRC finds any error of
// up to 64 bits in a row: no single damaged byte passes. The decoder trusts nothing it has not bounded.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace kdfast {

constexpr char kSnapshotMagic[8] = {'K', 'D', 'F', 'S', 'N', 'A', 'P', '\0'};
constexpr uint32_t kSnapshotVersion = 1;
constexpr uint64_t kSnapshotHeader = 24, kSnapshotEntry = 48, kSnapshotName = 24, kSnapshotAlign = 64;
constexpr uint32_t kSnapshotMaxSections = 1024;

class SnapshotError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct Section {
  std::string name;
  const uint8_t* data = nullptr;
  uint64_t size = 0;
};

// CRC-64/XZ (ECMA-182, reflected), eight bytes a step.
class Crc64 {
 public:
  static uint64_t of(const uint8_t* data, uint64_t size) {
    static const Crc64 tables;
    uint64_t crc = ~uint64_t{0};
    for (; size >= 8; size -= 8, data += 8) {
      uint64_t word;
      std::memcpy(&word, data, 8);
      word ^= crc;
      crc = 0;
      for (int k = 0; k < 8; ++k) crc ^= tables.table_[7 - k][word >> (8 * k) & 0xFF];
    }
    for (; size > 0; --size) crc = tables.table_[0][(crc ^ *data++) & 0xFF] ^ crc >> 8;
    return ~crc;
  }

 private:
  Crc64() {
    for (uint64_t byte = 0; byte < 256; ++byte) {
      uint64_t crc = byte;
      for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0xC96C5795D7870F42 : 0);
      table_[0][byte] = crc;
    }
    for (int k = 1; k < 8; ++k)
      for (int byte = 0; byte < 256; ++byte)
        table_[k][byte] = table_[0][table_[k - 1][byte] & 0xFF] ^ table_[k - 1][byte] >> 8;
  }

  std::array<std::array<uint64_t, 256>, 8> table_;
};

namespace detail {

inline uint64_t aligned(uint64_t offset) {
  return (offset + kSnapshotAlign - 1) / kSnapshotAlign * kSnapshotAlign;
}

template <typename T>
void put(std::vector<uint8_t>& out, T value) {
  for (size_t k = 0; k < sizeof(T); ++k) out.push_back(static_cast<uint8_t>(value >> (8 * k)));
}

template <typename T>
T get(const uint8_t* data) {
  T value = 0;
  for (size_t k = 0; k < sizeof(T); ++k) value |= static_cast<T>(data[k]) << (8 * k);
  return value;
}

}  // namespace detail

// The header, table and table checksum for these sections.
inline std::vector<uint8_t> snapshot_head(const std::vector<Section>& sections) {
  if (sections.size() > kSnapshotMaxSections) throw SnapshotError("snapshot: too many sections");
  std::vector<uint8_t> head(kSnapshotMagic, kSnapshotMagic + sizeof kSnapshotMagic);
  detail::put(head, kSnapshotVersion);
  detail::put(head, static_cast<uint32_t>(sections.size()));
  uint64_t offset = detail::aligned(kSnapshotHeader + sections.size() * kSnapshotEntry + 8), end = offset;
  std::vector<uint64_t> offsets;
  for (const Section& section : sections) {
    offsets.push_back(offset);
    end = offset + section.size;
    offset = detail::aligned(end);
  }
  detail::put(head, end);
  for (size_t i = 0; i < sections.size(); ++i) {
    const Section& section = sections[i];
    if (section.name.empty() || section.name.size() >= kSnapshotName)
      throw SnapshotError("snapshot: section name '" + section.name + "' must have 1 to 23 bytes");
    head.insert(head.end(), section.name.begin(), section.name.end());
    head.insert(head.end(), kSnapshotName - section.name.size(), 0);
    detail::put(head, offsets[i]);
    detail::put(head, section.size);
    detail::put(head, Crc64::of(section.data, section.size));
  }
  detail::put(head, Crc64::of(head.data(), head.size()));
  return head;
}

// What the table says of one section.
struct SectionEntry {
  std::string name;
  uint64_t offset = 0, size = 0, crc = 0;
};

// Bytes of header, table and the table's checksum, as the first kSnapshotHeader bytes of a file say.
inline uint64_t snapshot_head_size(const uint8_t* data, uint64_t size) {
  using detail::get;
  if (size < kSnapshotHeader + 8) throw SnapshotError("truncated: " + std::to_string(size) + " bytes");
  if (std::memcmp(data, kSnapshotMagic, sizeof kSnapshotMagic) != 0)
    throw SnapshotError("not a replay snapshot (wrong magic number)");
  const uint32_t version = get<uint32_t>(data + 8), count = get<uint32_t>(data + 12);
  if (version != kSnapshotVersion)
    throw SnapshotError("snapshot version " + std::to_string(version) + "; this build reads version " +
                        std::to_string(kSnapshotVersion));
  if (count > kSnapshotMaxSections) throw SnapshotError("damaged: " + std::to_string(count) + " sections");
  const uint64_t head = kSnapshotHeader + count * kSnapshotEntry + 8;
  if (size < head) throw SnapshotError("truncated inside the section table");
  return head;
}

// The table of a file of `size` bytes, whose head is in memory: sections follow each other and end with the
// file.
inline std::vector<SectionEntry> decode_table(const uint8_t* data, uint64_t size) {
  using detail::get;
  const uint64_t head = snapshot_head_size(data, size), table_end = head - 8;
  if (get<uint64_t>(data + table_end) != Crc64::of(data, table_end))
    throw SnapshotError("damaged: checksum mismatch in the header");
  if (get<uint64_t>(data + 16) != size)
    throw SnapshotError("truncated or extended: " + std::to_string(size) + " bytes, written as " +
                        std::to_string(get<uint64_t>(data + 16)));
  std::vector<SectionEntry> entries;
  uint64_t at = head;
  for (const uint8_t* entry = data + kSnapshotHeader; entry < data + table_end; entry += kSnapshotEntry) {
    const uint8_t* name_end = std::find(entry, entry + kSnapshotName, 0);
    if (name_end == entry || !std::all_of(entry, name_end, [](uint8_t c) { return c > 32 && c < 127; }))
      throw SnapshotError("damaged: section " + std::to_string(entries.size()) + " has no printable name");
    const std::string name(entry, name_end);
    if (!std::all_of(name_end, entry + kSnapshotName, [](uint8_t c) { return c == 0; }))
      throw SnapshotError("damaged: section '" + name + "' has bytes after its name");
    for (const SectionEntry& other : entries)
      if (other.name == name) throw SnapshotError("damaged: section '" + name + "' is there twice");
    const uint64_t offset = get<uint64_t>(entry + kSnapshotName),
                   length = get<uint64_t>(entry + kSnapshotName + 8);
    if (offset != detail::aligned(at) || offset > size || length > size - offset)
      throw SnapshotError("damaged: section '" + name + "' lies outside the file");
    entries.push_back({name, offset, length, get<uint64_t>(entry + kSnapshotName + 16)});
    at = offset + length;
  }
  if (size - at > kSnapshotAlign)  // fewer are padding, which must be zero
    throw SnapshotError("damaged: bytes after the last section");
  return entries;
}

// The sections of a snapshot in memory, all checks done; they point into `data`.
inline std::vector<Section> decode_snapshot(const uint8_t* data, uint64_t size) {
  std::vector<Section> sections;
  uint64_t at = 0;
  const auto check_padding = [&](uint64_t end) {
    for (; at < end; ++at)
      if (data[at] != 0)
        throw SnapshotError("damaged: padding at byte " + std::to_string(at) + " is not zero");
  };
  const std::vector<SectionEntry> entries = decode_table(data, size);
  at = snapshot_head_size(data, size);
  for (const SectionEntry& entry : entries) {
    check_padding(entry.offset);
    if (entry.crc != Crc64::of(data + entry.offset, entry.size))
      throw SnapshotError("damaged: checksum mismatch in section '" + entry.name + "'");
    sections.push_back({entry.name, data + entry.offset, entry.size});
    at = entry.offset + entry.size;
  }
  check_padding(size);
  return sections;
}

}  // namespace kdfast
