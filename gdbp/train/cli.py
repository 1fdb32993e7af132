"""``python -m gdbp train``: a first network from one command."""

import argparse
import math
import platform
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch

import gdbp
from gdbp import nn
from gdbp._command import try_to_write
from gdbp._errors import InputError, require
from gdbp.memory import cpu_cache_unless_refused

from . import loop
from .data import Data, load_data
from .history import History
from .options import add_options
from .rules import RULES, make_optimizer
from .run import build_network, save_run

__all__ = ["add_command"]


def add_command(commands) -> None:
    """Adds ``train`` to the subcommands of ``python -m gdbp``."""
    parser = commands.add_parser(
        "train",
        help="train a first network and write its run folder",
        description="Trains a network on a table of numbers, shows how it learns, and writes a run folder "
        "with metrics.csv, loss.png, model.safetensors and config.json.",
        epilog="Afterwards, from Python: gdbp.train.load_run(DIR).predict(x) for rows x of raw inputs.",
        formatter_class=_Help,
    )
    parser.set_defaults(run=train)
    add_options(parser)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but not where the default is None and the help says what that means."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False
        return action.help if silent else super()._get_help_string(action)


def train(options: argparse.Namespace) -> int:
    require("numpy", "matplotlib", "safetensors", *(["tqdm"] if _bar_shown(options) else []))
    device = _device(options.device)
    data = load_data(options.data, target=options.target, task=options.task, seed=options.seed).to(device)
    smoothing = 0.1 if options.label_smoothing is None else options.label_smoothing
    if options.label_smoothing is not None and not data.class_names:
        raise InputError("--label-smoothing is for classes, and this is a regression; leave it out")
    batch_size = loop.step_size(len(data.train[0]), options.method, options.batch_size)
    # Tried out now, for what can't be written should not wait for the end; made then, for a run may be stopped.
    folder = Path(options.out or f"runs/{data.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    try_to_write(folder / "config.json")
    hidden = options.hidden
    if hidden is None:  # a large network would learn a small set by heart
        hidden = [128, 64] if len(data.train[0]) >= 1000 else [32]
    sizes = [data.features, *hidden, data.outputs]
    generator = torch.Generator().manual_seed(options.seed)
    try:
        model = build_network(sizes, options.activation, options.init, generator).to(device)
    except RuntimeError as error:
        raise InputError(f"a network of {sizes} can't be made ({error}); use a smaller --hidden") from None
    loss = nn.CrossEntropyLoss(label_smoothing=smoothing) if data.class_names else nn.MSELoss()
    optimizer = make_optimizer(model, options.optimizer, options.method, options.lr, options.l1, options.l2)
    say = (lambda *_: None) if options.quiet else print
    _introduce(say, data, sizes, batch_size, optimizer, options)
    history = _fit(model, loss, optimizer, data, options, _threads(options.threads, batch_size, sizes))
    test = loop.evaluate(model, loss, *data.test)
    if not data.class_names:
        test["rmse"] = math.sqrt(test["loss"]) * data.y_std
    seconds = history[-1]["seconds"]
    speed = options.epochs * len(data.train[0]) / seconds
    config = {
        "options": {name: value for name, value in vars(options).items() if name not in ("run", "command")},
        "network": {"sizes": sizes, "activation": options.activation},
        "optimizer": {"lr": optimizer.defaults["lr"], "l2": optimizer.param_groups[0]["weight_decay"]},
        "batch_size": batch_size,
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
        save_run(folder, model, data, history, config)
    except OSError as error:
        raise InputError(f"run folder '{folder}' can't be written to ({error.strerror or error})") from None
    say(f"test      {_figures(test, data)}")
    say(f"time      {seconds:.2f} s, {speed:,.0f} samples/s")
    say(f"written   {folder}")
    if _guesses(test, data):
        remedy = "try another --lr or more --epochs"
        print(f"gdbp: the network is no better than a guess ({_figures(test, data)}); {remedy}", file=sys.stderr)
    return 0


def _introduce(say, data: Data, sizes: list[int], batch_size: int, optimizer, options) -> None:
    counts = [len(pair[0]) for pair in (data.train, data.validation, data.test)]
    learned = f"{len(data.class_names)} classes" if data.class_names else f"regression of {data.target_name}"
    sets = f"{counts[0]} training, {counts[1]} validation, {counts[2]} test samples"
    say(f"data      {data.name}: {learned}, {sets}")
    parameters = sum(a * b + b for a, b in pairwise(sizes))
    shape = f"{'-'.join(map(str, sizes))} {options.activation}"
    say(f"network   {shape}, {parameters:,} parameters, on {options.device}")
    rate = f"learning rate {optimizer.defaults['lr']:g} {options.schedule}"
    say(f"training  {options.optimizer}, {rate}, {options.epochs} epochs, {batch_size} samples a step")


def _fit(model, loss, optimizer, data: Data, options: argparse.Namespace, threads: int) -> History:
    """Trains on so many threads; a loss that grew, at once or in the end, is the user's to mend."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        start = loop.evaluate(model, loss, *data.train)["loss"]
        with cpu_cache_unless_refused():
            history = loop.fit(
                model, loss, optimizer, data,
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
        raise InputError(f"{what}; {_remedies(options, optimizer.defaults['lr'])}") from None
    except torch.OutOfMemoryError:
        raise InputError(f"{options.device} is out of memory; use a smaller --batch-size or --hidden") from None
    finally:
        torch.set_num_threads(before)


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


def _threads(asked: int | None, batch_size: int, sizes: list[int]) -> int:
    # Below some 10 million multiplications a step, threads cost more to start and join than they save.
    work = batch_size * sum(a * b for a, b in pairwise(sizes))
    return asked or (torch.get_num_threads() if work > 10_000_000 else 1)


def _bar_shown(options: argparse.Namespace) -> bool:
    return not options.quiet and sys.stderr.isatty()


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name!r} is unknown; expected cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count() or "no"
        seen = f"torch {torch.__version__} sees {found} CUDA device"
        raise InputError(f"--device {name} can't be used: {seen}; use --device cpu")
    return device


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
