"""Speech encoder and decoder over log-mel frames."""

from typing import Any

import torch
from torch import Tensor

from mmfast.models.text import Packing, within


class SpeechEncoder(torch.nn.Module):
    """Log-mel frames to a code: two convolutions of stride 2, packed bidirectional GRU, maximum over time.

    The convolutions leave a quarter of the frames, so the recurrence, which cannot run its steps side by side, is four
    times shorter.

    Input `speech`: (B, F, mels), 0-padded; `lengths`: (B,) int64 frames, each >= 1. Output: (B, code_size), each row
    normalised (LayerNorm). The code does not depend on how far the batch is padded.
    """

    def __init__(self, code_size: int, mels: int, hidden_size: int = 96, *, nn: Any = torch.nn) -> None:
        super().__init__()
        self.halve = nn.ModuleList(
            [
                nn.Conv1d(mels, hidden_size, 5, stride=2, padding=2),
                nn.Conv1d(hidden_size, hidden_size, 5, stride=2, padding=2),
            ]
        )
        self.relu = nn.ReLU()
        self.rnn = nn.GRU(hidden_size, hidden_size, batch_first=True, bidirectional=True)
        self.code = nn.Sequential(nn.Linear(2 * hidden_size, code_size), nn.LayerNorm(code_size))

    def forward(self, speech: Tensor, lengths: Tensor) -> Tensor:
        x = speech.transpose(1, 2)
        for convolution in self.halve:
            lengths = (lengths + 1) // 2
            x = self.relu(convolution(x))
            x = x * within(lengths.to(x.device), x.shape[2])[:, None]
        packing = Packing.of(lengths.cpu(), speech.device)
        return self.code(packing.maximum(self.rnn(packing.sequence(packing.gather(x.transpose(1, 2))))[0].data))


class SpeechDecoder(torch.nn.Module):
    """A code to log-mel frames: the code at every eighth frame beside that frame's place in time, then three
    ConvTranspose1d-BatchNorm-ReLU that double the frames.

    Input `codes`: (B, code_size), `frames`: how many to make. Output: (B, frames, mels).
    """

    PLACES = 16  # sines and cosines that tell a frame's place in time

    def __init__(self, code_size: int, mels: int, width: int = 64, *, nn: Any = torch.nn) -> None:
        super().__init__()
        # Two layers, for what is said when is no sum of what is said and when.
        self.start = nn.Sequential(
            nn.Linear(code_size + self.PLACES, 4 * width), nn.ReLU(), nn.Linear(4 * width, 2 * width), nn.ReLU()
        )
        layers: list[torch.nn.Module] = []
        for given, made in ((2 * width, 2 * width), (2 * width, width), (width, width)):
            layers += [
                nn.ConvTranspose1d(given, made, 4, stride=2, padding=1, bias=False),
                nn.BatchNorm1d(made),
                nn.ReLU(),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv1d(width, mels, 3, padding=1))

    def forward(self, codes: Tensor, frames: int) -> Tensor:
        steps = -(-frames // 8)
        place = self.places(steps, codes)
        x = torch.cat([codes[:, None].expand(-1, steps, -1), place.expand(len(codes), -1, -1)], dim=2)
        return self.layers(self.start(x).transpose(1, 2))[:, :, :frames].transpose(1, 2)

    def places(self, steps: int, like: Tensor) -> Tensor:
        """(steps, PLACES): sines and cosines of the step at periods from 4 to 512 steps."""
        periods = 4 * 2 ** torch.arange(self.PLACES // 2, device=like.device, dtype=like.dtype)
        turns = torch.arange(steps, device=like.device, dtype=like.dtype)[:, None] / periods
        return torch.cat([(2 * torch.pi * turns).sin(), (2 * torch.pi * turns).cos()], dim=1)
