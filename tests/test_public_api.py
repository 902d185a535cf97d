"""The public surface, pinned: a name that appears or disappears is a decision, not an accident."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import pickle

import pytest
import torch

import mmfast
from mmfast import functional, nn

SEQUENCES = ("RNN", "GRU", "LSTM")
CELLS = ("RNNCell", "GRUCell", "LSTMCell")
CONVOLUTIONS = ("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")
LAZY = tuple(f"Lazy{name}" for name in CONVOLUTIONS)
LAYERS = {*SEQUENCES, *CELLS, *CONVOLUTIONS, *LAZY, "AdversarialLoss", "FeatureMatchingLoss", "LeCam"}
OURS = {*LAYERS, "LossBalancer", "Sequential"}

# mmfast.functional: what an op serves, and what is made of such calls
DISPATCHED = {
    *("adversarial_discriminator_loss", "adversarial_generator_loss"),
    *("matching_discriminator_loss", "feature_matching"),
    *("rnn", "gru", "lstm", "rnn_cell", "gru_cell", "lstm_cell"),
    *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    *("conv_transpose1d_norm_act", "conv_transpose2d_norm_act", "conv_transpose3d_norm_act"),
}
COMPOSED = {
    *("r1_penalty", "r2_penalty", "wgan_penalty", "dragan_penalty", "max_gradient_penalty", "zero_centered_penalty"),
    *("adaptive_weight", "lecam_penalty"),
}

per_twin = pytest.mark.parametrize("name", SEQUENCES + CELLS + CONVOLUTIONS + LAZY)


def test_package() -> None:
    assert mmfast.__all__ == ["__version__", "accelerate", "explain", "functional", "nn", "restore", "use_backend"]
    assert all(hasattr(mmfast, name) for name in mmfast.__all__)
    assert mmfast.__version__ == importlib.metadata.version("mmfast")


def test_functional() -> None:
    assert sorted(functional.__all__) == sorted({*DISPATCHED, *COMPOSED})
    for name in DISPATCHED:
        backend = inspect.signature(getattr(functional, name)).parameters["backend"]
        assert backend.kind is inspect.Parameter.KEYWORD_ONLY
        assert backend.default is None


@pytest.mark.parametrize("name", sorted(OURS))
def test_layer(name: str) -> None:
    """An importable top-level name, as pickle needs it, with the twin's own name, as initialisers look for it."""
    layer = getattr(nn, name)
    assert layer.__name__ == layer.__qualname__ == name
    assert getattr(importlib.import_module(layer.__module__), name) is layer
    assert layer.__module__.startswith("mmfast.nn.")
    assert pickle.loads(pickle.dumps(layer)) is layer
    if name in LAYERS:
        assert layer.backend is None


@per_twin
def test_bases(name: str) -> None:
    """A subclass of its twin; RNN, GRU and LSTM of RNNBase, since Dynamo refuses instances of the twin."""
    layer, theirs = getattr(nn, name), getattr(torch.nn, name)
    assert layer is not theirs
    if name in SEQUENCES:
        assert issubclass(layer, torch.nn.RNNBase)
        assert not issubclass(layer, theirs)
    else:
        assert issubclass(layer, theirs)
    if name in LAZY:
        assert layer.cls_to_become is getattr(nn, name.removeprefix("Lazy"))


@per_twin
def test_constructor(name: str) -> None:
    """The twin's parameters with its defaults in its order, then backend, keyword-only."""
    *ours, backend = _parameters(getattr(nn, name))
    if name in SEQUENCES:  # *args and **kwargs, as in torch.nn
        ours, backend = ours[:1], ours[1]
    else:
        assert ours == _parameters(getattr(torch.nn, name))
    assert backend == ("backend", inspect.Parameter.KEYWORD_ONLY, None)


def _parameters(cls: type) -> list[tuple]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(cls).parameters.values()]


def test_documented() -> None:
    """Every public name has a docstring; a layer's and an op's says what of PyTorch it equals."""
    for name in (*SEQUENCES, *CELLS, *CONVOLUTIONS, *LAZY, "AdversarialLoss", "Sequential"):
        assert "Equivalent to" in inspect.getdoc(getattr(nn, name)), name
    for name in DISPATCHED:
        assert "Equivalent to" in inspect.getdoc(getattr(functional, name)), name
    for documented in (*(getattr(nn, name) for name in OURS), *(getattr(functional, name) for name in COMPOSED)):
        assert len(inspect.getdoc(documented)) > 100, documented
    for name in ("accelerate", "restore", "explain", "use_backend"):
        assert len(inspect.getdoc(getattr(mmfast, name))) > 200, name


def test_every_name_of_torch_nn() -> None:
    """Resolves from mmfast.nn: torch.nn's own object, or mmfast's of that name."""
    names = dir(torch.nn)
    assert len(names) > 150
    assert set(names) <= set(dir(nn))
    for name in names:
        found = getattr(nn, name)
        if name in OURS:
            assert found.__module__.startswith("mmfast.nn.")
        elif not name.startswith("__"):
            assert found is getattr(torch.nn, name), name


def test_all() -> None:
    public = {name for name in dir(torch.nn) if not name.startswith("_")}
    assert set(nn.__all__) == public | OURS
    assert len(nn.__all__) == len(set(nn.__all__))
    namespace: dict = {}
    exec("from mmfast.nn import *", namespace)
    assert namespace["GRU"] is nn.GRU
    assert namespace["Linear"] is torch.nn.Linear


def test_submodules() -> None:
    assert nn.functional is torch.nn.functional
    assert nn.utils.rnn.pack_sequence is torch.nn.utils.rnn.pack_sequence
    assert nn.init.orthogonal_ is torch.nn.init.orthogonal_
    from mmfast.nn import functional as torch_functional

    assert torch_functional is torch.nn.functional


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match=r"neither mmfast\.nn nor torch\.nn has 'GRUU'"):
        nn.GRUU  # noqa: B018


def test_accelerate_is_function_and_module() -> None:
    """mmfast.accelerate is the function; the module behind it still imports, and the function pickles."""
    assert inspect.isfunction(mmfast.accelerate)
    import mmfast.accelerate as function

    assert function is mmfast.accelerate
    module = importlib.import_module("mmfast.accelerate")
    assert inspect.ismodule(module)
    assert inspect.isfunction(mmfast.accelerate)
    assert pickle.loads(pickle.dumps(mmfast.accelerate)) is mmfast.accelerate
    assert pickle.loads(pickle.dumps(module.Row("a", "b", "c", "d", "e"))) == ("a", "b", "c", "d", "e")
