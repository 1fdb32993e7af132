"""Tables in plain text."""

from collections.abc import Sequence


def format_table(rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Rows of cells as aligned lines; the columns ``numbers`` to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [c.rjust(w) if i in numbers else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
