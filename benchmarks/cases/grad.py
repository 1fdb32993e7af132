"""Clipping all gradients by their norm together: many small ones, and one network's worth of large ones."""

from collections.abc import Iterator
from functools import partial

import torch

import gdbp.nn.utils
from benchmarks.work import OURS, Case, Contender, Goal, Setup, Work

# Of which a spread is compared after a step.
CHECK_ELEMENTS = 65536


def cases(smoke: bool) -> Iterator[Case]:
    sizes = {"1000 x 64": (1000, 64, Goal(20.0)), "67 M": (4, 2**24, Goal(1.8))}
    if smoke:
        sizes = {"3 x 5": (3, 5, None)}
    for name, (count, numel, goal) in sizes.items():
        yield Case("grad", "clip idle", name, partial(_build, count, numel, False), goal)
        yield Case("grad", "clip", name, partial(_build, count, numel, True))


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
        return [torch.tensor(exact, dtype=torch.float64), *(g[::stride].double() * factor for g in grads)]

    contenders = {OURS: contender(gdbp.nn.utils), "torch": contender(torch.nn.utils)}
    accesses = 3 if clips else 1
    traffic = accesses * sum(g.nbytes for g in grads)
    limit = setup.copy_limit(traffic, f"{accesses * grads[0].itemsize} B an element")
    # Wide: torch adds 16 M squares in float32.
    return Work(contenders, reference, tolerance=2**16, limit=limit, bytes=traffic)
