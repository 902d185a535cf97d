// The one pybind11 file: integers that are pointers in, a status out, the GIL released around every kernel.
// Only mmfast/native.py calls it; shapes, dtypes and devices are checked there.
// Compiled twice: as _C (CPU kernels, and CUDA kernels where nvcc was found), and with MMFAST_EMULATOR as _emulator
// (the CUDA kernels on a CPU, by the same names).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "mmfast.h"
#ifdef MMFAST_EMULATOR
#include "emulator/machine.h"
#include "emulator/selftest.h"
#else
#include "direct.h"
#endif

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

// What of a list of terms is the same in each call; local to this module, since two modules have it.
struct Terms {
    std::vector<mmfast_adversarial_term> terms;

    // one row a term: phi, sign, shift, weight, tilt
    using Row = std::tuple<int, double, double, double, double>;
    explicit Terms(const std::vector<Row>& rows) {
        for (const auto& [phi, sign, shift, weight, tilt] : rows) {
            mmfast_adversarial_term term{};
            term.per_weight = 1;
            term.phi = phi;
            term.sign = sign, term.shift = shift, term.weight = weight, term.tilt = tilt;
            terms.push_back(term);
        }
    }
};

using Pointers = std::vector<Pointer>;

// weights (K,) or (), per_weight (K,) or (), centres or 0, peers (K,), bytes of a centre
using Extras = std::tuple<Pointers, std::vector<int64_t>, Pointer, std::vector<int64_t>, int64_t>;

void add_extras(std::vector<mmfast_adversarial_term>& terms, const Extras& extras, Pointer slopes) {
    const auto& [weights, per_weight, centres, peers, bytes] = extras;
    for (size_t k = 0; k < terms.size(); ++k) {
        if (!weights.empty()) terms[k].weights = as_pointer(weights.at(k)), terms[k].per_weight = per_weight.at(k);
        if (centres) terms[k].centre = as_pointer(centres + size_t(peers.at(k) * bytes));
        if (slopes) terms[k].peer_slope = as_pointer(slopes + size_t(peers.at(k) * bytes));
    }
}

// One call: logits and sizes (K,); others (K,) or (); extras: an Extras or None.
struct Call {
    std::vector<mmfast_adversarial_term> terms;
    mmfast_adversarial_args args{};

    Call(const Terms& list, int dtype, bool mean, const Pointers& logits, const std::vector<int64_t>& sizes,
         const Pointers& others, const py::object& extras, Pointer slopes)
        : terms(list.terms) {
        if (logits.size() != terms.size() || sizes.size() != terms.size())
            throw std::invalid_argument("one tensor of logits is expected for each term");
        for (size_t k = 0; k < terms.size(); ++k) {
            terms[k].logits = as_pointer(logits[k]), terms[k].size = sizes[k];
            if (!others.empty()) terms[k].other = as_pointer(others.at(k));
        }
        if (!extras.is_none()) add_extras(terms, extras.cast<Extras>(), slopes);
        args.dtype = dtype;
        args.mean = mean;
        args.count = int64_t(terms.size());
        args.terms = terms.data();
    }

    // by the logits (K,), then by the others (K,) where there are others; 0 where one is not wanted
    void want(const Pointers& gradients) {
        const size_t count = terms.size();
        for (size_t k = 0; k < count; ++k) {
            terms[k].dlogits = as_pointer(gradients.at(k));
            if (gradients.size() > count) terms[k].dother = as_pointer(gradients.at(count + k));
        }
    }
};

// outputs: total, values or 0, slopes or 0, means or 0
using Outputs = std::array<Pointer, 4>;

void set_outputs(mmfast_adversarial_args& args, const Outputs& outputs) {
    args.total = as_pointer(outputs[0]);
    args.values = as_pointer(outputs[1]);
    args.slopes = as_pointer(outputs[2]);
    args.means = as_pointer(outputs[3]);
}

#ifndef MMFAST_EMULATOR
// gradients: (): not wanted; else those of the total, in the same call
int cpu_adversarial_forward(const Terms& terms, int dtype, bool mean, const Pointers& logits,
                            const std::vector<int64_t>& sizes, const Pointers& others, const py::object& extras,
                            const Outputs& outputs, const Pointers& gradients, int threads) {
    Call call(terms, dtype, mean, logits, sizes, others, extras, gradients.empty() ? 0 : outputs[2]);
    if (!gradients.empty()) call.want(gradients);
    set_outputs(call.args, outputs);
    call.args.threads = threads;
    return run(mmfast_cpu_adversarial_forward, call.args);
}

int cpu_adversarial_backward(const Terms& terms, int dtype, bool mean, const Pointers& logits,
                             const std::vector<int64_t>& sizes, const Pointers& others, const py::object& extras,
                             Pointer dtotal, Pointer slopes, const Pointers& gradients, int threads) {
    Call call(terms, dtype, mean, logits, sizes, others, extras, slopes);
    call.want(gradients);
    call.args.dtotal = as_pointer(dtotal);
    call.args.threads = threads;
    return run(mmfast_cpu_adversarial_backward, call.args);
}
#endif

// mmfast_rnn_layer, row by row: dtype, mode, directions, T, B, H, proj, zoneout, then the addresses of offsets,
// lengths, reset, zoneout mask, dropout mask, W_hh, b_hh and W_hr of both directions, h0, c0, and threads
mmfast_rnn_layer as_layer(const py::tuple& row) {
    size_t at = 0;
    const auto number = [&] { return row[at++].cast<int64_t>(); };
    const auto address = [&] { return as_pointer(row[at++].cast<Pointer>()); };
    mmfast_rnn_layer layer{};
    layer.dtype = int32_t(number()), layer.mode = int32_t(number()), layer.directions = int32_t(number());
    layer.steps = number(), layer.batch = number(), layer.hidden = number(), layer.proj = number();
    layer.zoneout = row[at++].cast<double>();
    layer.offsets = static_cast<const int64_t*>(address());
    layer.lengths = static_cast<const int64_t*>(address());
    layer.reset = static_cast<const uint8_t*>(address());
    layer.zoneout_mask = static_cast<const uint8_t*>(address());
    layer.dropout_mask = address();
    for (auto member : {layer.w_hh, layer.b_hh, layer.w_hr})
        for (int d = 0; d < 2; ++d) member[d] = address();
    layer.h0 = address(), layer.c0 = address();
    layer.threads = int32_t(number());
    return layer;
}

// p: the pointers of mmfast_rnn_forward_args in their order, up to hn and cn
mmfast_rnn_forward_args as_forward(const std::array<Pointer, 6>& p) {
    mmfast_rnn_forward_args args{};
    size_t at = 0;
    args.gx = as_pointer(p[at++]);
    for (void** out : {&args.gates, &args.cell, &args.y, &args.hn, &args.cn}) *out = as_pointer(p[at++]);
    return args;
}

// p: the pointers of mmfast_rnn_backward_args in their order, but for those of the biases
mmfast_rnn_backward_args as_backward(const std::array<Pointer, 13>& p) {
    mmfast_rnn_backward_args args{};
    size_t at = 0;
    for (const void** in : {&args.y, &args.gates, &args.cell, &args.dy, &args.dhn, &args.dcn})
        *in = as_pointer(p[at++]);
    for (void** out : {&args.dgates, &args.dm, &args.dh, &args.u, &args.previous, &args.dh0, &args.dc0})
        *out = as_pointer(p[at++]);
    return args;
}

#if defined(MMFAST_HAS_CUDA) || defined(MMFAST_EMULATOR)
int cuda_adversarial_forward(const Terms& terms, int dtype, bool mean, const Pointers& logits,
                             const std::vector<int64_t>& sizes, const Pointers& others, const py::object& extras,
                             const Outputs& outputs, Pointer scratch, Pointer stream) {
    Call call(terms, dtype, mean, logits, sizes, others, extras, 0);
    set_outputs(call.args, outputs);
    call.args.scratch = as_pointer(scratch);
    call.args.stream = as_pointer(stream);
    return run(mmfast_cuda_adversarial_forward, call.args);
}

int cuda_adversarial_backward(const Terms& terms, int dtype, bool mean, const Pointers& logits,
                              const std::vector<int64_t>& sizes, const Pointers& others, const py::object& extras,
                              Pointer dtotal, Pointer slopes, const Pointers& gradients, Pointer scratch,
                              Pointer stream) {
    Call call(terms, dtype, mean, logits, sizes, others, extras, slopes);
    call.want(gradients);
    call.args.dtotal = as_pointer(dtotal);
    call.args.scratch = as_pointer(scratch);
    call.args.stream = as_pointer(stream);
    return run(mmfast_cuda_adversarial_backward, call.args);
}
#endif

#if defined(MMFAST_HAS_CUDA) || defined(MMFAST_EMULATOR)
// dtype, mode, directions, rows, hidden, step, then lengths, cut, cuts and cut_step
using RnnStep = std::tuple<int, int, int, int64_t, int64_t, int64_t, Pointer, Pointer, int64_t, int64_t>;

mmfast_rnn_step as_step(const RnnStep& row, Pointer stream) {
    const auto& [dtype, mode, directions, rows, hidden, step, lengths, cut, cuts, cut_step] = row;
    return {dtype,
            mode,
            directions,
            rows,
            hidden,
            step,
            as_pointer<const int64_t>(lengths),
            as_pointer<const uint8_t>(cut),
            cuts,
            cut_step,
            as_pointer(stream)};
}

mmfast_rnn_layer as_cuda_layer(const py::tuple& row, int64_t rows, bool tf32, Pointer stream) {
    mmfast_rnn_layer layer = as_layer(row);
    layer.rows = rows, layer.tf32 = tf32, layer.stream = as_pointer(stream);
    return layer;
}

int cuda_rnn_forward(const py::tuple& layer, int64_t rows, bool tf32, const std::array<Pointer, 6>& p, Pointer stream) {
    mmfast_rnn_forward_args args = as_forward(p);
    args.layer = as_cuda_layer(layer, rows, tf32, stream);
    return run(mmfast_cuda_rnn_forward, args);
}

int cuda_rnn_backward(const py::tuple& layer, int64_t rows, bool tf32, const std::array<Pointer, 13>& p,
                      Pointer stream) {
    mmfast_rnn_backward_args args = as_backward(p);
    args.layer = as_cuda_layer(layer, rows, tf32, stream);
    return run(mmfast_cuda_rnn_backward, args);
}

// p: the pointers of mmfast_rnn_step_forward_args in their order
int cuda_rnn_step_forward(const RnnStep& step, const std::array<Pointer, 9>& p, Pointer stream) {
    const mmfast_rnn_step_forward_args args = {
        as_step(step, stream), as_pointer(p[0]), as_pointer(p[1]), as_pointer(p[2]), as_pointer(p[3]),
        as_pointer(p[4]),      as_pointer(p[5]), as_pointer(p[6]), as_pointer(p[7]), as_pointer(p[8])};
    return run(mmfast_cuda_rnn_step_forward, args);
}

// sizes: all, products, befores, before_step; p: the pointers of mmfast_rnn_step_backward_args in their order
int cuda_rnn_step_backward(const RnnStep& step, const std::array<int64_t, 4>& sizes, const std::array<Pointer, 15>& p,
                           Pointer stream) {
    mmfast_rnn_step_backward_args args{};
    args.step = as_step(step, stream);
    args.all = sizes[0], args.products = sizes[1], args.befores = sizes[2], args.before_step = sizes[3];
    size_t at = 0;
    for (const void** in : {&args.product, &args.y, &args.gates, &args.cell, &args.dy, &args.y_before,
                            &args.cell_before, &args.h0, &args.c0})
        *in = as_pointer(p[at++]);
    for (void** out : {&args.dh, &args.dc, &args.dgates, &args.dm, &args.previous, &args.delta})
        *out = as_pointer(p[at++]);
    return run(mmfast_cuda_rnn_step_backward, args);
}
#endif

// what both passes of a normalisation are given
using Normalization = std::tuple<int, bool, std::array<int64_t, 4>, int, double, bool, double, Pointer, Pointer,
                                 Pointer, Pointer, Pointer>;

// row: dtype, channels last, (sets, batch, channels, size), activation, negative slope, measure, eps, then the
// addresses of y, weight, bias, mean and var
mmfast_normalize_args as_normalize(const Normalization& row) {
    const auto& [dtype, channels_last, shape, activation, negative_slope, measure, eps, y, weight, bias, mean, var] =
        row;
    mmfast_normalize_args args{};
    args.dtype = dtype;
    args.channels_last = channels_last;
    args.sets = shape[0], args.batch = shape[1], args.channels = shape[2], args.size = shape[3];
    args.activation = activation;
    args.negative_slope = negative_slope;
    args.measure = measure;
    args.eps = eps;
    args.y = as_pointer(y);
    args.weight = as_pointer(weight);
    args.bias = as_pointer(bias);
    args.mean = as_pointer(mean);
    args.var = as_pointer(var);
    return args;
}

// gradients: the addresses of dout, dy, dweight and dbias
mmfast_normalize_args as_normalize_backward(const Normalization& row, const std::array<Pointer, 4>& gradients) {
    mmfast_normalize_args args = as_normalize(row);
    args.dout = as_pointer(gradients[0]);
    args.dy = as_pointer(gradients[1]);
    args.dweight = as_pointer(gradients[2]);
    args.dbias = as_pointer(gradients[3]);
    return args;
}

#if defined(MMFAST_HAS_CUDA) || defined(MMFAST_EMULATOR)
int64_t cuda_normalize_scratch(const Normalization& row) {
    const mmfast_normalize_args args = as_normalize(row);
    return mmfast_cuda_normalize_scratch(&args);
}

int cuda_normalize_forward(const Normalization& row, Pointer out, Pointer scratch, Pointer stream) {
    mmfast_normalize_args args = as_normalize(row);
    args.out = as_pointer(out);
    args.scratch = as_pointer(scratch);
    args.stream = as_pointer(stream);
    return run(mmfast_cuda_normalize_forward, args);
}

int cuda_normalize_backward(const Normalization& row, const std::array<Pointer, 4>& gradients, Pointer scratch,
                            Pointer stream) {
    mmfast_normalize_args args = as_normalize_backward(row, gradients);
    args.scratch = as_pointer(scratch);
    args.stream = as_pointer(stream);
    return run(mmfast_cuda_normalize_backward, args);
}

using Sizes = std::array<int64_t, 3>;
// dtype, x channels last, y channels last, batch, input channels, groups, output channels a group, then in_size,
// out_size, kernel, stride, dilation, before
using Direct = std::tuple<int, bool, bool, int64_t, int64_t, int64_t, int64_t, std::array<Sizes, 6>>;

mmfast_direct_args as_direct(const Direct& row) {
    const auto& [dtype, x_last, y_last, batch, in_channels, groups, group_out, sizes] = row;
    mmfast_direct_args args{};
    args.dtype = dtype, args.x_channels_last = x_last, args.y_channels_last = y_last;
    args.batch = batch, args.in_channels = in_channels, args.groups = groups, args.group_out = group_out;
    int64_t* const members[] = {args.in_size, args.out_size, args.kernel, args.stride, args.dilation, args.before};
    for (size_t i = 0; i < 6; ++i) std::copy(sizes[i].begin(), sizes[i].end(), members[i]);
    return args;
}

int64_t cuda_direct_scratch(const Direct& row) {
    const mmfast_direct_args args = as_direct(row);
    return mmfast_cuda_direct_scratch(&args);
}

int cuda_direct_forward(const Direct& row, int activation, double negative_slope, Pointer x, Pointer weight,
                        Pointer bias, Pointer y, Pointer stream) {
    mmfast_direct_args args = as_direct(row);
    args.activation = activation, args.negative_slope = negative_slope;
    args.x = as_pointer(x), args.weight = as_pointer(weight), args.bias = as_pointer(bias), args.y = as_pointer(y);
    args.stream = as_pointer(stream);
    return run(mmfast_cuda_direct_forward, args);
}

int cuda_direct_backward(const Direct& row, Pointer x, Pointer weight, Pointer dy, Pointer dx, Pointer dweight,
                         Pointer scratch, Pointer stream) {
    mmfast_direct_args args = as_direct(row);
    args.x = as_pointer(x), args.weight = as_pointer(weight), args.dy = as_pointer(dy);
    args.dx = as_pointer(dx), args.dweight = as_pointer(dweight), args.scratch = as_pointer(scratch);
    args.stream = as_pointer(stream);
    return run(mmfast_cuda_direct_backward, args);
}

// y and out, or of the backward y, dout and out
int cuda_activation(bool backward, int dtype, int which, double negative_slope, int64_t count, Pointer y, Pointer dout,
                    Pointer out, Pointer stream) {
    const mmfast_activation_args args{dtype,           which, negative_slope,    count, as_pointer(y), as_pointer(dout),
                                      as_pointer(out), 1,     as_pointer(stream)};
    return run(backward ? mmfast_cuda_activation_backward : mmfast_cuda_activation_forward, args);
}
#endif

#ifndef MMFAST_EMULATOR
// b_ih, w_ih, and below of each direction db_ih and db_hh: 0 where a direction, or it, has none
int rnn_forward(const py::tuple& layer, const std::array<Pointer, 6>& p, const std::array<Pointer, 2>& b_ih, Pointer x,
                const std::array<Pointer, 2>& w_ih, int64_t input) {
    mmfast_rnn_forward_args args = as_forward(p);
    args.layer = as_layer(layer);
    args.x = as_pointer(x), args.input = input;
    for (size_t d = 0; d < 2; ++d) args.b_ih[d] = as_pointer(b_ih[d]), args.w_ih[d] = as_pointer(w_ih[d]);
    return run(mmfast_cpu_rnn_forward, args);
}

// products: x, w_ih of each direction, dx, and of each direction dw_ih and dw_hh
int rnn_backward(const py::tuple& layer, const std::array<Pointer, 13>& p, const std::array<Pointer, 4>& biases,
                 const std::array<Pointer, 8>& products, int64_t input) {
    mmfast_rnn_backward_args args = as_backward(p);
    args.layer = as_layer(layer);
    args.x = as_pointer(products[0]), args.dx = as_pointer(products[3]), args.input = input;
    for (size_t d = 0; d < 2; ++d) {
        args.db_ih[d] = as_pointer(biases[2 * d]), args.db_hh[d] = as_pointer(biases[2 * d + 1]);
        args.w_ih[d] = as_pointer(products[1 + d]);
        args.dw_ih[d] = as_pointer(products[4 + 2 * d]), args.dw_hh[d] = as_pointer(products[5 + 2 * d]);
    }
    return run(mmfast_cpu_rnn_backward, args);
}

int rnn_cell(int dtype, int mode, int64_t batch, int64_t input, int64_t hidden, Pointer gx, Pointer gh, Pointer x,
             Pointer w_ih, Pointer b_ih, Pointer w_hh, Pointer b_hh, Pointer h0, Pointer c0, Pointer h, Pointer c) {
    const mmfast_rnn_cell_args args = {dtype,
                                       mode,
                                       batch,
                                       input,
                                       hidden,
                                       as_pointer(gx),
                                       as_pointer(gh),
                                       as_pointer(x),
                                       as_pointer(w_ih),
                                       as_pointer(b_ih),
                                       as_pointer(w_hh),
                                       as_pointer(b_hh),
                                       as_pointer(h0),
                                       as_pointer(c0),
                                       as_pointer(h),
                                       as_pointer(c)};
    return run(mmfast_cpu_rnn_cell, args);
}

// strides: of a and b by row and column, of out by row
int product(int dtype, const std::array<int64_t, 3>& shape, Pointer a, Pointer b, Pointer bias, Pointer out,
            const std::array<int64_t, 5>& strides, bool add, int threads) {
    mmfast_product_args args{};
    args.dtype = dtype;
    args.rows = shape[0], args.columns = shape[1], args.depth = shape[2];
    args.a = as_pointer(a), args.a_row = strides[0], args.a_column = strides[1];
    args.b = as_pointer(b), args.b_row = strides[2], args.b_column = strides[3];
    args.bias = as_pointer(bias);
    args.out = as_pointer(out), args.out_row = strides[4];
    args.add = add;
    args.threads = threads;
    return run(mmfast_cpu_product, args);
}

int cpu_normalize_forward(const Normalization& row, Pointer out, int threads) {
    mmfast_normalize_args args = as_normalize(row);
    args.out = as_pointer(out);
    args.threads = threads;
    return run(mmfast_cpu_normalize_forward, args);
}

int cpu_normalize_backward(const Normalization& row, const std::array<Pointer, 4>& gradients, int threads) {
    mmfast_normalize_args args = as_normalize_backward(row, gradients);
    args.threads = threads;
    return run(mmfast_cpu_normalize_backward, args);
}

int activation(Kernel<mmfast_activation_args> kernel, int dtype, int which, double negative_slope, int64_t count,
               Pointer y, Pointer dout, Pointer out, int threads) {
    const mmfast_activation_args args{dtype,           which,   negative_slope, count, as_pointer(y), as_pointer(dout),
                                      as_pointer(out), threads, nullptr};
    return run(kernel, args);
}

using Triple = std::array<int64_t, 3>;

// geometry: in_size, out_size, kernel, stride, dilation, before; pointers: x, weight, bias, y, dx, dweight
template <int (*kernel)(const mmfast_conv_transpose_args*)>
int conv_transpose(int dtype, bool x_channels_last, bool y_channels_last, const Triple& sizes,
                   const std::array<Triple, 6>& geometry, const std::array<Pointer, 6>& pointers, int activation,
                   double negative_slope, int threads) {
    mmfast_conv_transpose_args args{};
    args.dtype = dtype;
    args.x_channels_last = x_channels_last;
    args.y_channels_last = y_channels_last;
    args.batch = sizes[0];
    args.in_channels = sizes[1];
    args.out_channels = sizes[2];
    int64_t* const members[] = {args.in_size, args.out_size, args.kernel, args.stride, args.dilation, args.before};
    for (int i = 0; i < 6; ++i) std::copy(geometry[i].begin(), geometry[i].end(), members[i]);
    args.x = as_pointer(pointers[0]);
    args.weight = as_pointer(pointers[1]);
    args.bias = as_pointer(pointers[2]);
    args.y = as_pointer(pointers[3]);
    args.dx = as_pointer(pointers[4]);
    args.dweight = as_pointer(pointers[5]);
    args.activation = activation;
    args.negative_slope = negative_slope;
    args.threads = threads;
    return run(kernel, args);
}

void bind_cpu(py::module_& m) {
    m.def("isa", &mmfast_isa);
    m.def("set_isa", &mmfast_set_isa);
    m.def("is_intel", &mmfast_is_intel);
    m.def("supported_isas", &mmfast_supported_isas);

    m.def("cpu_adversarial_forward", &cpu_adversarial_forward);
    m.def("cpu_adversarial_backward", &cpu_adversarial_backward);
    m.def("cpu_rnn_forward", &rnn_forward);
    m.def("cpu_rnn_backward", &rnn_backward);
    m.def("cpu_rnn_cell", &rnn_cell);
    m.def("cpu_product", &product);

    m.def("cpu_phases_forward", &conv_transpose<mmfast_cpu_phases_forward>);
    m.def("cpu_phases_backward", &conv_transpose<mmfast_cpu_phases_backward>);
    m.def("cpu_gather_forward", &conv_transpose<mmfast_cpu_gather_forward>);
    m.def("cpu_gather_backward", &conv_transpose<mmfast_cpu_gather_backward>);
    m.def("cpu_squares_forward", &conv_transpose<mmfast_cpu_squares_forward>);
    m.def("cpu_squares_backward", &conv_transpose<mmfast_cpu_squares_backward>);
    m.def("cpu_depthwise_forward", &conv_transpose<mmfast_cpu_depthwise_forward>);
    m.def("cpu_depthwise_backward", &conv_transpose<mmfast_cpu_depthwise_backward>);
    m.def("cpu_normalize_forward", &cpu_normalize_forward);
    m.def("cpu_normalize_backward", &cpu_normalize_backward);
    m.def("cpu_activation_forward",
          [](int dtype, int which, double negative_slope, int64_t count, Pointer y, Pointer out, int threads) {
              return activation(mmfast_cpu_activation_forward, dtype, which, negative_slope, count, y, 0, out, threads);
          });
    m.def("cpu_activation_backward", [](int dtype, int which, double negative_slope, int64_t count, Pointer y,
                                        Pointer dout, Pointer out, int threads) {
        return activation(mmfast_cpu_activation_backward, dtype, which, negative_slope, count, y, dout, out, threads);
    });
}
#endif

#if defined(MMFAST_HAS_CUDA) || defined(MMFAST_EMULATOR)
void bind_cuda(py::module_& m) {
    m.def("cuda_adversarial_forward", &cuda_adversarial_forward);
    m.def("cuda_adversarial_backward", &cuda_adversarial_backward);
    m.def("cuda_rnn_forward", &cuda_rnn_forward);
    m.def("cuda_rnn_backward", &cuda_rnn_backward);
    m.def("cuda_rnn_resident", &mmfast_cuda_rnn_resident);
    m.def("cuda_rnn_step_forward", &cuda_rnn_step_forward);
    m.def("cuda_rnn_step_backward", &cuda_rnn_step_backward);
    m.def("cuda_normalize_scratch", &cuda_normalize_scratch);
    m.def("cuda_normalize_forward", &cuda_normalize_forward);
    m.def("cuda_normalize_backward", &cuda_normalize_backward);
    m.def("cuda_activation", &cuda_activation);
    m.def("cuda_direct_scratch", &cuda_direct_scratch);
    m.def("cuda_direct_forward", &cuda_direct_forward);
    m.def("cuda_direct_backward", &cuda_direct_backward);
}
#endif

#ifdef MMFAST_EMULATOR
void bind_machine(py::module_& m) {
    m.def("set_order", &mmfast::emulator::set_order);
    m.def("order", &mmfast::emulator::order);
    m.def("launches", &mmfast::emulator::launches);
    py::dict selftests;
    for (const mmfast::emulator::Selftest* test = mmfast::emulator::kSelftests; test->name; ++test)
        selftests[py::make_tuple(test->name, test->bug)] = py::cpp_function(test->run);
    m.attr("selftests") = selftests;
}
#endif

}  // namespace

#ifdef MMFAST_EMULATOR
PYBIND11_MODULE(_emulator, m) {
#else
PYBIND11_MODULE(_C, m) {
#endif
    m.attr("abi_version") = MMFAST_ABI_VERSION;
    m.attr("version") = MMFAST_VERSION;
    m.attr("adversarial_chunk") = MMFAST_ADVERSARIAL_CHUNK;
    m.attr("adversarial_term") = MMFAST_ADVERSARIAL_TERM;
    m.def("last_error", &mmfast_last_error);
    py::class_<Terms>(m, "AdversarialTerms", py::module_local())
        .def(py::init<const std::vector<Terms::Row>&>())
        .def_property_readonly("address", [](const Terms& list) { return Pointer(&list.terms); });
#ifdef MMFAST_EMULATOR
    bind_machine(m);
#else
    py::dict build;
    build["compiler"] = MMFAST_BUILD_COMPILER;
    build["openmp"] = MMFAST_BUILD_OPENMP;
    build["instruction sets"] = MMFAST_BUILD_ISAS;
    build["cuda"] = MMFAST_BUILD_CUDA;
    m.attr("build") = build;
    bind_cpu(m);
    if (mmfast::add_adversarial_direct(m.ptr()) || mmfast::add_rnn_cell_direct(m.ptr())) throw py::error_already_set();
#endif
#if defined(MMFAST_HAS_CUDA) || defined(MMFAST_EMULATOR)
    bind_cuda(m);
#endif
}
