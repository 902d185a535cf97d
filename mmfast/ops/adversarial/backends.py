"""The adversarial op's backends: refusals, preference, and the call.

`forward(terms, mean, logits)` gives (total (), values (K,)): total in the logits' dtype, values in float32 (float64 for
float64 logits). `backward(dtotal, terms, mean, logits)` gives the gradient of each tensor of logits, in its layout.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import types
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import native
from ...dispatch import Backend, GpuBackend, Op, TorchBackend
from . import equations
from .equations import Term


class Case(NamedTuple):
    """The static facts a choice depends on."""

    device: str
    dtype: torch.dtype


def values_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the terms' values for logits of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_outputs(logits: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Unwritten (total, values) for these logits; also the op's fake."""
    x = logits[0]
    return x.new_empty(()), x.new_empty(len(logits), dtype=values_dtype(x.dtype))


class Torch(TorchBackend):
    """The formula as PyTorch users write it."""

    def forward(self, terms: Sequence[Term], mean: bool, logits: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        values = equations.values(terms, mean, logits)
        total = values[0]
        for value in values[1:]:
            total = total + value
        return total, torch.stack(values).to(values_dtype(total.dtype))

    def backward(self, dtotal: Tensor, terms: Sequence[Term], mean: bool, logits: Sequence[Tensor]) -> list[Tensor]:
        return equations.gradient(dtotal, terms, mean, logits)


class Cpu(Backend):
    """csrc/cpu/adversarial.cpp"""

    name = "cpu"

    def refusals(self, case: Case) -> list[str]:
        refusals = [] if native.available() else [native.load_error()]
        if case.device != "cpu":
            refusals.append(f"the logits are on {case.device} (supported: cpu)")
        if case.dtype not in native.DTYPES:
            refusals.append(f"the logits are {case.dtype} (supported: float32, float64, float16, bfloat16)")
        return refusals

    def reluctance(self, case: Case) -> str:
        return ""

    def forward(self, terms: Sequence[Term], mean: bool, logits: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        total, values = empty_outputs(logits)
        native.cpu_adversarial_forward(terms, mean, values, total, [_dense(x) for x in logits])
        return total, values

    def backward(self, dtotal: Tensor, terms: Sequence[Term], mean: bool, logits: Sequence[Tensor]) -> list[Tensor]:
        logits = [_dense(x) for x in logits]
        dlogits = [torch.empty_like(x) for x in logits]
        native.cpu_adversarial_backward(terms, mean, dtotal.contiguous(), logits, dlogits)
        return dlogits


class Cuda(GpuBackend):
    """csrc/cuda/adversarial.cu, on a CUDA device; on CPU tensors in the emulator."""

    name = "cuda"

    def refusals(self, case: Case) -> list[str]:
        refusals = native.cuda_refusals(case.device)
        if case.dtype not in native.DTYPES:
            refusals.append(f"the logits are {case.dtype} (supported: float32, float64, float16, bfloat16)")
        return refusals

    def forward(self, terms: Sequence[Term], mean: bool, logits: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        total, values = empty_outputs(logits)
        scratch = total.new_empty(native.adversarial_scratch(logits), dtype=torch.float64)
        native.cuda_adversarial_forward(terms, mean, values, total, scratch, [_dense(x) for x in logits])
        return total, values

    def backward(self, dtotal: Tensor, terms: Sequence[Term], mean: bool, logits: Sequence[Tensor]) -> list[Tensor]:
        logits = [_dense(x) for x in logits]
        dlogits = [torch.empty_like(x) for x in logits]
        native.cuda_adversarial_backward(terms, mean, dtotal.contiguous(), logits, dlogits)
        return dlogits


class Triton(GpuBackend):
    """triton_kernels.py, on a CUDA device; on CPU tensors in Triton's interpreter."""

    name = "triton"

    def refusals(self, case: Case) -> list[str]:
        kernels, error = _triton_kernels()
        if kernels is None:
            return [error]
        refusals = []
        interpreted = not hasattr(kernels.forward_kernel, "warmup")
        if case.device == "cpu" and not interpreted:
            refusals.append("the logits are on cpu, where Triton needs TRITON_INTERPRET=1, set before it is imported")
        if case.device not in ("cpu", "cuda"):
            refusals.append(f"the logits are on {case.device} (supported: cuda, and cpu in Triton's interpreter)")
        if case.device == "cuda" and interpreted:
            refusals.append("TRITON_INTERPRET=1 is set, so Triton compiles nothing in this process")
        # arithmetic on bfloat16 is wrong in the interpreter
        dtypes = [torch.float32, torch.float16] + [torch.bfloat16] * (not interpreted)
        if case.dtype not in dtypes:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            refusals.append(f"the logits are {case.dtype} (supported: {names})")
        return refusals

    def forward(self, terms: Sequence[Term], mean: bool, logits: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        total, values = empty_outputs(logits)
        with _on_device(total):
            _triton_kernels()[0].forward(terms, mean, [_dense(x) for x in logits], total, values)
        return total, values

    def backward(self, dtotal: Tensor, terms: Sequence[Term], mean: bool, logits: Sequence[Tensor]) -> list[Tensor]:
        logits = [_dense(x) for x in logits]
        dlogits = [torch.empty_like(x) for x in logits]
        with _on_device(dtotal):
            _triton_kernels()[0].backward(dtotal.contiguous(), terms, mean, logits, dlogits)
        return dlogits


@functools.cache
def _triton_kernels() -> tuple[types.ModuleType, str] | tuple[None, str]:
    # only a call that considers Triton imports it: that takes longer than the rest of mmfast
    try:
        return importlib.import_module(".triton_kernels", __package__), ""
    except ImportError as error:
        return None, f"Triton could not be imported ({error})"


def _on_device(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _dense(x: Tensor) -> Tensor:
    """x itself where its elements fill one block of memory, whatever their order; else a contiguous copy."""
    if x.is_contiguous():
        return x
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1 and stride != expected:
            return x.contiguous()
        expected *= size
    return x


OP = Op("adversarial", Case, [Cpu(), Cuda(), Triton(), Torch()])
