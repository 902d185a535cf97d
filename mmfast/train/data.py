"""The data room: prepares pictures, captions and speech once, keeps them on disk, and hands out batches.

A prepared data set is a folder of .npy files and a dataset.json. It is built under another name and renamed when it is
complete, so a killed preparation leaves nothing that looks like one.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmfast import config
from mmfast.train import UserError
from mmfast.train.settings import ARTICLE_SIZE
from mmfast.train.sources import (
    Caption,
    Material,
    Recordings,
    digest,
    emoji_key,
    emoji_material,
    folder_key,
    folder_material,
    load_image,
    normalised,
)
from mmfast.train.speech import (
    HIGHEST,
    LOWEST,
    MELS,
    SAMPLE_RATE,
    SpeechUnavailable,
    log_mel,
    read_wav,
    require_espeak,
    speak,
)

try:
    import fcntl
except ImportError:
    # Windows: two preparations at once both do the work, and the later one is thrown away.
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "MAX_BYTES",
    "MELS",
    "SAMPLE_RATE",
    "Batch",
    "Dataset",
    "first_spoken",
    "prepare",
    "read_image",
    "read_wav",
    "speak",
    "text_tensor",
]

# Raised whenever the files below change their meaning.
FORMAT = 2
INDEX = "dataset.json"
MAX_BYTES = 96
MIN_SIZE = 8
HELD_OUT = 0.1
DRAWN_AT_ONCE = 16
SPOKEN_AHEAD = 4


@dataclass
class Batch:
    """What a training step sees.

    images: (B, 3, S, S) float32 in [-1, 1]. text: (B, T) int64, UTF-8 bytes, 0 behind the end. speech: (B, F, MELS)
    float32, log-mel, 0 behind the end, F >= 1. text_lengths, speech_lengths: (B,) int64, always on the CPU, because
    packing needs them there; a text has at least one byte, a caption without speech has length 0.
    """

    images: Tensor
    text: Tensor
    text_lengths: Tensor
    speech: Tensor
    speech_lengths: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its data on `device`."""
        return Batch(
            self.images.to(device),
            self.text.to(device),
            self.text_lengths,
            self.speech.to(device),
            self.speech_lengths,
        )

    def rows(self, which: Callable[[Tensor], Tensor]) -> Batch:
        """The rows that `which` picks from each tensor; padded as before, so that all parts have one shape."""
        parts = (self.images, self.text, self.text_lengths, self.speech, self.speech_lengths)
        return Batch(*(which(part) for part in parts))


class Dataset:
    """A prepared data set: P pictures with C captions, some of them spoken. Its arrays stay on disk until used.

    size: the pictures' side S. images: (P, 3, S, S) uint8. pictures: P names. texts, languages: C strings.
    picture_of: (C,) int64, which image a caption belongs to. train, held_out: int64 indices of captions; no string of
    held_out occurs in train. has_speech: (C,) bool. attribution: lines to show to the user. fingerprint: a hash of what
    the data was made from.
    """

    def __init__(self, folder: Path) -> None:
        """Opens a folder that `prepare` made. Errors: OSError or ValueError for anything else."""
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise ValueError(f"{folder} has format {index['format']}, this is format {FORMAT}")
        self.folder = folder
        self.size: int = index["size"]
        self.pictures: list[str] = index["pictures"]
        self.texts: list[str] = index["texts"]
        self.languages: list[str] = index["languages"]
        self.attribution: list[str] = index["attribution"]
        self.fingerprint: str = index["fingerprint"]
        self.speech_missing: str = index["speech_missing"]
        self.images = _mapped(folder / "images.npy")
        self.picture_of = _mapped(folder / "picture_of.npy")
        self.train = _mapped(folder / "train.npy")
        self.held_out = _mapped(folder / "held_out.npy")
        self._text = _Ragged(folder, "text")
        self._speech = _Ragged(folder, "speech")
        if self.images.shape != (len(self.pictures), 3, self.size, self.size) or not (
            len(self.texts) == len(self.languages) == len(self.picture_of) == len(self.train) + len(self.held_out)
        ):
            raise ValueError(f"the files in {folder} do not belong together")
        self.has_speech = torch.from_numpy(np.diff(self._speech.start) > 0)

    def batch(self, captions: Tensor, heard: Tensor | None = None, *, multiple: int = 1) -> Batch:
        """The captions with these indices, (B,) int64, and their pictures and speech. B >= 1.

        heard: (B,) bool, whose speech is wanted; None: all. multiple: of which the longest text and the longest speech
        are made by padding, so that batches come in few shapes.
        """
        # Gathered by numpy, not torch: on several threads such small steps only get in the way of the training.
        rows = captions.numpy()
        text, text_lengths = self._text.gather(rows, multiple)
        speech, speech_lengths = self._speech.gather(rows, multiple, None if heard is None else heard.numpy())
        behind_end = np.arange(speech.shape[1]) >= speech_lengths[:, None]
        frames = _dequantised(speech)
        frames[behind_end] = 0
        return Batch(
            images=torch.from_numpy(_to_float(self.images.numpy()[self.picture_of.numpy()[rows]])),
            text=torch.from_numpy(text.astype(np.int64)),
            text_lengths=torch.from_numpy(text_lengths),
            speech=torch.from_numpy(frames),
            speech_lengths=torch.from_numpy(speech_lengths),
        )


def first_spoken(has_speech: Tensor, most: int) -> Tensor:
    """(B,) bool: the first `most` of the rows that have speech. Speech is dear, and learned from fewer rows a step."""
    return has_speech & (has_speech.cumsum(0) <= most)


def prepare(
    folder: str | os.PathLike[str] | None = None,
    *,
    size: int = 32,
    source: str | os.PathLike[str] | None = None,
    progress: bool = True,
    limit: int | None = None,
) -> Dataset:
    """Opens the data set, and makes it first where it does not exist yet.

    folder: where prepared data is kept (default: MMFAST_DATA, else mmfast in the user's cache folder). size: the
    pictures' side, a power of two of at least 8. source: a folder of the user's own with images and captions.csv
    (columns file, text, and wav if there is speech); default: the emoji. limit: only so many emoji, with their
    skin-tone variants.
    Errors: UserError, one line that says what to do.
    """
    _check_size(size)
    if limit is not None and limit < 1:
        raise UserError(f"the limit is {limit} emoji; it must be at least 1")
    root = _cache_root() if folder is None else Path(folder)
    own = None if source is None else Path(source)
    name = _cache_name(own, size, limit)
    dataset = _opened(root / name)
    if dataset is not None:
        return dataset
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f".{name}.lock", progress):
            dataset = _opened(root / name)
            if dataset is None:
                material = emoji_material(limit) if own is None else folder_material(own)
                dataset = _made(material, root / name, size, progress)
            return dataset
    except OSError as error:
        raise UserError(_disk_trouble(root, error)) from error


def text_tensor(text: str) -> Tensor:
    """The bytes of a caption as the models read them: (T,) int64, 1 <= T <= MAX_BYTES.

    UTF-8 of the text in lower case with single blanks, cut between characters. Errors: UserError for an empty caption.
    """
    return torch.tensor(list(_encoded(text)), dtype=torch.int64)


def read_image(path: str | os.PathLike[str], size: int) -> Tensor:
    """An image file on white, padded to a square: (3, size, size) float32 in [-1, 1]. Errors: UserError."""
    _check_size(size)
    return torch.from_numpy(_to_float(load_image(Path(path), size)))


def _check_size(size: int) -> None:
    if size != ARTICLE_SIZE and (size < MIN_SIZE or size & (size - 1)):
        raise UserError(f"the image size is {size}; it must be a power of two of at least {MIN_SIZE}, such as 32 or 64")


def _encoded(text: str) -> bytes:
    try:
        data = normalised(text).lower().encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the caption {text!a} is no valid text; type it again") from error
    if not data:
        raise UserError("the caption is empty; type a word")
    return data[:MAX_BYTES].decode(errors="ignore").rstrip().encode()


def _to_float(images: np.ndarray) -> np.ndarray:
    return images * np.float32(1 / 127.5) - np.float32(1)


class _Ragged:
    """Rows of different lengths, one behind the other: values (N, ...) uint8, start (rows + 1,) int64."""

    def __init__(self, folder: Path, name: str) -> None:
        self.values = _mapped(folder / f"{name}.npy").numpy()
        self.start = _mapped(folder / f"{name}_start.npy").numpy()

    def gather(
        self, rows: np.ndarray, multiple: int = 1, wanted: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The rows side by side, (R, longest, ...) with zeros behind their ends, longest >= 1; their lengths (R,).

        Rows that are not `wanted`, (R,) bool, have no length; longest is a multiple of `multiple`.
        """
        first = self.start[rows]
        lengths = self.start[rows + 1] - first
        if wanted is not None:
            lengths *= wanted
        steps = np.arange(multiple * max(1, -(-lengths.max() // multiple)))
        inside = steps < lengths[:, None]
        gathered = self.values[(first[:, None] + steps) * inside]
        gathered[~inside] = 0
        return gathered, lengths


def _quantised(frames: Tensor) -> np.ndarray:
    levels = (frames.numpy() - LOWEST) * (255 / (HIGHEST - LOWEST))
    return levels.round().clip(0, 255).astype(np.uint8)


def _dequantised(levels: np.ndarray) -> np.ndarray:
    return levels * np.float32((HIGHEST - LOWEST) / 255) + np.float32(LOWEST)


def _ragged(parts: Sequence[np.ndarray], empty: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    start = np.cumsum([0, *(len(part) for part in parts)], dtype=np.int64)
    # One row is always there, so that a gather has something to read where nothing has any.
    return np.concatenate([*parts, empty] if start[-1] == 0 else list(parts)), start


def split(captions: Sequence[Caption]) -> tuple[list[int], list[int]]:
    """Indices of the captions to train on and of those held out.

    Captions go together if they are of one family or the models read the same bytes. Such groups are taken in the order
    of a hash until they make up one tenth of the (base picture, bytes) pairs; at least one group where there are two.
    """
    codes = [_encoded(c.text) for c in captions]
    groups = _grouped(captions, codes)
    pairs = {root: len({(captions[i].base, codes[i]) for i in members}) for root, members in groups.items()}
    # The hash of one string each: the least of all its strings' hashes would favour large groups.
    ordered = sorted(groups, key=lambda root: digest(min(codes[i] for i in groups[root])))
    target = round(HELD_OUT * sum(pairs.values()))
    held: set[int] = set()
    for root in ordered:
        if pairs[root] <= target:
            target -= pairs[root]
            held.update(groups[root])
    if not held and len(groups) > 1:
        held.update(groups[min(ordered, key=lambda root: pairs[root])])
    return [i for i in range(len(captions)) if i not in held], sorted(held)


def _grouped(captions: Sequence[Caption], codes: Sequence[bytes]) -> dict[Any, list[int]]:
    parent: dict[Any, Any] = {}

    def root(node: Any) -> Any:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = node = parent[parent[node]]
        return node

    for caption, code in zip(captions, codes, strict=True):
        parent[root(("family", caption.family))] = root(("code", code))
    groups: dict[Any, list[int]] = {}
    for i, code in enumerate(codes):
        groups.setdefault(root(("code", code)), []).append(i)
    return groups


def _cache_root() -> Path:
    if config.DATA:
        return Path(config.DATA)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmfast"


def _cache_name(source: Path | None, size: int, limit: int | None) -> str:
    key = emoji_key(limit) if source is None else folder_key(source)
    return f"{'emoji' if source is None else 'own'}-{size}-{digest(f'format {FORMAT}', key)[:16]}"


def _opened(path: Path) -> Dataset | None:
    """The data set in this folder, or None where there is none that can be used."""
    try:
        dataset = Dataset(path)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    if dataset.speech_missing:
        with contextlib.suppress(SpeechUnavailable):
            require_espeak()
            return None
    return dataset


def _made(material: Material, folder: Path, size: int, progress: bool) -> Dataset:
    partial = folder.with_name(f"{folder.name}.partial")
    # Left by a killed preparation, damaged, or without the speech that is possible now.
    for stale in (partial, folder):
        if stale.exists():
            shutil.rmtree(stale)
    try:
        partial.mkdir()
        with _Progress(material, folder.parent, show=progress) as bar:
            _build(material, partial, size, bar)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Dataset(folder)


@contextlib.contextmanager
def _locked(path: Path, progress: bool) -> Iterator[None]:
    """Only one process prepares; another waits and then finds the work done. A killed one loses the lock."""
    with path.open("w") as handle:
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _console(progress).print("another process is preparing the same data; waiting for it")
                fcntl.flock(handle, fcntl.LOCK_EX)
            except OSError as error:
                # Some network file systems have no locks.
                if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
                    raise
        yield


def _build(material: Material, folder: Path, size: int, bar: _Progress) -> None:
    captions = material.captions
    train, held_out = split(captions)
    frames = _draw_and_listen(material, folder / "images.npy", size, bar)
    silence = np.zeros((0, MELS), np.uint8)
    spoken, spoken_start = _ragged(
        [frames.get(i, silence) for i in range(len(captions))], np.zeros((1, MELS), np.uint8)
    )
    text, text_start = _ragged([np.frombuffer(_encoded(c.text), np.uint8) for c in captions], np.zeros(1, np.uint8))
    arrays = {
        "picture_of": np.array([c.picture for c in captions], np.int64),
        "train": np.array(train, np.int64),
        "held_out": np.array(held_out, np.int64),
        "text": text,
        "text_start": text_start,
        "speech": spoken,
        "speech_start": spoken_start,
    }
    for name, array in arrays.items():
        with _array_file(folder / f"{name}.npy", array.shape, array.dtype) as file:
            file.write(array.data)
    index = {
        "format": FORMAT,
        "size": size,
        "pictures": material.pictures,
        "texts": [c.text for c in captions],
        "languages": [c.language for c in captions],
        "attribution": material.attribution,
        "fingerprint": digest(material.fingerprint, f"format {FORMAT}, size {size}"),
        "speech_missing": material.speech_missing,
    }
    (folder / INDEX).write_text(json.dumps(index, ensure_ascii=False), encoding="utf-8")


def _draw_and_listen(material: Material, images: Path, size: int, bar: _Progress) -> dict[int, np.ndarray]:
    """Writes the pictures; returns the quantised frames of each spoken caption.

    Speaking runs in a thread of its own, always ahead, in one order, because eSpeak's pitch depends on what it said
    before. This thread draws while it waits.
    """
    frames: dict[int, np.ndarray] = {}
    with _array_file(images, (len(material.pictures), 3, size, size), np.dtype(np.uint8)) as file:
        drawing = _draw(material, file, size, bar)
        with ThreadPoolExecutor(1) as pool:
            for future in _ahead(pool, material.recordings()):
                while not future.done() and next(drawing, None):
                    pass
                recordings = future.result()
                if recordings is None:
                    break
                captions, rate, waves = recordings
                for caption, mel in zip(captions, log_mel(waves, rate), strict=True):
                    if mel is not None:
                        frames[caption] = _quantised(mel)
                bar.advance(len(captions))
        for _ in drawing:
            pass
    return frames


def _draw(material: Material, file: Any, size: int, bar: _Progress) -> Iterator[bool]:
    count = len(material.pictures)
    for start in range(0, count, DRAWN_AT_ONCE):
        part = range(start, min(start + DRAWN_AT_ONCE, count))
        file.write(b"".join(material.draw(i, size).tobytes() for i in part))
        bar.advance(len(part))
        yield True


def _ahead(pool: ThreadPoolExecutor, recordings: Iterator[Recordings]) -> Iterator[Future[Recordings | None]]:
    waiting = deque(pool.submit(next, recordings, None) for _ in range(SPOKEN_AHEAD))
    while True:
        yield waiting.popleft()
        waiting.append(pool.submit(next, recordings, None))


@contextlib.contextmanager
def _array_file(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> Iterator[Any]:
    """A .npy file to write the elements to in order. (numpy's own writer hides the reason when the disk is full.)"""
    with path.open("wb") as file:
        description = np.lib.format.dtype_to_descr(dtype)
        np.lib.format.write_array_header_1_0(file, {"descr": description, "fortran_order": False, "shape": shape})
        yield file


def _mapped(path: Path) -> Tensor:
    array = np.load(path, mmap_mode="c")
    # An empty array cannot be mapped; numpy then returns one of another class.
    return torch.from_numpy(np.asarray(array))


def _disk_trouble(root: Path, error: OSError) -> str:
    elsewhere = "or choose another folder with --cache or MMFAST_DATA"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left for the prepared data in {root}; free some (emoji of size 32 take 65 MB) {elsewhere}"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission to write the prepared data to {root}; change that {elsewhere}"
    return f"cannot write the prepared data to {root} ({error.strerror or error}); repair that {elsewhere}"


def _console(show: bool) -> Any:
    from rich.console import Console

    return Console(stderr=True, quiet=not show)


class _Progress:
    """A bar on a terminal, two lines elsewhere, nothing unless `show`."""

    def __init__(self, material: Material, root: Path, *, show: bool) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = _console(show)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        total = len(material.pictures) + material.recorded
        self._task = self._bar.add_task("preparing data", total=total)
        self._what = f"{len(material.pictures)} pictures, {len(material.captions)} captions, {material.recorded} spoken"
        self._root = root

    def __enter__(self) -> _Progress:
        self._started = time.monotonic()
        self._say(f"preparing data in {self._root}, once: {self._what}")
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.stop()
        if kind is None:
            self._say(f"prepared in {time.monotonic() - self._started:.0f} s")

    def advance(self, count: int) -> None:
        """So many more pictures or captions are done."""
        self._bar.advance(self._task, count)

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
