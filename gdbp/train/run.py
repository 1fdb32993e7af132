"""The network of a run, and the folder that keeps it: enough to draw, compare and use it again."""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import torch

from gdbp import nn
from gdbp._errors import InputError
from gdbp.nn.init import init_

from .data import Data
from .history import History

__all__ = ["ACTIVATIONS", "Run", "build_network", "load_run", "save_run"]

ACTIVATIONS = ("relu", "gelu", "sigmoid", "tanh")


def build_network(
    sizes: list[int], activation: str = "relu", init: str = "he", generator: torch.Generator | None = None
) -> torch.nn.Sequential:
    """Linear layers of the given widths, inputs first and outputs last, with the activation after all but
    the last.

    ``init`` and ``generator`` go to :func:`gdbp.nn.init.init_`; the last layer is drawn with the gain of a
    linear one.
    """
    layers = []
    for index, shape in enumerate(pairwise(sizes)):
        after = activation if index < len(sizes) - 2 else None
        layers.append(init_(nn.Linear(*shape, activation=after), init, nonlinearity=after, generator=generator))
    return torch.nn.Sequential(*layers)


def save_run(folder: Path, model: torch.nn.Module, data: Data, history: History, config: dict) -> None:
    """Writes the four files of a run; those of an earlier run in the folder are replaced."""
    from safetensors.torch import save_file

    history.to_csv(folder / "metrics.csv")
    history.plot(folder / "loss.png", title=f"{data.name}: {config['summary']}")
    weights = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    described = {
        "name": data.name,
        "task": data.task,
        "features": data.feature_names,
        "target": data.target_name,
        "classes": data.class_names,
        "x_mean": data.x_mean.tolist(),
        "x_std": data.x_std.tolist(),
        "y_mean": data.y_mean,
        "y_std": data.y_std,
    }
    text = json.dumps({**config, "data": described}, indent=2, allow_nan=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


@dataclass
class Run:
    """A trained network with its configuration; see :func:`load_run`."""

    model: torch.nn.Module
    config: dict

    @torch.no_grad()
    def predict(self, x) -> list[str] | list[float]:
        """Class names, or values in the unit of the target, for raw samples ``x`` (n, features)."""
        data = SimpleNamespace(**self.config["data"])
        try:
            x = torch.as_tensor(x, dtype=torch.float64, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"x can't be made a tensor of numbers: {error}") from None
        if x.ndim != 2 or x.shape[1] != len(data.x_mean):
            raise InputError(f"x has shape {tuple(x.shape)}; expected (samples, {len(data.x_mean)})")
        if not x.isfinite().all():
            row, column = (~x.isfinite()).nonzero()[0].tolist()
            name = data.features[column]
            raise InputError(f"x is {x[row, column]} at [{row}, {column}], column {name!r}; expected finite numbers")
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (data.x_mean, data.x_std))
        outputs = self.model(((x - mean) / std).float())
        if data.task == "classification":
            return [data.classes[index] for index in outputs.argmax(1).tolist()]
        return (outputs[:, 0].double() * data.y_std + data.y_mean).tolist()


def load_run(folder: str | Path) -> Run:
    """Opens what ``python -m gdbp train`` wrote; the network is on the CPU, in evaluation mode."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        weights = load_file(folder / "model.safetensors")
        model = build_network(config["network"]["sizes"], config["network"]["activation"])
        model.load_state_dict(weights)
    except FileNotFoundError as error:
        missing = error.filename or error
        raise InputError(f"folder {str(folder)!r} holds no finished run: {missing} is missing") from None
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise InputError(f"folder {str(folder)!r} holds a damaged run: {str(error).splitlines()[0]}") from None
    return Run(model.eval(), config)
