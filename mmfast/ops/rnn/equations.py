"""A recurrent layer in plain torch: its specification, the truth for tests, and the formula behind double backward.

With a = W_hh h' + b_hh, gx = W_ih x + b_ih and h', c' the state before it (in the reverse direction after it):

    RNN   h = phi(gx + a), phi = tanh or relu                             Elman, Cognitive Science 14 (1990)
    GRU   r = sigmoid(gx_r + a_r), z = sigmoid(gx_z + a_z),               Cho et al., arXiv:1406.1078, with
          n = tanh(gx_n + r a_n), h = n + z (h' - n)                      the reset after the product
    LSTM  i, f, o = sigmoid(gx + a), g = tanh(gx_g + a_g),                Hochreiter and Schmidhuber,
          c = f c' + i g, h = o tanh(c)                                   Neural Computation 9 (1997)

A layer's tensors, T steps of B sequences with I inputs and H units, D directions:

    x         (T, B, I); packed (N, I), all sequences' steps as torch's PackedSequence orders them
    weights   of each direction W_ih (G H, I), W_hh (G H, H), with bias also b_ih (G H,), b_hh (G H,), and last, for an
              LSTM with a projection h = W_hr (o tanh(c)), W_hr (P, H), where h is of size P; gates in torch's order:
              r z n, i f g o
    h0, c0    (D, B, H) or None: 0; c0 LSTM only
    lengths   (B,) int64 or None: steps of each padded sequence, clamped to [0, T]; outputs past a length are 0
    y         like x with D H for I;  hn, cn (D, B, H): the state after each sequence's last step
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

#: enum mmfast_rnn_mode, and the gates of a unit
MODES = {"RNN_TANH": 0, "RNN_RELU": 1, "GRU": 2, "LSTM": 3}
GATES = {"RNN_TANH": 1, "RNN_RELU": 1, "GRU": 3, "LSTM": 4}

#: (h,) or an LSTM's (h, c)
State = tuple[Tensor, ...]


class Layer(NamedTuple):
    """A layer's facts, and tensors that no gradient flows through. batch_sizes: (T,) int64 on CPU; packed only."""

    mode: str
    directions: int = 1
    batch_sizes: Tensor | None = None
    lengths: Tensor | None = None


class Weights(NamedTuple):
    """The weights of one direction."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    w_hr: Tensor | None


def split(weights: Sequence[Tensor], directions: int) -> list[Weights]:
    """The weights of each direction from the flat list."""
    each = len(weights) // directions
    parts = []
    for d in range(directions):
        w_ih, w_hh, *rest = weights[d * each : (d + 1) * each]
        w_hr = rest.pop() if each % 2 else None
        b_ih, b_hh = rest or (None, None)
        parts.append(Weights(w_ih, w_hh, b_ih, b_hh, w_hr))
    return parts


def cell(mode: str, gx: Tensor, a: Tensor, state: State) -> State:
    """The gates of one step: gx and a (B, G H), the state before it (B, H). The state after it, without projection."""
    if mode == "RNN_TANH":
        return (torch.tanh(gx + a),)
    if mode == "RNN_RELU":
        return (torch.relu(gx + a),)
    if mode == "GRU":
        gx_r, gx_z, gx_n = gx.chunk(3, -1)
        a_r, a_z, a_n = a.chunk(3, -1)
        r, z = torch.sigmoid(gx_r + a_r), torch.sigmoid(gx_z + a_z)
        n = torch.tanh(gx_n + r * a_n)
        return (n + z * (state[0] - n),)
    i, f, g, o = (gx + a).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def step(mode: str, gx: Tensor, part: Weights, state: State) -> State:
    """The state after a step, from gx (B, G H) and the state before it."""
    after = cell(mode, gx, linear(state[0], part.w_hh, part.b_hh), state)
    return after if part.w_hr is None else (linear(after[0], part.w_hr), *after[1:])


def sequence(
    x: Tensor, weights: Sequence[Tensor], h0: Tensor | None, c0: Tensor | None, layer: Layer
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(y, hn, cn) of a layer; cn only of an LSTM. Any order of differentiation; each costs O(T), packed or not."""
    batch = x.shape[1] if layer.batch_sizes is None else int(layer.batch_sizes[0])
    walk = _padded if layer.batch_sizes is None else _packed
    outputs, states = [], []
    for d, part in enumerate(split(weights, layer.directions)):
        gx = linear(x, part.w_ih, part.b_ih)
        state: State = (gx.new_zeros(batch, part.w_hh.shape[1]) if h0 is None else h0[d],)
        if layer.mode == "LSTM":
            state += (gx.new_zeros(batch, part.w_hh.shape[0] // 4) if c0 is None else c0[d],)
        y, state = walk(gx, part, state, layer, reverse=d == 1)
        outputs.append(y)
        states.append(state)
    y = outputs[0] if layer.directions == 1 else torch.cat(outputs, -1)
    hn, *cn = (torch.stack(each) for each in zip(*states, strict=True))
    return y, hn, cn[0] if cn else None


def _padded(gx: Tensor, part: Weights, state: State, layer: Layer, reverse: bool) -> tuple[Tensor, State]:
    steps = gx.unbind(0)  # one node for all steps: indexing each would make backward O(T^2)
    active: Sequence[Tensor] | None = None
    if layer.lengths is not None:
        time = torch.arange(len(steps), device=gx.device)[:, None, None]
        active = (time < layer.lengths[:, None]).unbind(0)
    outputs = []
    for t in range(len(steps))[::-1] if reverse else range(len(steps)):
        after = step(layer.mode, steps[t], part, state)
        output = after[0]
        if active is not None:
            output = torch.where(active[t], output, 0)
            after = tuple(torch.where(active[t], new, old) for new, old in zip(after, state, strict=True))
        state = after
        outputs.append(output)
    return torch.stack(outputs[::-1] if reverse else outputs), state


def _packed(gx: Tensor, part: Weights, state: State, layer: Layer, reverse: bool) -> tuple[Tensor, State]:
    sizes: list[int] = layer.batch_sizes.tolist()  # type: ignore[union-attr]
    steps = gx.split(sizes)
    if reverse:
        return _packed_reverse(steps, part, state, layer.mode)
    outputs: list[Tensor] = []
    ended: list[State] = []
    for gx_t in steps:
        size = gx_t.shape[0]
        if size < state[0].shape[0]:  # the shortest sequences have ended
            ended.append(tuple(each[size:] for each in state))
            state = tuple(each[:size] for each in state)
        state = step(layer.mode, gx_t, part, state)
        outputs.append(state[0])
    last = zip(state, *ended[::-1], strict=True)
    return torch.cat(outputs), tuple(torch.cat(each) for each in last)


def _packed_reverse(steps: Sequence[Tensor], part: Weights, initial: State, mode: str) -> tuple[Tensor, State]:
    outputs: list[Tensor] = []
    state = tuple(each[:0] for each in initial)
    for gx_t in reversed(steps):
        before, size = state[0].shape[0], gx_t.shape[0]
        if size > before:  # sequences whose last step this is begin
            state = tuple(torch.cat([each, first[before:size]]) for each, first in zip(state, initial, strict=True))
        state = step(mode, gx_t, part, state)
        outputs.append(state[0])
    return torch.cat(outputs[::-1]), state


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
    x, *weights = (a.view_as(a) for a in (x, *weights))
    h0, c0 = (None if state is None else state.view_as(state) for state in (h0, c0))
    wanted = [a for a, wanted in zip((x, h0, c0, *weights), need, strict=True) if wanted and a is not None]
    outputs = sequence(x, weights, h0, c0, layer)
    pairs = [(out, d) for out, d in zip(outputs, given, strict=True) if out is not None and d is not None]
    out, d = zip(*pairs, strict=True)
    found = torch.autograd.grad(out, wanted, d, create_graph=True, allow_unused=True)
    return [torch.zeros_like(a) if g is None else g for a, g in zip(wanted, found, strict=True)]
