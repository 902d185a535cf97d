"""The transposed convolutions on a CPU against PyTorch's: a table with bars, all cases, and random layers.

    python benchmarks/conv_table.py [table|cases|random] [--threads 1] [--seconds 1] [--only 64to3] [--mode forward]
        [--dtype bfloat16] [--compile]

One process, interleaved rounds, minimum over them; with --compile both sides are compiled. PyTorch runs contiguous and
channels last, and so does mmfast: `ratio` is PyTorch's faster one to mmfast's contiguous one, which a user gets who
changes nothing, `best` to mmfast's faster one. A random layer is drawn with its memory format, in which both run; it is
slower below 0.97 of PyTorch's speed by more than 2 us, after a second measurement with five times the rounds. Freed
memory is kept, as in rnn_table.py.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rnn_table import best_of, keep_memory, print_slowest

import mmfast
from mmfast.bench.cases import PASSES, ConvTransposeCase, cases
from mmfast.bench.contenders import _first_order, _forward, _second_order
from mmfast.bench.models import Dcgan

Call = Callable[[], Any]

FORWARD, TRAINING, SECOND = PASSES
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class Generator:
    """DCGAN's whole generator at 64 x 64: its forward and backward, on noise that needs no gradient."""

    batch: int
    size: tuple[int, ...] = (1, 1)

    @property
    def name(self) -> str:
        return f"dcgan-generator-B{self.batch}"

    def build(self, nn: Any) -> torch.nn.Module:
        return Dcgan(nn).generator

    def inputs(self, generator: torch.Generator, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
        return [torch.randn(self.batch, 100, 1, 1, generator=generator).to(dtype)]

    def run(self, module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return module(x)


#: what all rows are of: --dtype and --compile
OF = {"dtype": torch.float32, "compiled": False}


def call_of(case: Any, nn: Any, mode: str, layout: torch.memory_format | None) -> Call:
    """One pass of the case's module from a namespace, in a memory format."""
    torch.manual_seed(0)
    module = case.build(nn).to(OF["dtype"])
    (x,) = case.inputs(torch.Generator().manual_seed(1), OF["dtype"], "cpu")
    if layout is not None:
        module, x = module.to(memory_format=layout), x.contiguous(memory_format=layout)
    if OF["compiled"]:
        torch.compiler.reset()
        # not module.compile(), by which Dynamo skips the frames of torch.nn's own modules
        module = torch.compile(module, dynamic=False)
    if mode == FORWARD:
        module.eval()
        return lambda: _forward(lambda x: case.run(module, x), [x])
    # noise has no gradient
    x = x.requires_grad_(isinstance(case, ConvTransposeCase))
    cotangent = torch.randn(case.run(module, x).shape, generator=torch.Generator().manual_seed(2)).to(OF["dtype"])
    if layout is not None:
        cotangent = cotangent.contiguous(memory_format=layout)
    weights = list(module.parameters())
    derive = _first_order if mode == TRAINING else _second_order
    return lambda: derive(lambda x: case.run(module, x), [x], weights, cotangent)


#: case, {pass: bar}
TABLE: list[tuple[Any, dict[str, float]]] = []


def _fill_table() -> None:
    by_start = {
        "dcgan-64to3": {FORWARD: 3, TRAINING: 1.8},
        "dcgan-100to512": {TRAINING: 3},
        "dcgan-512to256": {TRAINING: 1},
        "dcgan-256to128": {TRAINING: 1.05},
        "dcgan-128to64": {TRAINING: 1.2},
        "mimi": {TRAINING: 3},
        "unet2d": {TRAINING: 1.1},
        "unet3d": {TRAINING: 1.1},
    }
    for start, bars in by_start.items():
        TABLE.extend((case, bars) for case in cases("conv_transpose") if case.name.startswith(start))
    TABLE.append((Generator(64), {TRAINING: 1.15}))


def contenders(case: Any, mode: str) -> dict[str, Call]:
    layouts = {"first": None}
    if len(case.size) > 1:
        layouts["last"] = LAST[len(case.size) + 2]
    sides = {"torch": torch.nn, "mmfast": mmfast.nn}
    return {
        f"{side} {name}": call_of(case, nn, mode, layout)
        for name, layout in layouts.items()
        for side, nn in sides.items()
    }


def print_rows(rows: list[tuple[Any, dict[str, float]]], passes: list[str], seconds: float) -> None:
    print(
        f"{'case':56} {'pass':17} {'torch ms':>8} {'last':>8} {'mmfast':>8} {'last':>8} {'ratio':>6} {'best':>5}  bar"
    )
    for case, bars in rows:
        for mode in passes:
            if mode == SECOND and isinstance(case, Generator):
                continue
            best = {name: 1e3 * taken for name, taken in best_of(contenders(case, mode), seconds).items()}
            theirs = [best[name] for name in ("torch first", "torch last") if name in best]
            ours = [best[name] for name in ("mmfast first", "mmfast last") if name in best]
            times = " ".join(f"{taken:8.3f}" for pair in (theirs, ours) for taken in (*pair, *[float("nan")] * 2)[:2])
            ratio, bar = min(theirs) / ours[0], bars.get(mode)
            verdict = "" if bar is None else f"{bar:4.2f} {'holds' if ratio >= bar else 'NOT'}"
            print(
                f"{case.name:56} {mode:17} {times} {ratio:6.2f} {min(theirs) / min(ours):5.2f}  {verdict}", flush=True
            )


def random_cases(count: int, seed: int) -> Iterator[tuple[ConvTransposeCase, str, torch.memory_format | None]]:
    """Layers of which a small one is as likely as a large one, with a pass and a memory format."""
    rng = random.Random(seed)

    def log_uniform(least: int, most: int) -> int:
        return round(least * (most / least) ** rng.random())

    while count:
        dims = rng.choice((1, 2, 2, 3))
        kernel, stride, dilation = rng.randint(1, 6), rng.randint(1, 4), rng.choice((1, 1, 1, 1, 2, 3))
        inputs, outputs, groups = log_uniform(1, 512), log_uniform(1, 512), 1
        if rng.random() < 0.25:
            groups = rng.choice((2, 4, inputs))
            inputs = max(groups, inputs // groups * groups)
            outputs = inputs if groups == inputs else max(groups, outputs // groups * groups)
        case = ConvTransposeCase(
            "random",
            log_uniform(1, 64),
            inputs,
            outputs,
            tuple(log_uniform(1, (2048, 64, 16)[dims - 1]) for _ in range(dims)),
            kernel,
            stride,
            rng.randint(0, kernel // 2),
            rng.randint(0, max(stride, dilation) - 1),
            groups,
            rng.random() < 0.5,
            rng.choice(("", "", "BatchNorm", "InstanceNorm")),
            rng.choice(("", "ReLU", "LeakyReLU", "Tanh", "SiLU")),
            dilation,
        )
        work = case.work(torch.float32)
        # what a norm has to have, and what ends in time
        if min(case.out_size()) < 2 or work.flops > 2e9 or work.bytes > 1e8:
            continue
        count -= 1
        yield case, rng.choice(PASSES[:2]), LAST[dims + 2] if dims > 1 and rng.random() < 0.5 else None


def rivals(count: int, seed: int) -> Iterator[tuple[str, dict[str, Call]]]:
    """A random layer's name and its two calls, in the memory format drawn for it."""
    for case, mode, layout in random_cases(count, seed):
        calls = {"torch": call_of(case, torch.nn, mode, layout), "mmfast": call_of(case, mmfast.nn, mode, layout)}
        yield f"{mode} {case.name} {'contiguous' if layout is None else 'channels last'}", calls


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("table", "cases", "random"), nargs="?", default="table")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each row")
    parser.add_argument("--count", type=int, default=200, help="of random layers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--mode", choices=PASSES, action="append", help="the passes; default: the first two")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="both sides")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    OF.update(dtype=getattr(torch, options.dtype), compiled=options.compile)
    keep_memory()
    print(f"torch {torch.__version__}, {mmfast.native.isa()}, {options.threads} threads")
    _fill_table()
    passes = options.mode or list(PASSES[:2])
    if options.what == "random":
        print_slowest(rivals(options.count, options.seed), options.seconds)
        return
    bars = {case.name: bars for case, bars in TABLE}
    rows = TABLE if options.what == "table" else [(case, bars.get(case.name, {})) for case in cases("conv_transpose")]
    print_rows([row for row in rows if options.only in row[0].name], passes, options.seconds)


if __name__ == "__main__":
    main()
