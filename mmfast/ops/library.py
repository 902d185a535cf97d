"""Registration shared by the ops: schema, kernels, fake and autograd under `torch.ops.mmfast`.

One kernel is registered for CPU and CUDA alike: the backend, an argument of every op, decides what runs. Autograd is
a classic autograd.Function entered from the Autograd key: a compiled graph holds one forward and one backward node.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..dispatch import outside_autocast

_library = torch.library.Library("mmfast", "DEF")


def define(schema: str, kernel: Callable, fake: Callable, differentiable: Callable) -> Callable:
    """Defines the op `mmfast::<schema>` and returns it, and its overload `kernel`, which graphs call.

    kernel: computes it, for CPU and CUDA tensors.
    fake: allocates outputs of the right shape, dtype and device without computing.
    differentiable: serves a call that needs a gradient, through an autograd.Function (which reaches the kernel by
        `below_autograd`) or by a formula that torch differentiates.
    """
    name, _, rest = schema.partition("(")
    for overload in (name, f"{name}.kernel"):
        _library.define(f"{overload}({rest}")
        for device in ("CPU", "CUDA"):
            _library.impl(overload, kernel, device)
        torch.library.register_fake(f"mmfast::{overload}", fake, lib=_library)
    op = getattr(torch.ops.mmfast, name).default

    def autograd(*args: Any) -> Any:
        return differentiable(*args) if needs_gradient(args) else below_autograd(op, *args)

    _library.impl(name, autograd, "Autograd")
    # of which Python would take 6 us
    _library.impl(f"{name}.kernel", torch.library.fallthrough_kernel, "Autograd")
    return op


def below_autograd(op: Any, *args: Any) -> Any:
    """Calls `op` below its Autograd key: under fakes, tracers and modes, then its kernel."""
    with torch._C._AutoDispatchBelowAutograd():
        return op._overloadpacket.kernel(*args)


def as_its_forward(backward: Callable) -> Callable:
    """A Function's `backward` outside autocast, in which it may be called, but in which no kernel ran."""

    @functools.wraps(backward)
    def run(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return backward(ctx, *gradients)
        devices = {g.device.type for g in gradients if g is not None}
        with outside_autocast(devices.pop()) if devices else contextlib.nullcontext():
            return backward(ctx, *gradients)

    return run


def needs_gradient(args: Any) -> bool:
    """Whether grad mode is on and any tensor in args, or in a list in args, requires grad."""
    return torch.is_grad_enabled() and any(
        arg.requires_grad if isinstance(arg, torch.Tensor) else isinstance(arg, (list, tuple)) and needs_gradient(arg)
        for arg in args
    )


def nodes_of(ctx: Any, tensors: Sequence[torch.Tensor | None]) -> list[Any]:
    """The graph's nodes behind the last tensors that an autograd.Function was given; None where there is none."""
    nodes = [node for node, _ in ctx.next_functions]
    given = iter(nodes[len(nodes) - sum(tensor is not None for tensor in tensors) :])
    return [None if tensor is None else next(given) for tensor in tensors]


def will_run(node: Any) -> bool:
    """Whether the running backward uses the gradient that goes to a node.

    ctx.needs_input_grad tells only what could be used: torch.autograd.grad asks for some of it, a gradient penalty for
    x alone. Takes 0.4 us, and 30 us for a leaf that torch.autograd.grad asks for.
    """
    if node is None:
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # so it answers for such a leaf
        return True
