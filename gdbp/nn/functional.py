"""Functions with torch.nn.functional's signatures, on fused kernels."""

import math
import warnings

import torch
from torch.nn import _reduction as _legacy

from gdbp import ops, reference
from gdbp.ops.linear import ACTIVATIONS


def _check_activation(activation: str | None) -> None:
    if activation is not None and (activation == "none" or activation not in ACTIVATIONS):
        names = ", ".join(name for name in ACTIVATIONS if name != "none")
        raise ValueError(f"activation is {activation!r}; expected None or one of {names}")


def _activate(input: torch.Tensor, activation: str | None) -> torch.Tensor:
    """The activation alone, computed by torch."""
    return input if activation is None else reference.ACTIVATIONS[activation][0](input)


_any_autocast = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


def _autocast_is_on(tensor: torch.Tensor) -> bool:
    if not _any_autocast():
        return False
    device = tensor.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _autocast(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The tensors in autocast's dtype, as torch's linear sees them."""
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return [
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype is not torch.float64 else t for t in tensors
    ]


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
    Half types are accumulated in float32. Returns (\\*, out_features).

    Backward forms the gradient of the pre-activation and of the bias in one pass, computes only what is asked
    for, and keeps one tensor: the output, or for gelu, gelu_tanh and silu the pre-activation. Derivatives of
    every order, ``torch.func`` and ``torch.compile`` work.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
        TypeError: a dtype without a kernel.
        ValueError: an unknown activation.
    """
    if activation is not None:
        _check_activation(activation)
    if _autocast_is_on(input):
        input, weight, bias = _autocast(input, weight, bias)
    return ops.linear(input, weight, bias, activation or "none")


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
    mean that is far from 0 costs no digits. Backward keeps the input alone. Returns the input's shape and dtype.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
        TypeError: a dtype without a kernel.
        ValueError: one value for each channel in training, eps, an unknown activation.
    """
    return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps, activation)


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
        input: (N, in_features).
        weight, bias: of the linear layer, (out_features, in_features) and (out_features,) or None.
        norm_weight, norm_bias: those of the normalisation, (out_features,) or None.

    Everything else, and what is raised, is as in :func:`linear` and :func:`batch_norm`.
    """
    if _autocast_is_on(input):
        input, weight = _autocast(input, weight)
    product = ops.linear(input, weight, None, "none")
    return _batch_norm(
        product, running_mean, running_var, norm_weight, norm_bias, training, momentum, eps, activation, offset=bias
    )


def _batch_norm(
    input, running_mean, running_var, weight, bias, training, momentum, eps, activation, batches=None, offset=None
):
    """``batches``, where given, is counted up; without a momentum the running statistics are then the mean of all."""
    if activation is not None:
        _check_activation(activation)
    if input.dim() < 2:
        if input.dim() == 1 and not input.numel():
            # torch's function lets it pass.
            output = torch.nn.functional.batch_norm(
                input, running_mean, running_var, weight, bias, training, momentum, eps
            )
            return _activate(output, activation)
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
        training,
        momentum,
        eps,
        activation or "none",
        batches,
        offset,
    )


def _reduction_name(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    if size_average is not None or reduce is not None:
        reduction = _legacy.legacy_get_string(size_average, reduce)
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{reduction} is not a valid value for reduction: expected none, mean or sum")
    return reduction


def _without_autocast(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Losses are computed in float32 under autocast, as torch's are."""
    if not _autocast_is_on(tensors[0]):
        return list(tensors)
    return [t.float() if t is not None and t.dtype in (torch.bfloat16, torch.float16) else t for t in tensors]


def _pointwise(kind: str, input: torch.Tensor, target: torch.Tensor, reduction: str, parameter: float = 0.0):
    if input.shape != target.shape:
        warnings.warn(
            f"Using a target size ({target.shape}) that is different to the input size ({input.shape}). "
            "This will likely lead to incorrect results due to broadcasting. "
            "Please ensure they have the same size.",
            stacklevel=3,
        )
        input, target = torch.broadcast_tensors(input, target)
    input, target = _without_autocast(input, target)
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
    reduction = _reduction_name(size_average, reduce, reduction)
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
    reduction = _reduction_name(size_average, reduce, reduction)
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
        RuntimeError: delta <= 0.
        ValueError: an unknown reduction.
    """
    reduction = _reduction_name(None, None, reduction)
    if delta <= 0:
        raise RuntimeError(
            f"huber_loss does not support non-positive values for delta. Got: {delta}; expected a number above 0"
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
    it ``abs(d) - beta / 2``. It is ``huber_loss(delta=beta) / beta``, and for beta 0 :func:`l1_loss`.

    Everything else is as in :func:`mse_loss`.

    Raises:
        RuntimeError: beta < 0.
        ValueError: an unknown reduction.
    """
    reduction = _reduction_name(size_average, reduce, reduction)
    if beta < 0:
        raise RuntimeError(f"smooth_l1_loss does not support negative values for beta. Got: {beta}; expected 0 or more")
    return _pointwise("smooth_l1_loss" if beta else "l1_loss", input, target, reduction, beta)


def cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Softmax cross-entropy between logits and class labels, torch's signature.

    Args:
        input: logits (C,), (N, C) or (N, C, d1, ...); float64, float32, bfloat16 or float16.
        target: int64 or uint8 labels of shape (), (N,) or (N, d1, ...). Probabilities, of the input's shape,
            are computed by torch's own function.
        weight: (C,) factor of each class, of the input's dtype, or None.
        ignore_index: the label whose rows count for nothing, whatever their logits hold.
        reduction: "mean" (divided by the weights of the labels that count), "sum" or "none".
        label_smoothing: from 0 to 1, the share of the target that is spread over all classes.

    The sum over the classes other than the label is kept apart, so the loss and the label's gradient are
    accurate for confident rows too, where ``1 - softmax`` has no digits left.

    Raises:
        IndexError: on the CPU, a label outside [0, C); names label and row. On CUDA its loss is NaN.
        RuntimeError: shapes, dtypes or devices that do not fit.
        ValueError: an unknown reduction, label_smoothing outside [0, 1], batches of different size.
    """
    reduction = _reduction_name(size_average, reduce, reduction)
    input, weight = _without_autocast(input, weight)
    if input.dim() < 1 or target.is_floating_point() or input.shape == target.shape:
        # Probabilities, and the inputs that torch itself refuses.
        return torch.nn.functional.cross_entropy(
            input,
            target,
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    if label_smoothing > 1:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    if target.dtype not in (torch.int64, torch.uint8):
        raise RuntimeError(
            f"target has dtype {target.dtype}; expected target dtype to be Long or Byte; convert it with .long()"
        )
    expected = (*input.shape[:1], *input.shape[2:]) if input.dim() > 1 else ()
    if target.shape != expected:
        if input.dim() > 1 and target.dim() > 0 and target.shape[0] != input.shape[0]:
            raise ValueError(
                f"Expected input batch_size ({input.shape[0]}) to match target batch_size ({target.shape[0]})."
            )
        raise RuntimeError(f"Expected target size {expected}, got {tuple(target.shape)}; give one label a row")
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("weight requires grad; cross_entropy is not differentiable in it; pass weight.detach()")
    rows = input.movedim(1, -1).flatten(0, -2) if input.dim() > 1 else input.unsqueeze(0)
    loss = ops.cross_entropy(
        rows, target.reshape(-1).long(), weight, reduction, ignore_index, max(0.0, label_smoothing)
    )
    return loss.reshape(expected) if reduction == "none" else loss
