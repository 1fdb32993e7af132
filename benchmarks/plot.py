"""``python -m gdbp bench plot``: files of results as pictures and as one HTML file that needs nothing else."""

import argparse
import base64
import io
from pathlib import Path

from benchmarks import figures, files, html
from benchmarks.environment import ROOT
from benchmarks.files import Report
from gdbp._errors import InputError, require

OUT = ROOT / "build" / "bench"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("files", metavar="FILE.json", type=Path, nargs="*", help="default: this repository's results")
    add("--out", metavar="FOLDER", type=Path, default=OUT,
        help=f"gets report.html, and pictures in place of those there (default {OUT.relative_to(ROOT)})")  # fmt: skip


def _as_svg(figure) -> str:
    """As the address of an image, so that no two pictures' ids meet in a page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def draw(report: Report, stem: str, folder: Path) -> list[html.Picture]:
    """Writes FOLDER/STEM-NAME.png for each figure that the report has rows for."""
    pictures = []
    for name, (title, make) in figures.FIGURES.items():
        if (figure := make(report)) is not None:
            figure.savefig(folder / f"{stem}-{name}.png", dpi=150)
            pictures.append(html.Picture(title, _as_svg(figure)))
    return pictures


def run(options: argparse.Namespace) -> int:
    reports = {path.stem: files.load(path) for path in options.files}
    if len(reports) < len(options.files):
        raise InputError("two of the files have the same name, and so would their pictures; rename one")
    reports = reports or files.committed()
    page = options.out / "report.html"
    files.write(page, "")
    for name in figures.FIGURES:  # those of an earlier page, whose files may not be among today's
        for picture in options.out.glob(f"*-{name}.png"):
            picture.unlink()
    try:
        require("matplotlib")
        drawn = {stem: draw(report, stem, options.out) for stem, report in reports.items()}
    except InputError:
        print("pictures need matplotlib, not installed here: pip install matplotlib; the report is without them")
        drawn = {stem: [] for stem in reports}
    files.write(page, html.page([(reports[stem], drawn[stem]) for stem in reports]))
    print(f"written: {page}")
    return 0
