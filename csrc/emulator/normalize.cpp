#include "cuda/normalize.cu"
