"""The step under torch.compile: one call of the dispatcher's operator for each group.

Numbers that change from step to step, the counts and a tensor lr, go into the graph as tensors; a group's other
options are constants of it, and changing one compiles again.
"""

import functools
from typing import Any

import torch

from gdbp.ops import grad, optim
from gdbp.optim._checkpoint import count_tensor


def init_group(optimizer: torch.optim.Optimizer, group: dict[str, Any], params, grads, states, counts) -> None:
    """Appends what a group's step takes, each kind after the other, and makes the states that are missing."""
    update = optimizer._update(group)
    params.extend(p for p in group["params"] if p.grad is not None)
    grads.extend(p.grad for p in params)
    if not update.states:
        return
    for p in params:
        state = optimizer.state[p]
        for key, first in update.counts:
            state[key] = count_tensor(state.get(key, first))
        for key in update.states:
            if state.get(key) is None:
                initial = complex(update.initial, update.initial) if p.is_complex() else update.initial
                state[key] = torch.full_like(p, initial, memory_format=torch.preserve_format)
    states.extend(optimizer.state[p][key] for key in update.states for p in params)
    counts.extend(optimizer.state[p][key] for key, _ in update.counts for p in params)


@torch.no_grad()
def step(optimizer: torch.optim.Optimizer, hyper_of) -> None:
    """The step as Dynamo traces it. hyper_of: a group's hyper-parameters from the group and its Update."""
    groups = optimizer.param_groups
    if not optimizer._precision.is_default() or any(group.get("differentiable") for group in groups):
        return _step_outside(optimizer)
    # What only the host can do: count the steps that were not skipped, where the gradients are elsewhere, and
    # tell whether a skipped one was a parameter's first, which dampening asks.
    skips = optimizer.skip_nonfinite or optimizer._step_supports_amp_scaling
    if skips and any(group.get("dampening") or any(p.is_cuda for p in group["params"]) for group in groups):
        return _step_outside(optimizer)
    calls = []
    for group in groups:
        update = optimizer._update(group)
        params, grads, states, counts = [], [], [], []
        lr = group["lr"]
        is_tensor = isinstance(lr, torch.Tensor)
        hyper = hyper_of({**group, "lr": 0.0} if is_tensor else group, update)
        fresh = _fresh(optimizer, group, update)
        # Dynamo runs a method of this name while it compiles, and guards what it returns: states are there
        # before the first step, which then needs no graph of its own. Where the first step is another one than
        # the others, it is traced as any function is.
        if fresh:
            init_group(optimizer, group, params, grads, states, counts)
        else:
            optimizer._init_group(group, params, grads, states, counts, fused=True)
        calls.append((params, grads, states, counts, update.rule, hyper, lr if is_tensor else None, fresh))
    norm = optimizer._norm(functools.partial(grad.norm, [g for call in calls for g in call[1]]))
    for call in calls:
        if call[0]:
            optim.step_(*call, norm)


@torch._disable_dynamo
def _step_outside(optimizer: torch.optim.Optimizer) -> None:
    """What the operator cannot do ends the graph, and is done as without a compiler."""
    optimizer._step_now()


def _fresh(optimizer, group: dict[str, Any], update) -> list[bool]:
    """Which parameters' momentum starts with the whole first gradient; empty where that changes nothing, as
    dampening alone tells it from a buffer that starts at zero."""
    if not group.get("dampening") or not update.states:
        return []
    fresh = [not optimizer.state[p] for p in group["params"] if p.grad is not None]
    return fresh if any(fresh) else []
