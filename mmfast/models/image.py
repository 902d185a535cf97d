"""Image encoder and decoder: strided convolutions in, transposed convolutions out."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def halvings(size: int) -> int:
    """How many times an image of side `size` is halved before it is 4 x 4. ValueError unless a power of two >= 8."""
    if size < 8 or size & (size - 1):
        raise ValueError(f"the image size must be a power of two and at least 8, got {size}")
    return size.bit_length() - 3


def widths(size: int, width: int, widest: int) -> list[int]:
    """Channels after each halving: `width`, doubled each time, at most `widest`."""
    return [min(width << i, widest) for i in range(halvings(size))]


def upsampling(code_size: int, size: int, width: int, nn: Any) -> torch.nn.Sequential:
    """(B, code_size, 1, 1) to (B, 3, size, size) in (-1, 1): ConvTranspose-BatchNorm-ReLU, doubling from 4 x 4."""
    channels = widths(size, width, 4 * width)[::-1]
    layers: list[torch.nn.Module] = [
        nn.ConvTranspose2d(code_size, channels[0], 4, bias=False),
        nn.BatchNorm2d(channels[0]),
        nn.ReLU(),
    ]
    for given, made in pairwise(channels):
        layers += [
            nn.ConvTranspose2d(given, made, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(made),
            nn.ReLU(),
        ]
    layers += [nn.ConvTranspose2d(channels[-1], 3, 4, stride=2, padding=1), nn.Tanh()]
    return nn.Sequential(*layers)


class ImageEncoder(torch.nn.Module):
    """Convolution-BatchNorm-LeakyReLU of stride 2 down to 4 x 4, then one linear layer to the code.

    Input `images`: (B, 3, size, size) in [-1, 1]. Output: (B, code_size), each row normalised (LayerNorm).
    """

    def __init__(self, code_size: int, size: int, width: int = 24, *, nn: Any = torch.nn) -> None:
        super().__init__()
        layers: list[torch.nn.Module] = []
        given = 3
        for made in widths(size, width, 8 * width):
            layers += [
                nn.Conv2d(given, made, 4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(made),
                nn.LeakyReLU(0.2),
            ]
            given = made
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(given * 16, code_size), nn.LayerNorm(code_size))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class ImageDecoder(torch.nn.Module):
    """Transposed convolutions from a code to an image: (B, code_size) to (B, 3, size, size) in (-1, 1)."""

    def __init__(self, code_size: int, size: int, width: int = 24, *, nn: Any = torch.nn) -> None:
        super().__init__()
        self.layers = upsampling(code_size, size, width, nn)

    def forward(self, codes: Tensor) -> Tensor:
        return self.layers(codes[:, :, None, None])
