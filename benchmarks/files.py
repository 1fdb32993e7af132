"""Files of results: reading, writing, and where those of this repository lie."""

import csv
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT
from gdbp._errors import InputError

Report = dict[str, Any]

RESULTS = ROOT / "benchmarks" / "results"

COLUMNS = (
    "family", "case", "size", "dtype", "device", "contender", "median_s", "p20_s", "p80_s", "samples", "gdbp_ratio",
    "gb_per_s", "tflop_per_s", "share_of_limit", "memory_bytes", "ulp", "correct", "noisy",
    "machine", "threads", "heap", "torch", "commit", "date",
)  # fmt: skip


# What reading a report takes for granted.
_ENVIRONMENT = {"device", "cpu", "instruction_set", "threads", "heap", "torch", "gdbp", "gpu", "commit", "date"}
_ROW = {"family", "case", "size", "dtype", "device", "contenders", "best", "ratio", "limit", "bytes", "flops", "goal"}
_CONTENDER = {"name", "median", "p20", "p80", "samples", "ulp", "correct", "noisy"}


def load(path: Path) -> Report:
    """Raises InputError for a file that `run` did not write."""
    try:
        report = json.loads(path.read_text())
        rows = report["rows"]
        dicts = [(_ENVIRONMENT, report["environment"]), *((_ROW, row) for row in rows)]
        dicts += [(_CONTENDER, contender) for row in rows for contender in row["contenders"]]
        if not (all(keys <= each.keys() for keys, each in dicts) and all(row["contenders"] for row in rows)):
            raise KeyError
        for row in rows:  # once, one that named nothing but a peer was written, too
            if row["goal"] and not row["goal"]["text"]:
                row["goal"] = None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path} is no result; expected a file that 'bench run --json' wrote") from None
    return report


def write(path: Path, text: str) -> None:
    """Makes the folder too; raises InputError where that can't be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None


def dump(report: Report) -> str:
    return json.dumps(report, indent=1) + "\n"


def machine(environment: dict[str, Any]) -> str:
    """The folder for results from there: "cpu", or the GPU's name as in "nvidia-h100-80gb-hbm3"."""
    gpu = environment["gpu"]
    return re.sub(r"[^a-z0-9]+", "-", gpu["name"].lower()).strip("-") if gpu else "cpu"


def place(report: Report, folder: Path = RESULTS) -> Path:
    """Where `run --save` puts a report: under its machine, named after date and commit, and a heap that was kept."""
    environment = report["environment"]
    commit = environment["commit"] or "no-commit"
    changed = "-changed" if commit.endswith("+") else ""
    kept = "-kept" if environment["heap"] == "kept" else ""
    name = f"{environment['date'][:10]}-{commit[:12].rstrip('+')}{changed}{kept}.json"
    return folder / machine(environment) / name


def committed(folder: Path = RESULTS) -> dict[str, Report]:
    """All reports of the CPU, by name, and the newest one of a GPU, if any, under their folders' and files' names."""
    # A folder of anything else has no GPU to show.
    others = [path for path in sorted(folder.glob("*/*.json")) if path.parent.name != "cpu"]
    gpus = {path: load(path) for path in others if '"multiprocessors"' in path.read_text()}
    newest = sorted(gpus, key=lambda path: gpus[path]["environment"]["date"])[-1:]
    chosen = [*sorted(folder.glob("cpu/*.json")), *newest]
    return {f"{path.parent.name}-{path.stem}": gpus.get(path) or load(path) for path in chosen}


def as_csv(report: Report) -> str:
    """A line for each contender of each row; empty where there is no figure."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    writer.writerows(_lines(report))
    return text.getvalue()


def _lines(report: Report) -> Iterable[list[Any]]:
    env = report["environment"]
    where = [env["gpu"]["name"] if env["gpu"] else env["cpu"], env["threads"], env["heap"], env["torch"]]
    where += [env["commit"], env["date"]]
    for row in report["rows"]:
        ours = row["contenders"][0]["median"]
        for c in row["contenders"]:
            seconds, limit = c["median"], row["limit"]
            yield [
                *(row[key] for key in COLUMNS[:5]),
                *(c[key] for key in ("name", "median", "p20", "p80", "samples")),
                seconds / ours,
                row["bytes"] / seconds * 1e-9 if row["bytes"] else None,
                row["flops"] / seconds * 1e-12 if row["flops"] else None,
                limit["seconds"] / seconds if limit else None,
                *(c.get(key) for key in ("memory", "ulp", "correct", "noisy")),
                *where,
            ]
