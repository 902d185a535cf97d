"""The transposed convolution without PyTorch's: an input of one position, by phases, and depthwise.

One position: y is x (N, Cin) times the window of weight (Cin, Cout * taps) that is not cropped away; nothing is summed.

By phases, few output channels, or taps that do not overlap: csrc/cpu/conv_phases.cpp; dweight of many is torch's.

By products of matrices, many channels: csrc/cpu/conv_gather.cpp; what is channels last but for dweight is torch's.
In one or two dimensions of two taps a phase, by fewer products: csrc/cpu/conv_squares.cpp.

Depthwise, as many groups as channels in and out: csrc/cpu/conv_depthwise.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ... import native
from ..product import prefers_native, product
from .equations import Geometry, convolve_backward

#: Output channels up to which a layer has few of them.
FEW_OUTPUTS = 4

#: Channels that torch.mm sums in one go: one product over all of them errs 1.8 x as much as PyTorch's convolution.
_CHANNELS = 32

#: Elements of a weight from which on its gradient by the kernel was measured faster, with AVX2.
_LARGE_WEIGHT = 2**19

#: And from which on that of x is PyTorch's, with AVX-512.
_HUGE_WEIGHT = 2**22


def is_one_position(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether x has one position and the output is a window of the taps."""
    if x.shape[2:].numel() != 1 or geometry.groups != 1 or max(geometry.dilation) > 1 or not x.shape[0]:
        return False
    kernel = weight.shape[2:]
    sizes, begins = geometry.out_size(x.shape[2:], kernel), _before(geometry)
    if weight.is_contiguous():
        # a window would be picked element by element, which takes longer than it saves
        return sizes == list(kernel) and not any(begins)
    return all(begin + size <= taps for begin, size, taps in zip(begins, sizes, kernel, strict=True))


def _before(geometry: Geometry) -> list[int]:
    return [padding + begin for padding, begin in zip(geometry.padding, geometry.crop[::2], strict=True)]


def _window(weight: Tensor, y: Tensor, geometry: Geometry) -> Tensor:
    """The taps (Cin, Cout, *y's size), a view of weight, that one position reaches y through."""
    if weight.shape[2:] == y.shape[2:]:
        return weight
    for dim, (before, size) in enumerate(zip(_before(geometry), y.shape[2:], strict=True), start=2):
        weight = weight.narrow(dim, before, size)
    return weight


def _as_matrix(tensor: Tensor, out: Tensor) -> Tensor:
    """tensor (rows, Cout, *size) as a matrix whose columns are in the order of out's memory; out is dense."""
    if out.is_contiguous():
        return tensor.reshape(tensor.shape[0], -1)
    return tensor.movedim(1, -1).reshape(tensor.shape[0], -1)


def one_position_forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, y: Tensor) -> Tensor:
    """Fills y, (N, Cout, *size) and dense, and returns it."""
    matrix, window = x.reshape(x.shape[:2]), _as_matrix(_window(weight, y, geometry), y)
    flat = _as_matrix(y, y)
    # Zen 3, batch 32, 100 to 512, k4: 1.4 ms, and in parts 2.0
    if prefers_native(matrix, window, with_avx2=True) or y.dtype.itemsize == 2:
        # of 16 bits the sums are float32, and rounded once
        product(matrix, window, out=flat, with_avx2=True)
    else:
        torch.mm(matrix[:, :_CHANNELS], window[:_CHANNELS], out=flat)
        for begin in range(_CHANNELS, matrix.shape[1], _CHANNELS):
            # not addmm, which may go on adding to the same sums
            flat.add_(torch.mm(matrix[:, begin : begin + _CHANNELS], window[begin : begin + _CHANNELS]))
    return y if bias is None else y.add_(bias.view(-1, *[1] * (y.dim() - 2)))


def one_position_backward(
    dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, mask: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of `one_position_forward` that mask asks for; dy is dense."""
    dx = dweight = None
    flat = _as_matrix(dy, dy)
    window = _window(weight, dy, geometry)
    if mask[0]:
        dx, matrix = torch.empty_like(x), _as_matrix(window, dy)
        if x.shape[0] < x.shape[1]:
            # the right matrix is packed. Zen 5, batch 32, 100 to 512, k4, with batch norm: both passes 2.8 to 2.5 ms
            dx.view(dx.shape[:2]).copy_(product(matrix, flat.t()).t())
        else:
            product(flat, matrix.t(), out=dx.view(dx.shape[:2]))
    if mask[1]:
        # Zen 3, batch 32, 100 to 512, k4: 1.3 ms, and MKL's 1.5; 64 to 100, k4: 0.15 and 0.12
        large = x.shape[1] * flat.shape[1] > _LARGE_WEIGHT
        found = product(x.reshape(x.shape[:2]).t(), flat, with_avx2=large)
        if dy.is_contiguous():
            found = found.view(window.shape)
        else:
            found = found.view(window.shape[0], *window.shape[2:], window.shape[1]).movedim(-1, 1)
        dweight = found
        if window.shape != weight.shape or found.stride() != weight.stride():
            dweight = torch.empty_like(weight) if window.shape == weight.shape else torch.zeros_like(weight)
            _window(dweight, dy, geometry).copy_(found)
    return dx, dweight, _sum_positions(dy) if mask[2] else None


def _sum_positions(dy: Tensor) -> Tensor:
    return dy.sum([0, *range(2, dy.dim())])


def native_window(x: Tensor, weight: Tensor, geometry: Geometry) -> native.Window:
    size, kernel = x.shape[2:], weight.shape[2:]
    lead = 3 - len(size)
    parts = (size, geometry.out_size(size, kernel), kernel, geometry.stride, geometry.dilation)
    ones = [(1,) * lead + tuple(part) for part in parts]
    return *ones, (0,) * lead + tuple(_before(geometry))  # type: ignore[return-value]


def phases_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    y: Tensor,
    activation: tuple[int, float],
) -> Tensor:
    """Fills y, (N, Cout, *size) and dense, with activation(conv_transpose(x) + bias), and returns it.

    x is dense, groups is 1.
    """
    native.cpu_phases_forward(native_window(x, weight, geometry), x, weight.contiguous(), bias, y, activation)
    return y


def phases_backward(
    dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, mask: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of the convolution in `phases_forward` that mask asks for; dy is dense, x contiguous."""
    dx = dweight = None
    window = native_window(x, weight, geometry)
    # without fused multiply-add, a dx of few terms errs twice as much as PyTorch's
    if mask[0] and native.isa() != "baseline":
        dx = x.new_empty(x.shape)
        if not native.cpu_conv_transpose_backward("phases", window, x, weight.contiguous(), dy, dx, None):
            dx = None
    # to copy what a position's taps reach, run by run, takes as long as the products of some ten channels a run
    runs = weight.shape[2:-1].numel() * (weight.shape[-1] if geometry.dilation[-1] > 1 else 1)
    if mask[1] and weight.shape[1] <= FEW_OUTPUTS and weight.shape[0] >= 10 * runs:
        dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        done = native.cpu_conv_transpose_backward("phases", window, x, weight, dy, None, dweight)
        dweight = laid_out_as(weight, dweight) if done else None
    rest = (mask[0] and dx is None, mask[1] and dweight is None, False)
    if any(rest):
        found = convolve_backward(dy, x, weight, geometry, rest)
        dx, dweight = dx if found[0] is None else found[0], dweight if found[1] is None else found[1]
    return dx, dweight, _sum_positions(dy) if mask[2] else None


#: Channels on either side, and positions in a batch, from which on products of matrices were measured faster: packing
#: the weight takes as long as some 16 positions.
LEAST_CHANNELS, _LEAST_POSITIONS = 32, 64


def is_wide(x: Tensor, weight: Tensor) -> bool:
    """Whether there are channels and positions enough for products of matrices; groups is 1."""
    return min(weight.shape[:2]) >= LEAST_CHANNELS and x.numel() >= _LEAST_POSITIONS * x.shape[1]


def multiplies(
    channels: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int],
    contiguous: bool,
    forward: bool = True,
) -> bool:
    """Whether products of matrices were measured faster on this processor; channels: the fewer of both sides'."""
    if native.isa() != "avx512":
        return native.isa() == "avx2"
    if any(more >= step for more, step in zip(output_padding, stride, strict=True)):
        # oneDNN refuses it, and PyTorch's own loops take twice as long: 64 to 64, k3 s1, dilation 2, 18.4 and 9.4 ms
        return True
    if max(stride) == 1:
        # with one phase only, oneDNN's convolutions are as fast
        return False
    if native.is_intel():
        return True
    if len(stride) == 1 or (has_squares(kernel, stride, dilation) and channels % 16 == 0):
        return True
    # Zen 5, ms of PyTorch and of ours: 112 to 48, k5 s2, at 23 x 23: forward 1.2 and 1.4, dx 1.1 and 1.3; 128 to 64,
    # k2 s2, at 64 x 64, batch 4: the forward by phases takes 7.6, by products 13.0
    apart = forward and contiguous and tuple(kernel) == tuple(stride)
    return not apart and (channels >= 128 or channels % LEAST_CHANNELS == 0)


def has_squares(kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> bool:
    """Whether two taps of one or two dimensions reach an output: csrc/cpu/conv_squares.cpp multiplies less there.

    Not measured on Intel's processors with AVX-512.
    """
    twice = len(kernel) < 3 and all(taps == 2 * step for taps, step in zip(kernel, stride, strict=True))
    return twice and max(dilation) == 1 and (native.isa() == "avx2" or native.beats_mkl())


#: Positions in a batch from which on squares were measured faster, and of a large weight: it is packed first, of twice
#: as many numbers; and how many outputs may be computed, with those beyond an odd end, for each that there is.
_LEAST_IN_SQUARES, _LEAST_OF_LARGE, _LARGE_SQUARES, _MOST_COMPUTED = 256, 512, 2**20, 1.2


def in_squares(x: Tensor, weight: Tensor, geometry: Geometry, forward: bool = True) -> bool:
    """Whether nine products for each square of four outputs, not sixteen, or three of four, were measured faster.

    ms of PyTorch's, of products and of these. Zen 3, shared with others: 128 to 64, k4 s2 p1, at 16 x 16, batch 32: 47,
    37 and 32, dx 48, 48 and 39; 512 to 128, at 32 x 32: 40, 41 and 34, dx 40, 44 and 32; channels last 256 to 256, at
    32 x 32, batch 2: 80, 88 and 64, dx 87, 84 and 67. Zen 5, in the same order: 9.9, 8.7 and 6.7, dx 9.1, 8.5 and 6.8,
    dweight 9.3, 8.5 and 6.1; 17.6, 17.2 and 12.8, dx 18.6, 17.0 and 12.6; 16.2, 16.6 and 12.1, dx 15.7, 16.6 and 12.7;
    128 to 64, at 5 x 5, batch 64, of which 6 x 6 are computed: 1.7, 1.4 and 1.9; 48 to 336, at 19 x 20, batch 9: 7.8,
    7.9 and 8.3. In one dimension 64 to 32, k4 s2, at 12,000: 7.6, 6.5 and 5.2, dx 5.9, 4.8 and 4.9, dweight 6.2, 6.0
    and 4.7; 144 to 48, k16 s8, at 186, batch 30: 7.4, 10.0 and 5.4, dx 7.4, 5.7 and 5.0, dweight 7.3, 5.7 and 4.8;
    512 to 256, at 75, batch 4: 7.4, 6.6 and 6.6, dx 7.7, 6.0 and 7.1.
    """
    size, kernel = x.shape[2:], weight.shape[2:]
    if not has_squares(kernel, geometry.stride, geometry.dilation):
        return False
    least_positions = _LEAST_IN_SQUARES if weight.numel() < _LARGE_SQUARES else _LEAST_OF_LARGE
    # of a small image's edges the other products leave out more
    if x.numel() < least_positions * x.shape[1] or min(size) < 6:
        return False
    # a block has two rows at least, which are to stay in a cache
    if len(size) > 1 and (size[1] > 1024 or (forward and x.shape[1] < 64)):
        return False
    outputs = geometry.out_size(size, kernel) if forward else size
    steps = geometry.stride if forward else (1,) * len(size)
    of_phase = [-(-side // step) for side, step in zip(outputs, steps, strict=True)]
    return math.prod(side + side % 2 for side in of_phase) <= _MOST_COMPUTED * math.prod(size)


def _leaves_dx(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch's dx was measured faster than that of products."""
    if native.beats_mkl() and weight.numel() >= _HUGE_WEIGHT:
        # the weight is packed in another order: Zen 5, 1024 to 512, k4 s2, at 4 x 4, batch 4: 10.7 ms where ours takes
        # 14.6; at 8 x 8, batch 8: 38 and 49
        return True
    if x.is_contiguous():
        # in one dimension, of channels that oneDNN need not pad, Zen 3: 512 to 256, k16 s8, at 75, batch 4: 22 ms where
        # ours took 29
        return x.dim() == 3 and weight.shape[0] % 16 == weight.shape[1] % 16 == 0 and native.isa() == "avx2"
    # 256 to 128, k4 s2 p1, at 8 x 8, batch 32: 21.9 ms where ours takes 24.0
    return True


def products_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, y: Tensor, squares: bool
) -> Tensor:
    """Fills y, (N, Cout, *size) and dense, with conv_transpose(x) + bias, and returns it. x is dense, groups is 1.

    squares: whether they are `in_squares`.
    """
    tensors = native_window(x, weight, geometry), x, weight.contiguous(), bias, y
    if not (squares and native.cpu_squares_forward(*tensors)):
        native.cpu_gather_forward(*tensors)
    return y


def products_backward(
    dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, mask: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of the convolution in `products_forward` that mask asks for; dy and x are dense."""
    dx = dweight = None
    window, squares = native_window(x, weight, geometry), in_squares(x, weight, geometry, False)

    def fill(weight: Tensor, dx: Tensor | None, dweight: Tensor | None) -> None:
        tensors = window, x, weight, dy, dx, dweight
        if not (squares and native.cpu_conv_transpose_backward("squares", *tensors)):
            native.cpu_conv_transpose_backward("gather", *tensors)

    if mask[0] and not squares and _leaves_dx(x, weight):
        dx = convolve_backward(dy, x, weight, geometry, (True, False, False))[0]
    elif mask[0]:
        dx = torch.empty_like(x)
        fill(weight.contiguous(), dx, None)
    if mask[1]:
        dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        fill(weight, None, dweight)
        dweight = laid_out_as(weight, dweight)
    return dx, dweight, _sum_positions(dy) if mask[2] else None


def laid_out_as(x: Tensor, gradient: Tensor) -> Tensor:
    """The dense gradient in the layout of x, or of torch.empty_like(x) where x is not dense."""
    return gradient if gradient.stride() == x.stride() else torch.empty_like(x).copy_(gradient)


def is_depthwise(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether each output channel has an input channel of its own."""
    return geometry.groups == x.shape[1] and weight.shape[1] == 1


def depthwise_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    y: Tensor,
    activation: tuple[int, float],
) -> bool:
    """Fills y, (N, C, *size) and dense, with activation(conv_transpose(x) + bias). False: the weight is not finite."""
    window = native_window(x, weight, geometry)
    return native.cpu_depthwise_forward(window, x.contiguous(), weight.contiguous(), bias, y, activation)


def depthwise_backward(
    dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, mask: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of the convolution in `depthwise_forward` that mask asks for; dy is dense."""
    dx = x.new_empty(x.shape) if mask[0] else None
    shares = x.new_empty(x.shape[0], *weight.shape) if mask[1] else None
    if mask[0] or mask[1]:
        tensors = native_window(x, weight, geometry), x.contiguous(), weight.contiguous(), dy, dx, shares
        if not native.cpu_conv_transpose_backward("depthwise", *tensors):
            return convolve_backward(dy, x, weight, geometry, mask)
    dx = None if dx is None else laid_out_as(x, dx)
    dweight = None if shares is None else laid_out_as(weight, shares.sum(0))
    return dx, dweight, _sum_positions(dy) if mask[2] else None
