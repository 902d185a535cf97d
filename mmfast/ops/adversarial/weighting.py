"""Weights between a generator's losses, from the size of their gradients, without a word from the host."""

from __future__ import annotations

import torch
from torch import Tensor


def adaptive_weight(
    reconstruction_loss: Tensor,
    adversarial_loss: Tensor,
    last_layer: Tensor,
    weight: float = 1.0,
    *,
    maximum: float = 1e4,
    eps: float = 1e-4,
) -> Tensor:
    """VQGAN's weight of the adversarial loss: it gives both losses gradients of one size in the generator's last layer.

    Equivalent to: `weight * (|dreconstruction/dlast_layer| / (|dadversarial/dlast_layer| + eps)).clamp(0, maximum)`,
    detached, with Euclidean norms.

    reconstruction_loss, adversarial_loss: without dimensions; their graphs are kept for the backward to come.
    last_layer: the weight of the generator's last layer, any shape.
    Returns the weight, without dimensions, in last_layer's dtype (at least float32), on its device, without a sync.
    Raises RuntimeError where a loss does not depend on last_layer.
    Source: Esser et al., arXiv:2012.09841, equation 7; the clamp is that of its authors' program.
    """
    norms = []
    for loss in (reconstruction_loss, adversarial_loss):
        (gradient,) = torch.autograd.grad(loss, last_layer, retain_graph=True)
        dtype = torch.float32 if gradient.dtype.itemsize == 2 else None
        norms.append(torch.linalg.vector_norm(gradient.detach(), dtype=dtype))
    return (norms[0] / (norms[1] + eps)).clamp(0, maximum) * weight
