"""Files of tests that a run of all tests leaves to processes of their own, beside the others."""

import subprocess

import pytest
from beside import FILES


def run(beside, name: str) -> subprocess.CompletedProcess:
    return beside.pytest(name)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.beside.with_args(run, name)) for name in FILES])
def test_a_file(beside, capsys, name):
    done = beside(run, name)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    with capsys.disabled():
        print(f"\n{name}\n{done.stdout}", end="")
