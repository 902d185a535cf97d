"""Recurrent layers under autocast: kernels read and give its dtype, where PyTorch's layers do."""

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import mmfast
from mmfast import native
from mmfast.ops.product import has_products
from mmfast.ops.rnn import backends
from mmfast.ops.rnn.backends import OP, Case

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
LAYERS = {
    "RNN": {"num_layers": 2, "nonlinearity": "relu", "bidirectional": True},
    "LSTM": {"num_layers": 2, "batch_first": True},
}
per_layer = pytest.mark.parametrize("name", LAYERS)
per_dtype = pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))


def drawn(name: str, backend: str | None = None):
    layer = getattr(mmfast.nn, name)(5, 16, **LAYERS[name], backend=backend)
    return layer, torch.randn(7, 3, 5, requires_grad=True)


def outputs_and_gradients(layer, x, dtype: torch.dtype | None, *states) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        y, last = layer(x, *states)
    outputs = [y, *(last if isinstance(last, tuple) else [last])]
    cotangents = [torch.randn(out.shape, generator=generator).to(out.dtype) for out in outputs]
    gradients = torch.autograd.grad(outputs, [x, *layer.parameters()], cotangents)
    return [out.detach() for out in outputs] + list(gradients)


@per_layer
@per_dtype
@pytest.mark.parametrize("backend", ["cpu", "cuda"])
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "states"])
def test_is_the_layer_in_that_dtype(name, dtype, backend, given):
    """Bit for bit, but the parameters' gradients come in their own dtype."""
    layer, x = drawn(name, backend)
    states = [torch.randn(4 if name == "RNN" else 2, 3 if name == "RNN" else 7, 16) for _ in range(2)][: len(name) - 2]
    hx = [] if not given else [states[0] if name == "RNN" else tuple(states)]
    ours = outputs_and_gradients(layer, x, dtype, *hx)
    outputs = len(ours) - 1 - len(list(layer.parameters()))
    assert {out.dtype for out in ours[:outputs]} == {dtype}
    assert {gradient.dtype for gradient in ours[outputs:]} == {torch.float32}
    low = getattr(mmfast.nn, name)(5, 16, **LAYERS[name], backend=backend).to(dtype)
    low.load_state_dict(layer.state_dict())
    cast = [torch.utils._pytree.tree_map(lambda t: t.to(dtype), state) for state in hx]
    there = outputs_and_gradients(low, x.detach().to(dtype).requires_grad_(), None, *cast)
    for mine, other in zip(ours, there, strict=True):
        assert torch.equal(mine, other.to(mine.dtype))


@per_dtype
def test_a_padded_rnn_gives_what_pytorchs_gives(dtype):
    """Its dtypes, and errors against float64 that the rule accepts."""
    # of relu, one rounding of a state near zero changes all that comes after it
    layer, stock = mmfast.nn.RNN(5, 16, bidirectional=True), torch.nn.RNN(5, 16, bidirectional=True)
    stock.load_state_dict(layer.state_dict())
    x = torch.randn(20, 8, 5, requires_grad=True)
    ours, theirs = outputs_and_gradients(layer, x, dtype), outputs_and_gradients(stock, x, dtype)
    assert [each.dtype for each in ours] == [each.dtype for each in theirs]
    assert OP.select(Case("cpu", dtype, "RNN_TANH", 5, 16, 0, True, autocast=True)) == "cpu"
    truth = outputs_and_gradients(stock.double(), x.detach().double().requires_grad_(), None)
    for mine, other, exact in zip(ours, theirs, truth, strict=True):
        bound = 2 * (other.double() - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
        assert (mine.double() - exact).abs().max() <= bound


@pytest.mark.skipif(native.isa() == "avx512", reason="oneDNN has these on this processor")
@per_dtype
def test_an_lstm_where_onednn_has_none(dtype):
    """PyTorch's raises on a processor without AVX-512; accelerated it trains."""
    stock, x = torch.nn.LSTM(5, 16), torch.randn(7, 3, 5)
    with torch.autocast("cpu", dtype), pytest.raises(RuntimeError, match="could not create a primitive"):
        stock(x)
    layer = mmfast.accelerate(stock)
    with torch.autocast("cpu", dtype):
        y, (h, c) = layer(x)
    y.float().square().mean().backward()
    assert y.dtype == h.dtype == c.dtype == dtype
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in layer.parameters())


@per_layer
def test_compiled(name):
    layer, x = drawn(name, "cpu")
    plain = outputs_and_gradients(layer, x, torch.bfloat16)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = compiled(x)
    assert torch.equal(y, plain[0])


@pytest.mark.parametrize(
    ("kind", "given"),
    [("gru", "float32"), ("gru", "bfloat16 input"), ("gru", "bfloat16 state"), ("lengths", "float32")],
)
def test_compiled_loops(kind, given, monkeypatch):
    """What eager may leave to PyTorch's loop is one graph, too, and of its loop's dtype."""
    monkeypatch.setattr(backends, "has_products", lambda dtype: True)
    OP.forget()
    name = "GRU" if kind == "gru" else "LSTM"
    layer, stock = getattr(mmfast.nn, name)(5, 16), getattr(torch.nn, name)(5, 16)
    stock.load_state_dict(layer.state_dict())
    low = {"float32": None, "bfloat16 input": 0, "bfloat16 state": 1}[given]
    x, h, c = (a.bfloat16() if i == low else a for i, a in enumerate(torch.randn(3, 7, 3, 16).unbind(0)))
    # an LSTM's sum is its second state
    x, hx = x[..., :5], h[:1] if kind == "gru" else (c[:1], h[:1])
    lengths = [7, 7, 7] if kind == "gru" else [7, 5, 2]
    options = {} if kind == "gru" else {"lengths": torch.tensor(lengths)}
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        (y, last), packed = compiled(x, hx, **options), pack_padded_sequence(x, lengths)
        expected, of_stock = stock(packed, hx)
    monkeypatch.undo()
    OP.forget()
    torch.testing.assert_close((y, last), (pad_packed_sequence(expected)[0], of_stock), atol=3e-2, rtol=3e-2)


@per_layer
def test_transforms_and_second_order(name):
    layer, x = drawn(name, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)[0]
        mapped = torch.vmap(lambda x: layer(x)[0])(torch.stack([x, x]))
    assert mapped.dtype == torch.bfloat16
    torch.testing.assert_close(mapped[1], y, atol=2e-2, rtol=2e-2)
    (dx,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
    dx.square().sum().backward()
    assert layer.weight_hh_l0.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["gru", "packed", "lengths"])
@per_dtype
@pytest.mark.parametrize("backend", ["cpu", "cuda", None])
def test_what_stays_float32(kind, dtype, backend):
    """PyTorch's loops on a CPU give float32, their products rounded; here all of it is float32, bit for bit."""
    name = "GRU" if kind == "gru" else "LSTM"
    layer = getattr(mmfast.nn, name)(5, 16, backend=backend)
    stock = getattr(torch.nn, name)(5, 16)
    stock.load_state_dict(layer.state_dict())
    x, options = torch.randn(7, 3, 5), {}
    if kind == "packed":
        x = pack_padded_sequence(x, [7, 5, 2])
    elif kind == "lengths":
        options = {"lengths": torch.tensor([7, 5, 2])}
    plain, _ = layer(x, **options)
    with torch.autocast("cpu", dtype):
        y, (h, *_) = layer(x, **options)
        theirs, _ = stock(pack_padded_sequence(x, [7, 5, 2]) if kind == "lengths" else x)
    ours, plain, theirs = (out.data if kind == "packed" else out for out in (y, plain, theirs))
    assert ours.dtype == h.dtype == theirs.data.dtype == torch.float32
    if backend or not has_products(dtype):
        assert torch.equal(ours, plain)
        case = Case("cpu", dtype, name if kind == "gru" else "LSTM", 5, 16, autocast=True, packed=kind == "packed")
        assert OP.select(case._replace(lengths=kind == "lengths"), backend) == (backend or "cpu")
    if kind != "lengths":
        torch.testing.assert_close(ours, theirs, atol=3e-2, rtol=3e-2)


def test_states_of_two_dtypes_are_pytorchs():
    """A GRU whose state is of autocast's dtype, which decides what PyTorch's loop gives."""
    layer, stock = mmfast.nn.GRU(5, 16), torch.nn.GRU(5, 16)
    stock.load_state_dict(layer.state_dict())
    x, h = torch.randn(7, 3, 5), torch.randn(1, 3, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        (ours, last), (theirs, other) = layer(x, h), stock(x, h)
    assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype and torch.equal(last, other)


@pytest.mark.parametrize("words, fields", [("projection", {"proj_size": 3}), ("Cell", {"cell": True})])
def test_refusals(words, fields):
    case = Case("cpu", torch.bfloat16, "LSTM", 8, 16, autocast=True)
    for name in ("cpu", "cuda"):
        refused = OP.backends[name].refusals
        assert not refused(case)
        assert any("autocast is on" in sentence for sentence in refused(case._replace(**fields))), words


@per_layer
def test_float64_among_float32_is_refused_as_without_autocast(name):
    layer, x = drawn(name)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="does not match weight dtype"):
        layer(x.detach().double())


@pytest.mark.parametrize(
    "build", [lambda: mmfast.nn.GRU(8, 8), lambda: mmfast.nn.ConvTranspose1d(8, 2, 4)], ids=["GRU", "conv"]
)
def test_a_backward_within_autocast_is_the_one_outside(build):
    """First and second order, of a forward without autocast."""
    layer = build()
    torch.manual_seed(0)
    x = torch.randn(3, 8, 8, requires_grad=True)

    def gradients() -> list[torch.Tensor]:
        out = layer(x)
        y = out[0] if isinstance(out, tuple) else out
        with torch.autocast("cpu", torch.bfloat16, enabled=within):
            (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            return [dx.detach(), *torch.autograd.grad(dx.square().sum(), [x, *list(layer.parameters())[:2]])]

    within = False
    expected = gradients()
    within = True
    for found, there in zip(gradients(), expected, strict=True):
        assert torch.equal(found, there)
