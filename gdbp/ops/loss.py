"""Losses: those of single elements, and cross-entropy."""

import torch

from gdbp import _load, reference
from gdbp.ops._function import Function, differentiate, is_differentiated, is_direct, is_fused, needs_autograd

if _load.available:
    from gdbp import _C


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
        input, target = ctx.saved_tensors
        nothing = (None,) * 3
        if is_differentiated():
            return *reference.pointwise_loss_backward(grad_output, input, target, *ctx.options), *nothing
        mask = ctx.needs_input_grad[:2]
        return *torch.ops.gdbp.pointwise_loss_backward(grad_output, input, target, *ctx.options, mask), *nothing

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
    if is_direct(input, target):
        return _C.pointwise_loss(input, target, kind, parameter, reduction)
    if not (_load.available and is_fused(input, target)):
        return reference.pointwise_loss(input, target, kind, parameter, reduction)
    if needs_autograd(input, target):
        return _PointwiseLoss.apply(input, target, kind, parameter, reduction)
    return torch.ops.gdbp.pointwise_loss(input, target, kind, parameter, reduction)


class _BceWithLogits(Function):
    @staticmethod
    def forward(input, target, weight, pos_weight, reduction):
        return torch.ops.gdbp.bce_with_logits(input, target, weight, pos_weight, reduction)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.reduction = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad_output):
        tensors, nothing = ctx.saved_tensors, (None,) * 3
        if is_differentiated():
            return *reference.bce_with_logits_backward(grad_output, *tensors, ctx.reduction), *nothing
        mask = ctx.needs_input_grad[:2]
        return *torch.ops.gdbp.bce_with_logits_backward(grad_output, *tensors, ctx.reduction, mask), *nothing

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return torch.vmap(reference.bce_with_logits, in_dims=in_dims)(*arguments), 0


def bce_with_logits(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    pos_weight: torch.Tensor | None,
    reduction: str,
) -> torch.Tensor:
    """Binary cross-entropy with logits, for two tensors of one shape and factors that broadcast to it, all of one
    dtype; see :mod:`gdbp.nn.functional`. Not differentiable in the factors."""
    tensors = (input, target, weight, pos_weight)
    if is_direct(*tensors):
        return _C.bce_with_logits(*tensors, reduction)
    if not (_load.available and is_fused(*tensors)):
        return reference.bce_with_logits(*tensors, reduction)
    if needs_autograd(input, target):
        return _BceWithLogits.apply(*tensors, reduction)
    return torch.ops.gdbp.bce_with_logits(*tensors, reduction)


class _CrossEntropy(Function):
    """Keeps the logits, over which the backward pass writes the gradient if ``inplace``."""

    @staticmethod
    def forward(logits, target, second, share, weight, normalizer, inplace, empty_is_zero, *options):
        arguments = (logits, target, second, share, weight, normalizer, *options, empty_is_zero)
        return torch.ops.gdbp.cross_entropy(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, normalizer, ctx.inplace, _, reduction, ignore_index, smoothing, z_loss, softcap = inputs
        ctx.options = (reduction, ignore_index, smoothing, z_loss, softcap)
        _, stats, divisor = output
        ctx.mark_non_differentiable(stats, divisor)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, normalizer, stats, divisor)

    @staticmethod
    def backward(ctx, grad_output, *_):
        nothing = (None,) * 11
        if grad_output is None:
            return None, None, *nothing
        *tensors, normalizer, stats, divisor = ctx.saved_tensors
        if is_differentiated():
            if ctx.inplace:
                raise RuntimeError(
                    "cross_entropy: inplace_backward=True writes the gradient over the logits, so it cannot be "
                    "differentiated again; leave out inplace_backward or create_graph"
                )
            return *reference.cross_entropy_backward(grad_output, *tensors, normalizer, *ctx.options), *nothing
        if ctx.inplace:
            torch.ops.gdbp.cross_entropy_backward_(grad_output, *tensors, stats, divisor, *ctx.options)
            return tensors[0].detach(), None, *nothing
        mask = ctx.needs_input_grad[:2]
        grads = torch.ops.gdbp.cross_entropy_backward(grad_output, *tensors, stats, divisor, *ctx.options, mask)
        return *grads, *nothing

    @staticmethod
    def vmap(info, in_dims, logits, target, second, share, weight, normalizer, inplace, *options):
        f = torch.vmap(reference.cross_entropy, in_dims=(*in_dims[:6], *in_dims[7:]))
        loss = f(logits, target, second, share, weight, normalizer, *options)
        # Only the fused backward reads the statistics, and it never runs on what vmap made.
        return (loss, loss.new_empty(()), loss.new_empty(())), (0, None, None)


if _load.available:
    differentiate("pointwise_loss", _PointwiseLoss.apply)
    differentiate("bce_with_logits", _BceWithLogits.apply)
    differentiate("cross_entropy", lambda *a: _CrossEntropy.apply(*a[:6], False, a[-1], *a[6:-1]))


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    second: torch.Tensor | None,
    share: torch.Tensor | None,
    weight: torch.Tensor | None,
    normalizer: torch.Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    empty_is_zero: bool = False,
    inplace: bool = False,
) -> torch.Tensor:
    """Cross-entropy of (N, C, ...) logits and (N, ...) int64 labels, two such labels of which the first has the
    (N, ...) float64 ``share``, or (N, C, ...) probabilities; see :mod:`gdbp.nn.functional`."""
    tensors = (logits, target, second, share, weight, normalizer)
    options = (reduction, ignore_index, label_smoothing, z_loss, softcap)
    if is_direct(*tensors):
        return _C.cross_entropy(*tensors, *options, empty_is_zero, inplace)
    if not (_load.available and is_fused(*tensors)):
        return reference.cross_entropy(*tensors, empty_is_zero, *options)
    if needs_autograd(logits, target):
        return _CrossEntropy.apply(*tensors, inplace, empty_is_zero, *options)[0]
    return torch.ops.gdbp.cross_entropy(*tensors, *options, empty_is_zero)[0]
