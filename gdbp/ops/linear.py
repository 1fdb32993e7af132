"""Linear layer with its activation: ``activation(input @ weight.T + bias)``."""

import torch

from gdbp import _load, reference
from gdbp.ops._function import Function, is_fused, needs_autograd

ACTIVATIONS = tuple(reference.ACTIVATIONS)


class _Linear(Function):
    @staticmethod
    def forward(input, weight, bias, activation):
        return torch.ops.gdbp.linear(input, weight, bias, activation)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, bias, activation = inputs
        y, pre = output
        ctx.mark_non_differentiable(pre)
        ctx.set_materialize_grads(False)
        ctx.activation = activation
        # Never more than the derivative needs: what is saved must not be changed in place afterwards.
        saved = {"gelu": pre, "none": None}.get(activation, y)
        ctx.save_for_backward(input, weight, bias, saved)

    @staticmethod
    def backward(ctx, grad_output, _):
        if grad_output is None:
            return None, None, None, None
        input, weight, bias, saved = ctx.saved_tensors
        if torch.is_grad_enabled():
            # Somebody will differentiate this: in operators that have derivatives of every order.
            return *reference.linear_backward(grad_output, input, weight, bias, ctx.activation), None
        mask = ctx.needs_input_grad[:3]
        saved = grad_output if saved is None else saved
        return *torch.ops.gdbp.linear_backward(grad_output, input, weight, saved, ctx.activation, mask), None

    @staticmethod
    def vmap(info, in_dims, input, weight, bias, activation):
        output = torch.vmap(reference.linear_with_pre, in_dims=in_dims)(input, weight, bias, activation)
        return output, (0, 0)


def linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str
) -> torch.Tensor:
    """See :func:`gdbp.nn.functional.linear`; here ``activation`` is a name, "none" for none."""
    if not (_load.available and is_fused(input, weight, bias)):
        return reference.linear(input, weight, bias, activation)
    if needs_autograd(input, weight, bias):
        return _Linear.apply(input, weight, bias, activation)[0]
    return torch.ops.gdbp.linear(input, weight, bias, activation)[0]
