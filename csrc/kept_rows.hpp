// A launch over rows of logits that is kept already: what kernels/common/launch_rows.py does for it, in less
// time.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "direct_launch.hpp"
#include "fast_call.hpp"
#include "launch_key.hpp"

namespace kdfast {

// The launches of one family, which Python keeps in a dict by their keys. It does nothing and says so
// wherever Python has to decide: nothing is kept yet, a value lies in memory, the launch is of an unusual
// kind or not direct.
class KeptRows {
 public:
  // `told`, by these names: the class of tensors, the dict, the namespace of kernels/launch.py, and
  // torch.empty_like.
  explicit KeptRows(const pybind11::dict& told)
      : keys_(keys_of(told["type"])), kept_(told["kept"]), home_(told["home"]), like_(told["like"]) {}

  // (reads, gradients, dim, (temperature, divisor, weight, mask), want, upstream, further, options) to the
  // loss, where that is wanted, else to the first of `reads`; to None where nothing was done.
  PyObject* run(PyObject* const* given) const {
    PyObject *const reads = given[0], *const gradients = given[1], *const scale = given[3],
                    *const upstream = given[5], *const further = given[6];
    for (PyObject* const tuple : {reads, gradients, scale, further}) {
      if (!PyTuple_Check(tuple)) return refused("a tuple is needed");
    }
    if (PyTuple_GET_SIZE(reads) < 1 || PyTuple_GET_SIZE(scale) != 4)
      return refused("logits and four factors");
    PyObject *const temperature = PyTuple_GET_ITEM(scale, 0), *const divisor = PyTuple_GET_ITEM(scale, 1),
                    *const weight = PyTuple_GET_ITEM(scale, 2), *const mask = PyTuple_GET_ITEM(scale, 3);
    if (!PyFloat_CheckExact(temperature) || !PyFloat_CheckExact(divisor)) Py_RETURN_NONE;
    PyObject* const others[] = {weight, mask, upstream, temperature, divisor};

    std::string bytes;
    bytes.reserve(256);
    if (!add_all(bytes, reads, true)) return nullptr;
    bytes += '|';
    if (!add_all(bytes, gradients, false)) return nullptr;
    for (PyObject* const value : others)
      if (!keys_.add(bytes, value, false)) return nullptr;
    if (!add_all(bytes, further, false)) return nullptr;
    const auto text = owned(PyBytes_FromStringAndSize(bytes.data(), static_cast<Py_ssize_t>(bytes.size())));
    if (!text) return nullptr;
    const auto key = owned(PyTuple_Pack(4, text.ptr(), given[2], given[4], given[7]));
    if (!key) return nullptr;
    // Kept alive: another thread may drop it meanwhile.
    const auto call =
        pybind11::reinterpret_borrow<pybind11::object>(PyDict_GetItemWithError(kept_.ptr(), key.ptr()));
    if (!call) return PyErr_Occurred() ? nullptr : Py_NewRef(Py_None);

    const auto partials = owned(PyObject_GetAttr(call.ptr(), names().alone));
    const auto launch = owned(PyObject_GetAttr(call.ptr(), names().launch));
    if (!partials || !launch) return nullptr;
    const auto function = owned(PyObject_GetAttr(launch.ptr(), names().direct));
    if (!function) return nullptr;
    const DirectLaunch* const direct = direct_launch_of(function.ptr());
    if (partials.is_none() || direct == nullptr) Py_RETURN_NONE;

    pybind11::object memory, loss;
    PyObject *partial = Py_None, *counter = Py_None;
    const int summed = PyObject_IsTrue(partials.ptr());
    if (summed < 0) return nullptr;
    if (summed != 0) {
      memory = of_reduction(call, partials);
      if (!memory) return nullptr;
      if (!PyTuple_Check(memory.ptr()) || PyTuple_GET_SIZE(memory.ptr()) != 3)
        return refused("reduction: three tensors");
      partial = PyTuple_GET_ITEM(memory.ptr(), 0);
      counter = PyTuple_GET_ITEM(memory.ptr(), 1);
      loss = owned(PyObject_CallOneArg(like_.ptr(), PyTuple_GET_ITEM(memory.ptr(), 2)));
      if (!loss) return nullptr;
    }
    PyObject* const total = loss ? loss.ptr() : Py_None;
    PyObject* const row[] = {Py_None,  total,       partial, counter, weight, mask,
                             upstream, temperature, Py_None, divisor, Py_None};
    const auto varying = static_cast<size_t>(PyTuple_GET_SIZE(reads) + PyTuple_GET_SIZE(gradients)) + 11;
    const int done = direct->launch_with(varying, further, [&](std::vector<PyObject*>& arguments) {
      DirectLaunch::append(arguments, reads);
      DirectLaunch::append(arguments, gradients);
      arguments.insert(arguments.end(), std::begin(row), std::end(row));
    });
    if (done < 0 || (done != 0 && !count(launch))) return nullptr;
    if (done == 0) Py_RETURN_NONE;
    return Py_NewRef(loss ? loss.ptr() : PyTuple_GET_ITEM(reads, 0));
  }

 private:
  struct Names {
    PyObject *alone = interned("alone"), *launch = interned("launch"), *direct = interned("_direct"),
             *device = interned("device"), *text = interned("name"), *reduction = interned("reduction"),
             *counts = interned("launch_counts"), *zero = PyLong_FromLong(0), *one = PyLong_FromLong(1);
  };

  static const Names& names() {
    static const Names all;
    return all;
  }

  static LaunchKeys keys_of(const pybind11::object& type) {
    return {reinterpret_cast<PyTypeObject*>(type.inc_ref().ptr()), exchange_of(type.ptr())};  // kept for good
  }

  static PyObject* refused(const char* what) {
    PyErr_SetString(PyExc_TypeError, what);
    return nullptr;
  }

  bool add_all(std::string& key, PyObject* tuple, bool whole) const {
    for (Py_ssize_t at = 0; at < PyTuple_GET_SIZE(tuple); ++at)
      if (!keys_.add(key, PyTuple_GET_ITEM(tuple, at), whole)) return false;
    return true;
  }

  // A name of kernels/launch.py's; null with an exception set.
  PyObject* global(PyObject* name) const {
    PyObject* const found = PyDict_GetItemWithError(home_.ptr(), name);
    if (found == nullptr && PyErr_Occurred() == nullptr) PyErr_SetObject(PyExc_NameError, name);
    return found;
  }

  pybind11::object of_reduction(const pybind11::object& call, const pybind11::object& partials) const {
    PyObject* const reduction = global(names().reduction);
    if (reduction == nullptr) return {};
    const auto device = owned(PyObject_GetAttr(call.ptr(), names().device));
    if (!device) return {};
    PyObject* const arguments[] = {device.ptr(), partials.ptr()};
    return owned(PyObject_Vectorcall(reduction, arguments, 2, nullptr));
  }

  // One more in launch_counts; false with an exception set.
  bool count(const pybind11::object& launch) const {
    const auto name = owned(PyObject_GetAttr(launch.ptr(), names().text));
    const auto counts = pybind11::reinterpret_borrow<pybind11::object>(global(names().counts));
    if (!name || !counts) return false;
    if (!PyDict_Check(counts.ptr())) return refused("launch_counts: a Counter is needed") != nullptr;
    // As the dict that it is: its own subscript goes through Python.
    PyObject* const before = PyDict_GetItemWithError(counts.ptr(), name.ptr());
    if (before == nullptr && PyErr_Occurred() != nullptr) return false;
    const auto after = owned(PyNumber_Add(before == nullptr ? names().zero : before, names().one));
    return after && PyDict_SetItem(counts.ptr(), name.ptr(), after.ptr()) == 0;
  }

  const LaunchKeys keys_;
  const pybind11::dict kept_, home_;
  const pybind11::object like_;
};

// run(reads, gradients, dim, scale, want, upstream, further, options) of one family.
inline pybind11::object kept_rows(const pybind11::dict& told) {
  static PyMethodDef definition = {"kept_rows", nullptr, 0,
                                   "Launch what is kept, or do nothing and return None."};
  return fast_function<KeptRows>(
      definition, new KeptRows(told),
      +[](PyObject* self, PyObject* const* given, Py_ssize_t count) -> PyObject* {
        if (count != 8) {
          PyErr_SetString(PyExc_TypeError, "eight arguments are needed");
          return nullptr;
        }
        return owner_of<KeptRows>(self)->run(given);
      });
}

}  // namespace kdfast
