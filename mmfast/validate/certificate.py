"""The certificate: every check as one line, with what it takes to repeat it; as text, Markdown, JSON and HTML."""

from __future__ import annotations

import datetime
import html
import json
import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..bench.report import WIDTH, replace
from .checks import BINS, CHECKS, MUTANT, NUMERICS, SECOND, TRAINING, Row

INTERRUPTED = "interrupted"

DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass
class Certificate:
    """What was checked, where, and what could not be."""

    environment: dict[str, Any]
    seed: int
    command: str
    rows: list[Row] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=dict)  # reason -> what it kept from being checked
    complete: bool = False
    cause: str = ""  # why it is not complete

    @property
    def passed(self) -> bool:
        """Whether everything that was to be checked was, and passed."""
        return self.complete and bool(self.rows) and all(row.passed for row in self.rows)

    @property
    def failures(self) -> list[Row]:
        return [row for row in self.rows if not row.passed]

    @property
    def verdict(self) -> str:
        failed = len(self.failures)
        if failed:
            return f"FAILED: {failed} of {len(self.rows)} checks"
        if not self.complete:
            return f"INCOMPLETE: {self.cause or 'ended'} after {len(self.rows)} checks, all passed"
        return f"PASSED: {len(self.rows)} checks" if self.rows else "NOTHING was checked"

    def as_dict(self) -> dict[str, Any]:
        when = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        return {"verdict": self.verdict, "passed": self.passed, "date": when, **asdict(self)}


@dataclass
class Group:
    """All rows of one check, op, backend and dtype."""

    check: str
    op: str
    backend: str
    dtype: str
    rows: list[Row]

    @property
    def failed(self) -> int:
        return sum(not row.passed for row in self.rows)

    @property
    def judged(self) -> bool:
        """Whether its rows hold errors against what the rule allows."""
        return self.check in (NUMERICS, SECOND)

    @property
    def worst(self) -> Row:
        return max(self.rows, key=lambda row: row.share)


def _backend(row: Row) -> str:
    """The backend, and how it ran here where that says more."""
    return row.how if row.check == MUTANT else row.backend if row.how == "PyTorch" else f"{row.backend}, {row.how}"


def groups(rows: Sequence[Row]) -> list[Group]:
    """In the order in which each appeared."""
    found: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.check, row.op, _backend(row), row.dtype), []).append(row)
    ordered = sorted(found, key=lambda key: (CHECKS.index(key[0]), key[1]))
    return [Group(check, op, backend, dtype, found[check, op, backend, dtype]) for check, op, backend, dtype in ordered]


def lines(certificate: Certificate) -> Iterator[tuple[str, str]]:
    """The summary, as (text, style) lines of at most 100 columns."""
    every = groups(certificate.rows)
    dtypes = sorted({group.dtype for group in every}, key=DTYPES.index)
    yield "How many checks passed, and the worst share of what the rule allows:", ""
    yield f"{'check':<17}{'op':<15}{'backend':<20}" + "".join(f"{name:>12}" for name in dtypes), "bold"
    for head in dict.fromkeys((group.check, group.op, group.backend) for group in every):
        same = {group.dtype: group for group in every if (group.check, group.op, group.backend) == head}
        cells = "".join(f"{_cell(same[name]) if name in same else '-':>12}" for name in dtypes)
        failed = any(group.failed for group in same.values())
        yield f"{head[0]:<17}{head[1]:<15}{head[2]:<20}{cells}", "red" if failed else ""
    for row in certificate.failures:
        yield f"! {row.check}: {row.op} {row.case} {row.backend} {row.dtype}", "red"
        yield from ((line, "red") for line in _wrapped(f"{row.quantity}: {row.detail}"))
        yield " \\\n".join(textwrap.wrap(row.command, WIDTH - 2, **_COMMAND)), ""
    for reason, what in certificate.skipped.items():
        yield from ((line, "dim") for line in textwrap.wrap(f"not checked ({len(what)}): {reason}", WIDTH))
    yield certificate.verdict, "bold green" if certificate.passed else "bold red"


#: a command is broken between its words, with a backslash
_COMMAND: dict[str, Any] = {
    "initial_indent": "    ",
    "subsequent_indent": "        ",
    "break_long_words": False,
    "break_on_hyphens": False,
}


def _cell(group: Group) -> str:
    if group.failed:
        return f"{group.failed} FAILED"
    return f"{len(group.rows)}  {group.worst.share:.2f}" if group.judged else f"{len(group.rows)}      "


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="    ")


def write(certificate: Certificate, path: Path) -> None:
    """JSON, HTML or Markdown, by the name's ending."""
    if path.suffix == ".json":
        text = json.dumps(_finite(certificate.as_dict()), indent=1) + "\n"
    elif path.suffix == ".html":
        text = "".join(_html(certificate))
    else:
        text = "\n".join(_markdown(certificate)) + "\n"
    replace(path, text)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


RULE = (
    "Against PyTorch in float64 on the CPU, an error passes if max <= 2 x the max error of PyTorch's own kernel in the "
    "same dtype + half an ulp of the largest value, and rms <= 1.5 x its rms error + 0.3 ulp of the values' rms. "
    "Errors are pooled over seeds. The share is the error over what the rule allows: 1 is the limit."
)


def _markdown(certificate: Certificate) -> Iterator[str]:
    yield f"# Certificate of numerics: {certificate.verdict}\n"
    yield RULE + "\n"
    yield "| | |\n|---|---|"
    for name, value in {**certificate.environment, "seed": certificate.seed, "command": certificate.command}.items():
        yield f"| {name} | {value} |"
    if certificate.failures:
        yield "\n## Failed\n"
    for row in certificate.failures:
        yield f"- {row.check}: {row.op} {row.case}, {_backend(row)}, {row.dtype}, {row.quantity}: {row.detail}\n"
        yield f"      {row.command}\n"
    yield "\n## Summary\n"
    yield "| check | op | backend | dtype | checks | worst share | at | failed |"
    yield "|---|---|---|---|---:|---:|---|---:|"
    for group in groups(certificate.rows):
        at = f"{group.worst.case}, {group.worst.quantity}" if group.judged else ""
        share = f"{group.worst.share:.2f}" if group.judged else ""
        cells = (group.check, group.op, group.backend, group.dtype, len(group.rows), share, at, group.failed)
        yield "| " + " | ".join(map(str, cells)) + " |"
    if certificate.skipped:
        yield "\n## Not checked\n"
    for reason, what in certificate.skipped.items():
        yield f"- {reason}: {len(what)}\n"
        yield from (f"    - {label}" for label in what)
    yield "\n## Errors against float64\n"
    figures = "PyTorch max / rms / ulp | mmfast max / rms / ulp"
    yield f"| op | case | backend | dtype | quantity | values | {figures} | share | |"
    yield "|---|---|---|---|---|---:|---|---|---:|---|"
    for row in certificate.rows:
        if row.check in (NUMERICS, SECOND):
            yield (
                f"| {row.op} | {row.case} | {_backend(row)} | {row.dtype} | {_quantity(row)} | {row.count} "
                f"| {_figures(row.pytorch)} | {_figures(row.mmfast)} | {row.share:.2f} | {_verdict(row)} |"
            )
    yield "\n## Other checks\n\n| check | op | case | backend | dtype | what | | |\n|---|---|---|---|---|---|---|---|"
    for row in certificate.rows:
        if row.check not in (NUMERICS, SECOND):
            where = f"{row.check} | {row.op} | {row.case} | {_backend(row)} | {row.dtype} | {row.quantity}"
            yield f"| {where} | {row.detail} | {'pass' if row.passed else '**FAIL**'} |"
    yield "\n## To repeat a line\n"
    for command in dict.fromkeys(row.command for row in certificate.rows):
        yield f"    {command}"


def _quantity(row: Row) -> str:
    return f"{row.quantity} of the penalty" if row.check == SECOND else row.quantity


def _verdict(row: Row) -> str:
    return "pass" if row.passed else f"**FAIL** {row.detail}"


def _figures(figures: dict[str, float]) -> str:
    return " / ".join(f"{figures[name]:.2g}" for name in ("max", "rms", "ulp")) if figures else "-"


_STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 100em; padding: 0 1em; color: #1b1b1b; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { padding: .15em .7em; text-align: left; border-bottom: 1px solid #ddd; white-space: nowrap; }
td:last-child { white-space: normal; min-width: 6em; }
td.n { text-align: right; font-variant-numeric: tabular-nums; } .fail { color: #b30000; font-weight: bold; }
code { background: #f4f4f4; padding: .1em .3em; } .h { display: inline-block; margin: 0 1.2em 1em 0; }
.h p { margin: 0; font-size: 12px; } .pass { color: #00664d; }
"""


def _html(certificate: Certificate) -> Iterator[str]:
    kind = "pass" if certificate.passed else "fail"
    yield f'<!doctype html><html lang="en"><meta charset="utf-8"><title>mmfast: numerics</title><style>{_STYLE}</style>'
    yield f'<h1>Certificate of numerics: <span class="{kind}">{html.escape(certificate.verdict)}</span></h1>'
    yield f"<p>{html.escape(RULE)}</p><table>"
    for name, value in {**certificate.environment, "seed": certificate.seed, "command": certificate.command}.items():
        yield f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>"
    yield "</table>"
    if certificate.failures:
        yield "<h2>Failed</h2><ul>"
        for row in certificate.failures:
            where = f"{row.check}: {row.op} {row.case}, {_backend(row)}, {row.dtype}, {row.quantity}: {row.detail}"
            yield f'<li class="fail">{html.escape(where)}<br><code>{html.escape(row.command)}</code></li>'
        yield "</ul>"
    yield "<h2>Errors in ulp</h2>"
    yield "<p>Shares of all values by their distance from float64, in units of the last place; "
    yield f"{_swatch(_MMFAST)} mmfast, {_swatch(_PYTORCH)} PyTorch.</p>"
    for group in groups(certificate.rows):
        if group.judged:
            yield _histogram(group)
    for row in certificate.rows:
        if row.check == TRAINING:
            yield _curves(row)
    yield "<h2>Checks</h2><p>The command that repeats a line shows where the pointer rests on it.</p>"
    yield "<table><tr><th>check<th>op<th>case<th>backend<th>dtype<th>quantity<th>values"
    yield "<th>PyTorch max / rms / ulp<th>mmfast max / rms / ulp<th>share<th></tr>"
    for row in certificate.rows:
        yield _html_row(row)
    yield "</table>"
    if certificate.skipped:
        yield "<h2>Not checked</h2>"
    yield "<ul>"
    for reason, what in certificate.skipped.items():
        yield f"<li>{html.escape(reason)} <small>({html.escape(', '.join(what))})</small></li>"
    yield "</ul>"


def _html_row(row: Row) -> str:
    numeric = row.check in (NUMERICS, SECOND)
    cells = (row.check, row.op, row.case, _backend(row), row.dtype, row.quantity)
    text = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
    for cell in (str(row.count) if numeric else "", _figures(row.pytorch), _figures(row.mmfast)):
        text += f'<td class="n">{cell}</td>'
    verdict = f"{row.share:.2f}" if numeric else ""
    mark = '<td class="pass">pass' if row.passed else '<td class="fail">FAIL'
    end = f'<td class="n">{verdict}</td>{mark} {html.escape(row.detail)}</td></tr>'
    return f'<tr title="{html.escape(row.command)}">{text}{end}'


_MMFAST, _PYTORCH = "#0072B2", "#E69F00"


def _swatch(color: str) -> str:
    return f'<svg width="10" height="10"><rect width="10" height="10" fill="{color}"/></svg>'


def _curves(row: Row) -> str:
    """The losses with and without accelerate."""
    width, height = 420, 160
    losses = [loss for curve in row.curves.values() for loss in curve if math.isfinite(loss)]
    low, spread = min(losses, default=0.0), max(losses, default=1.0) - min(losses, default=0.0) or 1.0
    drawing = [f'<svg width="{width + 20}" height="{height + 20}" role="img">']
    for who, color, dashes in (("pytorch", _PYTORCH, ""), ("mmfast", _MMFAST, "4 4")):
        curve = row.curves[who]
        points = " ".join(
            f"{width * i / max(1, len(curve) - 1) + 5:.1f},{height - height * (loss - low) / spread + 5:.1f}"
            for i, loss in enumerate(curve)
            if math.isfinite(loss)
        )
        line = f'fill="none" stroke="{color}" stroke-width="2" stroke-dasharray="{dashes}"'
        drawing.append(f'<polyline points="{points}" {line}><title>{who}</title></polyline>')
    name = html.escape(f"{row.case}, {row.dtype}: {row.detail}")
    return f"<div><p>{name}</p>{''.join(drawing)}</svg></div>"


def _histogram(group: Group) -> str:
    """Both histograms of a group side by side, as a drawing of its own."""
    labels = [*(f"{edge:g}" for edge in BINS), ">64"]
    totals = {
        who: [sum(row.histogram[who][i] for row in group.rows if row.histogram) for i in range(len(labels))]
        for who in ("mmfast", "pytorch")
    }
    tallest = max((n / max(1, sum(counts)) for counts in totals.values() for n in counts), default=1) or 1
    width, height = 26, 90
    drawing = [f'<svg width="{width * len(labels) + 10}" height="{height + 20}" role="img">']
    for who, color, shift in (("mmfast", _MMFAST, 2), ("pytorch", _PYTORCH, 12)):
        counts = totals[who]
        for i, n in enumerate(counts):
            tall = height * n / max(1, sum(counts)) / tallest
            title = f"{who}: {100 * n / max(1, sum(counts)):.2f} % up to {labels[i]} ulp"
            box = f'x="{i * width + shift}" y="{height - tall:.1f}" width="10" height="{tall:.1f}" fill="{color}"'
            drawing.append(f"<rect {box}><title>{title}</title></rect>")
    for i, label in enumerate(labels):
        drawing.append(
            f'<text x="{i * width + 12}" y="{height + 14}" font-size="9" text-anchor="middle">{label}</text>'
        )
    name = html.escape(f"{group.op}, {group.backend}, {group.dtype}, {group.check}")
    return f'<div class="h"><p>{name}</p>{"".join(drawing)}</svg></div>'
