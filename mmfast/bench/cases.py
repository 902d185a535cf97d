"""Layers of real models: the one list that tests, benchmarks and validation share.

A case builds its module from a namespace (torch.nn or mmfast.nn) and its inputs from a generator, so that rivals get
equal weights and equal data. It also counts the floating-point operations and the bytes that the work cannot do
without, which make the floor that a measured time is compared with.

Sources of the shapes: the models' published configurations, named in each case.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}

#: instead of a loss's mode: feature matching
FEATURES = "features"

#: what is measured of a layer or a loss; of a whole model it is a training step
PASSES = ("forward", "forward+backward", "double backward")
STEP = "training step"

OPS = ("rnn", "conv_transpose", "adversarial")

#: the probability of cases with zoneout; in evaluation it is a mean, with the same numbers for every contender
ZONEOUT = 0.1


@dataclass(frozen=True)
class Work:
    """What a forward pass cannot do without: floating-point operations in matrix products, and bytes moved."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class RnnCase:
    """A recurrent layer, or with steps = 0 a Cell. Lengths of packed input fall from steps to steps * shortest."""

    model: str
    mode: str
    steps: int
    batch: int
    input_size: int
    hidden_size: int
    layers: int = 1
    bidirectional: bool = False
    packed: bool = False
    shortest: float = 0.5
    #: what PyTorch's layers lack, which its contender does around them: "lengths", "resets", "zoneout" (its mean)
    extra: str = ""

    op = "rnn"

    @property
    def by_steps(self) -> bool:
        """Whether PyTorch's contender goes one step at a time."""
        return self.extra in ("resets", "zoneout")

    @property
    def name(self) -> str:
        extra = f"-L{self.layers}" * (self.layers > 1) + "-bi" * self.bidirectional + "-packed" * self.packed
        extra += f"-{self.extra}" * bool(self.extra)
        size = f"T{self.steps}-B{self.batch}" if self.steps else f"cell-B{self.batch}"
        return f"{self.model}-{self.mode}-{size}-I{self.input_size}-H{self.hidden_size}{extra}"

    def build(self, nn: Any) -> torch.nn.Module:
        if not self.steps:
            return getattr(nn, self.mode + "Cell")(self.input_size, self.hidden_size)
        layer = getattr(nn, self.mode)(self.input_size, self.hidden_size, self.layers, bidirectional=self.bidirectional)
        if self.extra == "zoneout" and hasattr(layer, "zoneout"):
            layer.zoneout = ZONEOUT
            layer.eval()
        return layer

    def lengths(self) -> Tensor:
        """(batch,) int64, descending."""
        return torch.linspace(self.steps, max(1.0, self.steps * self.shortest), self.batch).round().long()

    def inputs(self, generator: torch.Generator, dtype: torch.dtype, device: str) -> list[Tensor]:
        shape = (self.steps, self.batch, self.input_size) if self.steps else (self.batch, self.input_size)
        return [torch.randn(shape, generator=generator).to(device, dtype)]

    def initial(self, generator: torch.Generator, dtype: torch.dtype, device: str) -> list[Tensor]:
        """Initial states: h_0, and c_0 for an LSTM."""
        stacked = (self.layers * (1 + self.bidirectional),) if self.steps else ()
        shape = (*stacked, self.batch, self.hidden_size)
        count = 2 if self.mode == "LSTM" else 1
        return [torch.randn(shape, generator=generator).tanh().to(device, dtype) for _ in range(count)]

    def shrunk(self, batch: int, length: int, width: int) -> RnnCase:
        """The same layer with at most so many rows, steps and units."""
        return replace(
            self,
            batch=min(self.batch, batch),
            steps=min(self.steps, length),
            input_size=min(self.input_size, width),
            hidden_size=min(self.hidden_size, width),
        )

    def outputs(self, module: torch.nn.Module, x: Tensor, *state: Tensor) -> dict[str, Tensor]:
        """output, h_n and c_n of a layer; h and c of a Cell."""
        hx = (state if len(state) > 1 else state[0]) if state else None
        if not self.steps:
            y = module(x, hx)
            return {"h": y[0], "c": y[1]} if isinstance(y, tuple) else {"h": y}
        if self.packed:
            y, last = module(torch.nn.utils.rnn.pack_padded_sequence(x, self.lengths()), hx)
            y = y.data
        elif self.extra:
            y, last = self._with_extra(module, x, hx)
        else:
            y, last = module(x, hx)
        return {"output": y, **(dict(zip(("h_n", "c_n"), last, strict=True)) if self.mode == "LSTM" else {"h_n": last})}

    def resets(self) -> Tensor:
        """(steps, batch) bool: where an episode begins, one step in 20."""
        return torch.rand(self.steps, self.batch, generator=torch.Generator().manual_seed(3)) < 0.05

    def _with_extra(self, module: Any, x: Tensor, hx: Any) -> tuple[Tensor, Any]:
        ours = hasattr(module, "zoneout")
        if self.extra == "lengths" and ours:
            return module(x, hx, lengths=self.lengths())
        if self.extra == "lengths":
            packed, last = module(torch.nn.utils.rnn.pack_padded_sequence(x, self.lengths()), hx)
            return torch.nn.utils.rnn.pad_packed_sequence(packed, total_length=self.steps)[0], last
        if ours:
            return module(x, hx, reset_mask=self.resets().to(x.device)) if self.extra == "resets" else module(x, hx)
        return self._step_by_step(module, x, hx)

    def _step_by_step(self, module: Any, x: Tensor, hx: Any) -> tuple[Tensor, Any]:
        """Resets and zoneout of one layer in one direction with what PyTorch has: the layer, one step at a time."""
        resets = self.resets().to(x.device)
        if hx is None:
            zeros = x.new_zeros(1, self.batch, self.hidden_size)
            hx = (zeros, zeros) if self.mode == "LSTM" else zeros
        outputs = []
        for t in range(self.steps):
            if self.extra == "resets":
                keep = (~resets[t, :, None]).to(x.dtype)
                hx = tuple(state * keep for state in hx) if self.mode == "LSTM" else hx * keep
            h_before = hx[0] if self.mode == "LSTM" else hx
            _, hx = module(x[t : t + 1], hx)
            if self.extra == "zoneout":
                h = torch.lerp(hx[0] if self.mode == "LSTM" else hx, h_before, ZONEOUT)
                hx = (h, hx[1]) if self.mode == "LSTM" else h
            outputs.append(hx[0] if self.mode == "LSTM" else hx)
        return torch.cat(outputs), hx

    def run(self, module: torch.nn.Module, x: Tensor, *state: Tensor) -> Tensor:
        """The tensor whose gradient is taken."""
        return next(iter(self.outputs(module, x, *state).values()))

    def work(self, dtype: torch.dtype) -> Work:
        ragged = self.packed or self.extra == "lengths"
        rows = int(self.lengths().sum()) if ragged else max(self.steps, 1) * self.batch
        gates, directions, flops, words = GATES[self.mode], 1 + self.bidirectional, 0.0, 0.0
        width = self.input_size
        for _ in range(self.layers):
            flops += 2.0 * rows * gates * self.hidden_size * (width + self.hidden_size) * directions
            words += rows * (width + self.hidden_size * directions)
            words += gates * self.hidden_size * (width + self.hidden_size) * directions
            width = self.hidden_size * directions
        return Work(flops, words * dtype.itemsize)


@dataclass(frozen=True)
class ConvTransposeCase:
    """A transposed convolution, with the normalisation and activation that follow it in its model."""

    model: str
    batch: int
    in_channels: int
    out_channels: int
    size: tuple[int, ...]
    kernel: int
    stride: int
    padding: int = 0
    output_padding: int = 0
    groups: int = 1
    bias: bool = True
    norm: str = ""
    activation: str = ""
    dilation: int = 1

    op = "conv_transpose"

    @property
    def name(self) -> str:
        tail = "".join(f"-{part}" for part in (self.norm, self.activation) if part)
        more = f"d{self.dilation}" * (self.dilation > 1) + f"-g{self.groups}" * (self.groups > 1)
        at = "x".join(map(str, self.size))
        return (
            f"{self.model}-{self.in_channels}to{self.out_channels}-k{self.kernel}s{self.stride}p{self.padding}"
            f"{more}-at{at}-B{self.batch}{tail}"
        )

    def build(self, nn: Any) -> torch.nn.Module:
        dims = len(self.size)
        conv = getattr(nn, f"ConvTranspose{dims}d")(
            self.in_channels,
            self.out_channels,
            self.kernel,
            self.stride,
            self.padding,
            self.output_padding,
            self.groups,
            self.bias,
            self.dilation,
        )
        layers = [conv]
        if self.norm:
            layers.append(getattr(nn, f"{self.norm}{dims}d")(self.out_channels))
        if self.activation:
            layers.append(getattr(nn, self.activation)())
        return nn.Sequential(*layers)

    def inputs(self, generator: torch.Generator, dtype: torch.dtype, device: str) -> list[Tensor]:
        shape = (self.batch, self.in_channels, *self.size)
        return [torch.randn(shape, generator=generator).to(device, dtype)]

    def outputs(self, module: torch.nn.Module, x: Tensor) -> dict[str, Tensor]:
        return {"output": module(x)}

    def run(self, module: torch.nn.Module, x: Tensor) -> Tensor:
        return module(x)

    def initial(self, generator: torch.Generator, dtype: torch.dtype, device: str) -> list[Tensor]:
        """None: a convolution has no state."""
        return []

    def shrunk(self, batch: int, length: int, width: int) -> ConvTransposeCase:
        """The same layer with at most so many samples, positions a side and channels; depthwise stays depthwise."""
        inner, outer = min(self.in_channels, width), min(self.out_channels, width)
        groups = inner if self.groups == self.in_channels else self.groups
        return replace(
            self,
            batch=min(self.batch, batch),
            size=tuple(min(side, length) for side in self.size),
            in_channels=inner,
            out_channels=outer,
            groups=groups,
        )

    def out_size(self) -> list[int]:
        more = self.dilation * (self.kernel - 1) + 1 + self.output_padding - 2 * self.padding
        return [(side - 1) * self.stride + more for side in self.size]

    def work(self, dtype: torch.dtype) -> Work:
        dims = len(self.size)
        taps = self.kernel**dims * self.in_channels * self.out_channels / self.groups
        inputs = self.batch * math.prod(self.size)
        outputs = self.batch * math.prod(self.out_size())
        words = inputs * self.in_channels + outputs * self.out_channels + taps
        return Work(2.0 * inputs * taps, words * dtype.itemsize)


@dataclass(frozen=True)
class AdversarialCase:
    """The losses of a list of logits, one shape per discriminator; of mode `FEATURES` the distance of feature maps."""

    model: str
    mode: str
    shapes: tuple[tuple[int, ...], ...]

    op = "adversarial"

    @property
    def name(self) -> str:
        count = sum(math.prod(shape) for shape in self.shapes)
        return f"{self.model}-{self.mode}-{len(self.shapes)}x{count}"

    def build(self, nn: Any) -> torch.nn.Module:
        from .. import nn as mmfast_nn

        backend = "torch" if nn is torch.nn else None
        if self.mode == FEATURES:
            return mmfast_nn.FeatureMatchingLoss(detach=False, backend=backend)
        return mmfast_nn.AdversarialLoss(self.mode, backend=backend)

    def inputs(self, generator: torch.Generator, dtype: torch.dtype, device: str) -> list[Tensor]:
        return [3 * torch.randn(shape, generator=generator).to(device, dtype) for shape in self.shapes * 2]

    def outputs(self, module: Any, *logits: Tensor) -> dict[str, Tensor]:
        """Both losses, or the distance."""
        half = len(logits) // 2
        if self.mode == FEATURES:
            return {"distance": self.run(module, *logits)}
        generator = module.generator(logits[half:], logits[:half])
        return {"discriminator": self.run(module, *logits), "generator": generator}

    def run(self, module: Any, *logits: Tensor) -> Tensor:
        half = len(logits) // 2
        loss = module if self.mode == FEATURES else module.discriminator
        return loss(logits[:half], logits[half:])

    def initial(self, generator: torch.Generator, dtype: torch.dtype, device: str) -> list[Tensor]:
        """None: a loss has no state."""
        return []

    def shrunk(self, batch: int, length: int, width: int) -> AdversarialCase:
        """The same loss of tensors of at most batch x length x width numbers."""
        most = batch * length * width
        return replace(self, shapes=tuple((min(math.prod(shape), most),) for shape in self.shapes))

    def work(self, dtype: torch.dtype) -> Work:
        return Work(0.0, 2.0 * sum(math.prod(shape) for shape in self.shapes) * dtype.itemsize)


Case = RnnCase | ConvTransposeCase | AdversarialCase


def _rnn_cases() -> Iterator[RnnCase]:
    for mode in GATES:
        # the article's image encoder, rows of a 28 x 28 picture
        yield RnnCase("article", mode, 28, 64, 28, 128)
        yield RnnCase("layer", mode, 128, 64, 128, 128)
        yield RnnCase("layer", mode, 128, 8, 128, 128)
        yield RnnCase("layer", mode, 128, 1, 128, 128)
        yield RnnCase("layer", mode, 256, 16, 512, 512)
        yield RnnCase("layer", mode, 256, 64, 512, 512)
        yield RnnCase("layer", mode, 512, 16, 128, 128, packed=True)
        # AttnGAN's text encoder: 18 words of 300 numbers, 128 units a direction
        yield RnnCase("attngan", mode, 18, 32, 300, 128, bidirectional=True, packed=True, shortest=1 / 6)
        # mmfast train's speech encoder
        yield RnnCase("speech", mode, 60, 32, 80, 128, bidirectional=True, packed=True)
        yield RnnCase("cell", mode, 0, 64, 128, 128)
        yield RnnCase("cell", mode, 0, 1, 128, 128)
    # EnCodec's SLSTM: 75 frames a second of 512 channels, two layers
    yield RnnCase("encodec", "LSTM", 75, 8, 512, 512, layers=2)
    # what PyTorch's layers lack: mmfast train's speech encoder on padded input, episodes of recurrent agents, zoneout
    yield RnnCase("speech", "GRU", 60, 32, 80, 128, bidirectional=True, extra="lengths")
    yield RnnCase("agent", "LSTM", 64, 16, 128, 128, extra="resets")
    yield RnnCase("regularised", "GRU", 64, 16, 128, 128, extra="zoneout")


def _conv_transpose_cases() -> Iterator[ConvTransposeCase]:
    # DCGAN's generator (pytorch/examples)
    dcgan = ConvTransposeCase("dcgan", 32, 512, 256, (4, 4), 4, 2, 1, bias=False, norm="BatchNorm", activation="ReLU")
    yield replace(dcgan, in_channels=100, out_channels=512, size=(1, 1), stride=1, padding=0)
    yield dcgan
    yield replace(dcgan, in_channels=256, out_channels=128, size=(8, 8))
    yield replace(dcgan, in_channels=128, out_channels=64, size=(16, 16))
    yield replace(dcgan, in_channels=64, out_channels=3, size=(32, 32), norm="", activation="Tanh")
    # StudioGAN's deep_conv upsampling convolutions
    yield replace(dcgan, model="studiogan", bias=True)
    # pix2pix' U-Net at 256 x 256
    pix2pix = replace(dcgan, model="pix2pix", batch=1, activation="")
    yield replace(pix2pix, in_channels=1024, out_channels=512, size=(4, 4))
    yield replace(pix2pix, in_channels=512, out_channels=128, size=(32, 32))
    yield replace(pix2pix, in_channels=128, out_channels=3, size=(128, 128), norm="", activation="Tanh", bias=True)
    # CycleGAN's ResNet-9 decoder
    cyclegan = ConvTransposeCase("cyclegan", 1, 256, 128, (64, 64), 3, 2, 1, 1, norm="InstanceNorm", activation="ReLU")
    yield cyclegan
    # HiFi-GAN V1 and V3 upsamplers
    yield ConvTransposeCase("hifigan-v1", 4, 512, 256, (32,), 16, 8, 4)
    yield ConvTransposeCase("hifigan-v1", 4, 128, 64, (2048,), 4, 2, 1)
    yield ConvTransposeCase("hifigan-v3", 4, 256, 128, (32,), 16, 8, 4)
    # EnCodec at 24 kHz, DAC at 44.1 kHz, Mimi's depthwise resampler
    yield ConvTransposeCase("encodec", 4, 512, 256, (75,), 16, 8)
    yield ConvTransposeCase("encodec", 4, 64, 32, (12000,), 4, 2)
    yield ConvTransposeCase("dac", 2, 768, 384, (264,), 16, 8, 4)
    yield ConvTransposeCase("mimi", 8, 512, 512, (64,), 4, 2, groups=512, bias=False)
    # U-Net decoders in two and three dimensions
    yield ConvTransposeCase("unet2d", 4, 128, 64, (64, 64), 2, 2)
    yield ConvTransposeCase("unet3d", 1, 128, 64, (16, 20, 24), 2, 2)


def _adversarial_cases() -> Iterator[AdversarialCase]:
    # HiFi-GAN: five period and three scale discriminators, ragged
    hifigan = tuple((16, length) for length in (416, 416, 415, 413, 407, 512, 257, 129))
    for mode in ("non-saturating", "hinge", "lsgan", "wasserstein", "relativistic-average"):
        yield AdversarialCase("dcgan", mode, ((64,),))
        yield AdversarialCase("patchgan", mode, ((64, 1, 30, 30),))
        yield AdversarialCase("large", mode, ((4_000_000,),))
        yield AdversarialCase("hifigan", mode, hifigan)
    # the maps of its first scale discriminator, of 8192 samples
    sides = ((128, 8192), (128, 4096), (256, 2048), (512, 512), (1024, 128), (1024, 128), (1024, 128), (1, 128))
    yield AdversarialCase("hifigan", FEATURES, tuple((2, *side) for side in sides))


def cases(op: str | None = None) -> list[Case]:
    """All cases, or those of one op: "rnn", "conv_transpose" or "adversarial"."""
    every: Sequence[Case] = [*_rnn_cases(), *_conv_transpose_cases(), *_adversarial_cases()]
    return [case for case in every if op is None or case.op == op]


#: what `mmfast bench` measures on a CPU unless told otherwise: for each op the kinds of case that differ most
REPRESENTATIVE = (
    "article-LSTM-*",
    "layer-GRU-T128-B64-*",
    "layer-LSTM-T128-B1-*",
    "layer-RNN-T128-B8-*",
    "attngan-LSTM-*",
    "speech-GRU-*-packed",
    "cell-LSTM-cell-B1-*",
    "dcgan-512to256-*",
    "dcgan-64to3-*",
    "encodec-64to32-*",
    "mimi-*",
    "unet3d-*",
    "dcgan-non-saturating-*",
    "patchgan-hinge-*",
    "large-lsgan-*",
    "hifigan-lsgan-*",
)

#: the same on a GPU, which the large cases tell of
REPRESENTATIVE_GPU = (
    "layer-*-T128-B64-*",
    "layer-*-T256-B64-*",
    "layer-*-packed",
    "attngan-LSTM-*",
    "cell-*-B64-*",
    "dcgan-*to*",
    "pix2pix-128to3-*",
    "hifigan-v1-*",
    "encodec-*to*",
    "mimi-*",
    "unet3d-*",
    "patchgan-hinge-*",
    "large-*",
    "hifigan-lsgan-*",
)


def representative(device: str) -> tuple[str, ...]:
    """The patterns of the cases that stand for the rest on a device."""
    return REPRESENTATIVE if device == "cpu" else REPRESENTATIVE_GPU


def modes(case: Any) -> tuple[str, ...]:
    """What is measured of a case: every pass that applies, or a model's own modes."""
    if not isinstance(case, AdversarialCase):
        return getattr(case, "modes", PASSES)
    # the others' second derivative is zero
    return PASSES if case.mode in ("non-saturating", "lsgan", "relativistic-average") else PASSES[:2]


def is_compiled(case: Any) -> bool:
    """Whether torch.compile competes where no cases are named: in one an op."""
    return case.name.startswith(("layer-GRU-", "dcgan-64to3-", "hifigan-lsgan-"))


def usual_modes(case: Any) -> tuple[str, ...]:
    """`modes`, but double backward of a few only, for the sake of time."""
    twice = ("cell-LSTM-", "dcgan-512to256-", "dcgan-non-saturating-")
    return tuple(mode for mode in modes(case) if mode != PASSES[2] or case.name.startswith(twice))


def matching(patterns: Sequence[str], op: str | None = None) -> list[Case]:
    """The cases whose name fits any of the shell patterns."""
    return [case for case in cases(op) if any(fnmatch.fnmatchcase(case.name, pattern) for pattern in patterns)]


def from_shape(text: str) -> list[RnnCase]:
    """An RNN, a GRU and an LSTM of the shape `T128,B64,I128,H128`, with `L2` of two layers; ValueError otherwise."""
    sizes = {part[:1]: part[1:] for part in text.split(",")}
    if not {"T", "B", "I", "H"} <= sizes.keys() <= {"T", "B", "I", "H", "L"} or not all(
        size.isdigit() and int(size) > 0 for size in sizes.values()
    ):
        raise ValueError(f"shape {text!r}; expected steps, batch, input and hidden size: T128,B64,I128,H128 (and L2)")
    steps, batch, wide, hidden, layers = (int(sizes.get(name, 1)) for name in "TBIHL")
    return [RnnCase("shape", mode, steps, batch, wide, hidden, layers) for mode in GATES]


def scaling() -> list[RnnCase]:
    """One LSTM whose steps, batch and hidden size vary, one at a time."""
    base = RnnCase("scaling", "LSTM", 64, 16, 128, 128)
    points: list[RnnCase] = [replace(base, steps=steps) for steps in (16, 32, 64, 128, 256)]
    points += [replace(base, batch=batch) for batch in (1, 4, 64)]
    points += [replace(base, hidden_size=hidden) for hidden in (32, 64, 256)]
    return points
