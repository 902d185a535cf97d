"""The recurrent op: the walk through time against float64 by the rule of numerics.py, and everything around it."""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import mmfast
from mmfast import native, numerics
from mmfast.ops.rnn import equations
from mmfast.ops.rnn.backends import OP
from mmfast.ops.rnn.equations import GATES, MODES, Layer
from mmfast.ops.rnn.op import sequence

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
per_mode = pytest.mark.parametrize("mode", list(MODES))
per_directions = pytest.mark.parametrize("directions", [1, 2], ids=["uni", "bi"])


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Problem(NamedTuple):
    """Inputs of a layer; `scale` multiplies the weights, so large ones saturate and small ones stay near 0."""

    x: Tensor
    weights: list[Tensor]
    states: list[Tensor]
    layer: Layer

    def to(self, dtype: torch.dtype) -> "Problem":
        cast = functools.partial(torch.Tensor.to, dtype=dtype)
        drop = self.layer.dropout_mask
        layer = self.layer._replace(dropout_mask=None if drop is None else cast(drop))
        return Problem(cast(self.x), [cast(w) for w in self.weights], [cast(h) for h in self.states], layer)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.x, *self.states, *self.weights]


def draw(
    mode,
    shape,
    directions=1,
    *,
    seed=0,
    kind="padded",
    scale=1.0,
    bias=True,
    states=True,
    dtype=torch.float64,
    proj=0,
    extras=(),
):
    """A problem of shape (T, B, I, H): padded, with "lengths" or "packed", its numbers those of `dtype`.

    extras: of "resets", "zoneout" (its mask), "rate" (its mean) and "dropout".
    """
    steps, batch, inputs, hidden = shape
    generator = torch.Generator().manual_seed(seed)
    normal = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    rows, weights = GATES[mode] * hidden, []
    for _ in range(directions):
        # a large W_hh would make the recurrence chaotic: any two roundings of it end far apart
        weights += [normal(rows, inputs) * scale / inputs**0.5]
        weights += [normal(rows, proj or hidden) * min(scale, 0.6) / hidden**0.5]
        weights += [normal(rows) * scale * 0.3 for _ in range(2 * bias)]
        weights += [normal(proj, hidden) / hidden**0.5] * (proj > 0)
    sizes = [proj or hidden, hidden][: (1 + (mode == "LSTM")) * states]
    initial = [normal(directions, batch, size) * 0.5 for size in sizes]
    x = normal(steps, batch, inputs)
    layer = Layer(mode, directions)
    if kind != "padded":
        lengths = torch.randint(1, steps + 1, (batch,), generator=generator)
        lengths[0] = steps
        layer = layer._replace(lengths=lengths)
        if kind == "packed":
            packed = pack_padded_sequence(x, lengths.sort(descending=True).values)
            x, layer = packed.data, Layer(mode, directions, packed.batch_sizes)
    uniform = functools.partial(torch.rand, generator=generator)
    width = directions * (proj or hidden)
    if "resets" in extras:
        layer = layer._replace(reset_mask=uniform(x.shape[:-1]) < 0.3)
    if "zoneout" in extras:
        layer = layer._replace(zoneout_mask=uniform(*x.shape[:-1], width) < 0.4)
    if "rate" in extras:
        layer = layer._replace(zoneout=0.3)
    if "dropout" in extras:
        mask = (uniform(directions, batch, proj or hidden) < 0.7).double() / 0.7
        layer = layer._replace(dropout_mask=mask.to(dtype))
    return Problem(x, weights, initial, layer).to(dtype).to(torch.float64)


def results(function, problem: Problem, cotangents: list[Tensor] | None = None) -> dict[str, Tensor]:
    """Outputs of `function(x, weights, h0, c0, layer)`, and the gradients of sum(output * cotangent)."""
    inputs = [a.detach().requires_grad_() for a in problem.tensors]  # whose strides a copy would not have
    x, rest = inputs[0], inputs[1:]
    states, weights = rest[: len(problem.states)], rest[len(problem.states) :]
    h0, c0 = (*states, None, None)[:2]
    outputs = function(x, weights, h0, c0, problem.layer)[: 2 + (problem.layer.mode == "LSTM")]
    named = dict(zip(("y", "hn", "cn"), outputs, strict=False))
    if cotangents is None:
        cotangents = [random_like(out) for out in outputs]
    gradients = torch.autograd.grad(
        outputs, inputs, [c.to(out.dtype) for c, out in zip(cotangents, outputs, strict=True)]
    )
    labels = ["x", *("h0", "c0")[: len(states)], *(f"w{i}" for i in range(len(weights)))]
    return {**named, **{f"d{label}": g for label, g in zip(labels, gradients, strict=True)}}


def random_like(out: Tensor, seed: int = 1) -> Tensor:
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


cpu = functools.partial(sequence, backend="cpu")


def of_torch(x, weights, h0, c0, layer: Layer):
    """PyTorch's own layer."""
    batch = x.shape[1] if layer.batch_sizes is None else int(layer.batch_sizes[0])
    hidden = weights[1].shape[1]
    states = [x.new_zeros(layer.directions, batch, hidden) if s is None else s for s in (h0, c0)]
    hx = states if layer.mode == "LSTM" else states[0]
    options = (weights, len(weights) // layer.directions == 4, 1, 0.0, True, layer.directions == 2)
    function = getattr(torch._VF, layer.mode.lower())
    if layer.batch_sizes is not None:
        return function(x, layer.batch_sizes, hx, *options)
    return function(x, hx, *options, False)


def on(device: str, function):
    """`function(x, weights, h0, c0, layer)` on a device, of tensors on the CPU and with results there."""

    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    def call(x, weights, h0, c0, layer: Layer):
        masks = ("lengths", "reset_mask", "zoneout_mask", "dropout_mask")
        layer = layer._replace(**{name: moved(getattr(layer, name)) for name in masks})
        outputs = function(moved(x), [moved(w) for w in weights], moved(h0), moved(c0), layer)
        return tuple(None if out is None else out.cpu() for out in outputs)

    return call


# ---- gate functions


def all_magnitudes(dtype: torch.dtype) -> Tensor:
    """Positive and negative numbers of every exponent, evenly many of each, and what is special."""
    bits = torch.int32 if dtype == torch.float32 else torch.int64
    top = torch.tensor(float("inf"), dtype=dtype).view(bits)
    positive = torch.linspace(0, 1, 1 << 17, dtype=torch.float64).mul(float(top)).to(bits).view(dtype)
    special = torch.tensor([0.0, 5e-324, 1e-38, 1e-3, 0.1733, 0.3466, 87.3, 88.8, 104.0, float("inf")], dtype=dtype)
    positive = torch.cat([positive, torch.linspace(0, 110, 1 << 15, dtype=dtype), special])
    return torch.cat([positive, -positive])


@pytest.mark.parametrize("function", ["tanh", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_gate_functions(function, dtype, isa):
    """At most 2 ulp from the exact value, subnormal results included: h = tanh(x), or z of a GRU with n = 0, h' = 1."""
    x = all_magnitudes(dtype)
    if function == "tanh":
        weights = [torch.ones(1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype)]
        found = cpu(x[None, :, None], weights, None, None, Layer("RNN_TANH"))[0].flatten()
    else:
        weights = [torch.tensor([[0.0], [1.0], [0.0]], dtype=dtype), torch.zeros(3, 1, dtype=dtype)]
        finite = x.isfinite()  # inf times the weight 0 of the other gates is NaN
        x, state = x[finite], torch.ones(1, int(finite.sum()), 1, dtype=dtype)
        found = cpu(x[None, :, None], weights, state, None, Layer("GRU"))[0].flatten()
    exact = getattr(torch, function)(x.double())
    # torch's sigmoid in float64 underflows to 0 too early
    exact = torch.where(x.double() < -36, x.double().exp(), exact) if function == "sigmoid" else exact
    step = numerics._ulps(exact, dtype)
    off = ((found.double() - exact) / step).abs()
    # float64's reference is itself a rounded one
    assert off.max() <= (2 if dtype == torch.float32 else 3), f"{float(off.max())} ulp at {float(x[off.argmax()])}"
    if function == "tanh":
        assert torch.equal(found.sign(), x.sign())


@per_mode
def test_nan_spreads_as_in_torch(mode, isa):
    problem = draw(mode, (6, 4, 3, 20), seed=3, dtype=torch.float32).to(torch.float32)
    problem.x[2, 1, 0] = float("nan")
    problem.x[4, 3, 1] = float("inf")
    problem.x[1, 0, 2], problem.x[3, 2] = -float("inf"), float("inf")
    args = (problem.x, problem.weights, *(*problem.states, None)[:2], problem.layer)
    found, expected = cpu(*args)[0], of_torch(*args)[0]
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert found.isnan().any() and not found[0].isnan().any() and not found[:2, 1:].isnan().any()


# ---- numerics


SHAPES = {"T1-B9-I3-H17": (1, 9, 3, 17), "T7-B6-I5-H33": (7, 6, 5, 33), "T33-B13-I20-H64": (33, 13, 20, 64)}


def triples(
    problem: Problem, dtype: torch.dtype, *, of=cpu, rival=of_torch, truth=equations.sequence
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    reference = results(truth, problem)
    narrow = problem.to(dtype)
    ours, theirs = results(of, narrow), results(rival, narrow)
    if problem.layer.mode == "RNN_RELU":
        # relu's slope jumps where rounding carries a sum across 0: a few such jumps, other ones in each kernel, are the
        # whole error of a gradient; float64 has none of them, and test_any_shape and gradcheck hold the gradients
        reference = {name: reference[name] for name in ("y", "hn")}
    return {
        name: tuple(torch.cat([found[key].flatten() for key in keys]) for found in (ours, theirs, reference))
        for name, keys in grouped(reference).items()
    }


def grouped(names: Iterable[str]) -> dict[str, list[str]]:
    """What is of one kind, and so of one scale, is pooled: all initial states' gradients, all biases' ..."""
    groups: dict[str, list[str]] = {}
    # five weights a direction with a projection, four without
    kinds = "xhbbp" if sum(name.startswith("dw") for name in names) in (5, 10) else "xhbb"
    for name in names:
        kind = "dw" + kinds[int(name[2:]) % len(kinds)] if name.startswith("dw") else name.replace("dc0", "dh0")
        groups.setdefault(kind, []).append(name)
    return groups


def hold_to_formula(function, problem: Problem, tolerance: float = 2e-5) -> None:
    """A GPU backend's results in float32 against the formula's in float64."""
    found, expected = results(function, problem.to(torch.float32)), results(equations.sequence, problem)
    found = {name: value.double() for name, value in found.items()}
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def hold_second_order(function, problem: Problem) -> None:
    """The same of the gradients of a penalty on all gradients."""

    def second(function, problem):
        inputs = [a.clone().requires_grad_() for a in problem.tensors]
        states, weights = inputs[1 : 1 + len(problem.states)], inputs[1 + len(problem.states) :]
        y = function(inputs[0], weights, *(*states, None)[:2], problem.layer)[0]
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True, allow_unused=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first if g is not None), inputs)

    found, expected = second(function, problem.to(torch.float32)), second(equations.sequence, problem)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-5


@per_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_numerics(mode, dtype, shape, kind, seed):
    directions = 2 if kind == "packed" else 1

    def one(draw_seed):
        return triples(draw(mode, shape, directions, seed=draw_seed, kind=kind, dtype=dtype), dtype)

    numerics.assert_pooled(one, first_seed=seed)


@per_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_numerics_of_many_steps(mode, dtype, seed):
    """Packed, in both directions."""

    def one(draw_seed):
        shape = 128, 16, 16, 64  # two draws of which are enough
        return triples(draw(mode, shape, 2, seed=draw_seed, kind="packed", bias=False, dtype=dtype), dtype)

    numerics.assert_pooled(one, first_seed=seed)


EXTREMES = {
    # scale, shape, and how many draws make one sample: where gates saturate few values carry the largest error, which
    # each step multiplies; over 40 steps one sample in 20 was beyond the rule, of kernels whose rms errors are equal
    "saturated": (8.0, (6, 48, 4, 64), 8),
    "small": (1e-3, (40, 48, 4, 64), 1),
    "T1": (1.0, (1, 48, 16, 256), 1),
    "T128": (1.0, (128, 16, 16, 256), 1),
    "T300": (1.0, (300, 8, 16, 256), 1),
    "T4096": (1.0, (4096, 8, 16, 256), 1),
}


@per_mode
@pytest.mark.parametrize("extreme", EXTREMES)
def test_numerics_of_extremes(mode, extreme, seed):
    """Saturating weights, pre-activations around 1e-3, one step and thousands; PyTorch in float64 is the truth."""
    scale, shape, draws = EXTREMES[extreme]

    def one(draw_seed):
        # so many steps take PyTorch seconds, and biases' gradients alone are too few for two draws to be enough
        drawn = functools.partial(draw, mode, shape, scale=scale, bias=extreme != "T4096", dtype=torch.float32)
        problems = [drawn(seed=draw_seed * draws + i) for i in range(draws)]
        found = [triples(problem, torch.float32, truth=of_torch) for problem in problems]
        return {name: tuple(map(torch.cat, zip(*(of[name] for of in found), strict=True))) for name in found[0]}

    numerics.assert_pooled(one, first_seed=seed)


@per_mode
@pytest.mark.parametrize("lower", native.supported_isas()[:-1])
def test_instruction_sets(mode, lower):
    """A lower instruction set differs by rounding only; 33 units have a partial vector under each."""
    problem = draw(mode, (5, 7, 4, 33), 2, seed=5, kind="packed")
    best = results(cpu, problem)
    before = native.isa()
    native.set_isa(lower)
    try:
        found = results(cpu, problem)
    finally:
        native.set_isa(before)
    torch.testing.assert_close(found, best, rtol=1e-11, atol=1e-11)


MUTANTS = {
    "reset before the product": (
        "GRU",
        lambda p, s: s._replace(weights=[w * 1.02 if w.dim() > 1 else w for w in p.weights]),
    ),
    "h0 ignored": ("RNN_TANH", lambda p, s: s._replace(states=[torch.zeros_like(h) for h in p.states])),
    "c0 ignored": ("LSTM", lambda p, s: s._replace(states=[p.states[0], torch.zeros_like(p.states[1])])),
    "last step stale": ("LSTM", lambda p, s: s._replace(x=torch.cat([p.x[:-1], p.x[-2:-1]]))),
    "b_hh dropped": ("GRU", lambda p, s: s._replace(weights=[*p.weights[:3], torch.zeros_like(p.weights[3])])),
    "one unit's weights wrong": ("RNN_RELU", lambda p, s: s._replace(weights=[p.weights[0].flip(0), *p.weights[1:]])),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_numerics_catch(mutant, seed):
    """The same rule fails for a layer with a planted error."""
    mode, change = MUTANTS[mutant]

    def one(draw_seed):
        problem = draw(mode, SHAPES["T7-B6-I5-H33"], seed=draw_seed, dtype=torch.bfloat16)
        wrong = change(problem, problem)
        reference = results(equations.sequence, problem)
        ours, theirs = results(cpu, wrong.to(torch.bfloat16)), results(of_torch, problem.to(torch.bfloat16))
        return {name: (ours[name], theirs[name], reference[name]) for name in ("y", "dx")}

    with pytest.raises(AssertionError):
        numerics.assert_pooled(one, first_seed=seed)


PRODUCTS = [(1, 1, 1), (3, 5, 7), (17, 33, 0), (9, 530, 600), (130, 700, 13), (0, 4, 4), (70, 1, 513), (33, 289, 129)]


@pytest.mark.parametrize("shape", PRODUCTS, ids=["x".join(map(str, shape)) for shape in PRODUCTS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize("layout", ["rows", "a transposed", "b transposed", "strided"])
def test_product(shape, dtype, layout, isa, seed):
    """The kernel's product, any layout and size: within a sum's rounding error, the same bits from two threads, and
    nothing written beside the result."""
    (m, n, k), generator = shape, torch.Generator().manual_seed(seed)
    normal = functools.partial(torch.randn, generator=generator, dtype=dtype)
    a = (
        normal(k, m).t()
        if layout == "a transposed"
        else normal(m, 2 * k)[:, ::2]
        if layout == "strided"
        else normal(m, k)
    )
    b = (
        normal(n, k).t()
        if layout == "b transposed"
        else normal(k, 2 * n)[:, ::2]
        if layout == "strided"
        else normal(k, n)
    )
    bias = normal(n)
    expected, scale = a.double() @ b.double(), a.double().abs() @ b.double().abs() + 1
    found = []
    for threads in (1, 2):
        wide = torch.full((m, n + 3), float("nan"), dtype=dtype)
        torch.set_num_threads(threads)
        native.cpu_product(a, b, bias, wide[:, :n], False)
        assert ((wide[:, :n] - expected - bias).abs() <= 8 * torch.finfo(dtype).eps * scale).all()
        native.cpu_product(a, b, None, wide[:, :n], True)
        assert ((wide[:, :n] - 2 * expected - bias).abs() <= 16 * torch.finfo(dtype).eps * scale).all()
        assert wide[:, n:].isnan().all()
        found.append(wide[:, :n])
    assert torch.equal(*found)


# ---- what must not matter


@per_mode
@per_directions
@pytest.mark.parametrize("batch", [1, 5])
def test_threads_do_not_change_a_bit(mode, directions, batch):
    problem = draw(mode, (40, batch, 8, 129), directions, seed=7, dtype=torch.float32).to(torch.float32)
    args = (problem.x, problem.weights, *(*problem.states, None)[:2], problem.layer)
    backend = OP.backends["cpu"]
    outcomes = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        y, hn, cn, gates, cell = backend.forward(*args, True)
        given = [None if out is None else random_like(out).to(out.dtype) for out in (y, hn, cn)]
        torch.set_num_threads(threads)
        need = [True] * (3 + len(problem.weights))
        # dx and the matrices' gradients may be torch's products; the others are the recurrence's own
        gradients = [d for d in backend.backward(given, *args, (y, gates, cell), need)[1:] if d is None or d.dim() != 2]
        outcomes.append([a for a in (y, hn, cn, gates, cell, *gradients) if a is not None])
    assert len(outcomes[0]) >= 3 + 2 * directions
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))


@pytest.mark.parametrize("mode", [*MODES, "LSTM-proj"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_a_call_repeats_bit_for_bit(mode, threads, dtype):
    """All gradients, the products' too."""
    torch.set_num_threads(threads)
    mode, _, proj = mode.partition("-")
    for kind in ("padded", "packed", "lengths"):
        problem = draw(mode, (12, 7, 40, 65), 2, seed=7, kind=kind, proj=17 * bool(proj), dtype=dtype).to(dtype)
        once, again = results(cpu, problem), results(cpu, problem)
        assert all(torch.equal(once[name], again[name]) for name in once), kind


@per_mode
def test_a_permuted_batch_gives_the_permuted_result(mode):
    problem = draw(mode, (9, 11, 4, 20), 2, seed=8, kind="lengths", dtype=torch.float32).to(torch.float32)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(2))
    layer = problem.layer._replace(lengths=problem.layer.lengths[order])
    states = [h[:, order].contiguous() for h in problem.states]
    permuted = Problem(problem.x[:, order].contiguous(), problem.weights, states, layer)
    outputs = [torch.empty(9, 11, 40), *(torch.empty(2, 11, 20) for _ in states)]
    cotangents = [random_like(out) for out in outputs]
    found = results(cpu, permuted, [each[:, order] for each in cotangents])
    expected = results(cpu, problem, cotangents)
    expected = {name: a if name.startswith("dw") else a[:, order] for name, a in expected.items()}
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@per_mode
@per_directions
def test_packed_is_lengths_is_one_by_one(mode, directions):
    """Of the same sequences: lengths on padded input, a PackedSequence, and each sequence alone, gradients too."""
    problem = draw(mode, (8, 5, 3, 18), directions, seed=9, kind="lengths")
    lengths = problem.layer.lengths
    cotangent = random_like(torch.empty(8, 5, directions * 18))
    for b, length in enumerate(lengths.tolist()):
        cotangent[length:, b] = 5.0  # what is past a length must not matter
    ends = [random_like(h, seed=3) for h in problem.states]

    def by_lengths(x, weights, h0, c0, layer):
        return cpu(x, weights, h0, c0, layer)

    def by_packing(x, weights, h0, c0, layer):
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        states = [None if s is None else s[:, packed.sorted_indices] for s in (h0, c0)]
        y, *last = cpu(packed.data, weights, *states, Layer(mode, directions, packed.batch_sizes))
        y = PackedSequence(y, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
        last = [None if s is None else s[:, packed.unsorted_indices] for s in last]
        return pad_packed_sequence(y, total_length=8)[0], *last

    def one_by_one(x, weights, h0, c0, layer):
        each = []
        for b, length in enumerate(lengths.tolist()):
            states = [None if s is None else s[:, b : b + 1].contiguous() for s in (h0, c0)]
            y, *last = cpu(x[:length, b : b + 1].contiguous(), weights, *states, Layer(mode, directions))
            each.append([torch.nn.functional.pad(y, (0, 0, 0, 0, 0, 8 - length)), *last])
        y, hn, cn = zip(*each, strict=True)
        return torch.cat(y, 1), torch.cat(hn, 1), torch.cat(cn, 1) if mode == "LSTM" else None

    ways = [by_lengths, by_packing, one_by_one, equations.sequence]
    first, *others = [results(way, problem, [cotangent, *ends]) for way in ways]
    assert not first["y"][int(lengths.min()) :, int(lengths.argmin())].any()
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-10, atol=1e-10)


@per_mode
def test_lengths_of_zero(mode):
    """As a device's or a compiled graph's lengths may be: outputs 0, the state passes through."""
    problem = draw(mode, (4, 3, 2, 5), 2, seed=10)
    problem = problem._replace(layer=problem.layer._replace(lengths=torch.tensor([4, 0, -3])))
    found, expected = results(cpu, problem), results(equations.sequence, problem)
    torch.testing.assert_close(found, expected)
    assert torch.equal(found["hn"][:, 1:], problem.states[0][:, 1:])


# ---- derivatives


GRADCHECKS = [
    (mode, kind, states, ()) for mode in MODES for kind in ("padded", "packed", "lengths") for states in (0, 1)
]
GRADCHECKS += [("LSTM-proj", kind, 1, extras) for kind in ("padded", "packed") for extras in ((), ("resets", "rate"))]
GRADCHECKS += [(mode, kind, 1, ("resets", "zoneout", "dropout")) for mode in MODES for kind in ("padded", "packed")]


@pytest.mark.parametrize(
    ("mode", "kind", "states", "extras"),
    GRADCHECKS,
    ids=["-".join([mode, kind, "h0" if states else "none", *extras]) for mode, kind, states, extras in GRADCHECKS],
)
def test_gradcheck(mode, kind, states, extras):
    mode, _, proj = mode.partition("-")
    shape, proj = (2 if extras or proj else 3, 2, 2, 2), int(proj != "")
    problem = draw(mode, shape, 2, seed=11, kind=kind, states=states, bias=bool(states), proj=proj, extras=extras)
    inputs = [a.clone().requires_grad_() for a in problem.tensors]

    def outputs(x, *rest):
        initial, weights = rest[: len(problem.states)], list(rest[len(problem.states) :])
        return cpu(x, weights, *(*initial, None, None)[:2], problem.layer)[: 2 + (mode == "LSTM")]

    assert torch.autograd.gradcheck(outputs, inputs)
    if mode != "RNN_RELU":
        assert torch.autograd.gradgradcheck(outputs, inputs, atol=1e-4)


def test_no_gradient_through_what_the_inputs_were_made_from():
    """A second derivative where x itself depends on a weight of the layer."""
    problem = draw("GRU", (3, 2, 4, 4), seed=12)
    weights = [w.clone().requires_grad_() for w in problem.weights]

    def penalty(function):
        x = problem.x @ weights[1][:4]
        y = function(x, weights, *problem.states, None, problem.layer)[0]
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), weights)

    torch.testing.assert_close(penalty(cpu), penalty(equations.sequence))


@per_mode
def test_only_what_is_needed(mode):
    problem = draw(mode, (3, 2, 4, 5), 2, seed=13)
    everything = results(cpu, problem)
    names = [name for name in everything if name.startswith("d")]
    for wanted in range(len(names)):
        inputs = [a.clone().requires_grad_(i == wanted) for i, a in enumerate(problem.tensors)]
        initial, weights = inputs[1 : 1 + len(problem.states)], inputs[1 + len(problem.states) :]
        outputs = cpu(inputs[0], weights, *(*initial, None)[:2], problem.layer)[: 2 + (mode == "LSTM")]
        (found,) = torch.autograd.grad(outputs, inputs[wanted], [random_like(out) for out in outputs])
        torch.testing.assert_close(found, everything[names[wanted]])


LAYERS = {"RNN": {}, "GRU": {}, "LSTM": {}, "GRU-bi-L2": {"bidirectional": True, "num_layers": 2}}
CELLS = ["RNNCell", "GRUCell", "LSTMCell"]


def layer_of(label: str, nn=mmfast.nn, **options):
    torch.manual_seed(5)
    return getattr(nn, label.partition("-")[0])(4, 6, **LAYERS.get(label, {}), **options)


def first(outputs) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else outputs[0]


@pytest.mark.parametrize("label", [*LAYERS, *CELLS])
def test_transforms(label):
    """torch.func and forward mode, which torch.nn's own do not all serve."""
    module, x = layer_of(label).double(), torch.randn(*(5,) * (label in LAYERS), 3, 4, dtype=torch.float64)
    tangent = torch.randn_like(x)

    def total(x):
        return first(module(x)).square().sum()

    expected = torch.autograd.grad(total(leaf := x.clone().requires_grad_()), leaf)[0]
    torch.testing.assert_close(torch.func.grad(total)(x), expected)
    _, found = torch.func.jvp(total, (x,), (tangent,))
    torch.testing.assert_close(found, (expected * tangent).sum())
    batched = torch.func.vmap(lambda x: first(module(x)))(torch.stack([x, tangent]))
    torch.testing.assert_close(batched, torch.stack([first(module(x)), first(module(tangent))]))
    each = torch.func.vmap(torch.func.grad(total))(torch.stack([tangent, x]))
    torch.testing.assert_close(each[1], expected)


@pytest.mark.parametrize("label", LAYERS)
@pytest.mark.parametrize("backend", ["cpu", None])
def test_lengths_that_are_mapped_over(label, backend):
    """Clamped, as none can be looked at."""
    module, x = layer_of(label, backend=backend).double(), torch.randn(2, 5, 3, 4, dtype=torch.float64)
    lengths = torch.tensor([[5, 2, 0], [1, 9, 3]])
    found = torch.func.vmap(lambda x, lengths: module(x, lengths=lengths)[0])(x, lengths)
    expected = torch.stack([module(a, lengths=b)[0] for a, b in zip(x, lengths.clamp(1, 5), strict=True)])
    expected[0, :, 2] = 0
    torch.testing.assert_close(found, expected)
