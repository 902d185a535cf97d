"""conv_transpose*d_norm_act, and the layers and chains of layers that end in it, as PyTorch's own."""

import copy

import pytest
import torch
from test_conv_transpose import LAYOUTS, laid_out, random_tensors
from torch.nn import functional as F

import mmfast
import mmfast.functional as MF
from mmfast.nn import sequential
from mmfast.ops.conv_transpose.backends import OP


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("tracked", [True, False], ids=["tracked", "untracked"])
def test_batch_norm_as_torchs(seed, backend, training, affine, tracked):
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(3, 5, 4, 6, generator=generator), torch.randn(5, 8, 3, 3, generator=generator)
    norm = torch.nn.BatchNorm2d(8, affine=affine, track_running_stats=tracked, momentum=0.3).train(training)
    theirs = F.relu(norm(F.conv_transpose2d(x, weight, stride=2)))
    statistics = [torch.zeros(8), torch.ones(8)] if tracked else [None, None]
    ours = MF.conv_transpose2d_norm_act(
        x,
        weight,
        stride=2,
        norm="batch",
        norm_weight=norm.weight,
        norm_bias=norm.bias,
        running_mean=statistics[0],
        running_var=statistics[1],
        training=training,
        momentum=0.3,
        activation="relu",
        backend=backend,
    )
    torch.testing.assert_close(ours, theirs)
    if tracked:
        torch.testing.assert_close(statistics, [norm.running_mean, norm.running_var])


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("norm", [None, "batch", "instance"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_are_of_the_convolutions_result(seed, backend, norm, layout):
    x, weight, bias, *_ = random_tensors(seed, torch.float32, "none", layout=LAYOUTS[layout])
    call = {"stride": 2, "norm": norm, "training": True, "activation": "relu", "backend": backend}
    out, mean, var = MF.conv_transpose2d_norm_act(x, weight, bias, **call, statistics=True)
    torch.testing.assert_close(out, MF.conv_transpose2d_norm_act(x, weight, bias, **call))
    y = F.conv_transpose2d(x.double(), weight.double(), bias.double(), 2)
    dims = [2, 3] if norm == "instance" else [0, 2, 3]
    torch.testing.assert_close(mean.double(), y.mean(dims), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(var.double(), y.var(dims, correction=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_instance_norm_and_unbatched_input(seed, backend):
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(4, 5, 6, generator=generator), torch.randn(4, 7, 3, 3, generator=generator)
    theirs = F.leaky_relu(F.instance_norm(F.conv_transpose2d(x[None], weight, padding=1)), 0.3)[0]
    call = {"padding": 1, "norm": "instance", "activation": "leaky_relu", "negative_slope": 0.3, "backend": backend}
    torch.testing.assert_close(MF.conv_transpose2d_norm_act(x[None], weight, **call)[0], theirs)
    torch.testing.assert_close(MF.conv_transpose2d_norm_act(x, weight, **call), theirs)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_crop_drops_what_a_codec_slices_away(seed, backend):
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(2, 6, 11, generator=generator), torch.randn(6, 4, 8, generator=generator)
    ours = MF.conv_transpose1d_norm_act(x, weight, stride=4, crop=(1, 3), activation="tanh", backend=backend)
    torch.testing.assert_close(ours, F.conv_transpose1d(x, weight, stride=4)[:, :, 1:-3].tanh())


def test_empty_batch():
    x = torch.empty(0, 4, 3, 3, requires_grad=True)
    weight = torch.ones(4, 3, 2, 2, requires_grad=True)
    for activation in (None, "relu", "silu", "gelu"):
        out = MF.conv_transpose2d_norm_act(x, weight, stride=2, activation=activation, backend="cpu")
        assert out.shape == (0, 3, 6, 6)
        dx, dweight = torch.autograd.grad(out.sum(), [x, weight])
        assert dx.shape == x.shape and not dweight.any()


@pytest.mark.parametrize("momentum", [0.1, None])
def test_an_empty_batch_through_a_norm(momentum):
    """Leaves the running statistics what they are, whoever serves."""
    theirs = torch.nn.Sequential(
        torch.nn.ConvTranspose2d(4, 3, 2, 2), torch.nn.BatchNorm2d(3, momentum=momentum), torch.nn.ReLU()
    )
    ours = mmfast.accelerate(copy.deepcopy(theirs))
    x = torch.empty(0, 4, 3, 3)
    with mmfast.use_backend("cpu"):
        for model in (theirs, ours):
            model(x).sum().backward()
    assert ours(x).shape == (0, 3, 6, 6)
    theirs(x)
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0)


@pytest.mark.parametrize(("channels", "groups"), [((64, 64), 1), ((64, 3), 1), ((64, 64), 64)])
def test_autocast(seed, channels, groups):
    """A whole layer's dtype is autocast's, whichever kernel serves it; gradients are those of the leaves."""
    x, weight, *_ = random_tensors(seed, torch.float32, "none", channels, (5, 7), 4, bias=False, groups=groups)
    results = []
    for backend in ("torch", "cpu"):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        with torch.autocast("cpu", torch.bfloat16):
            y = MF.conv_transpose2d(*leaves, stride=2, padding=1, groups=groups, backend=backend)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), leaves)])
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05 * theirs.abs().max().item())


def test_errors_are_pytorchs():
    x, weight = torch.ones(2, 4, 3, 3), torch.ones(4, 2, 3, 3)
    for arguments in ({"groups": 3}, {"stride": 0}, {"output_padding": 2}, {"bias": torch.ones(3)}, {"padding": 9}):
        with pytest.raises((RuntimeError, ValueError)) as theirs:
            F.conv_transpose2d(x, weight, **arguments)
        with pytest.raises(type(theirs.value)) as ours:
            MF.conv_transpose2d(x, weight, **arguments, backend="cpu")
        assert str(ours.value) == str(theirs.value)
    with pytest.raises(ValueError, match="unknown norm 'layer'; accepted: None, 'batch', 'instance'"):
        MF.conv_transpose2d_norm_act(x, weight, norm="layer")
    with pytest.raises(ValueError, match="unknown activation 'cos'; accepted: None, 'relu'"):
        MF.conv_transpose2d_norm_act(x, weight, activation="cos")
    with pytest.raises(ValueError, match=r"crop is \(1, -1\)"):
        MF.conv_transpose2d_norm_act(x, weight, crop=(1, -1))
    with pytest.raises(RuntimeError, match="negative slope is -1"):
        MF.conv_transpose2d_norm_act(x, weight, activation="leaky_relu", negative_slope=-1.0, backend="cpu")
    with pytest.raises(ValueError, match="a norm by running statistics measures none"):
        MF.conv_transpose2d_norm_act(
            x, weight, norm="batch", running_mean=torch.ones(2), running_var=torch.ones(2), statistics=True
        )
    for backend in ("torch", "cpu"):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            MF.conv_transpose2d_norm_act(
                x[:1, :, :1, :1], weight[..., :1, :1], norm="batch", training=True, backend=backend
            )


def test_a_layer_that_pytorch_serves_asks_anew_when_the_choice_may_change(monkeypatch):
    calls = []
    forward = type(OP.backends["cpu"]).forward
    monkeypatch.setattr(
        OP.backends["cpu"], "forward", lambda *args: calls.append(1) or forward(OP.backends["cpu"], *args)
    )
    torch.manual_seed(0)
    model = mmfast.nn.Sequential(mmfast.nn.ConvTranspose2d(4, 8, 4, 2, 1), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
    x, small = torch.randn(8, 4, 32, 32), torch.randn(2, 4, 8, 8)

    def served(x, times):
        calls.clear()
        for _ in range(2):
            model(x)
        return len(calls) == 2 * times

    assert served(x, 1) and served(small, 0) and served(x, 1)
    # what is known of a small input does not enter the fused call
    with monkeypatch.context() as patch:
        patch.setattr(sequential, "_call_fused", None)
        assert served(small, 0)
        with pytest.raises(TypeError):
            model(x)
    model.eval()
    assert served(x, 0)
    with mmfast.use_backend("cpu"):
        assert served(x, 1)
    assert served(x, 0)
    model[0].backend = "cpu"
    assert served(x, 1)
    model[0].backend = None
    assert served(x, 0)
    model.train()
    assert served(x, 1)
    model[2] = torch.nn.Softplus()
    assert served(x, 0)
    model[2] = torch.nn.ReLU()
    assert served(x, 1)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_one_graph(seed, backend):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 5, 4, 4, generator=generator)
    weight = torch.randn(5, 6, 3, 3, generator=generator).requires_grad_()

    def call(x, weight):
        return MF.conv_transpose2d_norm_act(
            x, weight, stride=2, norm="batch", training=True, activation="relu", backend=backend
        )

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    dout = torch.randn(call(x, weight).shape, generator=generator)
    torch.testing.assert_close(compiled(x, weight), call(x, weight))
    gradients = (torch.autograd.grad(f(x, weight), weight, dout)[0] for f in (compiled, call))
    torch.testing.assert_close(*gradients)


def test_transforms_and_forward_mode(seed):
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(3, 2, 5, generator=generator), torch.randn(2, 3, 3, generator=generator)

    def call(x, backend):
        return MF.conv_transpose1d_norm_act(x[None], weight, activation="tanh", backend=backend)

    for transform in (torch.vmap, torch.func.jacrev):
        argument = x if transform is torch.vmap else x[0]
        ours, theirs = (transform(lambda x, b=b: call(x, b))(argument) for b in ("cpu", "torch"))
        torch.testing.assert_close(ours, theirs)
    ours, theirs = (torch.func.jvp(lambda x, b=b: call(x, b), (x[0],), (x[1],)) for b in ("cpu", "torch"))
    torch.testing.assert_close(ours, theirs)


NORMS_OF_WEIGHTS = {
    "weight": torch.nn.utils.parametrizations.weight_norm,
    "spectral": torch.nn.utils.parametrizations.spectral_norm,
    "older weight": torch.nn.utils.weight_norm,
    "older spectral": torch.nn.utils.spectral_norm,
}


def generator_of(nn, norm=True, of_weights="weight"):
    inner = nn.Sequential(nn.ConvTranspose2d(6, 8, 4, 2, 1, bias=False), *[nn.BatchNorm2d(8)] * norm, nn.LeakyReLU(0.2))
    parametrized = NORMS_OF_WEIGHTS[of_weights](nn.ConvTranspose2d(8, 5, 3, 2))
    return nn.Sequential(
        nn.ConvTranspose2d(4, 6, 4, 1), nn.InstanceNorm2d(6, affine=True), nn.SiLU(), inner, parametrized,
        nn.BatchNorm2d(5, momentum=None), nn.Tanh(),
    )  # fmt: skip


def watched_calls(monkeypatch):
    calls = []
    from mmfast.nn import sequential

    real = sequential._call_fused
    monkeypatch.setattr(sequential, "_call_fused", lambda modules, x: calls.append(len(modules)) or real(modules, x))
    return calls


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("of_weights", NORMS_OF_WEIGHTS)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_sequential_is_fused_and_the_same(seed, training, layout, of_weights, monkeypatch):
    torch.manual_seed(seed)
    theirs = generator_of(torch.nn, of_weights=of_weights).train(training)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    ours = mmfast.accelerate(generator_of(torch.nn, of_weights=of_weights).train(training))
    ours.load_state_dict(theirs.state_dict())
    keys = list(theirs.state_dict())
    assert list(ours.state_dict()) == keys and type(ours) is mmfast.nn.Sequential
    calls = watched_calls(monkeypatch)
    for _ in range(2):
        x = laid_out(torch.randn(3, 4, 2, 2), LAYOUTS[layout])
        results = []
        for model in (theirs, ours):
            leaf = x.clone().requires_grad_()
            # left to choose, so small a model is PyTorch's
            with mmfast.use_backend("cpu"):
                out = model(leaf)
            dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
            results.append([out, *torch.autograd.grad(out, [leaf, *model.parameters()], dout)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert calls == [3, 3, 3] * 2
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=1e-4, atol=1e-5)
    restored = mmfast.restore(ours)
    assert type(restored) is torch.nn.Sequential and type(restored[3]) is torch.nn.Sequential


@pytest.fixture
def on_cpu():
    with mmfast.use_backend("cpu"):
        yield


def test_sequential_calls_each_module_where_somebody_listens(monkeypatch, on_cpu):
    model = mmfast.accelerate(generator_of(torch.nn, norm=False))
    x = torch.randn(2, 4, 2, 2, requires_grad=True)
    calls = watched_calls(monkeypatch)
    model(x)
    assert calls == [3, 2, 3]
    for listened, kept in ((model[0], [2, 3]), (model[1], [2, 3]), (model[2], [2, 3]), (model[6], [3, 2])):
        heard = []

        def hook(*_, heard=heard):
            heard.append(1)

        for listen in (
            listened.register_forward_hook,
            listened.register_forward_pre_hook,
            listened.register_full_backward_hook,
            listened.register_full_backward_pre_hook,
        ):
            calls.clear()
            handle = listen(hook)
            model(x).sum().backward()
            handle.remove()
            assert calls == kept
        assert len(heard) == 4
    calls.clear()
    model[1].forward = lambda y: y
    model(x)
    del model[1].forward
    with torch.nn.modules.module.register_module_forward_hook(lambda *_: None):
        model(x)
    with torch.nn.modules.module.register_module_full_backward_hook(lambda *_: None):
        model(x)
    assert calls == [2, 3]
    calls.clear()
    model(x)
    assert calls == [3, 2, 3]


def test_what_is_noted_of_a_layer_is_forgotten_with_its_dtype():
    """Of float64 it is PyTorch's, of float32 not."""
    x = torch.randn(4, 64, 16, 16)
    for chain in (False, True):
        layer = mmfast.nn.ConvTranspose2d(64, 64, 4, 2, 1)
        module = mmfast.nn.Sequential(layer, torch.nn.ReLU()) if chain else layer
        for dtype, served in ((torch.float64, True), (torch.float32, False), (torch.float64, True)):
            module.to(dtype)
            for _ in range(2):
                out = module(x.to(dtype))
                assert ("ConvTranspose" in type(out.grad_fn).__name__) is not served


def test_a_layer_whose_weight_is_a_plain_tensor():
    layer = mmfast.nn.ConvTranspose2d(4, 4, 3, bias=False)
    weight = layer.weight.detach().clone()
    del layer.weight
    layer.weight, x = weight, torch.randn(1, 4, 5, 5)
    assert torch.equal(layer(x), F.conv_transpose2d(x, weight))


def test_a_chain_whose_norm_was_lazy_is_fused(monkeypatch):
    calls, fused = [], sequential._call_fused
    monkeypatch.setattr(sequential, "_call_fused", lambda chain, x: calls.append(len(chain)) or fused(chain, x))
    lazy = [mmfast.nn.ConvTranspose2d(64, 64, 4, 2, 1), torch.nn.LazyBatchNorm2d(), torch.nn.ReLU()]
    chain = mmfast.nn.Sequential(*lazy)
    x = torch.randn(8, 64, 16, 16)
    chain(x)
    assert calls == []
    chain(x)
    assert calls == [3]


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
def test_a_layer_is_traced_without_a_warning():
    for layer, x in (
        (mmfast.nn.ConvTranspose1d(16, 16, 4, 2, groups=16), torch.randn(1, 16, 8)),
        (mmfast.nn.ConvTranspose2d(64, 32, 4, 2, 1), torch.randn(2, 64, 8, 8)),
    ):
        theirs = mmfast.restore(copy.deepcopy(layer))
        assert torch.equal(torch.jit.trace(layer, x)(x), theirs(x))


def test_sequential_does_not_fuse_other_norms(monkeypatch):
    calls = watched_calls(monkeypatch)
    for norm in (
        torch.nn.SyncBatchNorm(6),
        torch.nn.GroupNorm(2, 6),
        torch.nn.InstanceNorm2d(6, track_running_stats=True),
    ):
        model = mmfast.nn.Sequential(mmfast.nn.ConvTranspose2d(4, 6, 3), norm.eval(), torch.nn.ReLU())
        model(torch.randn(2, 4, 2, 2))
    assert not calls
    model = mmfast.nn.Sequential(mmfast.nn.ConvTranspose2d(4, 6, 3), torch.nn.Tanh())
    assert model(torch.randn(4, 2, 2)).shape == (6, 4, 4)
    assert not calls
