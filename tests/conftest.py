"""What all tests share: the installed package is what they test, and every run draws fresh, repeatable inputs."""

import pathlib
import random
import sys
import zlib

import pytest
import torch

# `python -m pytest` puts the checkout first on the path, where it would hide the installed package and its libraries
_CHECKOUT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if pathlib.Path(entry or ".").resolve() != _CHECKOUT]

from mmfast import native  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=None, help="repeat a run's random inputs (its seed is in the header)")


def pytest_configure(config):
    if config.option.seed is None:
        config.option.seed = random.SystemRandom().randrange(2**31)


def pytest_report_header(config):
    return f"inputs drawn with --seed={config.option.seed}"


def pytest_sessionstart(session):
    if not native.available():
        raise pytest.UsageError(f"kernels cannot be tested: {native.load_error()}")


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
