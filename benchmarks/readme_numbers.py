"""Writes README's numbers from benchmarks/results/*.csv: `python benchmarks/readme_numbers.py`.

They stand between `<!-- numbers -->` and `<!-- /numbers -->`; a test keeps the two in step. `--check` only compares.
"""

from __future__ import annotations

import csv
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- numbers -->", "<!-- /numbers -->"

OPS = {"rnn": "recurrent", "conv_transpose": "transposed convolution", "adversarial": "adversarial loss"}
#: what the table shows; the means below it count every pass
SHOWN = ("forward+backward", "training step")
MODES = ("forward", "forward+backward", "double backward", "training step")

Line = dict[str, str]


def numbers() -> str:
    """The text between the markers."""
    parts = [text for path in sorted(RESULTS.glob("bench-*.csv")) for text in section(read(path))]
    return "\n".join([BEGIN, *parts, END])


def read(path: Path) -> list[Line]:
    """The lines of one results file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def section(lines: list[Line]) -> Iterator[str]:
    """What one machine's file says: a table, and each op's mean and worst case."""
    first = lines[0]
    count = first["threads"]
    yield (
        f"{first['machine']}, {count} thread{'s' * (count != '1')}, torch {first['torch']}, {first['dtype']}, commit "
        f"{first['commit']}; times are 20th percentiles, the rival the best of PyTorch eager and compiled:"
    )
    yield ""
    yield "| layer or loss, forward + backward | rival | mmfast | ratio | backend |"
    yield "|---|---:|---:|---:|---|"
    ours = [line for line in lines if line["provider"] == "mmfast"]
    for line in ours:
        if line["mode"] not in SHOWN:
            continue
        rival = float(line["low_us"]) * float(line["ratio_to_best_rival"])
        cells = (line["case"], duration(rival), duration(float(line["low_us"])))
        yield f"| {' | '.join(cells)} | {float(line['ratio_to_best_rival']):.2f}x | {line['backend'] or 'torch'} |"
    yield ""
    for op, name in OPS.items():
        found = [line for line in ours if line["op"] == op]
        if found:
            yield f"- {name}: {summary(found)}"


def summary(lines: list[Line]) -> str:
    """Geometric means by pass, and the worst case."""
    means = []
    for mode in MODES:
        ratios = [float(line["ratio_to_best_rival"]) for line in lines if line["mode"] == mode]
        if ratios:
            means.append(f"{mode} {statistics.geometric_mean(ratios):.2f}x")
    worst = min(lines, key=lambda line: float(line["ratio_to_best_rival"]))
    return (
        f"{', '.join(means)} on the geometric mean; worst {float(worst['ratio_to_best_rival']):.2f}x ({worst['case']})"
    )


def duration(us: float) -> str:
    """Three digits and a unit."""
    value, unit = (us, "us") if us < 999.5 else (us / 1e3, "ms")
    return f"{value:.2f} {unit}" if value < 9.995 else f"{value:.1f} {unit}" if value < 99.95 else f"{value:.0f} {unit}"


def updated(readme: str) -> str:
    """README with the numbers in their place; ValueError where the place is not marked."""
    before, found, rest = readme.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not (found and closed):
        raise ValueError(f"README.md has no {BEGIN} ... {END}")
    return before + numbers() + after


def main() -> int:
    """Rewrites README, or with --check says whether it is in step."""
    old = README.read_text()
    new = updated(old)
    if "--check" in sys.argv[1:]:
        print(
            "README's numbers are in step" if old == new else "README's numbers are old: benchmarks/readme_numbers.py"
        )
        return int(old != new)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
