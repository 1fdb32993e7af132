"""Clipping and inspecting gradients: torch.nn.utils' functions, one read of all gradients and at most one write.
And inspecting activations."""

import math
import types
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import utils as _torch

from gdbp import _load
from gdbp.nn.activity import ActivationCollector, ActivationStats, collect_activation_stats
from gdbp.nn.health import GradientHealth, gradient_health, seen_in

__all__ = [
    "ActivationCollector",
    "ActivationStats",
    "GradientHealth",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "collect_activation_stats",
    "get_total_norm",
    "gradient_health",
]


def _listed(tensors: Tensor | Iterable[Tensor], warn: bool = False) -> list[Tensor]:
    if isinstance(tensors, Tensor):
        return [tensors]
    listed = list(tensors)
    if warn and not listed and isinstance(tensors, types.GeneratorType):
        warnings.warn("`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=4)
    return listed


def _collect(tensors: list[Tensor], themselves: bool = False):
    """All gradients for one pass over them, or None where torch's functions are to do it: under torch.compile,
    which fuses those, and for tensors without kernels."""
    if not _load.available or torch.compiler.is_compiling():
        return None
    return _load._C.Gradients.of(tensors, themselves)


def _order(norm_type: float) -> float | None:
    """The order of a norm that is a norm; None for the others, which torch computes."""
    order = float(norm_type)
    return order if order > 0 else None


def _nonnegative(name: str, value: float) -> float:
    if not value >= 0:
        raise ValueError(f"{name} is {value}; expected a number of at least 0")
    return float(value)


def _check_finite(total: Tensor, gradients, norm_type: float, tensors: list[Tensor]) -> None:
    if torch.isfinite(total):
        return
    shapes = [tuple(tensors[i].shape) for i in gradients.positions]
    names = [f"number {i} of shape {shape}" for i, shape in zip(gradients.positions, shapes)]
    where = "; ".join(seen_in(gradients.health(), names)) or "each of them is finite, their norm is not"
    raise RuntimeError(
        f"The total norm of order {float(norm_type)} for gradients from `parameters` is non-finite, so it cannot be "
        "clipped. To disable this error and scale the gradients by the non-finite norm anyway, set "
        f"`error_if_nonfinite=False`. Gradients, counted from 0: {where}"
    )


@torch.no_grad()
def get_total_norm(
    tensors: Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """The norm of all elements of all tensors, in one read.

    Args:
        tensors: any shapes, floating point, of several dtypes if need be.
        norm_type: above 0, or ``inf`` for the largest absolute value. Others are torch's function's work.
        error_if_nonfinite: raise where the norm is NaN or infinite; on CUDA this waits for it.
        foreach: for torch's function, which serves DTensors, complex and sparse tensors, and several devices.

    Powers are summed in float64, so the norm overflows only where its own value does. It is a 0-dim tensor on the
    tensors' device: float64 where one of them is, else float32, for half types too, which could not hold it.

    Raises:
        RuntimeError: a norm that is not finite, with ``error_if_nonfinite``; names the tensors and what is in them.
    """
    tensors = _listed(tensors)
    order = _order(norm_type)
    gradients = _collect(tensors, True) if order and tensors else None
    if gradients is None:
        return _torch.get_total_norm(tensors, norm_type, error_if_nonfinite, foreach)
    norm = gradients.norm(order, math.inf)
    if error_if_nonfinite:
        _check_finite(norm[0], gradients, norm_type, tensors)
    return norm[0] if gradients.is_double else norm[0].float()


@torch.no_grad()
def clip_grads_with_norm_(
    parameters: Tensor | Iterable[Tensor], max_norm: float, total_norm: Tensor, foreach: bool | None = None
) -> None:
    """Multiply every gradient by ``min(1, max_norm / (total_norm + 1e-6))``; nothing is written where that is 1.

    Args:
        total_norm: one number, as from :func:`get_total_norm`.

    Raises:
        ValueError: max_norm below 0 or NaN, with which torch turns the gradients around.
    """
    max_norm = _nonnegative("max_norm", max_norm)
    parameters = _listed(parameters)
    gradients = _collect(parameters) if isinstance(total_norm, Tensor) and type(total_norm) is Tensor else None
    if gradients is None or not gradients.positions:
        return _torch.clip_grads_with_norm_(parameters, max_norm, total_norm, foreach)
    device = parameters[gradients.positions[0]].grad.device
    coefficient = (max_norm / (total_norm.double() + 1e-6)).clamp(max=1.0).to(device)
    if not gradients.scale(coefficient):
        _torch.clip_grads_with_norm_(parameters, max_norm, total_norm, foreach)


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scale all gradients so that their norm together is at most ``max_norm``; returns the norm they had.

    One read, and one write where they are too long. The norm is as in :func:`get_total_norm`, the scaling as in
    :func:`clip_grads_with_norm_`, so a NaN makes all gradients NaN, and an infinity makes the finite ones 0.

    Args:
        parameters: those without a gradient are passed over.
        max_norm: at least 0; ``inf`` only measures.
        norm_type, error_if_nonfinite, foreach: see :func:`get_total_norm`. The error comes before any change.

    Raises:
        RuntimeError: a norm that is not finite, with ``error_if_nonfinite``; says in which gradients what is.
        ValueError: max_norm below 0 or NaN.
    """
    max_norm = _nonnegative("max_norm", max_norm)
    parameters = _listed(parameters, warn=True)
    order = _order(norm_type)
    gradients = _collect(parameters) if order else None
    if gradients is None or not gradients.positions:
        return _torch.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
    norm = gradients.norm(order, max_norm)
    if error_if_nonfinite:
        _check_finite(norm[0], gradients, norm_type, parameters)
    if not gradients.scale(norm[1]):
        return _torch.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
    return norm[0] if gradients.is_double else norm[0].float()


@torch.no_grad()
def clip_grad_value_(parameters: Tensor | Iterable[Tensor], clip_value: float, foreach: bool | None = None) -> None:
    """Clamp every element of every gradient into ``[-clip_value, clip_value]``; NaN stays NaN.

    Raises:
        ValueError: clip_value below 0 or NaN.
    """
    clip_value = _nonnegative("clip_value", clip_value)
    parameters = _listed(parameters)
    gradients = _collect(parameters)
    if gradients is None or not gradients.clamp(clip_value):
        _torch.clip_grad_value_(parameters, clip_value, foreach)
