"""The dense layer."""

import torch

from gdbp.nn import functional as F
from gdbp.nn._arguments import check_activation
from gdbp.nn._batch_norm import activate
from gdbp.nn._observe import as_leaf, observers, tell
from gdbp.nn._twin import Twin


class Linear(torch.nn.Linear, metaclass=Twin):
    """``activation(input @ weight.T + bias)`` in one layer.

    A ``torch.nn.Linear`` in every respect (parameters, initial weights under the same seed, state_dict), with
    the activation that would follow it computed in the pass that adds the bias. As with all classes of
    :mod:`gdbp.nn` that torch has, ``isinstance`` takes torch's for one of these: of them torch's own modules are made.

    Args:
        in_features: size of each input row.
        out_features: size of each output row.
        bias: whether to learn a bias of shape (out_features,).
        device, dtype: of the parameters; float64, float32, bfloat16 or float16.
        activation: None, or a name: "relu", "gelu", ..., see :func:`gdbp.nn.functional.linear`.

    What takes a layer for any ``torch.nn.Linear`` and puts another in its place, or something beside it, does not know
    of the activation, and no error says so: LoRA adapters, quantization to another class, ``fuse_linear_bn_eval``. Give
    these torch's layers, and the model to :func:`gdbp.fuse`, which keeps out of what they do.

    Shape:
        input (\\*, in_features), output (\\*, out_features).

    Raises:
        ValueError: for an unknown activation.
    """

    _torchs = torch.nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        activation: str | None = None,
    ):
        check_activation(activation)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = activation

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if isinstance(input, torch.fx.Proxy):
            call = as_leaf(self, input)
            return activate(super().forward(input), self.activation) if call is None else call
        output = F.linear(input, self.weight, self.bias, activation=self.activation)
        if observers:
            tell((self,), self.activation, output)
        return output

    def extra_repr(self) -> str:
        suffix = "" if self.activation is None else f", activation={self.activation!r}"
        return super().extra_repr() + suffix
