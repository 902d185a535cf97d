"""Planted bugs: right kernels made wrong in ways that kernels go wrong, each of which the numerics rule must catch.

A rule that lets one of them through is too weak, and one that fails a right kernel is too strong: `trial` holds a
kernel, mutated or not, to `mmfast.numerics` on fresh random inputs and returns what the rule says.

    >>> trial("adversarial", seed, torch.bfloat16, "hinge")                               # a right kernel: []
    >>> trial("adversarial", seed, torch.bfloat16, "hinge", MUTANTS["adversarial"][0])    # what is wrong, in sentences

`PATTERNS` are mutations of an output whatever the op; the others are an op's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import native
from ..numerics import ENOUGH, Errors
from ..ops.adversarial import equations
from ..ops.adversarial.backends import OP as ADVERSARIAL
from ..ops.adversarial.equations import MODES, Inputs, Term, Terms
from ..ops.conv_transpose.equations import Epilogue, Geometry
from ..ops.conv_transpose.op import conv_transpose
from ..ops.rnn import equations as rnn_equations
from ..ops.rnn.backends import OP as RNN
from ..ops.rnn.equations import GATES, Layer

__all__ = ["ADVERSARIAL_MODES", "CONVOLUTION_MODES", "MUTANTS", "PATTERNS", "RNN_MODES", "Mutant", "trial"]


class AdversarialCall(NamedTuple):
    """The arguments of one forward and backward of the adversarial op: K terms, K tensors of logits, a cotangent.

    peers: of terms that compare with a mean, whose logits' it is; or none.
    """

    terms: Sequence[Term]
    mean: bool
    logits: Sequence[Tensor]
    cotangent: Tensor
    peers: Sequence[int] = ()


#: The modes that mutants are planted in: one of each phi, and one that compares.
ADVERSARIAL_MODES = ("non-saturating", "hinge", "lsgan", "wasserstein", "relativistic-average")


class RnnCall(NamedTuple):
    """The arguments of one forward and backward of a layer with every extra, all of one dtype."""

    x: Tensor
    weights: Sequence[Tensor]
    h0: Tensor
    c0: Tensor | None
    layer: Layer
    cotangent: Tensor


class ConvolutionCall(NamedTuple):
    """The arguments of one forward and backward of a transposed convolution; tensors: as the op's, of one dtype."""

    tensors: tuple[Tensor | None, ...]
    geometry: Geometry
    epilogue: Epilogue
    cotangent: Tensor


#: From a call's arguments to the kernel's (values, gradients): of the adversarial op (K,), of the others the output.
Kernel = Callable[[Any], tuple[Tensor, list[Tensor]]]


class Mutant(NamedTuple):
    """A bug: its name, the kernel that it makes of a right one, and the modes and dtypes in which it is one."""

    name: str
    plant: Callable[[Kernel], Kernel]
    modes: tuple[str, ...] = ADVERSARIAL_MODES
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)


#: Mutations of one output of any op, which has at least two elements.
PATTERNS: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled by 1.02": lambda out: out * 1.02,
    "halved": lambda out: out * 0.5,
    "negated": lambda out: -out,
    "all zero": torch.zeros_like,
    "shifted by one element": lambda out: out.flatten().roll(1).view_as(out),
    "first element not written": lambda out: _with(out, 0, float("nan")),
    "last element stale": lambda out: _with(out, -1, float(out.flatten()[-2])),
    "reversed": lambda out: out.flatten().flip(0).view_as(out),
    "one element off": lambda out: _with(out, 1, float(out.flatten()[1]) + 0.1 * float(out.abs().max())),
}


def _with(out: Tensor, index: int, value: float) -> Tensor:
    out = out.clone()
    out.view(-1)[index] = value
    return out


def _arguments(change: Callable[[AdversarialCall], AdversarialCall]) -> Callable[[Kernel], Kernel]:
    """A kernel that computes the right thing from wrong arguments, forward and backward."""
    return lambda kernel: lambda call: kernel(change(call))


def _terms(change: Callable[[int, Term], Term]) -> Callable[[Kernel], Kernel]:
    return _arguments(lambda call: call._replace(terms=[change(k, term) for k, term in enumerate(call.terms)]))


def _logits(change: Callable[[Tensor], Tensor]) -> Callable[[Kernel], Kernel]:
    return _arguments(lambda call: call._replace(logits=[change(x) for x in call.logits]))


def _on_values(change: Callable[[Tensor], Tensor]) -> Callable[[AdversarialCall, Tensor], Tensor]:
    return lambda _, x: change(x)


def _values(change: Callable[[AdversarialCall, Tensor], Tensor]) -> Callable[[Kernel], Kernel]:
    def plant(kernel: Kernel) -> Kernel:
        def mutant(call: AdversarialCall) -> tuple[Tensor, list[Tensor]]:
            values, gradients = kernel(call)
            return change(call, values), gradients

        return mutant

    return plant


def _gradients(change: Callable[[AdversarialCall, Tensor], Tensor]) -> Callable[[Kernel], Kernel]:
    def plant(kernel: Kernel) -> Kernel:
        def mutant(call: AdversarialCall) -> tuple[Tensor, list[Tensor]]:
            values, gradients = kernel(call)
            return values, [change(call, gradient) for gradient in gradients]

        return mutant

    return plant


def _drop_last_tensor(kernel: Kernel) -> Kernel:
    def mutant(call: AdversarialCall) -> tuple[Tensor, list[Tensor]]:
        values, gradients = kernel(call)
        return _with(values, -1, 0.0), [*gradients[:-1], torch.zeros_like(gradients[-1])]

    return mutant


def _held_constant(kernel: Kernel) -> Kernel:
    """The means that logits are compared with get no gradient."""

    def mutant(call: AdversarialCall) -> tuple[Tensor, list[Tensor]]:
        centres = torch.stack([call.logits[peer].mean() for peer in call.peers])
        inputs = Inputs(call.logits, centres=centres)
        return kernel(call)[0], equations.gradient(call.cotangent, call.terms, call.mean, inputs)

    return mutant


def _sum_in_the_logits_dtype(call: AdversarialCall, values: Tensor) -> Tensor:
    one_by_one = []
    for term, x in zip(call.terms, call.logits, strict=True):
        total = torch.zeros((), dtype=x.dtype)
        for element in x:
            total = total + equations.values([term], False, Inputs([element]))[0]
        one_by_one.append(total / x.numel() if call.mean else total)
    return torch.stack(one_by_one).to(values.dtype)


_LOW = (torch.float16, torch.bfloat16)
_MOVES = ("shifted by one element", "last element stale", "reversed")
_COMPARING = ("relativistic-average",)
_UNEQUAL = ("non-saturating", "hinge", "lsgan", *_COMPARING)

_ADVERSARIAL = [
    Mutant("wrong scale", _terms(lambda k, t: t._replace(weight=t.weight * 1.02))),
    Mutant("weight ignored", _terms(lambda k, t: t._replace(weight=1.0))),
    Mutant(
        "real and fake swapped", _arguments(lambda c: c._replace(terms=[c.terms[k ^ 1] for k in range(len(c.terms))]))
    ),
    Mutant("sign flipped", _terms(lambda k, t: t._replace(sign=-t.sign))),
    Mutant("sum instead of mean", _arguments(lambda c: c._replace(mean=not c.mean))),
    Mutant("hinge margin 0.9", _terms(lambda k, t: t._replace(shift=t.shift * 0.9)), ("hinge",)),
    Mutant("target 0.9", _terms(lambda k, t: t._replace(shift=t.shift * 0.9)), ("lsgan",)),
    Mutant("threshold off", _terms(lambda k, t: t._replace(shift=t.shift + 0.05))),
    Mutant("softplus without its tail", _terms(lambda k, t: t._replace(phi=equations.RELU)), ("non-saturating",)),
    Mutant("relu forgotten", _terms(lambda k, t: t._replace(phi=equations.IDENTITY)), ("hinge",)),
    Mutant("mean of its own side", _arguments(lambda c: c._replace(peers=range(len(c.peers)))), _COMPARING),
    Mutant("means held constant", _held_constant, _COMPARING),
    Mutant("last tensor dropped", _drop_last_tensor),
    Mutant("last element stale", _logits(lambda x: _with(x, -1, float(x[-2])))),
    Mutant("last element zero", _logits(lambda x: _with(x, -1, 0.0))),
    Mutant("one element read twice", _logits(lambda x: torch.cat([x[:1], x[:-1]]))),
    Mutant("divides by n - 1", _values(lambda c, v: v * len(c.logits[0]) / (len(c.logits[0]) - 1))),
    Mutant("cotangent ignored", _gradients(lambda c, g: g / c.cotangent)),
    Mutant("gradient not divided by n", _gradients(lambda c, g: g * g.numel())),
    Mutant("logits rounded to bfloat16", _logits(lambda x: x.bfloat16().to(x.dtype)), dtypes=(torch.float32,)),
    Mutant("sum in the logits' dtype", _values(_sum_in_the_logits_dtype), ("hinge",), _LOW),
    *(Mutant(f"values {name}", _values(_on_values(change))) for name, change in PATTERNS.items()),
    *(
        # in wasserstein all gradients of a tensor are the same number, so that moving them changes nothing
        Mutant(
            f"gradients {name}",
            _gradients(_on_values(change)),
            _UNEQUAL if name in _MOVES else ADVERSARIAL_MODES,
        )
        for name, change in PATTERNS.items()
    ),
]

#: Layers that mutants are planted in; "LSTM-proj" is one with a projection.
RNN_MODES = ("RNN_TANH", "GRU", "LSTM", "LSTM-proj")


def _rnn(name: str, change: Callable[[RnnCall], RnnCall], modes: tuple[str, ...] = RNN_MODES) -> Mutant:
    """A kernel that computes the right thing from wrong arguments, forward and backward."""
    return Mutant(name, lambda kernel: lambda call: kernel(change(call)), modes)


def _masked(name: str, change: Callable[[Any], Any]) -> Callable[[RnnCall], RnnCall]:
    return lambda call: call._replace(layer=call.layer._replace(**{name: change(getattr(call.layer, name))}))


def _weight(index: int, change: Callable[[Tensor], Tensor]) -> Callable[[RnnCall], RnnCall]:
    def changed(call: RnnCall) -> RnnCall:
        weights = list(call.weights)
        weights[index] = change(weights[index])
        return call._replace(weights=weights)

    return changed


def _gate(index: int, factor: float) -> Callable[[Tensor], Tensor]:
    """Of a GRU's or an LSTM's recurrent weight: one gate's rows times a factor."""

    def change(w: Tensor) -> Tensor:
        rows = w.shape[0] // (3 if w.shape[0] == 3 * _UNITS else 4)
        w = w.clone()
        w[index * rows : (index + 1) * rows] *= factor
        return w

    return change


_RNN = [
    _rnn("resets ignored", _masked("reset_mask", lambda m: None)),
    _rnn("resets a step late", _masked("reset_mask", lambda m: torch.cat([torch.zeros_like(m[:1]), m[:-1]]))),
    _rnn("resets inverted", _masked("reset_mask", lambda m: ~m)),
    _rnn("first sequence's resets for all", _masked("reset_mask", lambda m: m[:, :1].expand_as(m))),
    _rnn("zoneout ignored", _masked("zoneout_mask", lambda m: None)),
    _rnn("zoneout inverted", _masked("zoneout_mask", lambda m: ~m)),
    _rnn("zoneout's mask of the step before", _masked("zoneout_mask", lambda m: m.roll(1, 0))),
    _rnn("recurrent dropout ignored", _masked("dropout_mask", lambda m: None)),
    _rnn("recurrent dropout not scaled", _masked("dropout_mask", lambda m: (m > 0).to(m.dtype))),
    _rnn("recurrent dropout's mask of the next unit", _masked("dropout_mask", lambda m: m.roll(1, 2))),
    _rnn("lengths ignored", _masked("lengths", lambda m: None)),
    _rnn("lengths one too long", _masked("lengths", lambda m: m + 1)),
    _rnn("h0 ignored", lambda c: c._replace(h0=torch.zeros_like(c.h0))),
    _rnn(
        "c0 ignored", lambda c: c._replace(c0=torch.zeros_like(c.h0 if c.c0 is None else c.c0)), ("LSTM", "LSTM-proj")
    ),
    _rnn("projection off by 2 %", _weight(-1, lambda w: w * 1.02), ("LSTM-proj",)),
    _rnn("projection's rows shifted", _weight(-1, lambda w: w.roll(1, 0)), ("LSTM-proj",)),
    _rnn("reset gate off", _weight(1, _gate(0, 0.9)), ("GRU",)),
    _rnn("output gate off", _weight(1, _gate(3, 0.9)), ("LSTM", "LSTM-proj")),
    _rnn("b_hh dropped", _weight(3, torch.zeros_like)),
    _rnn("last input stale", lambda c: c._replace(x=torch.cat([c.x[:-1], c.x[-2:-1]]))),
    Mutant("output's last step stale", _values(_on_values(lambda y: torch.cat([y[:-1], y[-2:-1]]))), RNN_MODES),
    # one element of thousands may happen to resemble its neighbour, so that a stale one is none
    *(
        Mutant(f"{what} {name}", plant(_on_values(change)), RNN_MODES)
        for what, plant in (("output", _values), ("gradients", _gradients))
        for name, change in PATTERNS.items()
        if name != "last element stale"
    ),
]


class _Shape(NamedTuple):
    channels: tuple[int, int]
    groups: int
    bias: bool
    epilogue: Epilogue


#: Layers that mutants are planted in, all 2-d with kernel 4 and stride 2. No activation has a kink, across which
#: rounding would carry a right kernel's gradient, too.
_SHAPES = {
    "dense": _Shape((16, 16), 1, False, Epilogue("batch", 1e-2, "silu")),
    "depthwise": _Shape((16, 16), 16, True, Epilogue("none", activation="tanh")),
    "few": _Shape((16, 3), 1, False, Epilogue("instance", 1e-2, "sigmoid")),
}
CONVOLUTION_MODES = tuple(_SHAPES)
_NORMED = ("dense", "few")


def _convolution(
    name: str,
    index: int,
    change: Callable[[Tensor], Tensor],
    modes: tuple[str, ...] = CONVOLUTION_MODES,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16),
) -> Mutant:
    """A kernel that computes the right thing from a wrong tensor, the index-th."""

    def changed(call: ConvolutionCall) -> ConvolutionCall:
        tensors = list(call.tensors)
        tensors[index] = change(tensors[index])  # type: ignore[arg-type]
        return call._replace(tensors=tuple(tensors))

    return Mutant(name, lambda kernel: lambda call: kernel(changed(call)), modes, dtypes)


def _epilogue(name: str, change: Callable[[Epilogue], Epilogue], modes: tuple[str, ...]) -> Mutant:
    return Mutant(name, lambda kernel: lambda call: kernel(call._replace(epilogue=change(call.epilogue))), modes)


_CONVOLUTION = [
    _convolution("a tap dropped", 1, lambda w: w.index_fill(3, torch.tensor([1]), 0)),
    _convolution("taps mirrored", 1, lambda w: w.flip(3)),
    _convolution("phases shifted", 1, lambda w: w.roll(1, 3)),
    _convolution("neighbouring input channel", 1, lambda w: w.roll(1, 0)),
    _convolution("neighbouring output channel", 1, lambda w: w.roll(1, 1), _NORMED),
    _convolution("last input channel left out", 1, lambda w: w.index_fill(0, torch.tensor([len(w) - 1]), 0)),
    _convolution("weight rounded to bfloat16", 1, lambda w: w.bfloat16().to(w.dtype), dtypes=(torch.float32,)),
    _convolution("input shifted by a position", 0, lambda x: x.roll(1, 3)),
    _convolution("a border's positions left out", 0, lambda x: x.index_fill(3, torch.tensor([x.shape[3] - 1]), 0)),
    _convolution("last sample stale", 0, lambda x: torch.cat([x[:-1], x[-2:-1]])),
    _convolution("bias dropped", 2, torch.zeros_like, ("depthwise",)),
    _convolution("bias of the next channel", 2, lambda b: b.roll(1), ("depthwise",)),
    _convolution("norm's weight ignored", 3, torch.ones_like, _NORMED),
    _convolution("norm's bias ignored", 4, torch.zeros_like, _NORMED),
    _convolution("norm's bias of the next channel", 4, lambda b: b.roll(1), _NORMED),
    # over 1152 and 144 positions
    _convolution("variance of a sample", 3, lambda w: w * (1 - 1 / 1152) ** 0.5, ("dense",), (torch.float32,)),
    _convolution("variance of a sample's sample", 3, lambda w: w * (1 - 1 / 144) ** 0.5, ("few",), (torch.float32,)),
    _epilogue("eps twice as large", lambda e: e._replace(eps=2 * e.eps), _NORMED),
    _epilogue("activation forgotten", lambda e: e._replace(activation="none"), CONVOLUTION_MODES),
    _epilogue("a sample's moments, not the batch's", lambda e: e._replace(norm="instance"), ("dense",)),
    _epilogue("the batch's moments, not a sample's", lambda e: e._replace(norm="batch"), ("few",)),
    *(
        Mutant(f"{what} {name}", plant(_on_values(change)), CONVOLUTION_MODES)
        for what, plant in (("output", _values), ("gradients", _gradients))
        for name, change in PATTERNS.items()
        if name != "last element stale"
    ),
]

#: An op's mutants.
MUTANTS: dict[str, list[Mutant]] = {"adversarial": _ADVERSARIAL, "conv_transpose": _CONVOLUTION, "rnn": _RNN}


def trial(op: str, seed: int, dtype: torch.dtype, mode: str, mutant: Mutant | None = None) -> list[str]:
    """What the numerics rule says of an op's kernel on inputs drawn from `seed`, in sentences; [] if it passes.

    op: a key of MUTANTS. mode: one of its modes. mutant: None for the right kernel, which is the CPU kernel (of a
    convolution of 16 bits the CUDA kernel in the emulator), or PyTorch's formula where there is no native library.
    """
    runs: dict[str, tuple[Callable[..., list[str]], Kernel]] = {
        "adversarial": (_adversarial_trial, _adversarial_kernel),
        "conv_transpose": (_convolution_trial, _convolution_kernel),
        "rnn": (_rnn_trial, _rnn_kernel),
    }
    run, kernel = runs[op]
    return run(seed, dtype, mode, mutant.plant(kernel) if mutant else kernel)


def _convolution_kernel(call: ConvolutionCall) -> tuple[Tensor, list[Tensor]]:
    on_cpu = call.cotangent.dtype in (torch.float32, torch.float64)
    backend = "cpu" if on_cpu else "cuda"
    return _convolved(call, "torch" if native.load_error("_C" if on_cpu else "_emulator") else backend)


def _convolved(call: ConvolutionCall, backend: str) -> tuple[Tensor, list[Tensor]]:
    leaves = [None if a is None else a.detach().requires_grad_() for a in call.tensors]
    out = conv_transpose(tuple(leaves), call.geometry, call.epilogue, backend)[0]  # type: ignore[arg-type]
    some = [a for a in leaves if a is not None]
    return out.detach(), list(torch.autograd.grad(out, some, call.cotangent))


@functools.lru_cache(maxsize=16)
def _draw_convolution(seed: int, dtype: torch.dtype, mode: str) -> tuple[ConvolutionCall, tuple, tuple]:
    """A layer, and what float64 and PyTorch's operators make of it."""
    generator = torch.Generator().manual_seed(seed)
    (cin, cout), groups, has_bias, epilogue = _SHAPES[mode]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    # of a norm's layer so small that eps counts
    scale = 0.02 if epilogue.normalizes else 0.3
    x, weight = normal(8, cin, 6, 6), (normal(cin, cout // groups, 4, 4) * scale).to(dtype)
    bias = normal(cout) if has_bias else None
    norm = (normal(cout).abs() + 0.5, normal(cout)) if epilogue.normalizes else (None, None)
    geometry = Geometry((2, 2), (1, 1), (0, 0), (1, 1), groups, (0, 0, 0, 0))
    call = ConvolutionCall((x, weight, bias, *norm, None, None), geometry, epilogue, normal(8, cout, 12, 12))
    wide = call._replace(
        tensors=tuple(None if a is None else a.double() for a in call.tensors), cotangent=call.cotangent.double()
    )
    return call, _convolved(wide, "torch"), _convolved(call, "torch")


def _convolution_trial(seed: int, dtype: torch.dtype, mode: str, kernel: Kernel) -> list[str]:
    """Of the output, dx and dweight."""
    errors = {name: Errors(name) for name in ("out", "dx", "dweight")}
    try:
        for draw in range(seed, seed + ENOUGH):
            call, reference, yardstick = _draw_convolution(draw, dtype, mode)
            out, gradients = kernel(call)
            for name, *of in zip(
                errors, (out, *gradients), (yardstick[0], *yardstick[1]), (reference[0], *reference[1]), strict=False
            ):
                errors[name].add(*of)
            # dweight has too few values for the rule, and has been summed over many
            if errors["out"].enough and errors["dx"].enough:
                break
    except AssertionError as error:
        return [str(error)]
    return [f"{name}: {failure}" for name, pool in errors.items() if pool.enough for failure in pool.compare().failures]


def _rnn_kernel(call: RnnCall) -> tuple[Tensor, list[Tensor]]:
    if not native.available():
        return _rnn_formula(call)
    backend, (x, weights, h0, c0, layer, cotangent) = RNN.backends["cpu"], call
    y, _, _, *saved = backend.forward(x, weights, h0, c0, layer, True)
    need = [True, True, c0 is not None, *[True] * len(weights)]
    gradients = backend.backward((cotangent, None, None), x, weights, h0, c0, layer, (y, *saved), need)
    return y, [gradient for gradient in gradients if gradient is not None]


def _rnn_formula(call: RnnCall) -> tuple[Tensor, list[Tensor]]:
    given = [call.x, call.h0, call.c0, *call.weights]
    leaves = [None if a is None else a.detach().requires_grad_() for a in given]
    x, h0, c0, *weights = leaves
    y = rnn_equations.sequence(x, weights, h0, c0, call.layer)[0]  # type: ignore[arg-type]
    some = [a for a in leaves if a is not None]
    return y.detach(), list(torch.autograd.grad(y, some, call.cotangent))


#: Of a layer that mutants are planted in: steps, sequences, inputs, units, size of the projection.
_STEPS, _BATCH, _INPUTS, _UNITS, _PROJECTED = 6, 160, 16, 20, 9


@functools.lru_cache(maxsize=16)
def _draw_rnn(seed: int, dtype: torch.dtype, mode: str) -> tuple[RnnCall, tuple, tuple]:
    """A layer, and what float64 and PyTorch's operators make of it."""
    generator = torch.Generator().manual_seed(seed)
    name, _, projected = mode.partition("-")
    size, rows = _PROJECTED if projected else _UNITS, GATES[name] * _UNITS
    shapes = [(rows, _INPUTS), (rows, size), (rows,), (rows,), *[(size, _UNITS)] * bool(projected)]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    weights = [(normal(*shape) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.3)).to(dtype) for shape in shapes]
    chance = functools.partial(torch.rand, generator=generator)
    lengths = torch.randint(1, _STEPS + 1, (_BATCH,), generator=generator)
    lengths[-1] = _STEPS
    layer = Layer(
        name,
        lengths=lengths,
        reset_mask=chance(_STEPS, _BATCH) < 0.3,
        zoneout_mask=chance(_STEPS, _BATCH, size) < 0.4,
        dropout_mask=((chance(1, _BATCH, size) < 0.7) / 0.75).to(dtype),
    )
    c0 = normal(1, _BATCH, _UNITS) if name == "LSTM" else None
    x, cotangent = normal(_STEPS, _BATCH, _INPUTS), normal(_STEPS, _BATCH, size)
    call = RnnCall(x, weights, normal(1, _BATCH, size), c0, layer, cotangent)
    wide = RnnCall(
        *(x.double(), [w.double() for w in weights], call.h0.double(), None if c0 is None else c0.double()),
        layer._replace(dropout_mask=layer.dropout_mask.double()),  # type: ignore[union-attr]
        cotangent.double(),
    )
    return call, _rnn_formula(wide), _rnn_formula(call)


def _rnn_trial(seed: int, dtype: torch.dtype, mode: str, kernel: Kernel) -> list[str]:
    """Of y, dx and, pooled, the weights' gradients."""
    errors = {name: Errors(name) for name in ("y", "dx")}
    try:
        for draw in range(seed, seed + ENOUGH):
            call, reference, yardstick = _draw_rnn(draw, dtype, mode)
            y, gradients = kernel(call)
            errors["y"].add(y, yardstick[0], reference[0])
            errors["dx"].add(gradients[0], yardstick[1][0], reference[1][0])
            if all(pool.enough for pool in errors.values()):
                break
    except AssertionError as error:
        return [str(error)]
    return [f"{name}: {failure}" for name, pool in errors.items() for failure in pool.compare().failures]


def _adversarial_kernel(call: AdversarialCall) -> tuple[Tensor, list[Tensor]]:
    backend = ADVERSARIAL.backends["cpu" if native.available() else "torch"]
    terms, inputs = Terms(call.terms), Inputs(call.logits, peers=call.peers)
    _, values, slopes = backend.forward(terms, call.mean, inputs, True)
    needed = [True] * len(call.logits)
    return values, backend.backward(call.cotangent, terms, call.mean, inputs, slopes, needed)


# a list of tensors of so many logits; enough lists for the rule
_TENSORS, _LOGITS = 64, 24


class _Drawn(NamedTuple):
    """Lists of logits (lists, K, n), a cotangent each, two terms that take turns, the truth and PyTorch's results."""

    logits: Tensor
    cotangents: Tensor
    terms: list[Term]
    reference: tuple[Tensor, Tensor]
    yardstick: tuple[Tensor, Tensor]


@functools.lru_cache(maxsize=16)
def _draw(seed: int, dtype: torch.dtype, mode: str) -> _Drawn:
    generator = torch.Generator().manual_seed(seed)
    lists = ENOUGH // _TENSORS
    logits = (torch.randn(lists, _TENSORS, _LOGITS, generator=generator) * 2).to(dtype)
    cotangents = (torch.rand(lists, generator=generator) + 1.5).to(dtype)
    weights = (torch.rand(2, generator=generator, dtype=torch.float64) + 1.2).tolist()
    roles = (MODES[mode].real, MODES[mode].fake)
    terms = [term._replace(weight=weight) for term, weight in zip(roles, weights, strict=True)]
    compares = bool(MODES[mode].pairing)
    reference = _rows(terms, logits.double(), cotangents.double(), compares)
    return _Drawn(logits, cotangents, terms, reference, _rows(terms, logits, cotangents, compares))


def _adversarial_trial(seed: int, dtype: torch.dtype, mode: str, kernel: Kernel) -> list[str]:
    logits, cotangents, terms, reference, yardstick = _draw(seed, dtype, mode)
    errors = {"values": Errors("values"), "gradients": Errors("gradients")}
    peers = [k ^ 1 for k in range(_TENSORS)] if MODES[mode].pairing else []
    try:
        for k in range(len(logits)):
            call = AdversarialCall(terms * (_TENSORS // 2), True, logits[k].unbind(), cotangents[k], peers)
            values, gradients = kernel(call)
            errors["values"].add(values, yardstick[0][k].to(values.dtype), reference[0][k])
            errors["gradients"].add(torch.stack(gradients), yardstick[1][k], reference[1][k])
    except AssertionError as error:
        # of the wrong shape or pattern, which no figures are needed to see
        return [str(error)]
    return [f"{name}: {failure}" for name, pool in errors.items() for failure in pool.compare().failures]


def _rows(terms: Sequence[Term], logits: Tensor, cotangents: Tensor, compares: bool) -> tuple[Tensor, Tensor]:
    """Values (lists, K) and gradients (lists, K, n), even tensors by the first term, odd ones by the second.

    compares: whether each tensor's logits are less the mean of its neighbour's.
    """
    logits = logits.clone().requires_grad_()
    columns = []
    for k, term in enumerate(terms):
        other = logits[:, 1 - k :: 2].mean(-1, keepdim=True) if compares else None
        elements = equations._phi(term, equations._argument(term, logits[:, k::2], other))
        columns.append(elements.mean(-1) * term.weight)
    values = torch.stack(columns, -1).flatten(1)
    (gradients,) = torch.autograd.grad(values, logits, cotangents[:, None].expand_as(values))
    return values.detach(), gradients
