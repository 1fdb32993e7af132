"""Cross-entropy of logits, with torch's signature and what training asks for besides."""

import torch

from gdbp import ops
from gdbp.nn._arguments import check_tensors, reduction_name, without_autocast
from gdbp.nn._targets import Mixture, cap_of, check_options, class_number, in_float64, labels_of, mixture_of, share_of
from gdbp.ops._function import is_transformed


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
        target, second, share = mixture_of(target)
    input, weight = without_autocast(input, weight)
    check_options(target, second, weight, reduction, label_smoothing, z_loss, softcap, normalizer, empty)
    ignore_index = class_number(ignore_index)
    dim, is_labels = input.dim(), not target.is_floating_point()
    same_shape = dim == target.dim() and input.shape == target.shape
    soft = not is_labels and dim > 0 and same_shape and ignore_index < 0
    if not soft and (dim < 1 or not is_labels or same_shape):
        # What torch itself refuses.
        return torch.nn.functional.cross_entropy(
            input, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )
    if inplace_backward:
        inplace_backward = torch.is_grad_enabled() and not (torch.compiler.is_compiling() or is_transformed())
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
        target = labels_of(target, input, shape)
        if second is not None:
            second = labels_of(second, input, shape)
            share = share_of(share, shape, input.device)
    if dim == 1:
        input, target, second, share = (None if t is None else t.unsqueeze(0) for t in (input, target, second, share))
    if normalizer is not None:
        normalizer = in_float64("normalizer", normalizer, input.device).detach().reshape(())
    loss = ops.cross_entropy(
        input, target, second, share, weight, normalizer, reduction, ignore_index, max(0.0, label_smoothing),
        z_loss, cap_of(softcap), empty == "zero", inplace_backward,
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
