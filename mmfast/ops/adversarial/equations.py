"""The adversarial loss in plain torch: its specification, the truth for tests, and the formula behind double backward.

A loss is a sum of terms. The term (phi, sign, shift, weight) maps one tensor of logits x to
`weight * reduce(phi(sign * x + shift))`, reduce being the mean or the sum over all elements. With four functions phi,

    softplus(u) = log(1 + exp(u))      square(u) = u^2      relu(u) = max(u, 0)      identity(u) = u

the losses of the literature are rows of a table:

    non-saturating   softplus(-x) for real, softplus(x) for fake      Goodfellow et al., arXiv:1406.2661
    hinge            relu(1 - x), relu(1 + x); generator -x           Lim and Ye, arXiv:1705.02894
    lsgan            (x - 1)^2, x^2                                   Mao et al., arXiv:1611.04076
    wasserstein      -x, x                                            Arjovsky et al., arXiv:1701.07875
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

SOFTPLUS, SQUARE, RELU, IDENTITY = range(4)


class Term(NamedTuple):
    """`weight * reduce(phi(sign * x + shift))` of one tensor of logits x."""

    phi: int
    sign: float
    shift: float
    weight: float = 1.0


class Mode(NamedTuple):
    """The terms of a mode: the discriminator's on real and on fake logits, the generator's on fake logits."""

    real: Term
    fake: Term
    generator: Term


MODES = {
    "non-saturating": Mode(Term(SOFTPLUS, -1, 0), Term(SOFTPLUS, 1, 0), Term(SOFTPLUS, -1, 0)),
    "hinge": Mode(Term(RELU, -1, 1), Term(RELU, 1, 1), Term(IDENTITY, -1, 0)),
    "lsgan": Mode(Term(SQUARE, 1, -1), Term(SQUARE, 1, 0), Term(SQUARE, 1, -1)),
    "wasserstein": Mode(Term(IDENTITY, -1, 0), Term(IDENTITY, 1, 0), Term(IDENTITY, -1, 0)),
}


def _argument(term: Term, x: Tensor) -> Tensor:
    u = -x if term.sign == -1 else x if term.sign == 1 else x * term.sign
    return u if term.shift == 0 else u + term.shift


def _phi(phi: int, u: Tensor) -> Tensor:
    if phi == SOFTPLUS:
        return softplus(u)
    if phi == SQUARE:
        return u.square()
    return relu(u) if phi == RELU else u


def _slope(phi: int, u: Tensor) -> Tensor:
    """phi'(u), itself differentiable; relu's is 0 at 0, as torch's."""
    if phi == SOFTPLUS:
        return u.sigmoid()
    if phi == SQUARE:
        return u + u
    # NaN is not <= 0: like torch, the slope is then 1 and the NaN stays visible in the loss
    return (~(u <= 0)).to(u.dtype) if phi == RELU else torch.ones_like(u)


def values(terms: Sequence[Term], mean: bool, logits: Sequence[Tensor]) -> list[Tensor]:
    """The value of each term, a tensor without dimensions each."""
    reduced = []
    for term, x in zip(terms, logits, strict=True):
        y = _phi(term.phi, _argument(term, x))
        y = y.mean() if mean else y.sum()
        reduced.append(y if term.weight == 1 else y * term.weight)
    return reduced


def total(terms: Sequence[Term], mean: bool, logits: Sequence[Tensor]) -> Tensor:
    """The loss: the values of all terms, added in order."""
    first, *rest = values(terms, mean, logits)
    for value in rest:
        first = first + value
    return first


def gradient(dtotal: Tensor, terms: Sequence[Term], mean: bool, logits: Sequence[Tensor]) -> list[Tensor]:
    """dtotal times the gradient of `total` with respect to each tensor of logits, as a differentiable formula."""
    return [
        dtotal * (term.weight * term.sign / (max(x.numel(), 1) if mean else 1)) * _slope(term.phi, _argument(term, x))
        for term, x in zip(terms, logits, strict=True)
    ]
