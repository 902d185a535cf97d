// The adversarial loss on a CPU, called with the tensors themselves. For 64 logits the kernel takes a microsecond, and
// reading five addresses in Python and converting a dozen arguments took ten times as long.
#include <vector>

#include "direct.h"
#include "tensor_view.h"

namespace mmfast {
namespace {

// so few elements that other threads of Python may wait for them, and that gradients of a constant cost nothing
constexpr int64_t kFew = 4096;

bool have_one_shape(const DlpackTensor& x, const DlpackTensor& y) {
    if (x.ndim != y.ndim) return false;
    for (int i = 0; i < x.ndim; ++i)
        if (x.shape[i] != y.shape[i]) return false;
    return true;
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
            if (!is_tensor(tensors_[i]) || !view(tensors_[i], views[i], found)) return false;
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

// (tensor) -> the number of a tensor without dimensions, or None where it has none that can be read
PyObject* number_of(PyObject*, PyObject* tensor) {
    DlpackTensor x;
    View found;
    if (!torch_of().exchange || !is_tensor(tensor) || !view(tensor, x, found) || found.size != 1) Py_RETURN_NONE;
    return PyFloat_FromDouble(found.dtype == MMFAST_FLOAT64 ? *static_cast<const double*>(found.data)
                                                            : double(*static_cast<const float*>(found.data)));
}

PyMethodDef kMethods[] = {
    {"adversarial_direct", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(adversarial_direct)),
     METH_FASTCALL, nullptr},
    {"number_of", number_of, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

int add_adversarial_direct(PyObject* module) { return PyModule_AddFunctions(module, kMethods); }

}  // namespace mmfast
