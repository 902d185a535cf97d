#include "tensor_view.h"

namespace mmfast {
namespace {

// torch.zeros((), dtype=torch.`dtype`, device="cpu"), whatever the default device
PyObject* scalar_of(PyObject* torch, const char* dtype) {
    PyObject* zeros = PyObject_GetAttrString(torch, "zeros");
    PyObject* shape = Py_BuildValue("(())");
    PyObject* options = Py_BuildValue("{s:N,s:s}", "dtype", PyObject_GetAttrString(torch, dtype), "device", "cpu");
    PyObject* scalar = zeros && shape && options ? PyObject_Call(zeros, shape, options) : nullptr;
    Py_XDECREF(zeros), Py_XDECREF(shape), Py_XDECREF(options);
    return scalar;
}

// Errors leave it without an exchange table.
Torch ask_torch() {
    Torch found;
    PyObject *torch = PyImport_ImportModule("torch"), *nn = PyImport_ImportModule("torch.nn");
    if (!torch || !nn) return found;
    found.tensor = reinterpret_cast<PyTypeObject*>(PyObject_GetAttrString(torch, "Tensor"));
    found.parameter = reinterpret_cast<PyTypeObject*>(PyObject_GetAttrString(nn, "Parameter"));
    found.empty_like = PyObject_GetAttrString(torch, "empty_like");
    found.requires_grad = PyUnicode_InternFromString("requires_grad");
    found.is_neg = PyUnicode_InternFromString("is_neg");
    found.single = scalar_of(torch, "float32");
    found.dual = scalar_of(torch, "float64");
    Py_DECREF(torch), Py_DECREF(nn);
    if (!found.tensor || !found.parameter || !found.empty_like || !found.requires_grad || !found.is_neg ||
        !found.single || !found.dual)
        return found;
    PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(found.tensor), "__dlpack_c_exchange_api__");
    if (!capsule) return found;
    const auto* exchange = static_cast<DlpackExchange*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    Py_DECREF(capsule);
    if (exchange && exchange->major == kDlpackMajor && exchange->view_of_object) found.exchange = exchange;
    return found;
}

bool is_contiguous(const DlpackTensor& x, int64_t size) {
    if (!x.strides || size == 0) return true;
    int64_t expected = 1;
    for (int i = x.ndim - 1; i >= 0; --i) {
        if (x.shape[i] == 1) continue;
        if (x.strides[i] != expected) return false;
        expected *= x.shape[i];
    }
    return true;
}

// whether what is in memory is the tensor itself, and not its negative
bool is_itself(PyObject* tensor) {
    PyObject* negative = PyObject_CallMethodNoArgs(tensor, torch_of().is_neg);
    Py_XDECREF(negative);
    if (!negative) PyErr_Clear();
    return negative == Py_False;
}

}  // namespace

const Torch& torch_of() {
    static const Torch torch = [] {
        const Torch found = ask_torch();
        PyErr_Clear();
        return found;
    }();
    return torch;
}

bool is_tensor(PyObject* object) { return Py_TYPE(object) == torch_of().tensor; }
bool is_parameter(PyObject* object) { return Py_TYPE(object) == torch_of().parameter; }

bool view(PyObject* tensor, DlpackTensor& x, View& found) {
    if (torch_of().exchange->view_of_object(tensor, &x) != 0) {
        PyErr_Clear();
        return false;
    }
    if (x.device_type != kDlpackCpu || x.code != kDlpackFloat || x.lanes != 1 || x.bits < 32) return false;
    int64_t size = 1;
    for (int i = 0; i < x.ndim; ++i) size *= x.shape[i];
    if (!x.data && size) return false;
    found = {static_cast<char*>(x.data) + x.byte_offset, size, x.bits == 32 ? MMFAST_FLOAT32 : MMFAST_FLOAT64};
    return is_contiguous(x, size) && is_itself(tensor);
}

bool address(PyObject* tensor, void*& data) {
    DlpackTensor x;
    if (torch_of().exchange->view_of_object(tensor, &x) != 0) return false;
    data = static_cast<char*>(x.data) + x.byte_offset;
    return true;
}

PyObject* empty_like(PyObject* x) { return PyObject_Vectorcall(torch_of().empty_like, &x, 1, nullptr); }

PyObject* raise(int status) {
    PyObject* kind = status == MMFAST_INVALID_ARGUMENT ? PyExc_ValueError
                     : status == MMFAST_OUT_OF_MEMORY  ? PyExc_MemoryError
                                                       : PyExc_RuntimeError;
    PyErr_SetString(kind, mmfast_last_error());
    return nullptr;
}

}  // namespace mmfast
