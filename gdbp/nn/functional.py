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
    reduction = _reduction_name(size_average, reduce, reduction)
    if target.shape != input.shape:
        raise ValueError(f"Target size ({target.shape}) must be the same as input size ({input.shape})")
    input, target, weight, pos_weight = _without_autocast(input, target, weight, pos_weight)
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


Mixture = tuple[torch.Tensor, torch.Tensor, float | torch.Tensor]


def cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor | Mixture,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    normalizer: float | torch.Tensor | None = None,
    empty: str = "nan",
    inplace_backward: bool = False,
) -> torch.Tensor:
    """Softmax cross-entropy between logits and labels or probabilities: torch's signature, and what training asks
    for besides.

    Args:
        input: logits (C,), (N, C) or (N, C, d1, ...); float64, float32, bfloat16 or float16. No strides are copied
            where the classes lie together or N, C, d1, ... are in order.
        target: int64 or uint8 labels of shape (), (N,) or (N, d1, ...); or probabilities of the input's shape, to
            which gradients flow; or for MixUp a tuple ``(labels, labels, share)``, the share of the first ones
            being a number from 0 to 1 or a tensor that broadcasts to the labels' shape.
        weight: (C,) factor of each class, of the input's dtype, or None.
        ignore_index: the label whose rows count for nothing, whatever their logits hold.
        reduction: "mean" (divided by the weights of the labels that count; for probabilities by the number of
            rows), "sum" or "none".
        label_smoothing: from 0 to 1, the share of the target that is spread over all classes.
        z_loss: this times ``logsumexp(logits)**2`` is added to a row's loss, with the weight of its label (PaLM,
            Chowdhery et al., 2022, take 1e-4).
        softcap: logits become ``softcap * tanh(logits / softcap)`` first (Gemma 2 takes 30).
        normalizer: what "mean" divides by instead: the number of labels in all batches whose gradients are
            accumulated, say. A number or a 0-dim tensor.
        empty: the mean where there is nothing to divide by: "nan", as in torch, or "zero".
        inplace_backward: the gradient is written over the logits, which saves its memory and its pages. Wherever
            autograd needs them afterwards it raises an error; do not read them yourself. Under torch.compile this
            changes nothing.

    The terms of the largest logit are kept apart, so the loss and the gradients are accurate for confident rows
    too, where ``1 - softmax`` has no digits left. Sums are in float64, so any number of rows will do.

    Raises:
        IndexError: a label outside [0, C); names label and row. On CUDA its loss is NaN, and a later call raises.
        RuntimeError: shapes, dtypes or devices that do not fit; inplace_backward over a leaf.
        ValueError: an unknown reduction or ``empty``, numbers out of range, batches of different size.
    """
    reduction = _reduction_name(size_average, reduce, reduction)
    second = share = None
    if isinstance(target, tuple):
        target, second, share = _mixture(target)
    input, weight = _without_autocast(input, weight)
    _check_cross_entropy(input, target, second, weight, reduction, label_smoothing, z_loss, softcap, normalizer, empty)
    soft = input.dim() > 0 and target.is_floating_point() and input.shape == target.shape and ignore_index < 0
    if not soft and (input.dim() < 1 or target.is_floating_point() or input.shape == target.shape):
        # What torch itself refuses.
        return torch.nn.functional.cross_entropy(
            input, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )
    if inplace_backward and input.requires_grad and input.is_leaf and torch.is_grad_enabled():
        raise RuntimeError(
            "inplace_backward=True writes the gradient over the logits, and these are a leaf, whose values are yours "
            "to keep; leave it out, or pass logits that were computed"
        )
    shape = (*input.shape[:1], *input.shape[2:]) if input.dim() > 1 else ()
    if soft:
        if target.dtype != input.dtype:
            dtype = torch.promote_types(input.dtype, target.dtype)
            input, target = input.to(dtype), target.to(dtype)
    else:
        target = _labels(target, input, shape)
        if second is not None:
            second = _labels(second, input, shape)
            share = torch.as_tensor(share, dtype=torch.float64, device=input.device).expand(shape)
    if input.dim() == 1:
        input, target, second, share = (None if t is None else t.unsqueeze(0) for t in (input, target, second, share))
    if normalizer is not None:
        normalizer = torch.as_tensor(normalizer, dtype=torch.float64, device=input.device).detach()
    loss = ops.cross_entropy(
        input, target, second, share, weight, normalizer, reduction, ignore_index, max(0.0, label_smoothing),
        z_loss, softcap or 0.0, empty == "zero", inplace_backward,
    )  # fmt: skip
    return loss.reshape(shape) if reduction == "none" else loss


def _mixture(target: tuple) -> Mixture:
    if len(target) != 3:
        raise ValueError(f"target is a tuple of {len(target)}; expected (labels, labels, share of the first)")
    share = target[2]
    if isinstance(share, torch.Tensor):
        if share.requires_grad:
            raise RuntimeError("the share of a mixture requires grad; it has no derivative here; pass share.detach()")
    elif not 0 <= share <= 1:
        raise ValueError(f"the share of a mixture is {share}; expected a number from 0 to 1")
    for labels in target[:2]:
        if labels.is_floating_point():
            raise ValueError("a mixture is of labels; got floating-point targets; mix probabilities yourself")
    return target


def _check_cross_entropy(input, target, second, weight, reduction, label_smoothing, z_loss, softcap, normalizer, empty):
    if label_smoothing > 1:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    if not z_loss >= 0:
        raise ValueError(f"z_loss is {z_loss}; expected a number of at least 0")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; expected a number above 0, or None")
    if empty not in ("nan", "zero"):
        raise ValueError(f"empty is {empty!r}; expected 'nan' or 'zero'")
    if normalizer is not None and reduction != "mean":
        raise ValueError(f"normalizer divides the mean, and reduction is {reduction!r}; leave one of them out")
    if isinstance(normalizer, torch.Tensor) and normalizer.numel() != 1:
        raise ValueError(f"normalizer has shape {tuple(normalizer.shape)}; expected one number")
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("weight requires grad; cross_entropy is not differentiable in it; pass weight.detach()")
    if second is not None and second.shape != target.shape:
        raise ValueError(
            f"the labels of a mixture have shapes {tuple(target.shape)} and {tuple(second.shape)}; expected the same"
        )


def _labels(target: torch.Tensor, input: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if target.dtype not in (torch.int64, torch.uint8):
        raise RuntimeError(
            f"target has dtype {target.dtype}; expected target dtype to be Long or Byte; convert it with .long()"
        )
    if target.shape != shape:
        if input.dim() > 1 and target.dim() > 0 and target.shape[0] != input.shape[0]:
            raise ValueError(
                f"Expected input batch_size ({input.shape[0]}) to match target batch_size ({target.shape[0]})."
            )
        raise RuntimeError(f"Expected target size {shape}, got {tuple(target.shape)}; give one label a row")
    return target.long()
