"""Samples over time: what a few held-out captions are drawn as, from the first steps to the last."""

from typing import Any

import torch
from torch import Tensor

from mmfast.models import MODALITIES, Multimodal
from mmfast.train import data
from mmfast.train.settings import Settings

SHOWN = 6
FIRST = 25


class Strip:
    """Pictures of the same captions and noise after FIRST steps, twice as many, and so on; kept in the checkpoint."""

    def __init__(self, settings: Settings, dataset: data.Dataset) -> None:
        from mmfast.train.evaluate import shown

        generator = torch.Generator().manual_seed(settings.seed)
        self.captions = shown(dataset, generator, SHOWN, spoken=False)
        self.batch = dataset.batch(self.captions)
        self.noise = torch.randn(len(self.captions), settings.noise_size, generator=generator)
        self.steps: list[int] = []
        self.frames: list[Tensor] = []

    @staticmethod
    def due(step: int) -> bool:
        """Whether step `step` is drawn."""
        times, rest = divmod(step, FIRST)
        return times > 0 and rest == 0 and times & (times - 1) == 0

    @torch.no_grad()
    def draw(self, step: int, model: Multimodal) -> None:
        """Adds the pictures that `model`, in eval mode, makes after `step` steps."""
        device = next(model.parameters()).device
        codes = model.encode(self.batch.to(device))[0][:, MODALITIES.index("text")]
        made = model.generator(self.noise.to(device), codes).cpu()
        self.steps.append(step)
        self.frames.append(((made.clamp(-1, 1) + 1) * 127.5).round().byte())

    def state_dict(self) -> dict[str, Any]:
        return {"steps": list(self.steps), "frames": list(self.frames)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.frames = list(state["steps"]), list(state["frames"])
