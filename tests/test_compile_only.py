"""Every GPU kernel compiled without a GPU: registers, spills and shared memory in a table; what the machine code holds.

Triton's kernels for compute capability 8.0, 9.0 and 10.0; of the .cu files what the installed library holds. A spill
fails; so do loads narrower than 16 bytes where a kernel is bound by memory. cuobjdump comes with Triton.
"""

import inspect
import pathlib
import re
import shutil
import subprocess
from typing import NamedTuple

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmfast import native
from mmfast.ops.adversarial import triton_kernels as adversarial
from mmfast.ops.conv_transpose import triton_kernels as conv_transpose
from mmfast.ops.conv_transpose.equations import Geometry
from mmfast.ops.rnn import triton_kernels as rnn
from mmfast.ops.rnn.equations import GATES, MODES

CSRC = pathlib.Path(__file__).resolve().parent.parent / "csrc"
CUDA_SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
CUOBJDUMP = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
NVCC = shutil.which("nvcc")
#: The architectures that CMakeLists.txt builds for.
ARCHITECTURES = ["80", "90a", "100"]


class Resources(NamedTuple):
    kernel: str
    target: str
    registers: int
    stack: int
    local_accesses: int
    shared: int
    sass: str

    def row(self) -> str:
        numbers = (self.registers, self.stack, self.local_accesses, self.shared)
        return f"{self.kernel:40} {self.target:>6} " + "{:5} {:6} {:7} {:7}".format(*numbers)


HEAD = f"{'kernel':40} {'target':>6} {'regs':>5} {'stack':>6} {'spills':>7} {'shared':>7}"


def _cuobjdump(option: str, cubin: pathlib.Path) -> str:
    return subprocess.run([CUOBJDUMP, option, cubin], capture_output=True, text=True, check=True).stdout


def resources(cubin: pathlib.Path, target: str) -> list[Resources]:
    """One entry for each kernel of a cubin, from its header and its disassembly."""
    sass = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\t\tFunction :|\Z)", _cuobjdump("-sass", cubin), re.DOTALL))
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", _cuobjdump("-res-usage", cubin))
    return [
        Resources(
            _readable(name),
            target,
            int(registers),
            int(stack),
            len(re.findall(r"\b(?:LDL|STL)\b", sass[name])),
            int(shared),
            sass[name],
        )
        for name, registers, stack, shared in usage
    ]


def _readable(name: str) -> str:
    """Forward<float, 4> of a mangled instantiation of device.h's run()."""
    match = re.search(r"\d([A-Z][A-Za-z]+?)(?:I(?:NS\w*?\d(Bf16|Half)E|(f)|(d))((?:L[ib]\d+E)*)E|EEE)", name)
    if not match:
        return name
    stem, half, single, double, numbers = match.groups()
    kind = half or (single and "float") or (double and "double")
    arguments = [kind] * bool(kind) + re.findall(r"L[ib](\d+)E", numbers or "")
    return f"{stem}<{', '.join(arguments)}>" if arguments else stem


# ---- Triton

TRITON = {
    "adversarial.measure": adversarial.measure_kernel,
    "adversarial.forward": adversarial.forward_kernel,
    "adversarial.backward": adversarial.backward_kernel,
    "adversarial.finish": adversarial.finish_kernel,
}
PLAIN = {
    "PHIS": (0,),
    **dict.fromkeys(("OTHERS", "WEIGHTS", "CENTRES", "SLOPES", "MEASURED"), False),
    **dict.fromkeys(("FIRST", "VALUES", "ALIGNED"), True),
    "SPAN": 0,
    "BLOCK": adversarial.BLOCK,
}
# by value are lists of four tensors, or of as many as while a stream is captured; by table of up to 512
FORMS = {
    "plain": PLAIN,
    "captured": PLAIN,
    "table": {**PLAIN, "SPAN": 512},
    "pairs": {**PLAIN, "PHIS": (4,), "OTHERS": True},
    "mixed": {**PLAIN, "PHIS": (0, 1, 2, 7), "WEIGHTS": True},
    "averages": {**PLAIN, "CENTRES": True, "SLOPES": True, "MEASURED": True, "SPAN": 512},
    "averages-by-value": {**PLAIN, "PHIS": (1,), "CENTRES": True, "SLOPES": True, "MEASURED": True},
}


def _source(name: str, dtype: str, form: str) -> ASTSource:
    """The kernel as the just-in-time compiler makes it for tensors of torch's allocator."""
    kernel = TRITON[name]
    count = 1 if FORMS[form]["SPAN"] else adversarial.CAPTURED_TERMS if form == "captured" else 4
    types = {
        **dict.fromkeys(("raw_sums", "sums", "slope_sums", "values", "slopes", "centres"), "*fp32"),
        "running_total": "*fp64",
        "counter": "*i32",
        "table": "*i64",
        "real_table": "*fp64",
        "count": "i32",
        "pointers": tuple((f"*{kind}",) * count for kind in (dtype, dtype, "fp32", dtype, dtype)),
        "integers": (("i32",) * count,) * len(adversarial.INTEGERS),
        "reals": (("fp32",) * count,) * len(adversarial.REALS),
    }
    signature, constants, aligned = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in FORMS[form]:
            signature[argument] = "constexpr"
            constants[argument] = FORMS[form][argument]
            continue
        signature[argument] = types.get(argument, f"*{dtype}")
        if str(signature[argument]).startswith("*"):
            aligned[(i,)] = [["tt.divisibility", 16]]
        elif argument == "pointers":
            aligned.update({(i, j, k): [["tt.divisibility", 16]] for j in range(5) for k in range(count)})
    return ASTSource(kernel, signature, constants, aligned)


def compiled(tmp_path: pathlib.Path, source: ASTSource, capability: int, label: str, options: dict) -> Resources:
    """A Triton kernel's resources, printed as a row."""
    target = GPUTarget("cuda", capability, 32)
    made = triton.compile(source, target=target, options={**options, "enable_fp_fusion": True})
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(made.asm["cubin"])
    (found,) = resources(cubin, f"sm_{capability}")
    return found._replace(kernel=label, shared=made.metadata.shared)


CASES = [(name, dtype, 90, "plain") for name in TRITON for dtype in ("fp32", "fp16", "bf16")]
CASES += [(name, "bf16", capability, "plain") for name in TRITON for capability in (80, 100)]
CASES += [(name, "bf16", 90, form) for name in list(TRITON)[1:3] for form in ("pairs", "mixed", "averages-by-value")]
CASES += [(name, "fp32", 90, form) for name in TRITON for form in ("captured", "table")]
CASES += [("adversarial.forward", "bf16", capability, "averages") for capability in (80, 90, 100)]


@pytest.mark.parametrize(
    ("name", "dtype", "capability", "form"), CASES, ids=[f"{n}-{f}-{d}-sm{c}" for n, d, c, f in CASES]
)
def test_triton(tmp_path, capsys, name, dtype, capability, form):
    found = compiled(tmp_path, _source(name, dtype, form), capability, f"{name} {form} {dtype}", {})
    with capsys.disabled():
        print(f"\n{HEAD}\n{found.row()}" if (name, dtype, capability, form) == CASES[0] else f"\n{found.row()}", end="")
    check(found)
    if not name.endswith("finish"):
        assert "LDG.E.128" in found.sass, "the logits are not loaded 16 bytes at a time"
    if name.endswith("backward"):
        assert "STG.E.128" in found.sass, "the gradients are not stored 16 bytes at a time"


CONV_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CONV_LAYERS = {
    # the weight's shape, stride, padding, x channels last, epilogue
    "dcgan": ((128, 64, 4, 4), 2, 1, True, {"MOMENTS": True}),
    "rgb": ((64, 3, 4, 4), 2, 1, True, {"ACTIVATION": "tanh"}),
    "hifigan": ((512, 256, 16), 8, 4, False, {"HAS_BIAS": True}),
}
CONV_CASES = [(layer, "bf16", capability) for layer in CONV_LAYERS for capability in (80, 90, 100)]
CONV_CASES += [(layer, "fp32", 90) for layer in CONV_LAYERS]


@pytest.mark.parametrize(("layer", "dtype", "capability"), CONV_CASES, ids=[f"{n}-{d}-sm{c}" for n, d, c in CONV_CASES])
def test_triton_conv_transpose(tmp_path, capsys, layer, dtype, capability):
    shape, stride, padding, last, epilogue = CONV_LAYERS[layer]
    dims = len(shape) - 2
    geometry = Geometry((stride,) * dims, (padding,) * dims, (0,) * dims, (1,) * dims, 1, (0,) * (2 * dims))
    in_columns = shape[1] < 16
    plan = conv_transpose.plan(shape, geometry, CONV_DTYPES[dtype], last, not in_columns, dtype == "fp32")
    flags = ("HAS_BIAS", "MOMENTS", "GIVEN", "HAS_NORM_WEIGHT", "HAS_NORM_BIAS", "SAVE", "WIDE")
    given = {**plan.constants, **dict.fromkeys(flags, False), "X_LAST": last, "Y_LAST": last, "ACTIVATION": "none"}
    given.update(epilogue)
    options = {"num_warps": given.pop("num_warps"), "num_stages": given.pop("num_stages")}
    kernel = conv_transpose.conv_kernel
    floats = dict.fromkeys(("negative_slope", "eps"), "fp32")
    tensors = dict.fromkeys(("x", "weight", "bias", "out", "saved"), f"*{dtype}")
    wide = dict.fromkeys(("norm_weight", "norm_bias", "mean", "var", "counts", "means", "squares"), "*fp32")
    kinds = {**floats, **tensors, **wide, **dict.fromkeys(given, "constexpr")}
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
    pointers = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
    aligned = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = ASTSource(kernel, signature, given, aligned)
    found = compiled(tmp_path, source, capability, f"conv_transpose {layer} {dtype}", options)
    with capsys.disabled():
        print(f"\n{found.row()}", end="")
    check(found, 255)
    assert re.search({80: "HMMA", 90: "HGMMA", 100: r"UTC\w*MMA"}[capability], found.sass), "no matrix instruction"
    if last:
        assert re.search(r"LDGSTS\.E\.\S*128", found.sass), "x is not copied 16 bytes at a time"


NORM_KERNELS = ("moments", "merge", "normalize", "sums", "add", "input_gradient", "activation_gradient")
NORM_CASES = [(name, "bf16", capability, True) for name in NORM_KERNELS for capability in (80, 90, 100)]
NORM_CASES += [(name, "fp32", 90, False) for name in NORM_KERNELS]


@pytest.mark.parametrize(
    ("name", "dtype", "capability", "last"),
    NORM_CASES,
    ids=[f"{n}-{d}-sm{c}-{'last' if last else 'first'}" for n, d, c, last in NORM_CASES],
)
def test_triton_norm(tmp_path, capsys, name, dtype, capability, last):
    """What follows a convolution, forward and backward, for 128 channels and ReLU."""
    kernel = getattr(conv_transpose, f"{name}_kernel")
    y = torch.empty((32, 128, 16, 16), dtype=CONV_DTYPES[dtype])
    sets = conv_transpose._Sets(y.to(memory_format=torch.channels_last) if last else y, "batch")
    block = conv_transpose._TILE if name == "activation_gradient" else conv_transpose._BLOCK
    given = {
        **sets.constants, "HAS_WEIGHT": True, "HAS_BIAS": True, "ACTIVATION": "relu", "MEASURED": True,
        "TILES": conv_transpose._TILES, "BLOCK": block,
    }  # fmt: skip
    options = {option: given.pop(option) for option in conv_transpose.OPTIONS}
    if name == "sums":
        options["num_warps"] = conv_transpose._SUMS_WARPS
    kinds = {
        **dict.fromkeys(("batch", "positions", "parts", "count"), "i32"),
        **dict.fromkeys(("negative_slope", "eps", "share"), "fp32"),
        **dict.fromkeys(("y", "dout", "dy", "out", "value"), f"*{dtype}"),
    }
    signature = {n: "constexpr" if n in given else kinds.get(n, "*fp32") for n in kernel.arg_names}
    pointers = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
    constants = {n: given[n] for n in kernel.arg_names if n in given}
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in pointers})
    found = compiled(tmp_path, source, capability, f"norm.{name} {dtype}", options)
    with capsys.disabled():
        print(f"\n{found.row()}", end="")
    check(found)
    if last and name not in ("merge", "add"):
        assert "LDG.E.128" in found.sass, "y is not loaded 16 bytes at a time"


RNN_DTYPES = {**CONV_DTYPES, "fp16": torch.float16}
#: shared memory that a program may have, by compute capability
SHARED = {80: 166912, 90: 232448, 100: 232448}
# mode, dtype, H, compute capability, and what is given beside the states: lengths or packed offsets, reset masks
RNN_CASES = [(mode, "bf16", 128, 90, ()) for mode in ("RNN_TANH", "GRU")]
RNN_CASES += [("LSTM", "bf16", 128, capability, ()) for capability in SHARED]
RNN_CASES += [("LSTM", "bf16", 100, capability, ("LENGTHS", "RESETS")) for capability in SHARED]
RNN_CASES += [("GRU", "fp16", 100, 90, ("LENGTHS", "PACKED")), ("LSTM", "fp32", 128, 90, ("LENGTHS", "RESETS"))]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    ("mode", "dtype", "hidden", "capability", "given"),
    RNN_CASES,
    ids=["-".join((m, d, f"H{h}", f"sm{c}", *g)) for m, d, h, c, g in RNN_CASES],
)
def test_triton_rnn(tmp_path, capsys, direction, mode, dtype, hidden, capability, given):
    """Two directions with initial states, as a layer's forward and backward launch it."""
    plan = rnn.plan(mode, hidden, RNN_DTYPES[dtype], SHARED[capability], True, "RESETS" in given)
    lstm = mode == "LSTM"
    constants = {
        **plan.constants(), "MODE": MODES[mode], "GATES": GATES[mode], "DIRECTIONS": 2, "H": hidden,
        **{name: name in given for name in ("LENGTHS", "PACKED", "RESETS")},
        **dict.fromkeys(("BIAS", "H0", "KEEP", "DY", "DHN", "DH0"), True),
        **dict.fromkeys(("C0", "DCN", "DC0"), lstm), "PREVIOUS": "LENGTHS" in given,
    }  # fmt: skip
    kernel = getattr(rnn, f"{direction}_kernel")
    kinds = {**dict.fromkeys(("steps", "batch"), "i32"), "lengths": "*i64", "offsets": "*i64", "resets": "*u8"}
    signature = {name: "constexpr" if name in constants else kinds.get(name, f"*{dtype}") for name in kernel.arg_names}
    given_constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    pointers = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
    source = ASTSource(kernel, signature, given_constants, {(i,): [["tt.divisibility", 16]] for i in pointers})
    label = f"rnn.{direction} {mode} {dtype} H{hidden}{' streamed' * plan.streamed}"
    found = compiled(tmp_path, source, capability, label, plan.options())
    with capsys.disabled():
        print(f"\n{found.row()}", end="")
    check(found, 255)
    assert found.shared <= SHARED[capability]
    assert re.search(r"HMMA|HGMMA|UTC\w*MMA", found.sass), "no matrix instruction"


def test_no_recurrent_kernel_is_compiled_again_for_other_steps_or_batches():
    """Not for multiples of 16 either, nor for 1: T and B are arguments that nothing is specialised for."""
    for kernel in (rnn.forward_kernel, rnn.backward_kernel):
        sizes = {argument.name: argument for argument in kernel.params if argument.name in ("steps", "batch")}
        assert len(sizes) == 2
        assert all(argument.do_not_specialize and not argument.is_constexpr for argument in sizes.values())
    assert {"steps", "batch"}.isdisjoint(inspect.signature(rnn.plan).parameters)


def test_no_triton_kernel_is_left_out():
    """A kernel that only the interpreter ran may not compile at all."""
    kernels = {
        f"{module.__name__.split('.')[-2]}.{name.removesuffix('_kernel')}"
        for module in (adversarial, conv_transpose, rnn)
        for name in vars(module)
        if name.endswith("_kernel")
    }
    held = {*TRITON, *(f"conv_transpose.{name}" for name in ("conv", *NORM_KERNELS)), "rnn.forward", "rnn.backward"}
    assert kernels == held


def check(found: Resources, registers: int = 128) -> None:
    """No spill, no stack, no float atomics; 128 registers: two blocks of 256 threads a multiprocessor."""
    assert found.stack == 0, f"{found.kernel} uses {found.stack} bytes of stack"
    assert found.local_accesses == 0, f"{found.kernel} spills: {found.local_accesses} local memory instructions"
    assert not re.search(r"\b(ATOM|ATOMG|ATOMS|RED)\.\S*(F32|F16|F64|ADD\.F)", found.sass)
    assert found.registers <= registers


# ---- CUDA C++


@pytest.fixture(scope="module")
def cubins(tmp_path_factory):
    """A folder with the cubins that the installed `_C` holds, of each .cu for each architecture."""
    if not native.library().build["cuda"].startswith("yes"):
        pytest.skip(f"CUDA kernels compiled into mmfast: {native.library().build['cuda']}")
    folder = tmp_path_factory.mktemp("cubins")
    subprocess.run([CUOBJDUMP, "-xelf", "all", native.library().__file__], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("stem", [source.stem for source in CUDA_SOURCES])
def test_cuda(cubins, capsys, stem, architecture):
    cubin = cubins / f"{stem}.sm_{architecture}.cubin"
    kernels = resources(cubin, f"sm_{architecture}")
    with capsys.disabled():
        print(f"\n{stem}.cu\n{HEAD}", *(found.row() for found in kernels), sep="\n", end="")
    assert kernels
    # of each dtype, for tables of few terms and of as many as go by value while a stream is captured
    assert stem != "adversarial" or sum(", 32256>" in found.kernel for found in kernels) == 16
    for found in kernels:
        # 512 threads a block where it holds 256 units, else at most 256
        alone = stem in ("rnn_resident", "rnn_cluster") and "256" not in found.kernel
        check(found, 255 if alone else 128)
        if found.kernel.startswith(("Forward", "Backward")) and stem == "adversarial":
            assert "LDG.E.128" in found.sass, f"{found.kernel} does not load 16 bytes at a time"
        if found.kernel.startswith("Backward") and stem == "adversarial":
            assert "STG.E.128" in found.sass, f"{found.kernel} does not store 16 bytes at a time"
        if stem == "rnn_cluster" and architecture == "80":
            # where there are no clusters, a kernel that needs them is a trap
            assert "HMMA" not in found.sass
        elif stem in ("rnn_resident", "rnn_cluster"):
            assert "HMMA" in found.sass, f"{found.kernel} has no matrix instruction"
            for access in (r"LDGSTS\.E\.\S*128", r"STG\.E\.128", "LDG.E.128"):
                assert re.search(access, found.sass), f"{found.kernel} has no {access}"
            assert stem == "rnn_resident" or "STAS" in found.sass, f"{found.kernel} stores into no other block"
        wide = stem == "normalize" and re.match(r"\w+<\w+, [48],|Activate", found.kernel)
        if wide:
            assert "LDG.E.128" in found.sass, f"{found.kernel} does not load 16 bytes at a time"
        if wide and found.kernel.startswith(("Normalize", "InputGradient", "Activate")):
            assert "STG.E.128" in found.sass, f"{found.kernel} does not store 16 bytes at a time"
        if stem == "conv_transpose" and re.match(r"\w+<\w+, \d, [48], [12]>", found.kernel):
            assert "LDG.E.128" in found.sass, f"{found.kernel} does not load 16 bytes at a time"
        if stem == "conv_transpose" and re.match(r"Input<\w+, \d, [48],|Forward<\w+, \d, [48], [01]>", found.kernel):
            assert "STG.E.128" in found.sass, f"{found.kernel} does not store 16 bytes at a time"
        if stem == "rnn":
            for access in ("LDG.E.128", "STG.E.128"):
                assert access in found.sass, f"{found.kernel} has no {access}"


SPILLING = """
#include "cuda/device.h"
namespace mmfast {
namespace device {
struct Spill {
    static constexpr int kThreads = 1024;
    Global<const float> x;
    Global<float> y;
    MMFAST_DEVICE void operator()() const {
        float v[100];
        MMFAST_UNROLL
        for (int i = 0; i < 100; ++i) v[i] = load(x, i * 1024 + thread_index());
        for (int k = 0; k < 9; ++k) {
            MMFAST_UNROLL
            for (int i = 0; i < 100; ++i) v[i] = v[i] * v[(i + 37) % 100] + v[(i + 61) % 100];
        }
        MMFAST_UNROLL
        for (int i = 0; i < 100; ++i) store(y, i * 1024 + thread_index(), v[i]);
    }
};
int spill(void* stream) { return launch(Spill{}, 1, 0, stream); }
}  // namespace device
}  // namespace mmfast
"""


@pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")
def test_a_spill_is_seen(tmp_path):
    source, cubin = tmp_path / "spill.cu", tmp_path / "spill.cubin"
    source.write_text(SPILLING)
    command = [NVCC, "-std=c++17", "-O3", "-I", CSRC, "-cubin", "-arch=sm_80", source, "-o", cubin]
    subprocess.run(command, check=True, capture_output=True)
    (found,) = resources(cubin, "sm_80")
    with pytest.raises(AssertionError, match=r"stack|spills"):
        check(found)
