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


# Written out of each program or paper on its own: none calls another's, nor a mode's above.


def dcgan_discriminator(real, fake):
    """Radford et al., arXiv:1511.06434; pytorch/examples, dcgan/main.py: BCELoss of netD's Sigmoid, labels 1 and 0."""
    criterion, loss = torch.nn.BCELoss(), 0
    for r, f in zip(real, fake, strict=True):
        loss = loss + criterion(r.sigmoid(), torch.ones_like(r)) + criterion(f.sigmoid(), torch.zeros_like(f))
    return loss


def dcgan_generator(real, fake):
    """errG: "fake labels are real for generator cost"."""
    return sum(torch.nn.BCELoss()(f.sigmoid(), torch.ones_like(f)) for f in fake)


def pix2pix_discriminator(real, fake):
    """Isola et al., arXiv:1611.07004; pytorch-CycleGAN-and-pix2pix, models/pix2pix_model.py, backward_D, and
    models/networks.py, GANLoss("vanilla"), BCEWithLogitsLoss with the label expanded."""
    criterion, loss = torch.nn.BCEWithLogitsLoss(), 0
    for r, f in zip(real, fake, strict=True):
        on_fake = criterion(f, torch.tensor(0.0, dtype=f.dtype).expand_as(f))
        on_real = criterion(r, torch.tensor(1.0, dtype=r.dtype).expand_as(r))
        loss = loss + (on_fake + on_real) * 0.5
    return loss


def pix2pix_generator(real, fake):
    """backward_G: loss_G_GAN = criterionGAN(pred_fake, True), not halved."""
    criterion = torch.nn.BCEWithLogitsLoss()
    return sum(criterion(f, torch.tensor(1.0, dtype=f.dtype).expand_as(f)) for f in fake)


def cyclegan_discriminator(real, fake):
    """Zhu et al., arXiv:1703.10593; pytorch-CycleGAN-and-pix2pix, models/cycle_gan_model.py, backward_D_basic, and
    models/networks.py, GANLoss("lsgan"), MSELoss with the label expanded."""
    criterion, loss = torch.nn.MSELoss(), 0
    for r, f in zip(real, fake, strict=True):
        on_real = criterion(r, torch.tensor(1.0, dtype=r.dtype).expand_as(r))
        on_fake = criterion(f, torch.tensor(0.0, dtype=f.dtype).expand_as(f))
        loss = loss + (on_real + on_fake) * 0.5
    return loss


def cyclegan_generator(real, fake):
    """backward_G: criterionGAN(netD_A(fake_B), True), not halved."""
    criterion = torch.nn.MSELoss()
    return sum(criterion(f, torch.tensor(1.0, dtype=f.dtype).expand_as(f)) for f in fake)


def stylegan2_discriminator(real, fake):
    """Karras et al., arXiv:1912.04958; stylegan2-ada-pytorch, training/loss.py, Dmain: the gradients of the means of
    loss_Dgen, -log(1 - sigmoid(gen_logits)), and of loss_Dreal, -log(sigmoid(real_logits)), are added."""
    losses = [F.softplus(f).mean() for f in fake] + [F.softplus(-r).mean() for r in real]
    return torch.stack(losses).sum()


def stylegan2_generator(real, fake):
    """Gmain: loss_Gmain, -log(sigmoid(gen_logits)), its mean."""
    return torch.stack([F.softplus(-f).mean() for f in fake]).sum()


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
    """PyTorch-StudioGAN, src/utils/losses.py, d_hinge: a mean of each side."""
    loss = 0
    for r, f in zip(real, fake, strict=True):
        loss = loss + torch.mean(F.relu(1.0 - r)) + torch.mean(F.relu(1.0 + f))
    return loss


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
    "dcgan": (dcgan_discriminator, dcgan_generator),
    "pix2pix": (pix2pix_discriminator, pix2pix_generator),
    "cyclegan": (cyclegan_discriminator, cyclegan_generator),
    "hifigan": (hifigan_discriminator, hifigan_generator),
    "dac": (dac_discriminator, dac_generator),
    "audiocraft": (audiocraft_discriminator, audiocraft_generator),
    "encodec": (encodec_discriminator, encodec_generator),
    "vqgan": (vqgan_discriminator, vqgan_generator),
    "monai": (monai_discriminator, monai_generator),
    "stylegan2": (stylegan2_discriminator, stylegan2_generator),
    "r3gan": (r3gan_discriminator, r3gan_generator),
    "biggan": (biggan_discriminator, biggan_generator),
    "studiogan": (studiogan_discriminator, studiogan_generator),
    "mimicry": (mimicry_discriminator, mimicry_generator),
    "torchgan": (torchgan_discriminator, torchgan_generator),
}
