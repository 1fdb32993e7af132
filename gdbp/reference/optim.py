"""Optimizer steps: csrc/optim/optim_math.h in operators of torch."""

from collections.abc import Sequence

import torch
from torch import Tensor

# Each rule updates one parameter p and its states s in place. t: what it counts (see gdbp.ops.optim).


def _sgd(p, g, s, h, t):
    p.sub_(h.lr * g)


def _momentum(nesterov):
    def rule(p, g, s, h, t):
        momentum, dampening = h.rule
        if t.fresh:
            s[0].copy_(g)
        else:
            s[0].mul_(momentum).add_(g, alpha=1 - dampening)
        p.sub_(h.lr * (g + momentum * s[0] if nesterov else s[0]))

    return rule


def _rmsprop(centered, with_momentum):
    def rule(p, g, s, h, t):
        alpha, eps, momentum = h.rule
        s[0].mul_(alpha).addcmul_(g, g, value=1 - alpha)
        variance = s[0]
        if centered:
            mean = s[1 + with_momentum].lerp_(g, 1 - alpha)
            variance = (variance - mean * mean).clamp_min(0)
        update = g / (variance.sqrt() + eps)
        if with_momentum:
            update = s[1].mul_(momentum).add_(update)
        p.sub_(h.lr * update)

    return rule


def _moments(g, s, beta1, beta2):
    s[0].lerp_(g, 1 - beta1)
    s[1].mul_(beta2).addcmul_(g, g, value=1 - beta2)


def _adam(amsgrad):
    def rule(p, g, s, h, t):
        beta1, beta2, eps = h.rule
        _moments(g, s, beta1, beta2)
        variance = torch.maximum(s[2], s[1], out=s[2]) if amsgrad else s[1]
        denominator = variance.sqrt() / (1 - beta2**t.step) ** 0.5 + eps
        p.sub_(h.lr / (1 - beta1**t.step) * s[0] / denominator)

    return rule


def _nadam(p, g, s, h, t):
    beta1, beta2, eps, momentum_decay = h.rule
    momentum, following = (beta1 * (1 - 0.5 * 0.96 ** (n * momentum_decay)) for n in (t.step, t.step + 1))
    product = t.product.mul_(momentum).item()
    _moments(g, s, beta1, beta2)
    denominator = (s[1] / (1 - beta2**t.step)).sqrt() + eps
    p.sub_(h.lr * (1 - momentum) / (1 - product) * g / denominator)
    p.sub_(h.lr * following / (1 - product * following) * s[0] / denominator)


def _radam(p, g, s, h, t):
    beta1, beta2, eps = h.rule
    _moments(g, s, beta1, beta2)
    update = s[0] / (1 - beta1**t.step)
    correction2 = 1 - beta2**t.step
    limit = 2 / (1 - beta2) - 1
    length = limit - 2 * t.step * (1 - correction2) / correction2
    if length > 5:
        ratio = (length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length)
        update = update * (ratio * correction2) ** 0.5 / (s[1].sqrt() + eps)
    p.sub_(h.lr * update)


def _adamax(p, g, s, h, t):
    beta1, beta2, eps = h.rule
    s[0].lerp_(g, 1 - beta1)
    torch.maximum(s[1] * beta2, g.abs() + eps, out=s[1])
    p.sub_(h.lr / (1 - beta1**t.step) * s[0] / s[1])


def _adagrad(p, g, s, h, t):
    lr_decay, eps = h.rule
    s[0].addcmul_(g, g)
    p.sub_(h.lr / (1 + (t.step - 1) * lr_decay) * g / (s[0].sqrt() + eps))


def _adadelta(p, g, s, h, t):
    rho, eps = h.rule
    s[0].mul_(rho).addcmul_(g, g, value=1 - rho)
    delta = (s[1] + eps).sqrt() / (s[0] + eps).sqrt() * g
    s[1].mul_(rho).addcmul_(delta, delta, value=1 - rho)
    p.sub_(h.lr * delta)


def _lion(p, g, s, h, t):
    beta1, beta2 = h.rule
    mixture = beta1 * s[0] + (1 - beta1) * g
    # torch's sign of NaN is 0, which would hide a broken gradient.
    p.sub_(h.lr * torch.where(mixture.isnan(), mixture, mixture.sign()))
    s[0].mul_(beta2).add_(g, alpha=1 - beta2)


RULES = {
    "sgd": _sgd,
    "sgd_momentum": _momentum(False),
    "sgd_nesterov": _momentum(True),
    "rmsprop": _rmsprop(False, False),
    "rmsprop_momentum": _rmsprop(False, True),
    "rmsprop_centered": _rmsprop(True, False),
    "rmsprop_centered_momentum": _rmsprop(True, True),
    "adam": _adam(False),
    "adam_amsgrad": _adam(True),
    "adagrad": _adagrad,
    "adadelta": _adadelta,
    "adamax": _adamax,
    "nadam": _nadam,
    "radam": _radam,
    "lion": _lion,
}


class Hyper:
    """Named view of the flat list of hyper-parameters: ``struct Hyper`` of csrc/optim/hyper.h."""

    shared = ("lr", "weight_decay", "decoupled", "maximize", "l1", "l1_prox", "clip_value", "grad_scale")

    def __init__(self, values: Sequence[float]):
        for name, value in zip(self.shared, values, strict=False):
            setattr(self, name, value)
        self.rule = tuple(values[len(self.shared) :])


class _Clock:
    """``struct Clock`` of csrc/optim/hyper.h, and whether a rule without counts sees its first update."""

    def __init__(self, step: float, product: Tensor | None, fresh: bool):
        self.step, self.product, self.fresh = step, product, fresh


@torch.no_grad()
def optim_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Tensor],
    counts: Sequence[Tensor],
    rule: str,
    hyper: Sequence[float],
    lr: Tensor | None = None,
    fresh: Sequence[bool] = (),
    norm: Tensor | None = None,
) -> None:
    """See :func:`gdbp.ops.optim.step_`."""
    h = Hyper(hyper)
    if lr is not None:
        h.lr = lr.item()
    if norm is not None:
        if norm[2] != 0:
            return
        h.grad_scale *= norm[1].item()
    n = len(params)
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        step, product = counts[i::n] if len(counts) == 2 * n else (counts[i] if counts else None, None)
        clock = _Clock(0 if step is None else step.item() + 1, product, bool(fresh) and fresh[i])
        views = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in (p, g, *states[i::n])]
        _update(rule, *views[:2], views[2:], h, clock)
        if step is not None:
            step.add_(1)


def _update(rule, p, g, states, h, clock):
    g = g.to(p.dtype) * (-h.grad_scale if h.maximize else h.grad_scale)
    if h.clip_value != float("inf"):
        g = g.clamp(-h.clip_value, h.clip_value)
    if h.l1 and not h.l1_prox:
        g = g + h.l1 * p.sign()
    if h.weight_decay and not h.decoupled:
        g = g + h.weight_decay * p
    if h.decoupled:
        p.mul_(1 - h.lr * h.weight_decay)
    RULES[rule](p, g, states, h, clock)
    if h.l1 and h.l1_prox:
        p.copy_(torch.copysign((p.abs() - h.lr * h.l1).clamp_min(0), p))
