"""Clipping and inspecting gradients: torch.nn.utils' functions, one read of all gradients and at most one write; and
what torch does not have: clipping of other kinds, penalties, and what gradients and activations say of a network. The
rest of them is torch's own."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import utils as _torch

from gdbp._rest import rest_of
from gdbp.nn._arguments import nonnegative
from gdbp.nn._clipping import adaptive_clip_grad_, clip_grad_norm_by_group_, clip_grad_norm_by_layer_
from gdbp.nn._gradients import check_finite, collect, listed, order_of
from gdbp.nn._penalty import penalty
from gdbp.nn.activity import ActivationCollector, ActivationStats, collect_activation_stats
from gdbp.nn.health import GradientHealth, gradient_health

__all__ = [
    "ActivationCollector",
    "ActivationStats",
    "GradientHealth",
    "adaptive_clip_grad_",
    "clip_grad_norm_",
    "clip_grad_norm_by_group_",
    "clip_grad_norm_by_layer_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "collect_activation_stats",
    "get_total_norm",
    "gradient_health",
    "penalty",
]


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
        foreach: for torch's function, which serves DTensors, complex tensors, several devices, and from torch 2.15 on
            sparse tensors.

    Powers are summed in float64, which holds the squares of all other types: their 2-norm overflows only where its own
    value does. That of float64 tensors is infinite, as torch's, from a norm of some 1e154 on, where the squares
    overflow, and so is one of a high order (of float32 from 8 on) where the powers do. It is a 0-dim tensor on the
    tensors' device: float64 where one of them is, else float32, for half types too, which could not hold it.

    Raises:
        RuntimeError: a norm that is not finite, with ``error_if_nonfinite``; names the tensors and what is in them.
    """
    tensors = listed(tensors, "tensors", collected=True)
    order = order_of(norm_type)
    gradients = collect(tensors, True, name="tensors") if order and tensors else None
    if gradients is None:
        return _torch.get_total_norm(tensors, norm_type, error_if_nonfinite, foreach)
    norm = gradients.norm(order, math.inf)
    if error_if_nonfinite:
        check_finite(norm[0], gradients, norm_type, tensors)
    return norm[0] if gradients.is_double else norm[0].float()


@torch.no_grad()
def clip_grads_with_norm_(
    parameters: Tensor | Iterable[Tensor], max_norm: float, total_norm: Tensor, foreach: bool | None = None
) -> None:
    """Multiply every gradient by ``min(1, max_norm / (total_norm + 1e-6))``; nothing is written where that is 1, nor
    for ``max_norm=inf``, whatever the norm.

    Args:
        total_norm: one number, as from :func:`get_total_norm`.

    Raises:
        ValueError: max_norm below 0 or NaN, with which torch turns the gradients around; more than one total norm.
    """
    max_norm = nonnegative("max_norm", max_norm)
    parameters = listed(parameters, collected=True)
    if max_norm == math.inf:
        return None
    gradients = collect(parameters) if isinstance(total_norm, Tensor) and type(total_norm) is Tensor else None
    if gradients is None or not gradients.positions:
        return _torch.clip_grads_with_norm_(parameters, max_norm, total_norm, foreach)
    device = parameters[gradients.positions[0]].grad.device
    coefficient = (max_norm / (total_norm.double() + 1e-6)).clamp(max=1.0).to(device)
    try:
        scaled = gradients.scale(coefficient)
    except RuntimeError:
        if coefficient.numel() == 1:
            raise
        raise ValueError(f"total_norm has shape {tuple(total_norm.shape)}; expected one number") from None
    if not scaled:
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
    max_norm = nonnegative("max_norm", max_norm)
    parameters = listed(parameters, warn=True, collected=True)
    order = order_of(norm_type)
    gradients = collect(parameters) if order else None
    if gradients is None or not gradients.positions:
        return _torch.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
    norm = gradients.norm(order, max_norm)
    if error_if_nonfinite:
        check_finite(norm[0], gradients, norm_type, parameters)
    if not gradients.scale(norm[1]):
        return _torch.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
    return norm[0] if gradients.is_double else norm[0].float()


@torch.no_grad()
def clip_grad_value_(parameters: Tensor | Iterable[Tensor], clip_value: float, foreach: bool | None = None) -> None:
    """Clamp every element of every gradient into ``[-clip_value, clip_value]``; NaN stays NaN.

    Raises:
        ValueError: clip_value below 0 or NaN.
    """
    clip_value = nonnegative("clip_value", clip_value)
    parameters = listed(parameters, collected=True)
    gradients = collect(parameters)
    if gradients is None or not gradients.clamp(clip_value):
        _torch.clip_grad_value_(parameters, clip_value, foreach)


__getattr__, __dir__ = rest_of(__name__, _torch)
