"""A recurrent layer in plain torch: its specification, the truth for tests, and the formula behind double backward.

With a = W_hh h' + b_hh, gx = W_ih x + b_ih and h', c' the state before it (in the reverse direction after it):

    RNN   h = phi(gx + a), phi = tanh or relu                             Elman, Cognitive Science 14 (1990)
    GRU   r = sigmoid(gx_r + a_r), z = sigmoid(gx_z + a_z),               Cho et al., arXiv:1406.1078, with
          n = tanh(gx_n + r a_n), h = n + z (h' - n)                      the reset after the product
    LSTM  i, f, o = sigmoid(gx + a), g = tanh(gx_g + a_g),                Hochreiter and Schmidhuber,
          c = f c' + i g, h = o tanh(c)                                   Neural Computation 9 (1997)
          with a projection h = W_hr (o tanh(c))                          Sak et al., arXiv:1402.1128

Extras, each of which may be absent:

    resets             h' and c' are 0 where a row's reset_mask cuts it off from the step before
    recurrent dropout  a = W_hh (m h') + b_hh, m of a unit the same at     Gal and Ghahramani, arXiv:1512.05287
                       all steps; nothing else of h' is dropped
    zoneout            h = k h' + (1 - k) h~, h~ being the h above: k is   Krueger et al., arXiv:1606.01305, of h only,
                       the mask in training, the rate in evaluation        as in the library haste

A layer's tensors, T steps of B sequences with I inputs and H units, D directions:

    x         (T, B, I); packed (N, I), all sequences' steps as torch's PackedSequence orders them
    weights   of each direction W_ih (G H, I), W_hh (G H, H), with bias also b_ih (G H,), b_hh (G H,), and last, for an
              LSTM with a projection, W_hr (P, H); W_hh is then (G H, P); gates in torch's order: r z n, i f g o
    h0, c0    (D, B, P), (D, B, H) or None: 0; c0 LSTM only; P = H without a projection
    lengths   (B,) integers on x's device or None: steps of each padded sequence, clamped to [0, T]; outputs past a
              length are 0
    reset_mask    bool, x's shape without its last dimension: between row t - 1 and row t where it is true at t no state
              is passed on, in neither direction; at t = 0 it keeps h0 and c0 out of the forward direction
    zoneout_mask  bool, y's shape: where h' stays; None: zoneout is the rate
    dropout_mask  (D, B, P), x's dtype: m
    y         like x with D P for I;  hn (D, B, P), cn (D, B, H): the state after each sequence's last step
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
    reset_mask: Tensor | None = None
    zoneout_mask: Tensor | None = None
    dropout_mask: Tensor | None = None
    zoneout: float = 0.0

    @property
    def zones(self) -> bool:
        """Whether there is zoneout, by a mask or in expectation."""
        return self.zoneout_mask is not None or self.zoneout > 0


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


class Walk(NamedTuple):
    """One direction's walk: its weights, dropout mask (B, P), zoneout, and by step (rows, 1) cuts, (rows, P) masks."""

    mode: str
    part: Weights
    drop: Tensor | None
    zoneout: float
    cuts: Sequence[Tensor] | None
    zones: Sequence[Tensor] | None

    def step(self, t: int, gx: Tensor, state: State) -> State:
        """The state after step t, from gx (rows, G H) and the state before it."""
        if self.cuts is not None:
            state = tuple(each.masked_fill(self.cuts[t], 0) for each in state)
        before = state[0]
        operand = before if self.drop is None else before * self.drop[: before.shape[0]]
        h, *c = cell(self.mode, gx, linear(operand, self.part.w_hh, self.part.b_hh), state)
        if self.part.w_hr is not None:
            h = linear(h, self.part.w_hr)
        if self.zones is not None:
            h = torch.where(self.zones[t], before, h)
        elif self.zoneout:
            h = self.zoneout * before + (1 - self.zoneout) * h
        return h, *c


def sequence(
    x: Tensor, weights: Sequence[Tensor], h0: Tensor | None, c0: Tensor | None, layer: Layer
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(y, hn, cn) of a layer; cn only of an LSTM. Any order of differentiation; each costs O(T), packed or not."""
    batch = x.shape[1] if layer.batch_sizes is None else int(layer.batch_sizes[0])
    run = _padded if layer.batch_sizes is None else _packed
    outputs, states = [], []
    for d, part in enumerate(split(weights, layer.directions)):
        gx = linear(x, part.w_ih, part.b_ih)
        state: State = (gx.new_zeros(batch, part.w_hh.shape[1]) if h0 is None else h0[d],)
        if layer.mode == "LSTM":
            state += (gx.new_zeros(batch, part.w_hh.shape[0] // 4) if c0 is None else c0[d],)
        y, state = run(gx, _walk(part, layer, d, batch), state, layer, reverse=d == 1)
        outputs.append(y)
        states.append(state)
    y = outputs[0] if layer.directions == 1 else torch.cat(outputs, -1)
    hn, *cn = (torch.stack(each) for each in zip(*states, strict=True))
    return y, hn, cn[0] if cn else None


def _walk(part: Weights, layer: Layer, d: int, batch: int) -> Walk:
    drop = None if layer.dropout_mask is None else layer.dropout_mask[d]
    cuts = zones = None
    if layer.reset_mask is not None:
        cuts = _by_step(cuts_of(layer.reset_mask, layer, batch, d == 1)[..., None], layer)
    if layer.zoneout_mask is not None:
        zones = _by_step(layer.zoneout_mask.chunk(layer.directions, -1)[d], layer)
    return Walk(layer.mode, part, drop, layer.zoneout, cuts, zones)


def cuts_of(reset_mask: Tensor, layer: Layer, batch: int, reverse: bool) -> Tensor:
    """Rows that no state enters, by the walk in one direction: in reverse those before a row that is reset."""
    if not reverse:
        return reset_mask
    last = reset_mask.new_zeros(batch)
    if layer.batch_sizes is None:
        cuts = torch.cat([reset_mask[1:], last[None]])
        if layer.lengths is not None:
            time = torch.arange(1, len(cuts) + 1, device=cuts.device)[:, None]
            cuts = cuts & (time < layer.lengths)
        return cuts
    sizes: list[int] = layer.batch_sizes.tolist()
    later = [*reset_mask.split(sizes)[1:], last[:0]]
    return torch.cat([torch.cat([rows, last[: size - len(rows)]]) for rows, size in zip(later, sizes, strict=True)])


def _by_step(rows: Tensor, layer: Layer) -> Sequence[Tensor]:
    # one node for all steps: indexing each would make backward O(T^2)
    return rows.unbind(0) if layer.batch_sizes is None else rows.split(layer.batch_sizes.tolist())


def _padded(gx: Tensor, walk: Walk, state: State, layer: Layer, reverse: bool) -> tuple[Tensor, State]:
    steps = _by_step(gx, layer)
    active: Sequence[Tensor] | None = None
    if layer.lengths is not None:
        time = torch.arange(len(steps), device=gx.device)[:, None, None]
        active = (time < layer.lengths[:, None]).unbind(0)
    outputs = []
    for t in range(len(steps))[::-1] if reverse else range(len(steps)):
        after = walk.step(t, steps[t], state)
        output = after[0]
        if active is not None:
            output = torch.where(active[t], output, 0)
            after = tuple(torch.where(active[t], new, old) for new, old in zip(after, state, strict=True))
        state = after
        outputs.append(output)
    return torch.stack(outputs[::-1] if reverse else outputs), state


def _packed(gx: Tensor, walk: Walk, state: State, layer: Layer, reverse: bool) -> tuple[Tensor, State]:
    steps = _by_step(gx, layer)
    if reverse:
        return _packed_reverse(steps, walk, state)
    outputs: list[Tensor] = []
    ended: list[State] = []
    for t, gx_t in enumerate(steps):
        size = gx_t.shape[0]
        if size < state[0].shape[0]:  # the shortest sequences have ended
            ended.append(tuple(each[size:] for each in state))
            state = tuple(each[:size] for each in state)
        state = walk.step(t, gx_t, state)
        outputs.append(state[0])
    last = zip(state, *ended[::-1], strict=True)
    return torch.cat(outputs), tuple(torch.cat(each) for each in last)


def _packed_reverse(steps: Sequence[Tensor], walk: Walk, initial: State) -> tuple[Tensor, State]:
    outputs: list[Tensor] = []
    state = tuple(each[:0] for each in initial)
    for t, gx_t in reversed(list(enumerate(steps))):
        before, size = state[0].shape[0], gx_t.shape[0]
        if size > before:  # sequences whose last step this is begin
            state = tuple(torch.cat([each, first[before:size]]) for each, first in zip(state, initial, strict=True))
        state = walk.step(t, gx_t, state)
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
