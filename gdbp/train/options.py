"""The options of ``python -m gdbp train``, and the sentences for values that don't fit them."""

import argparse
import math

import torch

from gdbp import nn

from .loop import METHODS
from .readers import BUILTIN
from .run import ACTIVATIONS
from .schedule import SCHEDULES

__all__ = ["OPTIMIZERS", "add_options"]

OPTIMIZERS = ("sgd", "momentum", "rmsprop", "adam", "adamw")


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data").add_argument
    add("--data", default="digits", metavar="NAME|FILE", help=f"{', '.join(BUILTIN)}, or a .csv or .npz file")
    add("--target", metavar="COLUMN", help="the column of a .csv file to predict (default: the last)")
    add("--task", choices=("classification", "regression"), help="default: inferred from the target")
    add("--seed", type=_integer(0, 2**32 - 1), default=0, help="of the split, the initial weights and the shuffling")

    add = parser.add_argument_group("network").add_argument
    widths = "of the hidden layers, 0 for none (default: 128,64; 32 for fewer than 1000 training samples)"
    add("--hidden", type=_widths, metavar="WIDTHS", help=widths)
    add("--activation", choices=ACTIVATIONS, default="relu", help="after each hidden layer")
    add("--init", type=_scheme, default="he", help=f"initial weights: {', '.join(nn.init.SCHEMES)}")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=_integer(1), default=30, help="passes over the training set")
    add("--method", choices=METHODS, default="minibatch", help="a step takes all samples, one, or a batch")
    add("--batch-size", type=int, metavar="N", help="samples a step of method minibatch (default: 32)")
    add("--optimizer", choices=OPTIMIZERS, default="adamw", help="update rule")
    add("--lr", type=_number(above=0), help="highest learning rate (default: the optimizer's)")
    add("--schedule", choices=SCHEDULES, default="onecycle", help="of the learning rate")
    add("--l1", type=_number(least=0), default=0.0, help="L1 regularisation of the weights: exact zeros")
    add("--l2", type=_number(least=0), help="weight decay (default: 0.01 for adamw, else 0.0001)")
    smoothing = "of the labels, for classification"
    add("--label-smoothing", type=_number(least=0, most=1), default=0.1, metavar="SHARE", help=smoothing)
    noise = "on the inputs of each step, in standard deviations"
    add("--noise", type=_number(least=0), default=0.5, help=noise)
    add("--clip", type=_number(above=0), metavar="NORM", help="largest gradient norm (default: any)")
    keep = "which network: of the epoch with the lowest validation loss, or of the last"
    add("--keep", choices=("best", "last"), default="best", help=keep)
    add("--threads", type=_integer(1, 1024), metavar="N", help="CPU threads (default: 1 for a small network)")
    add("--device", default="cpu", help="cpu, cuda or cuda:N")

    add = parser.add_argument_group("output").add_argument
    out = "run folder (default: runs/<data>-<time>); files of an earlier run are replaced"
    add("--out", metavar="DIR", help=out)
    add("--quiet", action="store_true", help="print nothing but errors")


def _integer(least: int, most: float = math.inf):
    wanted = f"of at least {least}" if most == math.inf else f"from {least} to {most}"

    def parse(text: str) -> int:
        if not text.lstrip("-").isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"got {text!r}; expected a whole number {wanted}")
        return int(text)

    return parse


def _number(*, above: float = -math.inf, least: float = -math.inf, most: float = math.inf):
    wanted = f"above {above:g}" if math.isfinite(above) else f"of at least {least:g}"
    wanted += f" and at most {most:g}" if math.isfinite(most) else ""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and above < value and least <= value <= most):
            raise argparse.ArgumentTypeError(f"got {text!r}; expected a number {wanted}")
        return value

    return parse


def _widths(text: str) -> list[int]:
    if text.strip() in ("", "0"):
        return []
    widths = text.split(",")
    if not all(width.strip().isdecimal() and 0 < int(width) < 2**31 for width in widths):
        raise argparse.ArgumentTypeError(f"got {text!r}; expected whole numbers above 0 and commas, as in 128,64")
    return [int(width) for width in widths]


def _scheme(name: str) -> str:
    try:
        nn.init.init_(torch.nn.Linear(1, 1), name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name
