"""``python -m gdbp``: what was built, a first network from one command, checks and benchmarks."""

import argparse
import errno
import os
import signal
import sys

from gdbp import _load
from gdbp._command import Parser
from gdbp._errors import InputError


def _info(_options: argparse.Namespace) -> int:
    print(_load.format_build_info())
    return 0


def build_parser() -> argparse.ArgumentParser:
    # They take a while to import, and main() is ready for an interruption.
    from gdbp import _bench
    from gdbp.testing import cli as testing_cli
    from gdbp.train import cli

    parser = Parser(prog="python -m gdbp", description="Gradient descent and backpropagation, fused.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    info = commands.add_parser("info", help="show what was built, for which torch, CPU and GPU")
    info.set_defaults(run=_info)
    cli.add_commands(commands)
    testing_cli.add_command(commands)
    _bench.add_command(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 1 for a failed check, 2 for what the user can mend, 130 when
    interrupted, 141 when nobody reads the output any more."""
    try:
        try:
            options = build_parser().parse_args(argv)
            return options.run(options)
        finally:
            print(end="", flush=True)  # here, where a full disk gets its sentence
    except InputError as error:
        print(f"gdbp: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gdbp: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        # What waits in the buffer would fail again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:
            return 128 + signal.SIGPIPE
        print(f"gdbp: the output can't be written ({error.strerror}); free some space", file=sys.stderr)
        return 2


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see gdbp/__init__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
