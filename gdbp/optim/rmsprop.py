"""RMSprop."""

import torch

from gdbp.optim._base import Fused, Update


class RMSprop(Fused, torch.optim.RMSprop):
    """``torch.optim.RMSprop`` in one pass: momentum, centered, weight decay (L2), maximize.

    ``v = alpha * v + (1 - alpha) * g**2`` and ``p -= lr * g / (sqrt(v) + eps)``; with momentum the quotient goes
    through a buffer first; centered, the square of the gradient's running mean is taken off v (Hinton, 2012;
    Graves, 2013). That difference is clamped at 0, where rounding makes torch's a NaN.
    State: ``step``, ``square_avg``, ``grad_avg`` (centered), ``momentum_buffer`` (momentum).

    Arguments beyond torch's: see :class:`gdbp.optim._base.Fused`.
    """

    def _update(self, group):
        rule, states = "rmsprop", ("square_avg",)
        if group["centered"]:
            rule += "_centered"
        if group["momentum"] > 0:
            rule, states = rule + "_momentum", (*states, "momentum_buffer")
        if group["centered"]:
            states = (*states, "grad_avg")
        hyper = (group["alpha"], group["eps"], group["momentum"])
        if not group["centered"]:
            return Update(rule, states, hyper)
        return Update(rule, states, hyper, bits=24, too_fine="whose centered average is a difference of two others")
