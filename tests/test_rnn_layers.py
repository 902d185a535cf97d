"""The recurrent layers and Cells around the op: PyTorch's behaviour, what theirs lack, graphs, memory, preference."""

import functools
import multiprocessing

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rnn import CELLS, DTYPES, LAYERS, Problem, cpu, draw, layer_of, name_of, results, triples
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import mmfast
from mmfast import native, numerics
from mmfast.bench.cases import GATES as GATES_OF_CASES
from mmfast.bench.cases import RnnCase
from mmfast.bench.measure import peak_memory
from mmfast.dispatch import asked
from mmfast.nn import rnn as noted_layers
from mmfast.ops.rnn import backends, equations
from mmfast.ops.rnn.backends import OP, native_layer, sizes_of
from mmfast.ops.rnn.cell import most_rows
from mmfast.ops.rnn.equations import MODES, Layer
from mmfast.ops.rnn.op import backward_op, forward_op

# ---- the layers


@pytest.mark.parametrize("label", LAYERS)
@pytest.mark.parametrize("kind", ["tbi", "bti", "packed"])
def test_layers_equal_torch(label, kind):
    """The stack, its dropout drawn as PyTorch draws it, and strided input."""
    batch_first = kind == "bti"
    with pytest.warns(UserWarning) if "L2" not in label else _quiet():
        ours = layer_of(label, batch_first=batch_first, dropout=0.4, backend="cpu")
        theirs = layer_of(label, torch.nn, batch_first=batch_first, dropout=0.4)
    x = torch.randn(5, 3, 8)[:, :, ::2]
    outcomes = []
    for module in (ours, theirs):
        torch.manual_seed(11)
        leaf = x.clone().requires_grad_()
        y, hx = module(pack_padded_sequence(leaf, [5, 3, 1]) if kind == "packed" else leaf)
        y = y.data if kind == "packed" else y
        y.mul(torch.arange(1.0, 1 + y.numel()).view(y.shape) / y.numel()).sum().backward()
        outcomes.append([y, hx, leaf.grad, [p.grad for p in module.parameters()]])
    torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-5)


@pytest.fixture
def left(monkeypatch):
    """How often a layer called PyTorch's function as it had noted, while all calls are left to PyTorch."""
    calls, function = [], noted_layers.recurrent_of_aten
    monkeypatch.setattr(noted_layers, "recurrent_of_aten", lambda *args: calls.append(1) or function(*args))
    monkeypatch.setattr(backends.Cpu, "reluctance", lambda self, case: "for this test")
    OP.forget()
    yield calls
    monkeypatch.undo()
    OP.forget()


@pytest.mark.parametrize("label", LAYERS)
@pytest.mark.parametrize("with_states", [False, True], ids=["zeros", "hx"])
def test_calls_noted_as_pytorchs(label, with_states, left):
    """The second of two equal calls goes to PyTorch's function at once, and gives its result and gradients."""
    ours, theirs = layer_of(label), layer_of(label, torch.nn)
    x = torch.randn(2, 3, 4)
    hx = None
    if with_states:
        hx = tuple(map(torch.randn_like, last)) if isinstance(last := theirs(x)[1], tuple) else torch.randn_like(last)
    outcomes = []
    for module in (ours, ours, theirs):
        leaf = x.clone().requires_grad_()
        y, last = module(leaf, hx)
        outcomes.append([y, last, torch.autograd.grad(y.square().sum(), [leaf, *module.parameters()])])
    assert len(left) == 1
    torch.testing.assert_close(outcomes[1], outcomes[2], rtol=0, atol=0)
    torch.testing.assert_close(outcomes[0], outcomes[2], rtol=0, atol=0)


CHANGES = {
    "weight": (lambda m: setattr(m.weight_hh_l0, "data", torch.randn(4, 4)), {}, RuntimeError, "shapes"),
    "dtype": (lambda m: m.double(), {}, ValueError, "does not match weight dtype"),
    "hx": (lambda m: None, {"hx": torch.zeros(1, 2, 5)}, RuntimeError, "Expected hidden size"),
    "dims": (lambda m: None, {"hx": torch.zeros(3, 5)}, RuntimeError, "hx should also be 3-D"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_after_a_noted_call_are_seen(change, left):
    module, x = mmfast.nn.GRU(4, 5), torch.randn(2, 3, 4)
    module(x), module(x)
    assert len(left) == 1
    act, more, error, words = CHANGES[change]
    act(module)
    with pytest.raises(error, match=words):
        module(x, **more)
    assert len(left) == 1


def _forced(module, x):
    with mmfast.use_backend("cpu"):
        module(x), module(x)


def _autocast(module, x):
    with torch.autocast("cpu", torch.bfloat16):
        module(x), module(x)


def _with(**attributes):
    def act(module, x):
        vars(module).update(attributes)
        module(x), module(x)

    return act


#: calls that another path has to serve, two each: the second may not be taken for one like the first
PASSED_BY = {
    "use_backend": _forced,
    "backend": _with(backend="cpu"),
    "listener": lambda module, x: asked(lambda: (module(x), module(x))),
    "autocast": _autocast,
    "transform": lambda module, x: [torch.func.grad(lambda x: module(x)[0].sum())(x) for _ in range(2)],
    "zoneout": _with(zoneout=0.5),
    "recurrent dropout": _with(recurrent_dropout=0.5),
}


@pytest.mark.parametrize("way", PASSED_BY)
def test_who_asks_or_listens_passes_by_what_is_noted(way, left):
    module, x = mmfast.nn.GRU(4, 5), torch.randn(2, 3, 4)
    module(x), module(x)
    assert len(left) == 1
    PASSED_BY[way](module, x)
    assert len(left) == 1


class _quiet:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


@pytest.mark.parametrize("label", LAYERS)
def test_lengths_of_a_layer(label):
    module, x = layer_of(label, backend="cpu"), torch.randn(7, 3, 4)
    lengths = torch.tensor([3, 7, 1])
    found = module(x, lengths=lengths)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    y, hx = module(packed)
    torch.testing.assert_close(found, (pad_packed_sequence(y, total_length=7)[0], hx))
    with mmfast.use_backend("torch"):
        module.backend = None
        torch.testing.assert_close(module(x, lengths=lengths), found)


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        (torch.tensor([0, 3]), "greater than 0"),
        (torch.tensor([8, 3]), "has only 7 steps"),
        (torch.tensor([3]), "equal to batch_size"),
        (torch.tensor([3.0, 2.0]), "expected integers"),
    ],
    ids=["zero", "long", "few", "float"],
)
def test_wrong_lengths(lengths, words):
    with pytest.raises(RuntimeError, match=words):
        layer_of("GRU")(torch.randn(7, 2, 4), lengths=lengths)


@pytest.mark.parametrize("label", LAYERS)
def test_lengths_go_to_the_inputs_device(label):
    """On meta each look at a number would raise; the mask is what only the formula and the kernels serve."""
    module, x = layer_of(label, device="meta"), torch.randn(7, 2, 4, device="meta")
    lengths, resets = torch.tensor([7, 3]), torch.zeros(7, 2, dtype=torch.bool, device="meta")

    def shapes(outputs):
        return torch.utils._pytree.tree_map(torch.Tensor.size, outputs)

    expected = shapes(module(x))
    assert shapes(module(x, lengths=lengths, reset_mask=resets)) == expected
    assert shapes(module(x, lengths=lengths.to("meta"))) == expected


@pytest.mark.parametrize("label", LAYERS)
@pytest.mark.parametrize("backend", [None, "torch", "cpu", "cuda"])
@pytest.mark.parametrize("shape", [(0, 2, 4), (0, 0, 4), (0, 4)], ids=["batch", "none", "unbatched"])
def test_no_steps(label, backend, shape):
    words = "Expected sequence length to be larger than 0 in RNN"
    for module in (layer_of(label, torch.nn), layer_of(label, backend=backend)):
        with pytest.raises(RuntimeError, match=words):
            module(torch.randn(shape))


def test_lengths_need_padded_input():
    packed = pack_padded_sequence(torch.randn(7, 2, 4), [7, 3])
    for x in (packed, torch.randn(7, 4)):
        with pytest.raises(RuntimeError, match="expected padded 3-D input"):
            layer_of("GRU")(x, lengths=torch.tensor([7, 3]))


@pytest.mark.parametrize("sizes", [[3, 3, 1], [1, 2, 3], [3, 3, 0], [6, 1]], ids=str)
def test_wrong_batch_sizes(sizes):
    """Nothing is read past an end."""
    problem = draw("GRU", (2, 3, 4, 5), states=False)
    layer = Layer("GRU", batch_sizes=torch.tensor(sizes))
    with pytest.raises(RuntimeError, match="never rise and add up"):
        cpu(problem.x.view(6, 4), problem.weights, None, None, layer)


def test_states_of_another_dtype():
    problem = draw("LSTM", (2, 3, 4, 5))
    with pytest.raises(RuntimeError, match=r"torch.float32 on cpu; expected the input's torch.float64"):
        cpu(problem.x, problem.weights, problem.states[0].float(), problem.states[1], problem.layer)


def test_a_parametrized_recurrent_weight_learns():
    """PyTorch's layers go on with the weight that they flattened when they were made."""
    module = layer_of("LSTM")
    torch.nn.utils.parametrizations.spectral_norm(module, "weight_hh_l0")
    module(torch.randn(5, 3, 4))[0].sum().backward()
    assert module.parametrizations.weight_hh_l0.original.grad.abs().max() > 0


def laid_out(a: Tensor, layout: str) -> Tensor:
    """The same numbers with other strides."""
    if layout == "sliced":
        return torch.stack([a, a], -1).flatten(-2)[..., ::2]
    return a.transpose(0, 1).contiguous().transpose(0, 1) if layout == "transposed" and a.dim() > 1 else a


@given(
    st.sampled_from([*MODES, "LSTM-proj"]),
    *[st.integers(0, 9)] * 2,
    *[st.integers(1, 40)] * 2,
    st.sampled_from([1, 2]),
    st.booleans(),
    st.sampled_from(["padded", "packed", "lengths"]),
    st.sampled_from([torch.float32, torch.float64]),
    *[st.sampled_from(["dense", "sliced", "transposed"])] * 2,
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_any_shape(label, steps, batch, inputs, hidden, directions, bias, kind, dtype, layout, of_weights):
    """Outputs and gradients, of any strides."""
    mode, _, proj = label.partition("-")
    shape = max(steps, 1), max(batch, int(kind != "padded")), inputs, hidden
    proj = (hidden + 1) // 2 if proj and hidden > 1 else 0
    problem = draw(mode, shape, directions, seed=steps, kind=kind, bias=bias, proj=proj, dtype=dtype)
    expected = results(equations.sequence, problem)
    x, weights, states, layer = problem.to(dtype)
    weights, states = ([laid_out(a, of_weights) for a in tensors] for tensors in (weights, states))
    found = results(cpu, Problem(laid_out(x, layout), weights, states, layer))
    names = ("y", "hn") if label == "RNN_RELU" and dtype == torch.float32 else expected  # as in triples
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    for name in names:
        torch.testing.assert_close(found[name].double(), expected[name], rtol=tolerance, atol=tolerance, msg=name)


# ---- what PyTorch's layers lack


def pieces_of(length: int, resets: Tensor) -> list[slice]:
    """The parts of a sequence of `length` steps that its resets cut it into."""
    starts = [0, *(t for t in range(1, length) if resets[t])]
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], length], strict=True)]


@pytest.mark.parametrize("label", LAYERS)
@pytest.mark.parametrize("kind", ["padded", "lengths", "packed"])
def test_a_sequence_with_resets_is_its_parts_one_by_one(label, kind):
    module, x = layer_of(label).double(), torch.randn(9, 4, 4, dtype=torch.float64)
    lengths = torch.full((4,), 9) if kind == "padded" else torch.tensor([9, 2, 6, 1])
    resets = torch.rand(9, 4) < 0.3
    if kind == "packed":
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        rows = pack_padded_sequence(resets, lengths, enforce_sorted=False).data
        found = pad_packed_sequence(module(packed, reset_mask=rows)[0])[0]
    else:
        found = module(x, lengths=lengths if kind == "lengths" else None, reset_mask=resets)[0]
    for b, length in enumerate(lengths.tolist()):
        each = [module(x[piece, b])[0] for piece in pieces_of(length, resets[:, b])]
        torch.testing.assert_close(found[:length, b], torch.cat(each))
        assert not found[length:, b].any()


@pytest.mark.parametrize("label", ["RNN", "GRU", "LSTM"])
def test_a_reset_at_step_0_keeps_the_initial_state_out(label):
    module, x = layer_of(label), torch.randn(5, 3, 4)
    hx = tuple(torch.randn(1, 3, 6) for _ in range(2)) if label == "LSTM" else torch.randn(1, 3, 6)
    resets = torch.zeros(5, 3, dtype=torch.uint8)
    torch.testing.assert_close(module(x, hx, reset_mask=resets), module(x, hx))
    resets[0] = 1
    torch.testing.assert_close(module(x, hx, reset_mask=resets), module(x))


@pytest.mark.parametrize("label", LAYERS)
def test_zoneout_and_recurrent_dropout(label):
    """Masks by torch's generator in training, zoneout's mean and no dropout in evaluation."""
    module, x = layer_of(label, zoneout=0.5, recurrent_dropout=0.5), torch.randn(60, 3, 4)
    assert "zoneout=0.5, recurrent_dropout=0.5" in repr(module)
    torch.manual_seed(1)
    y = module(x)[0]
    assert not torch.equal(y, module(x)[0])
    torch.manual_seed(1)
    assert torch.equal(y, module(x)[0])
    module.recurrent_dropout = 0.0
    y = module(x)[0]
    stayed = (y[1:, :, :6] == y[:-1, :, :6]).double().mean()
    assert 0.42 < stayed < 0.58
    module.eval()
    assert torch.equal(module(x)[0], module(x)[0])
    module.zoneout, module.recurrent_dropout = 0.0, 0.5
    torch.testing.assert_close(module(x), layer_of(label).eval()(x))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (
            {"reset_mask": torch.zeros(5, 2, dtype=torch.bool)},
            RuntimeError,
            r"the shape \(5, 2\); expected .* \(7, 2\)",
        ),
        ({"reset_mask": torch.zeros(7, 2)}, RuntimeError, "expected bool or integers"),
        ({"zoneout": 1.0}, ValueError, "zoneout is 1.0; expected a probability"),
        ({"recurrent_dropout": -0.1}, ValueError, "recurrent_dropout is -0.1; expected a probability"),
    ],
    ids=["shape", "float", "zoneout", "recurrent-dropout"],
)
def test_wrong_extras(options, error, words):
    module = layer_of("GRU", **{name: rate for name, rate in options.items() if name != "reset_mask"})
    with pytest.raises(error, match=words):
        module(torch.randn(7, 2, 4), reset_mask=options.get("reset_mask"))


EXTRAS = {
    "resets": ("resets",),
    "zoneout": ("zoneout",),
    "rate": ("rate",),
    "dropout": ("dropout",),
    "all": ("resets", "zoneout", "dropout"),
    "mean": ("resets", "rate", "dropout"),
    "none": (),
}
MODES_AND_PROJECTION = {mode: (mode, 0) for mode in MODES} | {"LSTM-proj": ("LSTM", 7)}


@pytest.mark.parametrize(("mode", "proj"), MODES_AND_PROJECTION.values(), ids=MODES_AND_PROJECTION)
@pytest.mark.parametrize("kind", ["padded", "packed", "lengths"])
@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
def test_extras(mode, proj, kind, extras):
    """The native kernel is the formula, gradients too; one sequence with three threads shares out its units."""
    for batch, threads in ((1, 3), (6, 1)):
        problem = draw(mode, (7, batch, 3, 37), 2, seed=21, kind=kind, proj=proj, extras=extras)
        torch.set_num_threads(threads)
        found, expected = results(cpu, problem), results(equations.sequence, problem)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("mode", "proj"), MODES_AND_PROJECTION.values(), ids=MODES_AND_PROJECTION)
def test_extras_of_each_instruction_set(mode, proj, isa):
    problem = draw(mode, (7, 6, 3, 37), 2, seed=22, kind="packed", proj=proj, extras=EXTRAS["all"])
    found, expected = results(cpu, problem), results(equations.sequence, problem)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("mode", "proj"), MODES_AND_PROJECTION.values(), ids=MODES_AND_PROJECTION)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=name_of)
def test_numerics_of_extras(mode, proj, dtype, seed):
    """By the rule, the yardstick being the formula in torch's operators in this dtype."""

    def one(draw_seed):
        problem = draw(mode, (9, 8, 5, 24), 2, seed=draw_seed, proj=proj, dtype=dtype, extras=EXTRAS["all"])
        return triples(problem, dtype, rival=equations.sequence)

    numerics.assert_pooled(one, first_seed=seed)


@pytest.mark.parametrize("label", ["RNNCell-tanh", "RNNCell-relu", "GRUCell", "LSTMCell"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("batch", [0, 1, 2, 5, 2500])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
def test_cells(label, dtype, batch, bias, isa):
    """Without gradients the cells' own kernel; sizes that fill no vector, strided input, no state."""
    name, _, nonlinearity = label.partition("-")
    options = {"nonlinearity": nonlinearity} if nonlinearity else {}
    theirs = getattr(torch.nn, name)(37, 29, bias=bias, **options).to(dtype)
    ours = getattr(mmfast.nn, name)(37, 29, bias=bias, backend="cpu", **options).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(batch, 74, dtype=dtype)[:, ::2]
    states = torch.randn(batch, 29, dtype=dtype), torch.randn(29, batch, dtype=dtype).t()
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(dtype, 1e-5)
    with torch.no_grad():
        for hx in (states if name == "LSTMCell" else states[1], None):
            torch.testing.assert_close(ours(x, hx), theirs(x, hx), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("label", ["RNNCell-tanh", "RNNCell-relu", "GRUCell", "LSTMCell"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
def test_few_rows_are_given_as_tensors(label, dtype, bias, isa):
    """The kernel's direct call serves plain dense tensors that fit and no others, which another path serves as well."""
    name, _, nonlinearity = label.partition("-")
    mode = {"RNNCell": f"RNN_{nonlinearity.upper()}"}.get(name, name.removesuffix("Cell"))
    options = {"nonlinearity": nonlinearity} if nonlinearity else {}
    theirs = getattr(torch.nn, name)(37, 29, bias=bias, **options).to(dtype)
    ours = getattr(mmfast.nn, name)(37, 29, bias=bias, backend="cpu", **options).to(dtype)
    ours.load_state_dict(theirs.state_dict())

    def direct(x, hx, weights=ours._weights(), most=2):  # noqa: B008
        return native.rnn_cell_direct(MODES[mode], most, x, hx, weights)

    def of(h):
        return (h, h) if name == "LSTMCell" else h

    def draw(*shape):
        return torch.randn(shape, dtype=dtype)

    w_ih, w_hh, *biases = ours._weights()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    with torch.no_grad():
        for batch in (7, 4, 3, 1, 2):
            x, h = draw(batch, 37), draw(batch, 29)
            found = direct(x, of(h), most=batch)
            torch.testing.assert_close(found, theirs(x, of(h)), rtol=tolerance, atol=tolerance)
        others = [
            (draw(2, 74)[:, ::2], h),
            (x, draw(29, 2).t()),
            (torch._neg_view(x), h),
            (x, torch._neg_view(h)),
            (draw(3, 37), draw(3, 29)),
        ]
        for x_other, h_other in others:
            assert direct(x_other, of(h_other)) is None
            found, expected = ours(x_other, of(h_other)), theirs(x_other, of(h_other))
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        assert direct(x[:, 1:], of(h)) is None
        assert direct(x.half(), of(h.half())) is None
        assert direct(x, of(h.to(torch.float64 if dtype == torch.float32 else torch.float32))) is None
        assert direct(x.as_subclass(type("Other", (torch.Tensor,), {})), of(h)) is None
        assert direct(x, None) is None
        assert direct(x[0], of(h[0])) is None
        assert direct(x, of(draw(1, 29))) is None
        assert direct(x, of(h), (w_ih[1:], w_hh, *biases)) is None
        assert direct(x, of(h), (w_ih, w_hh[:, 1:].contiguous(), *biases)) is None
        assert direct(x, of(h), (w_ih, w_hh, None, draw(len(w_ih)))) is None


@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
def test_cells_refuse_as_torch_does(name):
    ours, theirs = getattr(mmfast.nn, name)(5, 6), getattr(torch.nn, name)(5, 6)
    h = torch.randn(2, 6)
    wrong = [
        (torch.randn(2, 4), h),
        (torch.randn(2, 5), torch.randn(2, 7)),
        (torch.randn(2, 5), torch.randn(3, 6)),
        (torch.randn(2, 5, dtype=torch.float64), h),
    ]
    for x, h in wrong:
        hx = (h, h) if name == "LSTMCell" else h
        with torch.no_grad(), pytest.raises(Exception) as expected:
            theirs(x, hx)
        with torch.no_grad(), pytest.raises(type(expected.value)):
            ours(x, hx)


@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
def test_cells_with_weights_elsewhere(name):
    """Never a kernel with the address of another device's memory, also where the choice was made before."""
    with torch.no_grad():
        getattr(mmfast.nn, name)(5, 6, backend="cpu")(torch.randn(1, 5))
        with pytest.raises(RuntimeError):
            getattr(mmfast.nn, name)(5, 6, device="meta", backend="cpu")(torch.randn(1, 5)).sum().item()


# ---- graphs


GRAPHS = [*LAYERS, *CELLS]


def graph_inputs(label: str, kind: str, steps: int, batch: int) -> dict[str, Tensor]:
    if "Cell" in label:
        return {"input": torch.randn(batch, 4)}
    x = {"input": torch.randn(steps, batch, 4)}
    return x if kind == "padded" else {**x, "lengths": torch.arange(batch) % steps + 1}


def per_graph(function):
    """A Cell has no lengths."""
    pairs = [(label, kind) for label in GRAPHS for kind in ("padded", "lengths") if kind == "padded" or label in LAYERS]
    return pytest.mark.parametrize(("label", "kind"), pairs)(function)


@per_graph
def test_compile(label, kind):
    """One graph, compiled once more when T and B change, and never again."""
    torch._dynamo.reset()
    module = layer_of(label)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for steps, batch in ((5, 3), (9, 7), (4, 2), (11, 6)):
        inputs = graph_inputs(label, kind, steps, batch)
        outcomes = []
        for function in (compiled, module):
            leaf = inputs["input"].clone().requires_grad_()
            y = function(**{**inputs, "input": leaf})
            first = y[0] if isinstance(y, tuple) else y
            outcomes.append((y, torch.autograd.grad(first.square().sum(), leaf)))
        torch.testing.assert_close(*outcomes)
    assert counter.frame_count <= 2


#: shape, given, options
GRAPHS_OF_MORE = {
    "T1": ("GRU", (1, 3), [], {}),
    "B1": ("LSTM", (4, 1), ["hx"], {}),
    "proj": ("LSTM", (4, 3), ["hx", "lengths"], {"proj_size": 3, "bidirectional": True}),
    "extras": ("GRU", (4, 3), ["hx", "reset_mask", "lengths"], {"zoneout": 0.3, "recurrent_dropout": 0.3}),
}


@pytest.mark.parametrize("case", GRAPHS_OF_MORE)
def test_compile_of_more(case):
    """Lengths of 0 and above T are clamped, as none is looked at."""
    torch._dynamo.reset()
    label, (steps, batch), given, options = GRAPHS_OF_MORE[case]
    module = layer_of(label, **options)
    x, directions = torch.randn(steps, batch, 4), 2 if module.bidirectional else 1
    states = [torch.randn(directions, batch, size) for size in (options.get("proj_size", 6), 6)]
    more = {"hx": tuple(states) if label == "LSTM" else states[0], "reset_mask": torch.rand(steps, batch) < 0.5}
    more = {name: tensor for name, tensor in more.items() if name in given}
    outcomes = []
    for function, lengths in (
        (torch.compile(module, backend="aot_eager", fullgraph=True), [9, 2, 0]),
        (module, [4, 2, 1]),
    ):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(3)
        y, last = function(leaf, **more, **({"lengths": torch.tensor(lengths)} if "lengths" in given else {}))
        last = [*last] if label == "LSTM" else [last]
        if "lengths" in given and lengths[2] == 0:
            assert not y[:, 2].any()
            assert all(torch.equal(a[:, 2], b[:, 2]) for a, b in zip(last, states, strict=label == "LSTM"))
        y, *last = (a[:, :2] for a in (y, *last))
        outcomes.append((y, last, torch.autograd.grad(y.square().sum(), leaf)))
    torch.testing.assert_close(*outcomes)


@per_graph
def test_export(label, kind):
    module = layer_of(label)
    steps, batch = torch.export.Dim("steps", min=2), torch.export.Dim("batch", min=2)
    shapes = {"input": {0: batch} if "Cell" in label else {0: steps, 1: batch}}
    if kind == "lengths":
        shapes["lengths"] = {0: batch}
    with torch.no_grad():
        program = torch.export.export(module, (), graph_inputs(label, kind, 5, 3), dynamic_shapes=shapes)
    nodes = [node for node in program.graph.nodes if node.op == "call_function" and "mmfast" in str(node.target)]
    # of a Cell Inductor makes more than of an op
    assert len(nodes) == (0 if "Cell" in label else module.num_layers)
    other = graph_inputs(label, kind, 8, 6)
    torch.testing.assert_close(program.module()(**other), module(**other))


@pytest.mark.parametrize("mode", ["RNN_TANH", "LSTM"])
def test_opcheck(mode):
    problem = draw(mode, (3, 2, 4, 5), 2, seed=15, kind="lengths")
    x, weights = problem.x.requires_grad_(), [w.requires_grad_() for w in problem.weights]
    states = (*problem.states, None)[:2]
    columns = (problem.layer.lengths, None, None, None, None, 0.0, mode, 2)
    torch.library.opcheck(forward_op, (x, weights, *states, *columns, True, "cpu"))
    with torch.no_grad():
        y, hn, _, gates, cell = forward_op(x, weights, *states, *columns, True, "cpu")
    need = [True, *(s is not None for s in states), *[True] * len(weights)]
    given = torch.randn_like(y), torch.randn_like(hn), None
    tests = ("test_schema", "test_faketensor")
    with torch.no_grad():
        torch.library.opcheck(
            backward_op, (*given, x, weights, *states, y, gates, cell, *columns, need, "cpu"), test_utils=tests
        )


# ---- memory and preference


@pytest.mark.parametrize("mode", GATES_OF_CASES)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_peak_memory(mode, packed):
    """Forward + backward: at most 1.05 times PyTorch's; here a third to three quarters."""
    case = RnnCase("memory", mode, 256, 32, 64, 128, packed=packed)
    (x,) = case.inputs(torch.Generator().manual_seed(0), torch.float32, "cpu")
    least = []
    for nn in (mmfast.nn, torch.nn):
        module, leaf = case.build(nn), x.clone().requires_grad_()
        module.backend = "cpu"

        def train(module=module, leaf=leaf):
            y = case.run(module, leaf)
            return torch.autograd.grad(y, [leaf, *module.parameters()], torch.ones_like(y))

        train()
        peaks = [peak_memory(train, "cpu") for _ in range(3)]
        if None in peaks:
            pytest.skip("this system does not tell a process's peak memory")
        least.append(min(peaks))
    ours, theirs = least
    assert 0 < ours <= 1.05 * theirs


def backends_of(module, *inputs) -> list[str]:
    """What serves a call of the module on each input."""
    return [OP.explain(case).backend for x in inputs for _, case in asked(functools.partial(module, x))]


@pytest.mark.parametrize("intel", [False, True], ids=["AMD", "Intel"])
def test_a_penalty_of_an_lstm_is_not_left_to_torch(monkeypatch, intel):
    """oneDNN's LSTM differentiated twice is a loop over operators."""
    monkeypatch.setattr(native, "isa", lambda: "avx512")
    monkeypatch.setattr(native, "is_intel", lambda: intel)
    leaf = torch.randn(64, 16, 16, requires_grad=True)
    chosen = backends_of(mmfast.nn.LSTM(16, 64), leaf.detach(), leaf, leaf * 1)
    assert chosen == ["cpu"] * 3


def test_lstms_on_intel(monkeypatch):
    """Where oneDNN's was measured faster; with what PyTorch lacks it is no rival."""
    monkeypatch.setattr(native, "isa", lambda: "avx512")
    monkeypatch.setattr(native, "is_intel", lambda: True)
    module = mmfast.nn.LSTM(16, 64)
    assert backends_of(module, torch.randn(8, 16, 16), torch.randn(8, 64, 16)) == ["torch", "cpu"]
    with torch.no_grad():
        assert backends_of(module, torch.randn(20, 16, 16)) == ["torch"]
        module.zoneout = 0.1
        assert backends_of(module, torch.randn(20, 16, 16)) == ["cpu"]


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_lstms_with_a_projection_are_a_loops_but_for_few_steps(monkeypatch, isa):
    """oneDNN has no projection: PyTorch's is a loop over operators, as its GRU is."""
    monkeypatch.setattr(native, "isa", lambda: isa)
    monkeypatch.setattr(native, "is_intel", lambda: False)
    module = mmfast.nn.LSTM(16, 130, proj_size=8)
    x = torch.randn(2, 16, 16), torch.randn(64, 16, 16), torch.randn(128, 64, 16)
    assert backends_of(module, *x) == ["torch", "cpu", "cpu"]
    with torch.no_grad():
        assert backends_of(module, *x) == ["torch", "cpu", "cpu"]


def test_few_rows_of_heavy_layers_are_a_loops(monkeypatch):
    monkeypatch.setattr(native, "beats_mkl", lambda: True)
    x = torch.randn(4, 12, 16), torch.randn(4, 13, 16), torch.randn(1, 48, 16), torch.randn(1, 49, 16)
    module = mmfast.nn.GRU(16, 600)
    assert backends_of(module, *x) == ["cpu", "cpu", "torch", "cpu"]
    with torch.no_grad():
        assert backends_of(module, *x) == ["torch", "cpu", "torch", "cpu"]


def test_lstms_where_products_beat_mkls(monkeypatch):
    """AMD's AVX-512: all that trains but a few steps of tiny layers, and of few rows of large ones."""
    monkeypatch.setattr(native, "isa", lambda: "avx512")
    monkeypatch.setattr(native, "beats_mkl", lambda: True)
    monkeypatch.setattr(native, "is_intel", lambda: False)
    steps = torch.randn(1, 16, 16), torch.randn(16, 8, 16), torch.randn(17, 8, 16)
    assert backends_of(mmfast.nn.LSTM(16, 64), *steps) == ["cpu"] * 3
    assert backends_of(mmfast.nn.LSTM(16, 15), *steps) == ["torch", "cpu", "cpu"]
    assert backends_of(mmfast.nn.LSTM(16, 512), *steps) == ["torch", "torch", "cpu"]
    x = torch.randn(64, 16, 64, requires_grad=True)
    assert backends_of(mmfast.nn.LSTM(64, 128), x.detach(), x, x * 1) == ["cpu", "cpu", "torch"]
    with torch.no_grad():
        assert backends_of(mmfast.nn.LSTM(16, 64), torch.randn(12, 16, 16), torch.randn(16, 16, 16)) == ["cpu", "torch"]


@pytest.mark.parametrize("intel", [False, True], ids=["AMD", "Intel"])
def test_cells_without_gradients(monkeypatch, intel):
    monkeypatch.setattr(native, "is_intel", lambda: intel)
    x = torch.randn(4, 8)
    with torch.no_grad():
        chosen = [backends_of(getattr(mmfast.nn, name)(8, 16), x) for name in ("RNNCell", "GRUCell", "LSTMCell")]
    assert chosen == [["torch" if intel else "cpu"], ["cpu"], ["cpu"]]


@pytest.mark.parametrize(
    ("isa", "intel", "threads", "rows"),
    [
        ("avx512", False, 1, (64, 32, 32)),
        ("avx512", False, 2, (32, 16, 2)),
        ("avx2", False, 1, (256, 64, 2)),
        ("avx2", False, 2, (128, 32, 2)),
        ("avx512", True, 1, (2, 2, 2)),
        ("baseline", False, 1, (2, 2, 2)),
    ],
)
def test_rows_of_a_cell_that_the_kernel_multiplies(monkeypatch, isa, intel, threads, rows):
    """Of an RNNCell and an LSTMCell of 128 units, and of an LSTMCell of 1024."""
    monkeypatch.setattr(native, "isa", lambda: isa)
    monkeypatch.setattr(native, "is_intel", lambda: intel)
    torch.set_num_threads(threads)
    assert tuple(most_rows(*torch.empty(2, gates * n, n)) for gates, n in ((1, 128), (4, 128), (4, 1024))) == rows


def test_wide_steps_in_bfloat16_are_amxs(monkeypatch):
    monkeypatch.setattr(backends, "_multiplies_by_amx", lambda: True)
    narrow, broad = (mmfast.nn.GRU(8, hidden).bfloat16() for hidden in (255, 256))
    inputs = [torch.randn(9, batch, 8, dtype=torch.bfloat16) for batch in (31, 32, 127, 128)]
    assert backends_of(broad, *inputs) == ["cpu", "cpu", "cpu", "torch"]
    with torch.no_grad():
        assert backends_of(broad, *inputs) == ["cpu", "torch", "torch", "torch"]
        assert backends_of(narrow, *inputs) == ["cpu"] * 4
        monkeypatch.setattr(backends, "_multiplies_by_amx", lambda: False)
        assert backends_of(broad, *inputs) == ["cpu"] * 4


# ---- processes


def test_fork_after_a_parallel_region():
    """As in a DataLoader's worker: the kernel, though it is given two threads, runs on the one that a fork has left."""
    problem = draw("GRU", (50, 4, 8, 64), seed=1)
    parts = equations.split(problem.weights, 1)
    gx = problem.x.view(200, 8) @ parts[0].w_ih.T
    torch.set_num_threads(2)
    row, alive = native_layer(problem.layer, sizes_of(*problem[:2], problem.layer), parts, None, None)
    y, hn = gx.new_empty(200, 64), gx.new_empty(1, 4, 64)

    def total() -> float:
        y.fill_(float("nan"))
        native.cpu_rnn_forward(row, gx, (None, None), (y, hn, None), [None])
        return sum(y.flatten().tolist())

    expected = total()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=lambda: queue.put(total()))
    process.start()
    assert queue.get(timeout=60) == expected
    process.join()
    del alive
