"""Compiles and runs the caching allocator's own test, tests/cpp/memory_cache.cpp: plain C++, no torch.

Once as it is, and once with each sanitizer that the compiler has.
"""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "tests" / "cpp" / "memory_cache.cpp"
FLAGS = ["-std=c++20", "-O1", "-g", "-pthread", "-Wall", "-Wextra", "-Werror"]
LIBRARIES = {"address": "libasan.so", "thread": "libtsan.so", "undefined": "libubsan.so"}


def sanitizers() -> list[str]:
    """Those whose library lies beside the compiler: it names a path for what it finds."""
    found = {}
    for name, library in LIBRARIES.items():
        answer = subprocess.run(["g++", f"-print-file-name={library}"], capture_output=True, text=True, check=True)
        found[name] = "/" in answer.stdout
    return [name for name in LIBRARIES if found[name]]


@pytest.mark.parametrize("sanitizer", ["none", *sanitizers()])
def test_core(sanitizer, tmp_path):
    checks = [] if sanitizer == "none" else [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    binary = tmp_path / "memory_cache"
    command = ["g++", *FLAGS, *checks, "-I", str(ROOT / "csrc"), str(SOURCE), "-o", str(binary)]
    build = subprocess.run(command, capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    run = subprocess.run([str(binary)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
