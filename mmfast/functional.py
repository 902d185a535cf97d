"""The layers and losses as functions, shaped like torch.nn.functional."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import needs_formula
from .ops.adversarial import equations as adversarial_equations
from .ops.adversarial.backends import OP as ADVERSARIAL
from .ops.adversarial.backends import Case as AdversarialCase
from .ops.adversarial.equations import MODES, Mode, Term
from .ops.adversarial.op import loss as adversarial_loss

__all__ = ["adversarial_discriminator_loss", "adversarial_generator_loss"]

Logits = Tensor | Sequence[Tensor]


def adversarial_discriminator_loss(
    real_logits: Logits,
    fake_logits: Logits,
    mode: str = "non-saturating",
    *,
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """The discriminator's loss: the mean over each tensor, real + fake added (no factor 0.5), summed over a list.

    Equivalent to, for mode "non-saturating" and one tensor each:
    `scale * (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean())`; the other modes are in
    ops/adversarial/equations.py.

    real_logits, fake_logits: a tensor of any shape, or a list of tensors of any shapes, one per discriminator; the two
        lists have one length. float64, float32, float16 or bfloat16; 16-bit logits accumulate in float32.
    mode: "non-saturating", "hinge", "lsgan" (targets 1 and 0) or "wasserstein".
    backend: "torch", "cpu" or None (mmfast chooses).
    Returns the loss, a tensor without dimensions, in the logits' dtype (float32 under autocast).
    Differentiable to any order in eager.
    Raises ValueError for an unknown mode or backend, an empty list or lists of different lengths; RuntimeError for
        logits that are not floating point or not on one device.
    """
    real, fake = _as_list("real_logits", real_logits), _as_list("fake_logits", fake_logits)
    if len(real) != len(fake):
        raise ValueError(
            f"real_logits has {len(real)} tensors and fake_logits {len(fake)}; expected one of each per discriminator"
        )
    terms = _mode(mode)
    real_term, fake_term = _scaled(terms.real, scale), _scaled(terms.fake, scale)
    # real and fake of one discriminator side by side, so that terms are added in the order a user would add them
    logits = [x for pair in zip(real, fake, strict=True) for x in pair]
    return _adversarial([real_term, fake_term] * len(real), logits, backend)


def adversarial_generator_loss(
    fake_logits: Logits,
    real_logits: Logits | None = None,
    mode: str = "non-saturating",
    *,
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """The generator's loss: the mean over each tensor, summed over a list.

    Equivalent to, for mode "non-saturating" and one tensor: `scale * F.softplus(-fake_logits).mean()`; the other modes
    are in ops/adversarial/equations.py.

    fake_logits: a tensor of any shape, or a list of tensors of any shapes, one per discriminator. Dtypes, result and
        errors as `adversarial_discriminator_loss`.
    real_logits: accepted for modes that compare with them; none of the present ones does.
    """
    logits = _as_list("fake_logits", fake_logits)
    term = _scaled(_mode(mode).generator, scale)
    return _adversarial([term] * len(logits), logits, backend)


def _as_list(name: str, logits: Logits) -> list[Tensor]:
    tensors = [logits] if isinstance(logits, Tensor) else list(logits)
    if not tensors:
        raise ValueError(f"{name} is an empty list; expected a tensor or a list of at least one tensor")
    for x in tensors:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} holds a {type(x).__name__}; expected a tensor or a list of tensors")
        if not x.is_floating_point():
            raise RuntimeError(f"{name} holds logits of dtype {x.dtype}; expected a floating-point dtype")
    return tensors


def _mode(mode: str) -> Mode:
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; accepted: {', '.join(map(repr, MODES))}")
    return MODES[mode]


def _scaled(term: Term, scale: float) -> Term:
    return term if scale == 1 else term._replace(weight=term.weight * scale)


def _adversarial(terms: list[Term], logits: list[Tensor], backend: str | None) -> Tensor:
    first = logits[0]
    if any(x.device != first.device for x in logits):
        devices = sorted({str(x.device) for x in logits})
        raise RuntimeError(f"the logits are on {' and '.join(devices)}; expected all on one device")
    dtype = first.dtype
    for x in logits:
        if x.dtype != dtype:
            dtype = torch.promote_types(dtype, x.dtype)
    if dtype.itemsize == 2 and torch.is_autocast_enabled(first.device.type):
        dtype = torch.float32
    logits = [x if x.dtype == dtype else x.to(dtype) for x in logits]
    chosen = ADVERSARIAL.select(AdversarialCase(first.device.type, dtype), backend)
    if chosen == "torch" or needs_formula(logits):
        return adversarial_equations.total(terms, True, logits)
    return adversarial_loss(terms, True, logits, chosen)[0]
