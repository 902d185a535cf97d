"""Bugs planted in the kernels' own text, one at a time: each is caught by the ops' own tests, which here are run on it.

The CUDA kernels' bugs are compiled into an emulator of its own; whether a check of the emulator or a wrong number gave
a bug away is printed at the end.
"""

import collections
import ctypes
import functools
import importlib.machinery
import importlib.util
import pathlib
import re
import shutil
import sys

import pytest
import torch

sys.path.append(str(pathlib.Path(__file__).resolve().parent))

import planted
import test_conv_transpose_gpu as convolution
from test_rnn import draw, hold_to_formula, of_torch, triples

from mmfast import native, numerics
from mmfast.ops.conv_transpose.equations import Epilogue
from mmfast.ops.rnn.op import sequence

SEED = 5
cuda = functools.partial(sequence, backend="cuda")


def direct(at: int, last: bool) -> None:
    convolution.test_few_outputs_and_their_gradients_are_exact(
        SEED, "cuda", "cpu", torch.float32, last, convolution.DIRECT[at]
    )


def numerics_of(layer: str, epilogue: Epilogue, layout: torch.memory_format):
    return functools.partial(convolution.check_numerics, SEED, "cuda", "cpu", torch.float32, layer, epilogue, layout)


def convolutions():
    """Every axis that threads divide; stride beside dilation, groups, more rows than a part of the sums has."""
    yield from (functools.partial(direct, *case) for case in ((1, False), (4, False), (5, True), (7, False), (6, True)))
    yield functools.partial(convolution.test_many_rows_of_weights, SEED, "cuda", "cpu")
    yield functools.partial(convolution.test_integers_are_exact, SEED, "cuda", "cpu", convolution.GRID[2], 6, False)
    yield numerics_of("depthwise", Epilogue(activation="tanh"), torch.contiguous_format)


def norms():
    for shape, last in convolution.NORM_SHAPES[::2] + convolution.NORM_SHAPES[1::2]:
        yield functools.partial(
            convolution.test_norms_of_shapes, SEED, "cuda", "cpu", torch.float32, "batch", shape, last
        )
    yield numerics_of("k3s1", Epilogue("batch", 1e-5, "tanh"), torch.channels_last)
    yield functools.partial(direct, 0, False)


def recurrent():
    """Both directions, two blocks of sequences, lengths and resets; units that fill no vector, and that do."""
    for mode in ("GRU", "LSTM", "RNN_TANH"):
        for hidden in (32, 19):
            problem = draw(mode, (6, 11, 3, hidden), 2, seed=SEED, kind="lengths", extras=("resets",))
            yield functools.partial(hold_to_formula, cuda, problem)
    for dtype in (torch.float32, torch.bfloat16):
        yield functools.partial(numerics.assert_pooled, functools.partial(by_the_rule, dtype), first_seed=SEED)


def by_the_rule(dtype, seed):
    problem = draw("GRU", (4, 15, 5, 40), 2, seed=seed, dtype=dtype)
    return triples(problem, dtype, of=cuda, rival=of_torch)


TRIALS = {
    "conv_transpose.cu": convolutions,
    "normalize.cu": norms,
    "rnn_resident.cu": recurrent,
    "rnn_gates.h": recurrent,
    "rnn.cu": recurrent,
}


#: What the emulator says when one of its checks sees a bug.
REPORTS = {
    "a race": r"race:",
    "a copy that was not waited for": r"copies since line",
    "unwritten shared memory": r"which no thread has written",
    "an element out of bounds": r"which has \d+ elements|uses element \d+ of|past its end|before its begin",
    "two writers": r"wrote it|which thread \d+ of block \d+ wrote",
    "an output not written": r"was not written",
}


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    if shutil.which("c++") is None:
        pytest.skip("c++ is not on PATH, so kernels with planted bugs cannot be built")
    path = planted.build(tmp_path_factory.mktemp("planted"))
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


@pytest.mark.parametrize("source", planted.CUDA)
def test_without_a_bug_all_pass(source):
    for trial in TRIALS[source]():
        trial()


@pytest.mark.parametrize(("source", "bug"), planted.NUMBERED, ids=lambda part: part.replace(" ", "_"))
def test_every_bug_is_caught(emulator, caught, monkeypatch, source, bug):
    module, number = emulator
    load = native._load
    monkeypatch.setattr(native, "_load", lambda name="_C": (module, "") if name == "_emulator" else load(name))
    if source == "rnn.cu":
        monkeypatch.setattr(native, "cuda_rnn_resident", lambda *_: 0)
    number.value = planted.NUMBERED.index((source, bug)) + 1
    try:
        for trial in TRIALS[source]():
            try:
                trial()
            except RuntimeError as error:
                caught[next((kind for kind, words in REPORTS.items() if re.search(words, str(error))), "others")] += 1
                return
            except AssertionError:
                caught["a wrong number"] += 1
                return
    finally:
        number.value = 0
    pytest.fail("passes as right")
