"""A drop-in for torch.nn: `from mmfast import nn`. Names that mmfast does not speed up are torch.nn's own."""

from __future__ import annotations

from typing import Any

import torch

from .adversarial import AdversarialLoss as AdversarialLoss

__all__ = sorted({*getattr(torch.nn, "__all__", ()), "AdversarialLoss"})


def __getattr__(name: str) -> Any:
    return getattr(torch.nn, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(torch.nn)})
