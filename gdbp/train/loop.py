"""The training loop: shuffle, step, measure, once an epoch, over data that already lies in tensors."""

import math
import time
from collections.abc import Callable, Iterable

import torch

from gdbp._errors import InputError
from gdbp.step import TrainStep

from .batches import Batches, check_clip
from .data import Data, Pair
from .history import History
from .schedule import make_schedule

__all__ = ["evaluate", "fit"]

_EVALUATION_ROWS = 8192  # bounds the memory of a pass over a whole set


def fit(
    model: torch.nn.Module,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    data: Data | Pair,
    *,
    epochs: int,
    batch_size: int | None = None,
    method: str = "minibatch",
    schedule: str | Callable | None = None,
    clip: float | None = None,
    seed: int = 0,
    noise: float = 0.0,
    keep: str = "last",
    callbacks: Iterable[Callable[[dict], None]] = (),
    progress: bool = False,
) -> History:
    """Trains ``model`` in place and returns what was measured, one row an epoch.

    Both losses of a row are taken after the epoch, in evaluation mode, over the whole training and
    validation sets: they measure the same network, so their difference is overfitting and nothing else.

    Args:
        model: maps ``x`` (n, ...) to outputs; its parameters and the data are on one device.
        loss: called as ``loss(outputs, y)``, returns the mean as a 0-dim tensor.
        optimizer: over the parameters of ``model``.
        data: a :class:`~gdbp.train.Data`, or a pair of tensors ``(x, y)`` for training without validation.
            Integer ``y`` (n,) also measures the accuracy, floating ``y`` of the outputs' shape R2.
        epochs: passes over the training set, at least 1.
        batch_size: samples a step for ``minibatch``; default 32, or the whole set if that is smaller. The
            last step of an epoch takes what is left.
        method: ``batch`` (the whole training set each step: gradient descent as in the textbook),
            ``stochastic`` (one sample each step) or ``minibatch``.
        schedule: ``constant``, ``step``, ``cosine`` or ``onecycle`` (see :func:`gdbp.train.make_schedule`),
            or a function ``(optimizer, steps) -> scheduler``; the scheduler is stepped once after each
            optimizer step.
        clip: the gradient's norm over all parameters is scaled down to this if it is larger.
        noise: standard deviation of the normal noise that each training step adds to its inputs; it
            regularises, as no two steps see quite the same sample.
        seed: of the order of the samples and of the noise; the random state of torch is neither used nor
            changed.
        keep: ``last`` leaves the model as the last epoch made it; ``best`` puts back the parameters and
            buffers of the epoch with the lowest validation loss, which undoes overfitting.
        callbacks: each is called with the row after each epoch.
        progress: shows a bar on stderr (needs tqdm).

    Raises:
        InputError: an argument is out of range (a ValueError).
        FloatingPointError: the loss was no longer finite after an epoch; names the epoch and what to change.
    """
    batches = Batches(data, method, batch_size, noise=noise, seed=seed)
    if not isinstance(epochs, int) or epochs < 1:
        raise InputError(f"epochs is {epochs}; expected a whole number of at least 1")
    most = check_clip(clip)
    if not isinstance(callbacks, Iterable) or not all(map(callable, callbacks := tuple(callbacks))):
        raise InputError(f"callbacks is {callbacks!r}; expected a list of functions")
    if keep not in ("last", "best") or (keep == "best" and not isinstance(data, Data)):
        raise InputError(f"keep is {keep!r}; expected 'last', or 'best' for data with a validation set")
    make = schedule if callable(schedule) else lambda *of: make_schedule(schedule or "constant", *of)
    scheduler = make(optimizer, epochs * len(batches))
    step = TrainStep(model, loss, optimizer, strict=False, max_grad_norm=most, seed=seed)
    at_once = not noise and schedule in (None, "constant")  # nothing happens between two steps
    best, best_loss = None, math.inf
    history, start = History(), time.perf_counter()

    with _Bar(epochs * len(batches), progress) as bar:
        for epoch in range(1, epochs + 1):
            model.train()
            rate = optimizer.param_groups[0]["lr"]
            norms = []
            if at_once:
                step.many((batches.x, batches.y), batches.size, generator=batches.generator)
                norms.append(step.grad_norms)
                bar.advance(len(batches))
            for x, y in () if at_once else batches:
                step(x, y)
                norms.append(step.grad_norms)
                rate = optimizer.param_groups[0]["lr"]
                scheduler.step()
                bar.advance()
            row = {"epoch": epoch}
            measured = {"train": evaluate(model, loss, batches.x, batches.y)}
            if isinstance(data, Data):
                measured["val"] = evaluate(model, loss, *data.validation)
            for name in measured["train"]:
                row |= {f"{part}_{name}": figures[name] for part, figures in measured.items()}
            row |= {
                "grad_norm": torch.cat(norms).mean().item(),
                "lr": float(rate),
                "seconds": time.perf_counter() - start,
            }
            if not all(math.isfinite(value) for key, value in row.items() if key.endswith("loss")):
                less = "less noise, " if noise > 1 else ""
                raise FloatingPointError(
                    f"the loss became {row['train_loss']} in epoch {epoch}; use {less}a smaller learning rate "
                    "or clip the gradients"
                )
            history.append(**row)
            if keep == "best" and row["val_loss"] < best_loss:
                best, best_loss = {k: v.clone() for k, v in model.state_dict().items()}, row["val_loss"]
            bar.show(row)
            for callback in callbacks:
                callback(row)
    if best is not None:
        model.load_state_dict(best)
    return history


@torch.no_grad()
def evaluate(model: torch.nn.Module, loss: Callable, x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    """The loss over a whole set, and ``accuracy`` or ``r2`` where ``y`` has one. Ends in evaluation mode."""
    model.eval()
    outputs = torch.cat([model(rows) for rows in x.split(_EVALUATION_ROWS)])
    figures = {"loss": loss(outputs, y).item()}
    if not y.is_floating_point() and outputs.ndim == 2 and y.ndim == 1:
        figures["accuracy"] = (outputs.argmax(1) == y).double().mean().item()
    elif y.is_floating_point() and outputs.shape == y.shape:
        residual = (outputs - y).double().square().sum()
        spread = (y - y.mean(0)).double().square().sum()
        # Of a constant nothing can be explained: as scikit-learn has it, 1 for a perfect prediction, and else 0.
        figures["r2"] = (1 - residual / spread).item() if spread > 0 else float(residual == 0)
    return figures


class _Bar:
    """A tqdm bar over all steps of the run, with the figures of the last epoch; or nothing at all."""

    def __init__(self, steps: int, shown: bool) -> None:
        self.bar = None
        if shown:
            from tqdm import tqdm

            form = "{desc}{percentage:3.0f}%|{bar:20}| {elapsed}<{remaining}{postfix}"
            self.bar = tqdm(total=steps, bar_format=form, dynamic_ncols=True)

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *error) -> None:
        if self.bar is not None:
            self.bar.close()

    def advance(self, steps: int = 1) -> None:
        if self.bar is not None:
            self.bar.update(steps)

    def show(self, row: dict) -> None:
        if self.bar is None:
            return
        part = "val" if "val_loss" in row else "train"
        figures = [f"loss {row[f'{part}_loss']:.4f}"]
        if f"{part}_accuracy" in row:
            figures.append(f"accuracy {row[f'{part}_accuracy']:.1%}")
        if f"{part}_r2" in row:
            figures.append(f"R2 {row[f'{part}_r2']:.3f}")
        figures += [f"|grad| {row['grad_norm']:.3f}", f"lr {row['lr']:.2g}"]
        self.bar.set_description_str(f"epoch {row['epoch']:<3} ", refresh=False)
        self.bar.set_postfix_str(", ".join(figures), refresh=False)
