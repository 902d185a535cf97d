"""The acceptance rule itself: it passes what is right, and fails for each thing that it promises to look at."""

import math

import pytest
import torch

from mmfast import numerics
from mmfast.numerics import Errors, assert_matches, assert_pooled, compare, ulp

HALVES = [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, *HALVES]


def draw(seed, dtype, count=4096):
    """(a correct output, a yardstick, the reference): both are the reference rounded after one noisy operation each."""
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(count, dtype=torch.float64, generator=generator)

    def noisy():
        error = torch.randn(count, dtype=torch.float64, generator=generator) * torch.finfo(dtype).eps
        return (reference * (1 + error)).to(dtype)

    return noisy(), noisy(), reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_quality_passes(seed, dtype):
    assert assert_matches("out", *draw(seed, dtype)).passes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("bug", "figure"),
    [
        (lambda out: out * 1.02, "rms"),
        (lambda out: out + 0.02, "rms"),
        (lambda out: -out, "rms"),
        (lambda out: out.roll(1), "rms"),
        (lambda out: out.index_fill(0, torch.tensor([out.numel() - 1]), 9), "max"),
    ],
    ids=["scaled", "shifted", "negated", "rolled", "last-stale"],
)
def test_bugs_fail(seed, dtype, bug, figure):
    out, yardstick, reference = draw(seed, dtype)
    with pytest.raises(AssertionError, match=f"out: .*{figure} error"):
        assert_matches("out", bug(out), yardstick, reference)


def test_twice_the_noise_fails_on_rms_alone(seed):
    out, yardstick, reference = draw(seed, torch.bfloat16)
    most = (yardstick.double() - reference).abs().max()
    # of the largest of 4,096 errors some are twice another draw's by chance
    doubled = (reference + ((out.double() - reference) * 1.7).clamp(-most, most)).to(torch.float32)
    comparison = compare(doubled, yardstick.float(), reference)
    assert not comparison.passes
    assert all("rms" in failure for failure in comparison.failures)


def test_figures(seed):
    reference = torch.tensor([1.0, -4.0, 0.0], dtype=torch.float64)
    step = torch.finfo(torch.float32).eps
    comparison = compare(torch.tensor([1 + step, -4, 0]), torch.tensor([1, -4 + 4 * step, 0]), reference)
    assert comparison.count == 3
    assert comparison.ours == pytest.approx((step, step / math.sqrt(3), 1))
    assert comparison.yardstick == pytest.approx((4 * step, 4 * step / math.sqrt(3), 1))
    assert comparison.max_bound == pytest.approx(8 * step + 0.5 * 4 * step)
    assert comparison.rms_bound == pytest.approx(1.5 * 4 * step / math.sqrt(3) + 0.3 * 2 * step)


def test_a_perfect_yardstick_leaves_one_rounding(seed):
    _, _, reference = draw(seed, torch.float32)
    perfect = reference.float()
    assert_matches("out", perfect, perfect, perfect.double())
    largest = int(perfect.abs().argmax())
    out = perfect.clone()
    out[largest] += math.copysign(ulp(float(perfect[largest].abs()), torch.float32), float(perfect[largest]))
    with pytest.raises(AssertionError, match="max error"):
        assert_matches("out", out, perfect, perfect.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [1.0, 1.5, 3e-5, 6e4, 1e-7])
def test_ulp_is_the_distance_to_the_next_number(dtype, value):
    # one dtype's neighbours, found through its bits
    x = torch.tensor([value]).to(dtype)
    bits = x.view(torch.int32 if dtype == torch.float32 else torch.int16)
    after = (bits + 1).view(dtype)
    assert ulp(float(x), dtype) == float(after.double() - x.double())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: out[:-1], "shape"),
        (lambda out: out.float(), "float32"),
        (lambda out: out.to("meta"), "meta"),
    ],
    ids=["shape", "dtype", "device"],
)
def test_kind_differs(seed, change, message):
    out, yardstick, reference = draw(seed, torch.bfloat16)
    with pytest.raises(AssertionError, match=f"the output is .*{message}"):
        compare(change(out), yardstick, reference)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_pattern_differs(seed, value):
    out, yardstick, reference = draw(seed, torch.float32)
    reference[7] = yardstick[7] = value
    with pytest.raises(AssertionError, match=r"1 of 4096 values differ in being NaN or infinite.*index 7"):
        compare(out, yardstick, reference)
    spoiled = out.clone()
    spoiled[7] = value
    assert_pooled(lambda s: {"out": (spoiled, yardstick, reference), "more": draw(s, torch.float32)})
    reference[7] = yardstick[7] = 1
    with pytest.raises(AssertionError, match="index 7"):
        compare(spoiled, yardstick, reference)


def test_overflow_in_the_dtype_is_expected():
    reference = torch.tensor([1e5, 1.0], dtype=torch.float64)
    right = torch.tensor([float("inf"), 1.0], dtype=torch.float16)
    assert compare(right, right, reference).passes
    # an output that PyTorch overflows on the way is held to the reference all the same
    assert not compare(torch.tensor([1.0, 2.0]), torch.tensor([float("inf"), 1.0]), torch.ones(2).double()).passes


def test_too_few_values(seed):
    out, yardstick, reference = draw(seed, torch.float32, 4095)
    with pytest.raises(ValueError, match="4095 values are too few"):
        assert_matches("out", out, yardstick, reference)
    with pytest.raises(ValueError, match="0 values are too few"):
        assert_pooled(lambda s: {"out": draw(s, torch.float32, 0)})
    with pytest.raises(ValueError, match="nothing to compare"):
        Errors("out").compare()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2), torch.ones(2), torch.ones(2)), "reference is float32"),
        ((torch.ones(2), torch.ones(2), torch.ones(3).double()), "reference is float64 of shape .3,."),
        ((torch.ones(2).double(),) * 3, "yardstick is float64"),
        ((torch.ones(2).int(), torch.ones(2).int(), torch.ones(2).double()), "yardstick is int32"),
    ],
)
def test_unfit_reference_or_yardstick(arguments, message):
    with pytest.raises(ValueError, match=message):
        compare(*arguments)


def test_dtypes_do_not_pool():
    errors = Errors("out")
    errors.add(torch.ones(2), torch.ones(2), torch.ones(2).double())
    with pytest.raises(ValueError, match="float32 and float16 do not pool"):
        errors.add(torch.ones(2).half(), torch.ones(2).half(), torch.ones(2).double())


def test_pooling_draws_until_there_is_enough(seed):
    seen = []

    def sample(s):
        seen.append(s)
        return {"scalar": draw(s, torch.bfloat16, 1), "tensor": draw(s, torch.bfloat16, 100)}

    figures = assert_pooled(sample, seed)
    assert seen == list(range(seed, seed + numerics.ENOUGH))
    assert figures["scalar"].count == numerics.ENOUGH
    assert figures["tensor"].count == 4100
