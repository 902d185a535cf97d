"""The recurrent op's backends: refusals, preference, and the call.

`forward(x, weights, h0, c0, layer, keep)` gives (y, hn, cn, gates, cell), and
`backward(given, x, weights, h0, c0, layer, saved, need)` the gradients of (x, h0, c0, *weights). Shapes of x, weights
and states: equations.py; of what is saved, (y, gates, cell): csrc/mmfast.h. Where there is none of it - cn without an
LSTM, gates and cell of an RNN or without `keep` -, it is None, and of the op's outputs an empty tensor.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import native
from ...dispatch import Backend, GpuBackend, Op, TorchBackend
from .. import portable
from ..product import has_products
from . import equations
from .equations import GATES, MODES, Layer, Weights
from .products import (
    RecurrentSide,
    Sizes,
    input_gradient,
    input_side,
    projection_gradient,
    sizes_of,
    sum_biases,
    weight_gradients,
)


class Case(NamedTuple):
    """The static facts a choice depends on. mode: "RNN_TANH", "RNN_RELU", "GRU" or "LSTM", as torch.nn names them."""

    device: str
    dtype: torch.dtype
    mode: str
    input_size: int
    hidden_size: int
    proj_size: int = 0
    bidirectional: bool = False
    packed: bool = False
    lengths: bool = False
    #: under torch.compile, torch.export or a torch.func transform, which PyTorch's own layers do not support
    transformed: bool = False
    autocast: bool = False
    #: whether grad mode is on
    gradients: bool = True
    #: batch > FEW or hidden_size > LARGE, and batch * hidden_size > MANY, or training at most BRIEF steps, where batch
    #: and steps may be looked at: in eager
    many: bool = True
    #: at most SHORT steps, where the steps may be looked at: in eager, and in a graph for few steps alone
    short: bool = False
    #: steps * batch * hidden_size >= BULK, likewise
    bulky: bool = False
    #: at most BRIEF steps and steps * batch * hidden_size <= SMALL, likewise
    small: bool = False
    #: hidden_size >= BROAD and batch * hidden_size >= WIDE, in training WIDE_TRAINING, likewise
    wide: bool = False
    #: at least HEAVY weights of the last layer, at most LEAN rows of all steps, and in training more than 2 of a step,
    #: likewise
    lean: bool = False
    #: of all steps at most SPARSE, and as many weights
    sparse: bool = False
    #: hidden_size in MIDDLE and units of all steps in BAND, or NARROW, THIN and VAST, and x's gradient is wanted,
    #: likewise; but for a leaf over at least LONG steps: mostly a penalty's, which differentiates twice
    middling: bool = False
    cell: bool = False
    resets: bool = False
    zoneout: bool = False
    recurrent_dropout: bool = False

    @property
    def stays_float32(self) -> bool:
        """Under autocast: PyTorch's loops on a CPU multiply in its dtype, but add to a state that keeps its own."""
        loop = self.mode == "GRU" or (self.mode == "LSTM" and (self.packed or self.lengths))
        return self.autocast and loop and self.device == "cpu"

    @property
    def extras(self) -> list[str]:
        """What is asked for that PyTorch's layers lack, as the parameters are named."""
        named = {"reset_mask": self.resets, "zoneout": self.zoneout, "recurrent_dropout": self.recurrent_dropout}
        return [name for name, asked in named.items() if asked]


#: Rows, or units of all rows of a step, up to which an LSTM's step is so short that PyTorch's overhead decides.
FEW, MANY = 4, 512
#: Units of all steps from which on not even a single step is worth PyTorch's loop, with products of our own; and up to
#: which an LSTM without gradients takes less time here.
BULK = 1 << 14
#: Hidden size, and units of all rows of a step, from which on products in bfloat16 by AMX decide.
BROAD, WIDE, WIDE_TRAINING = 256, 1 << 13, 1 << 15
#: Weights of a layer from which on packing them and writing their gradients takes longer than few rows of all steps: an
#: LSTM's LEAN rows in oneDNN; SPARSE rows in a loop, without gradients or over SHORT sequences.
HEAVY, LEAN, SPARSE = 1 << 20, 128, 48
#: Rows of all steps to each input from which on the input's weights are worth packing where MKL is as fast.
PACKED = 2
#: Hidden sizes, units of all steps, and inputs from which on, of LSTMs that train here no faster than in oneDNN, which
#: makes x's gradient in any case.
MIDDLE, BAND, BROADER = range(65, 200), range(1 << 16, (1 << 18) + 1), 32
#: Hidden size up to which, inputs to each unit, and elements of x from which on the same holds: of so thin matrices its
#: products are faster.
NARROW, THIN, VAST = 8, 32, 1 << 18
#: Steps from which on a leaf's gradient is mostly a penalty's.
LONG = 64
#: Hidden size up to which an LSTM trains here as fast as in oneDNN: 0.94 to 0.98 of its speed at 1024.
LARGE = 512
#: Steps up to which PyTorch's loop takes less time than a call of the op, which takes about 150 us with its backward.
SHORT = {"RNN_TANH": 6, "RNN_RELU": 6, "GRU": 2, "LSTM": 2}
#: Steps up to which oneDNN's LSTM trains in less time than a call of the op takes; on Intel's AVX-512 only where the
#: units of all steps are few.
BRIEF, SMALL = 12, 1 << 13
#: Hidden size below which that holds on AMD's AVX-512, too.
TINY = 16


#: A Case's (many, short, bulky, small, wide, lean, sparse, middling).
Extent = tuple[bool, bool, bool, bool, bool, bool, bool, bool]

#: Units of all steps of SHORT sequences up to which Inductor's loops take less time than a call of the op does in a
#: graph; forward + backward, Zen 5: 0.98 to 1.76 times its speed, for 8192 units 0.73 to 1.02.
FEW_UNITS = 1 << 12


def extent(mode: str, weights: int, steps: int, batch: int, hidden: int, gradients: bool, x: Tensor) -> Extent:
    """Of a call in eager; weights: how many the last layer has; hidden: the hidden size."""
    brief, units = steps <= BRIEF, batch * hidden
    many = (units > MANY and (batch > FEW or hidden > LARGE)) or (gradients and brief)
    wide = hidden >= BROAD and units >= (WIDE_TRAINING if gradients else WIDE)
    heavy = weights >= HEAVY
    lean = heavy and steps * batch <= LEAN and (batch > 2 or not gradients)
    wanted = gradients and x.requires_grad and not (x.is_leaf and steps >= LONG)
    thin = hidden <= NARROW and x.shape[-1] >= THIN * hidden and x.numel() >= VAST
    middling = wanted and (thin or (hidden in MIDDLE and steps * units in BAND))
    short, small = steps <= SHORT[mode], brief and steps * units <= SMALL
    sparse = heavy and steps * batch <= SPARSE
    return many, short, steps * units >= BULK, small, wide, lean, sparse, middling


def empty_outputs(x: Tensor, weights: Sequence[Tensor], layer: Layer, keep: bool, batch: int) -> tuple[Tensor, ...]:
    """Unwritten (y, hn, cn, gates, cell); also the op's fake. Gates are those of the input side, to be overwritten."""
    rows, output = weights[1].shape
    hidden, D = rows // GATES[layer.mode], layer.directions
    y = x.new_empty((*x.shape[:-1], D * output))
    hn = x.new_empty((D, batch, output))
    cn = x.new_empty((D, batch, hidden) if layer.mode == "LSTM" else 0)
    steps = math.prod(x.shape[:-1])
    gated = keep and GATES[layer.mode] > 1
    gates = x.new_empty((steps, D * rows) if gated else 0)
    cell = x.new_empty((steps, D * hidden) if gated or (keep and layer.zones) else 0)
    return y, hn, cn, gates, cell


class Walker(Backend):
    """Kernels for the walk through time; all products over whole sequences are torch's."""

    #: Whether the walks add b_ih to gx and sum the gradients of the biases.
    walks_biases = False

    def makes_input_side(self, x: Tensor, layer: Layer, sizes: Sizes) -> bool:
        """Whether the walk makes gx of x (N, I), a step at a time."""
        return False

    def makes_products(self, x: Tensor, sizes: Sizes) -> bool:
        """Whether the walk back makes the products over all rows, but for a projection's."""
        return False

    def walk(
        self,
        layer: Layer,
        sizes: Sizes,
        parts: Sequence[Weights],
        h0: Tensor | None,
        c0: Tensor | None,
        x: Tensor,
        gx: Tensor | None,
        kept: tuple[Tensor | None, Tensor | None],
        results: tuple[Tensor, Tensor, Tensor | None],
    ) -> None:
        """Fills kept, (gates, cell) or None each, and results, (y, hn, cn)."""
        raise NotImplementedError

    def walk_back(
        self,
        layer: Layer,
        sizes: Sizes,
        parts: Sequence[Weights],
        h0: Tensor | None,
        c0: Tensor | None,
        saved: Sequence[Tensor],
        given: Sequence[Tensor | None],
        results: tuple[Tensor | None, ...],
        biases: Sequence[Tensor | None],
        products: tuple[Any, ...] = (),
    ) -> None:
        """Fills results, (dgates, dm, dh, u, previous, dh0, dc0), and where it `walks_biases` their gradients, of each
        direction (db_ih, db_hh); None: not wanted. products, where it `makes_products`: x, of each direction w_ih, and
        to be filled dx and of each direction (dw_ih, dw_hh)."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, weights: Sequence[Tensor], h0: Tensor | None, c0: Tensor | None, layer: Layer, keep: bool
    ) -> tuple[Tensor | None, ...]:
        sizes, parts = sizes_of(x, weights, layer), equations.split(weights, layer.directions)
        flat, gates = x.reshape(sizes.rows, x.shape[-1]), None
        inside = self.makes_input_side(flat, layer, sizes)
        gx = None if inside else input_side(flat, parts, not self.walks_biases)
        if keep and GATES[layer.mode] > 1:
            gates = x.new_empty((sizes.rows, layer.directions * weights[1].shape[0])) if gx is None else gx
        y = x.new_empty((*x.shape[:-1], layer.directions * sizes.output))
        hn = x.new_empty((layer.directions, sizes.batch, sizes.output))
        cn = x.new_empty((layer.directions, sizes.batch, sizes.hidden)) if layer.mode == "LSTM" else None
        cell = None
        if keep and (GATES[layer.mode] > 1 or layer.zones):
            # the kernel leaves out what is past a length
            empty = y.new_empty if layer.lengths is None else y.new_zeros
            cell = empty((sizes.rows, layer.directions * sizes.hidden))
        self.walk(layer, sizes, parts, h0, c0, flat, gx, (gates, cell), (y, hn, cn))
        return y, hn, cn, gates, cell

    def backward(self, *arguments: Any) -> list[Tensor | None]:
        return self.backward_and_deltas(*arguments)[0]

    def backward_and_deltas(
        self,
        given: Sequence[Tensor | None],
        x: Tensor,
        weights: Sequence[Tensor],
        h0: Tensor | None,
        c0: Tensor | None,
        layer: Layer,
        saved: Sequence[Tensor],
        need: Sequence[bool],
    ) -> tuple[list[Tensor | None], tuple[Tensor, Tensor | None]]:
        """The gradients, and (dgates, dm) of csrc/mmfast.h."""
        sizes, parts = sizes_of(x, weights, layer), equations.split(weights, layer.directions)
        y, directions, each = saved[0], layer.directions, len(weights) // layer.directions
        width = directions * sizes.output
        dgates = y.new_empty((sizes.rows, directions * weights[1].shape[0]))
        dm = y.new_empty((sizes.rows, width)) if layer.mode == "GRU" else None
        dh = u = previous = None
        if parts[0].w_hr is not None:
            dh, u = y.new_empty((sizes.rows, width)), y.new_empty((sizes.rows, directions * sizes.hidden))
        masks = layer.batch_sizes, layer.lengths, layer.reset_mask, layer.dropout_mask
        if any(need[4::each]) and any(mask is not None for mask in masks):
            previous = y.new_empty((sizes.rows, width))
        dh0 = torch.empty_like(h0, memory_format=torch.contiguous_format) if h0 is not None and need[1] else None
        dc0 = torch.empty_like(c0, memory_format=torch.contiguous_format) if c0 is not None and need[2] else None
        biases: list[Tensor | None] = []
        for d in range(directions) if each > 3 else ():
            wanted = need[5 + d * each : 7 + d * each]
            biases += [dgates.new_empty(weights[1].shape[0]) if want else None for want in wanted]
        dense, results = [_dense(d) for d in given], (dgates, dm, dh, u, previous, dh0, dc0)
        flat, dx = x.reshape(sizes.rows, x.shape[-1]), None
        of_matrices: list[Tensor | None] = []
        if self.makes_products(flat, sizes):
            if need[0]:
                dx = flat.new_empty(x.shape)
            for d, part in enumerate(parts):
                of_matrices.append(flat.new_empty(part.w_ih.shape) if need[3 + d * each] else None)
                of_matrices.append(flat.new_empty(part.w_hh.shape) if need[4 + d * each] else None)
            products = flat.contiguous(), [part.w_ih.contiguous() for part in parts], (dx, *of_matrices)
            self.walk_back(layer, sizes, parts, h0, c0, saved, dense, results, biases, products)
        else:
            self.walk_back(layer, sizes, parts, h0, c0, saved, dense, results, biases)
            if need[0]:
                dx = input_gradient(dgates, [part.w_ih for part in parts], GATES[layer.mode]).view(x.shape)
            side = RecurrentSide(y.view(sizes.rows, width), h0, previous, sizes, dm)
            for d in range(directions):
                mine = dgates if directions == 1 else dgates.chunk(2, 1)[d]
                of_matrices += weight_gradients(mine, flat, side, d, need[3 + d * each : 5 + d * each])
        if not self.walks_biases:
            sum_biases(dgates, dm, biases)
        dweights: list[Tensor | None] = []
        for d in range(directions):
            dweights += [*of_matrices[2 * d : 2 * d + 2], *biases[2 * d : 2 * d + 2]]
            if dh is not None and u is not None:
                dweights.append(projection_gradient(dh, u, sizes, d) if need[2 + (d + 1) * each] else None)
        return [dx, dh0, dc0, *dweights], (dgates, dm)


class Cpu(Walker):
    """csrc/cpu/rnn.cpp, rnn_cell.cpp"""

    name = "cpu"
    walks_biases = True

    def refusals(self, case: Case) -> list[str]:
        return native.cpu_refusals("the input is", case.device, case.dtype) + _beyond_autocast(case)

    def reluctance(self, case: Case) -> str:
        """PyTorch's RNN and GRU, loops over its operators, were slower beyond a few steps: 1.1 to 15 times. Its LSTM
        runs in oneDNN, but not in float64 or float16 (1.6 times slower than here) nor packed (2 to 15 times).

        Against oneDNN, AMD EPYC, 1 thread, PyTorch 2.13, time of torch / time here, padded float32:
                                                     AVX-512 (Zen 5)    AVX2
            training, few or batch * H <= 512        1.0 to 1.4         1.0 to 1.1
            training, above, H a multiple of 16      0.98 to 1.5        1.0 to 1.15, at H = 1024 0.94 to 0.98
            training, above, H = 73, 82, 98, 294     0.97 to 1.3        0.94 to 1.0
            training with x's gradient, MIDDLE, BAND 0.9 to 1.0         the same
            the same, NARROW, THIN, VAST             0.75 to 1.05       not measured
            training, HEAVY and LEAN, B > 2          0.8 to 1.2         not measured
            the same, B <= 2                         0.95 to 1.4        not measured
            training, H < 16, T <= 5                 0.96 to 1.05       not measured
            gradient penalty, T128 B16 H128          2.4 to 2.8         2.4
            inference, few or batch * H <= 512       1.05 to 1.5        1.0 to 1.3
            inference, above, less than BULK units   1.02 to 1.2        0.94 to 1.2
            inference, above                         0.9 to 1.1         the same
            bfloat16, H = 128                        0.75 to 0.82       PyTorch's raises
        There a loop of a step or two, of RNN and GRU too, took 1.2 to 2.2 times as long for at least BULK units, an
        LSTM's 1.05 to 1.6 times for any.
        On Intel's AVX-512 (Granite Rapids) training above, of any H to 700 and more than BRIEF steps, took 0.99 to 1.5
        times as long in PyTorch, inference 0.84 to 1.4.

        In bfloat16 with AMX PyTorch's loops for RNN and GRU took 0.63 to 0.85 of the time here for BROAD layers and
        WIDE steps, and 1.04 to 2.1 times as long for others.
        """
        if case.cell:
            if case.gradients:
                return "PyTorch's cells with gradients were measured as fast"
            if case.transformed:
                # compiled, Zen 3: 1 row of 64 units 0.45 to 0.47 of the speed, 64 rows of 128 units 0.7 to 0.9
                return "in a compiled graph Inductor makes one loop of what follows the products"
            # two products are nearly all of it: for 64 rows of 128 units PyTorch took 0.82 to 0.9 of the time here
            intels = GATES[case.mode] == 1 and native.is_intel()
            return "PyTorch's RNNCell was measured as fast on Intel's processors" if intels else ""
        if case.short and case.transformed:
            return f"in a compiled graph Inductor's loops were measured faster for at most {SHORT[case.mode]} steps"
        # oneDNN has no projection: Zen 5, 64 steps, 16 rows, 128 units to 64: 2.99 ms where ours takes 1.09
        ours, float32s = native.beats_mkl(), case.mode == "LSTM" and case.dtype == torch.float32 and not case.proj_size
        if case.short and not (case.extras or (ours and (float32s or (case.bulky and not case.sparse)))):
            return f"PyTorch's loop was measured faster for at most {SHORT[case.mode]} steps"
        if case.sparse and ours and not (case.gradients or case.extras or (float32s and not case.packed)):
            return f"PyTorch's loop was measured faster for {SPARSE} rows of all steps and {HEAVY} weights or more"
        if case.stays_float32 and has_products(case.dtype) and not case.transformed:
            return f"PyTorch's loop with products in {case.dtype} was not measured on such a processor"
        narrow = case.dtype == torch.bfloat16 and native.isa() == "avx512"  # below, PyTorch's LSTM raises
        onednn = float32s or (case.mode == "LSTM" and narrow)
        if case.wide and case.dtype == torch.bfloat16 and _multiplies_by_amx() and not (case.packed or case.lengths):
            return f"PyTorch's products in bfloat16 by AMX were measured faster for hidden sizes from {BROAD} on"
        if not onednn or case.packed or case.lengths or case.transformed or case.extras:
            return ""
        if narrow:
            return "PyTorch's LSTM in bfloat16, oneDNN's, was measured faster"
        if case.lean and native.beats_mkl():
            few = f"at most {LEAN} rows of all steps and {HEAVY} weights or more"
            return f"PyTorch's LSTM, oneDNN's, was measured faster for {few}"
        if not case.many:
            return ""
        if not case.gradients:
            if native.beats_mkl() and not case.bulky and case.hidden_size < LARGE:
                return ""
            return f"PyTorch's LSTM without gradients, oneDNN's, was measured faster for batch * hidden_size > {MANY}"
        if native.isa() == "avx512":
            few = f"at most {BRIEF} steps and {SMALL} units of all steps"
            if case.middling and case.input_size >= BROADER and not native.is_intel():
                few = "such sizes with the input's gradient"
            elif not (case.small and (native.is_intel() or case.hidden_size < TINY)):
                return ""
            return f"PyTorch's LSTM, oneDNN's, was measured faster for {few}"
        if case.hidden_size > LARGE:
            return f"PyTorch's LSTM, oneDNN's, was measured faster for hidden sizes above {LARGE}"
        if case.hidden_size % 16:
            return (
                f"PyTorch's LSTM, oneDNN's, was measured faster for hidden size {case.hidden_size}, no multiple of 16"
            )
        return ""

    def makes_input_side(self, x, layer, sizes) -> bool:
        # gx is neither written nor read: with AVX-512 0.97 to 1.06 of the speed in training and 1.02 to 1.22 without
        # gradients, with AVX2 0.98 to 1.08 and 0.95 to 1.5, but 0.6 to 0.95 for the few rows for which MKL packs no
        # weights, and 0.85 for HEAVY layers, whose panels no step finds in a cache; the gates past a length, which the
        # walk leaves out, are to be finite
        inputs, gates = x.shape[1], GATES[layer.mode] * sizes.hidden
        light = gates * (inputs + sizes.output) < HEAVY and sizes.rows >= PACKED * inputs
        worth = native.beats_mkl() or light
        return layer.lengths is None and worth and sizes.rows >= FEW * sizes.steps and self.makes_products(x, sizes)

    def makes_products(self, x, sizes) -> bool:
        # one call for all: after other work torch's from Python took 0.1 to 0.3 ms for a layer; with AVX2 1.0 to 1.4 of
        # the speed
        return sizes.rows > 0 and x.dtype.itemsize >= 4 and native.matches_mkl()

    def walk(self, layer, sizes, parts, h0, c0, x, gx, kept, results) -> None:
        row, alive = native_layer(layer, sizes, parts, h0, c0)
        b_ih = [_dense(part.b_ih) for part in parts]
        inputs: tuple[Any, ...] = ()
        if gx is None:
            inputs = x.contiguous(), [part.w_ih.contiguous() for part in parts]
        native.cpu_rnn_forward(row, gx, kept, results, b_ih, *inputs)
        del alive

    def walk_back(self, layer, sizes, parts, h0, c0, saved, given, results, biases, products=()) -> None:
        row, alive = native_layer(layer, sizes, parts, h0, c0)
        native.cpu_rnn_backward(row, saved, given, results, biases, *products)
        del alive


@functools.cache
def _multiplies_by_amx() -> bool:
    return torch.cpu._is_amx_tile_supported() and has_products(torch.bfloat16)


def _beyond_autocast(case: Case) -> list[str]:
    """Kernels read and give one dtype; a projected state in PyTorch's loop is of another than the cell's."""
    if not case.autocast or not (case.cell or (case.proj_size and case.device == "cpu")):
        return []
    return ["autocast is on (supported: off, or whole layers, on a CPU without projection)"]


def _beyond_the_gpu_kernels(case: Case) -> list[str]:
    """What neither CUDA C++ nor Triton has."""
    refusals = [f"proj_size is {case.proj_size} (supported: 0)"] if case.proj_size else []
    refusals += [f"{name} is given (supported: reset_mask)" for name in case.extras if name != "reset_mask"]
    return refusals + _beyond_autocast(case)


class Cuda(Walker, GpuBackend):
    """csrc/cuda/rnn_resident.cu, rnn_cluster.cu and rnn.cu, on a CUDA device; on CPU tensors in the emulator.

    Where W_hh fits into a block, or a cluster of blocks can share it, a layer's walk is one launch. Elsewhere a step is
    one of torch's products and one launch, so a Cell, a layer of one step, is two products and one launch.
    """

    name = "cuda"

    def refusals(self, case: Case) -> list[str]:
        refusals = native.cuda_refusals(case.device)
        if case.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            refusals.append(f"the input is {case.dtype} (supported: float32, float16, bfloat16)")
        return refusals + _beyond_the_gpu_kernels(case)

    def rounds(self, x: Tensor) -> bool:
        """Whether float32 is multiplied in TF32. PyTorch's setting is for CUDA, so the emulator does not."""
        return x.is_cuda and portable.uses_tf32()

    def walk(self, layer, sizes, parts, h0, c0, x, gx, kept, results) -> None:
        if _fits_on_chip(layer, sizes, gx):
            row, alive = _device_layer(layer, sizes, parts, h0, c0)
            kept = kept if GATES[layer.mode] > 1 else (None, None)
            native.cuda_rnn_forward(row, self.rounds(gx), gx, kept, results)
            del alive
            return
        y, hn, cn = results
        route = _Route(layer, sizes, gx)
        narrow = gx.dtype != torch.float32
        for d, part in enumerate(parts):
            h, c = hn[d], None
            _begin(h, h0, d)
            if layer.mode == "LSTM":
                c = cn[d].float() if narrow else cn[d]
                _begin(c, c0, d)
            exact = h.float() if layer.mode == "GRU" and narrow else None
            gates, cell = (kept[0], kept[1]) if GATES[layer.mode] > 1 else (None, None)
            of_gx, of_y, of_gates, of_cell = (route.columns(a, d) for a in (gx, y, gates, cell))
            w, bias = part.w_hh.t(), _dense(part.b_hh)
            product = gx.new_empty((sizes.batch, w.shape[1]))
            for t in route.times(d):
                row, rows = route.first[t], route.rows[t]
                torch.mm(h[:rows], w, out=product[:rows])
                pointers = of_gx.at(row), product, bias, h, exact, c
                outputs = of_y.at(row), of_gates.at(row), of_cell.at(row)
                native.cuda_rnn_step_forward(gx, route.step(t, d), (*pointers, *outputs))
            if c is not None and narrow:
                cn[d].copy_(c)

    def walk_back(self, layer, sizes, parts, h0, c0, saved, given, results, biases, products=()) -> None:
        if _fits_on_chip(layer, sizes, saved[0]):
            row, alive = _device_layer(layer, sizes, parts, h0, c0)
            native.cuda_rnn_backward(row, self.rounds(saved[0]), saved, given, results)
            del alive
            return
        dgates, dm, _, _, previous, *initial = results
        (y, gates, cell), (dy, *last) = saved, given
        route = _Route(layer, sizes, y)
        lstm, gated = layer.mode == "LSTM", GATES[layer.mode] > 1
        h0, c0 = _dense(h0), _dense(c0)
        sequences = y, gates if gated else None, cell if gated else None, dy, dgates, dm, previous
        for d, part in enumerate(parts):
            dh, dc = (y.new_empty((sizes.batch, sizes.hidden), dtype=torch.float32) for _ in range(2))
            for carried, start in zip((dh, dc), last, strict=True):
                _begin(carried, start, d)
            product = y.new_empty((sizes.batch, sizes.hidden))
            width, delta = part.w_hh.shape[0], None
            if layer.mode == "GRU" or layer.reset_mask is not None:
                delta = y.new_empty((sizes.batch, width))
            of_y, of_gates, of_cell, of_dy, *outputs = (route.columns(a, d) for a in sequences)
            starts = [None if state is None else state[d] for state in (h0, c0)]
            products, order = 0, route.times(d)
            for i, t in reversed(list(enumerate(order))):
                row, rows = route.first[t], route.rows[t]
                before = order[i - 1] if i else t
                at, befores = route.first[before], route.rows[before] if i else 0
                read = product, of_y.at(row), of_gates.at(row), of_cell.at(row), of_dy.at(row)
                written = [rows_of.at(row) for rows_of in outputs]
                native.cuda_rnn_step_backward(
                    y,
                    route.step(t, d),
                    (max(rows, products), products, befores, before),
                    (*read, of_y.at(at), of_cell.at(at), *starts, dh, dc if lstm else None, *written, delta),
                )
                operand = dgates[row : row + rows, d * width : (d + 1) * width] if delta is None else delta[:rows]
                if i or initial[0] is not None:
                    torch.mm(operand, part.w_hh, out=product[:rows])
                products = rows
            if initial[0] is not None:
                dh[:products] += product[:products]
            for wanted, found in zip(initial, (dh, dc), strict=True):
                if wanted is not None:
                    wanted[d].copy_(found)


def _fits_on_chip(layer: Layer, sizes: Sizes, x: Tensor) -> bool:
    """Whether a kernel walks whole sequences with W_hh on chip. One step is not worth bringing it there."""
    return sizes.steps > 1 and native.cuda_rnn_resident(x, MODES[layer.mode], sizes.hidden) > 0


def _device_layer(
    layer: Layer, sizes: Sizes, parts: Sequence[Weights], h0: Tensor | None, c0: Tensor | None
) -> tuple[tuple, native.RnnTensors]:
    """As `native_layer`, packed sizes as offsets and lengths on the weights' device."""
    if layer.batch_sizes is None:
        return native_layer(layer, sizes, parts, h0, c0)
    each = layer.batch_sizes
    # a sequence has as many steps as there are batches larger than its number
    lengths = sizes.steps - torch.searchsorted(each.flip(0), torch.arange(sizes.batch, device="cpu"), right=True)
    both = torch.cat([each.new_zeros(1), each.cumsum(0), lengths]).to(parts[0].w_hh.device, non_blocking=True)
    offsets, lengths = both.split([sizes.steps + 1, sizes.batch])
    _, tensors = native_layer(layer._replace(batch_sizes=None), sizes, parts, h0, c0)
    tensors = tensors._replace(offsets=offsets, lengths=lengths)
    return _row(layer, sizes, parts, tensors), tensors


class _Route:
    """Where a layer's steps are: of each its first row, its number of rows, and the order of each direction."""

    def __init__(self, layer: Layer, sizes: Sizes, x: Tensor) -> None:
        self.rows = [sizes.batch] * sizes.steps if layer.batch_sizes is None else layer.batch_sizes.tolist()
        self.first = [0, *itertools.accumulate(self.rows)]
        self.layer, self.sizes = layer, sizes
        self.constants = native.DTYPES[x.dtype], MODES[layer.mode], layer.directions
        self.lengths = None if layer.lengths is None else layer.lengths.to(torch.int64).contiguous()
        self.resets = None if layer.reset_mask is None else layer.reset_mask.contiguous().view(-1)

    def times(self, direction: int) -> list[int]:
        return list(range(self.sizes.steps))[:: 1 - 2 * direction]

    def columns(self, x: Tensor | None, direction: int) -> native.RnnRows:
        """Of a sequence tensor, (..., D * width)."""
        rows = None if x is None else x.view(self.sizes.rows, x.shape[-1])
        return native.rnn_rows(rows, direction, self.layer.directions)

    def step(self, t: int, direction: int) -> native.RnnStep:
        lengths = 0 if self.lengths is None else self.lengths.data_ptr()
        cut, cuts, cut_step = 0, 0, t + direction
        if self.resets is not None and cut_step < self.sizes.steps:
            cut, cuts = self.resets.data_ptr() + self.first[cut_step], self.rows[cut_step]
        return native.RnnStep(*self.constants, self.rows[t], self.sizes.hidden, t, lengths, cut, cuts, cut_step)


def _begin(state: Tensor, initial: Tensor | None, direction: int) -> None:
    """state = the direction's initial state, or 0"""
    if initial is None:
        state.zero_()
    else:
        state.copy_(initial[direction])


class Triton(Walker, GpuBackend):
    """triton_kernels.py, on a CUDA device; on CPU tensors in Triton's interpreter."""

    name = "triton"

    def refusals(self, case: Case) -> list[str]:
        kernels, error = portable.kernels(__package__)
        if kernels is None:
            return [error]
        refusals = portable.refusals("the input is", case.device, case.dtype, kernels.INTERPRETED)
        if not 1 <= case.hidden_size <= kernels.HIDDEN:
            refusals.append(f"hidden_size is {case.hidden_size} (supported: 1 to {kernels.HIDDEN})")
        return refusals + _beyond_the_gpu_kernels(case)

    def walk(self, layer, sizes, parts, h0, c0, x, gx, kept, results) -> None:
        shape = sizes.steps, sizes.batch, sizes.hidden
        with portable.on_device(gx):
            kernels = portable.kernels(__package__)[0]
            kernels.forward(layer, shape, parts, _dense(h0), _dense(c0), gx, kept, results)

    def walk_back(self, layer, sizes, parts, h0, c0, saved, given, results, biases, products=()) -> None:
        shape = sizes.steps, sizes.batch, sizes.hidden
        dgates, dm, _, _, *others = results
        with portable.on_device(saved[0]):
            kernels = portable.kernels(__package__)[0]
            kernels.backward(layer, shape, parts, _dense(h0), _dense(c0), saved, given, (dgates, dm, *others))


def native_layer(
    layer: Layer, sizes: Sizes, parts: Sequence[Weights], h0: Tensor | None, c0: Tensor | None
) -> tuple[tuple, native.RnnTensors]:
    """mmfast_rnn_layer, and the tensors that have to outlive it."""
    offsets = lengths = None
    if layer.batch_sizes is not None:
        # several times as fast as cumsum and pad for the few dozen steps that sequences mostly have
        offsets = torch.tensor([0, *itertools.accumulate(layer.batch_sizes.tolist())], device="cpu")
    elif layer.lengths is not None:
        lengths = layer.lengths.to(torch.int64).contiguous()
    masks = layer.reset_mask, layer.zoneout_mask, layer.dropout_mask
    reset, zones, drop, h0, c0 = map(_dense, (*masks, h0, c0))
    w_hh = [part.w_hh.contiguous() for part in parts]
    b_hh, w_hr = [_dense(part.b_hh) for part in parts], [_dense(part.w_hr) for part in parts]
    tensors = native.RnnTensors(offsets, lengths, reset, zones, drop, w_hh, b_hh, w_hr, h0, c0)
    return _row(layer, sizes, parts, tensors), tensors


def _row(layer: Layer, sizes: Sizes, parts: Sequence[Weights], tensors: native.RnnTensors) -> tuple:
    shape = sizes.steps, sizes.batch, sizes.hidden, 0 if parts[0].w_hr is None else sizes.output
    return native.rnn_layer(parts[0].w_hh.dtype, MODES[layer.mode], shape, layer.zoneout, tensors)


def _dense(a: Tensor | None) -> Tensor | None:
    return None if a is None else a.contiguous()


OP = Op("rnn", Case, [Cpu(), Cuda(), Triton(), TorchBackend()])
