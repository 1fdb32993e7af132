"""``python -m gdbp bench``: hands over to the benchmarks in the source checkout, which are not installed."""

import argparse
import sys
from pathlib import Path

from gdbp._errors import InputError

ROOT = Path(__file__).resolve().parents[1]


def add_command(commands) -> None:
    # No argument starts with this, so that all of them, options too, are left to the benchmarks' own parser.
    parser = commands.add_parser(
        "bench", help="measure against torch and the hardware's limit", add_help=False, prefix_chars="\0"
    )
    parser.add_argument("arguments", nargs="*")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    if not (ROOT / "benchmarks" / "cases").is_dir() or not (ROOT / "csrc").is_dir():
        raise InputError(
            "the benchmarks are part of gdbp's source checkout and are not installed; "
            "get its repository, and run 'make bench' or 'python -m gdbp bench' in that folder"
        )
    sys.path.insert(0, str(ROOT))  # before any other package of that name
    from benchmarks import cli

    return cli.main(options.arguments)
