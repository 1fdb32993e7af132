"""Batch normalisation with its activation, and the running statistics that it leaves behind."""

import torch
import torch.nn.functional as F

from gdbp import _load, reference
from gdbp.ops._function import Function, differentiate, is_differentiated, is_direct, is_fused, needs_autograd

if _load.available:
    from gdbp import _C


class _BatchNorm(Function):
    """Keeps the input, from which and from the statistics everything else follows: the output may be changed."""

    @staticmethod
    def forward(input, offset, weight, bias, running_mean, running_var, eps, activation):
        return torch.ops.gdbp.batch_norm(input, offset, weight, bias, running_mean, running_var, eps, activation)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, offset, weight, bias, running_mean, _, *ctx.options = inputs
        ctx.of_batch = running_mean is None
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, offset, weight, bias, output[1])

    @staticmethod
    def backward(ctx, grad_output, _):
        nothing = (None,) * 4
        if grad_output is None:
            return *nothing, *nothing
        input, offset, weight, bias, stats = ctx.saved_tensors
        if is_differentiated():
            # Somebody will differentiate this: in operators that have derivatives of every order.
            fixed = None if ctx.of_batch else stats
            return *reference.batch_norm_backward(
                grad_output, input, offset, weight, bias, fixed, *ctx.options
            ), *nothing
        for_input, for_offset, for_weight, for_bias = ctx.needs_input_grad[:4]
        through_offset = for_offset and not ctx.of_batch
        mask = (for_input, for_weight, for_bias or through_offset)
        grad_input, grad_weight, grad_bias = torch.ops.gdbp.batch_norm_backward(
            grad_output, input, weight, bias, stats, ctx.of_batch, *ctx.options, mask
        )
        grad_offset = torch.zeros_like(offset) if for_offset else None
        if through_offset:
            scale = (stats[1] + ctx.options[0]).rsqrt()
            scale = scale if weight is None else scale * weight
            grad_offset = (grad_bias * scale).to(offset.dtype)
        return grad_input, grad_offset, grad_weight, grad_bias if for_bias else None, *nothing

    @staticmethod
    def vmap(info, in_dims, *args):
        return torch.vmap(reference.batch_norm, in_dims=in_dims)(*args), (0, 0)


if _load.available:
    differentiate("batch_norm", _BatchNorm.apply)


def batch_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    activation: str,
    num_batches_tracked: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
) -> torch.Tensor:
    """See :func:`gdbp.nn.functional.batch_norm`; here ``activation`` is a name, "none" for none.

    ``num_batches_tracked``, where given, is counted up; with ``momentum=None`` the running statistics become the
    mean over that many batches. ``offset``, (channels,), is added to the input on the way.
    """
    if is_direct(input, running_mean, running_var, weight, bias, num_batches_tracked, offset):
        running = (running_mean, running_var, num_batches_tracked)
        return _C.batch_norm(input, offset, weight, bias, *running, training, momentum, eps, activation)
    known = running_mean is not None
    update = training and known
    if not (_load.available and is_fused(input, running_mean, running_var, weight, bias, offset)):
        if update and num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(num_batches_tracked) if update else 0.0
        if offset is not None:
            input = input + offset.to(input.dtype).view(-1, *[1] * (input.dim() - 2))
        output = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        return reference.ACTIVATIONS[activation][0](output)
    fixed = (running_mean, running_var) if known and not training else (None, None)
    args = (input, offset, weight, bias, *fixed, eps, activation)
    if needs_autograd(input, offset, weight, bias):
        output, stats = _BatchNorm.apply(*args)
    else:
        output, stats = torch.ops.gdbp.batch_norm(*args)
    if update:
        elements = input.numel() // input.shape[1] if input.shape[1] else 0
        _update_(running_mean, running_var, num_batches_tracked, stats, offset, elements, momentum)
    return output


def _update_(running_mean, running_var, num_batches_tracked, stats, *rest):
    tensors = (running_mean, running_var, num_batches_tracked, stats, rest[0])
    batched = any(t is not None and torch._C._functorch.is_batchedtensor(t) for t in tensors)
    update_ = reference.batch_norm_update_ if batched else torch.ops.gdbp.batch_norm_update_
    update_(running_mean, running_var, num_batches_tracked, stats, *rest)
