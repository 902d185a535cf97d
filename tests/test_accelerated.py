"""What is done with accelerated models: copies and files, dtypes and devices, transforms of calls, graphs."""

from __future__ import annotations

import copy
import datetime
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch
from net import LAYERS, Net, classes, clear, gradients, types
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import mmfast


@pytest.fixture
def pair() -> tuple[Net, Net]:
    """A model of torch.nn's layers and its accelerated copy."""
    theirs = Net()
    return theirs, mmfast.accelerate(copy.deepcopy(theirs))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 2, 7)


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
