#include "cuda/rnn_cluster.cu"
