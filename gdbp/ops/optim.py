"""The optimizer step over lists of tensors. Optimizers take a plan instead (see gdbp.optim), which is
cheaper for many tensors; this is the same kernel behind a dispatcher operator."""

from collections.abc import Sequence

import torch

from gdbp import _load, reference
from gdbp.ops._function import is_fused


def step_(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    states: Sequence[torch.Tensor],
    counts: Sequence[torch.Tensor],
    rule: str,
    hyper: Sequence[float],
    lr: torch.Tensor | None = None,
    fresh: Sequence[bool] = (),
    norm: torch.Tensor | None = None,
) -> None:
    """Update ``params``, ``states`` and ``counts`` in place.

    Args:
        states, counts: for each kind that the rule keeps, one tensor a parameter, one kind after the other.
            Counts are 0-dim CPU tensors: the steps so far and, for nadam, the product of its momenta.
        rule: a name of GDBP_OPTIM_RULES in csrc/optim/optim_math.h.
        hyper: numbers in the order of ``struct Hyper`` in csrc/optim/hyper.h.
        lr: a 0-dim tensor that stands for the first of ``hyper``.
        fresh: for rules without counts, whether this is a parameter's first update.
        norm: what :func:`gdbp.ops.grad.norm` returned; scales the gradients, or skips the step.
    """
    if _load.available and all(map(is_fused, params)):
        torch.ops.gdbp.optim_step_(params, grads, states, counts, rule, hyper, lr, fresh, norm)
    else:
        reference.optim_step_(params, grads, states, counts, rule, hyper, lr, fresh, norm)
