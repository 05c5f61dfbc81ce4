// A compiled kernel's launch where nothing has changed since the last one: the greater part of what
// kernels/launch.py does for each, in less time.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "fast_call.hpp"

namespace kdfast {

// One kernel on one geometry. It launches as Triton would, or does nothing and says so: where another driver,
// device or knob is in force than when it was made, or somebody listens to launches.
class DirectLaunch {
 public:
  // `told`: what stays the same, by the names below; those of Triton's objects are its own. `slot`: the
  // attribute of `driver` that `active` is found in, if it is another than that.
  explicit DirectLaunch(const pybind11::dict& told)
      : driver_(told["driver"]),
        slot_(told.contains("slot") ? pybind11::object(told["slot"]) : pybind11::str("active")),
        active_(told["active"]),
        runtime_(told["runtime"]),
        compilation_(told["compilation"]),
        kernel_(told["kernel"]),
        chain_(told["chain"]),
        run_(told["run"]),
        state_(told["state"]),
        programs_(told["programs"]),
        compiled_(told["compiled"]),
        tail_(told["tail"]),
        rest_(told["rest"]),
        device_(pybind11::cast<long>(told["device"])),
        stream_of_(device_ < 0 ? 0 : device_) {
    if (state_.size() != 3) throw pybind11::value_error("state: three values are needed");
  }

  // True: launched. False: nothing was done. Null: an exception is set.
  PyObject* launch(PyObject* varying, PyObject* further) const {
    if (!PyTuple_Check(varying) || !PyTuple_Check(further)) {
      PyErr_SetString(PyExc_TypeError, "launch: two tuples are needed");
      return nullptr;
    }
    const int done = launch_with(static_cast<size_t>(PyTuple_GET_SIZE(varying)), further,
                                 [varying](std::vector<PyObject*>& given) { append(given, varying); });
    return done < 0 ? nullptr : Py_NewRef(done != 0 ? Py_True : Py_False);
  }

  // The same as 1, 0 and -1, where `add` appends the `varying` first arguments.
  template <typename Add>
  int launch_with(size_t varying, PyObject* further, Add add) const {
    const int same = unchanged();
    if (same <= 0) return same;
    const auto stream = owned(PyObject_CallMethodOneArg(active_.ptr(), names().stream, stream_of_.ptr()));
    if (!stream) return -1;
    std::vector<PyObject*> given;
    given.reserve(16 + varying + tail_.size() + static_cast<size_t>(PyTuple_GET_SIZE(further)) +
                  rest_.size());
    append(given, programs_.ptr());
    given.push_back(stream.ptr());
    append(given, compiled_.ptr());
    given.insert(given.end(), 3, Py_None);  // the hooks, and what they would be told
    add(given);
    for (PyObject* const part : {tail_.ptr(), further, rest_.ptr()}) append(given, part);
    return owned(PyObject_Vectorcall(run_.ptr(), given.data(), given.size(), nullptr)) ? 1 : -1;
  }

  static void append(std::vector<PyObject*>& given, PyObject* tuple) {
    for (Py_ssize_t at = 0; at < PyTuple_GET_SIZE(tuple); ++at) given.push_back(PyTuple_GET_ITEM(tuple, at));
  }

 private:
  struct Names {
    PyObject *device = interned("get_current_device"), *stream = interned("get_current_stream"),
             *debug = interned("debug"), *instrumentation = interned("instrumentation_mode"),
             *stages = interned("add_stages_inspection_hook"), *pre_run = interned("pre_run_hooks"),
             *enter = interned("launch_enter_hook"), *leave = interned("launch_exit_hook"),
             *calls = interned("calls");
  };

  static const Names& names() {
    static const Names all;
    return all;
  }

  // Each says 1, 0, or -1 with an exception set.

  static int equals(const pybind11::object& owner, PyObject* name, PyObject* wanted) {
    const auto found = owned(PyObject_GetAttr(owner.ptr(), name));
    return found ? PyObject_RichCompareBool(found.ptr(), wanted, Py_EQ) : -1;
  }

  static int is_empty(const pybind11::object& owner, PyObject* name) {
    const auto found = owned(PyObject_GetAttr(owner.ptr(), name));
    return found ? PyObject_Not(found.ptr()) : -1;
  }

  int is_silent(PyObject* hook_name) const {
    const auto hook = owned(PyObject_GetAttr(runtime_.ptr(), hook_name));
    if (!hook) return -1;
    if (hook.is_none()) return 1;
    return reinterpret_cast<PyObject*>(Py_TYPE(hook.ptr())) == chain_.ptr() ? is_empty(hook, names().calls)
                                                                            : 0;
  }

  int is_on_device() const {
    if (device_ < 0) return 1;  // there is no other
    const auto current = owned(PyObject_CallMethodNoArgs(active_.ptr(), names().device));
    if (!current) return -1;
    const long index = PyLong_AsLong(current.ptr());
    return index == -1 && PyErr_Occurred() ? -1 : index == device_;
  }

  int unchanged() const {
    const auto active = owned(PyObject_GetAttr(driver_.ptr(), slot_.ptr()));
    if (!active) return -1;
    if (active.ptr() != active_.ptr()) return 0;
    int same = is_on_device();
    if (same > 0) same = equals(runtime_, names().debug, PyTuple_GET_ITEM(state_.ptr(), 0));
    if (same > 0) same = equals(compilation_, names().instrumentation, PyTuple_GET_ITEM(state_.ptr(), 1));
    if (same > 0) same = equals(runtime_, names().stages, PyTuple_GET_ITEM(state_.ptr(), 2));
    if (same > 0) same = is_empty(kernel_, names().pre_run);
    if (same > 0) same = is_silent(names().enter);
    if (same > 0) same = is_silent(names().leave);
    return same;
  }

  const pybind11::object driver_, slot_, active_, runtime_, compilation_, kernel_, chain_, run_;
  const pybind11::tuple state_, programs_, compiled_, tail_, rest_;
  const long device_;
  const pybind11::int_ stream_of_;
};

inline PyMethodDef& direct_launch_definition() {
  static PyMethodDef definition = {"launch", nullptr, 0, "Launch, or do nothing and return False."};
  return definition;
}

// launch(varying, further): whether it was done.
inline pybind11::object direct_launch(const pybind11::dict& told) {
  return fast_call<DirectLaunch, &DirectLaunch::launch>(direct_launch_definition(), new DirectLaunch(told));
}

// What such a function launches, borrowed; null for any other object.
inline const DirectLaunch* direct_launch_of(PyObject* function) {
  if (!PyCFunction_CheckExact(function)) return nullptr;
  auto* const object = reinterpret_cast<PyCFunctionObject*>(function);
  return object->m_ml == &direct_launch_definition() ? owner_of<DirectLaunch>(object->m_self) : nullptr;
}

}  // namespace kdfast
