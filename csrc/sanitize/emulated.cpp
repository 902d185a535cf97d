// Runs the CUDA kernels under AddressSanitizer and UBSan on cases from files, one case a line:
//
//     adversarial DTYPE MEAN ORDER PHI:SIGN:SHIFT:WEIGHT:SIZE ...
//     rnn_step | rnn_walk | rnn_cluster | convolution | norm ORDER SEED COUNT
//     rnn_step | rnn_walk | rnn_cluster | convolution | norm short SEED
//
// with DTYPE and PHI as numbers of mmfast.h. Every buffer is a heap block of exactly its size. Logits are random, and
// values and gradients are compared with the formula in double; of the other ops, COUNT calls are drawn from SEED, and
// outputs must be written; with "short" each buffer of one call in turn is an element too short, which must be seen.
// "overflow" as a line writes past a block, to show that the sanitizer is awake. Prints one line a case; exits with 1
// at the first that fails.
#include "sanitize/emulated.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include <fstream>
#include <iostream>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "cuda/device.h"
#include "emulator/machine.h"
#include "sanitize/buffers.h"

// fibers leave frames behind on purpose
extern "C" const char* __asan_default_options() { return "detect_stack_use_after_return=0:detect_leaks=0"; }

namespace {

using mmfast::device::Bf16;
using mmfast::device::Compute;
using mmfast::device::from_float;
using mmfast::device::Half;
using mmfast::device::to_float;

struct Term {
    int phi;
    double sign, shift, weight;
    long size;
};

double phi_of(int phi, double u) {
    switch (phi) {
        case MMFAST_SOFTPLUS:
            return fmax(u, 0) + log1p(exp(-fabs(u)));
        case MMFAST_SQUARE:
            return u * u;
        case MMFAST_RELU:
            return fmax(u, 0);
        default:
            return u;
    }
}
double slope_of(int phi, double u) {
    switch (phi) {
        case MMFAST_SOFTPLUS:
            return 1 / (1 + exp(-u));
        case MMFAST_SQUARE:
            return 2 * u;
        case MMFAST_RELU:
            return u > 0;
        default:
            return 1;
    }
}

bool close(const char* what, double found, double expected, double tolerance) {
    if (fabs(found - expected) <= tolerance * (1 + fabs(expected))) return true;
    printf("%s is %g, not %g\n", what, found, expected);
    return false;
}

template <typename T>
bool adversarial(int dtype, bool mean, const std::vector<Term>& terms) {
    using C = Compute<T>;
    const double tolerance = sizeof(T) == 2 ? 0.02 : sizeof(T) == 4 ? 1e-5 : 1e-12;
    std::mt19937 generator(17);
    std::normal_distribution<double> normal(0, 3);
    std::vector<std::unique_ptr<T[]>> x, dx;
    std::vector<mmfast_adversarial_term> rows;
    long chunks = 0;
    for (const Term& term : terms) {
        x.emplace_back(new T[size_t(term.size)]);
        dx.emplace_back(new T[size_t(term.size)]);
        for (long i = 0; i < term.size; ++i) x.back()[size_t(i)] = from_float<T>(C(normal(generator)));
        mmfast_adversarial_term row{};
        row.logits = x.back().get();
        row.size = term.size;
        row.phi = term.phi;
        row.sign = term.sign;
        row.shift = term.shift;
        row.weight = term.weight;
        rows.push_back(row);
        chunks += (term.size + MMFAST_ADVERSARIAL_CHUNK - 1) / MMFAST_ADVERSARIAL_CHUNK;
    }
    const std::unique_ptr<C[]> values(new C[rows.size()]);
    const std::unique_ptr<T> total(new T), dtotal(new T(from_float<T>(C(1.5))));
    const size_t words = 2 + rows.size() * (1 + MMFAST_ADVERSARIAL_TERM) + 3 * size_t(chunks);
    const std::unique_ptr<double[]> scratch(new double[words]);
    mmfast_adversarial_args args{};
    args.dtype = dtype;
    args.mean = mean;
    args.count = int64_t(rows.size());
    args.terms = rows.data();
    args.values = values.get();
    args.total = total.get();
    args.dtotal = dtotal.get();
    args.scratch = scratch.get();
    int status = mmfast_cuda_adversarial_forward(&args);
    for (size_t k = 0; k < rows.size(); ++k) rows[k].dlogits = dx[k].get();
    if (status == MMFAST_OK) status = mmfast_cuda_adversarial_backward(&args);
    if (status != MMFAST_OK) {
        printf("%s\n", mmfast_last_error());
        return false;
    }
    double sum = 0;
    for (size_t k = 0; k < terms.size(); ++k) {
        const Term& term = terms[k];
        const double scale = mean ? term.weight / double(term.size) : term.weight;
        double value = 0;
        for (size_t i = 0; i < size_t(term.size); ++i) {
            const double u = double(to_float(x[k][i])) * term.sign + term.shift;
            value += scale * phi_of(term.phi, u);
            const double gradient = 1.5 * scale * term.sign * slope_of(term.phi, u);
            if (!close("a gradient", double(to_float(dx[k][i])), gradient, tolerance)) return false;
        }
        if (term.size && !close("a value", double(values[k]), value, tolerance)) return false;
        sum += value;
    }
    return close("the total", double(to_float(*total)), sum, tolerance * 10);
}

bool run_adversarial(std::istringstream& line) {
    int dtype, mean;
    unsigned long order;
    line >> dtype >> mean >> order;
    mmfast::emulator::set_order(order);
    std::vector<Term> terms;
    for (std::string text; line >> text;) {
        Term term;
        if (sscanf(text.c_str(), "%d:%lf:%lf:%lf:%ld", &term.phi, &term.sign, &term.shift, &term.weight, &term.size) !=
            5)
            return false;
        terms.push_back(term);
    }
    switch (dtype) {
        case MMFAST_FLOAT32:
            return adversarial<float>(dtype, mean, terms);
        case MMFAST_FLOAT64:
            return adversarial<double>(dtype, mean, terms);
        case MMFAST_FLOAT16:
            return adversarial<Half>(dtype, mean, terms);
        case MMFAST_BFLOAT16:
            return adversarial<Bf16>(dtype, mean, terms);
        default:
            return false;
    }
}

bool run_random(std::istringstream& line, const char* name, bool (*run)()) {
    std::string order;
    unsigned seed;
    int count;
    if (!(line >> order >> seed)) return false;
    if (order == "short") return mmfast::sanitize::all_short_buffers_are_seen(name, run, seed);
    if (!(line >> count)) return false;
    mmfast::emulator::set_order(std::stoul(order));
    mmfast::sanitize::g_random.seed(seed);
    for (int i = 0; i < count; ++i)
        if (!run()) {
            printf("call %d: an output is not finite, or refused: %s\n", i, mmfast_last_error());
            return false;
        }
    return true;
}

// What a kernel does that writes past the memory that it was given.
struct Overflow {
    static constexpr int kThreads = 32;
    float* y;
    MMFAST_DEVICE void operator()() const { y[mmfast::device::thread_index()] = 1; }
};

bool overflow() {
    const std::unique_ptr<float[]> y(new float[31]);
    return mmfast::device::launch(Overflow{y.get()}, 1, 0, nullptr) == MMFAST_OK;
}

bool run_case(const std::string& text) {
    std::istringstream line(text);
    std::string op;
    line >> op;
    if (op == "adversarial") return run_adversarial(line);
    if (op == "rnn_step") return run_random(line, "rnn_step", run_emulated_rnn_step);
    if (op == "rnn_walk") return run_random(line, "rnn_walk", run_emulated_rnn_walk);
    if (op == "rnn_cluster") return run_random(line, "rnn_cluster", run_emulated_rnn_cluster);
    if (op == "convolution") return run_random(line, "convolution", run_emulated_convolution);
    if (op == "norm") return run_random(line, "norm", run_emulated_norm);
    if (op == "overflow") return overflow();
    return false;
}

}  // namespace

int main(int count, char** files) {
    for (int i = 1; i < count; ++i) {
        std::ifstream file(files[i]);
        for (std::string line; std::getline(file, line);) {
            const bool passed = run_case(line);
            std::cout << (passed ? "passed: " : "FAILED: ") << line << std::endl;
            if (!passed) return 1;
        }
    }
    return 0;
}
