"""What a run measured, one row an epoch: as a table, a CSV file, a picture, or a TensorBoard log."""

import csv
from collections.abc import Iterator
from pathlib import Path

__all__ = ["History"]

_TRAIN, _VALIDATION = "#2f6db5", "#e07b39"


class History:
    """Rows of figures: ``history["val_loss"]`` is a column, ``history[-1]`` a row (a dict), ``len(history)``
    their number.

    The rows that :func:`gdbp.train.fit` appends hold ``epoch`` (from 1), ``train_loss``, ``val_loss``,
    ``train_accuracy`` and ``val_accuracy`` (or ``train_r2`` and ``val_r2``), ``grad_norm`` (mean over the
    epoch's steps, before clipping), ``lr`` (of the epoch's last step) and ``seconds`` (since training
    began).
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def append(self, **row: float) -> None:
        """Adds a row. Raises ValueError if its columns differ from those of the first row."""
        if self.rows and row.keys() != self.rows[0].keys():
            raise ValueError(f"row has columns {', '.join(row)}; expected {', '.join(self.columns)}")
        self.rows.append(row)

    @property
    def columns(self) -> list[str]:
        return list(self.rows[0]) if self.rows else []

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, float]]:
        return iter(self.rows)

    def __getitem__(self, key):
        return [row[key] for row in self.rows] if isinstance(key, str) else self.rows[key]

    def to_csv(self, path: str | Path) -> None:
        """Writes one line an epoch under a line of column names; figures keep their full precision."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)

    def plot(self, path: str | Path, *, title: str = "") -> None:
        """Draws training and validation curves: the loss, and beside it the accuracy or R2 if there is one.

        The suffix of ``path`` chooses the format (.png, .svg, .pdf). Needs matplotlib; opens no window.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        panels = ["loss", *(name for name in ("accuracy", "r2") if f"train_{name}" in self.columns)]
        figure = Figure(figsize=(5.2 * len(panels), 3.8), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        for axes, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            self._draw(axes, name)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if title:
            figure.suptitle(title, fontsize=11, fontweight="bold")
        figure.savefig(path)

    def _draw(self, axes, name: str) -> None:
        percent = 100 if name == "accuracy" else 1
        heading = {"accuracy": "accuracy (%)", "r2": "R\N{SUPERSCRIPT TWO}"}.get(name, name)
        # A lone epoch has no line to draw, so its point must show.
        marker = "o" if len(self) == 1 else None
        for split, colour, text in (("train", _TRAIN, "training"), ("val", _VALIDATION, "validation")):
            if f"{split}_{name}" not in self.columns:
                continue
            values = [percent * value for value in self[f"{split}_{name}"]]
            label = f"{text}, last {values[-1]:.4g}"
            axes.plot(self["epoch"], values, color=colour, linewidth=1.8, marker=marker, label=label)
        losses = [abs(value) for key in self.columns if key.endswith("_loss") for value in self[key]]
        if name == "loss" and min(losses, default=0) > 0 and max(losses) > 20 * min(losses):
            axes.set_yscale("log")
        axes.set_xlabel("epoch")
        axes.set_title(heading, fontsize=10)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.02)
        axes.legend(frameon=False, fontsize=9)

    def to_tensorboard(self, folder: str | Path) -> None:
        """Writes every column as a scalar over the epochs; raises ImportError without tensorboard."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ImportError("to_tensorboard needs tensorboard: pip install tensorboard") from None
        with SummaryWriter(str(folder)) as writer:
            for row in self.rows:
                for name, value in row.items():
                    if name != "epoch":
                        writer.add_scalar(name.replace("_", "/", 1), value, row["epoch"])
