"""Speech as the models hear it: log-mel frames, read from wav files or spoken by eSpeak NG.

A frame is 25 ms of sound, every 20 ms, as 40 mel bands between 0 and 8 kHz, in decibels below the loudest band of the
whole recording, floored at -80 dB and shifted and scaled to roughly zero mean and unit variance. Loudness therefore
does not matter, and every value lies in [LOWEST, HIGHEST].

Mel scale: S. S. Stevens, J. Volkmann, E. B. Newman, 1937, in the form 2595 log10(1 + f / 700).
"""

from __future__ import annotations

import ctypes
import importlib
import math
import os
import threading
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmfast.train import UserError

SAMPLE_RATE = 16000
MELS = 40
WINDOW = 400
HOP = 320
FFT = 512
FLOOR_DB = -80.0
MEAN_DB = -40.0
SCALE_DB = 20.0
LOWEST = (FLOOR_DB - MEAN_DB) / SCALE_DB
HIGHEST = -MEAN_DB / SCALE_DB
MAX_SECONDS = 20.0

# Sound this far below the peak of a recording counts as silence at its two ends.
SILENCE = 10 ** (-50 / 20)

# eSpeak's voice for each language that it pronounces. Two languages of the emoji names are missing on purpose.
# Japanese: eSpeak has no readings for kanji and says "Chinese letter" for each, in 70 % of the names. Arabic: the names
# are written without short vowels, and eSpeak knows too few of them, so that 7 % of the words are bare consonants.
VOICES = {
    "en": "en-us",
    "es": "es",
    "ko": "ko",
    "pt": "pt-br",
    "it": "it",
    "fr": "fr",
    "de": "de",
    "fa": "fa",
    "id": "id",
    "zh": "cmn",
    "ru": "ru",
    "tr": "tr",
}


class SpeechUnavailable(Exception):
    """eSpeak NG cannot be loaded; the message says why."""


def speak(text: str, language: str = "en") -> Tensor:
    """The log-mel frames of `text` as eSpeak NG pronounces it.

    Shape: (F, MELS) float32. Errors: UserError where eSpeak cannot be loaded, does not pronounce the language, or the
    text has nothing to say.
    """
    try:
        (frames,) = spoken([text], language)
    except SpeechUnavailable as error:
        raise UserError(f'eSpeak NG cannot be loaded ({error}); pip install "mmfast[train]"') from error
    if frames is None:
        raise UserError(f"eSpeak NG has nothing to say for {text!r}; give it words")
    return frames


def spoken(texts: Sequence[str], language: str) -> list[Tensor | None]:
    """The log-mel frames of each text, (F_i, MELS) float32, or None for one that makes no sound.

    Errors: SpeechUnavailable; UserError for a language without a voice.
    """
    if language not in VOICES:
        raise UserError(f"eSpeak NG does not pronounce {language!r} well enough; languages: {', '.join(VOICES)}")
    rate, waves = say(texts, language)
    return log_mel(waves, rate)


def say(texts: Sequence[str], language: str) -> tuple[int, list[np.ndarray]]:
    """eSpeak's samples per second and its samples of each text, (N_i,) float32, a language of VOICES.

    As people do, it varies its pitch a little from one utterance to the next; a fresh process repeats itself exactly.
    Errors: SpeechUnavailable.
    """
    return _espeak().say(texts, VOICES[language])


def read_wav(path: str | os.PathLike[str]) -> Tensor:
    """The log-mel frames of a wav file: (F, MELS) float32. Any rate is resampled to 16 kHz, channels are averaged.

    Errors: UserError for a file that is no wav, is silent, or lasts longer than 20 s.
    """
    rate, wave = wav_samples(path)
    (frames,) = log_mel([wave], rate)
    if frames is None:
        raise UserError(f"{path} holds no sound; give a wav with speech")
    return frames


def require_espeak() -> None:
    """Makes sure that eSpeak NG is loaded and has every voice. Errors: SpeechUnavailable."""
    for voice in VOICES.values():
        _espeak().say([], voice)


def log_mel(waves: Sequence[np.ndarray], rate: int) -> list[Tensor | None]:
    """The log-mel frames of each mono recording of `rate` samples per second, without the silence at its ends.

    waves: (N_i,) float32 each, of any loudness. Returns (F_i, MELS) float32 each, or None for one without sound.
    """
    per_frame = rate * HOP / SAMPLE_RATE
    if len(waves) > 1 and not per_frame.is_integer():
        return [frames for wave in waves for frames in log_mel([wave], rate)]
    # All are laid one after the other, each starting at a whole frame with two silent frames behind it, so that one
    # resampling and one Fourier transform serve all and give each what it would get alone.
    waves = [_trimmed(wave) for wave in waves]
    lengths = [math.ceil(len(wave) / per_frame) for wave in waves]
    starts = np.cumsum([0, *(length + 2 for length in lengths)])
    line = np.zeros(math.ceil(starts[-1] * per_frame), np.float32)
    for wave, start in zip(waves, starts[:-1], strict=True):
        at = int(start * per_frame)
        line[at : at + len(wave)] = wave
    power = _mel_power(_resampled(line, rate))
    return [_normalised(power[at : at + n]) for at, n in zip(starts.tolist(), lengths, strict=False)]


def _resampled(wave: np.ndarray, rate: int) -> np.ndarray:
    if rate == SAMPLE_RATE:
        return wave
    from scipy.signal import resample_poly

    common = math.gcd(SAMPLE_RATE, rate)
    return resample_poly(wave, SAMPLE_RATE // common, rate // common).astype(np.float32)


def _mel_power(wave: np.ndarray) -> np.ndarray:
    from scipy.fft import rfft

    # Nothing here enters a team of threads (as torch and BLAS would for each small step): eSpeak speaks meanwhile.
    frames = np.lib.stride_tricks.sliding_window_view(wave, WINDOW)[::HOP]
    spectrum = rfft(frames * _window(), FFT)
    return _mel_filters().dot((spectrum.real**2 + spectrum.imag**2).T).T


@lru_cache(maxsize=1)
def _window() -> np.ndarray:
    """Hann's, periodic."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)).astype(np.float32)


@lru_cache(maxsize=1)
def _mel_filters() -> Any:
    """(MELS, FFT / 2 + 1), sparse: a band overlaps its two neighbours only."""
    from scipy.sparse import csr_array

    def mel(hertz: np.ndarray) -> np.ndarray:
        return 2595 * np.log10(1 + hertz / 700)

    bins = mel(np.linspace(0, SAMPLE_RATE / 2, FFT // 2 + 1))[:, None]
    edges = np.linspace(0, mel(np.array(SAMPLE_RATE / 2)), MELS + 2)
    rise = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return csr_array(np.minimum(rise, fall).clip(0).T.astype(np.float32))


def _normalised(power: np.ndarray) -> Tensor | None:
    loudest = power.max(initial=0)
    if not loudest > 0:
        return None
    decibels = 10 * np.log10((power / loudest).clip(10 ** (FLOOR_DB / 10)))
    return torch.from_numpy(((decibels - MEAN_DB) / SCALE_DB).astype(np.float32))


def _trimmed(wave: np.ndarray) -> np.ndarray:
    """Without the silence at both ends, scaled to a peak of one."""
    if not len(wave):
        return wave
    level = np.abs(wave)
    peak = level.max()
    if not peak > 0:
        return wave[:0]
    loud = np.flatnonzero(level >= SILENCE * peak)
    return wave[loud[0] : loud[-1] + 1] / peak


def wav_samples(path: str | os.PathLike[str]) -> tuple[int, np.ndarray]:
    """The samples per second of a wav file and its samples, (N,) float32, channels averaged.

    Errors: UserError for a file that is no wav or lasts longer than MAX_SECONDS.
    """
    try:
        from scipy.io import wavfile
    except ImportError as error:
        raise UserError('reading a wav needs scipy; pip install "mmfast[train]"') from error
    try:
        with warnings.catch_warnings():
            # Tags that players write into a wav are of no interest here.
            warnings.simplefilter("ignore")
            rate, samples = wavfile.read(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:
        raise UserError(f"{path} is no readable wav file ({error})") from error
    if not 4000 <= rate <= 400_000:
        raise UserError(f"{path} has {rate} samples/s; wav files of 4000 to 400000 samples/s can be read")
    samples = samples.astype(np.float32) - (128 if samples.dtype == np.uint8 else 0)
    if samples.ndim == 2:
        samples = samples.mean(axis=1)
    if len(samples) > MAX_SECONDS * rate:
        raise UserError(f"{path} lasts {len(samples) / rate:.0f} s; speech of at most {MAX_SECONDS:.0f} s can be read")
    if not np.isfinite(samples).all():
        raise UserError(f"{path} holds samples that are not finite numbers; write it again")
    return rate, samples


class _Espeak:
    """eSpeak NG through its C interface (espeak-ng/speak_lib.h), returning samples instead of playing them."""

    SYNCHRONOUS = 2
    BUFFER_MS = 2000
    DONT_EXIT = 0x8000
    CHARACTER_POSITION = 1
    UTF8 = 1

    def __init__(self) -> None:
        try:
            package = importlib.import_module("espeakng_loader")
            library = ctypes.CDLL(package.get_library_path())
            data = os.fsencode(package.get_data_path())
        except (ImportError, OSError, RuntimeError) as error:
            raise SpeechUnavailable(" ".join(str(error).split())) from error
        callback_type = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
        library.espeak_Initialize.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
        library.espeak_SetSynthCallback.argtypes = [callback_type]
        library.espeak_SetSynthCallback.restype = None
        library.espeak_SetVoiceByName.argtypes = [ctypes.c_char_p]
        library.espeak_Synth.argtypes = [
            ctypes.c_char_p,
            ctypes.c_size_t,
            ctypes.c_uint,
            ctypes.c_int,
            ctypes.c_uint,
            ctypes.c_uint,
            ctypes.c_void_p,
            ctypes.c_void_p,
        ]
        self.rate = library.espeak_Initialize(self.SYNCHRONOUS, self.BUFFER_MS, data, self.DONT_EXIT)
        if self.rate <= 0:
            raise SpeechUnavailable(f"eSpeak NG finds no voices in {os.fsdecode(data)}")
        self._library = library
        self._lock = threading.Lock()
        self._chunks: list[bytes] = []
        # Kept here, because the library keeps only the pointer.
        self._callback = callback_type(self._collect)
        library.espeak_SetSynthCallback(self._callback)

    def _collect(self, samples: int | None, count: int, events: int | None) -> int:
        if samples and count > 0:
            self._chunks.append(ctypes.string_at(samples, 2 * count))
        return 0

    def say(self, texts: Sequence[str], voice: str) -> tuple[int, list[np.ndarray]]:
        """The sample rate and the mono samples of each text, float32. Safe to call from several threads."""
        with self._lock:
            if self._library.espeak_SetVoiceByName(voice.encode()):
                raise SpeechUnavailable(f"eSpeak NG has no voice {voice!r}")
            return self.rate, [self._say(text) for text in texts]

    def _say(self, text: str) -> np.ndarray:
        self._chunks.clear()
        data = text.encode()
        self._library.espeak_Synth(data, len(data) + 1, 0, self.CHARACTER_POSITION, 0, self.UTF8, None, None)
        return np.frombuffer(b"".join(self._chunks), np.int16).astype(np.float32)


_espeak_lock = threading.Lock()
_espeak_loaded: _Espeak | None = None


def _espeak() -> _Espeak:
    # eSpeak's state is one per process, so there is one object, and a failure is tried again at the next call.
    global _espeak_loaded
    with _espeak_lock:
        if _espeak_loaded is None:
            _espeak_loaded = _Espeak()
        return _espeak_loaded
