"""Pictures from a trained run: of a text, a wav, an image, or any of them together (`mmfast sample`)."""

from pathlib import Path

import torch

from mmfast.models import Multimodal, combine
from mmfast.train import UserError, checkpoint, data, drawing
from mmfast.train.loop import check_packages
from mmfast.train.settings import read_config
from mmfast.train.step import build

DRAWN = 8


@torch.no_grad()
def sample(
    run: Path, text: str | None, audio: Path | None, image: Path | None, out: Path, to: str | None = None
) -> None:
    """Draws DRAWN pictures with different noise from the mean code of what is given, and writes them to `out` (PNG).

    `to`: another text; the pictures then lead to it from what is given, in equal steps of the code, with one noise.
    UserError where nothing is given, or something cannot be read.
    """
    if text is None and audio is None and image is None:
        raise UserError(f'nothing to draw: give a text, --audio or --image (mmfast sample {run} "red heart")')
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out} is no PNG: choose a name that ends in .png")
    if not out.absolute().parent.is_dir():
        raise UserError(f"the folder of --out {out} does not exist: make it, or choose another")
    settings, _ = read_config(run)
    check_packages()
    inputs = {
        "text": data.text_tensor(text)[None] if text is not None else None,
        "speech": data.read_wav(audio)[None] if audio is not None else None,
        "image": data.read_image(image, settings.size)[None] if image is not None else None,
    }
    end = data.text_tensor(to)[None] if to is not None else None
    model = build(settings, torch.nn)[0].eval()
    model.load_state_dict(checkpoint.load(run)["training"]["averaged"])
    codes = torch.stack(_codes(model, **inputs), 1)
    condition = combine(codes, torch.ones(codes.shape[:2], dtype=torch.bool))
    noise = torch.randn(DRAWN, settings.noise_size, generator=torch.Generator().manual_seed(settings.seed))
    condition = condition.expand(DRAWN, -1)
    if end is not None:
        way = torch.linspace(0, 1, DRAWN)[:, None]
        condition = torch.lerp(condition, _codes(model, end, None, None)[0].expand(DRAWN, -1), way)
        noise = noise[:1].expand(DRAWN, -1)
    drawn = list(model.generator(noise, condition))
    given = [f'"{text}"'] if text is not None else []
    given += [path.name for path in (audio, image) if path is not None]
    asked = " + ".join(given) + (f' to "{to}"' if to is not None else "")
    headings = ["drawn"] + [""] * (DRAWN - 1)
    if inputs["image"] is not None:
        drawn.insert(0, inputs["image"][0])
        headings.insert(0, "given")
    drawing.draw_sections(out, [drawing.Section(f"from {run.name}", headings, [drawing.Entry(asked, drawn)])])
    print(out)


def _codes(
    model: Multimodal, text: torch.Tensor | None, speech: torch.Tensor | None, image: torch.Tensor | None
) -> list[torch.Tensor]:
    codes = []
    if image is not None:
        codes.append(model.encode_image(image))
    if text is not None:
        codes.append(model.encode_text(text, torch.tensor([text.shape[1]])))
    if speech is not None:
        codes.append(model.encode_speech(speech, torch.tensor([speech.shape[1]])))
    return codes
