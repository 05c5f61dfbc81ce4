// The snapshot file: named byte sections, each with its own checksum, written whole or not at all.
//
//   0   "KDFSNAP\0"   8  u32 version   12  u32 sections   16  u64 size of the file   24  the table
//   table entry: name, zero padded to 24 bytes; u64 offset; u64 length; u64 CRC-64 of the section
//   after the table: u64 CRC-64 of everything before it; then the sections, each aligned to 64, zeros between
//
// All numbers are little-endian. Every byte is under a checksum or must be zero, and a CRC finds any error of
// up to 64 bits in a row: no single damaged byte passes. The decoder trusts nothing it has not bounded.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <system_error>
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

class File {
 public:
  File(const std::string& path, int flags)
      : path_(path), handle_(::open(path.c_str(), flags | O_CLOEXEC, 0644)) {
    if (handle_ < 0) fail("cannot open");
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  ~File() {
    if (handle_ >= 0) ::close(handle_);
  }

  void write(const uint8_t* data, uint64_t size) {
    while (size > 0) {
      const ssize_t done = ::write(handle_, data, std::min<uint64_t>(size, 1 << 30));
      if (done < 0 && errno == EINTR) continue;
      if (done < 0) fail("cannot write");
      data += done;
      size -= static_cast<uint64_t>(done);
    }
  }

  void read(uint8_t* data, uint64_t size) {
    while (size > 0) {
      const ssize_t done = ::read(handle_, data, std::min<uint64_t>(size, 1 << 30));
      if (done < 0 && errno == EINTR) continue;
      if (done < 0) fail("cannot read");
      if (done == 0) throw SnapshotError(path_ + ": became shorter while it was read");
      data += done;
      size -= static_cast<uint64_t>(done);
    }
  }

  uint64_t size() {
    struct stat info;
    if (::fstat(handle_, &info) != 0) fail("cannot read");
    return static_cast<uint64_t>(info.st_size);
  }

  void sync() {
    if (::fsync(handle_) != 0) fail("cannot write");
  }

 private:
  [[noreturn]] void fail(const char* what) {
    throw std::system_error(errno, std::generic_category(), path_ + ": " + what);
  }

  std::string path_;
  int handle_;
};

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

// Write to a temporary file beside `path`, sync it, and rename it into place: a crash leaves the old file.
inline void write_snapshot(const std::string& path, const std::vector<Section>& sections) {
  const std::string temporary = path + ".tmp." + std::to_string(::getpid());
  const std::string::size_type slash = path.find_last_of('/');
  const std::string directory = slash == std::string::npos ? "." : path.substr(0, std::max<size_t>(slash, 1));
  try {
    detail::File file(temporary, O_WRONLY | O_CREAT | O_TRUNC);
    const std::vector<uint8_t> head = snapshot_head(sections);
    const uint8_t zeros[kSnapshotAlign] = {};
    file.write(head.data(), head.size());
    uint64_t at = head.size();
    for (const Section& section : sections) {
      file.write(zeros, detail::aligned(at) - at);
      file.write(section.data, section.size);
      at = detail::aligned(at) + section.size;
    }
    if (sections.empty()) file.write(zeros, detail::aligned(at) - at);
    file.sync();
    if (std::rename(temporary.c_str(), path.c_str()) != 0)
      throw std::system_error(errno, std::generic_category(), path + ": cannot be put in place");
    detail::File(directory, O_RDONLY | O_DIRECTORY).sync();
  } catch (...) {
    ::unlink(temporary.c_str());
    throw;
  }
}

// The sections of a snapshot in memory, all checks done; they point into `data`.
inline std::vector<Section> decode_snapshot(const uint8_t* data, uint64_t size) {
  using detail::get;
  if (size < kSnapshotHeader + 8) throw SnapshotError("truncated: " + std::to_string(size) + " bytes");
  if (std::memcmp(data, kSnapshotMagic, sizeof kSnapshotMagic) != 0)
    throw SnapshotError("not a replay snapshot (wrong magic number)");
  const uint32_t version = get<uint32_t>(data + 8), count = get<uint32_t>(data + 12);
  if (version != kSnapshotVersion)
    throw SnapshotError("snapshot version " + std::to_string(version) + "; this build reads version " +
                        std::to_string(kSnapshotVersion));
  if (count > kSnapshotMaxSections) throw SnapshotError("damaged: " + std::to_string(count) + " sections");
  const uint64_t table_end = kSnapshotHeader + count * kSnapshotEntry;
  if (size < table_end + 8) throw SnapshotError("truncated inside the section table");
  if (get<uint64_t>(data + table_end) != Crc64::of(data, table_end))
    throw SnapshotError("damaged: checksum mismatch in the header");
  if (get<uint64_t>(data + 16) != size)
    throw SnapshotError("truncated or extended: " + std::to_string(size) + " bytes, written as " +
                        std::to_string(get<uint64_t>(data + 16)));
  std::vector<Section> sections;
  uint64_t at = table_end + 8;
  const auto check_padding = [&](uint64_t end) {
    for (; at < end; ++at)
      if (data[at] != 0)
        throw SnapshotError("damaged: padding at byte " + std::to_string(at) + " is not zero");
  };
  for (uint32_t i = 0; i < count; ++i) {
    const uint8_t* entry = data + kSnapshotHeader + i * kSnapshotEntry;
    const uint8_t* name_end = std::find(entry, entry + kSnapshotName, 0);
    if (name_end == entry || !std::all_of(entry, name_end, [](uint8_t c) { return c > 32 && c < 127; }))
      throw SnapshotError("damaged: section " + std::to_string(i) + " has no printable name");
    const std::string name(entry, name_end);
    const uint64_t offset = get<uint64_t>(entry + kSnapshotName),
                   length = get<uint64_t>(entry + kSnapshotName + 8);
    if (offset != detail::aligned(at) || offset > size || length > size - offset)
      throw SnapshotError("damaged: section '" + name + "' lies outside the file");
    check_padding(offset);
    if (get<uint64_t>(entry + kSnapshotName + 16) != Crc64::of(data + offset, length))
      throw SnapshotError("damaged: checksum mismatch in section '" + name + "'");
    sections.push_back({name, data + offset, length});
    at = offset + length;
  }
  check_padding(size);
  return sections;
}

}  // namespace kdfast
