"""Memory: what a contender keeps, and the most that one repetition takes on top of it."""

import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import environment

# Pages are counted in batches for each core, and code loaded on the way counts too.
RESOLUTION = 2**20


class CudaMeter:
    """Counts the bytes that torch's allocator hands out on the current GPU."""

    def held(self) -> int:
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def growth(self, run: Callable[[], object]) -> int:
        before = self.held()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return max(0, torch.cuda.max_memory_allocated() - before)


class ProcessMeter:
    """Counts the pages of the whole process, as Linux does: it sees what any library takes, and nothing below 1 MB."""

    def __init__(self):
        self._trim = ctypes.CDLL(None).malloc_trim

    def held(self) -> int:
        """Bytes in memory, after the heap has given back what is free."""
        gc.collect()
        self._trim(0)
        return self._kilobytes("VmRSS") * 1024

    def growth(self, run: Callable[[], object]) -> int:
        """Bytes that one repetition has in memory at its peak, beyond those before it."""
        before = self.held()
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
        run()
        return max(0, self._kilobytes("VmHWM") * 1024 - before)

    @staticmethod
    def _kilobytes(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def meter(device: str) -> CudaMeter | ProcessMeter | None:
    """None where the system does not tell: the CPU's needs Linux, and glibc's malloc giving back what is free."""
    if device == "cuda":
        return CudaMeter()
    if environment.heap() != "default" or not os.access("/proc/self/clear_refs", os.W_OK):
        return None
    try:
        return ProcessMeter()
    except (AttributeError, OSError):
        return None
