"""PyTorch's own recurrent layers on CUDA as one node: differentiable twice, and in eval mode, which cuDNN refuses.

The layers run in a graph of their own, which the node's backward walks; where gradients of the gradients are wanted,
the backward is that of a formula instead. No other interface of PyTorch is used than autograd's, so that each version
of cuDNN's operators, of which aten changes the arguments, is served by its own autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

#: A function of the differentiable inputs.
Function = Callable[..., tuple[Tensor, ...]]


def keeps_graph() -> bool:
    """Whether the running backward is to leave the graph for another one; cuDNN's then copies its workspace."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if asked is None else asked()


class StockLayers(torch.autograd.Function):
    """function(*inputs). formula: the same, differentiable in any order."""

    @staticmethod
    def forward(ctx: Any, function: Function, formula: Function, *inputs: Tensor):
        ctx.set_materialize_grads(False)
        need = ctx.needs_input_grad[2:]
        inner = [a.detach().requires_grad_(wanted) for a, wanted in zip(inputs, need, strict=True)]
        with torch.enable_grad():
            outputs = function(*inner)
        ctx.formula, ctx.inner = formula, (inner, outputs)
        ctx.save_for_backward(*inputs)
        return tuple(out.detach() for out in outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None):
        need = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            # views, so that where one input was made of another its gradient is not that one's, too
            inputs = [a.view_as(a) for a in ctx.saved_tensors]
            return None, None, *_gradients(ctx.formula(*inputs), inputs, need, cotangents, create_graph=True)
        inner, outputs = ctx.inner
        return None, None, *_gradients(outputs, inner, need, cotangents, retain_graph=keeps_graph())


def _gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], need: Sequence[bool], cotangents: Sequence, **options: bool
) -> list[Tensor | None]:
    """Of the inputs that need one."""
    # under autocast a formula's outputs are of another dtype than the layers'
    pairs = [(out, d.to(out.dtype)) for out, d in zip(outputs, cotangents, strict=True) if d is not None]
    wanted = [a for a, needed in zip(inputs, need, strict=True) if needed]
    if not pairs or not wanted:
        return [None] * len(inputs)
    of, by = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(of, wanted, by, allow_unused=True, **options))
    return [next(found) if needed else None for needed in need]
