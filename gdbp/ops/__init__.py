"""The operators: shapes for the compiler, derivatives for autograd, one module for each family in csrc.

The kernels are registered with torch's dispatcher as ``torch.ops.gdbp.*`` by the compiled part. Here each
gets a fake kernel (shapes without data, for torch.compile) and a ``torch.autograd.Function``.
"""

from gdbp import _load

if _load.available:
    from gdbp.ops import _fake  # noqa: F401

from gdbp.ops.dropout import dropout
from gdbp.ops.grad import penalty
from gdbp.ops.linear import linear
from gdbp.ops.linear_loss import linear_cross_entropy
from gdbp.ops.loss import bce_with_logits, cross_entropy, pointwise_loss
from gdbp.ops.norm import batch_norm
from gdbp.ops.optim import step_

if _load.available:
    from gdbp.ops import _flops  # noqa: F401  (of the operators above, too)

__all__ = [
    "batch_norm",
    "bce_with_logits",
    "cross_entropy",
    "dropout",
    "linear",
    "linear_cross_entropy",
    "penalty",
    "pointwise_loss",
    "step_",
]
