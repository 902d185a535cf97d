"""The transposed convolution in Triton, and the norm and activation after it, forward and backward.

    y[n, co, o] = bias[co] + sum over ci, k, i with i * stride + k * dilation = o + before of x[n, ci, i] w[ci, co, k]

before = padding + crop's begin. u = o + before; q = u // stride and r = u % stride, the phase. A phase has taps of its
own: k = first + j * period, period = stride / gcd(stride, dilation), j = 0, 1, ..., that read i = q - shift - j * step,
step = dilation / gcd. So each phase is a matrix product without a wasted multiplication: rows are the phase's output
positions of all samples, columns the output channels, and the sum is over taps and input channels.

Two forms of one kernel, both one launch:
    phases in the grid: a program has a tile of rows of one phase. u = before + p + stride * t: no row is wasted.
    phases in the columns: a column is a (channel, phase), a row a q: for few output channels, whose product would else
        be mostly padding, and for kernel = stride, where all phases read the same x. It needs dilation 1 and a kernel
        that is a multiple of the stride: then every phase has every tap.

x, y, out: (N, C, *size) contiguous, or channels last. weight: (Cin, Cout / groups, *kernel) contiguous, or channels
last; one that is contiguous and not small is brought into the other order first, by one copy, as a product reads output
channels side by side. bias, norm_weight, norm_bias: (C,). mean, var: (sets, C) float32, sets = N for an instance norm,
else 1. All are float32, float16 or bfloat16 and sums are float32; products of float32 are TF32 where PyTorch's settings
for convolutions say so. Three dimensions, the missing ones in front being 1.

The bytes are those of x and weight, read once (x's tiles once for each column tile and tap, from the cache), and of y,
written once; the flops 2 N Cin Cout taps |x|: bound by arithmetic where 2 Cin Cout taps / (Cin + Cout stride^d) > 400
in 16 bits, else by memory. A batch norm's moments come from the epilogue: each program stores count, mean and sum of
squared deviations of each of its columns, and one program a channel merges them in a fixed order in float64. A norm
reads y and writes out; its backward reads y and dout twice and writes dy: bound by memory.

Offsets are 64 bits from the tensor to the tile's first sample, 32 bits within; samples of 2^30 elements are
WIDE.
Nothing that a program is compiled for depends on the batch or a size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .equations import Epilogue, Geometry

# said outright, because Triton is about to change its default and warns of it
OPTIONS = {"enable_fp_fusion": True}

_SIZES = ["batch", "in_d", "in_h", "in_w", "out_d", "out_h", "out_w", "parts"]


@triton.jit
def _sigmoid(u):
    e = tl.exp(-tl.abs(u))
    return tl.where(u < 0, e, 1.0) / (1.0 + e)


@triton.jit
def _tanh(u):
    # 2 sigmoid(2u) - 1 cancels near 0, where the series of tanh is
    q = u * u
    p = -929569.0 / 638512875
    p = p * q + 21844.0 / 6081075
    p = p * q - 1382.0 / 155925
    p = p * q + 62.0 / 2835
    p = p * q - 17.0 / 315
    p = p * q + 2.0 / 15
    p = p * q - 1.0 / 3
    e = tl.exp(-2.0 * tl.abs(u))
    far = 1.0 - 2.0 * e / (1.0 + e)
    return tl.where(tl.abs(u) < 0.5, u + u * (q * p), tl.where(u < 0, -far, far))


@triton.jit
def _activate(u, negative_slope, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        u = tl.where(u < 0, 0.0, u)
    elif ACTIVATION == "leaky_relu":
        u = tl.where(u < 0, u * negative_slope, u)
    elif ACTIVATION == "tanh":
        u = _tanh(u)
    elif ACTIVATION == "sigmoid":
        u = _sigmoid(u)
    elif ACTIVATION == "silu":
        u = u * _sigmoid(u)
    elif ACTIVATION == "gelu":
        u = 0.5 * u * (1.0 + tl.erf(u * 0.7071067811865476))
    return u


@triton.jit
def _gradient(d, u, negative_slope, ACTIVATION: tl.constexpr):
    """d * activation'(u), at 0 and NaN as torch's; relu's 0 is one whatever d is"""
    if ACTIVATION == "relu":
        d = tl.where(u <= 0, 0.0, d)
    elif ACTIVATION == "leaky_relu":
        d = tl.where(u > 0, d, d * negative_slope)
    elif ACTIVATION == "tanh":
        # 4 sigmoid(2u) sigmoid(-2u), in which nothing cancels
        e = tl.exp(-2.0 * tl.abs(u))
        d = d * (4.0 * e / ((1.0 + e) * (1.0 + e)))
    elif ACTIVATION == "sigmoid":
        e = tl.exp(-tl.abs(u))
        d = d * (e / ((1.0 + e) * (1.0 + e)))
    elif ACTIVATION == "silu":
        v = _sigmoid(u)
        d = d * (v * (1.0 + u * (1.0 - v)))
    elif ACTIVATION == "gelu":
        d = d * (0.5 * (1.0 + tl.erf(u * 0.7071067811865476)) + u * tl.exp(-0.5 * u * u) * 0.3989422804014327)
    return d


@triton.jit
def _gradient_at_value(d, v, negative_slope, ACTIVATION: tl.constexpr):
    """d * activation'(u) where activation(u) = v; of silu and gelu, whose value does not tell it, v is u"""
    if ACTIVATION == "tanh":
        d = d * (1.0 - v * v)
    elif ACTIVATION == "sigmoid":
        d = d * (v * (1.0 - v))
    else:
        d = _gradient(d, v, negative_slope, ACTIVATION)
    return d


@triton.jit
def first_row(i_tile, positions, BLOCK: tl.constexpr):
    """(sample, position in it) of row i_tile * BLOCK, of rows numbered through samples of `positions` rows."""
    row = i_tile.to(tl.int64) * BLOCK
    sample = row // positions
    return sample, (row - sample * positions).to(tl.int32)


@triton.jit
def _taps_of(phase, KERNEL: tl.constexpr, PERIOD: tl.constexpr, GCD: tl.constexpr, INVERSE: tl.constexpr):
    """(first tap, number of taps) of a phase"""
    first = (phase // GCD * INVERSE) % PERIOD
    if GCD == 1 and KERNEL % PERIOD == 0:
        count = KERNEL // PERIOD
    else:
        count = (KERNEL - first + PERIOD - 1) // PERIOD
        count = tl.where(phase % GCD == 0, count, 0)
    return first, count


@triton.jit
def _divide(n, d, WIDE: tl.constexpr):
    """n // d, for n >= 0. Not WIDE: by a product, whose quotient, below 2^22, is at most 1 off."""
    if WIDE:
        q = n // d
    else:
        q = (n.to(tl.float32) * (1.0 / d)).to(tl.int32)
        r = n - q * d
        q += (r >= d).to(tl.int32) - (r < 0).to(tl.int32)
    return q


@triton.jit
def _steps(positions, CHANNELS: tl.constexpr, LAST: tl.constexpr):
    """How far apart neighbouring positions and neighbouring channels are."""
    if LAST:
        pixel = CHANNELS
        channel = 1
    else:
        pixel = 1
        channel = positions
    return pixel, channel


@triton.jit
def _wide(i, WIDE: tl.constexpr):
    if WIDE:
        i = i.to(tl.int64)
    return i


@triton.jit(do_not_specialize=[*_SIZES, "rows_d", "rows_h", "rows_w", "negative_slope", "eps"])
def conv_kernel(
    x,
    weight,
    bias,
    norm_weight,
    norm_bias,
    mean,
    var,
    out,
    saved,
    counts,
    means,
    squares,
    batch,
    in_d,
    in_h,
    in_w,
    out_d,
    out_h,
    out_w,
    rows_d,
    rows_h,
    rows_w,
    parts,
    negative_slope,
    eps,
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    GROUPS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    BEFORE: tl.constexpr,
    PERIOD: tl.constexpr,
    GCD: tl.constexpr,
    INVERSE: tl.constexpr,
    STEP: tl.constexpr,
    DIMS: tl.constexpr,
    PHASES_IN_COLUMNS: tl.constexpr,
    X_LAST: tl.constexpr,
    W_LAST: tl.constexpr,
    Y_LAST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MOMENTS: tl.constexpr,
    GIVEN: tl.constexpr,
    HAS_NORM_WEIGHT: tl.constexpr,
    HAS_NORM_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    GROUP_CIN: tl.constexpr = CIN // GROUPS
    GROUP_COUT: tl.constexpr = COUT // GROUPS
    TAPS: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    PHASES: tl.constexpr = STRIDE[0] * STRIDE[1] * STRIDE[2]
    COLUMNS: tl.constexpr = GROUP_COUT * PHASES if PHASES_IN_COLUMNS else GROUP_COUT
    COLUMN_TILES: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    GRID_PHASES: tl.constexpr = 1 if PHASES_IN_COLUMNS else PHASES
    K_TILES: tl.constexpr = (GROUP_CIN + BLOCK_K - 1) // BLOCK_K
    COLUMNS_ARE_TAPS: tl.constexpr = PHASES_IN_COLUMNS and PHASES == TAPS

    # programs that share rows of x are neighbours
    i_program = tl.program_id(0)
    i_n = i_program % COLUMN_TILES
    i_group = i_program // COLUMN_TILES % GROUPS
    i_phase = i_program // (COLUMN_TILES * GROUPS) % GRID_PHASES
    i_m = i_program // (COLUMN_TILES * GROUPS * GRID_PHASES)

    # rows
    in_positions = in_d * in_h * in_w
    out_positions = out_d * out_h * out_w
    row_positions = rows_d * rows_h * rows_w
    sample, start = first_row(i_m, row_positions, BLOCK_M)
    o_row = start + tl.arange(0, BLOCK_M)
    b_sample = _divide(o_row, row_positions, WIDE)
    b_tw = o_row - b_sample * row_positions
    m_row = sample + b_sample < batch
    b_td = tl.zeros((BLOCK_M,), tl.int32)
    b_th = tl.zeros((BLOCK_M,), tl.int32)
    if DIMS > 1:
        b_th = _divide(b_tw, rows_w, WIDE)
        b_tw -= b_th * rows_w
    if DIMS > 2:
        b_td = _divide(b_th, rows_h, WIDE)
        b_th -= b_td * rows_h

    # columns
    o_column = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_column = o_column < COLUMNS
    if PHASES_IN_COLUMNS:
        # side by side in memory where weight's are
        if W_LAST:
            b_phase = o_column // GROUP_COUT
            b_channel = o_column % GROUP_COUT
        else:
            b_phase = o_column % PHASES
            b_channel = o_column // PHASES
        b_rd = b_phase // (STRIDE[1] * STRIDE[2])
        b_rh = b_phase // STRIDE[2] % STRIDE[1]
        b_rw = b_phase % STRIDE[2]
        # of each row the first q that an output has, and where its phase 0 is in out
        b_qd = b_td + BEFORE[0] // STRIDE[0]
        b_qh = b_th + BEFORE[1] // STRIDE[1]
        b_qw = b_tw + BEFORE[2] // STRIDE[2]
        b_od = b_qd * STRIDE[0] - BEFORE[0]
        b_oh = b_qh * STRIDE[1] - BEFORE[1]
        b_ow = b_qw * STRIDE[2] - BEFORE[2]
        count_d: tl.constexpr = KERNEL[0] // STRIDE[0]
        count_h: tl.constexpr = KERNEL[1] // STRIDE[1]
        count_w: tl.constexpr = KERNEL[2] // STRIDE[2]
        b_tap = (b_rd * KERNEL[1] + b_rh) * KERNEL[2] + b_rw
    else:
        b_channel = o_column
        p_d = i_phase // (STRIDE[1] * STRIDE[2])
        p_h = i_phase // STRIDE[2] % STRIDE[1]
        p_w = i_phase % STRIDE[2]
        first_d, count_d = _taps_of((p_d + BEFORE[0]) % STRIDE[0], KERNEL[0], PERIOD[0], GCD[0], INVERSE[0])
        first_h, count_h = _taps_of((p_h + BEFORE[1]) % STRIDE[1], KERNEL[1], PERIOD[1], GCD[1], INVERSE[1])
        first_w, count_w = _taps_of((p_w + BEFORE[2]) % STRIDE[2], KERNEL[2], PERIOD[2], GCD[2], INVERSE[2])
        # the input position of the first tap: exact where the phase has taps
        b_qd = b_td + (p_d + BEFORE[0] - first_d * (STEP[0] * GCD[0])) // STRIDE[0]
        b_qh = b_th + (p_h + BEFORE[1] - first_h * (STEP[1] * GCD[1])) // STRIDE[1]
        b_qw = b_tw + (p_w + BEFORE[2] - first_w * (STEP[2] * GCD[2])) // STRIDE[2]
        b_od = b_td * STRIDE[0] + p_d
        b_oh = b_th * STRIDE[1] + p_h
        b_ow = b_tw * STRIDE[2] + p_w
        b_tap = (first_d * KERNEL[1] + first_h) * KERNEL[2] + first_w + tl.zeros((BLOCK_N,), tl.int32)

    p_x = x + sample * in_positions * CIN
    x_pixel, x_channel = _steps(in_positions, CIN, X_LAST)
    b_position = _wide((b_qd * in_h + b_qh) * in_w + b_qw, WIDE)
    b_first = _wide(b_sample, WIDE) * (in_positions * CIN) + b_position * x_pixel
    o_k = tl.arange(0, BLOCK_K)
    b_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i_step in range(count_d * count_h * count_w * K_TILES):
        i_tap = i_step // K_TILES
        k_start = (i_step - i_tap * K_TILES) * BLOCK_K
        j_d = 0
        j_h = 0
        j_w = i_tap
        if DIMS > 1:
            j_h = i_tap // count_w
            j_w = i_tap - j_h * count_w
        if DIMS > 2:
            j_d = j_h // count_h
            j_h -= j_d * count_h
        b_iw = b_qw - j_w * STEP[2]
        m_x = m_row & (b_iw >= 0) & (b_iw < in_w)
        if DIMS > 1:
            b_ih = b_qh - j_h * STEP[1]
            m_x &= (b_ih >= 0) & (b_ih < in_h)
        if DIMS > 2:
            b_id = b_qd - j_d * STEP[0]
            m_x &= (b_id >= 0) & (b_id < in_d)
        back = ((j_d * STEP[0] * in_h + j_h * STEP[1]) * in_w + j_w * STEP[2]) * x_pixel
        b_ci = k_start + o_k
        b_x_ci = i_group * GROUP_CIN + b_ci
        o_x = (b_first - back)[:, None] + (_wide(b_x_ci, WIDE) * x_channel)[None, :]
        b_k = b_tap + (j_d * PERIOD[0] * KERNEL[1] + j_h * PERIOD[1]) * KERNEL[2] + j_w * PERIOD[2]
        if W_LAST:
            o_w = (b_x_ci[:, None] * TAPS + b_k[None, :]) * GROUP_COUT + b_channel[None, :]
        elif COLUMNS_ARE_TAPS:
            o_w = b_x_ci[:, None] * COLUMNS + o_column[None, :]
        else:
            o_w = (b_x_ci[:, None] * GROUP_COUT + b_channel[None, :]) * TAPS + b_k[None, :]
        # no mask where none is needed: one would keep the loads from being 16 bytes wide
        if GROUP_CIN % BLOCK_K == 0:
            b_x = tl.load(p_x + o_x, mask=m_x[:, None], other=0.0)
            if COLUMNS % BLOCK_N == 0:
                b_w = tl.load(weight + o_w)
            else:
                b_w = tl.load(weight + o_w, mask=m_column[None, :], other=0.0)
        else:
            m_k = b_ci < GROUP_CIN
            b_x = tl.load(p_x + o_x, mask=m_x[:, None] & m_k[None, :], other=0.0)
            b_w = tl.load(weight + o_w, mask=m_k[:, None] & m_column[None, :], other=0.0)
        b_acc = tl.dot(b_x, b_w, b_acc, input_precision=PRECISION)

    b_co = i_group * GROUP_COUT + b_channel
    b_y = b_acc
    if HAS_BIAS:
        b_y += tl.load(bias + b_co, mask=m_column, other=0.0).to(tl.float32)[None, :]

    y_pixel, y_channel = _steps(out_positions, COUT, Y_LAST)
    b_position = _wide((b_od * out_h + b_oh) * out_w + b_ow, WIDE)
    b_row = _wide(b_sample, WIDE) * (out_positions * COUT) + b_position * y_pixel
    b_column = _wide(b_co, WIDE) * y_channel
    if PHASES_IN_COLUMNS:
        m_out = m_row[:, None] & m_column[None, :]
        b_out_d = b_od[:, None] + b_rd[None, :]
        b_out_h = b_oh[:, None] + b_rh[None, :]
        b_out_w = b_ow[:, None] + b_rw[None, :]
        m_out &= (b_out_d >= 0) & (b_out_d < out_d) & (b_out_h >= 0) & (b_out_h < out_h)
        m_out &= (b_out_w >= 0) & (b_out_w < out_w)
        b_column += _wide((b_rd * out_h + b_rh) * out_w + b_rw, WIDE) * y_pixel
    else:
        m_row &= (b_od < out_d) & (b_oh < out_h) & (b_ow < out_w)
        if COLUMNS % BLOCK_N == 0:
            m_out = m_row[:, None] & tl.full((1, BLOCK_N), True, tl.int1)
        else:
            m_out = m_row[:, None] & m_column[None, :]
    base = sample * out_positions * COUT
    o_y = b_row[:, None] + b_column[None, :]

    if SAVE:
        tl.store(saved + base + o_y, b_y.to(saved.dtype.element_ty), mask=m_out)
    if MOMENTS:
        # moments are those of what is stored
        b_stored = b_y.to(out.dtype.element_ty).to(tl.float32)
        if PHASES_IN_COLUMNS:
            b_count = tl.sum(m_out.to(tl.float32), 0)
        else:
            b_count = tl.sum(m_row.to(tl.float32), 0) + tl.zeros((BLOCK_N,), tl.float32)
        b_mean = tl.sum(tl.where(m_out, b_stored, 0.0), 0) / tl.where(b_count > 0, b_count, 1.0)
        b_off = tl.where(m_out, b_stored - b_mean[None, :], 0.0)
        if PHASES_IN_COLUMNS:
            b_part = i_m * PHASES + b_phase
        else:
            b_part = i_m * PHASES + i_phase + tl.zeros((BLOCK_N,), tl.int32)
        o_part = b_co.to(tl.int64) * parts + b_part
        tl.store(counts + o_part, b_count, mask=m_column)
        tl.store(means + o_part, b_mean, mask=m_column)
        tl.store(squares + o_part, tl.sum(b_off * b_off, 0), mask=m_column)
    if GIVEN:
        b_scale = 1.0 / tl.sqrt(tl.load(var + b_co, mask=m_column, other=1.0) + eps)
        if HAS_NORM_WEIGHT:
            b_scale *= tl.load(norm_weight + b_co, mask=m_column, other=0.0)
        b_y = (b_y - tl.load(mean + b_co, mask=m_column, other=0.0)[None, :]) * b_scale[None, :]
        if HAS_NORM_BIAS:
            b_y += tl.load(norm_bias + b_co, mask=m_column, other=0.0)[None, :]
    b_y = _activate(b_y, negative_slope, ACTIVATION)
    tl.store(out + base + o_y, b_y.to(out.dtype.element_ty), mask=m_out)


@triton.jit(do_not_specialize=["parts"])
def merge_kernel(counts, means, squares, mean, var, parts, BLOCK: tl.constexpr):
    """mean and var of each channel from its parts' moments, one program a channel."""
    i_channel = tl.program_id(0)
    start = i_channel.to(tl.int64) * parts
    o_part = tl.arange(0, BLOCK)
    b_count = tl.zeros((BLOCK,), tl.float64)
    b_sum = tl.zeros((BLOCK,), tl.float64)
    for i in range(0, parts, BLOCK):
        m_part = i + o_part < parts
        b_n = tl.load(counts + start + i + o_part, mask=m_part, other=0.0).to(tl.float64)
        b_count += b_n
        b_sum += b_n * tl.load(means + start + i + o_part, mask=m_part, other=0.0).to(tl.float64)
    count = tl.sum(b_count)
    whole_mean = tl.sum(b_sum) / count
    b_squares = tl.zeros((BLOCK,), tl.float64)
    for i in range(0, parts, BLOCK):
        m_part = i + o_part < parts
        b_n = tl.load(counts + start + i + o_part, mask=m_part, other=0.0).to(tl.float64)
        b_delta = tl.load(means + start + i + o_part, mask=m_part, other=0.0).to(tl.float64) - whole_mean
        b_part = tl.load(squares + start + i + o_part, mask=m_part, other=0.0).to(tl.float64)
        b_squares += tl.where(m_part, b_part + b_n * b_delta * b_delta, 0.0)
    tl.store(mean + i_channel, whole_mean.to(tl.float32))
    tl.store(var + i_channel, (tl.sum(b_squares) / count).to(tl.float32))


@triton.jit
def _set_tile(
    i_set, i_tile, o_channel, m_channel, batch, positions, CHANNELS: tl.constexpr, LAST: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(element of the tile's first sample, offsets, mask) of a tile of rows of one set, in the program's channels"""
    sample, start = first_row(i_tile, positions, BLOCK_R)
    o_row = start + tl.arange(0, BLOCK_R)
    b_sample = _divide(o_row, positions, WIDE)
    m_row = sample + b_sample < batch
    base = (i_set.to(tl.int64) * batch + sample) * positions * CHANNELS
    pixel, channel = _steps(positions, CHANNELS, LAST)
    b_row = _wide(b_sample, WIDE) * (positions * CHANNELS) + _wide(o_row - b_sample * positions, WIDE) * pixel
    offsets = b_row[:, None] + (_wide(o_channel, WIDE) * channel)[None, :]
    # no mask over the channels where none is needed: one would keep the loads from being 16 bytes wide
    if CHANNELS % BLOCK_C == 0:
        mask = m_row[:, None] & tl.full((1, BLOCK_C), True, tl.int1)
    else:
        mask = m_row[:, None] & m_channel[None, :]
    return base, offsets, mask


@triton.jit
def _set_program(CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, parts):
    """(channels, their mask, part, set) of this program"""
    COLUMN_TILES: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    i_program = tl.program_id(0)
    i_rest = i_program // COLUMN_TILES
    o_channel = i_program % COLUMN_TILES * BLOCK_C + tl.arange(0, BLOCK_C)
    return o_channel, o_channel < CHANNELS, i_rest % parts, i_rest // parts


@triton.jit(do_not_specialize=["batch", "positions", "parts"])
def moments_kernel(
    y, counts, means, squares, batch, positions, parts, CHANNELS: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr,
    TILES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Count, mean and squared deviations of each channel in TILES tiles of rows, read twice, the second time cached."""
    o_channel, m_channel, i_part, i_set = _set_program(CHANNELS, BLOCK_C, parts)
    b_count = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    b_sum = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for i in range(tl.minimum(TILES, tl.cdiv(batch * positions, BLOCK_R) - i_part * TILES)):
        base, o_y, m_y = _set_tile(
            i_set, i_part * TILES + i, o_channel, m_channel, batch, positions, CHANNELS, LAST, WIDE, BLOCK_R, BLOCK_C
        )
        b_count += m_y.to(tl.float32)
        b_sum += tl.load(y + base + o_y, mask=m_y, other=0.0).to(tl.float32)
    b_n = tl.sum(b_count, 0)
    b_mean = tl.sum(b_sum, 0) / tl.where(b_n > 0, b_n, 1.0)
    b_squares = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for i in range(tl.minimum(TILES, tl.cdiv(batch * positions, BLOCK_R) - i_part * TILES)):
        base, o_y, m_y = _set_tile(
            i_set, i_part * TILES + i, o_channel, m_channel, batch, positions, CHANNELS, LAST, WIDE, BLOCK_R, BLOCK_C
        )
        b_off = tl.load(y + base + o_y, mask=m_y, other=0.0).to(tl.float32) - b_mean[None, :]
        b_squares += tl.where(m_y, b_off * b_off, 0.0)
    o_part = (i_set * CHANNELS + o_channel).to(tl.int64) * parts + i_part
    tl.store(counts + o_part, b_n, mask=m_channel)
    tl.store(means + o_part, b_mean, mask=m_channel)
    tl.store(squares + o_part, tl.sum(b_squares, 0), mask=m_channel)


@triton.jit
def _parameters(
    norm_weight, norm_bias, mean, var, i_set, o_channel, m_channel, eps,
    CHANNELS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """(mean, 1 / standard deviation, weight, bias) of channels of a set"""
    b_mean = tl.load(mean + i_set * CHANNELS + o_channel, mask=m_channel, other=0.0)
    b_var = tl.load(var + i_set * CHANNELS + o_channel, mask=m_channel, other=1.0)
    b_weight = tl.full(o_channel.shape, 1.0, tl.float32)
    b_bias = tl.zeros(o_channel.shape, tl.float32)
    if HAS_WEIGHT:
        b_weight = tl.load(norm_weight + o_channel, mask=m_channel, other=0.0)
    if HAS_BIAS:
        b_bias = tl.load(norm_bias + o_channel, mask=m_channel, other=0.0)
    return b_mean, 1.0 / tl.sqrt(b_var + eps), b_weight, b_bias


@triton.jit(do_not_specialize=["batch", "positions", "parts", "negative_slope", "eps"])
def normalize_kernel(
    y, norm_weight, norm_bias, mean, var, out, batch, positions, parts, negative_slope, eps,
    CHANNELS: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    o_channel, m_channel, i_part, i_set = _set_program(CHANNELS, BLOCK_C, parts)
    base, o_y, m_y = _set_tile(
        i_set, i_part, o_channel, m_channel, batch, positions, CHANNELS, LAST, WIDE, BLOCK_R, BLOCK_C
    )
    b_mean, b_invstd, b_weight, b_bias = _parameters(
        norm_weight, norm_bias, mean, var, i_set, o_channel, m_channel, eps, CHANNELS, HAS_WEIGHT, HAS_BIAS
    )
    b_y = tl.load(y + base + o_y, mask=m_y, other=0.0).to(tl.float32)
    b_u = (b_y - b_mean[None, :]) * (b_invstd * b_weight)[None, :] + b_bias[None, :]
    b_u = _activate(b_u, negative_slope, ACTIVATION)
    tl.store(out + base + o_y, b_u.to(out.dtype.element_ty), mask=m_y)


@triton.jit(do_not_specialize=["batch", "positions", "parts", "negative_slope", "eps"])
def sums_kernel(
    y, dout, norm_weight, norm_bias, mean, var, dbias_parts, dweight_parts, batch, positions, parts, negative_slope,
    eps, CHANNELS: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, TILES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of dz and of dz * xhat over TILES tiles of rows, dz = dout * activation'(z), xhat the normalised y."""
    o_channel, m_channel, i_part, i_set = _set_program(CHANNELS, BLOCK_C, parts)
    b_dbias = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    b_dweight = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for i in range(tl.minimum(TILES, tl.cdiv(batch * positions, BLOCK_R) - i_part * TILES)):
        base, o_y, m_y = _set_tile(
            i_set, i_part * TILES + i, o_channel, m_channel, batch, positions, CHANNELS, LAST, WIDE, BLOCK_R, BLOCK_C
        )
        b_mean, b_invstd, b_weight, b_bias = _parameters(
            norm_weight, norm_bias, mean, var, i_set, o_channel, m_channel, eps, CHANNELS, HAS_WEIGHT, HAS_BIAS
        )
        b_y = tl.load(y + base + o_y, mask=m_y, other=0.0).to(tl.float32)
        b_dout = tl.load(dout + base + o_y, mask=m_y, other=0.0).to(tl.float32)
        b_xhat = (b_y - b_mean[None, :]) * b_invstd[None, :]
        b_u = b_xhat * b_weight[None, :] + b_bias[None, :]
        b_dz = tl.where(m_y, _gradient(b_dout, b_u, negative_slope, ACTIVATION), 0.0)
        b_dbias += b_dz
        b_dweight += b_dz * b_xhat
    o_part = (i_set * CHANNELS + o_channel).to(tl.int64) * parts + i_part
    tl.store(dbias_parts + o_part, tl.sum(b_dbias.to(tl.float64), 0).to(tl.float32), mask=m_channel)
    tl.store(dweight_parts + o_part, tl.sum(b_dweight.to(tl.float64), 0).to(tl.float32), mask=m_channel)


@triton.jit(do_not_specialize=["parts"])
def add_kernel(dbias_parts, dweight_parts, dbias, dweight, parts, BLOCK: tl.constexpr):
    """The sums of each channel's parts, one program a channel."""
    i_channel = tl.program_id(0)
    start = i_channel.to(tl.int64) * parts
    o_part = tl.arange(0, BLOCK)
    b_dbias = tl.zeros((BLOCK,), tl.float64)
    b_dweight = tl.zeros((BLOCK,), tl.float64)
    for i in range(0, parts, BLOCK):
        m_part = i + o_part < parts
        b_dbias += tl.load(dbias_parts + start + i + o_part, mask=m_part, other=0.0).to(tl.float64)
        b_dweight += tl.load(dweight_parts + start + i + o_part, mask=m_part, other=0.0).to(tl.float64)
    tl.store(dbias + i_channel, tl.sum(b_dbias).to(tl.float32))
    tl.store(dweight + i_channel, tl.sum(b_dweight).to(tl.float32))


@triton.jit(do_not_specialize=["batch", "positions", "parts", "negative_slope", "eps", "share"])
def input_gradient_kernel(
    y, dout, norm_weight, norm_bias, mean, var, dbias, dweight, dy, batch, positions, parts, negative_slope, eps, share,
    CHANNELS: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, MEASURED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dy = weight / std * (dz - [dbias + xhat * dweight] * share), [...] only where the moments are y's own."""
    o_channel, m_channel, i_part, i_set = _set_program(CHANNELS, BLOCK_C, parts)
    base, o_y, m_y = _set_tile(
        i_set, i_part, o_channel, m_channel, batch, positions, CHANNELS, LAST, WIDE, BLOCK_R, BLOCK_C
    )
    b_mean, b_invstd, b_weight, b_bias = _parameters(
        norm_weight, norm_bias, mean, var, i_set, o_channel, m_channel, eps, CHANNELS, HAS_WEIGHT, HAS_BIAS
    )
    b_y = tl.load(y + base + o_y, mask=m_y, other=0.0).to(tl.float32)
    b_dout = tl.load(dout + base + o_y, mask=m_y, other=0.0).to(tl.float32)
    b_xhat = (b_y - b_mean[None, :]) * b_invstd[None, :]
    b_u = b_xhat * b_weight[None, :] + b_bias[None, :]
    b_dz = _gradient(b_dout, b_u, negative_slope, ACTIVATION)
    if MEASURED:
        b_dbias = tl.load(dbias + i_set * CHANNELS + o_channel, mask=m_channel, other=0.0) * share
        b_dweight = tl.load(dweight + i_set * CHANNELS + o_channel, mask=m_channel, other=0.0) * share
        b_dz -= b_dbias[None, :] + b_xhat * b_dweight[None, :]
    b_dy = b_dz * (b_weight * b_invstd)[None, :]
    tl.store(dy + base + o_y, b_dy.to(dy.dtype.element_ty), mask=m_y)


@triton.jit(do_not_specialize=["count", "negative_slope"])
def activation_gradient_kernel(
    value, dout, dy, count, negative_slope, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """dy = dout * activation'(u), by what the forward kept."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    o_y = tl.arange(0, BLOCK)
    # no mask on a whole block: one would keep the accesses from being 16 bytes wide, as count is known only at run time
    if start + BLOCK <= count:
        b_v = tl.load(value + start + o_y).to(tl.float32)
        b_dout = tl.load(dout + start + o_y).to(tl.float32)
        b_dy = _gradient_at_value(b_dout, b_v, negative_slope, ACTIVATION)
        tl.store(dy + start + o_y, b_dy.to(dy.dtype.element_ty))
    else:
        m_y = o_y < count - start
        b_v = tl.load(value + start + o_y, mask=m_y, other=0.0).to(tl.float32)
        b_dout = tl.load(dout + start + o_y, mask=m_y, other=0.0).to(tl.float32)
        b_dy = _gradient_at_value(b_dout, b_v, negative_slope, ACTIVATION)
        tl.store(dy + start + o_y, b_dy.to(dy.dtype.element_ty), mask=m_y)


#: Whether TRITON_INTERPRET=1 made these kernels Python, for CPU tensors.
INTERPRETED = not isinstance(conv_kernel, triton.JITFunction)

_BLOCK = 1024
#: Rows and channels of a tile of the norm's kernels, and the tiles that one program sums up.
_TILE, _TILES = 2048, 8
#: Warps of the kernel that keeps two tiles of sums: with 4 it spills on sm_100.
_SUMS_WARPS = 8
#: A sample of so many elements needs offsets of 64 bits.
_LARGE = 2**30
#: _divide's quotients are below this.
_DIVISIBLE = 2**22


class Plan(NamedTuple):
    """What a convolution's program is compiled for: static facts alone."""

    constants: dict[str, Any]
    phases: int
    column_tiles: int
    in_columns: bool


@functools.lru_cache(maxsize=1024)
def plan(
    shape: tuple[int, ...], geometry: Geometry, dtype: torch.dtype, x_last: bool, w_last: bool, tf32: bool
) -> Plan:
    """shape: the weight's. x_last, w_last: whether the channels of x, of weight's outputs, are side by side."""
    in_channels, group_out, *kernel_size = shape
    kernel, stride, dilation = (_three(part) for part in (kernel_size, geometry.stride, geometry.dilation))
    gcd = tuple(map(math.gcd, stride, dilation))
    period = tuple(s // g for s, g in zip(stride, gcd, strict=True))
    step = tuple(d // g for d, g in zip(dilation, gcd, strict=True))
    phases = math.prod(stride)
    every_tap = max(dilation) == 1 and all(k % s == 0 for k, s in zip(kernel, stride, strict=True))
    in_columns = every_tap and phases > 1 and (group_out < 16 or kernel == stride)
    columns = group_out * phases if in_columns else group_out
    blocks = _blocks(in_channels // geometry.groups, columns, dtype.itemsize, x_last, in_columns)
    constants = {
        "CIN": in_channels,
        "COUT": group_out * geometry.groups,
        "GROUPS": geometry.groups,
        "KERNEL": kernel,
        "STRIDE": stride,
        "BEFORE": _three([p + c for p, c in zip(geometry.padding, geometry.crop[::2], strict=True)], 0),
        "PERIOD": period,
        "GCD": gcd,
        "INVERSE": tuple(pow(d, -1, n) if n > 1 else 0 for d, n in zip(step, period, strict=True)),
        "STEP": step,
        "DIMS": len(kernel_size),
        "PHASES_IN_COLUMNS": in_columns,
        "W_LAST": w_last,
        "PRECISION": "tf32" if tf32 else "ieee",
        **blocks,
    }
    tiles = triton.cdiv(columns, blocks["BLOCK_N"])
    return Plan(constants, phases, tiles * geometry.groups * (1 if in_columns else phases), in_columns)


def _three(sizes: Sequence[int], missing: int = 1) -> tuple[int, int, int]:
    return (*[missing] * (3 - len(sizes)), *sizes)  # type: ignore[return-value]


def _blocks(in_channels: int, columns: int, itemsize: int, x_last: bool, in_columns: bool) -> dict[str, int]:
    """The tile of a program, by channels and kernel: square where the product is large, deep where it is narrow.

    Half as large where x is read element by element, or each element has a mask of its own: addresses fill registers.
    """
    small = in_columns or not x_last
    n = min(max(triton.next_power_of_2(columns), 16), 64 if small else 128)
    k = min(max(triton.next_power_of_2(in_channels), 16), 64 if itemsize == 2 and x_last else 32)
    m = 64 if small else 128
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": 8 if m * n > 8192 else 4, "num_stages": 3}


def tf32_allowed() -> bool:
    """Whether PyTorch's settings let convolutions of float32 round their factors to TF32."""
    conv = getattr(torch.backends.cudnn, "conv", None)
    return torch.backends.cudnn.allow_tf32 if conv is None else conv.fp32_precision == "tf32"


def is_last(x: Tensor) -> bool:
    """Whether the second dimension's elements are side by side, and x one block of memory."""
    return x.movedim(1, -1).is_contiguous()


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    given: Sequence[Tensor | None] | None,
    geometry: Geometry,
    epilogue: Epilogue,
    out: Tensor,
    saved: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Fills out with the convolution and what of the epilogue needs no moments, and saved with the convolution alone.

    given: (norm_weight, norm_bias, mean, var) of a norm "given", else None. x, weight and out are dense, with elements.
    Returns (counts, means, squares), (Cout, parts) each, the moments' parts, for norm "batch" and "moments".
    """
    w_last = is_last(weight)
    facts = (tuple(weight.shape), geometry, x.dtype)
    tf32 = x.dtype == torch.float32 and tf32_allowed()
    x_last = is_last(x)
    chosen = plan(*facts, x_last, w_last, tf32)
    if not w_last and not chosen.in_columns:
        weight, w_last = weight.movedim(1, -1).contiguous().movedim(-1, 1), True
        chosen = plan(*facts, x_last, w_last, tf32)
    constants = chosen.constants
    size, out_size = _three(x.shape[2:]), _three(out.shape[2:])
    if chosen.in_columns:
        places = zip(out_size, constants["BEFORE"], constants["STRIDE"], strict=True)
        rows = [(before + n - 1) // stride - before // stride + 1 for n, before, stride in places]
    else:
        rows = [triton.cdiv(n, stride) for n, stride in zip(out_size, constants["STRIDE"], strict=True)]
    tiles = triton.cdiv(x.shape[0] * math.prod(rows), constants["BLOCK_M"])
    parts = tiles * chosen.phases
    moments = None
    if epilogue.norm in ("batch", "moments"):
        moments = tuple(torch.empty(out.shape[1], parts, dtype=torch.float32, device=x.device) for _ in range(3))
    norm_weight, norm_bias, mean, var = given or (None,) * 4
    optional = (bias, norm_weight, norm_bias, mean, var)
    conv_kernel[(tiles * chosen.column_tiles,)](
        x,
        weight,
        *(x if tensor is None else tensor for tensor in optional),
        out,
        out if saved is None else saved,
        *(moments or (out, out, out)),
        x.shape[0],
        *size,
        *out_size,
        *rows,
        parts,
        epilogue.negative_slope,
        epilogue.eps,
        X_LAST=x_last,
        Y_LAST=is_last(out),
        HAS_BIAS=bias is not None,
        MOMENTS=moments is not None,
        GIVEN=given is not None,
        HAS_NORM_WEIGHT=norm_weight is not None,
        HAS_NORM_BIAS=norm_bias is not None,
        ACTIVATION="none" if epilogue.norm in ("batch", "instance") else epilogue.activation,
        SAVE=saved is not None,
        WIDE=max(x[0].numel(), out[0].numel()) >= _LARGE or rows[0] * rows[1] >= _DIVISIBLE,
        **constants,
        **OPTIONS,
    )
    return moments  # type: ignore[return-value]


class _Sets:
    """A dense y (N, C, *size) as the norm's kernels take it: how it is laid out, and the tiles it is cut into."""

    def __init__(self, y: Tensor, norm: str) -> None:
        batch, channels = y.shape[:2]
        self.positions = y.shape[2:].numel()
        self.sets, self.batch = (batch, 1) if norm == "instance" else (1, batch)
        last = is_last(y)
        columns = min(triton.next_power_of_2(channels), 64 if last else 4)
        rows = _TILE // columns if last else _TILE // 4
        self.tiles = triton.cdiv(self.batch * self.positions, rows)
        self.parts = triton.cdiv(self.tiles, _TILES)
        self.column_tiles = triton.cdiv(channels, columns) * self.sets
        self.shape = (self.sets, channels)
        self.constants: dict[str, Any] = {
            "CHANNELS": channels,
            "LAST": last,
            "WIDE": y[0].numel() >= _LARGE,
            "BLOCK_R": rows,
            "BLOCK_C": columns,
            **OPTIONS,
        }

    def empty_parts(self, y: Tensor, count: int) -> list[Tensor]:
        shape = (self.shape[0] * self.shape[1], self.parts)
        return [torch.empty(shape, dtype=torch.float32, device=y.device) for _ in range(count)]


def moments(y: Tensor, norm: str) -> tuple[Tensor, Tensor, Tensor]:
    """The moments' parts of y, dense and with elements, for `merge`."""
    sets = _Sets(y, norm)
    counts, means, squares = sets.empty_parts(y, 3)
    sizes = (sets.batch, sets.positions, sets.parts)
    moments_kernel[(sets.column_tiles * sets.parts,)](y, counts, means, squares, *sizes, TILES=_TILES, **sets.constants)
    return counts, means, squares


def merge(parts: Sequence[Tensor], mean: Tensor, var: Tensor) -> None:
    """Fills mean and var from the moments' parts."""
    merge_kernel[(mean.numel(),)](*parts, mean, var, parts[0].shape[1], BLOCK=_BLOCK, **OPTIONS)


def normalize(y: Tensor, parameters: Sequence[Tensor | None], epilogue: Epilogue, out: Tensor) -> None:
    """Fills out, which may be y, with activation(norm(y)). parameters: (norm_weight, norm_bias, mean, var), float32."""
    sets = _Sets(y, epilogue.norm)
    normalize_kernel[(sets.column_tiles * sets.tiles,)](
        y,
        *_present(parameters),
        out,
        sets.batch,
        sets.positions,
        sets.tiles,
        epilogue.negative_slope,
        epilogue.eps,
        **_norm_constants(parameters, epilogue),
        **sets.constants,
    )


def normalize_backward(
    y: Tensor, dout: Tensor, parameters: Sequence[Tensor | None], epilogue: Epilogue, dy: Tensor
) -> tuple[Tensor, Tensor]:
    """Fills dy; returns dnorm_weight and dnorm_bias, (sets, C) float32. dout is laid out as y is, dy too."""
    sets = _Sets(y, epilogue.norm)
    dbias_parts, dweight_parts = sets.empty_parts(y, 2)
    dbias, dweight = (torch.empty(sets.shape, dtype=torch.float32, device=y.device) for _ in range(2))
    tensors = (y, dout, *_present(parameters))
    scalars = (epilogue.negative_slope, epilogue.eps)
    constants = {**_norm_constants(parameters, epilogue), **sets.constants}
    sums_kernel[(sets.column_tiles * sets.parts,)](
        *tensors,
        dbias_parts,
        dweight_parts,
        sets.batch,
        sets.positions,
        sets.parts,
        *scalars,
        TILES=_TILES,
        num_warps=_SUMS_WARPS,
        **constants,
    )
    add_kernel[(dbias.numel(),)](dbias_parts, dweight_parts, dbias, dweight, sets.parts, BLOCK=_BLOCK, **OPTIONS)
    input_gradient_kernel[(sets.column_tiles * sets.tiles,)](
        *tensors,
        dbias,
        dweight,
        dy,
        sets.batch,
        sets.positions,
        sets.tiles,
        *scalars,
        1.0 / (sets.batch * sets.positions),
        MEASURED=epilogue.norm != "given",
        **constants,
    )
    return dweight, dbias


def _present(parameters: Sequence[Tensor | None]) -> list[Tensor | None]:
    # an absent tensor is passed as another one, which the program does not touch
    return [parameters[-1] if tensor is None else tensor for tensor in parameters]


def _norm_constants(parameters: Sequence[Tensor | None], epilogue: Epilogue) -> dict[str, Any]:
    has = {"HAS_WEIGHT": parameters[0] is not None, "HAS_BIAS": parameters[1] is not None}
    return {**has, "ACTIVATION": epilogue.activation}


def activation_backward(value: Tensor, dout: Tensor, epilogue: Epilogue, dy: Tensor) -> None:
    """Fills dy with dout * activation' by what the forward kept; one layout, one block of memory each."""
    count = value.numel()
    activation_gradient_kernel[(triton.cdiv(count, _TILE),)](
        value, dout, dy, count, epilogue.negative_slope, ACTIVATION=epilogue.activation, BLOCK=_TILE, **OPTIONS
    )
