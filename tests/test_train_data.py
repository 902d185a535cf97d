"""The data room: what is prepared, what is held out, what a batch holds, and every way in which input can be bad."""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import wavfile

from mmfast import config
from mmfast.train import UserError, data, sources, speech

LIMIT = 12


@pytest.fixture(scope="module")
def emoji_root(tmp_path_factory):
    return tmp_path_factory.mktemp("emoji")


@pytest.fixture(scope="module")
def emoji(emoji_root):
    return data.prepare(emoji_root, limit=LIMIT, progress=False)


@pytest.fixture(scope="module")
def all_emoji():
    return sources.emoji_material()


@pytest.fixture
def rng(seed):
    return np.random.default_rng(seed)


@pytest.fixture
def chance(seed):
    return random.Random(seed)


def write_table(folder, rows, header=("file", "text", "wav")):
    with (folder / "captions.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def write_speech(path, seed, rate=16000, channels=1, dtype=np.int16, seconds=0.7):
    """A voice-like sound: a gliding tone with overtones, louder in the middle. The same for the same seed."""
    rng = np.random.default_rng(seed)
    time_axis = np.arange(int(seconds * rate)) / rate
    pitch = rng.uniform(90, 250) * (1 + 0.2 * np.sin(2 * np.pi * rng.uniform(1, 3) * time_axis))
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    wave = sum(amplitude * np.sin(k * phase) for k, amplitude in enumerate(rng.uniform(0.2, 1, 12), start=1))
    wave *= np.sin(np.pi * time_axis / seconds) / np.abs(wave).max()
    if dtype == np.uint8:
        samples = (wave * 127 + 128).astype(np.uint8)
    else:
        scale = 1 if np.issubdtype(dtype, np.floating) else np.iinfo(dtype).max
        samples = (wave * scale).astype(dtype)
    if channels > 1:
        samples = np.repeat(samples[:, None], channels, axis=1)
    wavfile.write(path, rate, samples)


@pytest.fixture
def own(tmp_path, rng, seed):
    """A user's folder: 6 images of different kinds, 14 captions, 3 of them spoken."""
    folder = tmp_path / "own"
    folder.mkdir()
    for i, (mode, suffix) in enumerate(
        [("RGB", "png"), ("RGBA", "png"), ("L", "png"), ("P", "gif"), ("RGB", "jpg")] * 2
    ):
        shape = (rng.integers(20, 70), rng.integers(20, 70))
        Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8)).convert(mode).save(folder / f"{i}.{suffix}")
    names = [path.name for path in sorted(folder.iterdir())][:6]
    rows = [[names[i % 6], f"word {i // 2} of {rng.integers(1000)}", ""] for i in range(14)]
    for i in range(3):
        write_speech(folder / f"{i}.wav", seed + i, rate=(8000, 22050, 44100)[i])
        rows[4 * i][2] = f"{i}.wav"
    write_table(folder, rows)
    return folder


def encoded(dataset, index):
    batch = dataset.batch(torch.tensor([index]))
    return bytes(batch.text[0].tolist())


def test_emoji_has_pictures_names_in_14_languages_and_speech_in_12(emoji):
    count = len(emoji.pictures)
    assert emoji.images.shape == (count, 3, 32, 32) and emoji.images.dtype == torch.uint8 and count >= LIMIT
    assert len(set(emoji.languages)) == 14
    assert {emoji.languages[i] for i in emoji.has_speech.nonzero().flatten()} == set(speech.VOICES)
    assert set(emoji.languages) - set(speech.VOICES) == {"ar", "ja"}
    assert len(emoji.texts) == 14 * count and set(emoji.picture_of.tolist()) == set(range(count))
    assert int(emoji.has_speech.sum()) == LIMIT * len(speech.VOICES)


def test_every_emoji_is_drawn_on_white(emoji):
    pictures = emoji.images.float()
    assert (pictures[:, :, 0, 0] > 250).all()
    assert (pictures.flatten(1).std(dim=1) > 10).all()
    assert len(torch.unique(emoji.images.flatten(1), dim=0)) == len(emoji.pictures)


def test_only_emoji_without_a_skin_tone_are_spoken(emoji):
    english = [i for i, language in enumerate(emoji.languages) if language == "en"]
    for i in english:
        assert bool(emoji.has_speech[i]) == ("skin tone" not in emoji.texts[i])
        assert emoji.texts[i] == emoji.pictures[emoji.picture_of[i]]


def test_speech_covers_the_range_and_is_roughly_normalised(emoji):
    batch = emoji.batch(emoji.has_speech.nonzero().flatten())
    inside = torch.arange(batch.speech.shape[1]) < batch.speech_lengths[:, None]
    heard = batch.speech[inside]
    assert abs(heard.mean()) < 0.2 and 0.8 < heard.std() < 1.2
    assert heard.amin(dim=-1).min() == speech.LOWEST and heard.max() == speech.HIGHEST
    assert 10 < batch.speech_lengths.float().mean() < 100


def test_attribution_names_all_licences(emoji):
    lines = "\n".join(emoji.attribution)
    for word in ("OpenMoji", "openmoji.org", "CC BY-SA 4.0", "emoji", "eSpeak NG", "GPL-3"):
        assert word in lines


def test_a_small_emoji_set_is_part_of_the_whole(emoji, all_emoji):
    assert set(emoji.pictures) <= set(all_emoji.pictures)
    assert len(all_emoji.pictures) > 3900 and len(all_emoji.captions) == 14 * len(all_emoji.pictures)
    assert all_emoji.recorded > 20_000


def test_two_fresh_processes_prepare_the_same_bytes(tmp_path):
    script = "import sys; from mmfast.train import data; data.prepare(sys.argv[1], limit=2, progress=False)"
    folders = [tmp_path / "a", tmp_path / "b"]
    processes = [subprocess.Popen([sys.executable, "-c", script, folder], cwd=tmp_path) for folder in folders]
    assert [process.wait() for process in processes] == [0, 0]
    first, second = ({p.name: p.read_bytes() for p in folder.glob("*/*")} for folder in folders)
    assert len(first) == 9 and first == second


def leaks(captions, train, held_out):
    """The reasons why this split would let the training see what is held out."""
    code = [sources.normalised(c.text).lower() for c in captions]
    strings = {code[i] for i in train} & {code[i] for i in held_out}
    families = {captions[i].family for i in train} & {captions[i].family for i in held_out}
    return strings | families


def test_no_held_out_string_and_no_variant_of_it_is_trained_on(all_emoji, chance):
    captions = all_emoji.captions
    train, held_out = data.split(captions)
    assert sorted(train + held_out) == list(range(len(captions)))
    assert not leaks(captions, train, held_out)
    everything = list(range(len(captions)))
    chance.shuffle(everything)
    assert leaks(captions, everything[5000:], everything[:5000])


def test_one_tenth_of_the_pairs_is_held_out(all_emoji):
    captions = all_emoji.captions
    pairs = {(c.base, c.text.lower()) for c in captions}
    _, held_out = data.split(captions)
    held_pairs = {(captions[i].base, captions[i].text.lower()) for i in held_out}
    assert abs(len(held_pairs) / len(pairs) - 0.1) < 0.001
    # Of every language, and of what is spoken, about as much as of everything.
    for language in {c.language for c in captions}:
        of_language = [i for i in held_out if captions[i].language == language]
        assert abs(14 * len(of_language) / len(captions) - 0.1) < 0.05
    untoned = [
        i
        for i, c in enumerate(captions)
        if "skin tone" not in all_emoji.pictures[c.picture] and c.language in speech.VOICES
    ]
    assert abs(len(set(untoned) & set(held_out)) / len(untoned) - 0.1) < 0.02


def test_skin_tones_belong_to_the_emoji_without(all_emoji):
    untoned = {c.base for c in all_emoji.captions if c.language == "en" and c.base == c.text}
    assert {c.base for c in all_emoji.captions} == untoned
    toned = [c for c in all_emoji.captions if c.language == "en" and "skin tone" in c.text and c.base != c.text]
    assert len(toned) == 2040 - 10
    assert all("skin tone" not in c.base for c in toned)


def test_the_split_depends_on_the_captions_only_and_not_on_their_order(all_emoji, chance):
    captions = chance.sample(all_emoji.captions, 3000)
    expected = {captions[i] for i in data.split(captions)[1]}
    assert 250 < len(expected) < 350
    chance.shuffle(captions)
    assert {captions[i] for i in data.split(captions)[1]} == expected


def test_prepared_emoji_hold_out_what_split_says(emoji):
    train, held_out = ({encoded(emoji, int(i)) for i in part} for part in (emoji.train, emoji.held_out))
    assert train and held_out and not train & held_out


@pytest.mark.parametrize("strings", [1, 2, 3, 30], ids=lambda n: f"strings{n}")
def test_a_tiny_folder_holds_out_at_least_one_string(tmp_path, rng, strings):
    Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    write_table(tmp_path, [["a.png", f"string {i % strings}", ""] for i in range(2 * strings)])
    dataset = data.prepare(tmp_path / "cache", source=tmp_path, size=8, progress=False)
    held = {dataset.texts[i] for i in dataset.held_out}
    assert len(held) == {1: 0, 2: 1, 3: 1, 30: 3}[strings]
    assert not held & {dataset.texts[i] for i in dataset.train}
    assert len(dataset.train) + len(dataset.held_out) == 2 * strings


def test_strings_that_differ_in_case_or_blanks_only_go_together(tmp_path, rng):
    Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    rows = [["a.png", text, ""] for i in range(10) for text in (f"Red  heart {i}", f"red heart {i}", f"RED heart {i}")]
    write_table(tmp_path, rows)
    dataset = data.prepare(tmp_path / "cache", source=tmp_path, size=8, progress=False)
    assert len(dataset.held_out) == 3


def test_a_batch_holds_the_captions_asked_for(own, tmp_path):
    dataset = data.prepare(tmp_path / "cache", source=own, size=16, progress=False)
    captions = torch.randperm(len(dataset.texts))[:7]
    batch = dataset.batch(captions)
    assert batch.images.dtype == torch.float32 and batch.text.dtype == torch.int64
    for row, caption in enumerate(captions.tolist()):
        length = int(batch.text_lengths[row])
        assert bytes(batch.text[row, :length].tolist()).decode() == dataset.texts[caption].lower()
        assert (batch.text[row, length:] == 0).all()
        expected = data.read_image(own / dataset.pictures[dataset.picture_of[caption]], 16)
        torch.testing.assert_close(batch.images[row], expected)
        assert bool(batch.speech_lengths[row] > 0) == bool(dataset.has_speech[caption])
        assert (batch.speech[row, int(batch.speech_lengths[row]) :] == 0).all()
    assert batch.text.shape == (7, int(batch.text_lengths.max()))
    moved = batch.to("meta")
    assert moved.images.is_meta and moved.speech.is_meta and not moved.text_lengths.is_meta


def test_speech_of_a_folder_is_what_read_wav_reads(own, tmp_path):
    dataset = data.prepare(tmp_path / "cache", source=own, size=8, progress=False)
    spoken = dataset.has_speech.nonzero().flatten()
    assert len(spoken) == 3
    batch = dataset.batch(spoken)
    for row in range(3):
        frames = data.read_wav(own / f"{row}.wav")
        assert int(batch.speech_lengths[row]) == len(frames)
        step = (speech.HIGHEST - speech.LOWEST) / 255
        torch.testing.assert_close(batch.speech[row, : len(frames)], frames, rtol=0, atol=0.51 * step)


def test_a_batch_without_speech_has_one_empty_frame(own, tmp_path):
    dataset = data.prepare(tmp_path / "cache", source=own, size=8, progress=False)
    silent = (~dataset.has_speech).nonzero().flatten()[:4]
    batch = dataset.batch(silent)
    assert batch.speech.shape == (4, 1, data.MELS) and not batch.speech.any() and not batch.speech_lengths.any()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("red heart", b"red heart"),
        ("  Red \t\n heart ", b"red heart"),
        ("Cafe\u0301", "caf\u00e9".encode()),
        ("\U0001f600" * 30, ("\U0001f600" * 24).encode()),
        ("x" + "\u00e9" * 60, ("x" + "\u00e9" * 47).encode()),
        ("x" * 95 + " y", b"x" * 95),
    ],
    ids=["plain", "blanks", "composed", "cut-4-bytes", "cut-2-bytes", "cut-blank"],
)
def test_text_tensor(text, expected):
    tensor = data.text_tensor(text)
    assert bytes(tensor.tolist()) == expected and tensor.dtype == torch.int64


@pytest.mark.parametrize("text", ["", "  \t\n", "\x00", "\ud800"], ids=["empty", "blanks", "control", "surrogate"])
def test_text_tensor_refuses(text):
    with one_line("caption"):
        data.text_tensor(text)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "1", "P", "I;16", "CMYK"])
def test_read_image_of_any_mode(tmp_path, rng, mode):
    grey = rng.choice(2, (4, 4)) * 255 if mode == "1" else rng.integers(0, 256, (4, 4))
    grey = np.kron(grey, np.ones((8, 8))).astype(np.uint8)
    image = Image.fromarray(grey)
    image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    image.save(path)
    read = data.read_image(path, 32)
    assert read.shape == (3, 32, 32) and read.dtype == torch.float32
    torch.testing.assert_close(read, torch.from_numpy(grey / 127.5 - 1).float().expand(3, 32, 32))


def test_transparent_parts_are_white_and_oblong_images_are_padded_with_white(tmp_path):
    red = Image.new("RGBA", (64, 16), (255, 0, 0, 255))
    red.paste((0, 0, 0, 0), (0, 0, 32, 16))
    red.save(tmp_path / "a.png")
    read = data.read_image(tmp_path / "a.png", 16)
    white, pure_red = torch.ones(3), torch.tensor([1.0, -1.0, -1.0])
    for row, column, expected in ((0, 12, white), (15, 12, white), (8, 2, white), (8, 12, pure_red)):
        torch.testing.assert_close(read[:, row, column], expected)


def test_log_mel_equals_its_definition(rng):
    wave = rng.standard_normal(16000 + 123)
    frames = (len(wave) + 319) // 320
    padded = np.concatenate([wave, np.zeros(1000)]) / np.abs(wave).max()
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    transform = np.exp(-2j * np.pi * np.outer(np.arange(257), np.arange(400)) / 512)
    power = np.stack([np.abs(transform @ (padded[320 * i : 320 * i + 400] * window)) ** 2 for i in range(frames)])
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 42) / 2595) - 1)
    hertz = np.arange(257) * 16000 / 512
    mels = np.log10(1 + np.stack([hertz] * 3) / 700)
    bands = np.zeros((frames, 40))
    for band in range(40):
        low, middle, high = np.log10(1 + edges[band : band + 3] / 700)
        triangle = np.minimum((mels[0] - low) / (middle - low), (high - mels[0]) / (high - middle)).clip(0)
        bands[:, band] = power @ triangle
    decibels = np.maximum(10 * np.log10(bands / bands.max()), -80)
    (read,) = speech.log_mel([wave.astype(np.float32)], 16000)
    np.testing.assert_allclose(read.numpy(), (decibels + 40) / 20, atol=2e-4)


@pytest.mark.parametrize("rate", [16000, 22050, 44100], ids=lambda r: f"rate{r}")
def test_many_recordings_at_once_give_what_each_gives_alone(rng, rate):
    waves = [rng.standard_normal(rng.integers(1, 2 * rate)).astype(np.float32) for _ in range(9)]
    for together, wave in zip(speech.log_mel(waves, rate), waves, strict=True):
        (alone,) = speech.log_mel([wave], rate)
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32, np.float64], ids=lambda d: d.__name__)
@pytest.mark.parametrize("channels", [1, 2, 5], ids=lambda c: f"channels{c}")
@pytest.mark.parametrize("rate", [16000, 8000, 11025, 22050, 44100, 48000], ids=lambda r: f"rate{r}")
def test_wavs_of_any_kind_sound_alike(tmp_path, seed, rate, channels, dtype):
    write_speech(tmp_path / "plain.wav", seed)
    write_speech(tmp_path / "other.wav", seed, rate=rate, channels=channels, dtype=dtype)
    plain, other = data.read_wav(tmp_path / "plain.wav"), data.read_wav(tmp_path / "other.wav")
    assert abs(len(plain) - len(other)) <= 1
    frames = min(len(plain), len(other))
    # Bands below 3 kHz, which every one of these rates carries, where the sound is not near the noise of 8 bits.
    plain, other = plain[2 : frames - 2, :24], other[2 : frames - 2, :24]
    loud = plain > 0.75
    assert loud.sum() > 100
    assert (plain - other)[loud].abs().mean() < 0.1


def test_tags_in_a_wav_do_not_matter(tmp_path, seed):
    write_speech(tmp_path / "plain.wav", seed)
    plain = (tmp_path / "plain.wav").read_bytes()
    tag = b"odd " + (6).to_bytes(4, "little") + b"maker!"
    size = (len(plain) + len(tag) - 8).to_bytes(4, "little")
    (tmp_path / "tagged.wav").write_bytes(plain[:4] + size + plain[8:12] + tag + plain[12:])
    assert torch.equal(data.read_wav(tmp_path / "plain.wav"), data.read_wav(tmp_path / "tagged.wav"))


def test_loudness_and_silence_around_do_not_matter(rng):
    wave = rng.standard_normal(9000).astype(np.float32)
    (plain,) = speech.log_mel([wave], 16000)
    (other,) = speech.log_mel([np.concatenate([np.zeros(777), wave * 3e-3, np.zeros(5000)]).astype(np.float32)], 16000)
    torch.testing.assert_close(plain, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("language", speech.VOICES)
def test_espeak_says_different_things_for_different_words(all_emoji, chance, language):
    names = [c.text for c in chance.sample(all_emoji.captions, 2000) if c.language == language][:6]
    frames = speech.spoken(names, language)
    assert all(f.shape[1] == data.MELS and 5 <= len(f) < 400 for f in frames)
    assert len({len(f) for f in frames}) > 1


def test_speak_is_a_recording_like_any_other():
    rate, (wave,) = speech.say(["two hearts"], "en")
    (expected,) = speech.log_mel([wave], rate)
    spoken = data.speak("two hearts")
    assert abs(len(spoken) - len(expected)) <= 2
    short = min(len(spoken), len(expected))
    assert (spoken[:short] - expected[:short]).abs().mean() < 0.6
    assert (spoken[:short] - spoken[:short].flip(0)).abs().mean() > 0.6


@pytest.mark.parametrize(("text", "language"), [("", "en"), ("heart", "ja"), ("heart", "xx")])
def test_speak_refuses(text, language):
    with one_line("eSpeak"):
        data.speak(text, language)


def contents(root):
    return sorted(path.name for path in root.iterdir() if not path.name.endswith(".lock"))


def test_the_second_time_opens_what_the_first_made(own, tmp_path, monkeypatch):
    root = tmp_path / "cache"
    first = data.prepare(root, source=own, size=16, progress=False)
    monkeypatch.setattr(sources, "load_image", None)
    second = data.prepare(root, source=own, size=16, progress=False)
    assert first.fingerprint == second.fingerprint and torch.equal(first.images, second.images)


def test_two_sizes_and_two_sources_live_side_by_side(own, emoji, emoji_root):
    before = contents(emoji_root)
    small = data.prepare(emoji_root, source=own, size=8, progress=False)
    large = data.prepare(emoji_root, source=own, size=64, progress=False)
    assert len(contents(emoji_root)) == len(before) + 2 and set(before) < set(contents(emoji_root))
    assert small.images.shape[-1] == 8 and large.images.shape[-1] == 64
    assert len({small.fingerprint, large.fingerprint, emoji.fingerprint}) == 3


def test_a_changed_folder_is_prepared_again_and_an_equal_copy_has_the_same_fingerprint(own, tmp_path, rng):
    first = data.prepare(tmp_path / "cache", source=own, size=8, progress=False)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in own.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert data.prepare(tmp_path / "cache", source=copy, size=8, progress=False).fingerprint == first.fingerprint
    Image.fromarray(rng.integers(0, 256, (30, 30, 3), np.uint8)).save(copy / "0.png")
    changed = data.prepare(tmp_path / "cache", source=copy, size=8, progress=False)
    assert changed.fingerprint != first.fingerprint and not torch.equal(changed.images, first.images)


def test_the_cache_folder_comes_from_the_setting_or_the_users_cache(own, tmp_path, monkeypatch):
    monkeypatch.setattr(config, "DATA", str(tmp_path / "set"))
    data.prepare(source=own, size=8, progress=False)
    assert contents(tmp_path / "set")
    monkeypatch.setattr(config, "DATA", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    data.prepare(source=own, size=8, progress=False)
    assert contents(tmp_path / "xdg" / "mmfast") == contents(tmp_path / "set")


@pytest.mark.parametrize("damage", ["cut-array", "cut-index", "other-format", "mixed", "missing"])
def test_a_damaged_cache_is_made_again(own, tmp_path, damage):
    root = tmp_path / "cache"
    first = data.prepare(root, source=own, size=16, progress=False)
    folder = first.folder
    expected = first.images.clone()
    index = folder / "dataset.json"
    if damage == "cut-array":
        os.truncate(folder / "images.npy", 1000)
    elif damage == "cut-index":
        os.truncate(index, 100)
    elif damage == "other-format":
        index.write_text(index.read_text().replace(f'"format": {data.FORMAT}', '"format": 0'))
    elif damage == "mixed":
        np.save(folder / "picture_of.npy", np.arange(5))
    else:
        (folder / "train.npy").unlink()
    again = data.prepare(root, source=own, size=16, progress=False)
    assert torch.equal(again.images, expected) and len(again.texts) == 14
    assert contents(root) == [folder.name]


def test_a_killed_preparation_leaves_no_cache_and_the_next_one_works(own, tmp_path):
    root = tmp_path / "cache"
    script = """
import sys, time
from mmfast.train import data, sources
draw = sources.load_image
def slow(path, side):
    print("drawing", flush=True)
    time.sleep(0.2)
    return draw(path, side)
sources.load_image = slow
data.prepare(sys.argv[1], source=sys.argv[2], size=8, progress=False)
"""
    process = subprocess.Popen([sys.executable, "-c", script, root, own], stdout=subprocess.PIPE, cwd=tmp_path)
    assert process.stdout.readline() == b"drawing\n"
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    (partial,) = contents(root)
    assert partial.endswith(".partial")
    dataset = data.prepare(root, source=own, size=8, progress=False)
    assert contents(root) == [dataset.folder.name] and not partial.startswith("dataset")
    assert len(dataset.images) == 6


def test_an_interrupted_preparation_leaves_nothing(own, tmp_path, monkeypatch):
    def interrupt(path, side):
        raise KeyboardInterrupt

    monkeypatch.setattr(sources, "load_image", interrupt)
    with pytest.raises(KeyboardInterrupt):
        data.prepare(tmp_path / "cache", source=own, size=8, progress=False)
    assert contents(tmp_path / "cache") == []


def test_two_at_once_do_the_work_once(own, tmp_path, monkeypatch, capsys):
    drawn = []
    draw = sources.load_image

    def slow(path, side):
        drawn.append(path)
        time.sleep(0.05)
        return draw(path, side)

    monkeypatch.setattr(sources, "load_image", slow)
    made = []

    def work():
        made.append(data.prepare(tmp_path / "cache", source=own, size=8))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 3 and len(drawn) == 6
    assert capsys.readouterr().err.count("waiting") == 2


def test_progress_is_plain_away_from_a_terminal_and_silent_on_request(own, tmp_path, capsys):
    data.prepare(tmp_path / "cache", source=own, size=8, progress=True)
    shown = capsys.readouterr()
    assert shown.out == "" and "\x1b" not in shown.err
    first, last = shown.err.splitlines()
    assert "6 pictures, 14 captions, 3 spoken" in first and last.startswith("prepared in")
    data.prepare(tmp_path / "cache", source=own, size=16, progress=False)
    assert capsys.readouterr() == ("", "")


class one_line:
    """The block raises a UserError of one line that holds all these words."""

    def __init__(self, *words):
        self.words = words

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        assert kind is UserError, f"{kind} instead of a UserError"
        message = str(error)
        assert "\n" not in message and len(message) < 400
        for word in self.words:
            assert str(word) in message, message
        return True


@pytest.mark.parametrize("size", [0, 4, 12, 33, -32, 100], ids=lambda s: f"size{s}")
def test_refuses_a_size_that_is_no_power_of_two(own, tmp_path, size):
    with one_line(size, "power of two"):
        data.prepare(tmp_path / "cache", source=own, size=size)
    with one_line(size, "power of two"):
        data.read_image(own / "0.png", size)
    assert not (tmp_path / "cache").exists()


def break_missing_folder(own):
    return own / "nowhere", ["no folder", "nowhere"]


def break_file_for_folder(own):
    return own / "0.png", ["no folder", "0.png"]


def break_no_table(own):
    (own / "captions.csv").unlink()
    return own, ["captions.csv", "file,text"]


def break_columns(own):
    write_table(own, [["0.png", "x"]], header=("image", "caption"))
    return own, ["image, caption", "file,text"]


def break_semicolons(own):
    (own / "captions.csv").write_text("file;text\n0.png;a heart\n")
    return own, ["file;text", "file,text"]


def break_no_rows(own):
    write_table(own, [])
    return own, ["no images"]


def break_no_header(own):
    (own / "captions.csv").write_text("")
    return own, ["none", "file,text"]


def break_empty_caption(own):
    write_table(own, [["0.png", "a heart", ""], ["0.png", "  ", ""]])
    return own, ["caption is empty", "line 3"]


def break_short_row(own):
    (own / "captions.csv").write_text("file,text\n0.png\n")
    return own, ["caption is empty", "line 2"]


def break_comma(own):
    (own / "captions.csv").write_text("file,text\n0.png,a heart, red\n")
    return own, ["more cells", "line 2", "quotes"]


def break_no_image_name(own):
    write_table(own, [["", "a heart", ""]])
    return own, ["no image named", "line 2"]


def break_missing_image(own):
    write_table(own, [["0.png", "a heart", ""], ["lost.png", "a star", ""]])
    return own, ["lost.png", "line 3"]


def break_missing_wav(own):
    write_table(own, [["0.png", "a heart", "lost.wav"]])
    return own, ["lost.wav", "line 2"]


def break_encoding(own):
    (own / "captions.csv").write_bytes("file,text\n0.png,caf\u00e9\n".encode("latin-1"))
    return own, ["captions.csv", "UTF-8"]


def break_image(own):
    (own / "0.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    return own, ["0.png", "image"]


def break_cut_image(own):
    os.truncate(own / "0.png", 200)
    return own, ["0.png", "image"]


def break_text_as_image(own):
    (own / "0.png").write_text("hello")
    return own, ["0.png", "image"]


def break_wav(own):
    (own / "0.wav").write_bytes(b"RIFX" + bytes(range(1, 250)))
    return own, ["0.wav", "wav"]


def break_empty_wav(own):
    (own / "0.wav").write_bytes(b"")
    return own, ["0.wav", "wav"]


def break_silent_wav(own):
    wavfile.write(own / "0.wav", 16000, np.zeros(8000, np.int16))
    return own, ["0.wav", "no sound"]


def break_long_wav(own):
    wavfile.write(own / "0.wav", 8000, np.ones(8000 * 21, np.int16))
    return own, ["0.wav", "21 s", "20 s"]


def break_nan_wav(own):
    wavfile.write(own / "0.wav", 16000, np.full(800, np.nan, np.float32))
    return own, ["0.wav", "finite"]


def break_rate(own):
    wavfile.write(own / "0.wav", 100, np.ones(80, np.int16))
    return own, ["0.wav", "100 samples/s"]


BREAKS = {name.removeprefix("break_"): value for name, value in list(globals().items()) if name.startswith("break_")}


@pytest.mark.parametrize("how", BREAKS)
def test_refuses_a_bad_folder_in_one_line_and_leaves_nothing(own, tmp_path, how):
    root = tmp_path / "cache"
    source, words = BREAKS[how](own)
    with one_line(*words):
        data.prepare(root, source=source, size=8, progress=False)
    assert not root.exists() or contents(root) == []


def test_a_table_saved_by_a_spreadsheet_is_read(own, tmp_path):
    (own / "captions.csv").write_bytes(
        b'\xef\xbb\xbffile, text\r\n0.png,"a heart, red"\r\n\r\n  1.png , caf\xc3\xa9 \r\n'
    )
    dataset = data.prepare(tmp_path / "cache", source=own, size=8, progress=False)
    assert dataset.texts == ["a heart, red", "caf\u00e9"] and dataset.pictures == ["0.png", "1.png"]


@pytest.mark.parametrize("what", ["missing", "folder"])
def test_reading_one_file_refuses(tmp_path, what):
    path = tmp_path if what == "folder" else tmp_path / "lost"
    with one_line(path):
        data.read_image(path, 32)
    with one_line(path):
        data.read_wav(path)


def test_a_full_disk(own, tmp_path, monkeypatch):
    array_file = data._array_file
    monkeypatch.setattr(data, "_array_file", lambda path, shape, dtype: array_file(Path("/dev/full"), shape, dtype))
    with one_line("no space left", tmp_path / "cache", "MMFAST_DATA"):
        data.prepare(tmp_path / "cache", source=own, size=8, progress=False)
    assert contents(tmp_path / "cache") == []


def test_no_permission_to_write(own, tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with one_line("no permission", tmp_path / "cache", "MMFAST_DATA"):
        data.prepare(tmp_path / "cache", source=own, size=8, progress=False)


def test_a_file_where_the_cache_folder_should_be(own, tmp_path):
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with one_line(root, "MMFAST_DATA"):
            data.prepare(root, source=own, size=8, progress=False)


@pytest.mark.parametrize("package", ["PIL.Image", "resvg_py", "emoji"])
def test_a_missing_package(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with one_line(package.partition(".")[0], "mmfast[train]"):
        data.prepare(tmp_path / "cache", limit=1, progress=False)
    assert not (tmp_path / "cache").exists() or contents(tmp_path / "cache") == []


def test_without_espeak_there_is_no_speech_until_there_is(tmp_path, monkeypatch):
    import espeakng_loader

    with monkeypatch.context() as patch:
        patch.setattr(speech, "_espeak_loaded", None)
        patch.setattr(espeakng_loader, "get_library_path", lambda: str(tmp_path / "lost.so"))
        without = data.prepare(tmp_path / "cache", limit=1, progress=False)
        assert not without.has_speech.any() and without.batch(without.train[:2]).speech.shape[1] == 1
        assert "left out" in without.attribution[-1] and "lost.so" in without.attribution[-1]
        assert data.prepare(tmp_path / "cache", limit=1, progress=False).fingerprint == without.fingerprint
        with one_line("lost.so", "mmfast[train]"):
            data.speak("red heart")
    again = data.prepare(tmp_path / "cache", limit=1, progress=False)
    assert again.has_speech.any() and again.fingerprint != without.fingerprint


def test_refuses_a_limit_below_one(tmp_path):
    with one_line("limit", "at least 1"):
        data.prepare(tmp_path / "cache", limit=0)
