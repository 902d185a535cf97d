// The one pybind11 file: integers that are pointers in, a status out, the GIL released around every kernel.
// Only mmfast/native.py calls it; shapes, dtypes and devices are checked there.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "mmfast.h"

namespace py = pybind11;

namespace {

using Pointer = uintptr_t;

template <typename T = void>
T* as_pointer(Pointer address) {
    return reinterpret_cast<T*>(address);
}

template <typename Args>
using Kernel = int (*)(const Args*);

template <typename Args>
int run(Kernel<Args> kernel, const Args& args) {
    py::gil_scoped_release nogil;
    return kernel(&args);
}

// one row a term: logits, dlogits (0 in forward), size, phi, sign, shift, weight
using Term = std::tuple<Pointer, Pointer, int64_t, int, double, double, double>;

std::vector<mmfast_adversarial_term> as_terms(const std::vector<Term>& rows) {
    std::vector<mmfast_adversarial_term> terms;
    terms.reserve(rows.size());
    for (const auto& [logits, dlogits, size, phi, sign, shift, weight] : rows)
        terms.push_back({as_pointer(logits), as_pointer(dlogits), size, phi, sign, shift, weight});
    return terms;
}

int adversarial(Kernel<mmfast_adversarial_args> kernel, int dtype, bool mean, const std::vector<Term>& rows,
                Pointer values, Pointer total, Pointer dtotal, int threads) {
    const std::vector<mmfast_adversarial_term> terms = as_terms(rows);
    mmfast_adversarial_args args{};
    args.dtype = dtype;
    args.mean = mean;
    args.count = int64_t(terms.size());
    args.terms = terms.data();
    args.values = as_pointer(values);
    args.total = as_pointer(total);
    args.dtotal = as_pointer(dtotal);
    args.threads = threads;
    return run(kernel, args);
}

// dtype, mode, directions, T, B, H, step stride, batch stride, offsets, lengths, W_hh of both directions, b_hh of both,
// h0, c0, threads
using RnnLayer = std::tuple<int, int, int, int64_t, int64_t, int64_t, int64_t, int64_t, Pointer, Pointer, Pointer,
                            Pointer, Pointer, Pointer, Pointer, Pointer, int>;

mmfast_rnn_layer as_layer(const RnnLayer& row) {
    mmfast_rnn_layer layer{};
    Pointer offsets, lengths, w_hh, w_hh_reverse, b_hh, b_hh_reverse, h0, c0;
    std::tie(layer.dtype, layer.mode, layer.directions, layer.steps, layer.batch, layer.hidden, layer.step_stride,
             layer.batch_stride, offsets, lengths, w_hh, w_hh_reverse, b_hh, b_hh_reverse, h0, c0, layer.threads) = row;
    layer.offsets = as_pointer<int64_t>(offsets);
    layer.lengths = as_pointer<int64_t>(lengths);
    layer.w_hh[0] = as_pointer(w_hh);
    layer.w_hh[1] = as_pointer(w_hh_reverse);
    layer.b_hh[0] = as_pointer(b_hh);
    layer.b_hh[1] = as_pointer(b_hh_reverse);
    layer.h0 = as_pointer(h0);
    layer.c0 = as_pointer(c0);
    return layer;
}

int rnn_forward(const RnnLayer& layer, Pointer gx, Pointer gates, Pointer cell, Pointer y, Pointer hn, Pointer cn) {
    const mmfast_rnn_forward_args args = {as_layer(layer), as_pointer(gx), as_pointer(gates), as_pointer(cell),
                                          as_pointer(y),   as_pointer(hn), as_pointer(cn)};
    return run(mmfast_cpu_rnn_forward, args);
}

int rnn_backward(const RnnLayer& layer, Pointer y, Pointer gates, Pointer cell, Pointer dy, Pointer dhn, Pointer dcn,
                 Pointer dgates, Pointer dm, Pointer previous, Pointer dh0, Pointer dc0) {
    const mmfast_rnn_backward_args args = {as_layer(layer), as_pointer(y),        as_pointer(gates), as_pointer(cell),
                                           as_pointer(dy),  as_pointer(dhn),      as_pointer(dcn),   as_pointer(dgates),
                                           as_pointer(dm),  as_pointer(previous), as_pointer(dh0),   as_pointer(dc0)};
    return run(mmfast_cpu_rnn_backward, args);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.attr("abi_version") = MMFAST_ABI_VERSION;
    m.attr("version") = MMFAST_VERSION;
    py::dict build;
    build["compiler"] = MMFAST_BUILD_COMPILER;
    build["openmp"] = MMFAST_BUILD_OPENMP;
    build["instruction sets"] = MMFAST_BUILD_ISAS;
    build["cuda"] = MMFAST_BUILD_CUDA;
    m.attr("build") = build;

    m.def("last_error", &mmfast_last_error);
    m.def("isa", &mmfast_isa);
    m.def("set_isa", &mmfast_set_isa);
    m.def("supported_isas", &mmfast_supported_isas);

    m.def("cpu_adversarial_forward",
          [](int dtype, bool mean, const std::vector<Term>& terms, Pointer values, Pointer total, int threads) {
              return adversarial(mmfast_cpu_adversarial_forward, dtype, mean, terms, values, total, 0, threads);
          });
    m.def("cpu_adversarial_backward",
          [](int dtype, bool mean, const std::vector<Term>& terms, Pointer dtotal, int threads) {
              return adversarial(mmfast_cpu_adversarial_backward, dtype, mean, terms, 0, 0, dtotal, threads);
          });
    m.def("cpu_rnn_forward", &rnn_forward);
    m.def("cpu_rnn_backward", &rnn_backward);
}
