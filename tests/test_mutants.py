"""The numerics rule catches every planted bug, and lets right kernels pass."""

import itertools

import pytest
import torch

from mmfast.validate.mutants import ADVERSARIAL_MODES, CONVOLUTION_MODES, MUTANTS, RNN_MODES, trial

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CASES = [(op, mutant) for op, mutants in MUTANTS.items() for mutant in mutants]


RIGHT = {"adversarial": ADVERSARIAL_MODES, "conv_transpose": CONVOLUTION_MODES, "rnn": RNN_MODES}


@pytest.mark.parametrize(("op", "mutant"), CASES, ids=[f"{op}-{mutant.name}".replace(" ", "_") for op, mutant in CASES])
def test_every_mutant_is_caught(request, op, mutant):
    # one seed for all, whose truth is then computed once
    seed = request.config.option.seed
    missed = [
        f"{mode} in {dtype}"
        for mode, dtype in itertools.product(mutant.modes, mutant.dtypes)
        if not trial(op, seed, dtype, mode, mutant)
    ]
    assert not missed, f"{mutant.name} passes as right: {', '.join(missed)}"


@pytest.mark.parametrize("op", RIGHT)
def test_no_false_alarm(op, seed, capsys):
    """200 right runs, over all modes and dtypes."""
    cases = list(itertools.product(RIGHT[op], DTYPES))
    alarms = []
    for run in range(200):
        mode, dtype = cases[run % len(cases)]
        failures = trial(op, seed + run, dtype, mode)
        alarms += [f"{mode} in {dtype}, seed {seed + run}: {failures}"] * bool(failures)
    with capsys.disabled():
        planted = sum(len(mutant.modes) * len(mutant.dtypes) for _, mutant in CASES)
        print(f"\nfalse alarms: {len(alarms)} of 200 right runs; mutants: {len(CASES)}, in {planted} cases", end="")
    assert not alarms, alarms
