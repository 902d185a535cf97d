"""`mmfast validate`: passes what is right, fails what is planted wrong, blames who did it, and writes it down."""

import importlib
import json
import os
import re
import subprocess
import sys

import pytest
import torch

from mmfast import cli, nn
from mmfast.bench import cases
from mmfast.bench.models import UserCase
from mmfast.dispatch import Op
from mmfast.ops.adversarial import losses
from mmfast.ops.adversarial.op import DirectLoss
from mmfast.validate import certificate, checks, model, schedule
from mmfast.validate.certificate import Certificate
from mmfast.validate.checks import NUMERICS, Row, Subject
from mmfast.validate.mutants import MUTANTS

CPU = type(Op.registry["adversarial"].backends["cpu"])
LOSS = Subject(cases.AdversarialCase("small", "lsgan", ((256,), (8,))), "cpu", torch.float32, "cpu")


def subject(**changes) -> Subject:
    return Subject(**{**LOSS.__dict__, **changes})


def by_quantity(rows) -> dict[str, Row]:
    return {row.quantity: row for row in rows}


# checks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_right_kernel_passes(dtype, seed):
    rows = by_quantity(checks.numerics(subject(dtype=dtype), range(seed, seed + 256)))
    assert rows.keys() == {"discriminator", "generator", "dx"}
    assert rows["dx"].count >= 4096
    for row in rows.values():
        assert row.passed, row.detail
        assert row.count >= 256
        assert 0 <= row.share <= 1
        assert row.mmfast.keys() == row.pytorch.keys() == {"max", "rms", "ulp"}
        assert sum(row.histogram["mmfast"]) == sum(row.histogram["pytorch"]) == row.count


def wrong(monkeypatch, change):
    """The CPU kernels' gradients, made with the loss or after it, changed before anybody sees them."""
    backward, with_gradients = CPU.backward, CPU.forward_with_gradients

    def changed(value):
        if isinstance(value, torch.Tensor):
            return change(value)
        return type(value)(changed(part) for part in value) if isinstance(value, (list, tuple)) else value

    def with_changed(*args):
        outputs, gradients = with_gradients(*args)
        return outputs, changed(gradients)

    directly = DirectLoss.backward
    monkeypatch.setattr(DirectLoss._backward_cls, "apply", lambda *args: changed(directly(*args)))
    monkeypatch.setattr(CPU, "backward", lambda *args: changed(backward(*args)))
    monkeypatch.setattr(CPU, "forward_with_gradients", with_changed)


def test_a_loss_that_is_off_by_a_millionth_fails(monkeypatch, seed):
    honest = losses.loss_of_tensors

    def off(*args):
        total = honest(*args)
        total.detach().mul_(1 + 1e-6)
        return total

    monkeypatch.setattr(losses, "loss_of_tensors", off)
    rows = by_quantity(checks.numerics(LOSS, range(seed, seed + 16)))
    assert not rows["discriminator"].passed
    assert rows["discriminator"].share > 1
    assert "the rms error is" in rows["discriminator"].detail
    assert rows["dx"].passed


def test_a_gradient_that_is_nan_once_fails(monkeypatch, seed):
    def spoil(x):
        x.view(-1)[-1] = float("nan")
        return x

    wrong(monkeypatch, spoil)
    rows = by_quantity(checks.numerics(LOSS, range(seed, seed + 8)))
    assert not rows["dx"].passed
    assert "NaN" in rows["dx"].detail


def test_double_backward_is_held_to_the_rule(seed):
    rows = by_quantity(checks.double_backward(LOSS, range(seed, seed + 64)))
    assert rows.keys() == {"dx"}
    assert rows["dx"].passed, rows["dx"].detail
    flat = cases.AdversarialCase("small", "wasserstein", ((30,),))
    assert checks.double_backward(subject(case=flat), range(4)) == []


def test_double_backward_of_recurrent_weights_keeps_the_rule(seed):
    """Summed over all steps in one chain, they missed it."""
    [gru] = cases.matching(["layer-GRU-T128-B64-*"])
    for row in checks.double_backward(subject(case=gru.shrunk(8, 24, 512)), range(seed, seed + 16)):
        assert row.passed, row.detail


def test_a_gru_of_one_row_keeps_the_rule():
    """One chain over 64 steps for the input side's bias, and one over all gates for the second order, missed it."""
    [layer, cell] = (cases.matching([name])[0] for name in ("layer-GRU-T128-B1-*", "cell-GRU-cell-B1-*"))
    rows = [
        *checks.numerics(subject(case=layer.shrunk(1, 64, 128)), range(16)),
        *checks.double_backward(subject(case=cell), range(32)),
    ]
    assert {"dbias_ih_l0", "dh_0"} <= by_quantity(rows).keys()
    for row in rows:
        assert row.passed, row.detail


def test_a_planted_bug_must_be_caught(seed):
    mutant = MUTANTS["adversarial"][0]
    row = checks.caught("adversarial", mutant, mutant.modes[0], torch.float32, seed)
    assert row.passed
    assert row.quantity == mutant.name
    harmless = mutant._replace(plant=lambda kernel: kernel)
    row = checks.caught("adversarial", harmless, mutant.modes[0], torch.float32, seed)
    assert not row.passed
    assert row.detail == "the rule lets it pass"


def test_repeatability_fails_a_result_that_wanders(monkeypatch, seed):
    assert checks.repeatability(LOSS, seed).passed
    wrong(monkeypatch, lambda x: x * (1 + 1e-5 * torch.rand(())))
    row = checks.repeatability(LOSS, seed)
    assert not row.passed
    assert row.detail == "dx differ between two calls"


def test_thread_independence_fails_a_result_that_needs_its_threads(monkeypatch, seed):
    case = cases.AdversarialCase("large", "lsgan", ((5000,),))
    assert checks.thread_independence(subject(case=case), seed).detail == "same bits"
    wrong(monkeypatch, lambda x: x * (1 if torch.get_num_threads() > 1 else 1.001))
    row = checks.thread_independence(subject(case=case), seed)
    assert not row.passed
    assert "dx break the rule with one thread" in row.detail


def test_gradcheck_fails_a_gradient_that_is_another_functions(monkeypatch, seed):
    tiny = subject(case=LOSS.case.shrunk(1, 2, 3), dtype=torch.float64)
    assert checks.gradcheck(tiny, seed).passed
    wrong(monkeypatch, lambda x: 1.01 * x)
    assert not checks.gradcheck(tiny, seed).passed


def test_torchs_own_bits(monkeypatch, seed):
    for case in cases.matching(["speech-GRU*", "cell-LSTM-cell-B1-*", "hifigan-v1-128*", "patchgan-hinge*"]):
        own = subject(case=case.shrunk(2, 3, 16), backend="torch")
        assert checks.torchs_own_bits(own, seed).passed
    honest = nn.GRU.forward
    monkeypatch.setattr(nn.GRU, "forward", lambda *args: tuple(y * (1 + 1e-6) for y in honest(*args)))
    [gru] = cases.matching(["article-GRU*"])
    assert not checks.torchs_own_bits(subject(case=gru.shrunk(2, 3, 16), backend="torch"), seed).passed


def test_refusals_say_why_nothing_was_checked():
    assert checks.refusals(LOSS) == []
    assert "PyTorch itself refuses" in checks.refusals(subject(dtype=torch.float8_e5m2))[0]
    for case in cases.matching(["*-resets", "*-zoneout"]):
        assert "torch.nn has no such layer" in checks.refusals(subject(case=case.shrunk(2, 3, 16), backend="torch"))[0]


def test_the_share_is_the_larger_of_max_and_rms():
    from mmfast.numerics import Comparison, Figures

    found = Comparison(4096, torch.float32, Figures(1.0, 0.9, 3.0), Figures(1.0, 1.0, 3.0), 2.0, 1.0)
    assert checks.share(found) == 0.9
    assert checks.share(found._replace(max_bound=0.0)) == 1.0


# a user's own model


class Mine(torch.nn.Module):
    """Words and a picture to a score, with a mapping for an output."""

    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(20, 12)
        self.encoder = torch.nn.GRU(12, 24, batch_first=True)
        self.up = torch.nn.ConvTranspose1d(24, 16, 4, 2, 1)
        self.decoder = torch.nn.Sequential(torch.nn.ConvTranspose1d(16, 8, 4, 2, 1), torch.nn.LeakyReLU(0.2))
        self.dropped = torch.nn.Dropout(0.5)

    def forward(self, text, noise):
        states, last = self.encoder(self.words(text))
        return {"sound": self.dropped(self.decoder(self.up(states.transpose(1, 2) + noise))), "last": (last,)}


def rivals(seed, module=None) -> model.Rivals:
    torch.manual_seed(seed)
    sample = (torch.randint(0, 20, (16, 9)), torch.randn(16, 24, 9))
    return model.Rivals(UserCase("mine:build", module or Mine(), sample), torch.float32, "cpu", seed)


def test_a_users_model_passes_with_every_gradient(seed):
    mine = rivals(seed)
    assert isinstance(mine.ours.encoder, nn.GRU)
    rows = by_quantity(model.compared(mine))
    weights = {f"d {name}" for name, _ in mine.theirs.named_parameters()}
    assert rows.keys() == {"output 0", "output 1", "d input 0", *weights}
    assert all(row.passed for row in rows.values()), [row.detail for row in rows.values()]


def test_the_first_module_that_differs_is_blamed(monkeypatch, seed):
    honest = nn.ConvTranspose1d.forward
    monkeypatch.setattr(nn.ConvTranspose1d, "forward", lambda *args: honest(*args) * 1.001)
    rows = model.compared(rivals(seed))
    failed = [row for row in rows if not row.passed]
    assert failed
    assert all("up (ConvTranspose1d)" in row.detail for row in failed)


def test_a_container_is_blamed_where_its_parts_alone_are_right(monkeypatch, seed):
    mine = rivals(seed)
    accelerated = mine.ours.decoder
    honest = type(accelerated).forward

    def forward(self, x):
        return honest(self, x) * (1.001 if self is accelerated else 1)

    monkeypatch.setattr(type(accelerated), "forward", forward)
    failed = [row for row in model.compared(mine) if not row.passed]
    assert failed
    assert all("decoder (" in row.detail for row in failed)


def test_training_curves_agree_and_a_wrong_gradient_is_seen(monkeypatch, seed):
    row = model.trained(rivals(seed), 5)
    assert row.passed, row.detail
    assert [len(curve) for curve in row.curves.values()] == [5, 5]
    assert row.curves["pytorch"][0] > 0
    honest = nn.ConvTranspose1d.forward

    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dx):
            return dx / 2

    monkeypatch.setattr(nn.ConvTranspose1d, "forward", lambda self, x, *rest: honest(self, Halved.apply(x), *rest))
    assert not model.trained(rivals(seed), 5).passed


# the certificate


def row_of(**changes) -> Row:
    figures = {"max": 1e-6, "rms": 1e-7, "ulp": 0.7}
    values = {"check": NUMERICS, "op": "rnn", "case": "c<1>", "backend": "cpu", "how": "native", "dtype": "float32"}
    values |= {"quantity": "dx", "passed": True, "count": 5000, "pytorch": figures, "mmfast": figures, "share": 0.5}
    histogram = {"mmfast": [5000, *[0] * 10], "pytorch": [0, 5000, *[0] * 9]}
    return Row(**{**values, "histogram": histogram, "command": "mmfast validate rnn", **changes})


def certificate_of(*rows, **changes) -> Certificate:
    return Certificate({"machine": "m & n"}, 0, "mmfast validate", list(rows), **{"complete": True, **changes})


def test_it_passes_only_if_everything_was_checked_and_passed():
    assert certificate_of(row_of()).passed
    assert not certificate_of().passed
    assert not certificate_of(row_of(), row_of(passed=False)).passed
    assert not certificate_of(row_of(), complete=False).passed
    assert certificate_of(row_of(), row_of(passed=False)).verdict == "FAILED: 1 of 2 checks"


def test_every_form_of_it_tells_the_failure_and_how_to_repeat_it(tmp_path):
    found = certificate_of(
        row_of(),
        row_of(passed=False, detail="off by 1", share=2.0),
        row_of(check="gradcheck", histogram={}),
        skipped={"no GPU": ["x"]},
    )
    texts = {}
    for ending in ("md", "json", "html"):
        path = tmp_path / f"c.{ending}"
        certificate.write(found, path)
        texts[ending] = path.read_text()
    texts["lines"] = "\n".join(text for text, _ in certificate.lines(found))
    for text in texts.values():
        for part in ("FAILED: 1 of 3 checks", "off by 1", "mmfast validate rnn", "no GPU"):
            assert part in text
    assert max(map(len, texts["lines"].splitlines())) <= 100
    assert json.loads(texts["json"])["rows"][1]["share"] == 2.0
    assert "c&lt;1&gt;" in texts["html"]
    assert "m &amp; n" in texts["html"]
    bars = re.findall(r'height="([\d.]+)" fill="#0072B2"><title>mmfast: ([\d.]+) %', texts["html"])
    assert ("90.0", "100.00") in bars


# the order of checks, and their processes


TASK = """
import dataclasses, os, time, torch

@dataclasses.dataclass(frozen=True)
class Task:
    group: tuple
    label: str
    seconds: float = 0.0

    def __call__(self):
        time.sleep(self.seconds)
        return [(os.getpid(), os.environ.get("TRITON_INTERPRET"), torch.get_num_threads())], []

class Refused(Task):
    def __call__(self):
        return [], ["refused"]

class Deadly(Task):
    def __call__(self):
        os._exit(1)
"""


@pytest.fixture
def tasks_module(tmp_path, monkeypatch):
    """A module that other processes can import too."""
    (tmp_path / "some_tasks.py").write_text(TASK)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("some_tasks")
    del sys.modules["some_tasks"]


def test_every_group_has_its_turn_before_any_has_a_second(tasks_module):
    tasks = [tasks_module.Task((group,), group + number) for group in "ab" for number in "123"]
    assert [task.label for task in schedule.in_turn(tasks)] == ["a1", "b1", "a2", "b2", "a3", "b3"]


def test_what_time_leaves_out_is_said_and_no_group_is_left_out(tasks_module):
    one, two, three = (tasks_module.Task((label[0],), label, 0.01) for label in ("a1", "a2", "b2"))
    tasks = [one, two, tasks_module.Refused(("b",), "b1"), three]
    found = {task.label: (len(rows), reasons) for task, (rows, reasons) in schedule.outcomes(tasks, 0.0, 0)}
    assert found == {"a1": (1, []), "a2": (0, [schedule.LATE]), "b1": (0, ["refused"]), "b2": (1, [])}
    assert all(rows for _, (rows, _) in schedule.outcomes([one, two], 60.0, 0))


def test_checks_run_side_by_side_in_processes_of_one_thread_whose_triton_interprets(tasks_module):
    tasks = [tasks_module.Task(("a",), str(number), 1.0) for number in range(4)]
    shown = []
    found = [rows[0] for _, (rows, _) in schedule.outcomes(tasks, 60.0, 2, shown.append)]
    assert len({process for process, *_ in found} - {os.getpid()}) == 2
    assert {tuple(rest) for _, *rest in found} == {("1", 1)}
    assert max(map(len, shown)) == 2


def test_a_process_that_dies_names_its_checks(tasks_module):
    with pytest.raises(schedule.Died) as died:
        list(schedule.outcomes([tasks_module.Deadly(("a",), "deadly")], 60.0, 1))
    assert died.value.args[0] == ["deadly"]


def test_a_verdict_on_few_values_is_made_on_more_where_it_fails(monkeypatch, seed):
    few = cases.AdversarialCase("few", "lsgan", ((256,),))
    [*_, right] = checks.numerics(subject(case=few), range(seed, seed + 2))
    assert right.passed
    assert right.count < 4096
    wrong(monkeypatch, lambda x: 1.01 * x)
    [*_, row] = checks.numerics(subject(case=few), range(seed, seed + 2))
    assert not row.passed
    assert row.count >= 4096


def test_a_failure_is_pronounced_on_four_times_as_many_draws(monkeypatch, seed):
    many = cases.AdversarialCase("many", "lsgan", ((300,),))
    [*_, right] = checks.numerics(subject(case=many), range(seed, seed + 20))
    assert right.passed
    wrong(monkeypatch, lambda x: 1.01 * x)
    [*_, row] = checks.numerics(subject(case=many), range(seed, seed + 20))
    assert not row.passed
    assert row.count == 4 * right.count


def test_one_bad_draw_is_judged_among_others():
    """Both are off on ill-conditioned draws; on the first 16 of them only ours is."""
    pool = checks.Pool("x")
    exact = torch.ones(256, dtype=torch.float64)
    for drawn in range(1, 65):
        ours, theirs = exact.float(), exact.float()
        ours[0] += 1e-5 * (drawn % 20 == 3)
        theirs[0] += 1e-5 * (drawn % 20 == 19)
        pool.add(ours, theirs, exact)
        assert pool.settled(drawn) == (drawn == 64)
        if drawn == 16:
            assert not pool.passes
    assert pool.passes


# the command


def validate(*words, cwd) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mmfast", "validate", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_the_command_certifies_from_an_empty_folder(tmp_path):
    words = ("adversarial", "--cases", "patchgan-hinge*", "--backend", "cpu", "--backend", "torch")
    done = validate(*words, "--json", "c.json", "--html", "c.html", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert "\x1b" not in done.stdout
    assert done.stdout.splitlines()[-1].startswith("PASSED: ")
    content = json.loads((tmp_path / "c.json").read_text())
    assert content["command"] == "mmfast validate " + " ".join([*words, "--json", "c.json", "--html", "c.html"])
    found = {(row["check"], row["backend"], row["dtype"]) for row in content["rows"]}
    assert found >= {
        ("torch's own bits", "torch", "float16"),
        ("numerics", "cpu", "bfloat16"),
        ("gradcheck", "cpu", "float64"),
    }
    [again] = {row["command"] for row in content["rows"] if row["check"] == "gradcheck"}
    assert again.startswith("mmfast validate adversarial --cases 'patchgan-hinge-1x57600' --backend cpu")


def test_the_command_checks_a_users_model(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def build(): return torch.nn.Sequential(torch.nn.ConvTranspose1d(3, 5, 4, 2, 1), torch.nn.Tanh())\n"
        "def sample(): return torch.randn(4, 3, 70)\n"
    )
    words = ("--model", "mine:build", "--input", "mine:sample", "--steps", "3", "--out", "c.md")
    done = validate(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "d 0.weight" in (tmp_path / "c.md").read_text()
    assert "training" in done.stdout


def test_a_failure_is_the_exit_code(monkeypatch, capsys):
    wrong(monkeypatch, lambda x: 1.01 * x)
    assert cli.main(["validate", "adversarial", "--cases", "patchgan-hinge*", "--backend", "cpu"]) == 1
    output = capsys.readouterr().out
    assert "! numerics: adversarial patchgan-hinge-" in output
    assert "! gradcheck: adversarial patchgan-hinge-" in output
    assert output.splitlines()[-1].startswith("FAILED: ")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["gru"], "unknown op 'gru'; accepted: "),
        (["--cases", "nothing-*"], "no case fits nothing-*"),
        (["--steps", "3"], "--steps N needs --model"),
        (["--out", "c.pdf"], "a certificate's name ends in .md, .json or .html"),
        (["--model", "dcgan"], "give your own model"),
        (["--model", "a:b"], "needs --input"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_option_is_one_line(words, sentence, capsys):
    assert cli.main(["validate", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mmfast validate: ")
    assert sentence in error
    assert error.count("\n") == 1
