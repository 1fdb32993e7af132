"""Layers and losses with torch.nn's interfaces, on fused kernels."""

from gdbp.nn import functional, init
from gdbp.nn.linear import Linear
from gdbp.nn.loss import CrossEntropyLoss, HuberLoss, L1Loss, MSELoss, SmoothL1Loss
from gdbp.nn.mlp import MLP
from gdbp.nn.norm import BatchNorm1d, SyncBatchNorm

__all__ = [
    "BatchNorm1d",
    "CrossEntropyLoss",
    "HuberLoss",
    "L1Loss",
    "Linear",
    "MLP",
    "MSELoss",
    "SmoothL1Loss",
    "SyncBatchNorm",
    "functional",
    "init",
]
