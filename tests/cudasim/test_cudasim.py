"""The CUDA kernels, run on a CPU: compiled by g++ against cudasim.h under the address and undefined-behaviour
sanitizers, and compared with the CPU kernels over awkward sizes, every dtype and three schedules."""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
COMPILER = shutil.which("g++")
# -O1: the optimiser would take longer than the tests do.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
FLAGS = ["-std=c++20", "-O1", "-g", "-DGDBP_CUDASIM", f"-I{CSRC}", f"-I{HERE}", *SANITIZE, *WARNINGS]

RIGHT = ["reductions", "shuffles", "indices", "dynamic_shared", "shared_garbage"]
WRONG = {
    "missing_barrier": "a neighbour has not written yet",
    "overtaken": "a faster warp has written already",
    "global_out_of_bounds": "heap-buffer-overflow",
    "local_out_of_bounds": "stack-buffer-overflow",
    "divergent_barrier": "divergent barrier in block (0, 0, 0): thread 0 waits",
    "two_places": "divergent barrier in block (0, 0, 0): thread 0 waits",
    "missing_lane": "thread 7 has returned",
    "wrong_mask": "thread 16 of block (0, 0, 0) is not in the mask",
    "short_warp": "a mask that names lanes beyond the block",
}
FAMILIES = {
    "bce": ["forward", "backward", "nothing"],
    "grad": ["sizes", "many", "extremes", "nonfinite", "limits", "health", "orders", "rewrites"],
    "linear": ["forward", "backward"],
    "loss": ["cross_entropy", "mixtures", "probabilities", "no_rows", "all_ignored", "bad_labels", "extremes"],
    "norm": ["forward", "backward", "update"],
    "optim": ["rules", "control", "besides", "quantised", "schedules", "many", "nothing"],
    "pointwise": ["forward", "backward"],
    "units": ["count"],
}


def compile_(output: Path, *arguments) -> Path:
    assert COMPILER, "These tests compile with g++, and there is none in PATH: install it."
    command = [COMPILER, *FLAGS, *map(str, arguments), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    return output


def run(program: Path, case: str) -> subprocess.CompletedProcess:
    return subprocess.run([program, case], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """build(name): the test program of that name, compiled once."""
    folder = tmp_path_factory.mktemp("cudasim")
    engine = compile_(folder / "engine.o", "-c", HERE / "engine.cpp")
    programs = {}

    def program(name: str) -> Path:
        if name not in programs:
            parts = [engine]
            if name in FAMILIES:
                # A library of its own: what is thread-local in the program is shared memory to cudasim.
                sources = [CSRC / name / f"{name}_cpu.cpp", HERE / "parallel_serial.cpp"]
                parts += [
                    compile_(folder / f"{name}_cuda.o", "-c", "-x", "c++", CSRC / name / f"{name}_cuda.cu"),
                    compile_(folder / f"lib{name}_cpu.so", "-shared", "-fPIC", *sources),
                ]
            source = HERE / (f"{name}_test.cpp" if name in FAMILIES else f"{name}.cpp")
            programs[name] = compile_(folder / name, source, *parts, "-ldl", f"-Wl,-rpath,{folder}")
        return programs[name]

    return program


@pytest.mark.parametrize("case", RIGHT)
def test_simulator_computes(build, case):
    done = run(build("selftest"), case)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("case", WRONG)
def test_simulator_notices(build, case):
    done = run(build("selftest"), case)
    assert done.returncode != 0
    assert WRONG[case] in done.stderr


@pytest.mark.parametrize(("family", "case"), [(f, c) for f, cases in FAMILIES.items() for c in cases])
def test_kernels_agree_with_the_cpu(build, family, case):
    done = run(build(family), case)
    assert done.returncode == 0, done.stderr
