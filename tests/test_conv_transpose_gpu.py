"""The transposed convolution's kernels for GPUs, on whatever can run them here.

Without a GPU the CUDA kernels run in the emulator, and Triton's in its interpreter, which needs a process of its own:
test_triton_interpreter.py runs this file there, with TRITON_INTERPRET=1. With one, all run on it.
"""

import os

import pytest
import torch
import triton
import triton.language as tl
from test_conv_transpose import hold_gradient_of_x
from test_module_db import CONVOLUTIONS, INFOS, hold_to_torch
from torch.nn import functional as F

import mmfast
import mmfast.functional as MF
from mmfast import native, numerics
from mmfast.ops.conv_transpose import equations, triton_kernels
from mmfast.ops.conv_transpose.backends import OP, empty_output
from mmfast.ops.conv_transpose.equations import Epilogue, Geometry
from mmfast.ops.conv_transpose.op import conv_transpose

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LAYOUTS = {"first": torch.contiguous_format, "last": torch.channels_last}
if INTERPRETED:
    SERVED = [("triton", "cpu")]
elif torch.cuda.is_available():
    SERVED = [("triton", "cuda"), ("cuda", "cuda")]
else:
    SERVED = [("cuda", "cpu")]
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETED)

pytestmark = pytest.mark.usefixtures("poisoned_memory")
by_backend = pytest.mark.parametrize(("name", "device"), SERVED, ids=["-".join(served) for served in SERVED])
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(autouse=True)
def full_precision():
    """Float32 products are not rounded to TF32, which integers and the rule's yardstick would feel."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.fixture(autouse=True)
def thread_order(request):
    """The emulator runs threads in the order of the run's seed."""
    native.emulator_order(request.config.option.seed)
    yield
    native.emulator_order(0)


def geometry(dims, stride=1, padding=0, output_padding=0, dilation=1, groups=1, crop=None):
    sizes = [(n,) * dims if isinstance(n, int) else n for n in (stride, padding, output_padding, dilation)]
    return Geometry(*sizes, groups, crop or (0,) * (2 * dims))


class Problem:
    """Random tensors of a layer, and (out, gradients, moments) of it by a backend, by PyTorch and in float64."""

    def __init__(self, seed, dtype, g, epilogue, channels, size, kernel, batch=2, layout=torch.contiguous_format):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.g, self.epilogue, self.layout = g, epilogue, layout
        cin, cout = channels
        x, weight = normal(batch, cin, *size), normal(cin, cout // g.groups, *[kernel] * len(size))
        parameters = [None] * 4
        if epilogue.normalizes:
            # of one size in all channels: a large one's errors would be the whole pool's
            parameters[:2] = [torch.rand(cout, generator=generator, dtype=torch.float64) + 0.5, normal(cout)]
        if epilogue.norm == "given":
            parameters[2:] = [normal(cout), normal(cout).square() + 0.1]
        tensors = [x.contiguous(memory_format=layout), weight.contiguous(memory_format=layout), normal(cout)]
        self.tensors = [*(t.to(dtype) for t in tensors), *(None if p is None else p.float() for p in parameters)]
        self.dout = normal(*empty_output(x, weight, g).shape).to(dtype).contiguous(memory_format=layout)

    def run(self, backend, device="cpu"):
        """Outputs by a backend; backend "stock": PyTorch's functions; "exact": the formula in float64."""
        dtype = torch.float64 if backend == "exact" else None
        tensors = [None if t is None else t.detach().to(device, dtype).requires_grad_(i < 5)
                   for i, t in enumerate(self.tensors)]  # fmt: skip
        moments = []
        if backend == "exact":
            out, _, *moments = equations.forward(*tensors, self.g, self.epilogue)
        elif backend == "stock":
            out = stock(tensors, self.g, self.epilogue)
        else:
            out, *moments = conv_transpose(tuple(tensors), self.g, self.epilogue, backend)
        wanted = [t for t in tensors[:5] if t is not None]
        gradients = torch.autograd.grad(out, wanted, self.dout.to(device, dtype))
        moments = [m.detach() for m in moments if m is not None and m.numel()] if self.epilogue.measures else []
        return [out.detach(), *gradients], moments


def stock(tensors, g, epilogue):
    """What a user of torch.nn.functional writes."""
    x, weight, bias, norm_weight, norm_bias, mean, var = tensors
    y = equations.convolve(x, weight, bias, g)
    if epilogue.norm == "instance":
        y = F.instance_norm(y, weight=norm_weight, bias=norm_bias, eps=epilogue.eps)
    elif epilogue.normalizes:
        y = F.batch_norm(y, mean, var, norm_weight, norm_bias, epilogue.norm == "batch", eps=epilogue.eps)
    return equations.activate(y, epilogue.activation, epilogue.negative_slope)


LAYERS = {
    # (channels, size, kernel), geometry: phases in the grid, in the columns, and one phase
    "k4s2": (((20, 24), (4, 5), 4), geometry(2, 2, 1)),
    "C3": (((20, 3), (9, 7), 4), geometry(2, 2, 1)),
    "k2s2": (((20, 24), (5, 4), 2), geometry(2, 2)),
    "k3s1": (((20, 24), (5, 6), 3), geometry(2, 1, 1)),
    # few output channels a group: depthwise, and groups whose inputs fill accesses of 16 bytes and do not
    "depthwise": (((16, 16), (6, 8), 4), geometry(2, 2, 1, groups=16)),
    "groups": (((32, 8), (5, 4), 3), geometry(2, 2, 1, 1, groups=2)),
    "odd-groups": (((9, 6), (5, 4), 3), geometry(2, (2, 3), 1, groups=3)),
}
EPILOGUES = [
    ("none", "tanh"),
    ("none", "gelu"),
    # no relu: a value that rounding brings to the other side of 0 makes more of an error than the rest together
    ("batch", "tanh"),
    ("given", "silu"),
    ("instance", "sigmoid"),
    ("moments", "sigmoid"),
]


@by_backend
@by_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("norm", "activation"), EPILOGUES, ids=["-".join(pair) for pair in EPILOGUES])
@pytest.mark.parametrize("layer", ["k4s2"])
def test_numerics(seed, name, device, dtype, layer, norm, activation, layout):
    # eps is large enough to be seen beside a variance of hundreds
    check_numerics(seed, name, device, dtype, layer, Epilogue(norm, 0.5, activation, 0.2), LAYOUTS[layout])


@by_backend
@pytest.mark.parametrize("dtype", [torch.float32], ids=["float32"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("layer", [layer for layer in LAYERS if layer != "k4s2"])
def test_numerics_of_the_forms(seed, name, device, dtype, layer, layout):
    check_numerics(seed, name, device, dtype, layer, Epilogue("batch", 1e-5, "tanh"), LAYOUTS[layout])


@by_backend
@pytest.mark.parametrize("norm", ["none", "given"])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_gradients_of_activations_where_something_is_not_finite(seed, name, device, norm, activation):
    """relu's zero is one whatever comes; leaky relu multiplies what comes to a NaN."""
    generator = torch.Generator().manual_seed(seed)
    x, weight, *parameters = (torch.randn(*s, generator=generator) for s in ((2, 5, 3, 4), (5, 16, 3, 3), *[(16,)] * 4))
    x[0, 0, 1, 1] = torch.nan
    parameters = [p.abs().add(0.1).to(device) if norm == "given" else None for p in parameters]
    tensors = (x.to(device), weight.to(device), None, *parameters)
    hold_gradient_of_x(tensors, Epilogue(norm, 1e-5, activation, 0.3), name)


def check_numerics(seed, name, device, dtype, layer, epilogue, layout):
    """The rule for out and all gradients (dx and dweight are torch's own products of our dy)."""
    (channels, size, kernel), g = LAYERS[layer]
    pools: dict[int, numerics.Errors] = {}
    for at in range(seed, seed + 1):
        problem = Problem(at, dtype, g, epilogue, channels, size, kernel, 6, layout)
        (ours, moments), (theirs, _), (exact, truth) = (
            problem.run(*how) for how in ((name, device), ("stock", device), ("exact", "cpu"))
        )
        for i, row in enumerate(zip(ours, theirs, exact, strict=True)):
            pools.setdefault(i, numerics.Errors(str(i))).add(*row)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        for found, expected in zip(moments, truth if moments else [], strict=True):
            torch.testing.assert_close(found.cpu().double(), expected.detach(), rtol=tolerance, atol=tolerance)
    for i, pool in pools.items():
        # too few values for the rule's bare bounds are held to twice them
        comparison = pool.compare()
        slack = 1 if pool.enough else 2
        assert comparison.ours.rms <= slack * comparison.rms_bound, (i, comparison)
        assert comparison.ours.max <= slack * comparison.max_bound, (i, comparison)


GRID = [
    # dims, stride, padding, output_padding, dilation, groups, crop
    (1, 2, 1, 0, 1, 1, (0, 0)),
    (1, 1, 0, 2, 3, 1, (1, 0)),
    (1, 3, 2, 2, 2, 2, (0, 2)),
    (1, 4, 0, 0, 6, 1, (2, 1)),
    (1, 3, 2, 0, 1, 6, (1, 0)),
    (2, 2, 1, 1, 1, 1, (0, 0, 0, 0)),
    (2, (1, 3), (0, 1), (1, 2), (2, 1), 1, (1, 0, 0, 1)),
    (2, 3, 1, 0, 1, 1, (0, 1, 0, 0)),
    (2, 2, 1, 0, 1, 3, (0, 0, 0, 0)),
    (3, (2, 1, 2), 1, (1, 0, 0), 1, 1, (0, 0, 0, 0, 1, 0)),
    (3, 3, 0, 0, 1, 2, None),
]
IDS = ["x".join(map(str, row)).replace(" ", "") for row in GRID]


# Cin, Cout, groups, size, kernel and geometry of one dimension or three: accesses along positions, channels and inputs
DIRECT = [
    (8, 1, 1, (16,), 4, (2, 1, 0, 1)),
    (3, 2, 1, (7,), 5, (3, 0, 4, 6)),
    (8, 8, 8, (16,), 8, (4, 2, 0, 1)),
    (5, 5, 5, (9,), 3, (1, 0, 1, 3)),
    (16, 6, 2, (4, 5), 4, (2, 1, 0, 1)),
    (16, 16, 16, (4, 6), 3, (2, 0, 1, 2)),
    (4, 8, 2, (3, 2, 4), 2, (2, 0, 0, 1)),
    (8, 3, 1, (2, 3, 3), 3, (2, 1, 1, 1)),
]


@by_backend
@by_dtype
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("row", DIRECT, ids=lambda row: "-".join(map(str, row)).replace(" ", ""))
def test_few_outputs_and_their_gradients_are_exact(seed, name, device, dtype, last, row):
    """Small integers, whose sums every dtype holds: out and the gradients of x, weight and bias, bit for bit."""
    cin, cout, groups, size, kernel, options = row
    g = geometry(len(size), *options, groups, (1, 0) * len(size))
    generator = torch.Generator().manual_seed(seed)
    x, weight = (
        integers(generator, 2, cin, *size) // 2,
        integers(generator, cin, cout // groups, *[kernel] * len(size)) // 2,
    )
    tensors = [x, weight, integers(generator, cout)]
    dout = integers(generator, *empty_output(x, weight, g).shape) // 4
    if last:
        tensors[:2], dout = [t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, weight)], dout
    found = []
    for backend, where, kind in ((name, device, dtype), ("torch", "cpu", torch.float64)):
        leaves = [t.to(where, kind).requires_grad_() for t in tensors]
        out = conv_transpose((*leaves, *[None] * 4), g, Epilogue(activation="relu"), backend)[0]
        found.append([out, *torch.autograd.grad(out, leaves, dout.to(where, kind))])
    for ours, exact in zip(*found, strict=True):
        assert torch.equal(ours.detach().cpu().double(), exact.detach())


@by_backend
def test_many_rows_of_weights(seed, name, device):
    """The gradient of weight over more positions than a part has, of samples that end within one."""
    generator = torch.Generator().manual_seed(seed)
    x, weight = integers(generator, 3, 2, 41, 53), integers(generator, 2, 1, 2, 1)
    g = geometry(2, 2, 0, groups=2)
    dout = integers(generator, *empty_output(x, weight, g).shape)
    found = []
    for backend, where, kind in ((name, device, torch.float32), ("torch", "cpu", torch.float64)):
        leaf = weight.to(where, kind).requires_grad_()
        out = conv_transpose((x.to(where, kind), leaf, *[None] * 5), g, Epilogue(), backend)[0]
        found.append(torch.autograd.grad(out, leaf, dout.to(where, kind))[0].cpu().double())
    assert torch.equal(*found)


@pytest.mark.skipif(
    INTERPRETED or torch.cuda.is_available(), reason="for the emulator, whose inputs stay where they are"
)
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_offsets_of_cuda_past_2_to_31(last):
    """Samples of 2^29 elements, nearly all of them memory that nobody touches; their last positions are seen."""
    samples, channels, size = 5, 8, 2**26
    shape = (samples, size, channels) if last else (samples, channels, size)
    torch.utils.deterministic.fill_uninitialized_memory = False
    x = torch.empty(shape, dtype=torch.bfloat16)
    x = x.movedim(-1, 1).unsqueeze(2) if last else x.unsqueeze(2)
    x[..., -2:] = torch.arange(2.0 * samples * channels).reshape(samples, channels, 1, 2).to(x.dtype)
    weight = torch.ones(channels, 1, 1, 1, dtype=x.dtype)
    g = geometry(2, groups=channels, crop=(0, 0, size - 2, 0))
    y = conv_transpose((x, weight, *[None] * 5), g, Epilogue(), "cuda")[0]
    assert torch.equal(y, x[..., -2:])


def integers(generator, *shape):
    return torch.randint(-4, 5, shape, generator=generator).float()


@by_backend
@pytest.mark.parametrize(("out_channels", "last"), [(6, False), (36, True)], ids=["C6-first", "C36-last"])
@pytest.mark.parametrize("row", GRID, ids=IDS)
def test_integers_are_exact(seed, name, device, row, out_channels, last):
    dims, *rest, groups, crop = row
    g = geometry(dims, *rest, groups, crop)
    generator = torch.Generator().manual_seed(seed)
    x, weight = (
        integers(generator, 2, 6, *[5, 4, 3][:dims]),
        integers(generator, 6, out_channels // groups, *[3] * dims),
    )
    if last:
        x, weight = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, weight))
    bias = integers(generator, out_channels)
    tensors = [t.to(device) for t in (x, weight, bias)]
    out, mean, var = conv_transpose((*tensors, *[None] * 4), g, Epilogue("moments", activation="relu"), name)
    exact = equations.convolve(x.double(), weight.double(), bias.double(), g)
    assert torch.equal(out.cpu().double(), exact.relu())
    dims_of_moments = [0, *range(2, exact.dim())]
    torch.testing.assert_close(mean.cpu().double(), exact.mean(dims_of_moments), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(var.cpu().double(), exact.var(dims_of_moments, correction=0), rtol=1e-5, atol=1e-5)


@by_backend
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_torchs_own_samples(name, device, dims):
    from torch.testing._internal.common_methods_invocations import op_db

    (info,) = [op for op in op_db if op.name == f"nn.functional.conv_transpose{dims}d"]
    count = 0
    for sample in info.sample_inputs(device, torch.float32, requires_grad=False):
        expected = info.op(sample.input, *sample.args, **sample.kwargs)
        if INTERPRETED and expected.numel() * sample.args[0][0, 0].numel() > 1_000_000:
            # a minute of the interpreter's; the grid has its like: stride 3, dilation, output_padding, groups
            continue
        ours = getattr(MF, f"conv_transpose{dims}d")(sample.input, *sample.args, **sample.kwargs, backend=name)
        assert ours.stride() == expected.stride()
        # what cancels in a sum is rounded as its terms are
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
        count += 1
    assert count > 3


@pytest.mark.skipif(INTERPRETED, reason="Triton's kernels have been held to torch's samples above")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_module_db_on_cuda(name, outcome, same):
    with mmfast.use_backend("cuda"):
        hold_to_torch(INFOS[name], name, "f32", True, None, outcome, same)


@by_backend
def test_sliced_input_and_empty_batch(seed, name, device):
    generator = torch.Generator().manual_seed(seed)
    x = integers(generator, 2, 12, 9, 10)[:, ::2, 1:, ::3]
    weight = integers(generator, 6, 20, 3, 3)
    g = geometry(2, 2, 1)
    out = conv_transpose((x.to(device), weight.to(device), *[None] * 5), g, Epilogue(), name)[0]
    assert torch.equal(out.cpu(), equations.convolve(x, weight, None, g))
    assert MF.conv_transpose2d(x[:0].to(device), weight.to(device), backend=name).shape[0] == 0


# the interpreter computes by numpy, which tells of them
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@by_backend
def test_values_that_are_not_finite_stay_where_they_are(seed, name, device):
    """An input that is NaN or infinite reaches the outputs that its taps reach, and no other."""
    generator = torch.Generator().manual_seed(seed)
    for (channels, size, kernel), g in LAYERS.values():
        x, weight = (
            integers(generator, 2, channels[0], *size),
            torch.rand(*channels, kernel, kernel, generator=generator),
        )
        weight += 0.5
        x[0, 0, 1, 1], x[1, 2, 2, 1] = torch.nan, torch.inf
        out = conv_transpose((x.to(device), weight.to(device), *[None] * 5), g, Epilogue(), name)[0].cpu()
        touched = equations.convolve(x.isfinite().logical_not().float(), torch.ones_like(weight), None, g) > 0
        assert torch.equal(out.isfinite(), ~touched)


@by_backend
@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_gradients_of_relu(seed, name, device, norm, activation):
    """Integers, so that no sign is in doubt: without a norm exact, 0 where the argument is 0."""
    problem = Problem(seed, torch.float32, geometry(2, 2, 1), Epilogue(norm, 1e-5, activation, 0.25), (6, 5), (4, 4), 4)
    problem.tensors = [None if t is None else t.round() for t in problem.tensors]
    problem.dout = problem.dout.mul(4).round()
    (ours, _), (exact, _) = problem.run(name, device), problem.run("exact")
    for found, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(found.cpu().double(), expected, rtol=0, atol=0 if norm == "none" else 2e-3)


# (batch, channels, size), channels last: accesses of 16 bytes and of one element; of one tile, of several tiles, of
# fewer channels and rows than a block has threads, of samples that end within a tile
NORM_SHAPES = [
    ((2, 3, (9, 17)), True),
    ((3, 40, (11, 10)), True),
    ((1, 264, (2, 3)), True),
    ((5, 3, (4, 6)), False),
    ((3, 7, (5, 5)), False),
    ((2, 1, (96, 100)), False),
]


@by_backend
@pytest.mark.parametrize("dtype", DTYPES[::2] if not INTERPRETED else DTYPES[:1], ids=str)
@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize(("shape", "last"), NORM_SHAPES, ids=str)
def test_norms_of_shapes(seed, name, device, dtype, norm, shape, last):
    """A norm alone, after a convolution that leaves its input as it is, with a mean far from 0."""
    batch, channels, size = shape
    layout = LAYOUTS["last" if last else "first"]
    g = geometry(2, groups=channels)
    problem = Problem(seed, dtype, g, Epilogue(norm, 1e-5, "tanh"), (channels, channels), size, 1, batch, layout)
    problem.tensors[:3] = [problem.tensors[0] + 3, torch.ones_like(problem.tensors[1]), None]
    (ours, moments), (exact, truth) = problem.run(name, device), problem.run("exact")
    # the weight's gradient is 0 but for rounding, and torch's product of our dy
    del ours[2], exact[2]
    tolerance = 2e-5 if dtype == torch.float32 else 3e-2
    for found, expected in zip([*ours, *moments], [*exact, *truth], strict=True):
        scale = 1 + float(expected.detach().abs().max())
        torch.testing.assert_close(found.cpu().double(), expected.detach(), rtol=tolerance, atol=tolerance * scale)


@by_backend
def test_thread_order_does_not_change_a_bit(seed, name, device):
    """Orders are the emulator's; elsewhere this is one more test of repeatability."""
    found = []
    for order in (0, 1, 2, seed):
        native.emulator_order(order)
        launches = native.emulator_launches()
        problem = Problem(seed, torch.float32, geometry(2, 2, 1), Epilogue("batch", 1e-5, "silu"), (6, 3), (9, 9), 4)
        outputs, moments = problem.run(name, device)
        found.append([*outputs, *moments])
        # the moments' two launches and the norm, then the sums' two and the input's gradient
        assert native.emulator_launches() - launches >= 6 * ((name, device) == ("cuda", "cpu"))
    assert all(torch.equal(a, b) for again in found[1:] for a, b in zip(found[0], again, strict=True))


@by_backend
def test_second_order(seed, name, device):
    """A penalty on the input's gradient: the formula of equations.py behind the kernels."""
    problem = Problem(seed, torch.float32, geometry(2, 2, 1), Epilogue("batch", 1e-3, "tanh"), (4, 6), (3, 3), 4)
    found = []
    for backend, dtype in ((name, None), ("torch", torch.float64)):
        tensors = [None if t is None else t.detach().to(device, dtype).requires_grad_() for t in problem.tensors]
        out = conv_transpose(tuple(tensors), problem.g, problem.epilogue, backend)[0]
        (dx,) = torch.autograd.grad(out, tensors[0], problem.dout.to(device, dtype), create_graph=True)
        found.append([g.double().cpu() for g in torch.autograd.grad(dx.square().sum(), tensors[:2])])
    for ours, exact in zip(*found, strict=True):
        assert (ours - exact).norm() <= 1e-4 * exact.norm()


@by_backend
def test_repeatable(seed, name, device):
    problem = Problem(seed, torch.float32, geometry(2, 2, 1), Epilogue("batch", 1e-5, "silu"), (20, 24), (7, 7), 4)
    (first, moments), (second, again) = problem.run(name, device), problem.run(name, device)
    assert all(torch.equal(a, b) for a, b in zip([first[0], *moments], [second[0], *again], strict=True))


@triton.jit
def probe(out, i_tile, positions, channels, n, WIDE: tl.constexpr):
    sample, start = triton_kernels.first_row(i_tile + tl.program_id(0), positions, 128)
    tl.store(out, sample * positions * channels)
    tl.store(out + 1, start.to(tl.int64))
    b_n = n + tl.arange(0, 1)
    tl.store(out + 2 + tl.arange(0, 1), triton_kernels._divide(b_n, positions, WIDE).to(tl.int64))


@pytest.mark.skipif(not INTERPRETED, reason="its kernel is run by Triton's interpreter, in a process of its own")
def test_offsets_of_triton_past_2_to_31():
    """The first row of a tile and the divisions within it, for more rows than 31 bits count."""
    for i_tile, positions, channels, n in ((2**25 + 3, 4097, 3, 2**31 - 200), (2**30, 77, 512, 76), (5, 1, 1, 2**21)):
        for wide in (False, True):
            out = torch.zeros(3, dtype=torch.int64)
            probe[(1,)](out, i_tile, positions, channels, n, WIDE=wide)
            sample, start = divmod(i_tile * 128, positions)
            assert out.tolist() == [sample * positions * channels, start, n // positions]


@triton.jit
def probe_norm(out, i_set, i_tile, batch, positions, channel, C: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr):
    o_channel = channel + tl.arange(0, 1)
    base, offsets, mask = triton_kernels._set_tile(
        i_set + tl.program_id(0),
        i_tile + tl.program_id(0),
        o_channel,
        o_channel < C,
        batch,
        positions,
        C,
        LAST,
        WIDE,
        128,
        1,
    )
    tl.store(out + tl.arange(0, 128)[:, None], base + offsets.to(tl.int64), mask=mask)


@pytest.mark.skipif(not INTERPRETED, reason="its kernel is run by Triton's interpreter, in a process of its own")
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_norm_offsets_of_triton_past_2_to_31(last):
    """A tile of a set's rows, far behind the first ones and across the end of a sample, of small samples and large."""
    channels, channel = 512, 300
    for positions, wide in ((2**20 + 3, False), (2**22, True)):
        i_set, batch, i_tile = 2, 5, 3 * positions // 128
        out = torch.zeros(128, 1, dtype=torch.int64)
        probe_norm[(1,)](out, i_set, i_tile, batch, positions, channel, C=channels, LAST=last, WIDE=wide)
        rows = i_tile * 128 + torch.arange(128)
        pixel, plane = (channels, 1) if last else (1, positions)
        expected = (
            (i_set * batch + rows // positions) * positions * channels + rows % positions * pixel + channel * plane
        )
        assert int(expected.min()) > 2**31
        assert torch.equal(out[:, 0], expected)


def test_refusals_of_cuda_are_sentences():
    case = OP.case("cpu", torch.float32, 4, 4, (3,), (1,), (0,), (0,), (1,), 1)
    refused = OP.backends["cuda"].refusals
    leaky = case._replace(activation="leaky_relu", negative_slope=-1.0)
    for words, other in {"torch.float64": case._replace(dtype=torch.float64), "slope is -1.0": leaky}.items():
        assert any(words in sentence and "supported" in sentence for sentence in refused(other)), words
    assert not refused(case)
    assert OP.select(case) == "torch"
    assert any("tensors are on xpu" in sentence for sentence in refused(case._replace(device="xpu")))


def test_refusals_are_sentences():
    case = OP.case("cpu", torch.float64, 4, 4, (3,), (1,), (0,), (0,), (1,), 1)
    refusals = OP.backends["triton"].refusals(case)
    assert any("float64" in sentence and "supported" in sentence for sentence in refusals)
    assert OP.select(case) != "triton"
    serving = case._replace(device="cuda", dtype=torch.float16)
    assert OP.backends["triton"].reluctance(serving) == "not measured on this device"
