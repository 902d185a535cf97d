"""What is checked of an op on a backend: errors against float64, repeatability, threads, second order, gradcheck.

Errors are judged by mmfast.numerics' rule: PyTorch's own kernel, in the same dtype and on the same numbers, is the
yardstick; both are compared with PyTorch in float64 on the CPU.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from .. import nn as mmfast_nn
from ..accelerate import accelerate
from ..bench.cases import PASSES, AdversarialCase, modes
from ..dispatch import asked, use_backend
from ..numerics import ENOUGH, Comparison, Errors
from .mutants import Mutant, trial

NUMERICS, SECOND, SAME = "numerics", "double backward", "torch's own bits"
REPEATED, THREADS, GRADCHECK = "repeatability", "threads", "gradcheck"
MUTANT, TRAINING = "planted mutant", "training"
CHECKS = (SAME, NUMERICS, SECOND, GRADCHECK, REPEATED, THREADS, MUTANT, TRAINING)

#: a constant that is rounded once errs alike in all values of a draw, so that one large draw is still one sample
FEWEST_SEEDS = 16

#: so many times the seeds are drawn where fewer values than the rule asks for fail it
FURTHER = 16

#: a failure is pronounced on so many times the draws that it was first seen on: the values of a draw that is
#: ill-conditioned are large together, and their maximum is one sample, however many they are
AGAIN = 4

#: how a backend runs on a device
HOW = {
    ("cpu", "torch"): "PyTorch",
    ("cpu", "cpu"): "native",
    ("cpu", "triton"): "interpreted",
    ("cpu", "cuda"): "emulated",
    ("cuda", "torch"): "PyTorch",
    ("cuda", "triton"): "GPU",
    ("cuda", "cuda"): "GPU",
}

#: the upper ends of the histogram's bins, in ulp of the reference value; the last bin holds the rest
BINS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)

Named = list[tuple[str, Tensor]]


@dataclass(frozen=True)
class Subject:
    """What is under test."""

    case: Any
    backend: str
    dtype: torch.dtype
    device: str

    @property
    def how(self) -> str:
        return HOW[self.device, self.backend]

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass
class Row:
    """One line of the certificate."""

    check: str
    op: str
    case: str
    backend: str
    how: str
    dtype: str
    quantity: str
    passed: bool
    detail: str = ""
    count: int = 0
    pytorch: dict[str, float] = field(default_factory=dict)  # max, rms, ulp
    mmfast: dict[str, float] = field(default_factory=dict)
    share: float = 0.0  # of what the rule allows, the larger of max and rms
    histogram: dict[str, list[int]] = field(default_factory=dict)  # of errors in ulp, by BINS
    curves: dict[str, list[float]] = field(default_factory=dict)  # of training: the losses
    command: str = ""


class Trial:
    """One draw of weights and data: PyTorch's module, ours, and the float64 one, on the same numbers."""

    def __init__(self, subject: Subject, seed: int) -> None:
        self.subject = subject
        case, dtype, device = subject.case, subject.dtype, subject.device
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.theirs = case.build(torch.nn).to(device, dtype)
        self.exact = copy.deepcopy(self.theirs).to("cpu", torch.float64)
        self.ours = case.build(mmfast_nn).to(device, dtype)
        self.ours.load_state_dict(self.theirs.state_dict())
        self.ours = accelerate(self.ours)
        self.inputs = case.inputs(generator, dtype, device)
        self.states = case.initial(generator, dtype, device)
        with torch.no_grad():
            outputs = case.outputs(copy.deepcopy(self.theirs), *self.inputs, *self.states)
        self.cotangents = [torch.randn(y.shape, generator=generator).to(device, dtype) for y in outputs.values()]

    def by_pytorch(self, order: int = 1) -> Named:
        return self._quantities(self.theirs, order)

    def by_mmfast(self, order: int = 1) -> Named:
        with use_backend(self.subject.backend):
            return self._quantities(self.ours, order)

    def in_float64(self, order: int = 1) -> Named:
        return self._quantities(self.exact, order, lambda x: x.to("cpu", torch.float64))

    def _quantities(self, module: Any, order: int, cast: Callable[[Tensor], Tensor] = lambda x: x) -> Named:
        """Outputs and first-order gradients, or the second-order gradients of a penalty on the input's gradient."""
        inputs, states = ([cast(x.detach()).requires_grad_() for x in xs] for xs in (self.inputs, self.states))
        cotangents = [cast(x) for x in self.cotangents]
        outputs = self.subject.case.outputs(module, *inputs, *states)
        wanted = [("dx", x) for x in inputs] + [(f"d{name}_0", x) for name, x in zip("hc", states, strict=False)]
        if order == 2:
            slopes = torch.autograd.grad(list(outputs.values()), [x for _, x in wanted], cotangents, create_graph=True)
            outputs = {"penalty": torch.stack([slope.square().sum() for slope in slopes]).sum()}
            cotangents = [torch.ones_like(y) for y in outputs.values()]
        wanted += [(f"d{name}", weight) for name, weight in module.named_parameters()]
        found = torch.autograd.grad(list(outputs.values()), [x for _, x in wanted], cotangents, materialize_grads=True)
        gradients = [(name, x.detach()) for (name, _), x in zip(wanted, found, strict=True)]
        # a lone penalty, squares of 16-bit gradients summed, says nothing that its gradients do not
        return gradients if order == 2 else [*((name, y.detach()) for name, y in outputs.items()), *gradients]


class Pool:
    """One quantity's errors over the seeds, with their histograms."""

    def __init__(self, name: str) -> None:
        self.errors = Errors(name)
        self.counts = {who: torch.zeros(len(BINS) + 1, dtype=torch.int64) for who in ("mmfast", "pytorch")}
        self.mismatch = ""
        self.last = 0  # the draw that it is judged after, once that is known

    def add(self, ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
        try:
            self.errors.add(ours, theirs, exact)
        except AssertionError as differs:
            self.mismatch = str(differs)
            return
        for who, x in (("mmfast", ours), ("pytorch", theirs)):
            self.counts[who] += _bins(x, exact)

    @property
    def enough(self) -> bool:
        return self.errors.enough or bool(self.mismatch)

    def settled(self, drawn: int) -> bool:
        """Whether so many draws are all that it is judged on: decided once, for who stops where it passes passes."""
        if self.enough and not self.last:
            self.last = drawn if self.passes or self.mismatch else AGAIN * drawn
        return 0 < self.last <= drawn

    @property
    def passes(self) -> bool:
        return not self.mismatch and (self.errors.count == 0 or self.errors.compare().passes)

    def row(self, subject: Subject, check: str, quantity: str) -> Row:
        return self.fill(_row(subject, check, quantity, True))

    def fill(self, row: Row) -> Row:
        """The row with the figures and the verdict."""
        row.passed, row.detail = not self.mismatch, self.mismatch
        if self.errors.count == 0:
            return row
        found = self.errors.compare()
        row.passed = row.passed and found.passes
        row.detail = "; ".join(filter(None, [self.mismatch, *found.failures]))
        row.count, row.share = found.count, share(found)
        row.pytorch, row.mmfast = found.yardstick._asdict(), found.ours._asdict()
        row.histogram = {who: counts.tolist() for who, counts in self.counts.items()}
        return row


def share(found: Comparison) -> float:
    """The error as a share of what the rule allows: at most 1 passes."""
    pairs = ((found.ours.max, found.max_bound), (found.ours.rms, found.rms_bound))
    return max(error / bound if bound else float(error > 0) for error, bound in pairs)


def _bins(x: Tensor, exact: Tensor) -> Tensor:
    """How many errors are in each bin, (bins,) int64."""
    info = torch.finfo(x.dtype)
    exponent = torch.frexp(exact.abs().clamp(min=info.tiny)).exponent - 1
    step = torch.ldexp(torch.full_like(exact, info.eps), exponent)
    error = ((x.cpu().double() - exact).abs() / step).flatten()
    edges = torch.tensor(BINS, dtype=torch.float64)
    # right=False: an error equal to a bin's upper end is within it
    return torch.bincount(torch.bucketize(error[error.isfinite()], edges), minlength=len(BINS) + 1)


def _row(subject: Subject, check: str, quantity: str, passed: bool, detail: str = "") -> Row:
    where = (subject.case.op, subject.case.name, subject.backend, subject.how, subject.dtype_name)
    return Row(check, *where, quantity, passed, detail)


def refusals(subject: Subject) -> list[str]:
    """Why the backend cannot serve the case, or PyTorch itself cannot; empty where both can."""
    try:
        trial = Trial(subject, 0)
        with use_backend("torch"):
            choices = asked(lambda: trial._quantities(trial.ours, 1))
    except RuntimeError as error:
        return [f"PyTorch itself refuses: {str(error).splitlines()[0]}"]
    if subject.backend == "torch" and getattr(subject.case, "by_steps", False):
        return ["torch.nn has no such layer, whose bits could be compared"]
    if subject.backend != "torch" and not choices:
        return [f"no layer of it asks for a backend of {subject.case.op}"]
    reasons = []
    for op, case in choices:
        if subject.backend not in op.backends:
            reasons.append(f"{op.name} has no {subject.backend!r} backend")
        else:
            reasons += op.backends[subject.backend].refusals(case)
    return list(dict.fromkeys(reasons))


def numerics(subject: Subject, seeds: Sequence[int], order: int = 1) -> list[Row]:
    """A row for each output and gradient, its errors pooled over at least 16 seeds, and until there are 4096 values.

    A quantity that fails then is judged again after four times as many draws. Where the seeds end before there are
    4096 values of one and it fails, which may then be chance, up to 16 times as many seeds are drawn for it.
    """
    pools: dict[str, Pool] = {}
    for drawn, seed in enumerate(itertools.count(seeds[0]), 1):
        trial = Trial(subject, seed)
        found = zip(trial.by_mmfast(order), trial.by_pytorch(order), trial.in_float64(order), strict=True)
        for (name, ours), (_, theirs), (_, exact) in found:
            pool = pools.setdefault(name, Pool(name))
            if not pool.last or drawn <= pool.last:
                pool.add(ours, theirs, exact)
        if drawn >= min(FEWEST_SEEDS, len(seeds)):
            settled = [pool.settled(drawn) for pool in pools.values()]
            unsure = [pool for pool, done in zip(pools.values(), settled, strict=True) if not done]
            if not unsure or (drawn >= len(seeds) and all(not pool.last and pool.passes for pool in unsure)):
                break
        if drawn == FURTHER * len(seeds):
            break
    return [pool.row(subject, NUMERICS if order == 1 else SECOND, name) for name, pool in pools.items()]


def double_backward(subject: Subject, seeds: Sequence[int]) -> list[Row]:
    """The gradients of a penalty on the input's gradient; nothing for a loss whose second derivative is zero."""
    case = subject.case
    if isinstance(case, AdversarialCase) and PASSES[2] not in modes(case):
        return []
    return numerics(subject, seeds, order=2)


def repeatability(subject: Subject, seed: int) -> Row:
    """The same bits from the same numbers, twice."""
    trial = Trial(subject, seed)
    differing = _differing(trial.by_mmfast(), trial.by_mmfast())
    return _row(subject, REPEATED, "all", not differing, f"{differing} differ between two calls" * bool(differing))


def thread_independence(subject: Subject, seed: int) -> Row:
    """The same bits with one thread and with two.

    A gradient that torch's own matrix product makes may be rounded otherwise with another number of threads; it is then
    held to the rule with one thread too.
    """
    trial = Trial(subject, seed)
    with threads(1):
        alone = trial.by_mmfast()
        theirs = trial.by_pytorch()
    with threads(2):
        together = trial.by_mmfast()
    differing = _differing(alone, together)
    if not differing:
        return _row(subject, THREADS, "all", True, "same bits")
    breaking = [
        name
        for (name, x), (_, y), (_, exact) in zip(alone, theirs, trial.in_float64(), strict=True)
        if x.numel() >= ENOUGH and not _kept(name, x, y, exact)
    ]
    if breaking:
        return _row(subject, THREADS, "all", False, f"{', '.join(breaking)} break the rule with one thread")
    return _row(subject, THREADS, "all", True, f"{differing} within the rule: torch's products round otherwise")


def _kept(name: str, ours: Tensor, theirs: Tensor, exact: Tensor) -> bool:
    pool = Pool(name)
    pool.add(ours, theirs, exact)
    return not pool.mismatch and pool.errors.compare().passes


def torchs_own_bits(subject: Subject, seed: int) -> Row:
    """With backend="torch", torch.nn's own bits."""
    trial = Trial(subject, seed)
    differing = _differing(trial.by_mmfast(), trial.by_pytorch())
    return _row(subject, SAME, "all", not differing, f"{differing} differ from torch.nn's" * bool(differing))


def gradcheck(subject: Subject, seed: int) -> Row:
    """The gradients of a tiny float64 case against differences."""
    trial = Trial(subject, seed)
    weights = dict(trial.ours.named_parameters())

    def outputs(*given: Tensor) -> tuple[Tensor, ...]:
        return tuple(subject.case.outputs(trial.ours, *given[: len(given) - len(weights)]).values())

    given = [x.requires_grad_() for x in (*trial.inputs, *trial.states)]
    with use_backend(subject.backend):
        try:
            torch.autograd.gradcheck(outputs, (*given, *weights.values()), nondet_tol=0.0)
        except GradcheckError as error:
            return _row(subject, GRADCHECK, "all", False, str(error).splitlines()[0])
    return _row(subject, GRADCHECK, "all", True)


def caught(op: str, mutant: Mutant, mode: str, dtype: torch.dtype, seed: int) -> Row:
    """A planted bug, which passes this check if the rule fails it."""
    failures = trial(op, seed, dtype, mode, mutant)
    detail = failures[0] if failures else "the rule lets it pass"
    name = str(dtype).removeprefix("torch.")
    return Row(MUTANT, op, mode, "mutant", "planted", name, mutant.name, bool(failures), detail)


def _differing(a: Named, b: Named) -> str:
    names = (name for (name, x), (_, y) in zip(a, b, strict=True) if not torch.equal(x, y))
    return ", ".join(dict.fromkeys(names))


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Within this context torch uses so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
