"""Which backend serves a call: explicit choice > use_backend(...) > MMFAST_BACKEND > measured preference.

A backend says in sentences what it *cannot* do (`refusals`) and, of what it can, what it was not measured to do faster
than PyTorch (`reluctance`). The first backend of an op that neither refuses nor is reluctant serves; `torch`, the last,
does neither. An explicit choice asks only for refusals and raises where there are any.

A traced choice depends on static facts only - device, dtype, channels, kernel, mode, hidden size, the sizes of a graph
that is for these alone; never on a symbol -, so a compiled graph chooses once. In eager mode a recurrent layer may also
yield to PyTorch where a sequence or a batch is so small that the cost of the call decides.

Of a compiled graph each call pays for what Dynamo has read on the way: it looks at all of it again, some 20 ns for each
(Zen 5). So a choice is made in a function that Dynamo calls and does not trace, whose result is a constant.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch._C import _are_functorch_transforms_active, _get_tracing_state, _len_torch_dispatch_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling

from . import config, table

BACKENDS = ("torch", "cpu", "triton", "cuda")

# Process-wide, like torch.backends' own settings, and in a list that Dynamo guards on: a graph that was compiled under
# one choice is compiled again under another.
FORCED: list[str | None] = [None]


#: The answers that layers note (`Op.leaves`) hold as long as this object is the same.
EPOCH = [object()]

# What mmfast.explain installs, for as long as it runs a model, to hear of every choice.
_listeners: list[Callable[[Op, Any, str | None], None]] = []


class Backend:
    """One way to compute an op. A subclass sets `name` and adds the op's own methods."""

    name: str

    def refusals(self, case: Any) -> list[str]:
        """What of this case the backend cannot do: sentences saying what was asked and what is supported."""
        raise NotImplementedError

    def reluctance(self, case: Any) -> str:
        """Why PyTorch is preferred for this case; empty where this backend was measured to be faster."""
        raise NotImplementedError


class TorchBackend(Backend):
    """PyTorch's own implementation: it never refuses and is never reluctant."""

    name = "torch"

    def refusals(self, case: Any) -> list[str]:
        return []

    def reluctance(self, case: Any) -> str:
        return ""


class GpuBackend(Backend):
    """Kernels for a GPU; on CPU tensors they are emulated or interpreted, which only an explicit choice asks for."""

    def reluctance(self, case: Any) -> str:
        if case.device == "cpu":
            return f"{self.name} kernels run on a CPU only to be tested"
        return "not measured on this device"


class Choice(NamedTuple):
    """A backend's name, why it serves, and for each backend passed over the reasons."""

    backend: str
    reason: str
    passed_over: dict[str, list[str]]


class Op:
    """An op, the named tuple of static facts that its choice depends on, and its backends, `torch` last."""

    registry: dict[str, Op] = {}

    def __init__(self, name: str, case: type, backends: Sequence[Backend]) -> None:
        self.name = name
        self.case = case
        # Any: each op's backends add the op's own methods
        self.backends: dict[str, Any] = {backend.name: backend for backend in backends}
        self._chosen: dict[tuple, str] = {}
        Op.registry[name] = self

    def select(self, case: Any, explicit: str | None = None) -> str:
        """The name of the backend that serves `case`, a hashable tuple of static facts.

        Raises ValueError for an unknown backend's name and RuntimeError where an explicit choice cannot serve.
        """
        for listener in _listeners:
            listener(self, case, explicit)
        return self._select(case, asked_for(explicit))

    def select_by(self, facts: tuple, make_case: Callable[..., Any], explicit: str | None = None) -> str:
        """`select(make_case(*facts), explicit)`, where the answer for these facts is not known yet.

        facts: what a function sees of its arguments at once. They determine the case together with autocast, under
        which, as while tracing, the case is made anew.
        """
        if is_compiling():
            return self.select_while_tracing(make_case, _constants(facts), explicit)
        if each_call_chooses():
            return self.select(make_case(*facts), explicit)
        key = (facts, explicit or FORCED[0] or config.BACKEND, torch.get_num_threads())
        try:
            return self._chosen[key]
        except KeyError:
            chosen = self.select(make_case(*facts), explicit)
            if not _is_converted():
                self._chosen[key] = chosen
            return chosen
        except TypeError:  # a list among the facts is no key
            return self.select(make_case(*facts), explicit)

    def select_while_tracing(self, make_case: Callable[..., Any], facts: tuple, explicit: str | None = None) -> str:
        """`select_by` in a graph, of facts that are no symbols."""
        # Dynamo hands constants over, of which neither a named tuple is one nor an Op
        return _select_while_tracing(self.name, make_case, facts, explicit or FORCED[0])

    def known(self, facts: tuple, explicit: str | None = None) -> str | None:
        """What `select_by` chose for hashable facts before, if it did: for who knows that nothing else decides."""
        return self._chosen.get((facts, explicit or FORCED[0] or config.BACKEND, torch.get_num_threads()))

    def _select(self, case: Any, requested: str | None) -> str:
        if requested is None and _is_converted():
            requested = "torch"
        key = (case, requested, torch.get_num_threads())
        chosen = self._chosen.get(key)
        if chosen is None:
            chosen = self._chosen[key] = self._choose(case, requested).backend
        return chosen

    def leaves(self, cases: Iterable[Any]) -> bool:
        """Whether PyTorch serves all of these, where no layer and no function asks for a backend."""
        requested = asked_for()
        return requested == "torch" or (requested is None and all(self._select(x, None) == "torch" for x in cases))

    def forget(self) -> None:
        """Makes the op choose anew, for after the preference table has changed."""
        self._chosen.clear()
        EPOCH[0] = object()

    def explain(self, case: Any, explicit: str | None = None) -> Choice:
        """The choice for `case`, with its reasons. Raises as `select` does."""
        return self._choose(case, asked_for(explicit))

    def _choose(self, case: Any, requested: str | None) -> Choice:
        if requested is not None:
            return self._obey(case, check_backend(requested))
        measured = table.preferred(self.name, case)
        if measured and measured.backend in self.backends and not self.backends[measured.backend].refusals(case):
            return Choice(
                measured.backend, f"{measured.ratio:.2f} x PyTorch's speed, measured here: {table.path()}", {}
            )
        passed_over: dict[str, list[str]] = {}
        for name, backend in self.backends.items():
            refusals = backend.refusals(case)
            if not refusals and not (reluctance := backend.reluctance(case)):
                reason = "no other backend is faster here" if name == "torch" else "measured faster than PyTorch"
                return Choice(name, reason, passed_over)
            passed_over[name] = refusals or [reluctance]
        raise AssertionError(f"op {self.name} has no torch backend")

    def _obey(self, case: Any, requested: str) -> Choice:
        backend = self.backends.get(requested)
        if backend is None:
            refusals = [f"{self.name} has no {requested!r} backend (it has: {', '.join(self.backends)})"]
        else:
            refusals = backend.refusals(case)
        if refusals:
            raise RuntimeError(f"backend {requested!r} was asked for {self.name}, but: " + "; ".join(refusals))
        return Choice(requested, f"backend {requested!r} was asked for", {})


def each_call_chooses() -> bool:
    """Whether no earlier choice tells the next: somebody listens, autocast is on, or a tracer runs."""
    return is_compiling() or bool(_listeners) or torch._C._is_any_autocast_enabled() or _get_tracing_state() is not None


def _is_converted() -> bool:
    """Whether torch.jit.trace or torch.onnx.export records the call, for a runtime that knows none of mmfast's ops."""
    return _get_tracing_state() is not None or torch.onnx.is_in_onnx_export()


def _constants(facts: tuple) -> tuple:
    """The facts without symbols: a number that is symbolic in the graph becomes a constant that the graph guards on."""
    return tuple(map(_constant, facts))


def _constant(fact: Any) -> Any:
    if isinstance(fact, tuple):
        return _constants(fact)
    if isinstance(fact, bool):
        return True if fact else False  # noqa: SIM210 (bool(fact), and below float(fact), would stay symbols)
    if isinstance(fact, int):
        return operator.index(fact)
    if isinstance(fact, float):
        return float.fromhex(fact.hex())
    return fact


def is_known(number: float) -> bool:
    """Whether a number, while tracing, is one for all calls of the graph, and no symbol."""
    # importing it takes 0.2 s, but who traces has it
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return has_static_value(number)


def assume_constant_result(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compiler's, without importing torch's compiler (4 s) together with mmfast."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@assume_constant_result
def _select_while_tracing(name: str, make_case: Callable[..., Any], facts: tuple, explicit: str | None) -> str:
    case = make_case(*facts)
    return Op.registry[name].select(case._replace(traced=True) if hasattr(case, "traced") else case, explicit)


def asked_for(explicit: str | None = None) -> str | None:
    """The backend that a call with this `backend=` asks for; None: mmfast chooses."""
    return explicit or FORCED[0] or config.BACKEND


def check_backend(name: str) -> str:
    """`name`, or ValueError where it is no backend's name."""
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; mmfast has: {', '.join(BACKENDS)}")
    return name


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within this context every op uses the named backend ("torch", "cpu", "triton" or "cuda"); None: mmfast chooses.

    Process-wide, as torch.backends' settings are. An op that the backend cannot serve raises RuntimeError with the
    reasons. A module's or a function's own `backend=` argument comes before it, MMFAST_BACKEND after it.
    """
    before = FORCED[0]
    FORCED[0] = None if name is None else check_backend(name)
    EPOCH[0] = object()
    try:
        yield
    finally:
        FORCED[0] = before
        EPOCH[0] = object()


def asked(call: Callable[[], Any]) -> list[tuple[Op, Any]]:
    """The choices made while `call` ran in eager: (op, case), each once, in order."""
    choices: dict[tuple[str, Any], tuple[Op, Any]] = {}

    def listen(op: Op, case: Any, _explicit: str | None) -> None:
        choices[op.name, case] = op, case

    _listeners.append(listen)
    EPOCH[0] = object()
    try:
        call()
    finally:
        _listeners.remove(listen)
    return list(choices.values())


def needs_formula(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether a call is under a torch.func transform or forward-mode AD, which only differentiable formulas serve."""
    if is_compiling():
        return False
    if _are_functorch_transforms_active():
        return True
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def is_transforming() -> bool:
    """Whether a torch.func transform or forward-mode AD is entered at all, as `needs_formula` asks of tensors."""
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_watched() -> bool:
    """Whether anything would miss a kernel that is called directly: explain, a transform, forward-mode AD, a tracer."""
    # names of this module, for attributes of torch's take most of the time; what compiles without Dynamo dispatches
    return bool(
        is_dynamo_compiling()
        or _listeners
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _get_tracing_state() is not None
        or _len_torch_dispatch_stack()
    )


def autocasts(device: str) -> bool:
    """Whether autocast is on for the device; some devices, such as meta, have none."""
    return (
        torch._C._is_any_autocast_enabled()
        and torch.amp.is_autocast_available(device)
        and torch.is_autocast_enabled(device)
    )


def outside_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """torch.autocast refuses devices that know none, such as meta."""
    return torch.autocast(device, enabled=False) if autocasts(device) else contextlib.nullcontext()


def compute_dtype(device: str, dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or autocast's where that is on for the device and applies to `dtype`."""
    if dtype == torch.float64 or not dtype.is_floating_point or not autocasts(device):
        return dtype
    return torch.get_autocast_dtype(device)


def is_plain(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether kernels may be called on these tensors directly: eager, no subclass, nobody listening to dispatch.

    Of a tensor that stands for its negative (the imaginary part of a conjugate) PyTorch's dispatcher makes a plain one.
    torch.jit.trace listens, too: of a kernel called directly it would record nothing but the output's allocation.
    """
    return (
        not is_compiling()
        and _get_tracing_state() is None
        and _len_torch_dispatch_stack() == 0
        and _PLAIN.issuperset(map(type, tensors))  # all() of a generator takes three times as long
        and not any(map(_is_negative, tensors))
    )


_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
_is_negative = torch.Tensor.is_neg
