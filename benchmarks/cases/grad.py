"""One pass over all tensors of a model, many small ones or one network's worth of large ones: clipping by the norm of
all gradients, their health, and the L1 and L2 penalty of the parameters."""

from collections.abc import Iterator
from functools import partial

import torch

import gdbp.nn.utils
from benchmarks.work import OURS, Case, Contender, Goal, Setup, Work

# Of which a spread is compared after a step.
CHECK_ELEMENTS = 65536
# Tensors, elements of each; goals of clip idle, health and penalty.
SIZES = {
    "1000 x 64": (1000, 64, Goal(20.0), Goal(20.0), Goal(5.0)),
    "67 M": (4, 2**24, Goal(1.8), Goal(4.0), Goal(4.0, kept=2.0)),
}
L1, L2 = 1e-4, 1e-2


def cases(smoke: bool) -> Iterator[Case]:
    sizes = {"3 x 5": (3, 5, None, None, None)} if smoke else SIZES
    for name, (count, numel, idle, health, penalty) in sizes.items():
        yield Case("grad", "clip idle", name, partial(_build, count, numel, False), idle)
        yield Case("grad", "clip", name, partial(_build, count, numel, True))
        yield Case("grad", "health", name, partial(_health, count, numel), health)
        yield Case("grad", "penalty", name, partial(_penalty, count, numel), penalty)


def _build(count: int, numel: int, clips: bool, setup: Setup) -> Work:
    """`clips`: whether the norm is above the limit, so that the gradients are written too."""
    grads = [setup.normal(numel) for _ in range(count)]
    exact = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.double()) for g in grads])).item()
    maximum = exact / 2 if clips else 2 * exact
    stride = max(1, count * numel // CHECK_ELEMENTS)

    def count_down(limit: float) -> Iterator[float]:
        """Each below the norm that the last one left, so that every repetition writes; slowly, or it ends at 0."""
        while True:
            limit *= 0.9999
            yield limit

    def contender(module) -> Contender:
        params = [torch.nn.Parameter(torch.empty_like(g)) for g in grads]
        for p, g in zip(params, grads):
            p.grad = g.clone()

        def run() -> torch.Tensor:
            return module.clip_grad_norm_(params, maximum)

        def results() -> list[torch.Tensor]:
            return [run(), *(p.grad[::stride].clone() for p in params)]

        limits = count_down(maximum)

        def timed() -> torch.Tensor:
            return module.clip_grad_norm_(params, next(limits))

        return Contender(timed if clips else run, results)

    def reference() -> list[torch.Tensor]:
        factor = min(1.0, maximum / (exact + 1e-6))
        return [
            torch.tensor(exact, dtype=torch.float64, device=grads[0].device),
            *(g[::stride].double() * factor for g in grads),
        ]

    contenders = {OURS: contender(gdbp.nn.utils), "torch": contender(torch.nn.utils)}
    accesses = 3 if clips else 1
    traffic = accesses * sum(g.nbytes for g in grads)
    limit = setup.copy_limit(traffic, f"{accesses * grads[0].itemsize} B an element")
    # Wide: torch adds 16 M squares in float32.
    return Work(contenders, reference, tolerance=2**16, limit=limit, bytes=traffic)


def _health(count: int, numel: int, setup: Setup) -> Work:
    """Norm, largest, mean, NaNs, infinities and zeros of every gradient. Nothing is waited for."""
    named = [(str(i), torch.nn.Parameter(setup.normal(numel))) for i in range(count)]
    for _, p in named:
        p.grad = p.detach() + 1  # a mean of nothing but rounding could not be compared

    def ours() -> list[torch.Tensor]:
        health = gdbp.nn.utils.gradient_health(named)
        return [health.norm, health.largest, health.mean, health.nans, health.infinities, health.zeros]

    def by_hand(dtype: torch.dtype) -> list[torch.Tensor]:
        rows = [_statistics(p.grad.to(dtype)) for _, p in named]
        return [torch.stack(column) for column in zip(*rows)]

    contenders = {
        OURS: Contender(ours, ours),
        "torch": Contender(partial(by_hand, setup.dtype), partial(by_hand, setup.dtype)),
    }
    traffic = sum(p.nbytes for _, p in named)
    limit = setup.copy_limit(traffic, f"{named[0][1].itemsize} B an element")
    return Work(contenders, partial(by_hand, torch.float64), tolerance=2**16, limit=limit, bytes=traffic)


def _statistics(grad: torch.Tensor) -> list[torch.Tensor]:
    counts = [seen.sum().to(grad.dtype) for seen in (grad.isnan(), grad.isinf(), grad == 0)]
    return [torch.linalg.vector_norm(grad), grad.abs().max(), grad.mean(), *counts]


def _penalty(count: int, numel: int, setup: Setup) -> Work:
    """The value and the gradients of all parameters."""
    drawn = [setup.normal(numel) for _ in range(count)]
    stride = max(1, count * numel // CHECK_ELEMENTS)

    def by_hand(params: list[torch.Tensor]) -> torch.Tensor:
        return sum(L1 * p.abs().sum() + L2 / 2 * p.square().sum() for p in params)

    def contender(penalty) -> Contender:
        params = [p.clone().requires_grad_() for p in drawn]

        def run() -> tuple[torch.Tensor, ...]:
            value = penalty(params)
            return value, *torch.autograd.grad(value, params)

        def results() -> list[torch.Tensor]:
            value, *grads = run()
            return [value.detach(), *(g[::stride] for g in grads)]

        return Contender(run, results)

    def reference() -> list[torch.Tensor]:
        params = [p.double().requires_grad_() for p in drawn]
        value = by_hand(params)
        return [value.detach(), *(g[::stride] for g in torch.autograd.grad(value, params))]

    contenders = {OURS: contender(partial(gdbp.nn.utils.penalty, l1=L1, l2=L2)), "torch": contender(by_hand)}
    traffic = 3 * sum(p.nbytes for p in drawn)
    limit = setup.copy_limit(traffic, f"{3 * drawn[0].itemsize} B an element")
    # Wide: torch adds 16 M numbers in float32, and in half types the sums of 1000 tensors.
    return Work(contenders, reference, tolerance=2**16, limit=limit, bytes=traffic)
