"""The recurrent op's CUDA kernels, in the emulator and on a GPU where there is one, by the rule of test_rnn.py."""

import functools
import types

import pytest
import torch
from test_module_db import INFOS, RECURRENT, hold_to_torch
from test_rnn import DTYPES, draw, hold_second_order, hold_to_formula, name_of, of_torch, on, results, triples

import mmfast
from mmfast import native, numerics
from mmfast.ops import portable
from mmfast.ops.rnn.backends import OP, Case
from mmfast.ops.rnn.equations import MODES
from mmfast.ops.rnn.op import sequence

per_mode = pytest.mark.parametrize("mode", list(MODES))
per_kind = pytest.mark.parametrize("kind", ["padded", "packed", "lengths"])
NARROW = [dtype for dtype in DTYPES if dtype != torch.float64]


@pytest.fixture(autouse=True)
def emulated(request, monkeypatch):
    """Threads in the order of the run's seed; unwritten memory is NaN, so that what a kernel leaves out shows.

    Float32 is not rounded to TF32, on a GPU either.
    """
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")
    native.emulator_order(request.config.option.seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    native.emulator_order(0)


@pytest.fixture(params=["cpu", *["cuda"] * torch.cuda.is_available()], ids=lambda device: f"cuda-{device}")
def device(request):
    return request.param


@pytest.fixture
def cuda(device):
    return on(device, functools.partial(sequence, backend="cuda"))


@pytest.fixture(params=["resident", "steps"])
def walk(request, monkeypatch):
    """W_hh on chip for all steps, and the op's own loop over steps, which nothing then fits."""
    if request.param == "steps":
        monkeypatch.setattr(native, "cuda_rnn_resident", lambda *_: 0)


@pytest.fixture
def close(cuda):
    return functools.partial(hold_to_formula, cuda)


def test_refusals():
    case = Case("cpu", torch.float32, "LSTM", 8, 16)
    asked = {
        "torch.float64": case._replace(dtype=torch.float64),
        "proj_size is 3": case._replace(proj_size=3),
        "zoneout is given": case._replace(zoneout=True),
        "recurrent_dropout is given": case._replace(recurrent_dropout=True),
        "autocast is on": case._replace(autocast=True, cell=True),
        "tensors are on xpu": case._replace(device="xpu"),
    }
    refused = OP.backends["cuda"].refusals
    assert not refused(case._replace(resets=True, packed=True, cell=True))
    for words, other in asked.items():
        assert any(words in sentence for sentence in refused(other)), words
    assert OP.select(case) != "cuda"
    # cuDNN's is PyTorch's layer
    for name in ("cuda", "triton"):
        assert OP.backends[name].reluctance(case._replace(device="cuda")) == "not measured on this device"


@per_mode
@per_kind
@pytest.mark.parametrize("extras", [(), ("resets",)], ids=["plain", "resets"])
@pytest.mark.parametrize("directions", [1, 2], ids=["uni", "bi"])
def test_the_formula(walk, close, mode, kind, extras, directions):
    """Units that fill no vector, and that do; rows past one block's."""
    states = directions == 2
    for hidden in (19, 32):
        close(draw(mode, (5, 17, 3, hidden), directions, seed=2, kind=kind, extras=extras, states=states, bias=states))


#: hidden sizes of float32 that a cluster of blocks shares: it leaves units free in one block, and whole blocks
SHARED = {"RNN_TANH": (150, 256), "RNN_RELU": (131, 200), "GRU": (70, 129), "LSTM": (67, 160)}


@per_mode
@per_kind
@pytest.mark.parametrize("extras", [(), ("resets",)], ids=["plain", "resets"])
def test_the_formula_of_clusters(close, mode, kind, extras):
    """The same of W_hh on several chips, 9 and 3 rows."""
    one, two = SHARED[mode]
    close(draw(mode, (6, 9, 3, one), 2, seed=2, kind=kind, extras=extras))
    close(draw(mode, (3, 3, 2, two), 1, seed=3, kind=kind, extras=extras, states=False, bias=False))


@per_mode
@pytest.mark.parametrize("shape", [(1, 1, 2, 1), (3, 0, 2, 5), (2, 3, 1, 129), (64, 2, 3, 8)], ids=str)
def test_shapes(walk, close, mode, shape):
    close(draw(mode, shape, 2, seed=4))


@per_mode
def test_lengths_of_zero(walk, close, mode):
    problem = draw(mode, (4, 3, 2, 5), 2, seed=10)
    close(problem._replace(layer=problem.layer._replace(lengths=torch.tensor([4, 0, -3]))))
    close(problem._replace(layer=problem.layer._replace(lengths=torch.tensor([0, 0, 0]))))


@per_mode
@pytest.mark.parametrize("kind", ["padded", "packed"])
@pytest.mark.parametrize("dtype", NARROW, ids=name_of)
def test_numerics(walk, device, cuda, mode, dtype, kind, seed):
    def one(draw_seed):
        problem = draw(mode, (6, 15, 5, 40), 2, seed=draw_seed, kind=kind, dtype=dtype)
        return triples(problem, dtype, of=cuda, rival=on(device, of_torch))

    numerics.assert_pooled(one, first_seed=seed)


#: of a block that holds so many units: mode, dtype, hidden size
FULL = [(mode, dtype, 120) for mode in MODES for dtype in (torch.float16, torch.bfloat16)]
FULL += [(mode, torch.bfloat16, 250) for mode in ("RNN_TANH", "RNN_RELU")]
FULL += [("GRU", torch.float32, 64), ("LSTM", torch.float32, 64), ("RNN_TANH", torch.float32, 124)]
#: of a cluster
SPREAD = [("LSTM", torch.bfloat16, 140), ("LSTM", torch.float16, 500), ("LSTM", torch.float32, 250)]
SPREAD += [("GRU", torch.float16, 250), ("GRU", torch.bfloat16, 512), ("GRU", torch.float32, 128)]
SPREAD += [("RNN_RELU", torch.float16, 300), ("RNN_TANH", torch.bfloat16, 512), ("RNN_TANH", torch.float32, 256)]


@pytest.mark.parametrize(
    ("mode", "dtype", "hidden"),
    FULL + SPREAD,
    ids=lambda value: name_of(value) if isinstance(value, torch.dtype) else str(value),
)
def test_numerics_of_full_chips(device, cuda, mode, dtype, hidden, seed):
    """Blocks and clusters as large as they are, units aligned or not; resets."""
    shape = (3, 5, 280, hidden) if (mode, dtype, hidden) in SPREAD else (5, 9, 96, hidden)

    def one(draw_seed):
        problem = draw(mode, shape, 2, seed=draw_seed, kind="lengths", dtype=dtype, extras=("resets",))
        return triples(
            problem,
            dtype,
            of=cuda,
            rival=functools.partial(sequence, backend="cpu") if device == "cpu" else on(device, of_torch),
        )

    numerics.assert_pooled(one, first_seed=seed)


@per_mode
def test_many_steps(device, cuda, mode, seed):
    problem = draw(mode, (64, 3, 4, 40), seed=seed, kind="packed", dtype=torch.bfloat16)
    numerics.assert_pooled(
        lambda _: triples(problem, torch.bfloat16, of=cuda, rival=on(device, of_torch)), first_seed=seed
    )


@per_mode
@pytest.mark.parametrize("hidden", [33, 260], ids=["block", "cluster"])
def test_one_launch(mode, hidden):
    """A pass: all sequences, all steps and both directions."""
    problem = draw(mode, (3, 10, 3, hidden), 2, kind="packed").to(torch.bfloat16)
    inputs = [a.requires_grad_() for a in problem.tensors]
    before = native.emulator_launches()
    states = (*problem.states, None)[:2]
    y = sequence(problem.x, problem.weights, *states, problem.layer, "cuda")[0]
    assert native.emulator_launches() - before == 1
    torch.autograd.grad(y.sum(), inputs)
    assert native.emulator_launches() - before == 2


@pytest.mark.parametrize(
    ("mode", "dtype", "block", "cluster"),
    [
        ("LSTM", torch.bfloat16, 128, 512),
        ("GRU", torch.float16, 128, 512),
        ("RNN_RELU", torch.bfloat16, 256, 512),
        ("LSTM", torch.float32, 64, 256),
        ("GRU", torch.float32, 64, 256),
        ("RNN_TANH", torch.float32, 128, 256),
    ],
)
def test_what_fits_on_chip(mode, dtype, block, cluster):
    """Many blocks run at once, of clusters fewer; there are none of a cluster that the device lacks."""
    at_once = functools.partial(native.cuda_rnn_resident, torch.empty(1, dtype=dtype), MODES[mode])
    assert at_once(block) >= 132
    assert 7 <= at_once(block + 1) <= 33
    assert at_once(cluster) >= 7
    assert at_once(cluster + 1) == 0


@per_mode
def test_tf32(cuda, mode, monkeypatch):
    """Where PyTorch's setting allows it, operands are rounded to 11 bits; results differ, by so much."""
    for hidden in (40, 131):
        problem = draw(mode, (4, 3, 3, hidden), 2, seed=8)
        monkeypatch.setattr(OP.backends["cuda"], "rounds", lambda _: False)
        full = results(cuda, problem.to(torch.float32))["y"]
        monkeypatch.setattr(OP.backends["cuda"], "rounds", lambda _: True)
        rounded = results(cuda, problem.to(torch.float32))["y"]
        assert 0 < (full - rounded).abs().max() < 4e-3


def test_pytorchs_setting_of_precision(monkeypatch):
    for precision, expected in (("ieee", False), ("tf32", True)):
        monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", precision)
        assert portable.uses_tf32() is expected
    for expected in (False, True):  # of versions without it
        monkeypatch.setattr(torch.backends, "cudnn", types.SimpleNamespace(allow_tf32=expected))
        assert portable.uses_tf32() is expected


@per_mode
def test_saturated_and_special_values(walk, device, cuda, mode):
    """Large sums neither overflow nor turn into NaN; NaN and infinity spread as in PyTorch's layer."""
    problem = draw(mode, (6, 4, 3, 20), seed=3, dtype=torch.float32).to(torch.float32)
    problem.x[1] *= 1e4
    problem.x[2, 1, 0] = float("nan")
    problem.x[4, 3, 1] = float("inf")
    args = (problem.x, problem.weights, *(*problem.states, None)[:2], problem.layer)
    found, expected = cuda(*args)[0], on(device, of_torch)(*args)[0]
    assert torch.equal(found.isnan(), expected.isnan())
    assert found.isnan().any() and not found[:2].isnan().any()


@per_mode
@per_kind
def test_double_backward(cuda, mode, kind):
    hold_second_order(cuda, draw(mode, (4, 3, 3, 5), 2, seed=5, kind=kind))


@pytest.mark.parametrize("name", RECURRENT)
def test_module_db(name, outcome, same):
    with mmfast.use_backend("cuda"):
        hold_to_torch(INFOS[name], name, "f32", True, None, outcome, same, without="proj_size")


@pytest.mark.parametrize("label", ["RNNCell-tanh", "RNNCell-relu", "GRUCell", "LSTMCell"])
@pytest.mark.parametrize("dtype", NARROW, ids=name_of)
@pytest.mark.parametrize("batch", [0, 1, 5])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
def test_cells(label, dtype, batch, bias, outcome, same):
    """Gradients too; sizes that fill no vector and that do, strided input, no state."""
    name, _, nonlinearity = label.partition("-")
    options = {"nonlinearity": nonlinearity} if nonlinearity else {}
    for hidden in (29, 48):
        theirs = getattr(torch.nn, name)(37, hidden, bias=bias, **options).to(dtype)
        ours = getattr(mmfast.nn, name)(37, hidden, bias=bias, backend="cuda", **options).to(dtype)
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(batch, 74, dtype=dtype)[:, ::2]
        states = torch.randn(batch, hidden, dtype=dtype), torch.randn(batch, 2 * hidden, dtype=dtype)[:, ::2]
        for hx in (states if name == "LSTMCell" else states[1], None):
            if nonlinearity != "relu" or dtype == torch.float32:  # whose slope jumps where a sum is rounded across 0
                same(outcome(ours, x, hx), outcome(theirs, x, hx))
            with torch.no_grad():
                same(ours(x, hx), theirs(x, hx))


@per_mode
@pytest.mark.parametrize("hidden", [20, 140], ids=["block", "cluster"])
def test_thread_order_does_not_change_a_bit(cuda, mode, hidden, seed):
    problem = draw(mode, (4, 5, 4, hidden), 2, seed=6, kind="packed", extras=("resets",)).to(torch.float32)
    first = results(cuda, problem)
    for order in (0, 1, 2, seed):
        native.emulator_order(order)
        again = results(cuda, problem)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("mode", ["GRU", "LSTM"])
def test_a_planted_error_is_seen(close, mode):
    """The formula's test fails where a step reads another step's row, or a row's neighbour."""
    at = native.RnnRows.at
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "cuda_rnn_resident", lambda *_: 0)
        patch.setattr(native.RnnRows, "at", lambda rows, row: at(rows, max(row - 1, 0)))
        with pytest.raises((AssertionError, RuntimeError)):
            close(draw(mode, (5, 17, 3, 19), 2, seed=2))
