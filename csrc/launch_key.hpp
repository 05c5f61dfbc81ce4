// What a plan and a compiled kernel depend on of a call's arguments, as bytes: looked up before every launch.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "fast_call.hpp"

namespace kdfast {

// DLPack's C exchange (dlpack.h, version 1): how torch tells of a tensor without an object of Python's for
// each answer. Declared here, since nothing in csrc/ is compiled against torch.
namespace dlpack {

struct Device {
  int32_t type, index;
};

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t dims;
  DataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct Exchange {
  struct {
    uint32_t major, minor;
  } version;
  void *older, *allocate, *to_managed, *from_managed;
  int (*view)(void* object, Tensor* out);  // not owning; -1 with an exception set
  void* current_stream;
};

}  // namespace dlpack

// Keys of arguments; `type` is torch.Tensor, `exchange` null where torch has none that we know.
class LaunchKeys {
 public:
  LaunchKeys(PyTypeObject* type, const dlpack::Exchange* exchange) : type_(type), exchange_(exchange) {}

  // Key of `whole`, tensors or None with all their geometry, and of `kinds`, arguments with what a compiler
  // looks at. Both are tuples.
  PyObject* key(PyObject* whole, PyObject* kinds) const {
    if (!PyTuple_Check(whole) || !PyTuple_Check(kinds)) {
      PyErr_SetString(PyExc_TypeError, "launch_key: two tuples are needed");
      return nullptr;
    }
    std::string key;
    key.reserve(256);
    for (Py_ssize_t at = 0; at < PyTuple_GET_SIZE(whole); ++at)
      if (!add(key, PyTuple_GET_ITEM(whole, at), true)) return nullptr;
    key += '|';
    for (Py_ssize_t at = 0; at < PyTuple_GET_SIZE(kinds); ++at)
      if (!add(key, PyTuple_GET_ITEM(kinds, at), false)) return nullptr;
    return PyBytes_FromStringAndSize(key.data(), static_cast<Py_ssize_t>(key.size()));
  }

  // The part of one value; false with an exception set.
  bool add(std::string& key, PyObject* value, bool whole) const {
    if (value == Py_None) {
      key += 'n';
    } else if (PyFloat_CheckExact(value)) {
      key += 'f';
    } else if (PyLong_CheckExact(value)) {
      add_integer(key, value);
    } else if (PyObject_TypeCheck(value, type_)) {
      dlpack::Tensor tensor{};
      if (exchange_ == nullptr || exchange_->view(value, &tensor) != 0) {
        PyErr_Clear();
        return add_by_name(key, value, whole);  // a meta tensor, whose memory is nowhere
      }
      add_tensor(key, tensor, whole);
    } else {
      key += 'o';
      append(key, Py_TYPE(value));
    }
    return true;
  }

 private:
  template <typename T>
  static void append(std::string& key, const T& value) {
    key.append(reinterpret_cast<const char*>(&value), sizeof value);
  }

  // Triton compiles for an integer's width, and for whether 16 divides it or it is 1.
  static void add_integer(std::string& key, PyObject* value) {
    int overflow = 0;
    const long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
    unsigned long long bits = static_cast<unsigned long long>(number);
    if (overflow != 0) {
      bits = PyLong_AsUnsignedLongLongMask(value);
      PyErr_Clear();
    }
    const bool narrow = number >= INT32_MIN && number <= INT32_MAX;
    key += overflow != 0 ? 'u' : narrow ? 'i' : 'l';
    key += static_cast<char>('0' + ((bits & 15) == 0) + 2 * (overflow == 0 && number == 1));
  }

  static void add_tensor(std::string& key, const dlpack::Tensor& tensor, bool whole) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(tensor.data) + tensor.byte_offset;
    key += 't';
    append(key, tensor.dtype);
    key += static_cast<char>(address & 15);
    if (!whole) {
      key += static_cast<char>(tensor.dims == 0);
      return;
    }
    append(key, tensor.device);
    append(key, tensor.dims);
    const size_t bytes = sizeof(int64_t) * static_cast<size_t>(tensor.dims);
    if (bytes == 0) return;
    key.append(reinterpret_cast<const char*>(tensor.shape), bytes);
    key.append(reinterpret_cast<const char*>(tensor.strides), bytes);
  }

  // The same, asked of the object itself, in more time.
  static bool add_by_name(std::string& key, PyObject* value, bool whole) {
    const auto object = pybind11::reinterpret_borrow<pybind11::object>(value);
    try {
      const auto address = pybind11::cast<uint64_t>(object.attr("data_ptr")());
      const bool scalar = pybind11::cast<int64_t>(object.attr("dim")()) == 0;
      pybind11::tuple found = pybind11::make_tuple(object.attr("dtype"), address & 15, scalar);
      if (whole)
        found =
            pybind11::make_tuple(found, object.attr("device"), object.attr("shape"), object.attr("stride")());
      key += 's' + pybind11::cast<std::string>(pybind11::repr(found));
    } catch (pybind11::error_already_set& error) {
      error.restore();
      return false;
    }
    return true;
  }

  PyTypeObject* type_;
  const dlpack::Exchange* exchange_;
};

// What torch.Tensor offers, or null: no such attribute, or of a version that is laid out otherwise.
inline const dlpack::Exchange* exchange_of(PyObject* type) {
  PyObject* const capsule = PyObject_GetAttrString(type, "__dlpack_c_exchange_api__");
  const dlpack::Exchange* found = nullptr;
  if (capsule != nullptr) {
    found = static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    Py_DECREF(capsule);  // the table itself lives as long as the process
  }
  PyErr_Clear();
  return found != nullptr && found->version.major == 1 && found->view != nullptr ? found : nullptr;
}

// launch_key(whole, kinds) for tensors of this class.
inline pybind11::object launch_key_of(const pybind11::type& type) {
  static PyMethodDef definition = {"launch_key", nullptr, 0,
                                   "Bytes that are equal where a plan and a compiled kernel are."};
  auto* const object = reinterpret_cast<PyTypeObject*>(type.inc_ref().ptr());  // kept for good, as the key is
  return fast_call<LaunchKeys, &LaunchKeys::key>(definition, new LaunchKeys(object, exchange_of(type.ptr())));
}

}  // namespace kdfast
