"""`mmfast bench`: which cases are measured, how, and where the results go."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..dispatch import Op
from . import cases, floor, measure, models, peers, plots, report, tune
from .contenders import Bout
from .measure import Row

DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `mmfast bench`."""
    parser.description = "Measure what mmfast gains on this machine, next to PyTorch and to the machine's own floor."
    add = parser.add_argument
    add("ops", nargs="*", metavar="OP", help=f"{', '.join(Op.registry)} (all)")
    add("--cases", action="append", metavar="GLOB", help="measure the cases whose name fits (a few of each kind)")
    add("--list", action="store_true", help="list the cases and measure nothing")
    add(
        "--model",
        metavar="NAME",
        help=f"a training step of {', '.join(models.MODELS)}, or your own: package.module:function",
    )
    add("--input", metavar="SPEC", help="what your own model is called with: package.module:function, giving tensors")
    add("--shape", metavar="T128,B64,I128,H128", help="an RNN, a GRU and an LSTM of this shape (and L2: two layers)")
    add("--scaling", action="store_true", help="one LSTM over growing steps, batch and hidden size")
    add("--modes", metavar="M,M", help="forward, forward+backward, double backward (all that apply)")
    add(
        "--compile",
        choices=("training", "all", "both", "none"),
        help="torch.compile of PyTorch's module in forward+backward or all passes, of both modules, or not (training; "
        "on a CPU of one case an op where none are named: compiling takes long)",
    )
    add("--peers", action="store_true", help="other libraries that are installed: onnxruntime")
    add("--threads", type=int, metavar="N", help="threads (as torch has)")
    add("--dtype", choices=DTYPES, default="float32", help="of weights and data (float32)")
    add("--device", choices=("cpu", "cuda"), help="(a GPU where torch sees one)")
    add(
        "--rounds",
        type=int,
        metavar="N",
        help="rounds of each case, however long they take (at most 30, within half a second)",
    )
    add("--json", type=Path, metavar="FILE", help="write everything measured")
    add("--csv", type=Path, metavar="FILE", help="add a line per case and contender")
    add("--markdown", type=Path, metavar="FILE", help="write the tables")
    add("--plot", type=Path, metavar="FILE", help="draw speed-ups, roofline and scaling, as .png or .svg")
    add(
        "--base",
        type=Path,
        metavar="FILE",
        help="compare with the --json of an earlier run; fails where a case is slower",
    )
    add("--slowdown", type=float, default=1.1, metavar="X", help="how much slower than --base a case may be (1.1)")
    add("--tune", action="store_true", help="let mmfast choose by what is measured now: save it as preference table")


@dataclass
class Plan:
    """What `mmfast bench` was asked for, checked."""

    bouts: list[tuple[Any, str]]  # (case, mode)
    dtype: torch.dtype
    device: str
    rounds: int
    seconds: float
    compiled: str | None  # None: "training" of one case an op
    peers: bool
    rows: list[Row] = field(default_factory=list)


def run(args: argparse.Namespace) -> int:
    """Measures, prints, writes. 0; 1 where a case was slower than --base, or wrong; 2: a bad option; 130: Ctrl-C."""
    try:
        if args.list:
            return _list(_chosen(args), _device(args))
        plan = _plan(args)
        base = report.read_json(args.base) if args.base else None
        if args.plot:
            plots.check(args.plot)
    except ValueError as error:
        print(f"mmfast bench: {error}", file=sys.stderr)
        return 2
    threads = torch.get_num_threads()
    try:
        if args.threads:
            torch.set_num_threads(args.threads)
        return _run(plan, args, base)
    finally:
        torch.set_num_threads(threads)


def _plan(args: argparse.Namespace) -> Plan:
    device = _device(args)
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU")
    for name in ("threads", "rounds"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: expected at least 1")
    chosen = _chosen(args)
    wanted = None if args.modes is None else args.modes.split(",")
    for mode in wanted or ():
        if mode not in (*cases.PASSES, cases.STEP):
            raise ValueError(f"--modes {mode}: expected some of {', '.join(cases.PASSES)}")
    usual = not (args.cases or args.ops or args.modes)
    bouts = [
        (case, mode)
        for case in chosen
        for mode in (cases.usual_modes(case) if usual else cases.modes(case))
        if wanted is None or mode in wanted
    ]
    if args.peers:
        peers.installed()
    if not bouts:
        raise ValueError(f"--modes {args.modes}: none of the cases has it")
    rounds, seconds = (args.rounds, math.inf) if args.rounds else (30, 0.5)
    named = not usual or args.model or args.shape or args.scaling
    compiled = args.compile or ("training" if named or device == "cuda" else None)
    return Plan(bouts, DTYPES[args.dtype], device, rounds, seconds, compiled, args.peers)


def _device(args: argparse.Namespace) -> str:
    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _chosen(args: argparse.Namespace) -> list[Any]:
    for op in args.ops:
        if op not in Op.registry:
            raise ValueError(f"unknown op {op!r}; accepted: {', '.join(Op.registry)}")
    if args.model:
        return [models.from_name(args.model, args.input)]
    if args.shape:
        return list(cases.from_shape(args.shape))
    scaling = cases.scaling() if args.scaling else []
    if args.scaling and not (args.cases or args.ops):
        return list(scaling)
    patterns = args.cases or (
        ["*"] if args.list or (args.tune and not args.ops) else list(cases.representative(_device(args)))
    )
    found = [case for op in args.ops or cases.OPS for case in cases.matching(patterns, op)]
    if not found:
        raise ValueError(f"no case fits {' or '.join(patterns)}; mmfast bench --list shows all")
    return [*found, *scaling]


def _list(chosen: Sequence[Any], device: str) -> int:
    usual = cases.matching(cases.representative(device))
    for case in chosen:
        print(f"{case.op:<15} {case.name}{'  (by default)' * (case in usual)}")
    for name in models.MODELS:
        print(f"{'--model':<15} {name}")
    return 0


def _run(plan: Plan, args: argparse.Namespace, base: Sequence[Row] | None) -> int:
    from rich.console import Console

    # what a pipe or a file is given is 100 columns of plain text
    out = Console(highlight=False, soft_wrap=True, width=report.WIDTH)
    where = report.environment(plan.device)
    out.print(f"mmfast {where['mmfast']} ({where['commit']}), torch {where['torch']}, {where['machine']}", markup=False)
    rates = floor.measure(plan.dtype, plan.device)
    interrupted = False
    printed: set[str] = set()

    def show(op: str) -> None:
        nonlocal rates
        printed.add(op)
        # something else may have kept the machine busy when its rates were measured first
        rates = rates.or_better(floor.measure(plan.dtype, plan.device))
        for row in plan.rows:
            row.floor = rates.of(row.flops, row.bytes)
        out.print()
        for text, style in report.lines([row for row in plan.rows if row.op == op]):
            out.print(text, style=style, markup=False)

    started = time.perf_counter()
    try:
        for row in _measured(plan, rates, out):
            plan.rows.append(row)
            _save(plan, args, complete=False)
            if _done(plan, row.op):
                show(row.op)
    except KeyboardInterrupt:
        interrupted = True
    for op in dict.fromkeys(row.op for row in plan.rows):
        if op not in printed:
            show(op)
    if interrupted:
        out.print(f"\ninterrupted after {len(plan.rows)} of {len(plan.bouts)} measurements", style="bold red")
    out.print()
    for line in report.LEGEND:
        out.print(line, markup=False)
    out.print(
        f"This machine: {rates.flops / 1e9:.0f} GFLOP/s in a product, {rates.memory / 1e9:.1f} GB/s of memory; "
        f"measured in {time.perf_counter() - started:.0f} s."
    )
    _save(plan, args, complete=not interrupted)
    code = _conclude(plan, args, base, rates, out)
    return 130 if interrupted else code


def _conclude(plan: Plan, args: argparse.Namespace, base: Sequence[Row] | None, rates: floor.Floor, out: Any) -> int:
    """The files, tables and pictures that need all rows; the exit code."""
    if args.markdown and plan.rows:
        report.write_markdown(args.markdown, plan.rows, plan.device)
    if args.plot and plan.rows:
        where = report.environment(plan.device)
        title = (
            f"mmfast {where['mmfast']}, torch {where['torch']}, {where['machine']}, "
            f"{report.threads(torch.get_num_threads())}"
        )
        plots.draw(args.plot, plan.rows, rates, title)
    if args.tune and plan.rows:
        path, found = tune.save(plan.rows, plan.device)
        ours = sum(preference.backend != "torch" for preference in found.values())
        out.print(f"From now on mmfast's kernels serve {ours} of these {len(found)} kinds of case, by the table in")
        out.print(str(path), markup=False)
    fine = not any(name.startswith("mmfast") for row in plan.rows for name in row.wrong)
    if base is not None:
        lines, kept = report.compare(plan.rows, base, args.slowdown)
        out.print(f"\nCompared with {args.base}:", markup=False)
        for text, style in lines:
            out.print(text, style=style or None, markup=False)
        fine = fine and kept
    return 0 if fine else 1


def _done(plan: Plan, op: str) -> bool:
    return sum(row.op == op for row in plan.rows) == sum(case.op == op for case, _ in plan.bouts)


def _save(plan: Plan, args: argparse.Namespace, complete: bool) -> None:
    """After every row, so that nothing measured is lost."""
    if args.json:
        report.write_json(args.json, plan.rows, plan.device, complete)
    if args.csv and plan.rows:
        report.write_csv(args.csv, plan.rows, plan.device)


def _measured(plan: Plan, rates: floor.Floor, out: Any) -> Iterator[Row]:
    """A row for each bout, under a progress bar that names the case."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        BarColumn(20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    bar_console = out if out.is_terminal else Console(stderr=True)
    with Progress(*columns, console=bar_console, transient=True, disable=not bar_console.is_terminal) as progress:
        task = progress.add_task("", total=len(plan.bouts))
        for case, mode in plan.bouts:
            progress.update(task, description=f"{case.name[:52]} {report.MODE_LABELS[mode]}")
            bout = Bout(case, mode, plan.dtype, plan.device)
            contenders = bout.contenders(plan.compiled or ("training" if cases.is_compiled(case) else "none"))
            if plan.peers:
                contenders = peers.joined(bout, contenders)
            yield measure.measure(bout, rates, contenders=contenders, rounds=plan.rounds, seconds=plan.seconds)
            progress.advance(task)
