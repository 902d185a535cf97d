"""Training in several processes: the same gradients, one checkpoint, one end for all.

All but torchrun's own processes are forked from one that has imported everything: an import takes longer than a run.
"""

import contextlib
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver, get_context

import pytest
import torch
import torch.distributed as dist

import mmfast
from mmfast.train import checkpoint

BEGIN = """
import os, sys, torch, mmfast
assert mmfast.__file__ == package, mmfast.__file__
os.environ.update(environment)
os.chdir(folder)
for stream in (1, 2):
    os.dup2(os.open("said", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
torch.set_num_threads(1)
"""

# The speeds that a report compares are the first process's alone. Each step draws a number, as dropout would.
TRAIN = """
from mmfast import cli
from mmfast.train import evaluate, step
evaluate.compare_speed = lambda *given: evaluate.Speed(1, 1, 0, 20)
evaluate.compare_parts = lambda *given: {}
once = step.Step.__call__
step.Step.__call__ = lambda *given: (torch.rand(()), once(*given))[1]
sys.exit(cli.main(arguments))
"""

UNTOLD = """
from mmfast.train import evaluate
evaluate.report = lambda *given: None
"""

STEPS = """
from mmfast.train import data, loop
from mmfast.train.processes import leave, started, whole
from mmfast.train.settings import Settings
from mmfast.train.step import Step, PlainHinge

source, cache, layers, *ways = arguments
nn, hinge = (mmfast.nn, mmfast.nn.AdversarialLoss("hinge")) if layers == "mmfast" else (torch.nn, PlainHinge())
torch.set_default_dtype(torch.float64)
dataset = data.prepare(cache, size=8, source=source, progress=False)

def trained(processes, fsdp):
    settings = Settings(
        size=8, batch=8, mels=data.MELS, code_size=16, noise_size=4, warmup=1, learning_rate=1e-3, spoken=6, fsdp=fsdp
    )
    torch.manual_seed(0)
    step = Step(settings, nn, hinge, processes)
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
    kept = {"model": state["model"], "optimizer": state["optimizer"]["state"]}
    return {"losses": losses, "gradients": gradients, **kept}

with started(torch.device("cpu")) as processes:
    for way in ways:
        made = trained(processes, way == "fsdp")
        if processes.first:
            torch.save(made, way)
leave(0)
"""


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    """The process that all others are forked from; it imports from where it is begun, too."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["mmfast.cli", "mmfast.train.evaluate", "matplotlib.figure"])
    here = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    try:
        forkserver.ensure_running()
    finally:
        os.chdir(here)
    return context


@pytest.fixture
def run(forks, tmp_path):
    """run(count, work, *arguments): `work` in `count` processes, alone for 0; their exit codes, and what they said."""

    def run(count, work, *arguments):
        path, said = tmp_path / "work.py", tmp_path / "said"
        path.write_text(BEGIN + work)
        said.unlink(missing_ok=True)
        # as torchrun hosts it, where no port can be taken by another before it is used
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        processes = []
        for rank in range(max(count, 1)):
            own = {**place, "WORLD_SIZE": str(count), "RANK": str(rank)} if count else {}
            given = {"arguments": list(map(str, arguments)), "environment": own, "folder": str(tmp_path)}
            given["package"] = mmfast.__file__
            processes.append(forks.Process(target=runpy.run_path, args=(str(path), given)))
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join(120)
        finally:
            codes = [process.exitcode for process in processes]
            for process in processes:
                process.kill()
                process.join()
        return codes, said.read_text()

    return run


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("layers", ["torch", "mmfast"])
def test_two_processes_have_the_gradients_of_one_with_the_joined_batch(layers, run, tmp_path, own_pictures, cache):
    """In float64: losses, gradients of two steps - so the updates between them, too - and the weights after them."""
    for count, ways in ((0, ["alone"]), (2, ["ddp", "fsdp"])):
        codes, said = run(count, STEPS, own_pictures, cache, layers, *ways)
        assert set(codes) == {0}, said
    alone = torch.load(tmp_path / "alone")
    assert any(g.abs().max() > 1e-3 for g in alone["gradients"][1].values())
    for way in ("ddp", "fsdp"):
        joined = torch.load(tmp_path / way)
        torch.testing.assert_close(joined["losses"], alone["losses"], rtol=1e-8, atol=1e-8)
        for ours, theirs in zip(joined["gradients"], alone["gradients"], strict=True):
            assert_close(ours, theirs, way)
        assert_close(joined["model"], alone["model"], way)


def assert_close(ours, theirs, way):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{way} {n}: {m}"
        )


def new(own_pictures, cache, *more):
    return "train", "--size", "8", "--batch", "4", "--data", own_pictures, "--cache", cache, *more


@pytest.fixture
def trained(run):
    """trained(count, *arguments): a run that ends well, and of which one process reports."""

    def trained(count, *arguments):
        codes, said = run(count, TRAIN, *arguments)
        assert set(codes) == {0}, said
        assert said.count("draw your own") == 1

    return trained


def losses(folder):
    rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()[1:]]
    return torch.tensor([[float(x) for x in row] for row in rows])


@pytest.mark.parametrize("how", [[], ["--fsdp"]], ids=["ddp", "fsdp"])
def test_a_run_of_two_processes_goes_on_in_one_or_two(how, trained, tmp_path, own_pictures, cache):
    """Only the first process writes; resumed in two it goes on with the same files, and each process with the random
    numbers it would have drawn; in one, and from there in two again, to the same losses but for rounding."""
    trained(2, *new(own_pictures, cache, *how, "--out", "whole", "--steps", "8"))
    trained(2, *new(own_pictures, cache, *how, "--out", "parts", "--steps", "3"))
    shutil.copytree(tmp_path / "parts", tmp_path / "changing")
    trained(2, "train", "--resume", "parts", "--steps", "8")
    assert (tmp_path / "whole/metrics.csv").read_bytes() == (tmp_path / "parts/metrics.csv").read_bytes()
    state, again = (checkpoint.load(tmp_path / name) for name in ("whole", "parts"))
    for name, weight in state["training"]["model"].items():
        assert torch.equal(weight, again["training"]["model"][name]), name
    ours, theirs = ([random["cpu"] for random in x["random"]] for x in (again, state))
    assert len(ours) == 2 and not torch.equal(*ours)
    assert all(map(torch.equal, ours, theirs))
    for count, steps in ((0, 5), (2, 8)):
        trained(count, "train", "--resume", "changing", "--steps", steps)
    torch.testing.assert_close(losses(tmp_path / "changing"), losses(tmp_path / "whole"), rtol=1e-4, atol=1e-5)


def test_two_processes_in_half_precision(run, tmp_path, own_pictures, cache):
    """The first losses are those of one process in float32, as far as half precision goes."""
    ways = {
        "one": (0,),
        "bf16": (2, "--amp", "bf16"),
        "fp16": (2, "--amp", "fp16"),
        "fsdp": (2, "--amp", "bf16", "--fsdp"),
    }
    found = {}
    for name, (count, *how) in ways.items():
        codes, said = run(count, UNTOLD + TRAIN, *new(own_pictures, cache, *how, "--out", name, "--steps", "2"))
        assert set(codes) == {0}, said
        found[name] = losses(tmp_path / name)[:, :-1]  # the last is the gradient, where fp16 begins with too large ones
    for name in ("bf16", "fp16", "fsdp"):
        assert not torch.equal(found[name], found["one"]), name
        torch.testing.assert_close(found[name], found["one"], rtol=0.03, atol=0.03, msg=lambda m, n=name: f"{n}: {m}")


def test_a_batch_that_cannot_be_shared_is_refused(run, tmp_path, own_pictures, cache):
    codes, said = run(3, TRAIN, *new(own_pictures, cache))
    assert codes == [2, 2, 2]
    assert "--batch 4 cannot be shared among 3 processes" in said
    assert not (tmp_path / "runs").exists()


def test_an_interrupted_process_ends_all(tmp_path, own_pictures, cache):
    """Under torchrun one of two is told to stop, and after it was resumed one is killed: both times both end, a line
    says what to do, and the checkpoint is whole."""
    begun = new(own_pictures, cache, "--out", "run", "--steps", "100000", "--save-every", "5")
    for number, command in ((signal.SIGTERM, begun), (signal.SIGKILL, ("train", "--resume", "run"))):
        done = checkpoint.load(tmp_path / "run")["training"]["step"] if number == signal.SIGKILL else 0
        with torchrun(tmp_path, *command) as process:
            metrics = tmp_path / "run/metrics.csv"
            while not metrics.exists() or len(metrics.read_bytes().splitlines()) <= done + 20:
                assert process.poll() is None, process.communicate()[0]
                time.sleep(0.05)
            children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
            os.kill(int(children.stdout.split()[-1]), number)
            said = process.communicate(timeout=100)[0]
        assert process.returncode != 0
        assert "mmfast train --resume" in said, said
        step = checkpoint.load(tmp_path / "run")["training"]["step"]
        assert step >= done + 5
        assert len(metrics.read_text().splitlines()) > step


@contextlib.contextmanager
def torchrun(folder, *command):
    """`mmfast` in two processes of torchrun; none is left behind."""
    runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mmfast"]
    process = subprocess.Popen(
        [*runner, *map(str, command)], cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()  # which torchrun passes on to its processes
        process.communicate()
