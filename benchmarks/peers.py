"""What torch's users write around torch's optimizers, for what gdbp's do themselves."""

from collections.abc import Callable
from typing import NamedTuple

import torch

MAX_NORM = 1.0
EMA_DECAY = 0.999

Parameters = list[torch.nn.Parameter]
Make = Callable[[Parameters], torch.optim.Optimizer]


class Peer(NamedTuple):
    """A step, and what it changes: parameters, then states in the order of their names."""

    step: Callable[[], object]
    tensors: Callable[[], list[torch.Tensor]]


def plain(make: Make, params: Parameters) -> Peer:
    """The optimizer alone."""
    optimizer = make(params)
    return Peer(optimizer.step, lambda: [*params, *_states(optimizer, params)])


def clipped(make: Make, params: Parameters) -> Peer:
    """After the gradients, which become the peer's own, were clipped to a norm of MAX_NORM together."""
    for p in params:
        p.grad = p.grad.clone()
    optimizer = make(params)

    def step():
        torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
        optimizer.step()

    return Peer(step, lambda: [*params, *_states(optimizer, params)])


def clip_factor(grads: list[torch.Tensor]) -> float:
    """What :func:`clipped` multiplies by, in float64; torch's sums in the gradients' dtype lose digits."""
    norms = [torch.linalg.vector_norm(grad, dtype=torch.float64) for grad in grads]
    return min(1.0, MAX_NORM / (torch.stack(norms).norm().item() + 1e-6))


def averaged(make: Make, params: Parameters) -> Peer:
    """Followed by the moving average of ``torch.optim.swa_utils``, without the module around it."""
    optimizer = make(params)
    averages = [p.detach().clone() for p in params]
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(EMA_DECAY)

    def step():
        optimizer.step()
        average(averages, params, None)

    return Peer(step, lambda: [*params, *_states(optimizer, params, ema_param=averages)])


def mastered(make: Make, params: Parameters) -> Peer:
    """On float32 copies of the parameters, which take the gradients and are copied back."""
    masters = [p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for p in params]
    for master in masters:
        master.grad = torch.zeros_like(master)
    optimizer = make(masters)

    @torch.no_grad()
    def step():
        torch._foreach_copy_([master.grad for master in masters], [p.grad for p in params])
        optimizer.step()
        torch._foreach_copy_(params, masters)

    return Peer(step, lambda: [*params, *_states(optimizer, masters, master_param=masters)])


def _states(optimizer, params, **others: list[torch.Tensor]) -> list[torch.Tensor]:
    """State by state; counts, which are 0-dim, are left out."""
    states = {
        key: [optimizer.state[p][key] for p in params]
        for key, value in optimizer.state[params[0]].items()
        if torch.is_tensor(value) and value.dim()
    }
    states.update(others)
    return [tensor for key in sorted(states) for tensor in states[key]]


class Lion(torch.optim.Optimizer):
    """Lion (Chen et al., 2023) in tensor operations, a tensor at a time or by torch's foreach functions."""

    def __init__(self, params, lr: float, betas=(0.9, 0.99), weight_decay: float = 0.0, foreach: bool = False):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self.foreach = foreach
        for p in self.param_groups[0]["params"]:
            self.state[p]["exp_avg"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        lr, (beta1, beta2), shrink = group["lr"], group["betas"], 1 - group["lr"] * group["weight_decay"]
        params = group["params"]
        grads = [p.grad for p in params]
        means = [self.state[p]["exp_avg"] for p in params]
        if self.foreach:
            updates = torch._foreach_lerp(means, grads, 1 - beta1)
            torch._foreach_sign_(updates)
            torch._foreach_mul_(params, shrink)
            torch._foreach_add_(params, updates, alpha=-lr)
            torch._foreach_lerp_(means, grads, 1 - beta2)
            return
        for p, grad, mean in zip(params, grads, means):
            update = mean.lerp(grad, 1 - beta1).sign_()
            p.mul_(shrink).add_(update, alpha=-lr)
            mean.lerp_(grad, 1 - beta2)
