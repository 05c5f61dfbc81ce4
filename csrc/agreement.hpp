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

 private:
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

  // No subclass, which may answer otherwise; a tensor without memory that can be seen has no view.
  bool look(PyObject* value, dlpack::Tensor& out) const {
    auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(value));
    if (std::find(types_.begin(), types_.end(), type) == types_.end()) return false;
    if (exchange_->view(value, &out) != 0) {
      PyErr_Clear();
      return false;
    }
    return (out.dtype.code == kFloat || out.dtype.code == kBfloat) && out.dtype.lanes == 1;
  }

  static bool together(const dlpack::Tensor& one, const dlpack::Tensor& other) {
    return one.device.type == other.device.type && one.device.index == other.device.index;
  }

  static constexpr uint8_t kFloat = 2, kBfloat = 4;  // DLDataTypeCode

  const std::vector<PyObject*> types_;  // kept for good, as the function is
  const dlpack::Exchange* exchange_;
};

// agree(whole, channels) for tensors of these classes, the first of which tells of tensors.
inline pybind11::object agreement_of(const pybind11::type& type, const pybind11::type& other) {
  static PyMethodDef definition = {"agree", nullptr, 0,
                                   "Whether tensors are dense, of floating point, and fit together."};
  std::vector<PyObject*> types{type.inc_ref().ptr(), other.inc_ref().ptr()};
  return fast_call<Agreement, &Agreement::agree>(definition,
                                                 new Agreement(std::move(types), exchange_of(type.ptr())));
}

}  // namespace kdfast
