#include "cuda/conv_transpose.cu"
