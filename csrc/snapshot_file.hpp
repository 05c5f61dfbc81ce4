// Snapshot files: written whole or not at all, and looked at before memory is taken for them.
#pragma once

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <random>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "snapshot.hpp"

namespace kdfast {

namespace detail {

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

  void read(uint64_t offset, uint8_t* data, uint64_t size) {
    while (size > 0) {
      const ssize_t done =
          ::pread(handle_, data, std::min<uint64_t>(size, 1 << 30), static_cast<off_t>(offset));
      if (done < 0 && errno == EINTR) continue;
      if (done < 0) fail("cannot read");
      if (done == 0) throw SnapshotError("became shorter while it was read");
      data += done;
      offset += static_cast<uint64_t>(done);
      size -= static_cast<uint64_t>(done);
    }
  }

  struct stat info() {
    struct stat found;
    if (::fstat(handle_, &found) != 0) fail("cannot read");
    return found;
  }

  void sync() {
    if (::fsync(handle_) != 0) fail("cannot write");
  }

  // Whether the lock is ours now; it goes when the file is closed, however the process ends.
  bool lock() { return ::flock(handle_, LOCK_EX | LOCK_NB) == 0; }

 private:
  [[noreturn]] void fail(const char* what) {
    throw std::system_error(errno, std::generic_category(), path_ + ": " + what);
  }

  std::string path_;
  int handle_;
};

constexpr char kTemporaryMark[] = ".tmp-";
constexpr size_t kTemporaryDigits = 16, kNameLimit = 255;

// A path's folder, and what the names of its temporaries begin with.
inline std::pair<std::string, std::string> temporaries_of(const std::string& path) {
  const size_t slash = path.find_last_of('/');
  const std::string folder = slash == std::string::npos ? "." : path.substr(0, std::max<size_t>(slash, 1));
  const std::string name = slash == std::string::npos ? path : path.substr(slash + 1);
  const size_t room = kNameLimit - (sizeof kTemporaryMark - 1) - kTemporaryDigits;
  return {folder, name.substr(0, room) + kTemporaryMark};
}

inline std::string random_digits() {
  static std::atomic<uint64_t> calls{0};
  std::random_device device;
  uint64_t bits = (uint64_t{device()} << 32 | device()) ^ static_cast<uint64_t>(::getpid()) << 20 ^ ++calls;
  bits ^= static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
  std::string out(kTemporaryDigits, '0');
  for (char& digit : out) {
    digit = "0123456789abcdef"[bits & 15];
    bits >>= 4;
  }
  return out;
}

}  // namespace detail

// Remove what killed writers of `path` have left behind: temporaries that nobody holds locked.
inline int64_t sweep_temporaries(const std::string& path) {
  const auto [folder, prefix] = detail::temporaries_of(path);
  DIR* const listing = ::opendir(folder.c_str());
  if (listing == nullptr) return 0;  // the write that follows says why
  std::vector<std::string> found;
  while (const dirent* entry = ::readdir(listing)) {
    const std::string name = entry->d_name;
    if (name.size() == prefix.size() + detail::kTemporaryDigits &&
        name.compare(0, prefix.size(), prefix) == 0 &&
        name.find_first_not_of("0123456789abcdef", prefix.size()) == std::string::npos)
      found.push_back(folder + "/" + name);
  }
  ::closedir(listing);
  int64_t removed = 0;
  for (const std::string& name : found) {
    try {
      detail::File file(name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK);
      if (S_ISREG(file.info().st_mode) && file.lock() && ::unlink(name.c_str()) == 0) ++removed;
    } catch (const std::system_error&) {
      // Gone meanwhile, or somebody else's.
    }
  }
  return removed;
}

namespace detail {

// A new file beside `path` under a name that nobody else has, locked; its name goes to `temporary`.
inline std::unique_ptr<File> open_temporary(const std::string& path, std::string& temporary) {
  const auto [folder, prefix] = temporaries_of(path);
  for (;;) {
    temporary = folder + "/" + prefix + random_digits();
    auto file = std::make_unique<File>(temporary, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW);
    // Where a file system has no locks, nobody sweeps either. A sweeper may come before the lock: then anew.
    const bool taken = !file->lock() && errno == EWOULDBLOCK;
    if (!taken && file->info().st_nlink > 0) return file;
  }
}

}  // namespace detail

// Write to a temporary file beside `path`, sync it, and rename it into place: a crash leaves the old file.
// The temporary has a name of its own, so that writers of one path do not meet, and is locked while it is
// written.
inline void write_snapshot(const std::string& path, const std::vector<Section>& sections) {
  sweep_temporaries(path);
  std::string temporary;
  const std::unique_ptr<detail::File> held = detail::open_temporary(path, temporary);
  detail::File& file = *held;
  try {
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
    detail::File(detail::temporaries_of(path).first, O_RDONLY | O_DIRECTORY).sync();
  } catch (...) {
    ::unlink(temporary.c_str());
    throw;
  }
}

// A snapshot file that is open: its table first, its contents only when asked for.
class SnapshotFile {
 public:
  // Nothing waits: a pipe or a device is refused.
  explicit SnapshotFile(const std::string& path) : file_(path, O_RDONLY | O_NONBLOCK) {
    const struct stat info = file_.info();
    if (!S_ISREG(info.st_mode)) throw SnapshotError("not a regular file");
    size_ = static_cast<uint64_t>(info.st_size);
    std::vector<uint8_t> head(std::min(size_, kSnapshotHeader + 8));
    file_.read(0, head.data(), head.size());
    head.resize(snapshot_head_size(head.data(), size_));
    file_.read(0, head.data(), head.size());
    entries_ = decode_table(head.data(), size_);
  }

  uint64_t size() const { return size_; }
  const std::vector<SectionEntry>& entries() const { return entries_; }

  // One section, its checksum verified.
  std::vector<uint8_t> section(const std::string& name, uint64_t limit) {
    for (const SectionEntry& entry : entries_) {
      if (entry.name != name) continue;
      if (entry.size > limit)
        throw SnapshotError("section '" + name + "' has " + std::to_string(entry.size) + " bytes; at most " +
                            std::to_string(limit) + " are read");
      std::vector<uint8_t> data(entry.size);
      file_.read(entry.offset, data.data(), data.size());
      if (entry.crc != Crc64::of(data.data(), data.size()))
        throw SnapshotError("damaged: checksum mismatch in section '" + name + "'");
      return data;
    }
    throw SnapshotError("no section '" + name + "'");
  }

  // All `size()` bytes, unchecked.
  void read(uint8_t* data) { file_.read(0, data, size_); }

 private:
  detail::File file_;
  uint64_t size_ = 0;
  std::vector<SectionEntry> entries_;
};

}  // namespace kdfast
