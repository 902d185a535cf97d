"""`mmfast validate`: which checks run, in which process, and where the certificate goes."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..bench import cases, report
from ..dispatch import BACKENDS, Op
from . import certificate as documents
from . import checks, model
from .certificate import Certificate
from .checks import Row, Subject
from .mutants import MUTANTS, Mutant

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Effort:
    """How much is checked of a backend that runs in a certain way."""

    batch: int
    length: int
    width: int
    seeds: int  # at most so many are pooled


#: real widths for what runs as fast as in training, small ones for what is interpreted or emulated
_DEFAULT = {"native": Effort(8, 24, 512, 64), "GPU": Effort(8, 24, 512, 64), "PyTorch": Effort(4, 8, 64, 1)}
_FULL = {"native": Effort(16, 64, 1024, 4096), "GPU": Effort(64, 256, 1024, 4096), "PyTorch": Effort(8, 24, 512, 1)}
_SLOW, _SLOW_FULL = Effort(2, 5, 20, 8), Effort(3, 9, 36, 256)
_TINY = Effort(2, 3, 4, 1)


def add_validate_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `mmfast validate`."""
    parser.description = "Hold every kernel here against float64 and against PyTorch; exit with 0 only if all pass."
    add = parser.add_argument
    add("ops", nargs="*", metavar="OP", help=f"{', '.join(cases.OPS)} (all)")
    add("--cases", action="append", metavar="GLOB", help="check the cases whose name fits (a few of each kind)")
    add("--backend", choices=BACKENDS, action="append", help="check this backend (all that can run here)")
    add("--dtype", choices=DTYPES, action="append", help="check this dtype (all)")
    add("--device", choices=("cpu", "cuda"), help="(a GPU where torch sees one)")
    add("--full", action="store_true", help="all cases, larger, with more seeds")
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


@dataclass
class Task:
    """Some checks of one subject: called, it gives rows, or reasons why nothing could be checked."""

    label: str
    call: Callable[[], tuple[list[Row], list[str]]]


def _certify(args: argparse.Namespace, tasks: Sequence[Task]) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    out = Console(highlight=False, soft_wrap=True, width=report.WIDTH)
    device = _device(args)
    words = (
        ["mmfast", "validate", *sys.argv[2:]]
        if len(sys.argv) > 1 and sys.argv[1] == "validate"
        else ["mmfast", "validate"]
    )
    certificate = Certificate(report.environment(device), args.seed, " ".join(words))
    bar_console = out if out.is_terminal else Console(stderr=True)
    columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    try:
        with Progress(*columns, console=bar_console, transient=True, disable=not bar_console.is_terminal) as progress:
            bar = progress.add_task("", total=len(tasks))
            for task in tasks:
                progress.update(bar, description=task.label[:60])
                rows, reasons = task.call()
                certificate.rows += rows
                for reason in reasons:
                    certificate.skipped.setdefault(reason, []).append(task.label)
                progress.advance(bar)
        certificate.complete = True
    except KeyboardInterrupt:
        pass
    for text, style in documents.lines(certificate):
        out.print(text, style=style or None, markup=False)
    for path in _paths(args):
        documents.write(certificate, path)
    if not certificate.complete:
        return 130
    return 0 if certificate.passed else 1


def _device(args: argparse.Namespace) -> str:
    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _plan(args: argparse.Namespace) -> list[Task]:
    patterns = args.cases or (["*"] if args.full else list(cases.representative(_device(args))))
    chosen = [case for op in args.ops or cases.OPS for case in cases.matching(patterns, op)]
    if not chosen:
        raise ValueError(f"no case fits {' or '.join(patterns)}; mmfast bench --list shows all")
    return list(_tasks(args, chosen))


def _tasks(args: argparse.Namespace, chosen: Sequence[Any]) -> Iterator[Task]:
    device = _device(args)
    wanted = args.backend or BACKENDS
    for op in dict.fromkeys(case.op for case in chosen):
        for backend in Op.registry[op].backends:
            if backend not in wanted:
                continue
            if backend == "triton" and device == "cpu" and not _interpreting():
                yield Task(f"{op} triton (interpreted)", lambda op=op: _interpreted(args, op))  # type: ignore[misc]
                continue
            same = [case for case in chosen if case.op == op]
            yield from _backend_tasks(args, same, backend, device)
    if not (args.backend or args.cases or args.dtype):
        yield from _mutant_tasks(args)


def _mutant_tasks(args: argparse.Namespace) -> Iterator[Task]:
    """Every planted bug, in one mode and dtype in which it is one, or with --full in all of them."""
    for op in args.ops or cases.OPS:
        for number, mutant in enumerate(MUTANTS.get(op, ())):
            ways = list(itertools.product(mutant.modes, mutant.dtypes))
            chosen = ways if args.full else [ways[number % len(ways)]]

            def call(
                op: str = op, mutant: Mutant = mutant, chosen: list[tuple[str, torch.dtype]] = chosen
            ) -> tuple[list[Row], list[str]]:
                rows = [checks.caught(op, mutant, mode, dtype, args.seed) for mode, dtype in chosen]
                for row in rows:
                    row.command = f"mmfast validate {op} --seed {args.seed}{' --full' * args.full}"
                return rows, []

            yield Task(f"{op} planted: {mutant.name}", call)


def _backend_tasks(args: argparse.Namespace, chosen: Sequence[Any], backend: str, device: str) -> Iterator[Task]:
    how = checks.HOW[device, backend]
    slow = how in ("interpreted", "emulated")
    effort = (_SLOW_FULL if args.full else _SLOW) if slow else (_FULL if args.full else _DEFAULT)[how]
    for number, case in enumerate(chosen):
        # what is interpreted or emulated is checked in 16 bits on every third case, unless everything was asked for
        for dtype in DTYPES if args.full or not slow or number % 3 == 0 else ("float32",):
            if args.dtype is None or dtype in args.dtype:
                small = case.shrunk(effort.batch, effort.length, effort.width)
                subject = Subject(small, backend, DTYPES[dtype], device)
                yield Task(f"{case.op} {backend} {dtype} {case.name}", _call(args, case, subject, effort))


def _call(
    args: argparse.Namespace, case: Any, subject: Subject, effort: Effort
) -> Callable[[], tuple[list[Row], list[str]]]:
    def call() -> tuple[list[Row], list[str]]:
        reasons = checks.refusals(subject)
        rows = [] if reasons else list(_rows(args, subject, effort))
        full = " --full" * args.full
        command = f"mmfast validate {case.op} --cases '{case.name}' --backend {subject.backend}"
        for row in rows:
            row.command = f"{command} --dtype {subject.dtype_name} --device {subject.device} --seed {args.seed}{full}"
        return rows, reasons

    return call


def _rows(args: argparse.Namespace, subject: Subject, effort: Effort) -> Iterator[Row]:
    seeds = range(args.seed, args.seed + effort.seeds)
    if subject.backend == "torch":
        yield checks.torchs_own_bits(subject, args.seed)
        return
    yield from checks.numerics(subject, seeds)
    if subject.dtype != torch.float32:
        return
    yield from checks.double_backward(subject, seeds)
    yield checks.repeatability(subject, args.seed)
    if subject.device == "cpu" and subject.how != "interpreted":
        yield checks.thread_independence(subject, args.seed)
    tiny = Subject(
        subject.case.shrunk(_TINY.batch, _TINY.length, _TINY.width), subject.backend, torch.float64, subject.device
    )
    if not checks.refusals(tiny):
        yield checks.gradcheck(tiny, args.seed)


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _interpreted(args: argparse.Namespace, op: str) -> tuple[list[Row], list[str]]:
    """The same command in a process in which Triton interprets: it decides so once, when it is imported."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "mmfast", "validate", op, "--backend", "triton", "--device", "cpu"]
        command += ["--seed", str(args.seed), "--json", str(path), *["--full"] * args.full]
        command += [word for pattern in args.cases or () for word in ("--cases", pattern)]
        command += [word for dtype in args.dtype or () for word in ("--dtype", dtype)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"})
        if not path.exists():
            raise RuntimeError(f"the interpreted checks of {op} did not end well: {done.stderr.strip()}")
        found = json.loads(path.read_text())
    rows = [Row(**row) for row in found["rows"]]
    for row in rows:
        row.command = f"TRITON_INTERPRET=1 {row.command}"
    return rows, list(found["skipped"])
