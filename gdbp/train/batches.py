"""The samples of a training step: how many, in which order, with which noise."""

import math
from collections.abc import Iterator
from numbers import Real

import torch

from gdbp._errors import InputError

from .data import Data, Pair

__all__ = ["METHODS", "Batches", "check_clip", "step_size"]

METHODS = ("batch", "stochastic", "minibatch")


class Batches:
    """Each pass over it is an epoch: every sample once, in an order of its own.

    Args:
        data: a :class:`~gdbp.train.Data`, of which this takes the training set, or a pair of tensors ``(x, y)``.
        method, batch_size: see :func:`step_size`.
        noise: standard deviation of normal noise that is added to ``x``.
        seed: of order and noise.

    Raises:
        InputError: an argument is of another kind or out of range.
    """

    def __init__(
        self, data: Data | Pair, method: str, batch_size: int | None, *, noise: float = 0.0, seed: int = 0
    ) -> None:
        pair = data.train if isinstance(data, Data) else data
        if not isinstance(pair, (tuple, list)) or [isinstance(part, torch.Tensor) for part in pair] != [True, True]:
            raise InputError(f"data is of type {type(data).__name__}; expected a Data, or a pair of two tensors (x, y)")
        if not all(part.ndim for part in pair):
            raise InputError("data has a tensor without dimensions; expected a row for each sample")
        self.x, self.y = pair
        if not len(self.x) or len(self.y) != len(self.x):
            found = f"{len(self.x)} inputs and {len(self.y)} targets"
            raise InputError(f"data has {found}; expected as many, and at least one")
        self.size = step_size(len(self.x), method, batch_size)
        if not isinstance(noise, Real) or not 0 <= noise < math.inf:
            raise InputError(f"noise is {noise!r}; expected a finite number of at least 0")
        if noise and not self.x.is_floating_point():
            raise InputError(
                f"noise is {noise!r}, and the inputs are {self.x.dtype}; expected floating ones, or no noise"
            )
        if not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
            raise InputError(f"seed is {seed!r}; expected a whole number of 64 bits")
        self.noise = noise
        self.generator = torch.Generator().manual_seed(seed)
        self._jitter = torch.Generator(self.x.device).manual_seed(seed)

    def __len__(self) -> int:
        """Steps of an epoch; the last takes what is left."""
        return -(-len(self.x) // self.size)

    def __iter__(self) -> Iterator[Pair]:
        for x, y in self._split():
            if self.noise:
                x = x + self.noise * torch.empty_like(x).normal_(generator=self._jitter)
            yield x, y

    def _split(self) -> Iterator[Pair]:
        if self.size == len(self.x):
            yield self.x, self.y
            return
        # One shuffle an epoch and an index_select a step: no loader, no copies of single samples.
        order = torch.randperm(len(self.x), generator=self.generator, device="cpu").to(self.x.device)
        for index in order.split(self.size):
            yield self.x[index], self.y[index]


def step_size(samples: int, method: str = "minibatch", batch_size: int | None = None) -> int:
    """How many samples a training step takes. Raises InputError where the arguments don't fit together."""
    if method not in METHODS:
        raise InputError(f"method {method!r} is unknown; expected one of {', '.join(METHODS)}")
    if method != "minibatch":
        if batch_size is not None:
            raise InputError(f"batch size {batch_size} goes with method minibatch, not {method}; leave it out")
        return samples if method == "batch" else 1
    if batch_size is None:
        return min(32, samples)
    if not isinstance(batch_size, int) or not 1 <= batch_size <= samples:
        raise InputError(f"batch size {batch_size} is out of range; expected 1 to the {samples} training samples")
    return batch_size


def check_clip(clip: float | None) -> float:
    """The largest norm of a step's gradient: infinite for None. Raises InputError where ``clip`` is no such norm."""
    if clip is not None and not (isinstance(clip, Real) and clip > 0):
        raise InputError(f"clip is {clip!r}; expected a number above 0, or None for no clipping")
    return math.inf if clip is None else clip
