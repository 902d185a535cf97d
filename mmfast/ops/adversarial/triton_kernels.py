"""The adversarial loss in Triton: value_k = scale_k * sum_i w_i * phi_k(u_i), u_i = sign_k * (x_i - other_i) + shift_k;
total = their sum.

A list of any length is at most two launches forward and one backward. Each tensor is cut into chunks of BLOCK elements,
one program a chunk, all chunks numbered through; a program finds its chunk's term, and sums the chunk in float32 by
Triton's tree. The second launch adds up the chunks' sums in float64, in a fixed order. Where terms are compared with
means that are not known yet, the first launch adds up the logits and the second does all else, its last program to
finish the sums.

What tells the terms apart, pointers included, are numbers: of up to TERMS terms they are tuples, passed by value; of
more a table, copied from the host without waiting for it. By value nothing is copied, which capture in a CUDA graph
needs, but each number costs the launch about a tenth of a microsecond, and each length of list a compilation. So while
a stream is captured, lists go by value up to CAPTURED_TERMS, and longer ones in groups of so many, of as many launches
each: a graph that is replayed pays nothing for the numbers. Which phis there are and what terms have (others, weights,
centres) is compiled in, each phi once: so a program compiles once for each dtype, set of phis and, by value, count of
terms; never for a size.

logits[k], others[k]: (sizes[k],) float32, float16 or bfloat16, contiguous; dlogits[k], dothers[k] likewise, written.
weights[k]: float32, one for each per_weights[k] logits. centres, slopes, values: (K,) float32. total: () of the logits'
dtype, running_total: (1,) float64 of the groups before: written at the end. raw_sums, sums, slope_sums: (chunks,)
float32 each, counter: int32, all scratch. dtotal: () of the logits' dtype. An absent tensor is passed as another one,
which the program does not touch.

Forward reads each element once (twice where it computes the means); backward reads it once and writes its gradient:
both are bound by memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import equations
from .equations import Inputs, Terms, columns_of

BLOCK = 2048
TERMS = 16
#: 84 bytes each of the 4096 that a kernel's arguments may take.
CAPTURED_TERMS = 40
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

# A term's numbers, by place in their tuple; a table has them one after the other, K of each.
POINTERS = ("logits", "others", "weights", "dlogits", "dothers")
INTEGERS = ("first_chunk", "size", "per_weight", "phi", "peer", "needed")
REALS = ("sign", "shift", "tilt", "scale", "factor")
_LOGITS, _OTHERS, _WEIGHTS, _DLOGITS, _DOTHERS = (tl.constexpr(i) for i in range(len(POINTERS)))
_FIRST_CHUNK, _SIZE, _PER_WEIGHT, _PHI, _PEER, _NEEDED = (tl.constexpr(i) for i in range(len(INTEGERS)))
_SIGN, _SHIFT, _TILT, _SCALE, _FACTOR = (tl.constexpr(i) for i in range(len(REALS)))
_POINTERS = tl.constexpr(len(POINTERS))

# terms and chunks' sums that are added up at a time
_ROWS = tl.constexpr(16)
_LANES = tl.constexpr(32)


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
def _at(values, k):
    picked = values[0]
    for j in tl.static_range(1, len(values)):
        picked = tl.where(k == j, values[j], picked)
    return picked


@triton.jit
def _integer(integers, table, count, k, PLACE: tl.constexpr, SPAN: tl.constexpr):
    if SPAN:
        number = tl.load(table + (_POINTERS + PLACE) * count + k)
    else:
        number = _at(integers[PLACE], k).to(tl.int64)
    return number


@triton.jit
def _real(reals, real_table, count, k, PLACE: tl.constexpr, SPAN: tl.constexpr):
    if SPAN:
        number = tl.load(real_table + PLACE * count + k).to(tl.float32)
    else:
        number = _at(reals[PLACE], k)
    return number


@triton.jit
def _pointer(pointers, table, like, count, k, PLACE: tl.constexpr, SPAN: tl.constexpr, ALIGNED: tl.constexpr):
    # a pointer of the type of `like`
    if SPAN:
        p_x = tl.load(table + PLACE * count + k).to(like.dtype)
        if ALIGNED:
            p_x = tl.multiple_of(p_x, 16)
    else:
        # what is known of each: whether it is aligned
        p_x = _at(pointers[PLACE], k)
    return p_x


@triton.jit
def _term_of(i_chunk, integers, table, count, SPAN: tl.constexpr):
    # the last term that begins at or before this chunk, so none without elements
    if SPAN:
        o_term = tl.arange(0, SPAN)
        b_first = tl.load(table + _POINTERS * count + o_term, mask=o_term < count, other=2147483647)
        k = tl.sum((b_first <= i_chunk).to(tl.int32)) - 1
    else:
        k = i_chunk * 0
        for j in tl.static_range(1, len(integers[_FIRST_CHUNK])):
            k = tl.where(i_chunk >= integers[_FIRST_CHUNK][j], j, k)
    return k


@triton.jit
def _place_of(i_chunk, integers, table, count, SPAN: tl.constexpr, BLOCK: tl.constexpr):
    # the chunk's term, its first element, and how many of the term there are from it on
    k = _term_of(i_chunk, integers, table, count, SPAN)
    start = (i_chunk - _integer(integers, table, count, k, _FIRST_CHUNK, SPAN)) * BLOCK
    return k, start, _integer(integers, table, count, k, _SIZE, SPAN) - start


@triton.jit
def _function_of(integers, reals, table, real_table, count, k, SPAN: tl.constexpr):
    phi = _integer(integers, table, count, k, _PHI, SPAN)
    sign = _real(reals, real_table, count, k, _SIGN, SPAN)
    shift = _real(reals, real_table, count, k, _SHIFT, SPAN)
    return phi, sign, shift, _real(reals, real_table, count, k, _TILT, SPAN)


@triton.jit
def _load(p_x, o_x, m_x, left, BLOCK: tl.constexpr):
    # no mask on a whole chunk: one would keep the loads from being 16 bytes wide, as n is known only at run time
    if left >= BLOCK:
        b_x = tl.load(p_x + o_x).to(tl.float32)
    else:
        b_x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)
    return b_x


@triton.jit
def _differences(
    pointers,
    table,
    like,
    count,
    k,
    start,
    left,
    o_x,
    m_x,
    OTHERS: tl.constexpr,
    SPAN: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    p_x = _pointer(pointers, table, like, count, k, _LOGITS, SPAN, ALIGNED) + start
    b_x = _load(p_x, o_x, m_x, left, BLOCK)
    if OTHERS:
        p_other = _pointer(pointers, table, like, count, k, _OTHERS, SPAN, ALIGNED) + start
        b_x -= _load(p_other, o_x, m_x, left, BLOCK)
    return b_x


@triton.jit
def _store(p_x, o_x, m_x, left, b_x, BLOCK: tl.constexpr):
    if left >= BLOCK:
        tl.store(p_x + o_x, b_x.to(p_x.dtype.element_ty))
    else:
        tl.store(p_x + o_x, b_x.to(p_x.dtype.element_ty), mask=m_x)


@triton.jit
def _phi_of(b_x, phi, sign, shift, tilt, PHIS: tl.constexpr):
    if len(PHIS) == 1:
        b_y = _phi(_argument(b_x, sign, shift, PHIS[0]), tilt, PHIS[0])
    else:
        b_y = tl.zeros_like(b_x)
        for j in tl.static_range(len(PHIS)):
            if phi == PHIS[j]:
                b_y = _phi(_argument(b_x, sign, shift, PHIS[j]), tilt, PHIS[j])
    return b_y


@triton.jit
def _slope_of(b_x, phi, sign, shift, tilt, PHIS: tl.constexpr):
    if len(PHIS) == 1:
        b_s = _slope(_argument(b_x, sign, shift, PHIS[0]), b_x, tilt, PHIS[0])
    else:
        b_s = tl.zeros_like(b_x)
        for j in tl.static_range(len(PHIS)):
            if phi == PHIS[j]:
                b_s = _slope(_argument(b_x, sign, shift, PHIS[j]), b_x, tilt, PHIS[j])
    return b_s


@triton.jit
def _sum_of_chunks(sums, first, after):
    o_lane = tl.arange(0, 128)
    b_sum = tl.zeros((128,), tl.float64)
    for start in range(first, after, 128):
        o_sum = start + o_lane
        b_sum += tl.load(sums + o_sum, mask=o_sum < after, other=0.0).to(tl.float64)
    return tl.sum(b_sum)


@triton.jit
def _mean_of(total, size):
    # a float64 division is a call, around which registers would spill: one step of Newton's from float32's reciprocal
    inverse = (1.0 / size.to(tl.float32)).to(tl.float64)
    return total * (inverse * (2.0 - size.to(tl.float64) * inverse))


@triton.jit
def _sums_of_rows(sums, b_first, b_after, longest):
    o_lane = tl.arange(0, _LANES)
    b_sum = tl.zeros((_ROWS, _LANES), tl.float64)
    for start in range(0, longest, _LANES):
        o_sum = (b_first + start)[:, None] + o_lane[None, :]
        b_sum += tl.load(sums + o_sum, mask=o_sum < b_after[:, None], other=0.0).to(tl.float64)
    return tl.sum(b_sum, 1)


_NUMBERS = ["integers", "reals", "count"]


@triton.jit(do_not_specialize=_NUMBERS)
def finish_kernel(
    integers,
    reals,
    table,
    real_table,
    count,
    raw_sums,
    sums,
    slope_sums,
    values,
    slopes,
    centres,
    total,
    running_total,
    FIRST: tl.constexpr,
    VALUES: tl.constexpr,
    SLOPES: tl.constexpr,
    MEASURED: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """values, slopes and the totals of sums and slope_sums; MEASURED: the centres of raw_sums, too"""
    b_loss = tl.zeros((_ROWS,), tl.float64)
    for begin in range(0, count, _ROWS):
        o_row = begin + tl.arange(0, _ROWS)
        m_row = o_row < count
        # rows past the end are the last term's again
        o_term = tl.minimum(o_row, count - 1)
        # a lone term's numbers are scalars
        b_zero = tl.zeros((_ROWS,), tl.int64)
        b_size = b_zero + _integer(integers, table, count, o_term, _SIZE, SPAN)
        b_first = (b_zero + _integer(integers, table, count, o_term, _FIRST_CHUNK, SPAN)).to(tl.int32)
        b_chunks = tl.cdiv(b_size, BLOCK).to(tl.int32)
        b_after = b_first + b_chunks
        longest = tl.max(b_chunks)
        b_scale = _real(reals, real_table, count, o_term, _SCALE, SPAN)
        b_value = _sums_of_rows(sums, b_first, b_after, longest) * b_scale
        if VALUES:
            tl.store(values + o_row, b_value.to(tl.float32), mask=m_row)
        if SLOPES:
            b_factor = _real(reals, real_table, count, o_term, _FACTOR, SPAN)
            b_slope = _sums_of_rows(slope_sums, b_first, b_after, longest) * b_factor
            tl.store(slopes + o_row, b_slope.to(tl.float32), mask=m_row)
        if MEASURED:
            b_mean = _mean_of(_sums_of_rows(raw_sums, b_first, b_after, longest), b_size)
            tl.store(centres + o_row, b_mean.to(tl.float32), mask=m_row)
        b_loss += tl.where(m_row, b_value, 0.0)
    loss = tl.sum(b_loss)
    if not FIRST:
        loss += tl.load(running_total)
    tl.store(running_total, loss)
    tl.store(total, loss.to(tl.float32).to(total.dtype.element_ty))


@triton.jit(do_not_specialize=_NUMBERS)
def measure_kernel(
    pointers,
    integers,
    table,
    count,
    like,
    raw_sums,
    counter,
    SPAN: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """raw_sums; and counter = 0"""
    i_chunk = tl.program_id(0)
    k, start, left = _place_of(i_chunk, integers, table, count, SPAN, BLOCK)
    o_x = tl.arange(0, BLOCK)
    m_x = o_x < left
    p_x = _pointer(pointers, table, like, count, k, _LOGITS, SPAN, ALIGNED) + start
    tl.store(raw_sums + i_chunk, tl.sum(_load(p_x, o_x, m_x, left, BLOCK)))
    if i_chunk == 0:
        tl.store(counter, 0)


@triton.jit(do_not_specialize=_NUMBERS)
def forward_kernel(
    pointers,
    integers,
    reals,
    table,
    real_table,
    count,
    like,
    raw_sums,
    sums,
    slope_sums,
    counter,
    values,
    slopes,
    centres,
    total,
    running_total,
    PHIS: tl.constexpr,
    OTHERS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    CENTRES: tl.constexpr,
    VALUES: tl.constexpr,
    SLOPES: tl.constexpr,
    MEASURED: tl.constexpr,
    SPAN: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """sums and slope_sums; MEASURED: with centres of raw_sums, and the outputs, too"""
    i_chunk = tl.program_id(0)
    k, start, left = _place_of(i_chunk, integers, table, count, SPAN, BLOCK)
    o_x = tl.arange(0, BLOCK)
    m_x = o_x < left
    b_x = _differences(pointers, table, like, count, k, start, left, o_x, m_x, OTHERS, SPAN, ALIGNED, BLOCK)
    if CENTRES:
        peer = _integer(integers, table, count, k, _PEER, SPAN)
        if MEASURED:
            first = _integer(integers, table, count, peer, _FIRST_CHUNK, SPAN)
            size = _integer(integers, table, count, peer, _SIZE, SPAN)
            mean = _mean_of(_sum_of_chunks(raw_sums, first, first + tl.cdiv(size, BLOCK)), size)
            b_x -= mean.to(tl.float32)
        else:
            b_x -= tl.load(centres + peer)
    phi, sign, shift, tilt = _function_of(integers, reals, table, real_table, count, k, SPAN)
    b_y = _phi_of(b_x, phi, sign, shift, tilt, PHIS)
    if WEIGHTS:
        per_weight = _integer(integers, table, count, k, _PER_WEIGHT, SPAN)
        p_weight = _pointer(pointers, table, sums, count, k, _WEIGHTS, SPAN, False)
        b_w = tl.load(p_weight + (start + o_x) // per_weight, mask=m_x, other=0.0)
        b_y *= b_w
    tl.store(sums + i_chunk, tl.sum(tl.where(m_x, b_y, 0.0)))
    if SLOPES:
        b_s = _slope_of(b_x, phi, sign, shift, tilt, PHIS)
        if WEIGHTS:
            b_s *= b_w
        tl.store(slope_sums + i_chunk, tl.sum(tl.where(m_x, b_s, 0.0)))
    if MEASURED:
        # whoever counts last sees what all others stored before they counted
        tl.debug_barrier()
        if tl.atomic_add(counter, 1, sem="acq_rel") == tl.num_programs(0) - 1:
            tl.debug_barrier()
            finish_kernel(
                integers,
                reals,
                table,
                real_table,
                count,
                raw_sums,
                sums,
                slope_sums,
                values,
                slopes,
                centres,
                total,
                running_total,
                True,
                VALUES,
                SLOPES,
                MEASURED,
                SPAN,
                BLOCK,
            )


@triton.jit(do_not_specialize=_NUMBERS)
def backward_kernel(
    dtotal,
    pointers,
    integers,
    reals,
    table,
    real_table,
    count,
    like,
    centres,
    slopes,
    PHIS: tl.constexpr,
    OTHERS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    CENTRES: tl.constexpr,
    SLOPES: tl.constexpr,
    SPAN: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_chunk = tl.program_id(0)
    scale = tl.load(dtotal).to(tl.float32)
    k, start, left = _place_of(i_chunk, integers, table, count, SPAN, BLOCK)
    o_x = tl.arange(0, BLOCK)
    m_x = o_x < left
    b_x = _differences(pointers, table, like, count, k, start, left, o_x, m_x, OTHERS, SPAN, ALIGNED, BLOCK)
    peer = _integer(integers, table, count, k, _PEER, SPAN)
    if CENTRES:
        b_x -= tl.load(centres + peer)
    phi, sign, shift, tilt = _function_of(integers, reals, table, real_table, count, k, SPAN)
    factor = _real(reals, real_table, count, k, _FACTOR, SPAN)
    b_dx = _slope_of(b_x, phi, sign, shift, tilt, PHIS) * (scale * factor)
    if WEIGHTS:
        per_weight = _integer(integers, table, count, k, _PER_WEIGHT, SPAN)
        # centres or, without them, weights
        p_weight = _pointer(pointers, table, centres, count, k, _WEIGHTS, SPAN, False)
        b_dx *= tl.load(p_weight + (start + o_x) // per_weight, mask=m_x, other=0.0)
    if SLOPES:
        b_dx -= scale * tl.load(slopes + peer) / (start + left).to(tl.float32)
    needed = _integer(integers, table, count, k, _NEEDED, SPAN)
    if needed & 1:
        p_dx = _pointer(pointers, table, like, count, k, _DLOGITS, SPAN, ALIGNED) + start
        _store(p_dx, o_x, m_x, left, b_dx, BLOCK)
    if OTHERS:  # noqa: SIM102 (this is known when compiling, the other not)
        if needed & 2:
            p_dother = _pointer(pointers, table, like, count, k, _DOTHERS, SPAN, ALIGNED) + start
            _store(p_dother, o_x, m_x, left, -b_dx, BLOCK)


#: Whether TRITON_INTERPRET=1 made these kernels Python, for CPU tensors.
INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)


def is_grouped(count: int, x: Tensor) -> bool:
    """Whether a list of `count` tensors, x one of them, takes more launches: nothing is copied while captured."""
    return count > CAPTURED_TERMS and is_captured(x)


def is_captured(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def forward(
    terms: Terms, mean: bool, inputs: Inputs, total: Tensor, values: Tensor | None, state: Tensor | None
) -> None:
    """Fills total (), and where there are any values (K,) and state (2, K), slopes and centres, from K terms of dense
    tensors. The centres are computed where inputs.peers are given without them; a grouped list needs them given."""
    measured = bool(inputs.peers) and inputs.centres is None
    groups = list(_groups(terms, mean, inputs, [None] * (2 * len(terms))))
    running_total = total.new_empty(1, dtype=torch.float64)
    for group in groups:
        scratch = total.new_empty(3 * group.chunks + 1, dtype=torch.float32)
        raw_sums, sums, slope_sums, counter = scratch.split([group.chunks] * 3 + [1])
        part = slice(group.begin, group.begin + group.count)
        slopes, centres = (sums, sums) if state is None else state[:, part].unbind()
        if inputs.centres is not None:
            # peers are counted from the list's begin
            centres = inputs.centres
        outputs = (sums if values is None else values[part], slopes, centres, total, running_total)
        flags = {"VALUES": values is not None, "SLOPES": state is not None, "MEASURED": measured, "SPAN": group.span}
        counter = counter.view(torch.int32)
        if group.chunks:
            grid = (group.chunks,)
            if measured:
                measure_kernel[grid](
                    group.pointers,
                    group.integers,
                    group.table,
                    group.count,
                    inputs.logits[0],
                    raw_sums,
                    counter,
                    SPAN=group.span,
                    ALIGNED=group.aligned,
                    BLOCK=BLOCK,
                    **OPTIONS,
                )
            forward_kernel[grid](
                *group.numbers,
                inputs.logits[0],
                raw_sums,
                sums,
                slope_sums,
                counter,
                *outputs,
                **group.constants,
                **flags,
                BLOCK=BLOCK,
                **OPTIONS,
            )
        if not (measured and group.chunks):
            finish_kernel[(1,)](
                *group.numbers[1:],
                raw_sums,
                sums,
                slope_sums,
                *outputs,
                FIRST=group.begin == 0,
                **flags,
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
    padded = [*gradients, *[None] * (2 * len(terms) - len(gradients))]
    for group in _groups(terms, mean, inputs, padded):
        if not group.chunks or not any(group.needed):
            continue
        backward_kernel[(group.chunks,)](
            dtotal,
            *group.numbers,
            inputs.logits[0],
            (*inputs.weights, dtotal)[0] if inputs.centres is None else inputs.centres,
            dtotal if slopes is None else slopes,
            **group.constants,
            SLOPES=slopes is not None,
            SPAN=group.span,
            BLOCK=BLOCK,
            **OPTIONS,
        )


class _Group:
    """Terms of one launch as the kernels' arguments, by value or in a table."""

    def __init__(
        self,
        terms: Terms,
        mean: bool,
        inputs: Inputs,
        gradients: Sequence[Tensor | None],
        begin: int,
        count: int,
        by_value: bool,
    ) -> None:
        self.begin, self.count = begin, count
        part = slice(begin, begin + count)
        logits, others, weights = (tuple(tensors[part]) for tensors in inputs[:3])
        dlogits, dothers = gradients[: len(terms)][part], gradients[len(terms) :][part]
        phis, signs, shifts, factors, tilts = columns_of(terms[part])
        sizes = [x.numel() for x in logits]
        firsts = list(itertools.accumulate((triton.cdiv(n, BLOCK) for n in sizes), initial=0))
        self.chunks = firsts.pop()
        self.needed = [(dx is not None) + 2 * (dother is not None) for dx, dother in zip(dlogits, dothers, strict=True)]
        per_weights = [max(n // max(w.numel(), 1), 1) for n, w in zip(sizes, weights, strict=False)] or [1] * count
        peers = inputs.peers[part] or range(begin, begin + count)
        scales = [_scale(factor, mean, n) for factor, n in zip(factors, sizes, strict=True)]
        factors = [scale * sign for scale, sign in zip(scales, signs, strict=True)]
        # what is absent is as good as the logits
        written = (
            tuple(x if g is None else g for x, g in zip(logits, found, strict=True)) for found in (dlogits, dothers)
        )
        tensors = (logits, others or logits, weights or logits, *written)
        integers = (firsts, sizes, per_weights, phis, peers, self.needed)
        reals = (signs, shifts, tilts, scales, factors)
        addresses = [[x.data_ptr() for x in column] for column in tensors]
        # a weight is loaded by itself
        self.aligned = not by_value and not any(
            address % 16 for place, column in enumerate(addresses) if place != 2 for address in column
        )
        first = logits[0]
        if by_value:
            self.span = 0
            self.table = self.real_table = first
            self.pointers: tuple = tensors
            self.integers: tuple = tuple(map(tuple, integers))
            self.reals: tuple = tuple(map(tuple, reals))
        else:
            self.span = triton.next_power_of_2(count)
            whole = torch.tensor([*addresses, *integers], dtype=torch.int64, device="cpu")
            table = torch.cat([whole, whole.new_tensor(reals, dtype=torch.float64).view(torch.int64)])
            table = table.to(first.device, non_blocking=True)
            self.table, self.real_table = table, table[len(whole) :].view(torch.float64)
            self.pointers, self.integers, self.reals = ((first,),), ((0,),), ((0.0,),)
        self.numbers = (self.pointers, self.integers, self.reals, self.table, self.real_table, count)
        self.constants = {
            "PHIS": tuple(sorted(set(phis))),
            "OTHERS": bool(others),
            "WEIGHTS": bool(weights),
            "CENTRES": bool(inputs.peers) or inputs.centres is not None,
            "ALIGNED": self.aligned,
        }


def _groups(terms: Terms, mean: bool, inputs: Inputs, gradients: Sequence[Tensor | None]) -> Iterator[_Group]:
    count, captured = len(terms), is_captured(inputs.logits[0])
    step, by_value = (CAPTURED_TERMS, True) if captured else (count, count <= TERMS)
    for begin in range(0, count, step):
        yield _Group(terms, mean, inputs, gradients, begin, min(step, count - begin), by_value)


def _scale(weight: float, mean: bool, n: int) -> float:
    if not mean:
        return weight
    # the mean of no elements is NaN
    return weight / n if n else float("nan")
