"""The command line: `mmfast train | sample | bench | validate | info`. Parses only; a command is in its own module."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import mmfast
from mmfast.bench.command import add_bench_arguments
from mmfast.train import UserError
from mmfast.validate.command import add_validate_arguments


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaint is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """All commands and options."""
    parser = Parser(prog="mmfast", description="Fast training of multimodal image generators.")
    parser.add_argument("--version", action="version", version=f"mmfast {mmfast.__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    _add_train(commands.add_parser("train", help="train a GAN that draws emoji from typed words and from speech"))
    _add_sample(commands.add_parser("sample", help="draw pictures with a trained run"))
    _add_bench(commands.add_parser("bench", help="measure what mmfast gains on this machine"))
    _add_validate(commands.add_parser("validate", help="hold every kernel here against float64 and against PyTorch"))
    _add_info(commands.add_parser("info", help="say what this installation has and can run"))
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.description = "Train image, text and speech encoders and decoders together with a GAN, and report on it."
    add = parser.add_argument
    add(
        "--minutes",
        type=float,
        metavar="M",
        help="train for M minutes after preparation (8, where --steps is not given)",
    )
    add("--steps", type=int, metavar="N", help="train for N steps")
    add("--out", type=Path, metavar="DIR", help="the run's folder, new or empty (runs/DATE-TIME)")
    add(
        "--data",
        type=Path,
        metavar="DIR",
        help="your own pictures: a folder with captions.csv (file, text, optional wav)",
    )
    add("--cache", type=Path, metavar="DIR", help="where prepared data is kept (your cache folder, or MMFAST_DATA)")
    add("--size", type=int, metavar="S", help="side of the pictures, a power of two (32)")
    add("--batch", type=int, metavar="B", help="captions in a step (64)")
    add("--seed", type=int, metavar="K", help="of weights, order and noise (0)")
    add("--backend", metavar="NAME", help="torch, cpu, triton or cuda (chosen for each case)")
    add("--device", metavar="NAME", help="cpu or cuda (cpu)")
    add("--amp", metavar="TYPE", help="train in half precision: bf16, or fp16 with a gradient scaler")
    add("--compile", action="store_const", const=True, help="let torch.compile compile the chains of layers")
    add("--fsdp", action="store_const", const=True, help="under torchrun: share the weights among the processes, too")
    add("--preset", metavar="NAME", help="default, or article: the source article's own modules, pictures 28 x 28")
    add("--log", metavar="NAME", help="tensorboard: the losses for TensorBoard, too")
    add("--save-every", type=int, metavar="N", help="steps between checkpoints (200)")
    add("--resume", type=Path, metavar="RUN", help="go on with a run; --steps and --minutes count from its start")
    parser.set_defaults(run=_train)


def _add_sample(parser: argparse.ArgumentParser) -> None:
    parser.description = "Draw pictures from a text, a spoken word, an image, or any of them together."
    add = parser.add_argument
    add("folder", type=Path, metavar="RUN", help="a folder that mmfast train made")
    add("text", nargs="?", help='what to draw: "red heart"')
    add("--to", metavar="TEXT", help="draw the way from what is given to another text")
    add("--audio", type=Path, metavar="F.wav", help="a spoken caption")
    add("--image", type=Path, metavar="F.png", help="a picture to draw again")
    add(
        "--out", type=Path, metavar="F.png", default=Path("sample.png"), help="where to write the pictures (sample.png)"
    )
    parser.set_defaults(run=_sample)


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.description = "Say what this installation has and can run."
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=_info)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    add_bench_arguments(parser)
    parser.set_defaults(run=_bench)


def _add_validate(parser: argparse.ArgumentParser) -> None:
    add_validate_arguments(parser)
    parser.set_defaults(run=_validate)


def _train(args: argparse.Namespace) -> None:
    given = {
        name: value
        for name in (
            *("minutes", "steps", "data", "cache", "size", "batch", "seed", "backend", "save_every"),
            *("device", "amp", "compile", "fsdp", "preset", "log"),
        )
        if (value := getattr(args, name)) is not None
    }
    if args.resume is not None:
        _resume(args, given)
        return
    from mmfast.train import loop
    from mmfast.train.settings import ARTICLE_SIZE, Settings

    for name in ("data", "cache"):
        if name in given:
            given[name] = str(given[name].absolute())
    if given.get("preset") == "article":
        given.setdefault("size", ARTICLE_SIZE)
    if "steps" not in given:
        given.setdefault("minutes", 8.0)
    loop.start(Settings(**given), args.out)


def _resume(args: argparse.Namespace, given: dict[str, object]) -> None:
    fixed = [name for name in given if name not in ("minutes", "steps", "backend")] + (["out"] if args.out else [])
    if fixed:
        option = f"--{fixed[0].replace('_', '-')}"
        raise UserError(f"a resumed run keeps its own settings: drop {option}, or train a new run with it")
    from mmfast.train import loop

    loop.resume(args.resume, steps=args.steps, minutes=args.minutes, backend=args.backend)


def _sample(args: argparse.Namespace) -> None:
    from mmfast.train.sample import sample

    sample(args.folder, args.text, args.audio, args.image, args.out, args.to)


def _bench(args: argparse.Namespace) -> int:
    from mmfast.bench.command import run

    return run(args)


def _validate(args: argparse.Namespace) -> int:
    from mmfast.validate.command import run

    return run(args)


def _info(args: argparse.Namespace) -> int:
    from mmfast import info

    return info.main(args.json)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line (without the program's name; default: this process's own). Returns the exit code."""
    args = build_parser().parse_args(argv)
    try:
        code = args.run(args) or 0
    except UserError as error:
        print(f"mmfast: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("mmfast: interrupted", file=sys.stderr)
        code = 130
    except SystemExit as ended:
        code = ended.code
    if processes := sys.modules.get("mmfast.train.processes"):
        processes.leave(code)
    return code
