"""A loss as the compiled step takes it (csrc/step/objective.cpp: make_objective)."""

from collections.abc import Callable

import torch

from gdbp import nn
from gdbp.step._model import Layers
from gdbp.step._watch import CannotFuse

# Functions stand for modules with their default options.
_FUNCTIONS = {
    getattr(library, function): getattr(nn, module)
    for library in (nn.functional, torch.nn.functional)
    for function, module in {
        "mse_loss": "MSELoss",
        "l1_loss": "L1Loss",
        "huber_loss": "HuberLoss",
        "smooth_l1_loss": "SmoothL1Loss",
        "binary_cross_entropy_with_logits": "BCEWithLogitsLoss",
        "cross_entropy": "CrossEntropyLoss",
    }.items()
}


def describe(loss: torch.nn.Module | Callable, layers: Layers) -> tuple:
    """The loss's name, its reduction and its options; its modules are watched with those of ``layers``, which get a
    last layer where the loss has one of its own.

    Raises:
        CannotFuse: names what has no fused form.
    """
    loss = _FUNCTIONS[loss]() if not isinstance(loss, torch.nn.Module) and loss in _FUNCTIONS else loss
    label = type(loss).__name__ if isinstance(loss, torch.nn.Module) else repr(loss)
    read = _READERS.get(getattr(type(loss), "forward", None))
    if read is None:
        names = ", ".join(sorted({cls.__name__ for cls in _FUNCTIONS.values()}))
        raise CannotFuse(
            f"{label} is no loss with a fused form; expected one of {names}, LinearCrossEntropyLoss; "
            "use strict=False to run others eagerly"
        )
    layers.watch.module(loss, label)
    reduction = layers.watch.option(loss, "reduction")
    if reduction not in ("mean", "sum"):
        raise CannotFuse(f"{label} has reduction={reduction!r}; expected 'mean' or 'sum', for one number to descend")
    name, *options = read(loss, layers, label)
    return (name, reduction, *options)


def _pointwise(name: str, parameter: str | None = None):
    def read(loss, layers: Layers, label):
        value = float(layers.watch.option(loss, parameter)) if parameter else 0.0
        if parameter == "beta" and value == 0:
            return "l1_loss", 0.0
        if parameter and not value > 0:
            raise CannotFuse(f"{label} has {parameter}={value}; expected a number above 0")
        return name, value

    return read


def _bce(loss, layers: Layers, label):
    return "bce_with_logits", *(layers.watch.tensor(loss, name, label) for name in ("weight", "pos_weight"))


def _cross_entropy(loss, layers: Layers, label):
    def option(name, default):
        return layers.watch.option(loss, name) if hasattr(loss, name) else default

    smoothing, z_loss, softcap = option("label_smoothing", 0.0), option("z_loss", 0.0), option("softcap", None)
    if not (0 <= smoothing <= 1 and z_loss >= 0 and (softcap is None or softcap > 0)):
        raise CannotFuse(
            f"{label} has label_smoothing={smoothing}, z_loss={z_loss}, softcap={softcap}; expected a number from 0 to "
            "1, one of at least 0, and one above 0 or None"
        )
    ignored = option("ignore_index", None)
    return (
        "cross_entropy",
        layers.watch.tensor(loss, "weight", label),
        -100 if ignored is None else ignored,
        float(smoothing),
        float(z_loss),
        float(softcap or 0.0),
        option("empty", "nan") == "zero",
    )


def _linear_cross_entropy(loss, layers: Layers, label):
    if loss.out_features:
        raise CannotFuse(f"{label} has out_features={loss.out_features}; expected (), one row of logits a sample")
    layers.add(loss.linear, "loss.linear")
    return _cross_entropy(loss, layers, label)


_READERS = {
    torch.nn.MSELoss.forward: _pointwise("mse_loss"),
    nn.MSELoss.forward: _pointwise("mse_loss"),
    torch.nn.L1Loss.forward: _pointwise("l1_loss"),
    nn.L1Loss.forward: _pointwise("l1_loss"),
    torch.nn.HuberLoss.forward: _pointwise("huber_loss", "delta"),
    nn.HuberLoss.forward: _pointwise("huber_loss", "delta"),
    torch.nn.SmoothL1Loss.forward: _pointwise("smooth_l1_loss", "beta"),
    nn.SmoothL1Loss.forward: _pointwise("smooth_l1_loss", "beta"),
    torch.nn.BCEWithLogitsLoss.forward: _bce,
    nn.BCEWithLogitsLoss.forward: _bce,
    torch.nn.CrossEntropyLoss.forward: _cross_entropy,
    nn.CrossEntropyLoss.forward: _cross_entropy,
    nn.LinearCrossEntropyLoss.forward: _linear_cross_entropy,
}
