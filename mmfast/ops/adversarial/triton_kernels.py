"""The adversarial loss in Triton: value_k = scale_k * sum_i phi_k(u_i), u_i = sign_k * x_i + shift_k; total = their sum.

A list of up to TERMS tensors is one launch a pass: pointers and sizes are tuples, passed by value. Each tensor is cut
into chunks of BLOCK elements, one program a chunk, all chunks numbered through; a program sums its chunk in float32 by
Triton's tree, and one last program adds up the chunks' sums in float64, in a fixed order. phi_k is compiled in, so a
program compiles once for each dtype and list of modes, never for a size.

logits[k]: (sizes[k],) float32, float16 or bfloat16, contiguous; dlogits[k] likewise, written. sums: (chunks,) float32,
written by forward and read by finish. values: (K,) float32, total: () of the logits' dtype, running_total: (1,) float64
of the launches before: written by finish. dtotal: () of the logits' dtype.

Forward reads each logit once; backward reads it once and writes its gradient: both are bound by memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import equations
from .equations import Term

BLOCK = 2048
TERMS = 16

_SOFTPLUS = tl.constexpr(equations.SOFTPLUS)
_SQUARE = tl.constexpr(equations.SQUARE)
_RELU = tl.constexpr(equations.RELU)


@triton.jit
def _log1p(e):
    # log(1 + e) for 0 <= e <= 1 as 2 atanh(s), s = e / (2 + e) <= 1/3, by atanh's series; relatively accurate at 0
    s = e / (e + 2.0)
    q = s * s
    p = 1.0 / 15
    p = p * q + 1.0 / 13
    p = p * q + 1.0 / 11
    p = p * q + 1.0 / 9
    p = p * q + 1.0 / 7
    p = p * q + 1.0 / 5
    p = p * q + 1.0 / 3
    return 2.0 * (s + s * (q * p))


@triton.jit
def _phi(u, PHI: tl.constexpr):
    if PHI == _SOFTPLUS:
        # nothing cancels and nothing overflows
        y = tl.where(u < 0, 0.0, u) + _log1p(tl.exp(-tl.abs(u)))
    elif PHI == _SQUARE:
        y = u * u
    elif PHI == _RELU:
        y = tl.where(u < 0, 0.0, u)
    else:
        y = u
    return y


@triton.jit
def _slope(u, PHI: tl.constexpr):
    if PHI == _SOFTPLUS:
        e = tl.exp(-tl.abs(u))
        y = tl.where(u < 0, e, 1.0) / (1.0 + e)
    elif PHI == _SQUARE:
        y = u + u
    elif PHI == _RELU:
        # torch's subgradient: 0 where relu's argument is 0
        y = tl.where(u <= 0, 0.0, 1.0)
    else:
        y = tl.full(u.shape, 1.0, tl.float32)
    return y


@triton.jit(do_not_specialize=["sizes", "signs", "shifts"])
def forward_kernel(logits, sums, sizes, signs, shifts, PHIS: tl.constexpr, BLOCK: tl.constexpr):
    i_chunk = tl.program_id(0)
    first = 0
    for k in tl.static_range(len(PHIS)):
        after = first + tl.cdiv(sizes[k], BLOCK)
        if (i_chunk >= first) & (i_chunk < after):
            o_x = (i_chunk - first).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            m_x = o_x < sizes[k]
            b_x = tl.load(logits[k] + o_x, mask=m_x, other=0.0).to(tl.float32)
            b_y = _phi(b_x * signs[k] + shifts[k], PHIS[k])
            tl.store(sums + i_chunk, tl.sum(tl.where(m_x, b_y, 0.0)))
        first = after


@triton.jit(do_not_specialize=["sizes", "scales"])
def finish_kernel(
    sums, values, total, running_total, sizes, scales, FIRST: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr
):
    o_lane = tl.arange(0, 128)
    if FIRST:  # noqa: SIM108 - compiled: one branch only
        loss = tl.full((), 0.0, tl.float64)
    else:
        loss = tl.load(running_total)
    first = 0
    for k in tl.static_range(K):
        after = first + tl.cdiv(sizes[k], BLOCK)
        b_sum = tl.zeros((128,), tl.float64)
        for start in range(first, after, 128):
            o_sum = start + o_lane
            b_sum += tl.load(sums + o_sum, mask=o_sum < after, other=0.0).to(tl.float64)
        value = tl.sum(b_sum) * scales[k]
        tl.store(values + k, value.to(tl.float32))
        loss += value
        first = after
    tl.store(running_total, loss)
    tl.store(total, loss.to(tl.float32).to(total.dtype.element_ty))


@triton.jit(do_not_specialize=["sizes", "signs", "shifts", "factors"])
def backward_kernel(dtotal, logits, dlogits, sizes, signs, shifts, factors, PHIS: tl.constexpr, BLOCK: tl.constexpr):
    i_chunk = tl.program_id(0)
    scale = tl.load(dtotal).to(tl.float32)
    first = 0
    for k in tl.static_range(len(PHIS)):
        after = first + tl.cdiv(sizes[k], BLOCK)
        if (i_chunk >= first) & (i_chunk < after):
            o_x = (i_chunk - first).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            m_x = o_x < sizes[k]
            b_x = tl.load(logits[k] + o_x, mask=m_x, other=0.0).to(tl.float32)
            b_dx = _slope(b_x * signs[k] + shifts[k], PHIS[k]) * (scale * factors[k])
            tl.store(dlogits[k] + o_x, b_dx.to(dlogits[k].dtype.element_ty), mask=m_x)
        first = after


def forward(terms: Sequence[Term], mean: bool, logits: Sequence[Tensor], total: Tensor, values: Tensor) -> None:
    """Fills total () and values (K,) float32 from K dense tensors of logits of one dtype and device."""
    running_total = total.new_empty(1, dtype=torch.float64)
    for begin in range(0, len(terms), TERMS):
        group, tensors = terms[begin : begin + TERMS], logits[begin : begin + TERMS]
        sizes, phis, signs, shifts, weights = _columns(group, tensors)
        chunks = _chunks(sizes)
        sums = total.new_empty(chunks, dtype=torch.float32)
        if chunks:
            forward_kernel[(chunks,)](tuple(tensors), sums, sizes, signs, shifts, PHIS=phis, BLOCK=BLOCK)
        scales = tuple(_scale(weight, mean, n) for weight, n in zip(weights, sizes, strict=True))
        finish_kernel[(1,)](
            sums, values[begin:], total, running_total, sizes, scales, FIRST=begin == 0, K=len(group), BLOCK=BLOCK
        )


def backward(
    dtotal: Tensor, terms: Sequence[Term], mean: bool, logits: Sequence[Tensor], dlogits: Sequence[Tensor]
) -> None:
    """Fills each dlogits[k], of the layout of logits[k], with the gradient of the loss times dtotal ()."""
    for begin in range(0, len(terms), TERMS):
        group, tensors = terms[begin : begin + TERMS], logits[begin : begin + TERMS]
        sizes, phis, signs, shifts, weights = _columns(group, tensors)
        factors = tuple(_scale(w, mean, n) * s for w, n, s in zip(weights, sizes, signs, strict=True))
        chunks = _chunks(sizes)
        if chunks:
            out = tuple(dlogits[begin : begin + TERMS])
            backward_kernel[(chunks,)](
                dtotal, tuple(tensors), out, sizes, signs, shifts, factors, PHIS=phis, BLOCK=BLOCK
            )


def _columns(terms: Sequence[Term], logits: Sequence[Tensor]) -> tuple[tuple, tuple, tuple, tuple, tuple]:
    """sizes, phis, signs, shifts and weights, a tuple each; floats, so that no kernel compiles for an integer."""
    phis, *floats = zip(*terms, strict=True)
    signs, shifts, weights = (tuple(float(value) for value in column) for column in floats)
    return tuple(x.numel() for x in logits), tuple(int(phi) for phi in phis), signs, shifts, weights


def _chunks(sizes: Sequence[int]) -> int:
    return sum(triton.cdiv(n, BLOCK) for n in sizes)


def _scale(weight: float, mean: bool, n: int) -> float:
    if not mean:
        return weight
    # the mean of no elements is NaN
    return weight / n if n else float("nan")
