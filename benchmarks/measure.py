"""One case measured: contenders checked, then timed in turns; the outcome as a dict that goes to JSON."""

import gc
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks import memory, optional
from benchmarks.accuracy import ulp_error
from benchmarks.timing import Timing, clock_for, take_turns
from benchmarks.work import COMPILED, OURS, Case, Goal, Setup, Work

# Names under which the limit takes its turn among the contenders.
LIMIT = "limit"


def measure(case: Case, setup: Setup, budget: float, heap: str = "default") -> dict[str, Any]:
    """Builds, checks and times a case, and gives its memory back.

    Args:
        case: what to measure.
        setup: dtype (that of the case goes first), device and whether torch.compile takes part.
        budget: seconds of timing; exceeded where five rounds take longer.
        heap: the process's heap setting, which the goal may depend on.

    Returns a dict with

    - ``family``, ``case``, ``size``, ``dtype``, ``device``: what was measured;
    - ``contenders``: a list, gdbp first, of ``name``, seconds ``median``, ``p20``, ``p80``, ``samples``,
      ``ulp`` (largest error against float64; None if infinite), ``correct``, ``noisy`` and ``memory`` (bytes: what it
      keeps, and the most that a repetition adds to it; None where the system does not tell);
    - ``best``: name of the fastest correct peer, or None; ``ratio``: its median over ours;
    - ``limit``: None, or ``what`` and ``seconds``; ``bytes`` and ``flops`` of the work;
    - ``absent``: what to install, by the names of the optional peers that were asked for and could not take part;
    - ``goal``: None, or ``text``, the required ``ratio`` to ``peer`` and share of the ``limit``, and ``met``.
    """
    setup = replace(setup, dtype=case.dtype or setup.dtype, absent={})
    gc.freeze()  # what is here already need not be looked at again
    try:
        return _row(case, setup, budget, heap)
    finally:
        if setup.compile or setup.optional:
            torch.compiler.reset()  # else torch.compile counts this row's functions towards the next one's limit
        gc.collect()
        gc.unfreeze()
        if setup.device == "cuda":
            torch.cuda.empty_cache()


def _row(case: Case, setup: Setup, budget: float, heap: str) -> dict[str, Any]:
    work = case.build(setup)
    errors = _check(work, setup)
    runs: dict[str, Callable[[], object]] = {name: c.run for name, c in work.contenders.items()}
    if work.limit is not None:
        runs[LIMIT] = work.limit.run
    timings = take_turns(runs, budget, clock_for(setup.device, work.hot))
    contenders = [_contender(name, timings[name], errors[name], work.tolerance) for name in work.contenders]
    del runs
    for contender, needed in zip(contenders, _memory_by_turns(work, setup.device)):
        contender["memory"] = needed
    limit = None
    if work.limit is not None:
        limit = {"what": work.limit.what, "seconds": timings[LIMIT].median * work.limit.scale}
    row = {
        "family": case.family,
        "case": case.name,
        "size": case.size,
        "dtype": str(setup.dtype).removeprefix("torch."),
        "device": setup.device,
        "contenders": contenders,
        **compare(contenders),
        "limit": limit,
        "bytes": work.bytes,
        "flops": work.flops,
        "absent": setup.absent,
    }
    applies = setup.device == (case.device or "cpu") and setup.dtype in (torch.float32, case.dtype)
    row["goal"] = judge(case.goal, row, heap) if case.goal and applies else None
    return row


def _check(work: Work, setup: Setup) -> dict[str, float]:
    """Largest error of each contender, in ulp. Optional peers that raise one take no part."""
    reference = work.reference()
    errors = {}
    for name, contender in list(work.contenders.items()):
        try:
            results = contender.results()
        except Exception as error:  # whatever another project raises, the others are measured
            if name not in setup.optional:
                raise
            setup.absent[name] = optional.reason(error)
            del work.contenders[name]
            continue
        errors[name] = math.inf
        if len(results) == len(reference):
            errors[name] = max(ulp_error(*pair, work.floor) for pair in zip(results, reference))
    return errors


def _memory_by_turns(work: Work, device: str) -> list[int | None]:
    """What each contender needs, in order. They are given up on the way: what goes with one was its own."""
    meter = memory.meter(device)
    needed: list[int | None] = []
    for name in list(work.contenders):
        if meter is None:
            needed.append(None)
            continue
        peak = meter.growth(work.contenders[name].run)
        before = meter.held()
        del work.contenders[name]
        if name == COMPILED:
            torch.compiler.reset()  # which holds on to tensors too
        needed.append(peak + max(0, before - meter.held()))
    return needed


def _contender(name: str, timing: Timing, error: float, tolerance: float) -> dict[str, Any]:
    # JSON has no infinity.
    return {
        "name": name,
        **timing._asdict(),
        "ulp": error if math.isfinite(error) else None,
        "correct": error <= tolerance,
        "noisy": timing.noisy,
    }


def compare(contenders: list[dict[str, Any]]) -> dict[str, Any]:
    """The fastest of the peers whose result is right, and how many times our time it takes."""
    ours, *peers = contenders
    assert ours["name"] == OURS
    best = min((peer for peer in peers if peer["correct"]), key=lambda peer: peer["median"], default=None)
    if best is None:
        return {"best": None, "ratio": None}
    return {"best": best["name"], "ratio": best["median"] / ours["median"]}


def judge(goal: Goal, row: dict[str, Any], heap: str) -> dict[str, Any]:
    """Whether the row reaches the goal; the best peer stands in for a named one whose result is wrong."""
    times = {c["name"]: c["median"] for c in row["contenders"] if c["correct"]}
    required = goal.kept if heap == "kept" and goal.kept is not None else goal.ratio
    against = goal.peer if goal.peer in times else row["best"]
    texts, met = [], OURS in times
    if required is not None:
        peer = times.get(against)
        texts.append(f"{required:.2f}".rstrip("0").rstrip(".") + "x")
        met = met and peer is not None and peer >= required * times[OURS]
    if goal.limit is not None:
        texts.append(f"{goal.limit:.0%}")
        met = met and row["limit"] is not None and row["limit"]["seconds"] >= goal.limit * times[OURS]
    return {"text": " ".join(texts), "ratio": required, "peer": against, "limit": goal.limit, "met": met}
