"""Learning rates over a run, composed of torch's schedulers and advanced once per training step."""

from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR, StepLR

from gdbp._errors import InputError

__all__ = ["SCHEDULES", "make_schedule"]


def _constant(optimizer, steps):
    return LambdaLR(optimizer, lambda step: 1.0)


def _step(optimizer, steps):
    return StepLR(optimizer, step_size=-(-steps // 3), gamma=0.1)


def _cosine(optimizer, steps):
    return CosineAnnealingLR(optimizer, T_max=steps)


def _onecycle(optimizer, steps):
    # OneCycleLR would give momentum to an optimizer that was made without any.
    cycles = all("betas" in group or group.get("momentum", 0) > 0 for group in optimizer.param_groups)
    peaks = [group["lr"] for group in optimizer.param_groups]
    return OneCycleLR(optimizer, max_lr=peaks, total_steps=steps, cycle_momentum=cycles)


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer, int], LRScheduler]] = {
    "constant": _constant,
    "step": _step,
    "cosine": _cosine,
    "onecycle": _onecycle,
}


def make_schedule(name: str, optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """A torch scheduler that is to be stepped ``steps`` times, once after each optimizer step.

    ``constant``: the optimizer's rate throughout; ``step``: a tenth of it after each third of the run;
    ``cosine``: down to 0 along half a cosine; ``onecycle``: up from 1/25 of it over the first 30 % of the
    run, then down to nearly 0, with the momentum the other way round. Raises InputError for another name.
    """
    if name not in SCHEDULES:
        raise InputError(f"schedule {name!r} is unknown; expected one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name](optimizer, max(1, steps))
