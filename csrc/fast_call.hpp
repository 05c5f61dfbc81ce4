// Methods of C++ objects as plain functions of Python's: pybind11's own way to one takes longer than they do.
#pragma once

#include <pybind11/pybind11.h>

#include <utility>

namespace kdfast {

// What a call of Python's C interface returned, which is the caller's to release; null stays null.
inline pybind11::object owned(PyObject* made) { return pybind11::reinterpret_steal<pybind11::object>(made); }

// A name that attributes are looked up by, kept for good.
inline PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

// The function that calls `run`, which finds its owner in `owner`'s capsule; `definition` is static and
// filled here.
template <typename Owner>
pybind11::object fast_function(PyMethodDef& definition, Owner* owner,
                               PyObject* (*run)(PyObject*, PyObject* const*, Py_ssize_t)) {
  definition.ml_meth = reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(run));
  definition.ml_flags = METH_FASTCALL;
  const pybind11::capsule held(owner, [](void* pointer) { delete static_cast<Owner*>(pointer); });
  return pybind11::reinterpret_steal<pybind11::object>(PyCFunction_NewEx(&definition, held.ptr(), nullptr));
}

// What `fast_function` was given.
template <typename Owner>
const Owner* owner_of(PyObject* capsule) {
  return static_cast<const Owner*>(PyCapsule_GetPointer(capsule, nullptr));
}

// A function of two arguments that calls `Method` of an object which it owns.
template <typename Owner, PyObject* (Owner::*Method)(PyObject*, PyObject*) const>
pybind11::object fast_call(PyMethodDef& definition, Owner* owner) {
  return fast_function<Owner>(
      definition, owner, +[](PyObject* self, PyObject* const* given, Py_ssize_t count) -> PyObject* {
        if (count != 2) {
          PyErr_SetString(PyExc_TypeError, "two tuples are needed");
          return nullptr;
        }
        return (owner_of<Owner>(self)->*Method)(given[0], given[1]);
      });
}

}  // namespace kdfast
