"""Text encoder and decoder over UTF-8 bytes: every language and script, no vocabulary."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

BYTES = 256  # byte 0 pads and, for the decoder, starts and ends a caption


def within(lengths: Tensor, steps: int) -> Tensor:
    """(B,) lengths to the mask (B, steps) of the steps inside them."""
    return torch.arange(steps, device=lengths.device) < lengths[:, None]


class Packing(NamedTuple):
    """Where N steps of B sequences lie in packed data, which is as torch's PackedSequence orders it.

    What a layer needs is gathered by these indices straight from and to where it is used: padding is never computed,
    and pad_packed_sequence, whose backward copies the whole padded batch once for each length, not called.
    """

    row: Tensor  # (N,) int64: of which sequence
    step: Tensor  # (N,) int64: which step of it
    batch_sizes: Tensor  # (T,) int64, on the CPU: how many sequences have a step t
    longest_first: Tensor  # (B,) int64

    @classmethod
    def of(cls, lengths: Tensor, device: torch.device) -> "Packing":
        """For `lengths` (B,) int64 on the CPU, each >= 1; indices on `device`."""
        order = lengths.argsort(descending=True, stable=True)
        there = torch.arange(int(lengths[order[0]]))[:, None] < lengths[order]
        step, place = there.nonzero(as_tuple=True)
        return cls(order[place].to(device), step.to(device), there.sum(1), order.to(device))

    def gather(self, padded: Tensor) -> Tensor:
        """(B, T, ...) to packed (N, ...)."""
        return padded.flatten(0, 1).index_select(0, self.row * padded.shape[1] + self.step)

    def sequence(self, x: Tensor) -> PackedSequence:
        """Packed (N, I) as a recurrent layer takes it."""
        return PackedSequence(x, self.batch_sizes, self.longest_first, self.longest_first.argsort())

    def by_row(self, x: Tensor) -> Tensor:
        """Packed (N, H), sequence after sequence."""
        return x.index_select(0, (self.row * len(self.batch_sizes) + self.step).argsort())

    def maximum(self, x: Tensor) -> Tensor:
        """Packed (N, H) to each sequence's maximum over its steps: (B, H)."""
        least = x.new_zeros(len(self.longest_first), x.shape[1])
        return least.scatter_reduce(0, self.row[:, None].expand_as(x), x, "amax", include_self=False)


def written_bytes(text: Tensor, lengths: Tensor) -> Tensor:
    """The bytes of all captions, caption after caption, each with the 0 that ends it: (N,), N = sum(lengths) + B."""
    ended = torch.nn.functional.pad(text, (0, 1))
    return ended[within(lengths.to(text.device) + 1, ended.shape[1])]


class TextEncoder(torch.nn.Module):
    """Bytes to a code: embedding, a linear layer over neighbouring bytes, packed bidirectional GRU, maximum over time.

    The linear layer keeps every `stride`-th place, which makes the recurrence, whose steps cannot run side by side, so
    many times shorter. It is a convolution over `WINDOW` bytes at the places that a caption has.

    Input `text`: (B, T) int64 bytes, 0-padded; `lengths`: (B,) int64, each >= 1. Output: (B, code_size), each row
    normalised (LayerNorm). The code of a caption does not depend on how far the batch is padded.
    """

    WINDOW = 5

    def __init__(
        self, code_size: int, hidden_size: int = 128, embedding_size: int = 64, stride: int = 2, *, nn: Any = torch.nn
    ) -> None:
        super().__init__()
        self.stride = stride
        self.embedding = nn.Embedding(BYTES, embedding_size, padding_idx=0)
        self.neighbours = nn.Sequential(nn.Linear(self.WINDOW * embedding_size, hidden_size), nn.ReLU())
        self.rnn = nn.GRU(hidden_size, hidden_size, batch_first=True, bidirectional=True)
        self.code = nn.Sequential(nn.Linear(2 * hidden_size, code_size), nn.LayerNorm(code_size))

    def forward(self, text: Tensor, lengths: Tensor) -> Tensor:
        packing = Packing.of(-(-lengths.cpu() // self.stride), text.device)
        beside = self.WINDOW // 2
        windows = torch.nn.functional.pad(text, (beside, beside)).unfold(1, self.WINDOW, self.stride)
        x = self.neighbours(self.embedding(packing.gather(windows)).flatten(1))
        return self.code(packing.maximum(self.rnn(packing.sequence(x))[0].data))


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
        packing = Packing.of(lengths.cpu() + 1, text.device)
        before = packing.gather(torch.nn.functional.pad(text, (1, 0)))
        x = self.embedding(before) + self.given(codes).index_select(0, packing.row)
        hidden = self.rnn(packing.sequence(x), self.start(codes)[None])[0].data
        return self.byte(packing.by_row(hidden))

    def bytes_of(self, codes: Tensor, longest: int) -> Tensor:
        given, state = self.given(codes)[:, None], self.start(codes)[None]
        byte = torch.zeros(len(codes), 1, dtype=torch.int64, device=codes.device)
        written = [byte[:, :0]]
        for _ in range(longest):
            hidden, state = self.rnn(self.embedding(byte) + given, state)
            byte = self.byte(hidden).argmax(2)
            written.append(byte)
        return torch.cat(written, 1)
