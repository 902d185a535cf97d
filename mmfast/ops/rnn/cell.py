"""A Cell's step on a CPU without gradients, which takes a few microseconds: each tensor is asked once for each fact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import native
from ...dispatch import is_plain, is_watched
from ..product import product
from .backends import OP
from .equations import GATES, MODES

#: x, h0, c0, w_ih, w_hh, b_ih, b_hh
Operands = tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None]
#: h', and an LSTM's c', else h' again
State = tuple[Tensor, Tensor]

#: Rows up to which the products are made by the kernel: a call of torch.mm takes longer.
FEW_ROWS = 2
#: Rows by all threads up to which that holds with one gate, or with more, and multiplications by all of several, on
#: AMD's AVX-512. Zen 5, us of PyTorch's, with torch.mm or product.cpp, by the kernel: 3 rows of 128 units RNN 13.5,
#: 18.5, 5.7, LSTM 34, 35, 11; 32 rows RNN 36, 32, 17, LSTM 119, 82, 71.
ROWS_OF_ONE_GATE, ROWS_OF_GATES, SHARED_WORK = 64, 32, 1 << 25
#: Multiplications by all threads up to which that holds for more rows, on AVX2 that is not Intel's (measured on Zen 3:
#: for 4 to 64 rows of 128 units 1.1 to 2 times less time, with 1024 units the same for few rows).
WORK = 1 << 23


def at_once(mode: str, facts: tuple, x: Tensor, hx: Any, weights: Sequence[Tensor | None], backend: str | None) -> Any:
    """A Cell's result where its step without gradients is known to serve calls with these facts and nothing would miss
    it; else None.
    """
    if OP.known(facts, backend) != "cpu" or is_watched() or torch._C._is_any_autocast_enabled():
        return None
    most = FEW_ROWS if x.shape[0] <= FEW_ROWS else most_rows(weights[0], weights[1])  # type: ignore[arg-type]
    found = native.rnn_cell_direct(MODES[mode], most, x, hx, weights)
    if found is not None:
        return found
    h0, c0 = states_of(mode, hx)
    operands: Any = (x, h0, c0, *weights)
    if not is_plain([tensor for tensor in operands if tensor is not None]):
        return None
    state = step(mode, operands)
    return state if state is None or mode == "LSTM" else state[0]


def most_rows(w_ih: Tensor, w_hh: Tensor) -> int:
    """Rows of the batch up to which the kernel makes the products."""
    if native.isa() == "baseline" or native.is_intel():
        return FEW_ROWS
    threads = torch.get_num_threads()
    multiplications = max(1, (w_ih.numel() + w_hh.numel()) * threads)
    if native.isa() != "avx512":
        return max(FEW_ROWS, WORK // multiplications)
    rows = (ROWS_OF_ONE_GATE if w_hh.shape[0] == w_hh.shape[1] else ROWS_OF_GATES) // threads
    return max(FEW_ROWS, rows if threads == 1 else min(rows, SHARED_WORK // multiplications))


def states_of(mode: str, hx: Any) -> Sequence[Tensor | None]:
    """h and c of a Cell's hx."""
    if mode != "LSTM":
        return hx, None
    return (None, None) if hx is None else hx


def step(mode: str, tensors: Operands) -> State | None:
    """The state after one step, without gradients; None where sizes, dtypes or devices do not fit."""
    if not fits(mode, tensors):
        return None
    x, h0, c0, w_ih, w_hh, b_ih, b_hh = tensors
    (batch, inputs), hidden, dtype = x.shape, w_hh.shape[1], x.dtype
    gx = gh = None
    narrow = dtype is not torch.float32 and dtype is not torch.float64
    if narrow or (batch > FEW_ROWS and batch > most_rows(w_ih, w_hh)):
        gx = product(x, w_ih.t())
        if h0 is not None and (narrow or mode == "GRU"):
            gh = product(h0, w_hh.t())
        elif h0 is not None:
            product(h0, w_hh.t(), out=gx, add=True)
    if gx is not None and mode in ("RNN_TANH", "RNN_RELU"):
        h = gx  # read before it is written, number by number
    elif h0 is not None and h0.is_contiguous():
        h = torch.empty_like(h0)
    else:
        h = x.new_empty((batch, hidden))
    c = torch.empty_like(h) if mode == "LSTM" else h
    native.cpu_rnn_cell(MODES[mode], (batch, inputs, hidden), (gx, gh, x, w_ih, b_ih, w_hh, b_hh, h0, c0), h, c)
    return h, c


def fits(mode: str, tensors: Operands) -> bool:
    """Whether a Cell's tensors are of one dtype and kind of device, and of the sizes that its equations demand."""
    x, h0, c0, w_ih, w_hh, b_ih, b_hh = tensors
    (batch, inputs), (rows, hidden) = x.shape, w_hh.shape
    if rows != GATES[mode] * hidden or (b_ih is None) is not (b_hh is None):
        return False
    dtype, on_cpu = x.dtype, x.is_cpu
    state, bias = (batch, hidden), (rows,)
    for tensor, shape in ((w_hh, None), (w_ih, (rows, inputs)), (h0, state), (c0, state), (b_ih, bias), (b_hh, bias)):
        if tensor is None:
            continue
        if tensor.dtype is not dtype or tensor.is_cpu is not on_cpu or (shape and tensor.shape != shape):
            return False
    return True
