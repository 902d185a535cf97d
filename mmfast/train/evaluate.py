"""What a run has learned, and how fast its step is: numbers, pictures and the closing table."""

import copy
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import mmfast
from mmfast.models import MODALITIES, Multimodal, combine
from mmfast.models.multimodal import spoken_rows
from mmfast.models.text import within, written_bytes
from mmfast.train import drawing
from mmfast.train.data import MAX_BYTES, Dataset, first_spoken
from mmfast.train.settings import Settings
from mmfast.train.step import PlainHinge, Step
from mmfast.train.strip import Strip

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
    captions = kept_out(dataset)
    chosen = captions[torch.randperm(len(captions), generator=generator)[:most]]
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
        guessed = model.decode_text(codes[:, 1], batch.text, batch.text_lengths).argmax(1)
        means.add("text", guessed != written_bytes(batch.text, batch.text_lengths))
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


@torch.no_grad()
def recall(
    model: Multimodal, dataset: Dataset, settings: Settings, most: int = 1000, rivals: int = 100
) -> dict[str, float]:
    """R@1: how often a picture drawn from a held-out caption is nearest to its own true one among `rivals` pictures.

    Nearest by the cosine of 16 x 16 RGB (or less, of smaller pictures) from which the data's mean picture is taken; the
    others are drawn at random. text, speech, image, all: what the generator is given; shuffled: the text of a caption
    of another picture, a control; chance, 1 where there is one picture only. nan where nothing was given. The captions
    are new names of pictures that were trained on.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    captions = kept_out(dataset)
    captions = captions[torch.randperm(len(captions), generator=generator)[:most]]
    small = _thumbnails(dataset.images.float())
    mean = small.mean(0)
    known = torch.nn.functional.normalize(small - mean, dim=1)
    own = dataset.picture_of[captions]
    shown = gallery(own, len(known), rivals, generator)
    means = Means()
    for rows in torch.arange(len(captions)).split(settings.batch):
        batch = dataset.batch(captions[rows])
        codes, present = model.encode(batch)
        noise = torch.randn(len(rows), settings.noise_size, generator=generator)
        counted = {"speech": present[:, 2], "shuffled": own[rows] != own[rows].roll(1)}
        given = {name: codes[:, i] for i, name in enumerate(MODALITIES)}
        given |= {"all": combine(codes, present), "shuffled": codes.roll(1, 0)[:, 1]}
        for name, code in given.items():
            drawn = _thumbnails(levels(model.generator(noise, code))) - mean
            scores = torch.einsum("bd,bkd->bk", drawn, known[shown[rows]])
            hits = (scores[:, :1] > scores[:, 1:]).all(1)
            means.add(name, hits[counted.get(name, ...)])
    return {name: means[name] for name in (*MODALITIES, "all", "shuffled")} | {"chance": 1 / shown.shape[1]}


def gallery(own: Tensor, pictures: int, most: int, generator: torch.Generator) -> Tensor:
    """For each of the pictures `own`, (N,), it and then others drawn from all `pictures`: (N, at most `most`)."""
    others = torch.rand(len(own), pictures, generator=generator)
    return others.scatter(1, own[:, None], 2.0).topk(min(most, pictures), 1).indices


def _thumbnails(images: Tensor) -> Tensor:
    """(N, 3, S, S) to (N, 3 * 16 * 16), or fewer where S is smaller."""
    side = min(16, images.shape[-1])
    return torch.nn.functional.adaptive_avg_pool2d(images, side).flatten(1)


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
    same batches and noise, and before each step plain PyTorch is given mmfast's weights: so each step's losses differ
    by that step's rounding alone, which GAN training would soon magnify. The global random state is left as it was.
    """
    settings = replace(settings, device="cpu", amp=None, compile=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        plain = Step(settings, torch.nn, PlainHinge())
        fast = Step(settings, mmfast.nn, mmfast.nn.AdversarialLoss("hinge"))
        fast.load_state_dict({**state, "scaler": {}})
        times: dict[Step, list[float]] = {plain: [], fast: []}
        largest = 0.0
        for i, rows in enumerate(captions[: (steps + 2) * settings.batch].split(settings.batch)):
            plain.load_state_dict(fast.state_dict())
            batch = dataset.batch(rows, first_spoken(dataset.has_speech[rows], settings.spoken))
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


def compare_parts(settings: Settings, dataset: Dataset, captions: Tensor, rounds: int = 5) -> dict[str, list[float]]:
    """[plain PyTorch, mmfast]: the least ms, forward and backward, of each part of a step, taking turns."""
    settings = replace(settings, device="cpu", amp=None, compile=False)
    batch = dataset.batch(captions, first_spoken(dataset.has_speech[captions], settings.spoken))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        sides = [
            _part_calls(Step(settings, nn, loss), batch)
            for nn, loss in ((torch.nn, PlainHinge()), (mmfast.nn, mmfast.nn.AdversarialLoss("hinge")))
        ]
    least = {name: [float("inf"), float("inf")] for name in sides[0]}
    for _ in range(rounds):
        for name in least:
            for i, calls in enumerate(sides):
                began = time.perf_counter()
                calls[name]()
                least[name][i] = min(least[name][i], 1000 * (time.perf_counter() - began))
    return least


def _part_calls(step: Step, batch: Any) -> dict[str, Callable[[], None]]:
    """For each part of a step a function that runs it forward and backward."""
    model, settings = step.model, step.settings
    size = len(batch.images)
    codes = torch.randn(size, settings.code_size, requires_grad=True)
    noise = torch.randn(size, settings.noise_size)
    real, fake = torch.randn(2, size, requires_grad=True).unbind()

    def decode() -> list[Tensor]:
        rows = spoken_rows(batch.speech_lengths)
        text = model.decode_text(codes, batch.text, batch.text_lengths)
        return [model.decode_image(codes), text, model.decode_speech(codes[rows], batch.speech.shape[1])]

    def judge() -> list[Tensor]:
        return [step.discriminator(torch.cat([batch.images, batch.images]), torch.cat([codes, codes]))]

    makes: dict[str, Callable[[], list[Tensor]]] = {
        "encoders": lambda: [model.encode(batch)[0]],
        "decoders": decode,
        "generator": lambda: [model.generator(noise, codes)],
        "discriminator": judge,
        "loss": lambda: [step.adversarial.discriminator(real, fake) + step.adversarial.generator(fake)],
    }

    def both_ways(make: Callable[[], list[Tensor]]) -> Callable[[], None]:
        return lambda: torch.autograd.backward(made := make(), [torch.ones_like(x) for x in made])

    return {name: both_ways(make) for name, make in makes.items()}


@torch.no_grad()
def draw_samples(model: Multimodal, dataset: Dataset, settings: Settings, path: Path) -> None:
    """The sample grid: pictures of typed and of spoken held-out captions beside the true ones, and reconstructions."""
    generator = torch.Generator().manual_seed(settings.seed)
    typed = shown(dataset, generator, 12, spoken=False)
    spoken = shown(dataset, generator, 6, spoken=True)
    noises = torch.randn(3, len(typed), settings.noise_size, generator=generator)
    sections = [drawn_section(model, dataset, noises, typed, "text", "typed")]
    if len(spoken):
        sections.append(drawn_section(model, dataset, noises[:, : len(spoken)], spoken, "speech", "spoken"))
    sections.append(decoded_section(model, dataset, typed))
    if len(spoken):
        sections.append(spectra_section(model, dataset, spoken))
    drawing.draw_sections(path, sections)


def drawn_section(
    model: Multimodal, dataset: Dataset, noises: Tensor, captions: Tensor, modality: str, how: str
) -> drawing.Section:
    """What the generator makes of one modality of the captions, with each of `noises` (N, captions, noise_size)."""
    batch = dataset.batch(captions)
    codes = model.encode(batch)[0][:, MODALITIES.index(modality)]
    drawn = [model.generator(noise, codes) for noise in noises]
    title = f"{how} names that were {'kept out of' if len(dataset.held_out) else 'in'} the training"
    headings = ["true", "drawn", *[""] * (len(drawn) - 1)]
    return section(title, headings, [dataset.texts[i] for i in captions], [batch.images, *drawn])


def decoded_section(model: Multimodal, dataset: Dataset, captions: Tensor) -> drawing.Section:
    """Text and picture of the captions, each decoded from its own code."""
    batch = dataset.batch(captions)
    image, text, _ = model.encode(batch)[0].unbind(1)
    written = model.decode_text.write(text, MAX_BYTES)
    texts = [f"{dataset.texts[i]} \u2192 {made}" for i, made in zip(captions, written, strict=True)]
    title = "reconstructed: text and picture, each from its own code"
    return section(title, ["true", "decoded"], texts, [batch.images, model.decode_image(image)])


def spectra_section(model: Multimodal, dataset: Dataset, captions: Tensor) -> drawing.Section:
    """Log-mel of the spoken captions, time to the right and pitch upwards, and what is decoded from its code."""
    batch = dataset.batch(captions)
    made = model.decode_speech(model.encode(batch)[0][:, MODALITIES.index("speech")], batch.speech.shape[1])
    spectra = [
        [
            frames[:length].T.flip(0).expand(3, -1, -1) / 2
            for frames, length in zip(x, batch.speech_lengths, strict=True)
        ]
        for x in (batch.speech, made)
    ]
    texts = [dataset.texts[i] for i in captions]
    return section("reconstructed: speech, from its own code", ["true", "decoded"], texts, spectra)


def shown(dataset: Dataset, generator: torch.Generator, count: int, *, spoken: bool) -> Tensor:
    """Held-out captions to show, (at most count,) int64: of different pictures; short and drawable ones come first."""
    captions = kept_out(dataset)
    shuffled = captions[torch.randperm(len(captions), generator=generator)].tolist()
    candidates = [i for i in shuffled if dataset.has_speech[i] or not spoken]
    candidates.sort(key=lambda i: len(dataset.texts[i]) > 40 or not drawing.drawable(dataset.texts[i]))
    picked: dict[int, int] = {}
    for i in candidates:
        picked.setdefault(int(dataset.picture_of[i]), i)
        if len(picked) == count:
            break
    return torch.tensor(list(picked.values()), dtype=torch.int64)


def kept_out(dataset: Dataset) -> Tensor:
    """The held-out captions; all captions where the data is too small for any to be held out."""
    return dataset.held_out if len(dataset.held_out) else dataset.train


def section(title: str, headings: list[str], texts: list[str], columns: Sequence[Iterable[Tensor]]) -> drawing.Section:
    entries = [drawing.Entry(text, list(row)) for text, *row in zip(texts, *columns, strict=True)]
    return drawing.Section(title, headings, entries)


def report(run: "Run", model: Multimodal, state: dict[str, Any]) -> None:
    """Draws the pictures, measures errors and speed, and prints the closing table.

    `model`: the averaged one, in eval mode; `state`: of Step.state_dict. Both whole, not sharded.
    """
    settings, folder, dataset = run.settings, run.folder, run.dataset
    model = copy.deepcopy(model).cpu()
    drawing.draw_curves(folder / "curves.png", folder / "metrics.csv")
    draw_samples(model, dataset, settings, folder / "samples.png")
    written = ["samples.png", "curves.png", "speed.png"]
    if run.strip.frames:
        draw_strip(run.strip, dataset, folder / "strip.png")
        written.append("strip.png")
    console = Console()
    console.print(error_table(held_out_errors(model, dataset, settings)))
    console.print(recall_table(recall(model, dataset, settings)))
    captions = torch.cat([run.captions.at(run.step.done + i) for i in range(22)])
    speed = compare_speed(settings, dataset, state, captions)
    parts = compare_parts(settings, dataset, captions[: settings.batch]) | {"whole step": [speed.plain, speed.mmfast]}
    drawing.draw_ratios(folder / "speed.png", parts)
    console.print(parts_table(parts))
    trained = run.step.done * settings.batch / run.seconds
    console.print(
        f"{run.step.done} steps in {run.seconds / 60:.1f} minutes: {trained:.0f} images/s\n"
        f"training step, plain PyTorch {speed.plain:.0f} ms, mmfast {speed.mmfast:.0f} ms: "
        f"{speed.plain / speed.mmfast:.2f} x\n"
        f"largest difference between their losses over {speed.steps} steps: {speed.difference:.1e}",
        highlight=False,
    )
    for line in dataset.attribution:
        console.print(line, highlight=False, markup=False)
    for name in written:
        print(folder / name)
    print(f'draw your own: mmfast sample {folder} "red heart"')


def draw_strip(strip: Strip, dataset: Dataset, path: Path) -> None:
    """The strip of samples over time: a row for each caption, a column for each step drawn, the true picture last."""
    true = dataset.batch(strip.captions).images
    columns = [frames.float() / 127.5 - 1 for frames in strip.frames]
    headings = [*(str(step) for step in strip.steps), "true"]
    texts = [dataset.texts[i] for i in strip.captions]
    drawing.draw_sections(path, [section("drawn after so many steps", headings, texts, [*columns, true])], columns=1)


def recall_table(found: dict[str, float]) -> Table:
    """`recall` as it is printed."""
    table = Table("picture drawn from a held-out caption", "R@1", title_justify="left")
    for name in MODALITIES:
        table.add_row(f"its {name}", f"{found[name]:.3f}")
    table.add_row("all together", f"{found['all']:.3f}")
    table.add_row("another picture's text (control)", f"{found['shuffled']:.3f}")
    table.add_row("chance", f"{found['chance']:.3f}")
    table.caption = "nearest to its own true picture among random ones; new names of known pictures"
    return table


def parts_table(parts: dict[str, list[float]]) -> Table:
    """The times of `compare_parts` and the whole step as they are printed."""
    table = Table("forward and backward, ms", "plain PyTorch", "mmfast", "ratio", title_justify="left")
    for name, (plain, fast) in parts.items():
        table.add_row(name, f"{plain:.1f}", f"{fast:.1f}", f"{plain / fast:.2f}")
    return table


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
