"""The adversarial losses on a CPU against the eager formulas as libraries write them: a table of cases.

    python benchmarks/adversarial_table.py [--threads 1] [--seconds 1] [--only 64]

One process, float32, forward and backward, interleaved rounds, minimum over them. The floor of the cases of 4 million
logits is the time in which torch copies as many words as must be moved: each logit is read forward and backward and its
gradient written. Wasserstein's, whose gradient is one number, is read once; a relativistic average's once more, for all
means come before any slope, and all slopes, which are part of the means' gradients, before any gradient.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from rnn_table import best_of
from torch import Tensor
from torch.nn import functional as F

from mmfast import functional as mF

Lists = list[Tensor]
Loss = Callable[[Lists, Lists], Tensor]


class Row(NamedTuple):
    """bar: how many times as fast mmfast is to be. words: per logit, of the floor; 0: none."""

    name: str
    bar: float
    calls: dict[str, Callable[[], Any]]
    words: int = 0
    logits: int = 0


def bce(real: Tensor, fake: Tensor) -> Tensor:
    ones, zeros = torch.ones_like(real), torch.zeros_like(fake)
    return F.binary_cross_entropy_with_logits(real, ones) + F.binary_cross_entropy_with_logits(fake, zeros)


#: by mode: the discriminator's loss as programs write it
EAGER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "wasserstein": lambda r, f: f.mean() - r.mean(),
    "minimax": bce,
    "non-saturating": lambda r, f: F.softplus(-r).mean() + F.softplus(f).mean(),
    "hinge": lambda r, f: F.relu(1 - r).mean() + F.relu(1 + f).mean(),
    "lsgan": lambda r, f: F.mse_loss(r, torch.ones_like(r)) + F.mse_loss(f, torch.zeros_like(f)),
    "relativistic": lambda r, f: F.softplus(f - r).mean(),
    "relativistic-average": lambda r, f: bce(r - f.mean(), f - r.mean()),
    "relativistic-average-hinge": lambda r, f: F.relu(1 - r + f.mean()).mean() + F.relu(1 + f - r.mean()).mean(),
}


def hifigan(real: Lists, fake: Lists) -> Tensor:
    """HiFi-GAN's discriminator_loss, with the .item() of each part that it logs."""
    loss: Any = 0
    for r, f in zip(real, fake, strict=True):
        r_loss, f_loss = torch.mean((1 - r) ** 2), torch.mean(f**2)
        loss += r_loss + f_loss
        r_loss.item(), f_loss.item()
    return loss


def hifigan_features(real: Lists, fake: Lists) -> Tensor:
    return 2 * sum(torch.mean(torch.abs(r - f)) for r, f in zip(real, fake, strict=True))


def attngan(real: Lists, fake: Lists) -> Tensor:
    """AttnGAN's five terms on conditional and unconditional logits."""
    (c_real, c_wrong, u_real), (c_fake, u_fake) = real, fake

    def on(x: Tensor, label: float) -> Tensor:
        return F.binary_cross_entropy_with_logits(x, torch.full_like(x, label))

    return (on(u_real, 1) + on(c_real, 1)) / 2 + (on(u_fake, 0) + on(c_wrong, 0) + on(c_fake, 0)) / 3


def mmfast_attngan(real: Lists, fake: Lists) -> Tensor:
    (c_real, c_wrong, u_real), (c_fake, u_fake) = real, fake
    return mF.matching_discriminator_loss(c_real, c_fake, c_wrong, "minimax", unconditional=(u_real, u_fake))


def both(name: str, bar: float, shapes: tuple[list, list], theirs: Loss, ours: Loss, words: int = 0) -> Row:
    generator = torch.Generator().manual_seed(0)
    real, fake = ([torch.randn(shape, generator=generator).requires_grad_() for shape in side] for side in shapes)
    leaves = [*real, *fake]

    def step(loss: Loss) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(loss(real, fake), leaves)

    calls = {"torch": step(theirs), "mmfast": step(ours)}
    for one, other in zip(*(call() for call in calls.values()), strict=True):
        torch.testing.assert_close(one, other)
    return Row(name, bar, calls, words, sum(x.numel() for x in leaves))


def one_tensor(name: str, mode: str, shape: tuple[int, ...], bar: float, words: int = 0) -> Row:
    return both(
        f"{name} {mode}",
        bar,
        ([shape], [shape]),
        lambda r, f: EAGER[mode](r[0], f[0]),
        lambda r, f: mF.adversarial_discriminator_loss(r[0], f[0], mode),
        words,
    )


def hifigan_maps(batch: int, samples: int) -> tuple[list, list]:
    """(shapes of the logits of HiFi-GAN's 8 discriminators, shapes of their 54 maps)"""
    logits, maps = [], []
    for period in (2, 3, 5, 7, 11):
        length = -(-samples // period)
        for channels, stride in zip((32, 128, 512, 1024, 1024, 1), (3, 3, 3, 3, 1, 1), strict=True):
            length = (length - 1) // stride + 1
            maps.append((batch, channels, length, period))
        logits.append((batch, length * period))
    for scale in range(3):
        length = samples // 2**scale + (scale > 0)
        for channels, stride in zip((128, 128, 256, 512, 1024, 1024, 1024, 1), (1, 2, 2, 4, 4, 1, 1, 1), strict=True):
            length = (length - 1) // stride + 1
            maps.append((batch, channels, length))
        logits.append((batch, length))
    return logits, maps


def critic() -> torch.nn.Module:
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = []
    for inside, outside in ((3, 32), (32, 64), (64, 128)):
        layers += [torch.nn.Conv2d(inside, outside, 4, 2, 1), torch.nn.LeakyReLU(0.2)]
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(128 * 16, 1))


def steps_of_a_critic(name: str, theirs: Callable[..., Tensor], ours: Callable[..., Tensor]) -> Row:
    """A critic's loss with its penalty, and the gradient by its parameters."""
    model = critic()
    real, fake = torch.randn(16, 3, 32, 32), torch.randn(16, 3, 32, 32)
    parameters = list(model.parameters())

    def step(loss: Callable[..., Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(loss(model, real.detach().requires_grad_(), fake), parameters)

    return Row(name, 1.0, {"torch": step(theirs), "mmfast": step(ours)})


def r1(model: torch.nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """StyleGAN2's, in each step."""
    logits = model(real)
    (g,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
    return EAGER["non-saturating"](logits, model(fake)) + g.square().sum([1, 2, 3]).mean() * 5


def mmfast_r1(model: torch.nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    logits = model(real)
    return mF.adversarial_discriminator_loss(logits, model(fake)) + mF.r1_penalty(logits, real, 10.0)


def wgan_gp(model: torch.nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    share = torch.rand(len(real), 1, 1, 1)
    x = (share * real.detach() + (1 - share) * fake).requires_grad_()
    out = model(x)
    (g,) = torch.autograd.grad(out, x, torch.ones_like(out), create_graph=True)
    return EAGER["wasserstein"](model(real), model(fake)) + ((g.flatten(1).norm(2, dim=1) - 1) ** 2).mean() * 10


def mmfast_wgan_gp(model: torch.nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    loss = mF.adversarial_discriminator_loss(model(real), model(fake), "wasserstein")
    return loss + mF.wgan_penalty(model, real.detach(), fake, 10.0)


def rows() -> list[Callable[[], Row]]:
    """Made one by one: the large ones are not to be there at once."""
    bars = {"wasserstein": 1.1, "minimax": 1.5, "non-saturating": 1.5, "hinge": 1.7, "lsgan": 1.7}
    found = [lambda mode=mode: one_tensor("64", mode, (64,), bars.get(mode, 2.5)) for mode in EAGER]
    five = ([(64,)] * 3, [(64,)] * 2)
    found.append(lambda: both("64 five terms (AttnGAN)", 2.5, five, attngan, mmfast_attngan))
    found += [
        lambda mode=mode: one_tensor("PatchGAN 64x1x30x30", mode, (64, 1, 30, 30), 2.5)
        for mode in ("minimax", "hinge", "lsgan")
    ]
    logits = hifigan_maps(16, 8192)[0]
    maps = hifigan_maps(4, 8192)[1]
    found.append(
        lambda: both(
            "HiFi-GAN 8 discriminators batch 16",
            4,
            (logits, logits),
            hifigan,
            lambda r, f: mF.adversarial_discriminator_loss(r, f, "lsgan"),
        )
    )
    found.append(
        lambda: both(
            "HiFi-GAN 54 maps batch 4 x 8192",
            2,
            (maps, maps),
            hifigan_features,
            lambda r, f: mF.feature_matching(r, f, scale=2, detach=False),
        )
    )
    found.append(lambda: steps_of_a_critic("R1 step", r1, mmfast_r1))
    found.append(lambda: steps_of_a_critic("WGAN-GP step", wgan_gp, mmfast_wgan_gp))
    words = {"wasserstein": 1, "relativistic-average": 4, "relativistic-average-hinge": 4}
    found += [
        lambda mode=mode: one_tensor("4M", mode, (1 << 22,), 2 if mode == "wasserstein" else 4, words.get(mode, 3))
        for mode in EAGER
    ]
    return found


def print_table(seconds: float, only: str) -> None:
    print(f"{'case':40} {'torch ms':>9} {'mmfast':>9} {'ratio':>6} {'bar':>4} {'floor ms':>9} {'x floor':>7}")
    for make in rows():
        row = make()
        if only not in row.name:
            continue
        calls = dict(row.calls)
        if row.words:
            source, target = torch.ones(row.logits), torch.empty(row.logits)
            calls["copy"] = lambda target=target, source=source: target.copy_(source)
        best = {name: 1e3 * taken for name, taken in best_of(calls, seconds).items()}
        floor = best.get("copy", float("nan")) * row.words / 2
        print(
            f"{row.name:40} {best['torch']:9.4f} {best['mmfast']:9.4f} {best['torch'] / best['mmfast']:6.2f} "
            f"{row.bar:4.1f} {floor:9.4f} {best['mmfast'] / floor:7.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print_table(arguments.seconds, arguments.only)


if __name__ == "__main__":
    main()
