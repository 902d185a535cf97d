"""Registration shared by the ops: schema, kernels, fake and autograd under `torch.ops.mmfast`.

One kernel is registered for CPU and CUDA alike: the backend, an argument of every op, decides what runs. Autograd is
a classic autograd.Function entered from the Autograd key: a compiled graph holds one forward and one backward node.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("mmfast", "DEF")


def define(schema: str, kernel: Callable, fake: Callable, differentiable: Callable) -> Callable:
    """Defines the op `mmfast::<schema>` and returns it.

    kernel: computes it, for CPU and CUDA tensors.
    fake: allocates outputs of the right shape, dtype and device without computing.
    differentiable: serves a call that needs a gradient, through an autograd.Function (which reaches the kernel by
        `below_autograd`) or by a formula that torch differentiates.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    for device in ("CPU", "CUDA"):
        _library.impl(name, kernel, device)
    torch.library.register_fake(f"mmfast::{name}", fake, lib=_library)
    op = getattr(torch.ops.mmfast, name).default

    def autograd(*args: Any) -> Any:
        return differentiable(*args) if needs_gradient(args) else below_autograd(op, *args)

    _library.impl(name, autograd, "Autograd")
    return op


def below_autograd(op: Callable, *args: Any) -> Any:
    """Calls `op` below its Autograd key: under fakes, tracers and modes, then its kernel."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def needs_gradient(args: Any) -> bool:
    """Whether grad mode is on and any tensor in args, or in a list in args, requires grad."""
    return torch.is_grad_enabled() and any(
        arg.requires_grad if isinstance(arg, torch.Tensor) else isinstance(arg, (list, tuple)) and needs_gradient(arg)
        for arg in args
    )
