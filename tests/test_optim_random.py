"""Random optimizers, options, layouts, dtypes and histories against torch's float64 for-loop: 4,000 cases.

The oracle clips and adds L1 in front of torch's step, or shrinks after it, in float64. Distances are in units in the
last place of the parameter's dtype, at the largest value that the element had, plus the length of its step times the
condition of the sum that it follows: a gradient that weight decay nearly cancels is mostly rounding.
"""

import math
import random
from dataclasses import dataclass

import pytest
import torch

import gdbp
from gdbp.testing.compare import ulps
from tests.optimizers import torch_optimizer

CHUNKS, CASES = 40, 100

# The most ulp that the worst element of a case may be off after at most 6 steps: float64 and float32, half types.
# Centered RMSprop divides by a difference of nearly equal numbers.
LIMITS = {
    "SGD": (24, 4),
    "RMSprop": (32, 4),
    "Adam": (24, 4),
    "AdamW": (24, 4),
    "Adagrad": (24, 4),
    "NAdam": (24, 4),
    "RAdam": (24, 4),
    "Adamax": (24, 4),
    "Adadelta": (24, 4),
    "Lion": (24, 4),
}
# Largest part of a case's elements that are left out, as rounding decides a sign (L1, Lion) or torch makes a NaN.
UNDECIDED = 0.005


def choose(rng: random.Random, **options) -> dict:
    """Some of the options, each with one of its values."""
    return {name: rng.choice(values) for name, values in options.items() if rng.random() < 0.5}


RULES = {
    "SGD": lambda rng: rng.choice(
        [
            {},
            {"momentum": 0.9, **choose(rng, dampening=[0.3])},
            {"momentum": 0.5, "nesterov": True},
        ]
    ),
    "RMSprop": lambda rng: choose(rng, alpha=[0.5, 0.9], eps=[1e-3], momentum=[0.9], centered=[True]),
    "Adam": lambda rng: choose(
        rng, betas=[(0.3, 0.9), (0.9, 0.99)], eps=[1e-3], amsgrad=[True], decoupled_weight_decay=[True]
    ),
    "AdamW": lambda rng: choose(rng, betas=[(0.3, 0.9)], eps=[1e-3], amsgrad=[True]),
    "Adagrad": lambda rng: choose(rng, lr_decay=[0.1], initial_accumulator_value=[0.3], eps=[1e-3]),
    "NAdam": lambda rng: choose(
        rng, betas=[(0.3, 0.9)], eps=[1e-3], momentum_decay=[0.1], decoupled_weight_decay=[True]
    ),
    "RAdam": lambda rng: choose(rng, betas=[(0.3, 0.9)], eps=[1e-3], decoupled_weight_decay=[True]),
    "Adamax": lambda rng: choose(rng, betas=[(0.3, 0.9)], eps=[1e-3]),
    "Adadelta": lambda rng: choose(rng, rho=[0.5], eps=[1e-3]),
    "Lion": lambda rng: choose(rng, betas=[(0.5, 0.8)]),
}
DTYPES = [torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16]


@dataclass
class Case:
    """Everything that a seed decides, in words for the failure's message."""

    seed: int

    def __post_init__(self):
        rng = self.rng = random.Random(self.seed)
        self.generator = torch.Generator().manual_seed(self.seed)
        self.name = rng.choice(sorted(RULES))
        self.options = {
            "lr": rng.choice([0.1, 0.01, 0.001]),
            **RULES[self.name](rng),
            **choose(rng, weight_decay=[0.1, 0.01], maximize=[True]),
        }
        self.extras = choose(rng, clip_value=[0.5, 2.0], max_grad_norm=[0.1, 1.0, 1e6], skip_nonfinite=[True])
        if rng.random() < 0.4:
            self.extras |= {"l1": rng.choice([0.01, 0.2]), "l1_mode": rng.choice(["subgradient", "prox"])}
        self.dtype = rng.choice(DTYPES)
        self.grad_dtype = rng.choice(DTYPES) if rng.random() < 0.25 else self.dtype
        self.state_dtype = torch.float32 if self.dtype.itemsize == 2 and rng.random() < 0.3 else None
        self.threads = rng.choice([1, 2, 3])
        self.shapes = [self.shape() for _ in range(rng.randint(1, 5))]
        self.groups = rng.randint(1, min(3, len(self.shapes)))
        self.steps = rng.randint(1, 6)
        self.bad = rng.randrange(self.steps) if self.extras.get("skip_nonfinite") and rng.random() < 0.5 else None

    def __str__(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in vars(self).items() if k not in ("rng", "generator"))

    def shape(self) -> tuple[int, ...]:
        if self.rng.random() < 0.1:
            return (self.rng.choice([1023, 1025, 4097, 8191, 8193]),)
        return tuple(self.rng.choice([0, 1, 2, 3, 7, 16, 33]) for _ in range(self.rng.randint(0, 3)))

    def values(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype)

    def lay_out(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same numbers in a memory layout by chance."""
        kind = self.rng.choice(["as it is", "as it is", "transposed", "strided", "offset", "expanded", "permuted"])
        if kind == "transposed" and tensor.dim() > 1:
            return tensor.transpose(0, -1).contiguous().transpose(0, -1)
        if kind == "permuted" and tensor.dim() == 3:
            return tensor.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        if kind == "strided" and tensor.dim() > 0:
            return torch.stack([tensor, tensor], dim=-1)[..., 1]
        if kind == "offset":
            buffer = torch.zeros(tensor.numel() + 8, dtype=tensor.dtype)
            view = buffer[self.rng.randint(1, 7) :][: tensor.numel()].view(tensor.shape)
            return view.copy_(tensor)
        return tensor

    def gradient(self, shape: tuple[int, ...]) -> torch.Tensor | None:
        if self.rng.random() < 0.2:
            return None
        gradient = self.values(shape, self.grad_dtype)
        if gradient.numel() and self.rng.random() < 0.1:
            return gradient.reshape(-1)[:1].reshape([1] * len(shape)).expand(shape)
        return self.lay_out(gradient)


class Oracle:
    """torch's for-loop in float64, with what ours adds written out around it."""

    def __init__(self, case: Case, groups: list[list[torch.Tensor]]):
        self.case = case
        self.params = [[p.detach().double().contiguous().clone().requires_grad_() for p in group] for group in groups]
        self.optimizer = torch_optimizer(case.name, [{"params": group} for group in self.params], **case.options)
        self.peaks = [p.detach().abs() for group in self.params for p in group]
        # How much larger the terms of an element's gradient have been than their sum.
        self.conditions = [torch.ones_like(peak) for peak in self.peaks]
        # Half types are computed in float32.
        self.compute = torch.float64 if case.dtype is torch.float64 else torch.float32
        self.undecided = [torch.zeros_like(peak, dtype=torch.bool) for peak in self.peaks]
        # What half types lose between steps is theirs: Adam's mean square of a float16 gradient below 0.008 is 0.
        self.kept = case.dtype if case.dtype.itemsize == 2 else torch.float64

    def step(self, grads: list[torch.Tensor | None], ours: list[torch.Tensor]) -> None:
        """One step with these gradients; ours are the other side's parameters before its own step."""
        extras, flat = self.case.extras, [p for group in self.params for p in group]
        grads = [None if g is None else g.double() for g in grads]
        norm = torch.stack([g.square().sum() for g in grads if g is not None] or [torch.zeros(())]).sum().sqrt()
        if extras.get("skip_nonfinite") and not norm.isfinite():
            return
        limit = extras.get("max_grad_norm")
        scale = 1.0 if limit is None else (limit / (norm + 1e-6)).clamp(max=1.0)
        clip, l1 = extras.get("clip_value", math.inf), extras.get("l1", 0.0)
        prox = extras.get("l1_mode") == "prox"
        options = self.case.options
        decoupled = self.case.name in ("AdamW", "Lion") or options.get("decoupled_weight_decay", False)
        decay = 0.0 if decoupled else options.get("weight_decay", 0.0)
        before = [p.detach().clone() for p in flat]
        for p, g, condition in zip(flat, grads, self.conditions, strict=True):
            p.grad = None
            if g is not None:
                # In the dtype of ours: a sum that is nearly 0 is mostly the rounding of its terms.
                g = (g * scale).clamp(-clip, clip).to(self.compute)
                # maximize turns torch's gradient around, and the penalty stays one.
                penalty = p.detach().sign().to(self.compute) * (-l1 if self.case.options.get("maximize") else l1)
                p.grad = (g if prox else g + penalty).double().contiguous()
                terms = g.double().abs() + (0.0 if prox else l1) + decay * p.detach().abs()
                total = (p.grad + (-decay if self.case.options.get("maximize") else decay) * p.detach()).abs()
                torch.maximum(condition, torch.where(total > 0, terms / total, 1.0), out=condition)
        self.doubt(flat, ours, l1 and not prox)
        self.optimizer.step()
        with torch.no_grad():
            for i, (p, g) in enumerate(zip(flat, grads, strict=True)):
                if g is not None and prox:
                    p.copy_(p.sign() * (p.abs() - self.case.options["lr"] * l1).clamp_min(0.0))
                reach = torch.maximum(p.abs(), before[i].abs()) + self.conditions[i] * (p - before[i]).abs()
                torch.maximum(self.peaks[i], reach, out=self.peaks[i])
                p.copy_(p.to(self.kept))
                for key, state in self.optimizer.state[p].items():
                    if self.case.state_dtype is None and key not in ("step", "mu_product"):
                        state.copy_(state.to(self.kept))
                # torch's centered RMSprop takes roots of negative variances, and ours of 0.
                self.undecided[i] |= p.isnan()

    def doubt(self, params, ours, subgradient: bool) -> None:
        """Marks elements whose update follows the sign of a number that may round to either side of 0."""
        eps = torch.finfo(self.compute).eps
        for p, found, undecided in zip(params, ours, self.undecided, strict=True):
            if p.grad is not None and subgradient:
                undecided |= p.sign() != found.sign()
            if p.grad is not None and self.case.name == "Lion":
                beta = self.optimizer.param_groups[0]["betas"][0]
                m = beta * self.optimizer.state.get(p, {}).get("exp_avg", torch.zeros_like(p.grad))
                g = (1 - beta) * (-p.grad if self.case.options.get("maximize") else p.grad)
                undecided |= (m + g).abs() <= 16 * eps * (m.abs() + g.abs())


def run(case: Case) -> torch.Tensor:
    """Distances of the elements from the oracle."""
    values = [case.lay_out(case.values(shape, case.dtype)) for shape in case.shapes]
    params = [v.requires_grad_() for v in values]
    for p in params:
        p.grad_dtype = None
    groups = [params[i :: case.groups] for i in range(case.groups)]
    ordered = [p for group in groups for p in group]
    oracle = Oracle(case, groups)
    if case.state_dtype is not None:
        case.extras["state_dtype"] = case.state_dtype
    optimizer = getattr(gdbp.optim, case.name)([{"params": g} for g in groups], **case.options, **case.extras)
    for step in range(case.steps):
        grads = [case.gradient(p.shape) for p in ordered]
        if step == case.bad:
            grads = [g if g is None or not g.numel() else g + math.inf for g in grads]
        for p, g in zip(ordered, grads, strict=True):
            p.grad = g
        oracle.step(grads, ordered)
        optimizer.step()
    exact = [p for group in oracle.params for p in group]
    distances = torch.cat([ulps(*each).reshape(-1) for each in zip(ordered, exact, oracle.peaks, strict=True)])
    decided = ~torch.cat([undecided.reshape(-1) for undecided in oracle.undecided])
    assert decided.sum() >= (1 - UNDECIDED) * len(decided) - 1
    return distances[decided]


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random(chunk):
    threads = torch.get_num_threads()
    try:
        for seed in range(chunk * CASES, (chunk + 1) * CASES):
            case = Case(seed)
            torch.set_num_threads(case.threads)
            distances = run(case)
            worst = distances.max().item() if distances.numel() else 0.0
            limit = LIMITS[case.name][case.dtype.itemsize == 2]
            assert worst <= limit, f"{worst:.3g} ulp; repeat with: run(Case({seed})); {case}"
    finally:
        torch.set_num_threads(threads)
