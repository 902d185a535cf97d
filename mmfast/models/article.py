"""The article's own modules, at its constructors, with its slips corrected (each docstring says which)."""

from typing import Any

import torch
from torch import Tensor


class Encoder(torch.nn.Module):
    """A recurrent encoder: h = E(x), the hidden state after the last step.

    Equivalent to: `torch.nn.RNN(input_size, hidden_size, batch_first=True)(x)[1][-1]`.

    Input `x`: (B, T, input_size), float. Output: (B, hidden_size), in (-1, 1).
    The article uses it at (784, 128), on sequences of flattened 28 x 28 images.
    """

    def __init__(self, input_size: int, hidden_size: int, *, nn: Any = torch.nn) -> None:
        super().__init__()
        self.rnn = nn.RNN(input_size, hidden_size, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[1][-1]


class Decoder(torch.nn.Module):
    """A recurrent decoder: x' = D(h), a sequence from one code.

    The code is fed to an RNN at every step and each hidden state is mapped to one element of the sequence. The article
    decodes a single step; `steps` makes the result as long as what was encoded.

    Input `code`: (B, hidden_size), float; `steps` >= 1. Output: (B, steps, output_size), unbounded.
    """

    def __init__(self, hidden_size: int, output_size: int, *, nn: Any = torch.nn) -> None:
        super().__init__()
        self.rnn = nn.RNN(hidden_size, hidden_size, batch_first=True)
        self.linear = nn.Linear(hidden_size, output_size)

    def forward(self, code: Tensor, steps: int = 1) -> Tensor:
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        hidden, _ = self.rnn(code.unsqueeze(1).expand(-1, steps, -1))
        return self.linear(hidden)


class Generator(torch.nn.Module):
    """A multilayer perceptron from noise, or noise and a representation, to an image: x' = G(z, h).

    Linear 256, ReLU, linear 512, ReLU, linear img_size^2 * 3, Tanh. `z_size` is the length of everything that goes in:
    noise and, where it is given, the code.

    Input `z`: (N, noise), `h`: (N, code) or None, with noise + code = z_size. Output: (N, 3, S, S), in (-1, 1).
    The article's last layer has img_size * img_size * 3 outputs, and its `view` asks for another count of elements, so
    it cannot run; here the view is the image's own shape.
    """

    def __init__(self, z_size: int, img_size: int, *, nn: Any = torch.nn) -> None:
        super().__init__()
        self.img_size = img_size
        self.layers = nn.Sequential(
            nn.Linear(z_size, 256),
            nn.ReLU(),
            nn.Linear(256, 512),
            nn.ReLU(),
            nn.Linear(512, img_size * img_size * 3),
            nn.Tanh(),
        )

    def forward(self, z: Tensor, h: Tensor | None = None) -> Tensor:
        given = z if h is None else torch.cat([z, h], dim=1)
        return self.layers(given).view(-1, 3, self.img_size, self.img_size)


class Discriminator(torch.nn.Module):
    """Convolutions from an image to one logit; its sigmoid is p(real).

    4 x 4 convolutions of stride 2 with 64, 128, ... channels and LeakyReLU(0.2) halve the image until its side is at
    most 4; a last convolution as large as what is left gives the logit.

    Input `x`: (N, 3, img_size, img_size), float. Output: logits (N,), also for N = 1, where a bare `squeeze()` would
    give a scalar. The article ends in a sigmoid; logits are what a numerically safe loss takes, and `probability`
    gives the article's number.
    """

    def __init__(self, img_size: int, *, nn: Any = torch.nn) -> None:
        super().__init__()
        if img_size < 4:
            raise ValueError(f"img_size must be at least 4, got {img_size}")
        layers: list[torch.nn.Module] = []
        channels, wider, side = 3, 64, img_size
        while side > 4 or not layers:
            layers += [nn.Conv2d(channels, wider, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
            channels, wider, side = wider, wider * 2, side // 2
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, side))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).flatten()

    def probability(self, x: Tensor) -> Tensor:
        """p(real) of each image: `x` (N, 3, img_size, img_size) to (N,), in [0, 1]."""
        return self(x).sigmoid()
