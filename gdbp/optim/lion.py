"""Lion, which torch does not have."""

import torch

from gdbp.optim._base import Fused, Update


class Lion(Fused):
    """Lion (Chen et al., 2023): every element moves by ``lr``, in the direction of the sign of a mixture of momentum
    and gradient.

    ``p *= 1 - lr * weight_decay``, ``p -= lr * sign(beta1 * m + (1 - beta1) * g)``,
    ``m = beta2 * m + (1 - beta2) * g``.
    State: ``exp_avg``.

    Args:
        params: tensors, or groups, as for every torch optimizer.
        lr: default 1e-4; three to ten times smaller than AdamW's, as every element moves.
        betas: default (0.9, 0.99).
        weight_decay: decoupled; three to ten times larger than AdamW's. Default 0.
        maximize: default False.

    Raises:
        ValueError: for a negative lr or weight_decay, or betas outside [0, 1).

    Other arguments: see :class:`gdbp.optim._base.Fused`.
    """

    def __init__(
        self,
        params,
        lr: float | torch.Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **extras,
    ):
        if isinstance(lr, torch.Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        for index, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults, **extras)

    def _update(self, group):
        return Update("lion", ("exp_avg",), tuple(group["betas"]), counts=(), decoupled=True)
