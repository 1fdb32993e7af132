"""``python -m benchmarks.report FILE.json``: results as Markdown tables, printed or kept in a document."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.table import caption, markdown


class ReportError(Exception):
    """What the user can mend, in one sentence."""


def load(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text())
        if not isinstance(report["environment"]["device"], str) or not isinstance(report["rows"], list):
            raise TypeError
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise ReportError(f"{path} is no result; expected a file that benchmarks.run --json wrote") from None
    return report


def tables(reports: list[dict[str, Any]]) -> str:
    return "\n\n".join(f"{caption(r['environment'])}\n\n{markdown(r['rows'])}" for r in reports)


def updated(document: str, reports: list[dict[str, Any]]) -> str:
    """The document with each device's tables between its two markers, ``<!-- benchmarks:cpu -->`` first."""
    for device in sorted({report["environment"]["device"] for report in reports}):
        start, end = f"<!-- benchmarks:{device} -->", f"<!-- /benchmarks:{device} -->"
        before, opened, rest = document.partition(start)
        _, closed, after = rest.partition(end)
        if not (opened and closed):
            raise ReportError(f"the document has no place for the table; expected the lines {start} and {end}")
        chosen = [report for report in reports if report["environment"]["device"] == device]
        document = f"{before}{start}\n{tables(chosen)}\n{end}{after}"
    return document


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    add = parser.add_argument
    add("files", metavar="FILE.json", type=Path, nargs="+")
    add("--update", metavar="DOCUMENT", type=Path, help="put the tables between the document's markers")
    add("--check", action="store_true", help="with --update: write nothing, exit 1 on a difference")
    options = parser.parse_args(argv)
    if options.check and options.update is None:
        parser.error("--check compares with a document; name it with --update")
    return options


def main(argv: list[str] | None = None) -> int:
    """Returns 0, 1 where --check finds a difference, 2 for what the user can mend."""
    options = parse(argv)
    try:
        reports = [load(path) for path in options.files]
        if options.update is None:
            print(tables(reports))
            return 0
        try:
            document = options.update.read_text()
        except OSError as error:
            raise ReportError(f"{options.update} cannot be read: {error.strerror}") from None
        new = updated(document, reports)
    except ReportError as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 2
    if options.check:
        if new != document:
            remedy = " ".join(map(str, ["python -m benchmarks.report --update", options.update, *options.files]))
            print(f"{options.update} differs from the results; run: {remedy}", file=sys.stderr)
        return int(new != document)
    options.update.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
