"""Comparing tensors: in units in the last place, and bit by bit."""

import math
from collections.abc import Callable

import torch

from gdbp.testing.report import Failure


def ulps(p: torch.Tensor, exact: torch.Tensor, peak: torch.Tensor) -> torch.Tensor:
    """Distance of every element from its exact value, in units in the last place of p's dtype at peak."""
    info = torch.finfo(p.dtype)
    _, exponent = torch.frexp(peak.clamp_min(info.tiny).nan_to_num(posinf=info.max))
    unit = torch.exp2(exponent.double() - 1) * info.eps
    same = (p.detach() == exact.detach()) | (p.detach().isnan() & exact.detach().isnan())
    return torch.where(same, 0.0, ((p.detach().double() - exact.detach()).abs() / unit).nan_to_num(nan=math.inf))


def same_bits(a, b) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return (
            a.dtype == b.dtype
            and torch.equal(a.nan_to_num(nan=1.5), b.nan_to_num(nan=1.5))
            and bool(torch.equal(a.isnan(), b.isnan()))
        )
    return type(a) is type(b) and a == b


def difference(a, b) -> str:
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return f"is {a!r} instead of {b!r}"
    if a.dtype != b.dtype or a.shape != b.shape:
        return f"is {a.dtype} {tuple(a.shape)} instead of {b.dtype} {tuple(b.shape)}"
    return f"differs by up to {number((a.double() - b.double()).abs().max().item())}"


def number(value: float) -> str:
    return f"{value:.3g}"


def require(condition: bool, evidence: str | Callable[[], str]) -> None:
    if not condition:
        raise Failure(evidence if isinstance(evidence, str) else evidence())
