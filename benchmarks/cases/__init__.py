"""The cases, a module for each family; each has `cases(smoke)`."""

from benchmarks.cases import grad, linear, linear_cross_entropy, loss, norm, optim, step
from benchmarks.work import Case

FAMILIES = (grad, linear, linear_cross_entropy, loss, norm, optim, step)


def select(pattern: str = "", smoke: bool = False) -> list[Case]:
    """The cases in whose title, such as "optim.adamw 67 M", `pattern` occurs; tiny ones where `smoke`."""
    return [case for family in FAMILIES for case in family.cases(smoke) if pattern in case.title]
