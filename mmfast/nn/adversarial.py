"""The adversarial loss, feature matching and LeCam's regulariser as modules."""

from __future__ import annotations

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

        In place of its criterion, `criterion = mmfast.nn.AdversarialLoss.preset(name)`, and in the two steps
        `criterion.discriminator(real_logits, fake_logits)` and `criterion.generator(fake_logits)`, all on raw logits:
        take a final Sigmoid out of the discriminator. The fake logits of the discriminator's step are those of detached
        samples, as ever. What each program adds to it:

        "dcgan" (pytorch/examples, BCELoss after a Sigmoid; Radford et al., arXiv:1511.06434): nothing.
        "pix2pix" (Isola et al., arXiv:1611.07004): the discriminator's loss is halved; `l1 * 100`.
        "cyclegan" (Zhu et al., arXiv:1703.10593): least squares, the discriminator's loss is halved; cycle losses.
        "hifigan" (Kong et al., arXiv:2010.05646): least squares, summed over all discriminators; feature matching by
            `FeatureMatchingLoss.preset("hifigan")`; `mel * 45`.
        "dac" (Kumar et al., arXiv:2306.06546): the same; `FeatureMatchingLoss.preset("dac")`, doubled in its settings.
        "audiocraft" (Copet et al., arXiv:2306.05284; its settings for EnCodec): hinge, with generator -mean, the mean
            over the discriminators of one adversary; `FeatureMatchingLoss.preset("audiocraft")`; all balanced by
            `LossBalancer`.
        "encodec" (Défossez et al., arXiv:2210.13438, section 3.4): the same for the discriminator; the paper's
            generator is relu(1 - x), its feature matching the relative `FeatureMatchingLoss.preset("encodec")`.
        "vqgan" (Esser et al., arXiv:2012.09841): hinge, the discriminator's loss is halved; the generator's is weighted
            by `mmfast.functional.adaptive_weight`.
        "monai" (PatchAdversarialLoss with its defaults; Pinaya et al., arXiv:2307.15208): least squares after
            LeakyReLU(0.05), the mean over the discriminators; the sum of its two calls, for real and fake.
        "stylegan2" (Karras et al., arXiv:1912.04958): `mmfast.functional.r1_penalty(..., every=16)`.
        "r3gan" (Huang et al., arXiv:2501.05441): relativistic pairs; `r1_penalty` and `r2_penalty` in each step; the
            generator's step needs the real logits: `criterion.generator(fake_logits, real_logits)`.
        "biggan", "studiogan" (Brock et al., arXiv:1809.11096; StudioGAN's settings for it): hinge.
        "mimicry" (torch-mimicry's ns losses; Lee and Town, arXiv:2005.02494): its generator takes log(sigmoid + 1e-8),
            which differs below -15, where its gradient vanishes; this one is exact.
        "torchgan" (its minimax losses, nonsaturating; Pal and Das, arXiv:1909.03410): label smoothing by `smoothing=`.
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
        shown = f"{self.mode!r}, scale={self.scale}"
        if self.generator_scale != self.scale:
            shown += f", generator_scale={self.generator_scale}"
        if self.across != "sum":
            shown += f", across={self.across!r}"
        return shown


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
        detach: bool = True,
        relative: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.distance = distance
        self.scale = scale
        self.across = across
        self.detach = detach
        self.relative = relative
        self.backend = backend

    @classmethod
    def preset(cls, name: str, **options: Any) -> FeatureMatchingLoss:
        """The loss of a known program; options: those of the constructor, to change some.

        In place of its loops, `features = mmfast.nn.FeatureMatchingLoss.preset(name)` and in the generator's step
        `features(real_maps, fake_maps)` with the lists that the discriminators return.

        "hifigan": twice the sum of all maps' mean absolute differences; the real side gets a gradient, too.
        "dac": the plain sum, the real side detached.
        "audiocraft": the mean over a discriminator's maps, then over the discriminators; the real side gets a gradient
            (its discriminator's own is switched off there).
        "encodec": the paper's: relative to the mean magnitude of the real side, the mean over maps and discriminators
            (arXiv:2210.13438, equation 2).
        """
        return cls(**_preset("FeatureMatchingLoss", _FEATURE_PRESETS, name, options))

    def forward(self, real_maps: Logits, fake_maps: Logits, *, sample_weight: Tensor | None = None) -> Tensor:
        return F.feature_matching(
            real_maps,
            fake_maps,
            distance=self.distance,
            scale=self.scale,
            across=self.across,
            sample_weight=sample_weight,
            detach=self.detach,
            relative=self.relative,
            backend=self.backend,
        )

    def static_case(self) -> tuple[Op, Case]:
        return OP, Case(torch.get_default_device().type, torch.get_default_dtype())

    def extra_repr(self) -> str:
        return f"{self.distance!r}, scale={self.scale}, across={self.across!r}, relative={self.relative}"


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
