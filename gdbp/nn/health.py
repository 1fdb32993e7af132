"""What one read of all gradients says about a network's training."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gdbp import _load
from gdbp._table import format_table
from gdbp.nn._arguments import nonnegative

COLUMNS = ("norm", "largest", "mean", "nans", "infinities", "zeros")
# Where a rule of thumb begins to worry: see GradientHealth.
_DEAD, _VANISHING, _EXPLODING = 0.99, 1e-7, 1e3
_SLOW, _FAST = 1e-5, 1e-1


@dataclass(frozen=True)
class GradientHealth:
    """Statistics of each parameter's gradient, on the gradients' device, not waited for until they are printed.

    Attributes:
        names: of the parameters that have a gradient, n of them, in the model's order.
        numels: number of elements of each.
        norm, largest, mean: float64 (n,): 2-norm, largest absolute value (of those that are not NaN), mean.
        nans, infinities, zeros: float64 (n,): how many elements.
        update_ratio: float64 (n,) ``lr * norm / norm of the weights``, or None without ``lr``. Around 1e-3 a
            network learns well with plain gradient descent.

    ``str()`` is a table with a verdict for each parameter, :meth:`verdicts` these alone.
    """

    names: tuple[str, ...]
    numels: tuple[int, ...]
    norm: Tensor
    largest: Tensor
    mean: Tensor
    nans: Tensor
    infinities: Tensor
    zeros: Tensor
    update_ratio: Tensor | None = None

    def verdicts(self) -> dict[str, str]:
        """In words, for each parameter that something is wrong with: what, and what usually helps. Waits for
        the device."""
        return {row.name: verdict for row in self._rows() if (verdict := row.verdict())}

    def _rows(self) -> "list[_Row]":
        numbers = torch.stack([getattr(self, column) for column in COLUMNS], 1).tolist() if self.names else []
        ratios = [None] * len(self.names) if self.update_ratio is None else self.update_ratio.tolist()
        return [_Row(*row) for row in zip(self.names, self.numels, numbers, ratios)]

    def __str__(self) -> str:
        head = ["parameter", "elements", "norm", "largest", "mean", "NaN", "inf", "zero"]
        if self.update_ratio is not None:
            head.append("update/weight")
        rows = self._rows()
        table = [[*head, "verdict"], *([*row.cells(), row.verdict() or "ok"] for row in rows)]
        return format_table(table, range(1, len(head)))


@dataclass(frozen=True)
class _Row:
    name: str
    numel: int
    numbers: Sequence[float]
    update_ratio: float | None

    def cells(self) -> list[str]:
        norm, largest, mean, *counts = self.numbers
        shares = [f"{c / max(1, self.numel):.0%}" if c else "0" for c in counts[2:]]
        ratio = [] if self.update_ratio is None else [f"{self.update_ratio:.1e}"]
        numbers = [f"{x:.2e}" for x in (norm, largest, mean)]
        return [self.name, str(self.numel), *numbers, *(f"{c:.0f}" for c in counts[:2]), *shares, *ratio]

    def verdict(self) -> str:
        norm, _, _, nans, infinities, zeros = self.numbers
        typical = norm / max(1, self.numel) ** 0.5
        ratio = self.update_ratio
        if nans or infinities:
            return "not finite: lower the rate, clip the gradients, look for log(0) and 0/0 in the loss"
        if self.numel and zeros / self.numel > _DEAD:
            return "dead: leaky ReLU or He initialisation, a lower rate; or the loss does not depend on it"
        if typical > _EXPLODING or (ratio is not None and ratio > _FAST):
            return "explodes: clip the gradients, lower the rate, add batch norm"
        if self.numel and (typical < _VANISHING or (ratio is not None and ratio < _SLOW)):
            return "vanishes: ReLU in place of sigmoid or tanh, He initialisation, batch norm, or a higher rate"
        return ""


def seen_in(health: Tensor, names: Sequence[str]) -> list[str]:
    """For each gradient that is not finite, in words: its name, and what is in it."""
    counts = health[:, 3:5].tolist()
    return [f"{name}: {nans:.0f} NaN, {infinities:.0f} inf" for name, (nans, infinities) in zip(names, counts)
            if nans or infinities]  # fmt: skip


@torch.no_grad()
def gradient_health(
    model: torch.nn.Module | Iterable[tuple[str, Tensor]], *, lr: float | None = None
) -> GradientHealth:
    """Statistics of all gradients of a model, in one read of them and without waiting for the device.

    Args:
        model: a module, or pairs of name and parameter. Parameters without a gradient are left out.
        lr: the learning rate, at least 0; with it the weights are read too, for the size of a step of plain gradient
            descent relative to that of the weights.

    ``print(gradient_health(model))`` shows a table that says which layers vanish, explode or are dead, and what
    helps. A DTensor's numbers are those of all ranks, each of which must call this.
    """
    lr = None if lr is None else nonnegative("lr", lr)
    if not isinstance(model, torch.nn.Module | Iterable):
        raise TypeError(f"model is of type {type(model).__name__}; expected a module, or pairs of name and parameter")
    named = list(model.named_parameters() if isinstance(model, torch.nn.Module) else model)
    for pair in named:
        if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[1], Tensor):
            found = [type(x).__name__ for x in pair] if isinstance(pair, tuple) else f"a {type(pair).__name__}"
            raise TypeError(f"model holds {found}; expected a module, or pairs of name and parameter")
    pairs = [(name, p) for name, p in named if p.grad is not None]
    numbers = _read([p.grad for _, p in pairs])
    ratio = None
    if lr is not None:
        ratio = lr * numbers[0] / _read([p.detach() for _, p in pairs])[0]
    names, numels = tuple(str(name) for name, _ in pairs), tuple(p.grad.numel() for _, p in pairs)
    return GradientHealth(names, numels, *numbers, ratio)


def _read(tensors: list[Tensor]) -> list[Tensor]:
    """COLUMNS, each (n,) in float64."""
    read = _load._C.Gradients.of(tensors, True) if _load.available and not torch.compiler.is_compiling() else None
    if read is not None:
        return list(read.health().unbind(1))
    if not tensors:
        return [torch.zeros(0, dtype=torch.float64) for _ in COLUMNS]
    rows = [torch.stack(_read_one(t)) for t in tensors]
    return list(torch.stack([row.to(rows[0].device) for row in rows]).unbind(1))


def _read_one(tensor: Tensor) -> list[Tensor]:
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    x = (tensor.to_dense() if tensor.is_sparse else tensor).flatten()
    size = x.abs().double()
    nan = size.isnan()
    largest = torch.cat((torch.where(nan, 0, size), size.new_zeros(1))).amax()
    mean = x.real.double().sum() / max(1, x.numel())
    counts = [c.sum().double() for c in (nan, size.isinf(), size == 0)]
    return [torch.linalg.vector_norm(size), largest, mean, *counts]
