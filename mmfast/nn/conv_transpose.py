"""Transposed convolution in one, two and three dimensions; the lazy layers learn in_channels from their first input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import functional as F
from ..dispatch import EPOCH, Op, each_call_chooses
from ..ops.conv_transpose.backends import OP, Case
from ..ops.conv_transpose.layers import conv_transpose_call, conv_transpose_case
from .layer import Twin

Size = int | tuple[int, ...]

#: Calls of a layer that are noted: sizes of inputs, of which there may be any number.
MOST_NOTED = 64


class _Call(Twin):
    """The call and its case; a torch.nn.ConvTranspose*d comes behind it in the bases."""

    functional: Callable[..., Tensor]

    #: whether PyTorch serves a call, by what is seen of it at once; as old as `_asked`
    _noted: dict[tuple, bool] = {}

    def forward(self: Any, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if is_compiling():
            left = output_size is None and self._is_left_in_graph(input)
        else:
            # what else was looked at would cost as much as a small convolution
            plain = output_size is None and type(input) is Tensor and input.is_cpu and self.backend is None
            left = plain and (self._left is EPOCH[0] or self._is_left_for(input))
        if left:
            return super().forward(input)  # type: ignore[misc]
        dims = len(self.kernel_size)
        if self.padding_mode != "zeros":
            raise ValueError(f"Only `zeros` padding mode is supported for ConvTranspose{dims}d")
        output_padding = self.output_padding
        if output_size is not None:
            geometry = (self.stride, self.padding, self.kernel_size, dims, self.dilation)
            output_padding = tuple(self._output_padding(input, output_size, *geometry))
        return self.functional(
            input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            output_padding,
            self.groups,
            self.dilation,
            backend=self.backend,
        )

    def _apply(self: Any, *args: Any, **kwargs: Any) -> Any:
        # the parameters' dtype or device may change, by which the layer was noted to be PyTorch's
        self._asked = self._left = None
        return super()._apply(*args, **kwargs)  # type: ignore[misc]

    def _is_left_for(self: Any, input: Tensor) -> bool:
        """Whether PyTorch serves this call, as far as is known from one like it."""
        if each_call_chooses():
            return False
        if self._asked is not EPOCH[0] or len(self._noted) > MOST_NOTED:
            self._asked, self._noted = EPOCH[0], {}
            self._left = self._asked if self.is_left() else None
        seen = (input.shape, input.is_contiguous(), torch.is_grad_enabled())
        left = self._noted.get(seen)
        if left is None:
            op, case = self.static_case()
            call = conv_transpose_call(input, self.out_channels, self.stride)
            left = self._noted[seen] = op.leaves([case.of_this_call(*call)])
        return left

    def _is_left_in_graph(self: Any, input: Tensor) -> bool:
        """Whether PyTorch serves the call: known without the guards of all that the function looks at."""
        call = conv_transpose_call(input, self.out_channels, self.stride)
        geometry = (self.stride, self.padding, self.output_padding, self.groups, self.dilation)
        facts = (input.device, input.dtype, self.bias is not None, *call, self.weight.shape, *geometry)
        return OP.select_while_tracing(conv_transpose_case, facts, self.backend) == "torch"

    def is_left(self: Any, **epilogue: Any) -> bool:
        """Whether PyTorch serves this layer and what follows it, as a case names it, for any input."""
        op, case = self.static_case()
        return op.leaves(
            case._replace(contiguous=contiguous, gradients=gradients, **epilogue)
            for contiguous in (True, False)
            for gradients in (True, False)
        )

    def static_case(self: Any) -> tuple[Op, Any]:
        # of a weight that is made from others, one of these: to make it takes longer
        parameter = next(self.parameters(), None)
        parameter = self.weight if parameter is None else parameter
        channels = (self.in_channels, self.out_channels)
        geometry = (self.kernel_size, self.stride, self.padding, self.output_padding, self.dilation, self.groups)
        return OP, Case(parameter.device.type, parameter.dtype, *channels, *geometry, bias=self.bias is not None)


class _ConvTranspose(_Call):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Size = 1,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        geometry: Any = (kernel_size, stride, padding, output_padding, groups, bias, dilation, padding_mode)
        super().__init__(in_channels, out_channels, *geometry, device, dtype)  # type: ignore[call-arg]
        self.backend = backend


class _LazyConvTranspose(_Call):
    def __init__(
        self,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Size = 1,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        geometry: Any = (kernel_size, stride, padding, output_padding, groups, bias, dilation, padding_mode)
        super().__init__(out_channels, *geometry, device, dtype)  # type: ignore[call-arg]
        self.backend = backend


class ConvTranspose1d(_ConvTranspose, torch.nn.ConvTranspose1d):
    """A transposed convolution over sequences: x (N, Cin, L) or (Cin, L) gives (N, Cout, L') or (Cout, L').

    L' = (L - 1) * stride - 2 * padding + dilation * (kernel_size - 1) + output_padding + 1.

    Equivalent to: `torch.nn.ConvTranspose1d`, of which it is a subclass; `forward(x, output_size=None)` too.
    backend (keyword-only, an attribute): "torch", "cpu", "triton", "cuda" or None (mmfast chooses); not in state_dict.
    Dtypes, differentiability: `mmfast.functional.conv_transpose1d`.
    """

    functional = staticmethod(F.conv_transpose1d)


class ConvTranspose2d(_ConvTranspose, torch.nn.ConvTranspose2d):
    """A transposed convolution over images: x (N, Cin, H, W) or (Cin, H, W) gives (N, Cout, H', W') or (Cout, H', W').

    H' and W' follow the formula of ConvTranspose1d; a size is one number or a tuple (height, width).

    Equivalent to: `torch.nn.ConvTranspose2d`, of which it is a subclass. All else: `ConvTranspose1d`.
    """

    functional = staticmethod(F.conv_transpose2d)


class ConvTranspose3d(_ConvTranspose, torch.nn.ConvTranspose3d):
    """A transposed convolution over volumes: x (N, Cin, D, H, W) or (Cin, D, H, W) gives (N, Cout, D', H', W').

    D', H' and W' follow the formula of ConvTranspose1d; a size is one number or a tuple (depth, height, width).

    Equivalent to: `torch.nn.ConvTranspose3d`, of which it is a subclass. All else: `ConvTranspose1d`.
    """

    functional = staticmethod(F.conv_transpose3d)


class LazyConvTranspose1d(_LazyConvTranspose, torch.nn.LazyConvTranspose1d):  # type: ignore[misc]
    """A ConvTranspose1d without in_channels: taken from its first input, upon which it becomes a ConvTranspose1d.

    Equivalent to: `torch.nn.LazyConvTranspose1d`, of which it is a subclass.
    """

    cls_to_become = ConvTranspose1d  # type: ignore[assignment]
    functional = staticmethod(F.conv_transpose1d)


class LazyConvTranspose2d(_LazyConvTranspose, torch.nn.LazyConvTranspose2d):  # type: ignore[misc]
    """A ConvTranspose2d without in_channels: taken from its first input, upon which it becomes a ConvTranspose2d.

    Equivalent to: `torch.nn.LazyConvTranspose2d`, of which it is a subclass.
    """

    cls_to_become = ConvTranspose2d  # type: ignore[assignment]
    functional = staticmethod(F.conv_transpose2d)


class LazyConvTranspose3d(_LazyConvTranspose, torch.nn.LazyConvTranspose3d):  # type: ignore[misc]
    """A ConvTranspose3d without in_channels: taken from its first input, upon which it becomes a ConvTranspose3d.

    Equivalent to: `torch.nn.LazyConvTranspose3d`, of which it is a subclass.
    """

    cls_to_become = ConvTranspose3d  # type: ignore[assignment]
    functional = staticmethod(F.conv_transpose3d)
