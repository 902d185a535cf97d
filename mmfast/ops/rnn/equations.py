"""A recurrent layer in plain torch: its specification, the truth for tests, and the formula behind double backward.

With a = W_hh h' + b_hh, gx = W_ih x + b_ih and h', c' the state one step before (after, in the reverse direction):

    RNN   h = phi(gx + a), phi = tanh or relu                                          Elman, Cognitive Science 14 (1990)
    GRU   r = sigmoid(gx_r + a_r), z = sigmoid(gx_z + a_z),                            Cho et al., arXiv:1406.1078, with
          n = tanh(gx_n + r a_n), h = n + z (h' - n)                                   the reset after the product
    LSTM  i, f, o = sigmoid(gx + a), g = tanh(gx_g + a_g), c = f c' + i g,             Hochreiter and Schmidhuber, Neural
          h = o tanh(c)                                                                Computation 9 (1997)

A layer's tensors, T steps of B sequences with I inputs and H units, D directions:

    x         (T, B, I); batch_first (B, T, I); packed (N, I), all sequences' steps as torch's PackedSequence orders them
    weights   of each direction W_ih (G H, I), W_hh (G H, H) and, with bias, b_ih (G H,), b_hh (G H,); gates in torch's
              order: r z n, i f g o
    h0, c0    (D, B, H) or None: 0; c0 LSTM only
    lengths   (B,) int64 or None: steps of each padded sequence, clamped to [0, T]; outputs past a length are 0
    y         like x with D H for I;  hn, cn (D, B, H): the state after each sequence's last step
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

#: enum mmfast_rnn_mode, and the gates of a unit
MODES = {"RNN_TANH": 0, "RNN_RELU": 1, "GRU": 2, "LSTM": 3}
GATES = {"RNN_TANH": 1, "RNN_RELU": 1, "GRU": 3, "LSTM": 4}


class Layer(NamedTuple):
    """What is not a tensor that a gradient flows through. batch_sizes: (T,) int64 on CPU, packed only."""

    mode: str
    directions: int = 1
    batch_first: bool = False
    batch_sizes: Tensor | None = None
    lengths: Tensor | None = None


def split(weights: Sequence[Tensor], directions: int) -> list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]:
    """(W_ih, W_hh, b_ih, b_hh) of each direction from the flat list."""
    each = len(weights) // directions
    rows = [tuple(weights[d * each : (d + 1) * each]) for d in range(directions)]
    return [row if each == 4 else (*row, None, None) for row in rows]  # type: ignore[misc]


def cell(mode: str, gx: Tensor, a: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """One step of the gates: gx (B, G H), a = W_hh h + b_hh (B, G H), state before (B, H). The state after."""
    if mode == "RNN_TANH":
        return torch.tanh(gx + a), None
    if mode == "RNN_RELU":
        return torch.relu(gx + a), None
    if mode == "GRU":
        gx_r, gx_z, gx_n = gx.chunk(3, -1)
        a_r, a_z, a_n = a.chunk(3, -1)
        r, z = torch.sigmoid(gx_r + a_r), torch.sigmoid(gx_z + a_z)
        n = torch.tanh(gx_n + r * a_n)
        return n + z * (h - n), None
    i, f, g, o = (gx + a).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def sequence(
    x: Tensor, weights: Sequence[Tensor], h0: Tensor | None, c0: Tensor | None, layer: Layer
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(y, hn, cn) of a layer; cn only of an LSTM. Any order of differentiation, O(T) in both directions of it."""
    if layer.batch_first:
        x = x.transpose(0, 1)
    batch = x.shape[1] if layer.batch_sizes is None else int(layer.batch_sizes[0])
    outputs, last_h, last_c = [], [], []
    for d, (w_ih, w_hh, b_ih, b_hh) in enumerate(split(weights, layer.directions)):
        gx = torch.nn.functional.linear(x, w_ih, b_ih)
        zeros = gx.new_zeros(batch, w_hh.shape[1])
        h = zeros if h0 is None else h0[d]
        c = zeros if c0 is None else c0[d]
        walk = _packed if layer.batch_sizes is not None else _padded
        y, h, c = walk(gx, w_hh, b_hh, h, c, layer, reverse=d == 1)
        outputs.append(y)
        last_h.append(h)
        last_c.append(c)
    y = outputs[0] if layer.directions == 1 else torch.cat(outputs, -1)
    y = y.transpose(0, 1) if layer.batch_first else y
    return y, torch.stack(last_h), torch.stack(last_c) if layer.mode == "LSTM" else None


def _recur(h: Tensor, w_hh: Tensor, b_hh: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(h, w_hh, b_hh)


def _padded(gx: Tensor, w_hh, b_hh, h, c, layer: Layer, reverse: bool):
    steps = gx.unbind(0)  # one node for all steps: indexing each would make backward O(T^2)
    outputs = []
    active = None
    if layer.lengths is not None:
        time = torch.arange(len(steps), device=gx.device)[:, None, None]
        active = (time < layer.lengths[:, None]).unbind(0)
    for t in reversed(range(len(steps))) if reverse else range(len(steps)):
        new_h, new_c = cell(layer.mode, steps[t], _recur(h, w_hh, b_hh), h, c)
        if active is None:
            h, c = new_h, new_c
            outputs.append(h)
            continue
        h, c = torch.where(active[t], new_h, h), None if new_c is None else torch.where(active[t], new_c, c)
        outputs.append(torch.where(active[t], h, 0))
    return torch.stack(outputs[::-1] if reverse else outputs), h, c


def _packed(gx: Tensor, w_hh, b_hh, h, c, layer: Layer, reverse: bool):
    sizes: list[int] = layer.batch_sizes.tolist()  # type: ignore[union-attr]
    steps = gx.split(sizes)
    return (_packed_backwards if reverse else _packed_forwards)(steps, sizes, w_hh, b_hh, h, c, layer.mode)


def _packed_forwards(steps, sizes, w_hh, b_hh, h, c, mode):
    outputs, ended_h, ended_c = [], [], []
    for gx, size in zip(steps, sizes, strict=True):
        if size < h.shape[0]:  # the shortest sequences have ended
            ended_h.append(h[size:])
            h = h[:size]
            if c is not None:
                ended_c.append(c[size:])
                c = c[:size]
        h, c = cell(mode, gx, _recur(h, w_hh, b_hh), h, c)
        outputs.append(h)
    h = torch.cat([h, *reversed(ended_h)])
    return torch.cat(outputs), h, None if c is None else torch.cat([c, *reversed(ended_c)])


def _packed_backwards(steps, sizes, w_hh, b_hh, h0, c0, mode):
    outputs = []
    h, c = h0[:0], c0[:0]
    for gx, size in zip(reversed(steps), reversed(sizes), strict=True):
        if size > h.shape[0]:  # sequences whose last step this is begin
            c = None if c is None else torch.cat([c, c0[h.shape[0] : size]])
            h = torch.cat([h, h0[h.shape[0] : size]])
        h, c = cell(mode, gx, _recur(h, w_hh, b_hh), h, c)
        outputs.append(h)
    return torch.cat(outputs[::-1]), h, c


def gradient(
    given: Sequence[Tensor | None],
    x: Tensor,
    weights: Sequence[Tensor],
    h0: Tensor | None,
    c0: Tensor | None,
    layer: Layer,
    need: Sequence[bool],
) -> list[Tensor]:
    """The gradients of `sequence` that are needed, of (x, h0, c0, *weights), given those of (y, hn, cn).

    Itself differentiable: the sequence is computed again.
    """
    # views of their own, so that no gradient flows on through what the inputs were made from
    inputs = [None if a is None else a.view_as(a) for a in (x, h0, c0, *weights)]
    wanted = [a for a, wanted in zip(inputs, need, strict=True) if wanted]
    outputs = sequence(inputs[0], inputs[3:], inputs[1], inputs[2], layer)
    pairs = [(out, d) for out, d in zip(outputs, given, strict=True) if out is not None and d is not None]
    out, d = zip(*pairs, strict=True)
    found = torch.autograd.grad(out, wanted, d, create_graph=True, allow_unused=True)
    return [torch.zeros_like(a) if g is None else g for a, g in zip(wanted, found, strict=True)]
