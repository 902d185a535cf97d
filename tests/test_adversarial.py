"""The adversarial op: the same tests for every backend that can run here.

On a machine without a GPU these are PyTorch, the CPU kernel under each instruction set of the processor and the CUDA
kernel on the emulator; on one with a GPU the CUDA and Triton kernels on it as well. The Triton interpreter needs a
process of its own: test_triton_interpreter.py runs this file there, with TRITON_INTERPRET=1.
"""

import functools
import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import mmfast
from mmfast import native, numerics
from mmfast.ops.adversarial import equations
from mmfast.ops.adversarial.backends import OP, values_dtype
from mmfast.ops.adversarial.equations import MODES, Term
from mmfast.ops.adversarial.op import backward_op, forward_op, loss

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Served(NamedTuple):
    """A backend as tests ask for it: its name, the device of its tensors, and for the CPU its instruction set."""

    name: str
    device: str
    isa: str = ""

    @property
    def label(self) -> str:
        return f"{self.name}-{self.isa or self.device}"

    @property
    def dtypes(self) -> list[torch.dtype]:
        if self.name == "triton":
            return [torch.float32, torch.float16] + [torch.bfloat16] * (self.device == "cuda")
        return [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def _served() -> list[Served]:
    if INTERPRETED:
        return [Served("triton", "cpu")]
    served = [Served("torch", "cpu"), *(Served("cpu", "cpu", isa) for isa in native.supported_isas())]
    served.append(Served("cuda", "cpu"))
    if torch.cuda.is_available():
        served += [Served(name, "cuda") for name in ("torch", "cuda", "triton")]
    return served


SERVED = _served()
KERNELS = [served for served in SERVED if served.name != "torch"]
BEST = [served for served in SERVED if served.isa in ("", native.supported_isas()[-1])]
DEVICES = sorted({served.device for served in SERVED})


def by_backend(among, dtypes=None):
    """One parameter, (backend, dtype), for each dtype that the backend serves; (backend) alone without dtypes."""
    if dtypes is None:
        return pytest.mark.parametrize("served", among, ids=lambda served: served.label, indirect=True)
    # backends vary fastest, so that they share what a test computed once
    pairs = [(s, d) for d in dtypes for s in among if d in s.dtypes]
    ids = [f"{served.label}-{str(dtype).removeprefix('torch.')}" for served, dtype in pairs]
    return pytest.mark.parametrize(("served", "dtype"), pairs, ids=ids, indirect=["served"])


@pytest.fixture
def served(request):
    """The backend under test, under its instruction set."""
    before = native.isa()
    native.set_isa(request.param.isa or before)
    yield request.param
    native.set_isa(before)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """What torch.empty allocates starts as NaN, so an element that a kernel forgets is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def test_memory_is_poisoned():
    assert torch.empty(7).isnan().all()


LOW = (torch.float32, torch.float16, torch.bfloat16)
ALL = (*LOW, torch.float64)

# what each phi of a term stands for, as PyTorch users write it
PHI = {equations.SOFTPLUS: F.softplus, equations.SQUARE: Tensor.square, equations.RELU: F.relu}


class Pool:
    """Enough random rows of n logits for the rule, in lists of 66 with a cotangent each; the truth and the yardstick."""

    LIST = 66

    def __init__(self, seed: int, dtype: torch.dtype, mode: str, mean: bool, n: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        lists = -(-numerics.ENOUGH // self.LIST)
        self.mean = mean
        self.logits = (torch.randn(lists, self.LIST, n, generator=generator) * 3).to(dtype)
        self.cotangents = (torch.randn(lists, generator=generator) + 2).to(dtype)
        weights = (torch.rand(3, generator=generator, dtype=torch.float64) + 0.5).tolist()
        self.terms = [term._replace(weight=w) for term, w in zip(MODES[mode], weights, strict=True)]
        self.reference = self._formula(torch.float64)
        self.yardstick = self._formula(dtype)

    def _formula(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Values (lists, 66) and gradients, the k-th of a list by term k modulo 3, by PyTorch's functions in `dtype`."""
        logits = self.logits.to(dtype).requires_grad_()
        values = []
        for k, (phi, sign, shift, weight) in enumerate(self.terms):
            x = logits[:, k :: len(self.terms)]
            y = PHI.get(phi, Tensor.clone)(sign * x + shift)
            values.append(weight * (y.mean(-1) if self.mean else y.sum(-1)))
        values = torch.stack(values, -1).flatten(1)
        gradients = torch.autograd.grad(values, logits, self.cotangents.to(dtype)[:, None].expand_as(values))
        return values.detach(), gradients[0]

    def run(self, served: Served):
        """(total, values, gradients (66, n)) of each list, by the backend."""
        terms = self.terms * (self.LIST // len(self.terms))
        for rows, cotangent in zip(self.logits.to(served.device), self.cotangents.to(served.device), strict=True):
            logits = [x.requires_grad_() for x in rows.unbind()]
            total, values = loss(terms, self.mean, logits, served.name)
            yield total.detach(), values, torch.stack(torch.autograd.grad(total, logits, cotangent))


@functools.lru_cache(maxsize=2)
def pool(*arguments) -> Pool:
    return Pool(*arguments)


def check_total(total: Tensor, values: Tensor) -> None:
    """total is the values' sum, each value rounded at most once, and the total once more."""
    values = values.double().cpu()
    roundings = sum(0.5 * numerics.ulp(abs(value), torch.float32) for value in values.tolist())
    exact = float(values.sum())
    if abs(exact) < torch.finfo(total.dtype).max:
        assert abs(float(total) - exact) <= roundings + 0.5 * numerics.ulp(abs(exact), total.dtype)
    else:
        assert total.isinf()


@by_backend(KERNELS, LOW)
@pytest.mark.parametrize(
    ("mode", "mean", "n"),
    [(mode, True, n) for mode in MODES for n in (1, 63, 129)] + [(mode, False, 63) for mode in MODES],
    ids=lambda value: {True: "mean", False: "sum"}[value] if isinstance(value, bool) else None,
)
def test_numerics(request, served, dtype, mode, mean, n):
    drawn = pool(request.config.option.seed, dtype, mode, mean, n)
    values, gradients = numerics.Errors("values"), numerics.Errors("dlogits")
    for k, (total, ours, dlogits) in enumerate(drawn.run(served)):
        check_total(total, ours)
        values.add(ours.cpu(), drawn.yardstick[0][k].to(ours.dtype), drawn.reference[0][k])
        gradients.add(dlogits.cpu(), drawn.yardstick[1][k], drawn.reference[1][k])
    values.check()
    gradients.check()
