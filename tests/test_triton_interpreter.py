"""The Triton kernels in Triton's interpreter: the ops' own tests, in a process of their own.

Triton decides at its first import whether it interprets, hence the process. float32 and float16 only: arithmetic on
bfloat16 is wrong in the interpreter.
"""

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


@pytest.mark.parametrize("name", FILES)
def test_in_the_interpreter(request, name):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--seed={request.config.option.seed}"]
    command += ["-k", "triton", str(TESTS / name)]
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = int(re.search(r"(\d+) passed", done.stdout).group(1))
    assert passed >= FILES[name], done.stdout[-2000:]
