"""Losses: those of single elements, and cross-entropy."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def _wide(*tensors: Tensor | None) -> list[Tensor | None]:
    """Half types in float32, as the kernels compute."""
    return [None if t is None else t if t.element_size() > 2 else t.float() for t in tensors]


def _sign(d: Tensor) -> Tensor:
    """torch's sign of NaN is 0, which would hide a broken element."""
    return torch.where(d.isnan(), d.detach(), d.sign())


def _clamped(d: Tensor, limit: float) -> Tensor:
    """Beyond what the dtype holds there is no limit."""
    return d if limit > torch.finfo(d.dtype).max else d.clamp(-limit, limit)


def _huber(d: Tensor, delta: float) -> Tensor:
    c = _clamped(d, delta)
    return c * (d - 0.5 * c)


def _smooth_l1(d: Tensor, beta: float) -> Tensor:
    c = _clamped(d, beta)
    return c / beta * (d - 0.5 * c)  # divided first, lest the product overflow


# For each loss of single elements, given d = input - target and its parameter: the value and the derivative.
POINTWISE_LOSSES: dict[str, tuple[Callable[[Tensor, float], Tensor], Callable[[Tensor, float], Tensor]]] = {
    "mse_loss": (lambda d, _: d.square(), lambda d, _: 2 * d),
    "l1_loss": (lambda d, _: d * _sign(d).detach(), lambda d, _: _sign(d)),
    "huber_loss": (_huber, _clamped),
    "smooth_l1_loss": (_smooth_l1, lambda d, beta: _clamped(d, beta) / beta),
}


def pointwise_loss(input: Tensor, target: Tensor, kind: str, parameter: float, reduction: str) -> Tensor:
    x, y = _wide(input, target)
    return _reduce(POINTWISE_LOSSES[kind][0](x - y, parameter), reduction).to(input.dtype)


def pointwise_loss_backward(
    grad_output: Tensor, input: Tensor, target: Tensor, kind: str, parameter: float, reduction: str
) -> tuple[Tensor, Tensor]:
    """Gradients of input and target, as a graph that can be differentiated again."""
    scale, x, y = _wide(grad_output, input, target)
    if reduction == "mean":
        scale = scale / input.numel()
    grad = (POINTWISE_LOSSES[kind][1](x - y, parameter) * scale).to(input.dtype)
    return grad, -grad


def bce_with_logits(
    input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, reduction: str
) -> Tensor:
    dtype = input.dtype
    input, target, weight, pos_weight = _wide(input, target, weight, pos_weight)
    q = 1 if pos_weight is None else pos_weight
    loss = q * target * -F.logsigmoid(input) + (1 - target) * -F.logsigmoid(-input)
    return _reduce(loss if weight is None else loss * weight, reduction).to(dtype)


def bce_with_logits_backward(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of input and target, as a graph that can be differentiated again."""
    dtype = input.dtype
    grad_output, input, target, weight, pos_weight = _wide(grad_output, input, target, weight, pos_weight)
    q = 1 if pos_weight is None else pos_weight
    scale = grad_output if weight is None else grad_output * weight
    if reduction == "mean":
        scale = scale / input.numel()
    grad_input = scale * ((1 - target) * torch.sigmoid(input) - q * target * torch.sigmoid(-input))
    return grad_input.to(dtype), (scale * ((1 - q) * F.logsigmoid(input) - input)).to(dtype)


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
        a = a + part.unsqueeze(-1) * w * ((1 - label_smoothing) * is_label.to(w.dtype) + uniform)
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
    dtype = logits.dtype
    logits, weight = _wide(logits, weight)
    if target.is_floating_point():
        (target,) = _wide(target)
    a, row_weight, counts = _targets(logits, target, second, share, weight, ignore_index, label_smoothing)
    x = _capped(torch.where(counts.unsqueeze(-1), logits.movedim(1, -1), 0), softcap)
    total = x.logsumexp(-1)
    loss = torch.where(a != 0, a * (total.unsqueeze(-1) - x), 0).sum(-1) + z_loss * row_weight * total.square()
    divisor = _divisor(row_weight, normalizer, reduction)
    if divisor is None:
        return (loss if reduction == "none" else loss.sum()).to(dtype)
    mean = loss.sum() / divisor
    return (torch.where(divisor == 0, torch.zeros_like(mean), mean) if empty_is_zero else mean).to(dtype)


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
    dtype, target_dtype = logits.dtype, target.dtype
    grad_output, logits, weight = _wide(grad_output, logits, weight)
    if target.is_floating_point():
        (target,) = _wide(target)
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
        grad_target = (-scale * (1 - label_smoothing) * w * x.log_softmax(-1)).movedim(-1, 1).to(target_dtype)
    return grad.movedim(-1, 1).to(dtype), grad_target
