"""The layers and losses as functions, shaped like torch.nn.functional."""

from .ops.adversarial.losses import (
    adversarial_discriminator_loss,
    adversarial_generator_loss,
    feature_matching,
    lecam_penalty,
    matching_discriminator_loss,
)
from .ops.adversarial.penalties import (
    dragan_penalty,
    max_gradient_penalty,
    r1_penalty,
    r2_penalty,
    wgan_penalty,
    zero_centered_penalty,
)
from .ops.adversarial.weighting import adaptive_weight
from .ops.conv_transpose.layers import (
    conv_transpose1d,
    conv_transpose1d_norm_act,
    conv_transpose2d,
    conv_transpose2d_norm_act,
    conv_transpose3d,
    conv_transpose3d_norm_act,
)
from .ops.rnn.cell import gru_cell, lstm_cell, rnn_cell
from .ops.rnn.layers import gru, lstm, rnn

__all__ = [
    "adaptive_weight",
    "adversarial_discriminator_loss",
    "adversarial_generator_loss",
    "conv_transpose1d",
    "conv_transpose1d_norm_act",
    "conv_transpose2d",
    "conv_transpose2d_norm_act",
    "conv_transpose3d",
    "conv_transpose3d_norm_act",
    "dragan_penalty",
    "feature_matching",
    "gru",
    "gru_cell",
    "lecam_penalty",
    "lstm",
    "lstm_cell",
    "matching_discriminator_loss",
    "max_gradient_penalty",
    "r1_penalty",
    "r2_penalty",
    "rnn",
    "rnn_cell",
    "wgan_penalty",
    "zero_centered_penalty",
]
