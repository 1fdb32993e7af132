"""Batch normalisation as a function; public in :mod:`gdbp.nn.functional`."""

import math

import torch

from gdbp import ops, reference
from gdbp.nn._arguments import check_activation, check_tensor, number


def batch_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
) -> torch.Tensor:
    """``activation((input - mean) / sqrt(var + eps) * weight + bias)`` for each channel, torch's signature.

    Args:
        input: (N, C), (N, C, L) or more dimensions; any strides; float64, float32, bfloat16 or float16.
        running_mean, running_var: (C,). In training both may be None; else they are updated in place with the
            batch's mean and unbiased variance. Otherwise they normalise.
        weight, bias: (C,) or None for 1 and 0; any strides (torch's backward on the CPU reads a strided weight
            wrongly). Like the running statistics of the input's dtype, or float32 beside a half type.
        training: whether to normalise with the mean and the (biased) variance of the batch.
        momentum: share of the batch in the running statistics.
        eps: added to the variance; above 0 in training.
        activation: None or a name, see :func:`linear`.

    Half types are computed in float32, statistics and their sums in float64 (CUDA: float32 within 64 rows), so a
    mean that is far from 0 costs no digits; in forward mode (``torch.func.jvp``), where torch's function computes, it
    does. Backward keeps the input alone. Returns the input's shape and dtype.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
        TypeError: a dtype without a kernel.
        ValueError: one value for each channel in training, eps, an unknown activation.
    """
    check_tensor("input", input)
    return normalize(input, running_mean, running_var, weight, bias, training, momentum, eps, activation)


def linear_batch_norm(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
) -> torch.Tensor:
    """``batch_norm(linear(input, weight, bias), ...)`` without a pass that adds the bias.

    Subtracting the batch's mean takes the bias out again, so in training it only moves ``running_mean``, and its
    gradient is exactly 0 (where torch's is rounding noise); with running statistics it joins their mean.

    Args:
        input: (N, in_features); no other dimensions, whose bias would belong to another axis than the channels'.
        weight, bias: of the linear layer, (out_features, in_features) and (out_features,) or None.
        norm_weight, norm_bias: those of the normalisation, (out_features,) or None.

    Everything else, and what is raised, is as in :func:`linear` and :func:`batch_norm`.
    """
    check_tensor("input", input)
    if input.dim() != 2:
        raise ValueError(f"linear_batch_norm: input has shape {tuple(input.shape)}; expected (N, in_features)")
    # torch's own: a product alone has nothing to fuse, and its derivatives cost no call of Python.
    product = torch.nn.functional.linear(input, weight)
    return normalize(
        product, running_mean, running_var, norm_weight, norm_bias, training, momentum, eps, activation, offset=bias
    )


def normalize(
    input, running_mean, running_var, weight, bias, training, momentum, eps, activation, batches=None, offset=None
):
    """``batches``, where given, is counted up; without a momentum the running statistics are then the mean of all."""
    if activation is not None:
        check_activation(activation)
    if type(eps) is not float or (momentum is not None and type(momentum) is not float):
        eps, momentum = number("eps", eps), None if momentum is None else number("momentum", momentum)
    if input.dim() < 2:
        if input.dim() == 1 and not input.numel():
            # torch's function lets it pass.
            output = torch.nn.functional.batch_norm(
                input, running_mean, running_var, weight, bias, training, momentum, eps
            )
            return activate(output, activation)
        raise ValueError(f"batch_norm: input has shape {tuple(input.shape)}; expected (N, C) or (N, C, L)")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    if training:
        for name, values in (("running_mean", running_mean), ("running_var", running_var)):
            if values is not None and values.shape != input.shape[1:2]:
                raise RuntimeError(
                    f"batch_norm: {name} has shape {tuple(values.shape)}; expected ({input.shape[1]},), "
                    "one value for each channel of input"
                )
        if input.shape[0] * math.prod(input.shape[2:]) == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")
        if eps <= 0:
            raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    elif eps < 0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
    elif running_mean is None:
        raise RuntimeError("batch_norm: running_mean is None; it must be defined in evaluation mode")
    return ops.batch_norm(
        input,
        running_mean,
        running_var,
        weight,
        bias,
        bool(training),
        momentum,
        eps,
        activation or "none",
        batches,
        offset,
    )


def normalize_by(
    layer: torch.nn.BatchNorm1d, input: torch.Tensor, activation: str | None, offset: torch.Tensor | None = None
) -> torch.Tensor:
    """What a BatchNorm1d, ours or torch's, does to its input, and the activation behind it."""
    check_tensor("input", input)
    layer._check_input_dim(input)
    keep = layer.training and layer.track_running_stats
    known = keep or not layer.training
    running_mean, running_var = (layer.running_mean, layer.running_var) if known else (None, None)
    batches, momentum = layer.num_batches_tracked if keep else None, layer.momentum
    if batches is not None and (running_mean is None or batches.dtype is not torch.int64):
        batches.add_(1)
        if running_mean is not None:
            # Another type, as after .type(): our kernels don't count in it.
            batches, momentum = None, 1.0 / float(batches) if momentum is None else momentum
    return normalize(
        input,
        running_mean,
        running_var,
        layer.weight,
        layer.bias,
        layer.training or running_mean is None,
        # Without a momentum and without a count torch leaves the running statistics as they are.
        0.0 if momentum is None and batches is None else momentum,
        layer.eps,
        activation,
        batches,
        offset,
    )


def activate(input: torch.Tensor, activation: str | None) -> torch.Tensor:
    """The activation alone, computed by torch."""
    return input if activation is None else reference.ACTIVATIONS[activation][0](input)
