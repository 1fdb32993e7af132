"""``python -m gdbp train``: a first network from one command. ``python -m gdbp lr-find``: at which rate it learns."""

import argparse
import math
import platform
import sys
import time
from pathlib import Path

import torch

import gdbp
from gdbp._command import try_to_write
from gdbp._errors import InputError, require

from . import loop
from .data import Data
from .history import History
from .options import add_range_options, add_train_options
from .range_test import lr_find
from .rules import RULES
from .run import save_run
from .task import Task

__all__ = ["add_commands"]


def add_commands(commands) -> None:
    """Adds ``train`` and ``lr-find`` to the subcommands of ``python -m gdbp``."""
    parser = commands.add_parser(
        "train",
        help="train a first network and write its run folder",
        description="Trains a network on a table of numbers, shows how it learns, and writes a run folder "
        "with metrics.csv, loss.png, model.safetensors and config.json.",
        epilog="Afterwards, from Python: gdbp.train.load_run(DIR).predict(x) for rows x of raw inputs.",
        formatter_class=_Help,
    )
    parser.set_defaults(run=train)
    add_train_options(parser)
    parser = commands.add_parser(
        "lr-find",
        help="find a learning rate for train, in a second or two",
        description="Trains for some steps, each with a larger learning rate than the one before, and says which rate "
        "to take: a range test. It takes the options of train that describe the same training.",
        formatter_class=_Help,
    )
    parser.set_defaults(run=find)
    add_range_options(parser)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but not where the default is None and the help says what that means."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False
        return action.help if silent else super()._get_help_string(action)


def _say(options: argparse.Namespace):
    return (lambda *_: None) if options.quiet else print


def train(options: argparse.Namespace) -> int:
    require("numpy", "matplotlib", "safetensors", *(["tqdm"] if _bar_shown(options) else []))
    task, say = Task.of(options, options.lr), _say(options)
    data, optimizer = task.data, task.optimizer
    # Tried out now, for what can't be written should not wait for the end; made then, for a run may be stopped.
    folder = Path(options.out or f"runs/{data.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    try_to_write(folder / "config.json")
    task.introduce(say, options)
    rate = f"learning rate {optimizer.defaults['lr']:g} {options.schedule}"
    say(f"training  {options.optimizer}, {rate}, {options.epochs} epochs, {task.batch_size} samples a step")
    history = _fit(task, options)
    test = loop.evaluate(task.model, task.loss, *data.test)
    if not data.class_names:
        test["rmse"] = math.sqrt(test["loss"]) * data.y_std
    seconds = history[-1]["seconds"]
    speed = options.epochs * len(data.train[0]) / seconds
    config = {
        "options": {name: value for name, value in vars(options).items() if name not in ("run", "command")},
        "network": {"sizes": task.sizes, "activation": options.activation},
        "optimizer": {"lr": optimizer.defaults["lr"], "l2": optimizer.param_groups[0]["weight_decay"]},
        "batch_size": task.batch_size,
        "seed": options.seed,
        "versions": {
            "gdbp": gdbp.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "last_epoch": _as_json(history[-1]),
        "test": _as_json(test),
        "summary": f"test {_figures(test, data)}",
        "seconds": seconds,
        "samples_per_second": speed,
    }
    try:
        if options.out:
            folder.mkdir(parents=True, exist_ok=True)
        else:
            folder = _unused(folder)
        save_run(folder, task.model, data, history, config)
    except OSError as error:
        raise InputError(f"run folder '{folder}' can't be written to ({error.strerror or error})") from None
    say(f"test      {_figures(test, data)}")
    say(f"time      {seconds:.2f} s, {speed:,.0f} samples/s")
    say(f"written   {folder}")
    if _guesses(test, data):
        remedy = "try another --lr (python -m gdbp lr-find) or more --epochs"
        print(f"gdbp: the network is no better than a guess ({_figures(test, data)}); {remedy}", file=sys.stderr)
    return 0


def find(options: argparse.Namespace) -> int:
    require("numpy", *(["matplotlib"] if options.out else []))
    if options.out:
        try_to_write(Path(options.out))
    task = Task.of(options)
    task.introduce(_say(options), options)
    with task.resources(options):
        try:
            found = lr_find(
                task.model, task.loss, task.optimizer, task.data,
                lowest=options.lowest, highest=options.highest, steps=options.steps, batch_size=options.batch_size,
                method=options.method, clip=options.clip, noise=options.noise, seed=options.seed,
            )  # fmt: skip
        except FloatingPointError as error:
            raise InputError(str(error)) from None
    if options.out:
        _draw(found, options.out)
    if found.suggestion is None:
        raise InputError(str(found))
    print(f"{found.suggestion:.2g}" if options.quiet else f"found     {found}")
    return 0


def _draw(found, path: str) -> None:
    try:
        found.plot(path)
    except ValueError as error:  # a suffix that matplotlib does not know
        Path(path).unlink(missing_ok=True)
        raise InputError(f"--out {path!r} can't be drawn ({error})") from None
    except OSError as error:
        raise InputError(f"--out {path!r} can't be written to ({error.strerror or error})") from None


def _fit(task: Task, options: argparse.Namespace) -> History:
    """A loss that grew, at once or in the end, is the user's to mend."""
    try:
        with task.resources(options):
            start = loop.evaluate(task.model, task.loss, *task.data.train)["loss"]
            history = loop.fit(
                task.model, task.loss, task.optimizer, task.data,
                epochs=options.epochs, batch_size=options.batch_size, method=options.method,
                schedule=options.schedule, clip=options.clip, noise=options.noise, seed=options.seed,
                keep=options.keep, progress=_bar_shown(options),
            )  # fmt: skip
        end = history[-1]["train_loss"]
        if end > 2 * start:
            raise FloatingPointError(f"the training loss grew from {start:.3g} to {end:.3g}")
        return history
    except FloatingPointError as error:
        what, _, _ = str(error).partition(";")
        raise InputError(f"{what}; {_remedies(options, task.optimizer.defaults['lr'])}") from None


def _as_json(row: dict[str, float]) -> dict[str, float | None]:
    """The row with None for infinity and NaN, which JSON does not know; a test sample may lie far off the others."""
    return {name: value if math.isfinite(value) else None for name, value in row.items()}


def _guesses(test: dict[str, float], data: Data) -> bool:
    """Whether always naming the most frequent class, or the mean, would do as well."""
    if data.class_names:
        return test["accuracy"] <= data.test[1].bincount().max().item() / len(data.test[1])
    return test["r2"] <= 0


def _figures(test: dict[str, float], data: Data) -> str:
    if data.class_names:
        return f"accuracy {test['accuracy']:.2%}, loss {test['loss']:.4f}"
    return f"R2 {test['r2']:.3f}, RMSE {test['rmse']:.4g}, loss {test['loss']:.4f}"


def _bar_shown(options: argparse.Namespace) -> bool:
    return not options.quiet and sys.stderr.isatty()


def _unused(folder: Path) -> Path:
    """The folder, new, or one with a number after its name where another run was faster."""
    first, taken = folder, 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            taken += 1
            folder = first.with_name(f"{first.name}-{taken}")


def _remedies(options: argparse.Namespace, rate: float) -> str:
    """What helps against a loss that grew at this learning rate."""
    large = [f"a smaller --{name}" for name in ("noise", "l1", "l2") if (getattr(options, name) or 0) > 1]
    lower = min(rate / 10, RULES[options.optimizer].rate_of(options.method))
    return "use " + " or ".join([*large, f"--lr {lower:g}", "--clip 1"])
