"""Distance between a result and its float64 reference, in units in the last place."""

import math

import torch

# Few enough that the temporaries of the comparison stay in cache.
CHUNK = 2**18


def ulp_error(result: torch.Tensor, reference: torch.Tensor, floor: str = "none") -> float:
    """The largest error of an element, in ulp of the result's dtype at the reference's magnitude.

    Args:
        result: of any floating dtype.
        reference: float64, of the same shape.
        floor: "none", or "rms": elements below the root mean square of the reference are measured with its
            ulp. It is for sums of products, whose error follows the terms and not the sum.

    Returns infinity for another shape, or a NaN that only one of the two has.
    """
    if result.shape != reference.shape:
        return math.inf
    if result.numel() == 0:
        return 0.0
    info = torch.finfo(result.dtype)
    smallest = info.tiny
    if floor == "rms":
        smallest = max(smallest, reference.square().mean().sqrt().item())
    worst = 0.0
    chunks = zip(result.detach().reshape(-1).split(CHUNK), reference.detach().reshape(-1).split(CHUNK))
    for got, expected in chunks:
        # frexp's mantissa lies in [0.5, 1), hence the 1: the spacing at 2**e is eps * 2**e.
        _, exponent = torch.frexp(expected.abs().clamp_min(smallest))
        spacing = torch.ldexp(torch.full_like(expected, info.eps), exponent - 1)
        error = (got.double() - expected).abs() / spacing
        # Equal infinities differ by NaN.
        same = (got == expected) | (got.isnan() & expected.isnan())
        error = torch.where(same, 0.0, error.nan_to_num(nan=math.inf, posinf=math.inf))
        worst = max(worst, error.max().item())
    return worst
