"""A user's own model with and without `accelerate`: outputs, every gradient, whom to blame, and N steps of training."""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..accelerate import accelerate
from ..bench.models import UserCase, floating, from_name, wobbled
from .checks import NUMERICS, TRAINING, Named, Pool, Row
from .schedule import Outcome

OP = "model"

#: a module alone is blamed at once beyond so many times what the rule allows, which few values may exceed by chance
BLAMED = 4.0

#: the most draws that are pooled: a bias has few values, and the rule wants many
DRAWS = 16

#: steps of training may differ by so many times what one rounding of PyTorch's own weights makes of them
CHAOS = 4.0


class Rivals:
    """The model as it is, accelerated, and in float64, on one sample."""

    def __init__(self, case: UserCase, dtype: torch.dtype, device: str, seed: int) -> None:
        self.case, self.dtype, self.device = case, dtype, device
        self.generator = torch.Generator().manual_seed(seed)
        self.theirs = copy.deepcopy(case.module).to(device, dtype)
        self.exact = copy.deepcopy(self.theirs).to("cpu", torch.float64)
        self.ours = accelerate(copy.deepcopy(self.theirs))
        self.sample = [_cast(x, device, dtype) for x in case.sample]
        self.seed = seed

    def cotangents(self) -> list[Tensor]:
        """A random direction for every output."""
        with torch.no_grad():
            outputs = floating(self.called(copy.deepcopy(self.theirs), self.sample))
        return [torch.randn(y.shape, generator=self.generator).to(self.device, self.dtype) for y in outputs]

    def called(self, module: torch.nn.Module, sample: Sequence[Tensor]) -> Any:
        """The module's output, with the same random numbers (dropout) for whoever is called."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return module(*sample)

    def quantities(self, module: torch.nn.Module, cotangents: Sequence[Tensor], exact: bool = False) -> Named:
        """Outputs, and the gradients of the inputs and of every parameter."""
        place = ("cpu", torch.float64) if exact else (self.device, self.dtype)
        sample = [_cast(x.detach(), *place) for x in self.sample]
        inputs = [x.requires_grad_() for x in sample if x.is_floating_point()]
        outputs = floating(self.called(module, sample))
        wanted = [(f"d input {i}", x) for i, x in enumerate(inputs)]
        wanted += [(f"d {name}", weight) for name, weight in module.named_parameters() if weight.requires_grad]
        directions = [x.to(*place) for x in cotangents]
        differentiable = [(y, d) for y, d in zip(outputs, directions, strict=True) if y.requires_grad]
        found = torch.autograd.grad(
            [y for y, _ in differentiable],
            [x for _, x in wanted],
            [d for _, d in differentiable],
            materialize_grads=True,
        )
        named = [(f"output {i}", y.detach()) for i, y in enumerate(outputs)]
        return [*named, *((name, x) for (name, _), x in zip(wanted, found, strict=True))]


def _cast(x: Tensor, device: str, dtype: torch.dtype) -> Tensor:
    return x.to(device, dtype) if x.is_floating_point() else x.to(device)


@dataclass
class ModelCheck:
    """Every check of a user's model in a dtype."""

    rivals: Rivals
    model: str
    input: str
    dtype: str
    steps: int | None

    @property
    def label(self) -> str:
        return " ".join(self.group)

    @property
    def group(self) -> tuple[str, ...]:
        return self.model, self.dtype

    def __call__(self) -> Outcome:
        rows = compared(self.rivals)
        if self.steps:
            rows.append(trained(self.rivals, self.steps))
        command = f"mmfast validate --model {self.model} --input {self.input} --dtype {self.dtype}"
        for row in rows:
            row.command = f"{command} --seed {self.rivals.seed}{f' --steps {self.steps}' * bool(self.steps)}"
        return rows, []


def plan(args: argparse.Namespace) -> list[ModelCheck]:
    """The tasks of `mmfast validate --model`. ValueError for what cannot be loaded."""
    from .command import DTYPES, _device

    case = from_name(args.model, args.input)
    if not isinstance(case, UserCase):
        raise ValueError(f"--model {args.model}: give your own model as package.module:function")
    device = _device(args)
    return [
        ModelCheck(Rivals(case, DTYPES[dtype], device, args.seed), args.model, args.input, dtype, args.steps)
        for dtype in args.dtype or ("float32",)
    ]


def compared(rivals: Rivals) -> list[Row]:
    """A row per output and gradient, pooled over draws of data and directions until there are 4096 values or 16 draws.

    Where one fails, its row names the first module whose own result or gradients break the rule.
    """
    pools: dict[str, Pool] = {}
    for _ in range(DRAWS):
        cotangents = rivals.cotangents()
        found = zip(
            rivals.quantities(rivals.ours, cotangents),
            rivals.quantities(rivals.theirs, cotangents),
            rivals.quantities(rivals.exact, cotangents, exact=True),
            strict=True,
        )
        for (name, ours), (_, theirs), (_, exact) in found:
            pools.setdefault(name, Pool(name)).add(ours, theirs, exact)
        if all(pool.enough for pool in pools.values()):
            break
        rivals.sample = rivals.case.inputs(rivals.generator, rivals.dtype, rivals.device)
    rows = [pool.fill(_row(rivals, NUMERICS, name)) for name, pool in pools.items()]
    if not all(row.passed for row in rows):
        culprit = blamed(rivals)
        for row in rows:
            if not row.passed:
                row.detail += f"; the first module that differs on its own: {culprit or 'none alone'}"
    return rows


def _judged(rivals: Rivals, name: str, ours: Tensor, theirs: Tensor, exact: Tensor) -> Row:
    pool = Pool(name)
    pool.add(ours, theirs, exact)
    return pool.fill(_row(rivals, NUMERICS, name))


def _row(rivals: Rivals, check: str, quantity: str) -> Row:
    return Row(check, OP, rivals.case.name, "accelerate", rivals.device, _name(rivals.dtype), quantity, True)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def blamed(rivals: Rivals) -> str:
    """The path of the first module that, given what PyTorch's got, breaks the rule; empty where none does.

    Every module of the accelerated model is called alone on the inputs that its twin had in the plain model, in the
    order in which the twins returned: a module is blamed for itself, not for what it was fed, and nobody listens
    between modules that are fused.
    """
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
    handles = [
        module.register_forward_hook(
            lambda _m, args, kwargs, _out, path=path: calls.append((path, _detached(args), _detached(kwargs))),
            with_kwargs=True,
        )
        for path, module in rivals.theirs.named_modules()
        if path
    ]
    try:
        rivals.called(rivals.theirs, rivals.sample)
    finally:
        for handle in handles:
            handle.remove()
    worst, culprit = 1.0, ""
    for path, args, kwargs in calls:
        share = _alone(rivals, path, args, kwargs)
        if share > worst:
            worst, culprit = share, f"{path} ({type(rivals.ours.get_submodule(path)).__name__})"
        if share > BLAMED:
            break
    return culprit


def _alone(rivals: Rivals, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """The worst share of what the rule allows, in outputs and gradients of the module at `path`, called alone."""
    results = []
    directions: list[Tensor] = []
    for model, place in (
        (rivals.theirs, (rivals.device, rivals.dtype)),
        (rivals.ours, (rivals.device, rivals.dtype)),
        (rivals.exact, ("cpu", torch.float64)),
    ):
        module = model.get_submodule(path)
        given, named = _moved((args, kwargs), *place)
        leaves = [x.requires_grad_() for x in floating([*given, named])]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rivals.seed)
            outputs = floating(module(*given, **named))
        if not directions:
            directions = [torch.randn(y.shape, generator=rivals.generator) for y in outputs]
        wanted = [*leaves, *(weight for weight in module.parameters() if weight.requires_grad)]
        pairs = [(y, d.to(*place)) for y, d in zip(outputs, directions, strict=True) if y.requires_grad]
        grads = (
            torch.autograd.grad([y for y, _ in pairs], wanted, [d for _, d in pairs], materialize_grads=True)
            if wanted and pairs
            else ()
        )
        results.append([x.detach() for x in (*outputs, *grads)])
    theirs, ours, exact = results
    rows = [_judged(rivals, path, a, b, c) for a, b, c in zip(ours, theirs, exact, strict=True)]
    return max((math.inf if not row.count and not row.passed else row.share for row in rows), default=0.0)


def _detached(value: Any) -> Any:
    return _mapped(value, lambda x: x.detach().clone())


def _moved(value: Any, device: str, dtype: torch.dtype) -> Any:
    return _mapped(value, lambda x: _cast(x.detach().clone(), device, dtype))


def _mapped(value: Any, change: Any) -> Any:
    """The same nest of tuples, lists, dicts and packed sequences with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, torch.nn.utils.rnn.PackedSequence):
        return value._replace(data=change(value.data))
    if isinstance(value, dict):
        return {name: _mapped(part, change) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [_mapped(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def trained(rivals: Rivals, steps: int) -> Row:
    """N steps of Adam towards random targets, with and without accelerate, and once more from weights one rounding off.

    Training is chaotic: two correct runs drift apart. How far PyTorch drifts from itself when its weights are moved by
    one rounding is the yardstick; accelerate may drift CHAOS times as far.
    """
    moved = wobbled(rivals.theirs, rivals.generator)
    targets = rivals.cotangents()
    plain, ours, other = (
        _losses(rivals, copy.deepcopy(module), targets, steps) for module in (rivals.theirs, rivals.ours, moved)
    )
    floor = torch.finfo(rivals.dtype).eps * max(abs(loss) for loss in plain)
    drift = max(abs(a - b) for a, b in zip(ours, plain, strict=True))
    allowed = CHAOS * max(floor, *(abs(a - b) for a, b in zip(other, plain, strict=True)))
    finite = all(math.isfinite(loss) for loss in ours)
    detail = f"loss {plain[0]:.6g} to {plain[-1]:.6g}, with accelerate to {ours[-1]:.6g}; apart by {drift:.2g} at most"
    row = _row(rivals, TRAINING, f"{steps} losses")
    row.passed, row.detail = finite and drift <= allowed, f"{detail}, allowed {allowed:.2g}"
    row.count, row.share = steps, drift / allowed if allowed else 0.0
    row.curves = {"pytorch": plain, "mmfast": ours}
    return row


def _losses(rivals: Rivals, module: torch.nn.Module, targets: Sequence[Tensor], steps: int) -> list[float]:
    optimizer = torch.optim.Adam([weight for weight in module.parameters() if weight.requires_grad], lr=1e-3)
    losses = []
    for _ in range(steps):
        outputs = floating(rivals.called(module, rivals.sample))
        loss = torch.stack([(y - t).float().square().mean() for y, t in zip(outputs, targets, strict=True)]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
