"""What all tests share: the installed package is what they test, and every run draws fresh, repeatable inputs."""

import os
import pathlib
import random
import sys
import zlib

import pytest
import torch
from torch.utils import _pytree as pytree

# `python -m pytest` puts the checkout first on the path, where it would hide the installed package and its libraries
_CHECKOUT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if pathlib.Path(entry or ".").resolve() != _CHECKOUT]

# --import-mode=importlib puts no folder of tests there
sys.path.append(str(_CHECKOUT / "tests"))

from beside import FILES, Beside  # noqa: E402

import mmfast  # noqa: E402
from mmfast import native  # noqa: E402

BESIDE = pytest.StashKey[Beside]()


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=None, help="repeat a run's random inputs (its seed is in the header)")


def pytest_configure(config):
    if config.option.seed is None:
        # one verdict for one commit in CI, fresh inputs everywhere else
        config.option.seed = 0 if os.environ.get("CI") else random.SystemRandom().randrange(2**31)
    config.addinivalue_line("markers", "beside(function, *given): waits for function(beside, *given), see beside.py")


def pytest_report_header(config):
    return f"inputs drawn with --seed={config.option.seed}"


def pytest_sessionstart(session):
    """Nothing runs on anything but the installed package with its native library: the tests would pass hollow."""
    package = pathlib.Path(mmfast.__file__).resolve()
    if _CHECKOUT in package.parents and "site-packages" not in package.parts:
        raise pytest.UsageError(
            f"mmfast was imported from the checkout ({package}), and the tests are for the installed package; "
            'install it with: pip install torch==2.13.0 ".[test]"'
        )
    if not native.available():
        raise pytest.UsageError(f"kernels cannot be tested: {native.load_error()}")


def pytest_ignore_collect(collection_path, config):
    """A run of all tests has processes of their own for some files; see beside.py."""
    chosen = config.option.keyword or config.option.markexpr or any(".py" in argument for argument in config.args)
    return True if collection_path.name in FILES and not chosen else None


def pytest_collection_modifyitems(items):
    """Tests that wait for what runs beside the others come last."""
    items.sort(key=lambda item: item.get_closest_marker("beside") is not None)


def pytest_collection_finish(session):
    if session.config.option.collectonly:
        return
    beside = session.config.stash[BESIDE] = Beside(session.config.option.seed)
    session.config.add_cleanup(beside.end)
    for item in session.items:
        for mark in item.iter_markers("beside"):
            beside.begin(*mark.args)


@pytest.fixture(scope="session")
def beside(pytestconfig):
    """beside(function, *given): what the function that a test is marked with returned; see beside.py."""
    return pytestconfig.stash[BESIDE]


@pytest.fixture(autouse=True)
def one_thread():
    """Small inputs on one thread: waking the others costs more, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def seed(request):
    """A seed of this test's own: it follows from --seed and the test's name, not from which tests ran before."""
    return (request.config.option.seed + zlib.crc32(request.node.nodeid.encode())) % 2**31


@pytest.fixture(autouse=True)
def seeded(seed):
    """What a test draws from torch's own generator follows from its seed, too."""
    torch.manual_seed(seed)


@pytest.fixture(params=native.supported_isas() if native.available() else [])
def isa(request):
    """Each instruction set of the CPU kernels in turn."""
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


@pytest.fixture
def poisoned_memory():
    """What torch.empty allocates starts as NaN, so an element that a kernel forgets is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def fresh_graphs():
    """Graphs that one test compiled neither serve nor crowd the next."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


# of the largest value in a tensor, or of 1; how accurate a kernel is, the tests of its op judge by numerics' rule
_ROUNDING = {torch.float64: 1e-11, torch.float32: 3e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@pytest.fixture
def same():
    """same(found, expected): asserts that two trees of tensors are equal but for rounding."""

    def compare(found, expected):
        found, expected = _tensors(found), _tensors(expected)
        assert len(found) == len(expected) > 0
        for ours, theirs in zip(found, expected, strict=True):
            largest = theirs.abs().max().item() if theirs.numel() and theirs.is_floating_point() else 0.0
            tolerance = _ROUNDING.get(theirs.dtype, 0.0) * max(1.0, largest)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)

    return compare


@pytest.fixture
def outcome(seed):
    """outcome(function, *inputs): the outputs of function(*inputs), then the gradients, for a random cotangent, of the
    inputs and of the parameters - a module's own, or parameters=[...]. Equal calls within a test draw equal numbers."""

    def compute(function, *inputs, parameters=None):
        inputs = pytree.tree_map_only(torch.Tensor, _as_leaf, inputs)
        if parameters is None:
            parameters = function.parameters() if isinstance(function, torch.nn.Module) else []
        torch.manual_seed(seed)
        outputs = _tensors(function(*inputs))
        answers = [y for y in outputs if y.requires_grad]
        wanted = [x for x in (*_tensors(inputs), *parameters) if x.requires_grad]
        torch.manual_seed(seed + 1)
        cotangents = [torch.randn_like(y) for y in answers]
        gradients = torch.autograd.grad(answers, wanted, cotangents, allow_unused=True) if wanted and answers else ()
        return [y.detach() for y in outputs] + [dx for dx in gradients if dx is not None]

    return compute


def _as_leaf(x):
    return x.detach().clone().requires_grad_() if x.is_floating_point() else x


def _tensors(tree):
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


@pytest.fixture(scope="session")
def own_pictures(tmp_path_factory):
    """A folder of a user: 12 pictures of one colour on white, with two names each, one of them spoken (as a tone)."""
    import csv

    import numpy as np
    from PIL import Image
    from scipy.io import wavfile

    folder = tmp_path_factory.mktemp("own")
    draw = np.random.default_rng(0)
    with open(folder / "captions.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file", "text", "wav"])
        for i in range(12):
            picture = np.full((16, 16, 3), 255, np.uint8)
            picture[4:12, 2 + i // 3 : 8 + i // 3] = draw.integers(0, 256, 3)
            Image.fromarray(picture).save(folder / f"{i}.png")
            tone = 3000 * np.sin(np.arange(4000 + 500 * i) * (0.02 + 0.01 * i))
            wavfile.write(folder / f"{i}.wav", 16000, tone.astype(np.int16))
            table.writerows(
                [[f"{i}.png", f"square {'abcdefghijkl'[i] * 3}", f"{i}.wav"], [f"{i}.png", f"carré {i}", ""]]
            )
    return folder
