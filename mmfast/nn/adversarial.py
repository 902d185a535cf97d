"""The adversarial loss, feature matching and LeCam's regulariser as modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import functional as F
from ..dispatch import Op
from ..ops.adversarial.backends import OP, Case
from ..ops.adversarial.losses import Logits, Smoothing, batch_means, discriminator_recipe
from .layer import Layer

_PRESETS: dict[str, dict[str, Any]] = {
    "dcgan": {"mode": "non-saturating"},
    "pix2pix": {"mode": "non-saturating", "scale": 0.5, "generator_scale": 1.0},
    "cyclegan": {"mode": "lsgan", "scale": 0.5, "generator_scale": 1.0},
    "hifigan": {"mode": "lsgan"},
    "dac": {"mode": "lsgan"},
    "audiocraft": {"mode": "hinge", "across": "mean"},
    "encodec": {"mode": "hinge2", "across": "mean"},
    "vqgan": {"mode": "hinge", "scale": 0.5, "generator_scale": 1.0},
    "monai": {"mode": "leaky-lsgan", "across": "mean"},
    "stylegan2": {"mode": "non-saturating"},
    "r3gan": {"mode": "relativistic"},
    "biggan": {"mode": "hinge"},
    "studiogan": {"mode": "hinge"},
    "mimicry": {"mode": "non-saturating"},
    "torchgan": {"mode": "non-saturating"},
}

_FEATURE_PRESETS: dict[str, dict[str, Any]] = {
    "hifigan": {"scale": 2.0, "detach": False},
    "dac": {},
    "audiocraft": {"across": "mean", "detach": False},
    "encodec": {"across": "mean", "relative": True},
}


class AdversarialLoss(Layer, torch.nn.Module):
    """The loss of a discriminator on real and fake logits, and of the generator that it judges.

    Equivalent to, for mode "non-saturating":
    `discriminator(r, f) = scale * (softplus(-r).mean() + softplus(f).mean())`,
    `generator(f) = generator_scale * softplus(-f).mean()`,
    summed over the tensors of a list (multi-scale, multi-period discriminators).

    mode, smoothing, reduction, across, process_group: those of `mmfast.functional.adversarial_discriminator_loss`.
    scale: of both losses; generator_scale: of the generator's, where it has its own.
    backend: "torch", "cpu", "cuda", "triton" or None (mmfast chooses).
    Logits, dtypes, errors, differentiability: `mmfast.functional.adversarial_discriminator_loss`.
    """

    def __init__(
        self,
        mode: str = "non-saturating",
        scale: float = 1.0,
        *,
        generator_scale: float | None = None,
        smoothing: Smoothing = 0.0,
        reduction: str = "mean",
        across: str = "sum",
        process_group: Any = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        discriminator_recipe(1, mode, scale, smoothing, reduction, across)  # for its errors
        self.mode = mode
        self.scale = scale
        self.generator_scale = scale if generator_scale is None else generator_scale
        self.smoothing = smoothing
        self.reduction = reduction
        self.across = across
        self.process_group = process_group
        self.backend = backend

    @classmethod
    def preset(cls, name: str, **options: Any) -> AdversarialLoss:
        """The loss of a known program, with its factors; options: those of the constructor, to change some.

        After `criterion = mmfast.nn.AdversarialLoss.preset(name)`, in place of the program's own lines, with its names,
        all on raw logits; those of the discriminator's step are of detached samples, as ever:

        "dcgan" (pytorch/examples, BCELoss after a Sigmoid, which is to be taken out; Radford et al., arXiv:1511.06434):
            `errD = criterion.discriminator(netD(real_cpu), netD(fake.detach()))`;
            `errG = criterion.generator(netD(fake))`.
        "pix2pix" (Isola et al., arXiv:1611.07004), the discriminator's loss is halved:
            `self.loss_D = criterion.discriminator(pred_real, pred_fake)`;
            `self.loss_G_GAN = criterion.generator(pred_fake)`.
        "cyclegan" (Zhu et al., arXiv:1703.10593), least squares, the discriminator's loss is halved:
            `loss_D = criterion.discriminator(pred_real, pred_fake)`;
            `self.loss_G_A = criterion.generator(self.netD_A(self.fake_B))`, and so for B.
        "hifigan" (Kong et al., arXiv:2010.05646), least squares, summed over all discriminators:
            `loss_disc_all = criterion.discriminator([y_df_hat_r, y_ds_hat_r], [y_df_hat_g, y_ds_hat_g])`;
            `loss_gen = criterion.generator([y_df_hat_g, y_ds_hat_g])`, for its sum of loss_gen_s and loss_gen_f.
        "dac" (Kumar et al., arXiv:2306.06546), the same of each discriminator's last map:
            `loss_d = criterion.discriminator([x[-1] for x in d_real], [x[-1] for x in d_fake])`;
            `loss_g = criterion.generator([x[-1] for x in d_fake])`.
        "audiocraft" (Copet et al., arXiv:2306.05284; its settings for EnCodec), hinge, with generator -mean, the mean
            over the discriminators of one adversary; all is balanced by `LossBalancer`:
            `loss = criterion.discriminator(all_logits_real_is_fake, all_logits_fake_is_fake)`;
            `adv = criterion.generator(all_logits_fake_is_fake)`.
        "encodec" (Défossez et al., arXiv:2210.13438, section 3.4, of which there is no program), the same for the
            discriminator; the paper's generator is relu(1 - x):
            `loss_d = criterion.discriminator(real_logits, fake_logits)`;
            `loss_g = criterion.generator(fake_logits)`.
        "vqgan" (Esser et al., arXiv:2012.09841), hinge, the discriminator's loss is halved; the generator's is weighted
            by `mmfast.functional.adaptive_weight(nll_loss, g_loss, last_layer)`:
            `d_loss = disc_factor * criterion.discriminator(logits_real, logits_fake)`;
            `g_loss = criterion.generator(logits_fake)`.
        "monai" (PatchAdversarialLoss with its defaults; Pinaya et al., arXiv:2307.15208), least squares after
            LeakyReLU(0.05), the mean over the discriminators; the sum of its two calls, for real and fake:
            `discriminator_loss = criterion.discriminator(logits_real, logits_fake)`;
            `generator_loss = criterion.generator(logits_fake)`.
        "stylegan2" (Karras et al., arXiv:1912.04958), with `mmfast.functional.r1_penalty(..., every=16)`:
            `loss_D = criterion.discriminator(real_logits, gen_logits)`, the mean of loss_Dreal and of loss_Dgen added;
            `loss_Gmain = criterion.generator(gen_logits)`.
        "r3gan" (Huang et al., arXiv:2501.05441), relativistic pairs, so that the generator's step needs the real
            logits; `r1_penalty` and `r2_penalty` in each step:
            `AdversarialLoss = criterion.discriminator(RealLogits, FakeLogits)`;
            `AdversarialLoss = criterion.generator(FakeLogits, RealLogits)`.
        "biggan" (Brock et al., arXiv:1809.11096), hinge:
            `D_loss = criterion.discriminator(D_real, D_fake)`;
            `G_loss = criterion.generator(D_fake)`, each over the number of accumulated steps.
        "studiogan" (its settings for BigGAN), the same:
            `dis_acml_loss = criterion.discriminator(real_dict["adv_output"], fake_dict["adv_output"])`;
            `gen_acml_loss = criterion.generator(fake_dict["adv_output"])`.
        "mimicry" (torch-mimicry's ns losses; Lee and Town, arXiv:2005.02494): its generator takes log(sigmoid + 1e-8),
            which differs below -15, where its gradient vanishes; this one is exact:
            `errD = criterion.discriminator(output_real, output_fake)`;
            `errG = criterion.generator(output)`.
        "torchgan" (its minimax losses, nonsaturating; Pal and Das, arXiv:1909.03410), label smoothing by `smoothing=`:
            `loss = criterion.discriminator(dx, dgz)`;
            `loss = criterion.generator(dgz)`.
        """
        return cls(**_preset("AdversarialLoss", _PRESETS, name, options))

    def discriminator(
        self,
        real_logits: Logits,
        fake_logits: Logits,
        *,
        real_weight: Tensor | None = None,
        fake_weight: Tensor | None = None,
        return_values: bool = False,
    ) -> Any:
        """The discriminator's loss, a tensor without dimensions; the arguments are those of the function."""
        return F.adversarial_discriminator_loss(
            real_logits,
            fake_logits,
            self.mode,
            scale=self.scale,
            smoothing=self.smoothing,
            reduction=self.reduction,
            across=self.across,
            real_weight=real_weight,
            fake_weight=fake_weight,
            return_values=return_values,
            process_group=self.process_group,
            backend=self.backend,
        )

    def generator(
        self,
        fake_logits: Logits,
        real_logits: Logits | None = None,
        *,
        real_weight: Tensor | None = None,
        fake_weight: Tensor | None = None,
        return_values: bool = False,
    ) -> Any:
        """The generator's loss, a tensor without dimensions; relativistic modes need the real logits, too."""
        return F.adversarial_generator_loss(
            fake_logits,
            real_logits,
            self.mode,
            scale=self.generator_scale,
            reduction=self.reduction,
            across=self.across,
            real_weight=real_weight,
            fake_weight=fake_weight,
            return_values=return_values,
            process_group=self.process_group,
            backend=self.backend,
        )

    def static_case(self) -> tuple[Op, Case]:
        return OP, Case(torch.get_default_device().type, torch.get_default_dtype(), self.reduction != "none")

    def extra_repr(self) -> str:
        usual = {"generator_scale": self.scale, "smoothing": 0.0, "reduction": "mean", "across": "sum"}
        return f"{self.mode!r}, scale={self.scale}" + _unusual(self, usual)


class FeatureMatchingLoss(Layer, torch.nn.Module):
    """The distance between feature maps of real and of generated samples: `mmfast.functional.feature_matching`.

    Called with (real_maps, fake_maps, sample_weight=None); its options are those of the function.
    """

    def __init__(
        self,
        distance: str = "l1",
        scale: float = 1.0,
        *,
        across: str = "sum",
        weights: Sequence[float] | None = None,
        detach: bool = True,
        relative: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.distance = distance
        self.scale = scale
        self.across = across
        self.weights = weights
        self.detach = detach
        self.relative = relative
        self.backend = backend

    @classmethod
    def preset(cls, name: str, **options: Any) -> FeatureMatchingLoss:
        """The loss of a known program; options: those of the constructor, to change some.

        After `features = mmfast.nn.FeatureMatchingLoss.preset(name)`, in place of the program's own lines:

        "hifigan", twice the sum of all maps' mean absolute differences; the real side gets a gradient, too:
            `loss_fm = features([fmap_f_r, fmap_s_r], [fmap_f_g, fmap_s_g])`, for its sum of loss_fm_f and loss_fm_s.
        "dac", the plain sum of all but the last map, the real side detached (doubled in its settings):
            `loss_feature = features([x[:-1] for x in d_real], [x[:-1] for x in d_fake])`.
        "audiocraft", the mean over a discriminator's maps, then over the discriminators; the real side gets a gradient
            (its discriminator's own is switched off there):
            `feat = features(all_fmap_real, all_fmap_fake)`.
        "encodec", the paper's: relative to the mean magnitude of the real side, the mean over maps and discriminators
            (arXiv:2210.13438, equation 2):
            `loss_feat = features(real_maps, fake_maps)`.
        """
        return cls(**_preset("FeatureMatchingLoss", _FEATURE_PRESETS, name, options))

    def forward(self, real_maps: Logits, fake_maps: Logits, *, sample_weight: Tensor | None = None) -> Tensor:
        return F.feature_matching(
            real_maps,
            fake_maps,
            distance=self.distance,
            scale=self.scale,
            across=self.across,
            weights=self.weights,
            sample_weight=sample_weight,
            detach=self.detach,
            relative=self.relative,
            backend=self.backend,
        )

    def static_case(self) -> tuple[Op, Case]:
        return OP, Case(torch.get_default_device().type, torch.get_default_dtype())

    def extra_repr(self) -> str:
        usual = {"across": "sum", "weights": None, "detach": True, "relative": False}
        return f"{self.distance!r}, scale={self.scale}" + _unusual(self, usual)


class LeCam(Layer, torch.nn.Module):
    """LeCam's regulariser with its running means, a module to add to the discriminator's loss.

    `forward(real_logits, fake_logits)` first moves the means, `mean = decay * mean + (1 - decay) * logits.mean()` (the
    first call sets them), then gives `mmfast.functional.lecam_penalty`.

    weight: of the penalty; real_weight and fake_weight, (B,), weigh its samples, the means not.
    decay: of the means. discriminators: the number of tensors of logits.
    process_group: over whose ranks the batch means are averaged (torch.distributed); None: each rank has its own.
    real_mean, fake_mean: (discriminators,) buffers; seen: () bool, a buffer, whether they were set.
    Source: Tseng et al., arXiv:2104.03310.
    """

    real_mean: Tensor
    fake_mean: Tensor
    seen: Tensor

    def __init__(
        self,
        weight: float = 1.0,
        decay: float = 0.99,
        *,
        discriminators: int = 1,
        process_group: Any = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.decay = decay
        self.process_group = process_group
        self.backend = backend
        self.register_buffer("real_mean", torch.zeros(discriminators))
        self.register_buffer("fake_mean", torch.zeros(discriminators))
        self.register_buffer("seen", torch.zeros((), dtype=torch.bool))

    def forward(
        self,
        real_logits: Logits,
        fake_logits: Logits,
        *,
        real_weight: Tensor | None = None,
        fake_weight: Tensor | None = None,
    ) -> Tensor:
        if self.training:
            self._update(real_logits, fake_logits)
        return F.lecam_penalty(
            real_logits,
            fake_logits,
            self.real_mean,
            self.fake_mean,
            scale=self.weight,
            real_weight=real_weight,
            fake_weight=fake_weight,
            backend=self.backend,
        )

    @torch.no_grad()
    def _update(self, real_logits: Logits, fake_logits: Logits) -> None:
        means = batch_means([real_logits, fake_logits], self.backend)
        if means.numel() != 2 * self.real_mean.numel():
            raise ValueError(
                f"the logits are {means.numel()} tensors, real and fake; expected {2 * self.real_mean.numel()} for "
                f"{self.real_mean.numel()} discriminators"
            )
        if self.process_group is not None:
            torch.distributed.all_reduce(means.div_(self.process_group.size()), group=self.process_group)
        for buffer, now in zip((self.real_mean, self.fake_mean), means.to(self.real_mean.dtype).chunk(2), strict=True):
            buffer.copy_(torch.where(self.seen, torch.lerp(now, buffer, self.decay), now))
        self.seen.fill_(True)

    def static_case(self) -> tuple[Op, Case]:
        return OP, Case(torch.get_default_device().type, torch.get_default_dtype())

    def extra_repr(self) -> str:
        return f"weight={self.weight}, decay={self.decay}, discriminators={self.real_mean.numel()}"


def _preset(what: str, presets: dict[str, dict[str, Any]], name: str, options: dict[str, Any]) -> dict[str, Any]:
    if name not in presets:
        raise ValueError(f"{what} has no preset {name!r}; it has: {', '.join(map(repr, presets))}")
    return presets[name] | options


def _unusual(module: torch.nn.Module, usual: dict[str, Any]) -> str:
    """The options that are not the usual ones, as repr shows them."""
    options = ((name, getattr(module, name)) for name in usual)
    return "".join(f", {name}={option!r}" for name, option in options if option != usual[name])
