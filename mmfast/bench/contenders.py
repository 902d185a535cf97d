"""Who competes on a case: equal weights, equal data, equal precision; and the float64 truth they are checked against.

PyTorch runs twice under two names, and how far the two differ is the noise; where another memory format may serve it
better, it runs in that too. mmfast runs as a user gets it (its own choice of backend), and once for each backend, but
for a whole model's step, which is long.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import nn as mmfast_nn
from ..accelerate import accelerate
from ..dispatch import Op, asked, use_backend
from .cases import PASSES, STEP, ConvTransposeCase
from .models import wobbled

EAGER, AGAIN, CHANNELS_LAST, COMPILED = "eager", "eager again", "eager channels_last", "compile"
OURS, OURS_COMPILED = "mmfast", "mmfast compiled"

#: backends that run on a device as they would in training: neither interpreted nor emulated
NATIVE = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}

#: inputs are rotated over this many bytes, which no cache holds, but over at most so many sets
ROTATED_BYTES = 64 << 20
MOST_SETS = 64

#: runs of PyTorch from weights one rounding off that say how far a model's results jump
NEAR_MISSES = 8

Results = list[Tensor]
Inputs = list[Tensor]


class Contender:
    """One way to compute a case: `call(i)` computes it on the i-th set of inputs.

    backend: what mmfast is told to use while it runs; None for its own choice and for rivals.
    """

    def __init__(
        self,
        name: str,
        compute: Callable[[Inputs], Results],
        sets: Sequence[Inputs],
        backend: str | None = None,
    ) -> None:
        self.name = name
        self.compute = compute
        self.sets = sets
        self.backend = backend
        self.first = 0.0  # seconds of the first call, compilation included

    @property
    def is_ours(self) -> bool:
        return self.name.startswith(OURS)

    def call(self, i: int) -> Results:
        return self.compute(self.sets[i % len(self.sets)])

    def forced(self) -> contextlib.AbstractContextManager[None]:
        """The context in which it runs."""
        return use_backend(self.backend) if self.backend else contextlib.nullcontext()


class Bout:
    """One case and one of its modes, with PyTorch's module, at most `most` sets of inputs, and what float64 makes of
    them."""

    def __init__(
        self, case: Any, mode: str, dtype: torch.dtype, device: str, seed: int = 0, most: int = MOST_SETS
    ) -> None:
        self.case, self.mode, self.dtype, self.device = case, mode, dtype, device
        self.generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.module: torch.nn.Module = case.build(torch.nn).to(device, dtype)
        self.exact = copy.deepcopy(self.module).to("cpu", torch.float64)
        self.sets = self._input_sets(most)
        self.cotangent = self._cotangent()
        self._truths: dict[int, tuple[Results, Results]] = {}

    def contenders(self, compiled: str = "training") -> Iterator[Contender]:
        """All of them. compiled: torch.compile of PyTorch's module in "training" (forward + backward) or in "all"
        passes; of "both" modules in all passes; or of "none"."""
        compiling = self.mode == "forward+backward" or (self.mode == "forward" and compiled != "training")
        yield Contender(EAGER, self.computation(self.module), self.sets)
        yield Contender(AGAIN, self.computation(self.module), self.sets)
        layout = self._other_layout()
        if layout is not None:
            module = copy.deepcopy(self.module).to(memory_format=layout)  # type: ignore[call-overload]
            sets = [self._with_layout(inputs, layout) for inputs in self.sets]
            yield Contender(CHANNELS_LAST, self.computation(module), sets)
        if compiling and compiled != "none":
            torch.compiler.reset()
            yield Contender(COMPILED, self.computation(copy.deepcopy(self.module), compiled=True), self.sets)
        module = self.ours()
        compute = self.computation(module)
        yield Contender(OURS, compute, self.sets)
        if compiling and compiled == "both":
            yield Contender(OURS_COMPILED, self.computation(self.ours(), compiled=True), self.sets)
        for backend in self.backends(compute) if self.mode != STEP else ():
            yield Contender(f"{OURS} {backend}", compute, self.sets, backend)

    def ours(self) -> torch.nn.Module:
        """mmfast's module with PyTorch's weights and everything fused that mmfast fuses."""
        module = self.case.build(mmfast_nn).to(self.device, self.dtype)
        module.load_state_dict(self.module.state_dict())
        return accelerate(module)

    def asked(self, compute: Callable[[Inputs], Results]) -> list[tuple[Op, Any]]:
        """What mmfast was asked to choose a backend for while it computed: ops and their static facts."""
        return asked(lambda: compute(self.sets[0]))

    def backends(self, compute: Callable[[Inputs], Results]) -> list[str]:
        """The backends that can serve all of it on this device."""
        choices = self.asked(compute)
        return [
            name
            for name in NATIVE[self.device]
            if choices and all(name in op.backends and not op.backends[name].refusals(case) for op, case in choices)
        ]

    def computation(
        self, module: torch.nn.Module, *, compiled: bool = False, exact: bool = False
    ) -> Callable[[Inputs], Results]:
        """What is timed: from a set of inputs to all results. exact: in float64 on the CPU."""
        case, mode = self.case, self.mode
        if mode == STEP:
            return lambda inputs: case.step(module, inputs)
        run = torch.compile(lambda *xs: case.run(module, *xs)) if compiled else lambda *xs: case.run(module, *xs)
        if mode == "forward":
            module = module.eval()
            return lambda inputs: _forward(run, inputs)
        weights = [weight for weight in module.parameters() if weight.requires_grad]
        cotangent = self.cotangent.to("cpu", torch.float64) if exact else self.cotangent
        derive = _first_order if mode == "forward+backward" else _second_order
        return lambda inputs: derive(run, inputs, weights, cotangent)

    def truth(self, i: int) -> tuple[Results, Results]:
        """(PyTorch's results, float64 results) on the i-th set of inputs."""
        i %= len(self.sets)
        if i not in self._truths:
            yardstick = detached(self.computation(self.module)(self.sets[i]))
            exact = [self._exact(x) for x in self.sets[i]]
            self._truths[i] = yardstick, detached(self.computation(self.exact, exact=True)(exact))
        return self._truths[i]

    def near_misses(self, i: int) -> list[Results]:
        """PyTorch's results on the i-th set of inputs from weights that are moved by one rounding, some times over."""
        generator = torch.Generator().manual_seed(i)
        inputs = self.sets[i % len(self.sets)]
        return [detached(self.computation(wobbled(self.module, generator))(inputs)) for _ in range(NEAR_MISSES)]

    def refill(self, contenders: Sequence[Contender], i: int) -> None:
        """Puts fresh numbers where the i-th set's are, in the same memory, on a GPU behind work that lasts."""
        fresh = self._inputs()
        if self.device == "cuda":
            torch.cuda._sleep(20_000_000)
        with torch.no_grad():
            for sets in {id(c.sets): c.sets for c in contenders}.values():
                for old, new in zip(sets[i], fresh, strict=True):
                    old.copy_(new)
        self._truths.pop(i, None)

    def _input_sets(self, most: int) -> list[Inputs]:
        first = self._inputs()
        # a step's own weights and activations fill the caches, and float64 takes long for each set
        count = 2 if self.mode == STEP else ROTATED_BYTES // max(1, sum(x.nbytes for x in first))
        return [first, *(self._inputs() for _ in range(max(1, min(count, most) - 1)))]

    def _inputs(self) -> Inputs:
        inputs = self.case.inputs(self.generator, self.dtype, self.device)
        return [self._leaf(x) for x in inputs]

    def _leaf(self, x: Tensor) -> Tensor:
        return x.requires_grad_(x.is_floating_point() and self.mode in PASSES[1:])

    def _exact(self, x: Tensor) -> Tensor:
        x = x.detach().cpu()
        return self._leaf(x.double() if x.is_floating_point() else x)

    def _with_layout(self, inputs: Inputs, layout: torch.memory_format) -> Inputs:
        return [self._leaf(x.detach().to(memory_format=layout)) for x in inputs]

    def _cotangent(self) -> Tensor:
        """What the output's gradient is taken along."""
        if self.mode not in PASSES[1:]:
            return torch.empty(0)
        with torch.no_grad():
            y = self.case.run(copy.deepcopy(self.module), *self.sets[0])
        return torch.randn(y.shape, generator=self.generator).to(y.device, y.dtype)

    def _other_layout(self) -> torch.memory_format | None:
        if not isinstance(self.case, ConvTransposeCase) or len(self.case.size) == 1:
            return None
        return torch.channels_last if len(self.case.size) == 2 else torch.channels_last_3d


def detached(results: Sequence[Tensor]) -> Results:
    """Copies of the results, out of reach of whoever made them."""
    return [x.detach().clone() for x in results]


def _forward(run: Callable[..., Tensor], inputs: Inputs) -> Results:
    with torch.no_grad():
        return [run(*inputs)]


def _first_order(run: Callable[..., Tensor], inputs: Inputs, weights: Sequence[Tensor], cotangent: Tensor) -> Results:
    y = run(*inputs)
    wanted = [x for x in (*inputs, *weights) if x.requires_grad]
    return [y, *torch.autograd.grad(y, wanted, cotangent)]


def _second_order(run: Callable[..., Tensor], inputs: Inputs, weights: Sequence[Tensor], cotangent: Tensor) -> Results:
    """The gradient of a gradient penalty on the inputs, as R1 and WGAN-GP take it."""
    wanted = [x for x in inputs if x.requires_grad]
    slopes = torch.autograd.grad(run(*inputs), wanted, cotangent, create_graph=True)
    penalty = torch.stack([slope.square().sum() for slope in slopes]).sum()
    return [penalty, *torch.autograd.grad(penalty, [*wanted, *weights], materialize_grads=True)]
