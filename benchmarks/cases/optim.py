"""Optimizer steps: one large tensor, many small ones, a small network."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

import gdbp
from benchmarks.work import COMPILED, OURS, Case, Contender, Goal, Setup, Tensors, Work

CHECK_STEPS = 2
# Of a large tensor so many elements, evenly spread, are checked; the rules act on each element alone.
CHECK_ELEMENTS = 2**16


@dataclass(frozen=True)
class Rule:
    """A class of torch.optim and gdbp.optim, its options, and how many states it keeps."""

    optimizer: str
    states: int
    options: dict[str, Any]
    fused: bool = True  # whether torch has a fused form
    goals: dict[str, Goal] = field(default_factory=dict)

    def make(self, module, params, **implementation):
        return getattr(module, self.optimizer)(params, **self.options, **implementation)


# Rates are large, so that a step that does nothing is seen in bfloat16 too.
RULES = {
    "adamw": Rule(
        "AdamW",
        2,
        {"lr": 0.05, "weight_decay": 0.01},
        goals={
            "67 M": Goal(1.0, limit=0.9),
            "1000 x 64": Goal(10.0, peer="torch fused"),
            "4-tensor net": Goal(2.0, peer="torch fused"),
        },
    ),
    "adam_amsgrad": Rule("Adam", 3, {"lr": 0.05, "amsgrad": True}),
    "sgd_momentum": Rule("SGD", 1, {"lr": 0.05, "momentum": 0.9}),
    "rmsprop": Rule("RMSprop", 1, {"lr": 0.01}, fused=False, goals={"67 M": Goal(4.0)}),
    "rmsprop_centered": Rule(
        "RMSprop",
        3,
        {"lr": 0.01, "momentum": 0.9, "centered": True},
        fused=False,
        goals={"67 M": Goal(5.0)},
    ),
}

SIZES = {
    "67 M": [(2**26,)],
    "1000 x 64": [(64,)] * 1000,
    "4-tensor net": [(128, 784), (128,), (10, 128), (10,)],
}
SMOKE_SIZES = {"1 M": [(2**20,)], "3 x 17": [(17,)] * 3}


def cases(smoke: bool) -> Iterator[Case]:
    for size, shapes in (SMOKE_SIZES if smoke else SIZES).items():
        for name, rule in RULES.items():
            yield Case("optim", name, size, partial(_build, rule, shapes), rule.goals.get(size))


def _build(rule: Rule, shapes: list[tuple[int, ...]], setup: Setup) -> Work:
    start = [setup.away_from_zero(*shape) for shape in shapes]
    grads = [setup.away_from_zero(*shape) for shape in shapes]
    stride = max(1, sum(p.numel() for p in start) // CHECK_ELEMENTS)

    def sample(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().reshape(-1)[::stride].clone()

    sampled_start, sampled_grads = list(map(sample, start)), list(map(sample, grads))

    def contender(module, compiled: bool = False, **implementation) -> Contender:
        params = _parameters([p.clone() for p in start], grads)
        optimizer = rule.make(module, params, **implementation)
        step = torch.compile(optimizer.step) if compiled else optimizer.step
        return Contender(step, partial(_after_steps, optimizer, step, sample))

    def reference() -> Tensors:
        params = _parameters([p.double() for p in sampled_start], [g.double() for g in sampled_grads])
        optimizer = rule.make(torch.optim, params, foreach=False)
        return _after_steps(optimizer, optimizer.step, torch.Tensor.clone)

    contenders = {
        OURS: contender(gdbp.optim),
        "torch for-loop": contender(torch.optim, foreach=False),
        "torch foreach": contender(torch.optim, foreach=True),
    }
    if rule.fused:
        contenders["torch fused"] = contender(torch.optim, fused=True)
    if setup.compile:
        contenders[COMPILED] = contender(torch.optim, compiled=True, foreach=True)
    # The gradient is read; the parameter and every state are read and written.
    traffic = (3 + 2 * rule.states) * sum(p.nbytes for p in start)
    return Work(contenders, reference, tolerance=16, limit=setup.copy_limit(traffic), bytes=traffic)


def _parameters(values: list[torch.Tensor], grads: list[torch.Tensor]) -> list[torch.nn.Parameter]:
    params = list(map(torch.nn.Parameter, values))
    for p, grad in zip(params, grads):
        p.grad = grad
    return params


def _after_steps(optimizer, step, sample) -> Tensors:
    """Parameters and states after the first steps."""
    for _ in range(CHECK_STEPS):
        step()
    params = optimizer.param_groups[0]["params"]
    states = [optimizer.state[p][key] for p in params for key in sorted(optimizer.state[p]) if key != "step"]
    return [sample(tensor) for tensor in (*params, *states)]
