// The ops whose emulated kernels csrc/sanitize/emulated.cpp runs on random cases.
#pragma once

// Both passes of `count` random steps; whether every output was written and none is infinite or NaN.
bool run_rnn_steps(unsigned seed, int count);
