// kdfast._C: the bookkeeping of prioritized replay, what a CPU computes in one pass where operators take
// many, and the keys of launches.
#include "agreement.hpp"
#include "bound.hpp"
#include "cpu_loops.hpp"
#include "dead_leaves.hpp"
#include "direct_launch.hpp"
#include "kept_rows.hpp"
#include "launch_key.hpp"
#include "philox_normal.hpp"
#include "row_losses.hpp"

PYBIND11_MODULE(_C, module) {
  using namespace kdfast;
  module.doc() =
      "Bookkeeping of prioritized replay, and a CPU's fused loops: the part of kdfast that is C++.";
  py::register_exception<SnapshotError>(module, "SnapshotError", PyExc_ValueError);
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const std::system_error& error) {
      // A path need not be UTF-8.
      const auto what = py::reinterpret_steal<py::object>(PyUnicode_DecodeFSDefault(error.what()));
      PyErr_SetObject(PyExc_OSError, py::make_tuple(error.code().value(), what).ptr());
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

  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  py::class_<SharedTree>(
      module, "PriorityTree",
      "Sum tree over u32 fixed-point priorities with u64 sums, fan-out 256. Threads may share it.")
      .def(py::init<int64_t>(), py::arg("capacity"))
      .def_property_readonly("capacity", [](const SharedTree& self) { return self.layout().capacity; })
      .def_property_readonly("total", &SharedTree::total)
      .def_property_readonly("nbytes", &SharedTree::bytes)
      .def_property_readonly(
          "leaves", [](const SharedTree& self) { return as_array(self.leaves()); }, "A copy of all leaves.")
      .def_property_readonly(
          "sums", [](const SharedTree& self) { return as_array(self.sums()); },
          "A copy of all sums, the root first.")
      .def("set", &tree_set, py::arg("index"), py::arg("quantum"), "Set leaves, one after another.")
      .def("find", &tree_find, py::arg("targets"), "The slot whose prefix interval holds each target.")
      .def("sample", &tree_sample, py::arg("count"), py::arg("seed"), py::arg("step") = 0,
           py::arg("stratified") = true, "Draw slots in proportion to their leaves.")
      .def("rebuild", &SharedTree::rebuild, unlocked)
      .def("consistent", &SharedTree::consistent, unlocked);

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
      .def("remove",
           [](OwnedSlots& self, const Array<int64_t>& index) {
             const int64_t count = index.size();
             const int64_t* slot = index.data();
             py::gil_scoped_release release;
             self.core->remove(count, slot);
           })
      .def_property_readonly("live", [](const OwnedSlots& self) { return self.core->word(kLive); })
      .def_property_readonly("generation", [](const OwnedSlots& self) {
        const std::vector<ReplayCopy> copies = self.core->copy({"generation"});
        return py::array_t<uint32_t>(self.layout.capacity,
                                     reinterpret_cast<const uint32_t*>(copies[0].data.get()));
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
      .def("copy", &core_copy, py::arg("names"), "Copies of these arrays as bytes, all of one moment.")
      .def("load", &core_load, py::arg("arrays"), "Replace everything at once.")
      .def(
          "word", [](const BoundCore& self, int position) { return self.core->word(position); },
          py::arg("position"), py::call_guard<py::gil_scoped_release>(), "A word of meta.")
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
  py::class_<SnapshotFile>(module, "SnapshotFile", "A snapshot file whose table has been checked.")
      .def(py::init(&snapshot_open), py::arg("path"))
      .def_property_readonly("sizes", &snapshot_sizes, "Bytes of each section.")
      .def("section", &snapshot_section, py::arg("name"), py::arg("limit"),
           "One section of at most `limit` bytes, its checksum verified.")
      .def("read", &snapshot_read, "All sections, all checksums verified.");
  module.def("sweep_snapshot", &sweep_temporaries, py::arg("path"),
             "Remove what killed writers of this path left; returns how many files.");
  module.def("decode_snapshot", &views, py::arg("data"), "Sections of a snapshot in memory, likewise.");

  module.def("direct_launch", &direct_launch, py::arg("told"),
             "launch(varying, further) of one kernel on one geometry.");
  module.def("kept_rows", &kept_rows, py::arg("told"),
             "run(...) of the launches over rows that one family keeps.");
  module.def("launch_key_of", &launch_key_of, py::arg("type"),
             "launch_key(tensors, arguments) for tensors of this class.");
  module.def("agreement_of", &agreement_of, py::arg("type"), py::arg("other"),
             "(agree(tensors, channels), labelled(pair, axis)) for tensors of exactly these classes.");

  module.def(
      "normals",
      [](uint64_t key, uint32_t step, int64_t count) {
        if (count < 0) throw py::value_error("count: got " + std::to_string(count) + ", accepted: 0 or more");
        py::array_t<float> out(count);
        float* const data = out.mutable_data();
        py::gil_scoped_release release;
        normals(key, step, count, data);
        return out;
      },
      py::arg("key"), py::arg("step"), py::arg("count"),
      "Standard normals of a step under a 64-bit key, float32: the bits of kernels/common/normal.py.");

  module.def(
      "kl_rows",
      [](int64_t rows, int64_t classes, uintptr_t student, int64_t student_stride, uintptr_t teacher,
         int64_t teacher_stride, double inverse, uintptr_t loss, uintptr_t grad_student,
         uintptr_t grad_teacher, int64_t threads, float below) {
        if (classes < 1)
          throw py::value_error("classes: got " + std::to_string(classes) + ", accepted: 1 or more");
        return kl_rows(rows, classes, {at<const float>(student), student_stride},
                       {at<const float>(teacher), teacher_stride}, {inverse, below}, at<float>(loss),
                       {at<float>(grad_student), classes}, {at<float>(grad_teacher), classes}, threads);
      },
      py::call_guard<py::gil_scoped_release>(),
      "KL(softmax(teacher/T) || softmax(student/T)) of float32 rows at these addresses and T times its "
      "gradients (0: not wanted), with inverse = 1/T; in float64 below `below`. Whether a row is left to be "
      "computed otherwise: one with NaN, or with an absent class.");

  bind_cpu_loops(module);

  module.def(
      "dead_leaves",
      [](uint64_t seed, const Array<int64_t>& index, int64_t height, int64_t width, int64_t limit,
         const Array<float>& radii, const Array<float>& cumulative) {
        if (height < 0 || width < 0) throw py::value_error("height, width: accepted: 0 or more");
        if (radii.size() < 1 || radii.size() != cumulative.size())
          throw py::value_error("radii, cumulative: accepted: as many of each, at least one");
        py::array_t<uint8_t> out({index.size(), int64_t{3}, height, width});
        const LeafLaw law{radii.data(), cumulative.data(), radii.size()};
        const int64_t* const image = index.data();
        const int64_t count = index.size();
        uint8_t* const pixels = out.mutable_data();
        py::gil_scoped_release release;
        std::vector<uint8_t> covered;
        for (int64_t i = 0; i < count; ++i)
          paint_leaves(seed, image[i], height, width, limit, law, covered, pixels + i * 3 * height * width);
        return out;
      },
      py::arg("seed"), py::arg("index"), py::arg("height"), py::arg("width"), py::arg("limit"),
      py::arg("radii"), py::arg("cumulative"),
      "uint8 [B, 3, H, W]: images `index` of at most `limit` leaves each, with the reference's bits.");
}
