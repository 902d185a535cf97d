"""Text encoder and decoder over UTF-8 bytes: every language and script, no vocabulary."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

BYTES = 256  # byte 0 pads and, for the decoder, starts and ends a caption


def within(lengths: Tensor, steps: int) -> Tensor:
    """(B,) lengths to the mask (B, steps) of the steps inside them."""
    return torch.arange(steps, device=lengths.device) < lengths[:, None]


def pooled_rnn(rnn: torch.nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
    """Runs a bidirectional batch-first RNN on packed x: (B, T, I) and takes each unit's maximum over time: (B, 2H)."""
    packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
    hidden, _ = pad_packed_sequence(rnn(packed)[0], batch_first=True, padding_value=float("-inf"))
    return hidden.amax(1)


def written_bytes(text: Tensor, lengths: Tensor) -> Tensor:
    """The bytes of all captions, caption after caption, each with the 0 that ends it: (N,), N = sum(lengths) + B."""
    ended = torch.nn.functional.pad(text, (0, 1))
    return ended[within(lengths.to(text.device) + 1, ended.shape[1])]


class TextEncoder(torch.nn.Module):
    """Bytes to a code: embedding, a convolution over neighbouring bytes, packed bidirectional GRU, maximum over time.

    The convolution keeps every `stride`-th place, which makes the recurrence, whose steps cannot run side by side, so
    many times shorter.

    Input `text`: (B, T) int64 bytes, 0-padded; `lengths`: (B,) int64, each >= 1. Output: (B, code_size), each row
    normalised (LayerNorm). The code of a caption does not depend on how far the batch is padded.
    """

    def __init__(
        self, code_size: int, hidden_size: int = 128, embedding_size: int = 64, stride: int = 2, *, nn: Any = torch.nn
    ) -> None:
        super().__init__()
        self.stride = stride
        self.embedding = nn.Embedding(BYTES, embedding_size, padding_idx=0)
        self.neighbours = nn.Sequential(nn.Conv1d(embedding_size, hidden_size, 5, stride, padding=2), nn.ReLU())
        self.rnn = nn.GRU(hidden_size, hidden_size, batch_first=True, bidirectional=True)
        self.code = nn.Sequential(nn.Linear(2 * hidden_size, code_size), nn.LayerNorm(code_size))

    def forward(self, text: Tensor, lengths: Tensor) -> Tensor:
        x = self.neighbours(self.embedding(text).transpose(1, 2)).transpose(1, 2)
        return self.code(pooled_rnn(self.rnn, x, -(-lengths // self.stride)))


class TextWriter(torch.nn.Module):
    """What decodes a code to bytes."""

    def bytes_of(self, codes: Tensor, longest: int) -> Tensor:
        """The likeliest bytes of each code (B, code_size), one after the other: (B, longest) int64."""
        raise NotImplementedError

    @torch.no_grad()
    def write(self, codes: Tensor, longest: int = 64) -> list[str]:
        """The likeliest caption of each code (B, code_size), at most `longest` bytes."""
        return [bytes(row).split(b"\0")[0].decode(errors="ignore") for row in self.bytes_of(codes, longest).tolist()]


class TextDecoder(TextWriter):
    """A code to bytes: a packed GRU started from the code that sees the bytes so far and the code at each step."""

    def __init__(self, code_size: int, hidden_size: int = 128, embedding_size: int = 64, *, nn: Any = torch.nn) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, embedding_size)
        self.given = nn.Linear(code_size, embedding_size)
        self.start = nn.Sequential(nn.Linear(code_size, hidden_size), nn.Tanh())
        self.rnn = nn.GRU(embedding_size, hidden_size, batch_first=True)
        self.byte = nn.Linear(hidden_size, BYTES)

    def forward(self, codes: Tensor, text: Tensor, lengths: Tensor) -> Tensor:
        """Logits of each byte and of the end, given the code and the true bytes before it.

        `codes`: (B, code_size); `text`: (B, T) int64 bytes, 0-padded; `lengths`: (B,) int64. Output: (N, 256), one row
        for each of `written_bytes`; padding, which is most of a batch, gets none.
        """
        before = torch.nn.functional.pad(text, (1, 0))
        x = self.embedding(before) + self.given(codes)[:, None]
        packed = pack_padded_sequence(x, lengths.cpu() + 1, batch_first=True, enforce_sorted=False)
        hidden, _ = pad_packed_sequence(self.rnn(packed, self.start(codes)[None])[0], batch_first=True)
        return self.byte(hidden[within(lengths.to(hidden.device) + 1, hidden.shape[1])])

    def bytes_of(self, codes: Tensor, longest: int) -> Tensor:
        given, state = self.given(codes)[:, None], self.start(codes)[None]
        byte = torch.zeros(len(codes), 1, dtype=torch.int64, device=codes.device)
        written = [byte[:, :0]]
        for _ in range(longest):
            hidden, state = self.rnn(self.embedding(byte) + given, state)
            byte = self.byte(hidden).argmax(2)
            written.append(byte)
        return torch.cat(written, 1)
