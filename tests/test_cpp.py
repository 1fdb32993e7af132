"""Compiles and runs the programs of tests/cpp: plain C++, no torch.

Each is built once as the product is (the best instruction set chosen at run time), and once for every
instruction set alone that this CPU has, because each rounds in its own places.
"""

import platform
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Werror"]
PROGRAMS = sorted(path.stem for path in (ROOT / "tests" / "cpp").glob("test_*.cpp"))
LEVELS = {
    "x86-64": set(),
    "x86-64-v3": {"avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"},
    "x86-64-v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
}


def variants() -> list[str]:
    """The names of the builds that this CPU runs."""
    if platform.machine() != "x86_64":
        return ["clones"]
    cpuinfo = Path("/proc/cpuinfo").read_text()
    flags = set(next(line for line in cpuinfo.splitlines() if line.startswith("flags")).split(":")[1].split())
    return ["clones"] + [level for level, needed in LEVELS.items() if needed <= flags]


@pytest.mark.parametrize("variant", variants())
@pytest.mark.parametrize("program", PROGRAMS)
def test_program(program, variant, tmp_path):
    target = [] if variant == "clones" else ["-DGDBP_TEST_ONE_TARGET", f"-march={variant}"]
    source = ROOT / "tests" / "cpp" / f"{program}.cpp"
    binary = tmp_path / program
    command = ["g++", *FLAGS, *target, "-I", str(ROOT / "csrc"), str(source), "-o", str(binary)]
    build = subprocess.run(command, capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    run = subprocess.run([str(binary)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
