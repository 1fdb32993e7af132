"""``python -m gdbp bench report``: results as Markdown tables, printed or kept in a document."""

import argparse
import sys
from pathlib import Path

from benchmarks import files
from benchmarks.files import Report
from benchmarks.table import caption, markdown
from gdbp.train.errors import InputError

DEVICES = ("cpu", "cuda")
NOT_MEASURED = {
    "cpu": "Not measured. `python -m gdbp bench run --save` measures.",
    "cuda": "Not measured on a GPU. `make gpu-check` on a machine with one measures.",
}


def tables(reports: list[Report]) -> str:
    return "\n\n".join(f"{caption(r['environment'])}\n\n{markdown(r['rows'])}" for r in reports)


def markers(device: str) -> tuple[str, str]:
    return f"<!-- benchmarks:{device} -->", f"<!-- /benchmarks:{device} -->"


def updated(document: str, reports: list[Report], devices: list[str]) -> str:
    """The document with each device's tables, or that it was not measured, between its two markers.

    Raises:
        InputError: where a marker is missing.
    """
    for device in devices:
        start, end = markers(device)
        before, opened, rest = document.partition(start)
        _, closed, after = rest.partition(end)
        if not (opened and closed):
            raise InputError(f"the document has no place for the table; expected the lines {start} and {end}")
        chosen = [report for report in reports if report["environment"]["device"] == device]
        document = f"{before}{start}\n{tables(chosen) or NOT_MEASURED[device]}\n{end}{after}"
    return document


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
    places = [device for device in DEVICES if markers(device)[0] in document]
    return files.committed(), places or list(DEVICES[:1])


def run(options: argparse.Namespace) -> int:
    """Returns 0, or 1 where --check finds a difference."""
    if options.update is None:
        if options.check:
            raise InputError("--check compares with a document; name it with --update")
        print(tables(_chosen(options, "")[0]))
        return 0
    try:
        document = options.update.read_text()
    except OSError as error:
        raise InputError(f"{options.update} cannot be read: {error.strerror}") from None
    new = updated(document, *_chosen(options, document))
    if options.check:
        if new != document:
            remedy = " ".join(map(str, ["python -m gdbp bench report --update", options.update, *options.files]))
            print(f"{options.update} differs from the results; run: {remedy}", file=sys.stderr)
        return int(new != document)
    files.write(options.update, new)
    return 0
