"""Error figures against a float64 reference, and the one rule by which mmfast calls a result right.

An output is compared with a float64 reference computed on the CPU, and its error with the error of a yardstick:
PyTorch's own kernel in the same dtype. It passes if

    max error <= 2 x the yardstick's max error + half an ulp of the largest reference value   (one rounding)
    rms error <= 1.5 x the yardstick's rms error + 0.3 ulp of the reference's rms             (one rounding, rms)

where errors are pooled over seeds until there are 4096 values: on fewer, a kernel as good as the yardstick fails by
chance. Shape, dtype and device must be the yardstick's, and NaN and infinities must be where the rounded reference has
them. Apply it to the outputs and to every gradient of sum(output * random cotangent).

    errors = Errors("h_n")
    for seed in range(64):
        errors.add(out, yardstick, reference)
    errors.check()
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ENOUGH", "Comparison", "Errors", "Figures", "assert_matches", "assert_pooled", "compare", "ulp"]

#: The number of pooled values that the rule asks for.
ENOUGH = 4096

MAX_FACTOR, MAX_ULPS = 2.0, 0.5
RMS_FACTOR, RMS_ULPS = 1.5, 0.3


class Figures(NamedTuple):
    """Absolute errors against the reference: the largest, the root mean square, and the largest in ulp of its value."""

    max: float
    rms: float
    ulp: float


class Comparison(NamedTuple):
    """The errors of an output and of its yardstick, over `count` values of `dtype`.

    rms_bound, max_bound: what the rule allows the output.
    """

    count: int  # type: ignore[assignment]
    dtype: torch.dtype
    ours: Figures
    yardstick: Figures
    max_bound: float
    rms_bound: float

    @property
    def failures(self) -> list[str]:
        """What breaks the rule, in sentences; empty where the output passes."""
        failures = []
        for name, factor in (("max", MAX_FACTOR), ("rms", RMS_FACTOR)):
            error, bound = getattr(self.ours, name), getattr(self, f"{name}_bound")
            if not error <= bound:
                theirs = getattr(self.yardstick, name)
                failures.append(
                    f"the {name} error is {error:.3g}, more than {bound:.3g} "
                    f"({factor:g} x PyTorch's {theirs:.3g} + one rounding to {_name(self.dtype)})"
                )
        return failures

    @property
    def passes(self) -> bool:
        """Whether the output keeps the rule (whether there are enough values for it is not asked here)."""
        return not self.failures


class Errors:
    """The errors of one output, pooled over seeds (and over the tensors of a list)."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0
        self._dtype: torch.dtype | None = None
        self._ours = _Pool()
        self._yardstick = _Pool()
        self._reference = _Pool()

    @property
    def enough(self) -> bool:
        """Whether there are as many values as the rule asks for."""
        return self.count >= ENOUGH

    def add(self, out: Tensor, yardstick: Tensor, reference: Tensor) -> None:
        """Pools the errors of `out` and `yardstick`, of one shape, dtype (float32 or less) and device.

        reference: float64, on the CPU. AssertionError where out differs from the yardstick in shape, dtype or device,
        or from the reference in where NaN and infinities are; ValueError for a yardstick or reference of another kind.
        """
        self._check_kind(out, yardstick, reference)
        exact = reference.detach().reshape(-1)
        rounded = exact.to(out.dtype).double()
        ours, theirs = (x.detach().to("cpu", torch.float64).reshape(-1) for x in (out, yardstick))
        finite = rounded.isfinite()
        if not finite.all() or not ours.isfinite().all():
            self._check_pattern(ours, rounded, finite)
            exact, ours, theirs = exact[finite], ours[finite], theirs[finite]
        step = _ulps(exact, out.dtype)
        self._dtype = out.dtype
        self.count += exact.numel()
        self._ours.add(ours - exact, step)
        self._reference.add(exact, step)
        measured = theirs.isfinite()
        if not measured.all():
            # where PyTorch's own result overflowed it measures nothing
            theirs, exact, step = theirs[measured], exact[measured], step[measured]
        self._yardstick.add(theirs - exact, step)

    def compare(self) -> Comparison:
        """The figures so far, and what the rule allows. ValueError where nothing was added."""
        if self._dtype is None:
            raise ValueError(f"{self.name}: nothing to compare; add(out, yardstick, reference) first")
        ours, yardstick = self._ours.figures(), self._yardstick.figures()
        scale = self._reference.figures()
        max_bound = MAX_FACTOR * yardstick.max + MAX_ULPS * ulp(scale.max, self._dtype)
        rms_bound = RMS_FACTOR * yardstick.rms + RMS_ULPS * ulp(scale.rms, self._dtype)
        return Comparison(self.count, self._dtype, ours, yardstick, max_bound, rms_bound)

    def check(self) -> Comparison:
        """The figures, if the rule is kept; AssertionError otherwise, ValueError for fewer than 4096 values."""
        if not self.enough:
            raise ValueError(
                f"{self.name}: {self.count} values are too few for the rule; pool {ENOUGH} over more seeds"
            )
        comparison = self.compare()
        if comparison.failures:
            raise AssertionError(f"{self.name}: " + "; ".join(comparison.failures) + f" (over {self.count} values)")
        return comparison

    def _check_kind(self, out: Tensor, yardstick: Tensor, reference: Tensor) -> None:
        if reference.dtype != torch.float64 or reference.device.type != "cpu" or reference.shape != yardstick.shape:
            raise ValueError(
                f"{self.name}: the reference is {_kind(reference)}; expected float64 of shape "
                f"{tuple(yardstick.shape)} on cpu"
            )
        if yardstick.dtype == torch.float64 or not yardstick.is_floating_point():
            raise ValueError(
                f"{self.name}: the yardstick is {_kind(yardstick)}; expected a floating-point dtype below float64, "
                "than which the reference is more precise"
            )
        if self._dtype not in (None, yardstick.dtype):
            raise ValueError(f"{self.name}: errors of {_name(self._dtype)} and {_name(yardstick.dtype)} do not pool")
        if (out.shape, out.dtype, out.device) != (yardstick.shape, yardstick.dtype, yardstick.device):
            raise AssertionError(f"{self.name}: the output is {_kind(out)}, PyTorch's is {_kind(yardstick)}")

    def _check_pattern(self, ours: Tensor, rounded: Tensor, finite: Tensor) -> None:
        same = torch.where(finite, ours.isfinite(), (ours == rounded) | (ours.isnan() & rounded.isnan()))
        if not same.all():
            i = int((~same).nonzero()[0])
            raise AssertionError(
                f"{self.name}: {int((~same).sum())} of {same.numel()} values differ in being NaN or infinite; "
                f"the first, at flat index {i}, is {float(ours[i])}, the reference rounds to {float(rounded[i])}"
            )


class _Pool:
    """The running largest value, sum of squares and largest value in ulp."""

    def __init__(self) -> None:
        self.count, self.max, self.squares, self.ulp = 0, 0.0, 0.0, 0.0

    def add(self, x: Tensor, step: Tensor) -> None:
        if x.numel() == 0:
            return
        size = x.abs()
        self.count += x.numel()
        self.max = max(self.max, float(size.max()))
        self.squares += float(x.square().sum())
        self.ulp = max(self.ulp, float((size / step).max()))

    def figures(self) -> Figures:
        return Figures(self.max, math.sqrt(self.squares / max(self.count, 1)), self.ulp)


def compare(out: Tensor, yardstick: Tensor, reference: Tensor) -> Comparison:
    """The error figures of one output and of its yardstick, and what the rule allows.

    out, yardstick: any shape, one dtype and device; reference: float64 on the CPU, of the same shape.
    Raises as `Errors.add`.
    """
    errors = Errors("out")
    errors.add(out, yardstick, reference)
    return errors.compare()


def assert_matches(name: str, out: Tensor, yardstick: Tensor, reference: Tensor) -> Comparison:
    """The rule for one output of at least 4096 values; smaller ones are pooled with `Errors`.

    Returns the figures. AssertionError where the rule is broken; otherwise raises as `Errors.add`.
    """
    errors = Errors(name)
    errors.add(out, yardstick, reference)
    return errors.check()


def assert_pooled(
    draw: Callable[[int], Mapping[str, tuple[Tensor, Tensor, Tensor]]], first_seed: int = 0
) -> dict[str, Comparison]:
    """The rule for small outputs: draws seed after seed until each output has 4096 values, then checks each.

    draw: from a seed to {name: (out, yardstick, reference)}, the same names for each seed. A name that had no value
        after 4096 seeds is a ValueError.
    Returns the figures by name. Raises as `Errors.add` and `Errors.check`.
    """
    pools: dict[str, Errors] = {}
    for seed in range(first_seed, first_seed + ENOUGH):
        for name, tensors in draw(seed).items():
            errors = pools.setdefault(name, Errors(name))
            if not errors.enough:
                errors.add(*tensors)
        if all(errors.enough for errors in pools.values()):
            break
    return {name: errors.check() for name, errors in pools.items()}


def ulp(value: float, dtype: torch.dtype) -> float:
    """The distance between neighbouring numbers of `dtype` at |value|."""
    info = torch.finfo(dtype)
    if value < info.tiny:
        return info.tiny * info.eps
    return info.eps * 2.0 ** math.floor(math.log2(value))


def _ulps(values: Tensor, dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    exponent = torch.frexp(values.abs().clamp(min=info.tiny)).exponent - 1
    return torch.ldexp(torch.full_like(values, info.eps), exponent)


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _kind(x: Tensor) -> str:
    return f"{_name(x.dtype)} of shape {tuple(x.shape)} on {x.device}"
