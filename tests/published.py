"""What papers and programs write for adversarial losses, transcribed in plain torch from each of them on its own.

Functions of the real and the fake logits: PUBLISHED on one discriminator's tensors, PRESETS on lists of them; in each
the discriminator's and the generator's.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def total(term, real, fake):
    return sum(term(r, f) for r, f in zip(real, fake, strict=True))


def bce(x: Tensor, target: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(x, torch.full_like(x, target))


# by mode
PUBLISHED = {
    "non-saturating": (lambda r, f: bce(r, 1) + bce(f, 0), lambda r, f: bce(f, 1)),
    "minimax": (lambda r, f: bce(r, 1) + bce(f, 0), lambda r, f: torch.log(1 - f.sigmoid()).mean()),
    "hinge": (lambda r, f: F.relu(1 - r).mean() + F.relu(1 + f).mean(), lambda r, f: -f.mean()),
    "hinge2": (
        lambda r, f: -torch.clamp(r - 1, max=0).mean() - torch.clamp(-f - 1, max=0).mean(),
        lambda r, f: -torch.clamp(f - 1, max=0).mean(),
    ),
    "lsgan": (lambda r, f: F.mse_loss(r, torch.ones_like(r)) + (f**2).mean(), lambda r, f: ((1 - f) ** 2).mean()),
    "wasserstein": (lambda r, f: f.mean() - r.mean(), lambda r, f: -f.mean()),
    "relativistic": (lambda r, f: F.softplus(-(r - f)).mean(), lambda r, f: F.softplus(-(f - r)).mean()),
    "relativistic-average": (
        lambda r, f: bce(r - f.mean(), 1) + bce(f - r.mean(), 0),
        lambda r, f: bce(r - f.mean(), 0) + bce(f - r.mean(), 1),
    ),
    "relativistic-average-hinge": (
        lambda r, f: F.relu(1 - (r - f.mean())).mean() + F.relu(1 + (f - r.mean())).mean(),
        lambda r, f: F.relu(1 + (r - f.mean())).mean() + F.relu(1 - (f - r.mean())).mean(),
    ),
    "relativistic-average-lsgan": (
        lambda r, f: ((r - f.mean() - 1) ** 2).mean() + ((f - r.mean() + 1) ** 2).mean(),
        lambda r, f: ((f - r.mean() - 1) ** 2).mean() + ((r - f.mean() + 1) ** 2).mean(),
    ),
    "leaky-lsgan": (
        lambda r, f: F.mse_loss(F.leaky_relu(r, 0.05), torch.ones_like(r)) + F.leaky_relu(f, 0.05).square().mean(),
        lambda r, f: F.mse_loss(F.leaky_relu(f, 0.05), torch.ones_like(f)),
    ),
    "tanh-hinge": (
        lambda r, f: -torch.clamp(r.tanh() - 1, max=0).mean() - torch.clamp(-f.tanh() - 1, max=0).mean(),
        lambda r, f: -torch.clamp(f.tanh() - 1, max=0).mean(),
    ),
}


def mean_of(function):
    return lambda r, f: total(function, r, f) / len(r)


def sum_of(function):
    return lambda r, f: total(function, r, f)


LSGAN, VANILLA = PUBLISHED["lsgan"], PUBLISHED["non-saturating"]


def stylegan2_d(r, f):
    return (F.softplus(f) + F.softplus(-r)).mean()


# Written out of each program or paper on its own: no formula of theirs is another's above.


def dac_discriminator(real, fake):
    """Kumar et al., arXiv:2306.06546; dac/nn/loss.py, GANLoss.discriminator_loss: a square for each discriminator."""
    loss = torch.zeros((), dtype=real[0].dtype)
    for r, f in zip(real, fake, strict=True):
        loss = loss + torch.mean(f**2)
        loss = loss + torch.mean((1 - r) ** 2)
    return loss


def dac_generator(real, fake):
    """dac/nn/loss.py, GANLoss.generator_loss."""
    loss = torch.zeros((), dtype=fake[0].dtype)
    for f in fake:
        loss = loss + torch.mean((1 - f) ** 2)
    return loss


def biggan_discriminator(real, fake):
    """Brock et al., arXiv:1809.11096, appendix C.2; as in Lim and Ye: -E min(0, -1 + D(x)) - E min(0, -1 - D(G(z)))."""
    loss = 0
    for r, f in zip(real, fake, strict=True):
        loss = loss - torch.minimum(r - 1, torch.zeros_like(r)).sum() / r.numel()
        loss = loss - torch.minimum(-f - 1, torch.zeros_like(f)).sum() / f.numel()
    return loss


def biggan_generator(real, fake):
    """-E D(G(z))"""
    return sum(-f.sum() / f.numel() for f in fake)


def studiogan_discriminator(real, fake):
    """PyTorch-StudioGAN, src/utils/losses.py, d_hinge: one mean over the sum of both sides."""
    return sum(torch.mean((1.0 - r).clamp_min(0) + (1.0 + f).clamp_min(0)) for r, f in zip(real, fake, strict=True))


def studiogan_generator(real, fake):
    """src/utils/losses.py, g_hinge"""
    return -torch.stack([torch.mean(f) for f in fake]).sum()


def vqgan_discriminator(real, fake):
    """Esser et al., arXiv:2012.09841; taming/modules/losses/vqperceptual.py, hinge_d_loss: half of both means."""
    halves = []
    for r, f in zip(real, fake, strict=True):
        on_real = torch.where(r < 1, 1 - r, 0.0).mean()
        on_fake = torch.where(f > -1, 1 + f, 0.0).mean()
        halves.append(0.5 * (on_real + on_fake))
    return sum(halves)


def vqgan_generator(real, fake):
    """VQLPIPSWithDiscriminator.forward, optimizer_idx 0: g_loss = -mean(logits_fake), before its adaptive weight."""
    return sum(torch.mean(f).neg() for f in fake)


def hifigan_discriminator(real, fake):
    """Kong et al., arXiv:2010.05646, equation 1, of each sub-discriminator (section 2.4)."""
    on_real = sum((r - 1).square().sum() / r.numel() for r in real)
    return on_real + sum(f.square().sum() / f.numel() for f in fake)


def hifigan_generator(real, fake):
    """Equation 2."""
    return sum((f - 1).square().sum() / f.numel() for f in fake)


def audiocraft_discriminator(real, fake):
    """audiocraft/adversarial/losses.py, AdversarialLoss.train_adv with hinge: both means, over the number of lists."""
    loss = torch.zeros((), dtype=real[0].dtype)
    for r, f in zip(real, fake, strict=True):
        loss = loss - (-f - 1).clamp_max(0).mean() - (r - 1).clamp_max(0).mean()
    return loss / len(fake)


def audiocraft_generator(real, fake):
    """AdversarialLoss.forward with hinge_loss."""
    return torch.stack([f.mean() for f in fake]).mean().neg()


def encodec_discriminator(real, fake):
    """Défossez et al., arXiv:2210.13438, section 3.4: 1/K sum max(0, 1 - D_k(x)) + max(0, 1 + D_k(x^))."""
    sums = [F.threshold(1 - r, 0, 0).mean() + F.threshold(1 + f, 0, 0).mean() for r, f in zip(real, fake, strict=True)]
    return torch.stack(sums).mean()


def encodec_generator(real, fake):
    """1/K sum max(0, 1 - D_k(x^))"""
    return torch.stack([F.threshold(1 - f, 0, 0).mean() for f in fake]).mean()


def leaky(x):
    return torch.where(x > 0, x, 0.05 * x)


def monai_discriminator(real, fake):
    """MONAI's PatchAdversarialLoss for real and for fake: LeakyReLU(0.05), squares, the mean over discriminators."""
    on_real = torch.stack([(leaky(r) - 1).pow(2).mean() for r in real]).mean()
    return on_real + torch.stack([leaky(f).pow(2).mean() for f in fake]).mean()


def monai_generator(real, fake):
    return torch.stack([(leaky(f) - 1).pow(2).mean() for f in fake]).mean()


def r3gan_discriminator(real, fake):
    """Huang et al., arXiv:2501.05441, equation 2 with f(t) = -log(1 + exp(-t)), of D(x) - D(G(z))."""
    return sum(-F.logsigmoid(r - f).mean() for r, f in zip(real, fake, strict=True))


def r3gan_generator(real, fake):
    return sum(-F.logsigmoid(f - r).mean() for r, f in zip(real, fake, strict=True))


def mimicry_discriminator(real, fake):
    """torch-mimicry, minimax_loss_dis: binary cross entropy with logits, targets of ones and of zeros."""
    return sum(-torch.log(r.sigmoid()).mean() for r in real) - sum(torch.log((-f).sigmoid()).mean() for f in fake)


def mimicry_generator(real, fake):
    """ns_loss_gen"""
    return sum(-torch.log(f.sigmoid() + 1e-8).mean() for f in fake)


def torchgan_discriminator(real, fake):
    """torchgan/losses/functional.py, minimax_discriminator_loss: x * (1 - target) + log(1 + exp(-x))."""
    return sum(torch.logaddexp(-r, r.new_zeros(())).mean() for r in real) + sum(
        (f + torch.logaddexp(-f, f.new_zeros(()))).mean() for f in fake
    )


def torchgan_generator(real, fake):
    """minimax_generator_loss with nonsaturating"""
    return sum(torch.logaddexp(-f, f.new_zeros(())).mean() for f in fake)


PRESETS = {
    "dcgan": (
        sum_of(
            lambda r, f: (
                F.binary_cross_entropy(r.sigmoid(), torch.ones_like(r))
                + F.binary_cross_entropy(f.sigmoid(), torch.zeros_like(f))
            )
        ),
        sum_of(lambda r, f: F.binary_cross_entropy(f.sigmoid(), torch.ones_like(f))),
    ),
    "pix2pix": (sum_of(lambda r, f: (bce(f, 0) + bce(r, 1)) * 0.5), sum_of(VANILLA[1])),
    "cyclegan": (sum_of(lambda r, f: (((r - 1) ** 2).mean() + (f**2).mean()) * 0.5), sum_of(LSGAN[1])),
    "hifigan": (hifigan_discriminator, hifigan_generator),
    "dac": (dac_discriminator, dac_generator),
    "audiocraft": (audiocraft_discriminator, audiocraft_generator),
    "encodec": (encodec_discriminator, encodec_generator),
    "vqgan": (vqgan_discriminator, vqgan_generator),
    "monai": (monai_discriminator, monai_generator),
    "stylegan2": (sum_of(stylegan2_d), sum_of(lambda r, f: F.softplus(-f).mean())),
    "r3gan": (r3gan_discriminator, r3gan_generator),
    "biggan": (biggan_discriminator, biggan_generator),
    "studiogan": (studiogan_discriminator, studiogan_generator),
    "mimicry": (mimicry_discriminator, mimicry_generator),
    "torchgan": (torchgan_discriminator, torchgan_generator),
}
