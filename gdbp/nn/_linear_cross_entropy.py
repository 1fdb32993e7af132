"""Cross-entropy of a linear layer's output, with torch's signature and what training asks for besides."""

import torch

from gdbp import ops
from gdbp.nn._arguments import autocast, autocast_is_on, check_tensors, reduction_name, whole
from gdbp.nn._cross_entropy import cross_entropy
from gdbp.nn._targets import Mixture, cap_of, check_options, class_number, in_float64, labels_of, mixture_of, share_of

# Bytes of logits at a time: what stays in a CPU's last cache or near it, what fills a GPU.
_CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}


def linear_cross_entropy(
    input: torch.Tensor,
    linear_weight: torch.Tensor,
    target: torch.Tensor | Mixture,
    *,
    linear_bias: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options=None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    normalizer: float | torch.Tensor | None = None,
    empty: str = "nan",
    memory_budget: int | None = None,
) -> torch.Tensor:
    """``cross_entropy(linear(input, linear_weight, linear_bias), target, ...)`` without ever holding all logits: torch
    2.13's signature, for every torch that gdbp runs with.

    Args:
        input: (N, in_features) or (in_features,).
        linear_weight: (C, in_features), or (C, d1, ..., in_features) for targets (N, d1, ...), whose logits are formed
            as a whole.
        linear_bias: the weight's shape without its last dimension, or None.
        options: torch's ``LinearCrossEntropyOptions``, of which only a ``batch_chunk_size`` of 1 or more is looked at:
            the rows of a chunk.
        memory_budget: bytes that the logits of a chunk may take; default 32 MiB on a CPU, 512 MiB on CUDA. A chunk
            is one row at least.

    The other arguments are those of :func:`cross_entropy`. Losses, and the sums for the gradients of weight and bias,
    are in float32 for half types. The result has the dtype of that of the plain functions. Forward computes the
    gradients along with the loss: together they take the three matrix products of the plain layer. One more is taken
    by ``reduction="none"``, a second backward through one graph, what is traced by torch.compile or torch.export,
    and float16, whose gradients are formed for the upstream gradient itself: a scaled loss helps them, as it does
    those of the plain functions.

    Derivatives of higher order form the logits as a whole, as does a target of probabilities that requires gradients
    or has more digits than the losses, and ``torch.compile`` of torch before 2.13, which would lose the gradients.

    Raises:
        IndexError: a label out of range. RuntimeError: shapes, dtypes or devices that do not fit, numbers that require
        gradients. TypeError: an argument that is no tensor, a number that is none. ValueError: an unknown name, a
        number out of range.
    """
    check_tensors(input=input, linear_weight=linear_weight, linear_bias=linear_bias, weight=weight)
    _check_linear(input, linear_weight, linear_bias)
    reduction = reduction_name(None, None, reduction)
    budget = None if memory_budget is None else whole(memory_budget) or 0
    if budget is not None and budget < 1:
        raise ValueError(f"memory_budget is {memory_budget!r}; expected a whole number of bytes, 1 or more")
    soft = isinstance(target, torch.Tensor) and target.is_floating_point()
    if soft and ignore_index is not None:
        raise RuntimeError("ignore_index cannot be specified when target contains probabilities")
    ignore_index = -100 if ignore_index is None else class_number(ignore_index)
    if autocast_is_on(input):
        output = torch.promote_types(torch.float32, input.dtype)
        input, linear_weight, linear_bias = autocast(input, linear_weight, linear_bias)
        weight = weight if weight is None else weight.to(torch.promote_types(weight.dtype, torch.float32))
    else:
        output = input.dtype
    whole_logits = linear_weight.dim() > 2 or input.dim() == 1
    if soft:
        for t in (target,) if weight is None else (target, weight):
            output = torch.promote_types(output, t.dtype)
        weight = None if weight is None else weight.to(output)
        # Chunks have no more digits than the input, or float32.
        whole_logits |= target.requires_grad or target.dim() != 2 or output.itemsize > max(4, input.itemsize)
    extras = {"z_loss": z_loss, "softcap": softcap, "normalizer": normalizer, "empty": empty}
    shared = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing, **extras}
    if whole_logits:
        flat = linear_weight.flatten(0, -2)
        logits = ops.linear(input, flat, None if linear_bias is None else linear_bias.flatten(), "none")
        return cross_entropy(logits.unflatten(-1, linear_weight.shape[:-1]), target, weight, **shared)
    second = share = None
    if isinstance(target, tuple):
        target, second, share = mixture_of(target)
    check_options(target, second, weight, reduction, label_smoothing, z_loss, softcap, normalizer, empty)
    classes, shape = linear_weight.shape[0], input.shape[:1]
    if weight is not None:
        weight = _class_weight(weight, classes, output, input.device)
    if soft:
        if target.shape != (*shape, classes):
            raise RuntimeError(f"Expected target size {(*shape, classes)}, got {tuple(target.shape)}")
    else:
        target = labels_of(target, input, shape)
        if second is not None:
            second = labels_of(second, input, shape)
            share = share_of(share, shape, input.device)
    if normalizer is not None:
        normalizer = in_float64("normalizer", normalizer, input.device).detach().reshape(())
    chunk = getattr(options, "batch_chunk_size", None)
    if not isinstance(chunk, int) or chunk < 1:
        budget = budget or _CHUNK_BYTES.get(input.device.type, _CHUNK_BYTES["cpu"])
        chunk = max(1, budget // max(1, classes * max(4, input.element_size())))
    loss = ops.linear_cross_entropy(
        input, linear_weight, linear_bias, target, second, share, weight, normalizer, chunk, empty == "zero",
        reduction, ignore_index, max(0.0, label_smoothing), z_loss, cap_of(softcap),
    )  # fmt: skip
    return loss.to(output)


def _check_linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """In torch's words."""
    if input.dim() not in (1, 2):
        raise RuntimeError(f"expected input with dimensionality 1 or 2, got {input.dim()}")
    if weight.dim() < 2:
        raise RuntimeError(f"expected linear_weight with dimensionality at least 2, got {weight.dim()}")
    if input.shape[-1] != weight.shape[-1]:
        raise RuntimeError(
            "expected equal input and linear_weight last dimensions (in_features), "
            f"got {input.shape[-1]} and {weight.shape[-1]}, respectively"
        )
    if weight.dim() > 2 and input.dim() == 1:
        raise RuntimeError(
            f"K-dimensional loss defined by linear_weight shape {tuple(weight.shape)} requires batched input, "
            f"(N, {input.shape[-1]}), got unbatched input with shape {tuple(input.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:-1]:
        raise RuntimeError(f"expected linear_bias shape {tuple(weight.shape[:-1])}, got {tuple(bias.shape)}")
    for name, t in (("linear_weight", weight), ("linear_bias", bias)):
        if t is not None and (t.dtype != input.dtype or t.device != input.device) and not autocast_is_on(input):
            raise RuntimeError(
                f"{name} is {t.dtype} on {t.device} and input {input.dtype} on {input.device}; expected the same; "
                "convert one of them with .to()"
            )


def _class_weight(weight: torch.Tensor, classes: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if weight.shape != (classes,):
        raise RuntimeError(
            f"weight has shape {tuple(weight.shape)}; weight tensor should be defined either for all {classes} "
            f"classes or no classes; expected ({classes},)"
        )
    if weight.dtype != dtype or weight.device != device:
        raise RuntimeError(
            f"weight is {weight.dtype} on {weight.device} and the logits {dtype} on {device}; expected the same; "
            "convert it with .to()"
        )
    return weight
