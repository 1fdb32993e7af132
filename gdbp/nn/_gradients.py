"""What the functions that clip and inspect gradients share: lists of them, their checks, their errors."""

import math
import types
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from gdbp import _load
from gdbp.nn._arguments import number
from gdbp.nn.health import seen_in


def listed(
    tensors: Tensor | Iterable[Tensor], name: str = "parameters", warn: bool = False, collected: bool = False
) -> list[Tensor]:
    """``collected``: whether collect() is what looks at them next, which finds by itself what is no tensor."""
    if isinstance(tensors, Tensor):
        return [tensors]
    if not isinstance(tensors, Iterable):
        raise TypeError(f"{name} is of type {type(tensors).__name__}; expected a tensor, or tensors")
    listed = list(tensors)
    if not collected:
        _check_kinds(listed, name)
    if warn and not listed and isinstance(tensors, types.GeneratorType):
        warnings.warn("`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=4)
    return listed


def collect(tensors: list[Tensor], themselves: bool = False, by_row: bool = False, name: str = "parameters"):
    """All gradients for one pass over them, or None where torch's functions are to do it: under torch.compile,
    which fuses those, and for tensors without kernels."""
    if not _load.available or torch.compiler.is_compiling():
        return None
    found = _load._C.Gradients.of(tensors, themselves, by_row)
    if found is None:
        _check_kinds(tensors, name)
    return found


def _check_kinds(tensors: list[Tensor], name: str) -> None:
    for kind in set(map(type, tensors)):
        if not issubclass(kind, Tensor):
            raise TypeError(f"{name} holds a {kind.__name__}; expected tensors")


def order_of(norm_type: float) -> float | None:
    """The order of a norm that is a norm; None for the others, which torch computes."""
    order = math.inf if norm_type == "inf" else number("norm_type", norm_type)
    return order if order > 0 else None


def check_finite(total: Tensor, gradients, norm_type: float, tensors: list[Tensor]) -> None:
    if torch.isfinite(total):
        return
    where = "; ".join(said_of(gradients, tensors)) or "each of them is finite, their norm is not"
    raise RuntimeError(
        f"The total norm of order {float(norm_type)} for gradients from `parameters` is non-finite, so it cannot be "
        "clipped. To disable this error and scale the gradients by the non-finite norm anyway, set "
        f"`error_if_nonfinite=False`. Gradients, counted from 0: {where}"
    )


def said_of(gradients, tensors: Sequence[Tensor]) -> list[str]:
    """What is in those gradients that are not finite."""
    names = [f"number {i} of shape {tuple(tensors[i].shape)}" for i in gradients.positions]
    return seen_in(gradients.health(), names)
