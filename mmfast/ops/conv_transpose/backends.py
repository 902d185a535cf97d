"""The transposed convolution's backends: refusals, preference, and the call.

`forward(x, weight, bias, norm_weight, norm_bias, mean, var, geometry, epilogue, keep)` gives (out, saved, mean, var).
out is in the layout PyTorch's convolution gives; saved is what the backward needs besides the inputs and out: the
convolution's own result for a norm, silu and gelu, else (and without `keep`) an empty tensor; mean and var are the
moments, (Cout,) or (N, Cout), float64 for float64, else float32; empty for norm "none", and where they are given.

`backward(dout, x, weight, bias, norm_weight, norm_bias, mean, var, saved, geometry, epilogue, mask)`, saved being out
where forward's was empty, gives the gradients of x, weight, bias, norm_weight, norm_bias that mask asks for, None for
the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import native
from ...dispatch import Backend, GpuBackend, Op, TorchBackend
from .. import portable
from ..product import has_products
from . import equations, products
from .equations import Epilogue, Geometry

#: enum mmfast_activation
_NATIVE_ACTIVATIONS = {"none": 0, "relu": 1, "leaky_relu": 2, "tanh": 3, "sigmoid": 4, "silu": 5, "gelu": 6}

_NO_ACTIVATION = (0, Epilogue().negative_slope)

#: A sample of so many elements is torch's: offsets within one are 32 bits.
_LARGE = 2**30

#: Positions of a long row.
LONG_ROW = 64

#: Channels in and out, and in alone, from which on a convolution in 16 bits was measured faster through float32.
_WIDENED, _WIDENED_IN = 8, 32

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Case(NamedTuple):
    """The static facts a choice depends on; one entry per spatial dimension in the tuples.

    bias: there is one; contiguous: the input is; gradients: they may be asked for. `of_call`, not known in a graph for
    any size: spread: 0 where the input has one position, 2 where its rows have LONG_ROW of them, else 1; small: the
    output has few elements. traced: the call becomes
    part of a compiled graph.
    """

    device: str
    dtype: torch.dtype
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    crop: bool = False
    norm: str = "none"
    activation: str = "none"
    negative_slope: float = 0.01
    bias: bool = False
    contiguous: bool = True
    gradients: bool = True
    spread: int = 0
    small: bool = False
    traced: bool = False

    @property
    def of_call(self) -> tuple[str, ...]:
        return ("spread", "small", "traced")

    def of_this_call(self, contiguous: bool, gradients: bool, spread: int, small: bool) -> Case:
        """The layer's case, for a call with these facts."""
        return self._replace(contiguous=contiguous, gradients=gradients, spread=spread, small=small)


def moments_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of mean and var for tensors of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def keeps_result(epilogue: Epilogue) -> bool:
    """Whether the backward needs the convolution's own result: out does not tell it."""
    return epilogue.normalizes or epilogue.activation in ("silu", "gelu")


def results_of(saved: Tensor, epilogue: Epilogue) -> tuple[Tensor | None, Tensor | None]:
    """(the convolution's own result, out): the one of them that the backward is given as `saved`, if any."""
    if keeps_result(epilogue):
        return saved, None
    return None, None if epilogue.activation == "none" else saved


def moments_shape(shape: Sequence[int], epilogue: Epilogue) -> Sequence[int]:
    """The shape of mean and var for an output of `shape`."""
    if not epilogue.measures:
        return (0,)
    return shape[:2] if epilogue.norm == "instance" else shape[1:2]


def empty_output(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """An unwritten y, in the layout PyTorch's convolution gives: channels last where x or weight is."""
    shape = (x.shape[0], weight.shape[1] * geometry.groups, *geometry.out_size(x.shape[2:], weight.shape[2:]))
    layout = _CHANNELS_LAST.get(x.dim())
    if layout is not None and (_is_channels_last(x, layout) or _is_channels_last(weight, layout)):
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    return x.new_empty(shape)


def _is_channels_last(x: Tensor, layout: torch.memory_format) -> bool:
    return x.is_contiguous(memory_format=layout) and not x.is_contiguous()


class Torch(TorchBackend):
    """The formula on PyTorch's own kernels."""

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        geometry: Geometry,
        epilogue: Epilogue,
        keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        parameters = (norm_weight, norm_bias, mean, var)
        out, y, mean, var = equations.forward(x, weight, bias, *parameters, geometry, epilogue)
        dtype = moments_dtype(x.dtype)
        if mean is None or var is None or not epilogue.measures:
            mean, var = x.new_empty(0, dtype=dtype), x.new_empty(0, dtype=dtype)
        saved = y if keep and keeps_result(epilogue) and y is not out else x.new_empty(0)
        return out, saved, mean.to(dtype), var.to(dtype)

    def backward(
        self,
        dout: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        saved: Tensor,
        geometry: Geometry,
        epilogue: Epilogue,
        mask: Sequence[bool],
    ) -> list[Tensor | None]:
        parameters = (bias, norm_weight, norm_bias, mean, var)
        results = results_of(saved, epilogue)
        return equations.backward(dout, x, weight, *parameters, geometry, epilogue, mask, *results)


def prefers_products(case: Case) -> str:
    """Why `cpu` was measured faster than PyTorch for the convolution itself; empty where it was not.

    Measured on a Zen 4 core (AVX-512; depthwise: AVX2), torch 2.13, float32, one thread; PyTorch in its faster memory
    format.
    """
    if _is_widened(case.dtype, case.in_channels, case.out_channels) and not case.small:
        # Zen 3, ms of PyTorch and through float32: 128 to 64, k4 s2 p1, at 16 x 16, batch 4, bfloat16: forward 19.5 and
        # 5.2, both gradients 314 and 11; float16: 83 and 5.0, 331 and 11. 64 to 64 in 4 groups: 10.0 and 3.1, 72 and
        # 3.7; 8 to 8: 1.5 and 0.9, 14.0 and 1.3; depthwise, 512 channels, k4 s2, in 1-d: 38 and 7, 75 and 16
        return "16 bits through float32"
    projects = _is_projection(case) and case.groups == 1 and not (case.spread or case.crop)
    if projects and (case.dtype == torch.bfloat16 or (case.dtype == torch.float16 and case.gradients)):
        # Granite Rapids, 100 to 512, k4 s1, batch 32, with batch norm and ReLU: forward + backward 10.2 to 3.5 ms, the
        # forward alone 2.5 to 1.4 ms; float16: 217 to 8.2 ms, 2.5 to 3.3 ms
        return "a projection of one position"
    if case.dtype != torch.float32:
        return ""
    depthwise = case.groups > 1 and case.groups == case.in_channels == case.out_channels
    infers = case.bias or (case.spread == 2 and case.kernel_size[0] <= 2 * case.stride[0])
    if depthwise and len(case.stride) == 1 and case.stride[0] > 1 and (case.gradients or (infers and not case.small)):
        # Zen 5, forward, times PyTorch's speed: k = 2 s, at 32, 64, 512 positions: 0.9 to 1.4, 1.2 to 2.4, 2.6 to 4.6,
        # with a bias 4.7 to 21; k12 s2: 0.3, 0.6, 1.1, with a bias 2.3 to 7; both gradients of 512 channels, k4 s2, at
        # 64, batch 8: 1.3 to 0.16 ms. AVX2: 0.7 to 1.6, 0.9 to 1.7, 1.8 to 2.6, and 3.3 to 13. In 2-d it may be slower
        return "depthwise in 1-d"
    if case.groups != 1 or case.crop:
        return ""
    if projects:
        # 100 to 512, k4 s1, batch 32, at one position: forward 3.4 to 1.5 ms, both gradients 9.3 to 2.7 ms
        return "a projection of one position"
    if _has_few_outputs(case):
        # Granite Rapids: 64 to 3, k4 s2 p1, at 32 x 32, batch 32: forward 8.6 to 1.8 ms (channels_last 7.3), both
        # gradients 3.8 to 3.3 ms; from 8 to 3 to 256 to 3, in 1-d, 2-d and 3-d, forward 1.8 to 9 times as fast
        return "few output channels"
    channels = min(case.in_channels, case.out_channels)
    geometry = case.stride, case.dilation, case.output_padding
    multiplies = products.multiplies(channels, case.kernel_size, *geometry, case.contiguous)
    squares = products.has_squares(case.kernel_size, case.stride, case.dilation)
    if _is_wide(case) and multiplies and (case.contiguous or case.gradients or squares):
        # Zen 3, ms of forward, dx, dweight, from contiguous to ours (channels_last): 128 to 64, k4 s2 p1, at 16 x 16,
        # batch 32: 28.4, 27.3, 30.0 to 24.6, 24.6, 25.5 (24.4, 23.8, 33.6); 512 to 256, at 4 x 4: 31.9, 30.3, 42.8 to
        # 22.5, 23.2, 22.6 (30.3, 26.7, 82.1). Granite Rapids: 22.8, 13.0, 14.3 to 12.1, 14.5, 12.6 (11.8, 10.4, 12.9);
        # 21.2, 16.3, 19.8 to 11.4, 12.0, 10.0 (20.5, 18.6, 28.6). Zen 5: 19.1, 10.2, 10.7 to 12.2, 9.6, 9.8 (9.8, 9.3,
        # 11.9); 15.4, 15.9, 13.8 to 11.5, 12.6, 10.4 (13.1, 10.3, 23.5)
        return "products of matrices"
    if _is_apart(case) and case.contiguous and not case.small and (case.gradients or not case.traced):
        # 128 to 64, k2 s2, at 64 x 64, batch 4, Zen 5: forward 10.6 to 6.9 ms, dx 9.7 to 7.4 ms; 64 to 64, at 8 x 8,
        # batch 1: forward 39 to 74 us, forward + backward 131 to 185 us. In a graph without gradients, 128 to 64, at
        # 32 x 32, batch 4: 1.35 to 1.48 ms
        return "taps that do not overlap"
    return ""


def _slope_refusals(case: Case) -> list[str]:
    # of a falling slope out does not tell on which side of 0 it was
    if case.activation != "leaky_relu" or case.negative_slope >= 0:
        return []
    return [f"leaky_relu's negative slope is {case.negative_slope} (supported: at least 0)"]


def _is_apart(case: Case) -> bool:
    wide = case.in_channels >= 32 and case.out_channels >= 32 and len(case.kernel_size) > 1
    simple = {*case.dilation} == {1} and {*case.padding, *case.output_padding} == {0}
    return wide and case.kernel_size == case.stride and min(case.stride) > 1 and simple


def _is_wide(case: Case) -> bool:
    fits = case.in_channels >= products.LEAST_CHANNELS and case.out_channels >= products.LEAST_CHANNELS
    return fits and min(case.kernel_size) > 1 and not _is_projection(case) and not case.small


def _is_projection(case: Case) -> bool:
    fits = case.in_channels >= 32 and case.out_channels >= 32 and min(case.kernel_size) >= 3
    return fits and {*case.stride, *case.dilation} == {1} and {*case.padding, *case.output_padding} == {0}


def _has_few_outputs(case: Case) -> bool:
    fits = case.out_channels <= products.FEW_OUTPUTS and case.in_channels >= 8 and math.prod(case.kernel_size) > 1
    image = case.kernel_size == (4, 4) and case.stride == (2, 2) and case.in_channels >= 32
    # many phases of a few positions each: 30 to 3 in 3-d, k4 s3, at 2 x 3 x 7 took 1.6 times as long
    return fits and math.prod(case.stride) <= 8 and (image or not case.small)


class Cpu(Backend):
    """csrc/cpu: what follows the convolution, and around torch's matrix products the convolution itself.

    In 16 bits for which PyTorch has no fast convolution, it is that of float32, its result rounded.
    """

    name = "cpu"

    def refusals(self, case: Case) -> list[str]:
        refusals = native.cpu_refusals("the input is", case.device, case.dtype)
        return refusals + _slope_refusals(case)

    def reluctance(self, case: Case) -> str:
        if native.available() and prefers_products(case):
            return ""
        measured = case.norm == "batch" and case.activation in ("relu", "leaky_relu") and case.dtype == torch.float32
        if not measured:
            return "for this layer nothing was measured faster than PyTorch"
        # 128 to 64, k4 s2 p1, at 16 x 16, batch 32, with batch norm and ReLU: forward + backward 92 to 75 ms (AVX2),
        # 75 to 72 ms (AVX-512), but channels last 64 to 65 ms (AVX-512)
        if native.isa() == "avx512" and not case.contiguous:
            return "batch norm in channels_last was measured slower than PyTorch's with AVX-512"
        # 64 to 32, at 8 x 8, batch 8: 1.9 to 2.3 ms; 28 outputs, 2 x 44, k6 s4, batch 1: 0.9 to 1.4 ms (AVX-512)
        return "so small an output was measured slower than PyTorch's" if case.small else ""

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        geometry: Geometry,
        epilogue: Epilogue,
        keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        keep = keep and keeps_result(epilogue)
        dtype = moments_dtype(x.dtype)
        activation = (_NATIVE_ACTIVATIONS[epilogue.activation], epilogue.negative_slope)

        def nothing(dtype: torch.dtype = dtype) -> Tensor:
            return x.new_empty(0, dtype=dtype)

        fused = activation if epilogue.norm == "none" and not keep else _NO_ACTIVATION
        y = self._convolve(x, weight, bias, geometry, fused)
        # torch's instance norm gives a contiguous result whatever it is given
        y = y.contiguous() if epilogue.norm == "instance" else y
        if epilogue.measures:
            shape = moments_shape(y.shape, epilogue)
            mean, var = x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)
        out = torch.empty_like(y) if keep else y
        parameters = [_as(p, dtype) for p in (norm_weight, norm_bias, mean, var)]
        options = _layout(y, epilogue.norm), activation, epilogue.measures, epilogue.eps
        if y.numel() and epilogue.norm != "none":
            call = native.normalization(*options, y, parameters)
            native.cpu_normalize_forward(call, out if epilogue.normalizes else None)
        if not epilogue.normalizes and activation[0] and not fused[0]:
            native.cpu_activation_forward(activation, y, out)
        moments: Any = (mean, var) if epilogue.measures else (nothing(), nothing())
        return out, y if keep else nothing(x.dtype), *moments

    def backward(
        self,
        dout: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        saved: Tensor,
        geometry: Geometry,
        epilogue: Epilogue,
        mask: Sequence[bool],
    ) -> list[Tensor | None]:
        dy, dnorm_weight, dnorm_bias = self._epilogue_backward(
            dout, saved, [norm_weight, norm_bias, mean, var], epilogue
        )
        return [
            *self._convolve_backward(dy, x, weight, geometry, mask[:3]),
            dnorm_weight.to(norm_weight.dtype) if norm_weight is not None and mask[3] else None,
            dnorm_bias.to(norm_bias.dtype) if norm_bias is not None and mask[4] else None,
        ]

    def _convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, activation: tuple[int, float]
    ) -> Tensor:
        """activation(the convolution), dense."""
        if _is_widened(x.dtype, x.shape[1], weight.shape[1] * geometry.groups):
            wide = x.float(), weight.float(), None if bias is None else bias.float()
            return self._convolve(*wide, geometry, activation).to(x.dtype)
        method = _method(x, weight, geometry)
        bias = None if bias is None else bias.contiguous()
        if method == "depthwise":
            y = empty_output(x, weight, geometry)
            if products.depthwise_forward(x, weight, bias, geometry, y, activation):
                return y
        if method == "phases":
            y = empty_output(x, weight, geometry)
            return products.phases_forward(_dense(x), weight, bias, geometry, y, activation)
        squares = method == "products" and products.in_squares(x, weight, geometry)
        if squares or (method == "products" and x.is_contiguous()):
            y = empty_output(x, weight, geometry)
            products.products_forward(_dense(x), weight, bias, geometry, y, squares)
        elif method == "one position":
            y = products.one_position_forward(x, weight, bias, geometry, empty_output(x, weight, geometry))
        else:
            y = _dense(equations.convolve(x, weight, bias, geometry))
        if activation[0]:
            native.cpu_activation_forward(activation, y, y)
        return y

    def _convolve_backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, mask: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if _is_widened(x.dtype, x.shape[1], weight.shape[1] * geometry.groups):
            dx, dweight, dbias = self._convolve_backward(dy.float(), x.float(), weight.float(), geometry, mask)
            return _narrow(dx, x.dtype), _narrow(dweight, x.dtype), _narrow(dbias, x.dtype)
        method = _method(x, weight, geometry, forward=False)
        if method == "depthwise":
            return products.depthwise_backward(_dense(dy), x, weight, geometry, mask)
        if method == "one position":
            return products.one_position_backward(_dense(dy), x, weight, geometry, mask)
        if method == "products":
            return products.products_backward(_dense(dy), _dense(x), weight, geometry, mask)
        if method == "phases" and x.is_contiguous():
            return products.phases_backward(_dense(dy), x, weight, geometry, mask)
        return equations.convolve_backward(dy, x, weight, geometry, mask)

    def _epilogue_backward(
        self, dout: Tensor, saved: Tensor, parameters: list[Tensor | None], epilogue: Epilogue
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dy, dnorm_weight (Cout,), dnorm_bias (Cout,))"""
        activation = (_NATIVE_ACTIVATIONS[epilogue.activation], epilogue.negative_slope)
        nothing = dout.new_empty(0)
        if not epilogue.normalizes and epilogue.activation == "none":
            return dout, nothing, nothing
        saved = _dense(saved)
        dout = products.laid_out_as(saved, dout)
        dy = torch.empty_like(saved)
        if not epilogue.normalizes:
            native.cpu_activation_backward(activation, saved, dout, dy)
            return dy, nothing, nothing
        dtype, of_samples = moments_dtype(saved.dtype), epilogue.norm == "instance"
        shape = saved.shape[:2] if of_samples else saved.shape[1:2]
        sums = saved.new_empty(shape, dtype=dtype), saved.new_empty(shape, dtype=dtype)
        if saved.numel():
            wide = [_as(p, dtype) for p in parameters]
            options = _layout(saved, epilogue.norm), activation, epilogue.measures, epilogue.eps
            native.cpu_normalize_backward(native.normalization(*options, saved, wide), dout, dy, *sums)
        else:
            sums = sums[0].zero_(), sums[1].zero_()
        return dy, *((sums[0].sum(0), sums[1].sum(0)) if of_samples else sums)


def _is_widened(dtype: torch.dtype, in_channels: int, out_channels: int) -> bool:
    """Whether a convolution is computed in float32 instead of its 16 bits."""
    wide = in_channels >= _WIDENED_IN or min(in_channels, out_channels) >= _WIDENED
    return wide and not has_products(dtype)


def _method(x: Tensor, weight: Tensor, geometry: Geometry, forward: bool = True) -> str:
    """How the convolution of these tensors is computed: "torch", or by a part of products.py."""
    if not x.numel() or not x.is_floating_point():
        return "torch"
    if x.dtype.itemsize == 2:
        return "one position" if products.is_one_position(x, weight, geometry) else "torch"
    if geometry.groups > 1:
        return "depthwise" if products.is_depthwise(x, weight, geometry) else "torch"
    if products.is_one_position(x, weight, geometry):
        return "one position"
    if weight.shape[1] <= products.FEW_OUTPUTS:
        return "phases"
    channels, kernel = min(weight.shape[:2]), weight.shape[2:]
    strides = geometry.stride, geometry.dilation, geometry.output_padding
    multiplies = products.multiplies(channels, kernel, *strides, x.is_contiguous(), forward)
    if products.is_wide(x, weight) and multiplies:
        return "products"
    apart = tuple(weight.shape[2:]) == geometry.stride and x.is_contiguous() and weight.shape[1] > 1
    return "phases" if apart and {*geometry.dilation} == {1} else "torch"


def _dense(y: Tensor) -> Tensor:
    """y itself where it is contiguous or channels last; else a contiguous copy."""
    if y.is_contiguous():
        return y
    layout = _CHANNELS_LAST.get(y.dim())
    if layout is None:
        return y.contiguous()
    if y.is_contiguous(memory_format=layout):
        return y
    last = y.stride(1) == 1
    return y.contiguous(memory_format=layout if last else torch.contiguous_format)


def _layout(y: Tensor, norm: str) -> tuple[bool, tuple[int, int, int, int]]:
    """(channels last, (sets, batch, channels, size)) of a dense y, as the native library wants it."""
    batch, channels = y.shape[:2]
    size = y.shape[2:].numel()
    sets, batch = (batch, 1) if norm == "instance" else (1, batch)
    # with one position, both orders are the same memory, and vectors run over channels
    return size == 1 or not y.is_contiguous(), (sets, batch, channels, size)


def _narrow(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)


def _as(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return x if x is None or (x.dtype is dtype and x.is_contiguous()) else x.detach().to(dtype).contiguous()


class Triton(GpuBackend):
    """triton_kernels.py, on a CUDA device; on CPU tensors in the interpreter. Convolution gradients are torch's."""

    name = "triton"

    def refusals(self, case: Case) -> list[str]:
        kernels, error = portable.kernels(__package__)
        if kernels is None:
            return [error]
        refusals = portable.refusals("the input is", case.device, case.dtype, kernels.INTERPRETED)
        return refusals + _slope_refusals(case)

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        geometry: Geometry,
        epilogue: Epilogue,
        keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        kernels = portable.kernels(__package__)[0]
        keep = keep and keeps_result(epilogue)
        out = empty_output(x, weight, geometry)
        if epilogue.norm == "instance":
            # torch's instance norm gives a contiguous result whatever it is given
            out = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        saved = torch.empty_like(out) if keep else out.new_empty(0)
        shape = moments_shape(out.shape, epilogue)
        found_mean, found_var = (torch.empty(shape, dtype=torch.float32, device=x.device) for _ in range(2))
        if not out.numel() or not x.numel():
            return out, saved, found_mean, found_var
        wide = [_as(p, torch.float32) for p in (norm_weight, norm_bias, mean, var)]
        given = wide if epilogue.norm == "given" else None
        # a norm that measures reads the convolution's result, which is then out's or saved's own memory
        y = saved if keep and epilogue.normalizes and given is None else out
        with portable.on_device(x):
            separate = saved if keep and y is out else None
            parts = kernels.convolve(_dense(x), _dense(weight), bias, given, geometry, epilogue, y, separate)
            if epilogue.measures:
                kernels.merge(kernels.moments(y, epilogue.norm) if parts is None else parts, found_mean, found_var)
            if epilogue.normalizes and given is None:
                kernels.normalize(y, [*wide[:2], found_mean, found_var], epilogue, out)
        return out, saved, found_mean, found_var

    def backward(
        self,
        dout: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        saved: Tensor,
        geometry: Geometry,
        epilogue: Epilogue,
        mask: Sequence[bool],
    ) -> list[Tensor | None]:
        dnorm_weight = dnorm_bias = None
        dy = dout
        if saved.numel() and (epilogue.normalizes or epilogue.activation != "none"):
            kernels = portable.kernels(__package__)[0]
            saved = _dense(saved)
            dout = products.laid_out_as(saved, dout)
            dy = torch.empty_like(saved)
            with portable.on_device(saved):
                if epilogue.normalizes:
                    wide = [_as(p, torch.float32) for p in (norm_weight, norm_bias, mean, var)]
                    dnorm_weight, dnorm_bias = kernels.normalize_backward(saved, dout, wide, epilogue, dy)
                else:
                    kernels.activation_backward(saved, dout, epilogue, dy)
        return [
            *equations.convolve_backward(dy, x, weight, geometry, mask[:3]),
            _summed(dnorm_weight, norm_weight, mask[3]),
            _summed(dnorm_bias, norm_bias, mask[4]),
        ]


class Cuda(GpuBackend):
    """csrc/cuda, on a CUDA device; on CPU tensors in the emulator.

    Convolutions of at most 4 output channels a group are the kernels', with their gradients; others are torch's, and
    what follows them the kernels'.
    """

    name = "cuda"

    def refusals(self, case: Case) -> list[str]:
        refusals = native.cuda_refusals(case.device)
        if case.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            refusals.append(f"the input is {case.dtype} (supported: float32, float16, bfloat16)")
        return refusals + _slope_refusals(case)

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        geometry: Geometry,
        epilogue: Epilogue,
        keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        keep = keep and keeps_result(epilogue)
        activation = (_NATIVE_ACTIVATIONS[epilogue.activation], epilogue.negative_slope)
        fused = activation if epilogue.norm == "none" and not keep else _NO_ACTIVATION
        if _is_direct(x, weight, geometry):
            y = empty_output(x, weight, geometry)
            if y.numel():
                tensors = (
                    _aligned(_dense(x)),
                    _taps_first(weight),
                    None if bias is None else _aligned(bias.contiguous()),
                )
                native.cuda_direct_forward(
                    products.native_window(x, weight, geometry), *tensors, fused, geometry.groups, y
                )
        else:
            fused = _NO_ACTIVATION
            y = _aligned(_dense(equations.convolve(x, weight, bias, geometry)))
        # torch's instance norm gives a contiguous result whatever it is given
        y = y.contiguous() if epilogue.norm == "instance" else y
        shape = moments_shape(y.shape, epilogue)
        found = [torch.empty(shape, dtype=torch.float32, device=x.device) for _ in range(2)]
        out = torch.empty_like(y) if keep else y
        saved = y if keep else x.new_empty(0)
        if not y.numel():
            return out, saved, found[0], found[1]
        if epilogue.norm != "none":
            given = (mean, var) if epilogue.norm == "given" else found
            call = _normalization(y, [norm_weight, norm_bias, *given], activation, epilogue)
            native.cuda_normalize_forward(call[0], y, out if epilogue.normalizes else None)
        if not epilogue.normalizes and activation[0] and not fused[0]:
            native.cuda_activation_forward(activation, y, out)
        return out, saved, found[0], found[1]

    def backward(
        self,
        dout: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        saved: Tensor,
        geometry: Geometry,
        epilogue: Epilogue,
        mask: Sequence[bool],
    ) -> list[Tensor | None]:
        dnorm_weight = dnorm_bias = None
        dy = dout
        if saved.numel() and (epilogue.normalizes or epilogue.activation != "none"):
            saved = _aligned(_dense(saved))
            dout = _aligned(products.laid_out_as(saved, dout))
            dy = torch.empty_like(saved)
            activation = (_NATIVE_ACTIVATIONS[epilogue.activation], epilogue.negative_slope)
            if epilogue.normalizes:
                shape = (*[1] * (2 - mean.dim()), *mean.shape)
                dnorm_weight, dnorm_bias = (mean.new_empty(shape, dtype=torch.float32) for _ in range(2))
                call = _normalization(saved, [norm_weight, norm_bias, mean, var], activation, epilogue)
                native.cuda_normalize_backward(call[0], dout, dy, dnorm_weight, dnorm_bias)
            else:
                native.cuda_activation_backward(activation, saved, dout, dy)
        convolve_backward = _direct_backward if _is_direct(x, weight, geometry) else equations.convolve_backward
        return [
            *convolve_backward(dy, x, weight, geometry, mask[:3]),
            _summed(dnorm_weight, norm_weight, mask[3]),
            _summed(dnorm_bias, norm_bias, mask[4]),
        ]


def _is_direct(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether csrc/cuda/conv_transpose.cu takes the convolution of these tensors."""
    size = geometry.out_size(x.shape[2:], weight.shape[2:])
    out = weight.shape[1] * geometry.groups * math.prod(size)
    fits = max(x[:1].numel(), out, *x.shape[2:], *size) < _LARGE and weight.numel() < _LARGE
    return weight.shape[1] <= 4 and x.numel() > 0 and fits


def _taps_first(weight: Tensor) -> Tensor:
    """weight (Cin, Cout / groups, *kernel) as (*kernel, Cin, Cout / groups), contiguous."""
    return _aligned(weight.movedim((0, 1), (-2, -1)).contiguous())


def _direct_backward(
    dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, mask: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """equations.convolve_backward by csrc/cuda/conv_transpose.cu."""
    dx = torch.empty_like(_dense(x)) if mask[0] else None
    taps_first = _taps_first(weight)
    dtaps = torch.empty_like(taps_first) if mask[1] else None
    if mask[0] or mask[1]:
        window = products.native_window(x, weight, geometry)
        given = (_aligned(_dense(x)), taps_first, geometry.groups, _aligned(_dense(dy)))
        native.cuda_direct_backward(window, *given, dx, dtaps)
    dweight = None if dtaps is None else torch.empty_like(weight).copy_(dtaps.movedim((-2, -1), (0, 1)))
    return dx, dweight, dy.sum([0, *range(2, dy.dim())]) if mask[2] else None


def _normalization(
    y: Tensor, parameters: Sequence[Tensor | None], activation: tuple[int, float], epilogue: Epilogue
) -> tuple[tuple, list[Tensor | None]]:
    """(the call of native.cuda_normalize_*, the tensors that it reads beside y, for as long as it runs)"""
    wide = [None if p is None else _aligned(p.detach().to(torch.float32).contiguous()) for p in parameters]
    layout = _layout(y, epilogue.norm)
    return native.normalization(layout, activation, epilogue.measures, epilogue.eps, y, wide), wide


def _aligned(x: Tensor) -> Tensor:
    """x itself, or a copy where it does not begin at a multiple of 16 bytes."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _summed(gradient: Tensor | None, parameter: Tensor | None, asked: bool) -> Tensor | None:
    """The gradient (sets, C) of a norm's parameter, summed over its sets; zero where there were no elements."""
    if parameter is None or not asked:
        return None
    return torch.zeros_like(parameter) if gradient is None else gradient.sum(0).to(parameter.dtype)


OP = Op("conv_transpose", Case, [Cpu(), Triton(), Cuda(), Torch()])
