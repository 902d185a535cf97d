"""The transposed convolution's backends: refusals, preference, and the call."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...dispatch import Op, TorchBackend


class Case(NamedTuple):
    """The static facts a choice depends on; one entry per spatial dimension in the tuples."""

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


OP = Op("conv_transpose", Case, [TorchBackend()])
