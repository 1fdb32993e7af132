"""The class under test beside its oracle: itself on contiguous float64 parameters, in its plainest implementation."""

import copy
import inspect

import torch

from gdbp.testing.compare import difference, number, same_bits, ulps
from gdbp.testing.report import Failure, NotApplicable, one_line
from gdbp.testing.suite import Suite

# Ten steps round ten times; the rest is for intermediate roundings of classes built from tensor operations.
LIMIT_ULP = 16.0


class Subject:
    """A class of optimizers with the arguments to construct it."""

    def __init__(self, cls: type[torch.optim.Optimizer], kwargs: dict):
        self.cls, self.kwargs = cls, kwargs
        parameters = inspect.signature(cls).parameters
        self._plain = {flag: False for flag in ("foreach", "fused") if flag in parameters}
        self._no_float64: str | None = None
        # What schedulers change.
        self.scheduled = [name for name in ("lr", "momentum", "betas") if name in parameters]

    def make(self, params, **options) -> torch.optim.Optimizer:
        # A tensor among the arguments is the optimizer's to change: every optimizer gets its own.
        return self.cls(params, **{**copy.deepcopy(self.kwargs), **options})

    def oracle(self, params, **options) -> torch.optim.Optimizer:
        """The oracle's optimizer; NotApplicable where the class can't do float64."""
        if self._no_float64 is None:
            self._no_float64 = self._try_float64()
        if self._no_float64:
            raise NotApplicable(f"no oracle, as float64 does not work: {self._no_float64}")
        return self.make(params, **{**options, **self._plain})

    def _try_float64(self) -> str:
        p = torch.ones(3, 3, dtype=torch.float64, requires_grad=True)
        p.grad = torch.ones_like(p)
        try:
            self.make([p], **self._plain).step()
        except Exception as error:
            return one_line(f"{type(error).__name__}: {error}")
        return ""


SUITE = Suite("gdbp.testing.optimizers", Subject)


class Pair:
    """Parameters of the class under test and equal ones of its oracle, which get equal gradients."""

    def __init__(self, subject: Subject, values: list[torch.Tensor], **options):
        self.params = [v.detach().requires_grad_() for v in values]
        self.exact = [_exact(v).requires_grad_() for v in values]
        self.oracle = subject.oracle(self.exact, **options)
        self.optimizer = subject.make(self.params, **options)
        self.peaks = [q.detach().abs() for q in self.exact]

    @property
    def both(self) -> list[tuple[torch.optim.Optimizer, list[torch.Tensor]]]:
        return [(self.optimizer, self.params), (self.oracle, self.exact)]

    def give(self, grads: list[torch.Tensor | None]) -> None:
        for p, q, g in zip(self.params, self.exact, grads, strict=True):
            p.grad = g
            q.grad = None if g is None else _exact(g)

    def step(self, grads: list[torch.Tensor | None]) -> None:
        self.give(grads)
        self.oracle.step()
        self.optimizer.step()
        self.track()

    def track(self) -> None:
        """Takes note of the largest values so far, which set the unit of the distances."""
        for q, peak in zip(self.exact, self.peaks, strict=True):
            torch.maximum(peak, q.detach().abs(), out=peak)

    def run(self, steps: int, rng: torch.Generator) -> "Pair":
        for _ in range(steps):
            self.step([randn(p, rng) for p in self.params])
        return self

    def ulps(self) -> torch.Tensor:
        """Distances of all elements, each in units in the last place of the largest value that the element had."""
        found = [ulps(p, q, peak).reshape(-1) for p, q, peak in zip(self.params, self.exact, self.peaks, strict=True)]
        return torch.cat(found)

    def require_close(self, what: str = "", limit: float = LIMIT_ULP) -> str:
        """The largest distance as evidence; Failure where it is above the limit."""
        distances = self.ulps()
        worst = distances.max().item() if distances.numel() else 0.0
        if not worst <= limit:
            many = int((~(distances <= limit)).sum())
            raise Failure(f"{what}{many} of {distances.numel()} elements wrong, by up to {number(worst)} ulp")
        return f"{what}{number(worst)} ulp from float64"


def randn(like: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Normal numbers of the tensor's shape and dtype, contiguous."""
    return torch.randn(like.shape, generator=rng, dtype=torch.float64).to(like.dtype)


def snapshot(optimizer: torch.optim.Optimizer, params: list[torch.Tensor]) -> list:
    """Copies of the parameters and of everything that is kept for them."""
    return [(p.detach().clone(), copy.deepcopy(dict(optimizer.state.get(p, {})))) for p in params]


def require_equal(found, expected, what: str) -> None:
    """Failure where parameters or states of two snapshots differ in a bit."""
    for i, ((p, state), (q, other)) in enumerate(zip(found, expected, strict=True)):
        if not same_bits(p, q):
            raise Failure(f"{what}: parameter {i} {difference(p, q)}")
        if state.keys() != other.keys():
            raise Failure(f"{what}: states of parameter {i} are {sorted(state)} instead of {sorted(other)}")
        for key, value in state.items():
            if not same_bits(value, other[key]):
                raise Failure(f"{what}: state {key!r} of parameter {i} {difference(value, other[key])}")


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(torch.float64, copy=True, memory_format=torch.contiguous_format)
