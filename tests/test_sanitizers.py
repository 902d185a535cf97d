"""Kernels under AddressSanitizer and UBSan, as executables built here: the CUDA kernels on the emulator, which read
case files, and the CPU kernels, which draw random calls."""

import pathlib
import re
import shutil
import subprocess

import pytest

from mmfast import native

ROOT = pathlib.Path(__file__).resolve().parent.parent

CASES = """\
adversarial 0 1 0 0:-1:0:1.25:1 2:1:1:0.5:63 1:1:-1:2:129 3:-1:0:1:4097
adversarial 2 1 7 0:1:0:1.25:4096 1:1:-1:0.5:5 3:-1:0:1:9000
adversarial 3 0 3 2:-1:1:0.01:4100 0:-1:0:0.01:33
adversarial 1 0 1 0:1:0:1:0 1:1:0:1:4099
rnn_step 7 2 150
rnn_walk 0 1 30
rnn_walk 7 2 20
rnn_cluster 0 1 1
rnn_cluster 7 2 2
convolution 0 1 60
convolution 7 2 60
norm 7 2 20
"""
# each buffer in turn is an element too short, which the sanitizer must see
SHORT = "".join(f"{op} short {seed}\n" for op in ("rnn_step", "rnn_walk", "convolution", "norm") for seed in (1, 2))
SHORT += "rnn_cluster short 2\n"
# of so many terms the table is no longer among a kernel's arguments
LONG = "adversarial 0 1 5 " + " ".join(f"{k % 4}:1:0.5:1:{k % 9 + 1}" for k in range(150)) + "\n"


FILES = {"cases": CASES + LONG, "short": SHORT, "overflow": "overflow\n", "unknown": "adversarial 9 1 0 0:1:0:1:5\n"}


def build_and_run(beside) -> dict[str, subprocess.CompletedProcess]:
    """What came of each file of cases, of random calls under each instruction set, and of "cpu short"."""
    folder = beside.folder()
    targets = ["emulator_sanitized", *(f"cpu_sanitized_{isa}" for isa in native.supported_isas())]
    configure = ["-S", ROOT, "-B", folder, "-DMMFAST_SANITIZE=ON"]
    for command in (configure, ["--build", folder, "-j2", "--target", *targets]):
        done = beside.run("cmake", *command)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = {}
    for name, cases in FILES.items():
        (folder / f"{name}.txt").write_text(cases)
        found[name] = beside.run(folder / "emulator_sanitized", folder / f"{name}.txt")
    for isa in native.supported_isas():
        found[isa] = beside.run(folder / f"cpu_sanitized_{isa}", "150")
    # without vectors' masked loads, which the sanitizer does not see
    found["cpu short"] = beside.run(folder / "cpu_sanitized_baseline", "short")
    return found


pytestmark = [
    pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not on PATH to build executables with"),
    pytest.mark.beside.with_args(build_and_run),
]


@pytest.fixture
def found(beside):
    return beside(build_and_run)


def text(done: subprocess.CompletedProcess) -> str:
    return done.stdout + done.stderr


def test_kernels_are_clean(found):
    done = found["cases"]
    assert done.returncode == 0, text(done)
    assert done.stdout.count("passed: ") == FILES["cases"].count("\n")


def test_short_buffers_are_seen(found):
    done = found["short"]
    assert done.returncode == 0, text(done)
    assert done.stdout.count("seen: ") == SHORT.count("\n")


def test_an_overflow_is_seen(found):
    assert found["overflow"].returncode != 0
    assert "heap-buffer-overflow" in found["overflow"].stderr


def test_an_unknown_case_fails(found):
    assert found["unknown"].returncode == 1


@pytest.mark.parametrize("isa", native.supported_isas())
def test_cpu_kernels_are_clean(found, isa):
    """Random calls of every op, mode, dtype, layout and extra."""
    done = found[isa]
    assert (done.returncode, done.stdout) == (0, "passed: 150 calls of each op\n"), text(done)


def test_short_buffers_of_cpu_kernels_are_seen(found):
    done = found["cpu short"]
    assert done.returncode == 0, text(done)
    assert len(set(re.findall(r"seen: (\w+)", done.stdout))) == 9
