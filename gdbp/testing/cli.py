"""``python -m gdbp check``: the conformance checks from the command line."""

import argparse
import ast
import importlib

from gdbp._errors import InputError
from gdbp.testing.optimizer import check_optimizer
from gdbp.testing.report import one_line

__all__ = ["add_command"]


def add_command(commands) -> None:
    """Adds ``check`` to the subcommands of ``python -m gdbp``."""
    parser = commands.add_parser(
        "check",
        help="check that an optimizer does what PyTorch expects of one",
        description="Runs conformance checks on a class of optimizers and prints a table; the exit status is 1 when a "
        "check fails. Example: python -m gdbp check torch.optim.SGD --kw lr=0.1 fused=True",
    )
    parser.add_argument("optimizer", metavar="MODULE.CLASS", help="class to check, such as torch.optim.Adam")
    parser.add_argument(
        "--kw",
        metavar="NAME=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="argument of the class; the value is a Python literal, or else a string",
    )
    parser.set_defaults(run=check)


def check(options: argparse.Namespace) -> int:
    cls, kwargs = _find(options.optimizer), dict(map(_argument, options.kw))
    try:
        report = check_optimizer(cls, **kwargs)
    except (Exception, SystemExit) as error:  # of its constructor, which may raise anything
        raise InputError(f"{options.optimizer} can't be checked: {_told(error)}") from error
    print(report)
    return 0 if report.passed else 1


def _find(path: str) -> type:
    module, _, name = path.rpartition(".")
    if not module:
        raise InputError(f"MODULE.CLASS is {path!r}; expected a module and a class in it, such as torch.optim.Adam")
    try:
        return getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # of the module, which may do anything
        raise InputError(f"MODULE.CLASS is {path!r}, which can't be imported: {_told(error)}") from error


def _told(error: BaseException) -> str:
    """The error in a line, with its name, for its message alone may say little."""
    return one_line(f"{type(error).__name__}: {error}".removesuffix(": "))


def _argument(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise InputError(f"--kw got {text!r}; expected NAME=VALUE, such as lr=0.1")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
