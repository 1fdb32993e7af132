"""Layers and losses with torch.nn's interfaces, on fused kernels. The rest of it is torch's
own: ``gdbp.nn.X`` is ``torch.nn.X`` where there is none of ours."""

import torch

from gdbp._rest import rest_of
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
from gdbp.nn.mlp import MLP
from gdbp.nn.norm import BatchNorm1d, SyncBatchNorm

__all__ = [
    "MLP",
    "BCEWithLogitsLoss",
    "BatchNorm1d",
    "CrossEntropyLoss",
    "HuberLoss",
    "L1Loss",
    "Linear",
    "LinearCrossEntropyLoss",
    "MSELoss",
    "SmoothL1Loss",
    "SyncBatchNorm",
    "functional",
    "init",
    "utils",
]

__getattr__, __dir__ = rest_of(__name__, torch.nn)
