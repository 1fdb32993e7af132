"""Adam and AdamW."""

import torch

from gdbp.optim._base import Fused, Update


def _adam(group) -> Update:
    states = ("exp_avg", "exp_avg_sq")
    decoupled = bool(group["decoupled_weight_decay"])
    hyper = (*group["betas"], group["eps"])
    if group["amsgrad"]:
        return Update("adam_amsgrad", (*states, "max_exp_avg_sq"), hyper, decoupled=decoupled)
    return Update("adam", states, hyper, decoupled=decoupled)


class Adam(Fused, torch.optim.Adam):
    """``torch.optim.Adam`` in one pass: amsgrad, weight decay (L2, or decoupled), maximize.

    ``m`` and ``v`` are running means of the gradient and of its square; ``p -= lr * m' / (sqrt(v') + eps)`` with
    ``m' = m / (1 - beta1**t)``, ``v' = v / (1 - beta2**t)`` (Kingma and Ba, 2015; amsgrad: Reddi et al., 2018).
    State: ``step``, ``exp_avg``, ``exp_avg_sq``, ``max_exp_avg_sq`` (amsgrad).

    Arguments beyond torch's: see :class:`gdbp.optim._base.Fused`.
    """

    def _update(self, group):
        return _adam(group)


class AdamW(Fused, torch.optim.AdamW):
    """``torch.optim.AdamW`` in one pass: Adam with decoupled weight decay, ``p *= 1 - lr * weight_decay`` before
    the update (Loshchilov and Hutter, 2019). State as :class:`Adam`'s.

    Arguments beyond torch's: see :class:`gdbp.optim._base.Fused`.
    """

    def _update(self, group):
        return _adam(group)
