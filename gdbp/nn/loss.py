"""Losses as modules: torch.nn's classes with our functions inside."""

import torch

from gdbp.nn import functional as F


class MSELoss(torch.nn.MSELoss):
    """Mean squared error: ``(input - target)**2`` averaged, summed (``reduction="sum"``) or as is ("none").

    Input and target of any one shape; see :func:`gdbp.nn.functional.mse_loss`.
    """

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(input, target, reduction=self.reduction)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """Softmax cross-entropy of logits against labels, with torch's arguments (weight, ignore_index,
    reduction, label_smoothing) and its buffer ``weight``; see :func:`gdbp.nn.functional.cross_entropy`.
    """

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )
