"""Training as a learner meets it: data in, :func:`fit`, a :class:`History` and a run folder out.

What ``python -m gdbp train --data flowers.csv --out run`` wrote is used again with::

    run = gdbp.train.load_run("run")
    run.predict([[5.1, 3.5, 1.4, 0.2]])  # rows of raw inputs, in the file's order: names of classes, or values
"""

from gdbp._errors import InputError

from .data import Data, load_data
from .history import History
from .loop import evaluate, fit
from .range_test import RangeTest, lr_find
from .run import Run, build_network, load_run
from .schedule import make_schedule

__all__ = [
    "Data",
    "History",
    "InputError",
    "RangeTest",
    "Run",
    "build_network",
    "evaluate",
    "fit",
    "load_data",
    "load_run",
    "lr_find",
    "make_schedule",
]
