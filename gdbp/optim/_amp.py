"""``torch.amp.GradScaler``'s unscaling and skipping inside the step (``amp_fused=True``)."""

import math

import torch


def scaler_of(optimizer: torch.optim.Optimizer) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What a scaler left at the optimizer for this step alone: the scale of the gradients, and a number that is
    not 0 where one of them is not finite."""
    return getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)


def scaled(
    norm: torch.Tensor | None, limit: float, scale: torch.Tensor | None, found_inf: torch.Tensor | None
) -> torch.Tensor:
    """What :func:`gdbp.ops.grad.norm` would say of the unscaled gradients, without waiting for the device.

    Args:
        norm: what it says of the scaled ones without a limit; None where nobody asked for the norm.
        limit: largest norm of the unscaled ones.
    """
    device = next(t.device for t in (norm, scale, found_inf) if t is not None)
    total, _, skip = torch.zeros(3, dtype=torch.float64, device=device) if norm is None else norm
    unscale = torch.ones_like(total) if scale is None else scale.reshape(()).to(total).reciprocal()
    total = total * unscale
    coefficient = unscale
    if not math.isinf(limit):
        coefficient = unscale * (limit / (total + 1e-6)).clamp(max=1.0)
    if found_inf is not None:
        skip = skip + found_inf.reshape(()).to(total)
    return torch.stack([total, coefficient, skip])
