"""CPU memory that stays warm: a caching allocator for every CPU tensor of the process, whoever makes it.

On a CPU much of a large operation's time is the kernel handing out fresh pages, because malloc gives large blocks
back to the system whenever a tensor is freed. With the cache on, freed blocks wait, with their pages, for the next
tensor of about their size, as they do on CUDA::

    gdbp.memory.enable_cpu_cache()      # or GDBP_CPU_CACHE=1 in the environment

Only tensors of 32 KiB and more are concerned; smaller ones are left to malloc. A block is at most an eighth larger
than what was asked for, at most a quarter where one of the next size was free; and where keeping more would break the
limit below, a free block of up to twice the size serves. Off unless asked for: it costs up to a quarter more memory
than the blocks in use at their peak, which stays with the process until :func:`empty_cpu_cache`.
Safe with threads, fork, ``DataLoader`` workers, NumPy, DLPack and shared memory.
"""

import operator
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from gdbp import _load

__all__ = [
    "cpu_cache",
    "cpu_memory_stats",
    "disable_cpu_cache",
    "empty_cpu_cache",
    "enable_cpu_cache",
    "reset_peak_memory_stats",
]

VARIABLE = "GDBP_CPU_CACHE"

_C = _load._C
# What the cache was switched on with; None while it is off.
_settings: tuple[int | None, bool] | None = None


def enable_cpu_cache(max_bytes: int | None = None, huge_pages: bool = True) -> None:
    """Switches the cache on for the process, or changes its settings where it is on.

    Tensors that exist already stay where they are.

    Args:
        max_bytes: how much memory may wait for reuse, in bytes; beyond that the blocks that were used least
            recently go back to the system. None (default): as much as keeps everything together, in use and
            waiting, within 1.25 times the most that was in use at once since :func:`empty_cpu_cache`.
        huge_pages: whether to ask for pages of 2 MiB for blocks of at least that size
            (``madvise(MADV_HUGEPAGE)``), of which the kernel hands out a first one sooner.

    Raises:
        TypeError, ValueError: `max_bytes` is neither None nor a whole number of at least 0, or `huge_pages` is no bool.
        RuntimeError: another library has registered its own CPU allocator with torch, or gdbp's compiled part is
            missing. Nothing is changed then.
    """
    global _settings
    if max_bytes is not None:
        if isinstance(max_bytes, bool) or not hasattr(max_bytes, "__index__"):
            raise TypeError(f"max_bytes is {max_bytes!r}; expected None or a whole number of bytes")
        max_bytes = operator.index(max_bytes)
        if not 0 <= max_bytes < 2**63:
            raise ValueError(f"max_bytes is {max_bytes}; expected None or a number of bytes from 0 to 2**63 - 1")
    if not isinstance(huge_pages, bool):
        raise TypeError(f"huge_pages is {huge_pages!r}; expected True or False")
    if _C is None:
        raise RuntimeError(f"the CPU cache is compiled code, and {_load.reason}; {_load.HOW_TO_BUILD}")
    if not _C.cpu_cache_register():
        raise RuntimeError(
            "another library has registered its own CPU allocator with torch, so the CPU cache was not switched on "
            "and nothing was changed; use one or the other"
        )
    _C.cpu_cache_enable(max_bytes, huge_pages)
    _settings = max_bytes, huge_pages


def disable_cpu_cache() -> None:
    """Switches the cache off, and gives what waits for reuse back to the system.

    Tensors in use stay valid; their memory goes back to the system when they are freed. Does nothing where the
    cache is off.
    """
    global _settings
    if _settings is not None:
        _C.cpu_cache_unregister()
        _C.cpu_cache_disable()
    _settings = None


def empty_cpu_cache() -> None:
    """Gives the memory that waits for reuse back to the system; that of tensors in use stays."""
    if _C is not None:
        _C.cpu_cache_empty()


@contextmanager
def cpu_cache(max_bytes: int | None = None, huge_pages: bool = True) -> Iterator[None]:
    """The cache for the length of a ``with`` block, for all threads; afterwards it is on or off as before.

    Arguments and errors are those of :func:`enable_cpu_cache`.
    """
    before = _settings
    enable_cpu_cache(max_bytes, huge_pages)
    try:
        yield
    finally:
        if before is None:
            disable_cpu_cache()
        else:
            enable_cpu_cache(*before)


def cpu_memory_stats() -> dict[str, int]:
    """What the cache holds and did, named as in ``torch.cuda.memory_stats``.

    Small tensors, and those made while the cache is off, are not in it. A dict of ints with the keys

    - ``allocated_bytes.all.current``, ``.peak``, ``.allocated`` and ``.freed``: bytes of blocks in use by tensors, now
      and at most, and in total since the start;
    - ``reserved_bytes.all.`` the same: bytes got from the system, in use or waiting for reuse;
    - ``cached_bytes.all.current``: bytes waiting for reuse;
    - ``num_hits``, ``num_misses``: requests that found a warm block, and that did not;
    - ``num_alloc_retries``: how often the cache was emptied because the system had no memory;
    - ``num_ooms``: how often there was none even then, and torch's error was raised.

    Empty without gdbp's compiled part.
    """
    return _C.cpu_cache_stats() if _C is not None else {}


def reset_peak_memory_stats() -> None:
    """Sets the peaks of :func:`cpu_memory_stats` to the current values."""
    if _C is not None:
        _C.cpu_cache_reset_peaks()


@contextmanager
def cpu_cache_unless_refused() -> Iterator[None]:
    """As :func:`cpu_cache`, for training from the command line: leaves a cache that is on as it is, and does without
    one where the environment says GDBP_CPU_CACHE=0 or another library has its own allocator."""
    if _settings is not None or _C is None or os.environ.get(VARIABLE) == "0":
        yield
        return
    _enable_or_warn()
    try:
        yield
    finally:
        disable_cpu_cache()


def _enable_or_warn() -> None:
    try:
        enable_cpu_cache()
    except RuntimeError as error:
        warnings.warn(str(error), RuntimeWarning, stacklevel=3)


def _obey_environment() -> None:
    choice = os.environ.get(VARIABLE, "")
    if choice not in ("", "0", "1"):
        warnings.warn(f"{VARIABLE} is {choice!r}; expected 0 or 1, so the CPU cache stays off", stacklevel=2)
    elif choice == "1":
        _enable_or_warn()


_obey_environment()
