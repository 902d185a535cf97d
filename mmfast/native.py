"""The native libraries: the only module that imports `_C` and `_emulator`.

It checks what goes in and turns a status into an exception. `_C` holds the CPU kernels and, where nvcc was found, the
CUDA kernels; `_emulator` the CUDA kernels as they run on a CPU, checked, for CPU tensors.

A library is loaded at first use, after torch, so that both share one OpenMP runtime. One that cannot be loaded is no
error: `load_error()` keeps the reason, `mmfast info` shows it, and the `torch` backend serves everything.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from . import config

if TYPE_CHECKING:
    from .ops.adversarial.equations import Inputs, Terms

ABI_VERSION = 7

#: enum mmfast_dtype
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}

#: enum DirectOptions: what is reduced is the mean; pairs of terms are each other's peers; the tensors' second half are
#: the others of the first; the gradients do not depend on the logits; those that are required are wanted
DIRECT_MEAN, DIRECT_AVERAGES, DIRECT_OTHERS, DIRECT_CONSTANT, DIRECT_GRADIENTS = 1, 2, 4, 8, 16

_STATUS_ERRORS = {1: ValueError, 2: MemoryError, 3: RuntimeError}


_INSTALL = "pip install --force-reinstall --no-deps --no-cache-dir mmfast"


def _remedy(name: str, error: str) -> str:
    """The command that mends it."""
    built_for_others = sorted(path.name for path in Path(__file__).parent.glob(f"{name}.*"))
    if "GLIBC" in error or "CXXABI" in error:
        return f"it was built on a newer system; build it on this one: {_INSTALL} --no-binary mmfast"
    if "cannot open shared object file" in error:
        return "that library is the system's: install it with your package manager (libgomp.so.1: apt install libgomp1)"
    if "No module named" in error and built_for_others:
        return f"what is installed is for another Python ({', '.join(built_for_others)}): {_INSTALL}"
    return f"install it with a C++ compiler on PATH: {_INSTALL}"


@functools.cache
def _load(name: str = "_C") -> tuple[types.ModuleType | None, str]:
    try:
        library = importlib.import_module(f"mmfast.{name}")
    except ImportError as error:
        what = "native library" if name == "_C" else "emulator"
        return None, f"mmfast's {what} could not be loaded ({error}); {_remedy(name, str(error))}"
    if library.abi_version != ABI_VERSION:
        return None, (
            f"mmfast's {name} has ABI version {library.abi_version}, but this Python code needs {ABI_VERSION}; "
            f"install both anew: {_INSTALL}"
        )
    if name == "_C" and config.ISA is not None and library.set_isa(config.ISA) != 0:
        return None, f"MMFAST_ISA={config.ISA} is not one of: {library.supported_isas()}; unset MMFAST_ISA"
    return library, ""


def available() -> bool:
    """Whether the native library is loaded and fits this Python code."""
    return _load()[0] is not None


def load_error(name: str = "_C") -> str:
    """Why the native library, or the emulator, is not available; empty where it is."""
    return _load(name)[1]


def library(name: str = "_C") -> types.ModuleType:
    """The loaded library, `_C` or `_emulator`; RuntimeError where there is none."""
    module, error = _load(name)
    if module is None:
        raise RuntimeError(error)
    return module


def check(status: int, name: str = "_C") -> None:
    """Raises what a kernel's status stands for."""
    if status != 0:
        raise _STATUS_ERRORS.get(status, RuntimeError)(library(name).last_error())


def cpu_refusals(what: str, device: str, dtype: torch.dtype) -> list[str]:
    """Why the CPU kernels cannot run on `what`, tensors of this device type and dtype, in sentences."""
    refusals = [] if available() else [load_error()]
    if device != "cpu":
        refusals.append(f"{what} on {device} (supported: cpu)")
    return refusals + dtype_refusals(what, dtype)


def dtype_refusals(what: str, dtype: torch.dtype) -> list[str]:
    """Why the kernels cannot run on `what` of this dtype, in a sentence."""
    return [] if dtype in DTYPES else [f"{what} {dtype} (supported: float32, float64, float16, bfloat16)"]


def cuda_refusals(device: str) -> list[str]:
    """Why the CUDA kernels cannot run on tensors of this device type, in sentences; on "cpu" the emulator runs them."""
    if device == "cpu":
        error = _load("_emulator")[1]
        return [error] if error else []
    if device != "cuda":
        return [f"the tensors are on {device} (supported: cuda, and cpu in the emulator)"]
    if not available():
        return [load_error()]
    built: str = library().build["cuda"]
    if not built.startswith("yes"):
        return [f"mmfast has no CUDA kernels ({built})"]
    capability = torch.cuda.get_device_capability()
    architectures = built.removeprefix("yes: ").partition(",")[0].split()
    if not any(_runs_on(architecture, capability) for architecture in architectures):
        return [
            f"the device has compute capability {capability[0]}.{capability[1]} (built for: {', '.join(architectures)})"
        ]
    return []


def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for a CMake CUDA architecture runs on a device: "80-real" its machine code, "100" also its PTX."""
    number = architecture.partition("-")[0]
    target = divmod(int(number.rstrip("af")), 10)
    if not number.isdigit():
        return target == capability
    same_generation = target[0] == capability[0] and target <= capability
    return same_generation or (not architecture.endswith("-real") and target <= capability)


def emulator_order(seed: int) -> None:
    """The order in which the emulator runs threads: 0 the natural one, any other seed another one at random."""
    library("_emulator").set_order(seed)


def emulator_launches() -> int:
    """How many launches the emulator has run in this process."""
    return library("_emulator").launches()


def emulator_selftests() -> list[tuple[str, str]]:
    """The emulator's own kernels: (name, planted bug), "" for a kernel without one."""
    return list(library("_emulator").selftests)


def emulator_selftest(name: str, bug: str) -> None:
    """Runs one of them; RuntimeError with the emulator's report where it finds something wrong."""
    check(library("_emulator").selftests[name, bug](), "_emulator")


def isa() -> str:
    """The instruction set that the CPU kernels use."""
    return library().isa()


def beats_mkl() -> bool:
    """Whether the CPU kernels' vectors are wider than MKL's, which are AVX2's unless the processor is Intel's."""
    return available() and not is_intel() and library().isa() == "avx512"


def matches_mkl() -> bool:
    """Whether the CPU kernels' product is as fast as MKL's, or faster; on Intel's processors it is not."""
    return available() and not is_intel() and library().isa() != "baseline"


@functools.cache
def is_intel() -> bool:
    """Whether the processor is Intel's."""
    return bool(library().is_intel())


def set_isa(name: str) -> None:
    """Chooses the instruction set of the CPU kernels, at most what the processor supports (ValueError otherwise)."""
    check(library().set_isa(name))


def supported_isas() -> list[str]:
    """The instruction sets compiled in and supported by this processor, the best last."""
    return library().supported_isas().split()


def _adversarial_terms(terms: Terms, name: str) -> Any:
    """The library's own copy of the terms, made once."""
    copy = terms.copies[name] = library(name).AdversarialTerms([(int(phi), *rest) for phi, *rest in terms])
    return copy


def _adversarial_inputs(
    terms: Terms, mean: bool, inputs: Inputs, state: torch.Tensor | None, name: str = "_C"
) -> tuple[Any, ...]:
    """The arguments that every adversarial entry begins with. The inputs are dense, and alike where they meet."""
    logits, others, weights, centres, peers = inputs
    copy = terms.copies.get(name) or _adversarial_terms(terms, name)
    pointers, sizes = [_address(x) for x in logits], [x.numel() for x in logits]
    beside = [_address(x) for x in others] if others else ()
    extras = None
    if weights or peers or centres is not None:
        parts = [max(n // max(w.numel(), 1), 1) for n, w in zip(sizes, weights, strict=True)] if weights else ()
        width = 8 if logits[0].dtype == torch.float64 else 4
        centre = _address(centres) if state is None else state.data_ptr() + len(sizes) * width
        extras = [_address(w) for w in weights], parts, centre, peers or range(len(sizes)), width
    return copy, DTYPES[logits[0].dtype], mean, pointers, sizes, beside, extras


def _adversarial_outputs(
    inputs: Inputs, total: torch.Tensor, values: torch.Tensor | None, state: torch.Tensor | None
) -> tuple[int, int, int, int]:
    """Pointers to total, values, slopes and means; the means are an output where no centres were given for the peers"""
    if state is None:
        return total.data_ptr(), 0 if values is None else values.data_ptr(), 0, 0
    slopes = state.data_ptr()
    means = 0 if inputs.centres is not None else slopes + len(inputs.logits) * state.element_size()
    return total.data_ptr(), 0 if values is None else values.data_ptr(), slopes, means


def cpu_adversarial_forward(
    terms: Terms,
    mean: bool,
    inputs: Inputs,
    total: torch.Tensor,
    values: torch.Tensor | None,
    state: torch.Tensor | None,
    gradients: Sequence[torch.Tensor | None] = (),
) -> None:
    """Fills total (), and values (K,) and state (2, K) where there are any, from K terms of dense CPU tensors.

    state: slopes and centres of terms that have peers; the centres are computed where `inputs` has none.
    gradients: (), or those of the total by the logits, then by the others (None: not wanted): filled in the same pass.
    """
    arguments = _adversarial_inputs(terms, mean, inputs, state)
    outputs = _adversarial_outputs(inputs, total, values, state)
    wanted = [0 if g is None else g.data_ptr() for g in gradients]
    status = library().cpu_adversarial_forward(*arguments, outputs, wanted, torch.get_num_threads())
    if status:
        check(status)


def adversarial_direct(terms: Terms) -> tuple[Callable[..., Any], Callable[[torch.Tensor], float | None], int]:
    """(call, number_of, address) of K terms, whose kernel is given dense tensors themselves.

    call(address, options, threads, *tensors) gives (total, gradients), or None where another path has to serve the
    tensors: they are not all plain, dense, on the CPU, of one dtype, float32 or float64, and of one shape where they
    meet. gradients: one for each tensor that requires one and None for others; None where nobody wants any, () where
    they are left for later, many and constant. options: a sum of DIRECT_*.
    number_of(tensor) is what `item` gives, or None where the tensor is not such a one.
    """
    copy = terms.copies.get("_C") or _adversarial_terms(terms, "_C")
    module = library()
    return module.adversarial_direct, module.number_of, copy.address


def cpu_adversarial_backward(
    terms: Terms,
    mean: bool,
    inputs: Inputs,
    dtotal: torch.Tensor,
    state: torch.Tensor | None,
    gradients: Sequence[torch.Tensor | None],
) -> None:
    """Fills the gradients by the logits, then by the others (None: not wanted), each in the layout of its tensor."""
    arguments = _adversarial_inputs(terms, mean, inputs, state)
    wanted = [0 if g is None else g.data_ptr() for g in gradients]
    slopes = 0 if state is None else state.data_ptr()
    status = library().cpu_adversarial_backward(*arguments, _address(dtotal), slopes, wanted, torch.get_num_threads())
    if status:
        check(status)


def _launch(entry: str, x: torch.Tensor, *arguments: object) -> None:
    """Calls a CUDA kernel's entry on x's device and its current stream, or in the emulator where x is on the CPU."""
    if x.device.type == "cpu":
        check(getattr(library("_emulator"), entry)(*arguments, 0), "_emulator")
        return
    with torch.cuda.device(x.device):
        check(getattr(library(), entry)(*arguments, torch.cuda.current_stream().cuda_stream))


def adversarial_scratch(logits: Sequence[torch.Tensor], is_forward: bool) -> int:
    """The number of float64 elements that the CUDA kernels need as scratch."""
    module = library("_C" if logits[0].is_cuda else "_emulator")
    if not is_forward:
        return len(logits) * module.adversarial_term
    chunks = sum(-(-x.numel() // module.adversarial_chunk) for x in logits)
    return 2 + len(logits) * (1 + module.adversarial_term) + 3 * chunks


def cuda_adversarial_forward(
    terms: Terms,
    mean: bool,
    inputs: Inputs,
    total: torch.Tensor,
    values: torch.Tensor | None,
    state: torch.Tensor | None,
    scratch: torch.Tensor,
) -> None:
    """As cpu_adversarial_forward, on CUDA or in the emulator; scratch: adversarial_scratch float64 elements."""
    arguments = _adversarial_inputs(terms, mean, inputs, state, "_C" if total.is_cuda else "_emulator")
    outputs = _adversarial_outputs(inputs, total, values, state)
    _launch("cuda_adversarial_forward", total, *arguments, outputs, scratch.data_ptr())


def cuda_adversarial_backward(
    terms: Terms,
    mean: bool,
    inputs: Inputs,
    dtotal: torch.Tensor,
    state: torch.Tensor | None,
    gradients: Sequence[torch.Tensor | None],
    scratch: torch.Tensor,
) -> None:
    """As cpu_adversarial_backward, on CUDA or in the emulator; scratch: adversarial_scratch float64 elements."""
    arguments = _adversarial_inputs(terms, mean, inputs, state, "_C" if dtotal.is_cuda else "_emulator")
    wanted = [0 if g is None else g.data_ptr() for g in gradients]
    slopes = 0 if state is None else state.data_ptr()
    _launch("cuda_adversarial_backward", dtotal, *arguments, _address(dtotal), slopes, wanted, scratch.data_ptr())


def normalization(
    layout: tuple[bool, tuple[int, int, int, int]],
    activation: tuple[int, float],
    measure: bool,
    eps: float,
    y: torch.Tensor,
    parameters: Sequence[torch.Tensor | None],
) -> tuple:
    """What both passes of a normalisation are given; the caller keeps the tensors alive.

    layout: (channels last, (sets, batch, channels, size)). activation: (number, negative slope). measure: whether mean
    and var are y's own. y: dense. parameters: weight, bias (channels,) or None, mean, var (sets, channels) in y's
    compute dtype, contiguous.
    """
    return (DTYPES[y.dtype], *layout, *activation, measure, eps, *(_address(x) for x in (y, *parameters)))


def cpu_normalize_forward(call: tuple, out: torch.Tensor | None) -> None:
    """Fills out, if any, of y's layout, and, where they are measured, mean and var; call: `normalization`."""
    check(library().cpu_normalize_forward(call, _address(out), torch.get_num_threads()))


def cpu_normalize_backward(
    call: tuple, dout: torch.Tensor, dy: torch.Tensor, dweight: torch.Tensor, dbias: torch.Tensor
) -> None:
    """Fills dy, of y's and dout's layout, and dweight and dbias (sets, channels); call: `normalization`."""
    gradients = [_address(x) for x in (dout, dy, dweight, dbias)]
    check(library().cpu_normalize_backward(call, gradients, torch.get_num_threads()))


def cuda_normalize_forward(call: tuple, y: torch.Tensor, out: torch.Tensor | None) -> None:
    """As cpu_normalize_forward, on CUDA or in the emulator; every tensor begins at a multiple of 16 bytes."""
    _launch("cuda_normalize_forward", y, call, _address(out), _normalize_scratch(call, y).data_ptr())


def cuda_normalize_backward(
    call: tuple, dout: torch.Tensor, dy: torch.Tensor, dweight: torch.Tensor, dbias: torch.Tensor
) -> None:
    """As cpu_normalize_backward, on CUDA or in the emulator; every tensor begins at a multiple of 16 bytes."""
    gradients = [_address(x) for x in (dout, dy, dweight, dbias)]
    _launch("cuda_normalize_backward", dout, call, gradients, _normalize_scratch(call, dout).data_ptr())


def _normalize_scratch(call: tuple, x: torch.Tensor) -> torch.Tensor:
    module = library("_C" if x.is_cuda else "_emulator")
    return torch.empty(module.cuda_normalize_scratch(call), dtype=torch.float32, device=x.device)


def cuda_activation_forward(activation: tuple[int, float], y: torch.Tensor, out: torch.Tensor) -> None:
    """As cpu_activation_forward, on CUDA or in the emulator; both begin at a multiple of 16 bytes."""
    _launch("cuda_activation", y, False, DTYPES[y.dtype], *activation, y.numel(), _address(y), 0, out.data_ptr())


def cuda_activation_backward(
    activation: tuple[int, float], value: torch.Tensor, dout: torch.Tensor, dy: torch.Tensor
) -> None:
    """As cpu_activation_backward, on CUDA or in the emulator; all begin at a multiple of 16 bytes."""
    pointers = (_address(value), _address(dout), dy.data_ptr())
    _launch("cuda_activation", value, True, DTYPES[value.dtype], *activation, value.numel(), *pointers)


def cpu_activation_forward(activation: tuple[int, float], y: torch.Tensor, out: torch.Tensor) -> None:
    """Fills out, of y's layout, with the activation of y, a dense CPU tensor; out may be y."""
    arguments = (DTYPES[y.dtype], *activation, y.numel(), _address(y), out.data_ptr(), torch.get_num_threads())
    check(library().cpu_activation_forward(*arguments))


def cpu_activation_backward(
    activation: tuple[int, float], value: torch.Tensor, dout: torch.Tensor, dy: torch.Tensor
) -> None:
    """Fills dy with dout times the slope where the activation is `value` (silu, gelu: of its argument); one layout."""
    pointers = (_address(value), _address(dout), dy.data_ptr())
    check(
        library().cpu_activation_backward(
            DTYPES[value.dtype], *activation, value.numel(), *pointers, torch.get_num_threads()
        )
    )


#: in_size, out_size, kernel, stride, dilation, before: three dimensions each, the first ones perhaps 1
Window = tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int], Sequence[int], Sequence[int]]


def cpu_phases_forward(
    window: Window,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    activation: tuple[int, float],
) -> None:
    """Fills y (N, Cout, *out_size) from x (N, Cin, *in_size), dense both, and weight, contiguous."""
    _cpu_conv_transpose("cpu_phases_forward", window, (x, weight, bias, y, None, None), activation)


def cpu_gather_forward(
    window: Window, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor
) -> None:
    """Fills y (N, Cout, *out_size) from x (N, Cin, *in_size), dense both, and weight, contiguous."""
    _cpu_conv_transpose("cpu_gather_forward", window, (x, weight, bias, y, None, None))


def cpu_squares_forward(
    window: Window, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor
) -> bool:
    """As gather, where kernel = 2 stride, in one or two dimensions. False: y is not finite, and not to be used."""
    return _cpu_conv_transpose("cpu_squares_forward", window, (x, weight, bias, y, None, None))


def cpu_depthwise_forward(
    window: Window,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    activation: tuple[int, float],
) -> bool:
    """Fills y (N, C, *out_size), contiguous or channels last, from x (N, C, *in_size) and weight, contiguous.

    False: the weight is not finite, and nothing was done.
    """
    return _cpu_conv_transpose("cpu_depthwise_forward", window, (x, weight, bias, y, None, None), activation)


def cpu_conv_transpose_backward(
    method: Literal["phases", "gather", "squares", "depthwise"],
    window: Window,
    x: torch.Tensor,
    weight: torch.Tensor,
    dy: torch.Tensor,
    dx: torch.Tensor | None,
    dweight: torch.Tensor | None,
) -> bool:
    """Fills dx, of x's layout, and dweight, like weight contiguous, from x and dy, both dense.

    Phases and depthwise take x contiguous; depthwise fills dweight (N, C, taps), of each sample. False, of all but
    gather: dweight is not finite, or the weight, of squares dx, is not; what was filled is not to be used.
    """
    return _cpu_conv_transpose(f"cpu_{method}_backward", window, (x, weight, None, dy, dx, dweight))


_DECLINED = 4


def _cpu_conv_transpose(
    kernel: str, window: Window, tensors: Sequence[torch.Tensor | None], activation: tuple[int, float] = (0, 0.0)
) -> bool:
    """tensors: x, weight, bias, y or its gradient, dx, dweight. Whether the kernel did not decline them."""
    x, y = tensors[4] if tensors[0] is None else tensors[0], tensors[3]
    assert x is not None and y is not None
    read = (*tensors[2:3], tensors[5] if tensors[5] is not None else tensors[1])
    assert all(tensor is None or tensor.is_contiguous() for tensor in read)
    layouts = _is_channels_last(x), _is_channels_last(y)
    sizes = (x.shape[0], x.shape[1], y.shape[1])
    arguments = (DTYPES[x.dtype], *layouts, sizes, window, [_address(tensor) for tensor in tensors], *activation)
    status = getattr(library(), kernel)(*arguments, torch.get_num_threads())
    if status != _DECLINED:
        check(status)
    return status != _DECLINED


def _is_channels_last(x: torch.Tensor) -> bool:
    """Of a tensor that is dense, as addresses are counted by kernels."""
    if x.is_contiguous():
        return False
    assert x.movedim(1, -1).is_contiguous(), f"a tensor of strides {x.stride()} is not dense"
    return True


def _direct(window: Window, x: torch.Tensor, y: torch.Tensor, groups: int) -> tuple:
    last = (not x.is_contiguous(), not y.is_contiguous())
    return DTYPES[x.dtype], *last, *x.shape[:2], groups, y.shape[1] // groups, window


def cuda_direct_forward(
    window: Window,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: tuple[int, float],
    groups: int,
    y: torch.Tensor,
) -> None:
    """Fills y (N, Cout, *out_size) as mmfast_cuda_direct_forward does; x and y contiguous or channels last.

    weight: (*kernel, Cin, Cout / groups) contiguous. Every tensor begins at a multiple of 16 bytes.
    """
    pointers = (_address(x), _address(weight), _address(bias), y.data_ptr())
    _launch("cuda_direct_forward", x, _direct(window, x, y, groups), *activation, *pointers)


def cuda_direct_backward(
    window: Window,
    x: torch.Tensor,
    weight: torch.Tensor,
    groups: int,
    dy: torch.Tensor,
    dx: torch.Tensor | None,
    dweight: torch.Tensor | None,
) -> None:
    """Fills dx and dweight, of x's and weight's layout, where they are wanted; all else as in the forward."""
    call = _direct(window, x, dy, groups)
    size = 0 if dweight is None else library("_C" if x.is_cuda else "_emulator").cuda_direct_scratch(call)
    scratch = torch.empty(size, dtype=torch.float32, device=x.device)
    pointers = [_address(t) for t in (x, weight, dy, dx, dweight, scratch)]
    _launch("cuda_direct_backward", x, call, *pointers)


def _address(x: torch.Tensor | None) -> int:
    """Of a tensor's data, 0 without a tensor; RuntimeError where it has elements and no data."""
    if x is None:
        return 0
    address = x.data_ptr()
    if not address and x.numel():
        raise RuntimeError(
            f"a tensor of the shape {tuple(x.shape)} has no memory (its storage was freed, or PyTorch knows it to be "
            "zeros and stores none); expected one with data"
        )
    return address


def _addresses(*tensors: torch.Tensor | None) -> list[int]:
    """`_address` of each; a call for each would take most of the time."""
    return [0 if a is None else a.data_ptr() or _address(a) for a in tensors]


def cpu_rnn_forward(
    layer: tuple,
    gx: torch.Tensor | None,
    kept: Sequence[torch.Tensor | None],
    out: Sequence[torch.Tensor | None],
    b_ih: Sequence[torch.Tensor | None],
    x: torch.Tensor | None = None,
    w_ih: Sequence[torch.Tensor] = (),
) -> None:
    """Fills kept, (gates, cell), and out, (y, hn, cn), of mmfast_rnn_forward_args (csrc/mmfast.h).

    b_ih, w_ih: of each direction, contiguous; x, where gx is None: (N, I), contiguous; layer: `rnn_layer`.
    """
    pointers, inputs = _addresses(gx, *kept, *out), 0 if x is None else x.shape[1]
    beside = _addresses(*b_ih, None)[:2], _addresses(x)[0], _addresses(*w_ih, None, None)[:2], inputs
    check(library().cpu_rnn_forward(layer, pointers, *beside))


def cpu_rnn_backward(
    layer: tuple,
    saved: Sequence[torch.Tensor | None],
    given: Sequence[torch.Tensor | None],
    out: Sequence[torch.Tensor | None],
    biases: Sequence[torch.Tensor | None],
    x: torch.Tensor | None = None,
    w_ih: Sequence[torch.Tensor] = (),
    products: Sequence[torch.Tensor | None] = (),
) -> None:
    """Fills `out` (dgates, dm, dh, u, previous, dh0, dc0), `biases` (of each direction db_ih and db_hh) and `products`
    (dx, of each direction dw_ih and dw_hh) from `saved` (y, gates, cell) and `given` (dy, dhn, dcn).

    All are mmfast_rnn_backward_args' (csrc/mmfast.h), contiguous; layer: `rnn_layer`.
    """
    pointers, inputs = _addresses(*saved, *given, *out), 0 if x is None else x.shape[1]
    beside = _addresses(x, *(*w_ih, None, None)[:2], *products, *[None] * 5)[:8]
    check(library().cpu_rnn_backward(layer, pointers, _addresses(*biases, *[None] * 4)[:4], beside, inputs))


def cpu_rnn_cell(
    mode: int, shape: tuple[int, int, int], inputs: Sequence[torch.Tensor | None], h: torch.Tensor, c: torch.Tensor
) -> None:
    """Fills h and c of mmfast_rnn_cell_args (csrc/mmfast.h). shape: (B, I, H).

    inputs: gx, gh, x, w_ih, b_ih, w_hh, b_hh, h0, c0 of any strides.
    """
    dense = [a if a is None or a.is_contiguous() else a.contiguous() for a in inputs]
    addresses = _addresses(*dense)
    status = library().cpu_rnn_cell(DTYPES[h.dtype], mode, *shape, *addresses, h.data_ptr(), c.data_ptr())
    if status:
        check(status)


def rnn_cell_direct(mode: int, most: int, x: torch.Tensor, hx: Any, weights: Sequence[torch.Tensor | None]) -> Any:
    """A Cell's h', or an LSTM's (h', c'), or None where another path has to serve the tensors: they are not all plain,
    contiguous, on the CPU, of one dtype, float32 or float64, and of sizes that fit, or x has more rows than `most`.
    """
    return library().rnn_cell_direct(mode, most, x, hx, *weights)


def cpu_product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, add: bool) -> None:
    """out = a b + bias, or with `add` out += a b + bias: CPU tensors, float32 or float64, out dense along its rows."""
    pointers = _address(a), _address(b), _address(bias), out.data_ptr()
    strides = *a.stride(), *b.stride(), out.stride(0)
    shape = *out.shape, a.shape[1]
    status = library().cpu_product(DTYPES[a.dtype], shape, *pointers, strides, add, torch.get_num_threads())
    if status:
        check(status)


class RnnTensors(NamedTuple):
    """The tensors of mmfast_rnn_layer (csrc/mmfast.h), contiguous; of weights one or None for each direction."""

    offsets: torch.Tensor | None
    lengths: torch.Tensor | None
    reset: torch.Tensor | None
    zoneout_mask: torch.Tensor | None
    dropout_mask: torch.Tensor | None
    w_hh: Sequence[torch.Tensor]
    b_hh: Sequence[torch.Tensor | None]
    w_hr: Sequence[torch.Tensor | None]
    h0: torch.Tensor | None
    c0: torch.Tensor | None


def rnn_layer(
    dtype: torch.dtype, mode: int, shape: tuple[int, int, int, int], zoneout: float, tensors: RnnTensors
) -> tuple:
    """mmfast_rnn_layer. shape: (T, B, H, proj). The caller keeps the tensors alive until the kernel has returned."""
    *masks, w_hh, b_hh, w_hr, h0, c0 = tensors
    directions = len(w_hh)
    weights = itertools.chain(*((*pair, None)[:2] for pair in (w_hh, b_hh, w_hr)))  # type: ignore[misc]
    addresses = _addresses(*masks, *weights, h0, c0)
    return (DTYPES[dtype], mode, directions, *shape, zoneout, *addresses, torch.get_num_threads())


def cuda_rnn_resident(x: torch.Tensor, mode: int, hidden: int) -> int:
    """mmfast_cuda_rnn_resident on x's device, or in the emulator."""
    return _resident(x.device, DTYPES[x.dtype], mode, hidden)


@functools.cache
def _resident(device: torch.device, dtype: int, mode: int, hidden: int) -> int:
    if device.type == "cpu":
        return library("_emulator").cuda_rnn_resident(dtype, mode, hidden)
    with torch.cuda.device(device):
        return library().cuda_rnn_resident(dtype, mode, hidden)


def cuda_rnn_forward(
    layer: tuple, tf32: bool, gx: torch.Tensor, kept: Sequence[torch.Tensor | None], out: Sequence[torch.Tensor]
) -> None:
    """Fills kept, (gates, cell), and out, (y, hn, cn), as `cpu_rnn_forward`, on gx's device or in the emulator."""
    _launch("cuda_rnn_forward", gx, layer, gx.shape[0], tf32, _addresses(gx, *kept, *out))


def cuda_rnn_backward(
    layer: tuple,
    tf32: bool,
    saved: Sequence[torch.Tensor | None],
    given: Sequence[torch.Tensor | None],
    out: Sequence[torch.Tensor | None],
) -> None:
    """As `cpu_rnn_backward`, on the device of what is saved or in the emulator."""
    y = saved[0]
    assert y is not None
    rows = y.shape[:-1].numel()
    _launch("cuda_rnn_backward", y, layer, rows, tf32, _addresses(*saved, *given, *out))


class RnnRows(NamedTuple):
    """Where one direction's columns of a sequence tensor's rows are; an absent tensor's are nowhere."""

    start: int
    stride: int

    def at(self, row: int) -> int:
        return self.start + row * self.stride


def rnn_rows(x: torch.Tensor | None, direction: int, directions: int) -> RnnRows:
    """Of x, (N, directions * width) contiguous, the columns of this direction."""
    if x is None:
        return RnnRows(0, 0)
    stride = x.shape[1] * x.element_size()
    return RnnRows(x.data_ptr() + direction * (stride // directions), stride)


class RnnStep(NamedTuple):
    """mmfast_rnn_step (csrc/mmfast.h) but for its stream; mode: enum mmfast_rnn_mode; lengths, cut: addresses."""

    dtype: int
    mode: int
    directions: int
    rows: int
    hidden: int
    step: int
    lengths: int
    cut: int
    cuts: int
    cut_step: int


def cuda_rnn_step_forward(x: torch.Tensor, step: RnnStep, pointers: Sequence[int | torch.Tensor | None]) -> None:
    """mmfast_cuda_rnn_step_forward on x's device; pointers: those of its arguments in their order."""
    _launch("cuda_rnn_step_forward", x, step, [_pointer(p) for p in pointers])


def cuda_rnn_step_backward(
    x: torch.Tensor, step: RnnStep, sizes: tuple[int, int, int, int], pointers: Sequence[int | torch.Tensor | None]
) -> None:
    """mmfast_cuda_rnn_step_backward; sizes: all, products, befores, before_step; all else as in the forward."""
    _launch("cuda_rnn_step_backward", x, step, sizes, [_pointer(p) for p in pointers])


def _pointer(p: int | torch.Tensor | None) -> int:
    return p if isinstance(p, int) else _address(p)
