"""The adversarial loss in Triton: value_k = scale_k * sum_i phi_k(u_i), u_i = sign_k * x_i + shift_k, and their total.

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

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import equations
from .equations import Term

BLOCK = 2048
TERMS = 16
# said outright, because Triton is about to change its default and warns of it
OPTIONS = {"enable_fp_fusion": True}

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


@triton.jit
def _load(p_x, o_x, m_x, left, BLOCK: tl.constexpr):
    # no mask on a whole chunk: one would keep the loads from being 16 bytes wide, as n is known only at run time
    if left >= BLOCK:
        b_x = tl.load(p_x + o_x).to(tl.float32)
    else:
        b_x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)
    return b_x


@triton.jit
def _store(p_x, o_x, m_x, left, b_x, BLOCK: tl.constexpr):
    if left >= BLOCK:
        tl.store(p_x + o_x, b_x.to(p_x.dtype.element_ty))
    else:
        tl.store(p_x + o_x, b_x.to(p_x.dtype.element_ty), mask=m_x)


@triton.jit(do_not_specialize=["sizes", "firsts", "signs", "shifts"])
def forward_kernel(logits, sums, sizes, firsts, signs, shifts, PHIS: tl.constexpr, BLOCK: tl.constexpr):
    i_chunk = tl.program_id(0)
    for k in tl.static_range(len(PHIS)):
        if (i_chunk >= firsts[k]) & (i_chunk < firsts[k + 1]):
            start = (i_chunk - firsts[k]).to(tl.int64) * BLOCK
            left = sizes[k] - start
            o_x = tl.arange(0, BLOCK)
            m_x = o_x < left
            b_x = _load(logits[k] + start, o_x, m_x, left, BLOCK)
            b_y = _phi(b_x * signs[k] + shifts[k], PHIS[k])
            tl.store(sums + i_chunk, tl.sum(tl.where(m_x, b_y, 0.0)))


@triton.jit(do_not_specialize=["firsts", "scales"])
def finish_kernel(sums, values, total, running_total, firsts, scales, FIRST: tl.constexpr, K: tl.constexpr):
    o_lane = tl.arange(0, 128)
    if FIRST:  # noqa: SIM108 - compiled: one branch only
        loss = tl.full((), 0.0, tl.float64)
    else:
        loss = tl.load(running_total)
    for k in tl.static_range(K):
        b_sum = tl.zeros((128,), tl.float64)
        for start in range(firsts[k], firsts[k + 1], 128):
            o_sum = start + o_lane
            b_sum += tl.load(sums + o_sum, mask=o_sum < firsts[k + 1], other=0.0).to(tl.float64)
        value = tl.sum(b_sum) * scales[k]
        tl.store(values + k, value.to(tl.float32))
        loss += value
    tl.store(running_total, loss)
    tl.store(total, loss.to(tl.float32).to(total.dtype.element_ty))


@triton.jit(do_not_specialize=["sizes", "firsts", "signs", "shifts", "factors"])
def backward_kernel(
    dtotal, logits, dlogits, sizes, firsts, signs, shifts, factors, PHIS: tl.constexpr, BLOCK: tl.constexpr
):
    i_chunk = tl.program_id(0)
    scale = tl.load(dtotal).to(tl.float32)
    for k in tl.static_range(len(PHIS)):
        if (i_chunk >= firsts[k]) & (i_chunk < firsts[k + 1]):
            start = (i_chunk - firsts[k]).to(tl.int64) * BLOCK
            left = sizes[k] - start
            o_x = tl.arange(0, BLOCK)
            m_x = o_x < left
            b_x = _load(logits[k] + start, o_x, m_x, left, BLOCK)
            b_dx = _slope(b_x * signs[k] + shifts[k], PHIS[k]) * (scale * factors[k])
            _store(dlogits[k] + start, o_x, m_x, left, b_dx, BLOCK)


#: Whether TRITON_INTERPRET=1 made these kernels Python, for CPU tensors.
INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)


def forward(terms: Sequence[Term], mean: bool, logits: Sequence[Tensor], total: Tensor, values: Tensor) -> None:
    """Fills total () and values (K,) float32 from K dense tensors of logits of one dtype and device."""
    running_total = total.new_empty(1, dtype=torch.float64)
    for begin in range(0, len(terms), TERMS):
        group = _Group(terms[begin : begin + TERMS], mean, logits[begin : begin + TERMS])
        sums = total.new_empty(group.chunks, dtype=torch.float32)
        if group.chunks:
            forward_kernel[(group.chunks,)](
                group.logits, sums, group.sizes, group.firsts, group.signs, group.shifts, group.phis, BLOCK, **OPTIONS
            )
        finish_kernel[(1,)](
            sums,
            values[begin:],
            total,
            running_total,
            group.firsts,
            group.scales,
            begin == 0,
            len(group.phis),
            **OPTIONS,
        )


def backward(
    dtotal: Tensor, terms: Sequence[Term], mean: bool, logits: Sequence[Tensor], dlogits: Sequence[Tensor]
) -> None:
    """Fills each dlogits[k], of the layout of logits[k], with the gradient of the loss times dtotal ()."""
    for begin in range(0, len(terms), TERMS):
        group = _Group(terms[begin : begin + TERMS], mean, logits[begin : begin + TERMS])
        if group.chunks:
            backward_kernel[(group.chunks,)](
                dtotal,
                group.logits,
                tuple(dlogits[begin : begin + TERMS]),
                group.sizes,
                group.firsts,
                group.signs,
                group.shifts,
                tuple(scale * sign for scale, sign in zip(group.scales, group.signs, strict=True)),
                group.phis,
                BLOCK,
                **OPTIONS,
            )


class _Group:
    """The terms of one launch as tuples; factors are floats, so that no kernel compiles for an integer.

    firsts: the number of each tensor's first chunk, and of all chunks.
    """

    def __init__(self, terms: Sequence[Term], mean: bool, logits: Sequence[Tensor]) -> None:
        self.logits = tuple(logits)
        self.sizes = tuple(x.numel() for x in logits)
        self.phis = tuple(int(term.phi) for term in terms)
        self.signs = tuple(float(term.sign) for term in terms)
        self.shifts = tuple(float(term.shift) for term in terms)
        self.scales = tuple(_scale(term.weight, mean, n) for term, n in zip(terms, self.sizes, strict=True))
        self.firsts = (0, *itertools.accumulate(triton.cdiv(n, BLOCK) for n in self.sizes))
        self.chunks = self.firsts[-1]


def _scale(weight: float, mean: bool, n: int) -> float:
    if not mean:
        return float(weight)
    # the mean of no elements is NaN
    return weight / n if n else float("nan")
