"""Products of matrices: torch's, or on a CPU csrc/cpu/product.cpp's, or for 16 bits torch's in float32.

PyTorch's matrix products in float32 and float64 are MKL's, which runs its AVX2 code on processors that are not Intel's.
With AVX-512 the kernel here was measured 1.2 to 2.3 times as fast (AMD EPYC, Zen 5, from 64 x 128 x 128 to 8192 x 512 x
128), with 0.5 to 0.9 of the rms error. With AVX2 it was measured 0.8 to 1.4 times as fast (Zen 3), so there it makes
only what spares calls.

Of bfloat16 and float16 oneDNN makes products on some processors only. On others PyTorch's are a plain loop, which was
measured 8 to 100 times slower than to convert both matrices to float32 and back (AVX2, from 64 x 128 x 128 on).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import native

#: Rows of the result, and multiplications, from which on the kernel was measured faster.
ROWS, MULTIPLICATIONS = 16, 1 << 18
#: Elements of a 16-bit matrix that are converted at a time.
AT_ONCE = 1 << 22


def prefers_native(a: Tensor, b: Tensor, with_avx2: bool = False) -> bool:
    """Whether the kernel makes a b faster, as exactly: on CPU tensors, at least one of each matrix' strides 1.

    with_avx2: whether it was measured faster for such matrices with AVX2, too.
    """
    if not (native.beats_mkl() or (with_avx2 and native.isa() == "avx2")):
        return False
    (rows, depth), columns = a.shape, b.shape[1]
    return (
        rows >= ROWS
        and rows * columns * depth >= MULTIPLICATIONS
        and (a.dtype is torch.float32 or a.dtype is torch.float64)
        and a.is_cpu
        and 1 in a.stride()
        and 1 in b.stride()
    )


def product(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    add: bool = False,
    with_avx2: bool = False,
) -> Tensor:
    """out = a b + bias, or with `add` out += a b; out: dense along its rows, None: a new one."""
    if prefers_native(a, b, with_avx2):
        out = a.new_empty((a.shape[0], b.shape[1])) if out is None else out
        native.cpu_product(a, b, None if bias is None else bias.contiguous(), out, add)
        return out
    if is_loop(a):
        out = a.new_empty((a.shape[0], b.shape[1])) if out is None else out
        return _in_float32(a, b, bias, out, add)
    if add:
        return out.addmm_(a, b)  # type: ignore[union-attr]
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)


def is_loop(a: Tensor) -> bool:
    """Whether PyTorch multiplies such a matrix in a plain loop."""
    return a.dtype is not torch.float32 and a.is_cpu and not has_products(a.dtype)


@functools.cache
def has_products(dtype: torch.dtype) -> bool:
    """Whether oneDNN has products of this dtype on this processor, or is not there to be asked."""
    if dtype.itemsize > 2 or not torch.backends.mkldnn.is_available():
        return True
    ops = torch.ops.mkldnn
    return bool((ops._is_mkldnn_bf16_supported if dtype == torch.bfloat16 else ops._is_mkldnn_fp16_supported)())


def _in_float32(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor, add: bool) -> Tensor:
    """As `product`, rounded once; of the longer side a part at a time."""
    (rows, depth), first = a.shape, out if add else bias
    if rows >= depth:
        step, wide = max(1, AT_ONCE // max(depth, b.shape[1], 1)), b.float()
        for i in range(0, rows, step):
            part = torch.mm(a[i : i + step].float(), wide)
            if first is not None:
                part += first[i : i + step] if add else first
            out[i : i + step] = part
        return out
    total = out.new_zeros(out.shape, dtype=torch.float32)
    if first is not None:
        total += first
    step = max(1, AT_ONCE // max(rows, b.shape[1], 1))
    for i in range(0, depth, step):
        total.addmm_(a[:, i : i + step].float(), b[i : i + step].float())
    return out.copy_(total)
