"""Layers: linear with its activation, batch normalisation, statistics of units."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


# ---- linear ----

# For each activation: its value at the pre-activation z, and the gradient of z from that of the output.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "none": (lambda z: z, lambda g, z: g),
    "relu": (torch.relu, lambda g, z: aten.threshold_backward(g, z, 0)),
    "leaky_relu": (F.leaky_relu, lambda g, z: aten.leaky_relu_backward(g, z, 0.01, False)),
    "gelu": (F.gelu, lambda g, z: aten.gelu_backward(g, z)),
    "gelu_tanh": (
        lambda z: F.gelu(z, approximate="tanh"),
        lambda g, z: aten.gelu_backward(g, z, approximate="tanh"),
    ),
    "silu": (F.silu, lambda g, z: g * (torch.sigmoid(z) * (1 + z * torch.sigmoid(-z)))),
    "sigmoid": (torch.sigmoid, lambda g, z: aten.sigmoid_backward(g, torch.sigmoid(z))),
    "tanh": (torch.tanh, lambda g, z: aten.tanh_backward(g, torch.tanh(z))),
    "elu": (F.elu, lambda g, z: aten.elu_backward(g, 1, 1, 1, False, z)),
    "softplus": (F.softplus, lambda g, z: aten.softplus_backward(g, z, 1, 20)),
}


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return ACTIVATIONS[activation][0](F.linear(input, weight, bias))


def linear_with_pre(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    pre = F.linear(input, weight, bias)
    return ACTIVATIONS[activation][0](pre), pre


def linear_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of input, weight and bias, as a graph that can be differentiated again."""
    grad_pre = ACTIVATIONS[activation][1](grad_output, F.linear(input, weight, bias))
    # Not flatten(), which is_grads_batched does not know; and without columns there is no number of rows to find.
    count = math.prod(input.shape[:-1])
    rows = grad_pre.reshape(count, weight.shape[0])
    grad_weight = rows.t() @ input.reshape(count, weight.shape[1])
    return grad_pre @ weight, grad_weight, rows.sum(0) if bias is not None else None


# ---- batch normalisation ----
#
# ``offset`` would be added to the input of every channel. Normalised with the batch's own mean it changes nothing,
# so it only counts with running statistics; its gradient is then that of the input, summed.


def _per_channel(values: Tensor, input: Tensor) -> Tensor:
    """(channels,) in the compute type, shaped to meet (batch, channels, ...)."""
    dtype = torch.float64 if input.dtype is torch.float64 else torch.float32
    return values.to(dtype).view(-1, *[1] * (input.dim() - 2))


def _normalized(input: Tensor, mean: Tensor | None, variance: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    """(input - mean) / deviation and 1 / deviation in the compute type, mean and variance in float64; those of the
    batch for None."""
    x, compute = input.double(), torch.float64 if input.dtype is torch.float64 else torch.float32
    if mean is None:
        dims = [0, *range(2, input.dim())]
        mean = x.mean(dims, keepdim=True)
        variance = (x - mean).square().mean(dims, keepdim=True)
    inverse = (variance + eps).rsqrt()
    return ((x - mean) * inverse).to(compute), inverse.to(compute), mean, variance


def _affine(normalized: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    z = normalized if weight is None else normalized * _per_channel(weight, normalized)
    return z if bias is None else z + _per_channel(bias, normalized)


def batch_norm(
    input: Tensor,
    offset: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """The output, and mean and variance of the input without the offset, (2, channels) in float64."""
    mean, variance = running_mean, running_var
    if mean is not None:
        mean = mean if offset is None else mean - offset
        mean, variance = _per_channel(mean, input), _per_channel(variance, input)
    normalized, _, mean, variance = _normalized(input, mean, variance, eps)
    output = ACTIVATIONS[activation][0](_affine(normalized, weight, bias)).to(input.dtype)
    return output, torch.stack((mean.reshape(-1), variance.reshape(-1))).double()


def batch_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, offset, weight and bias, as a graph that can be differentiated again. ``stats`` where
    they are not the batch's."""
    dims = [0, *range(2, input.dim())]
    mean, variance = (None, None) if stats is None else (_per_channel(s, input) for s in stats)
    if stats is not None and offset is not None:
        # stats has the offset in it, as a number; here it must be seen.
        mean = mean - _per_channel(offset - offset.detach(), input)
    normalized, inverse, *_ = _normalized(input, mean, variance, eps)
    g = ACTIVATIONS[activation][1](grad_output.to(normalized.dtype), _affine(normalized, weight, bias))
    sum_g, sum_g_x = g.sum(dims, keepdim=True), (g * normalized).sum(dims, keepdim=True)
    grad = g
    if stats is None:
        count = input.numel() // max(1, input.shape[1])
        grad = g - sum_g / count - normalized * (sum_g_x / count)
    grad = grad * inverse if weight is None else grad * (inverse * _per_channel(weight, input))
    grad_offset = None
    if offset is not None:
        grad_offset = (grad.sum(dims) if stats is not None else torch.zeros_like(offset)).to(offset.dtype)
    return (
        grad.to(input.dtype),
        grad_offset,
        None if weight is None else sum_g_x.reshape(-1).to(weight.dtype),
        None if bias is None else sum_g.reshape(-1).to(bias.dtype),
    )


@torch.no_grad()
def batch_norm_update_(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    stats: Tensor,
    offset: Tensor | None,
    elements: int,
    momentum: float | None,
) -> None:
    """``running = (1 - momentum) * running + momentum * batch``, the variance without bias. Without a momentum the
    mean over all batches so far, which ``num_batches_tracked`` counts."""
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if not elements:
        return
    if momentum is None:
        momentum = 1 / num_batches_tracked.double()
    mean, variance = stats[0], stats[1] * (elements / (elements - 1))
    mean = mean if offset is None else mean + offset
    for running, batch in ((running_mean, mean), (running_var, variance)):
        running.copy_((1 - momentum) * running + momentum * batch)


# ---- units ----


def unit_stats(output: Tensor, low: float, high: float) -> Tensor:
    """Of each unit of (rows, units): how many outputs are up to ``low`` or from ``high`` on, their sum, and that of
    their squares; (3, units) in float64."""
    y = output.double()
    return torch.stack((((y <= low) | (y >= high)).double().sum(0), y.sum(0), y.square().sum(0)))
