"""accelerate and restore: what they change, what they must not, and everything that is done with models afterwards."""

from __future__ import annotations

import copy
import datetime
import pickle
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import mmfast


class Net(torch.nn.Module):
    """Every layer that mmfast stands in for, between others, from sequences (T, B, 7) with lengths to (B, 3, 2, 16)."""

    def __init__(self, nn=torch.nn) -> None:
        super().__init__()
        self.encoder = nn.GRU(7, 6, 2, bidirectional=True)
        self.middle = nn.Sequential(OrderedDict(rnn=nn.RNN(12, 10, nonlinearity="relu", batch_first=True)))
        self.lstm = nn.LSTM(10, 8, proj_size=5)
        self.cells = nn.ModuleList([nn.RNNCell(5, 5), nn.GRUCell(5, 5), nn.LSTMCell(5, 5)])
        self.up = nn.ModuleDict(
            {
                # without a bias: before a norm its gradient is 0, of which every kernel has its own rounding
                "1d": nn.ConvTranspose1d(5, 4, 4, 2, 1, bias=False),
                "2d": nn.ConvTranspose2d(4, 4, 2, 2),
                "3d": nn.ConvTranspose3d(4, 3, (1, 1, 2), (1, 1, 2), groups=1),
            }
        )
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, [3, 4][: x.shape[1]], enforce_sorted=False)
        y, _ = pad_packed_sequence(self.encoder(packed)[0])
        y, _ = self.middle(y.transpose(0, 1))
        y, _ = self.lstm(y.transpose(0, 1))
        h = self.cells[1](self.cells[0](y[-1]))
        h, _ = self.cells[2](h)
        y = self.norm(self.up["1d"]((y + h).permute(1, 2, 0))).relu()
        y = self.up["2d"](y[:, :, None])
        return self.up["3d"](y[:, :, None])[:, :, 0]


LAYERS = {
    "encoder": "GRU",
    "middle.rnn": "RNN",
    "lstm": "LSTM",
    "cells.0": "RNNCell",
    "cells.1": "GRUCell",
    "cells.2": "LSTMCell",
    "up.1d": "ConvTranspose1d",
    "up.2d": "ConvTranspose2d",
    "up.3d": "ConvTranspose3d",
}


def classes(model: torch.nn.Module, package=torch.nn) -> dict[str, type]:
    return {path: getattr(package, name) for path, name in LAYERS.items()}


def types(model: torch.nn.Module) -> dict[str, type]:
    return {path: type(model.get_submodule(path)) for path in LAYERS}


@pytest.fixture
def pair() -> tuple[Net, Net]:
    """A model of torch.nn's layers and its accelerated copy."""
    theirs = Net()
    return theirs, mmfast.accelerate(copy.deepcopy(theirs))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 2, 7)


def clear(model: torch.nn.Module) -> torch.nn.Module:
    for parameter in model.parameters():
        parameter.grad = None
    return model


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---- what changes, and what does not


def test_classes_there_and_back(x: Tensor, outcome, same) -> None:
    """Only the classes change: restore leaves the instances as they were, attribute for attribute."""
    model = Net()
    before = {path: dict(vars(model.get_submodule(path))) for path in LAYERS}
    expected = outcome(copy.deepcopy(model), x)
    assert mmfast.accelerate(model) is model
    assert types(model) == classes(model, mmfast.nn)
    same(outcome(copy.deepcopy(model), x), expected)
    assert mmfast.restore(model) is model
    assert types(model) == classes(model)
    for path, attributes in before.items():
        after = vars(model.get_submodule(path))
        assert set(after) == set(attributes)
        assert all(after[name] is attributes[name] for name in ("_parameters", "_buffers", "_forward_hooks"))
    same(outcome(model, x), expected)


def test_restored_is_bit_identical(x: Tensor, outcome) -> None:
    model = Net()
    expected = outcome(copy.deepcopy(model), x)
    found = outcome(mmfast.restore(mmfast.accelerate(model)), x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_same_parameters_and_optimizer(x: Tensor, same) -> None:
    """An optimizer made before goes on; its state stays valid through accelerate and restore."""
    losses = []
    for switch in (lambda model: model, mmfast.accelerate):
        torch.manual_seed(5)
        model = Net()
        parameters = list(model.parameters())
        optimizer = torch.optim.Adam(parameters, 1e-2)
        for step in range(4):
            if step == 1:
                switch(model)
            if step == 3:
                mmfast.restore(model)
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    same(losses[4:], losses[:4])


def test_idempotent(x: Tensor) -> None:
    model = mmfast.accelerate(mmfast.accelerate(Net()))
    assert types(model) == classes(model, mmfast.nn)
    model = mmfast.restore(mmfast.restore(model))
    assert types(model) == classes(model)
    model(x)


def test_constructed_with_mmfast(x: Tensor, outcome, same) -> None:
    """A model written with mmfast.nn is the accelerated one; restore makes it torch.nn's."""
    torch.manual_seed(3)
    theirs = Net()
    torch.manual_seed(3)
    ours = Net(mmfast.nn)
    assert types(ours) == classes(ours, mmfast.nn)
    expected = outcome(theirs, x)
    same(outcome(ours, x), expected)
    assert "backend" in vars(ours.lstm)
    torch.testing.assert_close(outcome(mmfast.restore(ours), x), expected, rtol=0, atol=0)
    assert set(vars(ours.lstm)) == set(vars(theirs.lstm))


def test_torch_nn_is_untouched() -> None:
    """Neither torch.nn's classes nor any of its settings change, nor does another model."""
    other = Net()
    before = {name: (getattr(torch.nn, name), dict(vars(getattr(torch.nn, name)))) for name in LAYERS.values()}
    settings = (torch.get_num_threads(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled())
    model = mmfast.accelerate(Net())
    assert settings == (
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
    )
    assert before == {name: (getattr(torch.nn, name), dict(vars(getattr(torch.nn, name)))) for name in before}
    assert types(other) == classes(other)
    mmfast.restore(model)


def test_a_layer_alone(outcome, same) -> None:
    layer = torch.nn.LSTM(7, 5)
    x = torch.randn(3, 2, 7)
    expected = outcome(layer, x)
    assert type(mmfast.accelerate(layer)) is mmfast.nn.LSTM
    same(outcome(layer, x), expected)
    assert type(mmfast.restore(layer)) is torch.nn.LSTM


def test_backend_argument(x: Tensor, outcome) -> None:
    model = Net()
    model.loss = mmfast.nn.AdversarialLoss()
    expected = outcome(copy.deepcopy(model), x)
    mmfast.accelerate(model, backend="torch")
    assert {model.get_submodule(path).backend for path in (*LAYERS, "loss")} == {"torch"}
    torch.testing.assert_close(outcome(model, x), expected, rtol=0, atol=0)
    mmfast.accelerate(model)
    assert model.lstm.backend == "torch"
    mmfast.restore(model)
    assert not hasattr(model.lstm, "backend")


@pytest.mark.parametrize("function", [mmfast.accelerate, mmfast.restore, mmfast.explain], ids=lambda f: f.__name__)
def test_no_module(function: Callable) -> None:
    with pytest.raises(TypeError, match=f"{function.__name__} was given a dict; expected a torch.nn.Module"):
        function({})


def test_unknown_backend() -> None:
    model = Net()
    with pytest.raises(ValueError, match="unknown backend 'gpu'; mmfast has: torch, cpu, triton, cuda"):
        mmfast.accelerate(model, backend="gpu")
    assert types(model) == classes(model)


# ---- what is left alone


class Doubled(torch.nn.GRU):
    def forward(self, x, hx=None):
        y, h = super().forward(x, hx)
        return 2 * y, h


class Named(torch.nn.ConvTranspose1d):
    def extra_repr(self) -> str:
        return f"named, {super().extra_repr()}"


def test_users_classes_are_left_alone(outcome, same) -> None:
    model = torch.nn.ModuleList([Doubled(7, 5), Named(5, 4, 3), torch.nn.GRU(7, 5)])
    mmfast.accelerate(model)
    assert [type(module) for module in model] == [Doubled, Named, mmfast.nn.GRU]
    why = {row.path: row.why for row in mmfast.explain(model)}
    assert why["0"] == "left alone: Doubled overrides forward"
    assert why["1"] == "left alone: Named is a class of its own; derive it from mmfast.nn.ConvTranspose1d instead"
    x = torch.randn(3, 2, 7)
    same(model[0](x)[0], 2 * torch.nn.GRU.forward(model[0], x)[0])


def test_replaced_forward_is_left_alone() -> None:
    """As other libraries wrap a layer: its class no longer decides what runs."""
    model = torch.nn.Sequential(torch.nn.ConvTranspose1d(5, 4, 3))
    original = model[0].forward
    model[0].forward = lambda x: -original(x)
    x = torch.randn(2, 5, 6)
    expected = model(x)
    mmfast.accelerate(model)
    assert type(model[0]) is torch.nn.ConvTranspose1d
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert mmfast.explain(model)[0].why == "left alone: its forward was replaced on the instance"


class Mine(mmfast.nn.GRU):
    """A user's class, derived from mmfast's."""


def test_classes_derived_from_mmfast(outcome) -> None:
    """Run mmfast's op, take a backend, and stay what they are."""
    model = torch.nn.Sequential(Mine(7, 5))
    mmfast.accelerate(model, backend="torch")
    assert model[0].backend == "torch"
    theirs = torch.nn.GRU(7, 5)
    theirs.load_state_dict(model[0].state_dict())
    x = torch.randn(3, 2, 7)
    torch.testing.assert_close(outcome(model[0], x), outcome(theirs, x), rtol=0, atol=0)
    mmfast.restore(model)
    assert type(model[0]) is Mine


# ---- sharing


def test_shared_modules_and_tied_weights(outcome, same) -> None:
    """One module in two places stays one module; one Parameter in two modules one Parameter, its gradients added."""
    theirs = torch.nn.ModuleDict({"a": torch.nn.GRUCell(6, 6), "c": torch.nn.GRUCell(6, 6)})
    theirs["b"] = theirs["a"]
    theirs["c"].weight_hh = theirs["a"].weight_hh
    ours = mmfast.accelerate(copy.deepcopy(theirs))
    assert ours["b"] is ours["a"]
    assert type(ours["a"]) is type(ours["c"]) is mmfast.nn.GRUCell
    assert ours["c"].weight_hh is ours["a"].weight_hh
    x = torch.randn(2, 6)

    def run(cells):
        return lambda x: cells["c"](x, cells["b"](x, cells["a"](x)))

    expected = outcome(run(theirs), x, parameters=list(theirs.parameters()))
    same(outcome(run(ours), x, parameters=list(ours.parameters())), expected)


def test_tied_to_another_layer(outcome) -> None:
    """An embedding tied to an RNN's input weight, through torch.nn.RNNBase's own attribute."""
    model = torch.nn.ModuleDict({"embed": torch.nn.Linear(6, 7), "rnn": torch.nn.RNN(6, 7)})
    model["rnn"].weight_ih_l0 = model["embed"].weight
    mmfast.accelerate(model)
    assert model["rnn"].weight_ih_l0 is model["embed"].weight
    model["rnn"](torch.randn(3, 2, 6))[0].sum().backward()
    assert model["embed"].weight.grad is not None


# ---- hooks


def with_hooks(model: Net) -> list:
    """Registers hooks of every kind, and gives the list that they write to."""
    seen: list = []
    for path in LAYERS:
        layer = model.get_submodule(path)
        layer.register_forward_pre_hook(lambda m, args, path=path: seen.append((path, "pre")))
        layer.register_forward_hook(lambda m, args, out, path=path: seen.append((path, "post")))
    model.up["1d"].register_full_backward_hook(lambda m, dx, dy: seen.append(("up.1d", dy[0].clone())))
    model.up["2d"].weight.register_hook(lambda g: seen.append(("up.2d", g.clone())))
    model.up["2d"].register_forward_hook(lambda m, args, out: out * 2)
    return seen


def test_hooks(pair: tuple[Net, Net], x: Tensor, same) -> None:
    """Forward, pre-forward, backward and parameter hooks of before and after run, and may change values."""
    records: list[list] = []
    for model in pair:
        seen = with_hooks(model)
        y = model(x)
        y.sum().backward()
        records.append([*seen, y.detach()])
    assert [record[0] for record in records[1][:-1]] == [record[0] for record in records[0][:-1]]
    values = [[value for _, value in record[:-1] if isinstance(value, Tensor)] + record[-1:] for record in records]
    assert len(values[0]) == 3
    same(values[1], values[0])


def test_hooks_of_before_stay() -> None:
    model = torch.nn.Sequential(torch.nn.ConvTranspose1d(5, 4, 3))
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append("forward"))
    handle = model[0].register_forward_pre_hook(lambda *_: calls.append("pre"))
    mmfast.accelerate(model)(torch.randn(2, 5, 6))
    handle.remove()
    mmfast.restore(model)(torch.randn(2, 5, 6))
    assert calls == ["pre", "forward", "forward"]


# ---- frozen weights


class Recorder(TorchDispatchMode):
    """The aten operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


def test_frozen_weights_of_a_convolution() -> None:
    """No gradient is computed for them, neither for the input where that needs none."""
    layer = mmfast.accelerate(torch.nn.ConvTranspose2d(5, 4, 3))
    layer.weight.requires_grad_(False)
    y = layer(torch.randn(2, 5, 6, 6))
    with Recorder() as recorder:
        y.sum().backward()
    backward = torch.ops.aten.convolution_backward.default
    assert [args[-1] for function, args in recorder.calls if function is backward] == [[False, False, True]]
    assert layer.weight.grad is None
    assert layer.bias.grad is not None


@pytest.mark.parametrize("frozen", ["weight_ih_l0", "weight_hh_l0", "bias_hh_l0", "weight_ih_l1"])
def test_frozen_weights_of_a_gru(frozen: str, outcome, same) -> None:
    theirs = torch.nn.GRU(7, 5, 2)
    getattr(theirs, frozen).requires_grad_(False)
    ours = mmfast.accelerate(copy.deepcopy(theirs))
    x = torch.randn(3, 2, 7)
    same(outcome(ours, x), outcome(theirs, x))
    ours(x)[0].sum().backward()
    assert [name for name, p in ours.named_parameters() if p.grad is None] == [frozen]


def test_all_frozen() -> None:
    layer = mmfast.accelerate(torch.nn.LSTM(7, 5)).requires_grad_(False)
    assert not layer(torch.randn(3, 2, 7))[0].requires_grad


# ---- parametrizations


class Tanh(torch.nn.Module):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        Tanh.calls += 1
        return x.tanh()


PARAMETRIZED = {
    "GRU": (lambda: torch.nn.GRU(7, 5), "weight_hh_l0", lambda: torch.randn(3, 2, 7)),
    "LSTM": (lambda: torch.nn.LSTM(7, 5, proj_size=3), "weight_hr_l0", lambda: torch.randn(3, 2, 7)),
    "LSTMCell": (lambda: torch.nn.LSTMCell(7, 5), "weight_ih", lambda: torch.randn(2, 7)),
    "ConvTranspose2d": (lambda: torch.nn.ConvTranspose2d(5, 4, 3), "weight", lambda: torch.randn(2, 5, 6, 6)),
}
per_parametrized = pytest.mark.parametrize("kind", PARAMETRIZED)


def parametrized(kind: str) -> tuple[torch.nn.Module, str, Tensor]:
    make, name, draw = PARAMETRIZED[kind]
    layer = make()
    parametrize.register_parametrization(layer, name, Tanh())
    return layer, name, draw()


@per_parametrized
def test_parametrized(kind: str, outcome, same) -> None:
    """The generated class gets mmfast's as its only base; the weight is computed once a call, with its gradient."""
    layer, _, x = parametrized(kind)
    generated, other = type(layer), copy.deepcopy(layer)
    expected = outcome(copy.deepcopy(layer), x)
    mmfast.accelerate(layer)
    assert type(layer).__bases__ == (getattr(mmfast.nn, kind),)
    assert type(layer).__name__ == f"Parametrized{kind}"
    assert parametrize.type_before_parametrizations(layer) is getattr(mmfast.nn, kind)
    Tanh.calls = 0
    found = outcome(layer, x)
    assert Tanh.calls == 1
    same(found, expected)
    assert type(other) is generated
    assert generated.__bases__ == (getattr(torch.nn, kind),)
    same(outcome(copy.deepcopy(layer), x), expected)
    assert parametrize.type_before_parametrizations(mmfast.restore(layer)) is getattr(torch.nn, kind)
    same(outcome(layer, x), expected)


@per_parametrized
@pytest.mark.parametrize("leave", [True, False], ids=["baked", "original"])
def test_parametrized_then_removed(kind: str, leave: bool, outcome, same) -> None:
    """accelerate, remove_parametrizations, restore."""
    layer, name, x = parametrized(kind)
    plain, _, _ = parametrized(kind)  # a deepcopy would share its generated class, and lose its property with it
    plain.load_state_dict(layer.state_dict())
    parametrize.remove_parametrizations(plain, name, leave_parametrized=leave)
    mmfast.accelerate(layer)
    parametrize.remove_parametrizations(layer, name, leave_parametrized=leave)
    assert type(layer) is getattr(mmfast.nn, kind)
    expected = outcome(plain, x)
    same(outcome(layer, x), expected)
    assert type(mmfast.restore(layer)) is getattr(torch.nn, kind)
    torch.testing.assert_close(outcome(layer, x), expected, rtol=0, atol=0)


@per_parametrized
def test_parametrized_after(kind: str, outcome, same) -> None:
    """accelerate, parametrize, restore, remove_parametrizations."""
    make, name, draw = PARAMETRIZED[kind]
    theirs, x = make(), draw()
    layer = mmfast.accelerate(copy.deepcopy(theirs))
    for module in (theirs, layer):
        parametrize.register_parametrization(module, name, Tanh())
    expected = outcome(theirs, x)
    same(outcome(layer, x), expected)
    mmfast.restore(layer)
    assert type(layer).__bases__ == (getattr(torch.nn, kind),)
    torch.testing.assert_close(outcome(layer, x), expected, rtol=0, atol=0)
    parametrize.remove_parametrizations(layer, name)
    assert type(layer) is getattr(torch.nn, kind)


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm", "orthogonal"])
def test_torch_s_parametrizations(norm: str, outcome, same) -> None:
    """On two weights of one layer, before and after accelerate."""
    layer = torch.nn.GRU(5, 5).eval()  # where spectral_norm makes no power iteration
    getattr(parametrizations, norm)(layer, "weight_hh_l0")
    x = torch.randn(3, 2, 5)
    ours = mmfast.accelerate(copy.deepcopy(layer))
    same(outcome(ours, x), outcome(layer, x))
    getattr(parametrizations, norm)(ours, "weight_ih_l0")
    ours(x)[0].sum().backward()
    assert all(p.grad is not None for p in ours.parameters() if p.requires_grad)
    assert list(mmfast.restore(ours).state_dict()) == list(ours.state_dict())


def test_one_power_iteration_a_call() -> None:
    layer = mmfast.accelerate(parametrizations.spectral_norm(torch.nn.GRU(5, 5), "weight_hh_l0")).train()
    norm = layer.parametrizations.weight_hh_l0[0]
    calls = []
    norm.register_forward_hook(lambda *_: calls.append(norm._u.clone()))
    layer(torch.randn(3, 2, 5))
    assert len(calls) == 1


def test_stock_parametrized_gru_trains() -> None:
    """What PyTorch's flat weights once froze in silence: the parametrized weight follows its original."""
    layer = mmfast.accelerate(parametrizations.weight_norm(torch.nn.GRU(5, 5), "weight_hh_l0"))
    x = torch.randn(3, 2, 5)
    before = layer(x)[0].detach()
    with torch.no_grad():
        layer.parametrizations.weight_hh_l0.original0.mul_(2)
    assert (layer(x)[0] - before).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", PARAMETRIZED)
@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_old_style_norms(kind: str, norm: str, order: str, same) -> None:
    """Whose weight is an attribute that a hook renews at each call, no leaf and no Parameter."""
    results = []
    make, name, draw = PARAMETRIZED[kind]
    x = draw()
    for package in ("theirs", "ours"):
        torch.manual_seed(1)
        layer = make()
        if package == "ours" and order == "before":
            mmfast.accelerate(layer)
        getattr(torch.nn.utils, norm)(layer, name)
        if package == "ours" and order == "after":
            mmfast.accelerate(layer)
        for _ in range(2):
            y = layer(x)
            y = y if isinstance(y, Tensor) else y[0]
            y.square().sum().backward()
        assert name not in layer._parameters
        results.append({"y": y.detach(), **gradients(layer)})
        getattr(torch.nn.utils, f"remove_{norm}")(layer, name)
        assert isinstance(getattr(layer, name), torch.nn.Parameter)
        layer(x)
    assert len(results[0]) >= 3
    same(results[1], results[0])


# ---- lazy layers


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("when", ["before", "after", "constructed"])
def test_lazy(dims: int, when: str, outcome, same) -> None:
    name = f"LazyConvTranspose{dims}d"
    x = torch.randn(2, 5, *(4, 3, 2)[:dims])
    layer = getattr(mmfast.nn if when == "constructed" else torch.nn, name)(6, 3)
    if when == "before":
        mmfast.accelerate(layer)
        assert type(layer) is getattr(mmfast.nn, name)
        mmfast.restore(layer)
        assert type(layer) is getattr(torch.nn, name)
        mmfast.accelerate(layer)
    assert layer.in_channels == 0
    first = layer(x).detach()
    if when == "after":
        mmfast.accelerate(layer)
    assert type(layer) is getattr(mmfast.nn, name.removeprefix("Lazy"))
    assert layer.weight.shape[:2] == (5, 6)
    theirs = getattr(torch.nn, name.removeprefix("Lazy"))(5, 6, 3)
    theirs.load_state_dict(layer.state_dict())
    same(first, theirs(x))
    same(outcome(layer, x), outcome(theirs, x))


def test_lazy_loads_a_state_dict(same) -> None:
    layer = mmfast.accelerate(torch.nn.LazyConvTranspose1d(6, 3))
    theirs = torch.nn.ConvTranspose1d(5, 6, 3)
    layer.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, 4)
    same(layer(x), theirs(x))


# ---- copies, files, processes


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "copy"])
def test_copies(how: str, pair: tuple[Net, Net], x: Tensor, outcome, same) -> None:
    """A copy is accelerated, too, and but for copy.copy independent of the original."""
    _, ours = pair
    ours(x)
    ours.eval()
    if how == "copy":
        other = copy.copy(ours.encoder)
        assert other.weight_hh_l0 is ours.encoder.weight_hh_l0
        y = torch.randn(3, 2, 7)
        same(other(y)[0], ours.encoder(y)[0])
        return
    other = copy.deepcopy(ours) if how == "deepcopy" else pickle.loads(pickle.dumps(ours))
    assert types(other) == classes(other, mmfast.nn)
    assert not other.training
    same(outcome(other, x), outcome(ours, x))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    assert (other(x) - ours(x)).abs().max() > 1e-3


def test_saved_and_loaded_in_another_process(pair: tuple[Net, Net], x: Tensor, tmp_path, same) -> None:
    """torch.save of whole modules: the classes are importable names."""
    _, ours = pair
    layers = torch.nn.ModuleDict({path.replace(".", "-"): ours.get_submodule(path) for path in LAYERS})
    layers["encoder"].backend = "torch"
    sequence = torch.randn(3, 2, 7)
    torch.save((layers, sequence, layers["encoder"](sequence)[0].detach()), tmp_path / "layers.pt")
    script = (
        "import torch\n"
        "layers, x, y = torch.load('layers.pt', weights_only=False)\n"
        "import mmfast\n"
        "assert type(layers['encoder']) is mmfast.nn.GRU and layers['encoder'].backend == 'torch'\n"
        "torch.testing.assert_close(layers['encoder'](x)[0], y)\n"
        "torch.save(mmfast.restore(layers), 'restored.pt')\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=120)
    restored = torch.load(tmp_path / "restored.pt", weights_only=False)
    assert type(restored["encoder"]) is torch.nn.GRU
    same(restored["encoder"](sequence), layers["encoder"](sequence))


def test_state_dict_both_ways(pair: tuple[Net, Net], x: Tensor, tmp_path, same) -> None:
    theirs, ours = pair
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata
    other = Net()
    other.load_state_dict(ours.state_dict())
    same(other(x), ours(x))
    torch.save(other.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    fresh = mmfast.accelerate(Net())
    fresh.load_state_dict(state, assign=True)
    same(fresh(x), other(x))
    same(mmfast.restore(fresh)(x), other(x))


def test_ema(pair: tuple[Net, Net], x: Tensor, same) -> None:
    """An AveragedModel of an accelerated model is accelerated, and averages."""
    _, ours = pair
    average = AveragedModel(ours, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    average.update_parameters(ours)
    before = ours.lstm.weight_hh_l0.detach().clone()
    with torch.no_grad():
        ours.lstm.weight_hh_l0.add_(1)
    average.update_parameters(ours)
    assert types(average.module) == classes(ours, mmfast.nn)
    same(average.module.lstm.weight_hh_l0, before + 0.5)
    average(x)


# ---- dtypes and devices


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=["f64", "bf16", "f16"])
def test_to(dtype: torch.dtype, pair: tuple[Net, Net], x: Tensor, same) -> None:
    theirs, ours = (model.eval().to(dtype) for model in pair)
    assert {parameter.dtype for parameter in ours.parameters()} == {dtype}
    same(ours(x.to(dtype)), theirs(x.to(dtype)))
    back = ours.float()
    same(back(x), theirs.float()(x))


def test_half(same) -> None:
    theirs = torch.nn.GRU(7, 5).half()
    ours = mmfast.accelerate(copy.deepcopy(theirs))
    x = torch.randn(3, 2, 7).half()
    same(ours(x), theirs(x))


def test_meta(x: Tensor, same) -> None:
    """Shapes without data; then memory, then values."""
    with torch.device("meta"):
        theirs = Net()
    ours = mmfast.accelerate(copy.deepcopy(theirs))
    sequence = torch.empty(3, 2, 7, device="meta")
    image = torch.empty(2, 5, 4, device="meta")
    assert ours.encoder(sequence)[0].shape == (3, 2, 12)
    assert ours.encoder(sequence)[0].is_meta
    assert ours.up["1d"](image).shape == (2, 4, 8)
    assert ours.cells[2](torch.empty(2, 5, device="meta"))[1].is_meta
    values = Net()
    ours.to_empty(device="cpu").load_state_dict(values.state_dict())
    ours.norm.reset_running_stats()
    same(ours(x), values(x))
    mmfast.accelerate(Net()).to("meta")


def test_flatten_parameters(pair: tuple[Net, Net], x: Tensor, same) -> None:
    """As models call it everywhere; here there is nothing to flatten."""
    _, ours = pair
    expected = ours(x)
    before = [p.data_ptr() for p in ours.parameters()]
    for layer in (ours.encoder, ours.middle.rnn, ours.lstm):
        assert layer.flatten_parameters() is None
    assert [p.data_ptr() for p in ours.parameters()] == before
    same(ours.eval()(x), ours(x))
    assert expected.requires_grad


def test_replaced_parameters(same) -> None:
    """Assigned Parameters, .data and functional_call's tensors count at once."""
    theirs = torch.nn.GRU(7, 5)
    ours = mmfast.accelerate(copy.deepcopy(theirs))
    x = torch.randn(3, 2, 7)
    for layer in (theirs, ours):
        torch.manual_seed(2)
        layer.weight_hh_l0 = torch.nn.Parameter(torch.randn(15, 5))
        layer.bias_ih_l0.data = torch.randn(15)
    same(ours(x), theirs(x))
    assert ours._flat_weights[1] is ours.weight_hh_l0


def weights_init(module: torch.nn.Module) -> None:
    """The initialiser of the DCGAN example and its many copies."""
    name = module.__class__.__name__
    if name.find("Conv") != -1:
        module.weight.data.normal_(0.0, 0.02)
    elif name.find("BatchNorm") != -1:
        module.weight.data.normal_(1.0, 0.02)
        module.bias.data.fill_(0)


def test_initialiser_by_class_name(pair: tuple[Net, Net]) -> None:
    states = []
    for model in pair:
        torch.manual_seed(4)
        model.apply(weights_init)
        states.append(model.state_dict())
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)
    assert states[0]["up.2d.weight"].std() < 0.03


def test_reset_parameters(pair: tuple[Net, Net]) -> None:
    states = []
    for model in pair:
        torch.manual_seed(4)
        for path in LAYERS:
            model.get_submodule(path).reset_parameters()
        states.append(model.state_dict())
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)


# ---- transforms of calls


def test_functional_call(pair: tuple[Net, Net], x: Tensor, same) -> None:
    theirs, ours = (model.eval() for model in pair)
    parameters = {name: (2 * p).detach() for name, p in theirs.named_parameters()}
    y = torch.func.functional_call(ours, parameters, (x,))
    same(y, torch.func.functional_call(theirs, parameters, (x,)))
    assert (y - ours(x)).abs().max() > 1e-3
    assert ours.lstm.weight_ih_l0 is dict(ours.named_parameters())["lstm.weight_ih_l0"]


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM", "GRUCell", "LSTMCell", "ConvTranspose3d"])
def test_func_grad(kind: str, same) -> None:
    sizes = (4, 3, 2) if kind.startswith("Conv") else (4, 3)
    theirs = getattr(torch.nn, kind)(*sizes)
    ours = mmfast.accelerate(copy.deepcopy(theirs))
    x = torch.randn(2, 4, 3, 2, 2) if kind.startswith("Conv") else torch.randn((5, 2, 4)["Cell" in kind :])
    results = []
    for layer in (theirs, ours):

        def loss(parameters: dict[str, Tensor], layer=layer) -> Tensor:
            y = torch.func.functional_call(layer, parameters, (x,))
            return (y if isinstance(y, Tensor) else y[0]).square().mean()

        results.append(torch.func.grad(loss)({name: p.detach() for name, p in layer.named_parameters()}))
    same(results[1], results[0])


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_vmap(dims: int, same) -> None:
    """Over inputs, and per-sample gradients."""
    layer = getattr(mmfast.nn, f"ConvTranspose{dims}d")(4, 3, 2)
    xs = torch.randn(5, 2, 4, *(4, 3, 2)[:dims])

    def call(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,))

    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    expected = torch.stack([call(parameters, x) for x in xs])
    same(torch.func.vmap(call, (None, 0))(parameters, xs), expected)

    def loss(parameters, x):
        return call(parameters, x).square().sum()

    many = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, xs)
    one = torch.func.grad(loss)(parameters, xs[3])
    same({name: grad[3] for name, grad in many.items()}, one)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])
def test_checkpointing(reentrant: bool, pair: tuple[Net, Net], x: Tensor, same) -> None:
    results = []
    for model in pair:
        model.norm.eval()
        inputs = x.clone().requires_grad_()
        checkpoint(model, inputs, use_reentrant=reentrant).square().sum().backward()
        results.append({"x": inputs.grad, **gradients(model)})
    same(results[1], results[0])


def test_saved_tensor_hooks(pair: tuple[Net, Net], x: Tensor, same) -> None:
    """Activations kept elsewhere: through save_on_cpu's pack and unpack."""
    _, ours = pair
    ours(x).square().sum().backward()
    expected = gradients(ours)
    clear(ours)
    with torch.autograd.graph.save_on_cpu():
        y = ours(x)
    y.square().sum().backward()
    same(gradients(ours), expected)


@pytest.fixture
def gloo(tmp_path) -> Iterator[None]:
    timeout = datetime.timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/group", timeout, world_size=1, rank=0)
    yield
    time.sleep(0.2)  # gloo's threads free tensors under Python's lock, which destroying the group holds while it waits
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("order", ["wrapped", "inside"])
def test_ddp(order: str, gloo, pair: tuple[Net, Net], x: Tensor, same) -> None:
    """DistributedDataParallel around an accelerated model, and accelerate on a model that it wraps."""
    # in float64, where a norm over few values does not magnify rounding
    theirs, ours, x = pair[0].double(), pair[1].double(), x.double()
    theirs(x).square().sum().backward()
    if order == "wrapped":
        model = torch.nn.parallel.DistributedDataParallel(ours)
    else:
        model = torch.nn.parallel.DistributedDataParallel(mmfast.restore(ours))
        mmfast.accelerate(model)
    assert types(model.module) == classes(ours, mmfast.nn)
    for _ in range(2):
        clear(model)
        model(x).square().sum().backward()
    same(gradients(model.module), gradients(theirs))


# ---- graphs


class Decoder(torch.nn.Module):
    """Cells and transposed convolutions, as one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = torch.nn.LSTMCell(6, 6)
        self.up = torch.nn.Sequential(
            torch.nn.ConvTranspose1d(6, 4, 4, 2, 1),
            torch.nn.BatchNorm1d(4),
            torch.nn.ReLU(),
            torch.nn.ConvTranspose1d(4, 2, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.cell(x)
        return self.up(h[:, :, None].expand(-1, -1, 3))


def test_compiled_fullgraph(outcome, same) -> None:
    theirs = Decoder().eval()
    ours = mmfast.accelerate(copy.deepcopy(theirs))
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for batch in (2, 3):
        x = torch.randn(batch, 6)
        same(outcome(compiled, x), outcome(theirs, x))


def test_compiled_with_every_number_symbolic(outcome, same) -> None:
    """dynamic=True makes symbols of floats, too: of zoneout and of a negative slope."""
    up = torch.nn.Sequential(torch.nn.ConvTranspose1d(4, 3, 2, 2), torch.nn.LeakyReLU(0.2))
    theirs = torch.nn.ModuleList([torch.nn.GRU(6, 4), up])
    ours = mmfast.accelerate(copy.deepcopy(theirs))

    def of(layers):
        return lambda x: layers[1](layers[0](x)[0].permute(1, 2, 0))

    compiled = torch.compile(of(ours), backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (2, 3):
        x = torch.randn(5, batch, 6)
        same(outcome(compiled, x), outcome(of(theirs), x))


def test_compiled_by_inductor(same) -> None:
    """Where `torch` serves, aten is traced, so that Inductor may fuse around it."""
    theirs = Decoder().eval()
    compiled = torch.compile(mmfast.accelerate(copy.deepcopy(theirs)), fullgraph=True)
    x = torch.randn(2, 6)
    with torch.no_grad():
        same(compiled(x), theirs(x))


# torch's own, where a graph breaks: before a tensor that requires grad, and around an autograd.Function
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
def test_compiled_model(pair: tuple[Net, Net], x: Tensor, outcome, same) -> None:
    """The whole model, packed sequences and all."""
    theirs, ours = pair
    same(outcome(torch.compile(ours, backend="aot_eager"), x), outcome(theirs, x))


def test_accelerated_after_compile(outcome, same) -> None:
    """A graph made of torch.nn's layers is not what runs afterwards, nor does restoring leave the other."""
    model = Decoder().eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(2, 6)
    expected = compiled(x)
    mmfast.accelerate(compiled, backend="torch")
    assert type(model.cell) is mmfast.nn.LSTMCell
    same(compiled(x), expected)
    model.cell.backend = "triton"
    with pytest.raises(RuntimeError, match="backend 'triton' was asked for rnn"):
        compiled(x)
    mmfast.restore(model)
    same(compiled(x), expected)


def test_exported(same) -> None:
    theirs = Decoder().eval()
    ours = mmfast.accelerate(copy.deepcopy(theirs))
    dynamic = ({0: torch.export.Dim("batch", min=2, max=64)},)
    exported = torch.export.export(ours, (torch.randn(3, 6),), dynamic_shapes=dynamic)
    x = torch.randn(5, 6)
    same(exported.module()(x), theirs(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("layer", "shape"), [("ConvTranspose1d", (2, 3, 6)), ("GRUCell", (2, 3)), ("LSTM", (5, 2, 3))])
def test_torchscript(layer: str, shape: tuple, same) -> None:
    """Refused in one sentence; after restore it compiles."""
    model = torch.nn.Sequential(getattr(torch.nn, layer)(3, 4, *([2] if layer.startswith("Conv") else [])))
    mmfast.accelerate(model)
    with pytest.raises(RuntimeError, match=rf"TorchScript cannot compile mmfast\.nn\.{layer}; call mmfast\.restore"):
        torch.jit.script(model)
    x = torch.randn(shape)
    same(torch.jit.script(mmfast.restore(model))(x), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traced(same) -> None:
    """A trace records PyTorch's own ops, which every runtime knows, not the memory they worked in."""
    decoder = mmfast.accelerate(Decoder()).eval()
    gru = mmfast.accelerate(torch.nn.GRU(6, 5))
    loss = mmfast.nn.AdversarialLoss("hinge")
    for function, draw in (
        (decoder, lambda: (torch.randn(2, 6),)),
        (gru, lambda: (torch.randn(3, 2, 6),)),
        (lambda real, fake: loss.discriminator(real, fake), lambda: (torch.randn(5), torch.randn(5))),
    ):
        inputs = draw()
        traced = torch.jit.trace(function, draw())
        same(traced(*inputs), function(*inputs))
        assert "mmfast::" not in str(traced.inlined_graph)


def test_onnx(monkeypatch: pytest.MonkeyPatch, same) -> None:
    """torch.onnx.export, too, finds none of mmfast's ops."""
    layer = torch.nn.GRU(6, 5, bidirectional=True)
    ours, x = mmfast.accelerate(copy.deepcopy(layer)), torch.randn(3, 2, 6)
    assert "mmfast." in str(torch.export.export(ours, (x,)).graph)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    exported = torch.export.export(ours, (x,))
    assert "mmfast." not in str(exported.graph)
    same(exported.module()(x), layer(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning")
def test_quantize_dynamic() -> None:
    """After restore it finds what it knows; before, it leaves mmfast's layers as they are."""
    model = torch.nn.Sequential(torch.nn.LSTM(7, 5)).eval()
    x = torch.randn(3, 2, 7)
    expected = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {torch.nn.LSTM})
    mmfast.accelerate(model)
    assert type(torch.ao.quantization.quantize_dynamic(model, {torch.nn.LSTM})[0]) is mmfast.nn.LSTM
    found = torch.ao.quantization.quantize_dynamic(mmfast.restore(model), {torch.nn.LSTM})
    assert type(found[0]) is type(expected[0]) is torch.ao.nn.quantized.dynamic.LSTM
    torch.testing.assert_close(found(x)[0], expected(x)[0], rtol=0, atol=0)


def test_gradient_penalty(outcome, same) -> None:
    """Second order through an accelerated model, as WGAN-GP takes it."""
    theirs = torch.nn.ModuleList([torch.nn.GRU(5, 4), torch.nn.ConvTranspose1d(4, 3, 3)])
    ours = mmfast.accelerate(copy.deepcopy(theirs))
    x = torch.randn(3, 2, 5)

    def penalty(layers):
        def compute(x):
            y = layers[1](layers[0](x)[0].permute(1, 2, 0)).tanh()
            (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            return (dx.norm() - 1).square()

        return compute

    expected = outcome(penalty(theirs), x, parameters=[*theirs.parameters()])
    assert len(expected) > 4
    same(outcome(penalty(ours), x, parameters=[*ours.parameters()]), expected)
