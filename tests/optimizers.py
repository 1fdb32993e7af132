"""What the tests of optimizers share: torch's for-loops as the oracle, Lion among them, and distances."""

import copy
import itertools

import pytest
import torch

import gdbp

CONFIGS = [
    ("SGD", dict(lr=0.1)),
    ("SGD", dict(lr=0.1, weight_decay=0.1, maximize=True)),
    ("SGD", dict(lr=0.1, momentum=0.9)),
    ("SGD", dict(lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.01)),
    ("SGD", dict(lr=0.1, momentum=0.9, nesterov=True)),
    ("SGD", dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, maximize=True)),
    *(
        ("RMSprop", dict(lr=0.01, momentum=momentum, centered=centered, weight_decay=decay))
        for momentum, centered, decay in itertools.product((0, 0.9), (False, True), (0, 0.1))
    ),
    ("RMSprop", dict(lr=0.01, alpha=0.5, eps=1e-3, maximize=True)),
    ("Adam", dict(lr=0.01)),
    ("Adam", dict(lr=0.01, weight_decay=0.1, betas=(0.3, 0.99))),
    ("Adam", dict(lr=0.01, amsgrad=True, maximize=True, eps=1e-3)),
    ("Adam", dict(lr=0.01, weight_decay=0.1, decoupled_weight_decay=True)),
    ("AdamW", dict(lr=0.01)),
    ("AdamW", dict(lr=0.01, amsgrad=True, weight_decay=0.1)),
    ("Adagrad", dict(lr=0.1)),
    ("Adagrad", dict(lr=0.1, lr_decay=0.1, weight_decay=0.1, initial_accumulator_value=0.3, maximize=True)),
    ("Adadelta", dict(lr=1.0)),
    ("Adadelta", dict(lr=0.5, rho=0.5, eps=1e-3, weight_decay=0.1, maximize=True)),
    ("Adamax", dict(lr=0.01)),
    ("Adamax", dict(lr=0.01, betas=(0.3, 0.9), eps=1e-3, weight_decay=0.1, maximize=True)),
    ("NAdam", dict(lr=0.01)),
    ("NAdam", dict(lr=0.01, weight_decay=0.1, momentum_decay=0.1, maximize=True)),
    ("NAdam", dict(lr=0.01, weight_decay=0.1, decoupled_weight_decay=True)),
    ("RAdam", dict(lr=0.01)),
    ("RAdam", dict(lr=0.01, betas=(0.5, 0.9), weight_decay=0.1, maximize=True)),
    ("RAdam", dict(lr=0.01, weight_decay=0.1, decoupled_weight_decay=True)),
    ("Lion", dict(lr=0.01)),
    ("Lion", dict(lr=0.01, betas=(0.5, 0.8), weight_decay=0.1, maximize=True)),
]
NAMES = sorted({name for name, _ in CONFIGS})
IDS = [f"{name}-{'-'.join(f'{k}={v}' for k, v in options.items())}" for name, options in CONFIGS]
EACH = pytest.mark.parametrize("name,options", CONFIGS, ids=IDS)
# Around the vector widths, the piece that is staged through buffers and the chunk that threads share.
SIZES = [(0,), (), (1,), (3, 5), (7,), (8,), (15,), (16, 1), (17,), (63,), (65,), (1023,), (1025,), (8191,), (8193,)]


class LoopLion(torch.optim.Optimizer):
    """Lion as a for-loop: what torch would have."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, maximize=False, foreach=False):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay, maximize=maximize))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                g = -p.grad if group["maximize"] else p.grad
                p.mul_(1 - group["lr"] * group["weight_decay"])
                mixture = group["betas"][0] * m + (1 - group["betas"][0]) * g
                p.sub_(group["lr"] * torch.where(mixture.isnan(), mixture, mixture.sign()))
                m.mul_(group["betas"][1]).add_((1 - group["betas"][1]) * g)


def torch_optimizer(name, params, **options):
    return (LoopLion if name == "Lion" else getattr(torch.optim, name))(params, **options, foreach=False)


def make(name, values, options, torch_class=False):
    params = [v.clone().requires_grad_() for v in values]
    if torch_class:
        return params, torch_optimizer(name, params, **options)
    return params, getattr(gdbp.optim, name)(params, **options)


def give(params, grads):
    for p, g in zip(params, grads, strict=True):
        p.grad = None if g is None else g.to(p.dtype).clone()


def steps(cls, values, grads, options):
    """Parameters and states after steps with these gradients."""
    params = [v.clone().requires_grad_() for v in values]
    if options.get("differentiable"):  # whose updates are part of a graph, which leaves can't be
        params = [p.clone() for p in params]
    optimizer = cls(params, **copy.deepcopy(options))
    for step in grads:
        give(params, step)
        optimizer.step()
    return params, [optimizer.state[p] for p in params]


def largest(tensors):
    return max((t.abs().max().item() for t in tensors if t.numel()), default=0.0)


def error(found, exact):
    return largest([f.detach().double() - e.detach().double() for f, e in zip(found, exact, strict=True)])


def assert_no_worse(ours, theirs, exact, dtype):
    unit = torch.finfo(dtype).eps * largest(exact)
    assert error(ours, exact) <= max(2 * error(theirs, exact), 4 * unit)
