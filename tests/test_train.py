"""Training: losses, the order of captions, exact resumption, what a kill or a NaN leaves behind, and that it learns."""

import copy
import errno
import functools
import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mmfast
from mmfast.models import Output
from mmfast.train import UserError, checkpoint, data, drawing, evaluate, loop, strip
from mmfast.train.settings import Settings, read_config, write_config
from mmfast.train.step import LOSSES, PlainHinge, Step, alignment_loss, speech_loss, text_loss


@pytest.fixture(autouse=True)
def drawn(seed):
    torch.manual_seed(seed)


@pytest.fixture(scope="module")
def dataset(own_pictures, tmp_path_factory):
    return data.prepare(tmp_path_factory.mktemp("cache"), size=8, source=own_pictures, progress=False)


@pytest.fixture
def settings():
    return Settings(size=8, batch=4, steps=12, save_every=4, mels=data.MELS, code_size=16, noise_size=4, warmup=5)


def new_run(folder, settings, dataset):
    folder.mkdir(exist_ok=True)
    return loop.Run(folder, settings, dataset)


def trained(folder, settings, dataset):
    run = new_run(folder, settings, dataset)
    assert run.train()
    return run


def flat(state, path=""):
    """Every tensor and number of a nested state by its path."""
    if isinstance(state, dict | list | tuple):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {k: v for key, value in items for k, v in flat(value, f"{path}/{key}").items()}
    return {path: state}


def assert_same_run(one, other):
    """The same metrics file, and the same checkpoint bit for bit but for the time it took."""
    assert (one / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()
    a, b = flat(checkpoint.load(one)), flat(checkpoint.load(other))
    assert a.keys() == b.keys()
    different = [
        k for k in a if k != "/seconds" and not (torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k])
    ]
    assert not different
    assert sum(torch.is_tensor(v) for v in a.values()) > 100


# ---- losses


def test_text_loss_is_the_mean_over_bytes_and_ends():
    lengths = torch.tensor([3, 1])
    text = torch.tensor([[7, 200, 9], [5, 0, 0]])
    logits = torch.randn(6, 256)
    expected = -logits.log_softmax(1)[range(6), [7, 200, 9, 0, 5, 0]].mean()
    torch.testing.assert_close(text_loss(logits, text, lengths), expected)


def test_speech_loss_is_the_mean_over_real_frames():
    made, true, lengths = torch.randn(2, 5, 3), torch.randn(2, 5, 3), torch.tensor([5, 2])
    expected = torch.cat([(made - true)[0].flatten(), (made - true)[1, :2].flatten()]).abs().mean()
    torch.testing.assert_close(speech_loss(made, true, lengths), expected)
    assert speech_loss(made[:0], true[:0], lengths[:0]) == 0


def output_of(codes, spoken):
    present = torch.ones(codes.shape[:2], dtype=torch.bool)
    present[:, 2] = False
    present[spoken, 2] = True
    return Output(codes, present, spoken, *[None] * 5)


def test_alignment_loss_is_the_cross_entropy_against_other_pictures():
    codes, pictures, spoken = torch.randn(4, 3, 6), torch.tensor([0, 1, 0, 2]), torch.tensor([1, 2])
    images, texts, speeches = torch.nn.functional.normalize(codes, dim=2).unbind(1)

    def contrast(a, b, of):
        terms = []
        for i in range(len(a)):
            rivals = [j for j in range(len(a)) if j == i or of[j] != of[i]]
            terms += [-(a[i] @ b[rivals].T / 0.1).log_softmax(0)[rivals.index(i)]]
            terms += [-(b[i] @ a[rivals].T / 0.1).log_softmax(0)[rivals.index(i)]]
        return torch.stack(terms).mean()

    expected = contrast(texts, images, pictures.tolist())
    torch.testing.assert_close(
        alignment_loss(output_of(codes, torch.tensor([], dtype=torch.int64)), pictures), expected
    )
    expected = expected + contrast(speeches[spoken], images[spoken], pictures[spoken].tolist())
    torch.testing.assert_close(alignment_loss(output_of(codes, spoken), pictures), expected)


def test_plain_hinge_is_what_mmfast_computes():
    real, fake = torch.randn(65), torch.randn(65)
    plain, fast = PlainHinge(), mmfast.nn.AdversarialLoss("hinge")
    torch.testing.assert_close(plain.discriminator(real, fake), fast.discriminator(real, fake))
    torch.testing.assert_close(plain.generator(fake), fast.generator(fake))


# ---- the stream of captions


@pytest.mark.parametrize("batch", [3, 7, 20], ids=["divides-not", "whole", "larger-than-the-data"])
def test_every_epoch_has_every_caption_in_an_order_of_its_own(batch):
    captions = torch.tensor([10, 11, 12, 13, 14, 15, 16])
    stream = loop.Captions(captions, batch, seed=3)
    flat = torch.cat([stream.at(step) for step in range(21)])[: 21 * batch // 7 * 7].view(-1, 7)
    assert (flat.sort(1).values == captions).all()
    assert len({tuple(epoch) for epoch in flat.tolist()}) > len(flat) // 2
    assert torch.equal(stream.at(5), loop.Captions(captions, batch, seed=3).at(5))
    assert not torch.equal(
        flat, torch.cat([loop.Captions(captions, batch, 4).at(i) for i in range(21)])[: flat.numel()].view(-1, 7)
    )


# ---- the step


def test_a_run_learns(tmp_path, settings, dataset):
    """Reconstructions and pictures of a small data set get better than half as wrong."""
    run = trained(tmp_path, replace(settings, steps=100, batch=8), dataset)
    rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    assert rows[0] == ["step", *LOSSES]
    assert [int(row[0]) for row in rows[1:]] == list(range(1, 101))
    values = torch.tensor([[float(x) for x in row[1:]] for row in rows[1:]])
    first, last = values[:5].mean(0), values[-5:].mean(0)
    for name in ("image", "text", "alignment", "picture"):
        assert last[LOSSES.index(name)] < 0.5 * first[LOSSES.index(name)], name
    assert last[LOSSES.index("speech")] < 0.8 * first[LOSSES.index("speech")]
    ignorant = evaluate.held_out_errors(Step(run.settings, torch.nn, PlainHinge()).averaged, dataset, run.settings)
    errors = evaluate.held_out_errors(run.step.averaged, dataset, run.settings)
    for name in ("image", "text", "speech", "picture_of_text", "picture_of_speech"):
        assert errors[name] < 0.7 * ignorant[name], name
    assert errors["mean_image"] == ignorant["mean_image"]


def test_averaged_weights_follow_the_trained_ones(settings, dataset):
    step = Step(settings, torch.nn, PlainHinge())
    before = copy.deepcopy(step.averaged)
    rows = dataset.train[:4]
    step(dataset.batch(rows), dataset.picture_of[rows], *loop.draw(settings, 4, 0))
    decay = (1 + 1) / (10 + 1)
    for old, new, now in zip(before.parameters(), step.averaged.parameters(), step.model.parameters(), strict=True):
        torch.testing.assert_close(new, decay * old + (1 - decay) * now)
    for kept, now in zip(step.averaged.buffers(), step.model.buffers(), strict=True):
        assert torch.equal(kept, now)
    assert all(p.requires_grad for p in step.discriminator.parameters())


def test_mmfast_and_plain_steps_agree(settings, dataset):
    step = Step(settings, torch.nn, PlainHinge())
    stream = loop.Captions(dataset.train, settings.batch, 0)
    captions = torch.cat([stream.at(i) for i in range(4)])
    before = torch.get_rng_state()
    weights = copy.deepcopy(step.model.state_dict())
    speed = evaluate.compare_speed(settings, dataset, step.state_dict(), captions, steps=2)
    assert speed.steps == 2
    assert speed.plain > 0
    assert speed.mmfast > 0
    assert speed.difference < 1e-3
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(weights.values(), step.model.state_dict().values(), strict=True))


def test_the_comparison_sees_a_difference(settings, dataset, monkeypatch):
    """Were mmfast's loss wrong by a factor, the largest difference would show it."""
    monkeypatch.setattr(PlainHinge, "generator", lambda self, fake: -0.9 * fake.mean())
    step = Step(settings, torch.nn, PlainHinge())
    captions = dataset.train[:8].repeat(2)[:12]
    assert evaluate.compare_speed(settings, dataset, step.state_dict(), captions, steps=1).difference > 1e-3


# ---- R@1


def known_pictures(count, captions):
    """A stand-in for a data set: `count` noisy pictures, alike but for a few patterns of weak and strong contrast.

    `captions`: of which pictures there are names, all of them held out; every other one is spoken.
    """
    contrast = torch.linspace(8, 40, count)[:, None]
    patterns = torch.nn.functional.normalize(torch.randn(count, 6), dim=1) @ torch.randn(6, 192).sign()
    images = (150 + contrast * patterns).clamp(0, 255).view(count, 3, 8, 8).byte()

    def batch(rows):
        return types.SimpleNamespace(images=images[captions[rows]] / 127.5 - 1, spoken=rows % 2 == 0)

    return types.SimpleNamespace(images=images, picture_of=captions, held_out=torch.arange(len(captions)), batch=batch)


def model_that_draws(*drawn):
    """A stand-in for a model: of true pictures (B, 3, 8, 8), functions to what it draws of image, text and speech."""

    def encode(batch):
        codes = torch.stack([draw(batch.images).flatten(1) for draw in drawn], 1)
        always = torch.ones_like(batch.spoken)
        return codes, torch.stack([always, always, batch.spoken], 1)

    return types.SimpleNamespace(encode=encode, generator=lambda noise, code: code.view(-1, 3, 8, 8))


def test_recall_of_models_whose_pictures_are_known(settings):
    """Among all pictures, so that nothing is left to chance; the last batch of 4 holds one caption."""
    dataset = known_pictures(20, torch.cat([torch.arange(20), torch.randint(0, 20, (13,))]))
    known = dataset.images / 127.5 - 1
    mean = known.mean(0)

    def right(true):
        return true

    def faint(true):
        return mean + 0.05 * (true - mean)

    def wrong(true):
        return known[[(int((known == x).flatten(1).all(1).nonzero()) + 1) % 20 for x in true]]

    def constant(true):
        return known[3].expand_as(true)

    def found(*drawn):
        return evaluate.recall(model_that_draws(*drawn), dataset, settings)

    perfect = {"image": 1, "text": 1, "speech": 1, "all": 1, "shuffled": 0, "chance": 1 / 20}
    assert found(right, right, right) == perfect
    assert found(faint, faint, faint) == perfect
    mixed = found(right, wrong, faint)
    assert (mixed["image"], mixed["text"], mixed["speech"]) == (1, 0, 1)
    same = found(wrong, constant, wrong)
    assert same["text"] == pytest.approx((dataset.picture_of == 3).double().mean().item())
    assert (same["image"], same["speech"]) == (0, 0)


def test_recall_of_speech_counts_the_spoken_alone(settings):
    """What is drawn from the zeros in place of silent captions' codes is no hit, and no miss."""
    dataset = known_pictures(20, torch.arange(20))
    model = model_that_draws(*[lambda true: true] * 3)
    encode = model.encode

    def silenced(batch):
        codes, present = encode(batch)
        return codes * present[:, :, None], present

    model.encode = silenced
    assert evaluate.recall(model, dataset, settings)["speech"] == 1


def test_recall_by_chance(settings):
    """Pictures of nothing are nearest to their own in one of 100 cases, of 300 pictures."""
    dataset = known_pictures(300, torch.arange(300).repeat(3))
    found = evaluate.recall(model_that_draws(*[torch.randn_like] * 3), dataset, settings)
    assert found["chance"] == 0.01
    assert all(found[name] < 0.04 for name in ("image", "text", "all", "shuffled"))


def test_recall_among_one_picture_is_chance(settings):
    found = evaluate.recall(
        model_that_draws(*[lambda true: true] * 3), known_pictures(1, torch.zeros(3).long()), settings
    )
    assert found.pop("shuffled") != found["text"]  # nan: there is no other picture
    assert set(found.values()) == {1}


@pytest.mark.parametrize(("pictures", "most"), [(300, 100), (7, 100), (1, 100)])
def test_a_gallery_has_the_own_picture_first_and_none_twice(pictures, most):
    own = torch.randint(0, pictures, (50,))
    shown = evaluate.gallery(own, pictures, most, torch.Generator().manual_seed(0))
    assert shown.shape == (50, min(most, pictures))
    assert torch.equal(shown[:, 0], own)
    assert all(len(set(row)) == len(row) and set(row) <= set(range(pictures)) for row in shown.tolist())
    assert pictures < most or len({tuple(sorted(row)) for row in shown.tolist()}) == 50


# ---- resumption


@pytest.mark.parametrize("stop", [3, 8], ids=["between-epochs", "at-a-checkpoint"])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, settings, dataset, monkeypatch, stop):
    """The strip too, of which steps are drawn before the stop and after."""
    monkeypatch.setattr(strip, "FIRST", 3)
    trained(tmp_path / "whole", settings, dataset)
    trained(tmp_path / "parts", replace(settings, steps=stop), dataset)
    torch.manual_seed(99)  # what another process would have
    second = new_run(tmp_path / "parts", settings, dataset)
    second.load()
    assert second.step.done == stop
    second.train()
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert second.strip.steps == [3, 6, 12]


def test_a_run_stopped_by_the_clock_is_a_run_stopped_by_steps(tmp_path, settings, dataset):
    run = trained(tmp_path / "clock", replace(settings, steps=None, minutes=0.02), dataset)
    assert run.seconds >= 1.2
    assert run.fraction() == 1
    trained(tmp_path / "steps", replace(settings, steps=run.step.done), dataset)
    assert_same_run(tmp_path / "clock", tmp_path / "steps")


def test_another_seed_is_another_run(tmp_path, settings, dataset):
    trained(tmp_path / "one", settings, dataset)
    trained(tmp_path / "other", replace(settings, seed=1), dataset)
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "one", tmp_path / "other")


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path, settings, dataset):
    """Rows behind the checkpoint, a row cut in its middle by the kill, and a file half written are taken away."""
    trained(tmp_path / "whole", settings, dataset)
    trained(tmp_path / "parts", replace(settings, steps=8), dataset)
    with open(tmp_path / "parts" / "metrics.csv", "a") as file:
        file.write("9,1,1,1,1,1,1,1,1\n1")
    half = tmp_path / "parts" / ".checkpoint.pt.1.tmp"
    half.write_bytes(b"half")
    second = new_run(tmp_path / "parts", settings, dataset)
    second.load()
    second.train()
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert not half.exists()


def test_a_run_killed_at_any_moment_goes_on_bit_for_bit(tmp_path, settings, dataset, own_pictures):
    """SIGKILL at a random moment; the next sitting ends where an unbroken run does."""
    settings = replace(settings, steps=20, data=str(own_pictures), cache=str(dataset.folder.parent))
    trained(tmp_path / "whole", settings, dataset)
    killed = tmp_path / "killed"
    killed.mkdir()
    write_config(killed, settings, {"threads": 1, "data": {}})
    new_run(killed, settings, dataset).save()
    command = [sys.executable, "-c", RESUME, str(killed)]
    doomed = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    metrics, rows = killed / "metrics.csv", random.randint(1, 14)
    while not metrics.exists() or len(metrics.read_bytes().splitlines()) <= rows:
        assert doomed.poll() is None, doomed.stdout.read().decode()
        time.sleep(0.01)
    time.sleep(random.random() / 20)
    doomed.kill()
    doomed.communicate()
    assert checkpoint.load(killed)["training"]["step"] in range(rows - settings.save_every, 20)
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stderr == b""
    assert_same_run(tmp_path / "whole", killed)


RESUME = """
import sys
from pathlib import Path
import torch
from mmfast.train import loop
torch.set_num_threads(1)
loop.FLUSH_EVERY = 1
loop.carry_out = lambda run: run.train()
loop.resume(Path(sys.argv[1]), steps=None, minutes=None, backend=None)
"""


def test_other_data_is_refused(tmp_path, settings, dataset):
    trained(tmp_path, replace(settings, steps=1), dataset)
    run = new_run(tmp_path, settings, dataset)
    run.dataset = copy.copy(dataset)
    run.dataset.fingerprint = "another"
    with pytest.raises(UserError, match="was trained on other data"):
        run.load()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_signal_stops_after_the_step_and_saves(tmp_path, settings, dataset, monkeypatch, number):
    run = new_run(tmp_path, settings, dataset)
    step = Step.__call__

    def then_signal(self, *args):
        losses = step(self, *args)
        if self.done == 6:
            os.kill(os.getpid(), number)
        return losses

    monkeypatch.setattr(Step, "__call__", then_signal)
    before = signal.getsignal(number)
    assert not run.train()
    assert checkpoint.load(tmp_path)["training"]["step"] == 6
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 7
    assert signal.getsignal(number) is before


# torch's own, raised inside its tracer
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_run_compiles_a_length_once(tmp_path, settings, dataset, monkeypatch):
    """Steps after the first of their lengths, and of as many spoken rows, compile nothing."""
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend="eager"))
    step, stats, graphs = Step.__call__, torch._dynamo.utils.counters["stats"], {}

    def counted(self, batch, *rest):
        before = stats["unique_graphs"]
        losses = step(self, batch, *rest)
        shape = batch.text.shape[1], batch.speech.shape[1], int((batch.speech_lengths > 0).sum())
        graphs.setdefault(shape, []).append(stats["unique_graphs"] - before)
        return losses

    monkeypatch.setattr(Step, "__call__", counted)
    trained(tmp_path, replace(settings, compile=True, steps=24), dataset)
    later = [n for _, *others in graphs.values() for n in others]
    assert not any(later), graphs
    assert len(later) >= 8 and sum(first > 0 for first, *_ in graphs.values()) > 1


# ---- what must not be lost


@pytest.mark.parametrize("what", ["loss", "weight"])
def test_nan_stops_the_run_and_leaves_the_last_good_checkpoint(tmp_path, settings, dataset, monkeypatch, what):
    """A NaN in step 7: the loss shows it at the next look; a weight is caught before it is saved. Step 4 is kept."""
    step = Step.__call__

    def poisoned(self, *args):
        losses = step(self, *args)
        if self.done == 7 and what == "loss":
            losses[LOSSES.index("picture")] = float("nan")
        if self.done == 8 and what == "weight":
            next(self.model.parameters()).data.view(-1)[0] = float("nan")
        return losses

    monkeypatch.setattr(Step, "__call__", poisoned)
    named = "picture of step 7" if what == "loss" else "a weight after step 8"
    with pytest.raises(UserError, match=rf"training diverged \({named} is not a finite number\).*step 4 is kept"):
        new_run(tmp_path, settings, dataset).train()
    state = checkpoint.load(tmp_path)
    assert state["training"]["step"] == 4
    assert all(bool(v.isfinite().all()) for k, v in flat(state["training"]).items() if torch.is_tensor(v))


# Where the system refuses to write, whoever asks: a full disk, and a folder that takes no files.
REFUSING = [("/dev/full", "the disk is full"), ("/sys/mmfast", "no permission to write")]


@pytest.mark.parametrize(("number", "says"), [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "no permission")])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, number, says):
    checkpoint.save(tmp_path, {"step": 1})

    def fail(handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=says):
        checkpoint.save(tmp_path, {"step": 2})
    monkeypatch.undo()
    assert checkpoint.load(tmp_path) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.NAME]


@pytest.mark.parametrize(
    "name", ["metrics.csv", f".{checkpoint.NAME}.{os.getpid()}.tmp"], ids=["metrics", "checkpoint"]
)
@pytest.mark.parametrize(("place", "says"), REFUSING, ids=["full", "read-only"])
def test_a_refused_write_ends_the_run_in_one_line(tmp_path, settings, dataset, monkeypatch, name, place, says):
    """From step 6 on the system itself refuses to write; the checkpoint of step 4 is kept, and goes on."""
    step = Step.__call__

    def then_full(self, *args):
        losses = step(self, *args)
        if self.done == 6:
            (tmp_path / name).unlink(missing_ok=True)
            (tmp_path / name).symlink_to(place)
        return losses

    monkeypatch.setattr(Step, "__call__", then_full)
    with pytest.raises(UserError, match=says) as caught:
        new_run(tmp_path, settings, dataset).train()
    assert "\n" not in str(caught.value)
    assert checkpoint.load(tmp_path)["training"]["step"] == 4
    assert not list(tmp_path.glob(".*.tmp"))
    monkeypatch.undo()
    (tmp_path / "metrics.csv").unlink(missing_ok=True)
    (tmp_path / "metrics.csv").touch()
    again = new_run(tmp_path, settings, dataset)
    again.load()
    assert again.train()


def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path):
    checkpoint.save(tmp_path, {"step": torch.arange(1000)})
    path = tmp_path / checkpoint.NAME
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(UserError) as caught:
        checkpoint.load(tmp_path)
    assert "cannot be read" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_random_state_comes_back():
    state = checkpoint.random_state()
    drawn = torch.rand(5)
    checkpoint.restore_random_state(state)
    assert torch.equal(drawn, torch.rand(5))


def test_config_holds_all_settings(tmp_path, settings):
    write_config(tmp_path, settings, {"data": {"pictures": 3}, "threads": 2})
    again, config = read_config(tmp_path)
    assert again == settings
    assert config["mmfast"] == mmfast.__version__
    assert config["data"] == {"pictures": 3}


class Writer:
    """A stand-in for SummaryWriter: what it was given; `after` so many numbers the system refuses to write, once."""

    def __init__(self, after, folder, purge_step):
        self.after, self.folder, self.purge_step = after, folder, purge_step
        self.numbers, self.closed = [], False

    def add_scalar(self, name, value, step):
        self._write()
        self.numbers.append((name, value, step))

    def close(self):
        self.closed = True
        self._write()

    def _write(self):
        if len(self.numbers) == self.after:
            self.after = None
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def writers(monkeypatch):
    """writers(after): those that are made from now on."""
    module, made = types.ModuleType("torch.utils.tensorboard"), []
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def failing(after):
        module.SummaryWriter = lambda *given, **named: made.append(Writer(after, *given, **named)) or made[-1]
        return made

    return failing


def test_tensorboard_is_given_the_metrics(tmp_path, settings, dataset, writers):
    """Of each sitting the steps that it adds; it hides what an earlier one wrote behind its checkpoint."""
    made = writers(None)
    trained(tmp_path, replace(settings, log="tensorboard", steps=5), dataset)
    second = new_run(tmp_path, replace(settings, log="tensorboard"), dataset)
    second.load()
    assert second.train()
    assert [writer.purge_step for writer in made] == [1, 6]
    assert all(writer.closed and writer.folder == str(tmp_path / "tensorboard") for writer in made)
    given = [number for writer in made for number in writer.numbers]
    rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()[1:]]
    expected = [(f"loss/{name}", x, int(step)) for step, *row in rows for name, x in zip(LOSSES, row, strict=True)]
    assert [(name, f"{value:.6g}", step) for name, value, step in given] == expected


@pytest.mark.parametrize("after", [70, 96], ids=["in-a-step", "at-the-end"])
def test_tensorboard_that_cannot_write_ends_the_run_in_one_line(tmp_path, settings, dataset, writers, after):
    writers(after)
    with pytest.raises(UserError, match=r"the disk is full, \S+tensorboard was not written") as caught:
        new_run(tmp_path, replace(settings, log="tensorboard"), dataset).train()
    assert "\n" not in str(caught.value)
    assert checkpoint.load(tmp_path)["training"]["step"] == (8 if after == 70 else 12)


# ---- pictures


@pytest.mark.parametrize(
    ("text", "possible"),
    [("red heart", True), ("Größe", True), ("сердце", True), ("赤いハート", False), ("하트", False), ("قلب", False)],
)
def test_drawable_texts(text, possible):
    assert drawing.drawable(text) is possible


def test_a_grid_shows_the_pictures_and_the_captions(tmp_path):
    from PIL import Image

    pictures = torch.rand(3, 3, 8, 8) * 2 - 1
    entries = [drawing.Entry("one 赤い", [pictures[0], pictures[1]]), drawing.Entry("two", [pictures[2], pictures[0]])]
    drawing.draw_sections(tmp_path / "a.png", [drawing.Section("title", ["true", "drawn"], entries)])
    entries[0].text = ""
    drawing.draw_sections(tmp_path / "b.png", [drawing.Section("title", ["true", "drawn"], entries)])
    sheets = []
    for name in ("a.png", "b.png"):
        with Image.open(tmp_path / name) as image:
            sheets.append(image.convert("RGB"))
    colours = {colour for _, colour in sheets[0].getcolors(100_000)}
    pixels = ((pictures + 1) * 127.5).round().byte().permute(0, 2, 3, 1).reshape(-1, 3).tolist()
    assert {tuple(pixel) for pixel in pixels} <= colours
    assert sheets[0].size == sheets[1].size
    assert sheets[0].tobytes() != sheets[1].tobytes()


def test_a_strip_shows_what_was_drawn_at_its_steps(tmp_path, settings, dataset, monkeypatch):
    """Of the captions' texts by the averaged weights; and a folder that takes no files is one line."""
    from PIL import Image

    monkeypatch.setattr(strip, "FIRST", 2)
    run = trained(tmp_path, replace(settings, steps=8), dataset)
    assert run.strip.steps == [2, 4, 8]
    shown, averaged = run.strip, run.step.averaged
    text = averaged.encode(dataset.batch(shown.captions))[0][:, 1]
    drawn = (averaged.generator(shown.noise, text).clamp(-1, 1) + 1) * 127.5
    assert torch.equal(shown.frames[-1], drawn.round().byte())
    assert not torch.equal(shown.frames[0], shown.frames[1])
    evaluate.draw_strip(shown, dataset, tmp_path / "strip.png")
    with Image.open(tmp_path / "strip.png") as image:
        found = {colour for _, colour in image.convert("RGB").getcolors(1_000_000)}
    for frames in shown.frames:
        assert {tuple(pixel) for pixel in frames.permute(0, 2, 3, 1).reshape(-1, 3).tolist()} <= found
    for place, says in REFUSING:
        (tmp_path / f".strip.png.{os.getpid()}.tmp").symlink_to(place)
        with pytest.raises(UserError, match=says):
            evaluate.draw_strip(shown, dataset, tmp_path / "strip.png")


def test_curves_draw_every_column(tmp_path, settings, dataset):
    from PIL import Image

    trained(tmp_path, replace(settings, steps=3), dataset)
    drawing.draw_curves(tmp_path / "curves.png", tmp_path / "metrics.csv")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (1400, 600)
        assert len(image.convert("RGB").getcolors(1_000_000)) > 20


def test_shown_captions_are_held_out_and_of_different_pictures(dataset):
    typed = evaluate.shown(dataset, torch.Generator().manual_seed(0), 4, spoken=False)
    spoken = evaluate.shown(dataset, torch.Generator().manual_seed(0), 4, spoken=True)
    for captions in (typed, spoken):
        assert len(captions)
        assert set(captions.tolist()) <= set(dataset.held_out.tolist())
        assert len(set(dataset.picture_of[captions].tolist())) == len(captions)
    assert dataset.has_speech[spoken].all()


# ---- the kill test's own verdict


@pytest.mark.parametrize(("growth", "code"), [(1.0, 0), (1.04, 0), (1.06, 1)])
def test_memory_that_grows_fails_the_soundness_run(tmp_path, monkeypatch, growth, code):
    """Judged from a fifth of the run on, whatever the beginning and single saves take."""
    path = Path(__file__).parent.parent / "benchmarks" / "train_soundness.py"
    spec = importlib.util.spec_from_file_location("train_soundness", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    memory = [100, *[1000] * 39, *[round(1000 * growth)] * 59, 5000]

    def unbroken(run, *given):
        run.mkdir()
        (run / "metrics.csv").write_text("step\n" + "1\n" * 30)
        return 1.0, memory

    monkeypatch.setattr(script, "unbroken", unbroken)
    monkeypatch.setattr(script, "broken", unbroken)
    monkeypatch.setattr(script, "same_weights", lambda *runs: True)
    monkeypatch.setattr(sys, "argv", ["train_soundness.py"])
    assert script.main() == code
