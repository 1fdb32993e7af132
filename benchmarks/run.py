"""``python -m benchmarks.run``: measures gdbp against its peers and the hardware's limit."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment, table
from benchmarks.cases import select
from benchmarks.measure import measure
from benchmarks.work import Case, Setup

DTYPES = ("float32", "bfloat16", "float16", "float64")


def _names(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    if not names or not set(names) <= set(DTYPES):
        raise argparse.ArgumentTypeError(f"{text!r}; expected some of {','.join(DTYPES)}")
    return names


def _positive(kind):
    def convert(text: str):
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text}; expected a number > 0")
        return value

    convert.__name__ = kind.__name__
    return convert


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    add = parser.add_argument
    add("-k", dest="pattern", metavar="NAME", default="", help="cases with NAME in their title (see --list)")
    add("--list", action="store_true", help="show the cases and stop")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", type=_names, default=["float32"], metavar="NAME,...", help="default float32; some have their own")
    add("--size", choices=("full", "smoke"), default="full", help="smoke: tiny cases, to see that they run")
    add("--peers", choices=("eager", "compile"), default="eager", help="compile adds torch.compile")
    add("--threads", type=_positive(int), default=None, help="of the CPU (default torch's)")
    add("--budget", type=_positive(float), default=3.0, metavar="SECONDS", help="for each row (default 3)")
    add("--heap", choices=("default", "kept"), default="default", help="kept: freed memory is not returned")
    add("--json", type=Path, metavar="FILE", help="write results and environment to FILE")
    return parser.parse_args(argv)


def _run_with_kept_heap(argv: list[str]) -> int:
    """malloc reads its settings when a process starts, so another one measures."""
    variables = environment.KEPT_HEAP
    settings = " ".join(f"{name}={value}" for name, value in variables.items())
    print(f"Heap kept: measuring in a child process with {settings}\n", flush=True)
    paths = [str(environment.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, **variables, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.call([sys.executable, "-m", "benchmarks.run", *argv], env=env)


def _print_list(cases: list[Case], smoke: bool) -> None:
    for case in cases:
        goal = case.goal
        parts = []
        if goal and goal.ratio is not None:
            kept = f" ({goal.kept:.2f}x with a kept heap)" if goal.kept else ""
            parts.append(f"{goal.ratio:.2f}x of {goal.peer or 'the best peer'}{kept}")
        if goal and goal.limit is not None:
            parts.append(f"{goal.limit:.0%} of the limit")
        print(f"{case.title:<40}  {'goal: ' + ', '.join(parts) if parts else ''}".rstrip())


def _dtypes(case: Case, cases: list[Case], names: list[str]) -> list[torch.dtype]:
    """Those to measure a case in: its own, or the chosen ones, without any that a case of that dtype measures."""
    if case.dtype:
        return [case.dtype]
    own = [c.dtype for c in cases if (c.family, c.name, c.size) == (case.family, case.name, case.size)]
    return [dtype for dtype in (getattr(torch, name) for name in names) if dtype not in own]


def _warn_of_load(env: dict[str, Any]) -> None:
    if env["load"] > 0.25 * env["cpus"]:
        print(f"WARNING: load {env['load']:.1f} on {env['cpus']} CPUs at the start; figures will be noisy.\n")


def _refuse(sentence: str) -> int:
    print(f"benchmarks.run: {sentence}", file=sys.stderr)
    return 2


def _write(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Returns 0, 1 where a result of ours was wrong, 2 for what the user can mend."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    cases = select(options.pattern, options.size == "smoke")
    if not cases:
        return _refuse(f"no case has {options.pattern!r} in its title; --list shows them")
    if options.list:
        _print_list(cases, options.size == "smoke")
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        return _refuse("--device cuda asks for a GPU, and torch sees none; use --device cpu")
    if options.heap == "kept" and environment.heap() != "kept":
        return _run_with_kept_heap(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    env = environment.describe(options.device)
    report: dict[str, Any] = {"environment": env, "options": {"budget": options.budget, "size": options.size}}
    report["rows"] = rows = []
    print(table.caption(env))
    print("ratio: the best correct peer's time over ours; limit: the limit's; ulp: our largest error\n")
    _warn_of_load(env)
    print(table.header())
    started = time.perf_counter()
    family = None
    for case in cases:
        if case.family != family:
            print(family := case.family)
        for dtype in _dtypes(case, cases, options.dtype):
            setup = Setup(dtype, options.device, options.peers == "compile")
            rows.append(measure(case, setup, options.budget, env["heap"]))
            print(table.terminal(rows[-1]), flush=True)
    report["seconds"] = time.perf_counter() - started
    print(f"\n{len(rows)} rows in {report['seconds']:.0f} s")
    if options.json:
        _write(options.json, report)
    wrong = [row for row in rows if not row["contenders"][0]["correct"]]
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
