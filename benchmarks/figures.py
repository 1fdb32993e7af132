"""Pictures of a report, by matplotlib: ratios as bars, throughput under its roof, time against size."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmarks.files import Report
from benchmarks.table import Row, duration, figure
from benchmarks.work import OURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AHEAD, BEHIND, PEER, ROOF = "#1a7f4b", "#c0392b", "#7a8699", "#b9770e"
OTHERS = ("#7a8699", "#2f6fb2", "#b9770e", "#8e5ea2", "#2a9d8f", "#c0392b", "#5d6d7e", "#a04000")


def _subplots(rows: int, columns: int, width: float, height: float) -> tuple["Figure", list]:
    from matplotlib.figure import Figure  # not pyplot: no window, and nothing global

    drawn = Figure(figsize=(width, height), layout="constrained")
    axes = drawn.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return drawn, list(axes.flat)


def label(row: Row) -> str:
    dtype = "" if row["dtype"] == "float32" else f" {row['dtype']}"
    return f"{row['family']}.{row['case']} {row['size']}{dtype}"


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers for a logarithmic axis, some of them even where it is short."""
    digits = (1, 2, 5) if high < 300 * low else (1,)
    ticks = [float(f"{digit}e{power}") for power in range(-12, 12) for digit in digits]
    return [tick for tick in ticks if low <= tick <= high]


def ratios(report: Report) -> "Figure | None":
    """The best peer's time over ours, a bar for each row, from the most lost to the most won."""
    rows = sorted((row for row in report["rows"] if row["ratio"]), key=lambda row: row["ratio"])
    if not rows:
        return None
    drawn, (axis,) = _subplots(1, 1, 8, 1.2 + 0.21 * len(rows))
    values = [row["ratio"] for row in rows]
    colours = [AHEAD if value >= 1 else BEHIND for value in values]
    axis.barh(range(len(rows)), [value - 1 for value in values], left=1, color=colours, height=0.7)
    axis.set_xscale("log")
    # Room for the labels, to the right of their bars.
    axis.set_xlim(min(0.5, *values) * 0.8, max(2.0, *values) * 3)
    ticks = _ticks(*axis.get_xlim())
    axis.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axis.minorticks_off()
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [label(row) for row in rows])
    axis.set_ylim(-0.6, len(rows) - 0.4)
    for y, (value, row) in enumerate(zip(values, rows)):
        text = f" {figure(value)}x {row['best']}"
        axis.text(max(1, value), y, text, va="center", fontsize=7, color="#444444")
    axis.set_xlabel("time of the best peer, over ours (right of 1: gdbp is faster)")
    return drawn


def roofline(report: Report) -> "Figure | None":
    """What is reached under what a copy, or the bare matrix products, of the same size reach in the same run."""
    rows = [row for row in report["rows"] if row["limit"]]
    # A row is shown with what its limit does: some have products to do, and yet memory is what limits them.
    kinds = [(kind, [row for row in rows if row["limit"]["what"].startswith("copy") == (kind == "bytes") and row[kind]])
             for kind in ("bytes", "flops")]  # fmt: skip
    kinds = [(kind, chosen) for kind, chosen in kinds if chosen]
    if not kinds:
        return None
    drawn, axes = _subplots(1, len(kinds), 5.5 * len(kinds), 4)
    for axis, (kind, chosen) in zip(axes, kinds):

        def rates(seconds: Callable[[Row], float | None], kind=kind, chosen=chosen) -> tuple[list, list]:
            points = sorted((row[kind], row[kind] / s * 1e-9) for row in chosen if (s := seconds(row)))
            return [x for x, _ in points], [y for _, y in points]

        axis.plot(*rates(lambda row: row["limit"]["seconds"]), "_", color=ROOF, markersize=14, markeredgewidth=2.5,
                  label="limit: copy" if kind == "bytes" else "limit: the bare products")  # fmt: skip
        axis.plot(*rates(_best), "o", color=PEER, markersize=5, fillstyle="none", label="best peer")
        axis.plot(*rates(lambda row: row["contenders"][0]["median"]), "o", color=AHEAD, markersize=5, label=OURS)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("bytes to move" if kind == "bytes" else "operations to do")
        axis.set_ylabel("GB/s" if kind == "bytes" else "GFLOP/s")
        axis.legend(fontsize=8, frameon=False)
    return drawn


def _best(row: Row) -> float | None:
    return next((c["median"] for c in row["contenders"] if c["name"] == row["best"]), None)


def growth(report: Report) -> "Figure | None":
    """Time against size, a panel for each series that `bench scaling` measured."""
    series: dict[str, list[Row]] = {}
    for row in report["rows"]:
        if "scaling" in row:
            series.setdefault(row["scaling"]["series"], []).append(row)
    if not series:
        return None
    columns = min(2, len(series))
    lines = -(-len(series) // columns)
    drawn, axes = _subplots(lines, columns, 5.2 * columns, 3.4 * lines)
    for axis in axes[len(series) :]:
        axis.remove()
    for axis, (title, rows) in zip(axes, series.items()):
        names = list(dict.fromkeys(c["name"] for row in rows for c in row["contenders"]))
        for name, colour in zip(names, [AHEAD, *OTHERS * len(names)]):
            axis.plot(*_times(rows, name), marker="o", markersize=3.5, color=colour, label=name,
                      linewidth=2.2 if name == OURS else 1.2, zorder=3 if name == OURS else 2)  # fmt: skip
        axis.set_xscale("log")
        axis.set_yscale("log")
        sizes = [row["scaling"]["size"] for row in rows]
        axis.set_xticks(sizes, [row["size"].rsplit(" ", 1)[0] for row in rows])
        ticks = _ticks(*axis.get_ylim())
        axis.set_yticks(ticks, [duration(tick) for tick in ticks])
        axis.minorticks_off()
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(rows[0]["scaling"]["of"])
        axis.legend(fontsize=7, frameon=False)
    return drawn


def _times(rows: list[Row], name: str) -> tuple[list[int], list[float]]:
    points = [(row["scaling"]["size"], c["median"]) for row in rows for c in row["contenders"] if c["name"] == name]
    return [x for x, _ in points], [y for _, y in points]


FIGURES: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "ratios": ("Against the best peer", ratios),
    "roofline": ("Against the limit", roofline),
    "growth": ("Time against size", growth),
}
