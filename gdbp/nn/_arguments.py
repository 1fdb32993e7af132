"""What the functions do to their arguments first: autocast, older names of reductions, and a sentence for what is no
tensor, number, module or activation."""

import math
import operator
from numbers import Real

import torch
from torch.nn import _reduction as _legacy

from gdbp.ops.linear import ACTIVATIONS

_any_autocast = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


def autocast_is_on(tensor: torch.Tensor) -> bool:
    if not _any_autocast():
        return False
    device = tensor.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def autocast(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The tensors in autocast's dtype, as torch's linear sees them."""
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return [
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype is not torch.float64 else t for t in tensors
    ]


def reduction_name(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    if size_average is not None or reduce is not None:
        reduction = _legacy.legacy_get_string(size_average, reduce)
    if reduction == "elementwise_mean":
        _legacy.get_enum(reduction)  # warns
        return "mean"
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{reduction} is not a valid value for reduction: expected none, mean or sum")
    return reduction


def without_autocast(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Losses are computed in float32 under autocast, as torch's are."""
    if not autocast_is_on(tensors[0]):
        return list(tensors)
    return [t.float() if t is not None and t.dtype in (torch.bfloat16, torch.float16) else t for t in tensors]


def whole(value: object) -> int | None:
    """A whole number, NumPy's too, as an int; None for anything else, and for a bool."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def no_number(**values: object) -> TypeError:
    """What to raise where a comparison of these was a TypeError, which is when there is time to see whose."""
    found = [f"{name} is {value!r}" for name, value in values.items() if not isinstance(value, Real)]
    return TypeError(f"{' and '.join(found)}; expected a number")


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        kind = type(value).__name__
        raise TypeError(f"{name} is of type {kind}; expected a tensor; convert it with torch.as_tensor()")


def number(name: str, value: object) -> float:
    """The value as a float, unless it cannot become one, or has a derivative that would be lost."""
    if type(value) is float:
        return value
    shape = () if isinstance(value, int) else getattr(value, "shape", ())
    if math.prod(shape) != 1:
        raise ValueError(f"{name} has shape {tuple(shape)}; expected one number")
    if isinstance(value, torch.Tensor):
        if value.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"{name} requires grad, and nothing here has a derivative in it; pass {name}.detach()")
        value = value.item()
    try:
        return float(None if isinstance(value, str) else value)
    except TypeError:
        raise no_number(**{name: value}) from None
    except OverflowError:
        raise ValueError(f"{name} is larger than any float; expected a smaller number, or inf") from None


def nonnegative(name: str, value: object) -> float:
    found = number(name, value)
    if not found >= 0:
        raise ValueError(f"{name} is {value}; expected a number of at least 0")
    return found


_MAY_BE_NONE = frozenset(("weight", "pos_weight", "linear_bias"))


def check_tensors(**tensors: object) -> None:
    for name, t in tensors.items():
        if t is not None or name not in _MAY_BE_NONE:
            check_tensor(name, t)


def check_loss(input: object, target: object, weight: object = None, pos_weight: object = None) -> None:
    """check_tensors() at a tenth of its time in the usual case."""
    if not (type(input) is type(target) is torch.Tensor and weight is pos_weight is None):
        check_tensors(input=input, target=target, weight=weight, pos_weight=pos_weight)


def check_module(name: str, value: object) -> None:
    if not isinstance(value, torch.nn.Module):
        raise TypeError(f"{name} is of type {type(value).__name__}; expected a torch.nn.Module")


def check_activation(activation: str | None) -> None:
    if activation is not None and (activation == "none" or activation not in ACTIVATIONS):
        names = ", ".join(name for name in ACTIVATIONS if name != "none")
        raise ValueError(f"activation is {activation!r}; expected None or one of {names}")
