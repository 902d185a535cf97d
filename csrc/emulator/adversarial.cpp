#include "cuda/adversarial.cu"
