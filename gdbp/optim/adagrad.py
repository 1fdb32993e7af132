"""Adagrad and Adadelta: learning rates from the history of each element."""

import torch

from gdbp.optim._base import Fused, Update


class Adagrad(Fused, torch.optim.Adagrad):
    """``torch.optim.Adagrad`` in one pass: ``sum += g**2``,
    ``p -= lr / (1 + (t - 1) * lr_decay) * g / (sqrt(sum) + eps)`` (Duchi et al., 2011). State: ``step``, ``sum``.

    Arguments beyond torch's: see :class:`gdbp.optim._base.Fused`.
    """

    def _update(self, group):
        initial = float(group["initial_accumulator_value"])
        return Update("adagrad", ("sum",), (group["lr_decay"], group["eps"]), initial=initial)


class Adadelta(Fused, torch.optim.Adadelta):
    """``torch.optim.Adadelta`` in one pass: steps as large as past steps were, relative to past gradients (Zeiler,
    2012). State: ``step``, ``square_avg``, ``acc_delta``.

    Arguments beyond torch's: see :class:`gdbp.optim._base.Fused`.
    """

    def _update(self, group):
        why = "whose second average grows by its own rounding"
        return Update("adadelta", ("square_avg", "acc_delta"), (group["rho"], group["eps"]), bits=8, too_fine=why)
