"""accelerate and restore: what they change, and what they must not."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from net import LAYERS, Net, classes, gradients, types
from torch import Tensor
from torch.nn.utils import parametrizations, parametrize
from torch.utils._python_dispatch import TorchDispatchMode

import mmfast


@pytest.fixture
def pair() -> tuple[Net, Net]:
    """A model of torch.nn's layers and its accelerated copy."""
    theirs = Net()
    return theirs, mmfast.accelerate(copy.deepcopy(theirs))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 2, 7)


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
