"""Training as a learner meets it: data in, :func:`fit`, a :class:`History` and a run folder out."""

from gdbp._errors import InputError

from .data import Data, load_data
from .history import History
from .loop import evaluate, fit
from .run import Run, build_network, load_run
from .schedule import make_schedule

__all__ = [
    "Data",
    "History",
    "InputError",
    "Run",
    "build_network",
    "evaluate",
    "fit",
    "load_data",
    "load_run",
    "make_schedule",
]
