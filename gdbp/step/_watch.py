"""What a compiled step was made of, and must find again at every call."""

from collections.abc import Iterable
from typing import Any

import torch

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


class CannotFuse(Exception):
    """One sentence: what can't be part of a fused step, what was expected, and what to do."""


class Watch:
    """Reads modules, and remembers what was read: C++ compares it by identity before each step."""

    def __init__(self):
        self.values: list[tuple[dict, str, Any]] = []  # a dict, a key, and what has to be there
        self.lengths: list[tuple[dict, int]] = []  # a dict, and how long it has to be

    def no_hooks(self, owner: Any, names: Iterable[str], label: str) -> None:
        """Raises CannotFuse: it has hooks of these names."""
        for name in names:
            hooks = getattr(owner, name)
            if hooks:
                raise CannotFuse(
                    f"{label} has hooks ({name}), which a fused step would not call; remove them, or use strict=False"
                )
            if hooks is not None:
                self.lengths.append((hooks, 0))

    def module(self, module: torch.nn.Module, label: str) -> None:
        """Notes children, and that there are no hooks and no forward of its own.

        Raises:
            CannotFuse: there are.
        """
        if "forward" in vars(module):
            raise CannotFuse(f"{label} has a forward of its own, set on the instance; delete it, or use strict=False")
        self.no_hooks(module, _HOOKS, label)
        self.lengths.append((module._modules, len(module._modules)))
        self.values += [(module._modules, name, child) for name, child in module._modules.items()]

    def option(self, module: torch.nn.Module, name: str) -> Any:
        """An attribute that is no tensor."""
        value = getattr(module, name)
        if name in vars(module):
            self.values.append((vars(module), name, value))
        return value

    def tensor(self, module: torch.nn.Module, name: str, label: str) -> torch.Tensor | None:
        """A parameter or buffer, or None."""
        for kind in (module._parameters, module._buffers):
            if name not in kind:
                continue
            value = kind[name]
            self.values.append((kind, name, value))
            if value is not None and type(value) not in (torch.Tensor, torch.nn.Parameter):
                raise CannotFuse(
                    f"{name} of {label} is of type {type(value).__name__}; expected a plain tensor; use strict=False"
                )
            if value is not None:
                self.no_hooks(value, _TENSOR_HOOKS, f"{name} of {label}")
            return value
        raise CannotFuse(
            f"{name} of {label} is computed, by a parametrization perhaps; make it a parameter again, or use "
            "strict=False"
        )
