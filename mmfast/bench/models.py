"""Whole training steps: the generator's and the discriminator's losses, gradients and updates of published models.

Each model is built from a namespace, torch.nn or mmfast.nn, with its published layer sizes; so is the loss, which for
torch.nn is PyTorch's own formula. The optimizers' learning rate is 0: an update costs what it costs, the weights stay,
and every step can be checked against float64. Dropout, random as it is, is left out.
"""

from __future__ import annotations

import copy
import importlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from .. import nn as mmfast_nn
from .cases import STEP, Work

Shape = tuple[int, ...]


class Adversaries(torch.nn.Module):
    """A generator and a discriminator with their losses and optimizers; a subclass sets the nets and the losses."""

    mode = "non-saturating"

    def __init__(self, nn: Any, generator: torch.nn.Module, discriminator: torch.nn.Module) -> None:
        super().__init__()
        self.generator = generator
        self.discriminator = discriminator
        self.adversarial = mmfast_nn.AdversarialLoss(self.mode, backend="torch" if nn is torch.nn else None)
        self.generator_optimizer = torch.optim.Adam(generator.parameters(), lr=0.0)
        self.discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), lr=0.0)

    def judged(self, given: Tensor, drawn: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """(logits, feature maps) of the discriminator."""
        return [self.discriminator(drawn)], []

    def reconstruction(self, drawn: Tensor, real: Tensor) -> Tensor | None:
        """What the generator's loss has besides the adversarial one."""
        return None

    def step(self, given: Tensor, real: Tensor) -> list[Tensor]:
        """One update of both: the two losses, then every gradient."""
        drawn = self.generator(given)
        loss_d = self._update_discriminator(given, drawn.detach(), real)
        loss_g = self._update_generator(given, drawn, real)
        return [loss_d, loss_g, *(w.grad for w in self.parameters() if w.grad is not None)]

    def _update_discriminator(self, given: Tensor, drawn: Tensor, real: Tensor) -> Tensor:
        self.discriminator_optimizer.zero_grad()
        loss = self.adversarial.discriminator(self.judged(given, real)[0], self.judged(given, drawn)[0])
        loss.backward()
        self.discriminator_optimizer.step()
        return loss.detach()

    def _update_generator(self, given: Tensor, drawn: Tensor, real: Tensor) -> Tensor:
        self.generator_optimizer.zero_grad()
        logits, maps = self.judged(given, drawn)
        loss = self.adversarial.generator(logits)
        if maps:
            with torch.no_grad():
                _, wanted = self.judged(given, real)
            loss = loss + feature_matching(wanted, maps)
        reconstruction = self.reconstruction(drawn, real)
        if reconstruction is not None:
            loss = loss + reconstruction
        loss.backward(inputs=list(self.generator.parameters()))
        self.generator_optimizer.step()
        return loss.detach()


def feature_matching(wanted: Sequence[Tensor], maps: Sequence[Tensor]) -> Tensor:
    """HiFi-GAN's: twice the mean absolute difference, summed over the maps."""
    return 2 * torch.stack([F.l1_loss(b, a) for a, b in zip(wanted, maps, strict=True)]).sum()


def spectral_distance(drawn: Tensor, real: Tensor) -> Tensor:
    """The mean absolute difference of magnitudes over 1024 samples. drawn, real: (B, 1, samples)."""
    window = torch.hann_window(1024, device=real.device, dtype=real.dtype)
    a, b = (torch.stft(x.squeeze(1), 1024, 256, window=window, return_complex=True).abs() for x in (drawn, real))
    return F.l1_loss(a, b)


class Dcgan(Adversaries):
    """DCGAN at 64 x 64 (pytorch/examples): nz 100, ngf and ndf 64."""

    def __init__(self, nn: Any) -> None:
        up: list[torch.nn.Module] = []
        for given, made, stride, padding in ((100, 512, 1, 0), (512, 256, 2, 1), (256, 128, 2, 1), (128, 64, 2, 1)):
            up += [nn.ConvTranspose2d(given, made, 4, stride, padding, bias=False), nn.BatchNorm2d(made), nn.ReLU()]
        up += [nn.ConvTranspose2d(64, 3, 4, 2, 1, bias=False), nn.Tanh()]
        down: list[torch.nn.Module] = [nn.Conv2d(3, 64, 4, 2, 1, bias=False), nn.LeakyReLU(0.2)]
        for given in (64, 128, 256):
            down += [nn.Conv2d(given, 2 * given, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * given), nn.LeakyReLU(0.2)]
        super().__init__(nn, nn.Sequential(*up), nn.Sequential(*down, nn.Conv2d(512, 1, 4, bias=False), nn.Flatten(0)))


class UNet(torch.nn.Module):
    """One level of pix2pix' U-Net: down, the level below, up, joined to its input."""

    def __init__(self, nn: Any, outer: int, inner: int, below: torch.nn.Module | None, outermost: bool = False) -> None:
        super().__init__()
        norm = [] if outermost or below is None else [nn.BatchNorm2d(inner)]
        activation = [] if outermost else [nn.LeakyReLU(0.2)]
        down = nn.Conv2d(3 if outermost else outer, inner, 4, 2, 1, bias=outermost)
        wide = inner if below is None else 2 * inner
        up = [nn.ReLU(), nn.ConvTranspose2d(wide, 3 if outermost else outer, 4, 2, 1, bias=outermost)]
        end = [nn.Tanh()] if outermost else [nn.BatchNorm2d(outer)]
        self.outermost = outermost
        self.layers = nn.Sequential(*activation, down, *norm, *([below] if below else []), *up, *end)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return y if self.outermost else torch.cat([x, y], 1)


class Pix2pix(Adversaries):
    """pix2pix at 256 x 256 (arXiv:1611.07004): U-Net of 8 levels, 70 x 70 PatchGAN, L1 of weight 100."""

    def __init__(self, nn: Any) -> None:
        unet = UNet(nn, 512, 512, None)
        for outer, inner in ((512, 512), (512, 512), (512, 512), (256, 512), (128, 256), (64, 128)):
            unet = UNet(nn, outer, inner, unet)
        down: list[torch.nn.Module] = [nn.Conv2d(6, 64, 4, 2, 1), nn.LeakyReLU(0.2)]
        for given, made, stride in ((64, 128, 2), (128, 256, 2), (256, 512, 1)):
            down += [nn.Conv2d(given, made, 4, stride, 1, bias=False), nn.BatchNorm2d(made), nn.LeakyReLU(0.2)]
        patches = nn.Sequential(*down, nn.Conv2d(512, 1, 4, 1, 1))
        super().__init__(nn, UNet(nn, 3, 64, unet, outermost=True), patches)

    def judged(self, given: Tensor, drawn: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return [self.discriminator(torch.cat([given, drawn], 1))], []

    def reconstruction(self, drawn: Tensor, real: Tensor) -> Tensor:
        return 100 * F.l1_loss(drawn, real)


class Residual(torch.nn.Module):
    """Layers whose output is added to their input."""

    def __init__(self, nn: Any, *layers: torch.nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Mean(torch.nn.Module):
    """The mean of what several branches make of one input: HiFi-GAN's multi-receptive field fusion."""

    def __init__(self, branches: Iterable[torch.nn.Module]) -> None:
        super().__init__()
        self.branches = torch.nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([branch(x) for branch in self.branches]).mean(0)


def _hifigan_block(nn: Any, channels: int, kernel: int) -> torch.nn.Module:
    def conv(dilation: int) -> torch.nn.Module:
        return weight_norm(nn.Conv1d(channels, channels, kernel, padding="same", dilation=dilation))

    return nn.Sequential(*(Residual(nn, nn.LeakyReLU(0.1), conv(d), nn.LeakyReLU(0.1), conv(1)) for d in (1, 3, 5)))


def _hifigan_generator(nn: Any) -> torch.nn.Module:
    layers: list[torch.nn.Module] = [weight_norm(nn.Conv1d(80, 512, 7, padding=3))]
    width = 512
    for kernel, stride in ((16, 8), (16, 8), (4, 2), (4, 2)):
        up = weight_norm(nn.ConvTranspose1d(width, width // 2, kernel, stride, (kernel - stride) // 2))
        width //= 2
        layers += [nn.LeakyReLU(0.1), up, Mean(_hifigan_block(nn, width, k) for k in (3, 7, 11))]
    return nn.Sequential(*layers, nn.LeakyReLU(), weight_norm(nn.Conv1d(width, 1, 7, padding=3)), nn.Tanh())


class Judges(torch.nn.Module):
    """Several discriminators, each a list of layers before whose activations the feature maps are taken."""

    def __init__(self, nn: Any, judges: Iterable[Sequence[torch.nn.Module]], views: Sequence[Callable]) -> None:
        super().__init__()
        self.judges = torch.nn.ModuleList(torch.nn.ModuleList(layers) for layers in judges)
        self.views = views

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        logits, maps = [], []
        for judge, view in zip(self.judges, self.views, strict=True):
            y = view(x)
            for layer in judge[:-1]:  # type: ignore[index]
                y = F.leaky_relu(layer(y), 0.1)
                maps.append(y)
            logits.append(judge[-1](y))  # type: ignore[index]
        return logits, maps


def _folded(period: int) -> Callable[[Tensor], Tensor]:
    """(B, 1, samples) as (B, 1, rows, period), the end reflected to fill the last row."""

    def view(x: Tensor) -> Tensor:
        x = F.pad(x, (0, -x.shape[-1] % period), "reflect")
        return x.view(x.shape[0], 1, -1, period)

    return view


def _pooled(times: int) -> Callable[[Tensor], Tensor]:
    def view(x: Tensor) -> Tensor:
        for _ in range(times):
            x = F.avg_pool1d(x, 4, 2, 2)
        return x

    return view


def _hifigan_judges(nn: Any) -> Judges:
    def period() -> list[torch.nn.Module]:
        widths = (1, 32, 128, 512, 1024)
        layers = [nn.Conv2d(a, b, (5, 1), (3, 1), (2, 0)) for a, b in itertools.pairwise(widths)]
        return [*layers, nn.Conv2d(1024, 1024, (5, 1), 1, (2, 0)), nn.Conv2d(1024, 1, (3, 1), 1, (1, 0))]

    def scale() -> list[torch.nn.Module]:
        rows: tuple[Shape, ...] = (
            (1, 128, 15, 1, 1),
            (128, 128, 41, 2, 4),
            (128, 256, 41, 2, 16),
            (256, 512, 41, 4, 16),
        )
        rows += ((512, 1024, 41, 4, 16), (1024, 1024, 41, 1, 16), (1024, 1024, 5, 1, 1), (1024, 1, 3, 1, 1))
        return [nn.Conv1d(a, b, k, s, k // 2, groups=g) for a, b, k, s, g in rows]

    views = [*(_folded(p) for p in (2, 3, 5, 7, 11)), *(_pooled(t) for t in range(3))]
    judges = [*(period() for _ in range(5)), *(scale() for _ in range(3))]
    return Judges(nn, [[weight_norm(layer) for layer in layers] for layers in judges], views)


class HifiGan(Adversaries):
    """HiFi-GAN V1 (arXiv:2010.05646): 8192 samples from 32 mel frames, 5 period and 3 scale discriminators."""

    mode = "lsgan"

    def __init__(self, nn: Any) -> None:
        super().__init__(nn, _hifigan_generator(nn), _hifigan_judges(nn))

    def judged(self, given: Tensor, drawn: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return self.discriminator(drawn)

    def reconstruction(self, drawn: Tensor, real: Tensor) -> Tensor:
        return 45 * spectral_distance(drawn, real)


class SkipLstm(torch.nn.Module):
    """EnCodec's SLSTM: two layers over time, added to their input. x: (B, channels, T)."""

    def __init__(self, nn: Any, channels: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(channels, channels, 2)

    def forward(self, x: Tensor) -> Tensor:
        steps = x.permute(2, 0, 1)
        return (steps + self.lstm(steps)[0]).permute(1, 2, 0)


class Crop(torch.nn.Module):
    """Drops `size` positions, half of them at either end."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.left, self.right = size // 2, size - size // 2

    def forward(self, x: Tensor) -> Tensor:
        return x[..., self.left : x.shape[-1] - self.right]


def _encodec_autoencoder(nn: Any) -> torch.nn.Module:
    def conv(given: int, made: int, kernel: int) -> torch.nn.Module:
        return weight_norm(nn.Conv1d(given, made, kernel, padding="same", padding_mode="reflect"))

    def unit(width: int) -> torch.nn.Module:
        return Residual(nn, nn.ELU(), conv(width, width // 2, 3), nn.ELU(), conv(width // 2, width, 1))

    width, strides = 32, (2, 4, 5, 8)
    layers: list[torch.nn.Module] = [conv(1, width, 7)]
    for s in strides:
        down = weight_norm(nn.Conv1d(width, 2 * width, 2 * s, s, (s + 1) // 2))
        layers += [unit(width), nn.ELU(), down]
        width *= 2
    layers += [SkipLstm(nn, width), nn.ELU(), conv(width, 128, 7), conv(128, width, 7), SkipLstm(nn, width)]
    for s in reversed(strides):
        up = weight_norm(nn.ConvTranspose1d(width, width // 2, 2 * s, s))
        width //= 2
        layers += [nn.ELU(), up, Crop(s), unit(width)]
    return nn.Sequential(*layers, nn.ELU(), conv(width, 1, 7))


def _spectrum(size: int) -> Callable[[Tensor], Tensor]:
    """(B, 1, samples) as real and imaginary parts (B, 2, frames, bins)."""

    def view(x: Tensor) -> Tensor:
        window = torch.hann_window(size, device=x.device, dtype=x.dtype)
        z = torch.stft(x.squeeze(1), size, size // 4, window=window, normalized=True, return_complex=True)
        return torch.view_as_real(z).permute(0, 3, 2, 1)

    return view


def _encodec_judges(nn: Any) -> Judges:
    def judge() -> list[torch.nn.Module]:
        first = nn.Conv2d(2, 32, (3, 9), padding=(1, 4))
        middle = [nn.Conv2d(32, 32, (3, 9), (1, 2), (d, 4), (d, 1)) for d in (1, 2, 4)]
        return [first, *middle, nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 1, 3, padding=1)]

    sizes = (2048, 1024, 512, 256, 128)
    return Judges(nn, [[weight_norm(layer) for layer in judge()] for _ in sizes], [_spectrum(n) for n in sizes])


class Encodec(Adversaries):
    """EnCodec at 24 kHz (arXiv:2210.13438): 320-fold autoencoder with LSTMs and five spectral discriminators.

    The quantizer is left out: its nearest neighbours, chosen otherwise after one rounding, are no measure of numerics.
    """

    mode = "hinge"

    def __init__(self, nn: Any) -> None:
        super().__init__(nn, _encodec_autoencoder(nn), _encodec_judges(nn))

    def judged(self, given: Tensor, drawn: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return self.discriminator(drawn)

    def reconstruction(self, drawn: Tensor, real: Tensor) -> Tensor:
        return F.l1_loss(drawn, real) + spectral_distance(drawn, real)


class Emoji(torch.nn.Module):
    """`mmfast train`'s own step: image, text and speech encoders and decoders, generator and discriminator."""

    def __init__(self, nn: Any) -> None:
        from ..train.settings import Settings
        from ..train.step import Step

        super().__init__()
        adversarial = mmfast_nn.AdversarialLoss("hinge", backend="torch" if nn is torch.nn else None)
        self.whole = Step(Settings(learning_rate=0.0, discriminator_rate=0.0), nn, adversarial)
        # the step is no module: its nets are named here, so that they are moved and accelerated with this one
        self.model, self.discriminator, self.averaged = self.whole.model, self.whole.discriminator, self.whole.averaged

    def step(
        self, images: Tensor, text: Tensor, heard: Tensor, text_lengths: Tensor, heard_lengths: Tensor, *rest: Tensor
    ) -> list[Tensor]:
        """One update: the losses, then every gradient. rest: which picture each row shows, the noise, what is given."""
        from ..train.data import Batch

        for name, vector in self.discriminator.named_buffers():
            if name.endswith(("_u", "_v")):
                # the power iterations of spectral_norm begin anew, so that every step can be compared with any other
                vector.fill_(vector.numel() ** -0.5)
        losses = self.whole(Batch(images, text, text_lengths, heard, heard_lengths), *rest)
        weights = (*self.model.parameters(), *self.discriminator.parameters())
        return [losses, *(w.grad for w in weights if w.grad is not None)]


@dataclass(frozen=True)
class EmojiCase:
    """A step of `mmfast train` on random captions and speech of the lengths that its data has."""

    name: str = "emoji"
    batch: int = 64
    text: int = 32  # bytes of the longest caption
    speech: int = 60  # frames of the longest recording

    op = "model"
    modes = (STEP,)

    def build(self, nn: Any) -> torch.nn.Module:
        return Emoji(nn)

    def inputs(self, generator: torch.Generator, dtype: torch.dtype, device: str) -> list[Tensor]:
        rows = self.batch
        images = torch.randn(rows, 3, 32, 32, generator=generator).tanh().to(device, dtype)
        heard = torch.randn(rows, self.speech, 40, generator=generator).to(device, dtype)
        text = torch.randint(32, 127, (rows, self.text), generator=generator)
        text_lengths = torch.linspace(self.text, 4, rows).long()
        # about half of the captions are spoken
        heard_lengths = torch.linspace(self.speech, 20, rows).long() * (torch.arange(rows) % 2 == 0)
        text[torch.arange(self.text)[None] >= text_lengths[:, None]] = 0
        noise = torch.randn(rows, 32, generator=generator).to(device, dtype)
        given = torch.rand(rows, 3, generator=generator) < torch.tensor([0.15, 0.6, 0.5])
        pictures = torch.arange(rows)
        moved = [x.to(device) for x in (pictures, noise, given)]
        return [images, text.to(device), heard, text_lengths, heard_lengths, *moved]

    def step(self, module: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
        return module.step(*inputs)


@dataclass(frozen=True)
class ModelCase:
    """A whole model as a case: one training step of it on random data of its real sizes."""

    name: str
    maker: Callable[[Any], Adversaries]
    shapes: tuple[Shape, Shape]  # of what the generator is given, and of the real data

    op = "model"
    modes = (STEP,)

    def build(self, nn: Any) -> torch.nn.Module:
        return self.maker(nn)

    def inputs(self, generator: torch.Generator, dtype: torch.dtype, device: str) -> list[Tensor]:
        given, real = (torch.randn(shape, generator=generator) for shape in self.shapes)
        return [given.to(device, dtype), real.tanh().to(device, dtype)]

    def step(self, module: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
        return module.step(*inputs)


@dataclass(frozen=True)
class UserCase:
    """A user's own module: forward, and forward + backward along a random direction."""

    name: str
    module: torch.nn.Module
    sample: tuple[Any, ...]

    op = "model"
    modes = ("forward", "forward+backward")

    def build(self, nn: Any) -> torch.nn.Module:
        """The module itself, whatever the namespace: what mmfast makes of it is accelerate's work."""
        return copy.deepcopy(self.module)

    def inputs(self, generator: torch.Generator, dtype: torch.dtype, device: str) -> list[Tensor]:
        """The sample; its floating-point tensors with a hundredth of their spread added as noise."""
        varied = []
        for x in self.sample:
            x = x.detach().clone().to(device)
            if x.is_floating_point():
                noise = torch.randn(x.shape, generator=generator).to(device)
                x = (x + 0.01 * x.std(correction=0) * noise).to(dtype)
            varied.append(x)
        return varied

    def run(self, module: torch.nn.Module, *inputs: Tensor) -> Tensor:
        return torch.cat([y.reshape(-1) for y in floating(module(*inputs))])

    def work(self, dtype: torch.dtype) -> Work:
        """Not counted."""
        return Work(float("nan"), float("nan"))


def wobbled(module: torch.nn.Module, generator: torch.Generator) -> torch.nn.Module:
    """A copy whose weights are moved by one rounding each, up or down."""
    module = copy.deepcopy(module)
    with torch.no_grad():
        for weight in module.parameters():
            signs = torch.randint(0, 2, weight.shape, generator=generator).to(weight) * 2 - 1
            weight.mul_(1 + torch.finfo(weight.dtype).eps * signs)
    return module


def floating(output: Any) -> list[Tensor]:
    """The floating-point tensors in whatever a module returns: tensors, sequences, mappings, packed sequences."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, torch.nn.utils.rnn.PackedSequence):
        return [output.data]
    if isinstance(output, dict):
        output = list(output.values())
    return [x for part in output for x in floating(part)] if isinstance(output, (list, tuple)) else []


MODELS: dict[str, ModelCase | EmojiCase] = {
    case.name: case
    for case in (
        ModelCase("dcgan", Dcgan, ((16, 100, 1, 1), (16, 3, 64, 64))),
        ModelCase("pix2pix", Pix2pix, ((1, 3, 256, 256), (1, 3, 256, 256))),
        ModelCase("hifigan", HifiGan, ((1, 80, 32), (1, 1, 8192))),
        ModelCase("encodec", Encodec, ((1, 1, 24000), (1, 1, 24000))),
        EmojiCase(),
    )
}


def from_name(name: str, sample: str | None) -> ModelCase | EmojiCase | UserCase:
    """A model of the list above by its name, or a user's own by `package.module:function` and its sample by another.

    Raises ValueError where the name is neither, or a function gives something else than is asked of it.
    """
    if name in MODELS:
        return MODELS[name]
    if ":" not in name:
        raise ValueError(
            f"unknown model {name!r}; accepted: {', '.join(MODELS)}, or your own as package.module:function"
        )
    if sample is None:
        raise ValueError(
            f"--model {name} needs --input package.module:function, which gives the tensors to call it with"
        )
    module, given = called(name), called(sample)
    if not isinstance(module, torch.nn.Module):
        raise ValueError(f"{name} gave a {type(module).__name__}; expected a torch.nn.Module")
    inputs = tuple(given) if isinstance(given, (tuple, list)) else (given,)
    if not all(isinstance(x, Tensor) for x in inputs):
        raise ValueError(f"{sample} gave {', '.join(type(x).__name__ for x in inputs)}; expected a tensor or several")
    return UserCase(name, module, inputs)


def called(spec: str) -> Any:
    """What the function named `package.module:function` gives; the current folder's modules are found too."""
    import sys

    package, _, function = spec.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(package), function)()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{spec} cannot be loaded: {error}") from error
