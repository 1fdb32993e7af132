"""Targets and options of the cross-entropies: what is checked of them, and how the operators take them."""

import torch

from gdbp.nn._arguments import nonnegative, number, whole
from gdbp.ops._function import is_direct

Mixture = tuple[torch.Tensor, torch.Tensor, float | torch.Tensor]


def check_options(target, second, weight, reduction, label_smoothing, z_loss, softcap, normalizer, empty):
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


def class_number(value: object) -> int:
    found = value if type(value) is int else whole(value)
    if found is None:
        raise TypeError(f"ignore_index is {value!r}; expected a whole number")
    if not -(2**63) <= found < 2**63:
        raise ValueError("ignore_index is beyond int64; expected a smaller number")
    return found


def cap_of(softcap: float | None) -> float:
    """As the operators take it: 0 for none."""
    return 0.0 if softcap is None or softcap == float("inf") else softcap


def mixture_of(target: tuple) -> Mixture:
    if len(target) != 3:
        raise ValueError(f"target is a tuple of {len(target)}; expected (labels, labels, share of the first)")
    share = target[2]
    if isinstance(share, torch.Tensor):
        if share.requires_grad:
            raise RuntimeError("the share of a mixture requires grad; it has no derivative here; pass share.detach()")
        if share.is_complex():
            raise TypeError(f"the share of a mixture has dtype {share.dtype}; expected numbers from 0 to 1")
        # Of those on other devices, or of somebody who traces, nobody waits for the values.
        if share.is_cpu and share.numel() and is_direct(share):
            least, most = (share, share) if share.numel() == 1 else torch.aminmax(share.detach())
            if not 0 <= float(least) <= float(most) <= 1:
                worst = float(most if least >= 0 else least)
                raise ValueError(f"the share of a mixture is {worst}; expected numbers from 0 to 1")
    elif not 0 <= number("the share of a mixture", share) <= 1:
        raise ValueError(f"the share of a mixture is {share}; expected a number from 0 to 1")
    for labels in target[:2]:
        if isinstance(labels, torch.Tensor) and labels.is_floating_point():
            raise ValueError("a mixture is of labels; got floating-point targets; mix probabilities yourself")
    return target


def share_of(share: float | torch.Tensor, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    share = in_float64("the share of a mixture", share, device)
    try:
        return share.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"the share of a mixture has shape {tuple(share.shape)}; expected one that broadcasts to the labels' "
            f"{tuple(shape)}"
        ) from None


def in_float64(name: str, value: float | torch.Tensor, device: torch.device) -> torch.Tensor:
    if isinstance(value, torch.Tensor) and value.is_meta and device.type != "meta":
        raise ValueError(f"{name} is on meta, without a value; expected a number, or a tensor on {device}")
    return torch.as_tensor(value, dtype=torch.float64, device=device)


def labels_of(target: torch.Tensor, input: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
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
