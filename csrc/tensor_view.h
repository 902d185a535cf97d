// Tensors as the native library sees them when it is called with the tensors themselves, which it reads through
// DLPack's exchange table.
#pragma once
#include <Python.h>
#include <stdint.h>

#include "dlpack.h"
#include "mmfast.h"

namespace mmfast {

// What is asked of torch once.
struct Torch {
    const DlpackExchange* exchange = nullptr;  // null: this torch has none, and no call is served
    PyTypeObject *tensor = nullptr, *parameter = nullptr;
    PyObject *empty_like = nullptr, *requires_grad = nullptr, *is_neg = nullptr;
    PyObject *single = nullptr, *dual = nullptr;  // tensors without dimensions, float32 and float64
};

const Torch& torch_of();

struct View {
    void* data;
    int64_t size;
    int32_t dtype;  // enum mmfast_dtype
};

// whether the object is a torch.Tensor or a torch.nn.Parameter itself, of no subclass
bool is_tensor(PyObject* object);
bool is_parameter(PyObject* object);

// of such an object; false where it is not dense, on the CPU, of float32 or float64
bool view(PyObject* tensor, DlpackTensor& x, View& found);

// the address of a tensor's data; false: a Python error is set
bool address(PyObject* tensor, void*& data);

// torch.empty_like(x); null: a Python error is set
PyObject* empty_like(PyObject* x);

// what an error of a kernel's stands for: native.py's check
PyObject* raise(int status);

}  // namespace mmfast
