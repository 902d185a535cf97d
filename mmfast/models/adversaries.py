"""The two that are trained against each other: conditional generator and conditional discriminator."""

from typing import Any

import torch
from torch import Tensor

from mmfast.models.image import upsampling, widths


class ConditionalGenerator(torch.nn.Module):
    """ConvTranspose-BatchNorm-ReLU from noise and code to an image: x' = G(z, h).

    Input `noise`: (B, noise_size), `codes`: (B, code_size). Output: (B, 3, size, size) in (-1, 1).
    Source: Radford et al., "Unsupervised Representation Learning with Deep Convolutional GANs" (2016).
    """

    def __init__(self, noise_size: int, code_size: int, size: int, width: int = 48, *, nn: Any = torch.nn) -> None:
        super().__init__()
        self.noise_size = noise_size
        self.layers = upsampling(noise_size + code_size, size, width, nn)

    def forward(self, noise: Tensor, codes: Tensor) -> Tensor:
        return self.layers(torch.cat([noise, codes], dim=1)[:, :, None, None])


class ConditionalDiscriminator(torch.nn.Module):
    """One logit per image: is it real, and is it the image of this code?

    Spectrally normalised 4 x 4 stride-2 convolutions with LeakyReLU(0.2) to a feature vector f; the logit is
    linear(f) + <embed(h), f>.

    Input `images`: (B, 3, size, size), `codes`: (B, code_size). Output: logits (B,).
    Sources: Miyato and Koyama, "cGANs with Projection Discriminator" (2018); Miyato et al., "Spectral Normalization
    for Generative Adversarial Networks" (2018).
    """

    def __init__(self, code_size: int, size: int, width: int = 24, *, nn: Any = torch.nn) -> None:
        super().__init__()
        normalised = nn.utils.parametrizations.spectral_norm
        layers: list[torch.nn.Module] = []
        given = 3
        for made in widths(size, width, 4 * width):
            layers += [normalised(nn.Conv2d(given, made, 4, stride=2, padding=1)), nn.LeakyReLU(0.2)]
            given = made
        layers += [normalised(nn.Conv2d(given, given, 4)), nn.LeakyReLU(0.2), nn.Flatten()]
        self.features = nn.Sequential(*layers)
        self.real = normalised(nn.Linear(given, 1))
        self.matching = normalised(nn.Linear(code_size, given, bias=False))

    def forward(self, images: Tensor, codes: Tensor) -> Tensor:
        features = self.features(images)
        return self.real(features).squeeze(1) + (self.matching(codes) * features).sum(1)
