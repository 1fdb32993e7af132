"""Rows of results as a table, on the terminal and in Markdown."""

import itertools
from collections.abc import Iterable
from typing import Any

from benchmarks.memory import RESOLUTION
from benchmarks.work import OURS

Row = dict[str, Any]

# Column, width on the terminal (119 with two spaces between), whether figures are aligned right.
COLUMNS = (
    ("case", 16, False),
    ("size", 13, False),
    ("dtype", 5, False),
    ("gdbp", 7, True),
    ("p20-p80", 11, True),
    ("best peer", 14, False),
    ("time", 7, True),
    ("ratio", 6, True),
    ("goal", 11, False),
    ("limit", 5, True),
    ("ulp", 4, True),
)
NOTES = "notes"
# What a short table leaves out, where all rows stand elsewhere; what is wrong or noise is said in any.
LONG, WARNINGS = ("p20-p80", "ulp"), ("WRONG", "NOISY")
DTYPES = {"float64": "f64", "float32": "f32", "bfloat16": "bf16", "float16": "f16"}
UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))


def _unit(seconds: float) -> tuple[float, str]:
    return next((unit for unit in UNITS if seconds >= unit[0]), UNITS[-1])


def figure(value: float) -> str:
    """Three digits that count."""
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


def duration(seconds: float) -> str:
    scale, name = _unit(seconds)
    return f"{figure(seconds / scale)} {name}"


def storage(count: float) -> str:
    """Bytes, in powers of 1000."""
    power = 3 if count >= 1e9 else 2
    return f"{figure(count / 1000**power)} {'MB' if power == 2 else 'GB'}"


def _ulp(value: float | None) -> str:
    if value is None:
        return "inf"
    return f"{value:.1f}" if value < 100 else f"{value:.0f}" if value < 1e5 else f"{value:.0e}"


def rate(row: Row) -> str | None:
    """What we reach, in GB/s or GFLOP/s."""
    seconds = row["contenders"][0]["median"]
    if row["flops"]:
        return f"{figure(row['flops'] / seconds * 1e-9)} GFLOP/s"
    return f"{figure(row['bytes'] / seconds * 1e-9)} GB/s" if row["limit"] and row["bytes"] else None


def cells(row: Row) -> list[str]:
    """One cell for each of COLUMNS."""
    ours = row["contenders"][0]
    best = next((c for c in row["contenders"] if c["name"] == row["best"]), None)
    scale, _ = _unit(ours["median"])
    goal = row["goal"]
    return [
        row["case"],
        row["size"],
        DTYPES.get(row["dtype"], row["dtype"]),
        duration(ours["median"]),
        f"{figure(ours['p20'] / scale)}-{figure(ours['p80'] / scale)}",
        best["name"] if best else "none correct",
        duration(best["median"]) if best else "",
        f"{figure(row['ratio'])}x" if best else "",
        f"{goal['text']} {'met' if goal['met'] else 'no'}" if goal else "",
        f"{row['limit']['seconds'] / ours['median']:.0%}" if row["limit"] else "",
        _ulp(ours["ulp"]),
    ]


def notes(row: Row) -> list[str]:
    """What the cells leave out: the other peers, what is wrong, what is noise, the rate."""
    said = []
    if not row["contenders"][0]["correct"]:
        said.append("OUR RESULT IS WRONG")
    for peer in row["contenders"][1:]:
        if not peer["correct"]:
            said.append(f"{peer['name']} {duration(peer['median'])} is WRONG ({_ulp(peer['ulp'])} ulp)")
        elif peer["name"] == row["best"]:
            said.append(f"{peer['name']} {_ulp(peer['ulp'])} ulp")
        else:
            said.append(f"{peer['name']} {duration(peer['median'])}")
    if reached := rate(row):
        said.append(reached)
    if row["limit"]:
        said.append(f"limit: {row['limit']['what']}")
    needed = {c["name"]: c["memory"] for c in row["contenders"] if c["name"] in (OURS, row["best"]) and c.get("memory")}
    if needed.get(OURS, 0) >= RESOLUTION:
        others = [f"{name} {storage(count)}" for name, count in needed.items() if name != OURS]
        said.append(", ".join([f"memory {storage(needed[OURS])}", *others]))
    if row["goal"] and row["goal"]["ratio"] and row["goal"]["peer"] != row["best"]:
        said.append(f"goal against {row['goal']['peer']}")
    if noisy := [c["name"] for c in row["contenders"] if c["noisy"] and c["name"] in (OURS, row["best"])]:
        said.append(f"NOISY: {', '.join(noisy)}")
    return said


def absent(rows: Iterable[Row]) -> list[str]:
    """A sentence for each peer that was asked for and did not take part."""
    reasons: dict[tuple[str, str], int] = {}
    for row in rows:
        for pair in row.get("absent", {}).items():
            reasons[pair] = reasons.get(pair, 0) + 1
    return [f"{peer} in {count} row{'s' * (count != 1)}: {why}" for (peer, why), count in reasons.items()]


def verdicts(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows that are ahead of the best peer, behind it, and without one, and that meet or miss their goal."""
    compared = [row for row in rows if row["ratio"] is not None]
    goals = [row for row in rows if row["goal"]]
    return {
        "ahead": [row for row in compared if row["ratio"] >= 1],
        "behind": sorted((row for row in compared if row["ratio"] < 1), key=lambda row: row["ratio"]),
        "alone": [row for row in rows if row["ratio"] is None],
        "met": [row for row in goals if row["goal"]["met"]],
        "missed": [row for row in goals if not row["goal"]["met"]],
    }


def summary(rows: list[Row]) -> str:
    found = {name: len(chosen) for name, chosen in verdicts(rows).items()}
    goals = found["met"] + found["missed"]
    return (
        f"{len(rows)} row{'s' * (len(rows) != 1)}: "
        f"{found['ahead']} faster than the best peer, {found['behind']} slower; "
        f"{found['met']} of {goals} goal{'s' * (goals != 1)} met"
    )


def _aligned(values: Iterable[str]) -> str:
    columns = ((value, width, ">" if right else "<") for value, (_, width, right) in zip(values, COLUMNS))
    return "  ".join(f"{value:{side}{width}}" for value, width, side in columns).rstrip()


def header() -> str:
    return _aligned(name for name, _, _ in COLUMNS)


def terminal(row: Row) -> str:
    """A row as lines of at most 120 columns, unless a name is longer than its column."""
    lines, line = [_aligned(cells(row))], " "
    for note in notes(row):
        addition = f" {note}" if line == " " else f"; {note}"
        if len(line) + len(addition) > 119:
            lines.append(line + ";")
            line, addition = " ", f" {note}"
        line += addition
    return "\n".join([*lines, line] if line.strip() else lines)


def caption(environment: dict[str, Any]) -> str:
    """The environment in a sentence."""
    threads = environment["threads"]
    where = f"{environment['cpu']}, {environment['instruction_set']}, {threads} thread{'s' * (threads != 1)}"
    if environment["gpu"]:
        where = f"{environment['gpu']['name']}, CUDA {environment['gpu']['cuda']}, host {where}"
    commit = environment["commit"]
    return (
        f"{where}; torch {environment['torch']}, gdbp {environment['gdbp']['version']}"
        f"{f' at {commit[:12]}' + '+' * commit.endswith('+') if commit else ''}; "
        f"heap {environment['heap']}; {environment['date'][:10]}."
    )


def markdown(rows: Iterable[Row], short: bool = False) -> str:
    """A table with the terminal's columns and the notes as a last one; a short one without LONG, and of the notes with
    WARNINGS alone."""
    kept = [not (short and name in LONG) for name, _, _ in COLUMNS]
    body = []
    for row in rows:
        case, *rest = cells(row)
        said = [note for note in notes(row) if not short or any(word in note for word in WARNINGS)]
        body.append([*itertools.compress([f"{row['family']}.{case}", *rest], kept), "; ".join(said)])
    columns = [*itertools.compress(COLUMNS, kept), (NOTES, 0, False)]
    if short and not any(cells[-1] for cells in body):
        columns, body = columns[:-1], [cells[:-1] for cells in body]
    head = [[name for name, _, _ in columns], ["--:" if right else "---" for _, _, right in columns]]
    lines = [f"| {' | '.join(cells)} |" for cells in (head[0], *body)]
    return "\n".join([lines[0], f"|{'|'.join(head[1])}|", *lines[1:]])
