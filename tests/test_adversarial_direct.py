"""Losses of plain tensors on the CPU, which csrc/adversarial_direct.cpp serves: as by the general call."""

import pytest
import torch

import mmfast

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("n", [64, 5000])
@pytest.mark.parametrize("mode", ["wasserstein", "non-saturating", "relativistic", "relativistic-average"])
def test_a_logit_changed_in_place(mode, n):
    weight = torch.ones(n, requires_grad=True)
    logits = weight * 1
    loss = mmfast.functional.adversarial_discriminator_loss(logits, torch.zeros(n), mode)
    with torch.no_grad():
        logits.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("n", [64, 5000])
@pytest.mark.parametrize("mode", ["wasserstein", "relativistic", "relativistic-average"])
def test_backward_again(mode, n):
    x, y = torch.randn(n, requires_grad=True), torch.randn(n, requires_grad=True)
    loss = mmfast.functional.adversarial_discriminator_loss(x, y, mode)
    once = torch.autograd.grad(loss, (x, y), retain_graph=True)
    twice = torch.autograd.grad(2 * loss, (x, y))
    loss_again = mmfast.functional.adversarial_discriminator_loss(x, y, mode)
    scaled = torch.autograd.grad(3 * loss_again, (x, y))
    for one, two, three in zip(once, twice, scaled, strict=True):
        torch.testing.assert_close(2 * one, two)
        torch.testing.assert_close(3 * one, three)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, (x, y))


@pytest.mark.parametrize("n", [64, 5000])
@pytest.mark.parametrize("mode", ["wasserstein", "lsgan", "relativistic", "relativistic-average"])
def test_a_batch_of_cotangents(mode, n):
    x, y = torch.randn(n, requires_grad=True), torch.randn(n, requires_grad=True)
    loss = mmfast.functional.adversarial_discriminator_loss(x, y, mode)
    cotangents = torch.randn(3)
    batch = torch.autograd.grad(loss, (x, y), cotangents, retain_graph=True, is_grads_batched=True)
    once = torch.autograd.grad(loss, (x, y), retain_graph=True)
    for many, one in zip(batch, once, strict=True):
        torch.testing.assert_close(many, cotangents[:, None] * one)


@pytest.mark.parametrize("which", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "mode", ["wasserstein", "hinge", "lsgan", "non-saturating", "relativistic", "relativistic-average"]
)
def test_the_direct_call_is_the_general_one(mode, dtype, which):
    x, y = (torch.randn(63, 1, dtype=dtype, requires_grad=wanted) for wanted in which)
    wanted = [t for t, need in zip((x, y), which, strict=True) if need]
    real = x if "relativistic" in mode else None
    discriminator = mmfast.functional.adversarial_discriminator_loss
    generator = mmfast.functional.adversarial_generator_loss
    for few, many in [
        # values are wanted: the general call
        (discriminator(x, y, mode), discriminator([x], [y], mode, return_values=True)[0]),
        (generator(y, real, mode), generator([y], real if real is None else [real], mode, return_values=True)[0]),
    ]:
        assert torch.equal(few, many)
        assert few.requires_grad == many.requires_grad
        if not few.requires_grad:
            continue
        for seen, expected in zip(
            torch.autograd.grad(few, wanted, allow_unused=True),
            torch.autograd.grad(many, wanted, allow_unused=True),
            strict=True,
        ):
            assert (seen is None and expected is None) or torch.equal(seen, expected)


DIRECT = {
    "tensors": lambda x, y: mmfast.functional.adversarial_discriminator_loss(x, y, "hinge"),
    "lists": lambda x, y: mmfast.functional.adversarial_discriminator_loss([x, x[:7]], [y, y[:7]], "hinge"),
    "pairs": lambda x, y: mmfast.functional.adversarial_discriminator_loss([x, x[:7]], [y, y[:7]], "relativistic"),
    "averages": lambda x, y: mmfast.functional.adversarial_discriminator_loss(
        [x, x[:7]], [y[:5], y], "relativistic-average"
    ),
    "five kinds": lambda x, y: mmfast.functional.matching_discriminator_loss(x, y, y, unconditional=(x, y)),
    "features": lambda x, y: mmfast.functional.feature_matching([[x], [x[:7]]], [[y], [y[:7]]], detach=False),
    "a generator": lambda x, y: mmfast.functional.adversarial_generator_loss([x, y], mode="lsgan"),
    "many and constant": lambda x, y: mmfast.functional.adversarial_discriminator_loss(
        x.expand(9, 1000).contiguous(), y.contiguous(), "wasserstein"
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("name", DIRECT)
def test_the_direct_call_serves(seed, name, dtype, monkeypatch):
    """It gives what the general call gives, which serves where this torch has no exchange table."""
    x, y = (torch.randn(1000, dtype=dtype).requires_grad_() for _ in range(2))
    loss = DIRECT[name](x, y)
    assert type(loss.grad_fn).__name__ == "DirectLossBackward"
    monkeypatch.setattr("mmfast.ops.adversarial.losses.loss_of_tensors", lambda *_: None)
    general = DIRECT[name](x, y)
    assert type(general.grad_fn).__name__ == "AdversarialLossBackward"
    torch.testing.assert_close(loss, general)
    for scale in (1.0, -0.3):
        found, expected = (
            torch.autograd.grad(one * scale, (x, y), allow_unused=True, retain_graph=True) for one in (loss, general)
        )
        torch.testing.assert_close(found, expected)


NOT_DIRECT = {
    "strided": lambda x, y: (x[::2], y),
    "transposed": lambda x, y: (x.view(40, 25).t(), y),
    "two dtypes": lambda x, y: (x, y.double()),
    "bfloat16": lambda x, y: (x.bfloat16(), y.bfloat16()),
    "a parameter": lambda x, y: (torch.nn.Parameter(x.detach()), y),
}


@pytest.mark.parametrize("name", NOT_DIRECT)
def test_the_direct_call_leaves_to_the_general_one(seed, name):
    x, y = NOT_DIRECT[name](*(torch.randn(1000).requires_grad_() for _ in range(2)))
    loss = mmfast.functional.adversarial_discriminator_loss(x, y, "lsgan")
    assert type(loss.grad_fn).__name__ == "AdversarialLossBackward"
    expected = (x.double() - 1).square().mean() + y.double().square().mean()
    # two roundings of the total's dtype
    rtol = {"bfloat16": 2e-2, "two dtypes": 1e-7}.get(name, 2 * torch.finfo(torch.float32).eps)
    torch.testing.assert_close(loss.double(), expected, rtol=rtol, atol=0)


@pytest.mark.parametrize(
    "again", [lambda x: x.clone(), lambda x: x.repeat_interleave(2)[::2]], ids=["dense", "strided"]
)
def test_tensors_that_a_hook_brings_back(seed, again):
    x, y = (torch.randn(64).requires_grad_() for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, again):
        loss = mmfast.functional.adversarial_discriminator_loss(x, y)
    once, twice = (torch.autograd.grad(loss, (x, y), retain_graph=True) for _ in range(2))
    torch.testing.assert_close(once, twice)
