"""What a run is made of: written to config.json in its folder, read back by `--resume` and `sample`."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mmfast
from mmfast.train import UserError

ARTICLE_SIZE = 28
FORMAT = 3  # of a run folder; raised when an older one can no longer be read


@dataclass(frozen=True)
class Settings:
    """Everything that the weights depend on, but for the data and the machine; and where and how long to run."""

    size: int = 32
    batch: int = 64
    seed: int = 0
    steps: int | None = None  # stop after so many, in all
    minutes: float | None = None  # stop after so many minutes of training, in all
    data: str | None = None  # the user's own folder of pictures
    cache: str | None = None  # where prepared data is kept
    backend: str | None = None
    device: str = "cpu"
    amp: str | None = None  # bf16 or fp16
    compile: bool = False
    fsdp: bool = False
    preset: str = "default"  # or article
    log: str | None = None  # or tensorboard
    save_every: int = 200
    spoken: int = 16  # at most so many captions of a step are heard, too
    mels: int = 40
    code_size: int = 128
    noise_size: int = 32
    learning_rate: float = 2e-3
    discriminator_rate: float = 4e-4
    warmup: int = 100
    half_life: int = 3000  # steps until the learning rate has fallen to one half
    average: float = 0.995  # decay of the averaged weights that samples are drawn with
    image_weight: float = 1.0
    text_weight: float = 0.2
    speech_weight: float = 0.3
    alignment_weight: float = 0.5
    picture_weight: float = 4.0
    adversarial_weight: float = 0.02

    def check(self) -> "Settings":
        """The same settings, or UserError where a number cannot be."""
        if self.preset == "article":
            if self.size != ARTICLE_SIZE:
                raise UserError(f"--preset article has pictures of side {ARTICLE_SIZE}: leave out --size")
        elif self.size < 8 or self.size & (self.size - 1):
            raise UserError(f"--size {self.size} is no power of two of at least 8: take 8, 16, 32, 64 or 128")
        for name, least in (("batch", 2), ("steps", 1), ("save_every", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} {value} is too small: take at least {least}")
        if self.minutes is not None and not 0 < self.minutes < float("inf"):
            raise UserError(f"--minutes {self.minutes:g} is no time to train for: take a number above 0")
        for name, known in (("amp", ("bf16", "fp16")), ("preset", ("default", "article")), ("log", ("tensorboard",))):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise UserError(f"--{name} {value} is not known: take {' or '.join(known)}")
        self._check_device()
        return self

    def _check_device(self) -> None:
        import torch

        try:
            kind = torch.device(self.device).type
        except RuntimeError:
            kind = ""
        if kind not in ("cpu", "cuda"):
            raise UserError(f"--device {self.device} is not known: take cpu or cuda")
        if kind == "cuda" and not torch.cuda.is_available():
            raise UserError(f"--device {self.device}: PyTorch sees no CUDA device here; take --device cpu")
        if self.fsdp and self.amp == "fp16":
            raise UserError("--fsdp has no gradient scaler for --amp fp16: take --amp bf16")

    def check_shares(self, processes: int) -> None:
        """UserError unless every process gets equally many captions of a step, at least 2."""
        if self.batch % processes or self.batch < 2 * processes:
            raise UserError(
                f"--batch {self.batch} cannot be shared among {processes} processes: take a multiple of {processes}, "
                f"at least {2 * processes}"
            )


def write_config(run: Path, settings: Settings, facts: dict[str, Any]) -> None:
    """config.json: the format, the versions, the settings and `facts` about data and machine."""
    import torch

    from mmfast.train.checkpoint import write_bytes

    config = {
        "format": FORMAT,
        "mmfast": mmfast.__version__,
        "torch": torch.__version__,
        "settings": dataclasses.asdict(settings),
        **facts,
    }
    write_bytes(run / "config.json", (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())


def read_config(run: Path) -> tuple[Settings, dict[str, Any]]:
    """The settings of a run folder, and all of its config.json. UserError where it is none, or of another format."""
    path = run / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        written = config["format"]
    except FileNotFoundError:
        raise UserError(
            f"{run} is no run folder (it has no config.json): name a folder that mmfast train made"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}): name another run or train anew") from None
    if written != FORMAT:
        raise UserError(
            f"{run} was made by mmfast {config.get('mmfast', '?')} in format {written}, and this mmfast "
            f"{mmfast.__version__} reads format {FORMAT}: train anew, or install the mmfast that made it"
        )
    try:
        settings, _, _ = Settings(**config["settings"]), config["threads"], config["data"]
        return settings, config
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): name another run or train anew") from None
