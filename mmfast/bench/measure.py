"""Measuring side by side: one process, interleaved rounds, and no time for whoever computes the wrong thing.

Every round times each contender once, in an order that rotates, so that whatever else the machine does falls on all
alike. A contender is checked against float64 before it is timed, on the results of its last timed call, and after
that on fresh numbers in old memory: a kernel that keeps results, writes nothing or runs beside the current stream is
reported as wrong. What a kernel leaves unwritten it hands out as NaN, because torch fills new memory so while checking.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import table
from ..numerics import Errors
from . import floor
from .contenders import AGAIN, EAGER, OURS, Bout, Contender, Results, detached

#: one sample lasts at least this long; shorter calls are repeated within it
SAMPLE_SECONDS = 1e-3
FEWEST_ROUNDS = 5

#: mmfast is slower where it falls below this ratio and loses more than this many seconds
SLOWER_RATIO, SLOWER_SECONDS = 0.97, 2e-6

#: results may be off by so many times what mmfast.numerics allows; a whole model carries a rounding through many layers
SLACK, MODEL_SLACK = 8, 64

#: the gradient of a model jumps where an activation or an L1 loss has its kink, and one value among thousands is on it:
#: a model's result may be off by these shares of its largest value and of its rms (of PyTorch's own runs whose weights
#: were moved by one rounding, one in four breaks the rule without it), or by so many times what such runs are off by
KINKS, NEAR_MISS = (0.01, 0.01), 1.5


@dataclass
class Timing:
    """One contender: seconds a call, as percentiles over the rounds."""

    low: float  # 20th percentile
    median: float
    high: float  # 80th percentile
    best: float
    first: float  # the first call, compilation included
    memory: int | None = None  # peak bytes beyond what was there before the call; None where not measured
    rounds: int = 0


@dataclass
class Row:
    """One case and mode: all contenders, the floor and the noise."""

    op: str
    case: str
    mode: str
    dtype: str
    device: str
    threads: int
    floor: float  # seconds; nan where not counted
    chosen: str = ""  # the backend (or backends, joined by +) that mmfast chose
    noise: float = 0.0  # |ratio - 1| of two measurements of one contender
    flops: float = math.nan  # of matrix products, with its bytes what the floor is made from
    bytes: float = math.nan
    keys: list[str] = field(default_factory=list)  # of the preference table: what mmfast chose by
    timings: dict[str, Timing] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)

    @property
    def rival(self) -> str:
        """The fastest of what a user has without mmfast; empty where nothing of it ran."""
        rivals = [name for name in self.timings if not name.startswith(OURS)]
        return min(rivals, key=lambda name: self.timings[name].low) if rivals else ""

    @property
    def ratio(self) -> float:
        """How many times faster mmfast's own choice is than the best rival; nan where one of them is missing."""
        if OURS not in self.timings or not self.rival:
            return math.nan
        return self.timings[self.rival].low / self.timings[OURS].low

    @property
    def slower(self) -> bool:
        """Whether mmfast loses: below 0.97 of the rival's speed and by more than 2 microseconds."""
        if math.isnan(self.ratio):
            return False
        loss = self.timings[OURS].low - self.timings[self.rival].low
        return self.ratio < SLOWER_RATIO and loss > SLOWER_SECONDS

    @property
    def share(self) -> float:
        """The floor as a share of mmfast's time: 1 is the physical limit."""
        return self.floor / self.timings[OURS].low if OURS in self.timings else math.nan

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "rival": self.rival, "ratio": self.ratio}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Row:
        values = {name: value for name, value in values.items() if name not in ("rival", "ratio")}
        return Row(**{**values, "timings": {name: Timing(**timing) for name, timing in values["timings"].items()}})


def measure(
    bout: Bout,
    rates: floor.Floor,
    *,
    contenders: Iterable[Contender] | None = None,
    rounds: int = 30,
    seconds: float = 1.5,
    memory: bool = True,
) -> Row:
    """Times every contender that computes the right thing: at most `rounds` rounds and about `seconds` seconds.

    Where mmfast comes out slower, everyone is timed again with five times the rounds.
    """
    row = _empty_row(bout, rates)
    field_of = list(_admitted(bout, bout.contenders() if contenders is None else contenders, row))
    if not field_of:
        return row
    _time(bout, field_of, row, rounds, seconds)
    if row.slower:
        _time(bout, field_of, row, 5 * rounds, 5 * seconds)
    _audit(bout, field_of, row)
    if memory:
        _weigh(bout, field_of, row)
    for c in field_of:
        if c.name == OURS:
            asked = bout.asked(c.compute)
            row.chosen = "+".join(sorted({op.explain(case).backend for op, case in asked}))
            row.keys = [table.key(op.name, case, row.threads) for op, case in asked]
    return row


def _empty_row(bout: Bout, rates: floor.Floor) -> Row:
    case = bout.case
    row = Row(
        op=case.op,
        case=case.name,
        mode=bout.mode,
        dtype=str(bout.dtype).removeprefix("torch."),
        device=bout.device,
        threads=torch.get_num_threads(),
        floor=rates.seconds(case, bout.mode, bout.dtype),
    )
    if not math.isnan(row.floor):
        work = case.work(bout.dtype)
        passes = 1 if bout.mode == "forward" else 3
        row.flops, row.bytes = passes * work.flops, passes * work.bytes
    return row


def _admitted(bout: Bout, contenders: Iterable[Contender], row: Row) -> Iterator[Contender]:
    """Those that compute the right thing, and do so again when new memory is poisoned."""
    for contender in contenders:
        started = time.perf_counter()
        try:
            with contender.forced():
                results = contender.call(0)
                _synchronize(bout.device)
                contender.first = time.perf_counter() - started
                complaint = _complaint(bout, 0, results)
                if not complaint and contender.is_ours:
                    complaint = _complaint(bout, 1, _poisoned(contender, 1))
        except Exception as error:  # whatever stops one contender, the others and the cases to come are measured
            complaint = f"does not run: {type(error).__name__}: {(str(error) or '-').splitlines()[0]}"
        if complaint:
            row.wrong[contender.name] = complaint
        else:
            yield contender


def _time(bout: Bout, field_of: list[Contender], row: Row, rounds: int, limit: float) -> None:
    """Fills row.timings; drops whose last results are wrong."""
    repeats = {c.name: _repeats(c, bout.device) for c in field_of}
    samples: dict[str, list[float]] = {c.name: [] for c in field_of}
    last: dict[str, Results] = {}
    started, i = time.perf_counter(), 0
    collecting = gc.isenabled()
    gc.disable()
    try:
        for i in range(rounds):
            for c in _rotated(field_of, i):
                with c.forced():
                    taken, last[c.name] = _sample(c, i, repeats[c.name], bout.device)
                samples[c.name].append(taken)
            if i + 1 >= FEWEST_ROUNDS and time.perf_counter() - started > limit:
                break
    finally:
        if collecting:
            gc.enable()
    for c in field_of:
        complaint = _complaint(bout, i + repeats[c.name] - 1, last[c.name])
        if complaint:
            row.wrong[c.name] = f"{complaint} (in a timed call)"
            row.timings.pop(c.name, None)
        else:
            row.timings[c.name] = _timing(c, samples[c.name])
    _note_noise(row)


def _note_noise(row: Row) -> None:
    again, eager = row.timings.pop(AGAIN, None), row.timings.get(EAGER)
    if again and eager:
        row.noise = abs(again.low / eager.low - 1)


def _rotated(field_of: list[Contender], i: int) -> list[Contender]:
    start = i % len(field_of)
    return field_of[start:] + field_of[:start]


def _repeats(contender: Contender, device: str) -> int:
    with contender.forced():
        taken, _ = _sample(contender, 0, 1, device)
        if taken < 10 * SAMPLE_SECONDS:
            taken = min(taken, *(_sample(contender, i, 1, device)[0] for i in (1, 2)))
    return max(1, math.ceil(SAMPLE_SECONDS / taken))


def _sample(contender: Contender, start: int, repeats: int, device: str) -> tuple[float, Results]:
    """(seconds a call, the last call's results) of some calls in a row, each on the next set of inputs."""
    results: list[Results] = []

    def calls() -> None:
        for i in range(start, start + repeats):
            results[:] = [contender.call(i)]

    taken = floor.seconds(calls, device) / repeats
    return taken, results[0]


def _timing(contender: Contender, samples: list[float]) -> Timing:
    low, median, high = (float(cut) for cut in np.quantile(samples, (0.2, 0.5, 0.8)))
    return Timing(low, median, high, min(samples), contender.first, rounds=len(samples))


def _audit(bout: Bout, field_of: list[Contender], row: Row) -> None:
    """Fresh numbers in the memory of old ones: whoever kept a result by its inputs' address gives the old one."""
    bout.refill(field_of, 0)
    for c in field_of:
        if c.name == AGAIN:
            continue
        with c.forced():
            results = _poisoned(c, 0) if c.is_ours else detached(c.call(0))
        complaint = _complaint(bout, 0, results)
        if complaint:
            row.wrong[c.name] = f"{complaint} (on fresh numbers in the memory of old ones)"
            row.timings.pop(c.name, None)


def _complaint(bout: Bout, i: int, results: Sequence[Tensor]) -> str:
    """What is wrong with the results on the i-th set of inputs; empty where nothing is."""
    yardstick, exact = bout.truth(i)
    if len(results) != len(exact):
        return f"gives {len(results)} results, PyTorch {len(exact)}"
    is_model = bout.case.op == "model"
    slack, kinks = (MODEL_SLACK, KINKS) if is_model else (SLACK, (0.0, 0.0))
    for place, (out, near, true) in enumerate(zip(results, yardstick, exact, strict=True)):
        complaint = disagreement(f"result {place}", out, near, true, slack, kinks)
        if complaint and is_model and kinks is KINKS:
            kinks = _jumps(bout, i, exact)
            complaint = disagreement(f"result {place}", out, near, true, slack, kinks)
        if complaint:
            return complaint
    return ""


def _jumps(bout: Bout, i: int, exact: Results) -> tuple[float, float]:
    """KINKS, or so many times what any result of PyTorch's near misses is off by, where that is more.

    Of any, for which gradients a kink is seen in is chance: each run crosses others. But not of one that is 0 but for
    rounding, as a bias' before a norm is.
    """
    scale = max(float(x.abs().max()) for x in exact)
    known = [place for place, x in enumerate(exact) if float(x.abs().max()) > 1e-9 * scale]
    off = [_shares_off(miss[place], exact[place]) for miss in bout.near_misses(i) for place in known]
    largest, rms = (max(kink, NEAR_MISS * max(shares)) for kink, *shares in zip(KINKS, *off, strict=True))
    return largest, rms


def _shares_off(out: Tensor, exact: Tensor) -> tuple[float, float]:
    """The largest error as a share of the largest exact value, and the rms error of the exact rms; 0 if not finite."""
    error = out.cpu().double() - exact
    largest, rms = error.abs().max() / exact.abs().max(), error.norm() / exact.norm()
    return largest.nan_to_num(0, 0, 0).item(), rms.nan_to_num(0, 0, 0).item()


def disagreement(
    name: str, out: Tensor, yardstick: Tensor, exact: Tensor, slack: float = SLACK, kinks: Sequence[float] = (0.0, 0.0)
) -> str:
    """Why `out` is not as good as the yardstick, by mmfast.numerics' rule; empty where it is.

    With `slack` times its bounds, or the shares `kinks` of the exact max and rms where that is more: this asks
    whether a kernel, PyTorch's other ones included, computes the right thing; `mmfast validate` asks how well.
    """
    if out.dtype == torch.float64:
        scale = float(exact.abs().max()) if exact.numel() else 0.0
        error = float((out.detach().cpu() - exact).abs().max()) if exact.numel() else 0.0
        return "" if error <= 1e-10 * max(scale, 1e-300) else f"{name} is off by {error:.3g} at a scale of {scale:.3g}"
    errors = Errors(name)
    try:
        errors.add(out.detach(), yardstick, exact)
    except AssertionError as differs:
        return str(differs)
    if not out.numel():
        return ""
    found = errors.compare()
    largest, rms = float(exact.abs().max()), float(exact.square().mean().sqrt())
    for what, error, bound in (
        ("max", found.ours.max, max(slack * found.max_bound, kinks[0] * largest)),
        ("rms", found.ours.rms, max(slack * found.rms_bound, kinks[1] * rms)),
    ):
        if not error <= bound:
            return f"{name}: the {what} error is {error:.3g}, more than {bound:.3g}"
    return ""


def _poisoned(contender: Contender, i: int) -> Results:
    """Its results when all memory that torch hands out is full of NaN."""
    with poison():
        return detached(contender.call(i))


@contextlib.contextmanager
def poison() -> Iterator[None]:
    """While it lasts, torch.empty and its kin hand out NaN (and deterministic algorithms run where there are any)."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    filling = settings.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        settings.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            settings.fill_uninitialized_memory = filling


def _weigh(bout: Bout, field_of: list[Contender], row: Row) -> None:
    gc.collect()
    for c in field_of:
        if c.name in row.timings:
            with c.forced():
                weights = [peak_memory(functools.partial(c.call, 1), bout.device) for _ in range(2)]
            row.timings[c.name].memory = min((w for w in weights if w is not None), default=None)


def peak_memory(call: Callable[[], object], device: str) -> int | None:
    """Bytes in use at the worst moment of a call, beyond those in use before it, results included.

    On a CPU the process's own peak, which counts native scratch memory too (Linux; None elsewhere).
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        # memory that was freed but kept would hide what a call takes
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        call()
        return _status("VmHWM") - before
    except (OSError, AttributeError):
        return None


def _status(name: str) -> int:
    with open(f"/proc/{os.getpid()}/status") as lines:
        for line in lines:
            if line.startswith(name):
                return int(line.split()[1]) << 10
    raise OSError(f"no {name} in /proc/self/status")


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
