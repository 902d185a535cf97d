"""The layers and losses as functions, shaped like torch.nn.functional."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from .dispatch import needs_formula
from .ops.adversarial import equations as adversarial_equations
from .ops.adversarial.backends import OP as ADVERSARIAL
from .ops.adversarial.backends import Case as AdversarialCase
from .ops.adversarial.equations import MODES, Mode, Term
from .ops.adversarial.op import loss as adversarial_loss
from .ops.adversarial.penalties import (
    dragan_penalty,
    max_gradient_penalty,
    r1_penalty,
    r2_penalty,
    wgan_penalty,
    zero_centered_penalty,
)
from .ops.adversarial.weighting import adaptive_weight
from .ops.conv_transpose.backends import OP as CONV_TRANSPOSE
from .ops.conv_transpose.backends import Case as ConvTransposeCase
from .ops.rnn.backends import OP as RNN
from .ops.rnn.backends import Case as RnnCase

__all__ = [
    "adaptive_weight",
    "adversarial_discriminator_loss",
    "adversarial_generator_loss",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "dragan_penalty",
    "gru",
    "gru_cell",
    "lstm",
    "lstm_cell",
    "max_gradient_penalty",
    "r1_penalty",
    "r2_penalty",
    "rnn",
    "rnn_cell",
    "wgan_penalty",
    "zero_centered_penalty",
]

Logits = Tensor | Sequence[Tensor]


def adversarial_discriminator_loss(
    real_logits: Logits,
    fake_logits: Logits,
    mode: str = "non-saturating",
    *,
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """The discriminator's loss: the mean over each tensor, real + fake added (no factor 0.5), summed over a list.

    Equivalent to, for mode "non-saturating" and one tensor each:
    `scale * (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean())`; the other modes are in
    ops/adversarial/equations.py.

    real_logits, fake_logits: a tensor of any shape, or a list of tensors of any shapes, one per discriminator; the two
        lists have one length. float64, float32, float16 or bfloat16; 16-bit logits accumulate in float32.
    mode: "non-saturating", "hinge", "lsgan" (targets 1 and 0) or "wasserstein".
    backend: "torch", "cpu" or None (mmfast chooses).
    Returns the loss, a tensor without dimensions, in the logits' dtype (float32 under autocast).
    Differentiable to any order in eager.
    Raises ValueError for an unknown mode or backend, an empty list or lists of different lengths; RuntimeError for
        logits that are not floating point or not on one device.
    """
    real, fake = _as_list("real_logits", real_logits), _as_list("fake_logits", fake_logits)
    if len(real) != len(fake):
        raise ValueError(
            f"real_logits has {len(real)} tensors and fake_logits {len(fake)}; expected one of each per discriminator"
        )
    terms = _mode(mode)
    real_term, fake_term = _scaled(terms.real, scale), _scaled(terms.fake, scale)
    # real and fake of one discriminator side by side, so that terms are added in the order a user would add them
    logits = [x for pair in zip(real, fake, strict=True) for x in pair]
    return _adversarial([real_term, fake_term] * len(real), logits, backend)


def adversarial_generator_loss(
    fake_logits: Logits,
    real_logits: Logits | None = None,
    mode: str = "non-saturating",
    *,
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """The generator's loss: the mean over each tensor, summed over a list.

    Equivalent to, for mode "non-saturating" and one tensor: `scale * F.softplus(-fake_logits).mean()`; the other modes
    are in ops/adversarial/equations.py.

    fake_logits: a tensor of any shape, or a list of tensors of any shapes, one per discriminator. Dtypes, result and
        errors as `adversarial_discriminator_loss`.
    real_logits: accepted for modes that compare with them; none of the present ones does.
    """
    logits = _as_list("fake_logits", fake_logits)
    term = _scaled(_mode(mode).generator, scale)
    return _adversarial([term] * len(logits), logits, backend)


def _as_list(name: str, logits: Logits) -> list[Tensor]:
    tensors = [logits] if isinstance(logits, Tensor) else list(logits)
    if not tensors:
        raise ValueError(f"{name} is an empty list; expected a tensor or a list of at least one tensor")
    for x in tensors:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} holds a {type(x).__name__}; expected a tensor or a list of tensors")
        if not x.is_floating_point():
            raise RuntimeError(f"{name} holds logits of dtype {x.dtype}; expected a floating-point dtype")
    return tensors


def _mode(mode: str) -> Mode:
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; accepted: {', '.join(map(repr, MODES))}")
    return MODES[mode]


def _scaled(term: Term, scale: float) -> Term:
    return term if scale == 1 else term._replace(weight=term.weight * scale)


def _adversarial(terms: list[Term], logits: list[Tensor], backend: str | None) -> Tensor:
    first = logits[0]
    if any(x.device != first.device for x in logits):
        devices = sorted({str(x.device) for x in logits})
        raise RuntimeError(f"the logits are on {' and '.join(devices)}; expected all on one device")
    dtype = first.dtype
    for x in logits:
        if x.dtype != dtype:
            dtype = torch.promote_types(dtype, x.dtype)
    if dtype.itemsize == 2 and _autocasts(first.device.type):
        dtype = torch.float32
    logits = [x if x.dtype == dtype else x.to(dtype) for x in logits]
    chosen = ADVERSARIAL.select(AdversarialCase(first.device.type, dtype), backend)
    if chosen == "torch" or needs_formula(logits):
        return adversarial_equations.total(terms, True, logits)
    return adversarial_loss(terms, True, logits, chosen)[0]


Weights = Sequence[Sequence[Tensor]]
Size = int | Sequence[int]

#: Rows of W_hh per hidden unit.
_GATES = {"RNN_TANH": 1, "RNN_RELU": 1, "GRU": 3, "LSTM": 4}


def rnn(
    input: Tensor,
    hx: Tensor | None,
    weights: Weights,
    *,
    nonlinearity: str = "tanh",
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A stack of Elman RNNs over whole sequences: h_t = tanh or relu (W_ih x_t + b_ih + W_hh h_{t-1} + b_hh).

    Equivalent to: the forward of `torch.nn.RNN` with these parameters, which is `torch._VF.rnn_tanh` or `rnn_relu`.

    With L layers, D = 2 directions (1 without bidirectional), hidden size H:
    input: (T, B, I); with batch_first (B, T, I); with batch_sizes (sum(batch_sizes), I), a PackedSequence's data.
    hx: (L * D, B, H), a packed batch's in the order of its data; None: zeros.
    weights: for each layer, for each direction, (w_ih, w_hh) or (w_ih, w_hh, b_ih, b_hh): w_ih (H, I), in later layers
        (H, D * H); w_hh (H, H); b_ih and b_hh (H,). Those of gru and lstm have 3 H and 4 H rows, gate after gate.
    dropout: the probability with which an output of each layer but the last is zeroed, in training only.
    batch_sizes: int64 on the CPU, a PackedSequence's: how many sequences have a step t, for each t.
    backend: "torch", "cpu", "triton", "cuda" or None (mmfast chooses).
    Returns (output, h_n): output (T, B, D * H), in the layout of the input; h_n (L * D, B, H).
    Dtypes: what PyTorch supports on the device; autocast as for torch.nn.RNN. Differentiable as torch.nn.RNN.
    Raises ValueError for an unknown nonlinearity or backend, RuntimeError for sizes that do not fit together.
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    mode = "RNN_TANH" if nonlinearity == "tanh" else "RNN_RELU"
    options = (dropout, training, bidirectional, batch_first, batch_sizes)
    output, h_n = _recurrent(mode, input, hx, weights, *options, backend)
    return output, h_n


def gru(
    input: Tensor,
    hx: Tensor | None,
    weights: Weights,
    *,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A stack of gated recurrent units over whole sequences, in PyTorch's form:

        r, z = sigmoid(W_i x_t + b_i + W_h h_{t-1} + b_h) of their gates
        n = tanh(W_in x_t + b_in + r * (W_hn h_{t-1} + b_hn))
        h_t = (1 - z) * n + z * h_{t-1}

    Equivalent to: the forward of `torch.nn.GRU` with these parameters, which is `torch._VF.gru`.
    All else: `rnn`, with 3 H rows in the order r, z, n in each weight. Source: Cho et al., arXiv:1406.1078.
    """
    options = (dropout, training, bidirectional, batch_first, batch_sizes)
    output, h_n = _recurrent("GRU", input, hx, weights, *options, backend)
    return output, h_n


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weights: Weights,
    *,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """A stack of long short-term memories over whole sequences:

        i, f, o = sigmoid(W_i x_t + b_i + W_h h_{t-1} + b_h) of their gates, g = tanh of its
        c_t = f * c_{t-1} + i * g
        h_t = o * tanh(c_t), with a projection W_hr (o * tanh(c_t))

    Equivalent to: the forward of `torch.nn.LSTM` with these parameters, which is `torch._VF.lstm`.

    hx: None or (h, c): h (L * D, B, P), c (L * D, B, H), where P is the projection's size, without one H.
    weights: as `rnn`'s, with 4 H rows in the order i, f, g, o in each weight; with a projection each tuple ends with
        w_hr (P, H), and w_hh is (4 H, P).
    Returns (output, (h_n, c_n)): output (T, B, D * P). All else: `rnn`. Sources: Hochreiter and Schmidhuber, 1997,
    doi:10.1162/neco.1997.9.8.1735; projection: Sak et al., arXiv:1402.1128.
    """
    options = (dropout, training, bidirectional, batch_first, batch_sizes)
    output, h_n, c_n = _recurrent("LSTM", input, hx, weights, *options, backend)
    return output, (h_n, c_n)


def _recurrent(
    mode: str,
    input: Tensor,
    hx: Tensor | tuple[Tensor, Tensor] | None,
    weights: Weights,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, ...]:
    first = weights[0]
    hidden_size = first[1].shape[0] // _GATES[mode]
    proj_size = first[-1].shape[0] if len(first) in (3, 5) else 0
    sizes = (input.shape[-1], hidden_size, proj_size)
    facts = (input.device, input.dtype, mode, *sizes, bidirectional, batch_sizes is not None)
    RNN.select_by(facts, _rnn_case, backend)
    if hx is None:
        hx = _zero_states(mode, input, len(weights), hidden_size, proj_size, batch_first, batch_sizes)
    function = _recurrent_outside_graphs if torch.compiler.is_compiling() else _recurrent_of_torch
    return function(mode, input, hx, weights, dropout, training, bidirectional, batch_first, batch_sizes)


def _rnn_case(device: torch.device, dtype: torch.dtype, mode: str, *rest: Any) -> RnnCase:
    return RnnCase(device.type, _compute_dtype(device.type, dtype), mode, *rest)


def _zero_states(
    mode: str,
    input: Tensor,
    rows: int,
    hidden_size: int,
    proj_size: int,
    batch_first: bool,
    batch_sizes: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:
    batch = input.shape[0 if batch_first else 1] if batch_sizes is None else int(batch_sizes[0])
    h = input.new_zeros(rows, batch, proj_size or hidden_size)
    return (h, input.new_zeros(rows, batch, hidden_size)) if mode == "LSTM" else h


def _recurrent_of_torch(
    mode: str,
    input: Tensor,
    hx: Tensor | tuple[Tensor, Tensor],
    weights: Weights,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None,
) -> tuple[Tensor, ...]:
    function = getattr(torch._VF, mode.lower())
    flat = [weight for layer in weights for weight in layer]
    biases = len(weights[0]) > 3
    layers = len(weights) // (2 if bidirectional else 1)
    options = (flat, biases, layers, dropout, training, bidirectional)
    if batch_sizes is not None:
        return function(input, batch_sizes, hx, *options)
    return function(input, hx, *options, batch_first)


# Traced, PyTorch's function would become one graph node per step and gate; it runs between two graphs instead, as
# torch.nn's own layers do
_recurrent_outside_graphs = _disable_dynamo(_recurrent_of_torch)


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
    if nonlinearity not in ("tanh", "relu"):
        raise RuntimeError(f"Unknown nonlinearity: {nonlinearity}")
    tanh = nonlinearity == "tanh"
    _select_cell("RNN_TANH" if tanh else "RNN_RELU", input, weight_hh, backend)
    hx = _zero_cell_state(input, weight_hh) if hx is None else hx
    function = torch._VF.rnn_tanh_cell if tanh else torch._VF.rnn_relu_cell
    return function(input, hx, weight_ih, weight_hh, bias_ih, bias_hh)


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
    _select_cell("GRU", input, weight_hh, backend)
    hx = _zero_cell_state(input, weight_hh) if hx is None else hx
    return torch._VF.gru_cell(input, hx, weight_ih, weight_hh, bias_ih, bias_hh)


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
    _select_cell("LSTM", input, weight_hh, backend)
    if hx is None:
        zeros = _zero_cell_state(input, weight_hh)
        hx = (zeros, zeros)
    return torch._VF.lstm_cell(input, hx, weight_ih, weight_hh, bias_ih, bias_hh)


def _select_cell(mode: str, input: Tensor, weight_hh: Tensor, backend: str | None) -> str:
    facts = (input.device, input.dtype, mode, input.shape[-1], weight_hh.shape[1])
    return RNN.select_by(facts, _rnn_case, backend)


def _zero_cell_state(input: Tensor, weight_hh: Tensor) -> Tensor:
    return input.new_zeros(input.shape[0], weight_hh.shape[1])


def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
    *,
    backend: str | None = None,
) -> Tensor:
    """A transposed convolution over sequences.

    Equivalent to: `torch.nn.functional.conv_transpose1d`, in every argument, dtype and error.

    input: (N, Cin, L) or (Cin, L). weight: (Cin, Cout / groups, K). bias: (Cout,) or None.
    Returns (N, Cout, L') or (Cout, L'), L' = (L - 1) * stride - 2 * padding + dilation * (K - 1) + output_padding + 1.
    backend: "torch", "cpu", "triton", "cuda" or None (mmfast chooses); ValueError for any other.
    Differentiable to any order.
    """
    _select_conv_transpose(1, input, weight, stride, padding, output_padding, groups, dilation, backend)
    return torch.conv_transpose1d(input, weight, bias, stride, padding, output_padding, groups, dilation)


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
    *,
    backend: str | None = None,
) -> Tensor:
    """A transposed convolution over images.

    Equivalent to: `torch.nn.functional.conv_transpose2d`, in every argument, dtype and error.

    input: (N, Cin, H, W) or (Cin, H, W). weight: (Cin, Cout / groups, Kh, Kw). All else: `conv_transpose1d`.
    """
    _select_conv_transpose(2, input, weight, stride, padding, output_padding, groups, dilation, backend)
    return torch.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)


def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
    *,
    backend: str | None = None,
) -> Tensor:
    """A transposed convolution over volumes.

    Equivalent to: `torch.nn.functional.conv_transpose3d`, in every argument, dtype and error.

    input: (N, Cin, D, H, W) or (Cin, D, H, W). weight: (Cin, Cout / groups, Kd, Kh, Kw). All else: `conv_transpose1d`.
    """
    _select_conv_transpose(3, input, weight, stride, padding, output_padding, groups, dilation, backend)
    return torch.conv_transpose3d(input, weight, bias, stride, padding, output_padding, groups, dilation)


def _select_conv_transpose(
    dims: int,
    input: Tensor,
    weight: Tensor,
    stride: Size,
    padding: Size,
    output_padding: Size,
    groups: int,
    dilation: Size,
    backend: str | None,
) -> str:
    # what is no transposed convolution at all, PyTorch refuses, with its own error
    if not (isinstance(input, Tensor) and isinstance(weight, Tensor) and weight.dim() == dims + 2):
        return "torch"
    facts = (input.device, input.dtype, weight.shape, stride, padding, output_padding, groups, dilation)
    return CONV_TRANSPOSE.select_by(facts, _conv_transpose_case, backend)


def _conv_transpose_case(
    device: torch.device,
    dtype: torch.dtype,
    shape: torch.Size,
    stride: Size,
    padding: Size,
    output_padding: Size,
    groups: int,
    dilation: Size,
) -> ConvTransposeCase:
    in_channels, group_channels, *kernel_size = shape
    dims = len(kernel_size)
    return ConvTransposeCase(
        device.type,
        _compute_dtype(device.type, dtype),
        in_channels,
        group_channels * groups,
        tuple(kernel_size),
        _per_dim(stride, dims),
        _per_dim(padding, dims),
        _per_dim(output_padding, dims),
        _per_dim(dilation, dims),
        groups,
    )


def _per_dim(size: Size, dims: int) -> tuple[int, ...]:
    if isinstance(size, Sequence):
        return tuple(size) if len(size) == dims else tuple(size) * dims
    return (size,) * dims


def _compute_dtype(device: str, dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or autocast's where that is on for the device and applies to `dtype`."""
    if dtype == torch.float64 or not dtype.is_floating_point or not _autocasts(device):
        return dtype
    return torch.get_autocast_dtype(device)


def _autocasts(device: str) -> bool:
    """Whether autocast is on for the device; some devices, such as meta, have none."""
    return (
        torch._C._is_any_autocast_enabled()
        and torch.amp.is_autocast_available(device)
        and torch.is_autocast_enabled(device)
    )
