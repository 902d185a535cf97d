"""The transposed convolution and its epilogue in plain torch: specification, truth for tests, second derivatives.

    y = conv_transpose(x, w) + b, of which `crop` positions are dropped at each end
    u = (y - mean) / sqrt(var + eps) * norm_weight + norm_bias     where there is a norm, else u = y
    out = activation(u)

norm "batch" takes mean and (biased) var over the batch and all positions of a channel (Ioffe and Szegedy,
arXiv:1502.03167), "instance" over the positions of one sample's channel (Ulyanov et al., arXiv:1607.08022), "given"
from the caller: a batch norm in evaluation. "moments" only tells mean and var, those of norm "batch", and leaves u = y.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS = ("none", "relu", "leaky_relu", "tanh", "sigmoid", "silu", "gelu")
NORMS = ("none", "batch", "instance", "given", "moments")


class Geometry(NamedTuple):
    """One entry per spatial dimension in each tuple; crop: (begin, end) of the first dimension, of the second, ..."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    crop: tuple[int, ...]

    def out_size(self, size: Sequence[int], kernel: Sequence[int]) -> list[int]:
        """The output's spatial size for an input's spatial size."""
        cropped = [begin + end for begin, end in zip(self.crop[::2], self.crop[1::2], strict=True)]
        rows = zip(size, kernel, *self[:4], cropped, strict=True)
        return [(n - 1) * s - 2 * p + d * (k - 1) + o + 1 - c for n, k, s, p, o, d, c in rows]


class Epilogue(NamedTuple):
    """What follows the convolution. negative_slope is leaky_relu's."""

    norm: str = "none"
    eps: float = 1e-5
    activation: str = "none"
    negative_slope: float = 0.01

    @property
    def normalizes(self) -> bool:
        """Whether there is a norm."""
        return self.norm in ("batch", "instance", "given")

    @property
    def measures(self) -> bool:
        """Whether mean and var are results."""
        return self.norm in ("batch", "instance", "moments")


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """y (N, Cout, *sizes) of x (N, Cin, *sizes) and weight (Cin, Cout / groups, *kernel)."""
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[x.dim() - 3]
    stride, padding, output_padding, dilation, groups, crop = geometry
    y = function(x, weight, bias, stride, padding, output_padding, groups, dilation)
    for dim, (begin, end) in enumerate(zip(crop[::2], crop[1::2], strict=True), start=2):
        if begin or end:
            y = y.narrow(dim, begin, y.shape[dim] - begin - end)
    return y


def convolve_backward(
    dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, mask: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dy times the gradients of `convolve` with respect to x, weight and bias, those that mask asks for."""
    stride, padding, output_padding, dilation, groups, crop = geometry
    if any(crop):
        # F.pad wants the last dimension first
        pairs = zip(crop[-2::-2], crop[::-2], strict=True)
        dy = F.pad(dy, [side for pair in pairs for side in pair])
    sizes = [weight.shape[1] * groups]
    options = (sizes, stride, padding, dilation, True, output_padding, groups, list(mask))
    return torch.ops.aten.convolution_backward(dy, x, weight, *options)


def moment_dims(dims: int, norm: str) -> list[int]:
    """The dimensions of a tensor of `dims` dimensions over which a norm takes its moments."""
    return [*([] if norm == "instance" else [0]), *range(2, dims)]


def moments(y: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    """(mean, biased variance) of y: (Cout,), for norm "instance" (N, Cout)."""
    dims = moment_dims(y.dim(), norm)
    return y.mean(dims), y.var(dims, correction=0)


def _spread(statistic: Tensor, y: Tensor) -> Tensor:
    """A statistic (Cout,) or (N, Cout), in a shape that goes with y."""
    return statistic.reshape(*([1] * (2 - statistic.dim())), *statistic.shape, *([1] * (y.dim() - 2)))


def activate(u: Tensor, activation: str, negative_slope: float) -> Tensor:
    """activation(u)"""
    if activation == "leaky_relu":
        return F.leaky_relu(u, negative_slope)
    return u if activation == "none" else getattr(torch if activation in ("tanh", "sigmoid") else F, activation)(u)


def activation_slope(u: Tensor, activation: str, negative_slope: float) -> Tensor:
    """activation'(u), itself differentiable; at 0 as torch's, and 1 where a relu's u is NaN."""
    if activation in ("relu", "leaky_relu"):
        return torch.ones_like(u).masked_fill(u <= 0, 0.0 if activation == "relu" else negative_slope)
    if activation == "tanh":
        return 1 - u.tanh().square()
    s = u.sigmoid()
    if activation == "sigmoid":
        return s * (1 - s)
    if activation == "silu":
        return s * (1 + u * (1 - s))
    if activation == "gelu":
        density = torch.exp(-0.5 * u * u) * 0.3989422804014327
        return 0.5 * (1 + torch.erf(u * 0.7071067811865476)) + u * density
    return torch.ones_like(u)


def slope_of_value(out: Tensor, activation: str, negative_slope: float) -> Tensor | None:
    """activation'(u) of out = activation(u), itself differentiable; None where out does not tell it."""
    if activation == "tanh":
        return 1 - out.square()
    if activation == "sigmoid":
        return out * (1 - out)
    # of a falling slope out does not tell on which side of 0 it was
    if activation == "relu" or (activation == "leaky_relu" and negative_slope >= 0):
        return activation_slope(out, activation, negative_slope)
    return None


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    geometry: Geometry,
    epilogue: Epilogue,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(out, y, mean, var); mean and var are read for norm "given", else computed, and None for norm "none"."""
    y = convolve(x, weight, bias, geometry)
    u = y
    if epilogue.measures:
        mean, var = moments(_wide(y), epilogue.norm)
    if epilogue.normalizes:
        wide = _wide(y)
        u = _argument(_normalized(wide, mean, var, epilogue.eps), norm_weight, norm_bias)
    return activate(u, epilogue.activation, epilogue.negative_slope).to(y.dtype), y, mean, var


def _wide(y: Tensor) -> Tensor:
    """y, or in 16 bits its copy in float32: what norms compute in."""
    return y.float() if y.dtype.itemsize == 2 else y


def _normalized(y: Tensor, mean: Tensor | None, var: Tensor | None, eps: float) -> Tensor:
    assert mean is not None and var is not None
    return (y - _spread(mean, y)) * _spread((var + eps).rsqrt(), y)


def _argument(normalized: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None) -> Tensor:
    u = normalized if norm_weight is None else normalized * _spread(norm_weight, normalized)
    return u if norm_bias is None else u + _spread(norm_bias, normalized)


def backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    geometry: Geometry,
    epilogue: Epilogue,
    mask: Sequence[bool],
    y: Tensor | None = None,
    out: Tensor | None = None,
) -> list[Tensor | None]:
    """dout times the gradients with respect to x, weight, bias, norm_weight, norm_bias, as a differentiable formula.

    mask: for each of the five whether it is asked for; None stands for those that are not. mean and var are read for
    norm "given" only: elsewhere they are functions of x, weight and bias. y, out: `forward`'s, differentiable, where
    they are known: each may spare the convolution.
    """
    dnorm_weight = dnorm_bias = None
    activation = epilogue.activation, epilogue.negative_slope
    if not epilogue.normalizes and epilogue.activation == "none":
        dy = dout
    elif not epilogue.normalizes:
        slope = None if out is None else slope_of_value(out, *activation)
        if slope is None:
            slope = activation_slope(convolve(x, weight, bias, geometry) if y is None else y, *activation)
        dy = dout * slope
    else:
        y = convolve(x, weight, bias, geometry) if y is None else y
        wide = _wide(y)
        if epilogue.measures:
            mean, var = moments(wide, epilogue.norm)
        assert var is not None
        normalized = _normalized(wide, mean, var, epilogue.eps)
        u = _argument(normalized, norm_weight, norm_bias)
        du = dout * activation_slope(u, *activation)
        every = [0, *range(2, y.dim())]
        dnorm_weight, dnorm_bias = (du * normalized).sum(every), du.sum(every)
        dnormalized = du if norm_weight is None else du * _spread(norm_weight, du)
        if epilogue.measures:
            dims = moment_dims(y.dim(), epilogue.norm)
            along = (dnormalized * normalized).mean(dims, keepdim=True)
            dnormalized = dnormalized - dnormalized.mean(dims, keepdim=True) - normalized * along
        dy = dnormalized * _spread((var + epilogue.eps).rsqrt(), y)
    gradients = [*convolve_backward(dy.to(x.dtype), x, weight, geometry, mask[:3]), dnorm_weight, dnorm_bias]
    return [gradient if asked else None for gradient, asked in zip(gradients, mask, strict=True)]
