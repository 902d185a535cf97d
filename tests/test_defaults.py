"""What kernels read and allocate: it follows from their inputs alone, which have memory."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils import _pytree as pytree

import mmfast
from mmfast import functional, nn


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# no tensor on "meta" has memory, and default_dtype's are twice as long
DEFAULTS = {"device": lambda: torch.device("meta"), "dtype": lambda: default_dtype(torch.float64)}


def packed(*shape: int):
    return pack_padded_sequence(torch.randn(shape), torch.arange(shape[1], 0, -1))


def chain(norm: torch.nn.Module) -> torch.nn.Module:
    tail = (torch.nn.ReLU(), torch.nn.ConvTranspose2d(64, 3, 4, 2, 1), torch.nn.Tanh())
    return mmfast.accelerate(torch.nn.Sequential(torch.nn.ConvTranspose2d(16, 64, 4, 2, 1), norm, *tail))


# id: a module, and its input's draw
MODULES: dict[str, tuple[Callable[[], torch.nn.Module], Callable]] = {
    "rnn": (lambda: nn.RNN(6, 5, 2, backend="cpu"), lambda: torch.randn(9, 3, 6)),
    "lstm-packed": (lambda: nn.LSTM(6, 5, bidirectional=True, backend="cpu"), lambda: packed(9, 3, 6)),
    "gru-packed-emulated": (lambda: nn.GRU(6, 5, backend="cuda"), lambda: packed(4, 3, 6)),
    "gru-bfloat16": (lambda: nn.GRU(6, 5, backend="cpu").bfloat16(), lambda: torch.randn(700, 3, 6).bfloat16()),
    "cell": (lambda: nn.GRUCell(6, 5), lambda: torch.randn(3, 6)),
    "phases": (lambda: nn.ConvTranspose2d(64, 3, 4, 2, 1, backend="cpu"), lambda: torch.randn(2, 64, 8, 8)),
    "depthwise": (lambda: nn.ConvTranspose1d(64, 64, 4, 2, groups=64, backend="cpu"), lambda: torch.randn(2, 64, 30)),
    "batch-norm": (lambda: chain(torch.nn.BatchNorm2d(64)), lambda: torch.randn(4, 16, 16, 16)),
    "instance-norm": (lambda: chain(torch.nn.InstanceNorm2d(64)), lambda: torch.randn(4, 16, 16, 16)),
}


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("name", MODULES)
def test_modules(name, default):
    build, draw = MODULES[name]
    module, x = build(), draw()

    def run() -> list[torch.Tensor]:
        out = pytree.tree_leaves(module(x))[0]
        return [out.detach(), *torch.autograd.grad(out, list(module.parameters()), out.detach())]

    expected = run()
    with DEFAULTS[default]():
        found = run()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("mode", ["non-saturating", "relativistic", "relativistic-average"])
def test_losses(mode, default):
    lists = [[torch.randn(5, 3, requires_grad=True), torch.randn(70, requires_grad=True)] for _ in range(2)]

    def run() -> list[torch.Tensor]:
        loss = functional.adversarial_discriminator_loss(*lists, mode, backend="cpu")
        loss = loss + functional.feature_matching([lists[0]], [lists[1]], backend="cpu")
        return [loss.detach(), *torch.autograd.grad(loss, [*lists[0], *lists[1]])]

    expected = run()
    with DEFAULTS[default]():
        found = run()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_lengths_as_a_list():
    layer, x = nn.GRU(6, 5), torch.randn(9, 3, 6)
    expected, _ = layer(x, lengths=[9, 4, 1])
    with torch.device("meta"):
        found, _ = layer(x, lengths=[9, 4, 1])
        with pytest.raises(RuntimeError, match="has to be greater than 0"):
            layer(x, lengths=[9, 4, 0])
    assert torch.equal(found, expected)


def test_imported_with_other_defaults(tmp_path):
    """In a process of its own."""
    program = """
import torch
torch.set_default_device("meta")
torch.set_default_dtype(torch.float64)
from mmfast import functional, nn
real, fake = (torch.ones(3, device="cpu", dtype=torch.float32) for _ in range(2))
assert functional.adversarial_discriminator_loss(real, fake, "lsgan") == 1
layer = nn.GRU(4, 3, device="cpu", dtype=torch.float32)
layer(torch.ones(20, 2, 4, device="cpu", dtype=torch.float32))[0].sum().backward()
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)


def freed(x: torch.Tensor) -> torch.Tensor:
    x.untyped_storage().resize_(0)
    return x


@pytest.mark.parametrize("without", [freed, lambda x: torch._efficientzerotensor(x.shape)], ids=["freed", "zeros"])
@pytest.mark.parametrize("name", [name for name in MODULES if "packed" not in name and "bfloat16" not in name])
def test_a_tensor_without_memory(name, without):
    """Refused, or as PyTorch has it, computed as zeros; never read."""
    build, draw = MODULES[name]
    module, x = build(), draw()
    try:
        out = pytree.tree_leaves(module(without(x)))[0]
    except RuntimeError as error:
        assert re.search("no memory|not allocated|out of bounds|storage", str(error)), error
    else:
        assert without is not freed and torch.equal(out, pytree.tree_leaves(module(torch.zeros_like(draw())))[0])


@pytest.mark.parametrize("without", [freed, lambda x: torch._efficientzerotensor(x.shape)], ids=["freed", "zeros"])
def test_logits_without_memory(without):
    with pytest.raises(RuntimeError, match="no memory"):
        functional.adversarial_discriminator_loss(without(torch.ones(5)), torch.ones(5), "hinge", backend="cpu")


def test_tensors_that_stand_for_their_negative(seed):
    """As the imaginary part of a conjugate does."""
    x = torch.randn(6)
    for mode in ("hinge", "relativistic"):
        found = functional.adversarial_discriminator_loss(torch._neg_view(x), x, mode, backend="cpu")
        assert torch.equal(found, functional.adversarial_discriminator_loss(-x, x, mode, backend="cpu"))
    for name in ("rnn", "phases", "depthwise"):
        build, draw = MODULES[name]
        module, x = build(), draw()
        found, expected = (pytree.tree_leaves(module(each))[0] for each in (torch._neg_view(x), -x))
        assert torch.equal(found, expected)
