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
from typing import Any, NamedTuple

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
        rows = zip(size, kernel, *self[:4], self.crop[::2], self.crop[1::2], strict=True)
        return [(n - 1) * s - 2 * p + d * (k - 1) + o + 1 - a - b for n, k, s, p, o, d, a, b in rows]


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


def activate_backward(dout: Tensor, u: Tensor, activation: str, negative_slope: float) -> Tensor:
    """dout * activation'(u), itself differentiable; at 0 as torch's, and dout where a relu's u is NaN."""
    aten = torch.ops.aten
    if activation == "relu":
        return aten.threshold_backward(dout, u, 0)
    if activation == "leaky_relu":
        return aten.leaky_relu_backward(dout, u, negative_slope, False)
    if activation == "silu":
        s = u.sigmoid()
        return dout * (s * (1 + u * (1 - s)))
    if activation == "gelu":
        density = torch.exp(-0.5 * u * u) * 0.3989422804014327
        return dout * (0.5 * (1 + torch.erf(u * 0.7071067811865476)) + u * density)
    of_value = activate_backward_of_value(dout, activate(u, activation, negative_slope), activation, negative_slope)
    return dout if of_value is None else of_value


def activate_backward_of_value(dout: Tensor, out: Tensor, activation: str, negative_slope: float) -> Tensor | None:
    """`activate_backward` of out = activation(u); None where out does not tell it."""
    aten = torch.ops.aten
    if activation == "tanh":
        return aten.tanh_backward(dout, out)
    if activation == "sigmoid":
        return aten.sigmoid_backward(dout, out)
    if activation == "relu":
        return aten.threshold_backward(dout, out, 0)
    # of a falling slope out does not tell on which side of 0 it was
    if activation == "leaky_relu" and negative_slope >= 0:
        return aten.leaky_relu_backward(dout, out, negative_slope, True)
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


class NormBackward(torch.autograd.Function):
    """(dy, dnorm_weight, dnorm_bias) of a norm over all but y's second dimension, from u's gradient du.

    With xhat = (y - mean) / sigma, N elements of a channel, w = norm_weight or 1 and <> a channel's mean,
        dy = w / sigma * (du - <du> - xhat <du xhat>),  dnorm_weight = N <du xhat>,  dnorm_bias = N <du>.
    These are one pass of torch's. Its gradients by du, y and w, of g = dy's gradient, p and q = dnorm_weight's and
    dnorm_bias's, are in closed form, of a few passes:
        by w      N / sigma * (<g du> - <g> <du> - <g xhat> <du xhat>)
        by du     w / sigma * (g - <g> - xhat <g xhat>) + p xhat + q
        by y      -w / sigma^2 * (xhat (<g du> - <g> <du> - 3 <g xhat> <du xhat>) + <du xhat> (g - <g>)
                  + <g xhat> (du - <du>)) + p / sigma * (du - <du> - xhat <du xhat>)
    Beyond that it goes by `_norm_backward`: PyTorch's batch norm takes mean and sigma for constants there.
    """

    @staticmethod
    def forward(ctx: Any, du: Tensor, y: Tensor, norm_weight: Tensor | None, mean: Tensor, rstd: Tensor, eps: float):
        ctx.eps = eps
        found = _batch_norm_backward(du, y, norm_weight, mean, rstd, eps)
        ctx.save_for_backward(du, y, norm_weight, mean, rstd, *found[1:])
        return found

    @staticmethod
    def backward(ctx: Any, g: Tensor, p: Tensor, q: Tensor):
        du, y, w, mean, rstd, of_weight, of_bias = ctx.saved_tensors
        if torch.is_grad_enabled():
            # aliases, for du may be a function of y
            aliases: Any = (None if x is None else x.view_as(x) for x in (du, y, w))
            du, y, w = aliases
            wanted = [x for x in (du, y, w) if x is not None and x.requires_grad]
            pairs = zip(_norm_backward(du, y, w, ctx.eps), (g, p, q), strict=True)
            made, along = zip(*((made, gradient) for made, gradient in pairs if made.requires_grad), strict=True)
            found = iter(torch.autograd.grad(made, wanted, along, create_graph=True, materialize_grads=True))
            return *(next(found) if asked else None for asked in ctx.needs_input_grad[:3]), None, None, None
        dims, count = moment_dims(y.dim(), "batch"), y.numel() // max(1, y.shape[1])
        by_du, of_g_weight, of_g_bias = _batch_norm_backward(g, y, w, mean, rstd, ctx.eps)
        a, b, c = of_g_bias / count, of_g_weight / count, (g * du).mean(dims)  # <g>, <g xhat>, <g du>
        of_du, of_both = of_bias / count, of_weight / count  # <du>, <du xhat>
        scale = rstd if w is None else rstd * w
        steep = -scale * rstd
        # by y: along * (y - mean) + of_g * g + of_slope * du + rest
        of_g, of_slope = steep * of_both, steep * b + p * rstd
        along = rstd * (steep * (c - a * of_du - 3 * b * of_both) - p * rstd * of_both)
        rest = -of_g * a - of_slope * of_du
        centred = y - _spread(mean, y)
        by_du = by_du.addcmul_(centred, _spread(p * rstd, y)).add_(_spread(q, y))
        by_y = centred.mul_(_spread(along, y)).add_(_spread(rest, y))
        by_y.addcmul_(g, _spread(of_g, y)).addcmul_(du, _spread(of_slope, y))
        by_w = None if w is None else count * rstd * (c - a * of_du - b * of_both)
        return by_du, by_y, by_w, None, None, None


def _batch_norm_backward(
    du: Tensor, y: Tensor, norm_weight: Tensor | None, mean: Tensor, rstd: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.ones_like(rstd) if norm_weight is None else norm_weight
    given = du, y, weight, None, None, mean, rstd, True, eps, [True, True, True]
    return torch.ops.aten.native_batch_norm_backward(*given)


def _norm_backward(du: Tensor, y: Tensor, norm_weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """What NormBackward computes, differentiable as often as one likes."""
    dims = moment_dims(y.dim(), "batch")
    mean, var = moments(y, "batch")
    normalized = _normalized(y, mean, var, eps)
    dnorm_weight, dnorm_bias = (du * normalized).sum(dims), du.sum(dims)
    dnormalized = du if norm_weight is None else du * _spread(norm_weight, du)
    along = (dnormalized * normalized).mean(dims, keepdim=True)
    dnormalized = dnormalized - dnormalized.mean(dims, keepdim=True) - normalized * along
    return dnormalized * _spread((var + eps).rsqrt(), y), dnorm_weight, dnorm_bias


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

    mask: for each of the five whether it is asked for; None stands for those that are not. mean and var, constants for
    norm "given", are elsewhere taken for the functions of x, weight and bias that they are; they, y and out are
    `forward`'s where they are known, y and out differentiable: each may spare the convolution.
    """
    dnorm_weight = dnorm_bias = None
    activation = epilogue.activation, epilogue.negative_slope
    if not epilogue.normalizes:
        of_value = None if out is None else activate_backward_of_value(dout, out, *activation)
        if of_value is None and epilogue.activation != "none":
            y = convolve(x, weight, bias, geometry) if y is None else y
            of_value = activate_backward(dout, y, *activation)
        dy = dout if of_value is None else of_value
    else:
        y = convolve(x, weight, bias, geometry) if y is None else y
        wide = _wide(y)
        if mean is None or var is None:
            mean, var = moments(wide.detach(), epilogue.norm)
        du = dout.to(wide.dtype)
        norm_weight, norm_bias = (None if p is None else p.to(wide.dtype) for p in (norm_weight, norm_bias))
        if epilogue.activation != "none":
            du = activate_backward(du, _argument_of(wide, norm_weight, norm_bias, mean, var, epilogue), *activation)
        dy, dnorm_weight, dnorm_bias = _through_norm(du, wide, norm_weight, mean, var, epilogue)
    gradients = [*convolve_backward(dy.to(x.dtype), x, weight, geometry, mask[:3]), dnorm_weight, dnorm_bias]
    return [gradient if asked else None for gradient, asked in zip(gradients, mask, strict=True)]


def _argument_of(
    y: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, mean: Tensor, var: Tensor, epilogue: Epilogue
) -> Tensor:
    """u, differentiable where a gradient goes by it."""
    if epilogue.activation in ("relu", "leaky_relu"):
        norm_weight, norm_bias = (None if x is None else x.detach() for x in (norm_weight, norm_bias))
        return _argument(_normalized(y.detach(), mean, var, epilogue.eps), norm_weight, norm_bias)
    if epilogue.measures:
        mean, var = moments(y, epilogue.norm)
    return _argument(_normalized(y, mean, var, epilogue.eps), norm_weight, norm_bias)


def _through_norm(
    du: Tensor, y: Tensor, norm_weight: Tensor | None, mean: Tensor, var: Tensor, epilogue: Epilogue
) -> tuple[Tensor, Tensor, Tensor]:
    """(dy, dnorm_weight, dnorm_bias) of u's gradient du."""
    rstd = (var + epilogue.eps).rsqrt()
    if epilogue.norm == "given":
        dims = moment_dims(y.dim(), "batch")
        dnorm_weight, dnorm_bias = (du * _normalized(y, mean, var, epilogue.eps)).sum(dims), du.sum(dims)
        return du * _spread(rstd if norm_weight is None else rstd * norm_weight, y), dnorm_weight, dnorm_bias
    if epilogue.norm == "batch":
        return NormBackward.apply(du, y, norm_weight, mean, rstd, epilogue.eps)
    # each sample's channel is one of a batch of one
    weight = None if norm_weight is None else norm_weight.repeat(len(y))
    one = (1, -1, *y.shape[2:])
    parts = du.reshape(one), y.reshape(one), weight, mean.flatten(), rstd.flatten()
    dy, *of_samples = NormBackward.apply(*parts, epilogue.eps)
    dnorm_weight, dnorm_bias = (x.view(mean.shape).sum(0) for x in of_samples)
    return dy.view(y.shape), dnorm_weight, dnorm_bias
