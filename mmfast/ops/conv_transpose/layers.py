"""Transposed convolutions as functions, with a norm and an activation or without: checks and choice around the op."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...dispatch import compute_dtype, is_known, needs_formula
from . import equations
from .backends import LONG_ROW, OP, Case
from .equations import ACTIVATIONS, Epilogue, Geometry
from .op import conv_transpose

Size = int | Sequence[int]


def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
    *,
    backend: str | None = None,
) -> Tensor:
    """A transposed convolution over sequences.

    Equivalent to: `torch.nn.functional.conv_transpose1d`, in every argument, dtype and error.

    input: (N, Cin, L) or (Cin, L). weight: (Cin, Cout / groups, K). bias: (Cout,) or None.
    Returns (N, Cout, L') or (Cout, L'), L' = (L - 1) * stride - 2 * padding + dilation * (K - 1) + output_padding + 1.
    backend: "torch", "cpu", "triton", "cuda" or None (mmfast chooses); ValueError for any other.
    Differentiable to any order.
    """
    geometry: Any = (stride, padding, output_padding, groups, dilation)
    chosen = _select_conv_transpose(1, input, weight, bias, *geometry, backend)
    if chosen == "torch":
        return torch.conv_transpose1d(input, weight, bias, *geometry)
    arguments: Any = (1, input, weight, bias, *geometry, chosen)
    return _conv_transpose(*arguments)


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
    *,
    backend: str | None = None,
) -> Tensor:
    """A transposed convolution over images.

    Equivalent to: `torch.nn.functional.conv_transpose2d`, in every argument, dtype and error.

    input: (N, Cin, H, W) or (Cin, H, W). weight: (Cin, Cout / groups, Kh, Kw). All else: `conv_transpose1d`.
    """
    geometry: Any = (stride, padding, output_padding, groups, dilation)
    chosen = _select_conv_transpose(2, input, weight, bias, *geometry, backend)
    if chosen == "torch":
        return torch.conv_transpose2d(input, weight, bias, *geometry)
    arguments: Any = (2, input, weight, bias, *geometry, chosen)
    return _conv_transpose(*arguments)


def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
    *,
    backend: str | None = None,
) -> Tensor:
    """A transposed convolution over volumes.

    Equivalent to: `torch.nn.functional.conv_transpose3d`, in every argument, dtype and error.

    input: (N, Cin, D, H, W) or (Cin, D, H, W). weight: (Cin, Cout / groups, Kd, Kh, Kw). All else: `conv_transpose1d`.
    """
    geometry: Any = (stride, padding, output_padding, groups, dilation)
    chosen = _select_conv_transpose(3, input, weight, bias, *geometry, backend)
    if chosen == "torch":
        return torch.conv_transpose3d(input, weight, bias, *geometry)
    arguments: Any = (3, input, weight, bias, *geometry, chosen)
    return _conv_transpose(*arguments)


_SPATIAL = ("sequences", "images", "volumes")


def _norm_act(dims: int) -> Callable[..., Any]:
    """conv_transpose*d_norm_act of so many spatial dimensions."""

    def conv_transpose_norm_act(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        dilation: Size = 1,
        *,
        crop: Sequence[tuple[int, int]] | tuple[int, int] = (0, 0),
        norm: str | None = None,
        norm_weight: Tensor | None = None,
        norm_bias: Tensor | None = None,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
        activation: str | None = None,
        negative_slope: float = 0.01,
        statistics: bool = False,
        backend: str | None = None,
    ) -> Any:
        epilogue = _epilogue(norm, running_mean, training, eps, activation, negative_slope, statistics)
        sizes = (stride, padding, output_padding, groups, dilation)
        parameters = (norm_weight, norm_bias, running_mean, running_var)
        arguments: Any = (input, weight, bias, *sizes, crop, parameters, momentum, epilogue, statistics, backend)
        out, mean, var = _conv_transpose_norm_act(dims, *arguments)
        return (out, mean, var) if statistics else out

    name = f"conv_transpose{dims}d"
    conv_transpose_norm_act.__name__ = conv_transpose_norm_act.__qualname__ = f"{name}_norm_act"
    conv_transpose_norm_act.__doc__ = f"""A transposed convolution of {_SPATIAL[dims - 1]}, norm and activation: one op.

    Equivalent to, for norm "batch" and activation "relu", with `crop` positions sliced off the convolution's result:
    `relu(batch_norm({name}(input, weight, bias, ...)[crop], running_mean, running_var, norm_weight, norm_bias,
    training, momentum, eps))`.

    input, weight, bias, stride, padding, output_padding, groups, dilation: as in `{name}`.
    crop: how many positions to drop from the result at (begin, end), or a pair per spatial dimension; audio codecs
        that are causal drop their whole overlap at the end.
    norm: None, "batch" (training, or no running statistics: moments of this batch; else the running statistics) or
        "instance" (always its own moments). norm_weight, norm_bias: (Cout,) or None.
    running_mean, running_var: (Cout,) or None; "batch" updates them in training, as PyTorch does.
    activation: None, "relu", "leaky_relu" (with negative_slope), "tanh", "sigmoid", "silu" or "gelu" (exact).
    statistics: whether mean and biased variance of the convolution's result, before norm and activation, are returned
        too: float32 (float64 for float64), without gradients, (Cout,) over batch and positions; "instance": (N, Cout).
    backend: "torch", "cpu", "triton", "cuda" or None (mmfast chooses).
    Returns the output, (N, Cout, *sizes) or (Cout, *sizes), in input's dtype, or (output, mean, var). Differentiable
        to any order in eager.
    Raises ValueError for an unknown norm, activation or backend, and where a norm that measures has one value per
        channel; RuntimeError for what PyTorch's own functions refuse.
    """
    return conv_transpose_norm_act


conv_transpose1d_norm_act = _norm_act(1)
conv_transpose2d_norm_act = _norm_act(2)
conv_transpose3d_norm_act = _norm_act(3)


def _epilogue(
    norm: str | None,
    running_mean: Tensor | None,
    training: bool,
    eps: float,
    activation: str | None,
    negative_slope: float,
    statistics: bool,
) -> Epilogue:
    if norm not in (None, "batch", "instance"):
        raise ValueError(f"unknown norm {norm!r}; accepted: None, 'batch', 'instance'")
    if activation is not None and activation not in ACTIVATIONS[1:]:
        accepted = ", ".join(map(repr, ACTIVATIONS[1:]))
        raise ValueError(f"unknown activation {activation!r}; accepted: None, {accepted}")
    if norm == "instance" and running_mean is not None:
        raise ValueError("norm 'instance' takes no running statistics; pass None, or norm='batch'")
    kind = norm or ("moments" if statistics else "none")
    if norm == "batch" and not training and running_mean is not None:
        if statistics:
            raise ValueError("statistics are asked for, but a norm by running statistics measures none")
        kind = "given"
    return Epilogue(kind, eps, activation or "none", negative_slope)


def _conv_transpose(
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Size,
    output_padding: Size,
    groups: int,
    dilation: Size,
    backend: str,
) -> Tensor:
    geometry = _geometry(dims, stride, padding, output_padding, groups, dilation)
    if not _fits(dims, input, weight, bias, geometry):
        # what is no transposed convolution, PyTorch refuses, with its own error
        function = _OP[dims - 1]
        return function(input, weight, bias, stride, padding, output_padding, groups, dilation)
    plain = Epilogue()
    return _conv_transpose_op(dims, input, weight, bias, (None,) * 4, geometry, plain, backend)[0]


def _conv_transpose_norm_act(
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Size,
    output_padding: Size,
    groups: int,
    dilation: Size,
    crop: Sequence[tuple[int, int]] | tuple[int, int],
    parameters: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    momentum: float,
    epilogue: Epilogue,
    statistics: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(out, mean, var), with PyTorch's functions mean and var only if they are asked for.

    parameters: norm_weight, norm_bias, running_mean, running_var.
    """
    cropped = _crop(crop, dims)
    sizes = (stride, padding, output_padding, groups, dilation)
    facts = (any(cropped), epilogue.norm, epilogue.activation, epilogue.negative_slope)
    chosen = _select_conv_transpose(dims, input, weight, bias, *sizes, backend, *facts)
    geometry = _geometry(dims, *sizes, cropped)
    # what the moments of nothing are, and do to the running ones, PyTorch knows
    of_nothing = epilogue.measures and not input.numel()
    if chosen == "torch" or of_nothing or not _fits(dims, input, weight, bias, geometry):
        y = _OP[dims - 1](input, weight, bias, stride, padding, output_padding, groups, dilation)
        for dim, (begin, end) in enumerate(zip(cropped[::2], cropped[1::2], strict=True), start=-dims):
            y = y.narrow(dim, begin, y.shape[dim] - begin - end) if begin or end else y
        out, mean, var = _normalize_and_activate(
            y if y.dim() == dims + 2 else y[None], *parameters, momentum, epilogue, statistics
        )
        return out if y.dim() == dims + 2 else out[0], mean, var
    norm_weight, norm_bias, running_mean, running_var = parameters
    given = (running_mean, running_var) if epilogue.norm == "given" else (None, None)
    operands = (input, weight, bias, (norm_weight, norm_bias, *given))
    out, mean, var = _conv_transpose_op(dims, *operands, geometry, epilogue, chosen)
    if epilogue.measures and epilogue.normalizes:
        count = out.numel() // max(mean.numel(), 1)
        if count == 1 or (epilogue.norm == "batch" and out.shape[-dims:].numel() * (out.dim() == dims + 1) == 1):
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {out.size()}")
        if epilogue.norm == "batch" and running_mean is not None and running_var is not None:
            with torch.no_grad():
                running_mean.lerp_(_to(running_mean.dtype, mean), momentum)
                running_var.lerp_(_to(running_var.dtype, var) * (count / max(count - 1, 1)), momentum)
    return out, mean, var


def _normalize_and_activate(
    y: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    epilogue: Epilogue,
    statistics: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What follows a convolution with the result y (N, Cout, *sizes), on PyTorch's own functions."""
    mean = var = None
    if statistics:
        wide = y.detach().float() if y.dtype.itemsize == 2 else y.detach()
        mean, var = equations.moments(wide, epilogue.norm)
    if epilogue.norm in ("batch", "given"):
        options = (epilogue.measures, momentum, epilogue.eps)
        y = torch.nn.functional.batch_norm(y, running_mean, running_var, norm_weight, norm_bias, *options)
    elif epilogue.norm == "instance":
        y = torch.nn.functional.instance_norm(y, weight=norm_weight, bias=norm_bias, eps=epilogue.eps)
    return equations.activate(y, epilogue.activation, epilogue.negative_slope), mean, var


_OP = (
    torch.nn.functional.conv_transpose1d,
    torch.nn.functional.conv_transpose2d,
    torch.nn.functional.conv_transpose3d,
)


def _crop(crop: Sequence[tuple[int, int]] | tuple[int, int], dims: int) -> tuple[int, ...]:
    pairs: Any = [crop] * dims if isinstance(crop[0], int) else list(crop)
    flat = tuple(side for pair in pairs for side in pair)
    if len(pairs) != dims or len(flat) != 2 * dims or min(flat) < 0:
        raise ValueError(f"crop is {crop}; expected (begin, end), both at least 0, or one such pair per dimension")
    return flat


def _geometry(
    dims: int,
    stride: Size,
    padding: Size,
    output_padding: Size,
    groups: int,
    dilation: Size,
    crop: tuple[int, ...] = (),
) -> Geometry:
    sizes: Any = [_per_dim(size, dims) for size in (stride, padding, output_padding, dilation)]
    return Geometry._make((*sizes, groups, crop or (0,) * (2 * dims)))


def _select_conv_transpose(
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Size,
    output_padding: Size,
    groups: int,
    dilation: Size,
    backend: str | None,
    *epilogue: Any,
) -> str:
    # what is no transposed convolution at all, PyTorch refuses, with its own error
    if not (isinstance(input, Tensor) and isinstance(weight, Tensor) and weight.dim() == dims + 2):
        return "torch"
    geometry: Any = (stride, padding, output_padding, groups, dilation)
    known = conv_transpose_call(input, weight.shape[1] * groups, _per_dim(stride, dims))
    facts = (input.device, input.dtype, bias is not None, *known, weight.shape, *geometry, *epilogue)
    return OP.select_by(facts, conv_transpose_case, backend)


def conv_transpose_case(
    device: torch.device,
    dtype: torch.dtype,
    bias: bool,
    contiguous: bool,
    gradients: bool,
    spread: int,
    small: bool,
    shape: torch.Size,
    stride: Size,
    padding: Size,
    output_padding: Size,
    groups: int,
    dilation: Size,
    *epilogue: Any,
) -> Case:
    in_channels, group_channels, *kernel_size = shape
    dims = len(kernel_size)
    return Case(
        device.type,
        compute_dtype(device.type, dtype),
        in_channels,
        group_channels * groups,
        tuple(kernel_size),
        _per_dim(stride, dims),
        _per_dim(padding, dims),
        _per_dim(output_padding, dims),
        _per_dim(dilation, dims),
        groups,
        *epilogue,
    )._replace(bias=bias, contiguous=contiguous, gradients=gradients, spread=spread, small=small)


#: Elements of an output for which a fused norm saves less than its call costs, some 0.2 ms where caches are cold.
_SMALL_OUTPUT = 2**17


def conv_transpose_call(input: Tensor, out_channels: int, stride: Sequence[int]) -> tuple[bool, bool, int, bool]:
    """(contiguous, gradients, spread, small) of `Case`: what a choice depends on besides the layer.

    Of sizes that are symbols, of a graph for any, or traced, nothing is known.
    """
    known = input.is_contiguous(), torch.is_grad_enabled()
    if not input.dim():
        return *known, 0, False
    batch, *sizes = input.shape
    positions = math.prod(sizes[1:])
    elements = batch * positions * out_channels * math.prod(stride)
    unknown = not is_known(elements) if torch.compiler.is_compiling() else torch._C._get_tracing_state() is not None
    if unknown:
        return *known, 0, False
    spread = 0 if positions == 1 else 2 if sizes[-1] >= LONG_ROW else 1
    return *known, spread, elements < _SMALL_OUTPUT


def _fits(dims: int, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> bool:
    """Whether PyTorch would take these arguments: if not, it is asked, and its own error raised."""
    # written out, for what generators take is a tenth of a small layer's time
    if input.dim() not in (dims + 1, dims + 2) or input.shape[-dims - 1] != weight.shape[0]:
        return False
    stride, padding, output_padding, dilation, groups, _ = geometry
    size = input.shape[-dims:]
    if groups < 1 or weight.shape[0] % groups or min(size) < 1 or min(weight.shape) < 1:
        return False
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[1] * groups):
        return False
    if weight.device != input.device or (bias is not None and bias.device != input.device):
        return False
    same_dtype = weight.dtype == input.dtype and (bias is None or bias.dtype == input.dtype)
    if not same_dtype and compute_dtype(input.device.type, input.dtype) == input.dtype:
        return False
    if not len(stride) == len(padding) == len(output_padding) == len(dilation) == dims:
        return False
    if min(stride) < 1 or min(dilation) < 1 or min(padding) < 0 or min(output_padding) < 0:
        return False
    rows = zip(output_padding, stride, dilation, strict=True)
    if any(output_padding) and any(more >= step and more >= apart for more, step, apart in rows):
        return False
    return min(geometry.out_size(size, weight.shape[2:])) >= 1


def _conv_transpose_op(
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    parameters: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    geometry: Geometry,
    epilogue: Epilogue,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(input.device.type, input.dtype)
    x, weight = _to(dtype, input), _to(dtype, weight)
    bias = None if bias is None else _to(dtype, bias)
    unbatched = x.dim() == dims + 1
    tensors = (x.unsqueeze(0) if unbatched else x, weight, bias, *parameters)
    if needs_formula([tensor for tensor in tensors if tensor is not None]):
        out, _, mean, var = equations.forward(*tensors, geometry, epilogue)
        empty = out.new_empty(0)
        mean, var = (empty if mean is None else mean, empty if var is None else var)
    else:
        out, mean, var = conv_transpose(tensors, geometry, epilogue, backend)
    return out.squeeze(0) if unbatched else out, mean, var


def _to(dtype: torch.dtype, x: Tensor) -> Tensor:
    # a call of torch's takes ten times as long as the comparison
    return x if x.dtype == dtype else x.to(dtype)


def _per_dim(size: Size, dims: int) -> tuple[int, ...]:
    if isinstance(size, Sequence):
        return tuple(size) if len(size) == dims else tuple(size) * dims
    return (size,) * dims
