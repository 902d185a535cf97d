"""The floor: what a case would take if this machine did nothing but its matrix products and its memory traffic."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .cases import PASSES, Case

#: bytes copied to measure a bandwidth: within a core's cache, the shared cache, and beyond both
COPIED = {"cpu": (256 << 10, 4 << 20, 256 << 20), "cuda": (8 << 20, 1 << 30)}
SIDE = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class Floor:
    """The best rates measured here, with the threads that torch uses now."""

    flops: float  # floating-point operations a second in a large square matrix product
    bandwidth: dict[int, float]  # bytes a second, by bytes moved: of a copy or of a sum, whichever is faster

    def seconds(self, case: Case, mode: str, dtype: torch.dtype) -> float:
        """The longer of arithmetic and traffic; nan for a pass whose work is not counted.

        A forward pass is one product and reads and writes its tensors once; backward is twice that.
        """
        if mode not in PASSES[:2]:
            return math.nan
        work, passes = case.work(dtype), 1 + 2 * PASSES.index(mode)
        return self.of(passes * work.flops, passes * work.bytes)

    def of(self, flops: float, amount: float) -> float:
        """The longer of the arithmetic and of the traffic of `amount` bytes; nan for nan."""
        return math.nan if math.isnan(amount) else max(flops / self.flops, amount / self.rate(amount))

    def rate(self, size: float) -> float:
        """The bandwidth for a working set of `size` bytes: that of the nearest size measured which is not larger."""
        nearest = max([measured for measured in self.bandwidth if measured <= size], default=0)
        # a larger set is never served faster: where it was measured so, something disturbed the smaller one
        return max(rate for measured, rate in self.bandwidth.items() if measured >= nearest)

    @property
    def memory(self) -> float:
        """The bandwidth beyond every cache."""
        return self.bandwidth[max(self.bandwidth)]

    def or_better(self, other: Floor) -> Floor:
        """The better of two measurements, rate by rate."""
        rates = {size: max(rate, other.bandwidth[size]) for size, rate in self.bandwidth.items()}
        return Floor(max(self.flops, other.flops), rates)


def measure(dtype: torch.dtype, device: str) -> Floor:
    """Measures the matrix-product rate of `dtype` and the copy bandwidths of `device`, in about a second."""
    side = SIDE[device]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = fastest(lambda: torch.mm(a, b), device)
    return Floor(2 * side**3 / product, {size: _bandwidth(size, device) for size in COPIED[device]})


def _bandwidth(size: int, device: str) -> float:
    source = torch.randn(size // 8, device=device)
    target = torch.empty_like(source)
    copied = size / fastest(lambda: target.copy_(source), device)
    return max(copied, size / 2 / fastest(source.sum, device))


def fastest(call: Callable[[], object], device: str) -> float:
    """Seconds of the fastest of 16 calls."""
    call()
    return min(seconds(call, device) for _ in range(16))


def seconds(call: Callable[[], object], device: str) -> float:
    """Seconds of one call: by the clock on a CPU, by events on a GPU."""
    if device == "cpu":
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3
