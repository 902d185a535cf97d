"""Bugs planted in the kernels' own text, one at a time: each is caught by the ops' own tests, which here are run on it.

The CUDA kernels' bugs are compiled into an emulator of its own; whether a check of the emulator or a wrong number gave
a bug away is printed at the end.
"""

import collections
import ctypes
import functools
import importlib.machinery
import importlib.util
import os
import re
import shutil
from collections.abc import Callable, Iterator

import planted
import pytest
import test_conv_transpose_gpu as convolution
import torch
from test_rnn import draw, hold_to_formula, of_torch, triples

from mmfast import native, numerics
from mmfast.ops import portable
from mmfast.ops.conv_transpose.equations import Epilogue
from mmfast.ops.rnn.op import sequence

SEED = 5
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKEND = "triton" if INTERPRETED else "cuda"
walk = functools.partial(sequence, backend=BACKEND)
#: Raises where a kernel is wrong.
Trial = Callable[[], None]

in_the_interpreter = pytest.mark.skipif(not INTERPRETED, reason="for Triton's interpreter, which has its own process")


def direct(at: int, last: bool) -> Trial:
    row = convolution.DIRECT[at]
    return functools.partial(
        convolution.test_few_outputs_and_their_gradients_are_exact, SEED, BACKEND, "cpu", torch.float32, last, row
    )


def numerics_of(layer: str, epilogue: Epilogue, layout: torch.memory_format) -> Trial:
    return functools.partial(convolution.check_numerics, SEED, BACKEND, "cpu", torch.float32, layer, epilogue, layout)


def norm_of(shape: int, norm: str = "batch") -> Trial:
    return functools.partial(
        convolution.test_norms_of_shapes, SEED, BACKEND, "cpu", torch.float32, norm, *convolution.NORM_SHAPES[shape]
    )


def integers(row: int) -> Trial:
    return functools.partial(convolution.test_integers_are_exact, SEED, BACKEND, "cpu", convolution.GRID[row], 6, False)


def convolutions() -> Iterator[Trial]:
    """Every axis that threads divide; stride beside dilation, groups, more rows than a part of the sums has."""
    yield from (direct(1, False), direct(4, False), direct(5, True), direct(7, False), direct(6, True), integers(2))
    yield functools.partial(convolution.test_many_rows_of_weights, SEED, "cuda", "cpu")
    yield numerics_of("depthwise", Epilogue(activation="tanh"), torch.contiguous_format)


def norms() -> Iterator[Trial]:
    yield from map(norm_of, (0, 2, 4, 1, 3, 5))
    yield numerics_of("k3s1", Epilogue("batch", 0.5, "tanh"), torch.channels_last)
    # an activation alone, of elements that fill no access
    yield direct(0, False)


def triton_convolutions() -> Iterator[Trial]:
    yield from (direct(0, False), integers(2), integers(6), integers(4), norm_of(0), norm_of(4, "instance"))
    yield functools.partial(convolution.test_gradients_of_relu, SEED, BACKEND, "cpu", "none", "relu")
    yield from (numerics_of(layer, Epilogue("batch", 0.5, "tanh"), torch.channels_last) for layer in ("k3s1", "k4s2"))


def recurrent() -> Iterator[Trial]:
    """Both directions, two blocks of sequences, lengths and resets; units that fill no vector, and that do."""
    for mode in ("GRU", "LSTM", "RNN_TANH"):
        for hidden in (32, 19):
            problem = draw(mode, (6, 11, 3, hidden), 2, seed=SEED, kind="lengths", extras=("resets",))
            yield functools.partial(hold_to_formula, walk, problem)
    for dtype in (torch.float32, torch.bfloat16):
        yield functools.partial(numerics.assert_pooled, functools.partial(by_the_rule, dtype), first_seed=SEED)


def clusters() -> Iterator[Trial]:
    """Units that leave a block's free, and that do not."""
    for mode, hidden in (("GRU", 70), ("LSTM", 128), ("RNN_TANH", 150)):
        problem = draw(mode, (6, 3, 3, hidden), 2, seed=SEED, kind="lengths", extras=("resets",))
        yield functools.partial(hold_to_formula, walk, problem)


def by_the_rule(dtype, seed):
    problem = draw("GRU", (4, 15, 5, 40), 2, seed=seed, dtype=dtype)
    return triples(problem, dtype, of=walk, rival=of_torch)


def triton_recurrent() -> Iterator[Trial]:
    for mode in ("GRU", "LSTM"):
        problem = draw(mode, (5, 17, 3, 19), 2, seed=SEED, kind="lengths", extras=("resets",))
        yield functools.partial(hold_to_formula, walk, problem)
    yield functools.partial(streamed, draw("GRU", (3, 4, 3, 77), 2, seed=SEED))


def streamed(problem) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(portable.kernels("mmfast.ops.rnn")[0], "_INTERPRETED_SHARED", 2**15)
        hold_to_formula(walk, problem)


TRIALS = {
    "conv_transpose.cu": convolutions,
    "normalize.cu": norms,
    "rnn_walk.h": recurrent,
    "rnn_resident.cu": recurrent,
    "rnn_cluster.cu": clusters,
    "rnn_gates.h": recurrent,
    "rnn.cu": recurrent,
    "conv_transpose": triton_convolutions,
    "rnn": triton_recurrent,
}


#: What the emulator says when one of its checks sees a bug.
REPORTS = {
    "a race": r"race:",
    "a copy that was not waited for": r"copies since line",
    "unwritten shared memory": r"which no thread has written",
    "an element out of bounds": r"which has \d+ elements|uses element \d+ of|past its end|before its begin",
    "an output not written": r"was not written",
    "a cluster's barrier or store": r"deadlock|no wait for its barrier|of its cluster|not initialised|all have arrived",
}


@pytest.fixture(scope="module")
def emulator(beside):
    path = beside(planted.build)
    loader = importlib.machinery.ExtensionFileLoader("_emulator", str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_emulator", loader))
    loader.exec_module(module)
    return module, ctypes.c_int.in_dll(ctypes.CDLL(str(path)), "mmfast_planted")


@pytest.fixture(scope="module")
def caught(request):
    found = collections.Counter()
    yield found
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\nplanted bugs caught: {dict(found)}", end="")


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    """As in the tests that are run here: float32 is not rounded, and unwritten memory is NaN."""
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")
    torch.use_deterministic_algorithms(True, warn_only=True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    yield
    torch.use_deterministic_algorithms(False)


def hold_a_bug_to(source: str, caught: collections.Counter) -> None:
    """Runs trials until one fails."""
    for trial in TRIALS[source]():
        try:
            trial()
        except RuntimeError as error:
            caught[next((kind for kind, words in REPORTS.items() if re.search(words, str(error))), "others")] += 1
            return
        except AssertionError:
            caught["a wrong number"] += 1
            return
    pytest.fail("passes as right")


def by_steps_where_it_is(source: str, monkeypatch) -> None:
    """rnn.cu serves a layer whose W_hh does not fit on a chip."""
    if source == "rnn.cu":
        monkeypatch.setattr(native, "cuda_rnn_resident", lambda *_: 0)


# those of a walk's other files are the same
@pytest.mark.parametrize("source", [s for s in planted.CUDA if s not in ("rnn_resident.cu", "rnn_gates.h")])
def test_without_a_bug_all_pass(monkeypatch, source):
    by_steps_where_it_is(source, monkeypatch)
    for trial in TRIALS[source]():
        trial()


@pytest.mark.skipif(shutil.which("c++") is None, reason="c++ is not on PATH to build kernels with planted bugs with")
@pytest.mark.beside.with_args(planted.build)
@pytest.mark.parametrize(("source", "bug"), planted.NUMBERED, ids=lambda part: part.replace(" ", "_"))
def test_every_bug_is_caught(emulator, caught, monkeypatch, source, bug):
    module, number = emulator
    load = native._load
    monkeypatch.setattr(native, "_load", lambda name="_C": (module, "") if name == "_emulator" else load(name))
    by_steps_where_it_is(source, monkeypatch)
    monkeypatch.setattr(number, "value", planted.NUMBERED.index((source, bug)) + 1)
    hold_a_bug_to(source, caught)


@in_the_interpreter
@pytest.mark.parametrize("op", planted.TRITON)
def test_triton_without_a_bug(op):
    for trial in TRIALS[op]():
        trial()


@in_the_interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("op", "bug"),
    [(op, bug[0]) for op, bugs in planted.TRITON.items() for bug in bugs],
    ids=lambda part: part.replace(" ", "_"),
)
def test_triton_bugs_are_caught(tmp_path, caught, monkeypatch, op, bug):
    module, kernels = planted.triton_module(op, bug, tmp_path), portable.kernels
    package = f"mmfast.ops.{op}"
    monkeypatch.setattr(portable, "kernels", lambda of: (module, "") if of == package else kernels(of))
    hold_a_bug_to(op, caught)
