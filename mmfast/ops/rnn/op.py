"""The recurrent op: schema, fake, autograd. One node a layer, both directions.

    mmfast::rnn_forward(Tensor x, Tensor[] weights, Tensor? h0, Tensor? c0, <layer>, bool keep, str backend)
        -> (Tensor y, Tensor hn, Tensor cn, Tensor gates, Tensor cell)
    mmfast::rnn_backward(Tensor? dy, Tensor? dhn, Tensor? dcn, Tensor x, Tensor[] weights, Tensor? h0, Tensor? c0,
                         Tensor y, Tensor gates, Tensor cell, <layer>, bool[] need, str backend)
        -> Tensor[]: the gradients that are needed, of (x, h0, c0, *weights)
    <layer>: Tensor? lengths, Tensor? batch_sizes, Tensor? reset_mask, Tensor? zoneout_mask, Tensor? dropout_mask,
             float zoneout, str mode, int directions

Shapes: equations.py; what is saved (y, gates, cell): csrc/mmfast.h. Any order of differentiation in eager: where a
gradient of the backward is needed, it is that of equations.sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...dispatch import is_plain
from ..library import as_its_forward, below_autograd, define, needs_gradient, nodes_of, will_run
from . import equations, second_order
from .backends import OP, empty_outputs
from .equations import Layer

_LAYER = (
    "Tensor? lengths, Tensor? batch_sizes, Tensor? reset_mask, Tensor? zoneout_mask, Tensor? dropout_mask, "
    "float zoneout, str mode, int directions"
)


def sequence(
    x: Tensor, weights: Sequence[Tensor], h0: Tensor | None, c0: Tensor | None, layer: Layer, backend: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(y, hn, cn) of a layer, as `equations.sequence`; cn is None or empty but for an LSTM."""
    _check(x, weights, h0, c0, layer)
    tensors = [x, *weights, *(state for state in (h0, c0) if state is not None)]
    if not is_plain(tensors):
        keep = needs_gradient(tensors)
        return forward_op(x, list(weights), h0, c0, *_columns(layer), keep, backend)[:3]
    if needs_gradient(tensors):
        return RnnSequence.apply(True, layer, backend, x, h0, c0, *weights)
    return OP.backends[backend].forward(x, weights, h0, c0, layer, False)[:3]


def _check(x: Tensor, weights: Sequence[Tensor], h0: Tensor | None, c0: Tensor | None, layer: Layer) -> None:
    """RuntimeError where dtypes or devices differ, or packed sizes do not fit: a kernel would read past an end.

    Shapes of weights and states are checked before, by mmfast.functional.
    """
    for tensor in (*weights, h0, c0):
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            facts = f"{tensor.dtype} on {tensor.device}"
            raise RuntimeError(f"a weight or a state is {facts}; expected the input's {x.dtype} on {x.device}")
    _check_masks(x, weights, layer)
    sizes = layer.batch_sizes
    if sizes is None:
        return
    if sizes.device.type != "cpu" or sizes.dtype != torch.int64 or sizes.dim() != 1 or not sizes.numel():
        raise RuntimeError(f"batch_sizes are {sizes.dtype} on {sizes.device}; expected int64 on cpu, one for each step")
    each = sizes.tolist()
    if each != sorted(each, reverse=True) or each[-1] <= 0 or sum(each) != x.shape[0]:
        raise RuntimeError(
            f"batch_sizes go from {each[0]} to {each[-1]} and add up to {sum(each)}; expected sizes of at least 1 "
            f"that never rise and add up to the input's {x.shape[0]} rows"
        )


def _check_masks(x: Tensor, weights: Sequence[Tensor], layer: Layer) -> None:
    """RuntimeError for a mask of another shape, dtype or device than equations.py says."""
    output = weights[1].shape[1]
    expected: dict[str, tuple] = {}
    if layer.reset_mask is not None:
        expected["reset_mask"] = (layer.reset_mask, x.shape[:-1], torch.bool)
    if layer.zoneout_mask is not None:
        expected["zoneout_mask"] = (layer.zoneout_mask, (*x.shape[:-1], layer.directions * output), torch.bool)
    if layer.dropout_mask is not None:
        batch = x.shape[1] if layer.batch_sizes is None else int(layer.batch_sizes[0])
        expected["dropout_mask"] = (layer.dropout_mask, (layer.directions, batch, output), x.dtype)
    for name, (mask, shape, dtype) in expected.items():
        if mask.shape != shape or mask.dtype != dtype or mask.device != x.device:
            facts = f"{mask.dtype} {tuple(mask.shape)} on {mask.device}"
            raise RuntimeError(f"{name} is {facts}; expected {dtype} {tuple(shape)} on {x.device}")


class RnnSequence(torch.autograd.Function):
    """A layer: (y, hn, cn). direct: eager, the backend called without the dispatcher between; else also gates, cell."""

    @staticmethod
    def forward(
        ctx: Any,
        direct: bool,
        layer: Layer,
        backend: str,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        *weights: Tensor,
    ):
        ctx.set_materialize_grads(False)
        ctx.direct, ctx.layer, ctx.backend = direct, layer, backend
        if direct:
            outputs = OP.backends[backend].forward(x, weights, h0, c0, layer, True)
        else:
            outputs = below_autograd(forward_op, x, list(weights), h0, c0, *_columns(layer), True, backend)
        y, hn, cn, gates, cell = outputs
        ctx.save_for_backward(x, h0, c0, y, gates, cell, *weights)
        if direct:
            return y, hn, cn
        ctx.mark_non_differentiable(gates, cell)
        return outputs

    @staticmethod
    @as_its_forward
    def backward(ctx: Any, dy: Tensor | None, dhn: Tensor | None, dcn: Tensor | None, *_: None):
        x, h0, c0, y, gates, cell, *weights = ctx.saved_tensors
        if ctx.layer.mode != "LSTM":
            dcn = None
        need = _needed(ctx, x, h0, c0, weights) if ctx.direct else ctx.needs_input_grad[3:]
        given, layer = (dy, dhn, dcn), ctx.layer
        if dy is None and dhn is None and dcn is None:
            return None, None, None, *(None for _ in need)
        if ctx.direct and not torch.is_grad_enabled():
            backend = OP.backends[ctx.backend]
            gradients = backend.backward(given, x, weights, h0, c0, layer, (y, gates, cell), need)
        elif ctx.direct:
            gradients = RnnGradient.apply(layer, ctx.backend, need, (y, gates, cell), *given, x, h0, c0, *weights)
        else:
            saved = x, weights, h0, c0, y, gates, cell
            some = iter(backward_op(*given, *saved, *_columns(layer), list(need), ctx.backend))
            gradients = [next(some) if wanted else None for wanted in need]
        return None, None, None, *gradients


#: Floating-point operations of the input's product from which on it is worth asking which gradients are used.
ASKED = 1e8


def _needed(ctx: Any, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor]) -> Sequence[bool]:
    """Which gradients, of (x, h0, c0, *weights), the running backward uses."""
    could = ctx.needs_input_grad[-3 - len(weights) :]
    if 2.0 * x.numel() * weights[0].shape[0] < ASKED:
        return could
    nodes = nodes_of(ctx, (x, h0, c0, *weights))
    used = [will_run(node) for node in nodes[:4]]
    # where the first weight's is used, the others' mostly are
    return used + list(could[4:] if used[3] else map(will_run, nodes[4:]))


class RnnGradient(torch.autograd.Function):
    """A layer's backward, eager, itself to be differentiated: once by hand, beyond that by torch."""

    @staticmethod
    def forward(
        ctx: Any,
        layer: Layer,
        backend: str,
        need: Sequence[bool],
        saved: tuple[Tensor, Tensor, Tensor],
        dy: Tensor | None,
        dhn: Tensor | None,
        dcn: Tensor | None,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        *weights: Tensor,
    ):
        y, gates, cell = saved
        ctx.set_materialize_grads(False)
        ctx.layer, ctx.need = layer, need
        arguments = (dy, dhn, dcn), x, weights, h0, c0, layer, saved, need
        by_hand = hasattr(OP.backends[backend], "backward_and_deltas") and second_order.serves(x, weights, layer)
        if by_hand:
            gradients, deltas = OP.backends[backend].backward_and_deltas(*arguments)
        else:
            gradients, deltas = OP.backends[backend].backward(*arguments), (None, None)
        ctx.by_hand = by_hand
        ctx.save_for_backward(dy, dhn, dcn, x, h0, c0, y, gates, cell, *deltas, *weights)
        return tuple(gradients)

    @staticmethod
    @as_its_forward
    def backward(ctx: Any, *v: Tensor | None):
        dy, dhn, dcn, x, h0, c0, y, gates, cell, dgates, dm, *weights = ctx.saved_tensors
        given, layered = (dy, dhn, dcn), (x, weights, h0, c0, ctx.layer)
        if all(d is None for d in v):
            return (None,) * (10 + len(weights))
        if ctx.by_hand and not torch.is_grad_enabled():
            need = _needed(ctx, x, h0, c0, weights)
            by_given, by_inputs = second_order.gradient(v, given, *layered, (y, gates, cell), (dgates, dm), need)
            by_given = [None if d is None else g for d, g in zip(given, by_given, strict=True)]
        else:
            by_given, by_inputs = _by_torch(v, given, *layered, ctx.need)
        return None, None, None, None, *by_given, *by_inputs


def _by_torch(v, given, x, weights, h0, c0, layer: Layer, need) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """As second_order.gradient, of any order and any layer."""
    order, inputs = torch.is_grad_enabled(), [*given, x, h0, c0, *weights]
    with torch.enable_grad():
        inputs = [a if a is None or (order and a.requires_grad) else a.detach().requires_grad_() for a in inputs]
        *given, x, h0, c0 = inputs[:6]
        found = iter(equations.gradient(given, x, inputs[6:], h0, c0, layer, need))
        results = [next(found) if wanted else None for wanted in need]
        pairs = [(r, d) for r, d in zip(results, v, strict=True) if r is not None and d is not None]
        outputs, cotangents = zip(*pairs, strict=True)
        some = [a for a in inputs if a is not None]
        gradients = iter(torch.autograd.grad(outputs, some, cotangents, create_graph=order, allow_unused=True))
    each = [None if a is None else next(gradients) for a in inputs]
    return each[:3], each[3:]


def _columns(layer: Layer) -> tuple:
    masks = layer.reset_mask, layer.zoneout_mask, layer.dropout_mask
    return layer.lengths, layer.batch_sizes, *masks, layer.zoneout, layer.mode, layer.directions


def _layer(lengths, batch_sizes, reset_mask, zoneout_mask, dropout_mask, zoneout, mode, directions) -> Layer:
    return Layer(mode, directions, batch_sizes, lengths, reset_mask, zoneout_mask, dropout_mask, zoneout)


def _forward_kernel(x, weights, h0, c0, *rest):
    *columns, keep, backend = rest
    outputs = OP.backends[backend].forward(x, weights, h0, c0, _layer(*columns), keep)
    return tuple(x.new_empty(0) if output is None else output for output in outputs)


def _forward_fake(x, weights, h0, c0, *rest):
    *columns, keep, _ = rest
    layer = _layer(*columns)
    batch: Any = x.shape[1] if layer.batch_sizes is None else layer.batch_sizes[0].item()
    return empty_outputs(x, weights, layer, keep, batch)


def _forward_differentiable(x, weights, h0, c0, *rest):
    *columns, _, backend = rest
    return RnnSequence.apply(False, _layer(*columns), backend, x, h0, c0, *weights)


def _backward_kernel(dy, dhn, dcn, x, weights, h0, c0, y, gates, cell, *rest):
    *columns, need, backend = rest
    given, saved = (dy, dhn, dcn), (y, gates, cell)
    gradients = OP.backends[backend].backward(given, x, weights, h0, c0, _layer(*columns), saved, need)
    return [gradient for gradient, wanted in zip(gradients, need, strict=True) if wanted]


def _backward_fake(dy, dhn, dcn, x, weights, h0, c0, y, gates, cell, *rest):
    of = zip((x, h0, c0, *weights), rest[-2], strict=True)
    return [torch.empty_like(a, memory_format=torch.contiguous_format) for a, wanted in of if wanted]


def _backward_differentiable(dy, dhn, dcn, x, weights, h0, c0, y, gates, cell, *rest):
    *columns, need, _ = rest
    return equations.gradient((dy, dhn, dcn), x, weights, h0, c0, _layer(*columns), need)


forward_op = define(
    f"rnn_forward(Tensor x, Tensor[] weights, Tensor? h0, Tensor? c0, {_LAYER}, bool keep, str backend)"
    " -> (Tensor y, Tensor hn, Tensor cn, Tensor gates, Tensor cell)",
    _forward_kernel,
    _forward_fake,
    _forward_differentiable,
)
backward_op = define(
    "rnn_backward(Tensor? dy, Tensor? dhn, Tensor? dcn, Tensor x, Tensor[] weights, Tensor? h0, Tensor? c0,"
    f" Tensor y, Tensor gates, Tensor cell, {_LAYER}, bool[] need, str backend) -> Tensor[]",
    _backward_kernel,
    _backward_fake,
    _backward_differentiable,
)
