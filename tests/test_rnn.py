"""The recurrent op: the walk through time against float64 by the rule of numerics.py, and everything around it."""

import functools
import multiprocessing
from collections.abc import Iterable
from typing import NamedTuple

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import mmfast
from mmfast import native, numerics
from mmfast.bench.cases import GATES as GATES_OF_CASES
from mmfast.bench.cases import RnnCase
from mmfast.bench.measure import peak_memory
from mmfast.dispatch import asked
from mmfast.ops.rnn import equations
from mmfast.ops.rnn.backends import OP, native_layer, sizes_of
from mmfast.ops.rnn.equations import GATES, MODES, Layer
from mmfast.ops.rnn.op import backward_op, forward_op, sequence

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
    inputs = [a.clone().requires_grad_() for a in problem.tensors]
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


@pytest.fixture(params=native.supported_isas())
def isa(request):
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


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
    args = (problem.x, problem.weights, *(*problem.states, None)[:2], problem.layer)
    found, expected = cpu(*args)[0], of_torch(*args)[0]
    assert torch.equal(found.isnan(), expected.isnan())
    assert found.isnan().any() and not found[:2].isnan().any()


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


EXTREMES = {
    # scale, shape, and how many draws make one sample: where gates saturate few values carry the largest error, and
    # between two of PyTorch's own kernels the max of c_n over two draws differs by up to 1.7 x
    "saturated": (8.0, (40, 48, 4, 64), 4),
    "small": (1e-3, (40, 48, 4, 64), 1),
    "T1": (1.0, (1, 48, 16, 256), 1),
    "T128": (1.0, (128, 16, 16, 256), 1),
    "T4096": (1.0, (4096, 2, 16, 256), 1),
}


@per_mode
@pytest.mark.parametrize("extreme", EXTREMES)
def test_numerics_of_extremes(mode, extreme, seed):
    """Saturating weights, pre-activations around 1e-3, one step and thousands; PyTorch in float64 is the truth."""
    scale, shape, draws = EXTREMES[extreme]

    def one(draw_seed):
        problems = [
            draw(mode, shape, seed=draw_seed * draws + i, scale=scale, dtype=torch.float32) for i in range(draws)
        ]
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


PRODUCTS = [(1, 1, 1), (3, 5, 7), (17, 33, 0), (9, 50, 600), (130, 700, 13), (0, 4, 4), (70, 1, 513), (33, 289, 129)]


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


@per_mode
def test_a_permuted_batch_gives_the_permuted_result(mode):
    problem = draw(mode, (9, 11, 4, 20), 2, seed=8, kind="lengths", dtype=torch.float32).to(torch.float32)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(2))
    layer = problem.layer._replace(lengths=problem.layer.lengths[order])
    states = [h[:, order].contiguous() for h in problem.states]
    permuted = Problem(problem.x[:, order].contiguous(), problem.weights, states, layer)
    found, expected = results(cpu, permuted)["y"], results(cpu, problem)["y"]
    torch.testing.assert_close(found, expected[:, order], rtol=1e-6, atol=1e-6)


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


@per_mode
@pytest.mark.parametrize("kind", ["padded", "packed", "lengths"])
@pytest.mark.parametrize("states", [True, False], ids=["h0", "none"])
def test_gradcheck(mode, kind, states):
    problem = draw(mode, (3, 2, 2, 2), 2, seed=11, kind=kind, states=states, bias=states)
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


def layer_of(label: str, nn=mmfast.nn, **options):
    torch.manual_seed(5)
    return getattr(nn, label.partition("-")[0])(4, 6, **LAYERS.get(label, {}), **options)


@pytest.mark.parametrize("label", LAYERS)
def test_transforms(label):
    """torch.func and forward mode, which torch.nn's own layers do not all serve."""
    module, x = layer_of(label).double(), torch.randn(5, 3, 4, dtype=torch.float64)
    tangent = torch.randn_like(x)

    def total(x):
        return module(x)[0].square().sum()

    expected = torch.autograd.grad(total(leaf := x.clone().requires_grad_()), leaf)[0]
    torch.testing.assert_close(torch.func.grad(total)(x), expected)
    _, found = torch.func.jvp(total, (x,), (tangent,))
    torch.testing.assert_close(found, (expected * tangent).sum())
    batched = torch.func.vmap(lambda x: module(x)[0])(torch.stack([x, tangent]))
    torch.testing.assert_close(batched, torch.stack([module(x)[0], module(tangent)[0]]))


# ---- the layers


@pytest.mark.parametrize("label", LAYERS)
@pytest.mark.parametrize("batch_first", [False, True], ids=["tbi", "bti"])
def test_layers_equal_torch(label, batch_first):
    """The stack, its dropout drawn as PyTorch draws it, and strided input."""
    with pytest.warns(UserWarning) if "L2" not in label else _quiet():
        ours = layer_of(label, batch_first=batch_first, dropout=0.4, backend="cpu")
        theirs = layer_of(label, torch.nn, batch_first=batch_first, dropout=0.4)
    x = torch.randn(5, 3, 8)[:, :, ::2]
    outcomes = []
    for module in (ours, theirs):
        torch.manual_seed(11)
        leaf = x.clone().requires_grad_()
        y, hx = module(leaf)
        y.mul(torch.arange(1.0, 1 + y.numel()).view(y.shape) / y.numel()).sum().backward()
        outcomes.append([y, hx, leaf.grad, [p.grad for p in module.parameters()]])
    torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-5)


class _quiet:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


@pytest.mark.parametrize("label", LAYERS)
def test_lengths_of_a_layer(label):
    module, x = layer_of(label, backend="cpu"), torch.randn(7, 3, 4)
    lengths = torch.tensor([3, 7, 1])
    found = module(x, lengths=lengths)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    y, hx = module(packed)
    torch.testing.assert_close(found, (pad_packed_sequence(y, total_length=7)[0], hx))
    with mmfast.use_backend("torch"):
        module.backend = None
        torch.testing.assert_close(module(x, lengths=lengths), found)


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        (torch.tensor([0, 3]), "greater than 0"),
        (torch.tensor([8, 3]), "has only 7 steps"),
        (torch.tensor([3]), "equal to batch_size"),
        (torch.tensor([3.0, 2.0]), "expected integers"),
    ],
    ids=["zero", "long", "few", "float"],
)
def test_wrong_lengths(lengths, words):
    with pytest.raises(RuntimeError, match=words):
        layer_of("GRU")(torch.randn(7, 2, 4), lengths=lengths)


def test_lengths_need_padded_input():
    packed = pack_padded_sequence(torch.randn(7, 2, 4), [7, 3])
    for x in (packed, torch.randn(7, 4)):
        with pytest.raises(RuntimeError, match="expected padded 3-D input"):
            layer_of("GRU")(x, lengths=torch.tensor([7, 3]))


@pytest.mark.parametrize("sizes", [[3, 3, 1], [1, 2, 3], [3, 3, 0], [6, 1]], ids=str)
def test_wrong_batch_sizes(sizes):
    """Nothing is read past an end."""
    problem = draw("GRU", (2, 3, 4, 5), states=False)
    layer = Layer("GRU", batch_sizes=torch.tensor(sizes))
    with pytest.raises(RuntimeError, match="never rise and add up"):
        cpu(problem.x.view(6, 4), problem.weights, None, None, layer)


def test_states_of_another_dtype():
    problem = draw("LSTM", (2, 3, 4, 5))
    with pytest.raises(RuntimeError, match=r"torch.float32 on cpu; expected the input's torch.float64"):
        cpu(problem.x, problem.weights, problem.states[0].float(), problem.states[1], problem.layer)


def test_a_parametrized_recurrent_weight_learns():
    """PyTorch's layers go on with the weight that they flattened when they were made."""
    module = layer_of("LSTM")
    torch.nn.utils.parametrizations.spectral_norm(module, "weight_hh_l0")
    module(torch.randn(5, 3, 4))[0].sum().backward()
    assert module.parametrizations.weight_hh_l0.original.grad.abs().max() > 0


@given(
    st.sampled_from(list(MODES)),
    *[st.integers(0, 9)] * 2,
    st.integers(1, 40),
    st.sampled_from([1, 2]),
    st.booleans(),
    st.sampled_from(["padded", "packed", "lengths"]),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_shape(mode, steps, batch, hidden, directions, bias, kind):
    steps, batch = max(steps, 1), max(batch, int(kind != "padded"))
    problem = draw(mode, (steps, batch, 3, hidden), directions, seed=steps, kind=kind, bias=bias)
    torch.testing.assert_close(results(cpu, problem), results(equations.sequence, problem), rtol=1e-9, atol=1e-9)


# ---- what PyTorch's layers lack


def pieces_of(length: int, resets: Tensor) -> list[slice]:
    """The parts of a sequence of `length` steps that its resets cut it into."""
    starts = [0, *(t for t in range(1, length) if resets[t])]
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], length], strict=True)]


@pytest.mark.parametrize("label", LAYERS)
@pytest.mark.parametrize("kind", ["padded", "lengths", "packed"])
def test_a_sequence_with_resets_is_its_parts_one_by_one(label, kind):
    module, x = layer_of(label).double(), torch.randn(9, 4, 4, dtype=torch.float64)
    lengths = torch.full((4,), 9) if kind == "padded" else torch.tensor([9, 2, 6, 1])
    resets = torch.rand(9, 4) < 0.3
    if kind == "packed":
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        rows = pack_padded_sequence(resets, lengths, enforce_sorted=False).data
        found = pad_packed_sequence(module(packed, reset_mask=rows)[0])[0]
    else:
        found = module(x, lengths=lengths if kind == "lengths" else None, reset_mask=resets)[0]
    for b, length in enumerate(lengths.tolist()):
        each = [module(x[piece, b])[0] for piece in pieces_of(length, resets[:, b])]
        torch.testing.assert_close(found[:length, b], torch.cat(each))
        assert not found[length:, b].any()


@pytest.mark.parametrize("label", ["RNN", "GRU", "LSTM"])
def test_a_reset_at_step_0_keeps_the_initial_state_out(label):
    module, x = layer_of(label), torch.randn(5, 3, 4)
    hx = tuple(torch.randn(1, 3, 6) for _ in range(2)) if label == "LSTM" else torch.randn(1, 3, 6)
    resets = torch.zeros(5, 3, dtype=torch.uint8)
    torch.testing.assert_close(module(x, hx, reset_mask=resets), module(x, hx))
    resets[0] = 1
    torch.testing.assert_close(module(x, hx, reset_mask=resets), module(x))


@pytest.mark.parametrize("label", LAYERS)
def test_zoneout_and_recurrent_dropout(label):
    """Masks by torch's generator in training, zoneout's mean and no dropout in evaluation."""
    module, x = layer_of(label, zoneout=0.5, recurrent_dropout=0.5), torch.randn(60, 3, 4)
    assert "zoneout=0.5, recurrent_dropout=0.5" in repr(module)
    torch.manual_seed(1)
    y = module(x)[0]
    assert not torch.equal(y, module(x)[0])
    torch.manual_seed(1)
    assert torch.equal(y, module(x)[0])
    module.recurrent_dropout = 0.0
    y = module(x)[0]
    stayed = (y[1:, :, :6] == y[:-1, :, :6]).double().mean()
    assert 0.42 < stayed < 0.58
    module.eval()
    assert torch.equal(module(x)[0], module(x)[0])
    module.zoneout, module.recurrent_dropout = 0.0, 0.5
    torch.testing.assert_close(module(x), layer_of(label).eval()(x))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (
            {"reset_mask": torch.zeros(5, 2, dtype=torch.bool)},
            RuntimeError,
            r"the shape \(5, 2\); expected .* \(7, 2\)",
        ),
        ({"reset_mask": torch.zeros(7, 2)}, RuntimeError, "expected bool or integers"),
        ({"zoneout": 1.0}, ValueError, "zoneout is 1.0; expected a probability"),
        ({"recurrent_dropout": -0.1}, ValueError, "recurrent_dropout is -0.1; expected a probability"),
    ],
    ids=["shape", "float", "zoneout", "recurrent-dropout"],
)
def test_wrong_extras(options, error, words):
    module = layer_of("GRU", **{name: rate for name, rate in options.items() if name != "reset_mask"})
    with pytest.raises(error, match=words):
        module(torch.randn(7, 2, 4), reset_mask=options.get("reset_mask"))


EXTRAS = {
    "resets": ("resets",),
    "zoneout": ("zoneout",),
    "rate": ("rate",),
    "dropout": ("dropout",),
    "all": ("resets", "zoneout", "dropout"),
    "mean": ("resets", "rate", "dropout"),
    "none": (),
}
MODES_AND_PROJECTION = {mode: (mode, 0) for mode in MODES} | {"LSTM-proj": ("LSTM", 7)}


@pytest.mark.parametrize(("mode", "proj"), MODES_AND_PROJECTION.values(), ids=MODES_AND_PROJECTION)
@pytest.mark.parametrize("kind", ["padded", "packed", "lengths"])
@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
def test_extras(mode, proj, kind, extras):
    """The native kernel is the formula, gradients too; one sequence with three threads shares out its units."""
    for batch, threads in ((1, 3), (6, 1)):
        problem = draw(mode, (7, batch, 3, 37), 2, seed=21, kind=kind, proj=proj, extras=extras)
        torch.set_num_threads(threads)
        found, expected = results(cpu, problem), results(equations.sequence, problem)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("mode", "proj"), MODES_AND_PROJECTION.values(), ids=MODES_AND_PROJECTION)
def test_extras_of_each_instruction_set(mode, proj, isa):
    problem = draw(mode, (7, 6, 3, 37), 2, seed=22, kind="packed", proj=proj, extras=EXTRAS["all"])
    found, expected = results(cpu, problem), results(equations.sequence, problem)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("mode", "proj"), MODES_AND_PROJECTION.values(), ids=MODES_AND_PROJECTION)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=name_of)
def test_numerics_of_extras(mode, proj, dtype, seed):
    """By the rule, the yardstick being the formula in torch's operators in this dtype."""

    def one(draw_seed):
        problem = draw(mode, (9, 8, 5, 24), 2, seed=draw_seed, proj=proj, dtype=dtype, extras=EXTRAS["all"])
        return triples(problem, dtype, rival=equations.sequence)

    numerics.assert_pooled(one, first_seed=seed)


@pytest.mark.parametrize("label", ["RNNCell-tanh", "RNNCell-relu", "GRUCell", "LSTMCell"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("batch", [0, 1, 2, 5])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
def test_cells(label, dtype, batch, bias, isa):
    """Without gradients the cells' own kernel; sizes that fill no vector, strided input, no state."""
    name, _, nonlinearity = label.partition("-")
    options = {"nonlinearity": nonlinearity} if nonlinearity else {}
    theirs = getattr(torch.nn, name)(37, 29, bias=bias, **options).to(dtype)
    ours = getattr(mmfast.nn, name)(37, 29, bias=bias, backend="cpu", **options).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(batch, 74, dtype=dtype)[:, ::2]
    states = torch.randn(batch, 29, dtype=dtype), torch.randn(29, batch, dtype=dtype).t()
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(dtype, 1e-5)
    with torch.no_grad():
        for hx in (states if name == "LSTMCell" else states[1], None):
            torch.testing.assert_close(ours(x, hx), theirs(x, hx), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
def test_cells_refuse_as_torch_does(name):
    ours, theirs = getattr(mmfast.nn, name)(5, 6), getattr(torch.nn, name)(5, 6)
    h = torch.randn(2, 6)
    wrong = [
        (torch.randn(2, 4), h),
        (torch.randn(2, 5), torch.randn(2, 7)),
        (torch.randn(2, 5), torch.randn(3, 6)),
        (torch.randn(2, 5, dtype=torch.float64), h),
    ]
    for x, h in wrong:
        hx = (h, h) if name == "LSTMCell" else h
        with torch.no_grad(), pytest.raises(Exception) as expected:
            theirs(x, hx)
        with torch.no_grad(), pytest.raises(type(expected.value)):
            ours(x, hx)


@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
def test_cells_with_weights_elsewhere(name):
    """Never a kernel with the address of another device's memory, also where the choice was made before."""
    with torch.no_grad():
        getattr(mmfast.nn, name)(5, 6, backend="cpu")(torch.randn(1, 5))
        with pytest.raises(RuntimeError):
            getattr(mmfast.nn, name)(5, 6, device="meta", backend="cpu")(torch.randn(1, 5)).sum().item()


# ---- graphs


GRAPHS = [*LAYERS, "RNNCell", "GRUCell", "LSTMCell"]


def graph_inputs(label: str, kind: str, steps: int, batch: int) -> dict[str, Tensor]:
    if "Cell" in label:
        return {"input": torch.randn(batch, 4)}
    x = {"input": torch.randn(steps, batch, 4)}
    return x if kind == "padded" else {**x, "lengths": torch.arange(batch) % steps + 1}


def per_graph(function):
    """A Cell has no lengths."""
    pairs = [(label, kind) for label in GRAPHS for kind in ("padded", "lengths") if kind == "padded" or label in LAYERS]
    return pytest.mark.parametrize(("label", "kind"), pairs)(function)


@per_graph
def test_compile(label, kind):
    """One graph, compiled once more when T and B change, and never again."""
    torch._dynamo.reset()
    module = layer_of(label)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for steps, batch in ((5, 3), (9, 7), (4, 2), (11, 6)):
        inputs = graph_inputs(label, kind, steps, batch)
        outcomes = []
        for function in (compiled, module):
            leaf = inputs["input"].clone().requires_grad_()
            y = function(**{**inputs, "input": leaf})
            first = y[0] if isinstance(y, tuple) else y
            outcomes.append((y, torch.autograd.grad(first.square().sum(), leaf)))
        torch.testing.assert_close(*outcomes)
    assert counter.frame_count <= 2


@per_graph
def test_export(label, kind):
    module = layer_of(label)
    steps, batch = torch.export.Dim("steps", min=2), torch.export.Dim("batch", min=2)
    shapes = {"input": {0: batch} if "Cell" in label else {0: steps, 1: batch}}
    if kind == "lengths":
        shapes["lengths"] = {0: batch}
    program = torch.export.export(module, (), graph_inputs(label, kind, 5, 3), dynamic_shapes=shapes)
    nodes = [node for node in program.graph.nodes if node.op == "call_function" and "mmfast" in str(node.target)]
    if "Cell" not in label:
        assert len(nodes) == module.num_layers
    other = graph_inputs(label, kind, 8, 6)
    torch.testing.assert_close(program.module()(**other), module(**other))


@pytest.mark.parametrize("mode", ["RNN_TANH", "LSTM"])
def test_opcheck(mode):
    problem = draw(mode, (3, 2, 4, 5), 2, seed=15, kind="lengths")
    x, weights = problem.x.requires_grad_(), [w.requires_grad_() for w in problem.weights]
    states = (*problem.states, None)[:2]
    columns = (problem.layer.lengths, None, None, None, None, 0.0, mode, 2)
    torch.library.opcheck(forward_op, (x, weights, *states, *columns, True, "cpu"))
    with torch.no_grad():
        y, hn, _, gates, cell = forward_op(x, weights, *states, *columns, True, "cpu")
    need = [True, *(s is not None for s in states), *[True] * len(weights)]
    given = torch.randn_like(y), torch.randn_like(hn), None
    tests = ("test_schema", "test_faketensor")
    with torch.no_grad():
        torch.library.opcheck(
            backward_op, (*given, x, weights, *states, y, gates, cell, *columns, need, "cpu"), test_utils=tests
        )


# ---- memory and preference


@pytest.mark.parametrize("mode", GATES_OF_CASES)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_peak_memory(mode, packed):
    """Forward + backward: at most 1.05 times PyTorch's; here a third to three quarters."""
    case = RnnCase("memory", mode, 256, 32, 64, 128, packed=packed)
    (x,) = case.inputs(torch.Generator().manual_seed(0), torch.float32, "cpu")
    least = []
    for nn in (mmfast.nn, torch.nn):
        module, leaf = case.build(nn), x.clone().requires_grad_()
        module.backend = "cpu"

        def train(module=module, leaf=leaf):
            y = case.run(module, leaf)
            return torch.autograd.grad(y, [leaf, *module.parameters()], torch.ones_like(y))

        train()
        peaks = [peak_memory(train, "cpu") for _ in range(3)]
        if None in peaks:
            pytest.skip("this system does not tell a process's peak memory")
        least.append(min(peaks))
    ours, theirs = least
    assert 0 < ours <= 1.05 * theirs


def test_a_penalty_of_an_lstm_is_not_left_to_torch(monkeypatch):
    """oneDNN's LSTM differentiated twice is a loop over operators; a leaf that needs a gradient announces it."""
    monkeypatch.setattr(native, "isa", lambda: "avx512")
    module = mmfast.nn.LSTM(16, 64)
    leaf = torch.randn(64, 16, 16, requires_grad=True)
    chosen = [
        OP.explain(case).backend
        for x in (leaf.detach(), leaf, leaf * 1)
        for _, case in asked(functools.partial(module, x))
    ]
    assert chosen == ["torch", "cpu", "torch"]


# ---- processes


def test_fork_after_a_parallel_region():
    """As in a DataLoader's worker: the kernel, though it is given two threads, runs on the one that a fork has left."""
    problem = draw("GRU", (50, 4, 8, 64), seed=1)
    parts = equations.split(problem.weights, 1)
    gx = problem.x.view(200, 8) @ parts[0].w_ih.T
    torch.set_num_threads(2)
    row, alive = native_layer(problem.layer, sizes_of(*problem[:2], problem.layer), parts, None, None)
    y, hn = gx.new_empty(200, 64), gx.new_empty(1, 4, 64)

    def total() -> float:
        y.fill_(float("nan"))
        native.cpu_rnn_forward(row, gx, (None, None), (y, hn, None), [None])
        return sum(y.flatten().tolist())

    expected = total()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=lambda: queue.put(total()))
    process.start()
    assert queue.get(timeout=60) == expected
    process.join()
    del alive
