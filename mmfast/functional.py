"""The layers and losses as functions, shaped like torch.nn.functional."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .dispatch import autocasts, is_plain, is_transforming, needs_formula
from .ops.adversarial.losses import (
    adversarial_discriminator_loss,
    adversarial_generator_loss,
    feature_matching,
    lecam_penalty,
    matching_discriminator_loss,
)
from .ops.adversarial.penalties import (
    dragan_penalty,
    max_gradient_penalty,
    r1_penalty,
    r2_penalty,
    wgan_penalty,
    zero_centered_penalty,
)
from .ops.adversarial.weighting import adaptive_weight
from .ops.conv_transpose import equations as conv_transpose_equations
from .ops.conv_transpose.backends import OP as CONV_TRANSPOSE
from .ops.conv_transpose.backends import Case as ConvTransposeCase
from .ops.conv_transpose.equations import ACTIVATIONS as CONV_TRANSPOSE_ACTIVATIONS
from .ops.conv_transpose.equations import Epilogue as ConvTransposeEpilogue
from .ops.conv_transpose.equations import Geometry as ConvTransposeGeometry
from .ops.conv_transpose.op import conv_transpose as conv_transpose_op
from .ops.library import needs_gradient
from .ops.rnn import cell as one_step
from .ops.rnn import equations as rnn_equations
from .ops.rnn.backends import BRIEF, FEW, LARGE, LONG, MANY, SHORT, VAST
from .ops.rnn.backends import OP as RNN
from .ops.rnn.backends import Case as RnnCase
from .ops.rnn.cudnn import StockLayers
from .ops.rnn.equations import GATES
from .ops.rnn.equations import Layer as RnnLayer
from .ops.rnn.op import sequence as rnn_sequence

__all__ = [
    "adaptive_weight",
    "adversarial_discriminator_loss",
    "adversarial_generator_loss",
    "conv_transpose1d",
    "conv_transpose1d_norm_act",
    "conv_transpose2d",
    "conv_transpose2d_norm_act",
    "conv_transpose3d",
    "conv_transpose3d_norm_act",
    "dragan_penalty",
    "feature_matching",
    "gru",
    "gru_cell",
    "lecam_penalty",
    "lstm",
    "lstm_cell",
    "matching_discriminator_loss",
    "max_gradient_penalty",
    "r1_penalty",
    "r2_penalty",
    "rnn",
    "rnn_cell",
    "wgan_penalty",
    "zero_centered_penalty",
]

Weights = Sequence[Sequence[Tensor]]
Size = int | Sequence[int]


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
    lengths: Tensor | None = None,
    reset_mask: Tensor | None = None,
    zoneout: float = 0.0,
    recurrent_dropout: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A stack of Elman RNNs over whole sequences: h_t = tanh or relu (W_ih x_t + b_ih + W_hh h_{t-1} + b_hh).

    Equivalent to: the forward of `torch.nn.RNN` with these parameters, which is `torch._VF.rnn_tanh` or `rnn_relu`;
    lengths, reset_mask, zoneout and recurrent_dropout are what PyTorch lacks.

    With L layers, D = 2 directions (1 without bidirectional), hidden size H:
    input: (T, B, I); with batch_first (B, T, I); with batch_sizes (sum(batch_sizes), I), a PackedSequence's data.
    hx: (L * D, B, H), a packed batch's in the order of its data; None: zeros.
    weights: for each layer, for each direction, (w_ih, w_hh) or (w_ih, w_hh, b_ih, b_hh): w_ih (H, I), in later layers
        (H, D * H); w_hh (H, H); b_ih and b_hh (H,). Those of gru and lstm have 3 H and 4 H rows, gate after gate.
    dropout: the probability with which an output of each layer but the last is zeroed, in training only.
    batch_sizes: int64 on the CPU, a PackedSequence's: how many sequences have a step t, for each t.
    lengths: (B,), integers: the steps of each sequence of a padded batch, in any order. Outputs past a length are 0,
        h_n is the state after each sequence's last step, and the reverse direction begins there. On the CPU each must
        be in [1, T]; on another device, and in a compiled graph, they are clamped to [0, T], unseen.
    reset_mask: bool or integers, the input's shape without its last dimension: where it is true a sequence begins anew,
        so that no state passes between this step and the one before, in neither direction; at step 0 it puts zeros in
        the place of hx. A sequence with resets gives what its parts, cut there, give one by one.
    zoneout: the probability with which a unit of h_t stays h_{t-1} in training (not c_t); in evaluation h_t is the
        mean of the two with this weight. Source: Krueger et al., arXiv:1606.01305.
    recurrent_dropout: the probability with which a unit of h_{t-1} is zeroed in its product with w_hh, at all steps of
        a sequence alike, in training only; the rest are divided by 1 - recurrent_dropout. Source: Gal and Ghahramani,
        arXiv:1512.05287. Both masks are drawn by torch's generator.
    backend: "torch", "cpu", "triton", "cuda" or None (mmfast chooses).
    Returns (output, h_n): output (T, B, D * H), in the layout of the input; h_n (L * D, B, H).
    Dtypes: what PyTorch supports on the device; autocast as for torch.nn.RNN. Differentiable to any order in eager.
    Raises ValueError for an unknown nonlinearity or backend and for a probability outside [0, 1), RuntimeError for
        sizes that do not fit together, lengths out of range and masks of another dtype or device.
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    mode = "RNN_TANH" if nonlinearity == "tanh" else "RNN_RELU"
    options = _Options(
        dropout, training, bidirectional, batch_first, batch_sizes, lengths, reset_mask, zoneout, recurrent_dropout
    )
    output, h_n = _recurrent(mode, input, None if hx is None else (hx,), weights, options, backend)
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
    lengths: Tensor | None = None,
    reset_mask: Tensor | None = None,
    zoneout: float = 0.0,
    recurrent_dropout: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A stack of gated recurrent units over whole sequences, in PyTorch's form:

        r, z = sigmoid(W_i x_t + b_i + W_h h_{t-1} + b_h) of their gates
        n = tanh(W_in x_t + b_in + r * (W_hn h_{t-1} + b_hn))
        h_t = (1 - z) * n + z * h_{t-1}

    Equivalent to: the forward of `torch.nn.GRU` with these parameters, which is `torch._VF.gru`.
    All else: `rnn`, with 3 H rows in the order r, z, n in each weight. Source: Cho et al., arXiv:1406.1078.
    """
    options = _Options(
        dropout, training, bidirectional, batch_first, batch_sizes, lengths, reset_mask, zoneout, recurrent_dropout
    )
    output, h_n = _recurrent("GRU", input, None if hx is None else (hx,), weights, options, backend)
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
    lengths: Tensor | None = None,
    reset_mask: Tensor | None = None,
    zoneout: float = 0.0,
    recurrent_dropout: float = 0.0,
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
    options = _Options(
        dropout, training, bidirectional, batch_first, batch_sizes, lengths, reset_mask, zoneout, recurrent_dropout
    )
    output, h_n, c_n = _recurrent("LSTM", input, hx, weights, options, backend)
    return output, (h_n, c_n)


class _Options(NamedTuple):
    """Of a stack, as the functions above name them."""

    dropout: float = 0.0
    training: bool = False
    bidirectional: bool = False
    batch_first: bool = False
    batch_sizes: Tensor | None = None
    lengths: Tensor | None = None
    reset_mask: Tensor | None = None
    zoneout: float = 0.0
    recurrent_dropout: float = 0.0


def _recurrent(
    mode: str,
    input: Tensor,
    states: Sequence[Tensor] | None,
    weights: Weights,
    options: _Options,
    backend: str | None,
) -> tuple[Tensor, ...]:
    if options.batch_sizes is not None and torch.compiler.is_compiling():
        return _packed_outside_graphs(mode, input, states, weights, options, backend)
    batch_sizes = options.batch_sizes
    sizes = _recurrent_sizes(mode, weights, options.bidirectional)
    _check_recurrent_input(mode, input, weights, sizes, batch_sizes)
    batch = input.shape[0 if options.batch_first else 1] if batch_sizes is None else int(batch_sizes[0])
    shapes = [(len(weights), batch, sizes.proj_size or sizes.hidden_size)]
    if mode == "LSTM":
        shapes.append((len(weights), batch, sizes.hidden_size))
    if states is not None:
        _check_states(states, shapes)
    options = _checked_options(options, input, batch)
    seen = not torch.compiler.is_compiling()
    formula = seen and is_transforming()
    formula = formula and needs_formula([input, *(states or ()), *(weight for layer in weights for weight in layer)])
    # a graph is not compiled anew for another batch
    seen = seen and not formula
    kind = (options.bidirectional, batch_sizes is not None, options.lengths is not None, not seen)
    hidden, steps, gradients = sizes.hidden_size, _steps(input, options), torch.is_grad_enabled()
    many = not seen or (batch * hidden > MANY and (batch > FEW or hidden > LARGE)) or (gradients and steps <= BRIEF)
    short, vast = seen and steps <= SHORT[mode], seen and steps * batch * hidden >= VAST
    probed = seen and gradients and steps >= LONG and input.requires_grad and input.is_leaf
    extras = (options.reset_mask is not None, options.zoneout > 0, options.recurrent_dropout > 0)
    facts = (input.device, input.dtype, mode, *sizes, *kind, gradients, many, short, vast, probed, *extras)
    chosen = RNN.select_by(facts, _rnn_case, backend)
    if chosen != "torch":
        one: Any = rnn_equations.sequence if formula else partial(rnn_sequence, backend=chosen)
        return _recurrent_by_layers(one, mode, input, states or (), weights, options)
    if any(extras):
        walk = _extras_outside_graphs if torch.compiler.is_compiling() else _recurrent_by_layers
        return walk(rnn_equations.sequence, mode, input, states or (), weights, options)
    if states is None:
        states = [input.new_zeros(shape) for shape in shapes]
    function = _recurrent_outside_graphs if torch.compiler.is_compiling() else _recurrent_of_torch
    return function(mode, input, states, weights, options)


# Its steps depend on numbers in batch_sizes, which no graph knows; torch.nn's layers run between two graphs, too
_packed_outside_graphs = _disable_dynamo(_recurrent)


def _rnn_case(device: torch.device, dtype: torch.dtype, mode: str, *rest: Any) -> RnnCase:
    dtype = _compute_dtype(device.type, dtype)
    *kind, gradients, many, short, vast, probed, resets, zoneout, recurrent_dropout = rest
    facts = (autocasts(device.type), gradients, many, short, vast, probed, False, resets, zoneout, recurrent_dropout)
    return RnnCase._make((device.type, dtype, mode, *kind, *facts))


def _steps(input: Tensor, options: _Options) -> int:
    if options.batch_sizes is not None:
        return options.batch_sizes.shape[0]
    return input.shape[1 if options.batch_first else 0]


def _checked_options(options: _Options, input: Tensor, batch: int) -> _Options:
    """With lengths and reset_mask as tensors of the kernels' own dtypes. Raises for what is out of range."""
    if options.lengths is not None:
        lengths = _checked_lengths(options.lengths, input, batch, options.batch_first, options.batch_sizes)
        options = options._replace(lengths=lengths)
    for name in ("zoneout", "recurrent_dropout"):
        if not 0 <= getattr(options, name) < 1:
            raise ValueError(f"{name} is {getattr(options, name)}; expected a probability, at least 0 and below 1")
    mask = options.reset_mask
    if mask is None:
        return options
    if mask.shape != input.shape[:-1]:
        raise RuntimeError(
            f"reset_mask has the shape {tuple(mask.shape)}; expected the input's without its last dimension, "
            f"{tuple(input.shape[:-1])}"
        )
    if mask.is_floating_point() or mask.is_complex() or mask.device != input.device:
        raise RuntimeError(
            f"reset_mask is {mask.dtype} on {mask.device}; expected bool or integers on the input's {input.device}"
        )
    return options._replace(reset_mask=mask if mask.dtype == torch.bool else mask != 0)


def _checked_lengths(lengths: Any, input: Tensor, batch: int, batch_first: bool, batch_sizes: Tensor | None) -> Tensor:
    """lengths as a tensor; RuntimeError for what torch.nn.utils.rnn.pack_padded_sequence refuses."""
    if batch_sizes is not None:
        raise RuntimeError(
            "lengths were given with packed input, which has lengths of its own; expected one of the two"
        )
    lengths = torch.as_tensor(lengths)
    if lengths.is_floating_point() or lengths.dim() != 1:
        raise RuntimeError(
            f"lengths are {lengths.dtype} in {lengths.dim()} dimensions; expected integers in one dimension"
        )
    if lengths.shape[0] != batch:
        raise RuntimeError(f"Expected `len(lengths)` to be equal to batch_size, but got {len(lengths)} ({batch=})")
    if lengths.device.type == "cpu" and batch and is_plain([lengths]):
        shortest, longest, steps = int(lengths.min()), int(lengths.max()), input.shape[1 if batch_first else 0]
        if shortest <= 0:
            raise RuntimeError(f"Length of all samples has to be greater than 0, but a length is {shortest}")
        if longest > steps:
            raise RuntimeError(f"a length is {longest}, but the input has only {steps} steps")
    return lengths


class _Sizes(NamedTuple):
    input_size: int
    hidden_size: int
    proj_size: int


def _recurrent_sizes(mode: str, weights: Weights, bidirectional: bool) -> _Sizes:
    """The sizes that the first layer's weights tell; RuntimeError where any weight has another shape than they demand.

    Not even PyTorch's kernels check all of this: its LSTM reads beyond a weight that is too small.
    """
    directions = 2 if bidirectional else 1
    if not weights or len(weights) % directions or not 2 <= len(weights[0]) <= 5:
        raise RuntimeError(
            f"weights has {len(weights)} tuples; expected {directions} per layer, each (w_ih, w_hh), "
            "(w_ih, w_hh, b_ih, b_hh), or with a projection one of these and w_hr"
        )
    w_ih, w_hh, *rest = weights[0]
    rows, output_size = w_hh.shape
    hidden_size = rows // GATES[mode]
    proj_size = output_size if len(rest) % 2 else 0
    expected = [(rows, w_ih.shape[-1]), (rows, proj_size or hidden_size), *[(rows,)] * (len(rest) // 2 * 2)]
    if proj_size:
        expected.append((proj_size, hidden_size))
    for index, layer in enumerate(weights):
        if index == directions:
            expected[0] = (rows, output_size * directions)
        shapes = [weight.shape for weight in layer]
        if shapes != expected:
            raise RuntimeError(f"weights[{index}] has the shapes {list(map(tuple, shapes))}; expected {expected}")
    return _Sizes(w_ih.shape[-1], hidden_size, proj_size)


def _check_recurrent_input(
    mode: str, input: Tensor, weights: Weights, sizes: _Sizes, batch_sizes: Tensor | None
) -> None:
    """PyTorch's checks, with its words."""
    dtype = weights[0][0].dtype
    if input.dtype != dtype and not torch._C._is_any_autocast_enabled():
        # torch.nn.LSTM leaves the dtype of packed input to its kernel
        error = RuntimeError if mode == "LSTM" and batch_sizes is not None else ValueError
        raise error(
            f"RNN input dtype ({input.dtype}) does not match weight dtype ({dtype}). "
            f"Convert input: input.to({dtype}), or convert model: model.to({input.dtype})"
        )
    dims = 3 if batch_sizes is None else 2
    if input.dim() != dims:
        raise RuntimeError(f"input must have {dims} dimensions, got {input.dim()}")
    if input.shape[-1] != sizes.input_size:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {sizes.input_size}, got {input.shape[-1]}"
        )


def _check_states(states: Sequence[Tensor], shapes: list[tuple[int, int, int]]) -> None:
    for index, (state, shape) in enumerate(zip(states, shapes, strict=True)):
        which = "hidden" if len(shapes) == 1 else f"hidden[{index}]"
        if state.shape != shape:
            raise RuntimeError(f"Expected {which} size {shape}, got {list(state.shape)}")


def _recurrent_by_layers(
    function: Callable[..., tuple[Tensor, Tensor, Tensor | None]],
    mode: str,
    input: Tensor,
    states: Sequence[Tensor],
    weights: Weights,
    options: _Options,
) -> tuple[Tensor, ...]:
    """The stack, each layer by `function(x, weights, h0, c0, layer)`, between them dropout as PyTorch draws it."""
    directions = 2 if options.bidirectional else 1
    transposed = options.batch_first and options.batch_sizes is None
    x = input.transpose(0, 1).contiguous() if transposed else input
    resets = options.reset_mask
    if resets is not None:
        resets = (resets.transpose(0, 1) if transposed else resets).contiguous()
    base = RnnLayer(mode, directions, options.batch_sizes, options.lengths, resets)
    last: list[tuple[Tensor, ...]] = []
    for start in range(0, len(weights), directions):
        if start and options.dropout and options.training:
            x = torch.dropout(x, options.dropout, True)
        rows = slice(start, start + directions)
        flat = [weight for part in weights[rows] for weight in part]
        h0, c0 = (*(state if len(weights) == directions else state[rows] for state in states), None, None)[:2]
        x, hn, cn = function(x, flat, h0, c0, _masked(base, x, flat[1].shape[1], options))
        last.append((hn, cn) if mode == "LSTM" else (hn,))  # type: ignore[arg-type]
    hx = last[0] if len(last) == 1 else tuple(torch.cat(each) for each in zip(*last, strict=True))
    return x.transpose(0, 1) if transposed else x, *hx


def _masked(layer: RnnLayer, x: Tensor, output_size: int, options: _Options) -> RnnLayer:
    """The layer with masks drawn for recurrent dropout and zoneout, in this order, in training; else with its rate."""
    if options.recurrent_dropout and options.training:
        batch = x.shape[1] if layer.batch_sizes is None else int(layer.batch_sizes[0])
        keep = 1 - options.recurrent_dropout
        drop = torch.bernoulli(x.new_full((layer.directions, batch, output_size), keep)).div_(keep)
        layer = layer._replace(dropout_mask=drop)
    if not options.zoneout:
        return layer
    if not options.training:
        return layer._replace(zoneout=options.zoneout)
    shape = (*x.shape[:-1], layer.directions * output_size)
    mask = torch.bernoulli(torch.full(shape, options.zoneout, device=x.device)).bool()
    return layer._replace(zoneout_mask=mask)


_extras_outside_graphs = _disable_dynamo(_recurrent_by_layers)


def _recurrent_of_torch(
    mode: str, input: Tensor, states: Sequence[Tensor], weights: Weights, options: _Options
) -> tuple[Tensor, ...]:
    if options.lengths is not None:
        return _lengths_of_torch(mode, input, states, weights, options)
    if _is_cudnns(input, options):
        tensors = [input, *states, *(weight for layer in weights for weight in layer)]
        if is_plain(tensors) and not needs_formula(tensors) and needs_gradient(tensors):
            return _recurrent_of_cudnn(mode, input, states, weights, options)
    return _recurrent_of_aten(mode, input, states, weights, options)


def _is_cudnns(input: Tensor, options: _Options) -> bool:
    """Whether cuDNN serves PyTorch's layers, and no mask of its own dropout is in the way of a formula."""
    return input.is_cuda and torch.backends.cudnn.enabled and not (options.dropout and options.training)


def _recurrent_of_cudnn(
    mode: str, input: Tensor, states: Sequence[Tensor], weights: Weights, options: _Options
) -> tuple[Tensor, ...]:
    # nothing is dropped: in training mode for the workspace that a backward needs
    options, count = options._replace(dropout=0.0, training=True), len(states)

    def run(function: Callable[..., tuple[Tensor, ...]], x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        flat = iter(rest[count:])
        parts = [tuple(next(flat) for _ in layer) for layer in weights]
        return function(mode, x, rest[:count], parts, options)

    formula = partial(_recurrent_by_layers, rnn_equations.sequence)
    flat = [weight for layer in weights for weight in layer]
    return StockLayers.apply(partial(run, _recurrent_of_aten), partial(run, formula), input, *states, *flat)


def _recurrent_of_aten(
    mode: str, input: Tensor, states: Sequence[Tensor], weights: Weights, options: _Options
) -> tuple[Tensor, ...]:
    function = getattr(torch._VF, mode.lower())
    flat = [weight for layer in weights for weight in layer]
    biases = len(weights[0]) > 3
    layers = len(weights) // (2 if options.bidirectional else 1)
    shape = (flat, biases, layers, options.dropout, options.training, options.bidirectional)
    hx = states if mode == "LSTM" else states[0]
    if options.batch_sizes is not None:
        return function(input, options.batch_sizes, hx, *shape)
    return function(input, hx, *shape, options.batch_first)


def _lengths_of_torch(
    mode: str, input: Tensor, states: Sequence[Tensor], weights: Weights, options: _Options
) -> tuple[Tensor, ...]:
    """By way of a PackedSequence."""
    batch_first = options.batch_first
    packed = pack_padded_sequence(input, options.lengths.cpu(), batch_first, enforce_sorted=False)  # type: ignore[union-attr]
    states = [state.index_select(1, packed.sorted_indices) for state in states]  # type: ignore[arg-type]
    options = options._replace(batch_first=False, batch_sizes=packed.batch_sizes, lengths=None)
    output, *last = _recurrent_of_torch(mode, packed.data, states, weights, options)
    packed = PackedSequence(output, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
    output, _ = pad_packed_sequence(packed, batch_first, total_length=input.shape[1 if batch_first else 0])
    return output, *(state.index_select(1, packed.unsorted_indices) for state in last)  # type: ignore[arg-type]


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
    mode, weights = "RNN_TANH" if tanh else "RNN_RELU", (weight_ih, weight_hh, bias_ih, bias_hh)
    if found := _cell(mode, input, hx, None, weights, backend):
        return found[0]
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
    if found := _cell("GRU", input, hx, None, (weight_ih, weight_hh, bias_ih, bias_hh), backend):
        return found[0]
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
    h, c = (None, None) if hx is None else hx
    if found := _cell("LSTM", input, h, c, (weight_ih, weight_hh, bias_ih, bias_hh), backend):
        return found
    if hx is None:
        zeros = _zero_cell_state(input, weight_hh)
        hx = (zeros, zeros)
    return torch._VF.lstm_cell(input, hx, weight_ih, weight_hh, bias_ih, bias_hh)


def _cell_case(
    device: torch.device, dtype: torch.dtype, mode: str, input_size: int, hidden_size: int, gradients: bool
) -> RnnCase:
    dtype, autocast = _compute_dtype(device.type, dtype), autocasts(device.type)
    return RnnCase(device.type, dtype, mode, input_size, hidden_size, autocast=autocast, gradients=gradients, cell=True)


def _cell(
    mode: str,
    input: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    weights: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    backend: str | None,
) -> tuple[Tensor, Tensor] | None:
    """The state after one step, (h, c), without c h twice; None where it is for PyTorch to compute or to refuse."""
    gradients = torch.is_grad_enabled()
    facts = (input.device, input.dtype, mode, input.shape[-1], weights[1].shape[1], gradients)
    if not (gradients or torch.compiler.is_compiling()):
        found = one_step.at_once(mode, facts, (input, h, c, *weights), backend)
        if found is not None:
            return found
    chosen = RNN.select_by(facts, _cell_case, backend)
    if chosen == "torch":
        return None
    if chosen == "cpu" and not gradients:
        tensors = [x for x in (input, h, c, *weights) if x is not None]
        if is_plain(tensors) and not needs_formula(tensors):
            return one_step.step(mode, (input, h, c, *weights))
    given = [weight for weight in weights if weight is not None]
    states = [state for state in (h, c) if state is not None]
    if not one_step.fits(mode, (input, h, c, *weights)) and not torch._C._is_any_autocast_enabled():
        return None
    # the state after a sequence of one step
    first = [state.unsqueeze(0) for state in states] or None
    _, *last = _recurrent(mode, input.unsqueeze(0), first, [given], _Options(), chosen)
    return last[0].squeeze(0), last[-1].squeeze(0)


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
    geometry: Any = (stride, padding, output_padding, groups, dilation)
    chosen = _select_conv_transpose(1, input, weight, *geometry, backend)
    if chosen == "torch":
        return torch.conv_transpose1d(input, weight, bias, *geometry)
    arguments: Any = (1, input, weight, bias, *geometry, chosen)
    return _conv_transpose(*arguments)


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
    geometry: Any = (stride, padding, output_padding, groups, dilation)
    chosen = _select_conv_transpose(2, input, weight, *geometry, backend)
    if chosen == "torch":
        return torch.conv_transpose2d(input, weight, bias, *geometry)
    arguments: Any = (2, input, weight, bias, *geometry, chosen)
    return _conv_transpose(*arguments)


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
    geometry: Any = (stride, padding, output_padding, groups, dilation)
    chosen = _select_conv_transpose(3, input, weight, *geometry, backend)
    if chosen == "torch":
        return torch.conv_transpose3d(input, weight, bias, *geometry)
    arguments: Any = (3, input, weight, bias, *geometry, chosen)
    return _conv_transpose(*arguments)


_SPATIAL = ("sequences", "images", "volumes")


def _norm_act(dims: int) -> Callable[..., Any]:
    """conv_transpose*d_norm_act of so many spatial dimensions."""

    def conv_transpose_norm_act(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        dilation: Size = 1,
        *,
        crop: Sequence[tuple[int, int]] | tuple[int, int] = (0, 0),
        norm: str | None = None,
        norm_weight: Tensor | None = None,
        norm_bias: Tensor | None = None,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
        activation: str | None = None,
        negative_slope: float = 0.01,
        statistics: bool = False,
        backend: str | None = None,
    ) -> Any:
        epilogue = _epilogue(norm, running_mean, training, eps, activation, negative_slope, statistics)
        sizes = (stride, padding, output_padding, groups, dilation)
        parameters = (norm_weight, norm_bias, running_mean, running_var)
        arguments: Any = (input, weight, bias, *sizes, crop, parameters, momentum, epilogue, statistics, backend)
        out, mean, var = _conv_transpose_norm_act(dims, *arguments)
        return (out, mean, var) if statistics else out

    name = f"conv_transpose{dims}d"
    conv_transpose_norm_act.__name__ = conv_transpose_norm_act.__qualname__ = f"{name}_norm_act"
    conv_transpose_norm_act.__doc__ = f"""A transposed convolution of {_SPATIAL[dims - 1]}, norm and activation: one op.

    Equivalent to, for norm "batch" and activation "relu", with `crop` positions sliced off the convolution's result:
    `relu(batch_norm({name}(input, weight, bias, ...)[crop], running_mean, running_var, norm_weight, norm_bias,
    training, momentum, eps))`.

    input, weight, bias, stride, padding, output_padding, groups, dilation: as in `{name}`.
    crop: how many positions to drop from the result at (begin, end), or a pair per spatial dimension; audio codecs
        that are causal drop their whole overlap at the end.
    norm: None, "batch" (training, or no running statistics: moments of this batch; else the running statistics) or
        "instance" (always its own moments). norm_weight, norm_bias: (Cout,) or None.
    running_mean, running_var: (Cout,) or None; "batch" updates them in training, as PyTorch does.
    activation: None, "relu", "leaky_relu" (with negative_slope), "tanh", "sigmoid", "silu" or "gelu" (exact).
    statistics: whether mean and biased variance of the convolution's result, before norm and activation, are returned
        too: float32 (float64 for float64), without gradients, (Cout,) over batch and positions; "instance": (N, Cout).
    backend: "torch", "cpu", "triton", "cuda" or None (mmfast chooses).
    Returns the output, (N, Cout, *sizes) or (Cout, *sizes), in input's dtype, or (output, mean, var). Differentiable
        to any order in eager.
    Raises ValueError for an unknown norm, activation or backend, and where a norm that measures has one value per
        channel; RuntimeError for what PyTorch's own functions refuse.
    """
    return conv_transpose_norm_act


conv_transpose1d_norm_act = _norm_act(1)
conv_transpose2d_norm_act = _norm_act(2)
conv_transpose3d_norm_act = _norm_act(3)


def _epilogue(
    norm: str | None,
    running_mean: Tensor | None,
    training: bool,
    eps: float,
    activation: str | None,
    negative_slope: float,
    statistics: bool,
) -> ConvTransposeEpilogue:
    if norm not in (None, "batch", "instance"):
        raise ValueError(f"unknown norm {norm!r}; accepted: None, 'batch', 'instance'")
    if activation is not None and activation not in CONV_TRANSPOSE_ACTIVATIONS[1:]:
        accepted = ", ".join(map(repr, CONV_TRANSPOSE_ACTIVATIONS[1:]))
        raise ValueError(f"unknown activation {activation!r}; accepted: None, {accepted}")
    if norm == "instance" and running_mean is not None:
        raise ValueError("norm 'instance' takes no running statistics; pass None, or norm='batch'")
    kind = norm or ("moments" if statistics else "none")
    if norm == "batch" and not training and running_mean is not None:
        if statistics:
            raise ValueError("statistics are asked for, but a norm by running statistics measures none")
        kind = "given"
    return ConvTransposeEpilogue(kind, eps, activation or "none", negative_slope)


def _conv_transpose(
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Size,
    output_padding: Size,
    groups: int,
    dilation: Size,
    backend: str,
) -> Tensor:
    geometry = _geometry(dims, stride, padding, output_padding, groups, dilation)
    if not _fits(dims, input, weight, bias, geometry):
        # what is no transposed convolution, PyTorch refuses, with its own error
        function = _CONV_TRANSPOSE[dims - 1]
        return function(input, weight, bias, stride, padding, output_padding, groups, dilation)
    plain = ConvTransposeEpilogue()
    return _conv_transpose_op(dims, input, weight, bias, (None,) * 4, geometry, plain, backend)[0]


def _conv_transpose_norm_act(
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Size,
    output_padding: Size,
    groups: int,
    dilation: Size,
    crop: Sequence[tuple[int, int]] | tuple[int, int],
    parameters: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    momentum: float,
    epilogue: ConvTransposeEpilogue,
    statistics: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(out, mean, var), with PyTorch's functions mean and var only if they are asked for.

    parameters: norm_weight, norm_bias, running_mean, running_var.
    """
    cropped = _crop(crop, dims)
    sizes = (stride, padding, output_padding, groups, dilation)
    facts = (any(cropped), epilogue.norm, epilogue.activation, epilogue.negative_slope)
    chosen = _select_conv_transpose(dims, input, weight, *sizes, backend, *facts)
    geometry = _geometry(dims, *sizes, cropped)
    if chosen == "torch" or not _fits(dims, input, weight, bias, geometry):
        y = _CONV_TRANSPOSE[dims - 1](input, weight, bias, stride, padding, output_padding, groups, dilation)
        for dim, (begin, end) in enumerate(zip(cropped[::2], cropped[1::2], strict=True), start=-dims):
            y = y.narrow(dim, begin, y.shape[dim] - begin - end) if begin or end else y
        out, mean, var = _normalize_and_activate(
            y if y.dim() == dims + 2 else y[None], *parameters, momentum, epilogue, statistics
        )
        return out if y.dim() == dims + 2 else out[0], mean, var
    norm_weight, norm_bias, running_mean, running_var = parameters
    given = (running_mean, running_var) if epilogue.norm == "given" else (None, None)
    operands = (input, weight, bias, (norm_weight, norm_bias, *given))
    out, mean, var = _conv_transpose_op(dims, *operands, geometry, epilogue, chosen)
    if epilogue.measures and epilogue.normalizes:
        count = out.numel() // max(mean.numel(), 1)
        if count == 1 or (epilogue.norm == "batch" and out.shape[-dims:].numel() * (out.dim() == dims + 1) == 1):
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {out.size()}")
        if epilogue.norm == "batch" and running_mean is not None and running_var is not None:
            with torch.no_grad():
                running_mean.lerp_(mean.to(running_mean.dtype), momentum)
                running_var.lerp_(var.to(running_var.dtype) * (count / max(count - 1, 1)), momentum)
    return out, mean, var


def _normalize_and_activate(
    y: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    epilogue: ConvTransposeEpilogue,
    statistics: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What follows a convolution with the result y (N, Cout, *sizes), on PyTorch's own functions."""
    mean = var = None
    if statistics:
        wide = y.detach().float() if y.dtype.itemsize == 2 else y.detach()
        mean, var = conv_transpose_equations.moments(wide, epilogue.norm)
    if epilogue.norm in ("batch", "given"):
        options = (epilogue.measures, momentum, epilogue.eps)
        y = torch.nn.functional.batch_norm(y, running_mean, running_var, norm_weight, norm_bias, *options)
    elif epilogue.norm == "instance":
        y = torch.nn.functional.instance_norm(y, weight=norm_weight, bias=norm_bias, eps=epilogue.eps)
    return conv_transpose_equations.activate(y, epilogue.activation, epilogue.negative_slope), mean, var


_CONV_TRANSPOSE = (
    torch.nn.functional.conv_transpose1d,
    torch.nn.functional.conv_transpose2d,
    torch.nn.functional.conv_transpose3d,
)


def _crop(crop: Sequence[tuple[int, int]] | tuple[int, int], dims: int) -> tuple[int, ...]:
    pairs: Any = [crop] * dims if isinstance(crop[0], int) else list(crop)
    flat = tuple(side for pair in pairs for side in pair)
    if len(pairs) != dims or len(flat) != 2 * dims or min(flat) < 0:
        raise ValueError(f"crop is {crop}; expected (begin, end), both at least 0, or one such pair per dimension")
    return flat


def _geometry(
    dims: int,
    stride: Size,
    padding: Size,
    output_padding: Size,
    groups: int,
    dilation: Size,
    crop: tuple[int, ...] = (),
) -> ConvTransposeGeometry:
    sizes: Any = [_per_dim(size, dims) for size in (stride, padding, output_padding, dilation)]
    return ConvTransposeGeometry._make((*sizes, groups, crop or (0,) * (2 * dims)))


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
    *epilogue: Any,
) -> str:
    # what is no transposed convolution at all, PyTorch refuses, with its own error
    if not (isinstance(input, Tensor) and isinstance(weight, Tensor) and weight.dim() == dims + 2):
        return "torch"
    geometry: Any = (stride, padding, output_padding, groups, dilation)
    known = conv_transpose_call(input, weight.shape[1] * groups, _per_dim(stride, dims))
    facts = (input.device, input.dtype, *known, weight.shape, *geometry, *epilogue)
    return CONV_TRANSPOSE.select_by(facts, _conv_transpose_case, backend)


def _conv_transpose_case(
    device: torch.device,
    dtype: torch.dtype,
    contiguous: bool,
    gradients: bool,
    spread: bool,
    small: bool,
    shape: torch.Size,
    stride: Size,
    padding: Size,
    output_padding: Size,
    groups: int,
    dilation: Size,
    *epilogue: Any,
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
        *epilogue,
    )._replace(contiguous=contiguous, gradients=gradients, spread=spread, small=small)


#: Elements of an output for which a fused norm saves less than its call costs, some 0.2 ms where caches are cold.
_SMALL_OUTPUT = 2**17


def conv_transpose_call(input: Tensor, out_channels: int, stride: Sequence[int]) -> tuple[bool, bool, bool, bool]:
    """(contiguous, gradients, spread, small) of `ConvTransposeCase`: what a choice depends on besides the layer.

    In a graph, whose sizes may be symbols, nothing is known of them.
    """
    known = input.is_contiguous(), torch.is_grad_enabled()
    if torch.compiler.is_compiling() or not input.dim():
        return *known, False, False
    positions = math.prod(input.shape[2:])
    return *known, positions > 1, input.shape[0] * positions * out_channels * math.prod(stride) < _SMALL_OUTPUT


def _fits(dims: int, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvTransposeGeometry) -> bool:
    """Whether PyTorch would take these arguments: if not, it is asked, and its own error raised."""
    if input.dim() not in (dims + 1, dims + 2) or input.shape[-dims - 1] != weight.shape[0]:
        return False
    groups, size = geometry.groups, input.shape[-dims:]
    if groups < 1 or weight.shape[0] % groups or min(size) < 1 or min(weight.shape) < 1:
        return False
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[1] * groups):
        return False
    if any(x.device != input.device for x in (weight, bias) if x is not None):
        return False
    same_dtype = weight.dtype == input.dtype and (bias is None or bias.dtype == input.dtype)
    if not same_dtype and _compute_dtype(input.device.type, input.dtype) == input.dtype:
        return False
    lists = geometry[:4]
    if any(len(part) != dims for part in lists) or min(*geometry.stride, *geometry.dilation) < 1:
        return False
    if min(*geometry.padding, *geometry.output_padding) < 0:
        return False
    rows = zip(geometry.output_padding, geometry.stride, geometry.dilation, strict=True)
    if any(padding >= stride and padding >= dilation for padding, stride, dilation in rows):
        return False
    return min(geometry.out_size(size, weight.shape[2:])) >= 1


def _conv_transpose_op(
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    parameters: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    geometry: ConvTransposeGeometry,
    epilogue: ConvTransposeEpilogue,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _compute_dtype(input.device.type, input.dtype)
    x, weight = input.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    unbatched = x.dim() == dims + 1
    tensors = (x.unsqueeze(0) if unbatched else x, weight, bias, *parameters)
    if needs_formula([tensor for tensor in tensors if tensor is not None]):
        out, _, mean, var = conv_transpose_equations.forward(*tensors, geometry, epilogue)
        empty = out.new_empty(0)
        mean, var = (empty if mean is None else mean, empty if var is None else var)
    else:
        out, mean, var = conv_transpose_op(tensors, geometry, epilogue, backend)
    return out.squeeze(0) if unbatched else out, mean, var


def _per_dim(size: Size, dims: int) -> tuple[int, ...]:
    if isinstance(size, Sequence):
        return tuple(size) if len(size) == dims else tuple(size) * dims
    return (size,) * dims


def _compute_dtype(device: str, dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or autocast's where that is on for the device and applies to `dtype`."""
    if dtype == torch.float64 or not dtype.is_floating_point or not autocasts(device):
        return dtype
    return torch.get_autocast_dtype(device)
