#include "cuda/rnn.cu"
