"""``python -m benchmarks.heaps``: one work under several heaps, a process for each: time, page faults, peak memory.

The heaps are malloc's default, gdbp's CPU cache, malloc told by environment variables to keep what is freed, and
jemalloc and tcmalloc where they are installed. None of the works uses anything else of gdbp.
"""

import argparse
import ctypes.util
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment
from benchmarks.cases import memory
from benchmarks.work import Setup
from gdbp._command import integer

COLD = "default"
HEAPS = {COLD: {}, "gdbp": {"GDBP_CPU_CACHE": "1"}, "kept": environment.KEPT_HEAP}
TRAINING = str(environment.ROOT / "examples" / "warm_memory.py")
IDLE = ["-c", "import benchmarks.heaps; print(0)"]
SECONDS = 1.5  # that a work is repeated for

# Works by name, as arguments of the interpreter; each prints its milliseconds last.
SCRIPTS = {
    "training 784-512-512-10, batch 128": [TRAINING, "--cold"],
    "training 784-2048-2048-1000, batch 1024": [
        TRAINING, "--cold", "--batch", "1024", "--width", "2048", "--classes", "1000", "--steps", "16",
    ],
}  # fmt: skip


def works(smoke: bool) -> dict[str, list[str]]:
    scripts = {name: [*command, "--steps", "2"] if smoke else command for name, command in SCRIPTS.items()}
    size = ["--smoke"] if smoke else []
    jobs = map(" ".join, memory.jobs(smoke))
    return scripts | {name: ["-m", "benchmarks.heaps", "--work", name, *size] for name in jobs}


def heaps() -> dict[str, dict[str, str]]:
    found = {name: ctypes.util.find_library(name) for name in ("jemalloc", "tcmalloc")}
    return HEAPS | {name: {"LD_PRELOAD": library} for name, library in found.items() if library}


def repeat(name: str, smoke: bool) -> None:
    """In the child: the work without any switching, for the process has one heap."""
    jobs = {" ".join(title): job for title, (job, _) in memory.jobs(smoke).items()}
    run, _ = jobs[name](Setup())
    run()
    run()
    seconds: list[float] = []
    end = time.perf_counter() + (0 if smoke else SECONDS)
    while len(seconds) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    print(f"{statistics.median(seconds) * 1e3:.6f} ms")


def measure(arguments: list[str], variables: dict[str, str], threads: int) -> dict[str, float]:
    """Milliseconds of one repetition; CPU seconds, those of the kernel, page faults and peak MiB of the process."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GDBP_", "LD_PRE"))}
    env = clean | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(environment.ROOT)} | variables
    command = [sys.executable, *arguments]
    with subprocess.Popen(command, env=env, cwd=environment.ROOT, stdout=subprocess.PIPE, text=True) as child:
        last = child.stdout.read().splitlines()[-1:]
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {child.returncode}")
    return {
        "ms": float(last[0].split()[0]),
        "cpu": usage.ru_utime + usage.ru_stime,
        "system": usage.ru_stime,
        "faults": usage.ru_minflt,
        "peak": usage.ru_maxrss / 1024,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the times, how many times as fast the cache is as the default heap, and what it takes at its peak, also
    as a multiple of the default's. What the libraries take by themselves is not in the peaks."""
    names = list(rows[0]["heaps"])
    lines = [
        "| work | " + " | ".join(f"{name} ms" for name in names) + " | faster | peak MiB | peak |",
        "|---|" + "--:|" * (len(names) + 3),
    ]
    for row in rows:
        times = [f"{row['heaps'][name]['ms']:.3g}" for name in names]
        cold, warm = row["heaps"][COLD], row["heaps"]["gdbp"]
        ratios = f"{cold['ms'] / warm['ms']:.2f}x | {warm['peak']:.0f} | {warm['peak'] / max(cold['peak'], 1):.2f}x"
        lines.append(f"| {row['work']} | {' | '.join(times)} | {ratios} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.heaps", description=__doc__)
    add = parser.add_argument
    add("-k", dest="pattern", metavar="NAME", default="", help="works with NAME in their name")
    add("--rounds", type=integer(1), default=3, help="of all heaps in turn; the medians are shown (default 3)")
    add("--threads", type=integer(1), default=torch.get_num_threads(), help="of the CPU (default torch's)")
    add("--smoke", action="store_true", help="tiny works, to see that they run")
    add("--json", type=Path, metavar="FILE", help="write results and environment to FILE")
    add("--work", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.work:
        repeat(options.work, options.smoke)
        return 0
    idle = {heap: measure(IDLE, variables, options.threads)["peak"] for heap, variables in heaps().items()}
    rows = []
    for name, arguments in works(options.smoke).items():
        if options.pattern not in name:
            continue
        samples: dict[str, list[dict[str, float]]] = {heap: [] for heap in heaps()}
        for _ in range(options.rounds):
            for heap, variables in heaps().items():
                sample = measure(arguments, variables, options.threads)
                samples[heap].append(sample | {"peak": max(0.0, sample["peak"] - idle[heap])})
        medians = {
            heap: {key: statistics.median(sample[key] for sample in taken) for key in taken[0]}
            for heap, taken in samples.items()
        }
        rows.append({"work": name, "heaps": medians})
        print(table(rows[-1:]) if len(rows) == 1 else table(rows[-1:]).splitlines()[-1], flush=True)
    if not rows:
        print(f"no work has {options.pattern!r} in its name: {', '.join(works(options.smoke))}", file=sys.stderr)
        return 2
    if options.json:
        env = environment.describe("cpu") | {"threads": options.threads}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"environment": env, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
