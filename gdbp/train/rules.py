"""The update rules of ``python -m gdbp train``, and the rates at which they learn the built-in data sets."""

from typing import Any, NamedTuple

import torch

from gdbp import optim

__all__ = ["RULES", "make_optimizer"]


class Rule(NamedTuple):
    make: type[torch.optim.Optimizer]
    extra: dict[str, Any]
    decay: float
    rate: float
    single: float  # the rate of steps of one sample, whose gradients point anywhere

    def rate_of(self, method: str) -> float:
        return self.single if method == "stochastic" else self.rate


RULES = {
    "sgd": Rule(optim.SGD, {}, 1e-4, 0.1, 0.01),
    "momentum": Rule(optim.SGD, {"momentum": 0.9}, 1e-4, 0.05, 0.001),
    "rmsprop": Rule(optim.RMSprop, {}, 1e-4, 2e-3, 1e-3),
    "adam": Rule(optim.Adam, {}, 1e-4, 5e-3, 1e-3),
    "adamw": Rule(optim.AdamW, {}, 1e-2, 5e-3, 1e-3),
}


def make_optimizer(
    model: torch.nn.Module, name: str, method: str, lr: float | None, l1: float, l2: float | None
) -> torch.optim.Optimizer:
    """The rule ``name`` over the parameters of ``model``, with its own rate and decay where none is given."""
    rule = RULES[name]
    # A bias shifts and can't overfit by its size, so only the weights are regularised.
    weights = {"params": [p for p in model.parameters() if p.ndim > 1]}
    biases = {"params": [p for p in model.parameters() if p.ndim <= 1], "l1": 0.0, "weight_decay": 0.0}
    return rule.make(
        [weights, biases],
        lr=lr or rule.rate_of(method),
        weight_decay=rule.decay if l2 is None else l2,
        l1=l1,
        l1_mode="prox",
        **rule.extra,
    )
