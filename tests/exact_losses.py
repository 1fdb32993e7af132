"""Losses and their gradients written out in float64, each with the size of the terms that it is a sum of.

An :class:`Exact` result has a ``reach``: the absolute values of its terms added up, a term that is itself rounded
counting as often as its roundings (an exponential of d has an error of d ulp). An implementation that sums in any order
is off by a few ulp at the reach, and one that forms a result as a difference that cancels is not.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.oracle import spacing


@dataclass
class Exact:
    value: Tensor
    reach: Tensor

    def __mul__(self, factor: Tensor | float) -> "Exact":
        size = factor.abs() if isinstance(factor, Tensor) else abs(factor)
        return Exact(self.value * factor, self.reach * size)

    def __add__(self, other: "Exact") -> "Exact":
        return Exact(self.value + other.value, self.reach + other.reach)

    def map(self, f) -> "Exact":
        """``f``, which moves elements or adds them up, of both."""
        return Exact(f(self.value), f(self.reach))

    def distance(self, actual: Tensor) -> float:
        """The largest error of ``actual`` in ulp of its compute type at the reach. The last rounding of half types is
        forgiven."""
        compute, exact = torch.promote_types(actual.dtype, torch.float32), self.value.to(actual.dtype)
        same = (actual == exact) | (actual.isnan() & exact.isnan())
        error = (actual.double() - self.value).abs()
        if actual.itemsize == 2:
            error = (error - spacing(self.value, actual.dtype) / 2).clamp_min(0)
        error = torch.where(same, 0, (error / spacing(self.reach, compute)).nan_to_num(nan=torch.inf))
        return error.max().item() if error.numel() else 0.0


def reduced(each: Exact, reduction: str, divisor: Tensor) -> Exact:
    if reduction == "none":
        return each
    total = each.map(torch.sum)
    return total if reduction == "sum" else total * (1 / divisor)


# ---- losses of single elements ----


def pointwise(name: str, parameter: float, x: Tensor, t: Tensor) -> tuple[Exact, Exact]:
    """The loss of every element, and its derivative in x."""
    d = x - t
    size = d.abs()
    if name == "mse_loss":
        value, slope = d * d, 2 * d
    elif name == "l1_loss" or (name == "smooth_l1_loss" and parameter == 0):
        value, slope = size, torch.where(d.isnan(), d, d.sign())
    else:
        scale = parameter if name == "smooth_l1_loss" else 1.0
        value = torch.where(size > parameter, parameter * (size - parameter / 2), d * d / 2) / scale
        slope = d.clamp(-parameter, parameter) / scale
    return Exact(value, value.abs()), Exact(slope, slope.abs())


def bce_with_logits(
    x: Tensor, t: Tensor, weight: Tensor, pos_weight: Tensor, compute: torch.dtype
) -> tuple[Exact, Exact, Exact]:
    """The loss of every element, and its derivatives in x and t, computed in the dtype ``compute``."""
    # An exponential that is no normal number has lost digits, whatever it is multiplied by later.
    tiny = torch.finfo(compute).smallest_normal
    tail = torch.log1p(torch.exp(-x.abs()))
    plus, minus = x.clamp_min(0) + tail, (-x).clamp_min(0) + tail
    value = pos_weight * t * minus + (1 - t) * plus
    up, down = (1 - t) * torch.sigmoid(x), pos_weight * t * torch.sigmoid(-x)
    of_t = pos_weight * minus - plus
    results = (
        (value, value),
        (up - down, up.abs() + down.abs() + tiny * (1 + pos_weight)),
        (of_t, (pos_weight + 1) * minus + x.abs()),
    )
    return tuple(Exact(v * weight, r.abs() * weight.abs()) for v, r in results)


# ---- cross-entropy ----


class Softmax:
    """Of rows of logits (rows, classes), capped before."""

    top: Tensor  # one-hot: the first of the largest
    m: Tensor  # (rows, 1): the largest
    nll: Exact
    p: Exact
    rest: Tensor  # 1 - p
    log_sum_exp: Exact  # (rows, 1)
    doubt: Tensor  # (rows, 1): roundings in the sum over the other classes

    def __init__(self, x: Tensor, softcap: float, compute: torch.dtype, blur: Tensor | float = 0.0):
        """``blur``: what the logits themselves may be off, in ulp at 1."""
        x = softcap * torch.tanh(x / softcap) if softcap else x
        self.top = torch.nn.functional.one_hot(x.argmax(-1), x.shape[-1]).bool()
        self.m = m = x.amax(-1, keepdim=True)
        d = x - m
        # What the rounding of d is, in ulp at 1.
        rounding = (x.abs() + m.abs() if softcap else d.abs()) + blur
        e = torch.exp(d)
        swollen = torch.where(e > 0, e * (1 + rounding), e)
        # m - m: nothing is known of a row without a finite largest logit.
        others = torch.where(self.top, 0, e).sum(-1, keepdim=True) + (m - m)
        others_reach = torch.where(self.top, 0, swollen).sum(-1, keepdim=True)
        total, log_total = 1 + others, torch.log1p(others)
        doubt = torch.where(others > 0, others_reach / others, 1)
        self.nll = Exact(log_total - d, log_total * doubt + rounding)
        tiny = torch.finfo(compute).smallest_normal  # as above
        self.p = Exact(e / total, (swollen + e * others_reach / total) / total + tiny)
        self.rest = torch.where(d == 0, others / total, 1 - e / total)
        self.log_sum_exp = Exact(m + log_total, m.abs() + log_total * doubt + torch.as_tensor(blur).amax(-1, True))
        self.doubt = doubt


@dataclass
class Rows:
    """Targets of rows as coefficients of the classes."""

    coefficients: Tensor  # (rows, classes), all terms
    uniform: Tensor  # of which label smoothing's
    weight: Tensor  # (rows,) of each row in the mean
    counts: Tensor  # (rows,) bool
    hot: Tensor | None  # (rows, classes) bool: the labels; None for probabilities


def rows_of_labels(labels, ignore_index: int, weight: Tensor, smoothing: float) -> Rows:
    """``labels``: pairs of (rows,) labels and their shares."""
    classes = len(weight)
    shape = (len(labels[0][0]), classes)
    hot, uniform = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    row_weight = torch.zeros(shape[0], dtype=torch.float64)
    for label, share in labels:
        kept = label != ignore_index
        one = torch.nn.functional.one_hot(torch.where(kept, label, 0), classes) * (share * kept).unsqueeze(-1)
        hot += one
        uniform += (share * kept).unsqueeze(-1) * weight * (smoothing / classes)
        row_weight += one @ weight
    counts = torch.stack([label != ignore_index for label, _ in labels]).any(0)
    return Rows((1 - smoothing) * hot * weight + uniform, uniform, row_weight, counts, hot > 0)


def rows_of_probabilities(target: Tensor, weight: Tensor, smoothing: float) -> Rows:
    coefficients = weight * ((1 - smoothing) * target + smoothing / target.shape[-1])
    ones = torch.ones(len(target), dtype=torch.float64)
    return Rows(coefficients, torch.zeros_like(coefficients), ones, ones > 0, None)


def sum_of_others(a: Tensor) -> Tensor:
    """For each element the sum of all others in its row; the sum of all less its own would cancel."""
    before, after = a.cumsum(-1)[:, :-1], a.flip(-1).cumsum(-1).flip(-1)[:, 1:]
    return torch.nn.functional.pad(before, (1, 0)) + torch.nn.functional.pad(after, (0, 1))


def cross_entropy(
    x: Tensor, rows: Rows, z_loss: float, softcap: float, compute: torch.dtype, blur: Tensor | float = 0.0
) -> tuple[Exact, Exact, Softmax]:
    """The loss of every row, and its derivative in the logits x, computed in the dtype ``compute``."""
    softmax = Softmax(x, softcap, compute, blur)
    a, lse = rows.coefficients, softmax.log_sum_exp
    # Nothing of an impossible class is nothing.
    loss = Exact(*(torch.where(a == 0, 0 * t.nan_to_num(nan=torch.nan, posinf=0), a * t).sum(-1)
                   for t in (softmax.nll.value, softmax.nll.reach)))  # fmt: skip
    pull = Exact(2 * z_loss * lse.value, 2 * z_loss * lse.reach) * rows.weight.unsqueeze(-1)
    if z_loss:
        both = Exact(lse.value**2, lse.value.abs() * (2 * lse.reach + lse.value.abs()))
        loss = loss + both.map(lambda t: t.squeeze(-1)) * (z_loss * rows.weight)
    p = softmax.p
    others = sum_of_others(a)
    value = p.value * (others + pull.value) - a * softmax.rest
    # Where all digits are to be had: at labels, and for the largest logit.
    near = softmax.top if rows.hot is None else rows.hot
    share = torch.where(near, others + rows.uniform, a.sum(-1, keepdim=True))
    reach = p.reach * (share + pull.value.abs()) + p.value * pull.reach
    reach = reach + a * torch.where(near, softmax.rest * softmax.doubt, 1)
    if softcap:
        e = torch.exp(-2 * (x / softcap).abs())
        slope = 4 * e / (1 + e) ** 2
        swollen = slope * (1 + 2 * (x / softcap).abs()).nan_to_num(posinf=1) + torch.finfo(compute).smallest_normal
        value, reach = value * slope, reach * swollen
    counts = rows.counts.unsqueeze(-1)
    gradient = Exact(torch.where(counts, value, 0), torch.where(counts, reach, 0))
    return Exact(torch.where(rows.counts, loss.value, 0), torch.where(rows.counts, loss.reach, 0)), gradient, softmax
