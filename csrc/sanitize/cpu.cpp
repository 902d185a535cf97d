// Runs the CPU kernels under AddressSanitizer and UBSan on random calls: every op, dtype, layout and extra, sizes that
// fill no vector, more threads than rows. Every buffer is a heap block of exactly its size; outputs start as NaN and
// must be finite afterwards. The argument is the number of calls of each op, or "short": then each buffer of a few
// calls in turn is an element too short, which must be seen. Compiled with one instruction set, as csrc/cpu is.
#include "sanitize/cpu.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sanitize/buffers.h"

using namespace mmfast::sanitize;

namespace mmfast {
bool forked() { return false; }
namespace MMFAST_ISA {

bool run_adversarial() {
    const int dtype = int(pick(0, 3)), wide = dtype == MMFAST_FLOAT64 ? MMFAST_FLOAT64 : MMFAST_FLOAT32;
    Buffers buffers(dtype), values(wide);
    std::vector<mmfast_adversarial_term> terms(static_cast<size_t>(pick(1, 5)));
    const int64_t count = int64_t(terms.size());
    const bool beside = pick(0, 1);
    for (mmfast_adversarial_term& term : terms) {
        term.size = pick(0, 4) ? pick(1, 70) : pick(1, 20000);
        term.phi = int32_t(pick(0, 8)), term.sign = pick(0, 1) ? 1 : -1, term.shift = 0.5, term.weight = 0.3;
        term.tilt = 0.2, term.per_weight = pick(0, 1) ? term.size : 1;
        term.logits = buffers.input(term.size);
        if (beside) term.other = buffers.input(term.size);
        term.weights = values.maybe(term.size / term.per_weight);
    }
    mmfast_adversarial_args args{};
    args.dtype = dtype, args.mean = int32_t(pick(0, 1)), args.count = count, args.terms = terms.data();
    args.threads = int32_t(pick(1, 3));
    args.values = values.output(count), args.slopes = values.output(count), args.means = values.output(count);
    args.total = buffers.output(1);
    if (adversarial_forward(args) != MMFAST_OK || !buffers.all_written() || !values.all_written()) return false;
    for (mmfast_adversarial_term& term : terms) {
        term.dlogits = buffers.output(term.size);
        if (beside) term.dother = buffers.output(term.size);
    }
    args.dtotal = buffers.input(1);
    return adversarial_backward(args) == MMFAST_OK && buffers.all_written();
}

}  // namespace MMFAST_ISA
}  // namespace mmfast

using namespace mmfast::MMFAST_ISA;

int main(int argument_count, char** arguments) {
    struct {
        const char* name;
        bool (*run)();
    } const ops[] = {{"layer", run_layer},         {"cell", run_cell},          {"product", run_product},
                     {"phases", run_phases},       {"gather", run_gather},      {"squares", run_squares},
                     {"depthwise", run_depthwise}, {"norm", run_normalization}, {"adversarial", run_adversarial}};
    const bool is_short = argument_count > 1 && !strcmp(arguments[1], "short");
    const int calls = argument_count > 1 ? atoi(arguments[1]) : 100;
    int unseen = 0;
    for (const auto& op : ops) {
        for (unsigned seed = 1; is_short && seed <= 3; ++seed)
            unseen += !all_short_buffers_are_seen(op.name, op.run, seed);
        for (int i = 0; i < calls; ++i)
            if (!op.run()) {
                printf("%s, call %d: an output is not finite, or the kernel refused\n", op.name, i);
                return 1;
            }
    }
    printf("passed: %d calls of each op\n", calls);
    return unseen ? 1 : 0;
}
