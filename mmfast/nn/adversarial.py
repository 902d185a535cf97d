"""The adversarial loss as a module."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional as F
from ..dispatch import Op
from ..ops.adversarial.backends import OP, Case
from ..ops.adversarial.equations import MODES
from .layer import Layer


class AdversarialLoss(Layer, torch.nn.Module):
    """The loss of a discriminator on real and fake logits, and of the generator that it judges.

    Equivalent to, for mode "non-saturating":
    `discriminator(r, f) = scale * (softplus(-r).mean() + softplus(f).mean())`,
    `generator(f) = scale * softplus(-f).mean()`,
    summed over the tensors of a list (multi-scale, multi-period discriminators).

    mode: "non-saturating", "hinge", "lsgan" (targets 1 and 0) or "wasserstein"; ValueError otherwise.
    backend: "torch", "cpu", "cuda", "triton" or None (mmfast chooses).
    Logits, dtypes, errors, differentiability: `mmfast.functional.adversarial_discriminator_loss`.
    """

    def __init__(self, mode: str = "non-saturating", scale: float = 1.0, *, backend: str | None = None) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}; accepted: {', '.join(map(repr, MODES))}")
        self.mode = mode
        self.scale = scale
        self.backend = backend

    def discriminator(self, real_logits: F.Logits, fake_logits: F.Logits) -> Tensor:
        """The discriminator's loss, a tensor without dimensions."""
        return F.adversarial_discriminator_loss(
            real_logits, fake_logits, self.mode, scale=self.scale, backend=self.backend
        )

    def generator(self, fake_logits: F.Logits, real_logits: F.Logits | None = None) -> Tensor:
        """The generator's loss, a tensor without dimensions."""
        return F.adversarial_generator_loss(fake_logits, real_logits, self.mode, scale=self.scale, backend=self.backend)

    def static_case(self) -> tuple[Op, Case]:
        return OP, Case(torch.get_default_device().type, torch.get_default_dtype())

    def extra_repr(self) -> str:
        return f"{self.mode!r}, scale={self.scale}"
