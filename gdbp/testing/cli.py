"""``python -m gdbp check``: the conformance checks from the command line."""

import argparse
import ast
import importlib

import torch

from gdbp._command import shown
from gdbp._errors import InputError
from gdbp.testing.layers import check_layer
from gdbp.testing.optimizers import check_optimizer
from gdbp.testing.report import one_line

__all__ = ["add_command"]


def add_command(commands) -> None:
    """Adds ``check`` to the subcommands of ``python -m gdbp``."""
    parser = commands.add_parser(
        "check",
        help="check that an optimizer or a layer does what PyTorch expects of one",
        description="Runs conformance checks on a class of optimizers or layers and prints a table; the exit status is "
        "1 when a check fails. Examples: python -m gdbp check torch.optim.SGD --kw lr=0.1 fused=True; "
        "python -m gdbp check torch.nn.BatchNorm1d --kw num_features=3 --input 8,3",
    )
    parser.add_argument("subject", metavar="MODULE.CLASS", help="class to check, such as torch.optim.Adam")
    parser.add_argument(
        "--kw",
        metavar="NAME=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="argument of the class; the value is a Python literal, or else a string",
    )
    parser.add_argument("--input", type=_shape, metavar="SHAPE", help="of a layer's input, batch first, such as 8,3")
    parser.set_defaults(run=check)


def check(options: argparse.Namespace) -> int:
    cls, kwargs = _find(options.subject), dict(map(_argument, options.kw))
    is_layer = isinstance(cls, type) and issubclass(cls, torch.nn.Module)
    if not is_layer and not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise InputError(f"MODULE.CLASS is {options.subject!r}; expected a class of optimizers or of modules")
    if is_layer and options.input is None:
        raise InputError(f"{options.subject} is a layer; say of which shape its inputs are, such as --input 8,3")
    if options.input is not None and not is_layer:
        raise InputError(f"--input is for layers, and {options.subject} is none; leave it out")
    try:
        report = check_layer(cls, input_shape=options.input, **kwargs) if is_layer else check_optimizer(cls, **kwargs)
    except (Exception, SystemExit) as error:  # of its constructor, which may raise anything
        raise InputError(f"{options.subject} can't be checked: {_told(error)}") from error
    print(report)
    return 0 if report.passed else 1


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.split(",")
    if not all(size.isdecimal() and 0 < len(size) < 10 and int(size) > 0 for size in map(str.strip, sizes)):
        raise argparse.ArgumentTypeError(f"got {shown(text)}; expected sizes above 0 and commas, as in 8,3")
    return tuple(map(int, sizes))


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
