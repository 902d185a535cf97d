"""benchmarks/gpu_check.sh, run on a CPU: every part that needs no GPU, its files and its summary."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).resolve().parent.parent / "benchmarks" / "gpu_check.sh"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not on PATH")


def run(folder: pathlib.Path, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OUT": str(folder), "PYTHON": sys.executable, **environment}
    return subprocess.run(
        ["bash", SCRIPT, "--cpu"], env=environment, capture_output=True, text=True, timeout=400, check=False
    )


def test_on_a_cpu(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "log.txt").read_text()[-5000:]
    summary = (tmp_path / "summary.txt").read_text()
    assert done.stdout == summary
    for part in ("machine", "correct", "numerics", "losses", "recurrent", "decoders", "tests", "cudnn", "speed"):
        assert f"{part}: ok, " in summary
    assert "adversarial by cuda: " in summary
    assert re.search(r"cuda: \d+ launches forward \+ backward of 150 tensors", summary)
    assert re.search(r"table-GRU-T256-B64-I512-H512 forward\+backward: cudnn [\d.]+ us, cuda", summary)
    assert "x padded of as many rows (aim 1.05)" in summary
    assert (tmp_path / "parts" / "cudnn.txt").read_text().startswith("==== cudnn: ok")
    assert re.search(r"64>3: [\d.]+ us, [\d.]+ x floor", summary)
    assert "geometric mean" in summary
    assert "every part passed" in summary
    for name in ("numerics", "speed"):
        assert json.loads((tmp_path / f"{name}.json").read_text())["rows"]
        assert (tmp_path / f"{name}.md").read_text()
    assert "passed" in (tmp_path / "log.txt").read_text()


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
