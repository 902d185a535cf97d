"""Training in several processes: the same gradients, one checkpoint, one end for all."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from mmfast.train import checkpoint

STEP = """
import sys, torch, mmfast
from mmfast.train import data, loop
from mmfast.train.processes import leave, started, whole, whole_tree
from mmfast.train.settings import Settings
from mmfast.train.step import Step, PlainHinge

out, source, cache, fsdp = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4] == "fsdp"
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
dataset = data.prepare(cache, size=8, source=source, progress=False)
settings = Settings(
    size=8, batch=8, mels=data.MELS, code_size=16, noise_size=4, warmup=1, learning_rate=1e-3, spoken=6, fsdp=fsdp
)
with started(torch.device("cpu")) as processes:
    torch.manual_seed(0)
    step = Step(settings, torch.nn, PlainHinge(), processes)
    # Adam divides by the root of a square, which would magnify rounding where a gradient is nearly 0
    step.optimizer.param_groups[0]["eps"] = step.discriminator_optimizer.param_groups[0]["eps"] = 1e-3
    gradients = []
    for i in range(2):
        captions = loop.Captions(dataset.train, 8, 0).at(i)
        noise, wanted = loop.draw(settings, 8, i)
        heard = data.first_spoken(dataset.has_speech[captions], settings.spoken)
        rows = processes.share(captions)
        batch = dataset.batch(captions, heard).rows(processes.share)
        batch.images, batch.speech = batch.images.double(), batch.speech.double()
        mine = (processes.share(x.double() if x.is_floating_point() else x) for x in (noise, wanted))
        losses = step(batch, dataset.picture_of[rows], *mine)
        gradients.append({n: whole(p.grad).clone() for n, p in step.model.named_parameters()})
    state = step.state_dict()
    if processes.first:
        kept = {"model": state["model"], "optimizer": state["optimizer"]["state"]}
        torch.save({"losses": losses, "gradients": gradients, **kept}, out)
leave(0)
"""


def launched(count, tmp_path, *command, **options):
    """A command in `count` processes of torchrun, or in this interpreter without it for count 0."""
    runner = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count else []
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *runner, *map(str, command)],
        cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options,
    )  # fmt: skip


def finished(process, code=0):
    said = process.communicate(timeout=150)[0]
    assert process.returncode == code, said
    return said


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "step.py"
    path.write_text(STEP)
    return path


@pytest.fixture(scope="module")
def alone(own_pictures, cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    (folder / "step.py").write_text(STEP)
    finished(launched(0, folder, "step.py", "out.pt", own_pictures, cache, "ddp"))
    return torch.load(folder / "out.pt")


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_have_the_gradients_of_one_with_the_joined_batch(
    how, tmp_path, script, alone, own_pictures, cache
):
    """In float64: losses, gradients of two steps - so the updates between them, too - and the weights after them."""
    finished(launched(2, tmp_path, script, "out.pt", own_pictures, cache, how))
    joined = torch.load(tmp_path / "out.pt")
    torch.testing.assert_close(joined["losses"], alone["losses"], rtol=1e-8, atol=1e-8)
    for ours, theirs in zip(joined["gradients"], alone["gradients"], strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(
                ours[name], theirs[name], rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}"
            )
    assert any(g.abs().max() > 1e-3 for g in alone["gradients"][1].values())
    for name, weight in joined["model"].items():
        torch.testing.assert_close(weight, alone["model"][name], rtol=1e-6, atol=1e-8)


def train(*more):
    return ["-m", "mmfast", "train", "--size", "8", "--batch", "4", *more]


@pytest.mark.parametrize("how", [[], ["--fsdp"]], ids=["ddp", "fsdp"])
def test_a_run_of_two_processes_goes_on_in_one_or_two(how, tmp_path, own_pictures, cache):
    """Only the first process writes; resumed in two it goes on with the same files, in one to the same losses."""
    new = train("--data", own_pictures, "--cache", cache, *how)
    said = finished(launched(2, tmp_path, *new, "--out", "whole", "--steps", "5"))
    assert said.count("draw your own") == 1
    finished(launched(2, tmp_path, *new, "--out", "parts", "--steps", "3"))
    finished(launched(2, tmp_path, "-m", "mmfast", "train", "--resume", "parts", "--steps", "5"))
    assert (tmp_path / "whole/metrics.csv").read_bytes() == (tmp_path / "parts/metrics.csv").read_bytes()
    state = checkpoint.load(tmp_path / "whole")
    assert len(state["random"]) == 2
    again = checkpoint.load(tmp_path / "parts")
    for name, weight in state["training"]["model"].items():
        assert torch.equal(weight, again["training"]["model"][name]), name
    if not how:
        finished(launched(0, tmp_path, "-m", "mmfast", "train", "--resume", "parts", "--steps", "7"))
        assert len((tmp_path / "parts/metrics.csv").read_text().splitlines()) == 8


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["sigterm", "sigkill"])
def test_an_interrupted_process_ends_all(number, tmp_path, own_pictures, cache):
    """One of two is told to stop, or killed: both end, one line says what to do, and the checkpoint is whole."""
    new = train("--data", own_pictures, "--cache", cache, "--out", "run", "--steps", "100000", "--save-every", "5")
    process = launched(2, tmp_path, *new)
    metrics = tmp_path / "run/metrics.csv"
    while not metrics.exists() or len(metrics.read_bytes().splitlines()) <= 20:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    os.kill(int(children.stdout.split()[-1]), number)
    said = process.communicate(timeout=100)[0]
    assert process.returncode != 0
    assert "mmfast train --resume" in said
    step = checkpoint.load(tmp_path / "run")["training"]["step"]
    assert step >= 5
    assert len(metrics.read_text().splitlines()) > step


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path, own_pictures, cache):
    said = launched(3, tmp_path, *train("--data", own_pictures, "--cache", cache)).communicate(timeout=100)[0]
    assert "--batch 4 cannot be shared among 3 processes" in said
    assert not (tmp_path / "runs").exists()
