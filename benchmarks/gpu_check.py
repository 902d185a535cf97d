"""The parts of gpu_check.sh that are no command of mmfast's, each a subcommand. "RESULT: " lines go into its summary.

small     every GPU backend once against float64, on small cases of each kind; what compute-sanitizer runs
graph     forward + backward captured in a CUDA graph and replayed on new data, the same on a side stream, and twice
losses    every mode, feature matching, LeCam, penalty and weighting: no wait for the device, captured in a graph;
          kernels launched in a pass over many discriminators
recurrent recurrent layers in bfloat16, forward and forward + backward, by cuDNN and by each backend, beside their aims
cudnn     cuDNN's layers of every mode and dtype over hidden sizes, packed and not, and mmfast's where there is one
decoders  transposed convolutions of public decoders, forward in bfloat16, as CUDA graphs: each layer by PyTorch and by
          torch.compile in both memory formats and by each backend, and the sums beside the floors that they aim at
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

import mmfast
from mmfast import functional, native, nn
from mmfast.bench import cases, measure
from mmfast.bench.cases import AdversarialCase, ConvTransposeCase, RnnCase
from mmfast.bench.contenders import Bout, Inputs, Results
from mmfast.ops.adversarial.equations import MODES
from mmfast.validate.checks import Subject, Trial, refusals

#: batch, steps or positions a side, units or channels: odd, and more than one block of a loss's logits
SMALL = (3, 5, 33)
#: of these kinds one case each is captured in a graph
CAPTURED = (
    "layer-RNN-T128-B8-*",
    "layer-LSTM-T128-B8-*",
    "layer-GRU-T128-B8-*",
    "dcgan-64to3-*",
    "mimi-*",
    "hifigan-non-saturating-*",
)


def backends(device: str) -> list[str]:
    # Triton's interpreter needs a process of its own
    return ["cuda", "triton"] if device == "cuda" else ["cuda"]


def served(found: list[Any], device: str) -> Iterator[Subject]:
    """Each backend with each case that it can serve."""
    for backend in backends(device):
        for case in found:
            subject = Subject(case, backend, torch.float32, device)
            if not refusals(subject):
                yield subject


def small(arguments: argparse.Namespace) -> int:
    found = list(dict.fromkeys(case.shrunk(*SMALL) for case in cases.cases()))
    right: dict[str, int] = {}
    subjects = list(served(found, arguments.device))
    for subject, following in zip(subjects, [*subjects[1:], None], strict=True):
        trial = Trial(subject, arguments.seed)
        quantities = zip(trial.by_mmfast(), trial.by_pytorch(), trial.in_float64(), strict=True)
        for (name, ours), (_, theirs), (_, exact) in quantities:
            complaint = measure.disagreement(name, ours, theirs, exact)
            if complaint:
                print(f"RESULT: {subject.case.name}, {subject.backend}: {complaint}")
                return 1
        kind = _kind(subject)
        right[kind] = right.get(kind, 0) + 1
        print(f"right: {kind}, {subject.case.name}", flush=True)
        if following is None or _kind(following) != kind:
            print(f"RESULT: {kind}: {right[kind]} small cases right", flush=True)
    return 0 if right else 1


def _kind(subject: Subject) -> str:
    return f"{subject.case.op} by {subject.backend}"


def graph(arguments: argparse.Namespace) -> int:
    for subject in served(cases.matching(CAPTURED), "cuda"):
        bout = Bout(subject.case, "forward+backward", subject.dtype, "cuda", arguments.seed, most=1)
        with mmfast.use_backend(subject.backend):
            complaint = _on_streams(bout.computation(bout.ours()), bout.sets[0])
        name = f"{subject.case.name}, {subject.backend}"
        print(
            f"RESULT: {name}: {complaint or 'a second run, a side stream and a CUDA graph give the eager bits'}",
            flush=True,
        )
        if complaint:
            return 1
    return 0


def _on_streams(compute: Callable[[Inputs], Results], inputs: Inputs) -> str:
    """What goes wrong on a side stream or in a graph; empty where nothing does."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            on_side = compute(inputs)
    torch.cuda.synchronize()
    eager = [x.clone() for x in compute(inputs)]
    if not _same(eager, compute(inputs)):
        return "a second run gives other bits"
    if not _same(on_side, eager):
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
    if found[0].is_cuda:
        torch.cuda.synchronize()
    return all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def losses(arguments: argparse.Namespace) -> int:
    """Kernels beside mmfast's, as those that autograd fills a gradient with, are counted, too."""
    many = AdversarialCase("many", "hinge", tuple((16, 1, 3 + k) for k in range(75)))
    failed = 0
    for subject in served([many], arguments.device):
        backend = subject.backend
        bout = Bout(many, "forward+backward", torch.float32, arguments.device, arguments.seed, most=1)
        inputs = [torch.randn(n, 40, device=arguments.device).requires_grad_() for n in (8, 5, 8, 5)]
        with mmfast.use_backend(backend):
            compute = bout.computation(bout.ours())
            passes = [("hinge of 150 tensors", compute, bout.sets[0])]
            passes += [(name, functools.partial(_stepped, step), inputs) for name, step in steps(arguments.device)]
            complaints = {name: complaint for name, run, given in passes if (complaint := _waits(run, given))}
            count = _launches(functools.partial(compute, bout.sets[0]), arguments.device)
        failed += len(complaints)
        for name, complaint in complaints.items():
            print(f"RESULT: {backend}, {name}: {complaint}", flush=True)
        print(f"RESULT: {backend}: {len(passes) - len(complaints)} losses {REPEATED[arguments.device]}", flush=True)
        print(f"RESULT: {backend}: {count} launches forward + backward of 150 tensors (aim 3)", flush=True)
    return failed


#: what is seen of a pass on a device
REPEATED = {"cuda": "never wait for the device, and are captured in a graph", "cpu": "give the same bits twice"}

Lists = Sequence[torch.Tensor]


def steps(device: str) -> Iterator[tuple[str, Callable[[Lists, Lists], torch.Tensor]]]:
    """Every kind of loss with its name: of two discriminators' real and fake logits, (8, 40) and (5, 40)."""
    for mode in MODES:
        for side in ("discriminator", "generator"):
            yield f"{mode}, {side}", _of(nn.AdversarialLoss(mode, across="mean"), side)
    smoothed = nn.AdversarialLoss("non-saturating", smoothing=(0.1, 0.2))
    weight = torch.rand(8, device=device)
    yield "label smoothing", smoothed.discriminator
    yield "weights by sample", lambda r, f: smoothed.discriminator(r[0], f[0], real_weight=weight, fake_weight=weight)
    yield "a matching discriminator", lambda r, f: functional.matching_discriminator_loss(r, f, r, unconditional=(f, r))
    # without a memory, so that a second call gives the same
    yield "LeCam", nn.LeCam(decay=0.0, discriminators=2).to(device)
    yield "feature matching", nn.FeatureMatchingLoss(detach=False)
    yield "relative feature matching", nn.FeatureMatchingLoss(across="mean", relative=True)
    for name in ("r1", "r2", "zero_centered", "wgan", "dragan", "max_gradient"):
        yield f"{name} penalty", functools.partial(_penalty, getattr(functional, f"{name}_penalty"))
    yield "adaptive weight", _adaptive
    yield "balancer", functools.partial(_balanced, nn.LossBalancer({"a": 1.0, "b": 3.0}, decay=0.0).to(device))


def _of(loss: nn.AdversarialLoss, side: str) -> Callable[[Lists, Lists], torch.Tensor]:
    return loss.discriminator if side == "discriminator" else lambda real, fake: loss.generator(fake, real)


def _penalty(penalty: Callable[..., torch.Tensor], real: Lists, fake: Lists) -> torch.Tensor:
    """Of a critic whose gradient is the same wherever it is taken, so that random points do not tell."""

    def critic(x: torch.Tensor) -> torch.Tensor:
        return (x * fake[1][0]).sum(1)

    if penalty is functional.dragan_penalty:
        return penalty(critic, real[0])
    if penalty in (functional.wgan_penalty, functional.max_gradient_penalty):
        return penalty(critic, real[0], fake[0])
    return penalty(critic(real[0]), real[0])


def _adaptive(real: Lists, fake: Lists) -> torch.Tensor:
    out = real[0] * fake[0]
    adversarial = functional.adversarial_generator_loss(out)
    return out.abs().mean() + adversarial * functional.adaptive_weight(out.abs().mean(), adversarial, fake[0])


def _balanced(balancer: nn.LossBalancer, real: Lists, fake: Lists) -> torch.Tensor:
    out = real[0] * fake[0]
    losses = {"a": out.abs().mean(), "b": functional.adversarial_generator_loss(out)}
    return (out * balancer.gradient(losses, out)).sum()


def _stepped(step: Callable[[Lists, Lists], torch.Tensor], inputs: Inputs) -> Results:
    """A forward and a backward of a step; inputs: the real and then the fake logits."""
    half = len(inputs) // 2
    total = step(inputs[:half], inputs[half:])
    return [total.detach(), *torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)]


def _waits(compute: Callable[[Inputs], Results], inputs: Inputs) -> str:
    """What a pass does that it must not: wait for the device, which torch then refuses, or not be captured."""
    once = compute(inputs)
    if not once[0].is_cuda:
        return "" if _same(once, compute(inputs)) else "a second run gives other bits"
    try:
        torch.cuda.set_sync_debug_mode("error")
        compute(inputs)
        torch.cuda.set_sync_debug_mode("default")
        return _on_streams(compute, inputs)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _launches(compute: Callable[[], Any], device: str) -> int:
    if device == "cpu":
        before = native.emulator_launches()
        compute()
        return native.emulator_launches() - before
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        compute()
        torch.cuda.synchronize()
    on_gpu = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_gpu)


#: Steps, batch, units: mode to milliseconds that forward, and forward + backward, aim at on an H200 in bfloat16.
AIMS = {
    (128, 64, 128): {"RNN": (0.035, 0.10), "GRU": (0.065, 0.18), "LSTM": (0.075, 0.21)},
    (256, 64, 512): {"RNN": (0.14, 0.40), "GRU": (0.22, 0.70), "LSTM": (0.26, 0.80)},
}
PASSES = ("forward", "forward+backward")


def recurrent(arguments: argparse.Namespace) -> int:
    """Tells; nothing that is slow fails. Triton last, whose compilation takes most of the time that there is."""
    broken = 0
    for backend in backends(arguments.device):
        measure_one = functools.partial(_of_layer, backend=backend, dtype=torch.bfloat16, arguments=arguments)
        for (steps, batch, units), aims in AIMS.items():
            for mode, aim in aims.items():
                case = RnnCase("table", mode, steps, batch, units, units)
                times = [measure_one(case, passes=name) for name in PASSES]
                broken += backend == "cuda" and not all(backend in found for found in times)
                _print_row(case.name, times, [f"aim {1e3 * a:.0f} us" for a in aim])
        for mode in cases.GATES:
            packed = RnnCase("table", mode, 512, 16, 128, 128, packed=True)
            # as many rows without lengths, and as many steps, of which a kernel that walks through time has no fewer
            as_many_rows = int(packed.lengths().sum()) // packed.batch
            padded = [replace(packed, packed=False, steps=steps) for steps in (as_many_rows, packed.steps)]
            times = [[measure_one(case, passes=name, how="ahead") for name in PASSES] for case in (packed, *padded)]
            own = [[found.get(backend, math.nan) for found in row] for row in times]
            of = [
                f"{a / b:.2f} x padded of as many rows (aim 1.05), {a / c:.2f} x of as many steps"
                for a, b, c in zip(*own, strict=True)
            ]
            _print_row(packed.name, times[0], of)
            cell = RnnCase("table", mode, 0, 64, 128, 128)
            for how in ("graph", "calls"):
                _print_row(cell.name, [measure_one(cell, passes=name, how=how) for name in PASSES], [how] * 2)
    return 1 if broken else 0


#: Of cuDNN's grid, most of interest first.
GRID_UNITS = (128, 256, 512, 64, 1024, 192, 152, 168)
GRID_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def cudnn(arguments: argparse.Namespace) -> int:
    """Forward + backward of 64 sequences of 128 steps, as much as there is time for. Without Triton, which compiles
    for seconds what then takes a millisecond."""
    began = time.monotonic()
    for units, dtype, mode, packed in itertools.product(GRID_UNITS, GRID_DTYPES, cases.GATES, (False, True)):
        case = RnnCase("grid", mode, 128, 64, units, units, packed=packed)
        how = "ahead" if packed else "graph"
        times = _of_layer(case, "cuda", dtype, "forward+backward", arguments, how)
        name = str(dtype).removeprefix("torch.")
        print(f"RESULT: {case.name} {name}: {_line(times)}", flush=True)
        if arguments.device == "cpu" or time.monotonic() - began > arguments.seconds:
            break
    return 0


def _of_layer(
    case: RnnCase, backend: str, dtype: torch.dtype, passes: str, arguments: argparse.Namespace, how: str = "graph"
) -> dict[str, float]:
    """Seconds by who ran: PyTorch's module, a layer's being cuDNN's, and the backend if it can; how: of _seconds."""
    device = arguments.device
    case = case.shrunk(*SMALL) if device == "cpu" else case
    if refusals(Subject(case, backend, dtype, device)):
        return {}
    bout = Bout(case, passes, dtype, device, arguments.seed, most=2)
    times = {}
    for name, module, used in (("cudnn", bout.module, None), (backend, bout.ours(), backend)):
        compute = bout.computation(module)
        try:
            with mmfast.use_backend(used):
                times[name] = _seconds(lambda *x, run=compute: run(x), bout.sets, device, how)
        except Exception as error:  # the others are measured
            print(f"{case.name} by {name}: {type(error).__name__}: {error}", flush=True)
    return times


def _line(times: dict[str, float]) -> str:
    return ", ".join(f"{name} {1e6 * t:.1f} us" for name, t in times.items()) or "nothing ran"


def _print_row(name: str, times: Sequence[dict[str, float]], aims: Sequence[str]) -> None:
    for what, found, aim in zip(PASSES, times, aims, strict=True):
        if not found:
            continue
        print(f"RESULT: {name} {what}: {_line(found)}{f' ({aim})' * bool(aim)}", flush=True)


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
    bout = Bout(layer, "forward", torch.bfloat16, arguments.device, arguments.seed, most=8)
    formats = {"first": torch.contiguous_format}
    if len(layer.size) == 2:
        formats["last"] = torch.channels_last
    times = {}
    for where, layout in formats.items():
        sets = [[x.to(memory_format=layout) for x in inputs] for inputs in bout.sets]
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


def _seconds(module: Callable, sets: list[Inputs], device: str, how: str = "graph") -> float:
    """Of one call, on a GPU the median of 20 rounds of all sets: of "calls", of replays of a "graph" of them, or of
    calls that the host is "ahead" of; the last two are without the host's part. Lengths of a packed sequence come from
    the host, which no graph takes."""
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
    replay = functools.partial(_call_all, module, sets)
    if how == "graph":
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            replay()
        replay = captured.replay
    found = []
    for _ in range(20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if how == "ahead":
            torch.cuda._sleep(10_000_000)  # 5 ms
        begin.record()
        replay()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1e3 / len(sets))
    return statistics.median(found)


def _call_all(module: Callable, sets: list[Inputs]) -> None:
    for inputs in sets:
        module(*inputs)


PARTS = {part.__name__: part for part in (small, graph, losses, recurrent, cudnn, decoders)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=30.0, help="after so many cudnn begins no further row")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    return PARTS[arguments.part](arguments)


if __name__ == "__main__":
    sys.exit(main())
