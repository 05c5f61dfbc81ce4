// Methods of C++ objects as plain functions of Python's: pybind11's own way to one takes longer than they do.
#pragma once

#include <pybind11/pybind11.h>

#include <utility>

namespace kdfast {

// A function of two arguments that calls `Method` of an object which it owns; `definition` is static and
// filled here.
template <typename Owner, PyObject* (Owner::*Method)(PyObject*, PyObject*) const>
pybind11::object fast_call(PyMethodDef& definition, Owner* owner) {
  definition.ml_meth = reinterpret_cast<PyCFunction>(
      reinterpret_cast<void*>(+[](PyObject* self, PyObject* const* given, Py_ssize_t count) -> PyObject* {
        if (count != 2) {
          PyErr_SetString(PyExc_TypeError, "two tuples are needed");
          return nullptr;
        }
        return (static_cast<const Owner*>(PyCapsule_GetPointer(self, nullptr))->*Method)(given[0], given[1]);
      }));
  definition.ml_flags = METH_FASTCALL;
  const pybind11::capsule held(owner, [](void* pointer) { delete static_cast<Owner*>(pointer); });
  return pybind11::reinterpret_steal<pybind11::object>(PyCFunction_NewEx(&definition, held.ptr(), nullptr));
}

}  // namespace kdfast
