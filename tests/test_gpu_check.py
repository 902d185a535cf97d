"""benchmarks/gpu_check.sh, run on a CPU: every part that needs no GPU, its files and its summary."""

import contextlib
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import torch

SCRIPT = pathlib.Path(__file__).resolve().parent.parent / "benchmarks" / "gpu_check.sh"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not on PATH")


def command(folder: pathlib.Path, **environment: str) -> tuple[list, dict]:
    return ["bash", SCRIPT, "--cpu"], {**os.environ, "OUT": str(folder), "PYTHON": sys.executable, **environment}


def run(folder: pathlib.Path, **environment: str) -> subprocess.CompletedProcess:
    words, variables = command(folder, **environment)
    return subprocess.run(words, env=variables, capture_output=True, text=True, timeout=400, check=False)


def run_whole(beside) -> tuple[pathlib.Path, subprocess.CompletedProcess]:
    folder = beside.folder()
    words, variables = command(folder)
    return folder, beside.run(*words, env=variables)


@pytest.mark.beside.with_args(run_whole)
def test_on_a_cpu(beside):
    folder, done = beside(run_whole)
    assert done.returncode == 0, done.stdout + done.stderr + (folder / "log.txt").read_text()[-5000:]
    summary = (folder / "summary.txt").read_text()
    assert done.stdout == summary
    for part in ("machine", "correct", "numerics", "losses", "recurrent", "decoders", "tests", "cudnn", "speed"):
        assert f"{part}: ok, " in summary
    assert "adversarial by cuda: " in summary
    assert re.search(r"cuda: \d\d losses give the same bits twice", summary)
    assert re.search(r"cuda: \d+ launches forward \+ backward of 150 tensors", summary)
    assert re.search(r"table-GRU-T256-B64-I512-H512 forward\+backward: cudnn [\d.]+ us, cuda", summary)
    assert "x padded of as many rows (aim 1.05)" in summary
    assert (folder / "parts" / "cudnn.txt").read_text().startswith("==== cudnn: ok")
    assert re.search(r"64>3: [\d.]+ us, [\d.]+ x floor", summary)
    assert "geometric mean" in summary
    assert "every part passed" in summary
    for name in ("numerics", "speed"):
        assert json.loads((folder / f"{name}.json").read_text())["rows"]
        assert (folder / f"{name}.md").read_text()
    assert "passed" in (folder / "log.txt").read_text()


def test_a_part_that_fails_is_in_the_summary(tmp_path):
    """With no python to be found every part fails; the script goes on, tells of each and returns their number."""
    done = run(tmp_path, PYTHON="no-such-python")
    assert done.returncode == 9
    assert "correct: FAILED (127)" in done.stdout
    assert "9 parts failed" in done.stdout


def test_no_time_left(tmp_path):
    done = run(tmp_path, GPU_CHECK_SECONDS="0")
    assert done.returncode == 9
    assert "numerics: not run, no time left" in done.stdout


@pytest.mark.parametrize(("how", "calls", "slept"), [("graph", 2, 0), ("calls", 40, 0), ("ahead", 40, 20)])
def test_a_gpus_time(monkeypatch, how, calls, slept):
    """Of a stand-in for a GPU: in a graph each set is called once, else 20 times, after warming up."""
    done = []

    class Device:
        def __init__(self, **_):
            pass

        def elapsed_time(self, other):
            return 6.0

        def replay(self):
            done.append("replay")

        def record(self):
            done.append("record")

        wait_stream = synchronize = lambda *_: None

    for name in ("Stream", "Event", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, Device)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", Device)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append("sleep"))
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT.with_suffix(".py"))
    gpu_check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu_check)
    assert gpu_check._seconds(done.append, [["one"], ["two"]], "cuda", how) == pytest.approx(3e-3)
    assert done.count("one") + done.count("two") == 3 + calls
    assert done.count("sleep") == slept
    # what is timed lies between two records
    timed = ["replay"] if how == "graph" else ["one", "two"]
    assert done[-len(timed) - 2 :] == ["record", *timed, "record"]
