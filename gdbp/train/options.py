"""The options of ``python -m gdbp train`` and ``lr-find``, and the sentences for values that don't fit them."""

import argparse

import torch

from gdbp import nn
from gdbp._command import integer, number, shown

from .batches import METHODS
from .data import TASKS
from .readers import BUILTIN
from .rules import RULES
from .run import ACTIVATIONS
from .schedule import SCHEDULES

__all__ = ["add_range_options", "add_train_options"]


def add_train_options(parser: argparse.ArgumentParser) -> None:
    """What ``python -m gdbp train`` takes."""
    _add_data_and_network(parser)
    add = parser.add_argument_group("training").add_argument
    _add_steps(add)
    add("--epochs", type=integer(1), default=30, help="passes over the training set")
    many, one = (
        ", ".join(f"{name} {rule.rate_of(method):g}" for name, rule in RULES.items())
        for method in ("minibatch", "stochastic")
    )
    add("--lr", type=number(above=0), help=f"highest learning rate (default: {many}; of method stochastic {one})")
    add("--schedule", choices=SCHEDULES, default="onecycle", help="of the learning rate")
    keep = "which network: of the epoch with the lowest validation loss, or of the last"
    add("--keep", choices=("best", "last"), default="best", help=keep)

    add = parser.add_argument_group("output").add_argument
    out = "run folder (default: runs/<data>-<time>); files of an earlier run are replaced"
    add("--out", metavar="DIR", help=out)
    add("--quiet", action="store_true", help="print nothing but errors")


def add_range_options(parser: argparse.ArgumentParser) -> None:
    """What ``python -m gdbp lr-find`` takes."""
    _add_data_and_network(parser)
    add = parser.add_argument_group("training").add_argument
    _add_steps(add)
    add("--lowest", type=number(above=0), default=1e-6, metavar="LR", help="learning rate of the first step")
    add("--highest", type=number(above=0), default=10.0, metavar="LR", help="learning rate of the last step")
    many = "how many rates to try (default: 100; 500 for fewer than 8 samples a step)"
    add("--steps", type=integer(20, 100_000), metavar="N", help=many)

    add = parser.add_argument_group("output").add_argument
    add("--out", metavar="FILE", help="a picture of the losses: .png, .svg or .pdf (default: none)")
    add("--quiet", action="store_true", help="print the rate alone")


def _add_data_and_network(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data").add_argument
    add("--data", default="digits", metavar="NAME|FILE", help=f"{', '.join(BUILTIN)}, or a .csv or .npz file")
    add("--target", metavar="COLUMN", help="the column of a .csv file to predict (default: the last)")
    add("--task", choices=TASKS, help="default: inferred from the target")
    add("--seed", type=integer(0, 2**32 - 1), default=0, help="of the split, the initial weights and the shuffling")

    add = parser.add_argument_group("network").add_argument
    widths = "of the hidden layers, 0 for none (default: 128,64; 32 for fewer than 1000 training samples)"
    add("--hidden", type=_widths, metavar="WIDTHS", help=widths)
    add("--activation", choices=ACTIVATIONS, default="relu", help="after each hidden layer")
    add("--init", type=_scheme, default="he", help=f"initial weights: {', '.join(nn.init.SCHEMES)}")


def _add_steps(add) -> None:
    """What a step of the training is."""
    add("--method", choices=METHODS, default="minibatch", help="a step takes all samples, one, or a batch")
    add("--batch-size", type=integer(1), metavar="N", help="samples a step of method minibatch (default: 32)")
    add("--optimizer", choices=RULES, default="adamw", help="update rule")
    add("--l1", type=number(least=0), default=0.0, help="L1 regularisation of the weights: exact zeros")
    add("--l2", type=number(least=0), help="weight decay (default: 0.01 for adamw, else 0.0001)")
    smoothing = "of the labels, for classification (default: 0.1)"
    add("--label-smoothing", type=number(least=0, most=1), metavar="SHARE", help=smoothing)
    noise = "on the inputs of each step, in standard deviations"
    add("--noise", type=number(least=0), default=0.5, help=noise)
    add("--clip", type=number(above=0), metavar="NORM", help="largest gradient norm (default: any)")
    add("--threads", type=integer(1, 1024), metavar="N", help="CPU threads (default: 1 for a small network)")
    add("--device", default="cpu", help="cpu, cuda or cuda:N")


def _widths(text: str) -> list[int]:
    if text.strip() in ("", "0"):
        return []
    widths = text.split(",")
    if not all(width.strip().isdecimal() and 0 < len(width) < 12 and int(width) < 2**31 for width in widths):
        raise argparse.ArgumentTypeError(f"got {shown(text)}; expected whole numbers above 0 and commas, as in 128,64")
    return [int(width) for width in widths]


def _scheme(name: str) -> str:
    try:
        nn.init.init_(torch.nn.Linear(1, 1), name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name
