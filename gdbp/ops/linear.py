"""Linear layer with its activation: ``activation(input @ weight.T + bias)``."""

import torch

from gdbp import _load, reference
from gdbp.ops._function import Function, differentiate, is_differentiated, is_direct, is_fused, needs_autograd

if _load.available:
    from gdbp import _C

ACTIVATIONS = tuple(reference.ACTIVATIONS)
# Those whose derivative needs the pre-activation; for the others the output is enough.
NEED_PRE = frozenset(torch.ops.gdbp.activations_that_save("pre") if _load.available else ())


def _backward(ctx, grad_output, input, weight, bias, saved):
    if is_differentiated():
        # Somebody will differentiate this: in operators that have derivatives of every order.
        return *reference.linear_backward(grad_output, input, weight, bias, ctx.activation), None
    mask = ctx.needs_input_grad[:3]
    return *torch.ops.gdbp.linear_backward(grad_output, input, weight, saved, ctx.activation, mask), None


class _Linear(Function):
    """Keeps the output, or without an activation nothing: what is kept must not be changed in place later."""

    @staticmethod
    def forward(input, weight, bias, activation):
        return torch.ops.gdbp.linear(input, weight, bias, activation)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, bias, ctx.activation = inputs
        ctx.save_for_backward(input, weight, bias, None if ctx.activation == "none" else output)

    @staticmethod
    def backward(ctx, grad_output):
        input, weight, bias, saved = ctx.saved_tensors
        return _backward(ctx, grad_output, input, weight, bias, grad_output if saved is None else saved)

    @staticmethod
    def vmap(info, in_dims, input, weight, bias, activation):
        return torch.vmap(reference.linear, in_dims=in_dims)(input, weight, bias, activation), 0


class _LinearWithPre(Function):
    """Keeps the pre-activation, which is a second output for autograd's sake."""

    @staticmethod
    def forward(input, weight, bias, activation):
        return torch.ops.gdbp.linear_with_pre(input, weight, bias, activation)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, bias, ctx.activation = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight, bias, output[1])

    @staticmethod
    def backward(ctx, grad_output, _):
        if grad_output is None:
            return None, None, None, None
        return _backward(ctx, grad_output, *ctx.saved_tensors)

    @staticmethod
    def vmap(info, in_dims, input, weight, bias, activation):
        output = torch.vmap(reference.linear_with_pre, in_dims=in_dims)(input, weight, bias, activation)
        return output, (0, 0)


if _load.available:
    differentiate("linear", _Linear.apply)
    differentiate("linear_with_pre", _LinearWithPre.apply)


def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    """See :func:`gdbp.nn.functional.linear`; here ``activation`` is a name, "none" for none."""
    if is_direct(input, weight, bias):
        return _C.linear(input, weight, bias, activation)
    if not (_load.available and is_fused(input, weight, bias)):
        return reference.linear(input, weight, bias, activation)
    if not needs_autograd(input, weight, bias):
        return torch.ops.gdbp.linear(input, weight, bias, activation)
    if activation in NEED_PRE:
        return _LinearWithPre.apply(input, weight, bias, activation)[0]
    return _Linear.apply(input, weight, bias, activation)
