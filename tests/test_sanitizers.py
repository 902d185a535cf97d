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


def build(beside) -> pathlib.Path:
    folder = beside.folder()
    targets = ["emulator_sanitized", *(f"cpu_sanitized_{isa}" for isa in native.supported_isas())]
    configure = ["-S", ROOT, "-B", folder, "-DMMFAST_SANITIZE=ON"]
    for command in (configure, ["--build", folder, "-j2", "--target", *targets]):
        done = beside.run("cmake", *command)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "emulator_sanitized"


pytestmark = [
    pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not on PATH to build executables with"),
    pytest.mark.beside.with_args(build),
]


@pytest.fixture
def executable(beside):
    return beside(build)


def run(executable: pathlib.Path, cases: str, folder: pathlib.Path) -> subprocess.CompletedProcess:
    path = folder / "cases.txt"
    path.write_text(cases)
    return subprocess.run([executable, path], capture_output=True, text=True, timeout=600, check=False)


def test_kernels_are_clean(executable, tmp_path):
    cases = CASES + LONG
    done = run(executable, cases, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("passed: ") == cases.count("\n")


def test_short_buffers_are_seen(executable, tmp_path):
    done = run(executable, SHORT, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("seen: ") == SHORT.count("\n")


def test_an_overflow_is_seen(executable, tmp_path):
    done = run(executable, "overflow\n", tmp_path)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


def test_an_unknown_case_fails(executable, tmp_path):
    assert run(executable, "adversarial 9 1 0 0:1:0:1:5\n", tmp_path).returncode == 1


@pytest.mark.parametrize("isa", native.supported_isas())
def test_cpu_kernels_are_clean(executable, isa):
    """Random calls of every op, mode, dtype, layout and extra."""
    program = executable.parent / f"cpu_sanitized_{isa}"
    done = subprocess.run([program, "150"], capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode, done.stdout) == (0, "passed: 150 calls of each op\n"), done.stdout + done.stderr


def test_short_buffers_of_cpu_kernels_are_seen(executable):
    """Without vectors' masked loads, which the sanitizer does not see."""
    program = executable.parent / "cpu_sanitized_baseline"
    done = subprocess.run([program, "short"], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(set(re.findall(r"seen: (\w+)", done.stdout))) == 8
