"""The pictures of a run: curves, and grids of samples with their captions."""

import csv
import io
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmfast.train.checkpoint import write_bytes

TILE = 96  # pixels that a picture is drawn at, at least
GAP = 6
TEXT_WIDTH = 210
FONT_SIZE = 14
INK, PALE, PAPER = (30, 30, 30), (110, 110, 110), (255, 255, 255)


@dataclass
class Entry:
    """What was asked for, and pictures (3, height, width) in [-1, 1] under the section's headings, drawn as squares."""

    text: str
    pictures: list[Tensor]


@dataclass
class Section:
    """Entries under one title; `headings` name the pictures of each entry, an empty one goes on with the last."""

    title: str
    headings: list[str]
    entries: list[Entry]


def font_path() -> Path:
    """DejaVu Sans, which comes with matplotlib: Latin, Cyrillic and Greek; no Chinese, Japanese or Korean."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@cache
def _glyphs() -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(str(font_path())).get_charmap())


def drawable(text: str) -> bool:
    """Whether the font has every character, and the text runs from left to right."""
    return all(ord(c) in _glyphs() and unicodedata.bidirectional(c) not in ("R", "AL") for c in text)


def draw_sections(path: Path, sections: Sequence[Section], columns: int = 2) -> None:
    """A PNG of the sections one below the other, the entries of each in `columns` columns."""
    from PIL import Image

    drawn = [_section(section, columns) for section in sections if section.entries]
    sheet = Image.new("RGB", (max(i.width for i in drawn), sum(i.height for i in drawn)), PAPER)
    top = 0
    for image in drawn:
        sheet.paste(image, (0, top))
        top += image.height
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())


def _section(section: Section, columns: int) -> Any:
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(str(font_path()), FONT_SIZE)
    tile = _tile(section.entries[0].pictures[0])
    columns = min(columns, len(section.entries))
    rows = -(-len(section.entries) // columns)
    entry_width = TEXT_WIDTH + len(section.headings) * (tile + GAP) + 3 * GAP
    head = 3 * FONT_SIZE + 3 * GAP
    sheet = Image.new("RGB", (columns * entry_width + GAP, head + rows * (tile + GAP) + GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP), section.title, INK, font=font)
    for column in range(columns):
        left = GAP + column * entry_width + TEXT_WIDTH
        for i, heading in enumerate(section.headings):
            pen.text((left + i * (tile + GAP), head - FONT_SIZE - GAP), heading, PALE, font=font)
    for i, entry in enumerate(section.entries):
        left = GAP + (i % columns) * entry_width
        top = head + (i // columns) * (tile + GAP)
        sheet.paste(_caption(entry.text, font, tile), (left, top))
        for j, picture in enumerate(entry.pictures):
            sheet.paste(_image(picture, tile), (left + TEXT_WIDTH + j * (tile + GAP), top))
    return sheet


def _tile(picture: Tensor) -> int:
    side = picture.shape[-1]
    return side * max(1, round(TILE / side))


def _image(picture: Tensor, tile: int) -> Any:
    from PIL import Image

    pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels).resize((tile, tile), Image.Resampling.NEAREST)


def _caption(text: str, font: Any, height: int) -> Any:
    """`text` in lines beside a picture; what the font cannot draw is shown as '?', what does not fit is cut off."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (TEXT_WIDTH - GAP, height), PAPER)
    lines = [""]
    for word in "".join(c if drawable(c) else "?" for c in text).split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= TEXT_WIDTH - GAP or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    ImageDraw.Draw(image).text((0, 0), "\n".join(lines), INK, font=font)
    return image


def draw_curves(path: Path, metrics: Path) -> None:
    """A PNG of every column of metrics.csv over the steps: each value pale, the running mean of 50 dark."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with open(metrics, newline="") as file:
        rows = list(csv.reader(file))
    names, values = rows[0][1:], torch.tensor([[float(x) for x in row] for row in rows[1:]])
    figure = Figure(figsize=(14, 6), layout="constrained")
    FigureCanvasAgg(figure)
    for name, axes, column in zip(names, figure.subplots(2, 4).flat, values[:, 1:].T, strict=True):
        smooth = _running_mean(column, 50)
        axes.plot(values[:, 0], column, color="lightsteelblue", linewidth=0.5)
        axes.plot(values[:, 0], smooth, color="navy", linewidth=1.2)
        low, high = column.quantile(0.005), column.quantile(0.995)
        axes.set_ylim(float(low - 0.05 * (high - low)) - 1e-6, float(high + 0.05 * (high - low)) + 1e-6)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    write_bytes(path, buffer.getvalue())


def draw_ratios(path: Path, parts: dict[str, list[float]]) -> None:
    """A PNG of bars: how many times faster mmfast runs each part; `parts`: name to [plain ms, mmfast ms]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    bars = axes.barh(list(parts), [plain / fast for plain, fast in parts.values()], color="steelblue")
    axes.bar_label(bars, [f"{plain:.1f} to {fast:.1f} ms" for plain, fast in parts.values()], padding=3, fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.margins(x=0.25)
    axes.invert_yaxis()
    axes.set_xlabel("time of plain PyTorch / time of mmfast")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    write_bytes(path, buffer.getvalue())


def _running_mean(values: Tensor, width: int) -> Tensor:
    sums = torch.nn.functional.pad(values.double().cumsum(0), (1, 0))
    ends = torch.arange(1, len(values) + 1)
    begins = (ends - width).clamp(min=0)
    return (sums[ends] - sums[begins]) / (ends - begins)
