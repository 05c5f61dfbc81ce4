// kdfast._C: the bookkeeping of prioritized replay. Every batch call releases the GIL.
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

PYBIND11_MODULE(_C, module) {
  using namespace kdfast;
  module.doc() = "Bookkeeping of prioritized replay: the part of kdfast that is C++.";
  py::register_exception<SnapshotError>(module, "SnapshotError", PyExc_ValueError);
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const std::system_error& error) {
      errno = error.code().value();
      PyErr_SetObject(PyExc_OSError, py::make_tuple(error.code().value(), error.what()).ptr());
    }
  });

  py::dict meta;
  const char* const names[] = {"SEED",         "STEP",         "HEAD",        "LIVE",
                               "INSERTED",     "MAX_PRIORITY", "PENDING_MAX", "TICKET",
                               "NON_FINITE",   "STALE",        "SATURATED",   "FLOORED",
                               "OUT_OF_RANGE", "BAD_LABEL",    "EMPTY_SLOT",  "EVICTED"};
  static_assert(sizeof names / sizeof *names == kMetaWords);
  for (int word = 0; word < kMetaWords; ++word) meta[names[word]] = word;
  module.attr("META") = meta;

  py::class_<OwnedTree>(module, "PriorityTree",
                        "Sum tree over u32 fixed-point priorities with u64 sums, fan-out 256.")
      .def(py::init<int64_t>(), py::arg("capacity"))
      .def_property_readonly("capacity", [](const OwnedTree& self) { return self.layout.capacity; })
      .def_property_readonly("total", [](const OwnedTree& self) { return self.tree.total(); })
      .def_property_readonly(
          "nbytes", [](const OwnedTree& self) { return self.leaves.size() * 4 + self.sums.size() * 8; })
      .def_property_readonly(
          "leaves",
          [](const OwnedTree& self) {
            return py::array_t<uint32_t>(self.layout.capacity, self.leaves.data());
          },
          "A copy of all leaves.")
      .def_property_readonly(
          "sums",
          [](const OwnedTree& self) { return py::array_t<uint64_t>(self.layout.sums, self.sums.data()); },
          "A copy of all sums, the root first.")
      .def("set", &tree_set, py::arg("index"), py::arg("quantum"), "Set leaves, one after another.")
      .def("find", &tree_find, py::arg("targets"), "The slot whose prefix interval holds each target.")
      .def("sample", &tree_sample, py::arg("count"), py::arg("seed"), py::arg("step") = 0,
           py::arg("stratified") = true, "Draw slots in proportion to their leaves.")
      .def(
          "rebuild", [](OwnedTree& self) { self.tree.rebuild(); }, py::call_guard<py::gil_scoped_release>())
      .def(
          "consistent", [](const OwnedTree& self) { return self.tree.consistent(); },
          py::call_guard<py::gil_scoped_release>());

  py::class_<ClassHistogramOwner>(module, "ClassHistogram", "Rows held by class, exactly.")
      .def(py::init<int64_t>(), py::arg("num_classes"))
      .def("add", &ClassHistogramOwner::add, py::arg("labels"))
      .def("remove", &ClassHistogramOwner::remove, py::arg("labels"))
      .def_property_readonly("counts", [](const ClassHistogramOwner& self) {
        return py::array_t<int64_t>(static_cast<int64_t>(self.counts.size()), self.counts.data());
      });

  py::class_<OwnedSlots>(module, "RingSlots", "Slots and evictions alone, without rows.")
      .def(py::init<int64_t, const std::string&, int64_t>(), py::arg("capacity"),
           py::arg("eviction") = "fifo", py::arg("num_classes") = 0)
      .def("insert", &slots_insert, py::arg("count"), py::arg("labels") = py::none(),
           py::arg("priority") = py::none(), "The slot of each insertion, in order.")
      .def("remove", [](OwnedSlots& self,
                        const Array<int64_t>& index) { self.core->remove(index.size(), index.data()); })
      .def_property_readonly("live", [](const OwnedSlots& self) { return self.meta[kLive]; })
      .def_property_readonly("generation", [](const OwnedSlots& self) {
        return py::array_t<uint32_t>(self.layout.capacity, self.generation.data());
      });

  py::class_<BoundCore>(module, "ReplayCore", "The buffer's bookkeeping over arrays that it keeps alive.")
      .def(py::init<int64_t, int64_t, int64_t, const std::string&, double, double, double, bool, py::dict>(),
           py::arg("capacity"), py::arg("row_bytes"), py::arg("classes"), py::arg("eviction"),
           py::arg("alpha"), py::arg("eps"), py::arg("scale"), py::arg("strict"), py::arg("arrays"))
      .def(
          "add",
          [](BoundCore& self, int64_t count, uintptr_t rows, uintptr_t labels, uintptr_t priority,
             uintptr_t index) {
            self.core->add(count, at<uint8_t>(rows), at<int64_t>(labels), at<float>(priority),
                           at<int64_t>(index));
          },
          py::call_guard<py::gil_scoped_release>())
      .def("sample", &core_sample)
      .def(
          "update",
          [](BoundCore& self, int64_t count, uintptr_t index, uintptr_t priority, uintptr_t generation,
             bool largest) {
            self.core->update(count, at<int64_t>(index), at<float>(priority), at<int64_t>(generation),
                              largest);
          },
          py::call_guard<py::gil_scoped_release>())
      .def(
          "remove",
          [](BoundCore& self, int64_t count, uintptr_t index) {
            self.core->remove(count, at<int64_t>(index));
          },
          py::call_guard<py::gil_scoped_release>())
      .def(
          "rebuild", [](BoundCore& self) { self.core->rebuild(); }, py::call_guard<py::gil_scoped_release>())
      .def(
          "consistent", [](BoundCore& self) { return self.core->consistent(); },
          py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("derived_bytes",
                             [](const BoundCore& self) { return self.core->derived_bytes(); });

  module.def(
      "sum_layout",
      [](int64_t capacity) {
        const TreeLayout layout(capacity);
        std::vector<std::pair<int64_t, int64_t>> levels;
        for (int level = 1; level <= layout.levels; ++level)
          levels.emplace_back(layout.offset[level], layout.count[level]);
        return py::make_tuple(layout.sums, levels);
      },
      py::arg("capacity"), "(words of sums, [(offset, count) of level 1, ...]).");
  module.def(
      "sums_of",
      [](const Array<int32_t>& leaves) {
        const TreeLayout layout(leaves.size());
        py::array_t<int64_t> sums(layout.sums);
        std::fill_n(sums.mutable_data(), layout.sums, 0);
        auto* bits = reinterpret_cast<uint32_t*>(const_cast<int32_t*>(leaves.data()));
        PriorityTree(layout, bits, reinterpret_cast<uint64_t*>(sums.mutable_data())).rebuild();
        return sums;
      },
      py::arg("leaves"), "All sums of these leaves (u32 bits in int32), the root first.");
  module.def(
      "philox", [](uint64_t key, const std::array<uint32_t, 4>& counter) { return philox4x32(key, counter); },
      py::arg("key"), py::arg("counter"), "One block of Philox-4x32-10.");
  module.def(
      "quantise",
      [](const Array<float>& delta, double alpha, double eps, double scale) {
        std::vector<double> mass(delta.size());
        py::array_t<uint32_t> quantum(delta.size());
        fixed_masses(delta.data(), delta.size(), alpha, eps, scale, mass.data());
        fixed_round(mass.data(), delta.size(), quantum.mutable_data());
        return quantum;
      },
      py::arg("delta"), py::arg("alpha"), py::arg("eps"), py::arg("scale"),
      "clip(round((|delta| + eps)^alpha * scale), 1, 2^32 - 1).");
  module.def(
      "crc64", [](const Array<uint8_t>& data) { return Crc64::of(data.data(), data.size()); }, "CRC-64/XZ.");
  module.def("save_snapshot", &save, py::arg("path"), py::arg("sections"),
             "Write a snapshot file atomically.");
  module.def("encode_snapshot", &encode, py::arg("sections"), "A snapshot as bytes.");
  module.def("load_snapshot", &load, py::arg("path"), "Sections of a snapshot file, all checksums verified.");
  module.def("decode_snapshot", &views, py::arg("data"), "Sections of a snapshot in memory, likewise.");
}
