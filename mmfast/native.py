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


def cpu_normalize_forward(
    layout: tuple[bool, tuple[int, int, int, int]],
    activation: tuple[int, float],
    measure: bool,
    eps: float,
    y: torch.Tensor,
    parameters: Sequence[torch.Tensor | None],
    out: torch.Tensor,
) -> None:
    """Fills out, and with `measure` mean and var, from y: dense CPU tensors of one dtype and one order of memory.

    layout: (channels last, (sets, batch, channels, size)). activation: (number, negative slope). parameters: weight,
    bias (channels,) or None, mean, var (sets, channels) in y's compute dtype, contiguous.
    """
    pointers = [_pointer(x) for x in parameters]
    threads = torch.get_num_threads()
    arguments = (DTYPES[y.dtype], *layout, *activation, measure, eps, y.data_ptr(), *pointers, out.data_ptr(), threads)
    check(library().cpu_normalize_forward(*arguments))


def cpu_normalize_backward(
    layout: tuple[bool, tuple[int, int, int, int]],
    activation: tuple[int, float],
    measure: bool,
    eps: float,
    y: torch.Tensor,
    parameters: Sequence[torch.Tensor | None],
    dout: torch.Tensor,
    dy: torch.Tensor,
    dweight: torch.Tensor,
    dbias: torch.Tensor,
) -> None:
    """Fills dy, of y's layout, and dweight and dbias (sets, channels); the other arguments as in the forward."""
    pointers = [_pointer(x) for x in (y, *parameters, dout, dy, dweight, dbias)]
    threads = torch.get_num_threads()
    arguments = (DTYPES[y.dtype], *layout, *activation, measure, eps, *pointers, threads)
    check(library().cpu_normalize_backward(*arguments))


def cpu_activation_forward(activation: tuple[int, float], y: torch.Tensor, out: torch.Tensor) -> None:
    """Fills out, of y's layout, with the activation of y, a dense CPU tensor; out may be y."""
    arguments = (DTYPES[y.dtype], *activation, y.numel(), y.data_ptr(), out.data_ptr(), torch.get_num_threads())
    check(library().cpu_activation_forward(*arguments))


def cpu_activation_backward(
    activation: tuple[int, float], value: torch.Tensor, dout: torch.Tensor, dy: torch.Tensor
) -> None:
    """Fills dy with dout times the slope at which the activation took `value` (silu: its argument); one layout."""
    pointers = (value.data_ptr(), dout.data_ptr(), dy.data_ptr())
    check(
        library().cpu_activation_backward(
            DTYPES[value.dtype], *activation, value.numel(), *pointers, torch.get_num_threads()
        )
    )


def _pointer(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
