"""The cases, a module for each family; each has `cases(smoke)`."""

from benchmarks.cases import linear, loss, optim, step
from benchmarks.work import Case

FAMILIES = (linear, loss, optim, step)


def select(pattern: str = "", smoke: bool = False, device: str = "cpu") -> list[Case]:
    """The cases for a device in whose title, such as "optim.adamw 67 M", `pattern` occurs; tiny ones where `smoke`."""
    cases = [case for family in FAMILIES for case in family.cases(smoke)]
    return [case for case in cases if pattern in case.title and (device == "cpu" or not case.cpu_only)]
