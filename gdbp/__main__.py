"""``python -m gdbp``: what was built, a first network from one command, checks and benchmarks."""

import argparse
import sys

from gdbp import _bench, _load
from gdbp._errors import InputError
from gdbp.testing import cli as testing_cli
from gdbp.train import cli


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the command line in one sentence, as everything else here does."""

    def error(self, message: str):
        raise InputError(f"{message}; see {self.prog} --help")


def _info(_options: argparse.Namespace) -> int:
    print(_load.format_build_info())
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m gdbp", description="Gradient descent and backpropagation, fused.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    info = commands.add_parser("info", help="show what was built, for which torch, CPU and GPU")
    info.set_defaults(run=_info)
    cli.add_command(commands)
    testing_cli.add_command(commands)
    _bench.add_command(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 1 for a failed check, 2 for what the user can mend, 130 when
    interrupted."""
    try:
        options = build_parser().parse_args(argv)
        return options.run(options)
    except InputError as error:
        print(f"gdbp: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gdbp: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
