"""Stochastic gradient descent."""

import torch

from gdbp.optim._base import Fused, Update


class SGD(Fused, torch.optim.SGD):
    """``torch.optim.SGD`` in one pass: momentum, dampening, Nesterov, weight decay (L2), maximize.

    With g the gradient plus ``weight_decay * p``: ``buf = momentum * buf + (1 - dampening) * g`` (``buf = g`` the
    first time), and ``p -= lr * buf``, or ``p -= lr * (g + momentum * buf)`` with Nesterov; without momentum
    ``p -= lr * g`` (Sutskever et al., 2013, in torch's form). State: ``momentum_buffer``.

    Arguments beyond torch's: see :class:`gdbp.optim._base.Fused`.
    """

    def _update(self, group):
        if group["momentum"] == 0:
            return Update("sgd", counts=())
        rule = "sgd_nesterov" if group["nesterov"] else "sgd_momentum"
        return Update(rule, ("momentum_buffer",), (group["momentum"], group["dampening"]), counts=())
