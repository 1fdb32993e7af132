"""C++ programs whose exit status is a test.

They are compiled and run from the start of the session on, by the cores that the tests in Python leave idle, and their
tests come last. A module with such tests has ``start(items, folder, pool)``, which returns the future outcome of every
item by its node id (:func:`one_for_each` where every test is a program); a test takes its own by the fixture
``outcome``.
"""

import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parent.parent / "csrc"
# Nobody waits for them yet, so they let others go first.
NICE = [nice, "-n", "10"] if (nice := shutil.which("nice")) else []


def run(*command, timeout: float | None = None) -> subprocess.CompletedProcess:
    return subprocess.run([*NICE, *map(str, command)], capture_output=True, text=True, timeout=timeout)


def compile_(output: Path, *arguments) -> Path:
    compiler = shutil.which("g++")
    assert compiler, "These tests compile with g++, and there is none in PATH: install it."
    done = run(compiler, *arguments, "-I", CSRC, "-o", output)
    assert done.returncode == 0, f"{' '.join(map(str, arguments))}\n{done.stderr}"
    return output


def run_when_built(program: Future, *arguments) -> subprocess.CompletedProcess:
    # Long enough for a program that lets others go first, and an end to one that hangs.
    return run(program.result(), *arguments, timeout=600)


def one_for_each(
    build: Callable[..., Path], items: Sequence[pytest.Item], folder: Path, pool: Executor
) -> dict[str, Future]:
    """``build(folder, **parameters)`` of every item, all of them before the first is run."""
    programs = {item.nodeid: pool.submit(build, folder, **item.callspec.params) for item in items}
    return {node: pool.submit(run_when_built, program) for node, program in programs.items()}
