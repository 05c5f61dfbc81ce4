// What kdfast._C binds: owners of memory, checked views, and batch calls that release the GIL.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <numeric>

#include "replay_core.hpp"
#include "shared_tree.hpp"
#include "snapshot_file.hpp"

namespace py = pybind11;

namespace kdfast {
namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

// The data of an array that must have exactly this dtype, layout and length; no silent copies.
template <typename T>
T* checked(const py::object& object, int64_t length, const char* name, bool writeable = true) {
  if (!py::isinstance<Array<T>>(object))
    throw std::invalid_argument(std::string(name) + ": must be a C-contiguous numpy array of " +
                                std::string(py::str(py::dtype::of<T>())));
  auto array = py::reinterpret_borrow<py::array>(object);
  if (array.size() != length)
    throw std::invalid_argument(std::string(name) + ": got " + std::to_string(array.size()) +
                                " elements, accepted: " + std::to_string(length));
  if (writeable && !array.writeable()) throw std::invalid_argument(std::string(name) + ": is read-only");
  return static_cast<T*>(const_cast<void*>(array.data()));
}

template <typename T>
const T* optional(const py::object& object, int64_t length, const char* name) {
  return object.is_none() ? nullptr : checked<T>(object, length, name, false);
}

template <typename T>
py::array_t<T> as_array(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<int64_t>(values.size()), values.data());
}

py::array_t<int64_t> tree_find(const SharedTree& self, const Array<uint64_t>& targets) {
  py::array_t<int64_t> slots(targets.size());
  int64_t* out = slots.mutable_data();
  const uint64_t* target = targets.data();
  const int64_t count = targets.size();
  py::gil_scoped_release release;
  self.find(count, target, out);
  return slots;
}

py::array_t<int64_t> tree_sample(const SharedTree& self, int64_t count, uint64_t seed, uint64_t step,
                                 bool stratified) {
  if (count < 0)
    throw std::invalid_argument("count: got " + std::to_string(count) + ", accepted: at least 0");
  py::array_t<int64_t> slots(count);
  int64_t* out = slots.mutable_data();
  py::gil_scoped_release release;
  self.sample(count, seed, step, stratified, out);
  return slots;
}

void tree_set(SharedTree& self, const Array<int64_t>& index, const Array<uint32_t>& quantum) {
  if (index.size() != quantum.size())
    throw std::invalid_argument("quantum: got " + std::to_string(quantum.size()) +
                                " elements, accepted: " + std::to_string(index.size()));
  const int64_t count = index.size();
  const int64_t* slot = index.data();
  const uint32_t* value = quantum.data();
  py::gil_scoped_release release;
  self.set(count, slot, value);
}

struct ClassHistogramOwner {
  explicit ClassHistogramOwner(int64_t classes) {
    if (classes < 1)
      throw std::invalid_argument("num_classes: got " + std::to_string(classes) + ", accepted: at least 1");
    counts.resize(classes);
  }

  void change(const Array<int64_t>& labels, bool add) {
    ClassHistogram histogram(static_cast<int64_t>(counts.size()), counts.data());
    const int64_t classes = histogram.classes();
    for (int64_t i = 0; i < labels.size(); ++i)
      if (labels.data()[i] < 0 || labels.data()[i] >= classes)
        throw std::invalid_argument("labels: got " + std::to_string(labels.data()[i]) + ", accepted: 0 to " +
                                    std::to_string(classes - 1));
    if (!add) {
      std::vector<int64_t> left = counts;
      for (int64_t i = 0; i < labels.size(); ++i)
        if (--left[labels.data()[i]] < 0)
          throw std::invalid_argument("labels: got " + std::to_string(labels.data()[i]) +
                                      " more often than it is held, " +
                                      std::to_string(counts[labels.data()[i]]));
    }
    for (int64_t i = 0; i < labels.size(); ++i) {
      const auto label = static_cast<int32_t>(labels.data()[i]);
      add ? histogram.add(label) : histogram.remove(label);
    }
  }
  void add(const Array<int64_t>& labels) { change(labels, true); }
  void remove(const Array<int64_t>& labels) { change(labels, false); }

  std::vector<int64_t> counts;
};

// Slot allocation without rows: which slot each insertion gets, and whom it evicts.
struct OwnedSlots {
  OwnedSlots(int64_t capacity, const std::string& eviction, int64_t classes)
      : layout(capacity),
        leaves(capacity),
        generation(capacity),
        sums(layout.sums),
        delta(capacity),
        labels(capacity, kUnlabelled),
        order(capacity),
        meta(kMetaWords),
        counts(accepted(classes, eviction)) {
    std::iota(order.begin(), order.end(), 0);
    meta[kMaxPriority] = -1;
    // With alpha 1, eps 0 and scale 1 a priority is its own fixed-point mass.
    core = std::make_unique<ReplayCore>(
        capacity, 0, classes, eviction_named(eviction), PriorityRule{1.0, 0.0, 1.0}, true,
        ReplayState{leaves.data(), sums.data(), delta.data(), generation.data(), labels.data(), meta.data(),
                    counts.data(), order.data(), nullptr});
  }

  static int64_t accepted(int64_t classes, const std::string& eviction) {
    const int64_t least = eviction_named(eviction) == Eviction::kClassBalanced ? 1 : 0;
    if (classes < least)
      throw std::invalid_argument("num_classes: got " + std::to_string(classes) + ", accepted: at least " +
                                  std::to_string(least));
    return classes;
  }

  TreeLayout layout;
  std::vector<uint32_t> leaves, generation;
  std::vector<uint64_t> sums;
  std::vector<float> delta;
  std::vector<int32_t> labels, order;
  std::vector<int64_t> meta, counts;
  std::unique_ptr<ReplayCore> core;
};

py::array_t<int64_t> slots_insert(OwnedSlots& self, int64_t count, const py::object& labels,
                                  const py::object& priority) {
  if (count < 0)
    throw std::invalid_argument("count: got " + std::to_string(count) + ", accepted: at least 0");
  py::array_t<int64_t> index(count);
  int64_t* out = index.mutable_data();
  const int64_t* label = optional<int64_t>(labels, count, "labels");
  const float* value = optional<float>(priority, count, "priority");
  py::gil_scoped_release release;
  self.core->add(count, nullptr, label, value, out);
  return index;
}

// The bookkeeping arrays of a state, each of the right dtype and length.
ReplayState checked_state(const py::dict& arrays, int64_t capacity, int64_t classes, bool writeable) {
  const TreeLayout layout(capacity);
  const auto bits = [&](const char* name) {
    return reinterpret_cast<uint32_t*>(checked<int32_t>(arrays[name], capacity, name, writeable));
  };
  ReplayState state{};
  state.leaves = bits("leaves");
  state.sums = reinterpret_cast<uint64_t*>(checked<int64_t>(arrays["sums"], layout.sums, "sums", writeable));
  state.delta = checked<float>(arrays["delta"], capacity, "delta", writeable);
  state.generation = bits("generation");
  state.labels = checked<int32_t>(arrays["labels"], capacity, "labels", writeable);
  state.meta = checked<int64_t>(arrays["meta"], kMetaWords, "meta", writeable);
  state.class_counts = checked<int64_t>(arrays["class_counts"], classes, "class_counts", writeable);
  return state;
}

// ReplayCore over numpy views, which it keeps alive. Batches come as addresses (torch's data_ptr): the caller
// in kdfast/reference/replay.py has checked dtype, layout and length, and a numpy view of each would cost
// more than the work.
struct BoundCore {
  BoundCore(int64_t capacity, int64_t row_bytes, int64_t classes, const std::string& eviction, double alpha,
            double eps, double scale, bool strict, py::dict arrays)
      : keep(std::move(arrays)), capacity(capacity), row_bytes(row_bytes), classes(classes) {
    ReplayState state = checked_state(keep, capacity, classes, true);
    if (row_bytes > 0) state.rows = checked<uint8_t>(keep["rows"], capacity * row_bytes, "rows");
    const int64_t ordered = keep.contains("order") ? py::len(keep["order"]) : 0;
    if (ordered > 0) state.order = checked<int32_t>(keep["order"], capacity, "order");
    core = std::make_unique<ReplayCore>(capacity, row_bytes, classes, eviction_named(eviction),
                                        PriorityRule{alpha, eps, scale}, strict, state);
  }

  py::dict keep;
  int64_t capacity, row_bytes, classes;
  std::unique_ptr<ReplayCore> core;
};

// name -> bytes, all copied at one moment; numpy owns them.
py::dict core_copy(const BoundCore& self, const std::vector<std::string>& names) {
  std::vector<ReplayCopy> copies;
  {
    py::gil_scoped_release release;
    copies = self.core->copy(names);
  }
  py::dict out;
  for (size_t i = 0; i < names.size(); ++i) {
    const int64_t bytes = copies[i].bytes;
    uint8_t* const data = copies[i].data.release();
    const py::capsule owner(data, [](void* memory) { delete[] static_cast<uint8_t*>(memory); });
    out[py::str(names[i])] = py::array_t<uint8_t>(bytes, data, owner);
  }
  return out;
}

void core_load(BoundCore& self, const py::dict& arrays) {
  ReplayState source = checked_state(arrays, self.capacity, self.classes, false);
  int64_t rows = 0;
  if (self.row_bytes > 0) {
    rows = py::len(arrays["rows"]) / self.row_bytes;
    if (rows > self.capacity) throw std::invalid_argument("rows: got more than the capacity");
    source.rows = checked<uint8_t>(arrays["rows"], rows * self.row_bytes, "rows", false);
  }
  py::gil_scoped_release release;
  self.core->load(source, rows);
}

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void core_sample(BoundCore& self, int64_t count, double beta, bool stratified, uintptr_t rows,
                 uintptr_t labels, uintptr_t index, uintptr_t generation, uintptr_t weight,
                 uintptr_t probability, const py::object& gain, const py::object& bias) {
  Normalize normalize;
  if (!gain.is_none()) {
    normalize.channels = py::reinterpret_borrow<py::array>(gain).size();
    normalize.gain = checked<float>(gain, normalize.channels, "gain", false);
    normalize.bias = checked<float>(bias, normalize.channels, "bias", false);
  }
  const SampleOut out{at<uint8_t>(rows),       at<int64_t>(labels), at<int64_t>(index),
                      at<int64_t>(generation), at<float>(weight),   at<float>(probability)};
  py::gil_scoped_release release;
  self.core->sample(count, beta, stratified, normalize, out);
}

using Sections = std::vector<std::pair<std::string, Array<uint8_t>>>;

void save(const std::string& path, const Sections& named) {
  std::vector<Section> sections;
  for (const auto& [name, array] : named)
    sections.push_back({name, array.data(), static_cast<uint64_t>(array.size())});
  py::gil_scoped_release release;
  write_snapshot(path, sections);
}

py::bytes encode(const Sections& named) {
  std::vector<Section> sections;
  for (const auto& [name, array] : named)
    sections.push_back({name, array.data(), static_cast<uint64_t>(array.size())});
  std::vector<uint8_t> out = snapshot_head(sections);
  for (const Section& section : sections) {
    out.resize(detail::aligned(out.size()), 0);
    out.insert(out.end(), section.data, section.data + section.size);
  }
  if (sections.empty()) out.resize(detail::aligned(out.size()), 0);
  return py::bytes(reinterpret_cast<const char*>(out.data()), out.size());
}

// name -> uint8 view into `whole`.
py::dict views(const py::array_t<uint8_t>& whole) {
  const uint8_t* data = whole.data();
  const uint64_t size = static_cast<uint64_t>(whole.size());
  std::vector<Section> sections;
  {
    py::gil_scoped_release release;
    sections = decode_snapshot(data, size);
  }
  py::dict out;
  for (const Section& section : sections)
    out[py::str(section.name)] =
        py::array_t<uint8_t>(static_cast<int64_t>(section.size), section.data, whole);
  return out;
}

std::unique_ptr<SnapshotFile> snapshot_open(const std::string& path) {
  py::gil_scoped_release release;
  return std::make_unique<SnapshotFile>(path);
}

py::dict snapshot_sizes(const SnapshotFile& self) {
  py::dict out;
  for (const SectionEntry& entry : self.entries()) out[py::str(entry.name)] = entry.size;
  return out;
}

py::bytes snapshot_section(SnapshotFile& self, const std::string& name, uint64_t limit) {
  std::vector<uint8_t> data;
  {
    py::gil_scoped_release release;
    data = self.section(name, limit);
  }
  return py::bytes(reinterpret_cast<const char*>(data.data()), data.size());
}

py::dict snapshot_read(SnapshotFile& self) {
  py::array_t<uint8_t> whole(static_cast<int64_t>(self.size()));
  uint8_t* data = whole.mutable_data();
  {
    py::gil_scoped_release release;
    self.read(data);
  }
  return views(whole);
}

}  // namespace
}  // namespace kdfast
