// The ops whose emulated kernels csrc/sanitize/emulated.cpp runs on random cases.
#pragma once

// Each runs forward and backward of one random call; whether every output was written and none is infinite or NaN.
bool run_emulated_rnn_step();
bool run_emulated_rnn_walk();
bool run_emulated_rnn_cluster();
bool run_emulated_convolution();
bool run_emulated_norm();
