"""torch.compile of what mmfast serves: as few guards as may be, and for a static small size PyTorch's own op."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import softplus

import mmfast
from mmfast import nn


def guards(function: Callable, *inputs: Tensor) -> int:
    """How many guards a graph has, each of which takes some 20 ns a call or more."""
    found = []

    def look(entries):
        found.append(len(entries))
        return [True] * len(entries)

    torch.compiler.reset()
    torch.compile(function, backend="eager", fullgraph=True, options={"guard_filter_fn": look})(*inputs)
    return found[0]


def targets(function: Callable, *calls: tuple[Tensor, ...]) -> list[list[str]]:
    """What each graph calls that is compiled for these calls, one after another."""
    found = []

    def look(graph, _):
        found.append([str(node.target) for node in graph.graph.nodes if node.op.startswith("call")])
        return graph

    torch.compiler.reset()
    compiled = torch.compile(function, backend=look, fullgraph=True)
    for inputs in calls:
        torch.testing.assert_close(compiled(*inputs), function(*inputs))
    return found


def plain(real: Tensor, fake: Tensor) -> Tensor:
    return softplus(-real).mean() + softplus(fake).mean()


@pytest.mark.parametrize("mode", ["non-saturating", "hinge", "lsgan"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_guards_of_a_loss(mode, scale):
    """There were 150 more than the plain formula's, and 64 logits took 0.89 of its speed."""
    loss, (real, fake) = nn.AdversarialLoss(mode, scale), torch.randn(2, 64)
    least = guards(plain, real, fake)
    assert guards(loss.discriminator, real, fake) <= least + 45
    assert guards(loss.generator, fake) <= least + 45
    assert guards(lambda *logits: loss.discriminator([*logits], [*logits]), real, fake) <= least + 50


def test_a_loss_in_a_graph_is_the_formula():
    """Whatever way it takes through the house."""
    real, fake = torch.randn(2, 9)
    logits = {"tensor": (real, fake), "list": ([real, fake], [fake, real]), "half": (real.half(), fake.half())}
    for mode in ("non-saturating", "hinge", "relativistic", "relativistic-average"):
        for options in (
            {},
            {"scale": 0.5},
            {"scale": 2},
            {"across": "mean"},
            {"reduction": "sum"},
            {"reduction": "none"},
        ):
            loss = nn.AdversarialLoss(mode, **options)
            for given in logits.values():
                torch.compiler.reset()
                for call in (loss.discriminator, lambda real, fake, loss=loss: loss.generator(fake, real)):
                    compiled = torch.compile(call, backend="eager", fullgraph=True)
                    torch.testing.assert_close(compiled(*given), call(*given))


def test_a_loss_in_a_graph_under_autocast():
    """Computes in float32, as in eager."""
    loss, (real, fake) = nn.AdversarialLoss(), torch.randn(2, 9).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.compile(loss.discriminator, backend="eager", fullgraph=True)(real, fake)
        expected = loss.discriminator(real, fake)
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected)


def test_a_loss_for_any_scale():
    """One more graph when the scale changes, and smoothing does, and never again."""
    real, fake = torch.randn(2, 9)
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    def call(scale, smoothing):
        return mmfast.functional.adversarial_discriminator_loss(real, fake, scale=scale, smoothing=smoothing)

    compiled = torch.compile(call, backend=count, fullgraph=True)
    for scale, smoothing in ((0.5, 0.1), (0.6, 0.2), (0.7, 0.3), (0.8, 0.4)):
        torch.testing.assert_close(compiled(scale, smoothing), call(scale, smoothing))
    assert len(graphs) <= 2


@pytest.mark.parametrize("wrong", [{"mode": "none"}, {"reduction": "max"}, {"across": "max"}, {"smoothing": (0.1,)}])
def test_errors_of_a_compiled_loss(wrong):
    real, fake = torch.randn(2, 9)

    def call(real, fake):
        return mmfast.functional.adversarial_discriminator_loss(real, fake, **wrong)

    with pytest.raises(ValueError) as expected:
        call(real, fake)
    with pytest.raises(ValueError, match=r".") as found:
        torch.compile(call, backend="eager")(real, fake)
    assert str(found.value) == str(expected.value)


def test_a_tensor_as_scale_is_refused_in_a_graph():
    def call(x):
        return mmfast.functional.adversarial_generator_loss(x, scale=x[0])

    with pytest.raises(TypeError, match="scale is a Tensor; expected a number"):
        torch.compile(call, backend="eager")(torch.ones(3))


def test_a_small_convolution_is_torchs_in_a_static_graph():
    """As in eager; a graph for any size is not compiled again for another, and is served as large ones are."""
    layer = nn.ConvTranspose2d(16, 3, 4, 2, 1)
    calls = [(torch.randn(1, 16, size, size),) for size in (4, 5, 6, 7)]
    static, dynamic = targets(layer, *calls)
    assert not any("mmfast" in target for target in static)
    assert sum("mmfast" in target for target in dynamic) == 1
    (large,) = targets(layer, (torch.randn(8, 16, 40, 40),))
    assert sum("mmfast" in target for target in large) == 1


def test_taps_that_do_not_overlap_are_torchs_in_a_graph_without_gradients():
    layer, x = nn.ConvTranspose2d(64, 64, 2, 2), torch.randn(2, 64, 16, 16)
    (trained,) = targets(layer, (x,))
    with torch.no_grad():
        (inferred,) = targets(layer, (x,))
    assert [sum("mmfast" in target for target in graph) for graph in (trained, inferred)] == [1, 0]


def test_guards_of_a_convolution():
    x = torch.randn(1, 16, 4, 4)
    ours, theirs = (module.ConvTranspose2d(16, 8, 4, 2, 1) for module in (nn, torch.nn))
    assert guards(ours, x) <= guards(theirs, x) + 25
    ours, theirs = (module.Sequential(layer, torch.nn.ReLU()) for module, layer in ((nn, ours), (torch.nn, theirs)))
    assert guards(ours, x) <= guards(theirs, x) + 35


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_guards_of_a_recurrent_layer(name):
    """Beside those of PyTorch's Cell, for its layers are in no graph; a constant of eight elements is nine more."""
    least = guards(getattr(torch.nn, f"{name}Cell")(4, 8), torch.randn(3, 4))
    layer = getattr(nn, name)(4, 8)
    assert guards(layer, torch.randn(30, 3, 4)) <= least + 100
    assert guards(layer, torch.randn(2, 3, 4)) <= least + 130


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_a_step_or_two_of_a_layer_is_a_formula_in_a_static_graph(name):
    """And the op, in the one graph for any other number of steps, for more steps or many units, and where a backend is
    asked for."""
    layer = getattr(nn, name)(4, 8)

    def is_op(*calls):
        return [any("mmfast" in target for target in graph) for graph in targets(layer, *calls)]

    calls = [(torch.randn(steps, 3, 4),) for steps in (2, 9, 4, 7)]
    assert is_op(*calls) == [False, True]
    assert is_op((torch.randn(1, 600, 4),)) == is_op((torch.randn(7, 3, 4),)) == [True]
    with mmfast.use_backend("cpu"):
        assert is_op(calls[0]) == [True]
    layer.backend = "cpu"
    assert is_op(calls[0]) == [True]
    # PyTorch's own, which no graph holds
    layer.backend = "torch"
    with pytest.raises(torch._dynamo.exc.Unsupported):
        is_op(calls[0])


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}])
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_gradients_of_a_step_or_two(name, options):
    layer = getattr(nn, name)(4, 8, **options)
    x, found = torch.randn(2, 2, 4, requires_grad=True), []
    for function in (torch.compile(layer, backend="aot_eager", fullgraph=True), layer):
        y, last = function(x)
        found.append((y, last, torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])))
    torch.testing.assert_close(*found)


def test_a_graph_calls_the_kernels_overload():
    """Whose Autograd key is no Python: of 101 us that a layer's forward takes in a graph, that were 6."""
    layer, x = nn.LSTM(4, 8), torch.randn(30, 3, 4)
    with torch.no_grad():
        graph = make_fx(layer, tracing_mode="fake", _allow_non_fake_inputs=True)(x)
    assert [str(node.target) for node in graph.graph.nodes if "mmfast" in str(node.target)] == [
        "mmfast.rnn_forward.kernel"
    ]
