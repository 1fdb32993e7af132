"""The arguments that every fused optimizer has beyond torch's: their defaults, and what they may be."""

import inspect
from typing import Any

from gdbp.optim._precision import Precision

EXTRAS = (
    inspect.Parameter("l1", inspect.Parameter.KEYWORD_ONLY, default=0.0, annotation=float),
    inspect.Parameter("l1_mode", inspect.Parameter.KEYWORD_ONLY, default="subgradient", annotation=str),
    inspect.Parameter("clip_value", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=float | None),
)
STEP_EXTRAS = (
    inspect.Parameter("max_grad_norm", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=float | None),
    inspect.Parameter("skip_nonfinite", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=bool),
    inspect.Parameter("amp_fused", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=bool),
    *(
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Precision.__annotations__[name]
        )
        for name, default in Precision._field_defaults.items()
    ),
)


def set_extras(group: dict[str, Any], defaults: dict[str, Any]) -> None:
    for parameter in EXTRAS:
        group.setdefault(parameter.name, defaults.get(parameter.name, parameter.default))
    check_extras(group)


def check_extras(extras: dict[str, Any]) -> None:
    l1, mode, clip = extras["l1"], extras["l1_mode"], extras["clip_value"]
    try:
        if not l1 >= 0.0:
            raise ValueError(f"Invalid l1 value: {l1}; expected a number >= 0")
        if clip is not None and not clip > 0.0:
            raise ValueError(f"Invalid clip_value: {clip}; expected a number > 0, or None for no clipping")
    except TypeError:
        raise TypeError(f"l1 is {l1!r} and clip_value {clip!r}; expected numbers, or None for no clipping") from None
    if mode not in ("subgradient", "prox"):
        raise ValueError(f"Invalid l1_mode: {mode!r}; expected 'subgradient' or 'prox'")


def check_max_grad_norm(value: float | None) -> None:
    try:
        if value is not None and not value > 0.0:
            raise ValueError(f"Invalid max_grad_norm: {value}; expected a number > 0, or None for no clipping")
    except TypeError:
        raise TypeError(f"max_grad_norm is {value!r}; expected a number > 0, or None for no clipping") from None


def check_switches(**values: bool) -> None:
    for name, value in values.items():
        if isinstance(value, str):  # every string is true
            raise TypeError(f"{name} is {value!r}; expected True or False")
