"""Gradient penalties: the regularisers of adversarial training that differentiate through a gradient.

Each is a formula of torch's functions around one `torch.autograd.grad(..., create_graph=True)` with respect to the
discriminator's inputs. That inner pass computes no gradient of a weight; the weights get theirs when the penalty is
differentiated. The reductions run in float32 (float64 for float64) outside autocast, and are finite, with a finite
gradient, where the gradient is zero.

Lazy regularisation (Karras et al., arXiv:1912.04958, section 3): add the penalty in one step of `every`, with that
`every`, and the loss keeps its expected value:

    if step % 16 == 0:
        loss = loss + r1_penalty(real_logits, real, gamma=10, every=16)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...dispatch import outside_autocast

Logits = Any  # a tensor, or a list, nested to any depth, of tensors
Inputs = Tensor | Sequence[Tensor]
Critic = Callable[[Tensor], Logits]

#: A gradient of float16 logits starts at most this large, so that the scale of a GradScaler cannot make it infinite.
_LARGEST_SCALE = 2.0**15


def zero_centered_penalty(
    logits: Logits, inputs: Inputs, weight: float = 1.0, *, every: int = 1, scaler: torch.amp.GradScaler | None = None
) -> Tensor:
    """Draws the gradient of the logits with respect to the inputs to zero.

    Equivalent to: `weight * every * torch.autograd.grad(logits.sum(), inputs, create_graph=True)[0].square()
    .flatten(1).sum(1).mean()`.

    logits: a tensor, or a list of tensors, nested to any depth: of all scales, what the discriminator makes of the
        inputs.
    inputs: (B, ...) each; they must require grad before the logits are computed from them.
    every: how many steps this one stands for (lazy regularisation).
    scaler: the GradScaler of the training step under float16 autocast: the inner gradient is scaled by it, and unscaled
        in float32, so that it does not underflow. The penalty itself is not scaled; scale it with the rest of the loss.
    Returns the penalty, a tensor without dimensions in float32 (float64 for float64 inputs).
    Differentiable to any order in eager.
    Raises RuntimeError for inputs that do not require grad or that the logits do not depend on, ValueError for an empty
        list.
    Source: Mescheder et al., arXiv:1801.04406; Roth et al., arXiv:1705.09367.
    """
    squares, batch = _squares(_input_gradients(logits, inputs, scaler))
    return squares.sum() * (weight * every / batch) if batch else squares.sum() / 0


def r1_penalty(
    real_logits: Logits,
    real: Inputs,
    gamma: float = 10.0,
    *,
    every: int = 1,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    """R1: `gamma / 2` times the mean squared norm of the discriminator's gradient on real samples.

    Equivalent to: `zero_centered_penalty(real_logits, real, gamma / 2, every=every)`, whose arguments these are.
    Source: Mescheder et al., arXiv:1801.04406, equation 9.
    """
    return zero_centered_penalty(real_logits, real, gamma / 2, every=every, scaler=scaler)


def r2_penalty(
    fake_logits: Logits,
    fake: Inputs,
    gamma: float = 10.0,
    *,
    every: int = 1,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    """R2: the same as R1 on generated samples, which must be detached from the generator and require grad.

    Equivalent to: `zero_centered_penalty(fake_logits, fake, gamma / 2, every=every)`, whose arguments these are.
    Source: Mescheder et al., arXiv:1801.04406, equation 10.
    """
    return zero_centered_penalty(fake_logits, fake, gamma / 2, every=every, scaler=scaler)


def wgan_penalty(
    critic: Critic,
    real: Tensor,
    fake: Tensor,
    weight: float = 10.0,
    *,
    target: float = 1.0,
    norm: str = "sample",
    every: int = 1,
    scaler: torch.amp.GradScaler | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """WGAN-GP: draws the norm of the critic's gradient to 1 between real and generated samples.

    Equivalent to: `weight * every * (grad.flatten(1).norm(2, dim=1) - target).square().mean()` with the gradient of
    `critic(x).sum()` at `x = a * real + (1 - a) * fake`, a uniform in [0, 1), one for each sample.

    critic: from samples (B, ...) to logits, as `zero_centered_penalty` takes them.
    real, fake: (B, ...), of one shape; both are detached. x has the wider of their dtypes.
    norm: "sample", or "batch": one norm of the gradients of the whole batch, as torchgan takes it.
    generator: draws a; None: torch's own.
    All else: `zero_centered_penalty`. ValueError for another norm or for shapes that differ.
    Source: Gulrajani et al., arXiv:1704.00028, equation 3.
    """
    if norm not in ("sample", "batch"):
        raise ValueError(f"unknown norm {norm!r}; accepted: 'sample', 'batch'")
    norms = _norms(critic, _between(real, fake, generator), scaler, norm == "batch")
    return (norms - target).square().mean() * (weight * every)


def dragan_penalty(
    critic: Critic,
    real: Tensor,
    weight: float = 10.0,
    *,
    target: float = 1.0,
    every: int = 1,
    scaler: torch.amp.GradScaler | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """DRAGAN: WGAN-GP's penalty around real samples, at `x = real + a * 0.5 * real.std() * u`.

    a is uniform in [0, 1), one for each sample, u one for each element. Everything else: `wgan_penalty`.
    Source: Kodali et al., arXiv:1705.07215; the noise is that of its authors' program.
    """
    real = real.detach()
    a = _uniform(real, (len(real),) + (1,) * (real.ndim - 1), generator)
    x = real + a * (0.5 * real.std() * _uniform(real, tuple(real.shape), generator))
    norms = _norms(critic, x.requires_grad_(), scaler, False)
    return (norms - target).square().mean() * (weight * every)


def max_gradient_penalty(
    critic: Critic,
    real: Tensor,
    fake: Tensor,
    weight: float = 1.0,
    *,
    every: int = 1,
    scaler: torch.amp.GradScaler | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Max-GP: the largest squared norm of the critic's gradient in the batch, between real and generated samples.

    Equivalent to: `weight * every * grad.flatten(1).norm(2, dim=1).square().max()`, at x as in `wgan_penalty`, whose
    arguments these are.
    Source: Zhou et al., arXiv:1902.05687.
    """
    x = _between(real, fake, generator)
    squares, _ = _squares(_input_gradients(critic(x), x, scaler))
    return squares.max() * (weight * every)


def tensors_of(name: str, logits: Any) -> Iterator[Tensor]:
    """The tensors of a list nested to any depth, in order; TypeError for anything else in it."""
    if isinstance(logits, Tensor):
        yield logits
        return
    if not isinstance(logits, (list, tuple)):
        raise TypeError(f"{name} holds a {type(logits).__name__}; expected a tensor or a list of tensors")
    for part in logits:
        yield from tensors_of(name, part)


def _input_gradients(logits: Logits, inputs: Inputs, scaler: torch.amp.GradScaler | None) -> list[Tensor]:
    """The gradient of the sum of all logits with respect to each input, in float32 or float64."""
    outputs = list(tensors_of("logits", logits))
    sources = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    if not outputs or not sources:
        raise ValueError(
            f"{'inputs' if outputs else 'logits'} is an empty list; expected a tensor or a list of tensors"
        )
    if not all(x.requires_grad for x in sources):
        raise RuntimeError("the inputs do not require grad; call requires_grad_() on them before the discriminator")
    scale = None
    if scaler is not None and scaler.is_enabled():
        scale = scaler.scale(torch.ones((), device=outputs[0].device)).clamp(max=_LARGEST_SCALE)
    ones = [torch.ones_like(y) if scale is None else scale.to(y.dtype).expand_as(y) for y in outputs]
    gradients = torch.autograd.grad(outputs, sources, ones, create_graph=True)
    with outside_autocast(sources[0].device.type):
        gradients = tuple(g.float() if g.dtype.itemsize == 2 else g for g in gradients)
        return list(gradients if scale is None else (g / scale for g in gradients))


def _squares(gradients: list[Tensor]) -> tuple[Tensor, int]:
    """The squared norm of each sample's gradient (B,), and B."""
    batch = len(gradients[0])
    with outside_autocast(gradients[0].device.type):
        parts = [g.square().sum(tuple(range(1, g.ndim))) if g.ndim > 1 else g.square() for g in gradients]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
    return total, batch


def _norms(critic: Critic, x: Tensor, scaler: torch.amp.GradScaler | None, whole_batch: bool) -> Tensor:
    (gradient,) = _input_gradients(critic(x), x, scaler)
    with outside_autocast(gradient.device.type):
        # torch's own choice of a subgradient: 0 where the norm is 0
        return torch.linalg.vector_norm(
            gradient if whole_batch else gradient.flatten(1), dim=None if whole_batch else 1
        )


def _between(real: Tensor, fake: Tensor, generator: torch.Generator | None) -> Tensor:
    if real.shape != fake.shape:
        raise ValueError(f"real has shape {tuple(real.shape)} and fake {tuple(fake.shape)}; expected one shape")
    # as in a * real + (1 - a) * fake, with generated samples in autocast's dtype, or images of integers
    dtype = torch.promote_types(real.dtype, fake.dtype)
    if not dtype.is_floating_point:
        dtype = torch.get_default_dtype()
    real, fake = real.detach().to(dtype), fake.detach().to(dtype)
    a = _uniform(real, (len(real),) + (1,) * (real.ndim - 1), generator)
    return torch.lerp(fake, real, a).requires_grad_()


def _uniform(like: Tensor, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    return torch.rand(shape, dtype=like.dtype, device=like.device, generator=generator)
