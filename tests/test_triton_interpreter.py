"""The Triton kernels in Triton's interpreter: the ops' own tests, in a process of their own.

Triton decides at its first import whether it interprets, hence the process. float32 and float16 only: arithmetic on
bfloat16 is wrong in the interpreter.
"""

import concurrent.futures
import os
import pathlib
import re
import subprocess
import sys

import pytest

TESTS = pathlib.Path(__file__).resolve().parent


#: At least how many tests of each file run there.
FILES = {
    "test_adversarial.py": 50,
    "test_conv_transpose_gpu.py": 50,
    "test_losses.py": 50,
    "test_planted.py": 41,
    "test_rnn_triton.py": 50,
}


def run(name: str, seed: int) -> subprocess.CompletedProcess:
    # one thread each: two run at once, and OpenMP's threads would wait for each other
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--seed={seed}"]
    command += ["-k", "triton", str(TESTS / name)]
    return subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=800)


@pytest.fixture(scope="module")
def runs(request):
    """Of each file that is asked for, its run: two at a time."""
    asked = [item.callspec.params["name"] for item in request.session.items if item.module is request.module]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(run, name, request.config.option.seed) for name in asked}


@pytest.mark.parametrize("name", FILES)
def test_in_the_interpreter(runs, name):
    done = runs[name].result()
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = int(re.search(r"(\d+) passed", done.stdout).group(1))
    assert passed >= FILES[name], done.stdout[-2000:]
