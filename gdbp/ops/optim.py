"""The optimizer step over lists of tensors. Optimizers take a plan instead (see gdbp.optim), which is
cheaper for many tensors; this is the same kernel behind a dispatcher operator."""

from collections.abc import Sequence

import torch

from gdbp import _load, reference
from gdbp.ops._function import is_fused


def step_(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    states: Sequence[Sequence[torch.Tensor]],
    rule: str,
    hyper: Sequence[float],
    counts: Sequence[int],
) -> None:
    """Update ``params`` and ``states`` in place.

    ``states`` holds one list for each of the rule's states. ``hyper`` is in the order of ``struct Hyper`` in
    csrc/optim/optim_math.h. ``counts`` is the number of this update for each parameter, 1 for the first.
    """
    flat = [tensor for kind in states for tensor in kind]
    if _load.available and all(map(is_fused, params)):
        torch.ops.gdbp.optim_step_(params, grads, flat, rule, hyper, counts)
    else:
        reference.optim_step_(params, grads, states, rule, hyper, counts)
