"""Pictures of what was measured: speed-up bars, the roofline, and scaling over steps, batch and hidden size."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .contenders import OURS
from .floor import Floor
from .measure import Row
from .report import MODE_LABELS

#: Okabe and Ito's colours, told apart by any eye, and a marker each for black and white
STYLES = {
    "forward": ("#0072B2", "o"),
    "forward+backward": ("#E69F00", "s"),
    "double backward": ("#009E73", "^"),
    "training step": ("#CC79A7", "D"),
}


def check(path: Path) -> None:
    """ValueError where `draw` could not write there."""
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"--plot {path}: the name must end in .png or .svg")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError('--plot needs matplotlib: pip install "mmfast[train]"')


def draw(path: Path, rows: Sequence[Row], rates: Floor, title: str) -> None:
    """Writes the picture as PNG or SVG, by the name's ending; nothing where no row has anything to draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bars = [row for row in rows if not math.isnan(row.ratio) and not row.case.startswith("scaling-")]
    scaled = [row for row in rows if row.case.startswith("scaling-")]
    counted = [row for row in bars if not math.isnan(row.flops)]
    panels: list[tuple[float, Callable[[Any], None]]] = []
    if bars:
        panels.append((1.0 + 0.2 * len(bars) + 0.15 * len({row.case for row in bars}), lambda at: _bars(at, bars)))
    if counted:
        panels.append((4.5, lambda at: _roofline(at, counted, rates)))
    if scaled:
        panels.append((3.5, lambda at: _scaling(at, scaled)))
    if not panels:
        return
    figure = Figure(figsize=(10, sum(height for height, _ in panels) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    parts = figure.subfigures(len(panels), 1, height_ratios=[height for height, _ in panels], squeeze=False)
    for part, (_, panel) in zip(parts[:, 0], panels, strict=True):
        panel(part)
    unfinished = path.with_name(path.name + ".unfinished")
    figure.savefig(unfinished, format=path.suffix[1:], dpi=110)
    unfinished.replace(path)


def _bars(part: Any, rows: Sequence[Row]) -> None:
    axes = part.subplots()
    places, labels, at = [], [], 0.0
    for case in dict.fromkeys(row.case for row in rows):
        same = [row for row in rows if row.case == case]
        for row in same:
            color, _ = STYLES[row.mode]
            axes.barh(at, math.log2(row.ratio), height=0.9, color=color)
            beyond = math.log2(row.ratio) >= 0
            axes.annotate(
                f"{row.ratio:.2f}x",
                (math.log2(row.ratio), at),
                xytext=(3 if beyond else -3, 0),
                textcoords="offset points",
                ha="left" if beyond else "right",
                va="center",
                fontsize=7,
            )
            at += 1
        places.append(at - (len(same) + 1) / 2)
        labels.append(case)
        at += 0.7
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(places, labels, fontsize=7)
    axes.set_ylim(at, -1)
    low, high = (f(math.log2(row.ratio) for row in rows) for f in (min, max))
    ticks = range(math.floor(min(low, -0.5)), math.ceil(max(high, 1)) + 1)
    axes.set_xticks(list(ticks), [f"{2.0**tick:g}x" for tick in ticks])
    axes.set_xlim(ticks[0] - 0.35, ticks[-1] + 0.35)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_xlabel("the best rival's time / mmfast's (log scale; right of 1x mmfast is faster)", fontsize=8)
    axes.set_title("Speed-up", fontsize=10, loc="left")
    _legend(axes, rows)


def _legend(axes: Any, rows: Sequence[Row]) -> None:
    """Above the bars, which may fill any corner."""
    from matplotlib.patches import Patch

    modes = [mode for mode in STYLES if any(row.mode == mode for row in rows)]
    patches, labels = [Patch(color=STYLES[m][0]) for m in modes], [MODE_LABELS[m] for m in modes]
    axes.legend(patches, labels, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(modes), frameon=False)


def _roofline(part: Any, rows: Sequence[Row], rates: Floor) -> None:
    """Each row at its arithmetic intensity; one without matrix products counts one operation a byte."""
    axes = part.subplots()
    points = []
    for row in rows:
        for name, filled in ((row.rival, False), (OURS, True)):
            work = row.flops or row.bytes
            points.append((work / row.bytes, work / row.timings[name].low / 1e9, STYLES[row.mode], filled))
    low = min(min(x for x, *_ in points) / 2, 0.5)
    high = max(max(x for x, *_ in points) * 2, 4 * rates.flops / rates.memory)
    for bandwidth, style, label in (
        (rates.memory, "-", f"memory {rates.memory / 1e9:.0f} GB/s"),
        (max(rates.bandwidth.values()), ":", f"cache {max(rates.bandwidth.values()) / 1e9:.0f} GB/s"),
    ):
        ridge = rates.flops / bandwidth
        label = f"{label}, {rates.flops / 1e9:.0f} GFLOP/s"
        axes.plot(
            [low, ridge, high],
            [low * bandwidth / 1e9, rates.flops / 1e9, rates.flops / 1e9],
            "k" + style,
            lw=1,
            label=label,
        )
    for x, y, (color, marker), filled in points:
        axes.plot(x, y, marker, color=color, markerfacecolor=color if filled else "white", markersize=5)
    axes.plot([], [], "ko", markersize=5, label="mmfast (marker: pass, as the bars' colours)")
    axes.plot([], [], "ko", markersize=5, markerfacecolor="white", label="best rival")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_xlabel("floating-point operations per byte that must move", fontsize=8)
    axes.set_ylabel("GFLOP/s (without products: GB/s)", fontsize=8)
    axes.set_title("Roofline of this machine", fontsize=10, loc="left")
    axes.grid(alpha=0.3, which="both")
    # nothing is above the roof
    axes.set_ylim(top=5 * rates.flops / 1e9)
    axes.legend(fontsize=7, loc="upper left", ncols=2)


def _scaling(part: Any, rows: Sequence[Row]) -> None:
    panels = part.subplots(1, 3, sharey=True)
    for axes, letter, label in zip(panels, "TBH", ("time steps", "batch", "hidden size"), strict=True):
        varied = _varied(rows, letter)
        for mode in dict.fromkeys(row.mode for _, row in varied):
            color, marker = STYLES[mode]
            points = sorted((x, row) for x, row in varied if row.mode == mode)
            xs = [x for x, _ in points]
            for name, style, fill in ((None, "--", "white"), (OURS, "-", color)):
                ys = [1e3 * row.timings[name or row.rival].low for _, row in points]
                who = "mmfast" if name else "PyTorch"
                axes.plot(
                    xs, ys, style + marker, color=color, markerfacecolor=fill, ms=5, label=f"{who}, {MODE_LABELS[mode]}"
                )
        sizes = sorted({x for x, _ in varied})
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(label, fontsize=8)
        axes.grid(alpha=0.3, which="both")
        axes.set_xticks(sizes, [str(x) for x in sizes])
        axes.minorticks_off()
    panels[0].set_ylabel("milliseconds", fontsize=8)
    panels[0].legend(fontsize=7)
    part.suptitle(
        "Scaling of one LSTM (64 steps, batch 16, 128 units; one of them varied)", fontsize=10, x=0.02, ha="left"
    )


def _varied(rows: Sequence[Row], letter: str) -> list[tuple[int, Row]]:
    """(size, row) of the rows in which only the size named by the letter differs from the base."""
    base = {"T": 64, "B": 16, "H": 128}
    chosen = []
    for row in rows:
        sizes = {part[0]: int(part[1:]) for part in row.case.split("-") if part[1:].isdigit()}
        if OURS in row.timings and all(sizes[name] == size for name, size in base.items() if name != letter):
            chosen.append((sizes[letter], row))
    return chosen
