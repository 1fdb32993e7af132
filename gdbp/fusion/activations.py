"""torch's activations, as modules, functions and methods, and the names under which kernels know them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

MODULES: dict[type, str] = {
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.ELU: "elu",
    nn.Softplus: "softplus",
}
# What torch lets one choose, under the names that its modules and functions share, and what the kernels have.
PARAMETERS: dict[str, dict[str, tuple]] = {
    "leaky_relu": {"negative_slope": (0.01,)},
    "gelu": {"approximate": ("none", "tanh")},
    "elu": {"alpha": (1.0,)},
    "softplus": {"beta": (1.0,), "threshold": (20.0,)},
}
_BUILTINS = frozenset(("gelu", "softplus"))  # those that have no ``inplace``
FUNCTIONS: dict[Callable, str] = {
    **{getattr(F, name): name for name in MODULES.values()},
    **{getattr(torch, name): name for name in ("relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_")},
    **{getattr(F, name): name for name in ("relu_", "leaky_relu_", "elu_")},
}
METHODS = frozenset(("relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_"))


def named(kind: str, values: Mapping[str, Any]) -> tuple[str | None, str]:
    """The kernel's name for an activation with these parameters; or None, and why there is none."""
    for parameter, known in PARAMETERS.get(kind, {}).items():
        value = values.get(parameter, known[0])
        if value not in known:
            return None, f"{kind} with {parameter}={value}; kernels have {' or '.join(map(str, known))}"
    if kind == "gelu" and values.get("approximate") == "tanh":
        kind = "gelu_tanh"
    return kind, ""


def of_module(module: nn.Module) -> tuple[str | None, str]:
    """Like :func:`named`, of a module; neither a name nor a reason where it is no activation known here."""
    kind = MODULES.get(type(module))
    if kind is None:
        return None, ""
    return named(kind, vars(module)) if kind in PARAMETERS else (kind, "")


def of_call(target: Callable | str, args: tuple, kwargs: Mapping[str, Any]) -> tuple[str | None, str]:
    """Like :func:`of_module`, of a call of a function or method; ``args`` come after the input."""
    kind = FUNCTIONS.get(target) if callable(target) else target if target in METHODS else None
    if kind is None:
        return None, ""
    kind = kind.removesuffix("_")
    names = [*PARAMETERS.get(kind, ()), *(() if kind in _BUILTINS else ("inplace",))]
    given = {**dict(zip(names, args)), **kwargs}
    if len(args) > len(names) or not given.keys() <= set(names):
        return None, f"{kind} with arguments of its own"
    return named(kind, given)
