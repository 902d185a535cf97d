"""Cells as functions: checks, choice, and the step itself.

On a CPU without gradients it takes a few microseconds: each tensor is asked once for each fact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import native
from ...dispatch import asked_for, autocasts, compute_dtype, is_plain, is_transforming, is_watched, needs_formula
from ..product import product
from .backends import OP, Case
from .equations import GATES, MODES
from .layers import Options, recurrent

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


def rnn_cell(
    input: Tensor,
    hx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    backend: str | None = None,
) -> Tensor:
    """One step of an Elman RNN: h' = tanh or relu (W_ih x + b_ih + W_hh h + b_hh).

    Equivalent to: `torch.rnn_tanh_cell(input, hx, weight_ih, weight_hh, bias_ih, bias_hh)` or `torch.rnn_relu_cell`.

    input: (B, I). hx: (B, H); None: zeros. weight_ih: (H, I). weight_hh: (H, H). bias_ih, bias_hh: (H,) or None.
    Returns h', (B, H). Dtypes: what PyTorch supports on the device. Differentiable to any order.
    Raises RuntimeError for an unknown nonlinearity and for sizes that do not fit together, ValueError for an unknown
    backend.
    """
    weights = (weight_ih, weight_hh, bias_ih, bias_hh)
    return cell(cell_mode(nonlinearity), input, hx, weights, backend)


def gru_cell(
    input: Tensor,
    hx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """One step of a gated recurrent unit; its formula is `gru`'s.

    Equivalent to: `torch.gru_cell(input, hx, weight_ih, weight_hh, bias_ih, bias_hh)`.

    input: (B, I). hx: (B, H); None: zeros. weight_ih: (3 H, I). weight_hh: (3 H, H). bias_ih, bias_hh: (3 H,) or None.
    Returns h', (B, H). All else: `rnn_cell`.
    """
    return cell("GRU", input, hx, (weight_ih, weight_hh, bias_ih, bias_hh), backend)


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of a long short-term memory; its formula is `lstm`'s.

    Equivalent to: `torch.lstm_cell(input, hx, weight_ih, weight_hh, bias_ih, bias_hh)`.

    input: (B, I). hx: (h, c), (B, H) each; None: zeros. weight_ih: (4 H, I). weight_hh: (4 H, H). bias_ih, bias_hh:
    (4 H,) or None. Returns (h', c'), (B, H) each. All else: `rnn_cell`.
    """
    return cell("LSTM", input, hx, (weight_ih, weight_hh, bias_ih, bias_hh), backend)


def cell_mode(nonlinearity: str) -> str:
    """An RNNCell's mode; RuntimeError for an unknown nonlinearity."""
    if nonlinearity == "tanh":
        return "RNN_TANH"
    if nonlinearity == "relu":
        return "RNN_RELU"
    raise RuntimeError(f"Unknown nonlinearity: {nonlinearity}")


def _cell_case(
    device: torch.device,
    dtype: torch.dtype,
    mode: str,
    input_size: int,
    hidden_size: int,
    gradients: bool,
    transformed: bool,
) -> Case:
    dtype = compute_dtype(device.type, dtype)
    of_call = {"transformed": transformed, "autocast": autocasts(device.type), "gradients": gradients}
    return Case(device.type, dtype, mode, input_size, hidden_size, cell=True, **of_call)


def cell(
    mode: str,
    input: Tensor,
    hx: Any,
    weights: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    backend: str | None,
) -> Any:
    """What `rnn_cell`, `gru_cell` and `lstm_cell` return."""
    gradients, traced = torch.is_grad_enabled(), torch.compiler.is_compiling()
    facts = (input.device, input.dtype, mode, input.shape[-1], weights[1].shape[1], gradients, traced)
    if not (gradients or traced):
        found = at_once(mode, facts, input, hx, weights, backend)
        if found is not None:
            return found
    h, c = states_of(mode, hx)
    if state := _cell(mode, facts, (input, h, c, *weights), backend):
        return state if mode == "LSTM" else state[0]
    if hx is None:
        zeros = input.new_zeros(input.shape[0], weights[1].shape[1])
        hx = (zeros, zeros) if mode == "LSTM" else zeros
    return getattr(torch._VF, f"{mode.lower()}_cell")(input, hx, *weights)


def _cell(mode: str, facts: tuple, operands: Operands, backend: str | None) -> tuple[Tensor, Tensor] | None:
    """The state after one step, (h, c), without c h twice; None where it is for PyTorch to compute or to refuse."""
    chosen: str | None = OP.select_by(facts, _cell_case, backend)
    if chosen == "torch":
        if torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled():
            return None
        if not is_transforming() or asked_for(backend):
            return None
        chosen = None  # the layer finds the formula where one is needed
    elif chosen == "cpu" and not torch.is_grad_enabled():
        tensors = [x for x in operands if x is not None]
        if is_plain(tensors) and not needs_formula(tensors):
            return step(mode, operands)
    input, h, c, *weights = operands
    given = [weight for weight in weights if weight is not None]
    states = [state for state in (h, c) if state is not None]
    if not fits(mode, operands) and not torch._C._is_any_autocast_enabled():
        return None
    # the state after a sequence of one step
    first = [state.unsqueeze(0) for state in states] or None
    _, *last = recurrent(mode, input.unsqueeze(0), first, [given], Options(), chosen)
    return last[0].squeeze(0), last[-1].squeeze(0)


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
