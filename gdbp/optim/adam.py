"""Adam and its relatives: running means of the gradient and of its square."""

import torch

from gdbp.optim._base import Fused, Update

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Adam(Fused, torch.optim.Adam):
    """``torch.optim.Adam`` in one pass: amsgrad, weight decay (L2, or decoupled), maximize.

    ``m`` and ``v`` are running means of the gradient and of its square; ``p -= lr * m' / (sqrt(v') + eps)`` with
    ``m' = m / (1 - beta1**t)``, ``v' = v / (1 - beta2**t)`` (Kingma and Ba, 2015; amsgrad: Reddi et al., 2018).
    State: ``step``, ``exp_avg``, ``exp_avg_sq``, ``max_exp_avg_sq`` (amsgrad).

    Arguments beyond torch's: see :class:`gdbp.optim._base.Fused`.
    """

    def _update(self, group):
        decoupled = bool(group["decoupled_weight_decay"])
        hyper = (*group["betas"], group["eps"])
        if group["amsgrad"]:
            return Update("adam_amsgrad", (*_MOMENTS, "max_exp_avg_sq"), hyper, decoupled=decoupled)
        return Update("adam", _MOMENTS, hyper, decoupled=decoupled)


class AdamW(Adam, torch.optim.AdamW):
    """``torch.optim.AdamW`` in one pass: Adam with decoupled weight decay, ``p *= 1 - lr * weight_decay`` before
    the update (Loshchilov and Hutter, 2019). State as :class:`Adam`'s.

    Arguments beyond torch's: see :class:`gdbp.optim._base.Fused`.
    """


class NAdam(Fused, torch.optim.NAdam):
    """``torch.optim.NAdam`` in one pass: Adam with Nesterov's look-ahead and a momentum schedule (Dozat, 2016).

    State: ``step``, ``mu_product``, ``exp_avg``, ``exp_avg_sq``.

    Arguments beyond torch's: see :class:`gdbp.optim._base.Fused`.
    """

    def _update(self, group):
        return Update(
            "nadam",
            _MOMENTS,
            (*group["betas"], group["eps"], group["momentum_decay"]),
            counts=(("step", 0.0), ("mu_product", 1.0)),
            decoupled=group["decoupled_weight_decay"],
        )


class RAdam(Fused, torch.optim.RAdam):
    """``torch.optim.RAdam`` in one pass: momentum first, Adam once the variance of its step is small enough (Liu et
    al., 2020). State: ``step``, ``exp_avg``, ``exp_avg_sq``.

    Arguments beyond torch's: see :class:`gdbp.optim._base.Fused`.
    """

    def _update(self, group):
        hyper = (*group["betas"], group["eps"])
        return Update("radam", _MOMENTS, hyper, decoupled=group["decoupled_weight_decay"])


class Adamax(Fused, torch.optim.Adamax):
    """``torch.optim.Adamax`` in one pass: Adam with the largest gradient, decaying, for the root of the mean square
    (Kingma and Ba, 2015, section 7). State: ``step``, ``exp_avg``, ``exp_inf``.

    Arguments beyond torch's: see :class:`gdbp.optim._base.Fused`.
    """

    def _update(self, group):
        return Update("adamax", ("exp_avg", "exp_inf"), (*group["betas"], group["eps"]))
