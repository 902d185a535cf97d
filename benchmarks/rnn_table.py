"""The recurrent layers on a CPU against PyTorch's in eager: a table of cases, and random shapes, none to be slower.

    python benchmarks/rnn_table.py [table|random] [--threads 1] [--seconds 2] [--count 200] [--only packed]

One process, float32, interleaved rounds, minimum over them. A case's floor is what its matrix products alone take, by
torch.mm in the same rounds. Times are the wall's, or with --clock thread the thread's, which a busy machine disturbs
less. A random shape is slower below 0.97 of PyTorch's speed by more than 2 us, after a second measurement with five
times the rounds. Freed memory is kept: whether the next call's is fresh, which costs some 1 us a page, would be luck of
the order of allocations, for either side.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch

import mmfast
from mmfast.bench.cases import GATES, RnnCase
from mmfast.bench.measure import SLOWER_RATIO, SLOWER_SECONDS

Call = Callable[[], Any]


#: --clock
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "thread": time.thread_time}
_clock = [time.perf_counter]


def keep_memory() -> None:
    """Makes glibc give nothing it frees back to the system."""
    trim_threshold, mmap_max = -1, -4
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_max, 0)


def best_of(calls: dict[str, Call], seconds: float, least: int = 5) -> dict[str, float]:
    """The shortest time of each call, in seconds."""
    clock = _clock[0]
    for call in calls.values():
        call()
    best = dict.fromkeys(calls, float("inf"))
    gc.disable()
    started, rounds = time.perf_counter(), 0
    while rounds < least or time.perf_counter() - started < seconds:
        for name, call in calls.items():
            begun = clock()
            call()
            best[name] = min(best[name], clock() - begun)
        rounds += 1
    gc.enable()
    return best


def training(case: RnnCase, module: torch.nn.Module) -> Call:
    """Forward and backward, x requiring a gradient."""
    generator = torch.Generator().manual_seed(1)
    (x,) = case.inputs(generator, torch.float32, "cpu")
    x.requires_grad_()
    inputs = [x, *module.parameters()]
    cotangent = torch.randn(case.run(module, x).shape, generator=generator)
    return lambda: torch.autograd.grad(case.run(module, x), inputs, cotangent)


def inference(case: RnnCase, module: torch.nn.Module) -> Call:
    generator = torch.Generator().manual_seed(1)
    (x,) = case.inputs(generator, torch.float32, "cpu")
    state = case.initial(generator, torch.float32, "cpu")
    hx = state[0] if len(state) == 1 else tuple(state)

    def call() -> Any:
        with torch.no_grad():
            return module(x) if case.steps else module(x, hx)

    return call


def penalty(case: RnnCase, module: torch.nn.Module) -> Call:
    """The gradient of a gradient penalty."""
    (x,) = case.inputs(torch.Generator().manual_seed(1), torch.float32, "cpu")
    x.requires_grad_()
    parameters = list(module.parameters())

    def call() -> Any:
        (dx,) = torch.autograd.grad(case.run(module, x).sum(), x, create_graph=True)
        return torch.autograd.grad((dx.flatten(1).norm(dim=1) - 1).square().mean(), parameters, allow_unused=True)

    return call


def products(case: RnnCase, passes: int) -> Call:
    """The matrix products of a layer's forward, with passes = 3 of its backward too."""
    lengths = case.lengths() if case.packed else torch.full((case.batch,), max(case.steps, 1))
    sizes = [int((lengths > t).sum()) for t in range(int(lengths.max()))]
    rows, hidden = sum(sizes), case.hidden_size
    gates = GATES[case.mode] * hidden
    h, d = torch.randn(rows, hidden), torch.randn(rows, gates)
    w_hh = torch.randn(gates, hidden)
    h_steps, d_steps = h.split(sizes), d.split(sizes)

    def once(x: torch.Tensor, w_ih: torch.Tensor) -> None:
        torch.mm(x, w_ih.t())
        for step in h_steps:
            torch.mm(step, w_hh.t())
        if passes == 1:
            return
        for step in d_steps:
            torch.mm(step, w_hh)
        torch.mm(d, w_ih), torch.mm(d.t(), x), torch.mm(d.t(), h)

    directions = 1 + case.bidirectional
    widths = [case.input_size] + [hidden * directions] * (case.layers - 1)
    layers = [(torch.randn(rows, width), torch.randn(gates, width)) for width in widths] * directions
    return lambda: [once(*layer) for layer in layers]


#: name, kind, case but for its mode
TABLE: list[tuple[Callable[..., Call], RnnCase]] = [
    (training, RnnCase("train", "RNN", 128, 64, 128, 128)),
    (training, RnnCase("train", "RNN", 28, 64, 28, 128)),
    (training, RnnCase("train", "RNN", 128, 8, 128, 128)),
    (training, RnnCase("train", "RNN", 128, 1, 128, 128)),
    (training, RnnCase("train", "RNN", 256, 16, 512, 512)),
    (training, RnnCase("train", "RNN", 512, 16, 128, 128, packed=True)),
    (training, RnnCase("train", "RNN", 18, 32, 300, 128, bidirectional=True, packed=True, shortest=1 / 6)),
    (penalty, RnnCase("penalty", "RNN", 128, 16, 128, 128)),
    (inference, RnnCase("infer", "RNN", 0, 64, 128, 128)),
    (inference, RnnCase("infer", "RNN", 0, 1, 128, 128)),
]


def pair(kind: Callable[..., Call], case: RnnCase) -> dict[str, Call]:
    torch.manual_seed(0)
    theirs = case.build(torch.nn)
    ours = case.build(mmfast.nn)
    ours.load_state_dict(theirs.state_dict())
    return {"torch": kind(case, theirs), "mmfast": kind(case, ours)}


def print_table(seconds: float, only: str) -> None:
    print(f"{'case':58} {'torch ms':>9} {'mmfast':>9} {'floor':>9} {'ratio':>6} {'x floor':>7}")
    for kind, base in TABLE:
        for mode in GATES:
            case = replace(base, mode=mode)
            if only not in case.name:
                continue
            calls = pair(kind, case)
            if kind is not penalty:
                calls["floor"] = products(case, 1 if kind is inference else 3)
            best = {name: 1e3 * taken for name, taken in best_of(calls, seconds).items()}
            floor = best.get("floor", float("nan"))
            print(
                f"{case.name:58} {best['torch']:9.4f} {best['mmfast']:9.4f} {floor:9.4f} "
                f"{best['torch'] / best['mmfast']:6.2f} {best['mmfast'] / floor:7.2f}",
                flush=True,
            )


def random_cases(count: int, seed: int = 0) -> Iterator[tuple[Callable[..., Call], RnnCase]]:
    """Shapes of which a small one is as likely as a large one."""
    rng = random.Random(seed)

    def log_uniform(least: int, most: int) -> int:
        return round(least * (most / least) ** rng.random())

    while count:
        steps, batch = log_uniform(1, 600), log_uniform(1, 130)
        inputs, hidden = log_uniform(1, 700), log_uniform(1, 700)
        layers, both, packed = rng.randint(1, 3), rng.random() < 0.5, rng.random() < 0.3
        kind, mode = rng.choice([training, training, inference]), rng.choice(list(GATES))
        case = RnnCase("random", mode, steps, batch, inputs, hidden, layers, both, packed)
        if case.work(torch.float32).flops < 4e9:
            count -= 1
            yield kind, case


def print_slowest(rivals: Iterable[tuple[str, dict[str, Call]]], seconds: float, shown: int = 40) -> None:
    """Those that gain least of named pairs, slowest first; one that looks slower is measured again for longer."""
    found = []
    for name, calls in rivals:
        for least in (5, 25):
            best = best_of(calls, seconds * least / 5, least)
            ratio, loss = best["torch"] / best["mmfast"], best["mmfast"] - best["torch"]
            slower = ratio < SLOWER_RATIO and loss > SLOWER_SECONDS
            if not slower:
                break
        found.append((ratio, slower, name, best["torch"] * 1e6, best["mmfast"] * 1e6))
    found.sort()
    for ratio, slower, name, theirs, ours in found[:shown]:
        print(f"{ratio:6.2f} {'SLOWER' if slower else '':6} {name} {theirs:.0f} us, {ours:.0f} us")
    print(f"{sum(slower for _, slower, *_ in found)} of {len(found)} slower; median {found[len(found) // 2][0]:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("table", "random"), nargs="?", default="table")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each case")
    parser.add_argument("--count", type=int, default=200, help="of random shapes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--only", default="", help="cases of the table with this in their name")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_memory()
    _clock[0] = CLOCKS[options.clock]
    print(f"torch {torch.__version__}, {mmfast.native.isa()}, {options.threads} threads")
    if options.what == "table":
        print_table(options.seconds, options.only)
    else:
        shapes = random_cases(options.count, options.seed)
        print_slowest(((f"{kind.__name__} {case.name}", pair(kind, case)) for kind, case in shapes), options.seconds)


if __name__ == "__main__":
    main()
