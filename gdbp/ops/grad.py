"""One read of many gradients: their norm, and what it decides."""

from collections.abc import Sequence

import torch

from gdbp.ops._distributed import is_distributed, local, sum_over_ranks


@torch.no_grad()
def norm(
    grads: Sequence[torch.Tensor], max_norm: float, scale: float = 1.0, skip_nonfinite: bool = False
) -> torch.Tensor:
    """Three float64 numbers: the 2-norm of all gradients times ``scale``; the coefficient that every gradient is
    to be multiplied by, ``scale * min(1, max_norm / (norm + 1e-6))``; and 1 where the step is to be skipped.

    In plain torch, for tensors that the kernels in csrc/grad do not see. A DTensor's norm is over all ranks,
    each of which must call this with the same DTensors in the same order.
    """
    if not grads:
        return torch.tensor([0.0, scale, 0.0], dtype=torch.float64)
    # One sum for all that are spread alike, so that the ranks talk once and not once for every gradient.
    squares: dict = {}
    for g in grads:
        spread = (g.device_mesh, g.placements) if is_distributed(g) else g.device
        _, parts = squares.setdefault(spread, (g, []))
        parts.append(torch.linalg.vector_norm(local(g), dtype=_wide(g)).double().square())
    sums = []
    for first, parts in squares.values():
        total = torch.stack(parts).sum()
        sums.append(sum_over_ranks(total, first) if is_distributed(first) else total)
    total = torch.stack([part.to(sums[0].device) for part in sums]).sum().sqrt() * scale
    coefficient = scale * (max_norm / (total + 1e-6)).clamp(max=1.0)
    skip = ~torch.isfinite(total) if skip_nonfinite else torch.zeros_like(total)
    return torch.stack([total, coefficient, skip.to(total.dtype)])


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.complex128 if tensor.is_complex() else torch.float64
