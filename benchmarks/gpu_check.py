"""The parts of gpu_check.sh that are no command of mmfast's, each a subcommand. "RESULT: " lines go into its summary.

small    every GPU backend once against float64, on small cases of each kind; what compute-sanitizer runs
graph    forward + backward captured in a CUDA graph and replayed on new data, and the same on a side stream
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import torch

import mmfast
from mmfast.bench import cases, measure
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["small", "graph"])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    return {"small": small, "graph": graph}[arguments.part](arguments)


if __name__ == "__main__":
    sys.exit(main())
