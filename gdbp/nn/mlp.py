"""A multilayer perceptron."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch

from gdbp.nn import init as init_
from gdbp.nn._arguments import check_activation, number, whole
from gdbp.nn._observe import is_watched, observers, obstacle
from gdbp.nn.linear import Linear
from gdbp.nn.norm import BatchNorm1d
from gdbp.ops import mlp


class MLP(torch.nn.Sequential):
    """Linear layers with an activation after each but the last.

    ``MLP([784, 256, 10])`` is ``Linear(784, 256, activation="relu")`` and ``Linear(256, 10)``. With ``batch_norm``
    each hidden layer is ``Linear(..., bias=False)`` and ``BatchNorm1d(..., activation=...)``: the normalisation would
    take a bias of the linear layer out again. With ``dropout`` each hidden layer ends in a ``torch.nn.Dropout``.

    Args:
        sizes: number of inputs, of units in each hidden layer, and of outputs; at least two.
        activation: of the hidden layers; None, or a name, see :func:`gdbp.nn.functional.linear`.
        batch_norm: whether to normalise hidden layers before their activation.
        dropout: probability of a hidden unit to be dropped in training; none for 0.
        init: how weights are drawn, a name in ``gdbp.nn.init.SCHEMES``, with the gain of the activation (1 for the
            last layer); biases start at 0.
        device, dtype: of the parameters.

    Shape:
        input (\\*, sizes[0]), or (N, sizes[0]) with ``batch_norm``; output (\\*, sizes[-1]).

    On the CPU in float32 or float64 layers up to 128 wide are one node of the graph: a block of rows goes through all
    of them while it is in the cache, forward and then backward. Hidden outputs are kept in between, and where the
    activation's derivative needs them pre-activations.

    On CUDA in float32, bfloat16 or float16 (or under autocast), up to 65,536 rows go through layers up to 128 wide in
    one kernel, without gradients in 16 bits any number of rows. Gradients come out of another, activations in shared
    memory, which makes the forward pass again: only the input is kept. Products of float32 are those of tf32 where
    ``torch.backends.cuda.matmul.fp32_precision`` is "tf32", and else three of these, exact to some 2^-21.

    Raises:
        ValueError: fewer than two sizes or one below 1, an unknown activation or scheme, all-zero weights asked
            for, dropout outside [0, 1).
    """

    def __init__(
        self,
        sizes: Sequence[int],
        activation: str | None = "relu",
        *,
        batch_norm: bool = False,
        dropout: float = 0.0,
        init: str = "he",
        device=None,
        dtype=None,
    ):
        given = list(sizes) if isinstance(sizes, Iterable) else sizes
        sizes = [whole(size) or 0 for size in given] if isinstance(given, list) else []
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(
                f"sizes is {given}; expected two or more whole numbers above 0: inputs, hidden units, outputs"
            )
        if not 0 <= number("dropout", dropout) < 1:
            raise ValueError(f"dropout is {dropout}; expected a probability from 0 up to, not including, 1")
        if not isinstance(batch_norm, bool):
            raise TypeError(f"batch_norm is {batch_norm!r}; expected True or False")
        check_activation(activation)
        where = {"device": device, "dtype": dtype}
        layers: list[torch.nn.Module] = []
        for inputs, outputs in pairwise(sizes[:-1]):
            if batch_norm:
                linear = Linear(inputs, outputs, bias=False, **where)
                layers += [linear, BatchNorm1d(outputs, activation=activation, **where)]
            else:
                linear = Linear(inputs, outputs, activation=activation, **where)
                layers.append(linear)
            init_.init_(linear, init, nonlinearity=activation)
            if dropout:
                layers.append(torch.nn.Dropout(dropout))
        layers.append(init_.init_(Linear(*sizes[-2:], **where), init, nonlinearity=None))
        super().__init__(*layers)

    def forward(self, input):
        output = None
        # What torch.fx traces with is no tensor.
        if torch.is_tensor(input) and mlp.is_taken(input):
            output = self._in_one_kernel(input)
        return super().forward(input) if output is None else output

    def _in_one_kernel(self, input):
        layers = list(self._modules.values())
        if layers and not observers and not is_watched() and _is_plain(layers):
            weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
            return mlp.forward(input, weights, biases, layers[0].activation or "none")
        return None

    def __getitem__(self, index):
        # A part of it is a plain Sequential: torch would call the constructor with layers.
        if isinstance(index, slice):
            return torch.nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)


def _is_plain(layers: list[torch.nn.Module]) -> bool:
    """Whether they are what the constructor made of nothing but layers and one activation, and nobody listens."""
    first = getattr(layers[0], "activation", None)
    return all(
        type(layer) is Linear
        and layer.activation == (first if layer is not layers[-1] else None)
        and not obstacle(layer)
        for layer in layers
    )
