"""What a run has learned, and how fast its step is: numbers, pictures and the closing table."""

import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import mmfast
from mmfast.models import Multimodal
from mmfast.models.text import within
from mmfast.train import drawing
from mmfast.train.data import Dataset
from mmfast.train.settings import Settings
from mmfast.train.step import PlainHinge, Step

if TYPE_CHECKING:
    from mmfast.train.loop import Run


class Means:
    """Means of named quantities, over all values added."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)

    def add(self, name: str, values: Tensor) -> None:
        self.sums[name] += float(values.double().sum())
        self.counts[name] += values.numel()

    def __getitem__(self, name: str) -> float:
        """nan where nothing was added."""
        return self.sums[name] / self.counts[name] if self.counts[name] else float("nan")


@torch.no_grad()
def held_out_errors(model: Multimodal, dataset: Dataset, settings: Settings, most: int = 512) -> Means:
    """Errors of `model` (in eval mode) over at most `most` held-out captions, with noise of a fixed seed.

    image, picture_of_text, picture_of_speech, mean_image: mean absolute error in levels of 255: of the image decoded
    from the picture's own code, generated from the written and from the spoken caption, and of the mean training
    picture, for comparison. text: share of bytes wrong, each guessed from the code and the true bytes before it.
    speech, mean_speech: mean absolute error in standard deviations of log-mel, and that of the mean frame.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    chosen = dataset.held_out[torch.randperm(len(dataset.held_out), generator=generator)[:most]]
    constant = mean_picture(dataset)
    means = Means()
    for captions in chosen.split(settings.batch):
        batch = dataset.batch(captions)
        noise = torch.randn(len(captions), settings.noise_size, generator=generator)
        codes, present = model.encode(batch)
        true = (batch.images + 1) * 127.5
        means.add("mean_image", (constant - true).abs())
        means.add("image", (levels(model.decode_image(codes[:, 0])) - true).abs())
        means.add("picture_of_text", (levels(model.generator(noise, codes[:, 1])) - true).abs())
        asked = within(batch.text_lengths + 1, batch.text.shape[1] + 1)
        right = torch.nn.functional.pad(batch.text, (0, 1))[asked]
        means.add("text", model.decode_text(codes[:, 1], batch.text)[asked].argmax(1) != right)
        heard = present[:, 2]
        if heard.any():
            spoken = batch.speech[heard]
            inside = within(batch.speech_lengths[heard], spoken.shape[1])
            made = model.decode_speech(codes[heard, 2], spoken.shape[1])
            means.add("speech", (made - spoken)[inside].abs())
            means.add("mean_speech", spoken[inside].abs())
            means.add("picture_of_speech", (levels(model.generator(noise[heard], codes[heard, 2])) - true[heard]).abs())
    return means


def levels(images: Tensor) -> Tensor:
    """Images in [-1, 1] to levels 0 to 255."""
    return (images + 1) * 127.5


def mean_picture(dataset: Dataset, most: int = 1024) -> Tensor:
    """(3, size, size): the mean of `most` pictures, evenly spread, in levels 0 to 255."""
    stride = max(1, len(dataset.images) // most)
    return dataset.images[::stride].float().mean(0)


class Speed(NamedTuple):
    """Two training steps side by side, from equal weights on equal batches."""

    plain: float  # ms, median
    mmfast: float  # ms, median
    difference: float  # the largest between two losses of the same step
    steps: int


def compare_speed(
    settings: Settings, dataset: Dataset, state: dict[str, Any], captions: Tensor, steps: int = 20
) -> Speed:
    """Trains plain PyTorch and mmfast side by side for `steps` steps after two to warm up, taking turns at going first.

    `state`: of Step.state_dict, which both start from; `captions`: (at least (steps + 2) * batch,) int64. Both see the
    same batches and noise, so their losses differ by rounding alone. The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        plain = Step(settings, torch.nn, PlainHinge())
        fast = Step(settings, mmfast.nn, mmfast.nn.AdversarialLoss("hinge"))
        plain.load_state_dict(state)
        fast.load_state_dict(state)
        times: dict[Step, list[float]] = {plain: [], fast: []}
        largest = 0.0
        for i, rows in enumerate(captions[: (steps + 2) * settings.batch].split(settings.batch)):
            batch = dataset.batch(rows)
            noise = torch.randn(len(rows), settings.noise_size)
            wanted = torch.rand(len(rows), 3) < 0.5
            losses = {}
            for step in (plain, fast) if i % 2 else (fast, plain):
                began = time.perf_counter()
                losses[step] = step(batch, dataset.picture_of[rows], noise, wanted)
                times[step].append(1000 * (time.perf_counter() - began))
            # The last is no loss but the norm of the gradient.
            largest = max(largest, float((losses[plain] - losses[fast])[:-1].abs().max()))
    return Speed(median(times[plain][2:]), median(times[fast][2:]), largest, steps)


@torch.no_grad()
def draw_samples(model: Multimodal, dataset: Dataset, settings: Settings, path: Path) -> None:
    """The sample grid: pictures of typed and of spoken held-out captions beside the true ones, and reconstructions."""
    generator = torch.Generator().manual_seed(settings.seed)
    sections = []
    for modality, how, captions in (
        (1, "typed", shown(dataset, generator, 12, spoken=False)),
        (2, "spoken", shown(dataset, generator, 6, spoken=True)),
    ):
        if not len(captions):
            continue
        batch = dataset.batch(captions)
        codes, _ = model.encode(batch)
        noises = torch.randn(3, len(captions), settings.noise_size, generator=generator)
        drawn = [model.generator(noise, codes[:, modality]) for noise in noises]
        title = f"{how}, from names that were kept out of training"
        texts = [dataset.texts[i] for i in captions]
        sections.append(section(title, ["true", "drawn", "", ""], texts, [batch.images, *drawn]))
        if modality == 1:
            texts = [
                f"{given} \u2192 {made}"
                for given, made in zip(texts, model.decode_text.write(codes[:, 1]), strict=True)
            ]
            decoded = section(
                "reconstructed: text and picture, each from its own code",
                ["true", "decoded"],
                texts,
                [batch.images, model.decode_image(codes[:, 0])],
            )
    drawing.draw_sections(path, [*sections, decoded])


def shown(dataset: Dataset, generator: torch.Generator, count: int, *, spoken: bool) -> Tensor:
    """Held-out captions to show, (at most count,) int64: of different pictures, short, and drawable by the font."""
    picked: dict[int, int] = {}
    held_out = dataset.held_out
    for i in held_out[torch.randperm(len(held_out), generator=generator)].tolist():
        text = dataset.texts[i]
        if (dataset.has_speech[i] or not spoken) and len(text) <= 40 and drawing.drawable(text):
            picked.setdefault(int(dataset.picture_of[i]), i)
        if len(picked) == count:
            break
    return torch.tensor(list(picked.values()), dtype=torch.int64)


def section(title: str, headings: list[str], texts: list[str], columns: list[Tensor]) -> drawing.Section:
    entries = [drawing.Entry(text, list(row)) for text, *row in zip(texts, *columns, strict=True)]
    return drawing.Section(title, headings, entries)


def report(run: "Run") -> None:
    """Draws the pictures, measures errors and speed, and prints the closing table."""
    settings, folder, model = run.settings, run.folder, run.step.averaged
    drawing.draw_curves(folder / "curves.png", folder / "metrics.csv")
    draw_samples(model, run.dataset, settings, folder / "samples.png")
    errors = held_out_errors(model, run.dataset, settings)
    captions = torch.cat([run.captions.at(run.step.done + i) for i in range(22)])
    speed = compare_speed(settings, run.dataset, run.step.state_dict(), captions)
    console = Console()
    console.print(error_table(errors))
    trained = run.step.done * settings.batch / run.seconds
    console.print(
        f"{run.step.done} steps in {run.seconds / 60:.1f} minutes: {trained:.0f} images/s\n"
        f"training step, plain PyTorch {speed.plain:.0f} ms, mmfast {speed.mmfast:.0f} ms: "
        f"{speed.plain / speed.mmfast:.2f} x\n"
        f"largest difference between their losses over {speed.steps} steps: {speed.difference:.1e}",
        highlight=False,
    )
    for line in run.dataset.attribution:
        console.print(line, highlight=False, markup=False)
    for name in ("samples.png", "curves.png"):
        print(folder / name)
    print(f'draw your own: mmfast sample {folder} "red heart"')


def error_table(errors: Means) -> Table:
    """The errors of held_out_errors as they are printed."""
    table = Table("held-out captions: error of", "error", "of a constant guess", title_justify="left")
    blank = f"{errors['mean_image']:.1f}"
    table.add_row("image, decoded from its code (of 255)", f"{errors['image']:.1f}", blank)
    table.add_row("text, from its code (bytes wrong)", f"{100 * errors['text']:.1f} %", "")
    table.add_row("speech, from its code (std of log-mel)", f"{errors['speech']:.3f}", f"{errors['mean_speech']:.3f}")
    table.add_row("picture drawn from text (of 255)", f"{errors['picture_of_text']:.1f}", blank)
    table.add_row("picture drawn from speech (of 255)", f"{errors['picture_of_speech']:.1f}", blank)
    return table
