"""The article's modules at its sizes, put together so that `mmfast train --preset article` can train them."""

from typing import Any

import torch
from torch import Tensor

from mmfast.models.article import Decoder, Discriminator, Encoder, Generator
from mmfast.models.multimodal import Multimodal
from mmfast.models.text import BYTES, TextWriter, within


def ending_together(x: Tensor, lengths: Tensor) -> Tensor:
    """Moves the padding of (B, T, ...) sequences from behind their ends to before their beginnings."""
    steps = torch.arange(x.shape[1], device=x.device)
    source = (steps - (x.shape[1] - lengths.to(x.device))[:, None]) % x.shape[1]
    return x.gather(1, source.view(*source.shape, *[1] * (x.dim() - 2)).expand_as(x))


class ImageSequences(torch.nn.Module):
    """Encoder(S * S, code_size) on a picture as the sequence of its three flattened colour planes."""

    def __init__(self, code_size: int, size: int, *, nn: Any = torch.nn) -> None:
        super().__init__()
        self.encoder = Encoder(size * size, code_size, nn=nn)

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(images.flatten(2))


class ImagePlanes(torch.nn.Module):
    """Decoder(code_size, S * S), three steps long: (B, code_size) to (B, 3, S, S)."""

    def __init__(self, code_size: int, size: int, *, nn: Any = torch.nn) -> None:
        super().__init__()
        self.size = size
        self.decoder = Decoder(code_size, size * size, nn=nn)

    def forward(self, codes: Tensor) -> Tensor:
        return self.decoder(codes, 3).view(-1, 3, self.size, self.size)


class ByteSequences(torch.nn.Module):
    """Encoder(256, code_size) on a caption's bytes, each as 256 numbers of which one is 1."""

    def __init__(self, code_size: int, *, nn: Any = torch.nn) -> None:
        super().__init__()
        self.encoder = Encoder(BYTES, code_size, nn=nn)

    def forward(self, text: Tensor, lengths: Tensor) -> Tensor:
        ones = torch.nn.functional.one_hot(text, BYTES) * within(lengths.to(text.device), text.shape[1])[:, :, None]
        weight = self.encoder.rnn.weight_ih_l0
        return self.encoder(ending_together(ones.to(weight.dtype), lengths))


class ByteDecoder(TextWriter):
    """Decoder(code_size, 256): logits of every byte and of the end, from the code alone."""

    def __init__(self, code_size: int, *, nn: Any = torch.nn) -> None:
        super().__init__()
        self.decoder = Decoder(code_size, BYTES, nn=nn)

    def forward(self, codes: Tensor, text: Tensor, lengths: Tensor) -> Tensor:
        """`codes`: (B, code_size); `text`: (B, T) int64 bytes; `lengths`: (B,). Output: (N, 256), as TextDecoder's."""
        made = self.decoder(codes, text.shape[1] + 1)
        return made[within(lengths.to(made.device) + 1, made.shape[1])]

    def bytes_of(self, codes: Tensor, longest: int) -> Tensor:
        return self.decoder(codes, longest).argmax(2)


class SpeechSequences(torch.nn.Module):
    """Encoder(mels, code_size) on log-mel frames."""

    def __init__(self, code_size: int, mels: int, *, nn: Any = torch.nn) -> None:
        super().__init__()
        self.encoder = Encoder(mels, code_size, nn=nn)

    def forward(self, speech: Tensor, lengths: Tensor) -> Tensor:
        return self.encoder(ending_together(speech, lengths))


class ArticleGenerator(Generator):
    """Generator(noise_size + code_size, S), with the noise's length as an attribute."""

    def __init__(self, noise_size: int, code_size: int, size: int, *, nn: Any = torch.nn) -> None:
        super().__init__(noise_size + code_size, size, nn=nn)
        self.noise_size = noise_size


class ArticleModel(Multimodal):
    """`Multimodal` of the article's Encoder, Decoder and Generator, as written; any size of image >= 4.

    The code is the hidden state after the last step; sequences of a batch therefore end together.
    """

    def __init__(
        self, size: int = 28, mels: int = 40, code_size: int = 128, noise_size: int = 32, *, nn: Any = torch.nn
    ) -> None:
        torch.nn.Module.__init__(self)
        self.code_size = code_size
        self.encode_image = ImageSequences(code_size, size, nn=nn)
        self.encode_text = ByteSequences(code_size, nn=nn)
        self.encode_speech = SpeechSequences(code_size, mels, nn=nn)
        self.decode_image = ImagePlanes(code_size, size, nn=nn)
        self.decode_text = ByteDecoder(code_size, nn=nn)
        self.decode_speech = Decoder(code_size, mels, nn=nn)
        self.generator = ArticleGenerator(noise_size, code_size, size, nn=nn)


class ArticleDiscriminator(Discriminator):
    """`Discriminator`, which judges the image alone, called as a conditional one is."""

    def forward(self, x: Tensor, codes: Tensor | None = None) -> Tensor:
        return super().forward(x)
