"""The run: folder, schedule, progress, checkpoints and resumption."""

import contextlib
import datetime
import itertools
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mmfast
from mmfast.train import UserError, checkpoint, data
from mmfast.train.checkpoint import file_errors, write_bytes
from mmfast.train.processes import ALONE, Processes, process_count, started
from mmfast.train.progress import Progress
from mmfast.train.settings import Settings, read_config, write_config
from mmfast.train.step import LOSSES, Step
from mmfast.train.strip import Strip

FLUSH_EVERY = 10  # steps between looks at the losses


class Captions:
    """The endless stream of training captions: epoch after epoch, each in an order of its own.

    A pure function of seed and step, so there is nothing to save: a resumed run asks for the step it is at.
    """

    def __init__(self, captions: Tensor, batch: int, seed: int) -> None:
        self.captions = captions
        self.batch = batch
        self.seed = seed
        self._epoch = -1
        self._order = captions

    def at(self, step: int) -> Tensor:
        """The captions of step `step` (from 0): (batch,) int64."""
        place, missing, parts = step * self.batch, self.batch, []
        while missing:
            epoch, begin = divmod(place, len(self.captions))
            part = self._ordered(epoch)[begin : begin + missing]
            parts.append(part)
            place, missing = place + len(part), missing - len(part)
        return torch.cat(parts)

    def _ordered(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = self.captions[torch.randperm(len(self.captions), generator=generator)]
            self._epoch = epoch
        return self._order


def draw(settings: Settings, rows: int, step: int) -> tuple[Tensor, Tensor]:
    """Noise (rows, noise_size), and which of image, text and speech the generator may see: (rows, 3) bool.

    A pure function of seed and step, like Captions. Mostly words or speech alone, for that is what it is asked for
    later.
    """
    generator = torch.Generator().manual_seed(((settings.seed << 32) + step) % 2**63)
    noise = torch.randn(rows, settings.noise_size, generator=generator)
    wanted = torch.rand(rows, 3, generator=generator) < torch.tensor([0.15, 0.6, 0.5])
    return noise, wanted


class Metrics:
    """metrics.csv: a row of LOSSES for each step, and no wall-clock number, so that equal runs have equal files.

    `run`: None where nothing is to be written. `writer`: a tensorboard SummaryWriter that is given the same, or None.
    """

    def __init__(self, run: Path | None, step: int, writer: Any = None) -> None:
        self.path = run and run / "metrics.csv"
        self.writer = writer
        self.pending: list[tuple[int, Tensor]] = []
        if self.path is None:
            return
        header = ",".join(("step", *LOSSES)) + "\n"
        kept = header
        if step:
            with file_errors(self.path):
                lines = self.path.read_text().splitlines(keepends=True)[1:]
            kept += "".join(line for line in lines if line.endswith("\n") and int(line.split(",")[0]) <= step)
        write_bytes(self.path, kept.encode())

    def add(self, step: int, losses: Tensor) -> None:
        self.pending.append((step, losses))

    def flush(self) -> dict[str, float]:
        """Writes what is pending; returns the means. FloatingPointError names the first step that was not finite."""
        if not self.pending:
            return {}
        steps = [step for step, _ in self.pending]
        rows = torch.stack([losses for _, losses in self.pending]).tolist()
        self.pending.clear()
        self._write(steps, rows)
        for step, row in zip(steps, rows, strict=True):
            bad = [name for name, x in zip(LOSSES, row, strict=True) if x - x != 0]
            if bad:
                raise FloatingPointError(f"{' and '.join(bad)} of step {step}")
        return {name: sum(column) / len(rows) for name, column in zip(LOSSES, zip(*rows, strict=True), strict=True)}

    def _write(self, steps: list[int], rows: list[list[float]]) -> None:
        if self.path is None:
            return
        lines = [f"{step},{','.join(f'{x:.6g}' for x in row)}\n" for step, row in zip(steps, rows, strict=True)]
        with file_errors(self.path), open(self.path, "a") as file:
            file.writelines(lines)
        if self.writer is None:
            return
        with file_errors(self.path.with_name("tensorboard")):
            for step, row in zip(steps, rows, strict=True):
                for name, x in zip(LOSSES, row, strict=True):
                    self.writer.add_scalar(f"loss/{name}", x, step)


@contextlib.contextmanager
def summary_writer(settings: Settings, run: Path | None, step: int) -> Iterator[Any]:
    """The SummaryWriter that --log asks for, in the run's folder, or None. What it held behind `step` is hidden."""
    if settings.log is None or run is None:
        yield None
        return
    from torch.utils.tensorboard import SummaryWriter

    folder = run / "tensorboard"
    with file_errors(folder):
        writer = SummaryWriter(str(folder), purge_step=step + 1)
    try:
        yield writer
    finally:
        with file_errors(folder):
            writer.close()


class Run:
    """A training run in its folder, or one process's part of it."""

    def __init__(self, folder: Path, settings: Settings, dataset: data.Dataset, processes: Processes = ALONE) -> None:
        self.folder = folder
        self.settings = settings
        self.dataset = dataset
        self.processes = processes
        self.captions = Captions(dataset.train, settings.batch, settings.seed)
        self.seconds = 0.0  # trained so far, in all sittings
        self.strip = Strip(settings, dataset)
        torch.manual_seed(settings.seed)
        self.step = new_step(settings, processes)
        if processes.rank:
            # From here on only what a model draws itself comes from this generator, and that is each process's own.
            torch.manual_seed(settings.seed + processes.rank)

    def load(self) -> None:
        """Goes back to the last checkpoint, which only the first process reads."""
        state: Any = None
        with self.processes.together():
            if self.processes.first:
                checkpoint.tidy(self.folder)
                state = checkpoint.load(self.folder)
                if state["fingerprint"] != self.dataset.fingerprint:
                    raise UserError(
                        f"{self.folder} was trained on other data than this: give it the same data, or train anew"
                    )
        state = self.processes.from_first(state)
        self.step.load_state_dict(state["training"])
        self.seconds = state["seconds"]
        self.strip.load_state_dict(state["strip"])
        if self.processes.rank < len(state["random"]):
            checkpoint.restore_random_state(state["random"][self.processes.rank])

    def save(self) -> None:
        """Replaces the checkpoint, unless a weight is not finite (FloatingPointError)."""
        if not self.step.is_finite():
            raise FloatingPointError(f"a weight after step {self.step.done}")
        state = {
            "fingerprint": self.dataset.fingerprint,
            "seconds": self.seconds,
            "training": self.step.state_dict(),
            "strip": self.strip.state_dict(),
            "random": self.processes.every(checkpoint.random_state()),
        }
        with self.processes.together():
            if self.processes.first:
                checkpoint.save(self.folder, state)

    def finished(self) -> bool:
        """Whether the steps or the minutes asked for are done."""
        limits = self.settings
        out_of_steps = limits.steps is not None and self.step.done >= limits.steps
        return out_of_steps or (limits.minutes is not None and self.seconds >= 60 * limits.minutes)

    def fraction(self) -> float:
        """How much of the run is done, 0 to 1."""
        by_steps = self.step.done / self.settings.steps if self.settings.steps else 0.0
        by_time = self.seconds / (60 * self.settings.minutes) if self.settings.minutes else 0.0
        return min(1.0, max(by_steps, by_time))

    def train(self) -> bool:
        """Steps until the limit; False where Ctrl-C or SIGTERM came first. Saves first, on the way and last.

        Every process stops after the same step, whichever was told to, and only the first writes and shows.
        """
        if not self.step.done:
            self.save()
        try:
            with stop_signals() as stopped:
                return self._steps(stopped)
        except FloatingPointError as error:
            raise self._diverged(error) from None

    def _steps(self, stopped: list[int]) -> bool:
        first = self.processes.first
        folder = self.folder if first else None
        began, before, done = time.monotonic(), self.seconds, self.step.done
        with summary_writer(self.settings, folder, done) as writer, Progress(shown=first) as progress:
            metrics = Metrics(folder, done, writer)
            while True:
                told, over = self.processes.any([bool(stopped), self.finished()], self.step.device)
                if told or over:
                    break
                metrics.add(self.step.done + 1, self._once())
                self.seconds = before + time.monotonic() - began
                if self.step.done % FLUSH_EVERY == 0:
                    speed = (self.step.done - done) * self.settings.batch / (self.seconds - before)
                    with self.processes.together():
                        losses = metrics.flush()
                    progress.show(self.fraction(), self.step.done, losses, speed)
                if Strip.due(self.step.done):
                    self.strip.draw(self.step.done, self.step.drawing_model())
                if self.step.done % self.settings.save_every == 0:
                    metrics.flush()
                    self.save()
            metrics.flush()
            self.save()
        return over

    def _once(self) -> Tensor:
        done, share = self.step.done, self.processes.share
        captions = self.captions.at(done)
        noise, wanted = draw(self.settings, len(captions), done)
        heard = data.first_spoken(self.dataset.has_speech[captions], self.settings.spoken)
        rows = share(captions)
        # The joined batch, for its padding takes part in the speech decoder's batch statistics.
        batch = self.dataset.batch(captions, heard, multiple=16 if self.settings.compile else 1).rows(share)
        return self.step(batch, self.dataset.picture_of[rows], share(noise), share(wanted))

    def _diverged(self, error: FloatingPointError) -> UserError:
        kept = checkpoint.load(self.folder)["training"]["step"]
        return UserError(
            f"training diverged ({error} is not a finite number), and the checkpoint of step {kept} is kept: "
            f"train anew with another --seed, or draw with what there is (mmfast sample {self.folder} ...)"
        )


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that is empty until Ctrl-C or SIGTERM comes; a second Ctrl-C interrupts at once."""
    got: list[int] = []

    def note(number: int, _frame: Any) -> None:
        got.append(number)
        signal.signal(number, before[signal.Signals(number)])

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread, where signals are none of our business
        before = {}
    try:
        yield got
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start(settings: Settings, out: Path | None) -> None:
    """A new run: checks everything cheap first, then prepares the data, trains and reports."""
    settings = replace(settings, mels=data.MELS).check()
    check_packages(settings)
    if settings.fsdp and "RANK" not in os.environ:
        raise UserError("--fsdp shares the weights among processes: start it with torchrun -m mmfast train")
    settings.check_shares(process_count())
    device = torch.device(settings.device)
    with started(device) as processes, new_folder(out, processes) as folder, chosen_backend(settings):
        dataset = prepare(settings)
        run = Run(folder, settings, dataset, processes)
        if processes.first:
            write_config(folder, settings, facts(dataset))
        carry_out(run)


def resume(folder: Path, *, steps: int | None, minutes: float | None, backend: str | None) -> None:
    """Goes on with a run as if it had never stopped; `steps` and `minutes`, from its start, replace its limits.

    It may go on in another number of processes; in one, --fsdp has nothing to share.
    """
    settings, config = read_config(folder)
    if steps is not None or minutes is not None:
        settings = replace(settings, steps=steps, minutes=minutes)
    settings = replace(settings, backend=backend or settings.backend).check()
    check_packages(settings)
    check_writable(folder)
    settings.check_shares(process_count())
    with started(torch.device(settings.device)) as processes, chosen_backend(settings):
        run = Run(folder, settings, prepare(settings), processes)
        run.load()
        if processes.first:
            if run.finished():
                print(f"{folder} has done what it was asked for; --steps or --minutes, from its start, let it go on")
            if config["threads"] != torch.get_num_threads():
                threads = torch.get_num_threads()
                print(f"begun on {config['threads']} threads, goes on with {threads}: rounding will differ")
            write_config(folder, settings, {key: config[key] for key in ("data", "threads")})
        carry_out(run)


def carry_out(run: Run) -> None:
    from mmfast.train.evaluate import report

    settings, first = run.settings, run.processes.first
    limits = [f"{settings.steps} steps"] if settings.steps else []
    limits += [f"{settings.minutes:g} minutes"] if settings.minutes else []
    if not run.finished() and first:
        print(f"training in {run.folder} from step {run.step.done} to {' or '.join(limits)}", flush=True)
    if not run.train():
        if first:
            print(f"stopped at step {run.step.done}; go on with: mmfast train --resume {run.folder}")
        raise SystemExit(130)
    model, state = run.step.drawing_model(), run.step.state_dict()
    if first:
        report(run, model, state)


def facts(dataset: data.Dataset) -> dict[str, Any]:
    described = {
        "fingerprint": dataset.fingerprint,
        "pictures": len(dataset.pictures),
        "captions": len(dataset.texts),
        "held_out": len(dataset.held_out),
        "spoken": int(dataset.has_speech.sum()),
        "attribution": dataset.attribution,
    }
    return {"data": described, "threads": torch.get_num_threads()}


def prepare(settings: Settings) -> data.Dataset:
    folder = Path(settings.cache) if settings.cache else None
    source = Path(settings.data) if settings.data else None
    return data.prepare(folder, size=settings.size, source=source)


def check_packages(settings: Settings | None = None) -> None:
    """UserError where a package of the [train] extra that every run needs is missing, or one that --log needs."""
    from importlib.util import find_spec

    missing = [name for name in ("matplotlib", "PIL", "scipy") if find_spec(name) is None]
    if missing:
        raise UserError(
            f'training needs packages that are not installed ({", ".join(missing)}): pip install "mmfast[train]"'
        )
    if settings is not None and settings.log == "tensorboard" and find_spec("tensorboard") is None:
        raise UserError("--log tensorboard needs a package that is not installed: pip install tensorboard")


@contextlib.contextmanager
def chosen_backend(settings: Settings) -> Iterator[None]:
    """The backend asked for, while the context lasts; UserError at its start where it is unknown or cannot train."""
    if settings.backend is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(mmfast.use_backend(settings.backend))
            try_step(settings)
        except (ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"--backend {settings.backend} cannot train here: {reason}") from None
        yield


def try_step(settings: Settings) -> None:
    """One step of the settings' own models on two made-up captions: raises what any of their layers refuses."""
    lengths = torch.tensor([5, 3])
    batch = data.Batch(
        images=torch.randn(2, 3, settings.size, settings.size),
        text=torch.full((2, 5), 97),
        text_lengths=lengths,
        speech=torch.randn(2, 5, settings.mels),
        speech_lengths=lengths,
    )
    new_step(replace(settings, compile=False))(batch, torch.arange(2), *draw(settings, 2, 0))


def new_step(settings: Settings, processes: Processes = ALONE) -> Step:
    """The training step of mmfast's layers and loss, with new weights."""
    return Step(settings, mmfast.nn, mmfast.nn.AdversarialLoss("hinge"), processes)


def check_writable(folder: Path) -> None:
    """UserError where no file can be made in `folder`."""
    with file_errors(folder), tempfile.TemporaryFile(dir=folder):
        pass


def unused_name(parent: Path) -> Path:
    """A folder in `parent` named after date and time, that does not exist yet."""
    now = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
    names = (parent / (now if i == 1 else f"{now}-{i}") for i in itertools.count(1))
    return next(name for name in names if not name.exists())


@contextlib.contextmanager
def new_folder(out: Path | None, processes: Processes = ALONE) -> Iterator[Path]:
    """A new, empty, writable folder, made by the first process; taken away again where nothing was written into it."""
    folder = processes.from_first(out or unused_name(Path("runs")))
    if not processes.first:
        with processes.together():
            pass
        yield folder
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with processes.together():
            with file_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
                if any(folder.iterdir()):
                    raise UserError(
                        f"{folder} is not empty: name a new folder with --out, or go on with --resume {folder}"
                    )
            check_writable(folder)
        yield folder
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
