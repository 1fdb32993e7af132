"""``python -m gdbp bench list`` and ``run``: measures gdbp against its peers and the hardware's limit."""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment, files, optional, table
from benchmarks.cases import select
from benchmarks.measure import measure
from benchmarks.work import Case, Setup
from gdbp._command import integer, number, try_to_write
from gdbp._errors import InputError

DTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "float64": "f64"}
INTERRUPTED = 130  # as shells have it
PEERS = ("eager", "compile", *optional.PEERS)


def _dtype_names(text: str) -> list[str]:
    short = {value: key for key, value in DTYPES.items()}
    names = [short.get(name, name) for name in text.split(",") if name]
    if not names or not set(names) <= set(DTYPES):
        raise argparse.ArgumentTypeError(f"{text!r}; expected some of {','.join(DTYPES)}")
    return list(dict.fromkeys(names))


def _peer_names(text: str) -> frozenset[str]:
    names = frozenset(name for name in text.split(",") if name)
    if not names or not names <= {*PEERS, "all"}:
        raise argparse.ArgumentTypeError(f"{text!r}; expected some of {','.join(PEERS)}, or all")
    return frozenset(PEERS) if "all" in names else names


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")


def add_selection(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-k", dest="pattern", metavar="NAME", default="", help="cases with NAME in their title, as 'bench list' has it")
    add("--size", choices=("full", "smoke"), default="full", help="smoke: tiny cases, to see that they run")


def add_measuring(parser: argparse.ArgumentParser) -> None:
    """What `run` and `scaling` have in common."""
    add_selection(parser)
    add_device(parser)
    add = parser.add_argument
    add("--peers", type=_peer_names, default=frozenset(), metavar="NAME,...",
        help=f"{', '.join(PEERS)} or all (default eager, which always takes part)")  # fmt: skip
    add("--budget", type=number(above=0), default=3.0, metavar="SECONDS", help="for each row (default 3)")
    add("--heap", choices=("default", "kept"), default="default", help="kept: freed memory is not returned")
    add("--json", type=Path, metavar="FILE", help="write results and environment to FILE, making its folder")
    add("--csv", type=Path, metavar="FILE", help="the same with a line for each contender of each row")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_measuring(parser)
    add = parser.add_argument
    add("--dtype", type=_dtype_names, default=["float32"], metavar="NAME,...",
        help=f"{', '.join(DTYPES)} (default float32; some cases have their own)")  # fmt: skip
    add("--threads", type=integer(1), default=None, help="of the CPU (default torch's)")
    add("--save", action="store_true", help=f"write to {files.RESULTS.relative_to(environment.ROOT)}/MACHINE/ too")


def check_device(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda asks for a GPU, and torch sees none; use --device cpu")


def setup(options: argparse.Namespace, dtype: torch.dtype = torch.float32) -> Setup:
    compiles = "compile" in options.peers
    return Setup(dtype, options.device, compiles, optional=options.peers & optional.PEERS.keys())


def _selected(options: argparse.Namespace) -> list[Case]:
    cases = select(options.pattern, options.size == "smoke")
    if not cases:
        raise InputError(f"no case has {options.pattern!r} in its title; python -m gdbp bench list shows them")
    return cases


def show(options: argparse.Namespace) -> int:
    for case in _selected(options):
        goal = case.goal
        parts = []
        if goal and goal.ratio is not None:
            kept = f" ({goal.kept:.2f}x with a kept heap)" if goal.kept else ""
            parts.append(f"{goal.ratio:.2f}x of {goal.peer or 'the best peer'}{kept}")
        if goal and goal.limit is not None:
            parts.append(f"{goal.limit:.0%} of the limit")
        print(f"{case.title:<40}  {'goal: ' + ', '.join(parts) if parts else ''}".rstrip())
    return 0


def with_kept_heap(argv: list[str]) -> int:
    """The same in another process, for malloc reads its settings when a process starts."""
    variables = environment.KEPT_HEAP
    settings = " ".join(f"{name}={value}" for name, value in variables.items())
    print(f"Heap kept: measuring in a child process with {settings}\n", flush=True)
    paths = [str(environment.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, **variables, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.call([sys.executable, "-m", "gdbp", "bench", *argv], env=env)


def dtypes(case: Case, cases: list[Case], names: list[str]) -> list[torch.dtype]:
    """Those to measure a case in: its own, or the chosen ones, without any that a case of that dtype measures."""
    if case.dtype:
        return [case.dtype]
    own = [c.dtype for c in cases if (c.family, c.name, c.size) == (case.family, case.name, case.size)]
    return [dtype for dtype in (getattr(torch, name) for name in names) if dtype not in own]


def begin(options: argparse.Namespace) -> dict[str, Any]:
    """A report without rows yet; its environment is printed, and its files are known to be writable."""
    for path in filter(None, (options.json, options.csv)):
        try_to_write(path)
    env = environment.describe(options.device)
    print(table.caption(env))
    print("ratio: the best correct peer's time over ours; goal: what is to be reached, and whether it is;")
    print("limit: the hardware's time over ours; ulp: our largest error against float64\n")
    if env["load"] > 0.25 * env["cpus"]:
        print(f"WARNING: load {env['load']:.1f} on {env['cpus']} CPUs at the start; figures will be noisy.\n")
    print(table.header())
    peers = sorted(options.peers)
    return {"environment": env, "options": {"budget": options.budget, "size": options.size, "peers": peers}, "rows": []}


def finish(report: dict[str, Any], options: argparse.Namespace, started: float) -> int:
    """Writes what was asked for; 1 where a result of ours was wrong."""
    rows = report["rows"]
    report["seconds"] = time.perf_counter() - started
    for sentence in table.absent(rows):
        print(f"\nabsent: {sentence}", end="")
    print(f"\n{table.summary(rows)}; {report['seconds']:.0f} s")
    if options.json:
        files.write(options.json, files.dump(report))
    if options.csv:
        files.write(options.csv, files.as_csv(report))
    return int(not all(row["contenders"][0]["correct"] for row in rows))


@contextlib.contextmanager
def _termination_interrupts() -> Iterator[None]:
    """SIGTERM, which ``timeout`` and job queues send, ends a run as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _measure_all(cases: list[Case], options: argparse.Namespace, report: dict[str, Any]) -> None:
    family = None
    for case in cases:
        if case.family != family:
            print(family := case.family)
        for dtype in dtypes(case, cases, options.dtype):
            row = measure(case, setup(options, dtype), options.budget, report["environment"]["heap"])
            report["rows"].append(row)
            print(table.terminal(row), flush=True)


def run(options: argparse.Namespace) -> int:
    """Returns 0, or 1 where a result of ours was wrong. Interrupted, it still writes --json and --csv."""
    check_device(options.device)
    cases = [case for case in _selected(options) if case.device in (None, options.device)]
    if not cases:
        raise InputError(f"the cases with {options.pattern!r} in their titles do not run on {options.device}")
    if options.heap == "kept" and environment.heap() != "kept":
        return with_kept_heap(options.argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    report = begin(options)
    if options.save:
        try_to_write(path := files.place(report))
    started = time.perf_counter()
    try:
        with _termination_interrupts():
            _measure_all(cases, options, report)
    except KeyboardInterrupt:
        report["interrupted"] = True  # what was measured was not for nothing
        finish(report, options, started)
        print(f"interrupted after {len(report['rows'])} rows, and not saved among the results", file=sys.stderr)
        return INTERRUPTED
    status = finish(report, options, started)
    if options.save:
        files.write(path, files.dump(report))
        print(f"written to {path}")
    return status
