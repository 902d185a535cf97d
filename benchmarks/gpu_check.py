"""The parts of gpu_check.sh that are no command of mmfast's, each a subcommand. "RESULT: " lines go into its summary.

small    every GPU backend once against float64, on small cases of each kind; what compute-sanitizer runs
graph    forward + backward captured in a CUDA graph and replayed on new data, and the same on a side stream
decoders transposed convolutions of public decoders, forward in bfloat16, as CUDA graphs: each layer by PyTorch and by
         torch.compile in both memory formats and by each backend, and the sums beside the floors that they aim at
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

import mmfast
from mmfast.bench import cases, measure
from mmfast.bench.cases import ConvTransposeCase
from mmfast.bench.contenders import Bout, Inputs, Results
from mmfast.validate.checks import Subject, Trial, refusals

#: batch, steps or positions a side, units or channels: odd, and more than one block of a loss's logits
SMALL = (3, 5, 33)
#: of these kinds one case each is captured in a graph
CAPTURED = ("layer-LSTM-T128-B8-*", "layer-GRU-T128-B8-*", "dcgan-64to3-*", "mimi-*", "hifigan-non-saturating-*")


def backends(device: str) -> list[str]:
    # Triton's interpreter needs a process of its own
    return ["cuda", "triton"] if device == "cuda" else ["cuda"]


def served(found: list[Any], device: str) -> Iterator[Subject]:
    """Each case with each backend that can serve it."""
    for case in found:
        for backend in backends(device):
            subject = Subject(case, backend, torch.float32, device)
            if not refusals(subject):
                yield subject


def small(arguments: argparse.Namespace) -> int:
    found = list(dict.fromkeys(case.shrunk(*SMALL) for case in cases.cases()))
    right: dict[str, int] = {}
    for subject in served(found, arguments.device):
        trial = Trial(subject, arguments.seed)
        quantities = zip(trial.by_mmfast(), trial.by_pytorch(), trial.in_float64(), strict=True)
        for (name, ours), (_, theirs), (_, exact) in quantities:
            complaint = measure.disagreement(name, ours, theirs, exact)
            if complaint:
                print(f"RESULT: {subject.case.name}, {subject.backend}: {complaint}")
                return 1
        kind = f"{subject.case.op} by {subject.backend}"
        right[kind] = right.get(kind, 0) + 1
        print(f"right: {kind}, {subject.case.name}", flush=True)
    for kind, count in right.items():
        print(f"RESULT: {kind}: {count} small cases right")
    return 0 if right else 1


def graph(arguments: argparse.Namespace) -> int:
    for subject in served(cases.matching(CAPTURED), "cuda"):
        bout = Bout(subject.case, "forward+backward", subject.dtype, "cuda", arguments.seed)
        with mmfast.use_backend(subject.backend):
            complaint = _on_streams(bout)
        name = f"{subject.case.name}, {subject.backend}"
        print(f"RESULT: {name}: {complaint or 'side stream and CUDA graph give the eager bits'}", flush=True)
        if complaint:
            return 1
    return 0


def _on_streams(bout: Bout) -> str:
    """What goes wrong on a side stream or in a graph; empty where nothing does."""
    compute = bout.computation(bout.ours())
    inputs = bout.sets[0]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            on_side = compute(inputs)
    torch.cuda.synchronize()
    if not _same(on_side, compute(inputs)):
        return "a side stream gives another result"
    # a kernel on the wrong stream would read the data before this slow stream has written them
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        _rewrite(inputs)
        late = compute(inputs)
    torch.cuda.synchronize()
    if not _same(late, compute(inputs)):
        return "a kernel did not wait for its stream"
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        results = compute(inputs)
    for _ in range(3):
        _rewrite(inputs)
        captured.replay()
        if not _same(results, compute(inputs)):
            return "a replayed graph gives another result"
    return ""


def _rewrite(inputs: Inputs) -> None:
    with torch.no_grad():
        for x in inputs:
            x.copy_(torch.randn_like(x))


def _same(found: Results, expected: Results) -> bool:
    torch.cuda.synchronize()
    return all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


class Line(NamedTuple):
    """What a group of layers aims at. floor: microseconds by an H200's 4.8 TB/s and 790 TFLOP/s in bfloat16."""

    name: str
    layers: list[ConvTransposeCase]
    floor: float
    within: float  # times the floor, or times PyTorch's speed in contiguous memory where there is none


def lines() -> list[Line]:
    dcgan = ConvTransposeCase("dcgan", 128, 100, 512, (1, 1), 4, 1, 0, bias=False, norm="BatchNorm", activation="ReLU")
    generator = [dcgan]
    for channels, side in ((512, 4), (256, 8), (128, 16)):
        sizes = {"in_channels": channels, "out_channels": channels // 2, "size": (side, side)}
        generator.append(replace(dcgan, **sizes, stride=2, padding=1))
    image = replace(generator[-1], in_channels=64, out_channels=3, size=(32, 32), norm="", activation="Tanh")
    hifigan = ConvTransposeCase("hifigan-v1", 16, 512, 256, (32,), 16, 8, 4)
    encodec = ConvTransposeCase("encodec", 64, 512, 256, (75,), 16, 8)
    mimi = ConvTransposeCase("mimi", 8, 512, 512, (64,), 4, 2, groups=512, bias=False)

    def upsamplers(first: ConvTransposeCase, later: Sequence[tuple[int, int, int, int]]) -> list[ConvTransposeCase]:
        layers = [first]
        for channels, size, kernel, padding in later:
            sizes = {"in_channels": channels, "out_channels": channels // 2, "size": (size,)}
            layers.append(replace(first, **sizes, kernel=kernel, stride=kernel // 2, padding=padding))
        return layers

    return [
        Line("DCGAN generator", [*generator, image], 33.0, 1.4),
        Line(
            "DCGAN without norms", [*(replace(layer, norm="", activation="") for layer in generator), image], 33.0, 1.4
        ),
        Line("HiFi-GAN", upsamplers(hifigan, [(256, 256, 16, 4), (128, 2048, 4, 1), (64, 4096, 4, 1)]), 15.1, 1.6),
        Line("EnCodec", upsamplers(encodec, [(256, 600, 10, 0), (128, 3000, 8, 0), (64, 12000, 4, 0)]), 130.0, 1.6),
        Line("64>3", [image], 4.15, 1.3),
        Line("depthwise", [mimi], 0.0, 10.0),
    ]


def decoders(arguments: argparse.Namespace) -> int:
    """Tells; a goal that is missed fails nothing, a layer that does not run does. On a CPU tiny layers, emulated."""
    torch.backends.cudnn.benchmark = True
    broken, totals, known = 0, {}, {}
    for line in lines():
        theirs = ours = contiguous = 0.0
        for layer in line.layers:
            if arguments.device == "cpu":
                layer = layer.shrunk(*SMALL)
            if layer not in known:
                known[layer] = _times(layer, arguments)
                print(layer.name, {name: f"{1e6 * t:.1f} us" for name, t in known[layer].items()}, flush=True)
            times = known[layer]
            served = {name: t for name, t in times.items() if name.startswith("mmfast")}
            broken += not served
            ours += min(served.values(), default=float("nan"))
            theirs += min(t for name, t in times.items() if name not in served)
            contiguous += times["eager first"]
        totals[line.name] = ours
        goal = f"{ours * 1e6 / line.floor:.2f} x floor" if line.floor else f"{contiguous / ours:.1f} x cuDNN's speed"
        text = f"{line.name}: {1e6 * ours:.1f} us, {goal} (aim {line.within}), {theirs / ours:.2f} x the best rival"
        print(f"RESULT: {text}", flush=True)
    added = totals["DCGAN generator"] / totals["DCGAN without norms"] - 1
    print(f"RESULT: batch norm and ReLU add {100 * added:.0f} % to the DCGAN generator (aim 10)")
    return 1 if broken else 0


def _times(layer: ConvTransposeCase, arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of a forward in training mode, by who ran, PyTorch, compiled and each backend, and memory format."""
    bout = Bout(layer, "forward", torch.bfloat16, arguments.device, arguments.seed)
    formats = {"first": torch.contiguous_format}
    if len(layer.size) == 2:
        formats["last"] = torch.channels_last
    times = {}
    for where, layout in formats.items():
        sets = [[x.to(memory_format=layout) for x in inputs] for inputs in bout.sets[:8]]
        stock, fused = (module.to(memory_format=layout).train() for module in (bout.module, bout.ours()))
        torch.compiler.reset()
        runs: dict[str, tuple[Callable, str | None]] = {"eager": (stock, None)}
        if arguments.device == "cuda":
            runs["compile"] = (torch.compile(stock), None)
        runs.update({f"mmfast {name}": (fused, name) for name in backends(arguments.device)})
        for name, (module, backend) in runs.items():
            try:
                with torch.no_grad(), mmfast.use_backend(backend):
                    times[f"{name} {where}"] = _seconds(module, sets, arguments.device)
            except Exception as error:  # the others are measured
                print(f"{layer.name} by {name}: {type(error).__name__}: {error}", flush=True)
    return times


def _seconds(module: Callable, sets: list[Inputs], device: str) -> float:
    """Of one call; on a GPU the median of replays of a graph of all sets, without the host's part."""
    if device == "cpu":
        began = time.perf_counter()
        module(*sets[0])
        return time.perf_counter() - began
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            module(*sets[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for inputs in sets:
            module(*inputs)
    found = []
    for _ in range(20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1e3 / len(sets))
    return statistics.median(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["small", "graph", "decoders"])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    return {"small": small, "graph": graph, "decoders": decoders}[arguments.part](arguments)


if __name__ == "__main__":
    sys.exit(main())
