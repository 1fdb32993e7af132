"""Cross-entropy, of logits and of a linear layer's, with torch's signatures and what training asks for besides."""

import torch

from gdbp import ops
from gdbp.nn._arguments import (
    autocast,
    autocast_is_on,
    check_tensors,
    nonnegative,
    number,
    reduction_name,
    whole,
    without_autocast,
)
from gdbp.ops._function import functorch_is_active, is_direct

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
        weight: (C,) factor of each class, or None; of the input's dtype, but with probabilities promoted like these.
        ignore_index: the label whose rows count for nothing, whatever their logits hold.
        reduction: "mean" (divided by the weights of the labels that count; for probabilities by the number of
            rows), "sum" or "none".
        label_smoothing: from 0 to 1, the share of the target that is spread over all classes.
        z_loss: this times ``logsumexp(logits)**2`` is added to a row's loss, with the weight of its label (PaLM,
            Chowdhery et al., 2022, take 1e-4).
        softcap: logits become ``softcap * tanh(logits / softcap)`` first (Gemma 2 takes 30).
        normalizer: what "mean" divides by instead: the number of labels in all batches whose gradients are
            accumulated, say. A number or a 0-dim tensor.
        empty: the mean where there is nothing to divide by, all labels being ignored, say: "nan", as in torch, or
            "zero". Its gradient is 0 in both cases.
        inplace_backward: the gradient is written over the logits, which saves its memory and its pages. Wherever
            autograd needs them afterwards it raises an error; do not read them yourself. Under torch.compile and
            torch.func this changes nothing.

    The terms of the largest logit are kept apart, so the loss and the gradients are accurate for confident rows
    too, where ``1 - softmax`` has no digits left. Sums are in float64, so any number of rows will do.

    Raises:
        IndexError: a label outside [0, C); names label and row. On CUDA its loss is NaN, and a later call raises.
        TypeError: an argument that is no tensor, a number that is none.
        RuntimeError: shapes, dtypes or devices that do not fit; numbers that require gradients; inplace_backward over
            a leaf, a view of one, or logits that share memory, or with a target that requires gradients.
        ValueError: an unknown reduction or ``empty``, numbers out of range, batches of different size.
    """
    reduction = reduction_name(size_average, reduce, reduction)
    if type(input) is not torch.Tensor or weight is not None:
        check_tensors(input=input, weight=weight)
    second = share = None
    if isinstance(target, tuple):
        target, second, share = _mixture(target)
    input, weight = without_autocast(input, weight)
    _check_cross_entropy(target, second, weight, reduction, label_smoothing, z_loss, softcap, normalizer, empty)
    ignore_index = _class_number(ignore_index)
    dim, is_labels = input.dim(), not target.is_floating_point()
    same_shape = dim == target.dim() and input.shape == target.shape
    soft = not is_labels and dim > 0 and same_shape and ignore_index < 0
    if not soft and (dim < 1 or not is_labels or same_shape):
        # What torch itself refuses.
        return torch.nn.functional.cross_entropy(
            input, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )
    if inplace_backward:
        inplace_backward = torch.is_grad_enabled() and not (torch.compiler.is_compiling() or functorch_is_active())
        if inplace_backward:
            _check_inplace(input, target)
    shape = input.shape[:1] + input.shape[2:] if dim > 1 else ()
    if soft:
        if target.dtype != input.dtype or (weight is not None and weight.dtype != input.dtype):
            dtype = torch.promote_types(input.dtype, target.dtype)
            if weight is not None:
                dtype = torch.promote_types(dtype, weight.dtype)
                weight = weight.to(dtype)
            input, target = input.to(dtype), target.to(dtype)
    else:
        target = _labels(target, input, shape)
        if second is not None:
            second = _labels(second, input, shape)
            share = _share(share, shape, input.device)
    if dim == 1:
        input, target, second, share = (None if t is None else t.unsqueeze(0) for t in (input, target, second, share))
    if normalizer is not None:
        normalizer = _float64("normalizer", normalizer, input.device).detach().reshape(())
    loss = ops.cross_entropy(
        input, target, second, share, weight, normalizer, reduction, ignore_index, max(0.0, label_smoothing),
        z_loss, _cap(softcap), empty == "zero", inplace_backward,
    )  # fmt: skip
    return loss.reshape(shape) if reduction == "none" and loss.shape != shape else loss


def _check_inplace(logits: torch.Tensor, target: torch.Tensor) -> None:
    if target.requires_grad:
        raise RuntimeError(
            "inplace_backward=True writes the gradient over the logits, and target requires grad, which needs them; "
            "leave it out, or pass target.detach()"
        )
    if not logits.requires_grad:
        return
    base = logits if logits._base is None else logits._base
    if base.is_leaf:
        raise RuntimeError(
            "inplace_backward=True writes the gradient over the logits, and these are a leaf or a view of one, whose "
            "values are yours to keep; leave it out, or pass logits that were computed"
        )
    end = 1
    for stride, size in sorted(zip(logits.stride(), logits.shape)):
        if size > 1 and stride < end:
            raise RuntimeError(
                "inplace_backward=True writes the gradient over the logits, and these are expanded or overlap "
                f"(strides {logits.stride()}), several to one place; leave it out, or pass logits.contiguous()"
            )
        end += (size - 1) * stride


def _class_number(value: object) -> int:
    found = value if type(value) is int else whole(value)
    if found is None:
        raise TypeError(f"ignore_index is {value!r}; expected a whole number")
    if not -(2**63) <= found < 2**63:
        raise ValueError("ignore_index is beyond int64; expected a smaller number")
    return found


def _cap(softcap: float | None) -> float:
    """As the operators take it: 0 for none."""
    return 0.0 if softcap is None or softcap == float("inf") else softcap


def _mixture(target: tuple) -> Mixture:
    if len(target) != 3:
        raise ValueError(f"target is a tuple of {len(target)}; expected (labels, labels, share of the first)")
    share = target[2]
    if isinstance(share, torch.Tensor):
        if share.requires_grad:
            raise RuntimeError("the share of a mixture requires grad; it has no derivative here; pass share.detach()")
        if share.is_complex():
            raise TypeError(f"the share of a mixture has dtype {share.dtype}; expected numbers from 0 to 1")
        # Of those on other devices, or of somebody who traces, nobody waits for the values.
        outside = ~((share >= 0) & (share <= 1)) if share.is_cpu and is_direct(share) else None
        if outside is not None and outside.any():
            raise ValueError(f"the share of a mixture is {share[outside][0]}; expected numbers from 0 to 1")
    elif not 0 <= number("share", share) <= 1:
        raise ValueError(f"the share of a mixture is {share}; expected a number from 0 to 1")
    for labels in target[:2]:
        if isinstance(labels, torch.Tensor) and labels.is_floating_point():
            raise ValueError("a mixture is of labels; got floating-point targets; mix probabilities yourself")
    return target


def _share(share: float | torch.Tensor, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    share = _float64("the share of a mixture", share, device)
    try:
        return share.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"the share of a mixture has shape {tuple(share.shape)}; expected one that broadcasts to the labels' "
            f"{tuple(shape)}"
        ) from None


def _float64(name: str, value: float | torch.Tensor, device: torch.device) -> torch.Tensor:
    if isinstance(value, torch.Tensor) and value.is_meta and device.type != "meta":
        raise ValueError(f"{name} is on meta, without a value; expected a number, or a tensor on {device}")
    return torch.as_tensor(value, dtype=torch.float64, device=device)


def _check_cross_entropy(target, second, weight, reduction, label_smoothing, z_loss, softcap, normalizer, empty):
    for labels in (target,) if second is None else (target, second):
        if not isinstance(labels, torch.Tensor):
            raise TypeError(
                f"target is or holds a {type(labels).__name__}; expected a tensor of labels or probabilities, or a "
                "tuple of two tensors of labels and the share of the first"
            )
    if not number("label_smoothing", label_smoothing) <= 1:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    nonnegative("z_loss", z_loss)
    if softcap is not None and not number("softcap", softcap) >= torch.finfo(torch.float32).tiny:
        least = "a number above 0" if not softcap > 0 else "a number that float32 tells from 0"
        raise ValueError(f"softcap is {softcap}; expected {least}, or None")
    if empty not in ("nan", "zero"):
        raise ValueError(f"empty is {empty!r}; expected 'nan' or 'zero'")
    if normalizer is not None and reduction != "mean":
        raise ValueError(f"normalizer divides the mean, and reduction is {reduction!r}; leave one of them out")
    if isinstance(normalizer, torch.Tensor):  # whose value nobody waits for
        if normalizer.numel() != 1:
            raise ValueError(f"normalizer has shape {tuple(normalizer.shape)}; expected one number")
        if normalizer.is_complex():
            raise TypeError(f"normalizer has dtype {normalizer.dtype}; expected a number")
        if normalizer.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("normalizer requires grad; the loss has no derivative in it; pass normalizer.detach()")
    elif normalizer is not None:
        number("normalizer", normalizer)
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
        raise RuntimeError(f"Expected target size {tuple(shape)}, got {tuple(target.shape)}; give one label a row")
    return target if target.dtype is torch.int64 else target.long()


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
    and float16, whose gradients are formed for the upstream gradient itself, so that a scaled loss helps them.

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
    ignore_index = -100 if ignore_index is None else _class_number(ignore_index)
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
        target, second, share = _mixture(target)
    _check_cross_entropy(target, second, weight, reduction, label_smoothing, z_loss, softcap, normalizer, empty)
    classes, shape = linear_weight.shape[0], input.shape[:1]
    if weight is not None:
        weight = _class_weight(weight, classes, output, input.device)
    if soft:
        if target.shape != (*shape, classes):
            raise RuntimeError(f"Expected target size {(*shape, classes)}, got {tuple(target.shape)}")
    else:
        target = _labels(target, input, shape)
        if second is not None:
            second = _labels(second, input, shape)
            share = _share(share, shape, input.device)
    if normalizer is not None:
        normalizer = _float64("normalizer", normalizer, input.device).detach().reshape(())
    chunk = getattr(options, "batch_chunk_size", None)
    if not isinstance(chunk, int) or chunk < 1:
        budget = budget or _CHUNK_BYTES.get(input.device.type, _CHUNK_BYTES["cpu"])
        chunk = max(1, budget // max(1, classes * max(4, input.element_size())))
    loss = ops.linear_cross_entropy(
        input, linear_weight, linear_bias, target, second, share, weight, normalizer, chunk, empty == "zero",
        reduction, ignore_index, max(0.0, label_smoothing), z_loss, _cap(softcap),
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
