"""The benchmark suite: `pytest benchmarks --benchmark-only`. The same cases and the same checks as `mmfast bench`.

pytest-benchmark times mmfast as a user gets it. What it was measured against, side by side in the same process, is in
extra_info: the rivals' times (on a GPU by events), the ratio to the best of them, and the floor of this machine.
"""

import pathlib
import sys

import pytest
import torch

# `python -m pytest` puts the checkout first on the path, where it would hide the installed package and its libraries
_CHECKOUT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if pathlib.Path(entry or ".").resolve() != _CHECKOUT]

from mmfast.bench import cases, floor, measure  # noqa: E402
from mmfast.bench.contenders import OURS, Bout, Contender  # noqa: E402

ROUNDS = 15


def pytest_addoption(parser):
    parser.addoption("--all-cases", action="store_true", help="every case, not a few of each kind")


def pytest_generate_tests(metafunc):
    if "bout_of" not in metafunc.fixturenames:
        return
    op = metafunc.module.OP
    everything = metafunc.config.getoption("--all-cases")
    found = cases.cases(op) if everything else cases.matching(cases.representative(_device()), op)
    pairs = [(case, mode) for case in found for mode in (cases.modes if everything else cases.usual_modes)(case)]
    metafunc.parametrize("bout_of", pairs, ids=[f"{case.name}-{mode.replace(' ', '-')}" for case, mode in pairs])


def _device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def device():
    return _device()


@pytest.fixture(scope="session")
def rates(device):
    return floor.measure(torch.float32, device)


@pytest.fixture
def compare(benchmark, rates, device):
    """Times a bout side by side, then mmfast alone under pytest-benchmark; fails where a result was wrong."""

    def compared(bout_of):
        case, mode = bout_of
        bout = Bout(case, mode, torch.float32, device)
        row = measure.measure(bout, rates, contenders=bout.contenders("none"), rounds=ROUNDS, seconds=1.0)
        benchmark.group = f"{case.name} {mode}"
        benchmark.extra_info.update(row.as_dict())
        assert not row.wrong
        ours = Contender(OURS, bout.computation(bout.ours()), bout.sets)
        turn = iter(range(10**9))

        def call():
            ours.call(next(turn))
            if device == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(call, rounds=ROUNDS, iterations=1, warmup_rounds=2)

    return compared
