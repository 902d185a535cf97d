"""The Triton kernels in Triton's interpreter: the ops' own tests, in processes of their own, beside all other tests.

Triton decides at its first import whether it interprets, hence the processes. float32 and float16 only: arithmetic on
bfloat16 is wrong in the interpreter.
"""

import re
import subprocess

import pytest

#: At least how many tests of each file run there; those that take longest come first.
FILES = {
    "test_rnn_triton.py": 50,
    "test_conv_transpose_gpu.py": 50,
    "test_planted.py": 41,
    "test_adversarial.py": 50,
    "test_losses.py": 50,
}


def run(beside, name: str) -> subprocess.CompletedProcess:
    return beside.pytest(name, "-k", "triton", TRITON_INTERPRET="1")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.beside.with_args(run, name)) for name in FILES])
def test_in_the_interpreter(beside, name):
    done = beside(run, name)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = int(re.search(r"(\d+) passed", done.stdout).group(1))
    assert passed >= FILES[name], done.stdout[-2000:]
