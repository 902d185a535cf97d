"""The adversarial op: the same tests for every backend that can run here.

On a machine without a GPU these are PyTorch, the CPU kernel under each instruction set of the processor and the CUDA
kernel on the emulator; on one with a GPU the CUDA and Triton kernels on it as well. The Triton interpreter needs a
process of its own: test_triton_interpreter.py runs this file there, with TRITON_INTERPRET=1.
"""

import functools
import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from published import PUBLISHED, bce
from torch import Tensor
from torch.nn import functional as F

import mmfast
from mmfast import native, numerics
from mmfast.ops.adversarial import equations
from mmfast.ops.adversarial.backends import OP
from mmfast.ops.adversarial.equations import LECAM, MODES, Inputs, Term, Terms, columns_of
from mmfast.ops.adversarial.op import backward_op, forward_op, loss

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

pytestmark = pytest.mark.usefixtures("poisoned_memory")


class Served(NamedTuple):
    """A backend as tests ask for it: its name, the device of its tensors, and for the CPU its instruction set."""

    name: str
    device: str
    isa: str = ""

    @property
    def label(self) -> str:
        return f"{self.name}-{self.isa or self.device}"

    @property
    def dtypes(self) -> list[torch.dtype]:
        if self.name == "triton":
            return [torch.float32, torch.float16] + [torch.bfloat16] * (self.device == "cuda")
        return [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def _served() -> list[Served]:
    if INTERPRETED:
        return [Served("triton", "cpu")]
    served = [Served("torch", "cpu"), *(Served("cpu", "cpu", isa) for isa in native.supported_isas())]
    served.append(Served("cuda", "cpu"))
    if torch.cuda.is_available():
        served += [Served(name, "cuda") for name in ("torch", "cuda", "triton")]
    return served


SERVED = _served()
KERNELS = [served for served in SERVED if served.name != "torch"]
BEST = [served for served in SERVED if served.isa in ("", native.supported_isas()[-1])]
DEVICES = sorted({served.device for served in SERVED})


def by_backend(among, dtypes=None):
    """One parameter, (backend, dtype), for each dtype that the backend serves; (backend) alone without dtypes."""
    if dtypes is None:
        return pytest.mark.parametrize("served", among, ids=lambda served: served.label, indirect=True)
    # backends vary fastest, so that they share what a test computed once
    pairs = [(s, d) for d in dtypes for s in among if d in s.dtypes]
    ids = [f"{served.label}-{str(dtype).removeprefix('torch.')}" for served, dtype in pairs]
    return pytest.mark.parametrize(("served", "dtype"), pairs, ids=ids, indirect=["served"])


@pytest.fixture
def served(request):
    """The backend under test, under its instruction set."""
    before = native.isa()
    native.set_isa(request.param.isa or before)
    native.emulator_order(request.config.option.seed)
    yield request.param
    native.set_isa(before)
    native.emulator_order(0)


def test_memory_is_poisoned():
    assert torch.empty(7).isnan().all()


LOW = (torch.float32, torch.float16, torch.bfloat16)
ALL = (*LOW, torch.float64)

# what each phi of a term stands for, as PyTorch users write it
PHI = {
    equations.SOFTPLUS: F.softplus,
    equations.SQUARE: Tensor.square,
    equations.RELU: F.relu,
    equations.SIGMOID: Tensor.sigmoid,
}

# one mode for each phi of the table, and those with terms of their own
PLAIN = ["non-saturating", "minimax", "hinge", "lsgan", "wasserstein", "tanh-hinge"]


class Pool:
    """Enough random rows of n logits for the rule, in lists with a cotangent each; the truth and the yardstick."""

    # a program takes the interpreter a millisecond: there too few values to pool, which are held to float32 instead
    LIST, LISTS, SIZES = (12, 3, (129,)) if INTERPRETED else (66, -(-numerics.ENOUGH // 66), (1, 63, 129))

    def __init__(self, seed: int, dtype: torch.dtype, mode: str, mean: bool, n: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        lists = self.LISTS
        self.mean = mean
        self.logits = (torch.randn(lists, self.LIST, n, generator=generator) * 3).to(dtype)
        self.cotangents = (torch.randn(lists, generator=generator) + 2).to(dtype)
        weights = (torch.rand(3, generator=generator, dtype=torch.float64) + 0.5).tolist()
        self.terms = [term._replace(weight=w * term.weight) for term, w in zip(MODES[mode][:3], weights, strict=True)]
        self.reference = self._formula(torch.float64)
        self.yardstick = self._formula(dtype)

    def _formula(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Values (lists, LIST) and gradients, the k-th of a list by term k modulo 3, by PyTorch's own functions."""
        logits = self.logits.to(dtype).requires_grad_()
        values = []
        for k, (phi, sign, shift, weight, _) in enumerate(self.terms):
            x = logits[:, k :: len(self.terms)]
            y = PHI.get(phi, Tensor.clone)(sign * x + shift)
            values.append(weight * (y.mean(-1) if self.mean else y.sum(-1)))
        values = torch.stack(values, -1).flatten(1)
        gradients = torch.autograd.grad(values, logits, self.cotangents.to(dtype)[:, None].expand_as(values))
        return values.detach(), gradients[0]

    def run(self, served: Served):
        """(total, values, gradients (LIST, n)) of each list, by the backend."""
        terms = self.terms * (self.LIST // len(self.terms))
        for rows, cotangent in zip(self.logits.to(served.device), self.cotangents.to(served.device), strict=True):
            logits = [x.requires_grad_() for x in rows.unbind()]
            total, values = loss(Terms(terms), self.mean, Inputs(logits), served.name, True)
            yield total.detach(), values, torch.stack(torch.autograd.grad(total, logits, cotangent))


@functools.lru_cache(maxsize=2)
def pool(*arguments) -> Pool:
    return Pool(*arguments)


def check_total(total: Tensor, values: Tensor) -> None:
    """total is the values' sum, each value rounded at most once, and the total once more."""
    values = values.double().cpu()
    roundings = sum(0.5 * numerics.ulp(abs(value), torch.float32) for value in values.tolist())
    exact = float(values.sum())
    if abs(exact) < torch.finfo(total.dtype).max:
        assert abs(float(total) - exact) <= roundings + 0.5 * numerics.ulp(abs(exact), total.dtype)
    else:
        assert total.isinf()


@by_backend(KERNELS, LOW)
@pytest.mark.parametrize(
    ("mode", "mean", "n"),
    [(mode, True, n) for mode in PLAIN for n in Pool.SIZES] + [(mode, False, Pool.SIZES[-1]) for mode in PLAIN],
    ids=lambda value: {True: "mean", False: "sum"}[value] if isinstance(value, bool) else None,
)
def test_numerics(request, served, dtype, mode, mean, n):
    check_rule(pool(request.config.option.seed, dtype, mode, mean, n), served)


def check_rule(drawn, served: Served) -> None:
    values, gradients = numerics.Errors("values"), numerics.Errors("dlogits")
    for k, (total, ours, dlogits) in enumerate(drawn.run(served)):
        check_total(total, ours.flatten())
        # of real and fake logits of one discriminator
        ours = ours.cpu().view(len(drawn.reference[0][k]), -1).sum(-1)
        values.add(ours, drawn.yardstick[0][k].to(ours.dtype), drawn.reference[0][k])
        gradients.add(dlogits.cpu(), drawn.yardstick[1][k], drawn.reference[1][k])
    gradients.check()
    if values.enough:
        values.check()
    else:
        largest = float(drawn.reference[0].abs().max())
        assert values.compare().ours.max < 16 * numerics.ulp(largest, torch.float32)


def discriminator(mode: str, weights: tuple[str, ...] = (), **options):
    """The loss of lists of logits, (total, values), by the backend; with these weights, a list's samples' own."""

    def ours(real, fake, more, backend):
        given = dict(zip(weights, more[0], strict=False))
        return mmfast.functional.adversarial_discriminator_loss(
            real, fake, mode, return_values=True, backend=backend, **given, **options
        )

    return ours


def features(**options):
    def ours(real, fake, more, backend):
        # a factor for each map, or else all gradients of a list were one number, up to its sign
        return mmfast.functional.feature_matching(
            real,
            fake,
            weights=more[:, 0, 0].tolist(),
            detach=False,
            return_values=True,
            backend=backend,
            **options,
        )

    return ours


def lecam(real, fake, more, backend):
    """The penalty, which as a function tells of no values; more: the means of both sides, (K, 2, ...)."""
    logits = [x for pair in zip(real, fake, strict=True) for x in pair]
    centres = more[:, :, 0].flip(-1).flatten().float()
    return loss(Terms(LECAM * len(real)), True, Inputs(logits, (), (), centres), backend, True)


def by_sample(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight[:, None]


BOTH = ("real_weight", "fake_weight")

# what has terms of its own besides PLAIN's: by mmfast, and as PyTorch users write it of one discriminator's real and
# fake logits, (3, n), and more, (2, 3): weights of their samples, means, or factors
OTHERS = {
    **{
        mode: (discriminator(mode), lambda r, f, more, published=PUBLISHED[mode][0]: published(r, f))
        for mode in MODES
        if MODES[mode].pairing or mode == "leaky-lsgan"
    },
    "smoothed": (
        discriminator("non-saturating", smoothing=(0.1, 0.2)),
        lambda r, f, more: bce(r, 0.9) + bce(f, 0.2),
    ),
    "weighted sum": (
        discriminator("lsgan", BOTH, reduction="sum"),
        lambda r, f, w: by_sample((r - 1) ** 2, w[0]).sum() + by_sample(f**2, w[1]).sum(),
    ),
    "weighted averages": (
        discriminator("relativistic-average", BOTH),
        lambda r, f, w: (
            by_sample(F.softplus(f.mean() - r), w[0]).mean() + by_sample(F.softplus(f - r.mean()), w[1]).mean()
        ),
    ),
    "weighted pairs": (
        discriminator("relativistic", BOTH[:1]),
        lambda r, f, w: by_sample(F.softplus(f - r), w[0]).mean(),
    ),
    "lecam": (
        lecam,
        lambda r, f, m: F.relu(r - m[1, 0]).square().mean() + F.relu(m[0, 0] - f).square().mean(),
    ),
    "l1": (features(), lambda r, f, m: F.l1_loss(f, r) * m[0, 0]),
    "l2": (features(distance="l2"), lambda r, f, m: F.mse_loss(f, r) * m[0, 0]),
    "relative": (features(relative=True), lambda r, f, m: F.l1_loss(f, r) / r.detach().abs().mean() * m[0, 0]),
}

# in the interpreter there is time for so few lists that their factors' roundings, one for all logits of a list, decide
RULED = [] if INTERPRETED else list(OTHERS)


class OtherPool:
    """The same as Pool of `OTHERS`, of lists of real and fake logits, (3, n) each."""

    LISTS, LIST, N = Pool.LISTS, Pool.LIST, 11

    def __init__(self, seed: int, dtype: torch.dtype, name: str) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = self.LISTS, self.LIST
        self.ours, self.formula = OTHERS[name]
        self.logits = [(torch.randn(*shape, 3, self.N, generator=generator) * 3).to(dtype) for _ in range(2)]
        for x, other in (self.logits, self.logits[::-1]):
            # off the kinks of hinge, where the rounding of a mean decides on the slope
            distance = (x.double() - other.double().mean((-2, -1), keepdim=True)).abs()
            x[(distance - 1).abs() < 1e-5] += 0.0625
        more = (torch.rand(*shape, 2, 3, generator=generator) + 0.5).to(dtype)
        self.more = more[:, :1].expand_as(more) if "weighted" in name else more
        self.cotangents = (torch.randn(shape[0], generator=generator) + 2).to(dtype)
        self.reference = self._formula(torch.float64)
        self.yardstick = self._formula(dtype)

    def _formula(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Values (lists, LIST) and gradients (lists, real and fake, LIST, 3, n)."""
        logits = [x.to(dtype, copy=True).requires_grad_() for x in self.logits]
        values = torch.vmap(torch.vmap(self.formula))(*logits, self.more.to(dtype))
        gradients = torch.autograd.grad(values, logits, self.cotangents.to(dtype)[:, None].expand_as(values))
        return values.detach(), torch.stack(gradients, 1)

    def run(self, served: Served):
        # the emulator takes 30 ms for a list: its values are then too few for the rule, and held to float32 instead
        lists = 8 if served.name == "cuda" and served.device == "cpu" else self.LISTS
        drawn = [x[:lists].to(served.device) for x in (*self.logits, self.more, self.cotangents)]
        for real, fake, more, cotangent in zip(*drawn, strict=True):
            logits = [x.requires_grad_() for x in (*real.unbind(), *fake.unbind())]
            total, values = self.ours(logits[: self.LIST], logits[self.LIST :], more, served.name)
            gradients = torch.autograd.grad(total, logits, cotangent)
            yield total.detach(), values, torch.stack(gradients).unflatten(0, (2, -1))


@functools.lru_cache(maxsize=2)
def other_pool(*arguments) -> OtherPool:
    return OtherPool(*arguments)


@by_backend(KERNELS, LOW)
@pytest.mark.parametrize("name", RULED)
def test_numerics_of_other_losses(request, served, dtype, name):
    check_rule(other_pool(request.config.option.seed, dtype, name), served)


def logits_of(generator: torch.Generator, dtype: torch.dtype, *shapes) -> list[Tensor]:
    return [(torch.randn(shape, generator=generator) * 3).to(dtype) for shape in shapes]


def plain_loss(mode: str, real: list[Tensor], fake: list[Tensor], scale: float) -> Tensor:
    """The discriminator's loss as PyTorch users write it."""
    total = 0
    for r, f in zip(real, fake, strict=True):
        if mode == "non-saturating":
            total = total + F.softplus(-r).mean() + F.softplus(f).mean()
        elif mode == "hinge":
            total = total + F.relu(1 - r).mean() + F.relu(1 + f).mean()
        elif mode == "lsgan":
            total = total + ((r - 1) ** 2).mean() + (f**2).mean()
        else:
            total = total - r.mean() + f.mean()
    return scale * total


SHAPES = {
    "scalar": [()],
    "odd": [(3, 43)],
    "patches": [(2, 1, 30, 31)],
    "ragged": [(7, 9), (1,), (), (2049,), (2, 0, 3), (3, 1, 43), (4097,)],
}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float64: 1e-12}


@by_backend(SERVED, ALL)
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("mode", ["non-saturating", "hinge", "lsgan", "wasserstein"])
def test_public_functions(seed, served, dtype, mode, shapes):
    """The discriminator's and the generator's loss and their gradients, of a tensor and of a list."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [shape for shape in SHAPES[shapes] if 0 not in shape]
    real, fake = logits_of(generator, dtype, *shapes), logits_of(generator, dtype, *shapes)
    scale = 0.5 + float(torch.rand((), generator=generator))

    def gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
        return [g.cpu().double() for g in torch.autograd.grad(out, inputs)]

    exact = [x.double().requires_grad_() for x in (*real, *fake)]
    ours = [x.to(served.device).requires_grad_() for x in (*real, *fake)]
    half = len(shapes)
    listed = [x[0] if half == 1 else x for x in (ours[:half], ours[half:])]
    expected = plain_loss(mode, exact[:half], exact[half:], scale)
    out = mmfast.functional.adversarial_discriminator_loss(*listed, mode, scale=scale, backend=served.name)
    assert out.dtype == dtype
    assert out.shape == ()
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(out.detach().cpu().double(), expected.detach(), **close)
    torch.testing.assert_close(gradients(out, ours), gradients(expected, exact), **close)

    module = mmfast.nn.AdversarialLoss(mode, scale, backend=served.name)
    out = module.generator(listed[1])
    role = MODES[mode].generator
    expected = scale * equations.total([role] * half, True, Inputs(exact[half:]))
    torch.testing.assert_close(out.detach().cpu().double(), expected.detach(), **close)
    torch.testing.assert_close(gradients(out, ours[half:]), gradients(expected, exact[half:]), **close)
    torch.testing.assert_close(
        module.discriminator(*listed),
        mmfast.functional.adversarial_discriminator_loss(*listed, mode, scale=scale, backend=served.name),
        rtol=0,
        atol=0,
    )


def evaluate(served: Served, terms, mean: bool, logits: list[Tensor], cotangent: float = 1.75):
    """(total, values, gradients) on the CPU."""
    logits = [x.to(served.device).detach().requires_grad_() for x in logits]
    total, values = loss(Terms(terms), mean, Inputs(logits), served.name, True)
    gradients = torch.autograd.grad(total, logits, torch.full_like(total, cotangent))
    return total.detach().cpu(), values.cpu(), [g.cpu() for g in gradients]


@by_backend(SERVED, LOW)
@pytest.mark.parametrize("mean", [True, False], ids=["mean", "sum"])
# Triton's interpreter computes by numpy, which tells of infinities
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
def test_extreme_logits(served, dtype, mean):
    """NaN, infinities, 1e4, and what exp underflows and overflows on: the pattern and the values of float64."""
    numbers = [float("nan"), float("inf"), -float("inf"), 1e4, -1e4, 0.0, -0.0, 88.5, -88.5, 110.0, -110.0, 17.0, -17.0]
    numbers += [1e-6, -1e-6, 1.0, -1.0]
    terms, logits = [], []
    for phi in range(9):
        terms += [Term(phi, (-1.0) ** phi, 0.5 * (phi % 4), 0.75, -0.1)] * len(numbers)
        logits += [torch.tensor([x], dtype=dtype) for x in numbers]
    _, values, gradients = evaluate(served, terms, mean, logits)
    exact = [x.double().requires_grad_() for x in logits]
    expected = torch.stack(equations.values(terms, mean, Inputs(exact)))
    expected_gradients = torch.autograd.grad(expected.sum(), exact, torch.tensor(1.75, dtype=torch.float64))
    # the torch backend rounds each step to the dtype, where squares of 1e4 overflow in float16
    inexact = served.name == "torch"
    step = torch.finfo(dtype if inexact else torch.float32).eps
    finite = expected.abs() < (torch.finfo(dtype).max if inexact else 1e30)
    torch.testing.assert_close(values[finite].double(), expected[finite].detach(), rtol=8 * step, atol=8 * step)
    assert torch.equal(values[~finite].isnan(), expected[~finite].isnan())
    for ours, truth in zip(gradients, expected_gradients, strict=True):
        rounded = truth.to(dtype)
        torch.testing.assert_close(ours, rounded, rtol=4 * torch.finfo(dtype).eps, atol=1e-6, equal_nan=True)


@by_backend(SERVED, [torch.float32])
def test_no_elements(served, dtype):
    """As PyTorch: the mean of nothing is NaN, its sum is 0; gradients are empty; a list goes on behind it."""
    terms = [MODES["hinge"].real, MODES["hinge"].fake, MODES["lsgan"].fake]
    logits = [torch.empty(2, 0), torch.full((5,), 3.0), torch.empty(0)]
    total, values, gradients = evaluate(served, terms, False, logits)
    assert values.tolist() == [0, 20, 0]
    assert total == 20
    assert [g.shape for g in gradients] == [x.shape for x in logits]
    assert gradients[1].tolist() == [1.75] * 5
    total, values, gradients = evaluate(served, terms, True, logits)
    assert values.isnan().tolist() == [True, False, True]
    assert total.isnan()
    assert gradients[1].tolist() == pytest.approx([0.35] * 5)


@by_backend(SERVED, LOW)
def test_strides(seed, served, dtype):
    """Sliced, transposed, expanded and offset logits: gradients to the bit those of a copy, values within rounding."""
    generator = torch.Generator().manual_seed(seed)
    (base,) = logits_of(generator, dtype, (64, 130))
    views = [base[:, 1:], base[::2, 3:97], base.t(), base[5, 1:], base[:, :1].expand(64, 129)]
    views += [base[:64, :64].view(4, 16, 8, 8).permute(3, 0, 2, 1), base.view(-1)[3:], base.view(-1)[1:4098]]
    for view in views:
        terms = [MODES["non-saturating"].fake]
        _, values, (gradient,) = evaluate(served, terms, True, [view])
        _, expected, (copied,) = evaluate(served, terms, True, [view.contiguous()])
        torch.testing.assert_close(values, expected, rtol=1e-6 if served.name != "torch" else 1e-2, atol=0)
        if served.name == "torch":
            torch.testing.assert_close(gradient, copied)
        else:
            assert torch.equal(gradient, copied)


@by_backend(KERNELS, [torch.float32, torch.float16])
def test_a_list_is_its_tensors(seed, served, dtype):
    """One call for a list gives to the bit what a call for each tensor gives, also for more than one launch takes."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        [(1 + 37 * k % 300,) for k in range(150)] if served.name != "triton" else [(1 + 37 * k,) for k in range(20)]
    )
    logits = logits_of(generator, dtype, *shapes)
    terms = [MODES["non-saturating"][k % 3] for k in range(len(shapes))]
    total, values, gradients = evaluate(served, terms, True, logits)
    for k, x in enumerate(logits):
        alone, value, (gradient,) = evaluate(served, [terms[k]], True, [x])
        assert torch.equal(value[0], values[k])
        assert torch.equal(alone, value[0].to(dtype))
        assert torch.equal(gradient, gradients[k])
    check_total(total, values)


@by_backend(BEST, [torch.float32])
def test_only_some_gradients(seed, served, dtype):
    """A generator step: real logits need no gradient."""
    generator = torch.Generator().manual_seed(seed)
    real, fake = (x.to(served.device) for x in logits_of(generator, dtype, (5, 7), (5, 7)))
    fake.requires_grad_()
    out = mmfast.functional.adversarial_discriminator_loss(real, fake, "lsgan", backend=served.name)
    (gradient,) = torch.autograd.grad(out, fake)
    torch.testing.assert_close(gradient, 2 * fake.detach() / 35)
    assert not mmfast.functional.adversarial_generator_loss(real, mode="hinge", backend=served.name).requires_grad


@by_backend(BEST, [torch.float64])
@pytest.mark.parametrize("mode", [*PLAIN, "leaky-lsgan"])
def test_gradcheck(seed, served, dtype, mode):
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(n, generator=generator, dtype=dtype).to(served.device).requires_grad_() for n in (5, 1, 3)]
    terms = [MODES[mode][k]._replace(weight=1.5 - k) for k in range(3)]

    def total(*logits: Tensor) -> Tensor:
        return loss(Terms(terms), True, Inputs(logits), served.name)[0]

    # a gradient to be differentiated is the one that is not
    once, again = (torch.autograd.grad(total(*logits), logits, create_graph=create) for create in (False, True))
    torch.testing.assert_close([g.detach() for g in again], list(once))
    assert torch.autograd.gradcheck(total, logits, fast_mode=False)
    assert torch.autograd.gradgradcheck(total, logits, fast_mode=False)


@by_backend(BEST, [torch.float32])
def test_opcheck(seed, served, dtype):
    generator = torch.Generator().manual_seed(seed)
    logits = [x.to(served.device).requires_grad_() for x in logits_of(generator, dtype, (3, 5), (17,))]
    terms = Terms(MODES["non-saturating"][:2])
    others = [torch.randn_like(x).requires_grad_() for x in logits]
    weights = [torch.rand(3, device=served.device), torch.rand(17, device=served.device)]
    centres = torch.randn(2, device=served.device)
    slopes, dtotal = torch.randn(2, device=served.device), torch.tensor(1.5, device=served.device)
    for inputs, known, needed in (
        ((logits, [], [], None, []), None, [True, True]),
        ((logits, others, weights, None, []), None, [True, False, False, True]),
        ((logits, [], [], centres, [1, 0]), slopes, [True, True]),
    ):
        arguments = (*inputs, *columns_of(terms), True, served.name)
        torch.library.opcheck(forward_op, arguments)
        torch.library.opcheck(backward_op, (dtotal, known, needed, *arguments))


class Losses(torch.nn.Module):
    """Both losses on the logits of one layer."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.score = torch.nn.Linear(4, 3)
        self.loss = mmfast.nn.AdversarialLoss("non-saturating", backend=backend)

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        real, fake = self.score(real), self.score(fake)
        return self.loss.discriminator([real, real[:1]], [fake, fake[:1]]) + self.loss.generator(fake)


@by_backend(BEST, [torch.float32])
def test_compile(seed, served, dtype):
    """One graph, forward and backward, the eager result, and nothing compiled again for other data or another batch."""
    torch.manual_seed(seed)
    model = Losses(served.name).to(served.device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)

    def step(model: torch.nn.Module, *inputs: Tensor) -> list[Tensor]:
        out = model(*inputs)
        return [out.detach(), *torch.autograd.grad(out, list(model.parameters()))]

    inputs = [torch.randn(6, 4, device=served.device) for _ in range(2)]
    torch.testing.assert_close(step(compiled, *inputs), step(model, *inputs))
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch in (6, 9):
            inputs = [torch.randn(batch, 4, device=served.device) for _ in range(2)]
            torch.testing.assert_close(step(compiled, *inputs), step(model, *inputs))


@by_backend(BEST, [torch.float32])
def test_export(seed, served, dtype):
    torch.manual_seed(seed)
    model = Losses(served.name).to(served.device)
    inputs = [torch.randn(6, 4, device=served.device) for _ in range(2)]
    exported = torch.export.export(model, tuple(inputs))
    named = [node for node in exported.graph.nodes if node.target is forward_op]
    assert len(named) == (0 if served.name == "torch" else 2)
    torch.testing.assert_close(exported.module()(*inputs), model(*inputs))


@by_backend(BEST, [torch.float32])
def test_transforms(seed, served, dtype):
    generator = torch.Generator().manual_seed(seed)
    real, fake = (x.to(served.device) for x in logits_of(generator, dtype, (6, 5), (6, 5)))

    def out(real: Tensor, fake: Tensor) -> Tensor:
        return mmfast.functional.adversarial_discriminator_loss(real, fake, "hinge", backend=served.name)

    each = torch.stack([out(r, f) for r, f in zip(real, fake, strict=True)])
    torch.testing.assert_close(torch.vmap(out)(real, fake), each)
    leaf = fake.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(out, 1)(real, fake), torch.autograd.grad(out(real, leaf), leaf)[0])
    _, tangent = torch.func.jvp(out, (real, fake), (torch.ones_like(real), torch.zeros_like(fake)))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(real, torch.ones_like(real))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(out(dual, fake)).tangent, tangent)


@by_backend([s for s in BEST if s.name == "cpu"], LOW)
def test_threads_do_not_change_a_bit(seed, served, dtype):
    generator = torch.Generator().manual_seed(seed)
    logits = logits_of(generator, dtype, (300, 301), (100001,))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(evaluate(served, list(MODES["non-saturating"][:2]), True, logits))
    for total, values, gradients in results[1:]:
        assert torch.equal(total, results[0][0])
        assert torch.equal(values, results[0][1])
        assert all(map(torch.equal, gradients, results[0][2]))


@by_backend([s for s in BEST if s.name == "cuda" and s.device == "cpu"], LOW)
def test_thread_order_does_not_change_a_bit(seed, served, dtype):
    generator = torch.Generator().manual_seed(seed)
    logits = logits_of(generator, dtype, (33, 131), (5000,), (7,))
    results = []
    for order in (0, 1, 2, seed):
        native.emulator_order(order)
        results.append(evaluate(served, list(MODES["lsgan"][:3]), True, logits))
    for total, values, gradients in results[1:]:
        assert torch.equal(total, results[0][0])
        assert torch.equal(values, results[0][1])
        assert all(map(torch.equal, gradients, results[0][2]))


FORK = """
import os, torch
from mmfast.functional import adversarial_discriminator_loss as loss
torch.set_num_threads(2)
x, y = (torch.randn(100_000, requires_grad=True) for _ in range(2))
torch.autograd.grad(loss(x, y, backend="cpu"), (x, y))
child = os.fork()
if child == 0:
    # nothing else of this size: torch's own parallel regions do hang here
    dx, dy = torch.autograd.grad(loss(x, y, backend="cpu"), (x, y))
    os._exit(0 if dx[99_999] < 0 < dy[99_999] else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(INTERPRETED, reason="tested where the CPU kernels are")
def test_fork_after_a_parallel_region(tmp_path):
    """A DataLoader worker is forked after the parent's threads ran; libgomp's do not survive it."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK]
    assert subprocess.run(command, cwd=tmp_path, timeout=60, check=False).returncode == 0


@by_backend(BEST)
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (torch.ones(2), torch.ones(2), "wgan"),
            ValueError,
            "unknown mode 'wgan'; accepted: 'non-saturating', 'minimax'",
        ),
        (([], []), ValueError, "real_logits is an empty list"),
        (([torch.ones(2)] * 2, torch.ones(2)), ValueError, "2 tensors and fake_logits 1"),
        ((torch.ones(2), torch.ones(2).int()), RuntimeError, "fake_logits holds logits of dtype torch.int32"),
        ((torch.ones(2), [3.0]), TypeError, "fake_logits holds a float"),
        ((torch.ones(2), torch.ones(2, device="meta")), RuntimeError, "the logits are on cpu and meta"),
    ],
    ids=["mode", "empty", "lengths", "integers", "numbers", "devices"],
)
def test_errors(served, arguments, error, message):
    with pytest.raises(error, match=message):
        mmfast.functional.adversarial_discriminator_loss(*arguments, backend=served.name)


def test_unknown_backend():
    with pytest.raises(ValueError, match="unknown backend 'rocm'"):
        mmfast.functional.adversarial_generator_loss(torch.ones(2), backend="rocm")


def test_refusals_name_what_is_supported():
    case = OP.case("cpu", torch.float8_e5m2)
    for name in ("cpu", "cuda"):
        with pytest.raises(RuntimeError, match=f"backend '{name}' was asked for adversarial.*supported: float32"):
            OP.select(case, name)
    with pytest.raises(RuntimeError, match=r"the tensors are on xpu \(supported: cuda"):
        OP.select(OP.case("xpu", torch.float32), "cuda")
    if not INTERPRETED:
        with pytest.raises(RuntimeError, match="Triton needs TRITON_INTERPRET=1"):
            OP.select(OP.case("cpu", torch.float32), "triton")
    else:
        with pytest.raises(RuntimeError, match=r"torch.bfloat16 \(supported: float32, float16"):
            OP.select(OP.case("cpu", torch.bfloat16), "triton")


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_gpu_kernels_are_never_chosen_on_a_cpu(name):
    case = OP.case("cpu", torch.float32)
    assert "only to be tested" in OP.backends[name].reluctance(case)
    assert OP.select(case) not in ("cuda", "triton")


@by_backend(KERNELS, [torch.float32])
def test_unwritten_memory_would_be_seen(served, dtype):
    """The poison that the other tests rely on reaches the buffers that this backend fills."""
    outputs = [torch.empty_like(torch.ones(5, device=served.device)), torch.ones(1, device=served.device).new_empty(3)]
    assert all(x.isnan().all() for x in outputs)


@pytest.mark.parametrize("isa", native.supported_isas())
@pytest.mark.parametrize(("dtype", "lowest"), [(torch.float32, -103), (torch.float64, -743)], ids=["f32", "f64"])
def test_slopes_to_the_smallest(dtype, lowest, isa):
    """exp far below 0, where neither it nor a power of two is a normal number."""
    x = torch.linspace(lowest, 0, 20011, dtype=dtype).requires_grad_()
    before = native.isa()
    native.set_isa(isa)
    try:
        loss = mmfast.functional.adversarial_generator_loss(x, mode="minimax", reduction="sum", backend="cpu")
    finally:
        native.set_isa(before)
    (g,) = torch.autograd.grad(loss, x)
    slope, info = x.detach().double().exp(), torch.finfo(dtype)
    slope = slope / (1 + slope)
    torch.testing.assert_close(-g.double(), slope, rtol=4 * info.eps, atol=2 * info.smallest_normal * info.eps)
