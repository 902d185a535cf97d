"""What was measured, for eyes and for files: tables of at most 100 columns, JSON, CSV, Markdown, and a comparison."""

from __future__ import annotations

import csv
import json
import math
import platform
import statistics
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .. import __version__, table
from ..info import commit
from .contenders import AGAIN, CHANNELS_LAST, COMPILED, EAGER, OURS
from .measure import Row

WIDTH = 100

MODE_LABELS = {
    "forward": "forward",
    "forward+backward": "fwd + bwd",
    "double backward": "double bwd",
    "training step": "step",
}

#: what a row of the CSV file is known by; a later measurement of the same replaces it
KEY = ("op", "case", "mode", "dtype", "device", "provider", "commit")
COLUMNS = (
    *KEY, "threads", "backend", "low_us", "median_us", "high_us", "best_us", "first_ms", "memory_bytes", "rounds",
    "floor_us", "noise", "ratio_to_best_rival", "machine", "torch", "triton",
)  # fmt: skip


def environment(device: str) -> dict[str, Any]:
    """What a number must carry with it: machine, versions, commit."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "not installed"
    return {
        "machine": table.processor() if device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "device": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "mmfast": __version__,
        "commit": commit(),
    }


def lines(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """The table of one op's rows, as (text, style) lines."""
    if not rows:
        return
    first = rows[0]
    others = _others(rows)
    yield f"{first.op}: {first.dtype}, {first.device}, {threads(first.threads)}", "bold"
    heads = ["floor", "eager", "compile", *(name.removeprefix(OURS + " ")[:8] for name in others), "mmfast"]
    yield " " * 11 + "".join(f"{head:>9}" for head in heads) + "  ratio floor%  memory   first  A/A", "bold"
    case = ""
    for row in rows:
        if row.case != case:
            case = row.case
            yield f"{case}  [{row.chosen or 'torch'}]", ""
        yield _line(row, others), "red" if row.slower else "green" if row.ratio > 1.03 else ""
    for row in rows:
        for name, reason in row.wrong.items():
            yield from ((line, "red") for line in _wrapped(f"! {row.case}, {row.mode}: {name} {reason}"))
    yield from _summary(rows)


def _summary(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    measured = [row for row in rows if not math.isnan(row.ratio)]
    if not measured:
        yield f"{rows[0].op}: nothing was measured", "red"
        return
    parts = [
        f"{MODE_LABELS[mode]} {geometric_mean(row.ratio for row in measured if row.mode == mode):.2f}x"
        for mode in dict.fromkeys(row.mode for row in measured)
    ]
    worst = min(measured, key=lambda row: row.ratio)
    losses = sum(row.slower for row in measured)
    yield f"geometric mean {geometric_mean(row.ratio for row in measured):.2f}x ({', '.join(parts)})", "bold"
    slower = f"; slower in {losses} of {len(measured)}" if losses else ""
    yield f"worst {worst.ratio:.2f}x: {worst.case}, {MODE_LABELS[worst.mode]}{slower}", "bold"


LEGEND = (
    "Times are 20th percentiles of interleaved rounds. floor: this machine's matrix products and memory",
    "traffic alone; eager: PyTorch in its better memory format; compile: torch.compile of it, where asked",
    "for; mmfast: as you get it, by the backend in [brackets]; ratio: the best rival's time / mmfast's;",
    "floor%: floor / mmfast; memory: mmfast's peak beyond what was there; first: mmfast's first call;",
    "A/A: PyTorch against itself.",
)


def _line(row: Row, others: Sequence[str]) -> str:
    label, *cells = _cells(row, others)
    widths = [*[9] * (len(cells) - 5), 7, 7, 8, 8, 5]
    return f" {label:<10}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def _cells(row: Row, others: Sequence[str]) -> list[str]:
    present = [name for name in (EAGER, CHANNELS_LAST) if name in row.timings]
    eager = min(present, key=lambda name: row.timings[name].low, default=EAGER)
    ours = row.timings.get(OURS)
    return [
        MODE_LABELS[row.mode],
        duration(row.floor),
        *(_cell(row, name) for name in (eager, COMPILED, *others, OURS)),
        _times(row.ratio),
        _percent(row.share),
        size(ours.memory if ours else None),
        duration(ours.first if ours else math.nan),
        _percent(row.noise),
    ]


def _others(rows: Sequence[Row]) -> list[str]:
    """The contenders that have a column of their own: peers, then mmfast's backends."""
    names = dict.fromkeys(name for row in rows for name in (*row.timings, *row.wrong))
    return [name for name in names if name not in (EAGER, AGAIN, CHANNELS_LAST, COMPILED, OURS)]


def _cell(row: Row, name: str) -> str:
    if name in row.timings:
        return duration(row.timings[name].low)
    return "wrong" if name in row.wrong else "-"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="    ")


def threads(count: int) -> str:
    """1 thread, 2 threads."""
    return f"{count} thread{'s' * (count != 1)}"


def duration(seconds: float) -> str:
    """Three digits and a unit, at most 7 characters; "-" for nan."""
    if math.isnan(seconds):
        return "-"
    for unit, scale in (("us", 1e-6), ("ms", 1e-3)):
        if seconds < 999.5 * scale:
            return f"{_three(seconds / scale)} {unit}"
    return f"{_three(seconds)} s"


def size(amount: float | None) -> str:
    """Three digits and a unit of bytes; "-" for None."""
    if amount is None:
        return "-"
    if amount < 999.5:
        return f"{amount:.0f} B"
    for unit, scale in (("kB", 1e3), ("MB", 1e6)):
        if amount < 999.5 * scale:
            return f"{_three(amount / scale)} {unit}"
    return f"{_three(amount / 1e9)} GB"


def _three(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def _times(ratio: float) -> str:
    return "-" if math.isnan(ratio) else f"{ratio:.2f}x"


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.0f}%"


def geometric_mean(ratios: Iterable[float]) -> float:
    """nan for none."""
    values = list(ratios)
    return statistics.geometric_mean(values) if values else math.nan


def write_json(path: Path, rows: Sequence[Row], device: str, complete: bool) -> None:
    """Everything measured; nan as null. Replaces the file at once, so that it is whole at any moment."""
    content = {"environment": environment(device), "complete": complete, "rows": [row.as_dict() for row in rows]}
    replace(path, json.dumps(_without_nan(content), indent=1) + "\n")


def read_json(path: Path) -> list[Row]:
    """The rows of a file that `write_json` wrote; ValueError where it is none."""
    try:
        rows = json.loads(path.read_text())["rows"]
        return [Row.from_dict({name: _nan(name, value) for name, value in row.items()}) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of mmfast bench --json ({error!r})") from None


def _nan(name: str, value: Any) -> Any:
    return math.nan if value is None and name in ("floor", "flops", "bytes") else value


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_csv(path: Path, rows: Sequence[Row], device: str) -> None:
    """Adds a line per row and contender to the file; a line with the same key is replaced."""
    kept: dict[tuple[str, ...], dict[str, Any]] = {}
    if path.exists():
        with path.open(newline="") as file:
            kept = {tuple(line[name] for name in KEY): line for line in csv.DictReader(file)}
    for line in _csv_lines(rows, environment(device)):
        kept[tuple(str(line[name]) for name in KEY)] = line
    unfinished = path.with_name(path.name + ".unfinished")
    path.parent.mkdir(parents=True, exist_ok=True)
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept.values())
    unfinished.replace(path)


def _csv_lines(rows: Sequence[Row], where: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for row in rows:
        for provider, t in row.timings.items():
            ours = provider == OURS
            yield {
                **{name: getattr(row, name) for name in ("op", "case", "mode", "dtype", "device", "threads")},
                "provider": provider,
                "commit": where["commit"],
                "backend": row.chosen if ours else "",
                **{f"{name}_us": f"{1e6 * getattr(t, name):.2f}" for name in ("low", "median", "high", "best")},
                "first_ms": f"{1e3 * t.first:.2f}",
                "memory_bytes": "" if t.memory is None else t.memory,
                "rounds": t.rounds,
                "floor_us": "" if math.isnan(row.floor) else f"{1e6 * row.floor:.2f}",
                "noise": f"{row.noise:.3f}",
                "ratio_to_best_rival": f"{row.ratio:.3f}" if ours else "",
                **{name: where[name] for name in ("machine", "torch", "triton")},
            }


def write_markdown(path: Path, rows: Sequence[Row], device: str) -> None:
    """The tables as Markdown."""
    where = environment(device)
    text = "# mmfast bench\n\n" + ", ".join(f"{name} {value}" for name, value in where.items()) + "\n"
    for op in dict.fromkeys(row.op for row in rows):
        text += "\n" + "\n".join(_markdown([row for row in rows if row.op == op])) + "\n"
    replace(path, text + "\n" + " ".join(LEGEND) + "\n")


def _markdown(rows: Sequence[Row]) -> Iterator[str]:
    others = _others(rows)
    heads = [
        "case",
        "runs",
        "pass",
        "floor",
        "eager",
        "compile",
        *(name.removeprefix(OURS + " ")[:8] for name in others),
        "mmfast",
    ]
    heads += ["ratio", "floor%", "memory", "first", "noise"]
    yield f"## {rows[0].op}\n"
    yield "| " + " | ".join(heads) + " |"
    yield "|---|---|---|" + "---:|" * (len(heads) - 3)
    for row in rows:
        yield "| " + " | ".join([row.case, row.chosen or "torch", *_cells(row, others)]) + " |"
    yield ""
    yield from (text for text, _ in _summary(rows))


def replace(path: Path, text: str) -> None:
    """Writes a file under another name first, so that it is never seen half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)


def compare(rows: Sequence[Row], base: Sequence[Row], slowdown: float) -> tuple[list[tuple[str, str]], bool]:
    """(lines, whether there was something to compare and no case became slower) of mmfast's times then and now.

    A case is slower if its time grew by more than `slowdown`, and so did its time relative to PyTorch's: a machine
    that is busier than it was slows both.
    """
    before = {(row.case, row.mode, row.dtype, row.device, row.threads): row for row in base}
    found, fine = [(f"{'then':>70}{'now':>10}{'ratio':>8}", "bold")], True
    for row in rows:
        old = before.get((row.case, row.mode, row.dtype, row.device, row.threads))
        if old is None or OURS not in row.timings or OURS not in old.timings:
            continue
        then, now = old.timings[OURS].low, row.timings[OURS].low
        ratio = now / then
        relative = ratio * old.timings[old.rival].low / row.timings[row.rival].low
        bad = min(ratio, relative) > slowdown
        fine = fine and not bad
        name = f"{row.case[:48]} {MODE_LABELS[row.mode]}"
        found.append((f"{name:<60}{duration(then):>10}{duration(now):>10}{ratio:>7.2f}x{' slower' * bad}", "red" * bad))
    if len(found) == 1:
        return [("it holds none of these cases, in this dtype, on this device, with so many threads", "red")], False
    return found, fine
