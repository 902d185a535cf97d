"""The recurrent op's products of matrices over whole sequences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..product import is_loop, prefers_native, product
from .equations import Weights

#: Columns of the result from which on torch.mm sums in blocks; with fewer its rms error was up to 7 times as large.
WIDE = 16
#: Rows up to which torch.mm sums them in one chain; longer ones it sums in blocks.
ONE_CHAIN = 512
#: Elements of the result up to which a sum over an LSTM's gates is made gate by gate.
SMALL = 1 << 16


def input_side(x: Tensor, parts: Sequence[Weights]) -> Tensor:
    """x W_ih^T + b_ih of all directions: (N, D G H)"""
    if len(parts) == 1:
        return product(x, parts[0].w_ih.t(), parts[0].b_ih)
    width = parts[0].w_ih.shape[0]
    gx = x.new_empty((x.shape[0], len(parts) * width))
    for part, out in zip(parts, gx.split(width, 1), strict=True):
        product(x, part.w_ih.t(), part.b_ih, out)
    return gx


def input_gradient(dgates: Tensor, w_ih: Sequence[Tensor], gates: int) -> Tensor:
    """dgates W_ih, added over the directions: (N, I)"""
    each = dgates.chunk(len(w_ih), 1)
    if not (is_loop(dgates) or prefers_native(each[0], w_ih[0])):
        if gates == 4 and len(dgates) * w_ih[0].shape[1] <= SMALL and dgates.dtype == torch.float32:
            # one chain over all four gates is less accurate than oneDNN's
            return sum(map(_by_gates, each, w_ih))  # type: ignore[return-value]
        if w_ih[0].shape[1] < WIDE:
            return _input_gradient_transposed(each, w_ih).t().contiguous()
    dx = product(each[0], w_ih[0])
    for mine, w in zip(each[1:], w_ih[1:], strict=True):
        product(mine, w, out=dx, add=True)
    return dx


def _input_gradient_transposed(each: Sequence[Tensor], w_ih: Sequence[Tensor]) -> Tensor:
    dx = torch.mm(w_ih[0].t(), each[0].t())
    for mine, w in zip(each[1:], w_ih[1:], strict=True):
        dx.addmm_(w.t(), mine.t())
    return dx


def _by_gates(dgates: Tensor, w_ih: Tensor) -> Tensor:
    """dgates W_ih of four gates, each a sum of its own."""
    of_gates, w = dgates.unflatten(1, (4, -1)).transpose(0, 1), w_ih.unflatten(0, (4, -1))
    if w_ih.shape[1] < WIDE <= len(dgates):
        return torch.bmm(w.transpose(1, 2), of_gates.transpose(1, 2)).sum(0).t().contiguous()
    return torch.bmm(of_gates, w).sum(0)


def sum_over_rows(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """out = left^T right"""
    rows = left.shape[0]
    if is_loop(left) or prefers_native(left.t(), right):
        return product(left.t(), right, out=out)
    if right.shape[1] < WIDE <= left.shape[1]:
        return out.copy_(sum_over_rows(right, left, out.new_empty(out.shape[::-1])).t())
    if rows > ONE_CHAIN or out.dtype != torch.float32:
        return torch.mm(left.t(), right, out=out)
    # in four: PyTorch adds step after step, which is more accurate than one chain over all rows
    part = max(16, -(-rows // 4))
    torch.mm(left[:part].t(), right[:part], out=out)
    for start in range(part, rows, part):
        out.addmm_(left[start : start + part].t(), right[start : start + part])
    return out
