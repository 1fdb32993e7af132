"""Every operator in plain torch: what runs where the kernels cannot, and what differentiates them twice.

Layers and losses here are made of differentiable operators, so their derivatives of every order, forward
mode, vmap, and devices without our kernels come for free. ``optim_step_`` mirrors csrc/optim/optim_math.h.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


# ---- linear ----

# For each activation: its value at the pre-activation z, and the gradient of z from that of the output.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "none": (lambda z: z, lambda g, z: g),
    "relu": (torch.relu, lambda g, z: aten.threshold_backward(g, z, 0)),
    "gelu": (F.gelu, lambda g, z: aten.gelu_backward(g, z)),
    "sigmoid": (torch.sigmoid, lambda g, z: aten.sigmoid_backward(g, torch.sigmoid(z))),
    "tanh": (torch.tanh, lambda g, z: aten.tanh_backward(g, torch.tanh(z))),
}


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return ACTIVATIONS[activation][0](F.linear(input, weight, bias))


def linear_with_pre(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    pre = F.linear(input, weight, bias)
    return ACTIVATIONS[activation][0](pre), pre


def linear_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of input, weight and bias, as a graph that can be differentiated again."""
    grad_pre = ACTIVATIONS[activation][1](grad_output, F.linear(input, weight, bias))
    rows = torch.atleast_2d(grad_pre).flatten(0, -2)
    grad_weight = rows.t() @ torch.atleast_2d(input).flatten(0, -2)
    return grad_pre @ weight, grad_weight, rows.sum(0) if bias is not None else None


# ---- losses ----


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def mse_loss(input: Tensor, target: Tensor, reduction: str) -> Tensor:
    return _reduce((input - target).square(), reduction)


def mse_loss_backward(
    grad_output: Tensor, input: Tensor, target: Tensor, reduction: str
) -> tuple[Tensor, Tensor]:
    grad = 2 * (input - target) * grad_output
    if reduction == "mean":
        grad = grad / input.numel()
    return grad, -grad


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    return F.cross_entropy(
        logits,
        target,
        weight,
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )


def cross_entropy_backward(
    grad_output: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """Gradient of the logits, as a graph that can be differentiated again."""
    classes = logits.shape[-1]
    kept = target != ignore_index
    label = torch.where(kept, target, 0)
    # Whatever an ignored row holds: a NaN there would come back in the next derivative.
    logits = torch.where(kept.unsqueeze(-1), logits, 0)
    w = torch.ones_like(logits[0]) if weight is None else weight
    own = torch.where(kept, w[label], 0)
    scale = grad_output * kept
    if reduction == "mean":
        total = own.sum()
        scale = torch.where(total != 0, scale / torch.where(total != 0, total, 1), 0)
    p = logits.softmax(-1)
    a = ((1 - label_smoothing) * own).unsqueeze(-1)
    b = label_smoothing / classes
    is_label = label.unsqueeze(-1) == torch.arange(classes, device=logits.device)
    others = torch.where(is_label, 0, p)
    # others - (1 - p_label) with the difference as a sum, which keeps its digits where p_label is close to 1
    residual = torch.where(is_label, -others.sum(-1, keepdim=True), others)
    return scale.unsqueeze(-1) * (a * residual + b * (w.sum() * p - w))


# ---- optimizer steps ----


def _sgd(p, g, s, h, step):
    p.sub_(h.lr * g)


def _momentum(nesterov):
    def rule(p, g, s, h, step):
        momentum, dampening = h.rule
        if step > 1:
            s[0].mul_(momentum).add_(g, alpha=1 - dampening)
        else:
            s[0].copy_(g)
        p.sub_(h.lr * (g + momentum * s[0] if nesterov else s[0]))

    return rule


def _rmsprop(centered, with_momentum):
    def rule(p, g, s, h, step):
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


def _adam(amsgrad):
    def rule(p, g, s, h, step):
        beta1, beta2, eps = h.rule
        s[0].lerp_(g, 1 - beta1)
        s[1].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        variance = torch.maximum(s[2], s[1], out=s[2]) if amsgrad else s[1]
        denominator = variance.sqrt() / (1 - beta2**step) ** 0.5 + eps
        p.sub_(h.lr / (1 - beta1**step) * s[0] / denominator)

    return rule


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
}


class Hyper:
    """Named view of the flat list of hyper-parameters: ``struct Hyper`` of csrc/optim/optim_math.h."""

    shared = ("lr", "weight_decay", "decoupled", "maximize", "l1", "l1_prox", "clip_value", "grad_scale")

    def __init__(self, values: Sequence[float]):
        for name, value in zip(self.shared, values, strict=False):
            setattr(self, name, value)
        self.rule = tuple(values[len(self.shared) :])


@torch.no_grad()
def optim_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Sequence[Tensor]],
    rule: str,
    hyper: Sequence[float],
    counts: Sequence[int],
) -> None:
    h = Hyper(hyper)
    for i, (p, g, step) in enumerate(zip(params, grads, counts, strict=True)):
        g = g.to(p.dtype) * (-h.grad_scale if h.maximize else h.grad_scale)
        if h.clip_value != float("inf"):
            g = g.clamp(-h.clip_value, h.clip_value)
        if h.l1 and not h.l1_prox:
            g = g + h.l1 * p.sign()
        if h.weight_decay and not h.decoupled:
            g = g + h.weight_decay * p
        if h.decoupled:
            p.mul_(1 - h.lr * h.weight_decay)
        RULES[rule](p, g, [kind[i] for kind in states], h, step)
        if h.l1 and h.l1_prox:
            p.copy_(torch.copysign((p.abs() - h.lr * h.l1).clamp_min(0), p))
