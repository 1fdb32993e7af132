"""The class under test beside its oracle: itself on contiguous float64 parameters, in its plainest implementation."""

import copy
import inspect
import math
from collections.abc import Callable

import torch

from gdbp.testing.report import Failure, NotApplicable, one_line

# Ten steps round ten times; the rest is for intermediate roundings of classes built from tensor operations.
LIMIT_ULP = 16.0


class Subject:
    """A class of optimizers with the arguments to construct it."""

    def __init__(self, cls: type[torch.optim.Optimizer], kwargs: dict):
        self.cls, self.kwargs = cls, kwargs
        parameters = inspect.signature(cls).parameters
        self._plain = {flag: False for flag in ("foreach", "fused") if flag in parameters}
        self._no_float64: str | None = None
        self.momentum = [name for name in ("momentum", "betas") if name in parameters]

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
            raise Failure(f"{what}{many} of {distances.numel()} elements wrong, by up to {_number(worst)} ulp")
        return f"{what}{_number(worst)} ulp from float64"


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
            raise Failure(f"{what}: parameter {i} differs by up to {_difference(p, q)}")
        if state.keys() != other.keys():
            raise Failure(f"{what}: states of parameter {i} are {sorted(state)} instead of {sorted(other)}")
        for key, value in state.items():
            if not same_bits(value, other[key]):
                difference = _difference(value, other[key])
                raise Failure(f"{what}: state {key!r} of parameter {i} differs by up to {difference}")


def same_bits(a, b) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return (
            a.dtype == b.dtype
            and torch.equal(a.nan_to_num(nan=1.5), b.nan_to_num(nan=1.5))
            and bool(torch.equal(a.isnan(), b.isnan()))
        )
    return type(a) is type(b) and a == b


def ulps(p: torch.Tensor, exact: torch.Tensor, peak: torch.Tensor) -> torch.Tensor:
    """Distance of every element from its exact value, in units in the last place of p's dtype at peak."""
    info = torch.finfo(p.dtype)
    _, exponent = torch.frexp(peak.clamp_min(info.tiny).nan_to_num(posinf=info.max))
    unit = torch.exp2(exponent.double() - 1) * info.eps
    same = (p.detach() == exact.detach()) | (p.detach().isnan() & exact.detach().isnan())
    return torch.where(same, 0.0, ((p.detach().double() - exact.detach()).abs() / unit).nan_to_num(nan=math.inf))


def require(condition: bool, evidence: str | Callable[[], str]) -> None:
    if not condition:
        raise Failure(evidence if isinstance(evidence, str) else evidence())


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(torch.float64, copy=True, memory_format=torch.contiguous_format)


def _difference(a, b) -> str:
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return f"being {a!r} instead of {b!r}"
    if a.dtype != b.dtype or a.shape != b.shape:
        return f"being {a.dtype} {tuple(a.shape)} instead of {b.dtype} {tuple(b.shape)}"
    return _number((a.double() - b.double()).abs().max().item())


def _number(value: float) -> str:
    return f"{value:.3g}"
