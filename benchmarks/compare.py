"""``python -m gdbp bench compare``: two files of results, row by row."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import files
from benchmarks.table import DTYPES, Row, duration

# What times depend on, by the key in a report's environment.
CONDITIONS = {
    "cpu": "CPU",
    "cpus": "number of CPUs",
    "instruction_set": "instruction set",
    "threads": "threads",
    "heap": "heap",
    "torch": "torch",
    "python": "Python",
    "system": "system",
}


@dataclass(frozen=True)
class Change:
    """A row of both files.

    Args:
        ours, peer: the new median over the old one; `peer` is that of the old row's best peer, None where either file
            lacks it.
        noise: whether the middle 60 % of the old and of the new samples overlap.
        broken: whether our result was right, and is wrong.
    """

    title: str
    old: float
    new: float
    ours: float
    peer: float | None
    noise: bool
    broken: bool

    def failed(self, allowed: float) -> bool:
        return self.broken or (self.ours > 1 + allowed and not self.noise)

    def verdict(self, allowed: float) -> str:
        if self.broken:
            return "WRONG RESULT"
        if 1 / (1 + allowed) <= self.ours <= 1 + allowed:
            return ""
        return "noise" if self.noise else "SLOWER" if self.ours > 1 else "faster"


def key(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in ("family", "case", "size", "dtype", "device"))


def title(row: Row) -> str:
    return f"{row['family']}.{row['case']} {row['size']} {DTYPES.get(row['dtype'], row['dtype'])}"


def change(old: Row, new: Row) -> Change:
    before, after = old["contenders"][0], new["contenders"][0]
    peers = [next((c for c in row["contenders"] if c["name"] == old["best"]), None) for row in (old, new)]
    return Change(
        title(new),
        before["median"],
        after["median"],
        after["median"] / before["median"],
        peers[1]["median"] / peers[0]["median"] if all(peers) else None,
        after["p20"] <= before["p80"] and before["p20"] <= after["p80"],
        before["correct"] and not after["correct"],
    )


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What is not the same about two environments."""
    found = [
        f"{name}: {old.get(name_in)} before, {new.get(name_in)} now"
        for name_in, name in CONDITIONS.items()
        if old.get(name_in) != new.get(name_in)
    ]
    gpus = [(env.get("gpu") or {}).get("name") for env in (old, new)]
    if gpus[0] != gpus[1]:
        found.append(f"GPU: {gpus[0]} before, {gpus[1]} now")
    return found


def fraction(text: str) -> float:
    try:
        value = float(text.removesuffix("%")) / 100
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}; expected a percentage such as 10%")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("old", metavar="OLD.json", type=Path)
    add("new", metavar="NEW.json", type=Path)
    add("--fail", type=fraction, default=0.1, metavar="PERCENT",
        help="exit 1 where a row takes this much longer, beyond noise (default 10%%)")  # fmt: skip


def _line(title: str, old: str, new: str, ours: str, peer: str, verdict: str) -> str:
    return f"{title:<42} {old:>9} {new:>9} {ours:>7} {peer:>10}  {verdict}".rstrip()


def run(options: argparse.Namespace) -> int:
    """Returns 0, or 1 where a row became slower than allowed, or its result wrong."""
    reports = [files.load(path) for path in (options.old, options.new)]
    environments = [report["environment"] for report in reports]
    if different := differences(*environments):
        print("WARNING: not measured under the same conditions, so times need not be comparable:")
        print("\n".join(f"  {sentence}" for sentence in different))
        print("The peer's column shows how much of a change is the machine's.\n")
    old, new = ({key(row): row for row in report["rows"]} for report in reports)
    changes = [change(old[k], new[k]) for k in old if k in new]
    print(_line("case", "old", "new", "gdbp", "best peer", ""))
    for c in changes:
        peer = "" if c.peer is None else f"{c.peer - 1:+.0%}"
        print(_line(c.title, duration(c.old), duration(c.new), f"{c.ours - 1:+.0%}", peer, c.verdict(options.fail)))
    for rows, sentence in ((old.keys() - new.keys(), "only in the old file"), (new.keys() - old.keys(), "new")):
        for k in sorted(rows):
            print(f"{title(old.get(k) or new[k])}: {sentence}")
    failed = [c for c in changes if c.failed(options.fail)]
    wrong = sum(c.broken for c in failed)
    print(f"\n{len(changes)} rows compared: {len(failed) - wrong} slower by more than {options.fail:.0%}, beyond noise"
          + (f"; {wrong} WRONG" if wrong else ""))  # fmt: skip
    return int(bool(failed))
