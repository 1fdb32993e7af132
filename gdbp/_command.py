"""What the commands share: their parser, numbers among their arguments, and files that they are going to write."""

import argparse
import contextlib
import math
from pathlib import Path

from gdbp._errors import InputError

__all__ = ["Parser", "integer", "number", "shown", "try_to_write"]


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the command line in one sentence, as everything else here does."""

    def error(self, message: str):
        raise InputError(f"{message}; see {self.prog} --help")

    def parse_known_args(self, args=None, namespace=None):
        # Here, for what a command does not know the parser above it would refuse, and name its own help.
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return options, unknown


def integer(least: int, most: float = math.inf):
    """A type of arguments: whole numbers from ``least`` to ``most``."""
    wanted = f"of at least {least}" if most == math.inf else f"from {least} to {most}"

    def parse(text: str) -> int:
        # Longer texts Python does not read.
        if not text.removeprefix("-").isdecimal() or len(text) > 4300 or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"got {shown(text)}; expected a whole number {wanted}")
        return int(text)

    return parse


def number(*, above: float = -math.inf, least: float = -math.inf, most: float = math.inf):
    """A type of arguments: finite numbers between the bounds."""
    wanted = f"above {above:g}" if math.isfinite(above) else f"of at least {least:g}"
    wanted += f" and at most {most:g}" if math.isfinite(most) else ""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and above < value and least <= value <= most):
            raise argparse.ArgumentTypeError(f"got {shown(text)}; expected a finite number {wanted}")
        return value

    return parse


def shown(text: str) -> str:
    """The text in quotes, cut where it is too long for a sentence."""
    return repr(text if len(text) <= 60 else f"{text[:50]}...")


def try_to_write(path: Path) -> None:
    """Raises InputError where the file can't be written, and leaves everything as it is.

    Before the work is done: what can't be written should not wait for its end.
    """
    made: list[Path] = []
    try:
        made = [place for place in (path, *path.parents) if not place.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} can't be written to ({reason}); choose another place") from None
    finally:
        for place in made:
            with contextlib.suppress(OSError, ValueError):
                place.rmdir() if place.is_dir() else place.unlink()
