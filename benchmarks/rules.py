"""The optimizers that are measured, with their peers, the bytes they must move, and their goals."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks import peers
from benchmarks.work import Goal

LARGE, MANY, SMALL = "67 M", "1000 x 64", "4-tensor net"
# On CUDA.
RESNET, GPT = "ResNet-50", "GPT-2"


@dataclass(frozen=True)
class Rule:
    """A class of torch.optim and gdbp.optim, and how it is used.

    Args:
        optimizer: its name.
        traffic: how often an element of the parameters' dtype must be read or written in a step, and the further
            bytes, of other dtypes, for each parameter.
        options: of both; rates are large, so that a step that does nothing is seen in bfloat16 too.
        extras: options of gdbp's alone, and
        peer: what torch's users write for them.
        others: by package of :data:`benchmarks.optional.PEERS`, its class for the same, and further options of it.
        fused: the devices for which torch has a fused form.
        steps: how many are compared with the reference.
        loss: relative error that is no mistake, beyond that of rounding the results.
        compare_states: False where they are no numbers to compare.
        sizes: names of cases.optim.SIZES.
        dtype: see :class:`benchmarks.work.Case`.
        goals: by size.
    """

    optimizer: str
    traffic: tuple[int, float]
    options: dict[str, Any]
    extras: dict[str, Any] = field(default_factory=dict)
    peer: Callable[[peers.Make, peers.Parameters], peers.Peer] = peers.plain
    others: dict[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)
    fused: tuple[str, ...] = ("cpu", "cuda")
    steps: int = 2
    loss: float = 0.0
    compare_states: bool = True
    sizes: tuple[str, ...] = (LARGE,)
    dtype: torch.dtype | None = None
    goals: dict[str, Goal] = field(default_factory=dict)

    def make(self, module, params, **implementation):
        # Lion is not torch's.
        optimizer = getattr(module, self.optimizer, peers.Lion)
        return optimizer(params, **self.options, **implementation)

    def bytes_per_parameter(self, itemsize: int) -> float:
        accesses, further = self.traffic
        return accesses * itemsize + further


_ADAMW = {"lr": 0.05, "weight_decay": 0.01}
_ALL, _MODELS = (LARGE, MANY, SMALL), (RESNET, GPT)

# The gradient is read; the parameter and every state are read and written: 3 + 2 * states accesses.
RULES = {
    "adamw": Rule(
        "AdamW",
        (7, 0),
        _ADAMW,
        others={"bitsandbytes": ("AdamW", {}), "deepspeed": ("DeepSpeedCPUAdam", {"adamw_mode": True})},
        sizes=(*_ALL, *_MODELS),
        goals={
            LARGE: Goal(1.0, peer="torch fused", limit=0.9),
            MANY: Goal(40.0, peer="torch fused"),
            SMALL: Goal(2.0, peer="torch fused"),
            **dict.fromkeys(_MODELS, Goal(1.2, peer="torch fused")),
        },
    ),
    # The norm reads the gradients once more. Torch's, summed in float32, is 0.4 % off at 67 M.
    "adamw_clip": Rule(
        "AdamW",
        (8, 0),
        _ADAMW,
        extras={"max_grad_norm": peers.MAX_NORM},
        peer=peers.clipped,
        loss=2**-5,
        sizes=(LARGE, *_MODELS),
        goals={LARGE: Goal(1.6, peer="torch fused"), **dict.fromkeys(_MODELS, Goal(1.5, peer="torch fused"))},
    ),
    # A byte for each state, and 4 for each 256 of them, against torch's float32. What 8 bits lose of the states
    # is 1 to 3 % of a step.
    "adamw_8bit": Rule(
        "AdamW",
        (3, 4 * (1 + 4 / 256)),
        _ADAMW,
        extras={"state_dtype": "8bit"},
        others={"torchao": ("AdamW8bit", {}), "bitsandbytes": ("AdamW8bit", {})},
        loss=2**-7,
        compare_states=False,
        goals={LARGE: Goal(1.3, peer="torch fused")},
    ),
    # The average is float32 at least; in half types it follows rounded parameters, unlike the reference's.
    "adamw_ema": Rule(
        "AdamW", (7, 8), _ADAMW, extras={"ema_decay": peers.EMA_DECAY}, peer=peers.averaged, dtype=torch.float32
    ),
    # The gradient is read and the parameter written; its original and both states are float32.
    "adamw_master": Rule(
        "AdamW", (2, 24), _ADAMW, extras={"master_weights": True}, peer=peers.mastered, dtype=torch.bfloat16
    ),
    "adam_amsgrad": Rule("Adam", (9, 0), {"lr": 0.05, "amsgrad": True}, sizes=_ALL),
    "sgd_momentum": Rule(
        "SGD", (5, 0), {"lr": 0.05, "momentum": 0.9}, others={"bitsandbytes": ("SGD", {})}, sizes=_ALL
    ),
    "adagrad": Rule("Adagrad", (5, 0), {"lr": 0.05}, others={"bitsandbytes": ("Adagrad", {})}, fused=("cpu",)),
    "rmsprop": Rule(
        "RMSprop",
        (5, 0),
        {"lr": 0.01},
        others={"bitsandbytes": ("RMSprop", {})},
        fused=(),
        sizes=_ALL,
        goals={LARGE: Goal(4.0)},
    ),
    "rmsprop_centered": Rule(
        "RMSprop",
        (9, 0),
        {"lr": 0.01, "momentum": 0.9, "centered": True},
        fused=(),
        sizes=_ALL,
        goals={LARGE: Goal(5.0)},
    ),
    "lion": Rule("Lion", (5, 0), _ADAMW, others={"bitsandbytes": ("Lion", {})}, fused=(), goals={LARGE: Goal(3.0)}),
    "adamax": Rule("Adamax", (7, 0), {"lr": 0.05}, fused=(), goals={LARGE: Goal(3.0)}),
    "nadam": Rule("NAdam", (7, 0), {"lr": 0.05}, fused=(), goals={LARGE: Goal(3.0)}),
    # Its first five steps are momentum's alone.
    "radam": Rule("RAdam", (7, 0), {"lr": 0.02}, fused=(), steps=6, goals={LARGE: Goal(3.0)}),
    # With torch's eps of 1e-6 the first steps would be too small to be seen.
    "adadelta": Rule("Adadelta", (7, 0), {"lr": 0.5, "eps": 1e-2}, fused=(), goals={LARGE: Goal(3.0)}),
}
