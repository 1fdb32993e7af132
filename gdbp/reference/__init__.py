"""Every operator in plain torch: what runs where the kernels cannot, and what differentiates them twice.

Layers and losses here are made of differentiable operators, so their derivatives of every order, forward
mode, vmap, and devices without our kernels come for free. ``optim_step_`` mirrors csrc/optim/optim_math.h.
"""

from gdbp.reference.layers import (
    ACTIVATIONS,
    batch_norm,
    batch_norm_backward,
    batch_norm_update_,
    linear,
    linear_backward,
    linear_with_pre,
    unit_stats,
)
from gdbp.reference.losses import (
    POINTWISE_LOSSES,
    bce_with_logits,
    bce_with_logits_backward,
    cross_entropy,
    cross_entropy_backward,
    pointwise_loss,
    pointwise_loss_backward,
)
from gdbp.reference.optim import RULES, Hyper, optim_step_

__all__ = [
    "ACTIVATIONS",
    "POINTWISE_LOSSES",
    "RULES",
    "Hyper",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_update_",
    "bce_with_logits",
    "bce_with_logits_backward",
    "cross_entropy",
    "cross_entropy_backward",
    "linear",
    "linear_backward",
    "linear_with_pre",
    "optim_step_",
    "pointwise_loss",
    "pointwise_loss_backward",
    "unit_stats",
]
