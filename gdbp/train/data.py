"""Samples ready for training: split by a seed, standardised by the training set, held as tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gdbp._errors import InputError

from .readers import Table, infer_task, read_table

try:
    import numpy as np
except ImportError:  # read_table says so; everything that reads no data works without it
    np = None

__all__ = ["Data", "Pair", "load_data", "prepare", "split"]

Pair = tuple[torch.Tensor, torch.Tensor]
TASKS = ("classification", "regression")


@dataclass
class Data:
    """Three pairs ``(x, y)``, and what is needed to treat new samples alike.

    ``x`` is float32 (n, features), standardised. For classification ``y`` is int64 (n,), an index into
    ``class_names``; for regression it is float32 (n, 1), standardised: original = y * y_std + y_mean.
    """

    name: str
    task: str
    train: Pair
    validation: Pair
    test: Pair
    feature_names: list[str]
    target_name: str
    class_names: list[str]
    x_mean: torch.Tensor
    x_std: torch.Tensor
    y_mean: float = 0.0
    y_std: float = 1.0

    @property
    def features(self) -> int:
        return self.x_mean.numel()

    @property
    def outputs(self) -> int:
        return len(self.class_names) if self.task == "classification" else 1

    def to(self, device: torch.device | str) -> Data:
        """The same data with its three pairs on ``device``."""
        train, validation, test = (
            tuple(tensor.to(device) for tensor in pair) for pair in (self.train, self.validation, self.test)
        )
        return replace(self, train=train, validation=validation, test=test)


def load_data(source: str | Path, *, target: str | None = None, task: str | None = None, seed: int = 0) -> Data:
    """Reads, splits and standardises a data set.

    Args:
        source: ``digits``, ``breast-cancer``, ``diabetes`` (these come with scikit-learn), or a .csv or
            .npz file.
        target: the column of a .csv file to predict; default the last.
        task: ``classification`` or ``regression``; by default inferred: regression if the target is a number
            with more than 20 distinct values (100 if all are whole numbers).
        seed: of the split into 65 % training, 15 % validation and 20 % test samples.

    Raises:
        InputError: one sentence about what can't be used, and where it is.
    """
    if not isinstance(seed, int) or seed < 0:
        raise InputError(f"seed is {seed!r}; expected a whole number of at least 0")
    return prepare(read_table(source, target, task), task=task, seed=seed)


def prepare(table: Table, *, task: str | None = None, seed: int = 0) -> Data:
    """:func:`load_data` for a table that is already in memory."""
    distinct = np.unique(table.y)
    target = f"target {table.target_name!r} of {table.name!r}"
    task = task or table.task or infer_task(distinct)
    if task not in TASKS:
        raise InputError(f"task is {task!r}; expected {' or '.join(TASKS)}")
    if len(distinct) < 2:
        raise InputError(f"{target} is the same in all samples; there is nothing to learn")
    if task == "classification":
        if len(distinct) > len(table.y) // 2:
            raise InputError(
                f"{target} has {len(distinct)} distinct values in {len(table.y)} "
                "samples, too many for classes; choose another target, or task regression for numbers"
            )
        labels = np.searchsorted(distinct, table.y)
        class_names = table.class_names or [_class_name(value) for value in distinct.tolist()]
        strata, y = labels, torch.from_numpy(labels)
    else:
        if table.y.dtype.kind == "U":
            raise InputError(f"{target} holds words, such as {str(table.y[0])!r}; regression wants numbers")
        class_names = []
        # Blocks of about 20 neighbours in rank: each set then sees the whole range of the target.
        ranks = np.argsort(np.argsort(table.y, kind="stable"), kind="stable")
        strata = ranks * max(1, len(ranks) // 20) // len(ranks)
        y = torch.from_numpy(table.y.astype(np.float64)).unsqueeze(1)
        _check_scale(y, [target])

    parts = [torch.from_numpy(index) for index in split(strata, seed=seed)]
    x = torch.from_numpy(table.x)
    if any(len(index) == 0 for index in parts):
        raise InputError(
            f"{table.name!r} has {len(x)} samples, too few to split into training, validation and test sets; "
            "expected at least 4 for each class, or 20 for regression"
        )
    _check_scale(x, [f"column {name!r} of {table.name!r}" for name in table.feature_names])
    x_mean, x_std = _statistics(x[parts[0]], table.shared_scale)
    x = ((x - x_mean) / x_std).float()
    y_mean, y_std = 0.0, 1.0
    if task == "regression":
        mean, std = _statistics(y[parts[0]], False)
        y = ((y - mean) / std).float()
        y_mean, y_std = mean.item(), std.item()
    pairs = [(x[index], y[index]) for index in parts]
    names = (table.feature_names, table.target_name, class_names)
    return Data(table.name, task, *pairs, *names, x_mean, x_std, y_mean, y_std)


def split(strata: np.ndarray, *, seed: int = 0, validation=0.15, test=0.2) -> list[np.ndarray]:
    """Indices of the training, validation and test samples, in the same proportions within each stratum.

    Args:
        strata: (n,) integers: the class of each sample. Shares are rounded per class, and a class always
            keeps at least one training sample.
        seed: of the random choice; the same seed gives the same split on every machine.
        validation, test: the shares, of 1.
    """
    random = np.random.default_rng(seed)
    parts: tuple[list, list, list] = ([], [], [])
    for stratum in np.unique(strata):
        members = random.permutation(np.flatnonzero(strata == stratum))
        tests, validations = round(test * len(members)), round(validation * len(members))
        cuts = np.split(members, [len(members) - tests - validations, len(members) - tests])
        for part, cut in zip(parts, cuts, strict=True):
            part.append(cut)
    return [random.permutation(np.concatenate(part)) for part in parts]


def _check_scale(x: torch.Tensor, names: list[str]) -> None:
    """Whether float64 holds the squares of all values, and of their differences."""
    largest, spread = x.abs().amax(0), x.amax(0) - x.amin(0)
    for name, size, difference in zip(names, largest.tolist(), spread.tolist(), strict=True):
        if size > 1e150:
            raise InputError(f"{name} is too large to be standardised, as {size:.3g}; scale it down")
        if 0 < difference < 1e-150:
            raise InputError(f"{name} differs too little to be standardised, by {difference:.3g}; scale it up")


def _statistics(x: torch.Tensor, shared: bool) -> tuple[torch.Tensor, torch.Tensor]:
    # Of a constant like 0.1 rounding makes a deviation of 1e-17, by which other values must not be divided.
    std = torch.where(x.amax(0) > x.amin(0), x.std(0, correction=0), 0.0)
    if shared:  # a pixel that is almost always blank must not be blown up to the size of the others
        std = std.square().mean().sqrt().expand_as(std).clone()
    return x.mean(0), torch.where(std > 0, std, 1.0)


def _class_name(value) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
