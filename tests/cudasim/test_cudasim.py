"""The CUDA kernels, run on a CPU: compiled by g++ against cudasim.h under the address and undefined-behaviour
sanitizers, and compared with the CPU kernels over awkward sizes, every dtype and three schedules."""

import os
import shutil
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
COMPILER = shutil.which("g++")
# -O1: the optimiser would take longer than the tests do.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
FLAGS = ["-std=c++20", "-O1", "-g", "-DGDBP_CUDASIM", f"-I{CSRC}", f"-I{HERE}", *SANITIZE, *WARNINGS]

SELFTEST = "selftest"
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
    "grad": ["sizes", "many", "extremes", "nonfinite", "limits", "health", "orders", "rewrites", "units", "penalties"],
    "linear": ["forward", "backward"],
    "mlp": ["cross_entropy", "mean_square", "activations", "wide", "frozen", "bad_labels", "inference"],
    "loss": ["cross_entropy", "mixtures", "probabilities", "no_rows", "all_ignored", "bad_labels", "extremes"],
    "norm": ["forward", "backward", "update"],
    "optim": ["rules", "control", "besides", "quantised", "schedules", "many", "parts", "nothing"],
    "pointwise": ["forward", "backward"],
    "units": ["count"],
}


def compile_(output: Path, *arguments) -> Path:
    assert COMPILER, "These tests compile with g++, and there is none in PATH: install it."
    command = [COMPILER, *FLAGS, *map(str, arguments), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    return output


def build(folder: Path, name: str, engine: Future) -> Path:
    parts = []
    if name in FAMILIES:
        # A library of its own: what is thread-local in the program is shared memory to cudasim.
        sources = [CSRC / name / f"{name}_cpu.cpp", CSRC / "common" / "rows_cpu.cpp", HERE / "parallel_serial.cpp"]
        parts.append(compile_(folder / f"{name}_cuda.o", "-c", "-x", "c++", CSRC / name / f"{name}_cuda.cu"))
        if sources[0].exists():
            parts.append(compile_(folder / f"lib{name}_cpu.so", "-shared", "-fPIC", *sources))
    source = HERE / (f"{name}_test.cpp" if name in FAMILIES else f"{name}.cpp")
    return compile_(folder / name, source, *parts, engine.result(), "-ldl", f"-Wl,-rpath,{folder}")


def run(program: Future, case: str) -> subprocess.CompletedProcess:
    return subprocess.run([program.result(), case], capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory):
    """What every selected case did, by program and case: started together, for all cores to work on them."""
    folder = tmp_path_factory.mktemp("cudasim")
    wanted = [
        (item.callspec.params.get("family", SELFTEST), item.callspec.params["case"])
        for item in request.session.items
        if item.path == request.path
    ]
    # First come, first served: when the first case waits for its program, all programs are being built.
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    engine = pool.submit(compile_, folder / "engine.o", "-c", HERE / "engine.cpp")
    programs = {name: pool.submit(build, folder, name, engine) for name in dict.fromkeys(name for name, _ in wanted)}
    yield {(name, case): pool.submit(run, programs[name], case) for name, case in wanted}
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("case", RIGHT)
def test_simulator_computes(outcomes, case):
    done = outcomes[SELFTEST, case].result()
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("case", WRONG)
def test_simulator_notices(outcomes, case):
    done = outcomes[SELFTEST, case].result()
    assert done.returncode != 0
    assert WRONG[case] in done.stderr


@pytest.mark.parametrize(("family", "case"), [(f, c) for f, cases in FAMILIES.items() for c in cases])
def test_kernels_agree_with_the_cpu(outcomes, family, case):
    done = outcomes[family, case].result()
    assert done.returncode == 0, done.stderr
