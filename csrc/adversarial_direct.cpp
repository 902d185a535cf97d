// The adversarial loss on a CPU, called with the tensors themselves. For 64 logits the kernel takes a microsecond, and
// reading five addresses in Python and converting a dozen arguments took ten times as long.
#include "adversarial_direct.h"

#include <stdint.h>

#include <vector>

#include "dlpack.h"

namespace mmfast {
namespace {

// so few elements that other threads of Python may wait for them, and that gradients of a constant cost nothing
constexpr int64_t kFew = 4096;

// What is asked of torch once.
struct Torch {
    const DlpackExchange* exchange = nullptr;  // null: this torch has none, and no call is served
    PyTypeObject* tensor = nullptr;
    PyObject *empty_like = nullptr, *requires_grad = nullptr, *is_neg = nullptr;
    PyObject *single = nullptr, *dual = nullptr;  // tensors without dimensions, float32 and float64
};

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
    PyObject* torch = PyImport_ImportModule("torch");
    if (!torch) return found;
    found.tensor = reinterpret_cast<PyTypeObject*>(PyObject_GetAttrString(torch, "Tensor"));
    found.empty_like = PyObject_GetAttrString(torch, "empty_like");
    found.requires_grad = PyUnicode_InternFromString("requires_grad");
    found.is_neg = PyUnicode_InternFromString("is_neg");
    found.single = scalar_of(torch, "float32");
    found.dual = scalar_of(torch, "float64");
    Py_DECREF(torch);
    if (!found.tensor || !found.empty_like || !found.requires_grad || !found.is_neg || !found.single || !found.dual)
        return found;
    PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(found.tensor), "__dlpack_c_exchange_api__");
    if (!capsule) return found;
    const auto* exchange = static_cast<DlpackExchange*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    Py_DECREF(capsule);
    if (exchange && exchange->major == kDlpackMajor && exchange->view_of_object) found.exchange = exchange;
    return found;
}

const Torch& torch_of() {
    static const Torch torch = [] {
        const Torch found = ask_torch();
        PyErr_Clear();
        return found;
    }();
    return torch;
}

struct View {
    void* data;
    int64_t size;
    int32_t dtype;  // enum mmfast_dtype
};

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

bool have_one_shape(const DlpackTensor& x, const DlpackTensor& y) {
    if (x.ndim != y.ndim) return false;
    for (int i = 0; i < x.ndim; ++i)
        if (x.shape[i] != y.shape[i]) return false;
    return true;
}

// whether what is in memory is the tensor itself, and not its negative
bool is_itself(PyObject* tensor) {
    PyObject* negative = PyObject_CallMethodNoArgs(tensor, torch_of().is_neg);
    Py_XDECREF(negative);
    if (!negative) PyErr_Clear();
    return negative == Py_False;
}

// false where the object is no torch.Tensor that is dense, on the CPU, of float32 or float64
bool view(PyObject* object, DlpackTensor& x, View& found) {
    const Torch& torch = torch_of();
    if (Py_TYPE(object) != torch.tensor) return false;
    if (torch.exchange->view_of_object(object, &x) != 0) {
        PyErr_Clear();
        return false;
    }
    if (x.device_type != kDlpackCpu || x.code != kDlpackFloat || x.lanes != 1 || x.bits < 32) return false;
    int64_t size = 1;
    for (int i = 0; i < x.ndim; ++i) size *= x.shape[i];
    if (!x.data && size) return false;
    found = {static_cast<char*>(x.data) + x.byte_offset, size, x.bits == 32 ? MMFAST_FLOAT32 : MMFAST_FLOAT64};
    return is_contiguous(x, size) && is_itself(object);
}

PyObject* empty_like(PyObject* x) { return PyObject_Vectorcall(torch_of().empty_like, &x, 1, nullptr); }

// what an error of the kernel's stands for: native.py's check
PyObject* raise(int status) {
    PyObject* kind = status == MMFAST_INVALID_ARGUMENT ? PyExc_ValueError
                     : status == MMFAST_OUT_OF_MEMORY  ? PyExc_MemoryError
                                                       : PyExc_RuntimeError;
    PyErr_SetString(kind, mmfast_last_error());
    return nullptr;
}

class Call {
  public:
    Call(const std::vector<mmfast_adversarial_term>& terms, long options, int threads, PyObject* const* tensors,
         size_t count)
        : terms_(terms), options_(options), tensors_(tensors), count_(count) {
        args_.mean = (options & kDirectMean) != 0;
        args_.count = int64_t(terms_.size());
        args_.terms = terms_.data();
        args_.threads = threads;
    }
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;
    ~Call() {
        Py_XDECREF(total_);
        Py_XDECREF(gradients_);
    }

    // false where another path has to serve these tensors
    bool read() {
        if (!torch_of().exchange) return false;
        const size_t terms = terms_.size();
        const bool has_others = options_ & kDirectOthers;
        if (count_ != (has_others ? 2 * terms : terms)) return false;
        std::vector<DlpackTensor> views(count_);
        for (size_t i = 0; i < count_; ++i) {
            View found;
            if (!view(tensors_[i], views[i], found)) return false;
            if (i == 0) args_.dtype = found.dtype, first_size_ = found.size;
            if (found.dtype != args_.dtype) return false;
            elements_ += found.size;
            if (i < terms) {
                terms_[i].logits = found.data, terms_[i].size = found.size;
            } else {
                if (!have_one_shape(views[i], views[i - terms])) return false;
                terms_[i - terms].other = found.data;
            }
        }
        return true;
    }

    // (total, gradients); null with a Python error
    PyObject* compute() {
        total_ = empty_like(args_.dtype == MMFAST_FLOAT64 ? torch_of().dual : torch_of().single);
        if (!total_ || !address(total_, args_.total) || !want()) return nullptr;
        if (options_ & kDirectAverages) centre();
        const int status = run();
        if (status != MMFAST_OK) return raise(status);
        return PyTuple_Pack(2, total_, gradients_);
    }

  private:
    // each term's centre is the mean of the next one's logits, or of the one's before
    void centre() {
        const size_t bytes = args_.dtype == MMFAST_FLOAT64 ? sizeof(double) : sizeof(float);
        state_.resize(2 * terms_.size());
        char* means = reinterpret_cast<char*>(state_.data());
        char* slopes = reinterpret_cast<char*>(state_.data() + terms_.size());
        args_.means = means;
        if (gradients_ != Py_None) args_.slopes = slopes;
        for (size_t k = 0; k < terms_.size(); ++k) {
            terms_[k].centre = means + (k ^ 1) * bytes;
            terms_[k].peer_slope = slopes + (k ^ 1) * bytes;
        }
    }

    static bool address(PyObject* tensor, void*& data) {
        DlpackTensor x;
        if (torch_of().exchange->view_of_object(tensor, &x) != 0) return false;
        data = static_cast<char*>(x.data) + x.byte_offset;
        return true;
    }

    // makes the gradients: None where nobody wants one, () where they are left for later
    bool want() {
        Py_INCREF(Py_None);
        gradients_ = Py_None;
        if (!(options_ & kDirectGradients)) return true;
        const bool later = (options_ & kDirectConstant) && first_size_ > kFew;
        PyObject* made = nullptr;
        for (size_t i = 0; i < count_; ++i) {
            PyObject* needed = PyObject_GetAttr(tensors_[i], torch_of().requires_grad);
            if (!needed) return false;
            Py_DECREF(needed);
            if (needed != Py_True) continue;
            if (!made) {
                made = PyTuple_New(later ? 0 : Py_ssize_t(count_));
                if (!made) return false;
                Py_SETREF(gradients_, made);
            }
            if (later) return true;
            PyObject* gradient = empty_like(tensors_[i]);
            if (!gradient) return false;
            PyTuple_SET_ITEM(made, Py_ssize_t(i), gradient);
            mmfast_adversarial_term& term = terms_[i % terms_.size()];
            if (!address(gradient, i < terms_.size() ? term.dlogits : term.dother)) return false;
        }
        // of what needs no gradient, None
        for (Py_ssize_t i = 0; made && i < Py_ssize_t(count_); ++i)
            if (!PyTuple_GET_ITEM(made, i)) Py_INCREF(Py_None), PyTuple_SET_ITEM(made, i, Py_None);
        return true;
    }

    int run() {
        if (elements_ <= kFew) return mmfast_cpu_adversarial_forward(&args_);
        int status;
        Py_BEGIN_ALLOW_THREADS;
        status = mmfast_cpu_adversarial_forward(&args_);
        Py_END_ALLOW_THREADS;
        return status;
    }

    std::vector<mmfast_adversarial_term> terms_;
    std::vector<double> state_;
    mmfast_adversarial_args args_{};
    long options_;
    PyObject* const* tensors_;
    size_t count_;
    int64_t first_size_ = 0, elements_ = 0;
    PyObject *total_ = nullptr, *gradients_ = nullptr;
};

// (address of a list of terms, options, threads, *tensors) -> None, or (total, gradients)
PyObject* adversarial_direct(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (count < 4) {
        PyErr_SetString(PyExc_TypeError, "expected terms, options, threads and tensors");
        return nullptr;
    }
    const auto* terms = static_cast<const std::vector<mmfast_adversarial_term>*>(PyLong_AsVoidPtr(args[0]));
    const long options = PyLong_AsLong(args[1]), threads = PyLong_AsLong(args[2]);
    if (PyErr_Occurred()) return nullptr;
    Call call(*terms, options, int(threads), args + 3, size_t(count - 3));
    if (!call.read()) Py_RETURN_NONE;
    return call.compute();
}

// (tensor) -> the number of a tensor without dimensions, or None where `view` is false
PyObject* number_of(PyObject*, PyObject* tensor) {
    DlpackTensor x;
    View found;
    if (!torch_of().exchange || !view(tensor, x, found) || found.size != 1) Py_RETURN_NONE;
    return PyFloat_FromDouble(found.dtype == MMFAST_FLOAT64 ? *static_cast<const double*>(found.data)
                                                            : double(*static_cast<const float*>(found.data)));
}

PyMethodDef kMethods[] = {
    {"adversarial_direct", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(adversarial_direct)),
     METH_FASTCALL, nullptr},
    {"number_of", number_of, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

int add_direct(PyObject* module) { return PyModule_AddFunctions(module, kMethods); }

}  // namespace mmfast
