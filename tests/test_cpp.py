"""Compiles and runs the programs of tests/cpp: plain C++, no torch.

Each is built once as the product is (the best instruction set chosen at run time), and once for every
instruction set alone that this CPU has, because each rounds in its own places.
"""

import platform
from functools import partial
from pathlib import Path

import pytest

from tests.programs import compile_, one_for_each

SOURCES = Path(__file__).parent / "cpp"
FLAGS = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Werror"]
PROGRAMS = sorted(path.stem for path in SOURCES.glob("test_*.cpp"))
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


def build(folder: Path, program: str, variant: str) -> Path:
    target = [] if variant == "clones" else ["-DGDBP_TEST_ONE_TARGET", f"-march={variant}"]
    return compile_(folder / f"{program}-{variant}", *FLAGS, *target, SOURCES / f"{program}.cpp")


start = partial(one_for_each, build)


@pytest.mark.parametrize("variant", variants())
@pytest.mark.parametrize("program", PROGRAMS)
def test_program(program, variant, outcome):
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
