"""`mmfast bench`: an honest harness, tables that fit, files that survive, and preferences that dispatch obeys."""

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmfast import info, nn, table
from mmfast.bench import cases, command, floor, models, peers, plots, report, tune
from mmfast.bench import measure as measuring
from mmfast.bench.contenders import AGAIN, EAGER, OURS, Bout, Contender
from mmfast.bench.measure import Row, Timing
from mmfast.dispatch import Op, asked

RATES = floor.Floor(1e11, {1 << 18: 5e10, 1 << 28: 1e10})
SMALL = cases.AdversarialCase("small", "lsgan", ((40, 128), (7,)))


def bout(mode="forward+backward", case=SMALL, seed=0) -> Bout:
    return Bout(case, mode, torch.float32, "cpu", seed)


def timed(bout: Bout, compute, rounds=6, **options) -> Row:
    """PyTorch and one contender that claims to be mmfast."""
    pytorch = bout.computation(bout.module)
    contenders = [Contender(EAGER, pytorch, bout.sets), Contender(AGAIN, pytorch, bout.sets)]
    contenders.append(Contender(OURS, compute, bout.sets))
    return measuring.measure(bout, RATES, contenders=contenders, rounds=rounds, seconds=0.2, memory=False, **options)


# what is measured


def test_an_honest_contender_is_timed(seed):
    match = bout(seed=seed)
    row = timed(match, match.computation(match.ours()))
    assert row.wrong == {}
    assert set(row.timings) == {EAGER, OURS}
    for t in row.timings.values():
        assert 0 < t.best <= t.low <= t.median <= t.high
        assert t.first > 0
        assert t.rounds >= 5
    assert row.noise >= 0
    assert row.ratio == row.timings[EAGER].low / row.timings[OURS].low
    assert row.floor == pytest.approx(3 * 2 * (40 * 128 + 7) * 4 / 5e10)
    assert row.chosen == "cpu"
    assert len(row.keys) == 1


def cheat_first_result(match: Bout):
    honest, kept = match.computation(match.ours()), []

    def compute(inputs):
        kept.append(honest(inputs)) if not kept else None
        return kept[0]

    return compute


def cheat_cached_by_address(match: Bout):
    honest, kept = match.computation(match.ours()), {}

    def compute(inputs):
        key = tuple(x.data_ptr() for x in inputs)
        if key not in kept:
            kept[key] = [x.detach().clone() for x in honest(inputs)]
        return kept[key]

    return compute


def cheat_unwritten(match: Bout):
    """Hands out memory in which the right numbers of the last honest call may still lie."""
    honest = match.computation(match.ours())
    seen = []

    def compute(inputs):
        if not seen:
            seen.append(True)
            return honest(inputs)
        results = [x.detach() for x in honest(inputs)]
        return [results[0], torch.empty_like(results[1]), *results[2:]]

    return compute


def cheat_unwritten_tail(match: Bout):
    """Writes all but the last value, into memory that torch gave it."""
    honest = match.computation(match.ours())

    def compute(inputs):
        loss, first, *rest = (x.detach() for x in honest(inputs))
        out = torch.empty_like(first)
        out.view(-1)[:-1] = first.view(-1)[:-1]
        return [loss, out, *rest]

    return compute


def cheat_lazy_when_timed(match: Bout):
    """Right twice, when it is checked, and after that only for every call that it guesses to be one."""
    honest, calls = match.computation(match.ours()), []

    def compute(inputs):
        calls.append(None)
        return honest(inputs) if len(calls) <= 2 else [torch.zeros_like(x) for x in (inputs[0].sum(), *inputs)]

    return compute


def cheat_half_precision(match: Bout):
    honest = match.computation(match.ours())
    return lambda inputs: [x.bfloat16().float() for x in honest(inputs)]


CHEATS = [
    cheat_first_result,
    cheat_cached_by_address,
    cheat_unwritten,
    cheat_unwritten_tail,
    cheat_lazy_when_timed,
    cheat_half_precision,
]


@pytest.mark.parametrize("cheat", CHEATS, ids=lambda cheat: cheat.__name__)
def test_a_cheat_gets_no_time(cheat, seed):
    match = bout(seed=seed)
    row = timed(match, cheat(match))
    assert OURS in row.wrong
    assert OURS not in row.timings
    assert EAGER in row.timings
    assert math.isnan(row.ratio)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: streams cannot be mistaken")
def test_work_beside_the_current_stream_gets_no_time(seed):
    match = Bout(SMALL, "forward+backward", torch.float32, "cuda", seed)
    honest, aside = match.computation(match.module), torch.cuda.Stream()

    def compute(inputs):
        with torch.cuda.stream(aside):
            return honest(inputs)

    row = timed(match, compute)
    assert OURS in row.wrong


def test_a_contender_that_raises_is_reported_with_its_reason(seed):
    def compute(inputs):
        raise RuntimeError("no such kernel\nsecond line")

    row = timed(bout(seed=seed), compute)
    assert row.wrong == {OURS: "does not run: RuntimeError: no such kernel"}


def test_inputs_are_rotated_beyond_the_cache():
    large = bout(case=cases.AdversarialCase("large", "lsgan", ((1_000_000,),)))
    assert sum(x.nbytes for inputs in large.sets for x in inputs) >= 60 << 20
    assert len({x.data_ptr() for inputs in large.sets for x in inputs}) == 2 * len(large.sets)
    assert len(bout().sets) == 64


def test_peak_memory_counts_what_a_call_takes():
    x = torch.randn(1 << 20)
    found = measuring.peak_memory(lambda: (x + 1) * 2, "cpu")
    if found is None:
        pytest.skip("this system does not tell a process its peak memory")
    assert found == pytest.approx(2 * x.nbytes, rel=0.2)


def test_new_memory_is_poisoned_only_while_checking():
    with measuring.poison():
        assert torch.empty(1000).isnan().all()
        assert torch.empty_like(torch.randn(10)).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def row_of(case="c", mode="forward", ours=1.0, eager=1.0, **others) -> Row:
    """A row made up of times in milliseconds."""
    timings = {"eager": eager, "mmfast": ours, **others}
    made = {name: Timing(*[ms / 1e3] * 4, 0.1, 4096, 30) for name, ms in timings.items()}
    return Row("rnn", case, mode, "float32", "cpu", 1, 0.5e-3, "cpu", 0.01, 1e6, 1e5, ["key"], made)


@pytest.mark.parametrize(
    ("ours", "eager", "slower"), [(1.0, 0.96, True), (1.0, 0.98, False), (0.010, 0.0085, False), (0.5, 1.0, False)]
)
def test_slower_is_below_97_percent_and_by_more_than_2_microseconds(ours, eager, slower):
    assert row_of(ours=ours, eager=eager).slower is slower


def test_the_rival_is_the_best_of_what_is_not_ours():
    row = row_of(ours=1.0, eager=3.0, compile=2.0, **{"mmfast cpu": 0.5})
    assert (row.rival, row.ratio, row.share) == ("compile", 2.0, 0.5)


def test_the_floor_is_the_longer_of_arithmetic_and_traffic():
    assert RATES.of(2e11, 1e6) == 2.0
    assert RATES.of(1.0, 1e10) == 1.0
    assert RATES.rate(1000) == RATES.rate(1 << 18) == 5e10
    assert floor.Floor(1.0, {1: 3.0, 10: 7.0}).rate(2) == 7.0, "a larger set is never served faster"
    better = RATES.or_better(floor.Floor(2e11, {1 << 18: 1.0, 1 << 28: 2e10}))
    assert better == floor.Floor(2e11, {1 << 18: 5e10, 1 << 28: 2e10})


def test_this_machine_has_rates():
    rates = floor.measure(torch.float32, "cpu")
    assert 1e8 < rates.flops < 1e14
    assert all(1e7 < rate < 1e13 for rate in rates.bandwidth.values())


# the list of cases


def test_every_representative_pattern_fits_exactly_one_case():
    for pattern in cases.REPRESENTATIVE:
        assert len(cases.matching([pattern])) == 1, pattern


@pytest.mark.parametrize("pattern", cases.REPRESENTATIVE_GPU)
def test_every_pattern_for_a_gpu_fits(pattern):
    assert cases.matching([pattern])


@pytest.mark.parametrize("case", cases.cases(), ids=lambda case: case.name)
def test_a_shrunk_case_runs_and_is_no_larger(case):
    small = case.shrunk(2, 4, 8)
    generator = torch.Generator().manual_seed(1)
    inputs = small.inputs(generator, torch.float32, "cpu")
    states = small.initial(generator, torch.float32, "cpu")
    outputs = small.outputs(small.build(torch.nn), *inputs, *states)
    assert all(y.isfinite().all() for y in outputs.values())
    assert small.work(torch.float32).bytes <= case.work(torch.float32).bytes


def test_a_shape_makes_three_layers():
    found = cases.from_shape("T128,B64,I100,H32,L2")
    assert [case.mode for case in found] == ["RNN", "GRU", "LSTM"]
    assert found[2] == cases.RnnCase("shape", "LSTM", 128, 64, 100, 32, 2)
    for wrong in ("T128,B64", "T1,B1,I1,H0", "T1,B1,I1,Hx", "T1,B1,I1,H1,Q2"):
        with pytest.raises(ValueError, match="expected steps, batch"):
            cases.from_shape(wrong)


# whole models

#: millions of weights, as published: generator, discriminator
WEIGHTS = {"dcgan": (3.58, 2.77), "pix2pix": (54.41, 2.77), "hifigan": (13.94, 70.73)}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_model_has_its_published_number_of_weights(name):
    with torch.device("meta"):
        model = models.MODELS[name].build(torch.nn)
    found = [sum(w.numel() for w in net.parameters()) / 1e6 for net in (model.generator, model.discriminator)]
    assert found == pytest.approx(WEIGHTS[name], abs=0.01)


SMALL_MODELS = {
    "dcgan": ((2, 100, 1, 1), (2, 3, 64, 64)),
    "encodec": ((1, 1, 2560), (1, 1, 2560)),
}


@pytest.mark.parametrize("name", [*SMALL_MODELS, "emoji"])
def test_a_step_with_mmfast_is_pytorchs_step(name, seed):
    case = models.MODELS[name]
    case = replace(case, batch=4) if name == "emoji" else replace(case, shapes=SMALL_MODELS[name])
    match = bout(cases.STEP, case, seed)
    # where it is slower, as on a busy machine, it is timed in five times the rounds
    row = timed(match, match.computation(match.ours()), rounds=1)
    assert row.wrong == {}
    assert row.mode == "training step"
    assert math.isnan(row.floor)


def test_a_model_may_be_off_by_a_kink_and_by_no_more(seed):
    exact = torch.randn(5000, dtype=torch.float64)
    yardstick = exact.float()
    kinked = exact.float() + 0.005 * torch.randn(5000).clamp(-3, 3)
    assert "max error" in measuring.disagreement("x", kinked, yardstick, exact, measuring.MODEL_SLACK)
    assert not measuring.disagreement("x", kinked, yardstick, exact, measuring.MODEL_SLACK, measuring.KINKS)
    wrong = exact.float() * 1.02
    assert "error" in measuring.disagreement("x", wrong, yardstick, exact, measuring.MODEL_SLACK, measuring.KINKS)


class _Jumping:
    """A bout whose PyTorch is off by a share of the truth where its weights are moved by one rounding."""

    case = models.MODELS["dcgan"]

    def __init__(self, seed, share):
        self.exact = torch.randn(5000, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        self.share = share

    def truth(self, i):
        nothing = torch.full((5,), 1e-17, dtype=torch.float64)
        exact = [self.exact, self.exact, nothing]
        return [x.float() for x in exact], exact

    def near_misses(self, i):
        """A jump in another result than the one that is asked about, and noise in the one that is 0."""
        plain = self.exact.float()
        return [
            [plain, plain, torch.full((5,), 1e-8)],
            [plain, (self.exact * (1 + self.share)).float(), torch.zeros(5)],
        ]


@pytest.mark.parametrize(("off", "jump", "passes"), [(0.05, 0.04, True), (0.05, 0.03, False), (0.05, 0, False)])
def test_a_model_may_be_off_by_what_pytorch_is_off_from_weights_one_rounding_away(seed, off, jump, passes):
    jumping = _Jumping(seed, jump)
    (plain, _, zeros), _ = jumping.truth(0)
    complaint = measuring._complaint(jumping, 0, [(jumping.exact * (1 + off)).float(), plain, zeros])
    assert (complaint == "") == passes


def test_near_misses_are_pytorchs_steps_from_weights_one_rounding_away(seed):
    match = bout(cases.STEP, replace(models.MODELS["dcgan"], shapes=SMALL_MODELS["dcgan"]), seed)
    (plain, _), misses = match.truth(0), match.near_misses(0)
    assert len(misses) > 1
    for miss in misses:
        assert [x.shape for x in miss] == [x.shape for x in plain]
        assert not all(torch.equal(a, b) for a, b in zip(plain, miss, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(misses[0], misses[1], strict=True))


def test_a_step_leaves_the_weights_as_they_were(seed):
    match = bout(cases.STEP, replace(models.MODELS["dcgan"], shapes=SMALL_MODELS["dcgan"]), seed)
    before = [w.detach().clone() for w in match.module.parameters()]
    match.computation(match.module)(match.sets[0])
    assert all(map(torch.equal, before, match.module.parameters()))


def test_a_users_own_model_is_found_from_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def build(): return torch.nn.GRU(3, 5)\n"
        "def sample(): return torch.randn(4, 2, 3)\n"
        "def number(): return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    case = models.from_name("mine:build", "mine:sample")
    match = bout("forward+backward", case)
    assert [len(match.sets[0]), len(match.computation(match.ours())(match.sets[0]))] == [1, 6]
    for name, given, sentence in (
        ("mine:number", "mine:sample", "gave a int; expected a torch.nn.Module"),
        ("mine:build", "mine:number", "gave int; expected a tensor"),
        ("mine:build", None, "needs --input"),
        ("mine:nothing", "mine:sample", "cannot be loaded"),
        ("nowhere:build", "mine:sample", "cannot be loaded"),
        ("vgg", None, "unknown model 'vgg'; accepted: dcgan"),
    ):
        with pytest.raises(ValueError, match=sentence):
            models.from_name(name, given)


# reports


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.234e-6, "1.23 us"), (999.4e-6, "999 us"), (999.6e-6, "1.00 ms"), (0.0999, "99.9 ms"), (12.3, "12.3 s")],
)
def test_a_duration_has_three_digits(seconds, text):
    assert report.duration(seconds) == text


def test_a_table_fits_100_columns_and_ends_with_the_mean_and_the_worst():
    long = "cyclegan-256to128-k3s2p1-at64x64-B1-InstanceNorm-ReLU"
    rows = [
        row_of(long, "forward", 1.0, 2.0, compile=3.0, **{"mmfast triton": 900.0, "mmfast cuda": 0.1234}),
        row_of(long, "forward+backward", 1.0, 0.5),
        row_of("other", "double backward", 0.1, 0.8),
    ]
    rows[1].wrong["mmfast cuda"] = "result 0: " + "the max error is large " * 12
    found = list(report.lines(rows))
    texts = [text for text, _ in found]
    assert max(map(len, texts)) <= 100
    assert texts[-2].startswith("geometric mean 2.00x (forward 2.00x, fwd + bwd 0.50x, double bwd 8.00x)")
    assert texts[-1] == f"worst 0.50x: {long}, fwd + bwd; slower in 1 of 3"
    styles = {text.split()[0]: style for text, style in found if text.startswith(" ") and "floor%" not in text}
    assert (styles["forward"], styles["fwd"], styles["double"]) == ("green", "red", "green")
    assert any("wrong" in text for text in texts)


def test_json_keeps_everything(tmp_path):
    rows = [row_of("a"), row_of("b", "double backward", 2.0, 1.0)]
    rows[1].floor = rows[1].flops = rows[1].bytes = math.nan
    path = tmp_path / "r.json"
    report.write_json(path, rows, "cpu", complete=True)
    content = json.loads(path.read_text())
    assert content["complete"] is True
    assert content["environment"]["torch"] == torch.__version__
    assert content["rows"][1]["floor"] is None
    back = report.read_json(path)
    assert back[0] == rows[0]
    assert math.isnan(back[1].floor)
    path.write_text("{}")
    with pytest.raises(ValueError, match="is no result of mmfast bench"):
        report.read_json(path)


def test_csv_replaces_what_was_measured_before(tmp_path):
    path = tmp_path / "r.csv"
    report.write_csv(path, [row_of("a"), row_of("b")], "cpu")
    report.write_csv(path, [row_of("b", ours=0.25)], "cpu")
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["case"], line["provider"]) for line in lines] == [
        (case, provider) for case in "ab" for provider in ("eager", "mmfast")
    ]
    assert lines[3]["low_us"] == "250.00"
    assert lines[3]["ratio_to_best_rival"] == "4.000"
    assert lines[3]["backend"] == "cpu"
    assert not list(tmp_path.glob("*.unfinished"))


def test_a_comparison_fails_on_a_single_slower_case():
    base = [row_of("a"), row_of("b"), row_of("c")]
    lines, fine = report.compare([row_of("a"), row_of("b", ours=1.05), row_of("new", ours=9.0)], base, 1.1)
    assert fine
    assert len(lines) == 3
    lines, fine = report.compare([row_of("a"), row_of("b", ours=1.2)], base, 1.1)
    assert not fine
    assert sum("slower" in text for text, _ in lines) == 1
    assert max(len(text) for text, _ in lines) <= 100
    _, fine = report.compare([row_of("b", ours=1.2, eager=1.2)], base, 1.1)
    assert fine, "a machine that is busier slows PyTorch, too"


def test_a_comparison_with_nothing_in_common_fails():
    lines, fine = report.compare([row_of()], [row_of("another")], 1.1)
    assert not fine
    assert "holds none of these cases" in lines[0][0]


def test_peers_that_are_not_there_are_named(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install onnx onnxruntime"):
        peers.installed()


def test_pictures_are_drawn(tmp_path):
    rows = [row_of(mode=mode, ours=0.5) for mode in ("forward", "forward+backward")]
    rows += [row_of("d", "double backward", 2.0)]
    rows[2].flops = rows[2].bytes = math.nan
    rows += [row_of(case.name, ours=case.steps / 100) for case in cases.scaling()]
    for name, magic in (("p.png", b"\x89PNG"), ("p.svg", b"<?xml")):
        plots.draw(tmp_path / name, rows, RATES, "title")
        assert (tmp_path / name).read_bytes().startswith(magic)
    text = (tmp_path / "p.svg").read_text()
    for word in ("Speed-up", "Roofline", "Scaling", "time steps", "hidden size"):
        assert f"<!-- {word}" in text
    with pytest.raises(ValueError, match=r"must end in \.png or \.svg"):
        plots.check(Path("p.jpg"))


# the preference table


@pytest.fixture
def own_table(tmp_path, monkeypatch):
    """A table of this test's own; ops forget what they chose by it."""
    path = tmp_path / "folder" / "table.json"
    monkeypatch.setattr(table.config, "TABLE", str(path))
    monkeypatch.setattr(table.config, "BACKEND", None)
    forget()
    yield path
    monkeypatch.undo()
    forget()


def forget():
    table._read.cache_clear()
    for op in Op.registry.values():
        op.forget()


def loss_choice():
    """(op, case) of the adversarial loss of float32 logits."""
    [choice] = asked(lambda: nn.AdversarialLoss().generator(torch.randn(3)))
    return choice


def test_tuning_prefers_the_backend_that_never_lost():
    rows = [row_of("a", ours=1.0, **{"mmfast cpu": 0.5, "mmfast x": 0.1}) for _ in range(2)]
    assert tune.preferences(rows) == {"key": table.Preference("x", 10.0)}
    rows[1].timings["mmfast x"] = Timing(*[1.2e-3] * 4, 0.1)
    assert tune.preferences(rows) == {"key": table.Preference("cpu", 2.0)}
    del rows[1].timings["mmfast cpu"]
    assert tune.preferences(rows) == {"key": table.Preference("torch", 1.0)}


def test_dispatch_reads_the_table_and_only_its_own_machines(own_table):
    op, case = loss_choice()
    assert op.select(case) == "cpu"
    row = row_of()
    row.keys = [table.key(op.name, case, torch.get_num_threads())]
    assert tune.save([row], "cpu") == (own_table, {row.keys[0]: table.Preference("torch", 1.0)})
    assert op.select(case) == "torch"
    assert "measured here" in op.explain(case).reason
    assert op.select(case, "cpu") == "cpu", "an explicit choice comes first"
    assert "1 rows for this machine" in info.collect()["software"]["preference table"]
    torch.set_num_threads(2)
    assert op.select(case) == "cpu", "measured with another number of threads"
    torch.set_num_threads(1)
    content = json.loads(own_table.read_text())
    [machine] = content["machines"]
    assert torch.__version__ in machine
    own_table.write_text(json.dumps({"format": 1, "machines": {"another": content["machines"][machine]}}))
    forget()
    assert op.select(case) == "cpu"


def test_a_backend_that_the_table_names_and_that_cannot_is_not_taken(own_table):
    op, case = loss_choice()
    table.save("cpu", {table.key(op.name, case, torch.get_num_threads()): table.Preference("unheard of", 9.0)})
    forget()
    assert op.select(case) == "cpu"


def test_a_broken_table_is_named_where_it_is_used(own_table):
    own_table.parent.mkdir()
    own_table.write_text("{")
    forget()
    with pytest.raises(ValueError, match=r"table\.json is no preference table"):
        loss_choice()


# the command


def bench(*words, **options) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MMFAST_TABLE": str(options.pop("table", "")),
        "COLUMNS": "170",
    }
    return subprocess.run(
        [sys.executable, "-m", "mmfast", "bench", *words], capture_output=True, text=True, env=environment, **options
    )


QUICK = ("--cases", "dcgan-lsgan*", "--compile", "none", "--rounds", "5")


def test_the_command_measures_writes_tunes_and_compares(tmp_path):
    words = (*QUICK, "--json", "r.json", "--csv", "r.csv", "--markdown", "r.md", "--plot", "r.png", "--tune")
    done = bench(*words, cwd=tmp_path, table=tmp_path / "table.json")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(len(line) for line in lines if line != str(tmp_path / "table.json")) <= 100
    assert "\x1b" not in done.stdout
    assert "dcgan-lsgan-1x64  [cpu]" in lines
    assert any(re.match(r"geometric mean \d+\.\d\dx \(forward", line) for line in lines)
    rows = report.read_json(tmp_path / "r.json")
    assert [row.mode for row in rows] == list(cases.PASSES)
    assert all({"eager", "mmfast", "mmfast cpu"} == set(row.timings) for row in rows)
    assert (tmp_path / "r.md").read_text().count("| dcgan-lsgan-1x64 | cpu |") == 3
    assert (tmp_path / "r.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "table.json").read_text())["machines"]
    content = json.loads((tmp_path / "r.json").read_text())
    for row in content["rows"]:
        row["timings"]["mmfast"]["low"] /= 1000
    (tmp_path / "fast.json").write_text(json.dumps(content))
    assert bench(*QUICK, "--base", "fast.json", cwd=tmp_path).returncode == 1


def test_interrupted_it_keeps_what_it_measured(tmp_path):
    words = ("adversarial", "--cases", "*", "--compile", "none", "--json", "r.json")
    process = subprocess.Popen(
        [sys.executable, "-m", "mmfast", "bench", *words],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # a shell's background jobs ignore Ctrl-C, and so would this one if the tests are such a job
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    path, deadline = tmp_path / "r.json", time.monotonic() + 100
    while not path.exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert "interrupted after" in output
    content = json.loads(path.read_text())
    assert content["complete"] is False
    assert content["rows"][0]["case"] == "dcgan-non-saturating-1x64"
    assert "dcgan-non-saturating-1x64" in output


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["rnns"], "unknown op 'rnns'; accepted: "),
        (["--cases", "nothing-*"], "no case fits nothing-*; mmfast bench --list shows all"),
        (["--modes", "backward"], "--modes backward: expected some of forward"),
        (["--threads", "0"], "--threads 0: expected at least 1"),
        (["--base", "nowhere.json"], "nowhere.json is no result of mmfast bench --json"),
        (["--plot", "x.jpg"], "the name must end in .png or .svg"),
        (["--shape", "T1"], "shape 'T1'; expected steps"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_option_is_one_line(words, sentence, capsys):
    from mmfast import cli

    assert cli.main(["bench", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mmfast bench: ")
    assert sentence in error
    assert error.count("\n") == 1


def test_the_list_names_every_case(capsys):
    from mmfast import cli

    assert cli.main(["bench", "--list"]) == 0
    output = capsys.readouterr().out
    assert all(case.name in output for case in cases.cases())
    assert output.count("(by default)") == len(
        cases.matching(cases.REPRESENTATIVE if not torch.cuda.is_available() else cases.REPRESENTATIVE_GPU)
    )


def test_by_default_few_cases_go_to_second_order():
    import argparse

    parser = argparse.ArgumentParser()
    command.add_bench_arguments(parser)
    plan = command._plan(parser.parse_args([]))
    assert sum(mode == "double backward" for _, mode in plan.bouts) == 3
    assert {case.op for case, _ in plan.bouts} == set(cases.OPS)


# the numbers that README quotes

ROOT = Path(__file__).parent.parent


def readme_numbers():
    """benchmarks/readme_numbers.py as a module."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("readme_numbers", ROOT / "benchmarks" / "readme_numbers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readmes_numbers_are_those_of_the_results():
    script = readme_numbers()
    readme = (ROOT / "README.md").read_text()
    assert script.updated(readme) == readme, "run python benchmarks/readme_numbers.py"


def test_other_results_make_other_numbers(tmp_path, monkeypatch):
    script = readme_numbers()
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    rows = [row_of("layer-x", "forward+backward", ours=0.5), row_of("layer-x", ours=1.0), row_of("layer-y", ours=2.0)]
    report.write_csv(tmp_path / "bench-x.csv", rows, "cpu")
    text = script.updated(f"a\n{script.BEGIN}\nold\n{script.END}\nb\n")
    assert "| layer-x | 1.00 ms | 500 us | 2.00x | cpu |" in text
    assert "| layer-y" not in text, "the table shows training alone"
    assert "- recurrent: forward 0.71x, forward+backward 2.00x on the geometric mean; worst 0.50x (layer-y)" in text
    assert "old" not in text
    assert (text[:2], text[-3:]) == ("a\n", "\nb\n")
    with pytest.raises(ValueError, match="has no <!-- numbers -->"):
        script.updated("a\n")
