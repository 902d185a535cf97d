"""EnCodec's loss balancer as a module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class LossBalancer(torch.nn.Module):
    """Gives each loss a fixed share of the gradient that reaches the generator's output, whatever the loss's scale.

    The gradient of loss i with respect to the output, g_i, is rescaled by the running mean <|g_i|> of its norm:
    `sum_i total_norm * weight_i / sum(weights) * g_i / (<|g_i|> + eps)`.

    weights: the share of each loss, by name.
    rescale: False: the plain weighted sum `sum_i weight_i * g_i`.
    per_sample: the norm is the mean of the samples' norms, otherwise the norm of the whole batch.
    decay: of the running mean, `<x>_t = sum_k decay^k x_(t-k) / sum_k decay^k`; its state is in buffers.
    process_group: the running means are averaged over its ranks, by their batch sizes (torch.distributed).
    Nothing here waits for a GPU: means and factors stay on the device.
    Source: Défossez et al., arXiv:2210.13438, section 3.4 and equation 5; defaults are its authors' program's.
    """

    totals: Tensor
    masses: Tensor

    def __init__(
        self,
        weights: Mapping[str, float],
        *,
        rescale: bool = True,
        total_norm: float = 1.0,
        decay: float = 0.999,
        per_sample: bool = True,
        eps: float = 1e-12,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        if not weights:
            raise ValueError("weights is empty; expected the weight of at least one loss by its name")
        self.weights = dict(weights)
        self.rescale = rescale
        self.total_norm = total_norm
        self.decay = decay
        self.per_sample = per_sample
        self.eps = eps
        self.process_group = process_group
        self.register_buffer("totals", torch.zeros(len(self.weights)))
        self.register_buffer("masses", torch.zeros(len(self.weights)))

    def backward(self, losses: Mapping[str, Tensor], output: Tensor) -> None:
        """`output.backward(self.gradient(losses, output))`: the backward of the balanced losses."""
        output.backward(self.gradient(losses, output))

    def gradient(self, losses: Mapping[str, Tensor], output: Tensor) -> Tensor:
        """The balanced gradient with respect to `output`, in its shape; updates the running means.

        losses: by name, each without dimensions and made from `output`; their graphs are kept.
        output: (B, ...), the generator's output.
        Raises ValueError for a name that has no weight or without losses, RuntimeError as torch.autograd.grad.
        """
        names = list(self.weights)
        if not losses or not set(losses) <= set(names):
            raise ValueError(f"the losses are {sorted(losses)}; expected some of {names}")
        gradients = [torch.autograd.grad(loss, output, retain_graph=True)[0].detach() for loss in losses.values()]
        shares = [self.weights[name] for name in losses]
        if not self.rescale:
            return _weighted_sum(gradients, shares)
        means = self._running_means([names.index(name) for name in losses], gradients)
        factors = (means + self.eps).reciprocal().to(output.dtype).unbind()
        return _weighted_sum(gradients, [share * self.total_norm / sum(shares) for share in shares], factors)

    @torch.no_grad()
    def _running_means(self, rows: list[int], gradients: list[Tensor]) -> Tensor:
        norms = torch.stack([self._norm(gradient) for gradient in gradients])
        if len(rows) == len(self.weights) and rows == sorted(rows):
            totals, masses = self.totals, self.masses
            totals.mul_(self.decay).add_(norms)
            masses.mul_(self.decay).add_(1)
            means = totals / masses
        else:
            means = torch.stack([self._update(row, norm) for row, norm in zip(rows, norms.unbind(), strict=True)])
        return means if self.process_group is None else self._across_ranks(means, len(gradients[0]))

    def _update(self, row: int, norm: Tensor) -> Tensor:
        total, mass = self.totals[row], self.masses[row]
        return total.mul_(self.decay).add_(norm) / mass.mul_(self.decay).add_(1)

    def _norm(self, gradient: Tensor) -> Tensor:
        dtype = torch.float32 if gradient.dtype.itemsize == 2 else None
        if not self.per_sample:
            return torch.linalg.vector_norm(gradient, dtype=dtype).to(self.totals.dtype)
        samples = gradient.flatten(1) if gradient.ndim > 1 else gradient[:, None]
        return torch.linalg.vector_norm(samples, dim=1, dtype=dtype).mean().to(self.totals.dtype)

    def _across_ranks(self, means: Tensor, batch: int) -> Tensor:
        count = batch if self.per_sample else 1
        sums = torch.cat([means * count, means.new_full((1,), count)])
        torch.distributed.all_reduce(sums, group=self.process_group)
        return sums[:-1] / sums[-1]

    def extra_repr(self) -> str:
        return f"{self.weights}, rescale={self.rescale}, total_norm={self.total_norm}, decay={self.decay}"


def _weighted_sum(gradients: list[Tensor], weights: list[float], factors: Sequence[Tensor] | None = None) -> Tensor:
    total = torch.zeros_like(gradients[0])
    for k, (gradient, weight) in enumerate(zip(gradients, weights, strict=True)):
        # weights stay on the host and factors on the device, so nothing is copied between them
        if factors is None:
            total.add_(gradient, alpha=weight)
        else:
            total.addcmul_(gradient, factors[k], value=weight)
    return total
