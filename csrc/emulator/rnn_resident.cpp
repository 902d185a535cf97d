#include "cuda/rnn_resident.cu"
