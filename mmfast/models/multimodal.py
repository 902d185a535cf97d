"""All encoders, decoders and the generator in one module."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfast.models.adversaries import ConditionalGenerator
from mmfast.models.image import ImageDecoder, ImageEncoder
from mmfast.models.speech import SpeechDecoder, SpeechEncoder
from mmfast.models.text import TextDecoder, TextEncoder, TextWriter

MODALITIES = ("image", "text", "speech")


def combine(codes: Tensor, present: Tensor) -> Tensor:
    """The mean of the codes of the modalities present.

    `codes`: (B, M, code_size), `present`: (B, M) bool. Output: (B, code_size); a row with nothing present is 0.
    Equivalent to: `codes[b][present[b]].mean(0)` for each b. What stands in `codes` where `present` is False, NaN
    included, has no influence.
    """
    kept = codes.masked_fill(~present[:, :, None], 0)
    return kept.sum(1) / present.sum(1).clamp(min=1)[:, None]


def spoken_rows(speech_lengths: Tensor) -> Tensor:
    """The rows (R,) int64 that have speech, by their lengths (B,) on the CPU; where none has, the first alone.

    So that every weight takes part in every step, as training in several processes wants it.
    """
    rows = speech_lengths.nonzero().squeeze(1)
    return rows if len(rows) else rows.new_zeros(1)


class Output(NamedTuple):
    """What one forward pass makes of B captions, of which those in rows `spoken` (R,) have speech, see spoken_rows."""

    codes: Tensor  # (B, 3, code_size): of image, text, speech; 0 where there is no speech
    present: Tensor  # (B, 3) bool
    spoken: Tensor  # (R,) int64
    condition: Tensor  # (B, code_size): the mean of the codes that the generator was given
    picture: Tensor  # (B, 3, size, size): G(noise, condition)
    image: Tensor  # (B, 3, size, size): the image decoder's
    text: Tensor  # (N, 256): the text decoder's logits of all bytes and ends, caption after caption
    speech: Tensor  # (R, F, mels): the speech decoder's


class Multimodal(torch.nn.Module):
    """Image, text (UTF-8 bytes) and speech (log-mel frames) to one code and back, and a picture from noise and code.

    `nn`: the namespace all layers come from, torch.nn or mmfast.nn; the state_dict is the same.
    `size`: side of the images, a power of two >= 8 (else ValueError). `mels`: values of one speech frame.
    """

    # Any modules that are called alike.
    encode_image: torch.nn.Module
    encode_text: torch.nn.Module
    encode_speech: torch.nn.Module
    decode_image: torch.nn.Module
    decode_text: TextWriter
    decode_speech: torch.nn.Module
    generator: torch.nn.Module

    def __init__(
        self, size: int = 32, mels: int = 40, code_size: int = 128, noise_size: int = 32, *, nn: Any = torch.nn
    ) -> None:
        super().__init__()
        self.code_size = code_size
        self.encode_image = ImageEncoder(code_size, size, nn=nn)
        self.encode_text = TextEncoder(code_size, nn=nn)
        self.encode_speech = SpeechEncoder(code_size, mels, nn=nn)
        self.decode_image = ImageDecoder(code_size, size, nn=nn)
        self.decode_text = TextDecoder(code_size, nn=nn)
        self.decode_speech = SpeechDecoder(code_size, mels, nn=nn)
        self.generator = ConditionalGenerator(noise_size, code_size, size, nn=nn)

    def encode(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Codes (B, 3, code_size) and `present` (B, 3) of a batch with images, text and, in some rows, speech."""
        image = self.encode_image(batch.images)
        text = self.encode_text(batch.text, batch.text_lengths)
        rows = spoken_rows(batch.speech_lengths)
        heard = (batch.speech_lengths > 0).to(image.device)
        said = self.encode_speech(batch.speech[rows.to(image.device)], batch.speech_lengths[rows].clamp(min=1))
        speech = torch.zeros_like(image).index_copy(0, rows.to(image.device), said.to(image.dtype))
        always = torch.ones_like(heard)
        codes = torch.stack([image, text.to(image.dtype), speech * heard[:, None]], 1)
        return codes, torch.stack([always, always, heard], 1)

    def forward(self, batch: Any, noise: Tensor, wanted: Tensor) -> Output:
        """Encodes, decodes and generates.

        `batch`: images (B, 3, size, size) in [-1, 1], text (B, T) int64, text_lengths (B,), speech (B, F, mels) and
        speech_lengths (B,), 0 where there is none. `noise`: (B, noise_size). `wanted`: (B, 3) bool, the modalities the
        generator may see; where none of those is present it sees the text.
        """
        codes, present = self.encode(batch)
        used = present & wanted
        used = torch.stack([used[:, 0], used[:, 1] | ~used.any(1), used[:, 2]], 1)
        condition = combine(codes, used)
        spoken = spoken_rows(batch.speech_lengths).to(codes.device)
        return Output(
            codes=codes,
            present=present,
            spoken=spoken,
            condition=condition,
            picture=self.generator(noise, condition),
            image=self.decode_image(codes[:, 0]),
            text=self.decode_text(codes[:, 1], batch.text, batch.text_lengths),
            speech=self.decode_speech(codes[spoken, 2], batch.speech.shape[1]),
        )
