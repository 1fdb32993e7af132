"""What torch.utils.flop_counter counts for the operators with matrix products in them, by torch's own rule: two for
each multiplication with its addition, nothing for what is done element by element."""

import math

import torch
from torch.utils.flop_counter import register_flop_formula

_ops = torch.ops.gdbp


def _products(input, weights, masks) -> int:
    """Of so many products of each layer as its mask has flags set."""
    rows = math.prod(input[:-1])
    return sum(2 * rows * math.prod(w) * sum(mask) for w, mask in zip(weights, masks, strict=True))


@register_flop_formula([_ops.linear, _ops.linear_with_pre])
def _(input, weight, bias, activation, out_shape=None) -> int:
    return _products(input, [weight], [(True,)])


@register_flop_formula([_ops.linear_backward, _ops.linear_backward_over_saved])
def _(grad_output, input, weight, saved, activation, mask, out_shape=None) -> int:
    return _products(input, [weight], [mask[:2]])


@register_flop_formula([_ops.mlp, _ops.mlp_rows])
def _(input, weights, *options, out_shape=None) -> int:
    return _products(input, weights, [(True,)] * len(weights))


def _backward(input, weights, mask) -> int:
    """A layer's input has a gradient where something in front of it is trained."""
    return _products(input, weights, [(any(mask[: 2 * i + 1]), mask[2 * i + 1]) for i in range(len(weights))])


@register_flop_formula(_ops.mlp_rows_backward)
def _(grad_output, input, kept, output, weights, activations, mask, out_shape=None) -> int:
    return _backward(input, weights, mask)


@register_flop_formula(_ops.mlp_backward)
def _(grad_output, input, weights, biases, activation, factors, mask, out_shape=None) -> int:
    # The forward pass is made again.
    return _products(input, weights, [(True,)] * len(weights)) + _backward(input, weights, mask)


@register_flop_formula(_ops.linear_cross_entropy)
def _(upstream, x, weight, bias, target, second, share, class_weight, rows, mask, *options, out_shape=None) -> int:
    return _products(x, [weight], [(True, *mask[:2])])
