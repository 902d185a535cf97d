"""Products of matrices on a CPU: torch's, or csrc/cpu/product.cpp's.

PyTorch's matrix products in float32 and float64 are MKL's, which runs its AVX2 code on processors that are not Intel's.
With AVX-512 the kernel here was measured 1.2 to 2.3 times as fast (AMD EPYC, Zen 5, from 64 x 128 x 128 to 8192 x 512 x
128), with 0.5 to 0.9 of the rms error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native

#: Rows of the result, and multiplications, from which on the kernel was measured faster.
ROWS, MULTIPLICATIONS = 16, 1 << 18


def prefers_native(a: Tensor, b: Tensor) -> bool:
    """Whether the kernel makes a b faster, as exactly: on CPU tensors, at least one of each matrix' strides 1."""
    (rows, depth), columns = a.shape, b.shape[1]
    return (
        rows >= ROWS
        and rows * columns * depth >= MULTIPLICATIONS
        and (a.dtype is torch.float32 or a.dtype is torch.float64)
        and a.is_cpu
        and 1 in a.stride()
        and 1 in b.stride()
        and native.beats_mkl()
    )


def product(a: Tensor, b: Tensor, bias: Tensor | None = None, out: Tensor | None = None, add: bool = False) -> Tensor:
    """out = a b + bias, or with `add` out += a b; out: dense along its rows, None: a new one."""
    if prefers_native(a, b):
        out = a.new_empty((a.shape[0], b.shape[1])) if out is None else out
        native.cpu_product(a, b, None if bias is None else bias.contiguous(), out, add)
        return out
    if add:
        return out.addmm_(a, b)  # type: ignore[union-attr]
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)
