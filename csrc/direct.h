// Entries that are called with tensors and not with their addresses.
#pragma once
#include <Python.h>

#include "mmfast.h"

namespace mmfast {

// What adversarial_direct is to do, bit by bit; native.py has the same names.
enum DirectOptions : long {
    kDirectMean = 1,       // else the sum
    kDirectAverages = 2,   // terms 2k and 2k + 1 are each other's peers
    kDirectOthers = 4,     // the second half of the tensors are the others of the first
    kDirectConstant = 8,   // the gradients do not depend on the logits
    kDirectGradients = 16  // of those tensors that require one
};

// add the functions to the module; not 0: a Python error is set
int add_adversarial_direct(PyObject* module);
int add_rnn_cell_direct(PyObject* module);

}  // namespace mmfast
