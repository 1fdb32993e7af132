"""The learning-rate range test: a short training whose rate grows with every step, and what its losses say."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, islice, repeat
from numbers import Real
from pathlib import Path

import torch

from gdbp._errors import InputError
from gdbp.step import TrainStep

from .batches import Batches, check_clip
from .data import Data, Pair

__all__ = ["RangeTest", "lr_find"]

# Of the loss's whole fall. With 100 steps on digits, breast-cancer and diabetes, under four rules, constant and
# one-cycle schedules, 15 epochs at this rate ended at a validation loss 1.09 times that of the best of ten rates
# (geometric mean; 1.36 at worst); at the rate of the steepest fall 1.52 (3.4), at a tenth of the rate of the lowest
# loss 1.20 (2.2).
_FALLEN = 0.7
# What a point of the smoothed curve averages over: the standard deviation of the weights, as a share of all steps.
_WIDTH = 0.02
# So many standard deviations of the smoothed losses' noise are no fall yet.
_CHANCE = 4.0


@dataclass(frozen=True)
class RangeTest:
    """What :func:`lr_find` measured.

    Attributes:
        lr: learning rate of each step, rising (of the first parameter group).
        loss: of each step's batch, before the step, in training mode.
        suggestion: the rate by which the loss, smoothed, had done 70 % of its fall: large, and well before the rates at
            which it grows again. None where it never fell beyond its noise.
    """

    lr: list[float]
    loss: list[float]
    suggestion: float | None

    @property
    def smoothed(self) -> list[float]:
        """The losses, each averaged with its neighbours."""
        return _smooth(self.loss).tolist()

    def __str__(self) -> str:
        tested = f"{len(self.lr)} rates from {self.lr[0]:.2g} to {self.lr[-1]:.2g}"
        if self.suggestion is None:
            return f"{tested}: the loss never fell beyond its noise; try other rates, more steps or larger batches"
        lowest = self.lr[int(_smooth(self.loss).argmin())]
        return f"{tested}: the loss was lowest at {lowest:.2g}; train with a learning rate of {self.suggestion:.2g}"

    def plot(self, path: str | Path) -> None:
        """Draws loss against rate, and the suggestion. The suffix of ``path`` chooses the format (.png, .svg, .pdf).
        Needs matplotlib; opens no window."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5.6, 3.8), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        axes.semilogx(self.lr, self.loss, ".", color="#9db8d9", markersize=4, label="each batch")
        axes.semilogx(self.lr, self.smoothed, color="#2f6db5", linewidth=1.8, label="smoothed")
        if self.suggestion is not None:
            label = f"suggested, {self.suggestion:.2g}"
            axes.axvline(self.suggestion, color="#e07b39", linewidth=1.4, linestyle="--", label=label)
        # What comes after the loss has begun to grow would hide what was before.
        low, high = min(self.loss), max(self.smoothed[: max(1, len(self.loss) // 2)])
        margin = 0.1 * (high - low) or 0.1 * abs(high) or 1.0
        axes.set_ylim(low - margin, high + 2 * margin)
        axes.set_xlabel("learning rate")
        axes.set_title("loss", fontsize=10)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
        figure.savefig(path)


def lr_find(
    model: torch.nn.Module,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    data: Data | Pair,
    *,
    lowest: float = 1e-6,
    highest: float = 10.0,
    steps: int | None = None,
    batch_size: int | None = None,
    method: str = "minibatch",
    clip: float | None = None,
    seed: int = 0,
    noise: float = 0.0,
) -> RangeTest:
    """Trains a copy of ``model`` for some steps, each with a larger learning rate than the one before, and says which
    rate to take (the range test of L. N. Smith, arXiv:1506.01186).

    Model, optimizer and their states, and the random state of torch, are as they were: copies are trained, which
    take as much memory again. It ends early when a loss is not finite, or has grown far beyond its lowest.

    Args:
        model, loss, optimizer, data: as :func:`gdbp.train.fit` takes them. Parameter groups keep the ratios of their
            rates; the rates themselves do not matter. What a function or a hook refers to by itself is not copied: of a
            penalty on the parameters of ``model``, say, these would get gradients; pass a loss module that has them.
        lowest, highest: rates of the first and the last step, in a geometric row.
        steps: at least 20; default 100, or 500 where a step takes fewer than 8 samples, whose losses scatter. More take
            longer, and find a lower rate, for what each of them learns adds up.
        batch_size, method, clip, seed, noise: as in :func:`gdbp.train.fit`. The rate that is found is one for them: it
            grows with the batch.

    Raises:
        InputError: an argument is out of range (a ValueError), or the model can't be copied.
        FloatingPointError: the first loss is not finite; no rate would help.
    """
    batches = Batches(data, method, batch_size, noise=noise, seed=seed)
    check_clip(clip)
    for name, rate in (("lowest", lowest), ("highest", highest)):
        if not isinstance(rate, Real) or not 0 < rate < math.inf:
            raise InputError(f"{name} is {rate!r}; expected a finite number above 0")
    if lowest >= highest:
        raise InputError(f"lowest is {lowest:g} and highest {highest:g}; expected the lower one first")
    if steps is None:
        steps = 100 if batches.size >= 8 else 500
    if not isinstance(steps, int) or steps < 20:
        raise InputError(f"steps is {steps!r}; expected a whole number of at least 20")
    model, loss, optimizer = _copies(model, loss, optimizer)
    model.train()
    step = TrainStep(model, loss, optimizer, strict=False, max_grad_norm=clip, seed=seed)
    first = float(optimizer.param_groups[0]["lr"])
    ratios = [float(group["lr"]) / first if first > 0 else 1.0 for group in optimizer.param_groups]
    rates, losses, watch = [], [], _Watch(steps)
    devices = [batches.x.device] if batches.x.is_cuda else []
    with torch.random.fork_rng(devices):
        for k, (x, y) in enumerate(islice(chain.from_iterable(repeat(batches)), steps)):
            rate = lowest * (highest / lowest) ** (k / (steps - 1))
            for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
                _set_rate(group, rate * ratio)
            value = step(x, y).item()
            if not math.isfinite(value):
                break
            rates.append(rate)
            losses.append(value)
            if watch.has_diverged(value):
                break
    if not losses:
        raise FloatingPointError(f"the loss is {value} before the first step; look at the data and the initial weights")
    return RangeTest(rates, losses, _suggest(rates, losses))


def _copies(*parts):
    """Copies in one go, so that the optimizer's copy has the copied parameters."""
    try:
        return copy.deepcopy(parts)
    except Exception as error:
        raise InputError(
            f"model, loss and optimizer can't be copied ({type(error).__name__}: {error}); "
            "expected what copy.deepcopy takes; take the model out of wrappers such as DistributedDataParallel"
        ) from None


def _set_rate(group: dict, rate: float) -> None:
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


class _Watch:
    """Looks whether a loss has grown so far that no larger rate need be tried."""

    def __init__(self, steps: int) -> None:
        self.span = steps / 10
        self.count, self.sum, self.weight = 0, 0.0, 0.0
        self.first = self.lowest = math.nan

    def has_diverged(self, loss: float) -> bool:
        self.count += 1
        kept = 1 - 1 / self.span
        self.sum, self.weight = kept * self.sum + loss, kept * self.weight + 1
        mean = self.sum / self.weight
        if self.count <= self.span:  # rates at which nothing happens yet, and too few losses for a mean
            self.first = self.lowest = mean
        self.lowest = min(self.lowest, mean)
        # Four times the lowest, for losses that end at a level of their own; those that end near 0 may come back.
        return mean - self.lowest > 3 * max(abs(self.lowest), self.first - self.lowest)


def _weights(count: int) -> torch.Tensor:
    """Of the neighbours of one of so many losses, on both sides of it, in its smoothed one; they add up to 1."""
    width = _WIDTH * count
    reach = min(count, math.ceil(4 * width))
    k = torch.arange(-reach, reach + 1, dtype=torch.float64)
    return torch.softmax(-0.5 * (k / width).square(), 0)


def _smooth(losses: list[float]) -> torch.Tensor:
    weights = _weights(len(losses))
    # At the ends there are fewer neighbours, whose weights are to add up to 1 as well.
    rows = torch.stack([torch.tensor(losses, dtype=torch.float64), torch.ones(len(losses), dtype=torch.float64)])
    sums, shares = torch.nn.functional.conv1d(rows[:, None], weights[None, None], padding=len(weights) // 2)[:, 0]
    return sums / shares


def _suggest(rates: list[float], losses: list[float]) -> float | None:
    smooth = _smooth(losses)
    end = int(smooth.argmin())
    if end < 2:
        return None
    falling = smooth[: end + 1]
    start = smooth[: max(3, len(losses) // 10)].mean()
    # What chance makes of the smoothed losses: their scatter about the curve, of which smoothing leaves a part; and
    # what rounding does.
    scatter = (torch.tensor(losses[: end + 1], dtype=torch.float64) - falling).std()
    noise = scatter * _weights(len(losses)).norm() + torch.finfo(torch.float32).eps * start.abs()
    fall = start - falling[-1]
    if not fall > _CHANCE * noise:
        return None
    return rates[int((falling <= start - _FALLEN * fall).nonzero()[0])]
