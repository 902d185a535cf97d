"""The native library: the only module that imports `_C`. It checks what goes in and turns a status into an exception.

The library is loaded at first use, after torch, so that both share one OpenMP runtime. A library that cannot be loaded
is no error: `load_error()` keeps the reason, `mmfast info` shows it, and the `torch` backend serves everything.
"""

from __future__ import annotations

import functools
import importlib
import types
from collections.abc import Sequence

import torch

from . import config

ABI_VERSION = 1

#: enum mmfast_dtype
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}

_STATUS_ERRORS = {1: ValueError, 2: MemoryError, 3: RuntimeError}


@functools.cache
def _load() -> tuple[types.ModuleType | None, str]:
    try:
        library = importlib.import_module("mmfast._C")
    except ImportError as error:
        return None, f"mmfast's native library could not be loaded ({error}); reinstall with a C++ compiler on PATH"
    if library.abi_version != ABI_VERSION:
        return None, (
            f"mmfast's native library has ABI version {library.abi_version}, but this Python code needs {ABI_VERSION}; "
            "reinstall mmfast"
        )
    if config.ISA is not None and library.set_isa(config.ISA) != 0:
        return None, f"MMFAST_ISA={config.ISA} is not one of: {library.supported_isas()}"
    return library, ""


def available() -> bool:
    """Whether the native library is loaded and fits this Python code."""
    return _load()[0] is not None


def load_error() -> str:
    """Why the native library is not available; empty where it is."""
    return _load()[1]


def library() -> types.ModuleType:
    """The loaded library; RuntimeError where there is none."""
    module, error = _load()
    if module is None:
        raise RuntimeError(error)
    return module


def check(status: int) -> None:
    """Raises what a kernel's status stands for."""
    if status != 0:
        raise _STATUS_ERRORS.get(status, RuntimeError)(library().last_error())


def isa() -> str:
    """The instruction set that the CPU kernels use."""
    return library().isa()


def set_isa(name: str) -> None:
    """Chooses the instruction set of the CPU kernels, at most what the processor supports (ValueError otherwise)."""
    check(library().set_isa(name))


def supported_isas() -> list[str]:
    """The instruction sets compiled in and supported by this processor, the best last."""
    return library().supported_isas().split()


def cpu_adversarial_forward(
    terms: Sequence[tuple], mean: bool, values: torch.Tensor, total: torch.Tensor, logits: Sequence[torch.Tensor]
) -> None:
    """Fills values (K,) and total () from K terms (phi, sign, shift, weight) of K dense CPU tensors of one dtype."""
    rows = [(x.data_ptr(), 0, x.numel(), *term) for x, term in zip(logits, terms, strict=True)]
    dtype = DTYPES[total.dtype]
    threads = torch.get_num_threads()
    check(library().cpu_adversarial_forward(dtype, mean, rows, values.data_ptr(), total.data_ptr(), threads))


def cpu_adversarial_backward(
    terms: Sequence[tuple],
    mean: bool,
    dtotal: torch.Tensor,
    logits: Sequence[torch.Tensor],
    dlogits: Sequence[torch.Tensor],
) -> None:
    """Fills each dlogits[k], of the layout of logits[k], with the gradient of the loss times dtotal ()."""
    rows = [(x.data_ptr(), dx.data_ptr(), x.numel(), *term) for x, dx, term in zip(logits, dlogits, terms, strict=True)]
    dtype = DTYPES[dtotal.dtype]
    check(library().cpu_adversarial_backward(dtype, mean, rows, dtotal.data_ptr(), torch.get_num_threads()))


def _address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def cpu_rnn_forward(
    layer: tuple,
    gx: torch.Tensor,
    gates: torch.Tensor | None,
    cell: torch.Tensor | None,
    y: torch.Tensor,
    hn: torch.Tensor,
    cn: torch.Tensor | None,
) -> None:
    """Fills gates, cell, y, hn and cn of mmfast_rnn_forward_args (csrc/mmfast.h); layer: `rnn_layer`."""
    out = _address(gates), _address(cell), y.data_ptr(), hn.data_ptr(), _address(cn)
    check(library().cpu_rnn_forward(layer, gx.data_ptr(), *out))


def cpu_rnn_backward(
    layer: tuple, saved: Sequence[torch.Tensor | None], given: Sequence[torch.Tensor | None], out: Sequence
) -> None:
    """Fills `out` (dgates, dm, previous, dh0, dc0) from `saved` (y, gates, cell) and `given` (dy, dhn, dcn).

    All are mmfast_rnn_backward_args' (csrc/mmfast.h); layer: `rnn_layer`.
    """
    check(library().cpu_rnn_backward(layer, *map(_address, saved), *map(_address, given), *map(_address, out)))


def rnn_layer(
    dtype: torch.dtype,
    mode: int,
    shape: tuple[int, int, int],
    strides: tuple[int, int],
    offsets: torch.Tensor | None,
    lengths: torch.Tensor | None,
    w_hh: Sequence[torch.Tensor],
    b_hh: Sequence[torch.Tensor | None],
    h0: torch.Tensor | None,
    c0: torch.Tensor | None,
) -> tuple:
    """mmfast_rnn_layer of csrc/mmfast.h. shape: (T, B, H); one w_hh and b_hh a direction; tensors contiguous, on CPU.

    The caller keeps the tensors alive until the kernel has returned.
    """
    directions = len(w_hh)
    weights = [_address(x) for pair in (w_hh, b_hh) for x in (*pair, None)[:2]]
    sides = _address(offsets), _address(lengths), *weights, _address(h0), _address(c0)
    return (DTYPES[dtype], mode, directions, *shape, *strides, *sides, torch.get_num_threads())
