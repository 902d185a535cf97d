"""Recurrent layers and cells: here only the layout - packed, unbatched, batch first - and the checks of sizes.

Parameters are read through attributes at each call, each once, so parametrized and replaced weights are honoured
(a spectral_norm makes one power iteration a call). There is no flat weight buffer to go stale.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.utils.rnn import PackedSequence

from .. import functional as F
from ..dispatch import EPOCH, Op, each_call_chooses, is_transforming
from ..ops.rnn.backends import OP, Case
from ..ops.rnn.cell import cell, cell_mode
from ..ops.rnn.layers import Options, is_left, recurrent_of_aten
from .layer import Twin

_FUNCTIONS: dict[str, Any] = {
    "RNN_TANH": functools.partial(F.rnn, nonlinearity="tanh"),
    "RNN_RELU": functools.partial(F.rnn, nonlinearity="relu"),
    "GRU": F.gru,
    "LSTM": F.lstm,
}

#: Elements of an input up to which the checks and the choice are a part of a call that can be seen.
_SMALL = 1 << 14


class _Sequence(Twin, torch.nn.RNNBase):
    """A stack of recurrent layers in one or both directions. RNNBase makes the parameters and names the sizes."""

    #: Probabilities of `mmfast.functional.rnn`; not in state_dict.
    zoneout: float = 0.0
    recurrent_dropout: float = 0.0

    #: By call, the shapes of the weights and states where it was left to PyTorch's function, None where it was not.
    _noted: dict[tuple, tuple[list[Any], list[Any]] | None]

    def _set_extras(self, backend: str | None, zoneout: float, recurrent_dropout: float) -> None:
        self.backend = backend
        if zoneout:
            self.zoneout = zoneout
        if recurrent_dropout:
            self.recurrent_dropout = recurrent_dropout

    def extra_repr(self) -> str:
        extras = {"zoneout": self.zoneout, "recurrent_dropout": self.recurrent_dropout}
        return ", ".join([super().extra_repr(), *(f"{name}={rate}" for name, rate in extras.items() if rate)])

    @property
    def _flat_weights(self) -> list[Any]:
        """The parameters as they are now; RNNBase keeps a list of them, which the layers here never read."""
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: Any) -> None:
        """RNNBase renews its list here; there is none."""

    def forward(
        self, input: Any, hx: Any = None, *, lengths: Tensor | None = None, reset_mask: Tensor | None = None
    ) -> tuple[Any, Any]:
        plain = lengths is None and reset_mask is None and not is_compiling() and type(input) is Tensor
        if plain and input.is_cpu and input.numel() <= _SMALL:
            return self._forward_noted(input, hx)
        return self._forward(input, hx, lengths, reset_mask)

    def _forward_noted(self, input: Tensor, hx: Any) -> tuple[Any, Any]:
        """`_forward`, of which it is noted which calls were left to PyTorch's function.

        To check all and to choose takes as long as a few steps of a small layer. Compared each time is what may change
        unseen: where its shapes do not fit, PyTorch's LSTM reads beyond a weight.
        """
        if self.backend or self.zoneout or self.recurrent_dropout or each_call_chooses() or is_transforming():
            return self._forward(input, hx, None, None)
        if self._asked is not EPOCH[0] or len(self._noted) > 64:
            self._asked, self._noted = EPOCH[0], {}
        facts = (input.shape, input.dtype, input.requires_grad, input.is_leaf, self.batch_first)
        call = (*facts, torch.is_grad_enabled(), torch.get_num_threads())
        weights = self._own_weights()
        noted = self._noted.get(call)
        if noted and weights and (found := self._of_torch(input, hx, weights, *noted)):
            return found
        output, last = self._forward(input, hx, None, None)
        if call not in self._noted and weights and input.dim() == 3:
            left = is_left(self.mode, input, weights, self._options())
            states = last if self.mode == "LSTM" else (last,)
            shapes = [weight.shape for part in weights for weight in part], [state.shape for state in states]
            self._noted[call] = shapes if left else None
        return output, last

    def _of_torch(
        self, input: Tensor, hx: Any, weights: list[list[Any]], shapes: list[Any], of_states: list[Any]
    ) -> tuple[Any, Any] | None:
        """What PyTorch's function gives; None where it may not be called with these weights and states."""
        is_lstm = self.mode == "LSTM"
        if hx is None:
            states: Any = [input.new_zeros(shape) for shape in of_states]
        elif type(hx) is (tuple if is_lstm else Tensor):
            states = hx if is_lstm else (hx,)
        else:
            return None
        if [x.shape for part in weights for x in part] != shapes or [x.shape for x in states] != of_states:
            return None
        if weights[0][0].dtype != input.dtype:
            return None
        output, *last = recurrent_of_aten(self.mode, input, states, weights, self._options())
        return output, tuple(last) if is_lstm else last[0]

    def _options(self) -> Options:
        return Options(self.dropout, self.training, self.bidirectional, self.batch_first)

    def _forward(self, input: Any, hx: Any, lengths: Tensor | None, reset_mask: Tensor | None) -> tuple[Any, Any]:
        if lengths is not None:
            self._check_padded(input)
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx, reset_mask)
        if input.dim() == 3:
            if hx is not None:
                self._check_dims(hx, "batched", 3)
            return self._call(input, hx, None, lengths, reset_mask)
        if input.dim() == 2:
            return self._forward_unbatched(input, hx, reset_mask)
        kind = "tensor instead" if self.mode.startswith("RNN") else "instead"
        name = self.mode.partition("_")[0]
        raise ValueError(f"{name}: Expected input to be 2D or 3D, got {input.dim()}D {kind}")

    def _own_weights(self) -> list[list[Any]] | None:
        """The weights of each layer and direction; None where they are parametrized."""
        own: dict[str, Any] = self._parameters  # an attribute of a module takes a microsecond to be found
        try:
            return [[own[name] for name in names] for names in self._all_weights]
        except KeyError:
            return None

    def _check_padded(self, input: Any) -> None:
        if isinstance(input, PackedSequence) or input.dim() != 3:
            kind = "a PackedSequence" if isinstance(input, PackedSequence) else f"{input.dim()}-D input"
            raise RuntimeError(f"lengths were given with {kind}; expected padded 3-D input")

    def _forward_unbatched(self, input: Tensor, hx: Any, reset_mask: Tensor | None) -> tuple[Tensor, Any]:
        batch_dim = 0 if self.batch_first else 1
        if hx is not None:
            self._check_dims(hx, "unbatched", 2)
            hx = _each(hx, lambda state: state.unsqueeze(1))
        if reset_mask is not None:
            reset_mask = reset_mask.unsqueeze(batch_dim)
        output, hx = self._call(input.unsqueeze(batch_dim), hx, None, None, reset_mask)
        return output.squeeze(batch_dim), _each(hx, lambda state: state.squeeze(1))

    def _forward_packed(self, input: PackedSequence, hx: Any, reset_mask: Tensor | None) -> tuple[PackedSequence, Any]:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        if hx is not None:
            hx = self.permute_hidden(hx, sorted_indices)
        output, hx = self._call(data, hx, batch_sizes, None, reset_mask)
        packed = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
        return packed, self.permute_hidden(hx, unsorted_indices)

    def _check_dims(self, hx: Any, kind: str, dims: int) -> None:
        if hx.dim() != dims:
            raise RuntimeError(f"For {kind} {dims}-D input, hx should also be {dims}-D but got {hx.dim()}-D tensor")

    def _call(
        self,
        input: Tensor,
        hx: Any,
        batch_sizes: Tensor | None,
        lengths: Tensor | None,
        reset_mask: Tensor | None,
    ) -> tuple[Tensor, Any]:
        return _FUNCTIONS[self.mode](
            input,
            hx,
            self._own_weights() or self.all_weights,
            dropout=self.dropout,
            training=self.training,
            bidirectional=self.bidirectional,
            batch_first=self.batch_first,
            batch_sizes=batch_sizes,
            lengths=lengths,
            reset_mask=reset_mask,
            zoneout=self.zoneout,
            recurrent_dropout=self.recurrent_dropout,
            backend=self.backend,
        )

    def static_case(self) -> tuple[Op, Any]:
        parameter = next(self.parameters())
        sizes = (self.input_size, self.hidden_size, self.proj_size)
        return OP, Case(parameter.device.type, parameter.dtype, self.mode, *sizes, self.bidirectional)


def _each(hx: Any, function: Any) -> Any:
    return function(hx) if isinstance(hx, Tensor) else tuple(function(state) for state in hx)


class RNN(_Sequence):
    """A stack of Elman RNNs: h_t = tanh or relu (W_ih x_t + b_ih + W_hh h_{t-1} + b_hh).

    Equivalent to: `torch.nn.RNN`, with its constructor `RNN(input_size, hidden_size, num_layers=1, nonlinearity="tanh",
    bias=True, batch_first=False, dropout=0.0, bidirectional=False, device=None, dtype=None)`, attributes, state_dict,
    initialisation and errors; but a subclass of `torch.nn.RNNBase`, since torch.compile refuses every torch.nn.RNN.

    input: (T, B, I), with batch_first (B, T, I), unbatched (T, I), or a PackedSequence.
    hx: (layers * directions, B, H), unbatched without B; None: zeros.
    lengths (keyword-only): (B,) integers, the steps of each sequence of a padded batch; `mmfast.functional.rnn`.
    reset_mask (keyword-only): (T, B) in the layout of the input, of a PackedSequence (N,), its data's rows: where it
        is true a sequence begins anew; `mmfast.functional.rnn`.
    Returns the last layer's output (T, B, directions * H) in the layout of the input, and the final state like hx.
    backend (keyword-only, an attribute): "torch", "cpu", "triton", "cuda" or None (mmfast chooses); not in state_dict.
    zoneout, recurrent_dropout (keyword-only, attributes): probabilities, drawn in training; `mmfast.functional.rnn`.
    Dtypes, differentiability: `mmfast.functional.rnn`.
    """

    def __init__(
        self,
        *args: Any,
        backend: str | None = None,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        _refuse_proj_size(kwargs)
        if len(args) > 3:
            nonlinearity = args[3]
            args = args[:3] + args[4:]
        else:
            nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        super().__init__("RNN_" + nonlinearity.upper(), *args, **kwargs)
        self.nonlinearity = nonlinearity
        self._set_extras(backend, zoneout, recurrent_dropout)


class GRU(_Sequence):
    """A stack of gated recurrent units, with the reset gate applied after the product with h_{t-1}.

    Equivalent to: `torch.nn.GRU`, with its constructor `GRU(input_size, hidden_size, num_layers=1, bias=True,
    batch_first=False, dropout=0.0, bidirectional=False, device=None, dtype=None)`, attributes, state_dict,
    initialisation and errors; but a subclass of `torch.nn.RNNBase`, since torch.compile refuses every torch.nn.GRU.

    Shapes, backend, dtypes, differentiability: `RNN`, `mmfast.functional.gru`. Source: Cho et al., arXiv:1406.1078.
    """

    def __init__(
        self,
        *args: Any,
        backend: str | None = None,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        _refuse_proj_size(kwargs)
        super().__init__("GRU", *args, **kwargs)
        self._set_extras(backend, zoneout, recurrent_dropout)


class LSTM(_Sequence):
    """A stack of long short-term memories, with proj_size also their projection h_t = W_hr (o_t tanh(c_t)).

    Equivalent to: `torch.nn.LSTM`, with its constructor `LSTM(input_size, hidden_size, num_layers=1, bias=True,
    batch_first=False, dropout=0.0, bidirectional=False, proj_size=0, device=None, dtype=None)`, attributes, state_dict,
    initialisation and errors; but a subclass of `torch.nn.RNNBase`, since torch.compile refuses every torch.nn.LSTM.

    hx: None or (h, c), h of (layers * directions, B, proj_size or H) and c of (layers * directions, B, H).
    Returns the output and (h_n, c_n). All else: `RNN`, `mmfast.functional.lstm`. Source: Hochreiter and Schmidhuber,
    1997, doi:10.1162/neco.1997.9.8.1735; projection: Sak et al., arXiv:1402.1128.
    """

    def __init__(
        self,
        *args: Any,
        backend: str | None = None,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__("LSTM", *args, **kwargs)
        self._set_extras(backend, zoneout, recurrent_dropout)

    get_expected_cell_size: Any = torch.nn.LSTM.get_expected_cell_size
    check_forward_args: Any = torch.nn.LSTM.check_forward_args
    permute_hidden: Any = torch.nn.LSTM.permute_hidden

    def _check_dims(self, hx: Any, kind: str, dims: int) -> None:
        h, c = hx[0].dim(), hx[1].dim()
        if h != dims or c != dims:
            raise RuntimeError(
                f"For {kind} {dims}-D input, hx and cx should also be {dims}-D but got ({h}-D, {c}-D) tensors"
            )


def _refuse_proj_size(kwargs: dict[str, Any]) -> None:
    if "proj_size" in kwargs:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")


class _Cell(Twin):
    """One step; a torch.nn.RNNCellBase comes behind it in the bases."""

    name: str

    def _mode(self) -> str:
        raise NotImplementedError

    def _weights(self: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        own = self._parameters  # an attribute of a module takes a microsecond to be found
        try:
            return own["weight_ih"], own["weight_hh"], own["bias_ih"], own["bias_hh"]
        except KeyError:  # parametrized
            return self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh

    def forward(self: Any, input: Tensor, hx: Any = None) -> Any:
        dims = input.dim()
        if dims not in (1, 2):
            raise ValueError(f"{self.name}: Expected input to be 1D or 2D, got {dims}D instead")
        if hx is not None:
            self._check_dims(hx)
        if dims == 2:
            return self._call(input, hx)
        if hx is not None:
            hx = _each(hx, lambda state: state.unsqueeze(0))
        return _each(self._call(input.unsqueeze(0), hx), lambda state: state.squeeze(0))

    def _call(self: Any, input: Tensor, hx: Any) -> Any:
        # the functions of mmfast.functional by one call less
        return cell(self._mode(), input, hx, self._weights(), self.backend)

    def _check_dims(self, hx: Any) -> None:
        if hx.dim() not in (1, 2):
            raise ValueError(f"{self.name}: Expected hidden to be 1D or 2D, got {hx.dim()}D instead")

    def static_case(self: Any) -> tuple[Op, Any]:
        parameter = next(self.parameters())
        return OP, Case(
            parameter.device.type, parameter.dtype, self._mode(), self.input_size, self.hidden_size, cell=True
        )


class RNNCell(_Cell, torch.nn.RNNCell):
    """One step of an Elman RNN: h' = tanh or relu (W_ih x + b_ih + W_hh h + b_hh).

    Equivalent to: `torch.nn.RNNCell`, of which it is a subclass.

    input: (B, I) or (I,). hx: (B, H) or (H,); None: zeros. Returns h' of hx's shape.
    backend (keyword-only, an attribute): "torch", "cpu", "triton", "cuda" or None (mmfast chooses); not in state_dict.
    Dtypes, differentiability: `mmfast.functional.rnn_cell`.
    """

    name = "RNNCell"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, nonlinearity, device, dtype)
        self.backend = backend

    def _mode(self) -> str:
        return cell_mode(self.nonlinearity)


class GRUCell(_Cell, torch.nn.GRUCell):
    """One step of a gated recurrent unit, the reset gate after the product.

    Equivalent to: `torch.nn.GRUCell`, of which it is a subclass. Shapes and all else: `RNNCell`,
    `mmfast.functional.gru_cell`.
    """

    name = "GRUCell"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype)
        self.backend = backend

    def _mode(self) -> str:
        return "GRU"


class LSTMCell(_Cell, torch.nn.LSTMCell):
    """One step of a long short-term memory: (h, c) of (B, H) or (H,) each, None for zeros, gives (h', c').

    Equivalent to: `torch.nn.LSTMCell`, of which it is a subclass. All else: `RNNCell`, `mmfast.functional.lstm_cell`.
    """

    name = "LSTMCell"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype)
        self.backend = backend

    def _check_dims(self, hx: Any) -> None:
        for index, state in enumerate(hx):
            if state.dim() not in (1, 2):
                raise ValueError(f"LSTMCell: Expected hx[{index}] to be 1D or 2D, got {state.dim()}D instead")

    def _mode(self) -> str:
        return "LSTM"
