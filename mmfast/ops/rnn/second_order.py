"""The gradient of a layer's gradients, by hand: two walks through time of a few operators a step.

Let v be the gradients with respect to a backward's results (dx, dh0, dc0, dweights). <v, results> is the derivative of
<given, outputs> in the direction v of the inputs, so that

    its gradient by `given` (dy, dhn, dcn) is the outputs' tangent along v: a walk forward;
    its gradient by the inputs is the adjoint of that walk, in which the gradients of the tangents are the backward's
        own dgates: a walk backward.

Both walks are linear: the coefficients, and what the second one adds at each step, are computed for all steps at once.
With `_` for a tangent, `-` for the adjoint sought, d for the backward's gradients and e for what is added:

    RNN   h_ = phi' s_,                      s- = phi' h- + e
    GRU   p_ = gx_n_ + R s_r_ + r m_,        p- = N h- + e,  s_r- = R p- + e,  s_z- = Z h- + e,  m- = r p- + e
          h_ = N p_ + z h'_ + Z s_z_,        h'- = z h- + (s_r-, s_z-, m-) W_hh + e
    LSTM  c_ = f c'_ + A_ifg s_ifg_,         c- = c'-' + alpha h- + e,  s_ifg- = A_ifg c- + e,  s_o- = A_o h- + e
          h_ = A_o s_o_ + alpha c_,          c'- = f c- + e,  h'- = s- W_hh + e

Padded layers without lengths, masks or projection, in float32 and float64; the rest is differentiated by torch through
equations.gradient. Method: Pearlmutter, Neural Computation 6 (1994).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..product import product
from .equations import GATES, Layer, Weights, split
from .products import chain_of, sum_over_rows


def serves(x: Tensor, weights: Sequence[Tensor], layer: Layer) -> bool:
    """Whether `gradient` serves this layer."""
    plain = layer._replace(mode="", directions=1) == Layer("") if layer.batch_sizes is None else False
    projected = len(weights) // layer.directions % 2
    return plain and not projected and x.dtype in (torch.float32, torch.float64) and x.numel() > 0


class Tangents(NamedTuple):
    """The gradients by the weights' gradients of one direction; None: 0."""

    w_ih: Tensor | None
    w_hh: Tensor | None
    b_ih: Tensor | None
    b_hh: Tensor | None


class Part(NamedTuple):
    """One direction, its steps in the order of the walk. gates (T, B, G, H), others (T, B, H) and the like."""

    mode: str
    w: Weights
    v: Tangents
    x: Tensor
    vx: Tensor | None
    h: Tensor
    gates: Tensor
    cell: Tensor
    h0: Tensor
    c0: Tensor
    vh0: Tensor
    vc0: Tensor
    delta: Tensor  # the backward's gradients of the gates, (T, B, G, H), and those on the side of W_hh
    delta_hh: Tensor
    dy: Tensor
    dcn: Tensor | None

    @property
    def before(self) -> Tensor:
        return torch.cat([self.h0[None], self.h[:-1]])

    def side_of_x(self) -> Tensor:
        """The tangent of gx, to be written to: (T, B, G, H)."""
        return self._summed(self._product(self.vx, self.w.w_ih), self._product(self.x, self.v.w_ih), self.v.b_ih)

    def side_of_h(self) -> Tensor | None:
        """That of W_hh h' + b_hh but for h'_: (T, B, G, H), None: 0."""
        if self.v.w_hh is None and self.v.b_hh is None:
            return None
        return self._summed(self._product(self.before, self.v.w_hh), None, self.v.b_hh)

    def both_sides(self) -> Tensor:
        side, more = self.side_of_x(), self.side_of_h()
        return side if more is None else side.add_(more)

    def _product(self, x: Tensor | None, w: Tensor | None) -> Tensor | None:
        return None if x is None or w is None else x @ w.t()

    def _summed(self, *terms: Tensor | None) -> Tensor:
        total = None
        for term in terms:
            if term is not None:
                total = term if total is None else total + term
        if total is None or total.dim() == 1:
            total = torch.zeros_like(self.delta).flatten(2) + (0 if total is None else total)
        return total.unflatten(-1, self.delta.shape[2:])

    def passed(self) -> Tensor:
        """What the second walk passes on of V_hh: (T, B, H)."""
        return self.h.new_zeros(()).expand_as(self.h) if self.v.w_hh is None else self.delta_hh.flatten(2) @ self.v.w_hh


class Found(NamedTuple):
    """The tangents of h and of the last c, and the adjoints: of gx, of W_hh h' (T, B, G, H), of h0, of c0."""

    h: Tensor
    cn: Tensor | None
    gx: Tensor
    hh: Tensor
    h0: Tensor
    c0: Tensor | None


def _rnn(part: Part) -> Found:
    h, w_hh = part.h, part.w.w_hh
    slope = 1 - h * h if part.mode == "RNN_TANH" else (h > 0).to(h.dtype)
    sums, tangents = part.both_sides()[:, :, 0], torch.empty_like(h)
    state = part.vh0
    for s, k, out in zip(sums, slope, tangents, strict=True):
        s.addmm_(state, w_hh.t())
        state = torch.mul(s, k, out=out)
    adjoints = -2 * h * part.delta[:, :, 0] * sums if part.mode == "RNN_TANH" else torch.zeros_like(h)
    bar = torch.zeros_like(part.h0)
    for s, k, passed in zip(*map(_reversed, (adjoints, slope, part.passed())), strict=True):
        bar = torch.addmm(passed, s.addcmul_(k, bar), w_hh)
    adjoints = adjoints[:, :, None]
    return Found(tangents, None, adjoints, adjoints, bar, None)


def _gru(part: Part) -> Found:
    w_hh, before, m = part.w.w_hh, part.before, part.cell
    r, z, n = part.gates.unbind(2)
    slope = 1 - n * n
    to_p, to_r, to_z = (1 - z) * slope, r * (1 - r) * m, z * (1 - z) * (before - n)
    sums, hh = part.side_of_x(), part.side_of_h()
    p, tangents = sums[:, :, 2].clone(), torch.empty_like(part.h)
    sums[:, :, 2] = 0
    sums = sums if hh is None else sums.add_(hh)
    state = part.vh0
    for s, p_t, out, *k in zip(sums, p, tangents, to_r, r, to_p, z, to_z, strict=True):
        s.view(len(s), -1).addmm_(state, w_hh.t())
        s_r, s_z, s_m = s.unbind(1)
        p_t.addcmul_(k[0], s_r).addcmul_(k[1], s_m)
        torch.mul(k[2], p_t, out=out)
        state = out.addcmul_(k[3], state).addcmul_(k[4], s_z)

    d_n = part.delta[:, :, 2]
    dh = _shifted(part.delta_hh.flatten(2) @ w_hh) + part.dy
    for t in range(len(dh) - 2, -1, -1):
        dh[t].addcmul_(z[t + 1], dh[t + 1])
    s_r, s_z, s_m = sums.unbind(2)
    h_before = torch.cat([part.vh0[None], tangents[:-1]])
    dz, n_, z_ = dh * (before - n), slope * p, z * (1 - z) * s_z
    adjoints = torch.stack(
        [
            r * (1 - r) * d_n * (s_m + (1 - 2 * r) * s_r * m),
            z * (1 - z) * (dh * (h_before - n_) + (1 - 2 * z) * s_z * dz),
            d_n * r * (1 - r) * s_r,
        ],
        2,
    )
    p_bar = -slope * dh * (z_ + 2 * n * p * (1 - z))
    rest = (dh * z_).add_(part.passed())
    bar = torch.zeros_like(part.h0)
    walked = adjoints, p_bar, rest, to_r, r, to_p, z, to_z
    w_gates = w_hh.unflatten(0, (3, -1))
    for a, p_t, passed, *k in zip(*map(_reversed, walked), strict=True):
        a_r, a_z, a_m = a.unbind(1)
        p_t.addcmul_(k[2], bar)
        a_r.addcmul_(k[0], p_t)
        a_m.addcmul_(k[1], p_t)
        a_z.addcmul_(k[4], bar)
        bar = passed.addcmul_(k[3], bar).add_(_by_gates(a, w_gates))
    side = torch.stack([adjoints[:, :, 0], adjoints[:, :, 1], p_bar], 2)
    return Found(tangents, None, side, adjoints, bar, None)


def _lstm(part: Part) -> Found:
    w_hh, c = part.w.w_hh, part.cell
    c_before, tanh_c = torch.cat([part.c0[None], c[:-1]]), torch.tanh(c)
    i, f, g, o = part.gates.unbind(2)
    slopes = (1 - part.gates).mul_(part.gates)
    slopes[:, :, 2] = 1 - g * g
    others = torch.stack([g, c_before, i, tanh_c], 2)
    to_gates, to_c = slopes * others, o * (1 - tanh_c * tanh_c)
    sums, tangents, cells = part.both_sides(), torch.empty_like(part.h), torch.empty_like(c)
    h_, c_ = part.vh0, part.vc0
    for s, h_t, c_t, k, f_t, k_c in zip(sums, tangents, cells, to_gates, f, to_c, strict=True):
        s.view(len(s), -1).addmm_(h_, w_hh.t())
        moved = k * s
        torch.mul(f_t, c_, out=c_t).add_(moved[:, 0]).add_(moved[:, 1])
        c_ = c_t.add_(moved[:, 2])
        h_ = torch.addcmul(moved[:, 3], k_c, c_, out=h_t)

    dh = _shifted(part.delta.flatten(2) @ w_hh) + part.dy
    dc = dh * to_c
    if part.dcn is not None:
        dc[-1] += part.dcn
    for t in range(len(dc) - 2, -1, -1):
        dc[t].addcmul_(f[t + 1], dc[t + 1])
    c_tangents_before = torch.cat([part.vc0[None], cells[:-1]])
    moved = slopes * sums  # the gates' tangents
    slope_c = 1 - tanh_c * tanh_c
    adjoints = part.gates * -2
    adjoints[:, :, 0].add_(1)
    adjoints[:, :, 1].add_(1)
    adjoints[:, :, 3].add_(1)
    adjoints.mul_(sums).mul_(others)
    adjoints[:, :, 0].add_(moved[:, :, 2])
    adjoints[:, :, 1].add_(c_tangents_before)
    adjoints[:, :, 2].add_(moved[:, :, 0])
    adjoints[:, :, 3].addcmul_(slope_c, cells)
    adjoints[:, :, :3].mul_(dc[:, :, None])
    adjoints[:, :, 3].mul_(dh)
    adjoints.mul_(slopes)
    # what reaches c past h, at the step before where it is needed
    rest = dc * moved[:, :, 1]
    at_c = slope_c * dh * (moved[:, :, 3] - 2 * tanh_c * cells * o)
    rest[1:] += at_c[:-1]
    bar, carry = torch.zeros_like(part.h0), at_c[-1]
    walked = adjoints, rest, part.passed(), to_gates, f, to_c
    w_gates = w_hh.unflatten(0, (4, -1))
    for a, rest_t, passed, k, f_t, k_c in zip(*map(_reversed, walked), strict=True):
        c_bar = torch.addcmul(carry, k_c, bar)
        a[:, :3].addcmul_(k[:, :3], c_bar[:, None])
        a[:, 3].addcmul_(k[:, 3], bar)
        carry = rest_t.addcmul_(f_t, c_bar)
        bar = passed + _by_gates(a, w_gates)
    return Found(tangents, cells[-1], adjoints, adjoints, bar, carry)


def _by_gates(adjoints: Tensor, w_gates: Tensor) -> Tensor:
    """(B, G, H) times W_hh as (G, H, H), added over the gates: a chain over all of them errs more than PyTorch's."""
    return torch.bmm(adjoints.transpose(0, 1), w_gates).sum(0)


def _reversed(steps: Tensor) -> tuple[Tensor, ...]:
    return steps.unbind(0)[::-1]


def _shifted(steps: Tensor) -> Tensor:
    """Each step's row at the step before it, zeros at the last."""
    return torch.cat([steps[1:], torch.zeros_like(steps[:1])])


_WALKS = {"RNN_TANH": _rnn, "RNN_RELU": _rnn, "GRU": _gru, "LSTM": _lstm}


def gradient(
    v: Sequence[Tensor | None],
    given: Sequence[Tensor | None],
    x: Tensor,
    weights: Sequence[Tensor],
    h0: Tensor | None,
    c0: Tensor | None,
    layer: Layer,
    saved: Sequence[Tensor],
    deltas: tuple[Tensor, Tensor | None],
    need: Sequence[bool],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The gradients by `given`, and by (x, h0, c0, *weights), of <v, the backward's results>.

    v: gradients by the results, in the order of (x, h0, c0, *weights), None: 0. saved: (y, gates, cell); deltas: the
    backward's dgates and, of a GRU, dm (csrc/mmfast.h).
    """
    parts = _parts(v, given, x, weights, h0, c0, layer, saved, deltas)
    found = [_WALKS[layer.mode](part) for part in parts]
    by_given: list[Tensor | None] = [
        torch.cat([_ordered(each.h, d) for d, each in enumerate(found)], -1),
        torch.stack([each.h[-1] for each in found]),
        torch.stack([each.cn for each in found]) if layer.mode == "LSTM" else None,  # type: ignore[misc]
    ]
    dweights: list[Tensor | None] = [None] * len(weights)
    if any(need[3:]):
        dweights = [dw for part, each in zip(parts, found, strict=True) for dw in _weight_gradients(part, each)]
    dx = None
    if need[0]:
        each_dx = [_ordered(_input_gradient(*pair), d) for d, pair in enumerate(zip(parts, found, strict=True))]
        dx = each_dx[0] if len(each_dx) == 1 else each_dx[0] + each_dx[1]
    dh0 = None if h0 is None else torch.stack([each.h0 for each in found])
    dc0 = None if c0 is None else torch.stack([each.c0 for each in found])  # type: ignore[misc]
    return by_given, [dx, dh0, dc0, *dweights]


def _ordered(steps: Tensor, direction: int) -> Tensor:
    """From the order of the direction's walk to that of time, and back."""
    return steps.flip(0) if direction else steps


def _parts(v, given, x, weights, h0, c0, layer: Layer, saved, deltas) -> list[Part]:
    (steps, batch), directions, gates = x.shape[:2], layer.directions, GATES[layer.mode]
    hidden = weights[1].shape[1]
    y, saved_gates, saved_cell = saved
    dy, dhn, dcn = given
    vx, vh0, vc0, *vw = v
    zero = y.new_zeros(directions, batch, hidden)
    each = len(weights) // directions

    def steps_of(rows: Tensor, d: int) -> Tensor:
        return _ordered(rows.view(steps, batch, -1).chunk(directions, -1)[d], d).contiguous()

    parts = []
    for d, w in enumerate(split(weights, directions)):
        delta = steps_of(deltas[0], d).unflatten(-1, (gates, hidden))
        delta_hh = delta
        if deltas[1] is not None:
            delta_hh = torch.cat([delta[:, :, :2], steps_of(deltas[1], d)[:, :, None]], 2)
        dy_d = torch.zeros_like(delta[:, :, 0]) if dy is None else steps_of(dy.contiguous(), d)
        if dhn is not None:
            dy_d = dy_d if dy is None else dy_d.clone()
            dy_d[-1] += dhn[d]
        v_ih, v_hh, *v_bias = vw[d * each : (d + 1) * each]
        vb_ih, vb_hh = v_bias or (None, None)
        h0_d, c0_d, vh0_d, vc0_d = (zero[d] if state is None else state[d] for state in (h0, c0, vh0, vc0))
        parts.append(
            Part(
                layer.mode,
                w,
                Tangents(v_ih, v_hh, vb_ih, vb_hh),
                _ordered(x, d),
                None if vx is None else _ordered(vx, d),
                steps_of(y, d),
                steps_of(saved_gates, d).unflatten(-1, (gates, hidden)) if gates > 1 else saved_gates,
                steps_of(saved_cell, d) if gates > 1 else saved_cell,
                h0_d,
                c0_d,
                vh0_d,
                vc0_d,
                delta,
                delta_hh,
                dy_d,
                None if dcn is None else dcn[d],
            )
        )
    return parts


def _input_gradient(part: Part, found: Found) -> Tensor:
    dx = product(found.gx.flatten(0, 1).flatten(1), part.w.w_ih)
    if part.v.w_ih is not None:
        product(part.delta.flatten(0, 1).flatten(1), part.v.w_ih, out=dx, add=True)
    return dx.view(part.x.shape)


def _weight_gradients(part: Part, found: Found) -> list[Tensor | None]:
    """By (w_ih, w_hh[, b_ih, b_hh])."""
    gx, hh = found.gx.flatten(0, 1).flatten(1), found.hh.flatten(0, 1).flatten(1)
    dw_ih = _product(part, gx, part.x)
    if part.vx is not None:
        dw_ih += _product(part, part.delta.flatten(0, 1).flatten(1), part.vx)
    before = torch.cat([part.vh0[None], found.h[:-1]])
    dw_hh = _product(part, hh, part.before)
    dw_hh += _product(part, part.delta_hh.flatten(0, 1).flatten(1), before)
    return [dw_ih, dw_hh] if part.w.b_ih is None else [dw_ih, dw_hh, gx.sum(0), hh.sum(0)]


def _product(part: Part, left: Tensor, right: Tensor) -> Tensor:
    """left^T right of (T * B, m) and (T, B, n)"""
    out = left.new_empty(left.shape[1], right.shape[2])
    return sum_over_rows(left, right.flatten(0, 1), out, chain_of(part.mode, *right.shape[:2]))
