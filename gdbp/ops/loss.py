"""Losses: those of single elements, and cross-entropy over class indices."""

import torch

from gdbp import _load, reference
from gdbp.ops._function import Function, is_fused, needs_autograd


class _PointwiseLoss(Function):
    @staticmethod
    def forward(input, target, kind, parameter, reduction):
        return torch.ops.gdbp.pointwise_loss(input, target, kind, parameter, reduction)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, target, *ctx.options = inputs
        ctx.save_for_backward(input, target)

    @staticmethod
    def backward(ctx, grad_output):
        nothing = (None,) * 3
        input, target = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *reference.pointwise_loss_backward(grad_output, input, target, *ctx.options), *nothing
        mask = ctx.needs_input_grad[:2]
        grads = torch.ops.gdbp.pointwise_loss_backward(grad_output, input, target, *ctx.options, mask)
        return *grads, *nothing

    @staticmethod
    def vmap(info, in_dims, input, target, *options):
        return torch.vmap(reference.pointwise_loss, in_dims=in_dims)(input, target, *options), 0


def pointwise_loss(
    input: torch.Tensor, target: torch.Tensor, kind: str, parameter: float, reduction: str
) -> torch.Tensor:
    """A loss of single elements, for two tensors of one shape and dtype.

    ``kind`` is a name of GDBP_POINTWISE_LOSSES in csrc/pointwise/pointwise_math.h, and of a function in
    :mod:`gdbp.nn.functional`; ``parameter`` is its delta or beta, greater than 0, or unused.
    """
    if not (_load.available and is_fused(input, target)):
        return reference.pointwise_loss(input, target, kind, parameter, reduction)
    if needs_autograd(input, target):
        return _PointwiseLoss.apply(input, target, kind, parameter, reduction)
    return torch.ops.gdbp.pointwise_loss(input, target, kind, parameter, reduction)


class _CrossEntropy(Function):
    @staticmethod
    def forward(logits, target, weight, reduction, ignore_index, label_smoothing):
        return torch.ops.gdbp.cross_entropy(logits, target, weight, reduction, ignore_index, label_smoothing)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, target, weight, *ctx.options = inputs
        _, stats, total_weight = output
        ctx.mark_non_differentiable(stats, total_weight)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, target, weight, stats, total_weight)

    @staticmethod
    def backward(ctx, grad_output, *_):
        nothing = (None,) * 5
        if grad_output is None:
            return None, *nothing
        logits, target, weight, stats, total_weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            return reference.cross_entropy_backward(grad_output, logits, target, weight, *ctx.options), *nothing
        grad = torch.ops.gdbp.cross_entropy_backward(
            grad_output, logits, target, weight, stats, total_weight, *ctx.options
        )
        return grad, *nothing

    @staticmethod
    def vmap(info, in_dims, logits, target, weight, *options):
        loss = torch.vmap(reference.cross_entropy, in_dims=in_dims)(logits, target, weight, *options)
        # Only the fused backward reads the statistics, and it never runs on what vmap made.
        return (loss, loss.new_empty(()), loss.new_empty(())), (0, None, None)


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> torch.Tensor:
    """Cross-entropy of (rows, classes) logits and (rows,) int64 labels; see :mod:`gdbp.nn.functional`."""
    options = (reduction, ignore_index, label_smoothing)
    if not (_load.available and is_fused(logits, target, weight)):
        return reference.cross_entropy(logits, target, weight, *options)
    if needs_autograd(logits):
        return _CrossEntropy.apply(logits, target, weight, *options)[0]
    return torch.ops.gdbp.cross_entropy(logits, target, weight, *options)[0]
