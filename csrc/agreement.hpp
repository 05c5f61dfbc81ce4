// Whether tensors are of the kind that nearly every call has: one question instead of a dozen attributes.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <vector>

#include "fast_call.hpp"
#include "launch_key.hpp"

namespace kdfast {

// Looks at tensors of exactly these classes, torch.Tensor and torch.nn.Parameter; `exchange` as for
// LaunchKeys.
class Agreement {
 public:
  Agreement(std::vector<PyObject*> types, const dlpack::Exchange* exchange)
      : types_(std::move(types)), exchange_(exchange) {}

  // Whether `whole`, a tuple of one tensor at least, are dense, of floating point, on one device, and of one
  // shape of one dimension at least; and `channels`, a tuple of tensors or None, likewise but 1-d, of as many
  // values as that shape's second dimension has. False also where that cannot be told.
  PyObject* agree(PyObject* whole, PyObject* channels) const {
    if (!PyTuple_Check(whole) || !PyTuple_Check(channels)) {
      PyErr_SetString(PyExc_TypeError, "agree: two tuples are needed");
      return nullptr;
    }
    return Py_NewRef(exchange_ != nullptr && PyTuple_GET_SIZE(whole) > 0 && all(whole, channels) ? Py_True
                                                                                                 : Py_False);
  }

  // Whether the second tensor of `pair` holds int64, one a row of the first, whose dimension `axis`, a tuple
  // of one int, is left out; both dense and on one device, the first of floating point. False also where it
  // cannot be told.
  PyObject* labelled(PyObject* pair, PyObject* axis) const {
    if (!PyTuple_Check(pair) || !PyTuple_Check(axis)) {
      PyErr_SetString(PyExc_TypeError, "labelled: two tuples are needed");
      return nullptr;
    }
    if (PyTuple_GET_SIZE(pair) != 2 || PyTuple_GET_SIZE(axis) != 1) {
      PyErr_SetString(PyExc_TypeError, "labelled: two tensors and a dimension are needed");
      return nullptr;
    }
    const long dim = PyLong_AsLong(PyTuple_GET_ITEM(axis, 0));
    if (dim == -1 && PyErr_Occurred() != nullptr) return nullptr;
    return Py_NewRef(exchange_ != nullptr && one_a_row(pair, dim) ? Py_True : Py_False);
  }

  // Whether the second of `three` tensors holds int64 and the third floating point, both of one shape, which
  // is the first's but for its last dimension, of 1 at least there; all dense and on one device, the first of
  // floating point. `none` is an empty tuple. False also where it cannot be told.
  PyObject* listed(PyObject* three, PyObject* none) const {
    if (!PyTuple_Check(three) || !PyTuple_Check(none)) {
      PyErr_SetString(PyExc_TypeError, "listed: two tuples are needed");
      return nullptr;
    }
    if (PyTuple_GET_SIZE(three) != 3 || PyTuple_GET_SIZE(none) != 0) {
      PyErr_SetString(PyExc_TypeError, "listed: three tensors are needed");
      return nullptr;
    }
    return Py_NewRef(exchange_ != nullptr && few_a_row(three) ? Py_True : Py_False);
  }

 private:
  bool few_a_row(PyObject* three) const {
    dlpack::Tensor logits{}, index{}, value{};
    if (!look(PyTuple_GET_ITEM(three, 0), logits) || !see(PyTuple_GET_ITEM(three, 1), index) ||
        !look(PyTuple_GET_ITEM(three, 2), value))
      return false;
    if (!is_int64(index) || !together(logits, index) || !together(logits, value)) return false;
    if (logits.dims < 1 || index.dims != logits.dims || value.dims != logits.dims) return false;
    const int last = logits.dims - 1;
    return index.shape[last] > 0 && std::equal(index.shape, index.shape + logits.dims, value.shape) &&
           std::equal(logits.shape, logits.shape + last, index.shape);
  }

  bool one_a_row(PyObject* pair, long dim) const {
    dlpack::Tensor logits{}, labels{};
    if (!look(PyTuple_GET_ITEM(pair, 0), logits) || !see(PyTuple_GET_ITEM(pair, 1), labels)) return false;
    if (!is_int64(labels) || !together(logits, labels) || dim < 0 || dim >= logits.dims ||
        labels.dims != logits.dims - 1)
      return false;
    int64_t* const axis = logits.shape + dim;
    return std::equal(logits.shape, axis, labels.shape) &&
           std::equal(axis + 1, logits.shape + logits.dims, labels.shape + dim);
  }

  bool all(PyObject* whole, PyObject* channels) const {
    dlpack::Tensor first{};
    if (!look(PyTuple_GET_ITEM(whole, 0), first) || first.dims < 1) return false;
    for (Py_ssize_t at = 1; at < PyTuple_GET_SIZE(whole); ++at) {
      dlpack::Tensor other{};
      if (!look(PyTuple_GET_ITEM(whole, at), other) || !together(first, other)) return false;
      if (other.dims != first.dims || !std::equal(first.shape, first.shape + first.dims, other.shape))
        return false;
    }
    for (Py_ssize_t at = 0; at < PyTuple_GET_SIZE(channels); ++at) {
      PyObject* const value = PyTuple_GET_ITEM(channels, at);
      if (value == Py_None) continue;
      dlpack::Tensor other{};
      if (first.dims < 2 || !look(value, other) || !together(first, other)) return false;
      if (other.dims != 1 || other.shape[0] != first.shape[1]) return false;
    }
    return true;
  }

  // Of floating point.
  bool look(PyObject* value, dlpack::Tensor& out) const {
    return see(value, out) && (out.dtype.code == kFloat || out.dtype.code == kBfloat) && out.dtype.lanes == 1;
  }

  // No subclass, which may answer otherwise; a tensor without memory that can be seen has no view.
  bool see(PyObject* value, dlpack::Tensor& out) const {
    auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(value));
    if (std::find(types_.begin(), types_.end(), type) == types_.end()) return false;
    if (exchange_->view(value, &out) == 0) return true;
    PyErr_Clear();
    return false;
  }

  static bool is_int64(const dlpack::Tensor& tensor) {
    return tensor.dtype.code == kInt && tensor.dtype.bits == 64 && tensor.dtype.lanes == 1;
  }

  static bool together(const dlpack::Tensor& one, const dlpack::Tensor& other) {
    return one.device.type == other.device.type && one.device.index == other.device.index;
  }

  static constexpr uint8_t kInt = 0, kFloat = 2, kBfloat = 4;  // DLDataTypeCode

  const std::vector<PyObject*> types_;  // kept for good, as the function is
  const dlpack::Exchange* exchange_;
};

// (agree(whole, channels), labelled(pair, axis), listed(three, none)) for tensors of these classes, the first
// of which tells of tensors.
inline pybind11::tuple agreement_of(const pybind11::type& type, const pybind11::type& other) {
  static PyMethodDef agree = {"agree", nullptr, 0,
                              "Whether tensors are dense, of floating point, and fit together."};
  static PyMethodDef labelled = {"labelled", nullptr, 0, "Whether there is one int64 a row."};
  static PyMethodDef listed = {"listed", nullptr, 0, "Whether there are k int64 and k numbers a row."};
  const auto made = [&] {
    std::vector<PyObject*> types{type.inc_ref().ptr(), other.inc_ref().ptr()};
    return new Agreement(std::move(types), exchange_of(type.ptr()));
  };
  return pybind11::make_tuple(fast_call<Agreement, &Agreement::agree>(agree, made()),
                              fast_call<Agreement, &Agreement::labelled>(labelled, made()),
                              fast_call<Agreement, &Agreement::listed>(listed, made()));
}

}  // namespace kdfast
