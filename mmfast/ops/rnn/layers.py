"""Recurrent layers as functions: checks, choice and layout around the op."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from ...dispatch import (
    asked_for,
    autocasts,
    compute_dtype,
    is_known,
    is_plain,
    is_transforming,
    needs_formula,
    outside_autocast,
)
from ..library import needs_gradient
from . import equations
from .backends import FEW_UNITS, OP, SHORT, Case, Extent, extent
from .cudnn import StockLayers
from .equations import GATES, Layer
from .op import sequence

Weights = Sequence[Sequence[Tensor]]


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
        be in [1, T]; on another device, in a compiled graph, and where a torch.func transform maps over them, they are
        clamped to [0, T], unseen.
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
    options = Options(
        dropout, training, bidirectional, batch_first, batch_sizes, lengths, reset_mask, zoneout, recurrent_dropout
    )
    output, h_n = recurrent(mode, input, None if hx is None else (hx,), weights, options, backend)
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
    options = Options(
        dropout, training, bidirectional, batch_first, batch_sizes, lengths, reset_mask, zoneout, recurrent_dropout
    )
    output, h_n = recurrent("GRU", input, None if hx is None else (hx,), weights, options, backend)
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
    options = Options(
        dropout, training, bidirectional, batch_first, batch_sizes, lengths, reset_mask, zoneout, recurrent_dropout
    )
    output, h_n, c_n = recurrent("LSTM", input, hx, weights, options, backend)
    return output, (h_n, c_n)


class Options(NamedTuple):
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


def recurrent(
    mode: str,
    input: Tensor,
    states: Sequence[Tensor] | None,
    weights: Weights,
    options: Options,
    backend: str | None,
) -> tuple[Tensor, ...]:
    """What `rnn`, `gru` and `lstm` return, as one tuple."""
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
    if batch_sizes is None and _steps(input, options) == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    options = _checked_options(options, input, batch)
    traced = torch.compiler.is_compiling()
    flat = traced and _is_flat(mode, input, sizes, options)
    formula = not traced and is_transforming() and asked_for(backend) != "torch"
    formula = formula and needs_formula([input, *(states or ()), *(weight for layer in weights for weight in layer)])
    facts = _facts(mode, input, weights, sizes, options, batch, not (traced or formula), flat)
    chosen = OP.select_by(facts, _rnn_case, backend)
    if chosen != "torch":
        one: Any = equations.sequence if formula else partial(sequence, backend=chosen)
        if not autocasts(input.device.type):
            return _recurrent_by_layers(one, mode, input, states or (), weights, options)
        in_float32 = _rnn_case(*facts).stays_float32
        if found := _recurrent_outside_autocast(in_float32, one, mode, input, states or (), weights, options):
            return found
    flat = flat and asked_for(backend) is None
    if formula or flat or any(_extras(options)):
        walk = _extras_outside_graphs if traced and not flat else _recurrent_by_layers
        return walk(equations.sequence, mode, input, states or (), weights, options)
    if states is None:
        states = [input.new_zeros(shape) for shape in shapes]
    function = _recurrent_outside_graphs if traced else _recurrent_of_torch
    return function(mode, input, states, weights, options)


# Its steps depend on numbers in batch_sizes, which no graph knows; torch.nn's layers run between two graphs, too
_packed_outside_graphs = _disable_dynamo(recurrent)


def is_left(mode: str, input: Tensor, weights: Weights, options: Options) -> bool:
    """Whether PyTorch serves this call of padded input, which raised nothing, where nobody asks for a backend."""
    sizes = _recurrent_sizes(mode, weights, options.bidirectional)
    facts = _facts(mode, input, weights, sizes, options, input.shape[0 if options.batch_first else 1], True)
    return OP.select_by(facts, _rnn_case) == "torch"


def _facts(
    mode: str,
    input: Tensor,
    weights: Weights,
    sizes: _Sizes,
    options: Options,
    batch: int,
    seen: bool,
    flat: bool = False,
) -> tuple:
    """What the choice depends on; seen: whether steps and batch, too, may decide; flat: of a graph, `_is_flat`."""
    kind = (options.bidirectional, options.batch_sizes is not None, options.lengths is not None, not seen)
    hidden, steps, gradients = sizes.hidden_size, _steps(input, options), torch.is_grad_enabled()
    of_extent: Extent
    if seen:
        last = (2 if options.bidirectional else 1) * (weights[-1][0].numel() + weights[-1][1].numel())
        of_extent = extent(mode, last, steps, batch, hidden, gradients, input)
    else:
        # a graph is for any, or flat: for at most SHORT steps and FEW_UNITS of all steps alone. Written out, for of a
        # module's constant that Dynamo has read, each call of the graph looks at every element again
        of_extent = (True, flat, False, False, False, False, False, False)
    return input.device, input.dtype, mode, *sizes, *kind, gradients, of_extent, *_extras(options)


def _is_flat(mode: str, input: Tensor, sizes: _Sizes, options: Options) -> bool:
    """Whether a graph is for a few plain steps alone, which take less time one by one than a call of the op."""
    units = input.shape[0] * input.shape[1] * sizes.hidden_size
    if not is_known(units) or units > FEW_UNITS or _steps(input, options) > SHORT[mode]:
        return False
    plain = options.lengths is None and not any(_extras(options)) and not autocasts(input.device.type)
    return plain and input.is_cpu and input.dtype == torch.float32


def _extras(options: Options) -> tuple[bool, bool, bool]:
    return options.reset_mask is not None, options.zoneout > 0, options.recurrent_dropout > 0


def _rnn_case(device: torch.device, dtype: torch.dtype, mode: str, *rest: Any) -> Case:
    dtype = compute_dtype(device.type, dtype)
    *kind, gradients, of_extent = rest[:-3]
    given = (*kind, autocasts(device.type), gradients, *of_extent, False, *rest[-3:])
    return Case._make((device.type, dtype, mode, *given))


def _steps(input: Tensor, options: Options) -> int:
    if options.batch_sizes is not None:
        return options.batch_sizes.shape[0]
    return input.shape[1 if options.batch_first else 0]


def _checked_options(options: Options, input: Tensor, batch: int) -> Options:
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
    if not isinstance(lengths, Tensor):
        lengths = torch.as_tensor(lengths, device="cpu")
    if lengths.is_floating_point() or lengths.dim() != 1:
        raise RuntimeError(
            f"lengths are {lengths.dtype} in {lengths.dim()} dimensions; expected integers in one dimension"
        )
    if lengths.shape[0] != batch:
        raise RuntimeError(f"Expected `len(lengths)` to be equal to batch_size, but got {len(lengths)} ({batch=})")
    if lengths.device.type == "cpu" and batch and is_plain([lengths]) and not _is_transformed(lengths):
        shortest, longest, steps = int(lengths.min()), int(lengths.max()), input.shape[1 if batch_first else 0]
        if shortest <= 0:
            raise RuntimeError(f"Length of all samples has to be greater than 0, but a length is {shortest}")
        if longest > steps:
            raise RuntimeError(f"a length is {longest}, but the input has only {steps} steps")
    return lengths


# A transform's tensor, one of a batch say, which has no numbers to look at
_is_transformed = torch._C._functorch.is_functorch_wrapped_tensor


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
    autocasting = torch._C._is_any_autocast_enabled() and torch.float64 not in (input.dtype, dtype)
    if input.dtype != dtype and not autocasting:
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
    options: Options,
) -> tuple[Tensor, ...]:
    """The stack, each layer by `function(x, weights, h0, c0, layer)`, between them dropout as PyTorch draws it."""
    directions = 2 if options.bidirectional else 1
    transposed = options.batch_first and options.batch_sizes is None
    x = input.transpose(0, 1).contiguous() if transposed else input
    resets = options.reset_mask
    if resets is not None:
        resets = (resets.transpose(0, 1) if transposed else resets).contiguous()
    lengths = options.lengths
    if lengths is not None:
        lengths = lengths.to(x.device, non_blocking=True)
    base = Layer(mode, directions, options.batch_sizes, lengths, resets)
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


def _recurrent_outside_autocast(
    in_float32: bool,
    function: Any,
    mode: str,
    input: Tensor,
    states: Sequence[Tensor],
    weights: Weights,
    options: Options,
) -> tuple[Tensor, ...] | None:
    """In the dtype of PyTorch's result: of autocast, to which PyTorch casts all that cuDNN and oneDNN read, or float32.

    None where the result is float32 for other reasons than that all is, but in a graph, which has no other way.
    """
    device, tensors = input.device.type, (input, *states, *itertools.chain(*weights))
    if in_float32 and (input.dtype.itemsize == 2 or any(x.dtype != input.dtype for x in tensors)):
        if not torch.compiler.is_compiling():
            return None
        # PyTorch's loops add to the last state
        in_float32 = [input, *states][-1].dtype != torch.get_autocast_dtype(device)

    def cast(x: Tensor) -> Tensor:
        return x.to(torch.float32 if in_float32 else compute_dtype(device, x.dtype))

    operands = (cast(input), [cast(state) for state in states], [[cast(w) for w in part] for part in weights])
    with outside_autocast(device):
        return _recurrent_by_layers(function, mode, *operands, options)


def _masked(layer: Layer, x: Tensor, output_size: int, options: Options) -> Layer:
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
    mode: str, input: Tensor, states: Sequence[Tensor], weights: Weights, options: Options
) -> tuple[Tensor, ...]:
    if options.lengths is not None:
        return _lengths_of_torch(mode, input, states, weights, options)
    if _is_cudnns(input, options):
        tensors = [input, *states, *(weight for layer in weights for weight in layer)]
        if is_plain(tensors) and not needs_formula(tensors) and needs_gradient(tensors):
            return _recurrent_of_cudnn(mode, input, states, weights, options)
    return recurrent_of_aten(mode, input, states, weights, options)


def _is_cudnns(input: Tensor, options: Options) -> bool:
    """Whether cuDNN serves PyTorch's layers, and no mask of its own dropout is in the way of a formula."""
    return input.is_cuda and torch.backends.cudnn.enabled and not (options.dropout and options.training)


def _recurrent_of_cudnn(
    mode: str, input: Tensor, states: Sequence[Tensor], weights: Weights, options: Options
) -> tuple[Tensor, ...]:
    # nothing is dropped: in training mode for the workspace that a backward needs
    options, count = options._replace(dropout=0.0, training=True), len(states)

    def run(function: Callable[..., tuple[Tensor, ...]], x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        flat = iter(rest[count:])
        parts = [tuple(next(flat) for _ in layer) for layer in weights]
        return function(mode, x, rest[:count], parts, options)

    formula = partial(_recurrent_by_layers, equations.sequence)
    flat = [weight for layer in weights for weight in layer]
    return StockLayers.apply(partial(run, recurrent_of_aten), partial(run, formula), input, *states, *flat)


def recurrent_of_aten(
    mode: str, input: Tensor, states: Sequence[Tensor], weights: Weights, options: Options
) -> tuple[Tensor, ...]:
    """(output, *last states) of PyTorch's own function, which checks little of what it is given."""
    # torch._VF's own, for which that module would look in Python, a few microseconds long
    function = getattr(torch, mode.lower())
    flat = [weight for layer in weights for weight in layer]
    biases = len(weights[0]) > 3
    layers = len(weights) // (2 if options.bidirectional else 1)
    shape = (flat, biases, layers, options.dropout, options.training, options.bidirectional)
    hx = states if mode == "LSTM" else states[0]
    if options.batch_sizes is not None:
        return function(input, options.batch_sizes, hx, *shape)
    return function(input, hx, *shape, options.batch_first)


def _lengths_of_torch(
    mode: str, input: Tensor, states: Sequence[Tensor], weights: Weights, options: Options
) -> tuple[Tensor, ...]:
    """By way of a PackedSequence; of lengths on another device, or that none can have, padded."""
    lengths, batch_first, steps = options.lengths, options.batch_first, _steps(input, options)
    assert lengths is not None
    if not (lengths.is_cpu and len(lengths) and lengths.min() > 0 and lengths.max() <= steps):
        function = partial(_unseen_lengths_of_torch, options.training)
        return _recurrent_by_layers(function, mode, input, states, weights, options)
    packed = pack_padded_sequence(input, lengths, batch_first, enforce_sorted=False)
    states = [state.index_select(1, packed.sorted_indices) for state in states]  # type: ignore[arg-type]
    options = options._replace(batch_first=False, batch_sizes=packed.batch_sizes, lengths=None)
    output, *last = _recurrent_of_torch(mode, packed.data, states, weights, options)
    packed = PackedSequence(output, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
    output, _ = pad_packed_sequence(packed, batch_first, total_length=steps)
    return output, *(state.index_select(1, packed.unsorted_indices) for state in last)  # type: ignore[arg-type]


#: What closes a gate, and with the other sign opens it, in each of some inputs: products in 16 bits are made of eights.
_CLOSED, _INPUTS = -1e3, 8


def _unseen_lengths_of_torch(
    training: bool, x: Tensor, weights: Sequence[Tensor], h0: Tensor, c0: Tensor | None, layer: Layer
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`equations.sequence` of a layer with lengths, by PyTorch's own layer over all steps, without a look at them.

    For the reverse direction the steps within a length are turned around. Past a length, which more inputs tell, an
    LSTM's input gate is closed and its forget gate open, so that c stays; h is taken from the output.
    """
    steps, lstm = x.shape[0], layer.mode == "LSTM"
    lengths = layer.lengths.to(torch.int64).clamp(0, steps)[:, None]  # type: ignore[union-attr]
    time = torch.arange(steps, device=x.device)[:, None, None]
    past = time >= lengths
    turned, last = torch.where(past, time, lengths - 1 - time), (lengths - 1).clamp(min=0)[None]
    x = x.masked_fill(past, 0)  # NaN times 0, too, would get into c
    if lstm:
        x = torch.cat([x, past.to(x.dtype).expand(-1, -1, _INPUTS)], -1)
    outputs, ends = [], []
    each = len(weights) // layer.directions
    for d in range(layer.directions):
        w_ih, *others = weights[d * each : (d + 1) * each]
        if lstm:
            gates = w_ih.new_zeros((4, w_ih.shape[0] // 4, _INPUTS))
            gates[0], gates[1] = _CLOSED, -_CLOSED
            w_ih = torch.cat([w_ih, gates.flatten(0, 1)], 1)
        states = [state[d : d + 1] for state in (h0, c0) if state is not None]
        of_x = x.gather(0, turned.expand_as(x)) if d else x
        y, *end = _recurrent_of_torch(layer.mode, of_x, states, [[w_ih, *others]], Options(training=training))
        end[0] = torch.where(lengths > 0, y.gather(0, last.expand(1, *y.shape[1:])), states[0].to(y.dtype))
        outputs.append(y.gather(0, turned.expand_as(y)) if d else y)
        ends.append(end)
    h_n, *c_n = map(torch.cat, zip(*ends, strict=True))
    return torch.cat(outputs, -1).masked_fill(past, 0), h_n, c_n[0] if lstm else None


# Traced, PyTorch's function would become one graph node per step and gate; it runs between two graphs instead, as
# torch.nn's own layers do
_recurrent_outside_graphs = _disable_dynamo(_recurrent_of_torch)
