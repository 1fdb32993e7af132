"""Layers and losses with torch.nn's interfaces, on fused kernels."""

from gdbp.nn import functional, init
from gdbp.nn.linear import Linear
from gdbp.nn.loss import CrossEntropyLoss, MSELoss

__all__ = ["CrossEntropyLoss", "Linear", "MSELoss", "functional", "init"]
