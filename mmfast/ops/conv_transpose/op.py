"""The transposed-convolution op: schema, fake, autograd.

    mmfast::conv_transpose_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias,
        Tensor? mean, Tensor? var, <geometry>, <epilogue>, bool keep, str backend)
        -> (Tensor out, Tensor saved, Tensor mean, Tensor var)
    mmfast::conv_transpose_backward(Tensor dout, <the same tensors>, Tensor saved, <geometry>, <epilogue>, bool[5] mask,
        str backend) -> Tensor[]: dx, dweight, dbias, dnorm_weight, dnorm_bias, empty where mask does not ask

What the tensors are: backends.py. mean and var, given or computed, carry no gradient. Any order of differentiation in
eager: where a gradient of the backward is needed, it is equations.backward, of y or out as the forward left them, so y
is differentiable too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...dispatch import is_plain
from ..library import as_its_forward, below_autograd, define, needs_gradient, nodes_of, will_run
from . import equations
from .backends import OP, empty_output, keeps_result, moments_dtype, moments_shape, results_of
from .equations import Epilogue, Geometry
from .products import laid_out_as

_TENSORS = "Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, Tensor? mean, Tensor? var"
_GEOMETRY = "int[] stride, int[] padding, int[] output_padding, int[] dilation, int groups, int[] crop"
_EPILOGUE = "str norm, float eps, str activation, float negative_slope"
_NAMES = len(Geometry._fields), len(Epilogue._fields)

Tensors = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def conv_transpose(
    tensors: Tensors, geometry: Geometry, epilogue: Epilogue, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, mean, var) of (x, weight, bias, norm_weight, norm_bias, mean, var); x is batched."""
    present = [x for x in tensors if x is not None]
    if not is_plain(present):
        keep = needs_gradient(present)
        out, _, mean, var = forward_op(*tensors, *_flat(geometry, epilogue), keep, backend)
    elif needs_gradient(present):
        out, _, mean, var = ConvTranspose.apply(True, geometry, epilogue, backend, *tensors)
    else:
        out, _, mean, var = OP.backends[backend].forward(*tensors, geometry, epilogue, False)
    return out, mean, var


class ConvTranspose(torch.autograd.Function):
    """The convolution and what follows it, as one node. direct: eager, so the backend is called directly."""

    @staticmethod
    def forward(ctx: Any, direct: bool, geometry: Geometry, epilogue: Epilogue, backend: str, *tensors: Any):
        ctx.direct, ctx.geometry, ctx.epilogue, ctx.backend = direct, geometry, epilogue, backend
        if direct:
            outputs = OP.backends[backend].forward(*tensors, geometry, epilogue, True)
        else:
            outputs = below_autograd(forward_op, *tensors, *_flat(geometry, epilogue), True, backend)
        out, saved, mean, var = outputs
        x, weight, bias, norm_weight, norm_bias, given_mean, given_var = tensors
        moments = (given_mean, given_var) if epilogue.norm == "given" else (mean, var)
        saved = saved if keeps_result(epilogue) or epilogue.activation == "none" else out
        ctx.save_for_backward(x, weight, bias, norm_weight, norm_bias, *moments, saved)
        # y is differentiable for the sake of second derivatives
        ctx.mark_non_differentiable(*(() if keeps_result(epilogue) else outputs[1:2]), mean, var)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @as_its_forward
    def backward(ctx: Any, dout: Tensor | None, dy: Tensor | None = None, *_: Any):
        mask = list(ctx.needs_input_grad[4:9])
        if ctx.direct and torch.is_grad_enabled():
            # a gradient penalty asks for x's alone
            given = ctx.saved_tensors[: 7 if ctx.epilogue.norm == "given" else 5]
            mask = [could and will_run(node) for could, node in zip(mask, nodes_of(ctx, given), strict=False)]
        gradients: list[Tensor | None] = [None] * 5
        if dout is None:
            pass
        elif ctx.direct and not torch.is_grad_enabled():
            arguments = (*ctx.saved_tensors, ctx.geometry, ctx.epilogue, mask)
            gradients = OP.backends[ctx.backend].backward(dout, *arguments)
        else:
            arguments = (*ctx.saved_tensors, *_flat(ctx.geometry, ctx.epilogue), mask)
            gradients = backward_op(dout, *arguments, ctx.backend)
            gradients = [gradient if asked else None for gradient, asked in zip(gradients, mask, strict=True)]
        if dy is not None:
            x, weight, *_ = ctx.saved_tensors
            of_y = equations.convolve_backward(dy, x, weight, ctx.geometry, mask[:3])
            gradients = [*map(_sum, gradients[:3], of_y), *gradients[3:]]
        return *(None,) * 4, *gradients, None, None


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b


def _flat(geometry: Geometry, epilogue: Epilogue) -> tuple:
    return *(list(part) if isinstance(part, tuple) else part for part in geometry), *epilogue


def _unflatten(flat: Sequence[Any]) -> tuple[Geometry, Epilogue]:
    geometry = Geometry._make(tuple(part) if isinstance(part, list) else part for part in flat[: _NAMES[0]])
    return geometry, Epilogue(*flat[_NAMES[0] :])


def _forward_kernel(*args):
    *tensors, keep, backend = *args[:7], *args[-2:]
    return OP.backends[backend].forward(*tensors, *_unflatten(args[7:-2]), keep)


def _forward_fake(*args):
    x, weight, keep = args[0], args[1], args[-2]
    geometry, epilogue = _unflatten(args[7:-2])
    out = empty_output(x, weight, geometry)
    shape: Sequence[int] = moments_shape(out.shape, epilogue)
    moments = [x.new_empty(shape, dtype=moments_dtype(x.dtype)) for _ in range(2)]
    saved = torch.empty_like(out) if keep and keeps_result(epilogue) else x.new_empty(0)
    return out, saved, *moments


def _forward_differentiable(*args):
    return ConvTranspose.apply(False, *_unflatten(args[7:-2]), args[-1], *args[:7])


def _backward_kernel(*args):
    mask, backend = args[-2:]
    gradients = OP.backends[backend].backward(*args[:9], *_unflatten(args[9:-2]), mask)
    pairs = zip(gradients, args[1:6], strict=True)
    # PyTorch's convolution, and kernels, give a gradient of mixed layouts in another one than the fake says
    return [args[0].new_empty(0) if g is None else laid_out_as(tensor, g) for g, tensor in pairs]


def _backward_fake(*args):
    dout, mask = args[0], args[-2]
    return [
        torch.empty_like(tensor) if asked and tensor is not None else dout.new_empty(0)
        for tensor, asked in zip(args[1:6], mask, strict=True)
    ]


def _backward_differentiable(*args):
    tensors, saved, mask = args[:8], args[8], args[-2]
    geometry, epilogue = _unflatten(args[9:-2])
    arguments: Any = (*tensors, geometry, epilogue, mask, *results_of(saved, epilogue))
    gradients = equations.backward(*arguments)
    return [args[0].new_empty(0) if gradient is None else gradient for gradient in gradients]


forward_op = define(
    f"conv_transpose_forward({_TENSORS}, {_GEOMETRY}, {_EPILOGUE}, bool keep, str backend)"
    " -> (Tensor out, Tensor saved, Tensor mean, Tensor var)",
    _forward_kernel,
    _forward_fake,
    _forward_differentiable,
)
backward_op = define(
    f"conv_transpose_backward(Tensor dout, {_TENSORS}, Tensor saved, {_GEOMETRY}, {_EPILOGUE}, bool[5] mask,"
    " str backend) -> Tensor[]",
    _backward_kernel,
    _backward_fake,
    _backward_differentiable,
)
