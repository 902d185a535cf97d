"""Files that are whole or not there at all: written under a temporary name, flushed to disk, then renamed."""

import contextlib
import errno
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mmfast.train import UserError

NAME = "checkpoint.pt"


@contextlib.contextmanager
def file_errors(path: Path, then: str = "") -> Iterator[None]:
    """Turns an operating system's refusal to write `path` into a UserError of one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"the disk is full, {path} was not written: free some space{then}") from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(f"no permission to write {path}: choose another folder with --out{then}") from None
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}): choose another folder with --out"
        ) from None


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Writes a temporary file beside `path`, syncs it and renames it: `path` is the old file or the new one.

    UserError where it cannot be written; the old file then still stands.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with file_errors(path):
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def tidy(folder: Path) -> None:
    """Takes away what a killed `write_bytes` left in a folder that nobody else writes to."""
    for left in folder.glob(".*.tmp"):
        with file_errors(left):
            left.unlink()


def sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` last through a power cut, where the system can open folders."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def save(run: Path, state: dict[str, Any]) -> None:
    """Replaces the run's checkpoint by `state` (tensors and plain values)."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_bytes(run / NAME, buffer.getbuffer())


def load(run: Path, *, map_location: str = "cpu") -> dict[str, Any]:
    """The state last saved in the run. UserError where there is none, or it cannot be read."""
    path = run / NAME
    if not path.is_file():
        raise UserError(f"{run} has no checkpoint yet: train it anew (mmfast train --out ANOTHER)")
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # whatever a damaged file makes torch raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read ({reason}): train anew") from None


def random_state() -> dict[str, Any]:
    """The state of torch's random generators, of the CPU and of each GPU in use."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "cuda": gpus}


def restore_random_state(state: dict[str, Any]) -> None:
    """Puts back what `random_state` gave."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
