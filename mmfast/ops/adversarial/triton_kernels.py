"""The adversarial loss in Triton: value_k = scale_k * sum_i w_i * phi_k(u_i), u_i = sign_k * (x_i - other_i) + shift_k;
total = their sum.

A list of up to TERMS tensors is one launch a pass: pointers and sizes are tuples, passed by value. Each tensor is cut
into chunks of BLOCK elements, one program a chunk, all chunks numbered through; a program sums its chunk in float32 by
Triton's tree, and one last program adds up the chunks' sums in float64, in a fixed order. phi_k and what the terms have
(others, weights, centres, peers) are compiled in, so a program compiles once for each dtype and list of modes, never
for a size.

logits[k], others[k]: (sizes[k],) float32, float16 or bfloat16, contiguous; dlogits[k], dothers[k] likewise, written.
weights[k]: float32, one for each per_weights[k] logits. centres, slopes: (K,) float32. sums, slope_sums: (chunks,)
float32, written by forward and read by finish. values, out_slopes: (K,) float32, total: () of the logits' dtype,
running_total: (1,) float64 of the launches before: written by finish. dtotal: () of the logits' dtype.
An absent tensor is passed as another one, which the program does not touch.

Forward reads each element once; backward reads it once and writes its gradient: both are bound by memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import equations
from .equations import Inputs, Terms, columns_of

BLOCK = 2048
TERMS = 16
# said outright, because Triton is about to change its default and warns of it
OPTIONS = {"enable_fp_fusion": True}

_SOFTPLUS = tl.constexpr(equations.SOFTPLUS)
_SQUARE = tl.constexpr(equations.SQUARE)
_RELU = tl.constexpr(equations.RELU)
_ABS = tl.constexpr(equations.ABS)
_SIGMOID = tl.constexpr(equations.SIGMOID)
_RELU_SQUARE = tl.constexpr(equations.RELU_SQUARE)
_TILTED = tl.constexpr(equations.TILTED)
_LEAKY_SQUARE = tl.constexpr(equations.LEAKY_SQUARE)
_LEAK = tl.constexpr(equations.LEAK)


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
def _sigmoid(u):
    e = tl.exp(-tl.abs(u))
    return tl.where(u < 0, e, 1.0) / (1.0 + e)


@triton.jit
def _phi(u, tilt, PHI: tl.constexpr):
    if PHI == _SOFTPLUS or PHI == _TILTED:
        # nothing cancels and nothing overflows
        y = tl.where(u < 0, 0.0, u) + _log1p(tl.exp(-tl.abs(u)))
        if PHI == _TILTED:
            y += u * tilt
    elif PHI == _SQUARE or PHI == _LEAKY_SQUARE:
        y = u * u
    elif PHI == _RELU:
        y = tl.where(u < 0, 0.0, u)
    elif PHI == _RELU_SQUARE:
        y = tl.where(u < 0, 0.0, u * u)
    elif PHI == _ABS:
        y = tl.abs(u)
    elif PHI == _SIGMOID:
        y = _sigmoid(u)
    else:
        y = u
    return y


@triton.jit
def _slope(u, x, tilt, PHI: tl.constexpr):
    if PHI == _SOFTPLUS:
        y = _sigmoid(u)
    elif PHI == _TILTED:
        y = _sigmoid(u) + tilt
    elif PHI == _SQUARE:
        y = u + u
    elif PHI == _LEAKY_SQUARE:
        y = (u + u) * tl.where(x > 0, 1.0, _LEAK)
    elif PHI == _RELU:
        # torch's subgradient: 0 where relu's argument is 0
        y = tl.where(u <= 0, 0.0, 1.0)
    elif PHI == _RELU_SQUARE:
        y = tl.where(u <= 0, 0.0, u + u)
    elif PHI == _ABS:
        y = tl.where(u > 0, 1.0, tl.where(u < 0, -1.0, 0.0))
    elif PHI == _SIGMOID:
        e = tl.exp(-tl.abs(u))
        y = e / ((1.0 + e) * (1.0 + e))
    else:
        y = tl.full(u.shape, 1.0, tl.float32)
    return y


@triton.jit
def _argument(x, sign, shift, PHI: tl.constexpr):
    if PHI == _LEAKY_SQUARE:
        x = tl.where(x > 0, x, x * _LEAK)
    return x * sign + shift


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


@triton.jit
def _difference(
    p_x, p_other, p_centre, o_x, m_x, left, OTHERS: tl.constexpr, CENTRES: tl.constexpr, BLOCK: tl.constexpr
):
    b_x = _load(p_x, o_x, m_x, left, BLOCK)
    if OTHERS:
        b_x -= _load(p_other, o_x, m_x, left, BLOCK)
    if CENTRES:
        b_x -= tl.load(p_centre)
    return b_x


@triton.jit(do_not_specialize=["sizes", "per_weights", "signs", "shifts", "tilts"])
def forward_kernel(
    logits,
    others,
    weights,
    centres,
    sums,
    slope_sums,
    sizes,
    per_weights,
    signs,
    shifts,
    tilts,
    PEERS: tl.constexpr,
    PHIS: tl.constexpr,
    OTHERS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    CENTRES: tl.constexpr,
    SLOPES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_chunk = tl.program_id(0)
    first = 0
    for k in tl.static_range(len(PHIS)):
        after = first + tl.cdiv(sizes[k], BLOCK)
        if (i_chunk >= first) & (i_chunk < after):
            start = (i_chunk - first).to(tl.int64) * BLOCK
            left = sizes[k] - start
            o_x = tl.arange(0, BLOCK)
            m_x = o_x < left
            b_x = _difference(
                logits[k] + start, others[k] + start, centres + PEERS[k], o_x, m_x, left, OTHERS, CENTRES, BLOCK
            )
            b_u = _argument(b_x, signs[k], shifts[k], PHIS[k])
            b_y = _phi(b_u, tilts[k], PHIS[k])
            if WEIGHTS:
                b_w = tl.load(weights[k] + (start + o_x) // per_weights[k], mask=m_x, other=0.0)
                b_y *= b_w
            tl.store(sums + i_chunk, tl.sum(tl.where(m_x, b_y, 0.0)))
            if SLOPES:
                b_s = _slope(b_u, b_x, tilts[k], PHIS[k])
                if WEIGHTS:
                    b_s *= b_w
                tl.store(slope_sums + i_chunk, tl.sum(tl.where(m_x, b_s, 0.0)))
        first = after


@triton.jit
def _sum_of_chunks(sums, first, after):
    o_lane = tl.arange(0, 128)
    b_sum = tl.zeros((128,), tl.float64)
    for start in range(first, after, 128):
        o_sum = start + o_lane
        b_sum += tl.load(sums + o_sum, mask=o_sum < after, other=0.0).to(tl.float64)
    return tl.sum(b_sum)


@triton.jit(do_not_specialize=["sizes", "scales", "slope_scales"])
def finish_kernel(
    sums,
    slope_sums,
    values,
    out_slopes,
    total,
    running_total,
    sizes,
    scales,
    slope_scales,
    FIRST: tl.constexpr,
    K: tl.constexpr,
    VALUES: tl.constexpr,
    SLOPES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if FIRST:
        loss = tl.full((), 0.0, tl.float64)
    else:
        loss = tl.load(running_total)
    first = 0
    for k in tl.static_range(K):
        after = first + tl.cdiv(sizes[k], BLOCK)
        value = _sum_of_chunks(sums, first, after) * scales[k]
        if VALUES:
            tl.store(values + k, value.to(tl.float32))
        if SLOPES:
            tl.store(out_slopes + k, (_sum_of_chunks(slope_sums, first, after) * slope_scales[k]).to(tl.float32))
        loss += value
        first = after
    tl.store(running_total, loss)
    tl.store(total, loss.to(tl.float32).to(total.dtype.element_ty))


@triton.jit(do_not_specialize=["sizes", "per_weights", "signs", "shifts", "tilts", "factors", "counts"])
def backward_kernel(
    dtotal,
    logits,
    others,
    weights,
    centres,
    slopes,
    dlogits,
    dothers,
    sizes,
    per_weights,
    signs,
    shifts,
    tilts,
    factors,
    counts,
    PEERS: tl.constexpr,
    PHIS: tl.constexpr,
    NEEDED: tl.constexpr,
    OTHERS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    CENTRES: tl.constexpr,
    SLOPES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_chunk = tl.program_id(0)
    scale = tl.load(dtotal).to(tl.float32)
    first = 0
    for k in tl.static_range(len(PHIS)):
        after = first + tl.cdiv(sizes[k], BLOCK)
        if (i_chunk >= first) & (i_chunk < after):
            start = (i_chunk - first).to(tl.int64) * BLOCK
            left = sizes[k] - start
            o_x = tl.arange(0, BLOCK)
            m_x = o_x < left
            b_x = _difference(
                logits[k] + start, others[k] + start, centres + PEERS[k], o_x, m_x, left, OTHERS, CENTRES, BLOCK
            )
            b_u = _argument(b_x, signs[k], shifts[k], PHIS[k])
            b_dx = _slope(b_u, b_x, tilts[k], PHIS[k]) * (scale * factors[k])
            if WEIGHTS:
                b_dx *= tl.load(weights[k] + (start + o_x) // per_weights[k], mask=m_x, other=0.0)
            if SLOPES:
                b_dx -= scale * tl.load(slopes + PEERS[k]) / counts[k]
            if NEEDED[k] & 1:
                _store(dlogits[k] + start, o_x, m_x, left, b_dx, BLOCK)
            if NEEDED[k] & 2:
                _store(dothers[k] + start, o_x, m_x, left, -b_dx, BLOCK)
        first = after


#: Whether TRITON_INTERPRET=1 made these kernels Python, for CPU tensors.
INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)


def forward(
    terms: Terms, mean: bool, inputs: Inputs, total: Tensor, values: Tensor | None, slopes: Tensor | None
) -> None:
    """Fills total (), and values (K,) and slopes (K,) float32 where there are any, from K terms of dense tensors."""
    running_total = total.new_empty(1, dtype=torch.float64)
    wants_slopes = slopes is not None and slopes.numel() > 0
    for begin in range(0, len(terms), TERMS):
        group = _Group(terms, mean, inputs, begin)
        sums = total.new_empty(max(group.chunks, 1), dtype=torch.float32)
        slope_sums = torch.empty_like(sums) if wants_slopes else sums
        if group.chunks:
            forward_kernel[(group.chunks,)](
                *group.tensors,
                sums,
                slope_sums,
                *group.numbers,
                **group.constants,
                SLOPES=wants_slopes,
                BLOCK=BLOCK,
                **OPTIONS,
            )
        finish_kernel[(1,)](
            sums,
            slope_sums,
            sums if values is None else values[begin:],
            slopes[begin:] if wants_slopes and slopes is not None else sums,
            total,
            running_total,
            group.sizes,
            group.scales,
            group.factors,
            FIRST=begin == 0,
            K=len(group.sizes),
            VALUES=values is not None,
            SLOPES=wants_slopes,
            BLOCK=BLOCK,
            **OPTIONS,
        )


def backward(
    dtotal: Tensor,
    terms: Terms,
    mean: bool,
    inputs: Inputs,
    slopes: Tensor | None,
    gradients: Sequence[Tensor | None],
) -> None:
    """Fills the gradients by the logits, then by the others (None: not wanted), each in the layout of its tensor."""
    count = len(terms)
    dlogits, dothers = gradients[:count], gradients[count:] or [None] * count
    for begin in range(0, count, TERMS):
        group = _Group(terms, mean, inputs, begin)
        pairs = list(zip(dlogits[begin : begin + TERMS], dothers[begin : begin + TERMS], strict=True))
        if not group.chunks or all(dx is dother is None for dx, dother in pairs):
            continue
        backward_kernel[(group.chunks,)](
            dtotal,
            *group.tensors,
            dtotal if slopes is None else slopes,
            tuple(dtotal if dx is None else dx for dx, _ in pairs),
            tuple(dtotal if dother is None else dother for _, dother in pairs),
            *group.numbers,
            group.factors,
            tuple(float(n) for n in group.sizes),
            **group.constants,
            NEEDED=tuple((dx is not None) + 2 * (dother is not None) for dx, dother in pairs),
            SLOPES=slopes is not None,
            BLOCK=BLOCK,
            **OPTIONS,
        )


class _Group:
    """At most TERMS terms from `begin` on, as the kernels' arguments."""

    def __init__(self, terms: Terms, mean: bool, inputs: Inputs, begin: int) -> None:
        part = slice(begin, begin + TERMS)
        logits = tuple(inputs.logits[part])
        weights = tuple(inputs.weights[part])
        phis, signs, shifts, factors, tilts = (tuple(column[part]) for column in columns_of(terms))
        self.sizes = tuple(x.numel() for x in logits)
        self.chunks = sum(triton.cdiv(n, BLOCK) for n in self.sizes)
        self.scales = tuple(_scale(factor, mean, n) for factor, n in zip(factors, self.sizes, strict=True))
        self.factors = tuple(scale * sign for scale, sign in zip(self.scales, signs, strict=True))
        first = logits[0]
        self.tensors = (
            logits,
            tuple(inputs.others[part]) or logits,
            weights or logits,
            first if inputs.centres is None else inputs.centres,
        )
        parts = [max(n // max(w.numel(), 1), 1) for n, w in zip(self.sizes, weights, strict=False)] or [1] * len(logits)
        self.numbers = (self.sizes, tuple(parts), signs, shifts, tilts)
        peers = inputs.peers or range(len(terms))
        self.constants = {
            "PEERS": tuple(int(peer) for peer in peers[part]),
            "PHIS": tuple(int(phi) for phi in phis),
            "OTHERS": bool(inputs.others),
            "WEIGHTS": bool(weights),
            "CENTRES": inputs.centres is not None,
        }


def _scale(weight: float, mean: bool, n: int) -> float:
    if not mean:
        return weight
    # the mean of no elements is NaN
    return weight / n if n else float("nan")
