"""mmfast.nn's layers against torch.nn's: values, layouts, errors, and everything that is done with modules."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence
from torch.utils import _pytree as pytree

import mmfast
from mmfast import functional, nn

T, B, X, H = 5, 3, 7, 11  # steps, batch, input size, hidden size


def packed(batch_first: bool = False, sort: bool = False) -> PackedSequence:
    lengths = [5, 3, 1] if sort else [3, 5, 1]
    x = torch.randn(B, T, X) if batch_first else torch.randn(T, B, X)
    return pack_padded_sequence(x, lengths, batch_first=batch_first, enforce_sorted=sort)


def state(*shape: int) -> Tensor:
    return torch.randn(*shape)


# id: name, constructor arguments, and how inputs are drawn
CASES: dict[str, tuple[str, dict[str, Any], Callable[[], tuple]]] = {
    "RNN": ("RNN", {}, lambda: (torch.randn(T, B, X),)),
    "RNN-relu-hx": ("RNN", {"nonlinearity": "relu"}, lambda: (torch.randn(T, B, X), state(1, B, H))),
    "RNN-packed-hx": ("RNN", {}, lambda: (packed(), state(1, B, H))),
    "GRU": ("GRU", {}, lambda: (torch.randn(T, B, X),)),
    "GRU-T1-B1": ("GRU", {}, lambda: (torch.randn(1, 1, X),)),
    "GRU-B0": ("GRU", {}, lambda: (torch.randn(T, 0, X),)),
    "GRU-L3-dropout": ("GRU", {"num_layers": 3, "dropout": 0.5}, lambda: (torch.randn(T, B, X),)),
    "GRU-L2-bi-hx": ("GRU", {"num_layers": 2, "bidirectional": True}, lambda: (torch.randn(T, B, X), state(4, B, H))),
    "GRU-batch_first": ("GRU", {"batch_first": True}, lambda: (torch.randn(B, T, X), state(1, B, H))),
    "GRU-no-bias": ("GRU", {"bias": False}, lambda: (torch.randn(T, B, X),)),
    "GRU-unbatched": ("GRU", {}, lambda: (torch.randn(T, X),)),
    "GRU-unbatched-batch_first-hx": ("GRU", {"batch_first": True}, lambda: (torch.randn(T, X), state(1, H))),
    "GRU-strided": ("GRU", {}, lambda: (torch.randn(B, X, 2 * T).permute(2, 0, 1)[::2],)),
    "GRU-packed": ("GRU", {}, lambda: (packed(sort=True),)),
    "GRU-packed-bi-L2-dropout-hx": (
        "GRU",
        {"num_layers": 2, "bidirectional": True, "dropout": 0.3, "batch_first": True},
        lambda: (packed(batch_first=True), state(4, B, H)),
    ),
    "LSTM": ("LSTM", {}, lambda: (torch.randn(T, B, X),)),
    "LSTM-hx-list": ("LSTM", {}, lambda: (torch.randn(T, B, X), [state(1, B, H), state(1, B, H)])),
    "LSTM-bi-unbatched-hx": (
        "LSTM",
        {"bidirectional": True},
        lambda: (torch.randn(T, X), (state(2, H), state(2, H))),
    ),
    "LSTM-proj": ("LSTM", {"proj_size": 4}, lambda: (torch.randn(T, B, X), (state(1, B, 4), state(1, B, H)))),
    "LSTM-proj-L2-bi-no-bias-packed": (
        "LSTM",
        {"proj_size": 4, "num_layers": 2, "bidirectional": True, "bias": False},
        lambda: (packed(),),
    ),
    "LSTM-packed-hx": ("LSTM", {}, lambda: (packed(), (state(1, B, H), state(1, B, H)))),
    "RNNCell": ("RNNCell", {}, lambda: (torch.randn(B, X),)),
    "RNNCell-relu-no-bias-hx": (
        "RNNCell",
        {"nonlinearity": "relu", "bias": False},
        lambda: (torch.randn(B, X), state(B, H)),
    ),
    "GRUCell-hx": ("GRUCell", {}, lambda: (torch.randn(B, X), state(B, H))),
    "GRUCell-unbatched-hx": ("GRUCell", {}, lambda: (torch.randn(X), state(H))),
    "LSTMCell": ("LSTMCell", {}, lambda: (torch.randn(B, X),)),
    "LSTMCell-unbatched-hx": ("LSTMCell", {}, lambda: (torch.randn(X), (state(H), state(H)))),
    "conv1d-k4-s2": ("ConvTranspose1d", {"kernel_size": 4, "stride": 2}, lambda: (torch.randn(2, X, 6),)),
    "conv1d-unbatched": ("ConvTranspose1d", {"kernel_size": 3, "padding": 1}, lambda: (torch.randn(X, 6),)),
    "conv2d-k4-s2-p1": (
        "ConvTranspose2d",
        {"kernel_size": 4, "stride": 2, "padding": 1},
        lambda: (torch.randn(2, X, 3, 4),),
    ),
    "conv2d-N0": ("ConvTranspose2d", {"kernel_size": 4, "stride": 2}, lambda: (torch.randn(0, X, 3, 4),)),
    "conv2d-channels_last": (
        "ConvTranspose2d",
        {"kernel_size": 3, "bias": False},
        lambda: (torch.randn(2, X, 3, 4).to(memory_format=torch.channels_last),),
    ),
    "conv2d-output_size": (
        "ConvTranspose2d",
        {"kernel_size": 3, "stride": 2, "padding": 1},
        lambda: (torch.randn(2, X, 3, 4), [6, 8]),
    ),
    "conv2d-output_padding-dilation": (
        "ConvTranspose2d",
        {"kernel_size": (2, 3), "output_padding": (1, 2), "dilation": (2, 3)},
        lambda: (torch.randn(2, X, 3, 4),),
    ),
    "conv3d-s2": (
        "ConvTranspose3d",
        {"kernel_size": (1, 2, 3), "stride": (1, 2, 2)},
        lambda: (torch.randn(2, X, 2, 3, 4),),
    ),
}


def build(case: str, **more: Any) -> tuple[torch.nn.Module, torch.nn.Module, tuple]:
    """torch.nn's layer, mmfast's with equal weights, and inputs."""
    name, arguments, draw = CASES[case]
    theirs = getattr(torch.nn, name)(X, H, **arguments)
    ours = getattr(nn, name)(X, H, **arguments, **more)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours, draw()


def layouts(outputs: Any) -> list[tuple]:
    return [(x.shape, x.stride(), x.dtype) for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor)]


@pytest.mark.parametrize("case", CASES)
def test_equals_torch(case: str, outcome, same) -> None:
    """With the torch backend the same bits in the same layout; with the chosen one the same within rounding."""
    theirs, ours, inputs = build(case)
    expected = outcome(theirs, *inputs)
    same(outcome(ours, *inputs), expected)
    ours.backend = "torch"
    torch.testing.assert_close(outcome(ours, *inputs), expected, rtol=0, atol=0)
    assert layouts(ours(*inputs)) == layouts(theirs(*inputs))
    assert type(ours(*inputs)) is type(theirs(*inputs))
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize("case", CASES)
def test_initial_weights(case: str, seed: int) -> None:
    """A seed gives the weights that it gives torch.nn's layer."""
    name, arguments, _ = CASES[case]
    states = []
    for package in (torch.nn, nn):
        torch.manual_seed(seed)
        states.append(getattr(package, name)(X, H, **arguments).state_dict())
    assert list(states[0]) == list(states[1])
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)


@pytest.mark.parametrize("case", ["RNN-packed-hx", "GRU-L2-bi-hx", "LSTM-proj", "GRUCell-hx", "LSTMCell", "RNNCell"])
def test_functions(case: str) -> None:
    """The functions by hand, from the parameters alone, are what the layers compute."""
    theirs, ours, (x, *hx) = build(case, backend="torch")
    hx = hx[0] if hx else None
    if isinstance(theirs, torch.nn.RNNCellBase):
        function = getattr(functional, case.partition("Cell")[0].lower() + "_cell")
        result = function(x, hx, ours.weight_ih, ours.weight_hh, ours.bias_ih, ours.bias_hh, backend="torch")
    else:
        data, batch_sizes = x[:2] if isinstance(x, PackedSequence) else (x, None)
        if batch_sizes is not None:
            hx = hx[:, x.sorted_indices]
        function = getattr(functional, case.partition("-")[0].lower())
        options = {"bidirectional": ours.bidirectional, "batch_sizes": batch_sizes, "backend": "torch"}
        result = function(data, hx, ours.all_weights, **options)
        if batch_sizes is not None:
            result = (PackedSequence(result[0], *x[1:]), result[1][:, x.unsorted_indices])
    expected = theirs(x, hx if not isinstance(x, PackedSequence) else hx[:, x.unsorted_indices])
    torch.testing.assert_close(pytree.tree_leaves(result), pytree.tree_leaves(expected), rtol=0, atol=0)


# ---- errors


def failing_calls() -> Iterator[tuple[str, str, dict[str, Any], Callable[[], tuple]]]:
    for name in ("RNN", "GRU"):
        yield f"{name}-1d", name, {}, lambda: (torch.randn(X),)
        yield f"{name}-4d", name, {}, lambda: (torch.randn(2, T, B, X),)
        yield f"{name}-batched-hx2d", name, {}, lambda: (torch.randn(T, B, X), state(1, H))
        yield f"{name}-unbatched-hx3d", name, {}, lambda: (torch.randn(T, X), state(1, 1, H))
        yield f"{name}-input_size", name, {}, lambda: (torch.randn(T, B, X + 1),)
        yield f"{name}-dtype", name, {}, lambda: (torch.randn(T, B, X, dtype=torch.float64),)
        yield f"{name}-hx-batch", name, {}, lambda: (torch.randn(T, B, X), state(1, B + 1, H))
        yield f"{name}-hx-layers", name, {"bidirectional": True}, lambda: (torch.randn(T, B, X), state(1, B, H))
        yield f"{name}-hx-tuple", name, {}, lambda: (torch.randn(T, B, X), (state(1, B, H), state(1, B, H)))
        yield f"{name}-packed-hx", name, {}, lambda: (packed(), state(1, B, H + 1))
        yield f"{name}-packed-input_size", name, {}, lambda: (pack_sequence([torch.randn(2, X + 1)]),)
        yield f"{name}-packed-dtype", name, {}, lambda: (packed().double(),)
        yield f"{name}-no-tensor", name, {}, lambda: ([1.0],)
    yield "LSTM-1d", "LSTM", {}, lambda: (torch.randn(X),)
    yield "LSTM-batched-hx2d", "LSTM", {}, lambda: (torch.randn(T, B, X), (state(1, H), state(1, B, H)))
    yield "LSTM-unbatched-hx3d", "LSTM", {}, lambda: (torch.randn(T, X), (state(1, H), state(1, 1, H)))
    yield "LSTM-h", "LSTM", {}, lambda: (torch.randn(T, B, X), (state(1, B, H + 1), state(1, B, H)))
    yield "LSTM-c", "LSTM", {"proj_size": 4}, lambda: (torch.randn(T, B, X), (state(1, B, 4), state(1, B, 4)))
    yield "LSTM-dtype", "LSTM", {}, lambda: (torch.randn(T, B, X, dtype=torch.float64),)
    for name in ("RNNCell", "GRUCell", "LSTMCell"):
        both = (lambda x: (x, x)) if name == "LSTMCell" else (lambda x: x)
        yield f"{name}-3d", name, {}, lambda: (torch.randn(T, B, X),)
        yield f"{name}-hx3d", name, {}, lambda both=both: (torch.randn(B, X), both(state(1, B, H)))
        yield f"{name}-input_size", name, {}, lambda: (torch.randn(B, X + 1),)
        yield f"{name}-hx-size", name, {}, lambda both=both: (torch.randn(B, X), both(state(B, H + 1)))
        yield f"{name}-hx-batch", name, {}, lambda both=both: (torch.randn(B, X), both(state(B + 1, H)))
        yield f"{name}-dtype", name, {}, lambda: (torch.randn(B, X, dtype=torch.float64),)
    kernel = {"kernel_size": 3, "stride": 2}
    yield "conv2d-channels", "ConvTranspose2d", kernel, lambda: (torch.randn(2, X + 1, 3, 4),)
    yield "conv2d-2d", "ConvTranspose2d", kernel, lambda: (torch.randn(3, 4),)
    yield "conv2d-dtype", "ConvTranspose2d", kernel, lambda: (torch.randn(2, X, 3, 4, dtype=torch.float64),)
    yield "conv2d-integers", "ConvTranspose2d", kernel, lambda: (torch.ones(2, X, 3, 4, dtype=torch.long),)
    yield "conv2d-output_size", "ConvTranspose2d", kernel, lambda: (torch.randn(2, X, 3, 4), [99, 99])
    yield "conv2d-output_size-dims", "ConvTranspose2d", kernel, lambda: (torch.randn(2, X, 3, 4), [7])
    big = {"kernel_size": 3, "stride": 2, "output_padding": 2}
    yield "conv1d-output_padding", "ConvTranspose1d", big, lambda: (torch.randn(2, X, 6),)
    yield "conv1d-padding", "ConvTranspose1d", {"kernel_size": 1, "padding": 9}, lambda: (torch.randn(2, X, 6),)
    yield "conv1d-stride0", "ConvTranspose1d", {"kernel_size": 2, "stride": 0}, lambda: (torch.randn(2, X, 6),)
    yield "conv3d-no-tensor", "ConvTranspose3d", {"kernel_size": 2}, lambda: ([1.0],)


FAILING = {case: rest for case, *rest in failing_calls()}


def failure(function: Callable, *args: Any, **kwargs: Any) -> BaseException:
    with pytest.raises(BaseException) as caught:
        function(*args, **kwargs)
    return caught.value


@pytest.mark.parametrize("case", FAILING)
def test_errors(case: str) -> None:
    """The twin's exception type and words."""
    name, arguments, draw = FAILING[case]
    inputs = draw()
    expected = failure(getattr(torch.nn, name)(X, H, **arguments), *inputs)
    found = failure(getattr(nn, name)(X, H, **arguments), *inputs)
    assert type(found) is type(expected)
    assert str(found) == str(expected)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (
            lambda: (packed().double(),),
            r"RNN input dtype \(torch.float64\) does not match weight dtype \(torch.float32\)",
        ),
        (
            lambda: (pack_sequence([torch.randn(2, X + 1)]),),
            r"input.size\(-1\) must be equal to input_size. Expected 7, got 8",
        ),
        (
            lambda: (pack_sequence([torch.randn(2, X)] * 2), (state(1, 3, H), state(1, 3, H))),
            r"Expected hidden\[0\] size \(1, 2, 11\), got \[1, 3, 11\]",
        ),
        (
            lambda: (packed(), (state(1, B, H), state(1, B, H + 1))),
            r"Expected hidden\[1\] size \(1, 3, 11\), got \[1, 3, 12\]",
        ),
    ],
    ids=["dtype", "input_size", "hx-batch", "hx-size"],
)
def test_errors_of_packed_lstm(draw: Callable[[], tuple], message: str) -> None:
    """torch.nn.LSTM does not look at packed input: its kernel raises RuntimeError or reads beyond."""
    with pytest.raises(RuntimeError, match=message):
        nn.LSTM(X, H)(*draw())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: [], "weights has 0 tuples; expected 2 per layer"),
        (lambda w: w[:3], "weights has 3 tuples; expected 2 per layer"),
        (lambda w: [w[0], w[1], (*w[2][:2], *w[2][2:3]), w[3]], r"weights\[2\] has the shapes .* expected"),
        (lambda w: [w[0], w[1], w[0], w[3]], r"weights\[2\] has the shapes \[\(44, 7\), .* expected \[\(44, 22\), "),
        (lambda w: [w[0], (w[1][0], w[1][1][:-1], *w[1][2:]), *w[2:]], r"weights\[1\] has the shapes .*\(43, 11\)"),
    ],
    ids=["none", "odd", "missing", "layer", "rows"],
)
def test_errors_of_weights(change: Callable, message: str) -> None:
    """Weights that do not fit together are refused before any kernel reads them."""
    weights = nn.LSTM(X, H, 2, bidirectional=True).all_weights
    with pytest.raises(RuntimeError, match=message):
        functional.lstm(torch.randn(T, B, X), None, change(weights), bidirectional=True)


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("RNN", (X, H), {"nonlinearity": "gelu"}),
        ("RNN", (X, H, 1, "gelu"), {}),
        ("RNN", (X, H), {"proj_size": 3}),
        ("GRU", (X, H), {"proj_size": 3}),
        ("GRU", (X, H), {"dropout": 1.5}),
        ("GRU", (X, H), {"bias": 1}),
        ("GRU", (X, H), {"batch_first": None}),
        ("GRU", (X, 0), {}),
        ("GRU", (0, H), {}),
        ("GRU", (X, 2.0), {}),
        ("GRU", (X, H, 0), {}),
        ("GRU", (X,), {}),
        ("GRU", (X, H), {"colour": "red"}),
        ("LSTM", (X, H), {"proj_size": H}),
        ("LSTM", (X, H), {"proj_size": -1}),
        ("ConvTranspose2d", (X, H, 3), {"groups": 2}),
        ("ConvTranspose2d", (X, H, 3), {"padding_mode": "reflect"}),
        ("ConvTranspose2d", (X, H, 3), {"groups": 0}),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_constructor_errors(name: str, args: tuple, kwargs: dict) -> None:
    expected = failure(getattr(torch.nn, name), *args, **kwargs)
    found = failure(getattr(nn, name), *args, **kwargs)
    assert type(found) is type(expected)
    assert str(found).replace("_ConvTranspose.", f"{name}.") == str(expected)


def test_positional_constructors() -> None:
    """Every argument by position, as torch.nn takes them: also RNN's fourth, the nonlinearity."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rnn = nn.RNN(X, H, 2, "relu", False, True, 0.25, True)
    assert repr(rnn) == repr(torch.nn.RNN(X, H, 2, "relu", False, True, 0.25, True))
    assert (rnn.mode, rnn.nonlinearity) == ("RNN_RELU", "relu")
    lstm = nn.LSTM(X, H, 2, False, True, 0.25, True, 4, "meta", torch.float64)
    assert repr(lstm) == repr(torch.nn.LSTM(X, H, 2, False, True, 0.25, True, 4))
    assert lstm.weight_hr_l1_reverse.is_meta
    assert lstm.weight_hr_l1_reverse.dtype == torch.float64
    conv = nn.ConvTranspose2d(8, 4, (3, 2), 2, 1, 1, 4, False, 3, "zeros", "meta", torch.float64)
    assert repr(conv) == repr(torch.nn.ConvTranspose2d(8, 4, (3, 2), 2, 1, 1, 4, False, 3))
    assert conv.weight.dtype == torch.float64


def test_dropout_warning() -> None:
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
        nn.GRU(X, H, dropout=0.5)


# ---- the backend argument


@pytest.mark.parametrize("case", ["GRU", "LSTMCell", "conv2d-k4-s2-p1"])
def test_backend_attribute(case: str) -> None:
    theirs, ours, inputs = build(case, backend="torch")
    assert ours.backend == "torch"
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert pickle.loads(pickle.dumps(ours)).backend == copy.deepcopy(ours).backend == "torch"
    ours.backend = "brain"
    with pytest.raises(ValueError, match="unknown backend 'brain'; mmfast has: torch, cpu, triton, cuda"):
        ours(*inputs)
    ours.backend = None
    with mmfast.use_backend("torch"):
        expected = pytree.tree_leaves(theirs(*inputs))
        torch.testing.assert_close(pytree.tree_leaves(ours(*inputs)), expected, rtol=0, atol=0)


def test_backend_that_cannot() -> None:
    """An explicit choice that cannot serve raises, with the reasons; it never falls back in silence."""
    layer = nn.ConvTranspose1d(X, H, 3, backend="triton")
    with pytest.raises(RuntimeError, match="backend 'triton' was asked for conv_transpose, but: "):
        layer(torch.randn(2, X, 6))


def test_choice_follows_the_context() -> None:
    """What was chosen before does not stick when use_backend changes, nor within compiled graphs."""
    layer = nn.ConvTranspose1d(X, H, 3)
    x = torch.randn(2, X, 6)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    with mmfast.use_backend("triton"):
        with pytest.raises(RuntimeError, match="backend 'triton' was asked for conv_transpose"):
            layer(x)
        with pytest.raises(RuntimeError, match="backend 'triton' was asked for conv_transpose"):
            compiled(x)
    torch.testing.assert_close(compiled(x), layer(x))
