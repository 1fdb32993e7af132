"""torch's own operations on warm memory and on malloc's: the same work, with the CPU cache on for one contender."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.work import OURS, Case, Contender, Goal, Setup, Tensors, Work
from gdbp import _load, memory

ALLOCATIONS = 100
CHECK_STEPS = 3

# Puts the data in place, and gives one repetition and what it computes.
Job = Callable[[Setup], tuple[Callable[[], object], Callable[[], Tensors]]]


def cases(smoke: bool) -> Iterator[Case]:
    """Against a heap that is kept, the goal is to lose nothing."""
    for (name, size), (job, goal) in jobs(smoke).items():
        yield Case("memory", name, size, partial(_build, job), Goal(goal, kept=1.0))


def jobs(smoke: bool) -> dict[tuple[str, str], tuple[Job, float]]:
    """By name and size: what to do, and how many times as fast it is to be with the cache."""
    found: dict[tuple[str, str], tuple[Job, float]] = {}
    for rows, classes in [(4, 5)] if smoke else [(4096, 1000), (1024, 32000)]:
        found["cross_entropy", f"{rows}x{classes}"] = partial(_cross_entropy, rows, classes), 5.0
    found["mse_loss", "1 K" if smoke else "16 M"] = partial(_mse_loss, 2**10 if smoke else 2**24), 4.0
    sizes, batch = ((7, 5, 5, 3), 4) if smoke else ((784, 512, 512, 10), 128)
    found["step", f"batch {batch}"] = partial(_step, sizes, batch), 1.3
    shape = (3, 5, 7) if smoke else (1024, 1024, 4096)
    found["linear_gelu", "x".join(map(str, shape))] = partial(_linear_gelu, *shape), 1.0
    found["empty", "64 B"] = partial(_empty, 64), 1.0
    found["empty", "1 MiB"] = partial(_empty, 2**20), 5.0
    count, size = (2, 2**15) if smoke else (16, 2**20)
    found["fill", f"{count} x {size >> 10} KiB"] = partial(_fill, count, size), 5.0
    return found


class _Switch:
    """Registers the cache for a run at a time. Its blocks stay warm meanwhile, until the switch itself goes."""

    def __init__(self):
        on = ExitStack()
        on.enter_context(memory.cpu_cache())
        _load._C.cpu_cache_unregister()
        weakref.finalize(self, on.close)

    def cached(self, run: Callable[[], object]) -> Callable[[], object]:
        def cached_run():
            _load._C.cpu_cache_register()
            try:
                return run()
            finally:
                _load._C.cpu_cache_unregister()

        # The switch lives as long as the run.
        cached_run.switch = self
        return cached_run


def _build(job: Job, setup: Setup) -> Work:
    """Equal work is done three times, so that none finds what another left: two contenders and the reference."""
    state = setup.generator.get_state()

    def contender(wrap: Callable = lambda run: run) -> Contender:
        setup.generator.set_state(state)
        run, results = job(setup)
        return Contender(wrap(run), wrap(results))

    ours, torchs, reference = contender(_Switch().cached), contender(), contender()
    contenders = {OURS: ours, "torch": torchs}
    # The very same computation, whose last bits may hang on how a library cuts a sum.
    return Work(contenders, lambda: [t.double() for t in reference.results()], tolerance=64, floor="rms", hot=True)


def _backward(forward: Callable[[], torch.Tensor], leaves: list[torch.Tensor], gradient: torch.Tensor | None = None):
    """A forward and a backward pass, with all that was made for it freed before the next one."""

    def run() -> torch.Tensor:
        for leaf in leaves:
            leaf.grad = None
        value = forward()
        value.backward(gradient)
        return value

    def results() -> Tensors:
        return [run().detach(), *(leaf.grad for leaf in leaves)]

    return run, results


def _cross_entropy(rows: int, classes: int, setup: Setup):
    logits, labels = setup.normal(rows, classes).requires_grad_(), setup.labels(rows, classes)
    return _backward(lambda: F.cross_entropy(logits, labels), [logits])


def _mse_loss(numel: int, setup: Setup):
    x, target = setup.normal(numel).requires_grad_(), setup.normal(numel)
    return _backward(lambda: F.mse_loss(x, target), [x])


def _linear_gelu(batch: int, inputs: int, outputs: int, setup: Setup):
    x, bias = setup.normal(batch, inputs).requires_grad_(), setup.normal(outputs).requires_grad_()
    weight = setup.normal(outputs, inputs, std=inputs**-0.5).requires_grad_()
    return _backward(lambda: F.gelu(F.linear(x, weight, bias)), [x, weight, bias], setup.normal(batch, outputs))


def _step(sizes: tuple[int, ...], batch: int, setup: Setup):
    x, labels = setup.normal(batch, sizes[0]), setup.labels(batch, sizes[-1])
    layers = [layer for shape in pairwise(sizes) for layer in (nn.Linear(*shape), nn.ReLU())]
    network = nn.Sequential(*layers[:-1]).to(x)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(setup.normal(*p.shape, std=p.shape[-1] ** -0.5))
    optimizer = torch.optim.Adam(network.parameters())

    def run() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(network(x), labels)
        value.backward()
        optimizer.step()
        return value

    def results() -> Tensors:
        losses = [run().detach() for _ in range(CHECK_STEPS)]
        return [*losses, *(p.grad for p in network.parameters())]

    return run, results


def _empty(size: int, setup: Setup):
    """Allocated and freed, never touched."""
    empty, numel = torch.empty, size // setup.dtype.itemsize

    def run():
        for _ in range(ALLOCATIONS):
            empty(numel, dtype=setup.dtype)

    return run, lambda: [empty(numel, dtype=setup.dtype).zero_()]


def _fill(count: int, size: int, setup: Setup):
    """Together there at once, and written: beyond its threshold malloc gives the end of its heap back."""
    numel = size // setup.dtype.itemsize

    def run() -> Tensors:
        return [torch.full((numel,), float(i), dtype=setup.dtype) for i in range(count)]

    return run, run
