"""Time: clocks for CPU and CUDA, contenders taking turns, and the figures that stand for many samples."""

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

# A sample lasts at least this long, in seconds, so that reading the clock costs nothing beside it.
SAMPLE = 1e-3
MINIMUM_ROUNDS = 5
# Where a call takes longer than this, in seconds, and than the budget of all, two of them must do.
SLOW = 2.0
MAXIMUM_ROUNDS = 1000
NOISY = 1.3


class Timing(NamedTuple):
    """Seconds of one repetition: the median of the samples, and the limits of their middle 60 %."""

    median: float
    p20: float
    p80: float
    samples: int

    @property
    def noisy(self) -> bool:
        return self.p80 > NOISY * self.p20


def percentile(ordered: Sequence[float], fraction: float) -> float:
    """The value below which `fraction` of the ascending samples lie, interpolated between neighbours."""
    position = fraction * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summarize(samples: Sequence[float]) -> Timing:
    """Raises ValueError if there are no samples."""
    if not samples:
        raise ValueError("samples is empty; expected at least one time in seconds")
    ordered = sorted(samples)
    return Timing(*(percentile(ordered, q) for q in (0.5, 0.2, 0.8)), len(ordered))


def cpu_clock(run: Callable[[], object], calls: int) -> float:
    """Seconds for `calls` repetitions."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return time.perf_counter() - start


def cuda_hot_clock(run: Callable[[], object], calls: int) -> float:
    """Seconds for `calls` repetitions one after another, until the device is done; host time counts."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


class CudaColdClock:
    """Device seconds between two events, the L2 cache emptied before each repetition.

    The device is kept waiting while the host queues the work, so launches are not timed.
    """

    # Cycles a second that no GPU is beyond, and how much longer than the host took once the device waits.
    CYCLES, MARGIN = 2.2e9, 1.5

    def __init__(self):
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.flush = torch.empty(4 * max(properties.L2_cache_size, 2**24), dtype=torch.int8, device="cuda")

    def __call__(self, run: Callable[[], object], calls: int) -> float:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        torch.cuda.synchronize()
        queued = time.perf_counter()
        run()
        wait = int(self.MARGIN * self.CYCLES * (time.perf_counter() - queued))
        for start, end in events:
            self.flush.zero_()
            torch.cuda._sleep(wait)
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in events) * 1e-3


def clock_for(device: str, hot: bool) -> Callable[[Callable[[], object], int], float]:
    if device == "cpu":
        return cpu_clock
    return cuda_hot_clock if hot else CudaColdClock()


def take_turns(
    runs: Mapping[str, Callable[[], object]],
    budget: float,
    clock: Callable[[Callable[[], object], int], float] = cpu_clock,
) -> dict[str, Timing]:
    """Times every run, one sample of each in turn, so that a change in the machine's speed meets all alike.

    Args:
        runs: by name; each is called once, untimed, before the first sample.
        budget: seconds for all of them together; exceeded where five rounds take longer, or two of what is slow.
        clock: returns the seconds that a number of calls took.
    """
    sample = min(SAMPLE, budget / (2 * MINIMUM_ROUNDS * max(1, len(runs))))
    calls = {}
    samples: dict[str, list[float]] = {}
    names = []
    for name, run in runs.items():
        run()
        # The shorter of two, lest a first slow call make all samples short.
        first_two = [clock(run, 1), clock(run, 1)]
        once = min(first_two)
        is_slow = once > max(SLOW, budget)
        samples[name] = first_two if is_slow else []
        if not is_slow:
            names.append(name)
            calls[name] = max(1, math.ceil(sample / max(once, 1e-7)))
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + budget
        for done in range(MAXIMUM_ROUNDS):
            if done >= MINIMUM_ROUNDS and time.perf_counter() >= end:
                break
            # Each has the first turn now and then: what one leaves in the caches, the next one starts with.
            first = done % max(1, len(names))
            for name in names[first:] + names[:first]:
                samples[name].append(clock(runs[name], calls[name]) / calls[name])
    finally:
        if collecting:
            gc.enable()
    return {name: summarize(times) for name, times in samples.items()}
