"""Kills `mmfast train` at random moments: does it end where an unbroken run ends, and does its memory stay flat?

    python benchmarks/train_soundness.py [--kills 20] [--minutes 10] [--threads 1] [OPTIONS OF mmfast train]

First an unbroken run of so many minutes, whose memory is looked at once a second; then the same number of steps with
SIGKILL a moment after steps drawn from all of them, each followed by --resume. Prints a line for each
kill, the memory, and whether metrics.csv and the weights are the same bit for bit; exit code 1 where they are not, or
where the memory at the end is more than 5 % above what it was after a fifth of the run.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median_low

import torch

from mmfast.train import checkpoint

MEGABYTE = 1 << 20


def begun(command: list[str], threads: int) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    arguments = [sys.executable, "-m", "mmfast", "train", *command]
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def resident(process: subprocess.Popen) -> int:
    """Bytes of memory in use."""
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def rows(run: Path) -> int:
    path = run / "metrics.csv"
    return max(0, len(path.read_bytes().splitlines()) - 1) if path.exists() else 0


def unbroken(run: Path, minutes: float, options: list[str], threads: int) -> tuple[float, list[int]]:
    """Seconds from the first step to the last, and the memory at each second between."""
    process = begun(["--out", str(run), "--minutes", str(minutes), *options], threads)
    memory: list[int] = []
    first = last = 0.0
    done = 0
    while process.poll() is None:
        time.sleep(1)
        if (now := rows(run)) > done:
            done, last = now, time.monotonic()
            first = first or last
            memory.append(resident(process))
    if process.returncode:
        raise SystemExit(process.communicate()[0])
    if len(memory) < 5:
        raise SystemExit("the run was too short to judge its memory: take more --minutes")
    return last - first, memory


def settled(memory: list[int]) -> tuple[int, int]:
    """The memory after a fifth of a run and at its end: medians over a fifth each, which no save's buffer moves."""
    fifth = len(memory) // 5
    return median_low(memory[fifth : 2 * fifth]), median_low(memory[-fifth:])


def broken(run: Path, steps: int, marks: list[int], options: list[str], threads: int) -> None:
    """Trains `steps` steps, killed at a random moment after each of the steps `marks`."""
    command = ["--out", str(run), *options]
    for number, mark in enumerate(marks, 1):
        process = begun([*command, "--steps", str(steps)], threads)
        while rows(run) < mark and process.poll() is None:
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.2))
        process.kill()
        said = process.communicate()[0]
        if process.returncode != -signal.SIGKILL:
            raise SystemExit(said)
        kept = checkpoint.load(run)["training"]["step"]
        print(f"kill {number}: at step {rows(run)}, checkpoint of step {kept}", flush=True)
        command = ["--resume", str(run)]
    process = begun([*command, "--steps", str(steps)], threads)
    said = process.communicate()[0]
    if process.returncode:
        raise SystemExit(said)


def same_weights(one: Path, other: Path) -> bool:
    states = [checkpoint.load(run)["training"] for run in (one, other)]
    return all(
        torch.equal(a, b)
        for name in ("model", "averaged", "discriminator")
        for a, b in zip(*(state[name].values() for state in states), strict=True)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--threads", type=int, default=1)
    given, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        whole, parts = Path(folder) / "whole", Path(folder) / "parts"
        seconds, memory = unbroken(whole, given.minutes, options, given.threads)
        steps = rows(whole)
        begin, end = settled(memory)
        print(f"unbroken: {steps} steps in {seconds:.0f} s; memory {begin / MEGABYTE:.0f} MB after a fifth, ", end="")
        print(f"{end / MEGABYTE:.0f} MB at the end, at most {max(memory) / MEGABYTE:.0f} MB: ", end="")
        flat = end <= 1.05 * begin
        print("flat" if flat else "IT GROWS", flush=True)
        marks = sorted(random.sample(range(1, steps), given.kills))
        broken(parts, steps, marks, options, given.threads)
        metrics = (whole / "metrics.csv").read_bytes() == (parts / "metrics.csv").read_bytes()
        weights = same_weights(whole, parts)
    print(f"after {given.kills} kills: metrics.csv {'the same' if metrics else 'DIFFERENT'}, ", end="")
    print(f"weights {'the same' if weights else 'DIFFERENT'}")
    return 0 if metrics and weights and flat else 1


if __name__ == "__main__":
    sys.exit(main())
