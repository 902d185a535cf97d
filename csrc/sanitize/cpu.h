// The CPU kernels that csrc/sanitize/cpu.cpp runs, of the instruction set that this is compiled for.
#pragma once
#include "mmfast.h"

namespace mmfast {
namespace MMFAST_ISA {

int adversarial_forward(const mmfast_adversarial_args& args);
int adversarial_backward(const mmfast_adversarial_args& args);
int depthwise_forward(const mmfast_conv_transpose_args& args);
int depthwise_backward(const mmfast_conv_transpose_args& args);
int gather_forward(const mmfast_conv_transpose_args& args);
int gather_backward(const mmfast_conv_transpose_args& args);
int squares_forward(const mmfast_conv_transpose_args& args);
int squares_backward(const mmfast_conv_transpose_args& args);
int phases_forward(const mmfast_conv_transpose_args& args);
int phases_backward(const mmfast_conv_transpose_args& args);
int normalize_forward(const mmfast_normalize_args& args);
int normalize_backward(const mmfast_normalize_args& args);
int activation_forward(const mmfast_activation_args& args);
int activation_backward(const mmfast_activation_args& args);
int rnn_forward(const mmfast_rnn_forward_args& args);
int rnn_backward(const mmfast_rnn_backward_args& args);
int rnn_cell(const mmfast_rnn_cell_args& args);
int product(const mmfast_product_args& args);

// Each runs one random call, forward and backward; whether every output was written and none is infinite or NaN.
bool run_layer();
bool run_cell();
bool run_product();
bool run_phases();
bool run_gather();
bool run_squares();
bool run_depthwise();
bool run_normalization();
bool run_adversarial();

}  // namespace MMFAST_ISA
}  // namespace mmfast
