"""`mmfast info`: the machine, the software, how the native library was built, and what each backend can serve."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch

from . import __version__, native, table
from .dispatch import BACKENDS, Op

#: of what a pipe or a file is given
WIDTH = 100


def collect() -> dict[str, Any]:
    """Everything `mmfast info` shows, as plain data: {section: {name: value}}."""
    return {
        "machine": _machine(),
        "software": _software(),
        "native library": _native(),
        "backends": {name: {op: _verdict(op, name) for op in Op.registry} for name in BACKENDS},
    }


def commit() -> str:
    """The commit that this package was built from; its version where it was built from an archive without history."""
    recorded = Path(__file__).with_name("commit")
    return recorded.read_text().strip() if recorded.exists() else __version__


def main(as_json: bool = False) -> int:
    """Prints the report, as JSON or as tables. Returns the exit code."""
    report = collect()
    if as_json:
        print(json.dumps(report, indent=2))
        return 0
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    for section in ("machine", "software", "native library"):
        table = Table(title=section, title_justify="left", show_header=False)
        for name, value in report[section].items():
            table.add_row(name, str(value))
        console.print(table)
    table = Table("backend", *Op.registry, title="backends", title_justify="left")
    for name, verdicts in report["backends"].items():
        table.add_row(name, *verdicts.values())
    console.print(table)
    return 0


def _machine() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "processor": table.processor(),
        "cores": os.cpu_count(),
        "threads that torch uses": torch.get_num_threads(),
        "system": platform.platform(),
        "GPUs": ", ".join(gpus) or "none that torch can use",
    }


def _software() -> dict[str, Any]:
    return {
        "mmfast": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA that torch was built for": torch.version.cuda or "none",
        "NVIDIA driver": _driver(),
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "OpenMP runtimes loaded": ", ".join(_openmp_runtimes()) or "none",
        "preference table": _preferences(),
    }


def _driver() -> str:
    """The version in the line of /proc/driver/nvidia/version that names the module."""
    version = Path("/proc/driver/nvidia/version")
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", version.read_text()) if version.exists() else None
    return found.group() if found else "none"


def _preferences() -> str:
    try:
        count = table.count("cuda" if torch.cuda.is_available() else "cpu")
    except ValueError as error:
        return str(error)
    return f"{table.path()}: {count} rows for this machine" if count else "none for this machine (mmfast bench --tune)"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _openmp_runtimes() -> list[str]:
    """More than one means that two sets of threads compete for the same cores."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    paths = {line.split(maxsplit=5)[-1].strip() for line in maps.read_text().splitlines() if "omp" in line}
    return sorted({Path(path).name for path in paths if ".so" in path and Path(path).name.startswith("lib")})


def _native() -> dict[str, Any]:
    if not native.available():
        return {"loaded": f"no: {native.load_error()}"}
    library = native.library()
    return {
        "loaded": "yes",
        "built by": library.build["compiler"],
        "OpenMP": library.build["openmp"],
        "CUDA kernels": library.build["cuda"],
        "instruction set": f"{native.isa()} (of {', '.join(native.supported_isas())})",
        "emulator of CUDA kernels": native.load_error("_emulator") or "yes",
    }


def _verdict(op: str, backend: str) -> str:
    """yes, or why this op cannot be served by this backend on this machine."""
    if backend not in Op.registry[op].backends:
        return "no: not written"
    if backend == "torch":
        return "yes"
    if backend == "cpu":
        return "yes" if native.available() else "no: native library not loaded"
    if backend == "triton" and not importlib.util.find_spec("triton"):
        return "no: triton is not installed"
    if not torch.cuda.is_available():
        slowly = backend == "triton" or not native.load_error("_emulator")
        how = "interpreted" if backend == "triton" else "emulated"
        return f"{how}: no GPU" if slowly else "no: neither a GPU nor the emulator"
    if backend == "triton":
        return "yes"
    return "yes" if native.available() and native.library().build["cuda"].startswith("yes") else "no: not compiled in"
