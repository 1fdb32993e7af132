"""Functions with torch.nn.functional's signatures, on fused kernels."""

import warnings

import torch
from torch.nn import _reduction as _legacy

from gdbp import ops
from gdbp.ops.linear import ACTIVATIONS


def _check_activation(activation: str | None) -> None:
    if activation is not None and (activation == "none" or activation not in ACTIVATIONS):
        names = ", ".join(name for name in ACTIVATIONS if name != "none")
        raise ValueError(f"activation is {activation!r}; expected None or one of {names}")


def _autocast_is_on(tensor: torch.Tensor) -> bool:
    device = tensor.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _autocast(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The tensors in autocast's dtype where autocast is on for their device, as torch's linear sees them."""
    if not _autocast_is_on(tensors[0]):
        return list(tensors)
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return [
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype is not torch.float64 else t
        for t in tensors
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
        activation: None, "relu", "gelu" (exact), "sigmoid" or "tanh".

    All of one dtype (float64, float32, bfloat16, float16) and device; under autocast they are cast first.
    Half types are accumulated in float32. Returns (\\*, out_features).

    Backward forms the gradient of the pre-activation and of the bias in one pass, computes only what is asked
    for, and keeps one tensor: the output, or for gelu the pre-activation. Derivatives of every order,
    ``torch.func`` and ``torch.compile`` work.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
        TypeError: a dtype without a kernel.
        ValueError: an unknown activation.
    """
    if activation is not None:
        _check_activation(activation)
    input, weight, bias = _autocast(input, weight, bias)
    return ops.linear(input, weight, bias, activation or "none")


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
    if input.shape != target.shape:
        warnings.warn(
            f"Using a target size ({target.shape}) that is different to the input size ({input.shape}). "
            "This will likely lead to incorrect results due to broadcasting. "
            "Please ensure they have the same size.",
            stacklevel=2,
        )
        input, target = torch.broadcast_tensors(input, target)
    input, target = _without_autocast(input, target)
    dtype = torch.promote_types(input.dtype, target.dtype)
    return ops.mse_loss(input.to(dtype), target.to(dtype), reduction)


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
            f"target has dtype {target.dtype}; expected target dtype to be Long or Byte; "
            "convert it with .long()"
        )
    expected = (*input.shape[:1], *input.shape[2:]) if input.dim() > 1 else ()
    if target.shape != expected:
        if input.dim() > 1 and target.dim() > 0 and target.shape[0] != input.shape[0]:
            raise ValueError(
                f"Expected input batch_size ({input.shape[0]}) "
                f"to match target batch_size ({target.shape[0]})."
            )
        raise RuntimeError(
            f"Expected target size {expected}, got {tuple(target.shape)}; give one label a row"
        )
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "weight requires grad; cross_entropy is not differentiable in it; pass weight.detach()"
        )
    rows = input.movedim(1, -1).flatten(0, -2) if input.dim() > 1 else input.unsqueeze(0)
    loss = ops.cross_entropy(
        rows, target.reshape(-1).long(), weight, reduction, ignore_index, max(0.0, label_smoothing)
    )
    return loss.reshape(expected) if reduction == "none" else loss
