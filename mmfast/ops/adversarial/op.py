"""The adversarial op: schema, fake, autograd.

    mmfast::adversarial_forward(<inputs>, <terms>) -> (Tensor total, Tensor values, Tensor slopes)
    mmfast::adversarial_backward(Tensor dtotal, Tensor slopes, bool[] needed, <inputs>, <terms>) -> Tensor[]

Inputs and terms are those of equations.py; total is without dimensions in the logits' dtype, values (K,) and slopes
(K,) (without peers (0,)) are in the values' dtype. The backward's gradients are those by the logits, then by the
others, of which `needed` says for each whether it is wanted.

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
from .equations import Inputs, Term, Terms, columns_of

_INPUTS = "Tensor[] logits, Tensor[] others, Tensor[] weights, Tensor? centres, int[] peers"
_TERMS = "int[] phi, float[] sign, float[] shift, float[] weight, float[] tilt, bool mean, str backend"


def loss(
    terms: Terms, mean: bool, inputs: Inputs, backend: str, values_wanted: bool = False, group: Any = None
) -> tuple[Tensor, Tensor | None]:
    """(total (), values (K,)) of K terms; the values carry no gradient, and are None where nobody wants them.

    group: the process group over whose ranks the means of `inputs.peers` were averaged, or None.
    """
    tensors = (*inputs.logits, *inputs.others) if inputs.others else inputs.logits
    if not is_plain(tensors):
        return forward_op(*_arguments(inputs), *columns_of(terms), mean, backend)[:2]
    if not needs_gradient(tensors):
        return OP.backends[backend].forward(terms, mean, inputs, values_wanted)[:2]
    call = _Call(terms, mean, inputs, backend, values_wanted, group)
    return AdversarialLoss.apply(call, *tensors), call.values


class _Call:
    """What the eager Function is given besides tensors: one object, for each argument of apply costs time.

    values: an attribute that the forward fills, and no output, of which each would cost its gradient.
    """

    __slots__ = ("backend", "group", "inputs", "mean", "terms", "values", "values_wanted")

    def __init__(self, terms: Terms, mean: bool, inputs: Inputs, backend: str, values_wanted: bool, group: Any) -> None:
        self.terms, self.mean, self.inputs, self.backend = terms, mean, inputs, backend
        self.values_wanted, self.group, self.values = values_wanted, group, None


def means_of(terms: Terms, tensors: Sequence[Tensor], backend: str) -> Tensor:
    """(K,): the value of each of K terms, the mean over its tensor; tensors that require no grad."""
    inputs = Inputs(tensors)
    if not is_plain(tensors):
        return forward_op(*_arguments(inputs), *columns_of(terms), True, backend)[1]
    return OP.backends[backend].forward(terms, True, inputs, True)[1]


def is_eager(tensors: Sequence[Tensor]) -> bool:
    """Whether a loss of these tensors would call its backend directly, from which a process group is reached."""
    return is_plain(tensors)


class AdversarialLoss(torch.autograd.Function):
    """One node for the whole list, in eager: the backend is called without the dispatcher between."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *_: Tensor):
        terms, mean, inputs = call.terms, call.mean, call.inputs
        total, call.values, slopes = OP.backends[call.backend].forward(terms, mean, inputs, call.values_wanted)
        if call.group is not None:
            torch.distributed.all_reduce(slopes.div_(call.group.size()), group=call.group)
        _save(ctx, terms, mean, inputs, slopes, call.backend)
        # the node of the graph keeps its call; tensors are kept by save_for_backward only
        del call.inputs
        return total

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor):
        return None, *_gradients(ctx, dtotal, ctx.needs_input_grad[1:])


class TracedAdversarialLoss(torch.autograd.Function):
    """The same for tracers, modes and subclasses: through the dispatcher, and all outputs are outputs."""

    @staticmethod
    def forward(ctx: Any, terms: Terms, mean: bool, inputs: Inputs, backend: str, *_: Tensor):
        total, values, slopes = below_autograd(forward_op, *_arguments(inputs), *columns_of(terms), mean, backend)
        _save(ctx, terms, mean, inputs, slopes, backend)
        ctx.mark_non_differentiable(values, slopes)
        return total, values, slopes

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor, _dvalues: Tensor, _dslopes: Tensor):
        return None, None, None, None, *_gradients(ctx, dtotal, ctx.needs_input_grad[4:], direct=False)


def _save(ctx: Any, terms: Terms, mean: bool, inputs: Inputs, slopes: Tensor | None, backend: str) -> None:
    logits, others, weights, centres, peers = inputs
    if not others and not weights and centres is None:
        ctx.static = terms, mean, backend, None, ()
        ctx.save_for_backward(*logits)
        return
    ctx.static = terms, mean, backend, (len(logits), len(others), len(weights)), peers
    ctx.save_for_backward(*logits, *others, *weights, centres, slopes if peers else None)


def _gradients(ctx: Any, dtotal: Tensor, needed: Sequence[bool], direct: bool = True) -> Sequence[Tensor | None]:
    terms, mean, backend, counts, peers = ctx.static
    inputs, slopes = _saved(ctx.saved_tensors, counts, peers)
    if direct and not torch.is_grad_enabled():
        found = OP.backends[backend].backward(dtotal, terms, mean, inputs, slopes, needed)
    else:
        arguments = (slopes, list(needed), *_arguments(inputs), *columns_of(terms), mean, backend)
        found = backward_op(dtotal, *arguments)
    if len(found) == len(needed):
        return found
    rest = iter(found)
    return [next(rest) if need else None for need in needed]


def _saved(
    saved: Sequence[Tensor], counts: tuple[int, int, int] | None, peers: Sequence[int]
) -> tuple[Inputs, Tensor | None]:
    if counts is None:
        return Inputs(saved), None
    second, third = counts[0] + counts[1], sum(counts)
    return Inputs(saved[: counts[0]], saved[counts[0] : second], saved[second:third], saved[-2], peers), saved[-1]


def _arguments(inputs: Inputs) -> tuple:
    return list(inputs.logits), list(inputs.others), list(inputs.weights), inputs.centres, list(inputs.peers)


def _rows(phi: list[int], *numbers: list[float]) -> Terms:
    return Terms(Term(*row) for row in zip(phi, *numbers, strict=True))


def _forward_kernel(logits, others, weights, centres, peers, phi, sign, shift, weight, tilt, mean, backend):
    inputs = Inputs(logits, others, weights, centres, peers)
    return OP.backends[backend].forward(_rows(phi, sign, shift, weight, tilt), mean, inputs, True)


def _forward_fake(logits, others, weights, centres, peers, phi, sign, shift, weight, tilt, mean, backend):
    return empty_outputs(Inputs(logits, others, weights, centres, peers), True)


def _forward_differentiable(logits, others, weights, centres, peers, phi, sign, shift, weight, tilt, mean, backend):
    inputs = Inputs(logits, others, weights, centres, peers)
    terms = _rows(phi, sign, shift, weight, tilt)
    return TracedAdversarialLoss.apply(terms, mean, inputs, backend, *logits, *others)


def _backward_kernel(dtotal, slopes, needed, *rest):
    inputs, (*columns, mean, backend) = Inputs(*rest[:5]), rest[5:]
    return OP.backends[backend].backward(dtotal, _rows(*columns), mean, inputs, slopes, needed)


def _backward_fake(dtotal, slopes, needed, logits, others, *rest):
    return [torch.empty_like(x) for x, need in zip((*logits, *others), needed, strict=True) if need]


def _backward_differentiable(dtotal, slopes, needed, *rest):
    inputs, (*columns, mean, _backend) = Inputs(*rest[:5]), rest[5:]
    if inputs.peers:
        # the means, too, depend on the logits
        inputs = inputs._replace(centres=None)
    found = equations.gradient(dtotal, _rows(*columns), mean, inputs)
    return [g for g, need in zip(found, needed, strict=True) if need]


forward_op = define(
    f"adversarial_forward({_INPUTS}, {_TERMS}) -> (Tensor total, Tensor values, Tensor slopes)",
    _forward_kernel,
    _forward_fake,
    _forward_differentiable,
)
backward_op = define(
    f"adversarial_backward(Tensor dtotal, Tensor? slopes, bool[] needed, {_INPUTS}, {_TERMS}) -> Tensor[]",
    _backward_kernel,
    _backward_fake,
    _backward_differentiable,
)
