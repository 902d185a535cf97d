"""The command line: what a user types, what is written, and one line with exit code 2 for what cannot be done."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import wavfile

import mmfast
from mmfast import cli
from mmfast.train import checkpoint, drawing
from mmfast.train.evaluate import Speed
from mmfast.train.settings import FORMAT

SMALL = ["--size", "8", "--batch", "4"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, cache):
    """Every command runs in an empty folder, and prepares data in one that the tests share."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(mmfast.config, "DATA", str(cache))


@pytest.fixture(scope="module")
def finished(own_pictures, tmp_path_factory, cache):
    """A run of 6 steps and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    command = [*SMALL, "--data", str(own_pictures), "--cache", str(cache), "--out", str(folder), "--steps", "6"]
    done = subprocess.run(
        [sys.executable, "-m", "mmfast", "train", *command, "--save-every", "3"],
        cwd=folder.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return folder, done.stdout


def run(*argv):
    """The exit code of a command line, also where argparse exits by itself."""
    try:
        return cli.main([str(arg) for arg in argv])
    except SystemExit as exit:
        return exit.code


def refused(capsys, *argv):
    """The one line that a refused command line prints; it exits with 2 and leaves nothing in the current folder."""
    before = sorted(Path().rglob("*"))
    assert run(*argv) == 2
    printed = capsys.readouterr()
    # Preparation announces itself before it may find something wrong.
    lines = [line for line in printed.err.splitlines() if not line.startswith("prepar")]
    assert len(lines) == 1, printed.err
    assert lines[0].startswith("mmfast")
    assert sorted(Path().rglob("*")) == before
    return lines[0]


# ---- train


def test_train_writes_a_whole_run_and_says_what_it_learned(finished):
    folder, printed = finished
    files = {"config.json", "metrics.csv", "curves.png", "samples.png", "speed.png", "checkpoint.pt"}
    assert {path.name for path in folder.iterdir()} == files
    assert len((folder / "metrics.csv").read_text().splitlines()) == 7
    config = json.loads((folder / "config.json").read_text())
    assert config["format"] == FORMAT
    assert config["settings"]["batch"] == 4
    assert config["data"]["captions"] == 24
    for name in ("samples.png", "curves.png"):
        with Image.open(folder / name) as image:
            assert len(image.convert("RGB").getcolors(1_000_000)) > 100
        assert str(folder / name) in printed
    for said in ("image, decoded", "text, from", "speech, from", "drawn from text", "drawn from speech", "images/s"):
        assert said in printed
    # Every step starts from equal weights: rounding alone.
    assert float(re.search(r"over 20 steps: (\S+)", printed)[1]) < 1e-3
    for row in ("its image", "its text", "its speech", "all together", r"another picture's text \(control\)", "chance"):
        assert re.search(rf"│ {row} +│ \d\.\d{{3}} │", printed), row
    assert "random ones; new names of known pictures" in " ".join(printed.split())
    for part in ("encoders", "decoders", "generator", "discriminator", "loss", "whole step"):
        assert re.search(rf"│ {part} +│ \d+\.\d +│ \d+\.\d +│ \d+\.\d\d +│", printed), part
    assert not [path for path in Path().rglob("*") if path.suffix == ".tmp"]


@pytest.mark.parametrize(
    "options",
    [
        ("--preset", "article", "--batch", "4"),
        ("--preset", "article", "--batch", "4", "--amp", "bf16"),
        (*SMALL, "--amp", "fp16"),
        (*SMALL, "--amp", "bf16"),
        (*SMALL, "--compile"),
        (*SMALL, "--compile", "--amp", "bf16"),
    ],
    ids=["article", "article-bf16", "fp16", "bf16", "compiled", "compiled-bf16"],
)
# torch's own, raised inside its tracer
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_other_ways_to_train(options, own_pictures, monkeypatch):
    """Half precision, compiled, the article's own modules: they train and save."""
    monkeypatch.setattr("mmfast.train.evaluate.report", lambda *args: None)
    if "--compile" in options and "--amp" in options:
        # Inductor's code is the other's; here it is what Dynamo makes of the mixture.
        compile = functools.partialmethod(torch.nn.Module.compile, backend="eager")
        monkeypatch.setattr(torch.nn.Module, "compile", compile)
    assert run("train", *options, "--data", own_pictures, "--steps", "3", "--out", "run") == 0
    assert checkpoint.load(Path("run"))["training"]["step"] == 3
    rows = Path("run/metrics.csv").read_text().splitlines()
    assert len(rows) == 4 and "nan" not in rows[-1]


def test_one_picture_is_enough(tmp_path, capsys, monkeypatch):
    """Of which a report can say little: R@1 among one picture is chance."""
    monkeypatch.setattr("mmfast.train.evaluate.compare_speed", lambda *args: Speed(1, 1, 0, 20))
    monkeypatch.setattr("mmfast.train.evaluate.compare_parts", lambda *args: {})
    mine = tmp_path / "mine"
    mine.mkdir()
    Image.new("RGB", (16, 16), (200, 30, 30)).save(mine / "a.png")
    (mine / "captions.csv").write_text("file,text\n" + "".join(f"a.png,{name}\n" for name in ("a", "b", "c", "d")))
    assert run("train", *SMALL, "--data", mine, "--steps", "2", "--out", "run") == 0
    printed = capsys.readouterr().out
    assert re.search(r"│ chance +│ 1\.000 │", printed)
    assert "draw your own" in printed


def test_a_run_is_resumed_to_a_larger_limit(finished, tmp_path, capsys):
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    assert run("train", "--resume", folder, "--steps", "8") == 0
    assert "from step 6 to 8 steps" in capsys.readouterr().out
    assert checkpoint.load(folder)["training"]["step"] == 8
    config = json.loads((folder / "config.json").read_text())
    assert config["settings"]["steps"] == 8
    assert config["data"]["captions"] == 24
    assert config["threads"] == torch.get_num_threads()
    first = (finished[0] / "metrics.csv").read_text()
    assert (folder / "metrics.csv").read_text().startswith(first)


def test_a_finished_run_reports_again(finished, tmp_path, capsys):
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    (folder / "samples.png").unlink()
    assert run("train", "--resume", folder) == 0
    printed = capsys.readouterr().out
    assert "copy has done what it was asked for; --steps or --minutes" in printed
    assert "drawn from text" in printed
    assert (folder / "samples.png").read_bytes() == (finished[0] / "samples.png").read_bytes()
    assert (folder / "metrics.csv").read_bytes() == (finished[0] / "metrics.csv").read_bytes()


def test_the_default_folder_is_new_in_runs(own_pictures, monkeypatch):
    monkeypatch.setattr("mmfast.train.loop.carry_out", lambda run: run.save())
    assert run("train", *SMALL, "--data", own_pictures, "--steps", "1") == 0
    assert run("train", *SMALL, "--data", own_pictures, "--steps", "1") == 0
    folders = sorted(Path("runs").iterdir())
    assert len(folders) == 2
    for folder in folders:
        assert re.fullmatch(r"\d{4}-\d\d-\d\d-\d{6}(-2)?", folder.name)
        assert (folder / "config.json").exists()


def test_without_a_limit_it_is_eight_minutes(own_pictures, monkeypatch):
    asked = []
    monkeypatch.setattr("mmfast.train.loop.carry_out", lambda run: asked.append(run.settings))
    assert run("train", *SMALL, "--data", own_pictures) == 0
    assert run("train", *SMALL, "--data", own_pictures, "--steps", "5") == 0
    assert [(s.minutes, s.steps) for s in asked] == [(8.0, None), (None, 5)]


def test_a_backend_is_used_and_kept(own_pictures, monkeypatch):
    seen = []
    monkeypatch.setattr("mmfast.train.loop.carry_out", lambda run: seen.append(mmfast.dispatch.FORCED[0]) or run.save())
    assert run("train", *SMALL, "--data", own_pictures, "--steps", "1", "--backend", "torch", "--out", "a") == 0
    assert run("train", "--resume", "a", "--steps", "2") == 0
    assert seen == ["torch", "torch"]
    assert mmfast.dispatch.FORCED[0] is None


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--colour", "red"], "unrecognized arguments: --colour red"),
        (["--steps", "many"], "invalid int value: 'many'"),
        (["--steps", "0"], "--steps 0 is too small: take at least 1"),
        (["--batch", "0"], "--batch 0 is too small"),
        (["--seed", "-1"], "--seed -1 is too small"),
        (["--save-every", "0"], "--save-every 0 is too small"),
        (["--minutes", "0"], "--minutes 0 is no time"),
        (["--minutes", "nan"], "--minutes nan is no time"),
        (["--size", "24"], "--size 24 is no power of two"),
        (["--size", "4"], "--size 4 is no power of two of at least 8"),
        (["--data", "nowhere"], "there is no folder"),
        (["--backend", "abacus"], "--backend abacus cannot train here: unknown backend 'abacus'"),
        (["--backend", "triton"], "--backend triton cannot train here: backend 'triton' was asked for"),
        (["--device", "cuda"], "--device cuda: PyTorch sees no CUDA device here; take --device cpu"),
        (["--device", "tpu"], "--device tpu is not known: take cpu or cuda"),
        (["--fsdp"], "--fsdp shares the weights among processes: start it with torchrun"),
        (["--fsdp", "--amp", "fp16"], "--fsdp has no gradient scaler for --amp fp16: take --amp bf16"),
        (["--amp", "int8"], "--amp int8 is not known: take bf16 or fp16"),
        (["--preset", "large"], "--preset large is not known: take default or article"),
        (["--preset", "article", "--size", "32"], "--preset article has pictures of side 28: leave out --size"),
        (["--log", "wandb"], "--log wandb is not known: take tensorboard"),
        (["--resume", "nowhere"], "nowhere is no run folder"),
        (["--out", "/proc/run"], "cannot be written|no permission to write"),
        (["--out", "/dev/null"], "cannot be written"),
    ],
    ids=lambda value: "-".join(value).strip("-").replace("/", "_") if isinstance(value, list) else None,
)
def test_train_refuses_in_one_line(capsys, monkeypatch, argv, says):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert re.search(says, refused(capsys, "train", *argv))


def test_train_leaves_a_full_folder_alone(capsys):
    Path("mine").mkdir()
    Path("mine/letter.txt").write_text("dear")
    assert "mine is not empty: name a new folder with --out" in refused(capsys, "train", "--out", "mine")


def test_train_leaves_no_folder_where_the_data_is_bad(capsys, tmp_path_factory):
    data = tmp_path_factory.mktemp("bad")
    assert "there is no captions.csv" in refused(capsys, "train", "--data", data)
    (data / "captions.csv").write_text("file,text\na.png,a cat\n")
    (data / "a.png").write_bytes(b"no picture")
    assert "as an image" in refused(capsys, "train", "--data", data, "--out", "deep/folder")
    (data / "captions.csv").write_text("file,text\na.png, \n")
    assert "the caption is empty" in refused(capsys, "train", "--data", data)


def test_missing_packages_are_named(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert 'pip install "mmfast[train]"' in refused(capsys, "train")


@pytest.mark.parametrize(
    "option", [["--size", "16"], ["--batch", "8"], ["--seed", "1"], ["--out", "x"], ["--data", "."]]
)
def test_a_resumed_run_keeps_its_settings(capsys, finished, option):
    assert f"drop {option[0]}" in refused(capsys, "train", "--resume", finished[0], *option)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"format": 99, "mmfast": "9.0"}', "was made by mmfast 9.0 in format 99"),
        ("{", "cannot be read"),
        ('{"settings": {}}', "cannot be read"),
        (json.dumps({"format": FORMAT, "settings": {"wings": 2}}), "is damaged"),
    ],
    ids=["another-version", "cut-off", "no-format", "unknown-setting"],
)
def test_a_run_folder_that_cannot_be_read(capsys, content, says):
    Path("run").mkdir()
    Path("run/config.json").write_text(content)
    for command in (["train", "--resume", "run"], ["sample", "run", "red heart"]):
        assert says in refused(capsys, *command)


def test_a_run_without_a_checkpoint(capsys, finished):
    Path("run").mkdir()
    shutil.copy(finished[0] / "config.json", "run")
    for command in (["train", "--resume", "run", "--steps", "9"], ["sample", "run", "red heart"]):
        assert "run has no checkpoint yet" in refused(capsys, *command)


def test_a_full_disk_is_one_line(capsys, own_pictures, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mmfast.train.checkpoint.os.fsync", full)
    assert "the disk is full" in refused(
        capsys, "train", *SMALL, "--data", own_pictures, "--steps", "1", "--out", "full"
    )


def test_a_run_that_diverges_is_one_line(capsys, own_pictures, monkeypatch):
    from mmfast.train.step import Step

    step = Step.__call__
    monkeypatch.setattr(Step, "__call__", lambda self, *args: step(self, *args) * float("nan"))
    assert run("train", *SMALL, "--data", own_pictures, "--steps", "2", "--out", "bad") == 2
    line = capsys.readouterr().err
    assert len(line.splitlines()) == 1
    assert "training diverged" in line
    assert "step 0 is kept" in line


# ---- sample


@pytest.fixture
def inputs(tmp_path):
    """A text, a wav (stereo, of another rate) and an image (of another size)."""
    wave = (3000 * np.sin(np.arange(22050) * 0.05)).astype(np.int16)
    wavfile.write(tmp_path / "said.wav", 44100, np.stack([wave, wave // 2], 1))
    Image.new("RGBA", (20, 30), (200, 30, 30, 128)).save(tmp_path / "seen.png")
    return {"text": ["red heart"], "audio": ["--audio", "said.wav"], "image": ["--image", "seen.png"]}


@pytest.mark.parametrize(
    "given", ["text", "audio", "image", "text-audio", "text-image", "audio-image", "text-audio-image"]
)
def test_sample_draws_from_any_subset(finished, inputs, given):
    argv = [arg for name in given.split("-") for arg in inputs[name]]
    assert run("sample", finished[0], *argv, "--out", f"{given}.png") == 0
    with Image.open(f"{given}.png") as image:
        assert image.width > 8 * 96
        assert len(image.convert("RGB").getcolors(1_000_000)) > 50
    assert sorted(path.name for path in Path().iterdir()) == sorted([f"{given}.png", "said.wav", "seen.png"])


def test_samples_depend_on_what_is_asked_for_and_repeat(finished, capsys):
    pictures = {}
    for name, text in (("a", "red heart"), ("b", "red heart"), ("c", "blue star")):
        assert run("sample", finished[0], text, "--out", f"{name}.png") == 0
        with Image.open(f"{name}.png") as image:
            # Without the words at the left, which are other ones too.
            pictures[name] = image.convert("RGB").crop((220, 0, *image.size)).tobytes()
    assert pictures["a"] == pictures["b"]
    assert pictures["a"] != pictures["c"]
    assert capsys.readouterr().out.split() == ["a.png", "b.png", "c.png"]


def test_the_way_to_another_text_begins_and_ends_at_pictures_of_both(finished):
    """It begins with the first picture of the one text, and ends with the first of the other, of the same noise."""

    def pictures(name, *argv):
        assert run("sample", finished[0], *argv, "--out", f"{name}.png") == 0
        with Image.open(f"{name}.png") as image:
            sheet = np.array(image.convert("RGB")).astype(int)
        top, left = 3 * drawing.FONT_SIZE + 3 * drawing.GAP, drawing.GAP + drawing.TEXT_WIDTH
        places = [left + i * (drawing.TILE + drawing.GAP) for i in range(8)]
        return [sheet[top : top + drawing.TILE, place : place + drawing.TILE] for place in places]

    way = pictures("way", "red heart", "--to", "blue star")
    ends = pictures("from", "red heart")[0], pictures("to", "blue star")[0]
    for found, end in zip((way[0], way[-1]), ends, strict=True):
        assert abs(found - end).max() <= 1  # rounding
        assert len(np.unique(end.reshape(-1, 3), axis=0)) > 10
    assert abs(ends[0] - ends[1]).max() > 1
    # in equal steps, of which none turns back
    distances = [abs(picture - ends[0]).sum() for picture in way]
    assert distances == sorted(distances) and distances[-1] > distances[4] > distances[1]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "nothing to draw: give a text, --audio or --image"),
        ([""], "the caption is empty"),
        (["  "], "the caption is empty"),
        (["--audio", "none.wav"], "none.wav"),
        (["--image", "none.png"], "none.png"),
        (["--audio", "text.txt"], "text.txt is no readable wav file"),
        (["--image", "text.txt"], "text.txt as an image"),
        (["cat", "--out", "cat.gif"], "cat.gif is no PNG"),
        (["cat", "--out", "no/cat.png"], "the folder of --out no/cat.png does not exist"),
        (["cat", "--out", "/proc/cat.png"], "/proc/cat.png"),
        (["cat", "--to", ""], "the caption is empty"),
        (["cat", "dog"], "unrecognized arguments: dog"),
    ],
    ids=lambda value: "-".join(value).replace("/", "_") or "nothing" if isinstance(value, list) else None,
)
def test_sample_refuses_in_one_line(finished, capsys, argv, says):
    Path("text.txt").write_text("only words")
    assert says in refused(capsys, "sample", finished[0], *argv)


def test_sample_wants_a_run(capsys):
    assert "nowhere is no run folder" in refused(capsys, "sample", "nowhere", "red heart")


# ---- the rest


def test_info_prints_json(capsys):
    assert run("info", "--json") == 0
    assert json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("argv", [[], ["fly"], ["train", "sample"]], ids=["nothing", "unknown", "too-much"])
def test_a_command_line_that_is_none(capsys, argv):
    assert "--help" in refused(capsys, *argv)


def test_version_and_help(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"mmfast {mmfast.__version__}\n"
    assert run("train", "--help") == 0
    assert "--resume" in capsys.readouterr().out


def test_parsing_loads_nothing_heavy():
    """--help needs torch only as far as `import mmfast` does, and no package of the [train] extra."""
    code = (
        "import sys, mmfast; before = set(sys.modules); from mmfast import cli; cli.build_parser();"
        "print(sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout.replace("'", '"')))
    assert not loaded & {"torch", "numpy", "matplotlib", "PIL", "scipy", "rich"}


def test_interrupted_is_one_line(capsys, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("mmfast.train.loop.prepare", interrupt)
    assert run("train", "--out", "new") == 130
    assert capsys.readouterr().err == "mmfast: interrupted\n"
    assert not list(Path().iterdir())


def test_weights_of_a_run_load_without_mmfast_nn(finished):
    """The checkpoint holds plain tensors: it is read with weights_only and fits the models on torch.nn."""
    from mmfast.models import ConditionalDiscriminator, Multimodal

    state = torch.load(finished[0] / checkpoint.NAME, weights_only=True)["training"]
    Multimodal(8).load_state_dict(state["averaged"])
    ConditionalDiscriminator(128, 8).load_state_dict(state["discriminator"])
