"""``python -m gdbp bench``: the commands."""

import argparse
import json

from benchmarks import compare, environment, plot, report, run, scaling
from gdbp._command import Parser


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m gdbp bench", description="gdbp beside its peers and the hardware's limit.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, add, execute, summary in (
        ("list", run.add_selection, run.show, "the cases and their goals"),
        ("run", run.add_arguments, run.run, "measure, and show a table"),
        ("scaling", scaling.add_arguments, scaling.execute, "how the cost grows with sizes and threads"),
        ("compare", compare.add_arguments, compare.run, "what became slower from one file of results to another"),
        ("plot", plot.add_arguments, plot.run, "pictures and an HTML report from files of results"),
        ("report", report.add_arguments, report.run, "Markdown tables from files of results"),
        ("env", _add_env, _env, "what would be measured on"),
    ):
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        add(command)
        command.set_defaults(execute=execute)
    return parser


def _add_env(parser: argparse.ArgumentParser) -> None:
    run.add_device(parser)
    parser.add_argument("--json", action="store_true", help="print it as a file of results has it")


def _env(options: argparse.Namespace) -> int:
    run.check_device(options.device)
    described = environment.describe(options.device)
    if options.json:
        print(json.dumps(described, indent=1))
        return 0
    for key, value in described.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items()) or "none"
        print(f"{key.replace('_', ' '):<22} {value}")
    return 0


def main(argv: list[str]) -> int:
    """Runs one command and returns its exit status.

    Raises:
        InputError: for what the user can mend.
    """
    options = build_parser().parse_args(argv)
    options.argv = argv
    return options.execute(options)
