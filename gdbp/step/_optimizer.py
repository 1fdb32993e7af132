"""An optimizer as the compiled step takes it: its rules and its states, which stay its own."""

import inspect

import torch

from gdbp import optim
from gdbp.ops._function import is_fused
from gdbp.optim._base import Fused, has_step_hooks, is_torchs
from gdbp.step._watch import CannotFuse

_TWINS = {getattr(torch.optim, cls.__name__): cls for cls in (optim.SGD, optim.RMSprop, optim.Adam, optim.AdamW)}


def fused_form(optimizer: torch.optim.Optimizer) -> Fused:
    """The optimizer itself, or for torch's own a twin of our class that shares everything it holds.

    Raises:
        CannotFuse: an optimizer of another class.
    """
    # torch wraps the step of every class.
    if isinstance(optimizer, Fused) and inspect.unwrap(type(optimizer).step) is inspect.unwrap(Fused.step):
        return optimizer
    twin = _TWINS.get(type(optimizer))
    if twin is None:
        raise CannotFuse(
            f"{type(optimizer).__name__} has no fused form; expected an optimizer of gdbp.optim, or torch's own "
            f"{', '.join(cls.__name__ for cls in _TWINS)}; use strict=False to run others eagerly"
        )
    rules = object.__new__(twin)
    rules.__dict__ = optimizer.__dict__
    rules.__dict__.setdefault("_last", {"grad_norm": None})
    return rules


def check(optimizer: torch.optim.Optimizer) -> None:
    """Of everything that may change from step to step.

    Raises:
        CannotFuse: something that a fused step does not do.
    """
    name = type(optimizer).__name__
    if has_step_hooks(optimizer):
        raise CannotFuse(f"{name} has step hooks, which a fused step would not call; remove them, or use strict=False")
    if any(map(is_torchs, optimizer.param_groups)):
        raise CannotFuse(
            f"{name} has a group with capturable or differentiable, which torch's own step computes; switch them off, "
            "or use strict=False"
        )


def check_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Of the tensors, which do not change unnoticed.

    Raises:
        CannotFuse: tensors that C++ can't hold.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if not all(map(is_fused, params)) or len(set(map(id, params))) != len(params):
        raise CannotFuse(
            f"{type(optimizer).__name__} holds a parameter twice, or one that is no plain tensor; use strict=False"
        )
    kinds = {p.device for p in params}
    if len(kinds) > 1 or any(kind.type not in ("cpu", "cuda") for kind in kinds):
        found = ", ".join(sorted(map(str, kinds)))
        raise CannotFuse(f"the parameters are on {found}; expected the CPU or one CUDA device; use strict=False there")
