"""What a case is made of: equal work for gdbp and its peers, the right result, and the hardware's limit."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from benchmarks import optional

Tensors = Sequence[torch.Tensor]

OURS = "gdbp"
COMPILED = "torch compile"

# Half of a copy's traffic is read and half written. Buffers beyond this size are all far beyond any cache.
COPY_BUFFER_LIMIT = 256 * 2**20
# Below this much traffic a copy costs its call, and a percentage of that says nothing.
COPY_MINIMUM = 2**18
# Random numbers of a tensor that are drawn; a prime, so that no two rows are the same.
MOST_DRAWN = 4194301


class Contender(NamedTuple):
    """One implementation of the work."""

    run: Callable[[], Any]  # one repetition, as it is timed
    results: Callable[[], Tensors]  # to compare with the reference; called once, before anything is timed


class Limit(NamedTuple):
    """Work that no implementation can do without, timed between the contenders."""

    what: str
    run: Callable[[], Any]
    scale: float = 1.0  # the limit is `scale` times what `run` takes


@dataclass(frozen=True)
class Goal:
    """What gdbp is to reach, on the CPU or the case's own device, in float32 or the case's own dtype.

    Args:
        ratio: the peer's time over ours, at least.
        kept: the same with a heap that is kept; default `ratio`.
        peer: whose time; default that of the fastest correct one.
        limit: the limit's time over ours, at least.
    """

    ratio: float | None = None
    kept: float | None = None
    peer: str | None = None
    limit: float | None = None


@dataclass
class Work:
    """A case with its data in place.

    Args:
        contenders: by name, gdbp's under `OURS` first.
        reference: computes what `results` should be, in float64.
        tolerance: error in ulp beyond which a result is wrong.
        floor: see :func:`benchmarks.accuracy.ulp_error`.
        limit: None where the cost is that of the call alone.
        bytes, flops: least traffic and arithmetic; 0 where they say nothing.
        hot: whether the caches stay warm and host time counts too, on CUDA.
    """

    contenders: dict[str, Contender]
    reference: Callable[[], Tensors]
    tolerance: float
    floor: str = "none"
    limit: Limit | None = None
    bytes: int = 0
    flops: int = 0
    hot: bool = False


@dataclass(frozen=True)
class Setup:
    """Where and in which dtype a case is to run, which peers take part, and its random numbers.

    Args:
        compile: whether torch.compile does.
        optional: names of :data:`benchmarks.optional.PEERS` that do where they are installed.
        absent: why one of these does not; filled as a case is built.
    """

    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    compile: bool = False
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    optional: frozenset[str] = frozenset()
    absent: dict[str, str] = field(default_factory=dict)

    def add(self, contenders: dict[str, "Contender"], peer: str, make: Callable[[Any], "Contender"]) -> None:
        """Adds a peer of :data:`benchmarks.optional.PEERS` that was asked for, under its name.

        `make` gets the peer's module. Where it is not installed, or `make` fails, `absent` says what to do.
        """
        if peer not in self.optional:
            return
        module, self.absent[peer] = optional.load(peer, self.device)
        if module is None:
            return
        try:
            contenders[peer] = make(module)
            del self.absent[peer]
        except Exception as error:  # whatever another project raises, the others are measured
            self.absent[peer] = optional.reason(error)

    def normal(self, *shape: int, std: float = 1.0) -> torch.Tensor:
        """Normal random numbers; the same for every device, since they are drawn on the CPU."""
        return self._draw(shape, lambda n: torch.randn(n, generator=self.generator) * std)

    def away_from_zero(self, *shape: int) -> torch.Tensor:
        """Numbers of either sign, 0.5 to 1.5 in size, from which a small update takes no digits."""

        def draw(n: int) -> torch.Tensor:
            drawn = torch.rand(n, generator=self.generator).mul_(2).sub_(1)
            return drawn.add_(torch.where(drawn < 0, -0.5, 0.5))

        return self._draw(shape, draw)

    def _draw(self, shape: tuple[int, ...], draw: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """Many are few again and again: to draw them all would take longer than to measure."""
        count = math.prod(shape)
        drawn = draw(min(count, MOST_DRAWN)).to(self.device, self.dtype)
        if count > MOST_DRAWN:
            drawn = drawn.repeat(-(-count // MOST_DRAWN))[:count]
        return drawn.view(shape)

    def labels(self, count: int, classes: int) -> torch.Tensor:
        return torch.randint(classes, (count,), generator=self.generator).to(self.device)

    def copy_limit(self, traffic: int, counted: str) -> Limit | None:
        """A copy that moves `traffic` bytes, reads and writes together; None where that is too few.

        `counted` says how many that is of an element, such as "28 B a parameter".
        """
        if traffic < COPY_MINIMUM:
            return None
        size = min(traffic // 2, COPY_BUFFER_LIMIT) // 4
        source = torch.ones(size, device=self.device)
        target = torch.zeros_like(source)
        return Limit(f"copy, {counted}", lambda: target.copy_(source), traffic / (8 * size))


@dataclass(frozen=True)
class Case:
    """A measurement that can be made: a name, a size, how to put its data in place.

    `dtype` is the only one to measure, where the case is about one; likewise `device`.
    """

    family: str
    name: str
    size: str
    build: Callable[[Setup], Work]
    goal: Goal | None = None
    dtype: torch.dtype | None = None
    device: str | None = None

    @property
    def title(self) -> str:
        dtype = f" {str(self.dtype).removeprefix('torch.')}" if self.dtype else ""
        return f"{self.family}.{self.name} {self.size}{dtype}"


def powers(first: int, last: int, factor: int) -> list[int]:
    """`first` times the powers of `factor`, up to `last`."""
    sizes = [first]
    while sizes[-1] * factor <= last:
        sizes.append(sizes[-1] * factor)
    return sizes


@dataclass(frozen=True)
class Series:
    """A case at several sizes, to see how its cost grows.

    Args:
        of: what grows: "params", "tensors", "batch", "classes", or "threads", which are set for each.
        build: makes the case's work for a size.
        sizes: ascending, some times the one before.
    """

    family: str
    name: str
    of: str
    build: Callable[[int, Setup], Work]
    sizes: Sequence[int]

    @property
    def title(self) -> str:
        return f"{self.family}.{self.name} by {self.of}"

    def case(self, size: int) -> Case:
        """The case of one size."""
        power = sum(size >= limit for limit in (1000, 10**6))
        text = f"{size / 1000**power:.3g}{('', ' K', ' M')[power]} {self.of}"
        return Case(self.family, self.name, text, lambda setup: self.build(size, setup))
