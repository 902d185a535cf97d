"""A recurrent layer's walk through time in Triton, forward and backward, for H up to 128.

    a = W_hh h' + b_hh, h' and c' the state one step before (one step after in the reverse direction)
    RNN   h = phi(gx + a), phi = tanh or relu
    GRU   r = sigmoid(gx_r + a_r), z = sigmoid(gx_z + a_z), n = tanh(gx_n + r a_n), h = n + z (h' - n)
    LSTM  i, f, o = sigmoid(gx_ifo + a_ifo), g = tanh(gx_g + a_g), c = f c' + i g, h = o tanh(c)

Grid: (ceil(B / ROWS), D). A program owns ROWS sequences in one direction for all steps: sequences are independent, so
that no program waits for another. H is padded to BLOCK by masks. W_hh is loaded once, into shared memory, from where a
step's products (ROWS, BLOCK) x (BLOCK, BLOCK), one for each gate, read it; h, c and their gradients stay in registers,
and the next step's loads are on their way while this step computes. Where W_hh does not fit (STREAMED: float32 LSTM
above 64 units, small shared memories) its columns are read again at every step, PART at a time, and the left
operands of the products pass through `scratch`.

Row and column layouts, N rows, and what is saved: csrc/mmfast.h. All in one dtype - float32, float16 or bfloat16 - and
contiguous; states, gradients of states and sums are float32.
    gx, gates, dgates (N, D G H)     cell, dm, previous, y, dy (N, D H)     h0, c0, hn, cn and gradients (D, B, H)
    w_hh, b_hh (G H, H), (G H,) of the forward direction, w_hh_reverse, b_hh_reverse of the other
    lengths (B,) integers     offsets (T + 1,) int64, packed only     resets (N,) uint8
    scratch (programs, GATES, ROWS, BLOCK), STREAMED only
gates may be gx. An absent tensor is passed as another one, which the program does not touch. Of a padded tensor every
row is written but for gates and cell past a length; y, dgates, dm and previous are 0 there.

Model of a step, clocks on an H100 or H200 (not measured), bfloat16, H = 128, 16 sequences a program:
                         RNN     GRU     LSTM
    matrix units         210     620     830     32 G instructions of 16 x 8 x 16 a quarter of the chip at 6.5
    operands             420     930    1190     W_hh, 32 KB a gate at 128 bytes a clock; h, read by each warp
    special functions    256     768    1280     (2, 6, 10) x 2048 values at 16 a clock: exp2 and a reciprocal each
    latency              200     200     200     a chain of dependent instructions drains, barriers around h
    sum                 1090    2520    3500     less what overlaps: the smaller half of the first two
    microseconds     0.5-0.6 1.1-1.4 1.5-2.0
Backward has the same products and reads, and half of the special functions. T = 128, B = 64: 4 programs, 65 to 80,
140 to 180, 190 to 260 microseconds forward: some three times rnn_resident.cu's, whose W_hh stays in registers, for
each word of W_hh is read from shared memory for ROWS multiply-adds only. H = 512: cuDNN's or rnn_cluster.cu's.

A program is compiled for a mode, dtype, H and what there is of states, lengths and so on; never for T or B.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..portable import uses_tf32
from .equations import GATES, MODES, Layer, Weights

_TANH = tl.constexpr(0)
_RELU = tl.constexpr(1)
_GRU = tl.constexpr(2)
_LSTM = tl.constexpr(3)

#: Sequences of a program: the rows of the smallest matrix instruction.
ROWS = 16


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def _tanh(x, PRECISE: tl.constexpr):
    e = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - e) / (1.0 + e)
    y = tl.where(x < 0, -y, y)
    if PRECISE:
        # the quotient cancels near 0; the polynomial is Cephes' tanhf
        q = x * x
        p = -5.70498872745e-3
        p = p * q + 2.06390887954e-2
        p = p * q - 5.37397155531e-2
        p = p * q + 1.33314422036e-1
        p = p * q - 3.33332819422e-1
        y = tl.where(tl.abs(x) < 0.6, x + x * (q * p), y)
    return y


@triton.jit
def _gates(p_x, o_x, m_x, H: tl.constexpr, GATES: tl.constexpr):
    # always four, so that callers need no cases; what a mode has not is never used
    b_0 = tl.load(p_x + o_x, mask=m_x, other=0.0)
    b_1, b_2, b_3 = b_0, b_0, b_0
    if GATES > 1:
        b_1 = tl.load(p_x + (o_x + H), mask=m_x, other=0.0)
        b_2 = tl.load(p_x + (o_x + 2 * H), mask=m_x, other=0.0)
    if GATES > 3:
        b_3 = tl.load(p_x + (o_x + 3 * H), mask=m_x, other=0.0)
    return b_0, b_1, b_2, b_3


@triton.jit
def _store_gates(p_x, o_x, m_x, b_0, b_1, b_2, b_3, H: tl.constexpr, GATES: tl.constexpr):
    tl.store(p_x + o_x, b_0.to(p_x.dtype.element_ty), mask=m_x)
    if GATES > 1:
        tl.store(p_x + (o_x + H), b_1.to(p_x.dtype.element_ty), mask=m_x)
        tl.store(p_x + (o_x + 2 * H), b_2.to(p_x.dtype.element_ty), mask=m_x)
    if GATES > 3:
        tl.store(p_x + (o_x + 3 * H), b_3.to(p_x.dtype.element_ty), mask=m_x)


@triton.jit
def _weight(p_w, o_k, H: tl.constexpr, K: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    # rows o_k (PART,) of a right operand; K and N: how far apart its rows and its columns are
    o_n = tl.arange(0, BLOCK)[None, :]
    o_k = o_k[:, None]
    return tl.load(p_w + (o_k * K + o_n * N), mask=(o_k < H) & (o_n < H), other=0.0)


@triton.jit
def _weights(p_w, o_k, GATES: tl.constexpr, H: tl.constexpr, K: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    b_0 = _weight(p_w, o_k, H, K, N, BLOCK)
    b_1, b_2, b_3 = b_0, b_0, b_0
    if GATES > 1:
        b_1 = _weight(p_w + H * H, o_k, H, K, N, BLOCK)
        b_2 = _weight(p_w + 2 * H * H, o_k, H, K, N, BLOCK)
    if GATES > 3:
        b_3 = _weight(p_w + 3 * H * H, o_k, H, K, N, BLOCK)
    return b_0, b_1, b_2, b_3


@triton.jit
def _products(b_l0, b_l1, b_l2, b_l3, b_w0, b_w1, b_w2, b_w3, GATES: tl.constexpr, PRECISION: tl.constexpr):
    b_0 = tl.dot(b_l0, b_w0, input_precision=PRECISION)
    b_1, b_2, b_3 = b_0, b_0, b_0
    if GATES > 1:
        b_1 = tl.dot(b_l1, b_w1, input_precision=PRECISION)
        b_2 = tl.dot(b_l2, b_w2, input_precision=PRECISION)
    if GATES > 3:
        b_3 = tl.dot(b_l3, b_w3, input_precision=PRECISION)
    return b_0, b_1, b_2, b_3


@triton.jit
def _streamed(
    b_l0,
    b_l1,
    b_l2,
    b_l3,
    p_w,
    p_scratch,
    LEFTS: tl.constexpr,
    GATES: tl.constexpr,
    PRECISION: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
):
    # _products with W_hh read now, PART rows at a time; LEFTS: how many of the left operands differ
    SIZE: tl.constexpr = ROWS * BLOCK
    SECOND: tl.constexpr = SIZE if LEFTS > 1 else 0
    o_row = tl.arange(0, ROWS)[:, None] * BLOCK
    o_left = o_row + tl.arange(0, BLOCK)[None, :]
    tl.store(p_scratch + o_left, b_l0)
    if LEFTS > 1:
        tl.store(p_scratch + (SIZE + o_left), b_l1)
        tl.store(p_scratch + (2 * SIZE + o_left), b_l2)
    if LEFTS > 3:
        tl.store(p_scratch + (3 * SIZE + o_left), b_l3)
    tl.debug_barrier()
    b_0 = tl.zeros((ROWS, BLOCK), tl.float32)
    b_1, b_2, b_3 = b_0, b_0, b_0
    for start in tl.range(0, BLOCK, PART, num_stages=2):
        o_k = start + tl.arange(0, PART)
        o_part = o_row + o_k[None, :]
        b_w0, b_w1, b_w2, b_w3 = _weights(p_w, o_k, GATES, H, K, N, BLOCK)
        b_0 = tl.dot(tl.load(p_scratch + o_part), b_w0, b_0, input_precision=PRECISION)
        if GATES > 1:
            b_1 = tl.dot(tl.load(p_scratch + (SECOND + o_part)), b_w1, b_1, input_precision=PRECISION)
            b_2 = tl.dot(tl.load(p_scratch + (2 * SECOND + o_part)), b_w2, b_2, input_precision=PRECISION)
        if GATES > 3:
            b_3 = tl.dot(tl.load(p_scratch + (3 * SECOND + o_part)), b_w3, b_3, input_precision=PRECISION)
    # before the next step writes the scratch
    tl.debug_barrier()
    return b_0, b_1, b_2, b_3


@triton.jit
def _own_lengths(lengths, first, o_row, steps, batch, LENGTHS: tl.constexpr):
    # 0 of a row that is none
    m_row = o_row < batch - first
    if LENGTHS:
        b_length = tl.load(lengths + first + o_row, mask=m_row, other=0)
        b_length = tl.minimum(tl.maximum(b_length, 0), steps).to(tl.int32)
    else:
        b_length = tl.where(m_row, steps, 0)
    return b_length


@triton.jit
def _first_row(offsets, t, batch, PACKED: tl.constexpr):
    if PACKED:
        row = tl.load(offsets + t)
    else:
        row = tl.cast(t, tl.int64) * batch
    return row


@triton.jit
def _cut(resets, offsets, t, first, o_row, b_length, batch, i_d, PACKED: tl.constexpr, RESETS: tl.constexpr):
    # the sequences into whose step t no state passes: in the reverse direction the step after tells
    m_cut = t + i_d < b_length
    if not RESETS:
        m_cut = b_length < 0
    else:
        t = tl.minimum(t + i_d, tl.max(b_length) - 1)
        p_reset = resets + _first_row(offsets, t, batch, PACKED) + first
        m_cut = m_cut & (tl.load(p_reset + o_row, mask=m_cut, other=0) != 0)
    return m_cut[:, None]


@triton.jit(do_not_specialize=["steps", "batch"])
def forward_kernel(
    gx,
    w_hh,
    w_hh_reverse,
    b_hh,
    b_hh_reverse,
    h0,
    c0,
    lengths,
    offsets,
    resets,
    scratch,
    gates,
    cell,
    y,
    hn,
    cn,
    steps,
    batch,
    MODE: tl.constexpr,
    GATES: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    H: tl.constexpr,
    BIAS: tl.constexpr,
    H0: tl.constexpr,
    C0: tl.constexpr,
    LENGTHS: tl.constexpr,
    PACKED: tl.constexpr,
    RESETS: tl.constexpr,
    KEEP: tl.constexpr,
    STREAMED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
):
    DTYPE: tl.constexpr = y.dtype.element_ty
    PRECISE: tl.constexpr = tl.float32 == DTYPE
    WIDTH: tl.constexpr = DIRECTIONS * GATES * H
    UNITS: tl.constexpr = DIRECTIONS * H
    i_d = tl.program_id(1)
    first = tl.program_id(0).to(tl.int64) * ROWS
    o_row = tl.arange(0, ROWS)
    o_h = tl.arange(0, BLOCK)[None, :]
    m_h = o_h < H
    o_x = o_row[:, None] * WIDTH + (o_h + i_d * (GATES * H))
    o_y = o_row[:, None] * UNITS + (o_h + i_d * H)
    b_length = _own_lengths(lengths, first, o_row, steps, batch, LENGTHS)
    m_row = (o_row < batch - first)[:, None] & m_h
    p_w, p_b = w_hh, b_hh
    if i_d == 1:
        p_w, p_b = w_hh_reverse, b_hh_reverse
    if not STREAMED:
        b_w0, b_w1, b_w2, b_w3 = _weights(p_w, tl.arange(0, BLOCK), GATES, H, 1, H, BLOCK)
    if BIAS:
        b_b0, b_b1, b_b2, b_b3 = _gates(p_b, o_h, m_h, H, GATES)
    p_scratch = scratch + (tl.program_id(0) * DIRECTIONS + i_d).to(tl.int64) * (GATES * ROWS * BLOCK)
    state = (i_d * batch + first) * H
    o_state = o_row[:, None] * H + o_h
    b_h = tl.zeros((ROWS, BLOCK), tl.float32)
    b_c = b_h
    if H0:
        b_h = tl.load(h0 + state + o_state, mask=m_row, other=0.0).to(tl.float32)
    if C0:
        b_c = tl.load(c0 + state + o_state, mask=m_row, other=0.0).to(tl.float32)

    last = tl.max(b_length)
    t = i_d * tl.maximum(last - 1, 0)
    p_x = gx + (_first_row(offsets, t, batch, PACKED) + first) * WIDTH
    b_x0, b_x1, b_x2, b_x3 = _gates(p_x, o_x, (t < b_length)[:, None] & m_h, H, GATES)
    for i in range(last):
        t = i_d * (last - 1) + (1 - 2 * i_d) * i
        row = _first_row(offsets, t, batch, PACKED) + first
        m_active = (t < b_length)[:, None]
        b_g0, b_g1, b_g2, b_g3 = b_x0, b_x1, b_x2, b_x3
        t_next = tl.minimum(tl.maximum(t + 1 - 2 * i_d, 0), last - 1)
        p_x = gx + (_first_row(offsets, t_next, batch, PACKED) + first) * WIDTH
        m_x = (t_next < b_length)[:, None] & m_h
        b_x0, b_x1, b_x2, b_x3 = _gates(p_x, o_x, m_x, H, GATES)

        b_before, b_c_before = b_h, b_c
        if RESETS:
            m_cut = _cut(resets, offsets, t, first, o_row, b_length, batch, i_d, PACKED, RESETS)
            b_before = tl.where(m_cut, 0.0, b_h)
            b_c_before = tl.where(m_cut, 0.0, b_c)
        b_l = b_before.to(DTYPE)
        if STREAMED:
            b_0, b_1, b_2, b_3 = _streamed(
                b_l, b_l, b_l, b_l, p_w, p_scratch, 1, GATES, PRECISION, H, 1, H, ROWS, BLOCK, PART
            )
        else:
            b_0, b_1, b_2, b_3 = _products(b_l, b_l, b_l, b_l, b_w0, b_w1, b_w2, b_w3, GATES, PRECISION)
        if BIAS:
            b_0 += b_b0.to(tl.float32)
            if GATES > 1:
                b_1 += b_b1.to(tl.float32)
                b_2 += b_b2.to(tl.float32)
            if GATES > 3:
                b_3 += b_b3.to(tl.float32)
        b_0 += b_g0.to(tl.float32)
        if MODE == _TANH:
            b_new = _tanh(b_0, PRECISE)
        elif MODE == _RELU:
            # NaN stays NaN, as torch's
            b_new = tl.where(b_0 < 0, 0.0, b_0)
        elif MODE == _GRU:
            b_0 = _sigmoid(b_0)
            b_1 = _sigmoid(b_1 + b_g1.to(tl.float32))
            b_kept = b_2
            b_2 = _tanh(b_g2.to(tl.float32) + b_0 * b_2, PRECISE)
            b_new = b_2 + b_1 * (b_before - b_2)
        else:
            b_0 = _sigmoid(b_0)
            b_1 = _sigmoid(b_1 + b_g1.to(tl.float32))
            b_2 = _tanh(b_2 + b_g2.to(tl.float32), PRECISE)
            b_3 = _sigmoid(b_3 + b_g3.to(tl.float32))
            b_kept = b_1 * b_c_before + b_0 * b_2
            b_new = b_3 * _tanh(b_kept, PRECISE)
            b_c = tl.where(m_active, b_kept, b_c)
        b_h = tl.where(m_active, b_new, b_h)
        if KEEP and GATES > 1:
            _store_gates(gates + row * WIDTH, o_x, m_active & m_h, b_0, b_1, b_2, b_3, H, GATES)
            tl.store(cell + row * UNITS + o_y, b_kept.to(DTYPE), mask=m_active & m_h)
        if PACKED or not LENGTHS:
            tl.store(y + row * UNITS + o_y, b_new.to(DTYPE), mask=m_active & m_h)
        else:
            tl.store(y + row * UNITS + o_y, tl.where(m_active, b_new, 0.0).to(DTYPE), mask=m_row)
    if LENGTHS and not PACKED:
        for t in range(last, steps):
            row = tl.cast(t, tl.int64) * batch + first
            tl.store(y + row * UNITS + o_y, tl.zeros((ROWS, BLOCK), DTYPE), mask=m_row)
    tl.store(hn + state + o_state, b_h.to(DTYPE), mask=m_row)
    if MODE == _LSTM:
        tl.store(cn + state + o_state, b_c.to(DTYPE), mask=m_row)


@triton.jit
def _before(p_all, p_initial, o_all, o_initial, b_length, t, i_d, distance, m_row, m_cut, INITIAL: tl.constexpr):
    # the state before step t, (ROWS, BLOCK), of what is saved for every row
    b_left = tl.where(i_d == 0, t + 0 * b_length, b_length - 1 - t)[:, None]
    m_read = m_row & (t < b_length)[:, None]
    b_x = tl.load(p_all + distance + o_all, mask=m_read & (b_left > 0), other=0.0).to(tl.float32)
    if INITIAL:
        b_x += tl.load(p_initial + o_initial, mask=m_read & (b_left <= 0), other=0.0).to(tl.float32)
    return tl.where(m_cut, 0.0, b_x)


@triton.jit(do_not_specialize=["steps", "batch"])
def backward_kernel(
    w_hh,
    w_hh_reverse,
    h0,
    c0,
    lengths,
    offsets,
    resets,
    scratch,
    y,
    gates,
    cell,
    dy,
    dhn,
    dcn,
    dgates,
    dm,
    previous,
    dh0,
    dc0,
    steps,
    batch,
    MODE: tl.constexpr,
    GATES: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    H: tl.constexpr,
    H0: tl.constexpr,
    C0: tl.constexpr,
    LENGTHS: tl.constexpr,
    PACKED: tl.constexpr,
    RESETS: tl.constexpr,
    DY: tl.constexpr,
    DHN: tl.constexpr,
    DCN: tl.constexpr,
    PREVIOUS: tl.constexpr,
    DH0: tl.constexpr,
    DC0: tl.constexpr,
    STREAMED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
):
    DTYPE: tl.constexpr = y.dtype.element_ty
    PRECISE: tl.constexpr = tl.float32 == DTYPE
    WIDTH: tl.constexpr = DIRECTIONS * GATES * H
    UNITS: tl.constexpr = DIRECTIONS * H
    i_d = tl.program_id(1)
    first = tl.program_id(0).to(tl.int64) * ROWS
    o_row = tl.arange(0, ROWS)
    o_h = tl.arange(0, BLOCK)[None, :]
    m_h = o_h < H
    o_x = o_row[:, None] * WIDTH + (o_h + i_d * (GATES * H))
    o_y = o_row[:, None] * UNITS + (o_h + i_d * H)
    b_length = _own_lengths(lengths, first, o_row, steps, batch, LENGTHS)
    m_row = (o_row < batch - first)[:, None] & m_h
    p_w = w_hh
    if i_d == 1:
        p_w = w_hh_reverse
    if not STREAMED:
        b_w0, b_w1, b_w2, b_w3 = _weights(p_w, tl.arange(0, BLOCK), GATES, H, H, 1, BLOCK)
    p_scratch = scratch + (tl.program_id(0) * DIRECTIONS + i_d).to(tl.int64) * (GATES * ROWS * BLOCK)
    state = (i_d * batch + first) * H
    o_state = o_row[:, None] * H + o_h
    b_dh = tl.zeros((ROWS, BLOCK), tl.float32)
    b_dc = b_dh
    if DHN:
        b_dh = tl.load(dhn + state + o_state, mask=m_row, other=0.0).to(tl.float32)
    if DCN:
        b_dc = tl.load(dcn + state + o_state, mask=m_row, other=0.0).to(tl.float32)

    last = tl.max(b_length)
    for i in range(last):
        # the forward's walk backwards
        t = (1 - i_d) * (last - 1) + (2 * i_d - 1) * i
        row = _first_row(offsets, t, batch, PACKED) + first
        row_before = _first_row(offsets, tl.minimum(tl.maximum(t - 1 + 2 * i_d, 0), last - 1), batch, PACKED) + first
        m_active = (t < b_length)[:, None]
        m_x = m_active & m_h
        m_cut = _cut(resets, offsets, t, first, o_row, b_length, batch, i_d, PACKED, RESETS)
        distance = row_before * UNITS
        b_d = b_dh
        if DY:
            b_d += tl.load(dy + row * UNITS + o_y, mask=m_x, other=0.0).to(tl.float32)
        if MODE == _GRU or PREVIOUS:
            b_before = _before(y, h0 + state, o_y, o_state, b_length, t, i_d, distance, m_row, m_cut, H0)
        if GATES == 1:
            b_y = tl.load(y + row * UNITS + o_y, mask=m_x, other=0.0).to(tl.float32)
            if MODE == _TANH:
                b_0 = b_d * (1.0 - b_y * b_y)
            else:
                # torch's: NaN where h is, 0 where it is 0
                b_0 = tl.where(b_y <= 0, 0.0, b_d)
            b_1, b_2, b_3 = b_0, b_0, b_0
            b_l2 = b_0
            b_direct = tl.zeros((ROWS, BLOCK), tl.float32)
        else:
            b_0, b_1, b_2, b_3 = _gates(gates + row * WIDTH, o_x, m_x, H, GATES)
            b_0 = b_0.to(tl.float32)
            b_1 = b_1.to(tl.float32)
            b_2 = b_2.to(tl.float32)
            b_kept = tl.load(cell + row * UNITS + o_y, mask=m_x, other=0.0).to(tl.float32)
        if MODE == _GRU:
            b_z = b_1
            b_1 = b_d * (b_before - b_2) * (b_z * (1.0 - b_z))
            b_2 = b_d * (1.0 - b_z) * (1.0 - b_2 * b_2)
            b_l2 = b_2 * b_0
            b_0 = b_2 * b_kept * (b_0 * (1.0 - b_0))
            b_direct = b_d * b_z
        if MODE == _LSTM:
            b_c_before = _before(cell, c0 + state, o_y, o_state, b_length, t, i_d, distance, m_row, m_cut, C0)
            b_o = b_3.to(tl.float32)
            b_tanh = _tanh(b_kept, PRECISE)
            b_dcell = b_dc + b_d * b_o * (1.0 - b_tanh * b_tanh)
            b_3 = b_d * b_tanh * (b_o * (1.0 - b_o))
            b_dc = tl.where(m_active, tl.where(m_cut, 0.0, b_dcell * b_1), b_dc)
            b_1 = b_dcell * b_c_before * (b_1 * (1.0 - b_1))
            b_f = b_0
            b_0 = b_dcell * b_2 * (b_f * (1.0 - b_f))
            b_2 = b_dcell * b_f * (1.0 - b_2 * b_2)
            b_l2 = b_2
            b_direct = tl.zeros((ROWS, BLOCK), tl.float32)
        if LENGTHS:
            # the sums below take in only what is stored, and nothing is past a length
            b_0 = tl.where(m_active, b_0, 0.0)
            b_1 = tl.where(m_active, b_1, 0.0)
            b_2 = tl.where(m_active, b_2, 0.0)
            b_l2 = tl.where(m_active, b_l2, 0.0)
            if GATES > 3:
                b_3 = tl.where(m_active, b_3, 0.0)
        m_store = m_row
        if PACKED:
            m_store = m_x
        _store_gates(dgates + row * WIDTH, o_x, m_store, b_0, b_1, b_2, b_3, H, GATES)
        if MODE == _GRU:
            tl.store(dm + row * UNITS + o_y, b_l2.to(DTYPE), mask=m_store)
        if PREVIOUS:
            tl.store(previous + row * UNITS + o_y, b_before.to(DTYPE), mask=m_store)
        b_l0 = b_0.to(DTYPE)
        b_l1 = b_1.to(DTYPE)
        b_l2 = b_l2.to(DTYPE)
        b_l3 = b_3.to(DTYPE)
        if STREAMED:
            b_0, b_1, b_2, b_3 = _streamed(
                b_l0, b_l1, b_l2, b_l3, p_w, p_scratch, GATES, GATES, PRECISION, H, H, 1, ROWS, BLOCK, PART
            )
        else:
            b_0, b_1, b_2, b_3 = _products(b_l0, b_l1, b_l2, b_l3, b_w0, b_w1, b_w2, b_w3, GATES, PRECISION)
        if GATES > 3:
            b_2 += b_3
        if GATES > 1:
            b_0 += b_1 + b_2
        b_dh = tl.where(m_active, tl.where(m_cut, 0.0, b_direct + b_0), b_dh)
    if LENGTHS and not PACKED:
        b_zero = tl.zeros((ROWS, BLOCK), DTYPE)
        for t in range(last, steps):
            row = tl.cast(t, tl.int64) * batch + first
            _store_gates(dgates + row * WIDTH, o_x, m_row, b_zero, b_zero, b_zero, b_zero, H, GATES)
            if MODE == _GRU:
                tl.store(dm + row * UNITS + o_y, b_zero, mask=m_row)
            if PREVIOUS:
                tl.store(previous + row * UNITS + o_y, b_zero, mask=m_row)
    if DH0:
        tl.store(dh0 + state + o_state, b_dh.to(DTYPE), mask=m_row)
    if DC0:
        tl.store(dc0 + state + o_state, b_dc.to(DTYPE), mask=m_row)


#: Whether TRITON_INTERPRET=1 made these kernels Python, for CPU tensors.
INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)

#: Hidden size up to which there are kernels.
HIDDEN = 128
#: Bytes of shared memory that a program needs next to W_hh.
_OPERANDS = 16384
#: What the interpreter, which has no limit, is taken to have: the smallest device's since compute capability 8.0.
_INTERPRETED_SHARED = 101376
_PART = 32


class Plan(NamedTuple):
    """How a program is built for a hidden size; see the kernels' parameters."""

    block: int
    streamed: bool
    precision: str
    warps: int

    def constants(self) -> dict[str, Any]:
        part = min(_PART, self.block)
        sizes = {"ROWS": ROWS, "BLOCK": self.block, "PART": part}
        return {"STREAMED": self.streamed, "PRECISION": self.precision, **sizes}

    def options(self) -> dict[str, Any]:
        """How it is compiled: with all of a thread's registers, for shared memory has room for one program only."""
        return {"num_warps": self.warps, "num_stages": 1, "maxnreg": 255}


def plan(mode: str, hidden: int, dtype: torch.dtype, shared: int, tf32: bool, resets: bool = False) -> Plan:
    """shared: bytes of shared memory that a program may have."""
    block = max(16, triton.next_power_of_2(hidden))
    precise = dtype == torch.float32 and not tf32
    # products in full float32 hold their right operand in registers
    streamed = GATES[mode] * block * block * dtype.itemsize + _OPERANDS > shared or (precise and block > 64)
    # with resets the compiler holds W_hh in registers, and those of an LSTM of 128 units spill
    streamed = streamed or (resets and GATES[mode] == 4 and block == 128)
    return Plan(block, streamed, "ieee" if precise else "tf32", min(8, block // 8))


class _Walk:
    """What forward and backward share of a call."""

    def __init__(
        self,
        layer: Layer,
        shape: tuple[int, int, int],
        parts: Sequence[Weights],
        h0: Tensor | None,
        c0: Tensor | None,
        y: Tensor,
    ) -> None:
        self.steps, self.batch, hidden = shape
        self.y, self.h0, self.c0 = y, h0, c0
        self.w_hh = [parts[0].w_hh.contiguous(), parts[-1].w_hh.contiguous()]
        self.lengths = self.offsets = self.resets = None
        if layer.batch_sizes is not None:
            ends = layer.batch_sizes.cumsum(0)
            # a sequence has as many steps as there are batches larger than its number
            rising = layer.batch_sizes.flip(0)
            lengths = self.steps - torch.searchsorted(rising, torch.arange(self.batch, device="cpu"), right=True)
            both = torch.cat([ends.new_zeros(1), ends, lengths]).to(y.device)
            self.offsets, self.lengths = both.split([self.steps + 1, self.batch])
        elif layer.lengths is not None:
            self.lengths = layer.lengths.to(torch.int64).contiguous()
        if layer.reset_mask is not None:
            self.resets = layer.reset_mask.contiguous().view(torch.uint8)
        shared = _INTERPRETED_SHARED
        if y.is_cuda:
            properties: Any = torch.cuda.get_device_properties(y.device)
            shared = properties.shared_memory_per_block_optin
        self.plan = plan(layer.mode, hidden, y.dtype, shared, uses_tf32(), self.resets is not None)
        self.grid = (triton.cdiv(self.batch, ROWS), layer.directions)
        self.scratch = y
        if self.plan.streamed:
            programs = self.grid[0] * layer.directions
            self.scratch = y.new_empty(programs * GATES[layer.mode] * ROWS * self.plan.block)
        self.constants = dict(
            MODE=MODES[layer.mode],
            GATES=GATES[layer.mode],
            DIRECTIONS=layer.directions,
            H=hidden,
            H0=h0 is not None,
            C0=c0 is not None,
            LENGTHS=self.lengths is not None,
            PACKED=self.offsets is not None,
            RESETS=self.resets is not None,
            **self.plan.constants(),
            **self.plan.options(),
        )

    def some(self, *tensors: Tensor | None) -> list[Tensor]:
        """The tensors, y in the places of those that are absent."""
        return [self.y if tensor is None else tensor for tensor in tensors]

    def rows(self) -> list[Tensor]:
        return self.some(self.h0, self.c0, self.lengths, self.offsets, self.resets, self.scratch)


def forward(
    layer: Layer,
    shape: tuple[int, int, int],
    parts: Sequence[Weights],
    h0: Tensor | None,
    c0: Tensor | None,
    gx: Tensor,
    kept: tuple[Tensor | None, Tensor | None],
    results: tuple[Tensor, Tensor, Tensor | None],
) -> None:
    """Fills kept, (gates, cell), and results, (y, hn, cn). shape: steps, batch, hidden size."""
    walk = _Walk(layer, shape, parts, h0, c0, results[0])
    if not walk.batch:
        return
    b_hh = [None if part.b_hh is None else part.b_hh.contiguous() for part in (parts[0], parts[-1])]
    gates, cell = walk.some(*kept)
    bias, keep = b_hh[0] is not None, kept[1] is not None
    tensors = gx, *walk.w_hh, *walk.some(*b_hh), *walk.rows(), gates, cell, *walk.some(*results)
    forward_kernel[walk.grid](*tensors, walk.steps, walk.batch, BIAS=bias, KEEP=keep, **walk.constants)


def backward(
    layer: Layer,
    shape: tuple[int, int, int],
    parts: Sequence[Weights],
    h0: Tensor | None,
    c0: Tensor | None,
    saved: Sequence[Any],
    given: Sequence[Tensor | None],
    results: Sequence[Tensor | None],
) -> None:
    """Fills results, (dgates, dm, previous, dh0, dc0), from saved, (y, gates, cell), and given, (dy, dhn, dcn)."""
    walk = _Walk(layer, shape, parts, h0, c0, saved[0])
    if not walk.batch:
        return
    tensors = *walk.w_hh, *walk.rows(), *walk.some(*saved, *given, *results)
    there = [tensor is not None for tensor in (*given, *results[2:])]
    flags = dict(zip(("DY", "DHN", "DCN", "PREVIOUS", "DH0", "DC0"), there, strict=True))
    backward_kernel[walk.grid](*tensors, walk.steps, walk.batch, **flags, **walk.constants)
