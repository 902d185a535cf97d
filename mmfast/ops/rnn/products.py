"""The recurrent op's products of matrices over whole sequences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..product import is_loop, prefers_native, product
from .equations import Weights

#: Columns of the result from which on torch.mm sums in blocks; with fewer its rms error was up to 7 times as large.
WIDE = 16
#: Rows from which on torch.mm sums in blocks, of as many or fewer.
BLOCK = 384
#: Elements of the result up to which a sum over an LSTM's gates is made gate by gate.
SMALL = 1 << 16


def input_side(x: Tensor, parts: Sequence[Weights], biases: bool = True) -> Tensor:
    """x W_ih^T of all directions, with b_ih or without: (N, D G H)"""
    gx: Tensor | None = None
    if len(parts) > 1:
        gx = x.new_empty((x.shape[0], len(parts) * parts[0].w_ih.shape[0]))
    outs = [None] if gx is None else gx.chunk(len(parts), 1)
    for part, out in zip(parts, outs, strict=True):
        found = product(x, part.w_ih.t(), part.b_ih if biases else None, out)
    return found if gx is None else gx


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
    if w_ih.shape[1] < WIDE <= len(dgates):
        of_gates, w = dgates.unflatten(1, (4, -1)).transpose(0, 1), w_ih.unflatten(0, (4, -1))
        return torch.bmm(w.transpose(1, 2), of_gates.transpose(1, 2)).sum(0).t().contiguous()
    first, *rest = zip(dgates.chunk(4, 1), w_ih.chunk(4), strict=True)
    dx = torch.mm(*first)
    for part, w in rest:
        dx.addmm_(part, w)
    return dx


def chain_of(steps: int, batch: int) -> int:
    """Rows of a sequence tensor that a sum may take in one chain to be as accurate as PyTorch's loop.

    It sums each step's rows and then the steps: chains of `batch` and of `steps`, whose rms error is as one's of both.
    """
    return max(16, (steps + batch) * 3 // 2)


def sum_over_rows(left: Tensor, right: Tensor, out: Tensor, chain: int) -> Tensor:
    """out = left^T right, its sums made of chains of so many rows, or of BLOCK"""
    rows = left.shape[0]
    if is_loop(left) or prefers_native(left.t(), right):
        return product(left.t(), right, out=out)
    if right.shape[1] < max(WIDE, left.shape[1] // 8) and left.shape[1] >= WIDE:
        # a product of few columns takes longer than one of few rows
        return out.copy_(sum_over_rows(right, left, out.new_empty(out.shape[::-1]), chain).t())
    if chain >= min(rows, BLOCK) or out.dtype != torch.float32:
        return torch.mm(left.t(), right, out=out)
    torch.mm(left[:chain].t(), right[:chain], out=out)
    for start in range(chain, rows, chain):
        out.addmm_(left[start : start + chain].t(), right[start : start + chain])
    return out
