"""What a fused model does when it is called: runs of layers in one pass, and everything else one by one.

Nothing is remembered between calls. Whether layers make up a run is looked at when they are called, so whatever is
done to them later (hooks, a parametrization, another class, a layer in the place of another) counts from then on.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import gdbp.nn
from gdbp import reference
from gdbp.fusion import activations
from gdbp.nn import functional as F
from gdbp.nn._batch_norm import normalize_by
from gdbp.nn._observe import is_watched, observers, obstacle, tell
from gdbp.ops import mlp

Layer = torch.nn.Module | str  # a module, or the name of an activation that is a function

LINEARS = frozenset((torch.nn.Linear, gdbp.nn.Linear))
NORMS = frozenset((torch.nn.BatchNorm1d, gdbp.nn.BatchNorm1d))
_TORCHS = frozenset((torch.nn.Linear, torch.nn.BatchNorm1d))
# Activations whose output the backward pass reads, where torch's read their input: nothing may write to it afterwards.
SAVED_BY_OUTPUT = frozenset(("leaky_relu", "softplus"))
# Where torch's and our layers are that return new tensors, but for torch.nn.Identity.
_COPYING = frozenset(
    [f"torch.nn.modules.{name}" for name in ("linear", "activation", "batchnorm", "normalization", "conv", "pooling")]
    + [f"gdbp.nn.{name}" for name in ("linear", "norm", "mlp")]
)
DTYPES = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))


class Run(NamedTuple):
    """Layers that are computed together."""

    linear: torch.nn.Module | None
    norm: torch.nn.Module | None
    activation: str | None
    length: int  # number of layers

    def __call__(self, input: Tensor) -> Tensor:
        linear, norm, activation, _ = self
        if linear is None:
            return normalize_by(norm, input, activation)
        # Not by their attributes, which nn.Module looks up in Python.
        weight, bias = linear._parameters["weight"], linear._parameters["bias"]
        if norm is None:
            return F.linear(input, weight, bias, activation=activation)
        if input.dim() != 2:
            # Channels are not the linear layer's outputs: its bias is no offset of theirs.
            return normalize_by(norm, F.linear(input, weight, bias), activation)
        return normalize_by(norm, torch.nn.functional.linear(input, weight), activation, bias)

    def __str__(self) -> str:
        parts = ("linear" if self.linear is not None else "", "batch_norm" if self.norm is not None else "")
        return " + ".join(filter(None, (*parts, self.activation)))


class Strip(NamedTuple):
    """Narrow linear layers in a row, with activations: on the CPU one node of the graph, as for ``gdbp.nn.MLP``."""

    linears: tuple[torch.nn.Module, ...]
    activations: tuple[str, ...]
    length: int  # number of layers

    def __call__(self, input: Tensor) -> Tensor | None:
        weights, biases = ([linear._parameters[name] for linear in self.linears] for name in ("weight", "bias"))
        return mlp.on_cpu(input, weights, biases, self.activations)


def strip(layers: Sequence[Layer], start: int) -> Strip | None:
    """The two or more linear layers that begin at ``start`` and are narrow enough, if there are any."""
    linears, activations, end = [], [], start
    while end < len(layers) and len(linears) < mlp.MOST_LAYERS and is_narrow(layers[end]):
        found = match(layers, end)
        if found is None:
            found = Run(layers[end], None, _activation(layers[end]), 1)
        if found.norm is not None:
            break
        linears.append(found.linear)
        activations.append(found.activation or "none")
        end += found.length
    return Strip(tuple(linears), tuple(activations), end - start) if len(linears) > 1 else None


def is_narrow(layer: Layer) -> bool:
    """Whether this is a linear layer that can be part of a strip."""
    if type(layer) not in LINEARS or obstacle(layer):
        return False
    weight = layer._parameters.get("weight")
    if weight is None or "bias" not in layer._parameters:
        return False
    return max(weight.shape) <= mlp.MOST_WIDE and weight.dtype in (torch.float32, torch.float64)


def match(layers: Sequence[Layer], start: int) -> Run | None:
    """The run of two or more layers that begins at ``start``, if there is one."""
    end, linear, norm, activation = start, None, None, None
    layer = layers[end]
    if type(layer) in LINEARS:
        weight = layer._parameters.get("weight")
        if obstacle(layer) or _activation(layer) is not None or weight is None or weight.dtype not in DTYPES:
            return None
        if "bias" not in layer._parameters:
            return None
        linear = layer
        end += 1
    if end < len(layers) and type(layers[end]) in NORMS and not obstacle(layers[end]):
        norm = layers[end]
        activation = _activation(norm)
        end += 1
    if end > start and end < len(layers) and activation is None:
        layer = layers[end]
        if isinstance(layer, str):
            activation = layer
        elif type(layer) in activations.MODULES and not obstacle(layer):
            activation = activations.of_module(layer)[0]
        if activation in SAVED_BY_OUTPUT and is_written_over(layers[end + 1 :]):
            activation = None
        end += activation is not None
    return Run(linear, norm, activation, end - start) if end - start > 1 else None


def is_written_over(following: Sequence[Layer]) -> bool:
    """Whether layers that follow one another write to what the first of them is given."""
    for layer in following:
        if isinstance(layer, str) or (makes_new(layer) and not is_inplace(layer)):
            return False
        if is_inplace(layer):
            return True
    return False


def is_inplace(layer: torch.nn.Module) -> bool:
    """Whether a module, or one in it, says that it writes to what it is given."""
    return any(getattr(each, "inplace", False) for each in layer.modules())


def makes_new(layer: torch.nn.Module) -> bool:
    """Whether a module's output surely is no view of its input, nor the input itself."""
    kind = type(layer)
    return kind.__module__ in _COPYING and kind is not torch.nn.Identity


def _activation(layer: torch.nn.Module) -> str | None:
    """That of one of our layers; torch's have none."""
    return None if type(layer) in _TORCHS else layer.activation


def run(input: Tensor, *layers: Layer) -> Tensor:
    """The layers one after the other, as ``torch.nn.Sequential`` calls them, runs among them in one pass."""
    watched = is_watched() or isinstance(input, torch.fx.Proxy)
    in_strips = not (watched or observers) and mlp.is_on_cpu(input)
    i = 0
    while i < len(layers):
        found = strip(layers, i) if in_strips else None
        if found is not None:
            output = found(input)
            # Else nothing that the kernels take: the next ones would not be either.
            in_strips = output is not None
            if in_strips:
                input = output
                i += found.length
                continue
        found = None if watched else match(layers, i)
        if found is not None:
            input = found(input)
            if observers:
                tell(layers[i : i + found.length], found.activation, input)
            i += found.length
        else:
            layer = layers[i]
            input = reference.ACTIVATIONS[layer][0](input) if isinstance(layer, str) else layer(input)
            i += 1
    return input
