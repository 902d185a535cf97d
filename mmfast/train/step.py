"""One training step: all reconstructions and the adversarial loss, optimised together."""

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mmfast.models import ConditionalDiscriminator, Multimodal, Output
from mmfast.models.text import within, written_bytes
from mmfast.train.settings import Settings

LOSSES = ("image", "text", "speech", "alignment", "picture", "generator", "discriminator", "gradient")


class PlainHinge:
    """The hinge adversarial loss in plain torch, the yardstick of mmfast.nn.AdversarialLoss("hinge").

    Source: Lim and Ye, "Geometric GAN" (2017).
    """

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return functional.relu(1 - real).mean() + functional.relu(1 + fake).mean()

    def generator(self, fake: Tensor) -> Tensor:
        return -fake.mean()


def image_loss(made: Tensor, true: Tensor) -> Tensor:
    """L1 + mean square: L1 for clean colours, the square against a few far-off pixels."""
    return functional.l1_loss(made, true) + functional.mse_loss(made, true)


def text_loss(logits: Tensor, text: Tensor, lengths: Tensor) -> Tensor:
    """Nats per byte, ends counted. `logits`: (N, 256) of TextDecoder, `text`: (B, T), `lengths`: (B,)."""
    return functional.cross_entropy(logits, written_bytes(text, lengths))


def speech_loss(made: Tensor, true: Tensor, lengths: Tensor) -> Tensor:
    """Mean absolute error over the frames inside the lengths; 0 without any. `made`, `true`: (R, F, mels)."""
    if not len(made):
        return made.sum()
    inside = within(lengths.to(made.device), made.shape[1])
    return functional.l1_loss(made[inside], true[inside])


def alignment_loss(output: Output, pictures: Tensor, temperature: float = 0.1) -> Tensor:
    """Draws text and speech codes to the code of their own image, away from those of the batch's other pictures.

    `pictures`: (B,) int64, which picture each row shows; rows of the same picture are no rivals.
    Source: van den Oord et al., "Representation Learning with Contrastive Predictive Coding" (2018).
    """
    images, texts, speeches = functional.normalize(output.codes, dim=2).unbind(1)
    total = _contrast(texts, images, pictures, pictures, temperature)
    if len(output.spoken):
        heard = pictures[output.spoken]
        total = total + _contrast(speeches[output.spoken], images[output.spoken], heard, heard, temperature)
    return total


def _contrast(a: Tensor, b: Tensor, of_a: Tensor, of_b: Tensor, temperature: float) -> Tensor:
    rows = torch.arange(len(a), device=a.device)
    twins = (of_a[:, None] == of_b[None, :]).fill_diagonal_(False)
    scores = (a @ b.T / temperature).masked_fill(twins, float("-inf"))
    return (functional.cross_entropy(scores, rows) + functional.cross_entropy(scores.T, rows)) / 2


class Step:
    """Model, discriminator, their optimizers and the averaged weights; a call is one training step.

    `nn`: the namespace of all layers; `adversarial`: an object with .discriminator(real, fake) and .generator(fake).
    """

    def __init__(self, settings: Settings, nn: Any, adversarial: Any) -> None:
        self.settings = settings
        self.adversarial = adversarial
        self.model = Multimodal(settings.size, settings.mels, settings.code_size, settings.noise_size, nn=nn)
        self.discriminator = ConditionalDiscriminator(settings.code_size, settings.size, nn=nn)
        self.averaged = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=settings.learning_rate, betas=(0.5, 0.99), fused=True
        )
        self.discriminator_optimizer = torch.optim.Adam(
            self.discriminator.parameters(), lr=settings.discriminator_rate, betas=(0.5, 0.99), fused=True
        )
        self.done = 0

    def __call__(self, batch: Any, pictures: Tensor, noise: Tensor, wanted: Tensor) -> Tensor:
        """Updates all weights once. Returns the LOSSES, detached: (8,) float32.

        `pictures`: (B,) int64, which picture each row shows; `noise`, `wanted`: see Multimodal.forward.
        """
        self._set_rates()
        output = self.model(batch, noise, wanted)
        condition = output.condition.detach()
        discriminator = self._train_discriminator(batch.images, output.picture.detach(), condition)
        losses = self._losses(output, batch, pictures)
        losses["generator"] = self._generator_loss(output.picture, condition)
        weights = self.settings
        total = (
            weights.image_weight * losses["image"]
            + weights.text_weight * losses["text"]
            + weights.speech_weight * losses["speech"]
            + weights.alignment_weight * losses["alignment"]
            + weights.picture_weight * losses["picture"]
            + weights.adversarial_weight * losses["generator"]
        )
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        losses["gradient"] = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
        losses["discriminator"] = discriminator
        self.optimizer.step()
        self.done += 1
        self._average()
        return torch.stack([losses[name].detach() for name in LOSSES])

    def _losses(self, output: Output, batch: Any, pictures: Tensor) -> dict[str, Tensor]:
        spoken = output.spoken
        return {
            "image": image_loss(output.image, batch.images),
            "text": text_loss(output.text, batch.text, batch.text_lengths),
            "speech": speech_loss(output.speech, batch.speech[spoken], batch.speech_lengths[spoken]),
            "alignment": alignment_loss(output, pictures),
            "picture": image_loss(output.picture, batch.images),
        }

    def _train_discriminator(self, real: Tensor, fake: Tensor, condition: Tensor) -> Tensor:
        logits = self.discriminator(torch.cat([real, fake]), torch.cat([condition, condition]))
        loss = self.adversarial.discriminator(*logits.chunk(2))
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.discriminator_optimizer.step()
        return loss

    def _generator_loss(self, fake: Tensor, condition: Tensor) -> Tensor:
        # Frozen, so that no gradient of the discriminator's weights is computed only to be thrown away.
        self.discriminator.requires_grad_(False)
        loss = self.adversarial.generator(self.discriminator(fake, condition))
        self.discriminator.requires_grad_(True)
        return loss

    def _set_rates(self) -> None:
        # A function of the step alone: a run that is stopped by the clock goes on as if it had never stopped.
        warm = min(1.0, (self.done + 1) / self.settings.warmup)
        factor = warm / (1 + self.done / self.settings.half_life)
        for optimizer, rate in (
            (self.optimizer, self.settings.learning_rate),
            (self.discriminator_optimizer, self.settings.discriminator_rate),
        ):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(self.settings.average, (1 + self.done) / (10 + self.done))
        for mean, now in zip(self.averaged.parameters(), self.model.parameters(), strict=True):
            mean.lerp_(now, 1 - decay)
        for kept, latest in zip(self.averaged.buffers(), self.model.buffers(), strict=True):
            kept.copy_(latest)

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.done,
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "discriminator_optimizer": self.discriminator_optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["step"]
        # Copied, because an optimizer keeps the tensors it is given, and the next one would update the same.
        state = copy.deepcopy(state)
        for name in ("model", "averaged", "discriminator", "optimizer", "discriminator_optimizer"):
            getattr(self, name).load_state_dict(state[name])

    def is_finite(self) -> bool:
        """Whether every weight of model and discriminator is a finite number."""
        weights = [*self.model.parameters(), *self.discriminator.parameters()]
        return bool(torch.stack([weight.detach().norm() for weight in weights]).isfinite().all())
