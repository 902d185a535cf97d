"""The adversarial losses' modes and presets, feature matching and LeCam against transcriptions of their formulas."""

import ast
import copy
import inspect
import os
import re

import pytest
import torch
from published import PRESETS, PUBLISHED, bce, mean_of, total
from torch import Tensor
from torch.nn import functional as F

import mmfast
from mmfast import native, nn
from mmfast.ops import portable
from mmfast.ops.adversarial.equations import MODES

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["triton"] if INTERPRETED else ["torch", "cpu", "cuda"]
GPU_BACKENDS = ["triton"] if INTERPRETED else ["cuda"]
DEVICES = ["cuda", "cpu"] if torch.cuda.is_available() and not INTERPRETED else ["cpu"]

# more than one chunk of a kernel's
LONG = 1031 if INTERPRETED else 4099
SHAPES = {"one": [(7,)], "patches": [(5, 1, 6, 6)], "ragged": [(5, 1, 30), (5, 1, 7), (5, LONG), (5, 1)]}


def draw(seed: int, dtype: torch.dtype, shapes, scale: float = 2.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator) * scale).to(dtype) for shape in shapes]


def gradients(out: Tensor, inputs: list[Tensor], cotangent: float = 1.5) -> list[Tensor]:
    return list(torch.autograd.grad(out, inputs, torch.full_like(out, cotangent), materialize_grads=True))


def compare(ours, published, real: list[Tensor], fake: list[Tensor], tolerance: float = 2e-5) -> None:
    """Value and gradients of `ours` on these logits against `published` in float64."""
    real, fake = ([x.requires_grad_() for x in tensors] for tensors in (real, fake))
    exact = [[x.detach().double().requires_grad_() for x in tensors] for tensors in (real, fake)]
    out, expected = ours(real, fake), published(*exact)
    assert out.dtype == real[0].dtype
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(out.detach().double(), expected.detach(), **close)
    found = [g.double() for g in gradients(out, [*real, *fake])]
    torch.testing.assert_close(found, gradients(expected, [*exact[0], *exact[1]]), **close)


def test_every_mode_is_transcribed():
    assert list(PUBLISHED) == list(MODES)


def keep_off_kinks(logits: list[Tensor], others: list[Tensor]) -> None:
    """Moves what lies within rounding of 1 from the others' mean, where hinge has either of two slopes, from there."""
    for x, other in zip(logits, others, strict=True):
        distance = (x.double() - other.double().mean()).abs()
        x[(distance - 1).abs() < 1e-5] += 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_is_the_published_formula(seed, mode, shapes, backend):
    loss = nn.AdversarialLoss(mode, 0.7, generator_scale=1.3, backend=backend)
    real, fake = (draw(s, torch.float32, SHAPES[shapes]) for s in (seed, seed + 1))
    if mode == "relativistic-average-hinge":
        keep_off_kinks(real, fake)
        keep_off_kinks(fake, real)
    discriminator, generator = PUBLISHED[mode]
    compare(loss.discriminator, lambda r, f: 0.7 * total(discriminator, r, f), real, fake)
    compare(lambda r, f: loss.generator(f, r), lambda r, f: 1.3 * total(generator, r, f), real, fake)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=["f16", "bf16", "f64"])
@pytest.mark.parametrize("mode", ["relativistic", "relativistic-average", "relativistic-average-lsgan", "leaky-lsgan"])
def test_modes_in_other_dtypes(seed, mode, dtype):
    real, fake = (draw(s, dtype, SHAPES["ragged"]) for s in (seed, seed + 1))
    loss = nn.AdversarialLoss(mode, backend="cpu")
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
    compare(loss.discriminator, lambda r, f: total(PUBLISHED[mode][0], r, f), real, fake, tolerance)


def check_orders(out, logits: list[Tensor]) -> None:
    """First and second order against differences; a gradient to be differentiated is the one that is not."""
    once = torch.autograd.grad(out(*logits), logits)
    again = torch.autograd.grad(out(*logits), logits, create_graph=True)
    torch.testing.assert_close([g.detach() for g in again], list(once))
    assert torch.autograd.gradcheck(out, logits)
    assert torch.autograd.gradgradcheck(out, logits)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
@pytest.mark.parametrize("mode", [mode for mode in MODES if MODES[mode].pairing or mode == "leaky-lsgan"])
def test_second_order_of_modes_that_compare(seed, mode, backend):
    loss = nn.AdversarialLoss(mode, backend=backend)
    real, fake = (draw(s, torch.float64, [(4,), (2, 3)]) for s in (seed, seed + 1))
    logits = [x.requires_grad_() for x in (*real, *fake)]
    check_orders(lambda *logits: loss.discriminator(logits[:2], logits[2:]), logits)
    if MODES[mode].pairing:
        check_orders(lambda *logits: loss.generator(logits[2:], logits[:2]), logits)


def second_order_cases():
    f, w = mmfast.functional, torch.rand(3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return {
        "smoothed": lambda r, g, b: f.adversarial_discriminator_loss(r, g, smoothing=(0.1, 0.2), backend=b),
        "weighted averages": lambda r, g, b: f.adversarial_generator_loss(
            g, r, "relativistic-average", real_weight=w, fake_weight=2 * w, backend=b
        ),
        "weighted pairs": lambda r, g, b: f.adversarial_generator_loss(g, r, "relativistic", real_weight=w, backend=b),
        "matching": lambda r, g, b: f.matching_discriminator_loss(r, g, r * g, "lsgan", real_weight=w, backend=b),
        "lecam": lambda r, g, b: f.lecam_penalty(r, g, w[0], w[1], fake_weight=w, backend=b),
        "l1": lambda r, g, b: f.feature_matching([r, g], [g, r * r], detach=False, sample_weight=w, backend=b),
        "l2": lambda r, g, b: f.feature_matching([[r], [r]], [[g], [g]], distance="l2", detach=False, backend=b),
        "relative": lambda r, g, b: f.feature_matching(r.detach(), g * r, relative=True, across="mean", backend=b),
        "unreduced": lambda r, g, b: sum(
            x.sum() for x in f.adversarial_discriminator_loss(r, g, "minimax", reduction="none")
        ),
    }


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
@pytest.mark.parametrize("name", second_order_cases())
def test_second_order_of_other_losses(seed, name, backend):
    if name == "relative":
        # the real side that divides is held constant
        (real,), case = draw(seed, torch.float64, [(3, 2)]), second_order_cases()[name]
        logits = [x.requires_grad_() for x in draw(seed + 1, torch.float64, [(3, 2)])]

        def out(g: Tensor) -> Tensor:
            return case(real, g, backend)
    else:
        logits = [x.requires_grad_() for x in draw(seed, torch.float64, [(3, 2), (3, 2)])]

        def out(r: Tensor, g: Tensor) -> Tensor:
            return second_order_cases()[name](r, g, backend)

    check_orders(out, logits)


@pytest.fixture
def launches(monkeypatch):
    """How many kernels the emulator, or in its interpreter Triton, has launched."""
    if not INTERPRETED:
        return native.emulator_launches
    launched = []

    class Counted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            launched.append(grid)
            return self.kernel[grid]

        def __call__(self, *args):
            # one kernel from within another is no launch
            return self.kernel(*args)

    for name in [name for name in vars(triton_kernels()) if name.endswith("_kernel")]:
        monkeypatch.setattr(triton_kernels(), name, Counted(getattr(triton_kernels(), name)))
    return lambda: len(launched)


def triton_kernels():
    return portable.kernels("mmfast.ops.adversarial")[0]


# a program takes the interpreter milliseconds
LISTS = [(mode, count) for mode in MODES for count in ([1, 9] if INTERPRETED else [1, 5, 150])]
LISTS += [("lsgan", 40)] * INTERPRETED


@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize(("mode", "count"), LISTS)
def test_launches_of_a_list(seed, mode, count, backend, launches):
    """At most two launches forward and one backward, whatever the list's length; its value is the formula's."""
    real, fake = (
        [x.requires_grad_() for x in draw(s, torch.float32, [(2, 1 + 7 * k % 50) for k in range(count)])]
        for s in (seed, seed + 1)
    )
    counts = [launches()]
    loss = nn.AdversarialLoss(mode, across="mean", backend=backend).discriminator(real, fake)
    counts.append(launches())
    found = gradients(loss, [*real, *fake])
    counts.append(launches())
    assert counts[1] - counts[0] == 2
    assert counts[2] - counts[1] == 1
    expected = mean_of(PUBLISHED[mode][0])(real, fake)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, gradients(expected, [*real, *fake]))


# tensors, and the groups that their terms, two each, go in forward and backward
CAPTURED = [("hinge", 256, 1, 1), ("hinge", 1000, 2, 3)]
CAPTURED += [("relativistic-average", 256, 1, 1), ("relativistic-average", 1000, 3, 4)]
if INTERPRETED:
    # each of Triton's groups is at most 40 terms; its means are a forward of their own
    CAPTURED = [("hinge", 20, 1, 1), ("hinge", 21, 2, 2), ("relativistic-average", 21, 4, 2)]


@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize(("mode", "count", "forward", "backward"), CAPTURED)
def test_a_long_list_while_its_stream_is_captured(seed, mode, count, forward, backward, backend, launches, monkeypatch):
    """Then no table is copied from the host: 512 terms (Triton: 40) go by value, in as many launches as a shorter
    list, a longer one in groups, each of as many launches. The result is the same."""
    real, fake = (
        [x.requires_grad_() for x in draw(s, torch.float32, [(2, 1 + 7 * k % 50) for k in range(count)])]
        for s in (seed, seed + 1)
    )
    loss = nn.AdversarialLoss(mode, backend=backend)
    expected = loss.discriminator(real, fake)
    at_once = gradients(expected, [*real, *fake])
    if INTERPRETED:
        monkeypatch.setattr(triton_kernels(), "is_captured", lambda x: True)
    else:
        _capture(monkeypatch)
    before = launches()
    found = loss.discriminator(real, fake)
    after = launches()
    repeated = gradients(found, [*real, *fake])
    if INTERPRETED:
        # one after the other its groups are added up, and for means it multiplies by 1 / n: of a list it does neither
        torch.testing.assert_close([found, *repeated], [expected, *at_once])
    else:
        assert torch.equal(found, expected)
        assert all(map(torch.equal, repeated, at_once))
    assert (after - before, launches() - after) == (2 * forward, backward)


def _capture(monkeypatch):
    emulator = native.library("_emulator")

    class Capturing:
        # the emulator takes a stream of this address for one that is captured
        def __getattr__(self, name):
            found = getattr(emulator, name)
            return (lambda *arguments: found(*arguments[:-1], 1)) if name.startswith("cuda_") else found

    monkeypatch.setattr(native, "library", lambda name="_C": Capturing() if name == "_emulator" else None)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_launches_of_feature_matching(seed, backend, launches):
    real, fake = (
        draw(s, torch.float32, [(2, 1 + 7 * k % 50) for k in range(20 if INTERPRETED else 100)])
        for s in (seed, seed + 1)
    )
    fake = [x.requires_grad_() for x in fake]
    before = launches()
    loss = nn.FeatureMatchingLoss(backend=backend)(real, fake)
    after = launches()
    found = gradients(loss, fake)
    assert (after - before, launches() - after) == (2, 1)
    torch.testing.assert_close(found, gradients(FEATURES["dac"](real, fake), fake))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("smoothing", [0.1, (0.1, 0.2), (0.0, 0.3), -0.2, [0.1, -0.3]], ids=str)
def test_label_smoothing(seed, smoothing, backend):
    below, above = (smoothing, 0.0) if isinstance(smoothing, float) else smoothing
    shapes = SHAPES["ragged"]
    real, fake = (draw(s, torch.float32, shapes) for s in (seed, seed + 1))
    loss = nn.AdversarialLoss("minimax", smoothing=smoothing, backend=backend)
    compare(loss.discriminator, lambda r, f: total(lambda r, f: bce(r, 1 - below) + bce(f, above), r, f), real, fake)
    loss = nn.AdversarialLoss("lsgan", smoothing=smoothing, backend=backend)

    def squares(r, f):
        return ((r - (1 - below)) ** 2).mean() + ((f - above) ** 2).mean()

    compare(loss.discriminator, lambda r, f: total(squares, r, f), real, fake)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_its_program_s_loss(seed, name, backend):
    # a program takes the interpreter milliseconds
    shapes = SHAPES["ragged"][1::2] if INTERPRETED else SHAPES["ragged"]
    real, fake = (draw(s, torch.float32, shapes) for s in (seed, seed + 1))
    loss = nn.AdversarialLoss.preset(name, backend=backend)
    compare(loss.discriminator, PRESETS[name][0], real, fake)
    compare(lambda r, f: loss.generator(f, r), PRESETS[name][1], real, fake)


def test_the_presets_are_those_tested():
    with pytest.raises(ValueError, match="no preset 'gan'; it has: ") as error:
        nn.AdversarialLoss.preset("gan")
    assert str(error.value).partition("has: ")[2] == ", ".join(map(repr, PRESETS))
    assert nn.AdversarialLoss.preset("hifigan", scale=3.0).generator_scale == 3.0


@pytest.mark.parametrize(
    ("module", "names", "sides"),
    [
        (nn.AdversarialLoss, PRESETS, [("criterion", "discriminator"), ("criterion", "generator")]),
        (nn.FeatureMatchingLoss, ["hifigan", "dac", "audiocraft", "encodec"], [("features", None)]),
    ],
)
def test_each_preset_s_lines_are_documented(module, names, sides):
    """In the order of the presets, and they are Python that calls what the preset is named in the text."""
    text = inspect.getdoc(module.preset)
    sections = re.split(r'^"(\w+)"', text, flags=re.MULTILINE)[1:]
    assert sections[::2] == list(names)
    for section in sections[1::2]:
        # a line with a call is the assignment that replaces the program's
        lines = [line for line in re.findall("`([^`]+)`", section) if re.search(r"= .*\b(criterion|features)\b", line)]
        called = [
            (node.func.value.id, node.func.attr) if isinstance(node.func, ast.Attribute) else (node.func.id, None)
            for line in lines
            for node in ast.walk(ast.parse(line))
            if isinstance(node, ast.Call)
        ]
        assert [call for call in called if call[0] in ("criterion", "features")] == sides


MAPS = [[(2, 8, 33), (2, 16, 11, 2)], [(2, LONG)], [(2, 3), (2, 5), (2, 1, 7)]]


def nested(seed: int, dtype=torch.float32) -> list[list[Tensor]]:
    flat = iter(draw(seed, dtype, [shape for shapes in MAPS for shape in shapes]))
    return [[next(flat) for _ in shapes] for shapes in MAPS]


def joined(lists: list[list[Tensor]]) -> list[Tensor]:
    return [x for tensors in lists for x in tensors]


def nest(flat: list[Tensor]) -> list[list[Tensor]]:
    rest = iter(flat)
    return [[next(rest) for _ in shapes] for shapes in MAPS]


def audiocraft_maps(real, fake):
    loss = 0
    for maps_real, maps_fake in zip(nest(real), nest(fake), strict=True):
        loss = loss + sum(F.l1_loss(f, r) for r, f in zip(maps_real, maps_fake, strict=True)) / len(maps_real)
    return loss / len(MAPS)


def encodec_maps(real, fake):
    loss = 0
    for maps_real, maps_fake in zip(nest(real), nest(fake), strict=True):
        pairs = zip(maps_real, maps_fake, strict=True)
        loss = loss + sum((r.detach() - f).abs().mean() / r.detach().abs().mean() for r, f in pairs) / len(maps_real)
    return loss / len(MAPS)


FEATURES = {
    "hifigan": lambda real, fake: 2 * total(lambda r, f: torch.mean(torch.abs(r - f)), real, fake),
    "dac": lambda real, fake: total(lambda r, f: F.l1_loss(f, r.detach()), real, fake),
    "audiocraft": audiocraft_maps,
    "encodec": encodec_maps,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FEATURES)
def test_feature_matching_is_its_program_s(seed, name, backend):
    real, fake = (joined(nested(s)) for s in (seed, seed + 1))
    loss = nn.FeatureMatchingLoss.preset(name, backend=backend)
    compare(lambda r, f: loss(nest(r), nest(f)), FEATURES[name], real, fake)


@pytest.mark.parametrize("backend", BACKENDS)
def test_feature_matching_options(seed, backend):
    real, fake = (joined(nested(s)) for s in (seed, seed + 1))
    weights = [0.5 + k for k in range(6)]

    def ours(r, f):
        return mmfast.functional.feature_matching(
            r, f, distance="l2", scale=0.1, weights=weights, detach=False, backend=backend
        )

    def squares(r, f):
        return 0.1 * sum(w * F.mse_loss(f, r) for w, r, f in zip(weights, r, f, strict=True))

    compare(ours, squares, real, fake)
    out, values = mmfast.functional.feature_matching(real, fake, return_values=True, backend=backend)
    expected = [F.l1_loss(f, r).detach() for r, f in zip(real, fake, strict=True)]
    torch.testing.assert_close(values, torch.stack(expected), rtol=1e-5, atol=0)
    torch.testing.assert_close(values.sum(), out.detach(), rtol=1e-5, atol=0)


def test_a_factor_for_each_map_by_the_module(seed):
    real, fake = (nested(s) for s in (seed, seed + 1))
    weights = [0.5 + k for k in range(6)]
    loss = nn.FeatureMatchingLoss(across="mean", weights=weights)
    expected = mmfast.functional.feature_matching(real, fake, across="mean", weights=weights)
    assert torch.equal(loss(real, fake), expected)
    assert expected != mmfast.functional.feature_matching(real, fake, across="mean")


def test_a_list_without_maps():
    """It adds nothing to a sum, and has no mean, as in programs that divide by the number of its maps."""
    real, fake = [[torch.ones(2)], []], [[torch.zeros(2)], []]
    assert mmfast.functional.feature_matching(real, fake) == 1
    with pytest.raises(ValueError, match="the maps hold an empty list, which has no mean"):
        mmfast.functional.feature_matching(real, fake, across="mean")


SHOWN = {
    "'hinge', scale=1.0": nn.AdversarialLoss("hinge"),
    "'lsgan', scale=0.5, generator_scale=1.0": nn.AdversarialLoss.preset("cyclegan"),
    "'minimax', scale=1.0, smoothing=(0.1, 0.2), reduction='sum', across='mean'": nn.AdversarialLoss(
        "minimax", smoothing=(0.1, 0.2), reduction="sum", across="mean"
    ),
    "'l1', scale=1.0, across='mean', relative=True": nn.FeatureMatchingLoss.preset("encodec"),
    "'l2', scale=2.0, weights=[1, 2], detach=False": nn.FeatureMatchingLoss("l2", 2.0, weights=[1, 2], detach=False),
}


@pytest.mark.parametrize("shown", SHOWN)
def test_what_a_loss_shows_of_itself(shown):
    assert repr(SHOWN[shown]) == f"{type(SHOWN[shown]).__name__}({shown})"


def test_maps_of_any_layout(seed):
    real, fake = draw(seed, torch.float32, [(2, 5, 6, 7), (2, 5, 6, 7)])
    layouts = [
        real,
        real.contiguous(memory_format=torch.channels_last),
        real.transpose(1, 2).contiguous().transpose(1, 2),
    ]
    for r in layouts:
        for f in (fake, fake.contiguous(memory_format=torch.channels_last)):
            leaf = f.detach().requires_grad_()
            out = mmfast.functional.feature_matching(r, leaf, backend="cpu")
            torch.testing.assert_close(out, F.l1_loss(leaf, r))
            torch.testing.assert_close(gradients(out, [leaf]), gradients(F.l1_loss(leaf, r), [leaf]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["non-saturating", "relativistic", "relativistic-average"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_weights_and_reductions(seed, mode, reduction, backend):
    real, fake = (draw(s, torch.float32, SHAPES["ragged"]) for s in (seed, seed + 1))
    real_weight, fake_weight = torch.rand(2, 5, generator=torch.Generator().manual_seed(seed)).unbind()

    def reduced(x, weight):
        weighted = x * weight.double().view(-1, *[1] * (x.ndim - 1))
        return weighted.mean() if reduction == "mean" else weighted.sum()

    def formula(r, f):
        if mode == "relativistic":
            return reduced(F.softplus(f - r), real_weight)
        if mode == "relativistic-average":
            r, f = r - f.mean(), f - r.mean()
        return reduced(F.softplus(-r), real_weight) + reduced(F.softplus(f), fake_weight)

    weights = {"real_weight": real_weight}
    if mode != "relativistic":
        weights["fake_weight"] = fake_weight
    loss = nn.AdversarialLoss(mode, reduction=reduction, across="mean", backend=backend)
    published = mean_of(formula)
    compare(
        lambda r, f: loss.discriminator(r, f, **weights), published, real, fake, 2e-5 if reduction == "mean" else 2e-3
    )


def test_no_reduction(seed):
    real, fake = (draw(s, torch.float32, SHAPES["patches"] * 2) for s in (seed, seed + 1))
    losses = nn.AdversarialLoss("hinge", 0.5, reduction="none").discriminator(real, fake)
    expected = [0.5 * x for r, f in zip(real, fake, strict=True) for x in (F.relu(1 - r), F.relu(1 + f))]
    torch.testing.assert_close(losses, expected)
    pairs, values = nn.AdversarialLoss("relativistic", reduction="none").discriminator(real, fake, return_values=True)
    torch.testing.assert_close(pairs, [F.softplus(f - r) for r, f in zip(real, fake, strict=True)])
    torch.testing.assert_close(values, torch.stack([pair.sum() for pair in pairs]))
    with pytest.raises(RuntimeError, match=r"reduction='none' was asked for \(supported: 'mean', 'sum'\)"):
        nn.AdversarialLoss("hinge", reduction="none", backend="cpu").discriminator(real, fake)


@pytest.mark.parametrize("mode", MODES)
def test_weights_without_a_reduction(seed, mode):
    """Each element is its own, weighted by its sample's weight; unweighted they average to the published loss."""
    real, fake = (draw(s, torch.float64, SHAPES["ragged"]) for s in (seed, seed + 1))
    weights = dict(zip(("real_weight", "fake_weight"), sample_weights(seed, 2, 5), strict=True))
    if MODES[mode].pairing == "pairs":
        del weights["fake_weight"]
    loss = nn.AdversarialLoss(mode, reduction="none")
    sides = {"discriminator": (real, fake), "generator": (fake, real)}
    for (side, given), published in zip(sides.items(), PUBLISHED[mode], strict=True):
        plain, weighted = getattr(loss, side)(*given), getattr(loss, side)(*given, **weights)
        torch.testing.assert_close(sum(x.mean() for x in plain), total(published, real, fake))
        # a list of one kind of elements has one weight: pairs the real samples', a generator its fake samples'
        kinds = list(weights.values())[-(len(plain) // len(real)) :]
        for k, (x, y) in enumerate(zip(plain, weighted, strict=True)):
            torch.testing.assert_close(y, x * kinds[k % len(kinds)].double().view(-1, *[1] * (x.ndim - 1)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_of_nested_lists(seed, backend):
    real, fake = nested(seed), nested(seed + 1)
    for x in joined(fake):
        x.requires_grad_()
    loss = nn.AdversarialLoss("lsgan", 0.3, backend=backend)
    out, values = loss.discriminator(real, fake, return_values=True)
    assert out.requires_grad and not values.requires_grad
    expected = [
        [0.3 * (r - 1).square().mean(), 0.3 * f.detach().square().mean()]
        for r, f in zip(joined(real), joined(fake), strict=True)
    ]
    torch.testing.assert_close(values, torch.tensor(expected), rtol=1e-5, atol=0)
    torch.testing.assert_close(out, values.sum(), rtol=1e-5, atol=0)
    assert loss.generator(fake, return_values=True)[1].shape == (6,)
    averages = nn.AdversarialLoss("relativistic-average", backend=backend)
    out, values = averages.generator(fake, real, return_values=True)
    assert values.shape == (6, 2)
    torch.testing.assert_close(out, values.sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("unconditional", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_matching_conditions(seed, backend, unconditional):
    """GAN-CLS (Reed et al.) and, with unconditional logits, AttnGAN's discriminator."""
    m, f, w, ur, uf = ([x.requires_grad_() for x in draw(seed + k, torch.float32, SHAPES["ragged"])] for k in range(5))
    out = mmfast.functional.matching_discriminator_loss(
        m, f, w, unconditional=(ur, uf) if unconditional else None, backend=backend
    )
    expected = 0
    for k in range(len(m)):
        if unconditional:
            reals, fakes = bce(m[k], 1) + bce(ur[k], 1), bce(f[k], 0) + bce(w[k], 0) + bce(uf[k], 0)
            expected = expected + reals / 2 + fakes / 3
        else:
            expected = expected + bce(m[k], 1) + (bce(f[k], 0) + bce(w[k], 0)) / 2
    torch.testing.assert_close(out, expected)
    everything = [*m, *f, *w, *ur, *uf]
    torch.testing.assert_close(gradients(out, everything), gradients(expected, everything))


def weighted_mean(elements: Tensor, weight: Tensor) -> Tensor:
    return (elements * weight.to(elements.dtype).view(-1, *[1] * (elements.ndim - 1))).mean()


def sample_weights(seed: int, count: int, samples: int) -> list[Tensor]:
    return list(torch.rand(count, samples, generator=torch.Generator().manual_seed(seed)).unbind())


@pytest.mark.parametrize("unconditional", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_matching_conditions_by_sample(seed, backend, unconditional):
    lists = [[x.requires_grad_() for x in draw(seed + k, torch.float32, SHAPES["ragged"])] for k in range(5)]
    m, f, w, ur, uf = lists
    of_real, of_fake, of_mismatched = sample_weights(seed, 3, 5)
    out = mmfast.functional.matching_discriminator_loss(
        m,
        f,
        w,
        "hinge",
        unconditional=(ur, uf) if unconditional else None,
        real_weight=of_real,
        fake_weight=of_fake,
        mismatched_weight=of_mismatched,
        backend=backend,
    )
    expected = 0
    for k in range(len(m)):
        matching = weighted_mean(F.relu(1 - m[k]), of_real)
        wrong = weighted_mean(F.relu(1 + f[k]), of_fake) + weighted_mean(F.relu(1 + w[k]), of_mismatched)
        if unconditional:
            matching = (matching + weighted_mean(F.relu(1 - ur[k]), of_real)) / 2
            wrong = (wrong + weighted_mean(F.relu(1 + uf[k]), of_fake)) / 3
        else:
            wrong = wrong / 2
        expected = expected + matching + wrong
    torch.testing.assert_close(out, expected)
    everything = [x for tensors in lists for x in tensors]
    torch.testing.assert_close(gradients(out, everything), gradients(expected, everything))


@pytest.mark.parametrize("backend", BACKENDS)
def test_lecam_by_sample(seed, backend):
    real, fake = (draw(seed + k, torch.float32, SHAPES["ragged"]) for k in range(2))
    of_real, of_fake = sample_weights(seed, 2, 5)
    module = nn.LeCam(0.3, discriminators=4, backend=backend)

    def published(r, f):
        loss = 0
        for x, y in zip(r, f, strict=True):
            loss = loss + weighted_mean(F.relu(x - y.detach().mean()) ** 2, of_real)
            loss = loss + weighted_mean(F.relu(x.detach().mean() - y) ** 2, of_fake)
        return 0.3 * loss

    compare(lambda r, f: module(r, f, real_weight=of_real, fake_weight=of_fake), published, real, fake)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_feature_matching_by_sample(seed, backend, relative):
    real, fake = (joined(nested(s)) for s in (seed, seed + 1))
    (weight,) = sample_weights(seed, 1, 2)
    loss = nn.FeatureMatchingLoss(detach=False, relative=relative, backend=backend)

    def published(real, fake):
        by = [r.detach().abs().mean() if relative else 1 for r in real]
        return sum(weighted_mean((r - f).abs(), weight) / m for r, f, m in zip(real, fake, by, strict=True))

    compare(lambda r, f: loss(r, f, sample_weight=weight), published, real, fake)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
@pytest.mark.parametrize("mode", ["relativistic", "features"])
def test_weights_of_pairs_in_any_layout(seed, mode, backend):
    """A sample's weight is its own where samples are no blocks of memory, too."""
    (weight,) = sample_weights(seed, 1, 4)
    real, fake = draw(seed, torch.float32, [(4, 5, 6, 7), (4, 5, 6, 7)])
    # channels last, and samples last
    for order, back in (((0, 2, 3, 1), (0, 3, 1, 2)), ((1, 2, 3, 0), (3, 0, 1, 2))):
        r, f = (x.permute(order).contiguous().permute(back) for x in (real, fake))
        assert not r.is_contiguous()
        f = f.detach().requires_grad_()
        if mode == "features":
            out = mmfast.functional.feature_matching(r, f, sample_weight=weight, backend=backend)
            expected = weighted_mean((r - f).abs(), weight)
        else:
            out = mmfast.functional.adversarial_discriminator_loss(r, f, mode, real_weight=weight, backend=backend)
            expected = weighted_mean(F.softplus(f - r), weight)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(gradients(out, [f]), gradients(expected, [f]))


def test_a_sample_weight_is_for_each_sample():
    maps = [torch.ones(2, 3)]
    with pytest.raises(ValueError, match="expected one weight for each sample"):
        mmfast.functional.feature_matching(maps, maps, sample_weight=torch.ones(3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_lecam(seed, backend):
    module = nn.LeCam(0.3, 0.9, discriminators=4, backend=backend)
    means = None
    for step in range(3):
        real, fake = (draw(seed + 10 * step + k, torch.float32, SHAPES["ragged"]) for k in range(2))
        now = torch.stack([torch.stack([x.mean() for x in tensors]) for tensors in (real, fake)])
        means = now if means is None else 0.9 * means + 0.1 * now
        r_mean, f_mean = means.double().unbind()

        def published(r, f, r_mean=r_mean, f_mean=f_mean):
            loss = 0
            for k in range(4):
                loss = loss + torch.mean(F.relu(r[k] - f_mean[k]).pow(2)) + torch.mean(F.relu(r_mean[k] - f[k]).pow(2))
            return 0.3 * loss

        compare(module, published, real, fake)
    torch.testing.assert_close(module.real_mean, means[0])
    before = module.real_mean.clone()
    module.eval()(real, fake)
    assert torch.equal(module.real_mean, before)
    assert list(module.state_dict()) == ["real_mean", "fake_mean", "seen"]


@pytest.mark.parametrize("backend", ["torch", BACKENDS[-1]])
def test_lecam_resumed_copied_compiled_and_exported(seed, backend):
    """The means go on where they were, also as buffers that a compiled or exported graph writes."""

    def step(k: int) -> list[list[Tensor]]:
        return [draw(seed + 10 * k + side, torch.float32, [(6, 5), (6, 3)]) for side in range(2)]

    module = nn.LeCam(0.3, 0.5, discriminators=2, backend=backend)
    module(*step(0))
    resumed = nn.LeCam(0.3, 0.5, discriminators=2, backend=backend)
    resumed.load_state_dict(module.state_dict())
    exported = torch.export.export(copy.deepcopy(module), tuple(step(0))).module()
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    for k in (1, 2):
        expected = module(*step(k))
        for other in (resumed, exported, compiled):
            torch.testing.assert_close(other(*step(k)), expected)
    assert torch.equal(resumed.real_mean, module.real_mean)


class Everything(torch.nn.Module):
    """Every kind of loss on the logits of one layer."""

    def __init__(self, backend) -> None:
        super().__init__()
        self.score = torch.nn.Linear(4, 3)
        modes = ("relativistic", "relativistic-average", "lsgan")
        self.losses = torch.nn.ModuleList(nn.AdversarialLoss(mode, across="mean", backend=backend) for mode in modes)
        self.features = nn.FeatureMatchingLoss(detach=False, relative=True, backend=backend)

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        real, fake = self.score(real), self.score(fake)
        total = self.features([real], [fake])
        for loss in self.losses:
            total = total + loss.discriminator([real, real[:1]], [fake, fake[:1]]) + loss.generator(fake, real)
        return total


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_and_export(seed, backend):
    torch.manual_seed(seed)
    model = Everything(backend)
    inputs = [torch.randn(6, 4) for _ in range(2)]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def step(model):
        out = model(*inputs)
        return [out.detach(), *torch.autograd.grad(out, list(model.parameters()))]

    torch.testing.assert_close(step(compiled), step(model))
    exported = torch.export.export(model, tuple(inputs))
    torch.testing.assert_close(exported.module()(*inputs), model(*inputs))


@pytest.mark.parametrize("mode", ["relativistic", "relativistic-average"])
def test_transforms(seed, mode):
    real, fake = draw(seed, torch.float32, [(6, 5), (6, 5)])

    def out(real, fake):
        return mmfast.functional.adversarial_discriminator_loss(real, fake, mode, backend=BACKENDS[-1])

    each = torch.stack([out(r, f) for r, f in zip(real, fake, strict=True)])
    torch.testing.assert_close(torch.vmap(out)(real, fake), each)


def test_features_under_transforms(seed):
    real, fake = draw(seed, torch.float32, [(6, 5), (6, 5)])

    def out(real, fake):
        return mmfast.functional.feature_matching([real, real], [fake, 2 * fake], relative=True, backend=BACKENDS[-1])

    each = torch.stack([out(r, f) for r, f in zip(real, fake, strict=True)])
    torch.testing.assert_close(torch.vmap(out)(real, fake), each)
    leaf = fake.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(out, 1)(real, fake), torch.autograd.grad(out(real, leaf), leaf)[0])


@pytest.mark.parametrize("mode", ["lsgan", "relativistic", "relativistic-average"])
def test_autocast_computes_in_float32(seed, mode):
    real, fake = draw(seed, torch.bfloat16, [(50,), (50,)])
    with torch.autocast("cpu", torch.bfloat16):
        out = nn.AdversarialLoss(mode).discriminator(real, fake)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, nn.AdversarialLoss(mode).discriminator(real.float(), fake.float()))


@pytest.mark.parametrize("mode", ["non-saturating", "relativistic", "relativistic-average"])
def test_logits_of_two_dtypes(seed, mode):
    real, fake = (
        x.requires_grad_() for x in (*draw(seed, torch.bfloat16, [(9,)]), *draw(seed + 1, torch.float32, [(9,)]))
    )
    out, expected = nn.AdversarialLoss(mode).discriminator(real, fake), PUBLISHED[mode][0](real.float(), fake)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients(out, [real, fake]), gradients(expected, [real, fake]))


INF, NAN = float("inf"), float("nan")
COMPARING = {
    **{mode: PUBLISHED[mode][0] for mode in MODES if MODES[mode].pairing},
    # binary cross entropy multiplies infinity by 0
    "relativistic-average": lambda r, f: F.softplus(f.mean() - r).mean() + F.softplus(f - r.mean()).mean(),
    "l1": lambda r, f: F.l1_loss(f, r),
    "l2": lambda r, f: F.mse_loss(f, r),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", COMPARING)
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
def test_extreme_logits_that_are_compared(name, backend):
    """1e4, infinities and NaN on both sides: PyTorch's stable formula, in value and gradients."""
    for one, other in ((1e4, -1e4), (-1e4, 1e4), (INF, 1.0), (INF, INF), (0.0, -INF), (NAN, 1.0)):
        real, fake = (torch.tensor([x, 0.5], requires_grad=True) for x in (one, other))
        if name in MODES:
            out = nn.AdversarialLoss(name, backend=backend).discriminator(real, fake)
        else:
            out = nn.FeatureMatchingLoss(name, detach=False, backend=backend)(real, fake)
        expected = COMPARING[name](real, fake)
        torch.testing.assert_close(out, expected, equal_nan=True)
        found, by_torch = gradients(out, [real, fake]), gradients(expected, [real, fake])
        torch.testing.assert_close(found, by_torch, equal_nan=True)


ERRORS = {
    "pairs": (lambda f: f(torch.ones(2), torch.ones(3), "relativistic"), ValueError, r"shape \(2,\) and the fake one"),
    "smoothing": (lambda f: f(torch.ones(2), torch.ones(2), "hinge", smoothing=0.1), ValueError, "no labels to smooth"),
    "reduction": (lambda f: f(torch.ones(2), torch.ones(2), reduction="max"), ValueError, "unknown reduction 'max'"),
    "across": (lambda f: f(torch.ones(2), torch.ones(2), across="max"), ValueError, "across='max'; accepted"),
    "weights": (
        lambda f: f(torch.ones(2), torch.ones(2), real_weight=torch.ones(3)),
        ValueError,
        r"the weights have shape \(3,\) for logits of shape \(2,\)",
    ),
    "real logits": (
        lambda f: mmfast.functional.adversarial_generator_loss(torch.ones(2), mode="relativistic"),
        ValueError,
        "mode 'relativistic' compares with real logits",
    ),
    "maps": (
        lambda f: mmfast.functional.feature_matching([torch.ones(2)], [torch.ones(3)]),
        ValueError,
        r"a real map has shape \(2,\) and the fake one in its place \(3,\)",
    ),
    "distance": (
        lambda f: mmfast.functional.feature_matching(torch.ones(2), torch.ones(2), distance="l3"),
        ValueError,
        "unknown distance 'l3'",
    ),
    "means": (
        lambda f: mmfast.functional.lecam_penalty(torch.ones(2), torch.ones(2), torch.ones(2), torch.ones(2)),
        ValueError,
        "the means are of 2 and 2",
    ),
    "scale": (
        lambda f: f(torch.ones(2), torch.ones(2), scale=torch.ones(())),
        TypeError,
        r"scale is a Tensor; expected a number \(a tensor may multiply the loss\)",
    ),
    "smoothing by a tensor": (
        lambda f: f(torch.ones(2), torch.ones(2), smoothing=torch.ones(())),
        TypeError,
        "smoothing is a Tensor; expected a number",
    ),
    "smoothing by a word": (
        lambda f: f(torch.ones(2), torch.ones(2), smoothing="0.1"),
        TypeError,
        "smoothing is a str; expected a number$",
    ),
    "three smoothings": (
        lambda f: f(torch.ones(2), torch.ones(2), smoothing=(0.1, 0.2, 0.3)),
        ValueError,
        r"smoothing is \(0.1, 0.2, 0.3\); expected one number, or two",
    ),
    "scale of maps by a word": (
        lambda f: mmfast.functional.feature_matching(torch.ones(2), torch.ones(2), scale="2"),
        TypeError,
        "scale is a str; expected a number",
    ),
    "weight by a list": (
        lambda f: f(torch.ones(2), torch.ones(2), real_weight=[1.0, 2.0]),
        TypeError,
        "a weight is a list; expected a tensor",
    ),
    "device of a weight": (
        lambda f: f(torch.ones(2), torch.ones(2), fake_weight=torch.ones(2, device="meta"), backend=BACKENDS[-1]),
        RuntimeError,
        "the weights are on meta and the logits on cpu; expected one device",
    ),
    "device of maps' weight": (
        lambda f: mmfast.functional.feature_matching(
            torch.ones(2), torch.ones(2), sample_weight=torch.ones(2, device="meta"), relative=True
        ),
        RuntimeError,
        "the weights are on meta and the logits on cpu; expected one device",
    ),
    "a number for a mean": (
        lambda f: mmfast.functional.lecam_penalty(torch.ones(2), torch.ones(2), 0.5, torch.ones(1)),
        TypeError,
        "real_mean is a float; expected a tensor",
    ),
    "weight of a pair": (
        lambda f: f(torch.ones(2), torch.ones(2), "relativistic", fake_weight=torch.ones(2)),
        ValueError,
        "a pair of logits has one weight",
    ),
    "nesting": (
        lambda f: mmfast.functional.feature_matching(
            [[torch.ones(2)] * 2, [torch.ones(2)]], [[torch.ones(2)], [torch.ones(2)] * 2], across="mean"
        ),
        ValueError,
        "real_maps and fake_maps are nested differently",
    ),
    "device of means": (
        lambda f: mmfast.functional.lecam_penalty(
            torch.ones(2), torch.ones(2), *torch.ones(2, 1, device="meta"), backend=BACKENDS[-1]
        ),
        RuntimeError,
        "the means are on meta and the logits on cpu; expected one device",
    ),
    "reduction of a module": (
        lambda f: nn.AdversarialLoss(reduction="max"),
        ValueError,
        "unknown reduction 'max'",
    ),
    "matching": (
        lambda f: mmfast.functional.matching_discriminator_loss(torch.ones(2), torch.ones(2), [torch.ones(2)] * 2),
        ValueError,
        "matching_logits 1, fake_logits 1, mismatched_logits 2",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        call(mmfast.functional.adversarial_discriminator_loss)
