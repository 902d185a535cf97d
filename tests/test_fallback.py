"""The torch backend: bit for bit torch.nn, with or without the native library and Triton; and what importing costs.

Run as a script, this file compares in its own process; the tests below start it under the conditions that a running
process cannot change any more.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils import _pytree as pytree


class Case(NamedTuple):
    """A layer, its constructor's arguments, how its input is drawn, and the context that it runs in."""

    layer: str
    arguments: dict[str, Any]
    draw: Callable[[], Any]
    context: Callable[[], Any] = contextlib.nullcontext


def padded(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape)


def step(name: str, *batch: int) -> Callable[[], tuple]:
    """A cell's input and states."""

    def draw() -> tuple:
        h, c = torch.randn(*batch, 12), torch.randn(*batch, 12)
        return torch.randn(*batch, 8), ((h, c) if name == "LSTMCell" else h)

    return draw


def packed() -> PackedSequence:
    return pack_padded_sequence(torch.randn(6, 4, 8), [6, 2, 5, 5], enforce_sorted=False)


def bfloat16() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


SEQUENCE = {"input_size": 8, "hidden_size": 12}
CONVOLUTION = {"in_channels": 8, "out_channels": 6, "kernel_size": 4, "stride": 2, "padding": 1}
STACK = {**SEQUENCE, "num_layers": 2, "bidirectional": True, "dropout": 0.4}
CASES: dict[str, Case] = {}
for name in ("RNN", "GRU", "LSTM"):
    CASES |= {
        f"{name}-padded": Case(name, SEQUENCE, padded(6, 4, 8)),
        f"{name}-unbatched": Case(name, {**SEQUENCE, "batch_first": True}, padded(6, 8)),
        f"{name}-packed": Case(name, SEQUENCE, packed),
        f"{name}-stack": Case(name, STACK, padded(6, 4, 8)),
        f"{name}-stack-packed": Case(name, STACK, packed),
        f"{name}-autocast": Case(name, SEQUENCE, padded(6, 4, 8), bfloat16),
    }
CASES |= {
    "RNN-relu": Case("RNN", {**SEQUENCE, "nonlinearity": "relu"}, padded(6, 4, 8)),
    "LSTM-proj": Case("LSTM", {**SEQUENCE, "proj_size": 5}, padded(6, 4, 8)),
    "LSTM-proj-stack-packed": Case("LSTM", {**STACK, "proj_size": 5}, packed),
}
for name in ("RNNCell", "GRUCell", "LSTMCell"):
    CASES |= {
        f"{name}-batched": Case(name, SEQUENCE, step(name, 4)),
        f"{name}-unbatched": Case(name, SEQUENCE, step(name)),
        f"{name}-autocast": Case(name, SEQUENCE, step(name, 4), bfloat16),
    }
for dims, sizes in ((1, (9,)), (2, (5, 4)), (3, (3, 4, 2))):
    name = f"ConvTranspose{dims}d"
    CASES |= {
        f"{name}-batched": Case(name, CONVOLUTION, padded(3, 8, *sizes)),
        f"{name}-unbatched": Case(name, {**CONVOLUTION, "groups": 2, "bias": False}, padded(8, *sizes)),
        f"{name}-autocast": Case(name, CONVOLUTION, padded(3, 8, *sizes), bfloat16),
    }


def outputs_and_gradients(package: Any, case: Case, seed: int) -> dict[str, Tensor]:
    """By name; from equal weights and data for equal seeds."""
    torch.manual_seed(seed)
    layer = getattr(package, case.layer)(**case.arguments)
    x = pytree.tree_map_only(Tensor, lambda t: t.requires_grad_(t.is_floating_point()), case.draw())
    with case.context():
        result = layer(*x) if case.layer.endswith("Cell") else layer(x)
    outputs = [y for y in pytree.tree_leaves(result) if isinstance(y, Tensor)]
    answers = [y for y in outputs if y.requires_grad]
    data = x.data if isinstance(x, PackedSequence) else pytree.tree_leaves(x)[0]
    gradients = torch.autograd.grad(answers, [data, *layer.parameters()], [torch.randn_like(y) for y in answers])
    names = ["dx", *(f"d{name}" for name, _ in layer.named_parameters())]
    return {f"output {i}": y for i, y in enumerate(outputs)} | dict(zip(names, gradients, strict=True))


def differences(case: Case, seed: int) -> list[str]:
    """What of outputs and gradients is not bit for bit torch.nn's, in words."""
    import mmfast

    try:
        theirs = outputs_and_gradients(torch.nn, case, seed)
    except RuntimeError as refusal:
        # oneDNN has no bfloat16 LSTM for a processor without AVX-512: the same words from both
        assert "could not create a primitive" in str(refusal)
        with pytest.raises(RuntimeError, match=re.escape(str(refusal))):
            outputs_and_gradients(mmfast.nn, case, seed)
        return []
    ours = outputs_and_gradients(mmfast.nn, case, seed)
    assert theirs.keys() == ours.keys()
    assert all(value.abs().sum() > 0 for key, value in theirs.items() if value.is_floating_point())
    return [
        key
        for key, value in theirs.items()
        if value.dtype != ours[key].dtype or value.stride() != ours[key].stride() or not torch.equal(value, ours[key])
    ]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
def test_use_backend(name: str, seed: int) -> None:
    import mmfast

    with mmfast.use_backend("torch"):
        assert differences(CASES[name], seed) == []


class Hidden(importlib.abc.MetaPathFinder):
    """Makes modules unimportable, as if they were not installed."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if any(name == hidden or name.startswith(f"{hidden}.") for hidden in self.names):
            raise ModuleNotFoundError(f"No module named {name!r} (hidden)", name=name)


def script(hidden: list[str]) -> None:
    """Compares every case with these modules hidden; exits with the differences in words."""
    sys.meta_path.insert(0, Hidden(hidden))
    import mmfast
    from mmfast import native

    assert native.available() == ("mmfast._C" not in hidden), native.load_error()
    if "mmfast._C" in hidden:
        assert "could not be loaded" in native.load_error()
    found = {name: differences(case, 17) for name, case in CASES.items()}
    logits = torch.randn(5)
    loss = mmfast.nn.AdversarialLoss().generator(logits)
    if not torch.equal(loss, torch.nn.functional.softplus(-logits).mean()):
        found["AdversarialLoss"] = ["loss"]
    wrong = {name: keys for name, keys in found.items() if keys}
    sys.exit(f"not bit-identical: {wrong}" if wrong else 0)


def python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MMFAST_")}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=cwd, env=inherited | environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize("hidden", [[], ["mmfast._C", "triton"]], ids=["all", "without_C-without_triton"])
def test_environment(hidden: list[str], tmp_path: Path) -> None:
    """MMFAST_BACKEND=torch."""
    done = python(__file__, *hidden, cwd=tmp_path, MMFAST_BACKEND="torch", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr


def test_without_native_library_and_triton(tmp_path: Path) -> None:
    """Nothing asked for: torch serves everything then, by itself."""
    done = python(__file__, "mmfast._C", "triton", cwd=tmp_path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr


def test_refused_without_native_library(tmp_path: Path) -> None:
    """An explicit choice does not fall back: it says what is missing."""
    code = (
        "import sys; sys.modules['mmfast._C'] = None\n"
        "import torch, mmfast\n"
        "print(mmfast.explain(mmfast.nn.AdversarialLoss()))\n"
        "mmfast.nn.AdversarialLoss(backend='cpu').generator(torch.randn(3))\n"
    )
    done = python("-c", code, cwd=tmp_path)
    assert "torch    cpu: mmfast's native library could not be loaded" in done.stdout
    assert (
        "RuntimeError: backend 'cpu' was asked for adversarial, but: mmfast's native library could not" in done.stderr
    )


IMPORT = """
import sys, time, warnings
warnings.simplefilter("error")
import torch
before = set(sys.modules)
start = time.process_time()
import mmfast
seconds = time.process_time() - start
added = set(sys.modules) - before
assert not torch.cuda.is_initialized()
assert not any(name.partition(".")[0] == "triton" for name in added), "triton"
assert "torch._dynamo" not in sys.modules and "torch._inductor" not in sys.modules, "compiler"
assert "numpy" in before or "numpy" not in added
from mmfast import functional, nn
layer = nn.GRU(2, 3)
with warnings.catch_warnings():
    mmfast.accelerate(torch.nn.Sequential(torch.nn.ConvTranspose1d(2, 3, 4)))
    print(mmfast.explain(layer), file=sys.stderr)
assert not torch.cuda.is_initialized()
assert "torch._dynamo" not in sys.modules
print(f"{seconds:.4f}")
"""


@pytest.fixture(scope="module")
def imports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[subprocess.CompletedProcess]]:
    cwd = tmp_path_factory.mktemp("elsewhere")
    return [python("-c", IMPORT, cwd=cwd) for _ in range(3)]


def test_import_time(imports: list[subprocess.CompletedProcess]) -> None:
    """import mmfast adds at most 0.15 s to import torch, of processor time: other processes are not its fault."""
    assert min(float(done.stdout) for done in imports) <= 0.15


def test_import_is_quiet(imports: list[subprocess.CompletedProcess]) -> None:
    """It prints and warns nothing, initialises no CUDA, imports neither Triton nor a compiler."""
    for done in imports:
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) == 1
        assert done.stderr.startswith("path  layer  op"), done.stderr


ROOT = Path(__file__).resolve().parents[1]


def test_tests_refuse_the_checkout(tmp_path: Path) -> None:
    """conftest fails the session, and does not skip, where mmfast is not the installed package."""
    (tmp_path / "checkout").symlink_to(ROOT)
    code = (
        "import sys, pytest\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import mmfast\n"
        f"sys.exit(pytest.main(['-q', '--rootdir', {str(ROOT)!r}, {str(ROOT / 'tests/test_public_api.py')!r}]))"
    )
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "mmfast was imported from the checkout" in done.stdout + done.stderr


def test_tests_refuse_a_missing_library(tmp_path: Path) -> None:
    code = (
        "import sys, pytest\n"
        "sys.modules['mmfast._C'] = None\n"
        f"sys.exit(pytest.main(['-q', '--rootdir', {str(ROOT)!r}, {str(ROOT / 'tests/test_public_api.py')!r}]))"
    )
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "mmfast's native library could not be loaded" in done.stdout + done.stderr


if __name__ == "__main__":
    script(sys.argv[1:])
