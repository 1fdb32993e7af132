"""Who wants to see what layers put out, or that they are called. Hooks would do, if one on a layer did not keep it out
of a fused run."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch.nn.modules import module as _hooks


class Observer(Protocol):
    def watches(self, module: torch.nn.Module) -> bool: ...

    def see(self, layers: Sequence[torch.nn.Module | str], activation: str | None, output: torch.Tensor) -> None:
        """The layers that were computed together, their activation, and the output."""


# Empty as a rule.
observers: list[Observer] = []


def is_observed(module: torch.nn.Module) -> bool:
    return any(observer.watches(module) for observer in observers)


def obstacle(module: torch.nn.Module) -> str:
    """Why this module must be called and not be computed for; empty if nothing is in the way."""
    m = module
    if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
        return "it has hooks"
    if "forward" in m.__dict__:
        return "its forward was replaced"
    return ""


def is_watched() -> bool:
    """Whether somebody asked to be told of every module's call."""
    h = _hooks
    return bool(
        h._global_forward_hooks
        or h._global_forward_pre_hooks
        or h._global_backward_hooks
        or h._global_backward_pre_hooks
    )


def tell(layers: Sequence[torch.nn.Module | str], activation: str | None, output: torch.Tensor) -> None:
    for observer in tuple(observers):
        observer.see(layers, activation, output)


def as_leaf(module: torch.nn.Module, input: torch.fx.Proxy) -> torch.fx.Proxy | None:
    """A call of the module in the graph that torch.fx is making: as of torch's own layers, into which it does not
    look. None where the graph is that of the module itself."""
    path = input.tracer.path_of_module(module)
    return input.tracer.create_proxy("call_module", path, (input,), {}) if path else None
