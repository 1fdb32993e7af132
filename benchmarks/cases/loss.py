"""Losses, forward and backward."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

import gdbp.nn.functional as ours
from benchmarks.work import COMPILED, OURS, Case, Contender, Goal, Setup, Tensors, Work


def cases(smoke: bool) -> Iterator[Case]:
    sizes = {(64, 10): Goal(1.5), (4096, 1000): Goal(4.0, kept=2.5), (1024, 32000): Goal(4.0, kept=2.5)}
    if smoke:
        sizes = {(3, 10): None}
    for (rows, classes), goal in sizes.items():
        yield Case("loss", "cross_entropy", f"{rows}x{classes}", partial(_cross_entropy, rows, classes), goal)
    if smoke:
        yield Case("loss", "mse", "1 K", partial(_mse, 2**10))
    else:
        yield Case("loss", "mse", "16 M", partial(_mse, 2**24), Goal(4.0, kept=1.5))


def _cross_entropy(rows: int, classes: int, setup: Setup) -> Work:
    logits, labels = setup.normal(rows, classes, std=2.0), setup.labels(rows, classes)
    return _work(ours.cross_entropy, F.cross_entropy, logits, labels, 2 * logits.nbytes, setup)


def _mse(size: int, setup: Setup) -> Work:
    prediction, target = setup.normal(size), setup.normal(size)
    return _work(ours.mse_loss, F.mse_loss, prediction, target, 3 * prediction.nbytes, setup)


def _work(our_loss, torch_loss, input, target, traffic: int, setup: Setup) -> Work:
    """`traffic`: every input read once and the gradient written once, in bytes."""

    def contender(loss) -> Contender:
        run = partial(_run, loss, input.clone().requires_grad_(), target)
        return Contender(run, run)

    def reference() -> Tensors:
        exact = target.double() if target.is_floating_point() else target
        return _run(torch_loss, input.double().requires_grad_(), exact)

    contenders = {OURS: contender(our_loss), "torch": contender(torch_loss)}
    if setup.compile:
        contenders[COMPILED] = contender(torch.compile(torch_loss))
    # Wide, for torch rounds log-probabilities to the input's dtype, which costs half types some bits.
    return Work(contenders, reference, tolerance=256, limit=setup.copy_limit(traffic), bytes=traffic)


def _run(loss, input, target) -> Tensors:
    value = loss(input, target)
    value.backward()
    results = (value, input.grad)
    input.grad = None
    return results
