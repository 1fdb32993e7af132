"""A report as one HTML page: no script, font, style or picture from elsewhere."""

import json
import math
import statistics
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import NamedTuple

from benchmarks import table
from benchmarks.files import Report
from benchmarks.table import DTYPES, Row
from benchmarks.work import OURS

ASSETS = Path(__file__).parent / "assets"
# Ratios beyond these fill their half of the bar.
LOWEST, HIGHEST = 1 / 8, 64.0

COLUMNS = (
    "case", "size", "dtype", "gdbp", "best peer", "its time", "ratio", "", "goal", "limit", "memory", "ulp", "notes",
)  # fmt: skip


class Picture(NamedTuple):
    title: str
    address: str  # data:


def page(parts: list[tuple[Report, list[Picture]]]) -> str:
    """The page of some reports, each with its pictures."""
    text = (ASSETS / "report.html").read_text()
    for place, file in (("{style}", "report.css"), ("{script}", "report.js")):
        text = text.replace(place, (ASSETS / file).read_text().rstrip())
    # Last, for what is measured may be called anything.
    return text.replace("{body}", "\n".join(_report(report, pictures) for report, pictures in parts))


def _report(report: Report, pictures: list[Picture]) -> str:
    rows, env = report["rows"], report["environment"]
    where = env["gpu"]["name"] if env["gpu"] else env["cpu"]
    return "\n".join(
        [
            f"<header><h1>gdbp on {escape(where)}</h1><p>{escape(table.caption(env))}</p></header>",
            _tiles(rows),
            _lost(rows),
            *(_families(rows)),
            *(
                f'<section><h2>{escape(p.title)}</h2><img alt="{escape(p.title)}" src="{p.address}"></section>'
                for p in pictures
            ),
            _series(report.get("series", [])),
            *(f"<p>Absent: {escape(sentence)}</p>" for sentence in table.absent(rows)),
            _environment(report),
        ]
    )


def _tiles(rows: list[Row]) -> str:
    found = table.verdicts(rows)
    ratios = [row["ratio"] for row in rows if row["ratio"]]
    median = f"{table.figure(statistics.median(ratios))}x" if ratios else "none"
    wrong = [row for row in rows if not row["contenders"][0]["correct"]]
    goals = len(found["met"]) + len(found["missed"])
    tiles = [
        (str(len(found["ahead"])), f"of {len(ratios)} rows faster than the best peer", "good"),
        (str(len(found["behind"])), "rows where a peer is faster", "bad" if found["behind"] else ""),
        (median, "median ratio to the best peer", ""),
        (f"{len(found['met'])} of {goals}", "goals met", "bad" if found["missed"] else "good" if goals else ""),
        (str(len(wrong)), "wrong results of ours", "bad" if wrong else "good"),
    ]
    drawn = [f'<div class="tile {kind}"><b>{escape(value)}</b><span>{text}</span></div>' for value, text, kind in tiles]
    return f'<div class="tiles">{"".join(drawn)}</div>'


def _lost(rows: list[Row]) -> str:
    """What is not reached, before anything that is: the rows behind a peer, then those that miss a goal."""
    found = table.verdicts(rows)
    behind, missed = found["behind"], found["missed"]
    lines = []
    for row in [*behind, *(row for row in missed if row not in behind)]:
        said = [f"{row['best']} takes {row['ratio']:.0%} of our time"] if row in behind else []
        said += [_missed(row)] if row in missed else []
        said += ["noisy"] if any(c["noisy"] for c in row["contenders"] if c["name"] in (OURS, row["best"])) else []
        lines.append(f"<li><b>{escape(_name(row))}</b>: {escape('; '.join(said))}</li>")
    text = f"<ul>{''.join(lines)}</ul>" if lines else "<p>Nowhere: no peer is faster, and no goal is missed.</p>"
    return f"<section><h2>Where we lose</h2>{text}</section>"


def _missed(row: Row) -> str:
    goal, ours = row["goal"], row["contenders"][0]["median"]
    parts = []
    if goal["ratio"]:
        peer = next((c["median"] for c in row["contenders"] if c["name"] == goal["peer"]), None)
        reached = f"{table.figure(peer / ours)}x" if peer else "no correct peer"
        parts.append(f"{goal['ratio']:.3g}x of {goal['peer']} wanted, {reached} reached")
    if goal["limit"]:
        reached = f"{row['limit']['seconds'] / ours:.0%}" if row["limit"] else "no limit"
        parts.append(f"{goal['limit']:.0%} of the limit wanted, {reached} reached")
    return "; ".join(parts)


def _name(row: Row) -> str:
    return f"{row['family']}.{row['case']} {row['size']} {DTYPES.get(row['dtype'], row['dtype'])}"


def _families(rows: list[Row]) -> Iterable[str]:
    for family in dict.fromkeys(row["family"] for row in rows):
        body = (_row(row) for row in rows if row["family"] == family)
        yield f"<section><h2>{escape(family)}</h2>{_table(COLUMNS, body)}</section>"


def _table(heads: Iterable[str], rows: Iterable[str]) -> str:
    head = "".join(f"<th>{name}</th>" for name in heads)
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _row(row: Row) -> str:
    """Figures are cells with the number that they are sorted by."""
    ours = row["contenders"][0]
    best = next((c for c in row["contenders"] if c["name"] == row["best"]), None)
    case, size, dtype, time, spread, peer, peer_time, ratio, goal, limit, ulp = table.cells(row)
    share = row["limit"]["seconds"] / ours["median"] if row["limit"] else None
    kind = "" if row["ratio"] is None else "good" if row["ratio"] >= 1 else "bad"
    met = "" if not row["goal"] else "good" if row["goal"]["met"] else "bad"
    return "".join(
        [
            _cell(case, css="name"),
            _cell(size),
            _cell(dtype),
            _cell(time, ours["median"], title=f"middle 60 %: {spread}; {ours['samples']} samples"),
            _cell(peer),
            _cell(peer_time, best and best["median"]),
            _cell(ratio, row["ratio"] or 0, css=kind),
            f"<td>{_ratio_bar(row['ratio'])}</td>",
            _cell(goal, css=met),
            _cell(limit, share or 0),
            _cell(_memory(ours, best), ours.get("memory") or 0),
            _cell(ulp, ours["ulp"] if ours["ulp"] is not None else math.inf, css="" if ours["correct"] else "bad"),
            _cell("; ".join(note for note in table.notes(row) if not note.startswith("memory")), css="notes"),
        ]
    )


def _cell(text: str, value: float | None = None, css: str = "", title: str = "") -> str:
    attributes = ""
    if classes := f"{css}{' figure' * (value is not None)}".strip():
        attributes += f' class="{classes}"'
    if value is not None:
        attributes += f' data-value="{value:.6g}"'
    if title:
        attributes += f' title="{escape(title)}"'
    return f"<td{attributes}>{escape(text)}</td>"


def _memory(ours: dict, best: dict | None) -> str:
    if (ours.get("memory") or 0) < table.RESOLUTION:
        return ""
    return " / ".join(table.storage(c["memory"]) for c in (ours, best) if c and c.get("memory"))


def _ratio_bar(ratio: float | None) -> str:
    """From the middle, which is 1, to the left where the peer is faster; logarithmic."""
    if ratio is None:
        return ""
    if ratio >= 1:
        width = 50 * min(1.0, math.log(ratio) / math.log(HIGHEST))
        return f'<div class="bar"><i class="good" style="left:50%;width:{width:.1f}%"></i></div>'
    width = 50 * min(1.0, math.log(ratio) / math.log(LOWEST))
    return f'<div class="bar"><i class="bad" style="right:50%;width:{width:.1f}%"></i></div>'


def _series(found: list[dict]) -> str:
    if not found:
        return ""
    lines = []
    for item in found:
        fitted = "too few sizes"
        if item["exponent"] is not None:
            fitted = f"{item['exponent']:.2f} ± {item['error']:.2f}"
        cells = (item["series"], item["contender"], table.duration(item["smallest"]), str(item["from"]), fitted)
        lines.append("".join(map(_cell, cells)))
    drawn = _table(("series", "contender", "smallest size takes", "fitted from", "exponent"), lines)
    return f"<section><h2>How cost grows</h2><p>Time grows as size to the power of the exponent.</p>{drawn}</section>"


def _environment(report: Report) -> str:
    text = escape(json.dumps({key: report[key] for key in ("environment", "options") if key in report}, indent=1))
    return f"<details><summary>Environment and options</summary><pre>{text}</pre></details>"
