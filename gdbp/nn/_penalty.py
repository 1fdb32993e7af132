"""The L1 and L2 penalty of a model as a term of its loss."""

from collections.abc import Iterable

import torch
from torch import Tensor

from gdbp import ops
from gdbp.nn._arguments import nonnegative
from gdbp.nn._gradients import listed


def penalty(
    model: torch.nn.Module | Tensor | Iterable[Tensor],
    *,
    l1: float = 0.0,
    l2: float = 0.0,
) -> Tensor:
    """``l1 * sum(abs(p)) + l2 / 2 * sum(p**2)`` over all elements of all parameters, in one read of them.

    ``loss(output, target) + penalty(model, l1=1e-5)`` trains with L1 regularisation under any optimizer. Its gradient
    is ``l1 * sign(p) + l2 * p``: just what the optimizers of :mod:`gdbp.optim` add for ``l1=`` and ``weight_decay=``,
    in their pass over the parameters, so there use those, and this to see the value.

    Args:
        model: a module, of which all parameters count, or tensors: floating point, of any shapes and several dtypes.
        l1, l2: at least 0.

    Returns a 0-dim tensor on the parameters' device: float64 where one of them is, else float32. It is summed in
    float64, in an order that does not depend on the number of threads. Differentiable twice; the gradient of ``abs``
    at 0 is 0.

    Raises:
        ValueError: l1 or l2 below 0 or NaN.
        TypeError: parameters that are not floating point.
    """
    l1, l2 = nonnegative("l1", l1), nonnegative("l2", l2)
    tensors = listed(model.parameters() if isinstance(model, torch.nn.Module) else model, "model")
    for i, t in enumerate(tensors):
        if not t.is_floating_point():
            raise TypeError(f"penalty: tensor {i} has dtype {t.dtype}; expected floating point; leave it out")
    return ops.penalty(tensors, l1, l2)
