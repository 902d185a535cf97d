"""The adversarial op: schema, fake, autograd.

    mmfast::adversarial_forward(Tensor[] logits, int[] phi, float[] sign, float[] shift, float[] weight, bool mean,
                                str backend) -> (Tensor total, Tensor values)
    mmfast::adversarial_backward(Tensor dtotal, <the same>) -> Tensor[] dlogits

Any order of differentiation in eager: where a gradient of the backward is needed, it is equations.gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...dispatch import is_plain
from ..library import below_autograd, define, needs_gradient
from . import equations
from .backends import OP, empty_outputs
from .equations import Term

_TERMS = "int[] phi, float[] sign, float[] shift, float[] weight, bool mean, str backend"


def loss(terms: Sequence[Term], mean: bool, logits: Sequence[Tensor], backend: str) -> tuple[Tensor, Tensor]:
    """(total (), values (K,)) of K terms over K tensors of logits of one dtype and device; values carry no gradient."""
    if not is_plain(logits):
        return forward_op(list(logits), *_columns(terms), mean, backend)
    if needs_gradient(logits):
        return AdversarialLoss.apply(True, terms, mean, backend, *logits)
    return OP.backends[backend].forward(terms, mean, logits)


class AdversarialLoss(torch.autograd.Function):
    """One node for the whole list. direct: eager, so the backend is called without the dispatcher between."""

    @staticmethod
    def forward(ctx: Any, direct: bool, terms: Sequence[Term], mean: bool, backend: str, *logits: Tensor):
        ctx.direct, ctx.terms, ctx.mean, ctx.backend = direct, terms, mean, backend
        ctx.save_for_backward(*logits)
        if direct:
            total, values = OP.backends[backend].forward(terms, mean, logits)
        else:
            total, values = below_autograd(forward_op, list(logits), *_columns(terms), mean, backend)
        ctx.mark_non_differentiable(values)
        return total, values

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor, _dvalues: Tensor):
        needed = ctx.needs_input_grad[4:]
        logits = [x for x, need in zip(ctx.saved_tensors, needed, strict=True) if need]
        terms = [term for term, need in zip(ctx.terms, needed, strict=True) if need]
        if ctx.direct and not torch.is_grad_enabled():
            dlogits = OP.backends[ctx.backend].backward(dtotal, terms, ctx.mean, logits)
        else:
            dlogits = backward_op(dtotal, logits, *_columns(terms), ctx.mean, ctx.backend)
        rest = iter(dlogits)
        return None, None, None, None, *(next(rest) if need else None for need in needed)


def _columns(terms: Sequence[Term]) -> tuple[list, list, list, list]:
    phi, sign, shift, weight = ([float(value) for value in column] for column in zip(*terms, strict=True))
    return [int(value) for value in phi], sign, shift, weight


def _rows(phi: list[int], sign: list[float], shift: list[float], weight: list[float]) -> list[Term]:
    return [Term(*row) for row in zip(phi, sign, shift, weight, strict=True)]


def _forward_kernel(logits, phi, sign, shift, weight, mean, backend):
    return OP.backends[backend].forward(_rows(phi, sign, shift, weight), mean, logits)


def _forward_fake(logits, phi, sign, shift, weight, mean, backend):
    return empty_outputs(logits)


def _forward_differentiable(logits, phi, sign, shift, weight, mean, backend):
    return AdversarialLoss.apply(False, _rows(phi, sign, shift, weight), mean, backend, *logits)


def _backward_kernel(dtotal, logits, phi, sign, shift, weight, mean, backend):
    return OP.backends[backend].backward(dtotal, _rows(phi, sign, shift, weight), mean, logits)


def _backward_fake(dtotal, logits, phi, sign, shift, weight, mean, backend):
    return [torch.empty_like(x) for x in logits]


def _backward_differentiable(dtotal, logits, phi, sign, shift, weight, mean, backend):
    return equations.gradient(dtotal, _rows(phi, sign, shift, weight), mean, logits)


forward_op = define(
    f"adversarial_forward(Tensor[] logits, {_TERMS}) -> (Tensor total, Tensor values)",
    _forward_kernel,
    _forward_fake,
    _forward_differentiable,
)
backward_op = define(
    f"adversarial_backward(Tensor dtotal, Tensor[] logits, {_TERMS}) -> Tensor[]",
    _backward_kernel,
    _backward_fake,
    _backward_differentiable,
)
