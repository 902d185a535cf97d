"""The recurrent op's products of matrices over whole sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..product import is_loop, prefers_native, product
from .equations import GATES, Layer, Weights

#: Columns of the result from which on torch.mm sums in blocks; with fewer its rms error was up to 7 times as large.
WIDE = 16
#: Rows from which on torch.mm sums in blocks, of as many or fewer.
BLOCK = 384
#: Rows up to which oneDNN's LSTM was more accurate than one chain.
FEW_ROWS = 512
#: Elements of the result up to which a sum over an LSTM's gates is made gate by gate.
SMALL = 1 << 16


class Sizes(NamedTuple):
    """Of a layer's call: N rows, steps, batch, hidden size, size of h (the projection's or the hidden size), and the
    rows that `sum_over_rows` may sum in one chain."""

    rows: int
    steps: int
    batch: int
    hidden: int
    output: int
    chain: int


def sizes_of(x: Tensor, weights: Sequence[Tensor], layer: Layer) -> Sizes:
    rows, output = weights[1].shape
    if layer.batch_sizes is not None:
        steps, batch = layer.batch_sizes.shape[0], int(layer.batch_sizes[0])
    else:
        steps, batch = x.shape[:2]
    count = steps * batch if layer.batch_sizes is None else x.shape[0]
    return Sizes(count, steps, batch, rows // GATES[layer.mode], output, chain_of(layer.mode, steps, batch))


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


def chain_of(mode: str, steps: int, batch: int) -> int:
    """Rows of a sequence tensor that a sum may take in one chain to be as accurate as PyTorch's.

    Its loop sums each step's rows and then the steps: chains of `batch` and of `steps`, whose rms error is as one's of
    both. oneDNN's LSTM sums all rows as torch.mm does, but few of them in shorter chains.
    """
    if mode == "LSTM":
        rows = steps * batch
        return BLOCK if rows > FEW_ROWS else max(16, -(-rows // 4))
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


class RecurrentSide(NamedTuple):
    """What the gradient of W_hh is made of: the states before, or what they are taken from."""

    y: Tensor
    h0: Tensor | None
    previous: Tensor | None
    sizes: Sizes
    dm: Tensor | None

    def times(self, dgates: Tensor, direction: int, out: Tensor) -> None:
        """out = dgates^T times the state before each row"""
        size, batch, chain = self.sizes.output, self.sizes.batch, self.sizes.chain
        columns = slice(direction * size, (direction + 1) * size)
        if self.previous is not None:
            sum_over_rows(dgates, self.previous[:, columns], out, chain)
            return
        y, rest = self.y[:, columns], self.sizes.rows - batch
        # time-major and padded: the state before is the output `batch` rows before, or after in the reverse direction
        if direction == 0:
            sum_over_rows(dgates[batch:], y[:rest], out, chain)
            first = dgates[:batch]
        else:
            sum_over_rows(dgates[:rest], y[batch:], out, chain)
            first = dgates[rest:]
        if self.h0 is not None:
            product(first.t(), self.h0[direction], out=out, add=True)


def projection_gradient(dh: Tensor, u: Tensor, sizes: Sizes, direction: int) -> Tensor:
    """Of one direction's W_hr: dh^T u"""
    left = dh[:, direction * sizes.output : (direction + 1) * sizes.output]
    right = u[:, direction * sizes.hidden : (direction + 1) * sizes.hidden]
    return sum_over_rows(left, right, u.new_empty((sizes.output, sizes.hidden)), sizes.chain)


def weight_gradients(
    dgates: Tensor, x: Tensor, side: RecurrentSide, direction: int, need: Sequence[bool]
) -> list[Tensor | None]:
    """Of one direction's (W_ih, W_hh)."""
    hidden = side.sizes.hidden
    gradients: list[Tensor | None] = [None, None]
    if need[0]:
        dw = dgates.new_empty((dgates.shape[1], x.shape[1]))
        gradients[0] = sum_over_rows(dgates, x, dw, side.sizes.chain)
    if need[1]:
        dw = gradients[1] = dgates.new_empty((dgates.shape[1], side.sizes.output))
        if side.dm is None:
            side.times(dgates, direction, dw)
        else:
            side.times(dgates[:, : 2 * hidden], direction, dw[: 2 * hidden])
            side.times(side.dm[:, direction * hidden : (direction + 1) * hidden], direction, dw[2 * hidden :])
    return gradients


def sum_biases(dgates: Tensor, dm: Tensor | None, biases: Sequence[Tensor | None]) -> None:
    """Fills the gradients, of each direction (db_ih, db_hh)."""
    for i in range(0, len(biases), 2):
        db_ih, db_hh = biases[i : i + 2]
        if db_ih is None and db_hh is None:
            continue
        direction, rows = i // 2, dgates.shape[1] // (len(biases) // 2)
        sums = dgates[:, direction * rows : (direction + 1) * rows].sum(0)
        if db_ih is not None:
            db_ih.copy_(sums)
        if db_hh is None:
            continue
        db_hh.copy_(sums)
        if dm is not None:
            hidden = rows // 3
            db_hh[2 * hidden :] = dm[:, direction * hidden : (direction + 1) * hidden].sum(0)
