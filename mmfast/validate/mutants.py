"""Planted bugs: right kernels made wrong in ways that kernels go wrong, each of which the numerics rule must catch.

A rule that lets one of them through is too weak, and one that fails a right kernel is too strong: `trial` holds a
kernel, mutated or not, to `mmfast.numerics` on fresh random inputs and returns what the rule says.

    >>> trial("adversarial", seed, torch.bfloat16, "hinge")                               # a right kernel: []
    >>> trial("adversarial", seed, torch.bfloat16, "hinge", MUTANTS["adversarial"][0])    # what is wrong, in sentences

`PATTERNS` are mutations of an output whatever the op; the others are an op's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import native
from ..numerics import ENOUGH, Errors
from ..ops.adversarial import equations
from ..ops.adversarial.backends import OP as ADVERSARIAL
from ..ops.adversarial.equations import MODES, Inputs, Term, Terms

__all__ = ["ADVERSARIAL_MODES", "MUTANTS", "PATTERNS", "Mutant", "trial"]


class AdversarialCall(NamedTuple):
    """The arguments of one forward and backward of the adversarial op: K terms, K tensors of logits, a cotangent."""

    terms: Sequence[Term]
    mean: bool
    logits: Sequence[Tensor]
    cotangent: Tensor


#: The modes that mutants are planted in: one of each phi.
ADVERSARIAL_MODES = ("non-saturating", "hinge", "lsgan", "wasserstein")

#: From a call's arguments to the kernel's (values (K,), gradients).
Kernel = Callable[[AdversarialCall], tuple[Tensor, list[Tensor]]]


class Mutant(NamedTuple):
    """A bug: its name, the kernel that it makes of a right one, and the modes and dtypes in which it is one."""

    name: str
    plant: Callable[[Kernel], Kernel]
    modes: tuple[str, ...] = ADVERSARIAL_MODES
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)


#: Mutations of one output of any op, which has at least two elements.
PATTERNS: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled by 1.02": lambda out: out * 1.02,
    "halved": lambda out: out * 0.5,
    "negated": lambda out: -out,
    "all zero": torch.zeros_like,
    "shifted by one element": lambda out: out.flatten().roll(1).view_as(out),
    "first element not written": lambda out: _with(out, 0, float("nan")),
    "last element stale": lambda out: _with(out, -1, float(out.flatten()[-2])),
    "reversed": lambda out: out.flatten().flip(0).view_as(out),
    "one element off": lambda out: _with(out, 1, float(out.flatten()[1]) + 0.1 * float(out.abs().max())),
}


def _with(out: Tensor, index: int, value: float) -> Tensor:
    out = out.clone()
    out.view(-1)[index] = value
    return out


def _arguments(change: Callable[[AdversarialCall], AdversarialCall]) -> Callable[[Kernel], Kernel]:
    """A kernel that computes the right thing from wrong arguments, forward and backward."""
    return lambda kernel: lambda call: kernel(change(call))


def _terms(change: Callable[[int, Term], Term]) -> Callable[[Kernel], Kernel]:
    return _arguments(lambda call: call._replace(terms=[change(k, term) for k, term in enumerate(call.terms)]))


def _logits(change: Callable[[Tensor], Tensor]) -> Callable[[Kernel], Kernel]:
    return _arguments(lambda call: call._replace(logits=[change(x) for x in call.logits]))


def _on_values(change: Callable[[Tensor], Tensor]) -> Callable[[AdversarialCall, Tensor], Tensor]:
    return lambda _, x: change(x)


def _values(change: Callable[[AdversarialCall, Tensor], Tensor]) -> Callable[[Kernel], Kernel]:
    def plant(kernel: Kernel) -> Kernel:
        def mutant(call: AdversarialCall) -> tuple[Tensor, list[Tensor]]:
            values, gradients = kernel(call)
            return change(call, values), gradients

        return mutant

    return plant


def _gradients(change: Callable[[AdversarialCall, Tensor], Tensor]) -> Callable[[Kernel], Kernel]:
    def plant(kernel: Kernel) -> Kernel:
        def mutant(call: AdversarialCall) -> tuple[Tensor, list[Tensor]]:
            values, gradients = kernel(call)
            return values, [change(call, gradient) for gradient in gradients]

        return mutant

    return plant


def _drop_last_tensor(kernel: Kernel) -> Kernel:
    def mutant(call: AdversarialCall) -> tuple[Tensor, list[Tensor]]:
        values, gradients = kernel(call)
        return _with(values, -1, 0.0), [*gradients[:-1], torch.zeros_like(gradients[-1])]

    return mutant


def _sum_in_the_logits_dtype(call: AdversarialCall, values: Tensor) -> Tensor:
    one_by_one = []
    for term, x in zip(call.terms, call.logits, strict=True):
        total = torch.zeros((), dtype=x.dtype)
        for element in x:
            total = total + equations.values([term], False, Inputs([element]))[0]
        one_by_one.append(total / x.numel() if call.mean else total)
    return torch.stack(one_by_one).to(values.dtype)


_LOW = (torch.float16, torch.bfloat16)
_MOVES = ("shifted by one element", "last element stale", "reversed")
_UNEQUAL = ("non-saturating", "hinge", "lsgan")

_ADVERSARIAL = [
    Mutant("wrong scale", _terms(lambda k, t: t._replace(weight=t.weight * 1.02))),
    Mutant("weight ignored", _terms(lambda k, t: t._replace(weight=1.0))),
    Mutant(
        "real and fake swapped", _arguments(lambda c: c._replace(terms=[c.terms[k ^ 1] for k in range(len(c.terms))]))
    ),
    Mutant("sign flipped", _terms(lambda k, t: t._replace(sign=-t.sign))),
    Mutant("sum instead of mean", _arguments(lambda c: c._replace(mean=not c.mean))),
    Mutant("hinge margin 0.9", _terms(lambda k, t: t._replace(shift=t.shift * 0.9)), ("hinge",)),
    Mutant("target 0.9", _terms(lambda k, t: t._replace(shift=t.shift * 0.9)), ("lsgan",)),
    Mutant("threshold off", _terms(lambda k, t: t._replace(shift=t.shift + 0.05))),
    Mutant("softplus without its tail", _terms(lambda k, t: t._replace(phi=equations.RELU)), ("non-saturating",)),
    Mutant("relu forgotten", _terms(lambda k, t: t._replace(phi=equations.IDENTITY)), ("hinge",)),
    Mutant("last tensor dropped", _drop_last_tensor),
    Mutant("last element stale", _logits(lambda x: _with(x, -1, float(x[-2])))),
    Mutant("last element zero", _logits(lambda x: _with(x, -1, 0.0))),
    Mutant("one element read twice", _logits(lambda x: torch.cat([x[:1], x[:-1]]))),
    Mutant("divides by n - 1", _values(lambda c, v: v * len(c.logits[0]) / (len(c.logits[0]) - 1))),
    Mutant("cotangent ignored", _gradients(lambda c, g: g / c.cotangent)),
    Mutant("gradient not divided by n", _gradients(lambda c, g: g * g.numel())),
    Mutant("logits rounded to bfloat16", _logits(lambda x: x.bfloat16().to(x.dtype)), dtypes=(torch.float32,)),
    Mutant("sum in the logits' dtype", _values(_sum_in_the_logits_dtype), ("hinge",), _LOW),
    *(Mutant(f"values {name}", _values(_on_values(change))) for name, change in PATTERNS.items()),
    *(
        # in wasserstein all gradients of a tensor are the same number, so that moving them changes nothing
        Mutant(
            f"gradients {name}",
            _gradients(_on_values(change)),
            _UNEQUAL if name in _MOVES else ADVERSARIAL_MODES,
        )
        for name, change in PATTERNS.items()
    ),
]

#: An op's mutants.
MUTANTS: dict[str, list[Mutant]] = {"adversarial": _ADVERSARIAL}


def trial(op: str, seed: int, dtype: torch.dtype, mode: str, mutant: Mutant | None = None) -> list[str]:
    """What the numerics rule says of an op's kernel on inputs drawn from `seed`, in sentences; [] if it passes.

    op: "adversarial". mode: one of its modes. mutant: None for the right kernel, which is the CPU kernel, or PyTorch's
    formula where there is no native library.
    """
    kernel = {"adversarial": _adversarial_kernel}[op]
    return _adversarial_trial(seed, dtype, mode, mutant.plant(kernel) if mutant else kernel)


def _adversarial_kernel(call: AdversarialCall) -> tuple[Tensor, list[Tensor]]:
    backend = ADVERSARIAL.backends["cpu" if native.available() else "torch"]
    terms, inputs = Terms(call.terms), Inputs(call.logits)
    _, values, slopes = backend.forward(terms, call.mean, inputs, True)
    needed = [True] * len(call.logits)
    return values, backend.backward(call.cotangent, terms, call.mean, inputs, slopes, needed)


# a list of tensors of so many logits; enough lists for the rule
_TENSORS, _LOGITS = 64, 24


class _Drawn(NamedTuple):
    """Lists of logits (lists, K, n), a cotangent each, two terms that take turns, the truth and PyTorch's results."""

    logits: Tensor
    cotangents: Tensor
    terms: list[Term]
    reference: tuple[Tensor, Tensor]
    yardstick: tuple[Tensor, Tensor]


@functools.lru_cache(maxsize=16)
def _draw(seed: int, dtype: torch.dtype, mode: str) -> _Drawn:
    generator = torch.Generator().manual_seed(seed)
    lists = ENOUGH // _TENSORS
    logits = (torch.randn(lists, _TENSORS, _LOGITS, generator=generator) * 2).to(dtype)
    cotangents = (torch.rand(lists, generator=generator) + 1.5).to(dtype)
    weights = (torch.rand(2, generator=generator, dtype=torch.float64) + 1.2).tolist()
    roles = (MODES[mode].real, MODES[mode].fake)
    terms = [term._replace(weight=weight) for term, weight in zip(roles, weights, strict=True)]
    reference = _rows(terms, logits.double(), cotangents.double())
    return _Drawn(logits, cotangents, terms, reference, _rows(terms, logits, cotangents))


def _adversarial_trial(seed: int, dtype: torch.dtype, mode: str, kernel: Kernel) -> list[str]:
    logits, cotangents, terms, reference, yardstick = _draw(seed, dtype, mode)
    errors = {"values": Errors("values"), "gradients": Errors("gradients")}
    try:
        for k in range(len(logits)):
            call = AdversarialCall(terms * (_TENSORS // 2), True, logits[k].unbind(), cotangents[k])
            values, gradients = kernel(call)
            errors["values"].add(values, yardstick[0][k].to(values.dtype), reference[0][k])
            errors["gradients"].add(torch.stack(gradients), yardstick[1][k], reference[1][k])
    except AssertionError as error:
        # of the wrong shape or pattern, which no figures are needed to see
        return [str(error)]
    return [f"{name}: {failure}" for name, pool in errors.items() for failure in pool.compare().failures]


def _rows(terms: Sequence[Term], logits: Tensor, cotangents: Tensor) -> tuple[Tensor, Tensor]:
    """Values (lists, K) and gradients (lists, K, n), even tensors by the first term, odd ones by the second."""
    logits = logits.clone().requires_grad_()
    columns = []
    for k, term in enumerate(terms):
        elements = equations._phi(term, equations._argument(term, logits[:, k::2], None))
        columns.append(elements.mean(-1) * term.weight)
    values = torch.stack(columns, -1).flatten(1)
    (gradients,) = torch.autograd.grad(values, logits, cotangents[:, None].expand_as(values))
    return values.detach(), gradients
