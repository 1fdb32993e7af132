"""Layers and loss, as gdbp/step reads them, run by autograd's functions: what a CUDA graph records."""

from collections.abc import Callable
from functools import partial

import torch

from gdbp import ops, reference
from gdbp.nn import functional
from gdbp.nn._arguments import without_autocast
from gdbp.step._model import Layers

_Function = Callable[[torch.Tensor], torch.Tensor]


def forward_of(layers: Layers, seed: torch.Tensor) -> _Function:
    """The network as a function of its input; seed: of dropout, see :func:`gdbp.ops.dropout`."""
    functions = [_flat] if layers.flattens else []
    for layer, (kind, _, *options) in enumerate(layers.found):
        if kind == "dropout":
            options += [seed, layer]
        functions.append(partial(_FUNCTIONS[kind], *options))
    if layers.output_dims == 1:
        functions.append(torch.flatten)

    def forward(x: torch.Tensor) -> torch.Tensor:
        for function in functions:
            x = function(x)
        return x

    return forward


def loss_of(objective: tuple) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The loss as a function of the network's output and the target; objective: see ``_loss.describe``."""
    name, reduction, *options = objective
    if name == "cross_entropy":
        return partial(_cross_entropy, reduction, *options)
    if name == "bce_with_logits":
        weight, pos_weight = options
        loss = functional.binary_cross_entropy_with_logits
        return partial(loss, weight=weight, pos_weight=pos_weight, reduction=reduction)
    return partial(_pointwise, name, reduction, *options)


def _flat(x):
    return x.flatten(1) if x.dim() > 2 else x


def _linear(weight, bias, activation, x):
    return functional.linear(x, weight, bias, activation=None if activation == "none" else activation)


def _activation(name, x):
    return reference.ACTIVATIONS[name][0](x)


def _dropout(p, seed, layer, x):
    return ops.dropout(x, p, seed, layer)


def _batch_norm(features, weight, bias, running_mean, running_var, batches, eps, momentum, of_batch, activation, x):
    if x.dim() < 2 or x.shape[1] != features:
        raise ValueError(f"TrainStep: a batch norm got {tuple(x.shape)}; expected (rows, {features})")
    running = (running_mean, running_var)
    return ops.batch_norm(x, *running, weight, bias, of_batch, momentum, eps, activation, num_batches_tracked=batches)


_FUNCTIONS = {"linear": _linear, "activation": _activation, "dropout": _dropout, "batch_norm": _batch_norm}


def _cross_entropy(reduction, weight, ignore_index, smoothing, z_loss, softcap, empty_is_zero, output, target):
    return functional.cross_entropy(
        output,
        target,
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=smoothing,
        z_loss=z_loss,
        softcap=softcap or None,
        empty="zero" if empty_is_zero else "nan",
    )


def _pointwise(name, reduction, parameter, output, target):
    if output.shape != target.shape:
        raise ValueError(
            f"TrainStep: target has shape {tuple(target.shape)}; expected {tuple(output.shape)}, as the output"
        )
    output, target = without_autocast(output, target)
    dtype = torch.promote_types(output.dtype, target.dtype)
    return ops.pointwise_loss(output.to(dtype), target.to(dtype), name, parameter, reduction)
