"""accelerate, restore, explain: mmfast's layers in the places of torch.nn's, in one model and nowhere else."""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from . import dispatch, nn
from .dispatch import Op, check_backend
from .nn.layer import Layer
from .nn.sequential import has_chain

Model = TypeVar("Model", bound=torch.nn.Module)

_LAYERS = (
    *("RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell"),
    *("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"),
    *("LazyConvTranspose1d", "LazyConvTranspose2d", "LazyConvTranspose3d"),
)
_OURS: dict[type, type] = {getattr(torch.nn, name): getattr(nn, name) for name in _LAYERS}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}
_THEIRS[nn.Sequential] = torch.nn.Sequential

#: The criteria of adversarial losses: the mode that computes the same of both sides, and what else is to be changed.
_CRITERIA: dict[type, tuple[str, str]] = {
    torch.nn.BCEWithLogitsLoss: ("non-saturating", ""),
    torch.nn.BCELoss: ("non-saturating", "; it takes logits: remove the discriminator's final Sigmoid"),
    torch.nn.SoftMarginLoss: ("non-saturating", ""),
    torch.nn.MSELoss: ("lsgan", ""),
    torch.nn.HingeEmbeddingLoss: ("hinge", "; its hinge is on both sides, relu(1 - real) and relu(1 + fake)"),
}


def accelerate(model: Model, *, backend: str | None = None) -> Model:
    """Puts mmfast's layers in the places of torch.nn's in this model, in place, and returns it.

    Every torch.nn.RNN, GRU, LSTM, RNNCell, GRUCell, LSTMCell and (Lazy)ConvTranspose1d, 2d, 3d becomes mmfast.nn's of
    that name. Only the class of the instance changes: parameters, buffers, hooks, the training flag, and so optimizers,
    DDP buckets and state_dict keys stay what they are. A class that a user derived from one of these is left alone, as
    is a layer whose forward was replaced on the instance; `explain(model)` names them. A torch.nn.Sequential in which a
    ConvTranspose is followed by a BatchNorm, an InstanceNorm or an activation becomes mmfast.nn.Sequential, which calls
    them as one op where nobody listens between them. `restore(model)` undoes it.

    backend: "torch", "cpu", "triton" or "cuda" for every layer of mmfast in the model from now on; None: each layer
        keeps its own, at first None (mmfast chooses).
    Raises TypeError where model is no torch.nn.Module, ValueError for an unknown backend.
    """
    _check_model(model, "accelerate")
    if backend is not None:
        check_backend(backend)
    for module in model.modules():
        if _left_alone(module) is None and (ours := _OURS.get(type_before_parametrizations(module))):
            _become(module, ours)
            # RNNBase's list of weights: ours reads the parameters themselves
            module.__dict__.pop("_flat_weights", None)
        if backend is not None and isinstance(module, Layer):
            module.backend = backend
    for module in model.modules():
        if type(module) is torch.nn.Sequential and "forward" not in vars(module) and has_chain(module):
            _become(module, nn.Sequential)
    return model


def restore(model: Model) -> Model:
    """Puts torch.nn's layers in the places of mmfast's in this model, in place, and returns it.

    The inverse of `accelerate`; layers that were made with mmfast.nn become torch.nn's, too. Classes that a user
    derived from mmfast's stay. What demands torch.nn's own classes - TorchScript, ONNX export, quantize_dynamic - works
    on the result as on any model.
    Raises TypeError where model is no torch.nn.Module.
    """
    _check_model(model, "restore")
    for module in model.modules():
        if theirs := _THEIRS.get(type_before_parametrizations(module)):
            _become(module, theirs)
            for name in ("backend", "_asked", "_left", "_noted"):
                module.__dict__.pop(name, None)
            if isinstance(module, torch.nn.RNNBase):
                _renew_flat_weights(module)
    return model


class Row(NamedTuple):
    """One line of an explanation: what serves a layer's, or a function's, call of an op, and why not a faster one."""

    path: str
    layer: str
    op: str
    backend: str
    why: str


class Explanation(tuple[Row, ...]):
    """The rows that `explain` found; printed, a table."""

    def __str__(self) -> str:
        if not self:
            return "no layer here is one that mmfast accelerates"
        table = [("path", "layer", "op", "backend", "why"), *self]
        widths = [max(len(line[column]) for line in table) for column in range(4)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, [*widths, 0], strict=True)) for line in table
        )

    __repr__ = __str__


def explain(model: torch.nn.Module, *example_inputs: Any, **example_kwargs: Any) -> Explanation:
    """Which backend serves each layer of this model, why not a faster one, and what accelerate leaves alone and why.

    Among that are criteria such as BCEWithLogitsLoss: where one judges a discriminator's logits, its row says which
    line replaces it.

    Without inputs, each layer is judged by what it is: its sizes, and its parameters' dtype and device. With inputs the
    model is called once, `model(*example_inputs, **example_kwargs)`, and the rows are the choices really made - under
    autocast, with packed sequences, by functions of mmfast.functional outside of layers. The call leaves buffers and
    random number generators as they were. A backend of "none" marks a choice that would raise.
    Raises TypeError where model is no torch.nn.Module, and what the call raises.
    """
    _check_model(model, "explain")
    called = _call(model, example_inputs, example_kwargs) if example_inputs or example_kwargs else Called({}, False)
    fused = dict(_fused_cases(model))
    explained: list[Row] = []
    for path, module in model.named_modules():
        if reason := _left_alone(module) or _not_yet(module):
            explained.append(Row(path or ".", _class_name(module), _op_of(module), "torch", reason))
        if reason := _replaceable(module):
            explained.append(Row(path, _class_name(module), "adversarial", "torch", reason))
        if path in called.rows:
            explained += called.rows[path]
        elif isinstance(module, Layer):
            explained.append(_static_row(path, module, fused.get(path), called))
    return Explanation(explained)


def _check_model(model: Any, function: str) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"mmfast.{function} was given a {type(model).__name__}; expected a torch.nn.Module")


def _become(module: torch.nn.Module, cls: type) -> None:
    """Changes the class of module to cls. A parametrized module gets a generated class of its own, cls its only base,
    with the properties that torch.nn.utils.parametrize put into its present one (which its deepcopies share)."""
    if is_parametrized(module):
        generated = type(module)
        cls = type(generated.__name__, (cls,), dict(vars(generated)))
    module.__class__ = cls


def _renew_flat_weights(module: torch.nn.RNNBase) -> None:
    """RNNBase's list of weights and of what it recognises changes by, without flattening them into new memory."""
    with torch.no_grad():
        weights = [getattr(module, name, None) for name in module._flat_weights_names]
    module._flat_weights = weights
    module._flat_weight_refs = [None if weight is None else weakref.ref(weight) for weight in weights]


def _left_alone(module: Any) -> str | None:
    """Why accelerate leaves this layer alone; None where it does not, or where the module is no such layer."""
    cls: Any = type_before_parametrizations(module)
    twin = next((base for base in cls.__mro__ if base in _OURS), None)
    if isinstance(module, Layer) or twin is None:
        return None
    if "forward" in vars(module):
        return "left alone: its forward was replaced on the instance"
    if cls is twin:
        return None
    if cls.forward is not twin.forward:
        return f"left alone: {cls.__name__} overrides forward"
    return f"left alone: {cls.__name__} is a class of its own; derive it from mmfast.nn.{twin.__name__} instead"


def _not_yet(module: torch.nn.Module) -> str | None:
    if type_before_parametrizations(module) not in _OURS:
        return None
    return "torch.nn's own: mmfast.accelerate(model) puts mmfast's in its place"


def _replaceable(module: torch.nn.Module) -> str | None:
    """The change that has mmfast compute what this criterion does in a GAN; None for any other module."""
    if type(module) not in _CRITERIA or getattr(module, "reduction", "mean") == "none":
        return None
    if getattr(module, "weight", None) is not None or getattr(module, "pos_weight", None) is not None:
        return None
    mode, besides = _CRITERIA[type(module)]
    reduction = "" if module.reduction == "mean" else f", reduction={module.reduction!r}"
    return (
        "left alone: a criterion does not say which side it judges; if it is a discriminator's, replace it by "
        f"mmfast.nn.AdversarialLoss({mode!r}{reduction}) and call .discriminator(real_logits, fake_logits) and "
        f".generator(fake_logits){besides}"
    )


def _op_of(module: torch.nn.Module) -> str:
    return "rnn" if isinstance(module, (torch.nn.RNNBase, torch.nn.RNNCellBase)) else "conv_transpose"


def _class_name(module: torch.nn.Module) -> str:
    return type_before_parametrizations(module).__name__


def _row(path: str, module: Any, op: Op, case: Any, explicit: str | None) -> Row:
    try:
        choice = op.explain(case, explicit)
    except (RuntimeError, ValueError) as error:
        return Row(path or ".", _class_name(module), op.name, "none", str(error))
    passed_over = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in choice.passed_over.items())
    return Row(path or ".", _class_name(module), op.name, choice.backend, passed_over or choice.reason)


def _fused_cases(model: torch.nn.Module) -> Iterator[tuple[str, tuple[Op, Any]]]:
    """The layers that are one op with what follows them in an mmfast.nn.Sequential: path, op and case."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Sequential):
            for name, op_and_case in module.static_cases().items():
                yield f"{path}.{name}" if path else name, op_and_case


def _static_row(path: str, module: Any, fused: tuple[Op, Any] | None, called: Called) -> Row:
    op, case = fused or module.static_case()
    if not called.completely:
        return _row(path, module, op, case, module.backend)
    parent = path.rpartition(".")[0]
    for row in called.rows.get(parent, []) if fused else []:
        if row.op == op.name:
            return Row(path, _class_name(module), op.name, row.backend, f"one op with what follows it, see {row.path}")
    return Row(path or ".", _class_name(module), op.name, "-", "not called with these inputs")


class Called(NamedTuple):
    """What a call of the model told: the rows of each path, and whether it came to its end."""

    rows: dict[str, list[Row]]
    completely: bool


def _call(model: torch.nn.Module, inputs: tuple, kwargs: dict[str, Any]) -> Called:
    rows: dict[str, list[Row]] = {}
    inside = [("", model)]

    def listen(op: Op, case: Any, explicit: str | None) -> None:
        path, module = inside[-1]
        row = _row(path, module, op, case, explicit)
        if row not in rows.setdefault(path, []):
            rows[path].append(row)

    with _entered(model, inside), _untouched(), contextlib.ExitStack() as undo:
        dispatch._listeners.append(listen)
        undo.callback(dispatch._listeners.remove, listen)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        try:
            torch.func.functional_call(model, buffers, inputs, kwargs)
        except (RuntimeError, ValueError):
            if not any(row.backend == "none" for found in rows.values() for row in found):
                raise
            return Called(rows, False)
    return Called(rows, True)


@contextlib.contextmanager
def _entered(model: torch.nn.Module, inside: list[tuple[str, torch.nn.Module]]) -> Iterator[None]:
    """Within this context the last of `inside` is the innermost module that runs, with its path."""

    def watch(path: str, module: torch.nn.Module) -> None:
        def enter(*_: Any) -> None:
            inside.append((path, module))

        def leave(*_: Any) -> None:
            inside.pop()

        enter.of_explain = leave.of_explain = True  # type: ignore[attr-defined]
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))

    handles: list[Any] = []
    try:
        for path, module in model.named_modules():
            watch(path, module)
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _untouched() -> Iterator[None]:
    """Within this context compiled models run eagerly; after it the random number generators are as they were."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
