// What kdfast._C binds: owners of memory, checked views, and batch calls that release the GIL.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>

#include "replay_core.hpp"
#include "snapshot.hpp"

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

// An owning PriorityTree, for tests, benchmarks and whoever wants the tree alone.
struct OwnedTree {
  explicit OwnedTree(int64_t capacity)
      : layout(capacity),
        leaves(layout.capacity),
        sums(layout.sums),
        tree(layout, leaves.data(), sums.data()) {}

  TreeLayout layout;
  std::vector<uint32_t> leaves;
  std::vector<uint64_t> sums;
  PriorityTree tree;
  std::vector<uint64_t> uniform;
};

py::array_t<int64_t> tree_find(OwnedTree& self, const Array<uint64_t>& targets) {
  std::vector<uint64_t> rest(targets.data(), targets.data() + targets.size());
  for (uint64_t target : rest)
    if (target >= self.tree.total())
      throw std::invalid_argument("targets: got " + std::to_string(target) + ", accepted: below the total, " +
                                  std::to_string(self.tree.total()));
  py::array_t<int64_t> slots(targets.size());
  int64_t* out = slots.mutable_data();
  py::gil_scoped_release release;
  self.tree.find(static_cast<int64_t>(rest.size()), rest.data(), out);
  return slots;
}

py::array_t<int64_t> tree_sample(OwnedTree& self, int64_t count, uint64_t seed, uint64_t step,
                                 bool stratified) {
  if (count < 0)
    throw std::invalid_argument("count: got " + std::to_string(count) + ", accepted: at least 0");
  if (self.tree.total() == 0) throw std::invalid_argument("sample: the tree is empty");
  py::array_t<int64_t> slots(count);
  int64_t* out = slots.mutable_data();
  py::gil_scoped_release release;
  self.uniform.resize(count);
  philox_draws(seed, step, count, self.uniform.data());
  draw_targets(self.tree.total(), count, stratified, self.uniform.data(), self.uniform.data());
  self.tree.find(count, self.uniform.data(), out);
  return slots;
}

void tree_set(OwnedTree& self, const Array<int64_t>& index, const Array<uint32_t>& quantum) {
  if (index.size() != quantum.size())
    throw std::invalid_argument("quantum: got " + std::to_string(quantum.size()) +
                                " elements, accepted: " + std::to_string(index.size()));
  const int64_t count = index.size();
  const int64_t* slot = index.data();
  const uint32_t* value = quantum.data();
  py::gil_scoped_release release;
  for (int64_t i = 0; i < count; ++i) self.tree.check(slot[i]);
  for (int64_t i = 0; i < count; ++i) self.tree.set(slot[i], value[i]);
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
        meta(kMetaWords),
        counts(std::max<int64_t>(classes, 0)) {
    meta[kMaxPriority] = -1;
    // With alpha 1, eps 0 and scale 1 a priority is its own fixed-point mass.
    core = std::make_unique<ReplayCore>(
        capacity, 0, classes, eviction_named(eviction), PriorityRule{1.0, 0.0, 1.0}, true,
        ReplayState{leaves.data(), sums.data(), delta.data(), generation.data(), labels.data(), meta.data(),
                    counts.data(), nullptr});
  }

  TreeLayout layout;
  std::vector<uint32_t> leaves, generation;
  std::vector<uint64_t> sums;
  std::vector<float> delta;
  std::vector<int32_t> labels;
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

// ReplayCore over numpy views, which it keeps alive. Batches come as addresses (torch's data_ptr): the caller
// in kdfast/reference/replay.py has checked dtype, layout and length, and a numpy view of each would cost
// more than the work.
struct BoundCore {
  BoundCore(int64_t capacity, int64_t row_bytes, int64_t classes, const std::string& eviction, double alpha,
            double eps, double scale, bool strict, py::dict arrays)
      : keep(std::move(arrays)) {
    const TreeLayout layout(capacity);
    ReplayState state{};
    state.leaves = reinterpret_cast<uint32_t*>(checked<int32_t>(keep["leaves"], capacity, "leaves"));
    state.sums = reinterpret_cast<uint64_t*>(checked<int64_t>(keep["sums"], layout.sums, "sums"));
    state.delta = checked<float>(keep["delta"], capacity, "delta");
    state.generation =
        reinterpret_cast<uint32_t*>(checked<int32_t>(keep["generation"], capacity, "generation"));
    state.labels = checked<int32_t>(keep["labels"], capacity, "labels");
    state.meta = checked<int64_t>(keep["meta"], kMetaWords, "meta");
    state.class_counts = checked<int64_t>(keep["class_counts"], classes, "class_counts");
    if (row_bytes > 0) state.rows = checked<uint8_t>(keep["rows"], capacity * row_bytes, "rows");
    core = std::make_unique<ReplayCore>(capacity, row_bytes, classes, eviction_named(eviction),
                                        PriorityRule{alpha, eps, scale}, strict, state);
  }

  py::dict keep;
  std::unique_ptr<ReplayCore> core;
};

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

py::dict load(const std::string& path) {
  std::unique_ptr<detail::File> file;
  uint64_t size = 0;
  {
    py::gil_scoped_release release;
    file = std::make_unique<detail::File>(path, O_RDONLY);
    size = file->size();
  }
  py::array_t<uint8_t> whole(static_cast<int64_t>(size));
  uint8_t* data = whole.mutable_data();
  {
    py::gil_scoped_release release;
    file->read(data, size);
  }
  return views(whole);
}

}  // namespace
}  // namespace kdfast
