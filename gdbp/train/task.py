"""What the options of a command describe: data, network, loss and update rule."""

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

from gdbp import nn
from gdbp._errors import InputError
from gdbp.memory import cpu_cache_unless_refused

from .batches import step_size
from .data import Data, load_data
from .rules import make_optimizer
from .run import build_network

__all__ = ["Task"]


@dataclass(frozen=True)
class Task:
    data: Data
    sizes: list[int]
    model: torch.nn.Module
    loss: torch.nn.Module
    optimizer: torch.optim.Optimizer
    batch_size: int

    @classmethod
    def of(cls, options: argparse.Namespace, lr: float | None = None) -> "Task":
        """lr: None for the rule's own. Raises InputError where there can be no such task."""
        device = _device(options.device)
        data = load_data(options.data, target=options.target, task=options.task, seed=options.seed).to(device)
        smoothing = 0.1 if options.label_smoothing is None else options.label_smoothing
        if options.label_smoothing is not None and not data.class_names:
            raise InputError("--label-smoothing is for classes, and this is a regression; leave it out")
        batch_size = step_size(len(data.train[0]), options.method, options.batch_size)
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
        optimizer = make_optimizer(model, options.optimizer, options.method, lr, options.l1, options.l2)
        return cls(data, sizes, model, loss, optimizer, batch_size)

    def introduce(self, say, options: argparse.Namespace) -> None:
        """Says what is learned, and by which network."""
        data = self.data
        counts = [len(pair[0]) for pair in (data.train, data.validation, data.test)]
        learned = f"{len(data.class_names)} classes" if data.class_names else f"regression of {data.target_name}"
        sets = f"{counts[0]} training, {counts[1]} validation, {counts[2]} test samples"
        say(f"data      {data.name}: {learned}, {sets}")
        parameters = sum(a * b + b for a, b in pairwise(self.sizes))
        shape = f"{'-'.join(map(str, self.sizes))} {options.activation}"
        say(f"network   {shape}, {parameters:,} parameters, on {options.device}")

    @contextlib.contextmanager
    def resources(self, options: argparse.Namespace) -> Iterator[None]:
        """With the threads and the memory that suit it; running out of that is the user's to mend."""
        before = torch.get_num_threads()
        # Below some 10 million multiplications a step, threads cost more to start and join than they save.
        work = self.batch_size * sum(a * b for a, b in pairwise(self.sizes))
        torch.set_num_threads(options.threads or (before if work > 10_000_000 else 1))
        try:
            with cpu_cache_unless_refused():
                yield
        except torch.OutOfMemoryError:
            raise InputError(f"{options.device} is out of memory; use a smaller --batch-size or --hidden") from None
        finally:
            torch.set_num_threads(before)


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
