"""A drop-in for torch.nn: `from mmfast import nn`. Names that mmfast does not speed up are torch.nn's own."""

from __future__ import annotations

from typing import Any

import torch

from .adversarial import AdversarialLoss, FeatureMatchingLoss, LeCam
from .balancer import LossBalancer
from .conv_transpose import (
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    LazyConvTranspose1d,
    LazyConvTranspose2d,
    LazyConvTranspose3d,
)
from .rnn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from .sequential import Sequential

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "AdversarialLoss",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "FeatureMatchingLoss",
    "GRUCell",
    "LSTMCell",
    "LazyConvTranspose1d",
    "LazyConvTranspose2d",
    "LazyConvTranspose3d",
    "LeCam",
    "LossBalancer",
    "RNNCell",
    "Sequential",
]
__all__ += [name for name in dir(torch.nn) if not name.startswith("_") and name not in __all__]


def __getattr__(name: str) -> Any:
    try:
        return getattr(torch.nn, name)
    except AttributeError:
        raise AttributeError(f"neither mmfast.nn nor torch.nn has {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(torch.nn)})
