"""The transposed-convolution op and its epilogues, on the CPU's kernels."""

import itertools
import random

import pytest
import torch
from torch.nn import functional as F

import mmfast.functional as MF
from mmfast import native, numerics
from mmfast.ops.conv_transpose import equations, products
from mmfast.ops.conv_transpose.backends import OP, Case, empty_output
from mmfast.ops.conv_transpose.equations import Epilogue, Geometry
from mmfast.ops.conv_transpose.op import backward_op, conv_transpose, forward_op
from mmfast.ops.product import has_products

LAYOUTS = {"first": None, "last": torch.channels_last}
#: by the number of spatial dimensions
ORDERS = {"first": dict.fromkeys((1, 2, 3)), "last": {1: None, 2: torch.channels_last, 3: torch.channels_last_3d}}
ACTIVATIONS = equations.ACTIVATIONS


def geometry(dims, stride=1, padding=0, output_padding=0, dilation=1, groups=1, crop=()):
    sizes = [
        (value,) * dims if isinstance(value, int) else value for value in (stride, padding, output_padding, dilation)
    ]
    return Geometry(*sizes, groups, crop or (0,) * (2 * dims))


def laid_out(x, layout):
    return x if layout is None else x.contiguous(memory_format=layout)


def outputs(tensors, g, epilogue, backend, layout=None, cotangent_seed=0):
    """(out, dx, dweight, [dbias, dnorm_weight, dnorm_bias], mean, var): those that there are, in this order."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format) for x in tensors if x is not None]
    given = iter(leaves)
    full = [None if x is None else next(given) for x in tensors]
    wanted = [x.requires_grad_() for x in full[:5] if x is not None]
    if backend == "reference":
        out, _, mean, var = equations.forward(*full, g, epilogue)
    elif backend == "stock":
        out, mean, var = stock(full, g, epilogue), None, None
    else:
        out, mean, var = conv_transpose(tuple(full), g, epilogue, backend)
    generator = torch.Generator().manual_seed(cotangent_seed)
    dout = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    gradients = torch.autograd.grad(out, wanted, laid_out(dout, layout))
    moments = [] if mean is None or not mean.numel() else [mean, var]
    return [x.detach() for x in (out, *gradients, *moments)]


def stock(tensors, g, epilogue):
    """What a user of torch.nn.functional writes."""
    x, weight, bias, norm_weight, norm_bias, mean, var = tensors
    y = equations.convolve(x, weight, bias, g)
    if epilogue.norm == "instance":
        y = F.instance_norm(y, weight=norm_weight, bias=norm_bias, eps=epilogue.eps)
    elif epilogue.norm != "none":
        y = F.batch_norm(y, mean, var, norm_weight, norm_bias, epilogue.norm == "batch", eps=epilogue.eps)
    return equations.activate(y, epilogue.activation, epilogue.negative_slope)


def named(ours, yardstick, reference):
    """{name: (ours, yardstick, reference)} of what all three have."""
    return {str(i): row for i, row in enumerate(zip(ours, yardstick, reference, strict=False))}


def random_tensors(
    seed, dtype, norm, channels=(5, 64), size=(3, 2), kernel=3, batch=2, bias=True, layout=None, groups=1
):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    x = laid_out(normal(batch, channels[0], *size), layout)
    weight = normal(channels[0], channels[1] // groups, *[kernel] * len(size))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    parameters = [None] * 4
    if norm not in ("none", "moments"):
        parameters[:2] = [(normal(channels[1]) + 1).to(wide), normal(channels[1]).to(wide)]
    if norm == "given":
        parameters[2:] = [normal(channels[1]).to(wide), (normal(channels[1]).square() + 0.1).to(wide)]
    return [x, weight, normal(channels[1]) if bias else None, *parameters]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("norm", "activation", "size"),
    [
        ("batch", "relu", (3, 2)),
        ("batch", "tanh", (2, 1, 2)),  # not one wide: oneDNN leaves taps of dweight in bfloat16 unwritten there
        ("given", "silu", (3, 2)),
        ("instance", "leaky_relu", (3, 2)),
        ("instance", "relu", (5,)),
        ("none", "sigmoid", (3, 2)),
        ("none", "gelu", (2, 1, 3)),
    ],
)
def test_numerics_of_the_epilogue(seed, isa, norm, activation, size, layout, dtype):
    g, epilogue = geometry(len(size), stride=2, padding=1), Epilogue(norm, 1e-5, activation, 0.2)
    order = ORDERS[layout][len(size)]

    def draw(at):
        tensors = random_tensors(at, dtype, norm, size=size, bias=norm == "none", layout=order)
        exact = [None if x is None else x.double() for x in tensors]
        runs = [outputs(tensors, g, epilogue, backend, order, at) for backend in ("cpu", "stock")]
        # moments have no yardstick: the tests of moments are below
        return named(*runs, outputs(exact, g, epilogue, "reference", None, at))

    numerics.assert_pooled(draw, seed)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("channels", "size", "kernel", "stride", "padding", "groups"),
    [
        ((64, 3), (9, 17), 4, 2, 1, 1),
        ((40, 1), (33,), 5, 3, 0, 1),
        ((64, 32), (1, 1), 4, 1, 0, 1),
        ((32, 2), (3, 4, 5), 3, 2, 1, 1),
        ((24, 24), (63,), 4, 2, 0, 24),
        ((9, 9), (5, 17), 5, 3, 1, 9),
        ((6, 6), (3, 4, 5), 3, 2, 1, 6),
        ((40, 21), (5, 17), 2, 2, 0, 1),
        ((20, 12), (3, 4, 5), 2, 2, 0, 1),
        ((24, 6), (70,), 3, 3, 0, 1),
        ((64, 32), (9, 17), 4, 2, 1, 1),
        ((64, 40), (20, 18), 4, 2, 1, 1),
        ((32, 40), (20, 18), 4, 2, 1, 1),
        ((64, 40), (90,), 8, 4, 2, 1),
        ((40, 33), (3, 4, 5), 3, 2, 1, 1),
        ((128, 32), (70,), 16, 8, 4, 1),
    ],
    ids=[
        *("C3-2d", "C1-1d", "position", "C2-3d", "depthwise-1d", "depthwise-2d", "depthwise-3d"),
        *("apart-2d", "apart-3d", "apart-1d", "wide-2d", "squares", "squares-backward", "pairs", "wide-3d", "wide-1d"),
    ],
)
def test_numerics_of_products(seed, isa, channels, size, kernel, stride, padding, groups, layout):
    # as their models do: the RGB layer ends in tanh, the projection in relu
    activation = "tanh" if channels[1] <= 4 else "relu"
    g, epilogue = geometry(len(size), stride, padding, groups=groups), Epilogue(activation=activation)
    order = ORDERS[layout][len(size)]

    def draw(at):
        shape = {
            "channels": channels,
            "size": size,
            "kernel": kernel,
            "batch": 3,
            "layout": order,
            "groups": groups,
        }
        tensors = random_tensors(at, torch.float32, "none", **shape)
        # where nearly every tanh is saturated, the few that are not decide alone, and by chance
        tensors[1] *= channels[0] ** -0.5
        exact = [None if x is None else x.double() for x in tensors]
        runs = [outputs(tensors, g, epilogue, backend, order, at) for backend in ("cpu", "stock")]
        # dbias is a plain sum that both take with torch
        return named(*(run[:3] for run in (*runs, outputs(exact, g, epilogue, "reference", None, at))))

    numerics.assert_pooled(draw, seed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize(
    ("channels", "groups", "size", "stride", "padding"),
    [
        ((48, 33), 1, (5, 7), 2, 1),
        ((48, 33), 1, (1, 1), 1, 0),
        ((8, 8), 1, (5, 7), 2, 1),
        ((32, 16), 4, (5, 7), 2, 1),
        ((24, 24), 24, (33,), 2, 1),
    ],
    ids=["spread", "position", "narrow", "grouped", "depthwise"],
)
def test_numerics_of_16_bits(seed, dtype, channels, groups, size, stride, padding):
    g, epilogue = geometry(len(size), stride, padding, groups=groups), Epilogue(activation="tanh")

    def draw(at):
        tensors = random_tensors(at, dtype, "none", channels, size, kernel=4, groups=groups)
        tensors[1] *= (channels[0] // groups) ** -0.5
        exact = [None if x is None else x.double() for x in tensors]
        runs = [outputs(tensors, g, epilogue, backend, None, at) for backend in ("cpu", "stock")]
        return named(*runs, outputs(exact, g, epilogue, "reference", None, at))

    numerics.assert_pooled(draw, seed)


GRID = [
    # dims, stride, padding, output_padding, dilation, groups, crop
    (1, 2, 1, 0, 1, 1, (0, 0)),
    (1, 1, 0, 2, 3, 1, (1, 0)),
    (1, 3, 2, 2, 2, 2, (0, 2)),
    (2, 2, 1, 1, 1, 1, (0, 0, 0, 0)),
    (2, (1, 3), (0, 1), (1, 2), (2, 1), 1, (1, 0, 0, 1)),
    (2, 2, 1, 0, 1, 3, (0, 0, 0, 0)),
    (3, (2, 1, 2), 1, (1, 0, 0), 1, 1, (0, 0, 0, 0, 1, 0)),
    # taps that do not overlap
    (2, 3, 0, 0, 1, 1, (0, 1, 2, 0)),
    # depthwise where both channels are 6
    (1, 3, 2, 2, 2, 6, (0, 2)),
    (2, (1, 3), (0, 1), (1, 2), (2, 1), 6, (1, 0, 0, 1)),
    (3, (2, 1, 2), 1, (1, 0, 0), 1, 6, (0, 0, 0, 0, 1, 0)),
]
IDS = ["x".join(map(str, row)).replace(" ", "") for row in GRID]


@pytest.mark.parametrize("row", GRID, ids=IDS)
@pytest.mark.parametrize("out_channels", [3, 6], ids=["C3", "C6"])
def test_integers_are_exact(seed, isa, row, out_channels):
    dims, *rest, groups, crop = row
    g = geometry(dims, *rest, groups, crop)
    generator = torch.Generator().manual_seed(seed)

    def integers(*shape):
        return torch.randint(-4, 5, shape, generator=generator).float()

    x, weight = (
        integers(2, 6, *[5, 4, 3][:dims]),
        integers(6, out_channels // min(groups, out_channels) or 1, *[3] * dims),
    )
    tensors = [x, weight, integers(weight.shape[1] * groups), None, None, None, None]
    ours = outputs(tensors, g, Epilogue(activation="relu"), "cpu")[0]
    exact = equations.forward(*[None if t is None else t.double() for t in tensors], g, Epilogue(activation="relu"))[0]
    assert torch.equal(ours.double(), exact)


@pytest.mark.parametrize("method", ["gather", "squares", "phases", "depthwise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_products_of_matrices_are_exact(seed, isa, dtype, method):
    """Blocks of several samples and parts of one, both layouts, every place written: NaN was there before."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)

    def integers(*shape):
        return torch.randint(-4, 5, shape, generator=generator).to(dtype)

    for _ in range(30):
        dims = rng.choice((1, 2, 2, 3))
        stride, dilation, kernel = ([rng.randint(1, most) for _ in range(dims)] for most in (3, 2, 5))
        if method == "squares":
            dims, stride = len(stride[:2]), stride[:2]
            kernel, dilation = [2 * step for step in stride], [1] * dims
        output_padding = [rng.randint(0, max(pair) - 1) for pair in zip(stride, dilation, strict=True)]
        crop = tuple(rng.choice((0, 0, 1)) for _ in range(2 * dims))
        g = Geometry(tuple(stride), (rng.randint(0, 2),) * dims, tuple(output_padding), tuple(dilation), 1, crop)
        size = [rng.randint(1, (1500, 40, 9)[dims - 1]) for _ in range(dims)]
        if min(g.out_size(size, kernel)) < 1:
            continue
        inputs, outputs, batch = rng.randint(1, 70), rng.randint(1, 40), rng.choice((1, 2, 9))
        if method == "depthwise":
            g, outputs = g._replace(groups=inputs), 1
        layouts = {2: LAYOUTS, 3: {"first": None, "last": torch.channels_last_3d}}.get(dims, {"first": None})
        of_x, of_y = (layouts[rng.choice(list(layouts))] for _ in range(2))
        x, weight = laid_out(integers(batch, inputs, *size), of_x), integers(inputs, outputs, *kernel)
        bias = integers(outputs * g.groups) if rng.random() < 0.5 else None
        exact = equations.convolve(x.double(), weight.double(), None if bias is None else bias.double(), g)
        y = laid_out(torch.full(exact.shape, torch.nan, dtype=dtype), of_y)
        window = products.native_window(x, weight, g)
        if method in ("gather", "squares"):
            getattr(native, f"cpu_{method}_forward")(window, x, weight, bias, y)
        else:
            # x as it lies in memory is for the phases' forward alone
            x = x if method == "phases" else x.contiguous()
            getattr(native, f"cpu_{method}_forward")(window, x, weight, bias, y, (0, 0.0))
            x = x.contiguous()
        assert torch.equal(y.double(), exact)
        dy = laid_out(integers(*y.shape), of_y)
        dx = torch.full_like(x, torch.nan)
        # the depthwise kernel leaves each sample's
        dweight = torch.full((batch if method == "depthwise" else 1, *weight.shape), torch.nan, dtype=dtype)
        assert native.cpu_conv_transpose_backward(method, window, x, weight, dy, dx, dweight)
        exact = equations.convolve_backward(dy.double(), x.double(), weight.double(), g, (True, True, False))
        assert torch.equal(dx.double(), exact[0])
        assert torch.equal(dweight.sum(0).double(), exact[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_depthwise_in_one_dimension_is_exact_and_stays_inside(seed, isa, dtype):
    """Strides from one to more than a vector, ends that lack taps, what is not finite; NaN and a mark lie around."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)

    def integers(*shape):
        return torch.randint(-4, 5, shape, generator=generator).to(dtype)

    def amid(x, mark):
        return torch.cat([torch.full((64,), mark), x.flatten(), torch.full((64,), mark)]).to(dtype)

    for _ in range(300):
        stride = rng.choice((1, 2, 2, 3, 4, 5, 8, 10, 16, 17, 33))
        kernel, size = rng.randint(1, 3 * stride + 2), rng.choice((1, 2, 5, 15, 16, 17, 33, 64, 100))
        crop = rng.choice((0, 0, 3)), rng.choice((0, 0, 7))
        batch, channels = rng.randint(1, 3), rng.randint(1, 5)
        g = Geometry((stride,), (rng.randint(0, kernel),), (rng.randint(0, stride - 1),), (1,), channels, crop)
        if min(g.out_size([size], [kernel])) < 1:
            continue
        x, weight = integers(batch, channels, size), integers(channels, 1, kernel)
        bias = integers(channels) if rng.random() < 0.5 else None
        if rng.random() < 0.3:
            one = rng.choice((x, weight)).view(-1)
            one[rng.randrange(len(one))] = rng.choice((torch.inf, -torch.inf, torch.nan))
        exact = equations.convolve(x.double(), weight.double(), None if bias is None else bias.double(), g)
        around = amid(torch.full(exact.shape, torch.nan), 777.0)
        y = around[64:-64].view(exact.shape)
        x, weight = (amid(t, torch.nan)[64:-64].view(t.shape) for t in (x, weight))
        assert native.cpu_depthwise_forward(products.native_window(x, weight, g), x, weight, bias, y, (0, 0.0))
        torch.testing.assert_close(y.double(), exact, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(torch.cat([around[:64], around[-64:]]), torch.full((128,), 777.0, dtype=dtype))
        if not (x.isfinite().all() and weight.isfinite().all()):
            continue
        dy = amid(integers(*exact.shape), torch.nan)[64:-64].view(exact.shape)
        dx, dweight = torch.full_like(x, torch.nan), torch.full((batch, *weight.shape), torch.nan, dtype=dtype)
        window = products.native_window(x, weight, g)
        assert native.cpu_conv_transpose_backward("depthwise", window, x, weight, dy, dx, dweight)
        exact = equations.convolve_backward(dy.double(), x.double(), weight.double(), g, (True, True, False))
        assert torch.equal(dx.double(), exact[0])
        assert torch.equal(dweight.sum(0).double(), exact[1])
        # what is not finite goes where a tap is, and nowhere else
        dy.view(-1)[rng.randrange(dy.numel())] = torch.inf
        assert native.cpu_conv_transpose_backward("depthwise", window, x, weight, dy, dx, None)
        exact = equations.convolve_backward(dy.double(), x.double(), weight.double(), g, (True, False, False))[0]
        torch.testing.assert_close(dx.double(), exact, rtol=0, atol=0, equal_nan=True)


def test_an_axis_of_one_output_that_no_tap_reaches(seed, isa):
    generator = torch.Generator().manual_seed(seed)
    g = geometry(2, (3, 2), (1, 1), (2, 0), groups=8)
    x, weight = torch.randn(2, 8, 1, 40, generator=generator), torch.randn(8, 1, 1, 4, generator=generator)
    tensors = [x.requires_grad_(), weight.requires_grad_(), *[None] * 5]
    out = conv_transpose(tuple(tensors), g, Epilogue(), "cpu")[0]
    assert out.shape[2] == 1 and not out.any()
    assert not any(part.any() for part in torch.autograd.grad(out, tensors[:2], torch.randn(out.shape)))


@pytest.mark.parametrize("method", ["gather", "squares"])
def test_blocks_of_a_share_are_exact(seed, isa, method):
    """More blocks of samples than shares of a weight's gradient, the last of fewer samples than the one before."""
    generator = torch.Generator().manual_seed(seed)
    x, dy = (torch.randint(-4, 5, (229, *s), generator=generator).float() for s in ((7, 5, 7), (5, 10, 14)))
    weight, g = torch.empty(7, 5, 4, 4), geometry(2, 2, 1)
    window, dweight = products.native_window(x, weight, g), torch.full_like(weight, torch.nan)
    assert native.cpu_conv_transpose_backward(method, window, x, weight, dy, None, dweight)
    exact = equations.convolve_backward(dy.double(), x.double(), weight.double(), g, (False, True, False))[1]
    assert torch.equal(dweight.double(), exact)


def test_sums_of_many_terms_are_of_short_chains(seed, isa):
    """Positive terms: sums of one chain of 2048 are off by 9 to 14 roundings, of chains of 32 by 2 to 3."""
    generator = torch.Generator().manual_seed(seed)
    g = geometry(2, 2, 1)
    x, weight = (torch.rand(*s, generator=generator) for s in ((1, 2048, 5, 7), (2048, 3, 4, 4)))
    exact = equations.convolve(x.double(), weight.double(), None, g)
    y = torch.empty(exact.shape)
    native.cpu_phases_forward(products.native_window(x, weight, g), x, weight, None, y, (0, 0.0))
    torch.testing.assert_close(y.double(), exact, rtol=5 * torch.finfo(torch.float32).eps, atol=0)


@pytest.mark.parametrize("method", ["gather", "squares", "phases"])
def test_products_of_matrices_do_not_depend_on_threads(seed, method):
    generator = torch.Generator().manual_seed(seed)
    # of one dimension squares are pairs
    for batch, size in ((1, (5, 7)), (5, (40, 33)), (1, (35,)), (5, (1500,))):
        g = geometry(len(size), 2, 1)
        x, dy = (torch.randn(batch, c, *s, generator=generator) for c, s in ((48, size), (40, [2 * n for n in size])))
        weight = torch.randn(48, 40, *[4] * len(size), generator=generator)

        def run(threads, g=g, x=x, weight=weight, dy=dy):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            y, dx, dweight = torch.empty_like(dy), torch.empty_like(x), torch.zeros_like(weight)
            window = products.native_window(x, weight, g)
            activation = [(0, 0.0)] * (method == "phases")
            assert getattr(native, f"cpu_{method}_forward")(window, x, weight, None, y, *activation) is not False
            assert native.cpu_conv_transpose_backward(method, window, x, weight, dy, dx, dweight)
            torch.set_num_threads(before)
            return y, dx, dweight

        assert all(map(torch.equal, run(1), run(3)))


def check_orders(call, wanted):
    """First and second order against differences; a gradient to be differentiated is the one that is not."""
    once = torch.autograd.grad(call(*wanted).sin().sum(), wanted)
    again = torch.autograd.grad(call(*wanted).sin().sum(), wanted, create_graph=True)
    torch.testing.assert_close([g.detach() for g in again], list(once))
    assert torch.autograd.gradcheck(call, wanted, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, wanted, fast_mode=True)


@pytest.mark.parametrize("row", GRID, ids=IDS)
@pytest.mark.parametrize("norm", equations.NORMS)
def test_gradients_of_both_orders(seed, row, norm):
    dims, *rest, groups, crop = row
    g, epilogue = geometry(dims, *rest, groups, crop), Epilogue(norm, 1e-3, "tanh")
    channels = (groups if groups == 6 else 2 * groups, groups)
    shape = {"channels": channels, "size": [2, 2, 2][:dims], "kernel": 2, "groups": groups}
    tensors = random_tensors(seed, torch.float64, norm, **shape)
    wanted = [x.requires_grad_() for x in tensors[:5] if x is not None]

    def call(*leaves):
        given = iter(leaves)
        full = tuple(next(given) if x is not None else None for x in tensors[:5])
        return conv_transpose((*full, *tensors[5:]), g, epilogue, "cpu")[0]

    check_orders(call, wanted)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_gradients_of_every_activation(seed, activation, norm):
    tensors = random_tensors(seed, torch.float64, norm, channels=(2, 3), size=(2, 2), kernel=2)
    wanted = [x.requires_grad_() for x in tensors[:5] if x is not None]
    g, epilogue = geometry(2, 2), Epilogue(norm, 1e-3, activation, 0.2)

    def call(*leaves):
        return conv_transpose((*leaves, *[None] * (7 - len(leaves))), g, epilogue, "cpu")[0]

    check_orders(call, wanted)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slopes_are_as_precise_as_their_dtype(seed, activation):
    """Finer than gradcheck looks."""
    u = torch.randn(100, dtype=torch.float64).requires_grad_()
    (expected,) = torch.autograd.grad(equations.activate(u, activation, 0.2).sum(), u)
    ones = torch.ones_like(u)
    found = equations.activate_backward(ones, u, activation, 0.2)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    out = equations.activate(u, activation, 0.2)
    of_value = equations.activate_backward_of_value(ones, out, activation, 0.2)
    assert (of_value is None) == (activation in ("none", "silu", "gelu"))
    if of_value is not None:
        torch.testing.assert_close(of_value, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("affine", [False, True])
def test_third_order_through_a_norm(seed, affine):
    """PyTorch's own batch norm is wrong here: its second-order formula takes mean and variance for constants."""
    generator = torch.Generator().manual_seed(seed)
    x, weight, c = (torch.randn(s, generator=generator).double() for s in [(3, 2, 4), (2, 3, 3), (3, 3, 6)])
    norm = [torch.randn(3, generator=generator).double().requires_grad_() for _ in range(2)] if affine else [None] * 2
    leaves = [x.requires_grad_(), weight.requires_grad_(), *(p for p in norm if p is not None)]
    g, epilogue = geometry(1), Epilogue("batch", 1e-3, "tanh")

    def ours():
        return conv_transpose((x, weight, None, *norm, None, None), g, epilogue, "cpu")[0]

    def plain():
        return equations.forward(x, weight, None, *norm, None, None, g, epilogue)[0]

    def orders(call):
        found = []
        scalar = (call() * c).sum()
        for _ in range(3):
            gradients = torch.autograd.grad(scalar, leaves, create_graph=True, materialize_grads=True)
            found += gradients
            scalar = sum((gradient.square() * (1 + k)).sum() for k, gradient in enumerate(gradients))
        return [x.detach() for x in found]

    torch.testing.assert_close(orders(ours), orders(plain), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_torchs_own_samples(dims):
    from torch.testing._internal.common_methods_invocations import op_db

    name = f"nn.functional.conv_transpose{dims}d"
    (info,) = [op for op in op_db if op.name == name]
    count = 0
    for sample in info.sample_inputs("cpu", torch.float64, requires_grad=False):
        expected = info.op(sample.input, *sample.args, **sample.kwargs)
        ours = getattr(MF, f"conv_transpose{dims}d")(sample.input, *sample.args, **sample.kwargs, backend="cpu")
        torch.testing.assert_close(ours, expected)
        count += 1
    assert count > 3


def test_values_that_are_not_finite(seed, isa):
    cases = itertools.product(
        [(6, 3, 1, 2), (6, 20, 1, 2), (6, 20, 1, 3), (6, 6, 6, 2)], ["none", "given"], ["relu", "tanh"]
    )
    for (*channels, groups, stride), norm, activation in cases:
        g = geometry(2, stride, 0 if stride == 3 else 1, groups=groups)
        tensors = random_tensors(seed, torch.float32, norm, channels=channels, size=(4, 5), groups=groups)
        tensors[0][0, 0, 1, 1], tensors[0][1, 2, 3, 2] = torch.nan, torch.inf
        epilogue = Epilogue(norm, 1e-5, activation)
        for value in (1.0, -torch.inf):
            tensors[1][3, -1, 0, 0] = value
            ours, theirs = (outputs(tensors, g, epilogue, backend) for backend in ("cpu", "torch"))
            torch.testing.assert_close(ours[0], theirs[0], equal_nan=True)
            assert ours[0].isnan().any()


@pytest.mark.parametrize(
    ("out_channels", "kernel", "stride", "groups"),
    [(3, 4, 2, 1), (20, 3, 3, 1), (1, 4, 2, 48)],
    ids=["C3", "apart", "depthwise"],
)
def test_gradients_that_are_not_finite(seed, isa, out_channels, kernel, stride, groups):
    g = geometry(2, stride, 0 if stride == 3 else 1, groups=groups)
    generator = torch.Generator().manual_seed(seed)
    # channels enough for dweight to be ours, too
    x, weight = torch.randn(2, 48, 4, 5, generator=generator), torch.randn(48, out_channels, kernel, kernel)
    for value in (1.0, torch.inf):
        # at an edge, beyond which taps reach
        weight[3, -1, 0, 0] = x[1, 2, 0, 0] = value
        tensors = (x.clone().requires_grad_(), weight.clone().requires_grad_(), *[None] * 5)
        out = conv_transpose(tensors, g, Epilogue(), "cpu")[0]
        dout = torch.randn(out.shape, generator=generator)
        dout[0, 0, 1, 1], dout[1, 2, 3, 2] = torch.nan, torch.inf
        found = torch.autograd.grad(out, tensors[:2], dout)
        expected = equations.convolve_backward(dout, x, weight, g, (True, True, False))
        # sums of 180 products and more on either side; how accurate they are, the rule judges
        for ours, theirs in zip(found, expected[:2], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("norm", ["none", "given"])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_activations_where_something_is_not_finite(seed, isa, norm, activation, layout):
    """relu's zero is one whatever comes; leaky relu multiplies what comes to a NaN."""
    x, *others = random_tensors(seed, torch.float32, norm)
    x[0, 0, 1, 1] = torch.nan
    hold_gradient_of_x((laid_out(x, LAYOUTS[layout]), *others), Epilogue(norm, 1e-5, activation, 0.3), "cpu")


def hold_gradient_of_x(tensors, epilogue, name):
    """A backend's dx is PyTorch's, and finite; where relu's result is 0 an infinite gradient comes to it."""
    found = []
    for backend in (name, "torch"):
        leaf = tensors[0].detach().requires_grad_()
        out = conv_transpose((leaf, *tensors[1:]), geometry(2, 2, 1), epilogue, backend)[0]
        dout = torch.ones_like(out)
        if epilogue.activation == "relu":
            dout[out == 0] = torch.inf
        found.append(torch.autograd.grad(out, leaf, dout)[0])
    assert found[1].isfinite().all()
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_squares_are_not_of_what_is_not_finite(seed, isa, layout):
    """Differences of infinities are NaN, also where the formula has an infinity."""
    generator = torch.Generator().manual_seed(seed)
    g = geometry(2, 2, 1)
    x, weight = torch.randn(1, 64, 32, 34, generator=generator), torch.randn(64, 32, 4, 4, generator=generator)
    dout = torch.randn(1, 32, 64, 68, generator=generator)
    x[0, 3, 5, 7] = dout[0, 1, 7, 4] = torch.inf
    x, dout = laid_out(x, LAYOUTS[layout]), laid_out(dout, LAYOUTS[layout])
    assert products.in_squares(x, weight, g) is (isa == "avx2" or native.beats_mkl())
    tensors = (x.requires_grad_(), weight.requires_grad_(), *[None] * 5)
    out = conv_transpose(tensors, g, Epilogue(), "cpu")[0]
    expected = equations.convolve(x, weight, None, g)
    assert expected.isinf().any() and not expected.isnan().any()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    (dx,) = torch.autograd.grad(out, x, dout)
    expected = equations.convolve_backward(dout, x, weight, g, (True, False, False))[0]
    assert expected.isinf().any()
    torch.testing.assert_close(dx, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_nan_spoils_the_moments_of_its_channel_only(seed, isa):
    for layout in LAYOUTS.values():
        y = laid_out(torch.randn(3, 20, 6, 6, generator=torch.Generator().manual_seed(seed)), layout)
        y[1, 4, 2, 2] = torch.nan
        eye = laid_out(torch.eye(20).reshape(20, 20, 1, 1), layout)
        # torch's convolution spreads the NaN over all channels of the position: only one channel may be looked at
        out, mean, var = conv_transpose((y[:, 4:5], eye[:1, :1], *[None] * 5), geometry(2), Epilogue("batch"), "cpu")
        assert out.isnan().all() and mean.isnan().all() and var.isnan().all()


@pytest.mark.parametrize("shift", [0.0, 1e3, -1e4])
def test_moments_do_not_cancel(seed, isa, shift):
    generator = torch.Generator().manual_seed(seed)
    for layout in LAYOUTS.values():
        x = laid_out(torch.randn(8, 20, 9, 11, generator=generator) + shift, layout)
        # an outlier where a sum that is shifted by its first element would lose everything
        x[0, :, 0, 0] = shift + 300
        eye = torch.eye(20).reshape(20, 20, 1, 1)
        _, mean, var = conv_transpose((x, eye, *[None] * 5), geometry(2), Epilogue("batch"), "cpu")
        y = F.conv_transpose2d(x, eye).double()
        torch.testing.assert_close(mean.double(), y.mean([0, 2, 3]), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(var.double(), y.var([0, 2, 3], correction=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("channels", [3, 12, 20, 24, 36, 65, 72, 75])
def test_norms_of_every_number_of_channels(seed, isa, channels, dtype):
    """Channels last: vectors alone, in groups, and the last one over the one before; in its own place, too."""
    g, epilogue, layout = geometry(2), Epilogue("batch", 1e-5, "silu"), torch.channels_last
    shape = {"channels": (channels, channels), "size": (5, 7), "kernel": 1, "bias": False, "layout": layout}
    tensors = random_tensors(seed, dtype, "batch", **shape)
    tensors[1] = torch.eye(channels, dtype=dtype).reshape(channels, channels, 1, 1)
    ours = outputs(tensors, g, epilogue, "cpu", layout)
    exact = [None if x is None else x.double() for x in tensors]
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    for found, expected in zip(ours, outputs(exact, g, epilogue, "reference"), strict=True):
        torch.testing.assert_close(found.double(), expected, **tolerance)
    assert torch.equal(conv_transpose(tuple(tensors), g, epilogue, "cpu")[0], ours[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", ["batch", "instance", "none"])
def test_threads_do_not_change_bits(seed, layout, norm):
    tensors = random_tensors(seed, torch.float32, norm, (4, 24), (20, 20), batch=8, bias=False, layout=LAYOUTS[layout])
    # one dimension's kernel of one tap: torch's own convolution must not depend on the threads either
    tensors[1] = tensors[1][:, :, :1, :1].contiguous()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(outputs(tensors, geometry(2), Epilogue(norm, 1e-5, "silu"), "cpu", LAYOUTS[layout]))
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0])
        assert all(torch.equal(a, b) for a, b in zip(other[3:], results[0][3:], strict=True))


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("channels", "groups"), [((48, 3), 1), ((8, 8), 8)], ids=["C3", "depthwise"])
def test_threads_do_not_change_bits_of_columns(seed, layout, threads, channels, groups):
    shape = {"layout": LAYOUTS[layout], "groups": groups}
    tensors = random_tensors(seed, torch.float32, "none", channels, (24, 24), 4, 6, **shape)
    g, epilogue = geometry(2, 2, 1, groups=groups), Epilogue(activation="tanh")
    expected = outputs(tensors, g, epilogue, "cpu")
    torch.set_num_threads(threads)
    several = outputs(tensors, g, epilogue, "cpu")
    # dbias is a plain sum, and torch's; so is the backward of what is channels last, but for depthwise
    ours = 3 if groups > 1 or layout == "first" else 1
    assert all(map(torch.equal, several[:ours], expected[:ours]))


@pytest.mark.parametrize("dims", [2, 3])
def test_memory_format_is_pytorchs(seed, dims):
    convolve = (F.conv_transpose2d, F.conv_transpose3d)[dims - 2]
    for channels, x_layout, w_layout in itertools.product([(6, 20), (6, 3)], LAYOUTS, LAYOUTS):
        tensors = random_tensors(seed, torch.float32, "none", channels, (5, 4, 3)[:dims], layout=ORDERS[x_layout][dims])
        tensors[1] = laid_out(tensors[1], ORDERS[w_layout][dims])
        expected = convolve(tensors[0], tensors[1])
        assert empty_output(tensors[0], tensors[1], geometry(dims)).stride() == expected.stride()
        for activation in ("none", "relu", "silu"):
            out = conv_transpose(tuple(tensors), geometry(dims), Epilogue(activation=activation), "cpu")[0]
            assert out.stride() == expected.stride()


def test_strides_of_the_input_do_not_matter(seed):
    x = torch.randn(2, 12, 9, 10, generator=torch.Generator().manual_seed(seed))[:, ::2, 1:, ::3]
    for out_channels, norm in itertools.product((3, 20), ("none", "batch")):
        tensors = random_tensors(seed, torch.float32, norm, (6, out_channels), (8, 4))
        tensors[0] = x
        dense = [x.contiguous(), *tensors[1:]]
        for sliced, expected in zip(
            *(outputs(t, geometry(2, 2, 1), Epilogue(norm, 1e-5, "relu"), "cpu") for t in (tensors, dense)), strict=True
        ):
            torch.testing.assert_close(sliced, expected, rtol=1e-5, atol=1e-4)


def test_what_is_not_dense_reaches_no_kernel():
    x, weight, g = torch.randn(1, 4, 5, 12)[..., ::2], torch.randn(4, 3, 4, 4), geometry(2, 2, 1)
    y = torch.empty(1, 3, 10, 12)
    with pytest.raises(AssertionError, match="is not dense"):
        native.cpu_gather_forward(products.native_window(x, weight, g), x, weight, None, y)


def any_strides(x, seed):
    """Copies of x whose elements lie apart, in another order, or on one another; the last is another tensor."""
    order = random.Random(seed).sample(range(x.dim()), x.dim())
    other = x.permute(order).contiguous()
    apart = torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
    inside = F.pad(x, (1, 2), value=torch.nan)[..., 1:-2]
    return [apart, inside, other.permute([order.index(d) for d in range(x.dim())]), x[:1].expand_as(x)]


@pytest.mark.parametrize("backend", ["cpu", None])
@pytest.mark.parametrize(
    ("channels", "size", "kernel", "stride", "groups"),
    [
        ((64, 48), (20, 18), 4, 2, 1),  # squares
        ((64, 48), (750,), 4, 2, 1),
        ((64, 40), (20, 18), 5, 2, 1),  # products
        ((64, 40), (150,), 5, 2, 1),
        ((64, 3), (20, 18), 4, 2, 1),  # phases
        ((64, 40), (60, 30), 2, 2, 1),
        ((64, 64), (150,), 4, 2, 64),  # depthwise
        ((64, 40), (1, 1), 4, 1, 1),  # one position
        ((5, 6), (7, 8), 3, 2, 1),  # PyTorch's
    ],
)
def test_strides_do_not_matter(seed, isa, backend, channels, size, kernel, stride, groups):
    function = {1: F.conv_transpose1d, 2: F.conv_transpose2d}[len(size)]
    ours = {1: MF.conv_transpose1d, 2: MF.conv_transpose2d}[len(size)]
    x, weight, bias = random_tensors(seed, torch.float32, "none", channels, size, kernel, 2, groups=groups)[:3]
    options = {"stride": stride, "groups": groups}
    dout = torch.randn_like(function(x, weight, bias, **options))
    tensors = [x, weight, bias, dout]
    for i, j in itertools.product(range(4), range(4)):
        given = [*tensors]
        given[i] = any_strides(tensors[i], seed)[j]
        *wanted, dy = given
        wanted = [t.detach().requires_grad_() for t in wanted]
        found, expected = (
            (y := call(*wanted, **options), *torch.autograd.grad(y, wanted, dy))
            for call in (lambda *a, **k: ours(*a, **k, backend=backend), function)
        )
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_preference():
    plain = Case("cpu", torch.float32, 64, 32, (4, 4), (2, 2), (1, 1), (0, 0), (1, 1), 1)
    wide = "torch" if native.isa() == "baseline" else "cpu"
    assert OP.explain(plain).backend == wide
    # half of the last vector is empty
    assert OP.explain(plain._replace(out_channels=40)).backend == ("torch" if native.beats_mkl() else wide)
    assert OP.explain(plain._replace(out_channels=48)).backend == wide
    assert OP.explain(plain._replace(contiguous=False)).backend == wide
    inference = plain._replace(contiguous=False, gradients=False)
    has_squares = native.isa() == "avx2" or native.beats_mkl()
    assert OP.explain(inference).backend == ("cpu" if has_squares else "torch")
    assert OP.explain(inference._replace(kernel_size=(3, 3))).backend == "torch"
    assert OP.explain(plain._replace(small=True)).backend == "torch"
    assert OP.explain(plain._replace(out_channels=3)).backend == "cpu"
    few = Case("cpu", torch.float32, 16, 1, (7,), (1,), (3,), (0,), (1,), 1)
    assert OP.explain(few).backend == "cpu"
    assert OP.explain(few._replace(small=True)).backend == "torch"
    assert OP.explain(few._replace(in_channels=4)).backend == "torch"
    apart = plain._replace(kernel_size=(2, 2), padding=(0, 0))
    assert OP.explain(apart).backend == "cpu"
    assert OP.explain(apart._replace(contiguous=False)).backend == wide
    normalized = plain._replace(norm="batch", activation="relu")
    assert OP.explain(normalized).backend == "cpu"
    assert OP.explain(normalized._replace(small=True)).backend == "torch"
    unified = normalized._replace(stride=(1, 1), contiguous=False)
    assert OP.explain(unified).backend == ("torch" if native.isa() == "avx512" else "cpu")
    assert OP.explain(normalized._replace(contiguous=False)).backend == (wide if native.isa() == "avx512" else "cpu")
    projection = plain._replace(stride=(1, 1), padding=(0, 0))
    assert OP.explain(projection).backend == "cpu"
    assert OP.explain(projection._replace(spread=True)).backend == "torch"
    assert OP.explain(projection._replace(dtype=torch.bfloat16)).backend == "cpu"
    if has_products(torch.float16):
        assert OP.explain(projection._replace(dtype=torch.float16, gradients=False)).backend == "torch"
    assert OP.explain(plain._replace(groups=32)).backend == "torch"
    assert OP.explain(plain._replace(groups=64, out_channels=64)).backend == "torch"
    depthwise = Case("cpu", torch.float32, 64, 64, (4,), (2,), (1,), (0,), (1,), 64)
    assert OP.explain(depthwise).backend == "cpu"
    assert OP.explain(depthwise._replace(gradients=False)).backend == "torch"
    assert OP.explain(depthwise._replace(gradients=False, spread=2)).backend == "cpu"
    assert OP.explain(depthwise._replace(gradients=False, bias=True)).backend == "cpu"
    assert OP.explain(depthwise._replace(gradients=False, bias=True, small=True)).backend == "torch"
    assert OP.explain(depthwise._replace(stride=(1,))).backend == "torch"
    assert OP.explain(depthwise._replace(stride=(4,))).backend == "cpu"
    longer = depthwise._replace(kernel_size=(12,), gradients=False, spread=2)
    assert OP.explain(longer).backend == "torch"
    assert OP.explain(longer._replace(bias=True)).backend == "cpu"
    narrow = "torch" if has_products(torch.bfloat16) else "cpu"
    assert OP.explain(plain._replace(dtype=torch.bfloat16, norm="batch")).backend == narrow
    assert OP.explain(plain._replace(dtype=torch.bfloat16, in_channels=16)).backend == narrow
    assert OP.explain(plain._replace(dtype=torch.bfloat16, in_channels=4)).backend == "torch"
    assert OP.explain(depthwise._replace(dtype=torch.bfloat16, stride=(1,))).backend == narrow


@pytest.mark.parametrize("norm", equations.NORMS)
def test_op_is_registered_as_torch_wants_it(seed, norm):
    tensors = random_tensors(seed, torch.float32, norm, channels=(4, 6), size=(3, 3))
    for x in tensors[:5]:
        if x is not None:
            x.requires_grad_()
    g = geometry(2, 2, 1)
    flat = (*map(list, g[:4]), g.groups, list(g.crop), norm, 1e-5, "silu", 0.0)
    torch.library.opcheck(forward_op, (*tensors, *flat, True, "cpu"))
    out, saved, mean, var = (x.detach() for x in forward_op(*tensors, *flat, True, "cpu"))
    moments = tensors[5:] if norm == "given" else (mean, var) if norm != "none" else (None, None)
    leaves = [None if x is None else x.detach() for x in tensors[:5]]
    mask = [x is not None for x in leaves]
    torch.library.opcheck(backward_op, (torch.randn_like(out), *leaves, *moments, saved, *flat, mask, "cpu"))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (1, 0, 2, 3), (0, 1, 3, 2)], ids=str)
@pytest.mark.parametrize(
    ("channels", "groups", "size", "stride"),
    [((64, 64), 1, 6, 2), ((64, 3), 1, 6, 2), ((64, 64), 64, 6, 2), ((64, 64), 1, 1, 1), ((8, 8), 1, 6, 2)],
    ids=["products", "few outputs", "depthwise", "one position", "torch"],
)
def test_gradients_are_laid_out_as_the_fake_says(seed, order, channels, groups, size, stride):
    """In which order x is in memory, whatever kernel serves: a compiled graph checks it."""
    generator = torch.Generator().manual_seed(seed)
    there = [(4, channels[0], size, size)[axis] for axis in order]
    x = torch.randn(there, generator=generator).permute([order.index(axis) for axis in range(4)])
    weight = torch.randn(channels[0], channels[1] // groups, 4, 4, generator=generator)
    g = geometry(2, stride)._replace(groups=groups)
    flat = (*map(list, g[:4]), g.groups, list(g.crop), "none", 1e-5, "none", 0.0)
    dout = torch.randn_like(forward_op(x, weight, *[None] * 5, *flat, False, "cpu")[0])
    mask = [True, True, False, False, False]
    dx, dweight, *_ = backward_op(dout, x, weight, *[None] * 5, x.new_empty(0), *flat, mask, "cpu")
    assert dx.stride() == torch.empty_like(x).stride() and dweight.stride() == torch.empty_like(weight).stride()
