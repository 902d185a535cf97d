"""The adversarial op: schema, fake, autograd.

    mmfast::adversarial_forward(<inputs>, <terms>) -> (Tensor total, Tensor values, Tensor state)
    mmfast::adversarial_backward(Tensor dtotal, Tensor? state, bool[] needed, <inputs>, <terms>) -> Tensor[]

Inputs and terms are those of equations.py; total is without dimensions in the logits' dtype, values (K,) and state in
the values' dtype. state is (2, K) where terms have peers, else (0,): the slope of each term by its logits, which its
peer's gradient is less by, and the centres, which are computed where none are given. The backward's gradients are those
by the logits, then by the others, of which `needed` says for each whether it is wanted.

Any order of differentiation in eager: where a gradient of the backward is needed, it is equations.gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, get_num_threads, is_grad_enabled
from torch._C import _are_functorch_transforms_active as are_functorch_transforms_active

from ... import native
from ...dispatch import is_plain, needs_formula
from ..library import below_autograd, define
from . import equations
from .backends import OP, Outputs, empty_outputs
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
    if torch.is_grad_enabled():
        for x in tensors:
            if x.requires_grad:
                call = _Call(terms, mean, inputs, backend, values_wanted, group)
                return _apply(call, *tensors), call.values
    return OP.backends[backend].forward(terms, mean, inputs, values_wanted)[:2]


class _Call:
    """What the eager Function is given besides tensors: one object, for each argument of apply costs time.

    values: an attribute that the forward fills, and no output, of which each would cost its gradient.
    gradients: of the total, where they were computed together with it, until a backward has handed them out.
    """

    __slots__ = (
        "backend",
        "counts",
        "gradients",
        "group",
        "inputs",
        "mean",
        "peers",
        "terms",
        "values",
        "wanted",
    )

    def __init__(self, terms: Terms, mean: bool, inputs: Inputs, backend: str, wanted: bool, group: Any) -> None:
        self.terms = terms
        self.mean = mean
        self.inputs: Any = inputs
        self.backend = OP.backends[backend]
        self.wanted = wanted
        self.group = group
        self.values: Tensor | None = None
        self.gradients: list[Tensor | None] = []
        self.counts: tuple[int, int, int] | None = None
        self.peers: Sequence[int] = ()


def means_of(terms: Terms, tensors: Sequence[Tensor], backend: str) -> Tensor:
    """(K,): the value of each of K terms, the mean over its tensor; tensors that require no grad."""
    inputs = Inputs(tensors)
    if needs_formula(tensors):
        return torch.stack(equations.values(terms, True, inputs)).to(equations.values_dtype(tensors[0].dtype))
    if not is_plain(tensors):
        return forward_op(*_arguments(inputs), *columns_of(terms), True, backend)[1]
    return OP.backends[backend].forward(terms, True, inputs, True)[1]


def is_eager(tensors: Sequence[Tensor]) -> bool:
    """Whether a loss of these tensors would call its backend directly, from which a process group is reached."""
    return is_plain(tensors)


class Direct(NamedTuple):
    """A loss of dense tensors on the CPU as one call of native code: `native.adversarial_direct`.

    pairing: "pairs" of logits and others, "means" of each pair of logits, or "".
    """

    terms: Terms
    mean: bool
    pairing: str
    call: Callable[..., Any]
    number_of: Callable[[Tensor], float | None]
    address: int
    options: int

    @classmethod
    def of(cls, terms: Terms, mean: bool, pairing: str) -> Direct:
        options = native.DIRECT_MEAN if mean else 0
        options += {"pairs": native.DIRECT_OTHERS, "means": native.DIRECT_AVERAGES}.get(pairing, 0)
        if all(term.phi == equations.IDENTITY for term in terms):
            options += native.DIRECT_CONSTANT
        return cls(terms, mean, pairing, *native.adversarial_direct(terms), options)

    def inputs(self, tensors: Sequence[Tensor]) -> Inputs:
        if self.pairing == "pairs":
            return Inputs(tensors[: len(self.terms)], tensors[len(self.terms) :])
        return Inputs(tensors, peers=tuple(k ^ 1 for k in range(len(tensors))) if self.pairing else ())


def loss_of_tensors(direct: Direct, threads: int, tensors: Sequence[Tensor]) -> Tensor | None:
    """The total, or None where it is not the direct call that serves these tensors."""
    if not is_grad_enabled():
        found = direct.call(direct.address, direct.options, threads, *tensors)
        return found and found[0]
    found = direct.call(direct.address, direct.options + native.DIRECT_GRADIENTS, threads, *tensors)
    if not found or found[1] is None:
        return found and found[0]
    return _apply_direct((direct, *found), *tensors)


def _is_batch(dtotal: Tensor) -> bool:
    """Whether this is a batch of cotangents: torch.autograd.grad(..., is_grads_batched=True), or within vmap."""
    return torch._C._functorch.is_legacy_batchedtensor(dtotal) or are_functorch_transforms_active()


class DirectLoss(torch.autograd.Function):
    """`loss_of_tensors` as one node, in as few steps of Python as may be: at 64 logits they are what takes the time."""

    @staticmethod
    def forward(ctx: Any, found: tuple, *tensors: Tensor):
        ctx.direct, total, ctx.gradients = found
        # what save_for_backward does
        ctx.to_save = tensors
        return total

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor):
        # raises where a logit was changed in place, and in a second backward
        tensors, direct, gradients = ctx.saved_tensors, ctx.direct, ctx.gradients
        # None: of a batch of cotangents
        scale = None if is_grad_enabled() or are_functorch_transforms_active() else direct.number_of(dtotal)
        if scale is None:
            return None, *_direct_formula(ctx, dtotal, tensors)
        if gradients is None:
            options = direct.options + native.DIRECT_GRADIENTS
            found = direct.call(direct.address, options, get_num_threads(), *tensors)
            if not (found and found[1]):  # of tensors that a hook brought back in another layout
                return None, *_direct_formula(ctx, dtotal, tensors)
            gradients = found[1]
        elif not gradients:
            return None, *_constants(ctx, scale, tensors)
        ctx.gradients = None
        if scale != 1:
            for g in gradients:
                if g is not None:
                    g.mul_(dtotal)
        return None, *gradients


def _direct_formula(ctx: Any, dtotal: Tensor, tensors: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """The gradients, themselves differentiable."""
    direct = ctx.direct
    found = equations.gradient(dtotal, direct.terms, direct.mean, direct.inputs(tensors))
    return [g if need else None for g, need in zip(found, ctx.needs_input_grad[1:], strict=True)]


def _constants(ctx: Any, dtotal: float, tensors: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """The gradients where no logit changes them: one number each, expanded, as that of torch.sum is."""
    terms, mean = ctx.direct[:2]
    return [
        x.new_tensor(dtotal * term.weight * term.sign / (x.numel() if mean else 1)).expand_as(x) if need else None
        for term, x, need in zip(terms, tensors, ctx.needs_input_grad[1:], strict=True)
    ]


class AdversarialLoss(torch.autograd.Function):
    """One node for the whole list, in eager: the backend is called without the dispatcher between."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor):
        inputs, backend, group = call.inputs, call.backend, call.group
        if backend.name == "cpu" and group is None:
            outputs, call.gradients = backend.forward_with_gradients(
                call.terms, call.mean, inputs, call.wanted, ctx.needs_input_grad[1:]
            )
        else:
            outputs = backend.forward(call.terms, call.mean, inputs, call.wanted)
        total, call.values, state = outputs
        if group is not None and state is not None:
            torch.distributed.all_reduce(state[0].div_(group.size()), group=group)
        # the node of the graph keeps its call; tensors are kept by save_for_backward only
        call.inputs = None
        call.peers = inputs.peers
        if inputs.weights or inputs.peers or inputs.centres is not None:
            call.counts = len(inputs.logits), len(inputs.others), len(inputs.weights)
            ctx.save_for_backward(*tensors, *inputs.weights, inputs.centres, state)
        else:
            if inputs.others:
                call.counts = len(inputs.logits), len(inputs.others), 0
            # what save_for_backward does
            ctx.to_save = tensors
        ctx.call = call
        return total

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor):
        call = ctx.call
        if torch.is_grad_enabled():
            return None, *_second_order(ctx, dtotal)
        # raises where a logit was changed in place, and in a second backward
        saved = ctx.saved_tensors
        if _is_batch(dtotal):
            backend, needed = OP.backends["torch"], ctx.needs_input_grad[1:]
            found = backend.backward(dtotal, call.terms, call.mean, *_saved(saved, call), needed)
            return None, *_placed(found, needed)
        if call.gradients:
            gradients, call.gradients = call.gradients, []
            if dtotal.item() != 1:
                torch._foreach_mul_([g for g in gradients if g is not None], dtotal)
            return None, *gradients
        needed = ctx.needs_input_grad[1:]
        inputs, state = _saved(saved, call)
        found = call.backend.backward(dtotal, call.terms, call.mean, inputs, state, needed)
        return None, *_placed(found, needed)


def _unwrapped(function: Any) -> Any:
    """function.apply without what it looks up in each call.

    functorch's transforms, which that serves, never come here, and neither does a `vjp` in place of `backward`.
    """
    function._backward_cls.apply = function.backward
    return super(torch.autograd.Function, function).apply


_apply, _apply_direct = _unwrapped(AdversarialLoss), _unwrapped(DirectLoss)


def _second_order(ctx: Any, dtotal: Tensor) -> Sequence[Tensor | None]:
    call, needed = ctx.call, ctx.needs_input_grad[1:]
    if call.group is not None and call.peers:
        raise RuntimeError("a loss whose means are averaged over a process_group is differentiable once")
    inputs, state = _saved(ctx.saved_tensors, call)
    rest = (*columns_of(call.terms), call.mean, call.backend.name)
    return _placed(backward_op(dtotal, state, list(needed), *_arguments(inputs), *rest), needed)


class TracedAdversarialLoss(torch.autograd.Function):
    """The same for tracers, modes and subclasses: through the dispatcher, and all outputs are outputs."""

    @staticmethod
    def forward(ctx: Any, terms: Terms, mean: bool, inputs: Inputs, backend: str, *tensors: Tensor):
        total, values, state = below_autograd(forward_op, *_arguments(inputs), *columns_of(terms), mean, backend)
        ctx.static = terms, mean, backend
        ctx.counts, ctx.peers = (len(inputs.logits), len(inputs.others), len(inputs.weights)), inputs.peers
        ctx.save_for_backward(*tensors, *inputs.weights, inputs.centres, state if inputs.peers else None)
        ctx.mark_non_differentiable(values, state)
        return total, values, state

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor, _dvalues: Tensor, _dstate: Tensor):
        (terms, mean, backend), needed = ctx.static, ctx.needs_input_grad[4:]
        inputs, state = _saved(ctx.saved_tensors, ctx)
        rest = (*columns_of(terms), mean, backend)
        found = backward_op(dtotal, state, list(needed), *_arguments(inputs), *rest)
        return None, None, None, None, *_placed(found, needed)


def _placed(found: Sequence[Tensor], needed: Sequence[bool]) -> Sequence[Tensor | None]:
    """The gradients that were needed, each in its place, with None in the others'."""
    if len(found) == len(needed):
        return found
    rest = iter(found)
    return [next(rest) if need else None for need in needed]


def _saved(saved: Sequence[Tensor], layout: Any) -> tuple[Inputs, Tensor | None]:
    """(inputs, state); layout: has the counts of logits, others and weights, or None for logits alone, and the peers"""
    counts = layout.counts
    if counts is None:
        return Inputs(saved), None
    second, third = counts[0] + counts[1], sum(counts)
    logits, others, weights = saved[: counts[0]], saved[counts[0] : second], saved[second:third]
    if len(saved) == third:
        return Inputs(logits, others), None
    return Inputs(logits, others, weights, saved[-2], layout.peers), saved[-1]


def _arguments(inputs: Inputs) -> tuple:
    return list(inputs.logits), list(inputs.others), list(inputs.weights), inputs.centres, list(inputs.peers)


def _rows(phi: list[int], *numbers: list[float]) -> Terms:
    return Terms(Term(*row) for row in zip(phi, *numbers, strict=True))


def _forward_kernel(logits, others, weights, centres, peers, phi, sign, shift, weight, tilt, mean, backend):
    inputs = Inputs(logits, others, weights, centres, peers)
    return _all_tensors(OP.backends[backend].forward(_rows(phi, sign, shift, weight, tilt), mean, inputs, True))


def _forward_fake(logits, others, weights, centres, peers, phi, sign, shift, weight, tilt, mean, backend):
    return _all_tensors(empty_outputs(Inputs(logits, others, weights, centres, peers), True))


def _all_tensors(outputs: Outputs) -> tuple[Tensor, Tensor, Tensor]:
    total, values, state = outputs
    assert values is not None
    return total, values, values.new_empty(0) if state is None else state


def _forward_differentiable(logits, others, weights, centres, peers, phi, sign, shift, weight, tilt, mean, backend):
    inputs = Inputs(logits, others, weights, centres, peers)
    terms = _rows(phi, sign, shift, weight, tilt)
    return TracedAdversarialLoss.apply(terms, mean, inputs, backend, *logits, *others)


def _backward_kernel(dtotal, state, needed, *rest):
    inputs, (*columns, mean, backend) = Inputs(*rest[:5]), rest[5:]
    return OP.backends[backend].backward(dtotal, _rows(*columns), mean, inputs, state, needed)


def _backward_fake(dtotal, state, needed, logits, others, *rest):
    return [torch.empty_like(x) for x, need in zip((*logits, *others), needed, strict=True) if need]


def _backward_differentiable(dtotal, state, needed, *rest):
    inputs, (*columns, mean, _backend) = Inputs(*rest[:5]), rest[5:]
    if inputs.peers:
        # the means, too, depend on the logits
        inputs = inputs._replace(centres=None)
    found = equations.gradient(dtotal, _rows(*columns), mean, inputs)
    return [g for g, need in zip(found, needed, strict=True) if need]


forward_op = define(
    f"adversarial_forward({_INPUTS}, {_TERMS}) -> (Tensor total, Tensor values, Tensor state)",
    _forward_kernel,
    _forward_fake,
    _forward_differentiable,
)
backward_op = define(
    f"adversarial_backward(Tensor dtotal, Tensor? state, bool[] needed, {_INPUTS}, {_TERMS}) -> Tensor[]",
    _backward_kernel,
    _backward_fake,
    _backward_differentiable,
)
