"""Functions with torch.nn.functional's signatures, on fused kernels; what is none of them is torch's own."""

import warnings

import torch

from gdbp import ops
from gdbp._rest import rest_of
from gdbp.nn._arguments import (
    autocast,
    autocast_is_on,
    check_activation,
    check_loss,
    check_tensor,
    number,
    reduction_name,
    without_autocast,
)
from gdbp.nn._batch_norm import batch_norm, linear_batch_norm  # noqa: F401
from gdbp.nn._cross_entropy import cross_entropy  # noqa: F401
from gdbp.nn._linear_cross_entropy import linear_cross_entropy  # noqa: F401
from gdbp.nn._targets import Mixture  # noqa: F401


def linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
) -> torch.Tensor:
    """``activation(input @ weight.T + bias)``, the activation in the pass that adds the bias.

    Args:
        input: (\\*, in_features), at least one dimension; any strides.
        weight: (out_features, in_features).
        bias: (out_features,) or None.
        activation: None, "relu", "leaky_relu" (negative_slope 0.01), "gelu" (exact), "gelu_tanh", "silu",
            "sigmoid", "tanh", "elu" (alpha 1) or "softplus" (beta 1, threshold 20).

    All of one dtype (float64, float32, bfloat16, float16) and device; under autocast they are cast first.
    Half types are accumulated in float32. On a CPU without instructions for their products these are formed in
    float32, some 50 times as fast as torch's, with 48 MB for parts of them (``gdbp.build_info()["half_products"]``).
    Returns (\\*, out_features).

    Backward forms the gradient of the pre-activation and of the bias in one pass, computes only what is asked
    for, and keeps one tensor: the output, or for gelu, gelu_tanh, silu and elu the pre-activation. Derivatives of
    every order, ``torch.func`` and ``torch.compile`` work.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
        TypeError: a dtype without a kernel, an input that is no tensor.
        ValueError: an unknown activation.
    """
    if activation is not None:
        check_activation(activation)
    if not isinstance(input, torch.Tensor) or weight is None:
        check_tensor("input", input)
        check_tensor("weight", weight)
    if autocast_is_on(input):
        input, weight, bias = autocast(input, weight, bias)
    return ops.linear(input, weight, bias, activation or "none")


def _pointwise(kind: str, input: torch.Tensor, target: torch.Tensor, reduction: str, parameter: float = 0.0):
    if input.shape != target.shape:
        warnings.warn(
            f"Using a target size ({target.shape}) that is different to the input size ({input.shape}). "
            "This will likely lead to incorrect results due to broadcasting. "
            "Please ensure they have the same size.",
            stacklevel=3,
        )
        input, target = torch.broadcast_tensors(input, target)
    input, target = without_autocast(input, target)
    dtype = torch.promote_types(input.dtype, target.dtype)
    return ops.pointwise_loss(input.to(dtype), target.to(dtype), kind, parameter, reduction)


def mse_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean squared error, ``mean((input - target)**2)``, or the sum, or each element's ("none").

    Input and target have one shape (else torch's warning, and they are broadcast) and are promoted to one
    dtype. Gradients flow to both. With ``weight`` (one factor for each element) torch's function computes.

    Returns a 0-dim tensor, or the inputs' shape for "none". The mean of nothing is NaN, as in torch.

    Raises:
        ValueError: an unknown reduction.
    """
    reduction = reduction_name(size_average, reduce, reduction)
    check_loss(input, target, weight)
    if weight is not None:
        return torch.nn.functional.mse_loss(input, target, reduction=reduction, weight=weight)
    return _pointwise("mse_loss", input, target, reduction)


def l1_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean absolute error, ``mean(abs(input - target))``; the gradient is 0 where they are equal.

    NaN elements have the gradient NaN, where torch's is 0. Complex tensors are computed by torch's function.
    Everything else is as in :func:`mse_loss`.
    """
    reduction = reduction_name(size_average, reduce, reduction)
    check_loss(input, target, weight)
    if weight is not None or input.is_complex() or target.is_complex():
        return torch.nn.functional.l1_loss(input, target, reduction=reduction, weight=weight)
    return _pointwise("l1_loss", input, target, reduction)


def huber_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Huber's loss: of a difference d up to ``delta`` in size ``d**2 / 2``, beyond it ``delta * (abs(d) - delta / 2)``.

    Everything else is as in :func:`mse_loss`.

    Raises:
        RuntimeError: delta <= 0. TypeError: delta is no number.
        ValueError: an unknown reduction.
    """
    reduction = reduction_name(None, None, reduction)
    check_loss(input, target, weight)
    delta = number("delta", delta)
    if not delta > 0:
        raise RuntimeError(
            f"huber_loss does not support non-positive values for delta. Got: {delta:g}; expected a number above 0"
        )
    if weight is not None:
        return torch.nn.functional.huber_loss(input, target, reduction=reduction, delta=delta, weight=weight)
    return _pointwise("huber_loss", input, target, reduction, delta)


def smooth_l1_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> torch.Tensor:
    """Absolute error with its tip rounded off: of a difference d below ``beta`` in size ``d**2 / (2 * beta)``, beyond
    it ``abs(d) - beta / 2``. It is ``huber_loss(delta=beta) / beta``, and for beta 0, or one below all normal
    numbers, :func:`l1_loss`.

    Everything else is as in :func:`mse_loss`.

    Raises:
        RuntimeError: beta < 0. TypeError: beta is no number.
        ValueError: an unknown reduction.
    """
    reduction = reduction_name(size_average, reduce, reduction)
    check_loss(input, target)
    beta = number("beta", beta)
    if not beta >= 0:
        raise RuntimeError(
            f"smooth_l1_loss does not support negative values for beta. Got: {beta:g}; expected 0 or more"
        )
    is_sharp = beta < torch.finfo(torch.float64 if input.dtype is torch.float64 else torch.float32).tiny
    return _pointwise("l1_loss" if is_sharp else "smooth_l1_loss", input, target, reduction, beta)


def binary_cross_entropy_with_logits(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Binary cross-entropy, ``pos_weight * target * softplus(-input) + (1 - target) * softplus(input)``: of logits
    with targets from 0 to 1, its mean, its sum, or each element's ("none").

    Args:
        input, target: of one shape, promoted to one dtype with the factors. Gradients flow to both.
        weight: a factor for each element, or one that broadcasts to them.
        pos_weight: a factor for the positives, often of shape (classes,).

    Accurate for confident elements of either kind.

    Raises:
        RuntimeError: factors that do not broadcast to the input, or require gradients; devices that do not fit.
        ValueError: an unknown reduction, a target of another shape.
    """
    reduction = reduction_name(size_average, reduce, reduction)
    check_loss(input, target, weight, pos_weight)
    if target.shape != input.shape:
        raise ValueError(f"Target size ({target.shape}) must be the same as input size ({input.shape})")
    input, target, weight, pos_weight = without_autocast(input, target, weight, pos_weight)
    factors = [f for f in (weight, pos_weight) if f is not None]
    dtype = input.dtype
    for t in (target, *factors):
        if t.dim() or not input.dim():  # a lone number takes the others' dtype
            dtype = torch.promote_types(dtype, t.dtype)
    differentiable = torch.is_grad_enabled() and any(f.requires_grad for f in factors)
    if differentiable or not dtype.is_floating_point or any(_widens(f, input) for f in factors):
        return torch.nn.functional.binary_cross_entropy_with_logits(
            input, target, weight, reduction=reduction, pos_weight=pos_weight
        )
    tensors = (None if t is None else t.to(dtype) for t in (input, target, weight, pos_weight))
    return ops.bce_with_logits(*tensors, reduction)


def _widens(factor: torch.Tensor, input: torch.Tensor) -> bool:
    return torch.broadcast_shapes(factor.shape, input.shape) != input.shape


__getattr__, __dir__ = rest_of(__name__, torch.nn.functional)
