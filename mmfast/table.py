"""The preference table that `mmfast bench --tune` writes and dispatch reads: which backend was fastest on this machine.

A JSON file, MMFAST_TABLE or `mmfast/table.json` in the user's configuration folder. Its rows belong to a machine -
processor or GPU, instruction set, versions of torch and mmfast -, so that one home folder serves several machines and
a new version starts afresh. A row's key is all a choice depends on: the op, its static facts, the number of threads.
"""

from __future__ import annotations

import functools
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import config

FORMAT = 1


class Preference(NamedTuple):
    """The backend to prefer and how many times faster than PyTorch it was measured."""

    backend: str
    ratio: float


def path() -> Path:
    """Where the table is."""
    if config.TABLE:
        return Path(config.TABLE)
    folder = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(folder) / "mmfast" / "table.json"


def processor() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine(device: str) -> str:
    """What a measurement on `device` is true of: a change of any of it makes the table's rows for it unread."""
    from . import __version__, native

    if device == "cpu":
        hardware = f"{processor()}, {native.isa() if native.available() else 'no native library'}"
    else:
        hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else device
    return f"{hardware}, torch {torch.__version__}, mmfast {__version__}"


def key(op: str, case: Any, threads: int) -> str:
    """The row's name for a named tuple of static facts: `rnn(device=cpu, ..., threads=2)`.

    The sizes of one call, which `case.of_call` names where there are such, are no part of it.
    """
    facts = {**case._asdict(), "threads": threads}
    for name in getattr(case, "of_call", ()):
        del facts[name]
    return f"{op}({', '.join(f'{name}={value}' for name, value in facts.items())})"


def preferred(op: str, case: Any) -> Preference | None:
    """What was measured for `case` on this machine with this many threads; None where nothing was."""
    tables = _read(path())
    if not tables:
        return None
    row = tables.get(machine(case.device), {}).get(key(op, case, torch.get_num_threads()))
    return None if row is None else Preference(row["backend"], row["ratio"])


def count(device: str) -> int:
    """How many rows are true of this machine."""
    return len(_read(path()).get(machine(device), {}))


def save(device: str, rows: Mapping[str, Preference]) -> Path:
    """Adds rows, by their keys, to this machine's part of the table, replacing those of the same key."""
    target = path()
    tables = {name: dict(kept) for name, kept in _read(target).items()}
    tables.setdefault(machine(device), {}).update({name: row._asdict() for name, row in rows.items()})
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(target.name + ".unfinished")
    unfinished.write_text(json.dumps({"format": FORMAT, "machines": tables}, indent=1) + "\n")
    unfinished.replace(target)
    _read.cache_clear()
    return target


@functools.cache
def _read(file: Path) -> dict[str, dict[str, dict]]:
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text())
        if content["format"] == FORMAT:
            return content["machines"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is no preference table ({error!r}); delete it, or make one: mmfast bench --tune"
        ) from None
    return {}
