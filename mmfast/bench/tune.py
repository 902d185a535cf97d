"""From measured rows to this machine's preference table (mmfast.table), which dispatch reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .. import table
from ..dispatch import Op
from .contenders import CHANNELS_LAST, EAGER, OURS
from .measure import Row
from .report import geometric_mean

PREFIX = OURS + " "


def preferences(rows: Sequence[Row]) -> dict[str, table.Preference]:
    """By key of the table: the backend that was never slower than PyTorch, and the fastest of those on the mean.

    Several rows share a key, for a choice does not see the length of a sequence nor the size of a batch.
    """
    found = {}
    for key in dict.fromkeys(key for row in rows for key in row.keys):
        found[key] = _best([row for row in rows if key in row.keys and EAGER in row.timings])
    return {key: preference for key, preference in found.items() if preference is not None}


def _best(rows: Sequence[Row]) -> table.Preference | None:
    if not rows:
        return None
    names = set.intersection(*({name for name in row.timings if name.startswith(PREFIX)} for row in rows))
    best = table.Preference("torch", 1.0)
    for name in sorted(names - {OURS + " compiled"}):
        ratios = [_eager(row) / row.timings[name].low for row in rows]
        mean = geometric_mean(ratios)
        if min(ratios) >= 1 and mean > best.ratio:
            best = table.Preference(name.removeprefix(PREFIX), round(mean, 3))
    return best


def _eager(row: Row) -> float:
    return min(row.timings[name].low for name in (EAGER, CHANNELS_LAST) if name in row.timings)


def save(rows: Sequence[Row], device: str) -> tuple[Path, dict[str, table.Preference]]:
    """Writes the table and makes every op choose by it from now on."""
    found = preferences(rows)
    path = table.save(device, found)
    for op in Op.registry.values():
        op.forget()
    return path, found
