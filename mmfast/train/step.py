"""One training step: all reconstructions and the adversarial loss, optimised together."""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mmfast.models import ArticleDiscriminator, ArticleModel, ConditionalDiscriminator, Multimodal, Output
from mmfast.models.text import within, written_bytes
from mmfast.train.processes import ALONE, Processes, load_optimizer, load_weights, shard, spread, whole, whole_tree
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


def text_loss(logits: Tensor, text: Tensor, lengths: Tensor, processes: Processes = ALONE) -> Tensor:
    """Nats per byte, ends counted. `logits`: (N, 256) of TextDecoder, `text`: (B, T), `lengths`: (B,)."""
    bytes = written_bytes(text, lengths)
    return processes.portion(functional.cross_entropy(logits, bytes, reduction="sum"), logits.new_tensor(len(bytes)))


def speech_loss(made: Tensor, true: Tensor, lengths: Tensor, processes: Processes = ALONE) -> Tensor:
    """Mean absolute error over the frames inside the lengths; 0 without any. `made`, `true`: (R, F, mels)."""
    inside = within(lengths.to(made.device), made.shape[1])
    summed = (made - true).abs().sum(2).masked_fill(~inside, 0).sum() / made.shape[2]
    return processes.portion(summed, inside.sum().to(made.dtype))


def alignment_loss(output: Output, pictures: Tensor, processes: Processes = ALONE, temperature: float = 0.1) -> Tensor:
    """Draws text and speech codes to the code of their own image, away from those of the batch's other pictures.

    `pictures`: (B,) int64, which picture each row shows; rows of the same picture are no rivals, rows of other
    processes are. Source: van den Oord et al., "Representation Learning with Contrastive Predictive Coding" (2018).
    """
    images, texts, speeches = functional.normalize(output.codes, dim=2).unbind(1)
    heard = output.present[:, 2]
    total = _contrast(texts, images, pictures, torch.ones_like(heard), processes, temperature)
    return total + _contrast(speeches, images, pictures, heard, processes, temperature)


def _contrast(
    a: Tensor, b: Tensor, pictures: Tensor, there: Tensor, processes: Processes, temperature: float
) -> Tensor:
    rows = torch.arange(len(a), device=a.device)
    own = (len(a) * processes.rank + rows)[:, None]
    twins = pictures[:, None] == processes.gathered(pictures)[None, :]
    barred = (twins | ~processes.gathered(there)[None, :]).scatter(1, own, False)
    losses = torch.zeros_like(a[:, 0])
    for queries, keys in ((a, b), (b, a)):
        scores = (queries @ processes.gathered(keys).T / temperature).masked_fill(barred, float("-inf"))
        losses = losses + functional.cross_entropy(scores, own[:, 0], reduction="none") / 2
    return processes.portion((losses * there).sum(), there.sum().to(losses.dtype))


class Step:
    """Model, discriminator, their optimizers and the averaged weights; a call is one training step.

    `nn`: the namespace of all layers; `adversarial`: an object with .discriminator(real, fake) and .generator(fake).
    `processes`: that train together, each with its rows of the batch.
    """

    def __init__(self, settings: Settings, nn: Any, adversarial: Any, processes: Processes = ALONE) -> None:
        self.settings = settings
        self.adversarial = adversarial
        self.processes = processes
        self.device = torch.device(settings.device)
        self.model, self.discriminator = (net.to(self.device) for net in build(settings, nn))
        self.averaged = copy.deepcopy(self.model).requires_grad_(False).eval()
        if settings.compile:
            compile_parts(self.model, self.discriminator)
        self.sharded = settings.fsdp and processes.count > 1
        if self.sharded:
            shard(self.averaged, processes)
        share = shard if self.sharded else spread
        self._forward, self._judge = share(self.model, processes), share(self.discriminator, processes)
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=settings.learning_rate, betas=(0.5, 0.99), fused=True
        )
        self.discriminator_optimizer = torch.optim.Adam(
            self.discriminator.parameters(), lr=settings.discriminator_rate, betas=(0.5, 0.99), fused=True
        )
        self.half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(settings.amp or "")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.amp == "fp16")
        self.done = 0

    def __call__(self, batch: Any, pictures: Tensor, noise: Tensor, wanted: Tensor) -> Tensor:
        """Updates all weights once. Returns the LOSSES of the joined batch, detached: (8,) float32.

        `pictures`: (B,) int64, which picture each row shows; `noise`, `wanted`: see Multimodal.forward. All are of
        this process's rows.
        """
        self._set_rates()
        batch = batch.to(self.device)
        pictures, noise, wanted = (x.to(self.device, non_blocking=True) for x in (pictures, noise, wanted))
        with self._autocast():
            output = self._forward(batch, noise, wanted)
        output = Output(*(x.float() if x.dtype == self.half else x for x in output))
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
        self.scaler.scale(total).backward()
        losses["gradient"] = self._update_model()
        losses["discriminator"] = discriminator
        self.done += 1
        self._average()
        return self.processes.mean(torch.stack([losses[name].detach() for name in LOSSES]))

    def _losses(self, output: Output, batch: Any, pictures: Tensor) -> dict[str, Tensor]:
        spoken, joined = output.spoken, self.processes
        heard = batch.speech_lengths[spoken.cpu()]
        return {
            "image": image_loss(output.image, batch.images),
            "text": text_loss(output.text, batch.text, batch.text_lengths, joined),
            "speech": speech_loss(output.speech, batch.speech[spoken], heard, joined),
            "alignment": alignment_loss(output, pictures, joined),
            "picture": image_loss(output.picture, batch.images),
        }

    def _train_discriminator(self, real: Tensor, fake: Tensor, condition: Tensor) -> Tensor:
        with self._autocast():
            logits = self._judge(torch.cat([real, fake]), torch.cat([condition, condition]))
        loss = self.adversarial.discriminator(*logits.to(real.dtype).chunk(2))
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.discriminator_optimizer)
        return loss

    def _generator_loss(self, fake: Tensor, condition: Tensor) -> Tensor:
        # Frozen, so that no gradient of the discriminator's weights is computed only to be thrown away.
        self.discriminator.requires_grad_(False)
        with self._autocast():
            logits = self.discriminator(fake, condition)
        self.discriminator.requires_grad_(True)
        return self.adversarial.generator(logits.to(fake.dtype))

    def _update_model(self) -> Tensor:
        """The optimizer's step on clipped gradients; returns their norm before."""
        self.scaler.unscale_(self.optimizer)
        norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), 5.0))
        self.scaler.step(self.optimizer)
        if self.scaler.is_enabled():
            # The scaler tries factors until one is too large; that step is left out, and its norm says nothing.
            norm = norm.nan_to_num(0, 0, 0)
        self.scaler.update()
        return norm

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.half, enabled=self.half is not None)

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
        torch._foreach_lerp_(list(self.averaged.parameters()), list(self.model.parameters()), 1 - decay)
        for kept, latest in zip(self.averaged.buffers(), self.model.buffers(), strict=True):
            kept.copy_(latest)

    def drawing_model(self) -> Multimodal:
        """The averaged model, whole in every process, in eval mode."""
        if not self.sharded:
            return self.averaged
        model = build(self.settings, torch.nn)[0].to(self.device).requires_grad_(False).eval()
        model.load_state_dict(whole_tree(self.averaged.state_dict()))
        return model

    def state_dict(self) -> dict[str, Any]:
        """Everything, whole in every process: the same for any number of processes, sharded or not."""
        state = {
            "step": self.done,
            "scaler": self.scaler.state_dict(),
            **{name: getattr(self, name).state_dict() for name in ("model", "averaged", "discriminator")},
            **{name: getattr(self, name).state_dict() for name in ("optimizer", "discriminator_optimizer")},
        }
        return whole_tree(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["step"]
        # Copied, because an optimizer keeps the tensors it is given, and the next one would update the same.
        state = copy.deepcopy(state)
        self.scaler.load_state_dict(state["scaler"])
        for name in ("model", "averaged", "discriminator"):
            load_weights(getattr(self, name), state[name])
        for name in ("optimizer", "discriminator_optimizer"):
            load_optimizer(getattr(self, name), state[name])

    def is_finite(self) -> bool:
        """Whether every weight of model and discriminator is a finite number."""
        weights = [*self.model.parameters(), *self.discriminator.parameters()]
        return bool(torch.stack([whole(weight.detach().norm()) for weight in weights]).isfinite().all())


def build(settings: Settings, nn: Any) -> tuple[Any, Any]:
    """The preset's model and discriminator, with new weights, of layers from the namespace `nn`."""
    sizes = (settings.size, settings.mels, settings.code_size, settings.noise_size)
    if settings.preset == "article":
        return ArticleModel(*sizes, nn=nn), ArticleDiscriminator(settings.size, nn=nn)
    return Multimodal(*sizes, nn=nn), ConditionalDiscriminator(settings.code_size, settings.size, nn=nn)


def compile_parts(*nets: torch.nn.Module) -> None:
    """Has torch.compile compile, at its first call, each chain of at least three layers in `nets`, in place.

    What packs sequences of many lengths stays as it is: no shape of it comes twice.
    """
    for net in nets:
        for part in net.modules():
            if isinstance(part, torch.nn.Sequential) and len(part) >= 3:
                part.compile(dynamic=False, **_OF_ITS_OWN)


# All parts are one function to Dynamo, which would give up at 8 graphs; each has as many as it has lengths of speech.
_OF_ITS_OWN: dict[str, Any] = {
    name: value
    for name, value in {"isolate_recompiles": True, "recompile_limit": 64}.items()
    if name in inspect.signature(torch.compile).parameters
}
