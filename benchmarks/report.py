"""``python -m gdbp bench report``: results as Markdown tables, printed or kept in a document."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import files
from benchmarks.files import Report
from benchmarks.table import caption, markdown
from gdbp._errors import InputError

DEVICES = ("cpu", "cuda")
NOT_MEASURED = {
    "cpu": "Not measured. `python -m gdbp bench run --save` measures.",
    "cuda": "Not measured on a GPU. `make gpu-check` on a machine with one measures.",
}


# Where a document has the tables of a device: of the rows in whose titles one of the words occurs, or of all; measured
# with the heap that a word like heap:default names, or with any; where a word is "newest", the last run of each heap;
# where one is "short", without spreads, ulp and notes.
HEAP, NEWEST, SHORT = "heap:", "newest", "short"
PLACE = re.compile(
    r"<!-- benchmarks:(?P<what>(?P<device>cpu|cuda)(?P<words>( [^ >]+)*)) -->\n.*?<!-- /benchmarks:(?P=what) -->", re.S
)
MARKER = re.compile(r"<!-- (/?)benchmarks:(.*?) -->$", re.M)


def tables(reports: list[Report], words: Sequence[str] = (), short: bool = False) -> str:
    found = []
    for report in reports:
        rows = [row for row in report["rows"] if not words or any(word in title(row) for word in words)]
        if rows:
            found.append(f"{caption(report['environment'])}\n\n{markdown(rows, short)}")
    return "\n\n".join(found)


def title(row: dict[str, Any]) -> str:
    return f"{row['family']}.{row['case']} {row['size']}"


def _check_markers(document: str) -> None:
    """Raises InputError unless every start is followed by its end: what stands before another's end would go."""
    markers = MARKER.findall(document)
    for i in range(0, len(markers), 2):
        (slash, what), end = markers[i], markers[i + 1 : i + 2]
        if slash or end != [("/", what)]:
            raise InputError(
                f"the document's places for tables are damaged at benchmarks:{what}; expected the lines "
                f"<!-- benchmarks:{what} --> and <!-- /benchmarks:{what} -->, with no other such line between them"
            )


def updated(document: str, reports: list[Report], devices: list[str]) -> str:
    """The document with each device's tables, or that it was not measured, in its places.

    Raises:
        InputError: where a device has no place, or a place no end.
    """
    _check_markers(document)
    places = {match["device"] for match in PLACE.finditer(document)}
    if missing := [device for device in devices if device not in places]:
        start, end = (f"<!-- {slash}benchmarks:{missing[0]} -->" for slash in ("", "/"))
        raise InputError(f"the document has no place for the table; expected the lines {start} and {end}")

    def fill(match: re.Match[str]) -> str:
        device, what = match["device"], match["what"]
        if device not in devices:
            return match[0]
        words = match["words"].split()
        heaps = [word.removeprefix(HEAP) for word in words if word.startswith(HEAP)]
        chosen = [report for report in reports if report["environment"]["device"] == device]
        if heaps:
            chosen = [report for report in chosen if report["environment"]["heap"] in heaps]
        if NEWEST in words:
            by_date = sorted(chosen, key=lambda report: report["environment"]["date"])
            chosen = list({report["environment"]["heap"]: report for report in by_date}.values())
        titles = [word for word in words if not word.startswith(HEAP) and word not in (NEWEST, SHORT)]
        text = tables(chosen, titles, SHORT in words) or NOT_MEASURED[device]
        return f"<!-- benchmarks:{what} -->\n{text}\n<!-- /benchmarks:{what} -->"

    return PLACE.sub(fill, document)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("files", metavar="FILE.json", type=Path, nargs="*",
        help="default: this repository's, all of the CPU and the newest of a GPU")  # fmt: skip
    add("--update", metavar="DOCUMENT", type=Path, help="put the tables between the document's markers")
    add("--check", action="store_true", help="with --update: write nothing, exit 1 on a difference")


def _chosen(options: argparse.Namespace, document: str) -> tuple[list[Report], list[str]]:
    """The reports, and the devices whose places in the document are to be filled."""
    if options.files:
        reports = [files.load(path) for path in options.files]
        return reports, sorted({report["environment"]["device"] for report in reports})
    places = {match["device"] for match in PLACE.finditer(document)}
    return list(files.committed().values()), sorted(places) or list(DEVICES[:1])


def run(options: argparse.Namespace) -> int:
    """Returns 0, or 1 where --check finds a difference."""
    if options.update is None:
        if options.check:
            raise InputError("--check compares with a document; name it with --update")
        print(tables(_chosen(options, "")[0]))
        return 0
    try:
        document = options.update.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{options.update} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{options.update} is no text in UTF-8 ({error.reason} at byte {error.start})") from None
    new = updated(document, *_chosen(options, document))
    if options.check:
        if new != document:
            remedy = " ".join(map(str, ["python -m gdbp bench report --update", options.update, *options.files]))
            print(f"{options.update} differs from the results; run: {remedy}", file=sys.stderr)
        return int(new != document)
    files.write(options.update, new)
    return 0
