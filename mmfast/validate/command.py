"""`mmfast validate`: which checks run, in which process, and where the certificate goes."""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..bench import cases, report
from ..dispatch import BACKENDS, Op
from . import certificate as documents
from . import checks, model, schedule
from .certificate import INTERRUPTED, Certificate
from .checks import Row, Subject
from .mutants import MUTANTS
from .schedule import Outcome, Task

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Effort:
    """How much is checked of a backend that runs in a certain way."""

    batch: int
    length: int
    width: int
    seeds: int  # at most so many are pooled, unless they would fail on too few values


#: real widths for what runs as fast as in training, small ones for what is interpreted or emulated
_DEFAULT = {
    "native": Effort(8, 24, 512, 64),
    "GPU": Effort(8, 24, 512, 64),
    "PyTorch": Effort(4, 8, 64, 1),
    "emulated": Effort(2, 5, 20, 8),
    "interpreted": Effort(2, 5, 20, 8),
}
#: a draw takes milliseconds native or emulated, and up to a second interpreted, whatever the number of its values
_FULL = {
    "native": Effort(16, 64, 1024, 256),
    "GPU": Effort(64, 256, 1024, 4096),
    "PyTorch": Effort(8, 24, 512, 1),
    "emulated": Effort(3, 9, 36, 256),
    "interpreted": Effort(3, 4, 28, 32),
}
_TINY = Effort(2, 3, 4, 1)

#: by default, after so many seconds nothing more is begun of what something was checked of
SECONDS = 100.0


def add_validate_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `mmfast validate`."""
    parser.description = "Hold every kernel here against float64 and against PyTorch; exit with 0 only if all pass."
    add = parser.add_argument
    add("ops", nargs="*", metavar="OP", help=f"{', '.join(cases.OPS)} (all)")
    add("--cases", action="append", metavar="GLOB", help="check the cases whose name fits (a few of each kind)")
    add("--backend", choices=BACKENDS, action="append", help="check this backend (all that can run here)")
    add("--dtype", choices=DTYPES, action="append", help="check this dtype (all)")
    add("--device", choices=("cpu", "cuda"), help="(a GPU where torch sees one)")
    add("--full", action="store_true", help="all cases, larger, with more seeds (about 30 minutes on 2 CPU cores)")
    add(
        "--seconds",
        type=float,
        default=SECONDS,
        metavar="S",
        help=f"by default, begin nothing more after S ({SECONDS:g})",
    )
    add("--seed", type=int, default=0, metavar="N", help="of weights and data (0)")
    add("--out", type=Path, metavar="FILE", action="append", help="write the certificate: .md, .json or .html")
    add("--json", type=Path, metavar="FILE", help="the same as --out FILE.json")
    add("--html", type=Path, metavar="FILE", help="the same as --out FILE.html, with histograms")
    add("--model", metavar="SPEC", help="check your own model with and without accelerate: package.module:function")
    add("--input", metavar="SPEC", help="what your own model is called with: package.module:function, giving tensors")
    add("--steps", type=int, metavar="N", help="with --model: train N steps both ways and compare the losses")


def run(args: argparse.Namespace) -> int:
    """Checks, prints and writes. 0 only if all passed; 1 otherwise; 2 for a bad option; 130 on Ctrl-C."""
    try:
        _check_options(args)
        outcome = model.plan(args) if args.model else _plan(args)
    except ValueError as error:
        print(f"mmfast validate: {error}", file=sys.stderr)
        return 2
    return _certify(args, outcome)


def _check_options(args: argparse.Namespace) -> None:
    for op in args.ops:
        if op not in Op.registry:
            raise ValueError(f"unknown op {op!r}; accepted: {', '.join(cases.OPS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU")
    if args.steps is not None and (args.model is None or args.steps < 1):
        raise ValueError("--steps N needs --model, and N at least 1")
    for path in _paths(args):
        if path.suffix not in (".md", ".json", ".html"):
            raise ValueError(f"{path}: a certificate's name ends in .md, .json or .html")


def _paths(args: argparse.Namespace) -> list[Path]:
    return [*(args.out or ()), *(path for path in (args.json, args.html) if path)]


@dataclass(frozen=True)
class Check:
    """Every check of a case on a backend in a dtype; `case` is the whole one, the subject's perhaps a small one."""

    case: str
    subject: Subject
    effort: Effort
    seed: int
    full: bool

    @property
    def label(self) -> str:
        return " ".join((*self.group, self.case))

    @property
    def group(self) -> tuple[str, ...]:
        return self.subject.case.op, self.subject.backend, self.subject.dtype_name

    def __call__(self) -> Outcome:
        reasons = checks.refusals(self.subject)
        rows = [] if reasons else list(self._rows())
        op, backend, dtype = self.group
        command = f"mmfast validate {op} --cases '{self.case}' --backend {backend} --dtype {dtype}"
        for row in rows:
            row.command = f"{command} --device {self.subject.device} --seed {self.seed}{' --full' * self.full}"
        return rows, reasons

    def _rows(self) -> Iterator[Row]:
        subject, seeds = self.subject, range(self.seed, self.seed + self.effort.seeds)
        if subject.backend == "torch":
            yield checks.torchs_own_bits(subject, self.seed)
            return
        yield from checks.numerics(subject, seeds)
        if subject.dtype != torch.float32:
            return
        yield from checks.double_backward(subject, seeds)
        yield checks.repeatability(subject, self.seed)
        if subject.device == "cpu" and subject.how != "interpreted":
            yield checks.thread_independence(subject, self.seed)
        tiny = Subject(
            subject.case.shrunk(_TINY.batch, _TINY.length, _TINY.width), subject.backend, torch.float64, subject.device
        )
        if not checks.refusals(tiny):
            yield checks.gradcheck(tiny, self.seed)


@dataclass(frozen=True)
class Planted:
    """A planted bug, by its place among the op's, in some (mode, dtype) in which it is one."""

    op: str
    number: int
    ways: tuple[tuple[str, torch.dtype], ...]
    seed: int
    full: bool

    @property
    def label(self) -> str:
        return f"{self.op} planted: {MUTANTS[self.op][self.number].name}"

    @property
    def group(self) -> tuple[str, ...]:
        # each must be caught, and soon is
        return "planted", self.op, str(self.number)

    def __call__(self) -> Outcome:
        mutant = MUTANTS[self.op][self.number]
        rows = [checks.caught(self.op, mutant, mode, dtype, self.seed) for mode, dtype in self.ways]
        for row in rows:
            row.command = f"mmfast validate {self.op} --seed {self.seed}{' --full' * self.full}"
        return rows, []


def _certify(args: argparse.Namespace, tasks: Sequence[Task]) -> int:
    from rich.console import Console

    out = Console(highlight=False, soft_wrap=True, width=report.WIDTH)
    words = sys.argv[1:] if sys.argv[1:2] == ["validate"] else ["validate"]
    certificate = Certificate(report.environment(_device(args)), args.seed, " ".join(["mmfast", *words]))
    try:
        _fill(certificate, args, tasks, out)
        certificate.complete = True
    except KeyboardInterrupt:
        certificate.cause = INTERRUPTED
    except schedule.Died as died:
        certificate.cause = f"a process died while it checked {' or '.join(died.args[0])};"
    for text, style in documents.lines(certificate):
        out.print(text, style=style or None, markup=False)
    for path in _paths(args):
        documents.write(certificate, path)
    return 130 if certificate.cause == INTERRUPTED else 0 if certificate.passed else 1


def _fill(certificate: Certificate, args: argparse.Namespace, tasks: Sequence[Task], out: Any) -> None:
    """Runs the tasks under a progress bar that names them; the certificate has their rows in the tasks' order."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    bar_console = out if out.is_terminal else Console(stderr=True)
    columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    found: dict[int, Outcome] = {}
    try:
        with Progress(*columns, console=bar_console, transient=True, disable=not bar_console.is_terminal) as progress:
            bar = progress.add_task("", total=len(tasks))
            seconds = math.inf if args.full or args.cases or args.model else args.seconds
            running = schedule.outcomes(
                tasks, seconds, _processes(args, tasks), lambda labels: progress.update(bar, description=_shown(labels))
            )
            for task, outcome in running:
                found[id(task)] = outcome
                progress.advance(bar)
    finally:
        for task in tasks:
            rows, reasons = found.get(id(task), ([], []))
            certificate.rows += rows
            for reason in reasons:
                certificate.skipped.setdefault(reason, []).append(task.label)


def _shown(labels: Sequence[str]) -> str:
    """What is running, in the 60 columns that the bar leaves."""
    room = (60 - 3 * (len(labels) - 1)) // len(labels)
    return " | ".join(label if len(label) <= room else label[: room - 1] + "\u2026" for label in labels)


def _processes(args: argparse.Namespace, tasks: Sequence[Task]) -> int:
    """As many as torch has threads; none, which is to check here, for a GPU, for a user's model, and for one thread."""
    if args.model or _device(args) != "cpu":
        return 0
    count = min(torch.get_num_threads(), schedule.MOST_PROCESSES)
    interpreted = any(isinstance(task, Check) and task.subject.how == "interpreted" for task in tasks)
    return count if count > 1 else int(interpreted)


def _device(args: argparse.Namespace) -> str:
    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _plan(args: argparse.Namespace) -> list[Task]:
    patterns = args.cases or (["*"] if args.full else list(cases.representative(_device(args))))
    chosen = [case for op in args.ops or cases.OPS for case in cases.matching(patterns, op)]
    if not chosen:
        raise ValueError(f"no case fits {' or '.join(patterns)}; mmfast bench --list shows all")
    planted = [] if args.backend or args.cases or args.dtype else list(_planted(args))
    return [*_checks(args, chosen), *planted]


def _checks(args: argparse.Namespace, chosen: Sequence[Any]) -> Iterator[Check]:
    device = _device(args)
    for case in chosen:
        for backend in Op.registry[case.op].backends:
            how = checks.HOW[device, backend]
            effort = (_FULL if args.full else _DEFAULT)[how]
            small = case.shrunk(effort.batch, effort.length, effort.width)
            for dtype in DTYPES:
                if backend in (args.backend or BACKENDS) and dtype in (args.dtype or DTYPES):
                    subject = Subject(small, backend, DTYPES[dtype], device)
                    yield Check(case.name, subject, effort, args.seed, args.full)


def _planted(args: argparse.Namespace) -> Iterator[Planted]:
    """Every planted bug, in one mode and dtype in which it is one, or with --full in all of them."""
    for op in args.ops or cases.OPS:
        for number, mutant in enumerate(MUTANTS.get(op, ())):
            ways = list(itertools.product(mutant.modes, mutant.dtypes))
            chosen = ways if args.full else [ways[number % len(ways)]]
            yield Planted(op, number, tuple(chosen), args.seed, args.full)
