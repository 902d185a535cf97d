"""explain: which backend serves each layer, why not a faster one, and what accelerate left alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_sequence

import mmfast
from mmfast import dispatch
from mmfast.accelerate import Row

SAMPLES = {
    "RNN": ((5, 32), (8, 32, 5)),
    "GRU": ((5, 32, 2), (3, 32, 5)),
    "LSTM": ((5, 64), (20, 16, 5)),
    "RNNCell": ((5, 4), (2, 5)),
    "GRUCell": ((5, 4), (2, 5)),
    "LSTMCell": ((5, 4), (2, 5)),
    "ConvTranspose1d": ((5, 4, 3), (2, 5, 4)),
    "ConvTranspose2d": ((5, 4, 3), (2, 5, 4, 4)),
    "ConvTranspose3d": ((5, 4, 3), (2, 5, 4, 4, 4)),
}


class Gan(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = parametrizations.spectral_norm(torch.nn.GRU(5, 4), "weight_hh_l0")
        self.decoder = torch.nn.Sequential(
            torch.nn.ConvTranspose1d(4, 3, 4, 2, 1), torch.nn.BatchNorm1d(3), torch.nn.Dropout()
        )
        self.unused = torch.nn.LSTMCell(3, 3)
        self.loss = mmfast.nn.AdversarialLoss()

    def forward(self, x: Tensor) -> Tensor:
        codes, _ = self.encoder(x)
        image = self.decoder(codes.permute(1, 2, 0))
        image = mmfast.functional.conv_transpose1d(image, torch.ones(3, 1, 2), stride=2)
        return self.loss.generator(image)


@pytest.fixture
def gan() -> Gan:
    return mmfast.accelerate(Gan())


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 2, 5)


def by_path(explanation) -> dict[str, Row]:
    return {row.path: row for row in explanation}


@pytest.mark.parametrize("name", SAMPLES)
def test_what_is_said_is_what_runs(name: str) -> None:
    """With and without inputs, the row names the backend that the dispatcher chose for the call."""
    arguments, shape = SAMPLES[name]
    layer = getattr(mmfast.nn, name)(*arguments)
    x = torch.randn(shape)
    heard = []
    dispatch._listeners.append(lambda *choice: heard.append(choice))
    try:
        layer(x)
    finally:
        dispatch._listeners.clear()
    op, case, explicit = heard[0]
    (static,), called = mmfast.explain(layer), mmfast.explain(layer, x)
    assert static in called
    assert (static.op, static.backend) == (op.name, op.select(case, explicit))
    assert (static.path, static.layer) == (".", name)
    assert static.why


def test_static(gan: Gan) -> None:
    rows = by_path(mmfast.explain(gan))
    assert list(rows) == ["encoder", "decoder.0", "unused", "loss"]
    assert {path: (row.layer, row.op) for path, row in rows.items()} == {
        "encoder": ("GRU", "rnn"),
        "decoder.0": ("ConvTranspose1d", "conv_transpose"),
        "unused": ("LSTMCell", "rnn"),
        "loss": ("AdversarialLoss", "adversarial"),
    }
    assert rows["loss"].backend == "cpu"
    assert rows["loss"].why == "measured faster than PyTorch"


def test_called(gan: Gan, x: Tensor) -> None:
    """The choices of one call, functions outside of layers with the module that called them."""
    rows = [(row.path, row.op, row.why) for row in mmfast.explain(gan, x)]
    assert [(path, op) for path, op, _ in rows] == [
        (".", "conv_transpose"),
        (".", "adversarial"),
        ("encoder", "rnn"),
        ("decoder", "conv_transpose"),
        ("decoder.0", "conv_transpose"),
        ("unused", "rnn"),
        ("loss", "adversarial"),
    ]
    assert rows[4][2] == "one op with what follows it, see decoder"
    assert rows[5][2] == rows[6][2] == "not called with these inputs"
    assert mmfast.explain(gan, x=x) == mmfast.explain(gan, x)


def test_leaves_no_trace(gan: Gan, x: Tensor) -> None:
    """Buffers, random numbers, gradients, hooks and the mode are as before; so is the result of the next call."""
    gan(x)
    state = {name: value.clone() for name, value in gan.state_dict().items()}
    random = torch.get_rng_state()
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in gan.modules()]
    mmfast.explain(gan, x)
    torch.testing.assert_close(gan.state_dict(), state, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in gan.modules()] == hooks
    assert dispatch._listeners == []
    assert gan.training
    assert all(p.grad is None for p in gan.parameters())


def test_not_accelerated(x: Tensor) -> None:
    rows = by_path(mmfast.explain(Gan()))
    for path in ("encoder", "decoder.0", "unused"):
        assert rows[path].backend == "torch"
        assert rows[path].why == "torch.nn's own: mmfast.accelerate(model) puts mmfast's in its place"
    assert [row.path for row in mmfast.explain(Gan(), x)][:2] == [".", "."]


def test_forced(gan: Gan, x: Tensor) -> None:
    with mmfast.use_backend("torch"):
        for explanation in (mmfast.explain(gan), mmfast.explain(gan, x)):
            chosen = [row for row in explanation if row.backend != "-"]
            assert {row.backend for row in chosen} == {"torch"}
            asked = [row.why == "backend 'torch' was asked for" for row in chosen if "see decoder" not in row.why]
            assert len(asked) >= 4
            assert all(asked)


def test_refused(gan: Gan, x: Tensor) -> None:
    """Shown, before anything fails; and the row before the failure does not hide the rows after it."""
    gan.decoder[0].backend = "triton"
    with pytest.raises(RuntimeError, match="backend 'triton' was asked for conv_transpose"):
        gan(x)
    for explanation in (mmfast.explain(gan), mmfast.explain(gan, x)):
        row = by_path(explanation)["decoder.0"]
        assert row.backend == "none"
        assert row.why.startswith("backend 'triton' was asked for conv_transpose, but: ")
        assert by_path(explanation)["unused"].backend not in ("-", "none")
    gan.decoder[0].backend = "gpu"
    assert by_path(mmfast.explain(gan))["decoder.0"].why.startswith("unknown backend 'gpu'")


def test_other_errors_are_raised(gan: Gan) -> None:
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size"):
        mmfast.explain(gan, torch.randn(3, 2, 6))
    assert dispatch._listeners == []
    assert not any(m._forward_hooks for m in gan.modules())


def test_dtypes_and_packed_input() -> None:
    """What only a call tells: autocast's dtype and a packed sequence, as two rows of one layer."""
    seen = []
    gru = mmfast.nn.GRU(5, 4)
    dispatch._listeners.append(lambda op, case, explicit: seen.append(case))
    try:
        with torch.autocast("cpu", torch.bfloat16):
            mmfast.explain(gru, torch.randn(3, 2, 5))
        mmfast.explain(gru, pack_sequence([torch.randn(3, 5)]))
    finally:
        dispatch._listeners.clear()
    assert (seen[0].dtype, seen[0].packed) == (torch.bfloat16, False)
    assert (seen[-1].dtype, seen[-1].packed) == (torch.float32, True)


@pytest.mark.parametrize("hooked", [False, True], ids=["chain", "listened"])
def test_chains(hooked: bool) -> None:
    """The case of a convolution with its norm and activation, as they run: one op, or apart where somebody listens."""
    norm, activation = torch.nn.BatchNorm2d(64), torch.nn.LeakyReLU(0.3)
    model = mmfast.accelerate(torch.nn.Sequential(torch.nn.ConvTranspose2d(5, 64, 4, 2, 1), norm, activation))
    if hooked:
        norm.register_forward_hook(lambda *_: None)
    heard = []
    x = torch.randn(2, 5, 4, 4)
    dispatch._listeners.append(lambda op, case, explicit: heard.append(case))
    try:
        model(x)
        called = mmfast.explain(model, x)
        norm.eval()
        mmfast.explain(model, x)
    finally:
        dispatch._listeners.clear()
    assert [case.norm for case in heard] == (["none"] * 3 if hooked else ["batch", "batch", "given"])
    assert {case.activation for case in heard} == {"none" if hooked else "leaky_relu"}
    paths = [row.path for row in called]
    assert paths == (["0"] if hooked else [".", "0"])
    cases = model.static_cases()
    assert list(cases) == ([] if hooked else ["0"])
    if not hooked:
        assert cases["0"][1] == heard[-1]._replace(spread=False, small=False)
        (static,) = mmfast.explain(model)
        assert static.backend == mmfast.explain(model, x)[0].backend


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_lazy() -> None:
    model = mmfast.accelerate(torch.nn.Sequential(torch.nn.LazyConvTranspose1d(4, 3)))
    assert mmfast.explain(model)[0].layer == "LazyConvTranspose1d"
    assert mmfast.explain(model, torch.randn(2, 5, 4))[0].layer == "ConvTranspose1d"


def test_compiled(gan: Gan, x: Tensor) -> None:
    """A compiled model is explained by an eager call of it."""
    compiled = torch.compile(gan.decoder, backend="eager")
    image = torch.randn(2, 4, 3)
    compiled(image)
    rows = by_path(mmfast.explain(compiled, image))
    assert {path: (row.layer, row.op) for path, row in rows.items()} == {
        "_orig_mod": ("Sequential", "conv_transpose"),
        "_orig_mod.0": ("ConvTranspose1d", "conv_transpose"),
    }


def test_prints_as_a_table(gan: Gan) -> None:
    explanation = mmfast.explain(gan)
    lines = str(explanation).splitlines()
    assert repr(explanation) == str(explanation)
    assert len(lines) == 1 + len(explanation)
    assert lines[0].split() == ["path", "layer", "op", "backend", "why"]
    start = lines[0].index("why")
    assert [line[start:] for line in lines[1:]] == [row.why for row in explanation]
    assert all(line == line.rstrip() for line in lines)
    assert str(mmfast.explain(torch.nn.Linear(2, 2))) == "no layer here is one that mmfast accelerates"


CRITERIA = {
    "BCEWithLogitsLoss": ("AdversarialLoss('non-saturating')", lambda loss, x, label: loss(x, label)),
    "BCELoss": ("AdversarialLoss('non-saturating')", lambda loss, x, label: loss(x.sigmoid(), label)),
    "SoftMarginLoss": ("AdversarialLoss('non-saturating')", lambda loss, x, label: loss(x, 2 * label - 1)),
    "MSELoss": ("AdversarialLoss('lsgan')", lambda loss, x, label: loss(x, label)),
    "HingeEmbeddingLoss": ("AdversarialLoss('hinge')", None),
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", CRITERIA)
def test_a_criterion_that_could_be_replaced(name: str, reduction: str) -> None:
    """It is named with the change, and the change computes the same."""
    model = torch.nn.Module()
    model.criterion = criterion = getattr(torch.nn, name)(reduction=reduction)
    (row,) = mmfast.explain(model)
    # accelerate leaves it alone
    assert mmfast.accelerate(model).criterion is criterion
    assert type(criterion) is getattr(torch.nn, name)
    assert list(mmfast.explain(model)) == [row]
    change, call = CRITERIA[name]
    if reduction == "sum":
        change = change[:-1] + ", reduction='sum')"
    assert row[:4] == ("criterion", name, "adversarial", "torch")
    assert f"replace it by mmfast.nn.{change} " in row.why
    if call is None:
        return
    ours = eval("mmfast.nn." + change)
    real, fake = torch.randn(5, 1), torch.randn(5, 1)
    one, zero = torch.ones(5, 1), torch.zeros(5, 1)
    expected = call(model.criterion, real, one) + call(model.criterion, fake, zero)
    torch.testing.assert_close(ours.discriminator(real, fake), expected)
    torch.testing.assert_close(ours.generator(fake), call(model.criterion, fake, one))


def test_criteria_that_mmfast_does_not_replace() -> None:
    model = torch.nn.ModuleList(
        [
            torch.nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)),
            torch.nn.BCELoss(weight=torch.ones(3)),
            torch.nn.MSELoss(reduction="none"),
            torch.nn.CrossEntropyLoss(),
        ]
    )
    assert not mmfast.explain(model)
