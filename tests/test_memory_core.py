"""Compiles and runs the caching allocator's own test, tests/cpp/memory_cache.cpp: plain C++, no torch.

Once as it is, and once with each sanitizer that the compiler has.
"""

import subprocess
from functools import partial
from pathlib import Path

import pytest

from tests.programs import compile_, one_for_each

SOURCE = Path(__file__).parent / "cpp" / "memory_cache.cpp"
FLAGS = ["-std=c++20", "-O1", "-g", "-pthread", "-Wall", "-Wextra", "-Werror"]
LIBRARIES = {"address": "libasan.so", "thread": "libtsan.so", "undefined": "libubsan.so"}


def sanitizers() -> list[str]:
    """Those whose library lies beside the compiler: it names a path for what it finds."""
    found = {}
    for name, library in LIBRARIES.items():
        answer = subprocess.run(["g++", f"-print-file-name={library}"], capture_output=True, text=True, check=True)
        found[name] = "/" in answer.stdout
    return [name for name in LIBRARIES if found[name]]


def build(folder: Path, sanitizer: str) -> Path:
    checks = [] if sanitizer == "none" else [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    return compile_(folder / f"memory_cache-{sanitizer}", *FLAGS, *checks, SOURCE)


start = partial(one_for_each, build)


@pytest.mark.parametrize("sanitizer", ["none", *sanitizers()])
def test_core(sanitizer, outcome):
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
