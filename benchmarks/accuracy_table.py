"""``python -m benchmarks.accuracy_table``: gdbp's error and torch's, against float64, where digits are at stake.

Prints the table; with ``--write`` it is written to ``benchmarks/results/accuracy/losses.json`` and ``losses.md``.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment
from benchmarks.accuracy_cases import entries, error
from benchmarks.table import DTYPES

FOLDER = environment.ROOT / "benchmarks" / "results" / "accuracy"
COLUMNS = ("case", "dtype", "result", "gdbp", "torch", "rounding")
# What an error depends on.
KEPT = ("cpu", "instruction_set", "torch_instruction_set", "torch", "commit", "date")
# Beyond this, in roundings of the dtype, a result has lost digits that could be had.
LOST = 64

Row = dict[str, Any]


def rows() -> list[Row]:
    """A row for each result; errors that are not finite are the strings "nan" and "inf"."""
    made = []
    for entry in entries():
        exact = entry.exact()
        for i, result in enumerate(entry.results):
            errors = [error(run()[i], exact[i]) for run in entry.run]
            gdbps, torchs = (e if math.isfinite(e) else str(e) for e in errors)
            # More than half a unit where the exact result is among the dtype's smallest numbers.
            rounded = error(torch.as_tensor(exact[i], dtype=torch.float64).to(entry.dtype), exact[i])
            rounding = max(torch.finfo(entry.dtype).eps / 2, rounded if math.isfinite(rounded) else 0)
            made.append({
                "case": entry.case, "dtype": str(entry.dtype).removeprefix("torch."), "result": result,
                "gdbp": gdbps, "torch": torchs, "rounding": rounding,
            })  # fmt: skip
    return made


def is_lost(row: Row, who: str) -> bool:
    return not float(row[who]) <= LOST * row["rounding"]


def _cell(row: Row, who: str) -> str:
    value = float(row[who])
    text = "NaN" if math.isnan(value) else "infinite" if math.isinf(value) else f"{value:.1e}"
    return f"**{text}**" if is_lost(row, who) else text


def markdown(report: dict[str, Any]) -> str:
    env = report["environment"]
    lines = [
        "# Errors of losses and norms",
        "",
        f"{env['cpu']}, {env['instruction_set']}; torch {env['torch']}; {env['date'][:10]}. Written by "
        "`python -m benchmarks.accuracy_table --write`.",
        "",
        "Errors are relative to the exact result: its 2-norm, of a tensor. The last column is what rounding the exact "
        f"result to the dtype may cost. **Bold**: more than {LOST} times that.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---|---|---|--:|--:|--:|",
    ]
    for row in report["rows"]:
        cells = (row["case"], DTYPES[row["dtype"]], row["result"], _cell(row, "gdbp"), _cell(row, "torch"))
        lines.append(f"| {' | '.join(cells)} | {row['rounding']:.1e} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 where a result of ours has lost its digits."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy_table", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"into {FOLDER.relative_to(environment.ROOT)}/")
    parser.add_argument("--folder", type=Path, default=FOLDER, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    described = environment.describe("cpu")
    report = {"environment": {key: described[key] for key in KEPT}, "rows": rows()}
    text = markdown(report)
    print(text, end="")
    if options.write:
        options.folder.mkdir(parents=True, exist_ok=True)
        (options.folder / "losses.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
        (options.folder / "losses.md").write_text(text)
    return int(any(is_lost(row, "gdbp") for row in report["rows"]))


if __name__ == "__main__":
    sys.exit(main())
