"""The adversarial op's backends: refusals, preference, and the call.

`forward(terms, mean, inputs, values_wanted)` gives (total (), values (K,) or None, state (2, K) or None); op.py says
more. `backward(dtotal, terms, mean, inputs, state, needed)` gives the gradients by the logits and then by the others
that are needed, each in the layout of its tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import native
from ...dispatch import Backend, GpuBackend, Op, TorchBackend
from .. import portable
from . import equations
from .equations import Inputs, Term, Terms, values_dtype


class Case(NamedTuple):
    """The static facts a choice depends on.

    reduced: whether elements are reduced to a mean or a sum; traced: whether the call becomes part of a compiled graph.
    """

    device: str
    dtype: torch.dtype
    reduced: bool = True
    traced: bool = False


Outputs = tuple[Tensor, Tensor | None, Tensor | None]
Gradients = list[Tensor | None]

#: So many elements cost less than a call does.
_FEW = 4096


def empty_outputs(inputs: Inputs, values_wanted: bool) -> Outputs:
    """Unwritten (total, values, state), but for centres that are given; also the op's fake, which has them all."""
    x = inputs.logits[0]
    # one function of torch's and not two, and the one that costs least
    total = torch.empty((), dtype=x.dtype, device=x.device)
    if not values_wanted and not inputs.peers:
        return total, None, None
    dtype, count = values_dtype(x.dtype), len(inputs.logits)
    values = x.new_empty(count, dtype=dtype) if values_wanted else None
    state = None
    if inputs.peers:
        state = x.new_empty((2, count), dtype=dtype)
        if inputs.centres is not None:
            state[1].copy_(inputs.centres)
    return total, values, state


def empty_gradients(inputs: Inputs, needed: Sequence[bool]) -> Gradients:
    """Unwritten gradients by the logits and then by the others; None where one is not needed."""
    tensors = (*inputs.logits, *inputs.others) if inputs.others else inputs.logits
    return [torch.empty_like(x) if need else None for x, need in zip(tensors, needed, strict=True)]


class Torch(TorchBackend):
    """The formula as PyTorch users write it."""

    def forward(self, terms: Terms, mean: bool, inputs: Inputs, values_wanted: bool) -> Outputs:
        values = equations.values(terms, mean, inputs)
        total = equations.add_up(values)
        dtype = values_dtype(total.dtype)
        state = None
        if inputs.peers:
            centres = equations.means(inputs) if inputs.centres is None else inputs.centres
            slopes = equations.slopes(terms, mean, inputs._replace(centres=centres))
            state = torch.stack([slopes.to(dtype), centres.to(dtype)])
        return total, torch.stack(values).to(dtype), state

    def backward(
        self, dtotal: Tensor, terms: Terms, mean: bool, inputs: Inputs, state: Tensor | None, needed: Sequence[bool]
    ) -> list[Tensor]:
        slopes = None
        if state is not None:
            slopes, centres = state.unbind()
            inputs = inputs._replace(centres=centres)
        found = equations.gradient(dtotal, terms, mean, inputs, slopes)
        return [g for g, need in zip(found, needed, strict=True) if need]


class Cpu(Backend):
    """csrc/cpu/adversarial.cpp"""

    name = "cpu"

    def refusals(self, case: Case) -> list[str]:
        return native.cpu_refusals("the logits are", case.device, case.dtype) + unreduced(case)

    def reluctance(self, case: Case) -> str:
        # forward + backward of 64 / 57,600 / 4 million logits, AVX-512, 1 thread: 0.52 / 0.56 / 0.95 of LSGAN's formula
        # compiled, 0.52 / 1.15 / 2.34 of non-saturating's
        return "in a compiled graph Inductor's own loops are faster for few logits" if case.traced else ""

    def forward(self, terms: Terms, mean: bool, inputs: Inputs, values_wanted: bool) -> Outputs:
        return self.forward_with_gradients(terms, mean, inputs, values_wanted, ())[0]

    def forward_with_gradients(
        self, terms: Terms, mean: bool, inputs: Inputs, values_wanted: bool, needed: Sequence[bool]
    ) -> tuple[Outputs, Gradients]:
        """(outputs, the total's gradients that are needed, with None for others; or [] where they are left for later).

        Those that need the logits are computed while these are read.
        """
        inputs = dense(inputs)
        outputs = empty_outputs(inputs, values_wanted)
        gradients: Gradients = []
        # 16-bit gradients would be rounded before they are scaled, and again after it
        if needed and inputs.logits[0].dtype.itemsize > 2 and are_read(terms, inputs.logits[0]):
            gradients = empty_gradients(inputs, needed)
        native.cpu_adversarial_forward(terms, mean, inputs, *outputs, gradients)
        return outputs, gradients

    def backward(
        self, dtotal: Tensor, terms: Terms, mean: bool, inputs: Inputs, state: Tensor | None, needed: Sequence[bool]
    ) -> list[Tensor]:
        inputs = dense(inputs)
        gradients = empty_gradients(inputs, needed)
        native.cpu_adversarial_backward(terms, mean, inputs, dtotal, state, gradients)
        return [g for g in gradients if g is not None]


def are_read(terms: Terms, x: Tensor) -> bool:
    """Whether gradients need the logits, or these are so few that it does not matter.

    Others, Wasserstein's, wait for the backward: a forward alone is then as fast as PyTorch's.
    """
    return x.numel() <= _FEW or any(term.phi != equations.IDENTITY for term in terms)


def unreduced(case: Case) -> list[str]:
    """The refusal of a kernel, all of which reduce, where the elements are wanted."""
    return [] if case.reduced else ["reduction='none' was asked for (supported: 'mean', 'sum')"]


def dense(inputs: Inputs) -> Inputs:
    """The inputs, each tensor one block of memory, and tensors that meet elementwise in one order of elements."""
    logits, others, weights, centres, peers = inputs
    if not weights:
        for x in logits:
            if not x.is_contiguous():
                break
        else:
            for x in others:
                if not x.is_contiguous():
                    break
            else:
                return inputs
    if others:
        parts = [w.numel() for w in weights] or [1] * len(logits)
        pairs = [_alike(*tensors) for tensors in zip(logits, others, parts, strict=True)]
        logits, others = zip(*pairs, strict=True)
    elif weights:
        logits = [x.contiguous() for x in logits]
    else:
        logits = [x if x.is_contiguous() else _dense(x) for x in logits]
    return Inputs(logits, others, [w.contiguous() for w in weights] if weights else (), centres, peers)


def _alike(x: Tensor, other: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Both in one order of elements, in which each of `parts` weights is one block's."""
    if x.is_contiguous() and other.is_contiguous():
        return x, other
    alike = x.stride() == other.stride() and _dense(x) is x
    # samples are blocks where the first dimension is the outermost: channels_last
    if alike and (parts <= 1 or x.stride(0) * len(x) == x.numel()):
        return x, other
    return x.contiguous(), other.contiguous()


class Cuda(GpuBackend):
    """csrc/cuda/adversarial.cu, on a CUDA device; on CPU tensors in the emulator."""

    name = "cuda"

    def refusals(self, case: Case) -> list[str]:
        refusals = native.cuda_refusals(case.device) + native.dtype_refusals("the logits are", case.dtype)
        return refusals + unreduced(case)

    def forward(self, terms: Terms, mean: bool, inputs: Inputs, values_wanted: bool) -> Outputs:
        inputs = dense(inputs)
        outputs = empty_outputs(inputs, values_wanted)
        scratch = outputs[0].new_empty(native.adversarial_scratch(inputs.logits, True), dtype=torch.float64)
        native.cuda_adversarial_forward(terms, mean, inputs, *outputs, scratch)
        return outputs

    def backward(
        self, dtotal: Tensor, terms: Terms, mean: bool, inputs: Inputs, state: Tensor | None, needed: Sequence[bool]
    ) -> list[Tensor]:
        inputs = dense(inputs)
        gradients = empty_gradients(inputs, needed)
        scratch = dtotal.new_empty(native.adversarial_scratch(inputs.logits, False), dtype=torch.float64)
        native.cuda_adversarial_backward(terms, mean, inputs, dtotal, state, gradients, scratch)
        return [g for g in gradients if g is not None]


class Triton(GpuBackend):
    """triton_kernels.py, on a CUDA device; on CPU tensors in Triton's interpreter."""

    name = "triton"

    def refusals(self, case: Case) -> list[str]:
        kernels, error = portable.kernels(__package__)
        if kernels is None:
            return [error]
        refusals = portable.refusals("the logits are", case.device, case.dtype, kernels.INTERPRETED)
        return refusals + unreduced(case)

    def forward(self, terms: Terms, mean: bool, inputs: Inputs, values_wanted: bool) -> Outputs:
        inputs, kernels = dense(inputs), portable.kernels(__package__)[0]
        if inputs.peers and inputs.centres is None and kernels.is_grouped(len(terms), inputs.logits[0]):
            means = self.forward(
                Terms([Term(equations.IDENTITY, 1, 0)] * len(terms)), True, Inputs(inputs.logits), True
            )
            inputs = inputs._replace(centres=means[1])
        outputs = empty_outputs(inputs, values_wanted)
        with portable.on_device(outputs[0]):
            kernels.forward(terms, mean, inputs, *outputs)
        return outputs

    def backward(
        self, dtotal: Tensor, terms: Terms, mean: bool, inputs: Inputs, state: Tensor | None, needed: Sequence[bool]
    ) -> list[Tensor]:
        inputs = dense(inputs)
        gradients = empty_gradients(inputs, needed)
        slopes = None
        if state is not None:
            slopes, centres = state.unbind()
            inputs = inputs._replace(centres=centres)
        with portable.on_device(dtotal):
            portable.kernels(__package__)[0].backward(dtotal.contiguous(), terms, mean, inputs, slopes, gradients)
        return [g for g in gradients if g is not None]


def _dense(x: Tensor) -> Tensor:
    """x itself where its elements fill one block of memory, whatever their order; else a contiguous copy."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1 and stride != expected:
            return x.contiguous()
        expected *= size
    return x


OP = Op("adversarial", Case, [Cpu(), Cuda(), Triton(), Torch()])
