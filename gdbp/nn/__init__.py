"""Layers and losses with torch.nn's interfaces, on fused kernels."""

from gdbp.nn import functional, init, utils
from gdbp.nn.linear import Linear
from gdbp.nn.loss import (
    BCEWithLogitsLoss,
    CrossEntropyLoss,
    HuberLoss,
    L1Loss,
    LinearCrossEntropyLoss,
    MSELoss,
    SmoothL1Loss,
)

__all__ = [
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "HuberLoss",
    "L1Loss",
    "Linear",
    "LinearCrossEntropyLoss",
    "MSELoss",
    "SmoothL1Loss",
    "functional",
    "init",
    "utils",
]
