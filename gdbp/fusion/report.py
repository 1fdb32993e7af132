"""What was fused, what was not, and why."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gdbp._table import format_table
from gdbp.fusion import activations
from gdbp.fusion.run import DTYPES, LINEARS, NORMS, Layer, Run, match
from gdbp.nn._observe import obstacle


@dataclass(frozen=True)
class Fused:
    """A run: its layers in order, and what it is computed as.

    Attributes:
        layers: names in the model; an activation that is a function has brackets behind its own.
        kind: such as "linear + batch_norm + relu".
    """

    layers: tuple[str, ...]
    kind: str


@dataclass(frozen=True)
class Left:
    """A Linear or BatchNorm1d layer that is in no run, or an activation that is not in the run before it.

    Attributes:
        layer: its name in the model.
        reason: why it is left as it is.
    """

    layer: str
    reason: str


@dataclass(frozen=True)
class FuseReport:
    """What :func:`gdbp.fuse` found. ``str()`` is a table."""

    fused: tuple[Fused, ...]
    left: tuple[Left, ...]

    def __str__(self) -> str:
        rows = [["layers", "computed as", "why not fused"]]
        rows += [[", ".join(run.layers), run.kind, ""] for run in self.fused]
        rows += [[left.layer, "", left.reason] for left in self.left]
        return format_table(rows)


def is_candidate(module: Layer) -> bool:
    """Whether one would expect a run here."""
    return isinstance(module, (torch.nn.Linear, torch.nn.BatchNorm1d))


def describe(layers: Sequence[Layer], names: Sequence[str], end: str) -> tuple[list[Fused], list[Left]]:
    """The runs in a sequence of layers, and for each Linear and BatchNorm1d outside of them the reason; ``end``
    says what is behind the last layer."""
    fused, left = [], []
    i = 0
    while i < len(layers):
        found = match(layers, i)
        if found is not None:
            fused.append(Fused(tuple(names[i : i + found.length]), str(found)))
            i += found.length
            left += cut_short(found, layers[i : i + 1], names[i : i + 1])
            continue
        if is_candidate(layers[i]):
            left.append(Left(names[i], why_not(layers[i:], names[i:], end)))
        i += 1
    return fused, left


def cut_short(found: Run, following: Sequence[Layer], names: Sequence[str]) -> list[Left]:
    """Why the activation behind a run without one, if there is one, is not in it."""
    if found.activation is not None or not following or type(following[0]) not in activations.MODULES:
        return []
    why = activations.of_module(following[0])[1] or obstacle(following[0])
    return [Left(names[0], why or "what follows writes over its output, which must be kept for the backward pass")]


def why_not(layers: Sequence[Layer], names: Sequence[str], end: str) -> str:
    """Why the first of these layers begins no run."""
    own = _why_itself(layers[0])
    if own:
        return own
    if len(layers) == 1:
        return end
    following = layers[1]
    if isinstance(following, str):
        return f"followed by {following}"
    missing = activations.of_module(following)[1]
    if missing:
        return f"followed by {names[1]}, {missing}"
    known = type(following) in activations.MODULES or type(following) in NORMS
    hindered = obstacle(following) if known else ""
    why = f"; {hindered}" if hindered else ", whose output something writes over" if known else ""
    return f"followed by {names[1]}, a {type(following).__name__}{why}"


def _why_itself(module: torch.nn.Module) -> str:
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "it is parametrized"
    if type(module) not in LINEARS | NORMS:
        return f"it is a {type(module).__name__}, whose forward is its own"
    if getattr(module, "activation", None) is not None:
        return f"it computes its activation, {module.activation}, already"
    weight = module.weight
    if weight is not None and weight.dtype not in DTYPES:
        return f"its weight is {weight.dtype}, for which there are no kernels"
    return obstacle(module)
