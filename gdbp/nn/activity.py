"""What the outputs of a network's layers say about its training: dead units, saturated ones, means and variances."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gdbp import _load, reference
from gdbp._table import format_table
from gdbp.nn._arguments import check_module
from gdbp.nn._observe import observers
from gdbp.ops._function import is_fused, is_transformed

# Where an activation's curve is flat: outputs up to the first number, and from the second on. There its slope is
# 0 (relu), or about 1 % of what it can be (sigmoid and tanh: 4 %).
_INFINITY = float("inf")
FLAT = {
    "relu": (0.0, _INFINITY),
    "sigmoid": (0.01, 0.99),
    "tanh": (-0.98, 0.98),
    "elu": (-0.99, _INFINITY),
    "softplus": (0.01, _INFINITY),
}
# Where a rule of thumb begins to worry: shares of units, and of outputs.
_DEAD, _SATURATED, _CONSTANT = 0.1, 0.5, 1e-10


@dataclass(frozen=True)
class LayerActivity:
    """Outputs of one layer, over all calls that were collected.

    Attributes:
        name: the layer's, or those of the layers that were computed together.
        activation: its name, or None.
        rows: how many outputs of each unit there were.
        flat, mean, variance: float64 (units,) on the outputs' device: the share of a unit's outputs where the
            activation's curve is flat (ReLU: 0; sigmoid: within 0.01 of its ends; tanh: within 0.02; ELU and
            softplus: within 0.01 of the lower end; no outputs of others), the outputs' mean and (biased) variance.
    """

    name: str
    activation: str | None
    rows: int
    flat: Tensor
    mean: Tensor
    variance: Tensor

    @property
    def dead(self) -> Tensor:
        """bool (units,): whether all of a unit's outputs were on the flat part, so that it learned nothing."""
        return self.flat == 1

    def _numbers(self) -> list[float]:
        spread = self.variance.mean() + self.mean.var(correction=0)
        numbers = self.mean.mean(), spread, self.dead.double().sum(), self.flat.mean()
        return torch.stack(numbers).tolist() if len(self.flat) and self.rows else [0.0] * 4

    def cells(self) -> list[str]:
        mean, variance, dead, flat = self._numbers()
        counts = [f"{dead:.0f}", f"{flat:.0%}" if flat else "0"] if self.activation in FLAT else ["-", "-"]
        sizes = [str(len(self.flat)), str(self.rows)]
        return [self.name, self.activation or "none", *sizes, f"{mean:.2e}", f"{variance:.2e}", *counts]

    def verdict(self) -> str:
        """In words, what is wrong and what usually helps; empty if nothing is. Waits for the device."""
        mean, variance, dead, flat = self._numbers()
        if mean - mean or variance - variance:
            return "not finite: lower the rate, clip the gradients, look for overflow in the layers before"
        many_dead = dead > _DEAD * len(self.flat)
        if self.activation == "relu":
            if many_dead:
                return "dead units: leaky ReLU or He initialisation, a lower rate, batch norm"
        elif many_dead or flat > _SATURATED:
            return "saturated: Xavier initialisation, batch norm, smaller inputs, or ReLU"
        if self.rows > 1 and len(self.flat) and variance < _CONSTANT:
            return "constant: the layer passes nothing on; look at its weights and at the layers before"
        return ""


@dataclass(frozen=True)
class ActivationStats:
    """What :func:`collect_activation_stats` saw: ``layers`` in the order of their first calls. Their tensors are not
    waited for until they are printed. ``str()`` is a table with a verdict for each, :meth:`verdicts` these alone; of
    nothing it is a sentence."""

    layers: tuple[LayerActivity, ...]

    def __getitem__(self, name: str) -> LayerActivity:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"{name!r}; there are {', '.join(layer.name for layer in self.layers) or 'none'}")

    def verdicts(self) -> dict[str, str]:
        return {layer.name: verdict for layer in self.layers if (verdict := layer.verdict())}

    def __str__(self) -> str:
        if not self.layers:
            return "no layer that is watched was called; gdbp.fuse(model) has the layers of torch.nn watched, too"
        head = ["layer", "activation", "units", "rows", "mean", "variance", "dead", "flat", "verdict"]
        rows = [[*layer.cells(), layer.verdict() or "ok"] for layer in self.layers]
        return format_table([head, *rows], range(2, len(head) - 1))


class ActivationCollector:
    """A handle, as of a hook: ends with :meth:`remove`, or as a context manager. Printed, it is its statistics."""

    def __init__(self, model: torch.nn.Module):
        self._names = {module: name for name, module in reversed(list(model.named_modules()))}
        self._sums: dict[tuple[str, str | None], tuple[int, Tensor]] = {}
        observers.append(self)

    def stats(self) -> ActivationStats:
        """Everything collected so far, without waiting for the device."""
        return ActivationStats(tuple(_activity(*key, *value) for key, value in self._sums.items()))

    def clear(self) -> None:
        """Begin again from nothing."""
        self._sums.clear()

    def remove(self) -> None:
        """Collect no more; what was collected stays. Does nothing the second time."""
        if self in observers:
            observers.remove(self)

    def __enter__(self) -> "ActivationCollector":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __str__(self) -> str:
        return str(self.stats())

    def watches(self, module: torch.nn.Module) -> bool:
        """Whether it is a part of the model."""
        return module in self._names

    def see(self, layers: Sequence[torch.nn.Module | str], activation: str | None, output: Tensor) -> None:
        """Takes in one output; for our layers to call."""
        if layers[0] not in self._names or is_transformed():
            return
        parts = (f"{layer}()" if isinstance(layer, str) else self._names[layer] for layer in layers)
        key = (" + ".join(parts) or "(itself)", activation)
        with torch.no_grad():
            by_unit = torch.atleast_2d(output.detach())
            # Units are a layer's last dimension, and the second of a normalisation's.
            if by_unit.dim() > 2 and isinstance(_last_module(layers), torch.nn.modules.batchnorm._BatchNorm):
                by_unit = by_unit.movedim(1, -1)
            by_unit = by_unit.flatten(0, -2)
            sums = _read(by_unit, *FLAT.get(activation, (-_INFINITY, _INFINITY)))
            rows, before = self._sums.get(key, (0, None))
            self._sums[key] = (rows + by_unit.shape[0], sums if before is None else before + sums)


def collect_activation_stats(model: torch.nn.Module) -> ActivationCollector:
    """Watch the outputs of a model's layers while it runs: dead and saturated units, means and variances. ::

        with gdbp.nn.utils.collect_activation_stats(model) as activity:
            for input, target in batches:
                ...
        print(activity)

    Watched are our layers (``gdbp.nn.Linear``, ``BatchNorm1d``, ``SyncBatchNorm``) and the runs of a model that
    :func:`gdbp.fuse` has been over; for other layers, fuse first. While nobody watches it costs nothing. While somebody
    does, each output is read once more, right after it was written: a kernel that counts as it writes would be
    slower for everybody. Sums are kept in float64 on the device, which is not waited for.

    ``TrainStep`` does not call layers, and refuses a model that is watched. Calls inside transforms of torch.func are
    not counted. Of DTensors all is counted, which every rank must do.

    Args:
        model: the module whose layers to watch; what of it is called, and how often, does not matter.

    Raises:
        TypeError: model is no module.
    """
    check_module("model", model)
    return ActivationCollector(model)


def _last_module(layers: Sequence[torch.nn.Module | str]) -> torch.nn.Module | None:
    """The linear layer or normalisation whose units these are."""
    known = (torch.nn.Linear, torch.nn.modules.batchnorm._BatchNorm)
    return next((layer for layer in reversed(layers) if isinstance(layer, known)), None)


def _read(output: Tensor, low: float, high: float) -> Tensor:
    output = output.full_tensor() if hasattr(output, "full_tensor") else output
    if _load.available and is_fused(output) and output.is_floating_point():
        return torch.ops.gdbp.unit_stats(output, low, high)
    return reference.unit_stats(output, low, high)


def _activity(name: str, activation: str | None, rows: int, sums: Tensor) -> LayerActivity:
    flat, mean, squares = (sums / rows).unbind() if rows else torch.zeros_like(sums).unbind()
    return LayerActivity(name, activation, rows, flat, mean, (squares - mean * mean).clamp_min(0))
