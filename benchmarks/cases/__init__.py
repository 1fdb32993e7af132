"""The cases, a module for each family; each has `cases(smoke)`, and may have `series(smoke)`."""

from benchmarks.cases import grad, linear, linear_cross_entropy, loss, norm, optim, step
from benchmarks.work import Case, Series

FAMILIES = (grad, linear, linear_cross_entropy, loss, norm, optim, step)


def select(pattern: str = "", smoke: bool = False) -> list[Case]:
    """The cases in whose title, such as "optim.adamw 67 M", `pattern` occurs; tiny ones where `smoke`."""
    return [case for family in FAMILIES for case in family.cases(smoke) if pattern in case.title]


def select_series(pattern: str = "", smoke: bool = False) -> list[Series]:
    """The series in whose title, such as "optim.adamw by threads", `pattern` occurs; a few tiny sizes where `smoke`."""
    families = [family for family in FAMILIES if hasattr(family, "series")]
    return [series for family in families for series in family.series(smoke) if pattern in series.title]
