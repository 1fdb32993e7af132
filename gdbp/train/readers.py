"""From a name or a file to a table of numbers; every complaint names the place in the file."""

from __future__ import annotations

import csv
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from gdbp._errors import InputError, require

try:
    import numpy as np
except ImportError:  # read_table says so; everything that reads no data works without it
    np = None

__all__ = ["BUILTIN", "Table", "read_table"]

BUILTIN = ("digits", "breast-cancer", "diabetes")


@dataclass
class Table:
    """Samples as read: ``x`` (n, features) float64, ``y`` (n,) float64, or str for labels in words."""

    name: str
    x: np.ndarray
    y: np.ndarray
    feature_names: list[str]
    target_name: str = "target"
    class_names: list[str] = field(default_factory=list)  # when labels 0, 1, ... stand for words
    task: str | None = None  # None: to be inferred from y
    shared_scale: bool = False  # the inputs are in one unit, as the pixels of an image are


def read_table(source: str, target: str | None = None, task: str | None = None) -> Table:
    """Reads a built-in set (``digits``, ``breast-cancer``, ``diabetes``), a ``.csv`` or a ``.npz`` file.

    Args:
        source: one of the names, or a path. A CSV file has one sample a line, and may start with a line of
            column names (without one the columns are ``column_1``, ``column_2``, ...); it may be separated
            by commas, semicolons or tabs. An NPZ file holds ``x`` (n, ...) of numbers and ``y`` (n,).
        target: the CSV column to predict; default the last.
        task: ``regression`` makes a word in the target column an error instead of a class.

    Raises:
        InputError: the file is missing, empty, malformed, or holds what is not a finite number.
    """
    require("numpy")
    suffix = Path(source).suffix.lower()
    if source in BUILTIN:
        reader = _read_builtin
    elif suffix == ".csv":
        reader = _read_csv
    elif suffix == ".npz":
        reader = _read_npz
    else:
        raise InputError(f"data {source!r} is unknown; expected {', '.join(BUILTIN)}, or a .csv or .npz file")
    if target is not None and reader is not _read_csv:
        raise InputError(f"target {target!r} names a column of a .csv file; leave it out for {source!r}")
    try:
        table = _read_csv(source, target, task) if reader is _read_csv else reader(source)
    except FileNotFoundError:
        raise InputError(f"data file {source!r} does not exist; check the path") from None
    except OSError as error:
        raise InputError(f"data file {source!r} can't be read: {error.strerror or error}") from None
    if table.x.size == 0:
        raise InputError(f"{source!r} holds no data: {len(table.x)} samples of {table.x.shape[1]} inputs each")
    return table


def _read_builtin(source: str) -> Table:
    require("sklearn")
    from sklearn import datasets

    if source == "diabetes":
        bunch = datasets.load_diabetes(scaled=False)
        features = list(bunch.feature_names)
        return Table(source, bunch.data, bunch.target, features, "progression", task="regression")
    bunch = datasets.load_digits() if source == "digits" else datasets.load_breast_cancer()
    names = [str(name) for name in bunch.target_names]
    features = [str(name) for name in bunch.feature_names]
    y = bunch.target.astype(np.float64)
    return Table(source, bunch.data, y, features, "class", names, "classification", source == "digits")


def _read_csv(source: str, target: str | None, task: str | None) -> Table:
    lines, names, has_names = _csv_lines(source)
    if target is None:
        index = len(names) - 1
    elif names.count(target) == 1:
        index = names.index(target)
    elif target in names:
        raise InputError(f"target {target!r} names more than one column of {source!r}; rename all but one")
    else:
        raise InputError(f"target {target!r} is not a column of {source!r}, which has {', '.join(names)}")
    if len(names) < 2:
        raise InputError(f"{source!r} has one column only; expected input columns beside the target")
    inputs = [column for column in range(len(names)) if column != index]
    x = np.empty((len(lines), len(inputs)))
    for position, column in enumerate(inputs):
        x[:, position] = _numbers(source, lines, names, column)
    labels = [cells[index] for _, cells in lines]
    is_number = list(map(_is_number, labels))
    _check_first(source, lines[0][0], labels, is_number, has_names)
    if task == "regression" or all(is_number):
        y = _numbers(source, lines, names, index)
    else:
        y = np.array([_label(source, line, cells[index], names[index]) for line, cells in lines])
    return Table(Path(source).stem, x, y, [names[column] for column in inputs], names[index])


def _check_first(source: str, line: int, labels: list[str], is_number: list[bool], has_names: bool) -> None:
    """Whether the first sample's target is like the others', and no column's name."""
    counts = Counter(labels)
    alone = not has_names and counts[labels[0]] == 1 and all(counts[label] > 1 for label in labels[1:])
    if len(labels) > 1 and not is_number[0] and (all(is_number[1:]) or alone):
        others = "a number" if all(is_number[1:]) else "one of several samples' classes"
        raise InputError(
            f"{source!r} line {line} has {labels[0]!r} where all others have {others}; if that line holds names, "
            "expected none of them to be a number"
        )


def _csv_lines(source: str) -> tuple[list[tuple[int, list[str]]], list[str], bool]:
    """The samples as (line number, cells), the column names, and whether the file has these."""
    try:
        with open(source, newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=max(",;\t", key=first.count), skipinitialspace=True)
            lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if any(cells)]
    except UnicodeDecodeError:
        raise InputError(f"{source!r} is not UTF-8 text; save it as CSV (UTF-8)") from None
    except csv.Error as error:
        raise InputError(f"{source!r} is not a readable CSV file: {error}") from None
    if not lines:
        raise InputError(f"{source!r} is empty; expected one sample a line")
    header = lines[0][1]
    has_names = not any(map(_is_number, header))
    if not has_names:
        names = [f"column_{i + 1}" for i in range(len(header))]
    else:
        names, lines = header, lines[1:]
    if not lines:
        raise InputError(f"{source!r} has column names but no samples; expected one sample a line")
    for line, cells in lines:
        if len(cells) != len(names):
            raise InputError(f"{source!r} line {line} has {len(cells)} cells; expected {len(names)}, as in the first")
    return lines, names, has_names


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _label(source: str, line: int, cell: str, name: str) -> str:
    if not cell:
        raise InputError(f"column {name!r} of {source!r} is empty in line {line}; fill it in or drop the line")
    return cell


def _numbers(source: str, lines: list, names: list[str], column: int) -> np.ndarray:
    values = np.empty(len(lines))
    for row, (line, cells) in enumerate(lines):
        cell = _label(source, line, cells[column], names[column])
        try:
            values[row] = float(cell)
        except ValueError:
            raise InputError(
                f"column {names[column]!r} of {source!r} is not a number in line {line}: {cell!r}; "
                "write it as a number or drop the column"
            ) from None
        if not math.isfinite(values[row]):
            raise InputError(
                f"column {names[column]!r} of {source!r} is {cell} in line {line}; expected a finite number: "
                "fill the cell in or drop the line"
            )
    return values


def _read_npz(source: str) -> Table:
    if Path(source).is_file() and Path(source).stat().st_size == 0:
        raise InputError(f"{source!r} is empty; expected arrays x and y, as numpy.savez writes them")
    try:
        with np.load(source, allow_pickle=False) as archive:
            missing = [name for name in ("x", "y") if name not in archive.files]
            if missing:
                raise InputError(
                    f"{source!r} has no array {' and no array '.join(missing)}; expected x (samples, "
                    f"features) and y (samples), found {', '.join(archive.files) or 'nothing'}"
                )
            x, y = archive["x"], archive["y"]
    except (InputError, OSError):
        raise
    except Exception:  # zipfile, zlib and numpy each have their own errors for a damaged archive
        raise InputError(
            f"{source!r} is not a readable NPZ file of numbers and words; write it with numpy.savez"
        ) from None
    if x.ndim < 2 or x.dtype.kind not in "fiub":
        expected = "numbers of shape (samples, features)"
        raise InputError(f"array x of {source!r} is {x.dtype} {x.shape}; expected {expected}")
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.shape != x.shape[:1] or y.dtype.kind not in "fiubU":
        expected = f"numbers or words of shape {x.shape[:1]}"
        raise InputError(f"array y of {source!r} is {y.dtype} {y.shape}; expected {expected}")
    x = x.reshape(len(x), math.prod(x.shape[1:])).astype(np.float64)
    y = y if y.dtype.kind == "U" else y.astype(np.float64)
    for name, array in (("x", x), ("y", y)):
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            where = ", ".join(str(i) for i in np.argwhere(~np.isfinite(array))[0])
            raise InputError(f"array {name} of {source!r} is not finite at [{where}]; fill in or drop that sample")
    return Table(Path(source).stem, x, y, [f"x{i}" for i in range(x.shape[1])], "y")
