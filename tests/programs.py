"""C++ programs whose exit status is a test.

They are compiled and run from the start of the session on, by the cores that the tests in Python leave idle, and their
tests come last. A module with such tests has ``start(items, folder, pool)``, which returns the future outcome of every
item by its node id; a test takes its own by the fixture ``outcome``.
"""

import shutil
import subprocess
from concurrent.futures import Future
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent / "csrc"
# Nobody waits for them yet, so they let others go first.
NICE = [nice, "-n", "10"] if (nice := shutil.which("nice")) else []


def run(*command, timeout: float = 600) -> subprocess.CompletedProcess:
    return subprocess.run([*NICE, *map(str, command)], capture_output=True, text=True, timeout=timeout)


def compile_(output: Path, *arguments) -> Path:
    compiler = shutil.which("g++")
    assert compiler, "These tests compile with g++, and there is none in PATH: install it."
    done = run(compiler, *arguments, "-I", CSRC, "-o", output)
    assert done.returncode == 0, f"{' '.join(map(str, arguments))}\n{done.stderr}"
    return output


def run_when_built(program: Future, *arguments) -> subprocess.CompletedProcess:
    return run(program.result(), *arguments)
