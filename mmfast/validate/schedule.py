"""In which order checks run, in which processes, and what is left out when their time is up.

On a CPU they run side by side, each in a process of one thread: threads that wait for each other on a busy machine take
many times as long as one that works alone. In these processes Triton interprets, which it decides when it is imported.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

import torch

from .checks import Row

#: rows, or reasons why nothing could be checked
Outcome = tuple[list[Row], list[str]]

LATE = "no time for it by default (checked with --full, or where --cases names it)"

MOST_PROCESSES = 8


class Task(Protocol):
    """Some checks of one subject. Called, perhaps in another process, it gives its outcome."""

    @property
    def label(self) -> str:
        """What the progress bar shows."""

    @property
    def group(self) -> tuple[str, ...]:
        """Of every group something is checked, however long it takes."""

    def __call__(self) -> Outcome: ...


class Died(Exception):
    """A process ended in the middle of a check; its argument is the labels of those that were running."""


def in_turn(tasks: Sequence[Task]) -> list[Task]:
    """The first of every group, then the second of every group, and so on."""
    groups: dict[tuple[str, ...], list[Task]] = {}
    for task in tasks:
        groups.setdefault(task.group, []).append(task)
    turns = [(turn, place, task) for place, same in enumerate(groups.values()) for turn, task in enumerate(same)]
    return [task for _, _, task in sorted(turns, key=lambda entry: entry[:2])]


def outcomes(
    tasks: Sequence[Task], seconds: float, processes: int, show: Callable[[Sequence[str]], None] = lambda labels: None
) -> Iterator[tuple[Task, Outcome]]:
    """Every task with its outcome, as they end.

    seconds: after so many no further task is begun, except of a group of which nothing was checked yet.
    processes: how many are at work, besides this one; with 0 the tasks run here. show: is told what is running.
    """
    started, waiting, checked = time.monotonic(), deque(in_turn(tasks)), set()
    running: dict[Future[Outcome], Task] = {}
    pool: Executor = _Here() if processes == 0 else _pool(processes)
    try:
        while waiting or running:
            while waiting and len(running) < max(1, processes):
                task = waiting.popleft()
                if time.monotonic() - started > seconds and task.group in checked:
                    yield task, ([], [LATE])
                    continue
                show([*(other.label for other in running.values()), task.label])
                running[pool.submit(task)] = task
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                rows, reasons = _result(future, running)
                task = running.pop(future)
                if rows:
                    checked.add(task.group)
                yield task, (rows, reasons)
    finally:
        if running:
            # interrupted: whoever is in the middle of a check need not end it
            for process in multiprocessing.active_children():
                process.terminate()
        pool.shutdown(cancel_futures=True)


def _result(future: Future[Outcome], running: dict[Future[Outcome], Task]) -> Outcome:
    try:
        return future.result()
    except BrokenProcessPool:
        labels = [task.label for task in running.values()]
        running.clear()
        raise Died(labels) from None


def _pool(processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _begin)


def _begin() -> None:
    """In a process that is to check: it leaves Ctrl-C to its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)


class _Here(Executor):
    """Runs what it is given at once, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future
