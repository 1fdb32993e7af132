"""gdbp: the training step of gradient descent and backpropagation, fused, on CPU and CUDA.

Change an import, keep the script: ``gdbp.optim`` for ``torch.optim``, ``gdbp.nn`` for ``torch.nn``.
"""

import importlib
import signal
import sys

# Until gdbp/__main__.py is ready for it, Ctrl-C ends `python -m gdbp` at once, and not with a traceback of imports.
if sys.orig_argv[1:3] == ["-m", "gdbp"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from gdbp._load import build_info
from gdbp._version import __version__

from gdbp import memory, nn, ops, optim  # isort: skip  (ops need the compiled part that _load brings in)
from gdbp.fusion import explain, fuse, unfuse  # isort: skip
from gdbp.memory import enable_cpu_cache as keep_heap

from gdbp.step import TrainStep  # isort: skip

__all__ = [
    "TrainStep",
    "__version__",
    "build_info",
    "explain",
    "fuse",
    "keep_heap",
    "memory",
    "nn",
    "ops",
    "optim",
    "unfuse",
]


def __getattr__(name: str):
    # What most programs do without, and what takes a while to import.
    if name in ("testing", "train"):
        return importlib.import_module(f"gdbp.{name}")
    raise AttributeError(f"module 'gdbp' has no attribute {name!r}")
