"""The last layer of a language model and its loss: gradients of hidden states and weight."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

import gdbp.nn.functional as ours
from benchmarks.work import COMPILED, OURS, Case, Contender, Goal, Limit, Setup, Tensors, Work


def cases(smoke: bool) -> Iterator[Case]:
    sizes = {(5, 3, 7): None} if smoke else {(1024, 512, 32000): Goal(1.3)}
    for (rows, features, classes), goal in sizes.items():
        build = partial(_build, rows, features, classes)
        yield Case("linear_cross_entropy", "labels", f"{rows}x{features}x{classes}", build, goal)


def _plain(x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(x, weight), labels)


def _weight_second(loss):
    return lambda x, weight, labels: loss(weight, x, labels)


def _build(rows: int, features: int, classes: int, setup: Setup) -> Work:
    x, weight = setup.normal(rows, features), setup.normal(classes, features, std=features**-0.5)
    labels = setup.labels(rows, classes)

    def contender(loss) -> Contender:
        run = partial(_run, loss, labels, x.clone().requires_grad_(), weight.clone().requires_grad_())
        return Contender(run, run)

    def reference() -> Tensors:
        return _run(_plain, labels, x.double().requires_grad_(), weight.double().requires_grad_())

    contenders = {OURS: contender(ours.linear_cross_entropy), "torch": contender(_plain)}
    if hasattr(F, "linear_cross_entropy"):  # from torch 2.13 on
        options = torch.nn.LinearCrossEntropyOptions()
        contenders["torch chunked"] = contender(partial(F.linear_cross_entropy, options=options))
    if setup.compile:
        contenders[COMPILED] = contender(torch.compile(_plain))
    setup.add(contenders, "liger", lambda liger: contender(_weight_second(liger.LigerFusedLinearCrossEntropyLoss())))
    # Wide, for half types round the logits.
    return Work(contenders, reference, tolerance=1024, floor="rms", limit=_products(x, weight),
                flops=6 * rows * features * classes)  # fmt: skip


def _run(loss, labels, x, weight) -> Tensors:
    value = loss(x, weight, labels)
    value.backward()
    results = (value, x.grad, weight.grad)
    x.grad = weight.grad = None
    return results


def _products(x: torch.Tensor, weight: torch.Tensor) -> Limit:
    """The three products, over all logits at once, into memory that is there."""
    logits = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)

    def run():
        torch.mm(x, weight.t(), out=logits)
        torch.mm(logits, weight, out=grad_x)
        torch.mm(logits.t(), x, out=grad_weight)

    return Limit("GEMMs", run)
