"""Gradient penalties, VQGAN's adaptive weight and EnCodec's balancer against transcriptions of their formulas."""

import pytest
import torch
from torch import Tensor, autograd
from torch.utils._python_dispatch import TorchDispatchMode

import mmfast
from mmfast import functional as F
from mmfast import nn
from mmfast.ops.adversarial.equations import MODES
from mmfast.ops.conv_transpose import op as conv_transpose
from mmfast.ops.rnn import op as rnn


def critic(seed: int, dtype=torch.float64) -> torch.nn.Module:
    torch.manual_seed(seed)
    layers = (nn.Conv2d(3, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 16, 4, 2, 1), nn.Softplus(), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(64, 1)).to(dtype)


def images(seed: int, dtype=torch.float64, batch: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    real, fake = torch.randn(2, batch, 3, 8, 8, dtype=dtype, generator=generator).unbind()
    return real, fake


def input_gradient(net, x: Tensor) -> Tensor:
    """As WGAN-GP programs take it, with its graph, one row a sample."""
    logits = net(x)
    ones = torch.ones_like(logits)
    return autograd.grad(logits, x, ones, create_graph=True, retain_graph=True)[0].reshape(len(x), -1)


def between(real: Tensor, fake: Tensor, seed: int) -> Tensor:
    a = torch.rand(len(real), 1, 1, 1, dtype=real.dtype, generator=torch.Generator().manual_seed(seed))
    return (a * real + (1 - a) * fake).requires_grad_()


def around(real: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    a = torch.rand(len(real), 1, 1, 1, dtype=real.dtype, generator=generator)
    noise = torch.rand(real.shape, dtype=real.dtype, generator=generator)
    return (real + a * 0.5 * real.std() * noise).requires_grad_()


def published(name: str, net, real: Tensor, fake: Tensor, seed: int) -> Tensor:
    """The penalties as StudioGAN and torchgan (the norm of the batch) write them, with weights 3 (gammas 6)."""
    if name in ("r1", "r2"):
        gradient = input_gradient(net, (real if name == "r1" else fake).detach().requires_grad_())
        return 6 * 0.5 * (gradient**2).sum(1).mean(0)
    if name == "zero-centred":
        return 3 * (input_gradient(net, real.detach().requires_grad_()).norm(2, dim=1) ** 2).mean()
    if name == "dragan":
        return 3 * ((input_gradient(net, around(real, seed)).norm(2, dim=1) - 1) ** 2).mean()
    gradient = input_gradient(net, between(real, fake, seed))
    if name == "wgan":
        return 3 * ((gradient.norm(2, dim=1) - 1) ** 2).mean()
    if name == "wgan-batch":
        return 3 * (gradient.norm(2) - 1) ** 2
    return 3 * torch.max(gradient.norm(2, dim=1) ** 2)


def ours(name: str, net, real: Tensor, fake: Tensor, seed: int, **options) -> Tensor:
    if name in ("r1", "r2", "zero-centred"):
        x = (fake if name == "r2" else real).detach().requires_grad_()
        function = {"r1": F.r1_penalty, "r2": F.r2_penalty}.get(name, F.zero_centered_penalty)
        return function(net(x), x, 3 if name == "zero-centred" else 6, **options)
    options["generator"] = None if seed is None else torch.Generator().manual_seed(seed)
    if name == "dragan":
        return F.dragan_penalty(net, real, 3, **options)
    if name == "max":
        return F.max_gradient_penalty(net, real, fake, 3, **options)
    return F.wgan_penalty(net, real, fake, 3, norm="batch" if name == "wgan-batch" else "sample", **options)


PENALTIES = ["r1", "r2", "zero-centred", "wgan", "wgan-batch", "dragan", "max"]


@pytest.mark.parametrize("name", PENALTIES)
def test_a_penalty_is_the_published_formula(name, seed):
    net, (real, fake) = critic(seed), images(seed)
    value, expected = ours(name, net, real, fake, seed), published(name, net, real, fake, seed)
    assert expected.detach() > 0
    torch.testing.assert_close(value, expected)
    gradients = autograd.grad(value, net.parameters(), allow_unused=True, materialize_grads=True)
    expected_gradients = autograd.grad(expected, net.parameters(), allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(gradients, expected_gradients)


@pytest.mark.parametrize("name", PENALTIES)
def test_lazy_regularisation_keeps_the_expected_value(name, seed):
    net, (real, fake) = critic(seed), images(seed)
    every_step, lazy = ours(name, net, real, fake, seed), ours(name, net, real, fake, seed, every=16)
    torch.testing.assert_close(lazy, 16 * every_step)


class WeightGradients(TorchDispatchMode):
    """Counts the gradients of weights and biases that convolutions compute."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution_backward.default:
            self.count += sum(args[-1][1:])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", PENALTIES)
def test_the_inner_pass_computes_no_weight_gradient(name, seed):
    net, (real, fake) = critic(seed), images(seed)
    with WeightGradients() as inner:
        value = ours(name, net, real, fake, seed)
    assert inner.count == 0
    with WeightGradients() as outer:
        value.backward()
    assert outer.count > 0


@pytest.mark.parametrize("name", PENALTIES)
def test_a_flat_critic_has_finite_gradients(name, seed):
    net, (real, fake) = critic(seed), images(seed)
    with torch.no_grad():
        net[-1].weight.zero_()
    value = ours(name, net, real, fake, seed)
    value.backward()
    expected = 3.0 if name in ("wgan", "wgan-batch", "dragan") else 0.0
    assert float(value.detach()) == expected
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


def test_logits_of_several_scales_and_several_inputs(seed):
    generator = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(4, n, dtype=torch.float64, generator=generator).requires_grad_() for n in (6, 3))
    weight = torch.randn(9, 2, dtype=torch.float64, generator=generator)
    both = torch.cat([image, text], 1)
    logits = [[(both @ weight).tanh()], (both.square() @ weight[:, :1]).sin()]
    value = F.r1_penalty(logits, [image, text], 2.0)
    gradients = autograd.grad(logits[0][0].sum() + logits[1].sum(), (image, text), create_graph=True)
    torch.testing.assert_close(value, torch.cat(gradients, 1).square().sum(1).mean())


class Recurrent(torch.nn.Module):
    """A critic of sequences."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, torch.nn.Linear(7, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x.flatten(2))[0][:, -1])


def critic_of(layer: str, modules) -> torch.nn.Module:
    made = getattr(modules, layer)
    if layer == "ConvTranspose2d":
        layers = made(3, 4, 4, 2, 1), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(1024, 1)
        return torch.nn.Sequential(*layers).double()
    return Recurrent(made(64, 7, batch_first=True)).double()


@pytest.mark.parametrize("layer", ["RNN", "GRU", "LSTM", "ConvTranspose2d"])
def test_penalties_go_through_our_layers(layer, seed):
    """With the values and the weights' gradients of PyTorch's."""
    torch.manual_seed(seed)
    net, twin = critic_of(layer, nn), critic_of(layer, torch.nn)
    twin.load_state_dict(net.state_dict())
    real, fake = images(seed)
    for name in ("r1", "wgan", "dragan"):
        with mmfast.use_backend("cpu"):
            value = ours(name, net, real, fake, seed)
            found = autograd.grad(value, net.parameters(), allow_unused=True, materialize_grads=True)
        expected = published(name, twin, real, fake, seed)
        torch.testing.assert_close(value, expected)
        by_torch = autograd.grad(expected, twin.parameters(), allow_unused=True, materialize_grads=True)
        torch.testing.assert_close(found, by_torch)


@pytest.mark.parametrize("layer", ["GRU", "ConvTranspose2d"])
def test_the_inner_pass_computes_no_weight_gradient_of_our_layers(layer, seed, monkeypatch):
    asked = []
    if layer == "GRU":
        needed = rnn._needed
        # a layer of this size would not ask
        monkeypatch.setattr(rnn, "ASKED", 0)
        monkeypatch.setattr(rnn, "_needed", lambda *arguments: asked.append(needed(*arguments)) or asked[-1])
    else:
        backward = conv_transpose.backward_op
        monkeypatch.setattr(conv_transpose, "backward_op", lambda *args: asked.append(args[-2]) or backward(*args))
    net, (real, fake) = critic_of(layer, nn), images(seed)
    with mmfast.use_backend("cpu"):
        value = ours("wgan", net, real, fake, seed)
        assert len(asked) == 1
        assert [bool(wanted) for wanted in asked[0]] == [True] + [False] * (len(asked[0]) - 1)
        value.backward()
    assert all(p.grad is not None for name, p in net.named_parameters() if "weight" in name)


def test_a_gradient_scaler_keeps_float16_from_underflowing(seed):
    net = critic(seed, torch.float32)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter *= 0.015
    real, _ = images(seed, torch.float32)
    x = real.requires_grad_()
    exact = F.r1_penalty(net(x), x, 1e8)

    def half(scaler):
        with torch.autocast("cpu", torch.float16):
            return F.r1_penalty(net(x), x, 1e8, scaler=scaler)

    scaled, plain = (half(torch.amp.GradScaler("cpu", enabled=enabled)) for enabled in (True, False))
    assert scaled.dtype == torch.float32
    assert abs(scaled - exact) < 0.02 * exact
    assert abs(plain - exact) > 0.1 * exact
    (gradient,) = autograd.grad(scaled, net[0].weight)
    (expected,) = autograd.grad(exact, net[0].weight)
    torch.testing.assert_close(gradient, expected, rtol=0.05, atol=0.02 * float(expected.abs().max()))


@pytest.mark.parametrize("layer", ["RNN", "GRU", "LSTM", "ConvTranspose2d"])
def test_a_gradient_scaler_with_our_layers(layer, seed):
    net, (real, fake) = critic_of(layer, nn).float(), images(seed, torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    exact = ours("wgan", net, real, fake, seed)
    with torch.autocast("cpu", torch.float16):
        value = ours("wgan", net, real, fake, seed, scaler=scaler)
    torch.testing.assert_close(value, exact, rtol=0.01, atol=0)
    weights = [p for name, p in net.named_parameters() if "weight" in name]
    found, expected = autograd.grad(scaler.scale(value), weights), autograd.grad(exact, weights)
    for ours_of, theirs in zip(found, expected, strict=True):
        assert (ours_of / 512 - theirs).norm() < 0.02 * theirs.norm()


def test_what_a_penalty_refuses(seed):
    net, (real, fake) = critic(seed), images(seed)
    with pytest.raises(RuntimeError, match="the inputs do not require grad"):
        F.r1_penalty(net(real), real)
    with pytest.raises(ValueError, match="unknown norm 'frobenius'; accepted: 'sample', 'batch'"):
        F.wgan_penalty(net, real, fake, norm="frobenius")
    with pytest.raises(ValueError, match=r"real has shape \(5, 3, 8, 8\) and fake \(4, 3, 8, 8\)"):
        F.max_gradient_penalty(net, real, fake[:4])
    with pytest.raises(ValueError, match="logits is an empty list"):
        F.r1_penalty([], real.requires_grad_())
    with pytest.raises(TypeError, match="logits holds a str"):
        F.r1_penalty(["logit"], real.requires_grad_())


@pytest.mark.parametrize("name", ["wgan", "max"])
def test_samples_of_two_dtypes(name, seed):
    """Under autocast the generator's samples have another dtype than the real ones."""
    net, (real, fake) = critic(seed, torch.float32), images(seed, torch.float32)
    fake = fake.bfloat16()
    torch.testing.assert_close(ours(name, net, real, fake, seed), published(name, net, real, fake, seed))
    bytes_of = [x.clamp(0, 1).mul(255).byte() for x in (real, fake)]
    expected = ours(name, net, *(x.float() for x in bytes_of), seed)
    torch.testing.assert_close(ours(name, net, *bytes_of, seed), expected)


def test_nothing_is_read_on_the_host():
    """Tensors of the meta device have no values: an .item() of one raises."""
    with torch.device("meta"):
        net, weight = torch.nn.Linear(4, 1), torch.nn.Linear(4, 4).weight
        lecam, balancer = nn.LeCam(discriminators=2), nn.LossBalancer({"a": 1.0, "b": 2.0})
        real, fake = ([torch.ones(3, 4, requires_grad=True) for _ in range(2)] for _ in range(2))
    with pytest.raises(RuntimeError, match="meta"):
        real[0].sum().item()
    losses = [lecam(real, fake), F.feature_matching([real], [fake], relative=True, across="mean")]
    for mode in MODES:
        losses.append(F.adversarial_discriminator_loss(real, fake, mode, return_values=True)[0])
        losses.append(F.adversarial_generator_loss(fake, real, mode))
    losses += [ours(name, net, real[0], fake[0], None) for name in PENALTIES]
    for loss in losses:
        loss.backward()
    out = real[0] @ weight
    adversarial = out.sum() * F.adaptive_weight(out.mean(), out.sum(), weight)
    balancer.backward({"a": out.mean(), "b": adversarial}, out)
    assert weight.grad.shape == (4, 4)


def test_adaptive_weight_is_vqgan_s(seed):
    torch.manual_seed(seed)
    last = torch.randn(6, 4, requires_grad=True)
    x = torch.randn(5, 4)
    out = x @ last.T
    reconstruction, adversarial = (out - 1).abs().mean(), -out.sigmoid().mean()
    weight = F.adaptive_weight(reconstruction, adversarial, last, 0.8)
    r, a = (autograd.grad(loss, last, retain_graph=True)[0] for loss in (reconstruction, adversarial))
    expected = torch.clamp(torch.norm(r) / (torch.norm(a) + 1e-4), 0.0, 1e4).detach() * 0.8
    torch.testing.assert_close(weight, expected)
    assert not weight.requires_grad
    (reconstruction + weight * adversarial).backward()
    # against a loss without a gradient it stops at the maximum
    out = x @ last.T
    assert float(F.adaptive_weight((out * 1e6).sum(), (out * 0).sum(), last, 0.5)) == 5000.0


class Averager:
    """EnCodec's running mean in plain numbers."""

    def __init__(self, decay: float) -> None:
        self.decay, self.total, self.mass = decay, {}, {}

    def __call__(self, name: str, value: float) -> float:
        self.total[name] = self.total.get(name, 0.0) * self.decay + value
        self.mass[name] = self.mass.get(name, 0.0) * self.decay + 1
        return self.total[name] / self.mass[name]


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
def test_the_balancer_is_encodec_s(per_sample, rescale, seed):
    weights = {"l1": 0.1, "adv": 4.0, "feat": 2.0}
    balancer = nn.LossBalancer(weights, rescale=rescale, total_norm=1.5, decay=0.9, per_sample=per_sample)
    average = Averager(0.9)
    generator = torch.Generator().manual_seed(seed)
    for step in range(4):
        output = torch.randn(3, 2, 5, generator=generator).requires_grad_()
        losses = {"l1": output.abs().mean(), "adv": -100 * output.sigmoid().mean(), "feat": output.square().sum()}
        if step == 2:
            del losses["adv"]
        expected = 0
        for name, loss in losses.items():
            (gradient,) = autograd.grad(loss, output, retain_graph=True)
            norm = float(gradient.norm(dim=(1, 2)).mean() if per_sample else gradient.norm())
            share = weights[name] / sum(weights[k] for k in losses)
            scale = share * 1.5 / (1e-12 + average(name, norm)) if rescale else weights[name]
            expected = expected + gradient * scale
        balancer.backward(losses, output)
        torch.testing.assert_close(output.grad, expected)
    copy = nn.LossBalancer(weights)
    copy.load_state_dict(balancer.state_dict())
    assert torch.equal(copy.totals, balancer.totals)
    assert rescale == bool(balancer.masses.min() > 1)


def test_what_the_balancer_refuses():
    with pytest.raises(ValueError, match="weights is empty"):
        nn.LossBalancer({})
    output = torch.randn(3, requires_grad=True)
    with pytest.raises(ValueError, match=r"the losses are \['mel'\]; expected some of \['l1'\]"):
        mmfast.nn.LossBalancer({"l1": 1.0}).backward({"mel": output.sum()}, output)
