"""The adversarial loss in plain torch: its specification, the truth for tests, and the formula behind double backward.

A loss is a sum of terms. The term (phi, sign, shift, weight, tilt) maps one tensor of logits x to

    weight * reduce(w * phi(sign * (x - other) + shift))

reduce being the mean or the sum over all elements. `other` is nothing, a tensor of x's shape (relativistic pairs,
feature matching), or one number for the whole term, its centre (relativistic averages, LeCam). w, if there are
weights, has one number for each of the first n dimensions' elements. The functions phi are

    softplus(u) = log(1 + exp(u))      square(u) = u^2      relu(u) = max(u, 0)      identity(u) = u      abs(u) = |u|
    sigmoid(u) = 1 / (1 + exp(-u))     relu_square(u) = max(u, 0)^2          tilted(u) = softplus(u) + tilt * u
    leaky_square: the square of sign * leaky(x) + shift, leaky(x) = max(x, x / 20)

and the losses of the literature are rows of a table:

    non-saturating   softplus(-x) for real, softplus(x) for fake      Goodfellow et al., arXiv:1406.2661
    minimax          the same; generator -softplus(x)                 ibid., equation 1
    hinge            relu(1 - x), relu(1 + x); generator -x           Lim and Ye, arXiv:1705.02894
    hinge2           the same; generator relu(1 - x)                  audiocraft's name
    lsgan            (x - 1)^2, x^2                                   Mao et al., arXiv:1611.04076
    wasserstein      -x, x                                            Arjovsky et al., arXiv:1701.07875
    relativistic     softplus(-(real - fake)), pair by pair           Jolicoeur-Martineau, arXiv:1807.00734, RpGAN as in
                                                                      Huang et al., arXiv:2501.05441
    relativistic-average...   x less the mean of the other side       Jolicoeur-Martineau, arXiv:1807.00734
    leaky-lsgan      lsgan of leaky(x)                                MONAI's PatchAdversarialLoss
    tanh-hinge       hinge of tanh(x): 1 - tanh(x) = 2 sigmoid(-2x)   MONAI's PatchAdversarialLoss
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu, relu, softplus

SOFTPLUS, SQUARE, RELU, IDENTITY, ABS, SIGMOID, RELU_SQUARE, TILTED, LEAKY_SQUARE = range(9)

#: The slope of leaky_square's leaky below 0.
LEAK = 0.05


class Term(NamedTuple):
    """`weight * reduce(phi(sign * (x - other) + shift))` of one tensor of logits x."""

    phi: int
    sign: float
    shift: float
    weight: float = 1.0
    tilt: float = 0.0


class Terms(tuple):
    """A tuple of terms that remembers what the native libraries make of it."""

    @functools.cached_property
    def copies(self) -> dict[str, Any]:
        """The native libraries' copies of the terms, by the library's name."""
        return {}


def columns_of(terms: Iterable[Term]) -> tuple[list[int], list[float], list[float], list[float], list[float]]:
    """phi, sign, shift, weight and tilt of all terms, one list each."""
    phi, *numbers = zip(*terms, strict=True)
    sign, shift, weight, tilt = ([float(number) for number in column] for column in numbers)
    return list(phi), sign, shift, weight, tilt


class Mode(NamedTuple):
    """The terms of a mode: the discriminator's on real and on fake logits, the generator's on fake (and real) logits.

    pairing: "" where each side stands alone; "pairs": real less fake elementwise, in one term; "means": each less the
    mean of the other side.
    """

    real: Term
    fake: Term
    generator: Term
    generator_real: Term | None = None
    pairing: str = ""


def _means(real: Term, fake: Term, generator: Term, generator_real: Term) -> Mode:
    return Mode(real, fake, generator, generator_real, "means")


MODES = {
    "non-saturating": Mode(Term(SOFTPLUS, -1, 0), Term(SOFTPLUS, 1, 0), Term(SOFTPLUS, -1, 0)),
    "minimax": Mode(Term(SOFTPLUS, -1, 0), Term(SOFTPLUS, 1, 0), Term(SOFTPLUS, 1, 0, -1)),
    "hinge": Mode(Term(RELU, -1, 1), Term(RELU, 1, 1), Term(IDENTITY, -1, 0)),
    "hinge2": Mode(Term(RELU, -1, 1), Term(RELU, 1, 1), Term(RELU, -1, 1)),
    "lsgan": Mode(Term(SQUARE, 1, -1), Term(SQUARE, 1, 0), Term(SQUARE, 1, -1)),
    "wasserstein": Mode(Term(IDENTITY, -1, 0), Term(IDENTITY, 1, 0), Term(IDENTITY, -1, 0)),
    "relativistic": Mode(
        Term(SOFTPLUS, -1, 0), Term(SOFTPLUS, -1, 0), Term(SOFTPLUS, 1, 0), Term(SOFTPLUS, 1, 0), "pairs"
    ),
    "relativistic-average": _means(
        Term(SOFTPLUS, -1, 0), Term(SOFTPLUS, 1, 0), Term(SOFTPLUS, -1, 0), Term(SOFTPLUS, 1, 0)
    ),
    "relativistic-average-hinge": _means(Term(RELU, -1, 1), Term(RELU, 1, 1), Term(RELU, -1, 1), Term(RELU, 1, 1)),
    "relativistic-average-lsgan": _means(
        Term(SQUARE, 1, -1), Term(SQUARE, 1, 1), Term(SQUARE, 1, -1), Term(SQUARE, 1, 1)
    ),
    "leaky-lsgan": Mode(Term(LEAKY_SQUARE, 1, -1), Term(LEAKY_SQUARE, 1, 0), Term(LEAKY_SQUARE, 1, -1)),
    "tanh-hinge": Mode(Term(SIGMOID, -2, 0, 2), Term(SIGMOID, 2, 0, 2), Term(SIGMOID, -2, 0, 2)),
}

#: LeCam's terms on real and on fake logits, with the running mean of the other side as centre (arXiv:2104.03310).
LECAM = (Term(RELU_SQUARE, 1, 0), Term(RELU_SQUARE, -1, 0))


class Inputs(NamedTuple):
    """What K terms are computed of.

    logits: K tensors of any shapes, of one floating-point dtype. others: K tensors of the same shapes and dtype, or
    none. weights: K tensors (in the values' dtype), each number for one of numel(w) equal parts of the logits, in
    order; or none. centres: (K,) in the values' dtype, or None. peers: for each term, the term of whose logits its
    centre is the mean, so that a gradient flows there: it is centres[peer], or where there are no centres yet,
    computed; or none. others and centres exclude each other.
    """

    logits: Sequence[Tensor]
    others: Sequence[Tensor] = ()
    weights: Sequence[Tensor] = ()
    centres: Tensor | None = None
    peers: Sequence[int] = ()


def values_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the terms' values for logits of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _argument(term: Term, x: Tensor, other: Tensor | None) -> Tensor:
    u = x if other is None else x - other
    if term.phi == LEAKY_SQUARE:
        u = leaky_relu(u, LEAK)
    u = -u if term.sign == -1 else u if term.sign == 1 else u * term.sign
    return u if term.shift == 0 else u + term.shift


def _phi(term: Term, u: Tensor) -> Tensor:
    phi = term.phi
    if phi == SOFTPLUS:
        return softplus(u)
    if phi == RELU:
        return relu(u)
    if phi == IDENTITY:
        return u
    if phi in (SQUARE, LEAKY_SQUARE):
        return u.square()
    if phi == TILTED:
        return softplus(u) + u * term.tilt
    if phi == RELU_SQUARE:
        return relu(u).square()
    if phi == ABS:
        return u.abs()
    return u.sigmoid()


def _slope(term: Term, u: Tensor, x: Tensor) -> Tensor:
    """The derivative of phi by u (of leaky_square by x), itself differentiable; relu's is 0 at 0, as torch's."""
    phi = term.phi
    if phi == SOFTPLUS:
        return u.sigmoid()
    if phi == TILTED:
        return u.sigmoid() + term.tilt
    if phi == SQUARE:
        return u + u
    if phi == RELU_SQUARE:
        return 2 * relu(u)
    if phi == ABS:
        return u.sign()
    if phi == SIGMOID:
        s = u.sigmoid()
        return s * (1 - s)
    if phi == LEAKY_SQUARE:
        return torch.where(x > 0, 2 * u, 2 * LEAK * u)
    # NaN is not <= 0: like torch, the slope is then 1 and the NaN stays visible in the loss
    return (~(u <= 0)).to(u.dtype) if phi == RELU else torch.ones_like(u)


def _others(inputs: Inputs) -> list[Tensor | None]:
    if inputs.others:
        return list(inputs.others)
    if inputs.centres is not None:
        # without dimensions, so that they promote no logits
        centres = inputs.centres.unbind()
        return [centres[peer] for peer in inputs.peers or range(len(centres))]
    if inputs.peers:
        return [inputs.logits[peer].mean() for peer in inputs.peers]
    return [None] * len(inputs.logits)


def means(inputs: Inputs) -> Tensor:
    """(K,): the mean of each tensor of logits."""
    return torch.stack([x.mean() for x in inputs.logits])


def _weighted(y: Tensor, inputs: Inputs, k: int) -> Tensor:
    if not inputs.weights:
        return y
    weight = inputs.weights[k].to(y.dtype)
    if weight.numel() == y.numel():
        return y * weight.reshape(y.shape)
    return (y.reshape(weight.numel(), -1) * weight.reshape(-1, 1)).reshape(y.shape)


def elements(terms: Sequence[Term], inputs: Inputs) -> list[Tensor]:
    """Each term before it is reduced: `weight * w * phi(...)`, in the shape of its logits."""
    losses = []
    for k, (term, x, other) in enumerate(zip(terms, inputs.logits, _others(inputs), strict=True)):
        y = _weighted(_phi(term, _argument(term, x, other)), inputs, k)
        losses.append(y if term.weight == 1 else y * term.weight)
    return losses


def values(terms: Sequence[Term], mean: bool, inputs: Inputs) -> list[Tensor]:
    """The value of each term, a tensor without dimensions each."""
    reduced = []
    for k, (term, x, other) in enumerate(zip(terms, inputs.logits, _others(inputs), strict=True)):
        y = _weighted(_phi(term, _argument(term, x, other)), inputs, k)
        y = y.mean() if mean else y.sum()
        reduced.append(y if term.weight == 1 else y * term.weight)
    return reduced


def value(term: Term, mean: bool, x: Tensor) -> Tensor:
    """The value of one term of logits alone."""
    y = _phi(term, _argument(term, x, None))
    y = y.mean() if mean else y.sum()
    return y if term.weight == 1 else y * term.weight


def add_up(numbers: Sequence[Tensor]) -> Tensor:
    """The sum of tensors without dimensions, added in order."""
    first, *rest = numbers
    for number in rest:
        first = first + number
    return first


def total(terms: Sequence[Term], mean: bool, inputs: Inputs) -> Tensor:
    """The loss: the values of all terms, added in order."""
    return add_up(values(terms, mean, inputs))


def slopes(terms: Sequence[Term], mean: bool, inputs: Inputs) -> Tensor:
    """(K,): the sum of the gradient of each term's value by its logits, which is minus that by its centre."""
    sums = []
    for k, (term, x, other) in enumerate(zip(terms, inputs.logits, _others(inputs), strict=True)):
        g = _weighted(_slope(term, _argument(term, x, other), x), inputs, k)
        sums.append((g.mean() if mean else g.sum()) * (term.weight * term.sign))
    return torch.stack(sums)


def gradient(
    dtotal: Tensor, terms: Sequence[Term], mean: bool, inputs: Inputs, slopes: Tensor | None = None
) -> list[Tensor]:
    """dtotal times the gradient of `total` by each tensor of logits, then by each of the others: a formula of torch.

    slopes: (K,), what the function `slopes` gives, where it is known (and perhaps averaged over ranks).
    """
    gradients = []
    for k, (term, x, other) in enumerate(zip(terms, inputs.logits, _others(inputs), strict=True)):
        g = dtotal * (term.weight * term.sign / (max(x.numel(), 1) if mean else 1))
        gradients.append(g * _weighted(_slope(term, _argument(term, x, other), x), inputs, k))
    if inputs.others:
        return gradients + [-g for g in gradients]
    flows = [g.sum() for g in gradients] if slopes is None else [dtotal * s for s in slopes.to(dtotal.dtype).unbind()]
    if not inputs.peers:
        return gradients
    return [g - flows[peer] / max(g.numel(), 1) for g, peer in zip(gradients, inputs.peers, strict=True)]
