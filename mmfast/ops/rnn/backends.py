"""The recurrent op's backends: refusals, preference, and the call."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...dispatch import Op, TorchBackend


class Case(NamedTuple):
    """The static facts a choice depends on. mode: "RNN_TANH", "RNN_RELU", "GRU" or "LSTM", as torch.nn names them."""

    device: str
    dtype: torch.dtype
    mode: str
    input_size: int
    hidden_size: int
    proj_size: int = 0
    bidirectional: bool = False
    packed: bool = False


OP = Op("rnn", Case, [TorchBackend()])
