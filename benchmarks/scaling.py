"""``python -m gdbp bench scaling``: how the cost grows, as exponents fitted to times at several sizes."""

import argparse
import math
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import environment, run, table
from benchmarks.cases import FAMILIES
from benchmarks.measure import measure
from benchmarks.work import Series
from gdbp._errors import InputError

add_arguments = run.add_measuring


def select(pattern: str = "", smoke: bool = False) -> list[Series]:
    """The series in whose title, such as "optim.adamw by threads", `pattern` occurs; a few tiny sizes where `smoke`."""
    families = [family for family in FAMILIES if hasattr(family, "series")]
    return [series for family in families for series in family.series(smoke) if pattern in series.title]


def fit(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float] | None:
    """Exponent k of seconds = c * sizes**k, and its standard error, by least squares in logarithms.

    None for less than three points, which any curve fits.
    """
    if len(sizes) < 3:
        return None
    x, y = ([math.log(value) for value in values] for values in (sizes, seconds))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / spread
    residuals = sum((b - mean_y - slope * (a - mean_x)) ** 2 for a, b in zip(x, y))
    return slope, math.sqrt(residuals / (len(x) - 2) / spread)


def exponents(series: Series, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each contender: the time of the smallest size, and the fit to the upper half of the sizes, where what a
    call costs is the smallest part. Threads are few, so all of them count."""
    first = 0 if series.of == "threads" else min(len(rows) // 2, max(0, len(rows) - 3))
    found = []
    for contender in rows[0]["contenders"]:
        times = [c["median"] for row in rows for c in row["contenders"] if c["name"] == contender["name"]]
        if len(times) != len(rows):  # it took part in some only
            continue
        fitted = fit(series.sizes[first:], times[first:])
        found.append(
            {
                "series": series.title,
                "of": series.of,
                "contender": contender["name"],
                "smallest": times[0],
                "from": series.sizes[first],
                "exponent": fitted and fitted[0],
                "error": fitted and fitted[1],
            }
        )
    return found


def sentence(found: dict[str, Any]) -> str:
    start = f"  {found['contender']:<16} {table.duration(found['smallest']):>8} at the smallest"
    if found["exponent"] is None:
        return f"{start}; too few sizes for an exponent"
    return f"{start}; from {found['from']} on ~ {found['of']}^({found['exponent']:.2f} +- {found['error']:.2f})"


def _measure(series: Series, options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    threads = torch.get_num_threads()
    try:
        for size in series.sizes:
            if series.of == "threads":
                torch.set_num_threads(size)
            row = measure(series.case(size), run.setup(options), options.budget, environment.heap())
            row["scaling"] = {"series": series.title, "of": series.of, "size": size}
            rows.append(row)
            print(table.terminal(row), flush=True)
    finally:
        torch.set_num_threads(threads)
    return rows


def execute(options: argparse.Namespace) -> int:
    """Returns 0, or 1 where a result of ours was wrong."""
    chosen = select(options.pattern, options.size == "smoke")
    if not chosen:
        titles = ", ".join(series.title for series in select())
        raise InputError(f"no series has {options.pattern!r} in its title; there are {titles}")
    run.check_device(options.device)
    if options.heap == "kept" and environment.heap() != "kept":
        return run.with_kept_heap(options.argv)
    report = run.begin(options)
    report["series"] = []
    started = time.perf_counter()
    for series in chosen:
        print(series.title)
        rows = _measure(series, options)
        found = exponents(series, rows)
        print("\n".join(map(sentence, found)), flush=True)
        report["rows"] += rows
        report["series"] += found
    return run.finish(report, options, started)
