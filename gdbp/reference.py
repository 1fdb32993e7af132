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
    "leaky_relu": (F.leaky_relu, lambda g, z: aten.leaky_relu_backward(g, z, 0.01, False)),
    "gelu": (F.gelu, lambda g, z: aten.gelu_backward(g, z)),
    "gelu_tanh": (
        lambda z: F.gelu(z, approximate="tanh"),
        lambda g, z: aten.gelu_backward(g, z, approximate="tanh"),
    ),
    "silu": (F.silu, lambda g, z: g * (torch.sigmoid(z) * (1 + z * torch.sigmoid(-z)))),
    "sigmoid": (torch.sigmoid, lambda g, z: aten.sigmoid_backward(g, torch.sigmoid(z))),
    "tanh": (torch.tanh, lambda g, z: aten.tanh_backward(g, torch.tanh(z))),
    "elu": (F.elu, lambda g, z: aten.elu_backward(g, 1, 1, 1, False, z)),
    "softplus": (F.softplus, lambda g, z: aten.softplus_backward(g, z, 1, 20)),
}


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return ACTIVATIONS[activation][0](F.linear(input, weight, bias))


def linear_with_pre(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
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


# ---- batch normalisation ----
#
# ``offset`` would be added to the input of every channel. Normalised with the batch's own mean it changes nothing,
# so it only counts with running statistics; its gradient is then that of the input, summed.


def _per_channel(values: Tensor, input: Tensor) -> Tensor:
    """(channels,) in the compute type, shaped to meet (batch, channels, ...)."""
    dtype = torch.float64 if input.dtype is torch.float64 else torch.float32
    return values.to(dtype).view(-1, *[1] * (input.dim() - 2))


def _normalized(input: Tensor, mean: Tensor | None, variance: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    """(input - mean) / deviation in the compute type, 1 / deviation, mean and variance; those of the batch for None."""
    x = input.double() if input.dtype is torch.float64 else input.float()
    if mean is None:
        dims = [0, *range(2, input.dim())]
        mean = x.mean(dims, keepdim=True)
        variance = (x - mean).square().mean(dims, keepdim=True)
    inverse = (variance + eps).rsqrt()
    return (x - mean) * inverse, inverse, mean, variance


def _affine(normalized: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    z = normalized if weight is None else normalized * _per_channel(weight, normalized)
    return z if bias is None else z + _per_channel(bias, normalized)


def batch_norm(
    input: Tensor,
    offset: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """The output, and mean and variance of the input without the offset, (2, channels) in float64."""
    mean, variance = running_mean, running_var
    if mean is not None:
        mean = mean if offset is None else mean - offset
        mean, variance = _per_channel(mean, input), _per_channel(variance, input)
    normalized, _, mean, variance = _normalized(input, mean, variance, eps)
    output = ACTIVATIONS[activation][0](_affine(normalized, weight, bias)).to(input.dtype)
    return output, torch.stack((mean.reshape(-1), variance.reshape(-1))).double()


def batch_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, offset, weight and bias, as a graph that can be differentiated again. ``stats`` where
    they are not the batch's."""
    dims = [0, *range(2, input.dim())]
    mean, variance = (None, None) if stats is None else (_per_channel(s, input) for s in stats)
    if stats is not None and offset is not None:
        # stats has the offset in it, as a number; here it must be seen.
        mean = mean - _per_channel(offset - offset.detach(), input)
    normalized, inverse, *_ = _normalized(input, mean, variance, eps)
    g = ACTIVATIONS[activation][1](grad_output.to(normalized.dtype), _affine(normalized, weight, bias))
    sum_g, sum_g_x = g.sum(dims, keepdim=True), (g * normalized).sum(dims, keepdim=True)
    grad = g
    if stats is None:
        count = input.numel() // max(1, input.shape[1])
        grad = g - sum_g / count - normalized * (sum_g_x / count)
    grad = grad * inverse if weight is None else grad * (inverse * _per_channel(weight, input))
    grad_offset = None
    if offset is not None:
        grad_offset = (grad.sum(dims) if stats is not None else torch.zeros_like(offset)).to(offset.dtype)
    return (
        grad.to(input.dtype),
        grad_offset,
        None if weight is None else sum_g_x.reshape(-1).to(weight.dtype),
        None if bias is None else sum_g.reshape(-1).to(bias.dtype),
    )


@torch.no_grad()
def batch_norm_update_(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    stats: Tensor,
    offset: Tensor | None,
    elements: int,
    momentum: float | None,
) -> None:
    """``running = (1 - momentum) * running + momentum * batch``, the variance without bias. Without a momentum the
    mean over all batches so far, which ``num_batches_tracked`` counts."""
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if not elements:
        return
    if momentum is None:
        momentum = 1 / num_batches_tracked.double()
    mean, variance = stats[0], stats[1] * (elements / (elements - 1))
    mean = mean if offset is None else mean + offset
    for running, batch in ((running_mean, mean), (running_var, variance)):
        running.copy_((1 - momentum) * running + momentum * batch)


# ---- units ----


def unit_stats(output: Tensor, low: float, high: float) -> Tensor:
    """Of each unit of (rows, units): how many outputs are up to ``low`` or from ``high`` on, their sum, and that of
    their squares; (3, units) in float64."""
    y = output.double()
    return torch.stack((((y <= low) | (y >= high)).double().sum(0), y.sum(0), y.square().sum(0)))


# ---- losses ----


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def _sign(d: Tensor) -> Tensor:
    """torch's sign of NaN is 0, which would hide a broken element."""
    return torch.where(d.isnan(), d, d.sign())


def _huber(d: Tensor, delta: float) -> Tensor:
    c = d.clamp(-delta, delta)
    return c * (d - 0.5 * c)


# For each loss of single elements, given d = input - target and its parameter: the value and the derivative.
POINTWISE_LOSSES: dict[str, tuple[Callable[[Tensor, float], Tensor], Callable[[Tensor, float], Tensor]]] = {
    "mse_loss": (lambda d, _: d.square(), lambda d, _: 2 * d),
    "l1_loss": (lambda d, _: d * _sign(d).detach(), lambda d, _: _sign(d)),
    "huber_loss": (_huber, lambda d, delta: d.clamp(-delta, delta)),
    "smooth_l1_loss": (lambda d, beta: _huber(d, beta) / beta, lambda d, beta: d.clamp(-beta, beta) / beta),
}


def pointwise_loss(input: Tensor, target: Tensor, kind: str, parameter: float, reduction: str) -> Tensor:
    return _reduce(POINTWISE_LOSSES[kind][0](input - target, parameter), reduction)


def pointwise_loss_backward(
    grad_output: Tensor, input: Tensor, target: Tensor, kind: str, parameter: float, reduction: str
) -> tuple[Tensor, Tensor]:
    """Gradients of input and target, as a graph that can be differentiated again."""
    grad = POINTWISE_LOSSES[kind][1](input - target, parameter) * grad_output
    if reduction == "mean":
        grad = grad / input.numel()
    return grad, -grad


def bce_with_logits(
    input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, reduction: str
) -> Tensor:
    q = 1 if pos_weight is None else pos_weight
    loss = q * target * -F.logsigmoid(input) + (1 - target) * -F.logsigmoid(-input)
    return _reduce(loss if weight is None else loss * weight, reduction)


def bce_with_logits_backward(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of input and target, as a graph that can be differentiated again."""
    q = 1 if pos_weight is None else pos_weight
    scale = grad_output if weight is None else grad_output * weight
    if reduction == "mean":
        scale = scale / input.numel()
    grad_input = scale * ((1 - target) * torch.sigmoid(input) - q * target * torch.sigmoid(-input))
    return grad_input, scale * ((1 - q) * F.logsigmoid(input) - input)


def _targets(
    logits: Tensor,
    target: Tensor,
    second: Tensor | None,
    share: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the loss of a row is made of, classes last: the coefficient of each -log softmax (..., C), and the row's
    weight in the mean and whether it counts at all (...)."""
    classes = logits.shape[1]
    w = torch.ones(classes, dtype=logits.dtype, device=logits.device) if weight is None else weight
    uniform = label_smoothing / max(1, classes)
    if target.is_floating_point():
        rows = target.movedim(1, -1)
        ones = torch.ones_like(rows[..., :1].sum(-1), requires_grad=False)
        return w * ((1 - label_smoothing) * rows + uniform), ones, ones.bool()
    parts = [(target, None)] if second is None else [(target, share), (second, 1 - share)]
    a, row_weight, counts = 0, 0, False
    for labels, part in parts:
        kept = labels != ignore_index
        label = torch.where(kept, labels, 0)
        part = kept.to(logits.dtype) if part is None else torch.where(kept, part, 0).to(logits.dtype)
        is_label = label.unsqueeze(-1) == torch.arange(classes, device=logits.device)
        a = a + part.unsqueeze(-1) * w * ((1 - label_smoothing) * is_label + uniform)
        row_weight = row_weight + part * (w[label] if classes else 0)
        counts = kept | counts
    return a, row_weight, counts


def _capped(x: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(x / softcap) if softcap else x


def _divisor(row_weight: Tensor, normalizer: Tensor | None, reduction: str) -> Tensor | None:
    if reduction != "mean":
        return None
    return row_weight.sum() if normalizer is None else normalizer.to(row_weight.dtype)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    second: Tensor | None,
    share: Tensor | None,
    weight: Tensor | None,
    normalizer: Tensor | None,
    empty_is_zero: bool,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> Tensor:
    if second is None and normalizer is None and not (empty_is_zero or z_loss or softcap):
        return F.cross_entropy(
            logits,
            target,
            weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )
    a, row_weight, counts = _targets(logits, target, second, share, weight, ignore_index, label_smoothing)
    x = _capped(torch.where(counts.unsqueeze(-1), logits.movedim(1, -1), 0), softcap)
    total = x.logsumexp(-1)
    loss = torch.where(a != 0, a * (total.unsqueeze(-1) - x), 0).sum(-1) + z_loss * row_weight * total.square()
    divisor = _divisor(row_weight, normalizer, reduction)
    if divisor is None:
        return loss if reduction == "none" else loss.sum()
    mean = loss.sum() / divisor
    return torch.where(divisor == 0, torch.zeros_like(mean), mean) if empty_is_zero else mean


def cross_entropy_backward(
    grad_output: Tensor,
    logits: Tensor,
    target: Tensor,
    second: Tensor | None,
    share: Tensor | None,
    weight: Tensor | None,
    normalizer: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the logits and of probabilities, as a graph that can be differentiated again."""
    a, row_weight, counts = _targets(logits, target, second, share, weight, ignore_index, label_smoothing)
    # Whatever an ignored row holds: a NaN there would come back in the next derivative.
    rows = torch.where(counts.unsqueeze(-1), logits.movedim(1, -1), 0)
    x = _capped(rows, softcap)
    scale = grad_output * counts
    divisor = _divisor(row_weight, normalizer, reduction)
    if divisor is not None:
        scale = torch.where(divisor != 0, scale / torch.where(divisor != 0, divisor, 1), 0)
    scale = scale.unsqueeze(-1)
    p = x.softmax(-1)
    # 1 - p and the sum of the other coefficients, for the largest logit as sums: where p is close to 1, or one
    # coefficient is most of them, a difference has no digits left.
    is_largest = x.detach().argmax(-1, keepdim=True) == torch.arange(x.shape[-1], device=x.device)
    rest = torch.where(is_largest, torch.where(is_largest, 0, p).sum(-1, keepdim=True), 1 - p)
    others = torch.where(is_largest, torch.where(is_largest, 0, a).sum(-1, keepdim=True), a.sum(-1, keepdim=True) - a)
    pull = 2 * z_loss * (row_weight * x.logsumexp(-1)).unsqueeze(-1) if z_loss else 0
    grad = scale * (p * (others + pull) - a * rest)
    if softcap:
        grad = grad * 4 * torch.sigmoid(2 * rows / softcap) * torch.sigmoid(-2 * rows / softcap)
    grad_target = None
    if target.is_floating_point():
        w = 1 if weight is None else weight
        grad_target = (-scale * (1 - label_smoothing) * w * x.log_softmax(-1)).movedim(-1, 1)
    return grad.movedim(-1, 1), grad_target


# ---- optimizer steps ----
#
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
        views = [torch.view_as_real(t) if t.is_complex() else t for t in (p, g, *states[i::n])]
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
