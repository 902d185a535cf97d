// A Cell's step for few rows on a CPU, called with the tensors themselves: the kernel takes a few microseconds, and
// looking at seven tensors in Python took as long again.
#include "direct.h"
#include "tensor_view.h"

namespace mmfast {
namespace {

// Reads a step's tensors; a size that is not known yet is -1.
class Reader {
  public:
    // the first tensor tells the dtype
    explicit Reader(mmfast_rnn_cell_args& args) : args_(args) { args_.dtype = -1; }

    // false where another path has to serve this tensor
    bool matrix(PyObject* tensor, int64_t& rows, int64_t& columns, const void*& data) {
        return read(tensor, 2, data) && agree(x_.shape[0], rows) && agree(x_.shape[1], columns);
    }

    bool bias(PyObject* tensor, int64_t& rows, const void*& data) {
        return tensor == Py_None || (read(tensor, 1, data) && agree(x_.shape[0], rows));
    }

  private:
    bool read(PyObject* tensor, int32_t dims, const void*& data) {
        View found;
        if (!is_tensor(tensor) && !is_parameter(tensor)) return false;
        if (!view(tensor, x_, found) || x_.ndim != dims) return false;
        if (args_.dtype < 0) args_.dtype = found.dtype;
        data = found.data;
        return found.dtype == args_.dtype;
    }

    static bool agree(int64_t size, int64_t& known) {
        if (known < 0) known = size;
        return size == known;
    }

    mmfast_rnn_cell_args& args_;
    DlpackTensor x_;
};

// (mode, most rows, x, hx, w_ih, w_hh, b_ih, b_hh) -> h', or an LSTM's (h', c'), or None where another path has to
// serve
PyObject* rnn_cell_direct(PyObject*, PyObject* const* given, Py_ssize_t count) {
    if (count != 8) {
        PyErr_SetString(PyExc_TypeError, "expected mode, most rows, x, hx, two weights and two biases");
        return nullptr;
    }
    const long mode = PyLong_AsLong(given[0]), most = PyLong_AsLong(given[1]);
    if (PyErr_Occurred()) return nullptr;
    if (!torch_of().exchange) Py_RETURN_NONE;
    PyObject *h0 = given[3], *c0 = nullptr;
    if (mode == MMFAST_LSTM) {
        if (!PyTuple_CheckExact(h0) || PyTuple_GET_SIZE(h0) != 2) Py_RETURN_NONE;
        c0 = PyTuple_GET_ITEM(h0, 1), h0 = PyTuple_GET_ITEM(h0, 0);
    }
    mmfast_rnn_cell_args args{};
    args.mode = int32_t(mode);
    args.batch = args.input = args.hidden = -1;
    Reader reader(args);
    if (!reader.matrix(given[2], args.batch, args.input, args.x) || args.batch > most ||
        !reader.matrix(h0, args.batch, args.hidden, args.h0))
        Py_RETURN_NONE;
    int64_t rows = args.hidden * (mode == MMFAST_LSTM ? 4 : mode == MMFAST_GRU ? 3 : 1);
    if ((c0 && !reader.matrix(c0, args.batch, args.hidden, args.c0)) ||
        !reader.matrix(given[4], rows, args.input, args.w_ih) ||
        !reader.matrix(given[5], rows, args.hidden, args.w_hh) || !reader.bias(given[6], rows, args.b_ih) ||
        !reader.bias(given[7], rows, args.b_hh) || (given[6] == Py_None) != (given[7] == Py_None))
        Py_RETURN_NONE;
    PyObject* h = empty_like(h0);
    PyObject* c = h && c0 ? empty_like(h0) : nullptr;
    PyObject* both = nullptr;
    if (h && (c || !c0) && address(h, args.h) && (!c || address(c, args.c))) {
        int status;
        Py_BEGIN_ALLOW_THREADS;
        status = mmfast_cpu_rnn_cell(&args);
        Py_END_ALLOW_THREADS;
        if (status != MMFAST_OK)
            raise(status);
        else
            both = c ? PyTuple_Pack(2, h, c) : Py_NewRef(h);
    }
    Py_XDECREF(h), Py_XDECREF(c);
    return both;
}

PyMethodDef kMethods[] = {
    {"rnn_cell_direct", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(rnn_cell_direct)), METH_FASTCALL,
     nullptr},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

int add_rnn_cell_direct(PyObject* module) { return PyModule_AddFunctions(module, kMethods); }

}  // namespace mmfast
