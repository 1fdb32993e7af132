"""The benchmarks' command, and made-up results for it."""

from benchmarks import environment
from benchmarks.measure import compare
from benchmarks.work import OURS
from gdbp.__main__ import main

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def bench(*arguments) -> int:
    return main(["bench", *map(str, arguments)])


def contender(name, median, correct=True, memory=0):
    return {
        "name": name,
        "median": median,
        "p20": median,
        "p80": median,
        "samples": 5,
        "ulp": 0.5 if correct else None,
        "correct": correct,
        "noisy": False,
        "memory": memory,
    }


def example_row(*contenders, **changes):
    contenders = contenders or (contender(OURS, 2e-3), contender("torch", 5e-3))
    row = {
        "family": "loss",
        "case": "mse",
        "size": "16 M",
        "dtype": "float32",
        "device": "cpu",
        "contenders": list(contenders),
        "limit": {"what": "copy, 12 B an element", "seconds": 1e-3},
        "bytes": 2**20,
        "flops": 0,
        "absent": {},
        "goal": None,
    }
    return {**row, **compare(row["contenders"]), **changes}


def example_report(*rows, gpu=None, **changes):
    """`gpu`: its name, for a report of CUDA."""
    env = {**environment.describe("cpu"), "commit": COMMIT, "date": "2030-01-02T03:04:05+00:00"}
    if gpu:
        env |= {"device": "cuda", "gpu": {"name": gpu, "memory": 2**36, "multiprocessors": 132, "cuda": "13.0"}}
    return {"environment": env | changes, "rows": list(rows) or [example_row()]}
