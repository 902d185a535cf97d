"""The recurrent op's Triton kernels: on a GPU where there is one, and in Triton's interpreter.

The interpreter has a process of its own: test_triton_interpreter.py runs this file there, with TRITON_INTERPRET=1.
Without either, only the test of refusals runs.
"""

import functools
import os

import pytest
import torch
from test_module_db import INFOS, RECURRENT, hold_to_torch
from test_rnn import draw, hold_second_order, hold_to_formula, of_torch, on, results, triples

import mmfast
from mmfast import numerics
from mmfast.ops import portable
from mmfast.ops.rnn.backends import OP, Case
from mmfast.ops.rnn.equations import MODES
from mmfast.ops.rnn.op import sequence

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

DEVICES = ["cpu"] if INTERPRETED else ["cuda"] if torch.cuda.is_available() else []

per_mode = pytest.mark.parametrize("mode", list(MODES))
per_kind = pytest.mark.parametrize("kind", ["padded", "packed", "lengths"])


def test_triton_refusals():
    case = Case("cpu", torch.float32, "LSTM", 8, 16)
    asked = {
        "torch.float64": case._replace(dtype=torch.float64),
        "hidden_size is 129": case._replace(hidden_size=129),
        "proj_size is 3": case._replace(proj_size=3),
        "zoneout is given": case._replace(zoneout=True),
        "recurrent_dropout is given": case._replace(recurrent_dropout=True),
        "autocast is on": case._replace(autocast=True, cell=True),
    }
    refused = OP.backends["triton"].refusals
    assert len(refused(case._replace(resets=True))) == (0 if INTERPRETED else 1)
    for words, other in asked.items():
        assert any(words in sentence for sentence in refused(other)), words
    if not INTERPRETED:
        with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
            OP.select(case, "triton")
    assert OP.select(case) != "triton"


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Unwritten memory is NaN: what a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=DEVICES, ids=lambda device: f"triton-{device}")
def device(request):
    return request.param


@pytest.fixture
def triton(device):
    return on(device, functools.partial(sequence, backend="triton"))


@pytest.fixture
def close(triton):
    return functools.partial(hold_to_formula, triton)


@per_mode
@per_kind
@pytest.mark.parametrize("extras", [(), ("resets",)], ids=["plain", "resets"])
@pytest.mark.parametrize("directions", [1, 2], ids=["uni", "bi"])
def test_triton_is_the_formula(close, mode, kind, extras, directions):
    """Two programs a direction, the second one with a single sequence; sizes that fill no block."""
    states = directions == 2
    close(draw(mode, (5, 17, 3, 19), directions, seed=2, kind=kind, extras=extras, states=states, bias=states))


@per_mode
@pytest.mark.parametrize("precise", [False, True], ids=["tf32", "ieee"])
def test_triton_where_weights_are_streamed(close, mode, precise, monkeypatch):
    """By the formula where W_hh of 77 units does not fit, and in full float32."""
    kernels = portable.kernels("mmfast.ops.rnn")[0]
    monkeypatch.setattr(kernels, "uses_tf32", lambda: not precise)
    monkeypatch.setattr(kernels, "_INTERPRETED_SHARED", 2**15)
    close(draw(mode, (3, 4, 3, 77), 2, seed=3, kind="lengths", extras=("resets",)))


@per_mode
@pytest.mark.parametrize("shape", [(1, 1, 2, 1), (3, 0, 2, 5), (2, 3, 1, 128)], ids=str)
def test_triton_shapes(close, mode, shape):
    close(draw(mode, shape, 2, seed=4))


@per_mode
def test_triton_lengths_of_zero(close, mode):
    problem = draw(mode, (4, 3, 2, 5), 2, seed=10)
    close(problem._replace(layer=problem.layer._replace(lengths=torch.tensor([4, 0, -3]))))
    close(problem._replace(layer=problem.layer._replace(lengths=torch.tensor([0, 0, 0]))))


@per_mode
@pytest.mark.parametrize(("dtype", "kind"), [("float32", "padded"), ("float16", "packed")])
def test_triton_numerics(device, triton, mode, dtype, kind, seed):
    dtype = getattr(torch, dtype)

    def one(draw_seed):
        # many units, whose sums take the interpreter little longer: so fewer draws have values enough
        problem = draw(mode, (5, 15, 5, 125), 2, seed=draw_seed, kind=kind, dtype=dtype)
        return triples(problem, dtype, of=triton, rival=on(device, of_torch))

    numerics.assert_pooled(one, first_seed=seed)


@pytest.mark.parametrize("mode", ["RNN_TANH", "GRU", "LSTM"])
def test_triton_many_steps(close, mode):
    close(draw(mode, (64, 3, 4, 20), seed=11, kind="packed"))


@per_mode
@per_kind
def test_triton_double_backward(triton, mode, kind):
    hold_second_order(triton, draw(mode, (4, 3, 3, 5), 2, seed=5, kind=kind))


@pytest.mark.skipif(not INTERPRETED, reason="torch's samples are made on the CPU")
@pytest.mark.parametrize("name", RECURRENT)
def test_triton_module_db(name, outcome, same):
    with mmfast.use_backend("triton"):
        hold_to_torch(INFOS[name], name, "f32", True, None, outcome, same, without="proj_size")


def test_triton_repeats_its_bits(triton):
    problem = draw("GRU", (6, 5, 4, 20), 2, seed=6, kind="packed").to(torch.float32)
    first, second = results(triton, problem), results(triton, problem)
    assert all(torch.equal(first[name], second[name]) for name in first)
