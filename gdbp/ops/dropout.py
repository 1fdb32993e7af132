"""Dropout whose mask is a function of a seed, and so the same on every device."""

import torch

from gdbp.ops._function import Function


class _Dropout(Function):
    @staticmethod
    def forward(input, p, seed, layer):
        return torch.ops.gdbp.dropout(input, p, seed, layer)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.p, seed, ctx.layer = inputs
        ctx.save_for_backward(seed)

    @staticmethod
    def backward(ctx, grad_output):
        (seed,) = ctx.saved_tensors
        return _Dropout.apply(grad_output, ctx.p, seed, ctx.layer), None, None, None


def dropout(input: torch.Tensor, p: float, seed: torch.Tensor, layer: int) -> torch.Tensor:
    """Elements are 0 with probability ``p`` from 0 to 1, and else divided by 1 - p. Which ones is a function of
    ``seed`` (one int64 number beside the input), ``layer`` (a number that tells masks of one seed apart) and the
    element's position. Differentiable any number of times; only with the compiled part."""
    return _Dropout.apply(input, p, seed, layer)
