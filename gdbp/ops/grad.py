"""One read of many tensors: the norm of gradients and what it decides, the penalty of parameters."""

from collections.abc import Sequence

import torch
from torch.autograd import forward_ad

from gdbp import _load
from gdbp.ops._distributed import is_distributed, local, sum_over_ranks
from gdbp.ops._function import Function, is_batched, is_differentiated, is_transformed, needs_autograd


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


class _Penalty(Function):
    @staticmethod
    def forward(l1, l2, *tensors):
        value = _load._C.Gradients.of(list(tensors), True).penalty(l1, l2)
        return value.to(_dtype_of(tensors))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.l1, ctx.l2, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad_output):
        tensors = ctx.saved_tensors
        wanted = [t for t, needed in zip(tensors, ctx.needs_input_grad[2:]) if needed]
        if is_differentiated() or is_transformed() or is_batched(grad_output):
            slopes = iter(_penalty_slopes(grad_output, wanted, ctx.l1, ctx.l2))
        else:
            read = _load._C.Gradients.of(wanted, True)
            slopes = iter(read.penalty_slope(ctx.l1, ctx.l2, grad_output.double()))
        return None, None, *(next(slopes) if needed else None for needed in ctx.needs_input_grad[2:])


def penalty(tensors: Sequence[torch.Tensor], l1: float, l2: float) -> torch.Tensor:
    """``l1 sum |x| + l2 / 2 sum x^2`` of all; see :func:`gdbp.nn.utils.penalty`."""
    traced = is_transformed() or torch.compiler.is_compiling() or torch.jit.is_tracing()
    plain = _load.available and not traced
    read = _load._C.Gradients.of(list(tensors), True) if plain and tensors and forward_ad._current_level < 0 else None
    if read is None:
        return _plain_penalty(tensors, l1, l2)
    if needs_autograd(*tensors):
        return _Penalty.apply(l1, l2, *tensors)
    return read.penalty(l1, l2).to(_dtype_of(tensors))


# In operators that torch differentiates again, and for tensors that the kernels do not see.


def _dtype_of(tensors: Sequence[torch.Tensor]) -> torch.dtype:
    return torch.float64 if any(t.dtype is torch.float64 for t in tensors) else torch.float32


def _plain_penalty(tensors: Sequence[torch.Tensor], l1: float, l2: float) -> torch.Tensor:
    if not tensors:
        return torch.zeros((), dtype=torch.float32)
    wide = [t.double() for t in tensors]
    total = sum((l1 * t.abs().sum() + l2 / 2 * t.square().sum()).to(wide[0].device) for t in wide)
    return total.to(_dtype_of(tensors))


def _penalty_slopes(
    grad_output: torch.Tensor, tensors: Sequence[torch.Tensor], l1: float, l2: float
) -> list[torch.Tensor]:
    g = grad_output.double()
    return [(g.to(t.device) * (l1 * t.double().sign() + l2 * t.double())).to(t.dtype) for t in tensors]
