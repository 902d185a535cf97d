"""PyTorch's layers as one node, as on CUDA: on a CPU the node is asked for, on a GPU it is there by itself."""

import functools

import pytest
import torch

import mmfast
from mmfast.ops.rnn import equations
from mmfast.ops.rnn import layers as functions

LAYERS = {
    "RNN": {"num_layers": 2, "nonlinearity": "relu"},
    "GRU": {"bidirectional": True, "batch_first": True},
    "LSTM": {"num_layers": 2, "bidirectional": True, "proj_size": 3},
}
per_layer = pytest.mark.parametrize("name", LAYERS)


@pytest.fixture(params=["cpu", *["cuda"] * torch.cuda.is_available()])
def device(request, monkeypatch):
    if request.param == "cpu":
        monkeypatch.setattr(functions, "_is_cudnns", lambda input, options: not (options.dropout and options.training))
    return request.param


def layers(name: str, device: str, **options):
    """PyTorch's module, ours and a function of flat tensors for each, and those: x, states, weights."""
    theirs = getattr(torch.nn, name)(5, 4, **LAYERS[name], **options).to(device, torch.float64)
    ours = getattr(mmfast.nn, name)(5, 4, **LAYERS[name], backend="torch", **options).to(device, torch.float64)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 6, 5, device=device, dtype=torch.float64, requires_grad=True)
    return theirs, ours, x


def flat(outputs) -> list[torch.Tensor]:
    return [outputs] if isinstance(outputs, torch.Tensor) else [t for part in outputs for t in flat(part)]


def gradients(module, x, create_graph=False):
    outputs = flat(module(x))
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=o.dtype).to(o.device) for o in outputs]
    return torch.autograd.grad(outputs, [x, *module.parameters()], cotangents, create_graph=create_graph)


@per_layer
def test_gradients_are_pytorchs_bits(device, name):
    theirs, ours, x = layers(name, device)
    assert "StockLayers" in flat(ours(x))[0].grad_fn.name()
    for found, expected in zip(flat(ours(x)), flat(theirs(x)), strict=True):
        assert torch.equal(found, expected)
    for found, expected in zip(gradients(ours, x), gradients(theirs, x), strict=True):
        assert torch.equal(found, expected)


@per_layer
def test_a_graph_that_is_kept_gives_the_same_twice(device, name):
    _, ours, x = layers(name, device)
    loss = sum(out.square().sum() for out in flat(ours(x)))
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, x)[0], first)
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(loss, x)


@per_layer
def test_second_order(device, name):
    """A penalty on the input's gradients, of the weights; the state is made of the input."""
    theirs, ours, x = layers(name, device)
    found = []
    for module in (theirs, ours):
        with torch.backends.cudnn.flags(enabled=module is ours):
            grads = gradients(module, x, create_graph=True)
            penalty = sum(g.square().sum() for g in grads)
            found.append(torch.autograd.grad(penalty, [x, *module.parameters()]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)


def test_a_state_made_of_the_input(device):
    _, ours, x = layers("GRU", device)
    plain = mmfast.nn.GRU(5, 4, bidirectional=True, batch_first=True, backend="cpu").double()
    plain.load_state_dict(ours.state_dict())
    found = []
    for module, at in ((plain, "cpu"), (ours, device)):
        y = x.detach().to(at).requires_grad_()
        h0 = y[:, :1, :4].transpose(0, 1).expand(2, 3, 4).tanh()
        first = torch.autograd.grad(module(y, h0)[0].square().sum(), y, create_graph=True)[0]
        found.append((first, torch.autograd.grad(first.square().sum(), y)[0]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-9, atol=1e-9)


def test_eval_mode(device):
    """With a dropout that eval mode leaves out; in training mode the layer is PyTorch's own node."""
    theirs, ours, x = layers("LSTM", device, dropout=0.5)
    assert "StockLayers" not in flat(ours(x))[0].grad_fn.name()
    theirs.eval(), ours.eval()
    with torch.backends.cudnn.flags(enabled=False):
        expected = gradients(theirs, x)
    for a, b in zip(gradients(ours, x), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_packed_and_a_part_of_the_gradients(device):
    theirs, ours, x = layers("RNN", device)
    for module in (theirs, ours):
        module.requires_grad_(False)
        module.weight_hh_l0.requires_grad_()
    packed = torch.nn.utils.rnn.pack_padded_sequence(x.detach(), [3, 3, 2, 2, 1, 1])
    results = []
    for module in (theirs, ours):
        y, h = module(packed)
        module.zero_grad()
        (y.data.square().sum() + h.sum()).backward()
        results.append((y.data, module.weight_hh_l0.grad))
        assert module.weight_ih_l0.grad is None
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@per_layer
def test_lengths_unseen(device, name):
    """Clamped, and NaN past them is not read, as by the formula; of any order."""
    _, ours, x = layers(name, device)
    states = [state.detach() * 3 for state in flat(ours(x)[1])]
    lengths = torch.tensor([2, 0, 1, 9, -1, 3][: 3 if ours.batch_first else 6], device=device, dtype=torch.int32)
    x = x.detach()
    time = torch.arange(x.shape[1 if ours.batch_first else 0], device=device)
    past = time >= lengths[:, None]
    past = (past if ours.batch_first else past.t())[..., None]
    options = ours._options()._replace(lengths=lengths)
    results = []
    for function, nothing in (
        (functions._lengths_of_torch, float("nan")),
        (functools.partial(functions._recurrent_by_layers, equations.sequence), 0.0),
    ):
        leaves = [a.clone().requires_grad_() for a in (x.masked_fill(past, nothing), *states)]
        inputs = [*leaves, *ours.parameters()]
        outputs = function(ours.mode, leaves[0], leaves[1:], ours.all_weights, options)
        cotangents = [torch.ones_like(out).cumsum(-1) for out in outputs]
        grads = torch.autograd.grad(outputs, inputs, cotangents, create_graph=True)
        penalty = sum(g.square().sum() for g in grads)
        results.append([*outputs, *grads, *torch.autograd.grad(penalty, inputs)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
