"""What a run of checks found, and the table that shows it."""

import textwrap
from dataclasses import dataclass

PASS, FAIL, NOT_APPLICABLE = "pass", "FAIL", "n/a"


class Failure(Exception):
    """What a check raises where the class under test is wrong; the message is the evidence."""


class NotApplicable(Exception):
    """What a check raises where there is nothing to check; the message is the reason."""


@dataclass(frozen=True)
class Check:
    """One check and its outcome.

    Attributes:
        name: what was checked.
        status: "pass", "FAIL" or "n/a".
        evidence: one line: what was seen, how the check failed, or why it does not apply.
    """

    name: str
    status: str
    evidence: str

    @property
    def passed(self) -> bool:
        """Whether the check applies and was passed."""
        return self.status == PASS


@dataclass(frozen=True)
class Report:
    """All checks of one class. ``str(report)`` is a table.

    Attributes:
        subject: the class and its arguments.
        checks: in the order in which they ran.
    """

    subject: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed; checks that do not apply are no failures."""
        return not self.failed

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that failed."""
        return tuple(check.name for check in self.checks if check.status == FAIL)

    def __getitem__(self, name: str) -> Check:
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(f"no check is called {name!r}; there are: {', '.join(check.name for check in self.checks)}")

    def __str__(self) -> str:
        width = max((len(check.name) for check in self.checks), default=0)
        rows = [f"{check.name:<{width}}  {check.status:<4}  {check.evidence}" for check in self.checks]
        counts = [sum(check.status == status for check in self.checks) for status in (PASS, FAIL, NOT_APPLICABLE)]
        summary = "{} passed, {} failed, {} not applicable".format(*counts)
        return "\n".join([self.subject, *rows, summary])


def one_line(text: str) -> str:
    """The text with its line ends gone, cut where it is too long for a row of the table."""
    return textwrap.shorten(text.strip(), 200, placeholder=" ...")
