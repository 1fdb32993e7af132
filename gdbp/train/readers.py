"""From a name or a file to a table of numbers; every complaint names the place in the file."""

from __future__ import annotations

import csv
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from gdbp._errors import InputError, require

try:
    import numpy as np
except ImportError:  # read_table says so; everything that reads no data works without it
    np = None

__all__ = ["BUILTIN", "Table", "infer_task", "read_table"]

BUILTIN = ("digits", "breast-cancer", "diabetes")


@dataclass
class Table:
    """Samples as read: ``x`` (n, features) float64, ``y`` (n,) of numbers, or str for labels in words."""

    name: str
    x: np.ndarray
    y: np.ndarray
    feature_names: list[str]
    target_name: str = "target"
    class_names: list[str] = field(default_factory=list)  # when labels 0, 1, ... stand for words
    task: str | None = None  # None: to be inferred from y
    shared_scale: bool = False  # the inputs are in one unit, as the pixels of an image are


def read_table(source: str | Path, target: str | None = None, task: str | None = None) -> Table:
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
    if not isinstance(source, (str, Path)):
        raise InputError(f"data is {source!r}; expected {', '.join(BUILTIN)}, or the path of a .csv or .npz file")
    source = str(source)
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
        if "\0" in source:  # no file is called so, and each reader would say it in its own way
            raise FileNotFoundError
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
    return Table(source, bunch.data, bunch.target, features, "class", names, "classification", source == "digits")


def _read_csv(source: str, target: str | None, task: str | None) -> Table:
    lines, names, has_names = _csv_lines(source)
    if target is None:
        index = len(names) - 1
        if not names[index]:
            raise InputError(f"the last column of {source!r} has no name; name the target column, or drop the last one")
    elif names.count(target) == 1:
        index = names.index(target)
    elif target in names:
        raise InputError(f"target {target!r} names more than one column of {source!r}; rename all but one")
    else:
        raise InputError(f"target {target!r} is not a column of {source!r}, which has {', '.join(names)}")
    if len(names) < 2:
        raise InputError(
            f"{source!r} has one column only; expected input columns beside the target, separated by commas, "
            "semicolons or tabs"
        )
    inputs = [column for column in range(len(names)) if column != index]
    x = np.empty((len(lines), len(inputs)))
    for position, column in enumerate(inputs):
        x[:, position] = _numbers(source, lines, names, column)
        counted = len(lines) > 1 and np.array_equal(x[:, position], x[0, position] + np.arange(len(lines)))
        if counted and not names[column]:
            raise InputError(
                f"column {column + 1} of {source!r} has no name and numbers the rows, from which nothing should be "
                "learned; drop it (pandas: to_csv(index=False)), or give it a name to learn from it"
            )
    labels = [_label(source, line, cells[index], names[index]) for line, cells in lines]
    _check_target(source, lines, labels, has_names)
    if task == "regression" or all(map(_is_number, labels)):
        y = _numbers(source, lines, names, index)
        if task != "regression":
            y = _exact(labels, y)
    else:
        y = np.array(labels)
    return Table(Path(source).stem, x, y, [names[column] for column in inputs], names[index])


def infer_task(distinct: np.ndarray) -> str:
    """What a target of these distinct values is for."""
    if distinct.dtype.kind == "U":
        return "classification"
    whole = bool((distinct == np.floor(distinct)).all())
    return "regression" if len(distinct) > (100 if whole else 20) else "classification"


def _exact(labels: list[str], values: np.ndarray) -> np.ndarray:
    """The labels as they are where float64 would make one of several: large whole numbers, and such as 07 and 7."""
    if not all(re.fullmatch(r"[+-]?\d+", label) for label in labels):
        return values
    if any(re.match(r"[+-]?0\d", label) for label in labels):
        return np.array(labels)
    try:
        return np.array([int(label) for label in labels], dtype=np.int64)
    except OverflowError:
        return np.array(labels)


def _check_target(source: str, lines: list, labels: list[str], has_names: bool) -> None:
    """Whether every sample's target is like the others', and the first one no column's name."""
    counts = Counter(labels)
    words = [label for label in counts if not _is_number(label)]
    numbers = [float(label) for label in labels if _is_number(label)]
    if 2 * len(numbers) >= len(labels):
        others = "others have a number"
        if infer_task(np.unique(numbers)) == "classification":  # a word that occurs again may be a class, too
            words = [word for word in words if counts[word] == 1]
    else:
        others = "all others have one of several samples' classes"
        once = [label for label, count in counts.items() if count == 1]
        words = once if once == words[:1] == labels[:1] != labels and not has_names else []
    if words:
        place = labels.index(words[0])
        remedy = "write it as a number or drop the line"
        if place == 0 and not has_names:
            remedy = "if that line holds names, expected none of them to be a number"
        raise InputError(f"{source!r} line {lines[place][0]} has {words[0]!r} where {others}; {remedy}")


def _csv_lines(source: str) -> tuple[list[tuple[int, list[str]]], list[str], bool]:
    """The samples as (line number, cells), the column names, and whether the file has these."""
    lines: list[tuple[int, list[str]]] = []
    start = 1  # line of a sample; one with line ends in quotes goes on after it
    try:
        with open(source, newline="", encoding="utf-8-sig") as file:
            first = next((line for line in file if line.strip()), "")
            file.seek(0)
            reader = csv.reader(file, delimiter=max(",;\t", key=first.count), skipinitialspace=True, strict=True)
            for cells in reader:
                if len(cells) > 1 or any(map(str.strip, cells)):
                    lines.append((start, [cell.strip() for cell in cells]))
                start = reader.line_num + 1
    except UnicodeDecodeError:
        raise InputError(f"{source!r} is not UTF-8 text; save it as CSV (UTF-8)") from None
    except csv.Error as error:
        raise InputError(
            f"{source!r} line {start} is no readable CSV ({error}); close or double a quote that starts there"
        ) from None
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
            found = f"{len(cells)} cell{'s' * (len(cells) != 1)}"
            raise InputError(f"{source!r} line {line} has {found}; expected {len(names)}, as in the first")
    return lines, names, has_names


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _label(source: str, line: int, cell: str, name: str) -> str:
    if not cell or cell.lower().lstrip("+-") == "nan":
        raise InputError(
            f"column {name!r} of {source!r} is {cell or 'empty'} in line {line}; fill it in or drop the line"
        )
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
    if x.ndim < 2 or not np.can_cast(x.dtype, np.float64):  # which integers can, by numpy's rules
        expected = "numbers of at most 64 bits and of shape (samples, features)"
        raise InputError(f"array x of {source!r} is {x.dtype} {x.shape}; expected {expected}")
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.shape != x.shape[:1] or not (y.dtype.kind == "U" or np.can_cast(y.dtype, np.float64)):
        expected = f"numbers of at most 64 bits, or words, of shape {x.shape[:1]}"
        raise InputError(f"array y of {source!r} is {y.dtype} {y.shape}; expected {expected}")
    x = x.reshape(len(x), math.prod(x.shape[1:])).astype(np.float64)
    if y.dtype.kind in "bf":  # integers stay what they are, for float64 does not tell large ones apart
        y = y.astype(np.float64)
    for name, array in (("x", x), ("y", y)):
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            where = ", ".join(str(i) for i in np.argwhere(~np.isfinite(array))[0])
            raise InputError(f"array {name} of {source!r} is not finite at [{where}]; fill in or drop that sample")
    return Table(Path(source).stem, x, y, [f"x{i}" for i in range(x.shape[1])], "y")
