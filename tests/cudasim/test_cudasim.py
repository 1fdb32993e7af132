"""The CUDA kernels, run on a CPU: compiled by g++ against cudasim.h under the address and undefined-behaviour
sanitizers, and compared with the CPU kernels over awkward sizes, every dtype and three schedules."""

from concurrent.futures import Executor, Future
from pathlib import Path

import pytest

from tests.programs import CSRC, compile_, run_when_built

HERE = Path(__file__).parent
# Of undefined behaviour what a GPU would not forgive and the address sanitizer does not see. That one calls its checks:
# in line, with all the others, they took the compiler twice as long as the tests.
CHECKS = ["address", "alignment", "bounds", "shift", "signed-integer-overflow", "integer-divide-by-zero"]
SANITIZE = [f"-fsanitize={','.join(CHECKS)}", "-fno-sanitize-recover=all"]
SANITIZE += ["--param=asan-instrumentation-with-call-threshold=0", "--param=asan-use-after-return=0"]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
# -O1 and -g1: more would take the compiler longer than the tests.
FLAGS = ["-std=c++20", "-O1", "-g1", "-DGDBP_CUDASIM", f"-I{HERE}", *SANITIZE, *WARNINGS]

# Its cases take seconds; 60 of them go by before the compiler is done, and 40 with this.
FASTER = {"optim": ["-O0"]}

# The engine switches threads at every barrier, and is not what is tested.
ENGINE_FLAGS = ["-O2", *(f"--param=asan-{what}=0" for what in ("instrument-reads", "instrument-writes", "stack"))]

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
# What compiles longest comes first, for the rest to fill the other cores.
FAMILIES = {
    "optim": ["rules", "control", "besides", "quantised", "schedules", "many", "parts", "nothing"],
    "norm": ["forward", "backward", "update"],
    "loss": [
        *["cross_entropy", "mixtures", "probabilities", "no_rows", "all_ignored", "bad_labels"],
        *["extremes", "huge_upstream", "infinite_upstream", "no_classes"],
    ],
    "linear": ["forward", "backward"],
    "mlp": [
        *["cross_entropy", "mean_square", "upstream", "activations", "wide", "frozen", "bad_labels"],
        *["all_ignored", "nan_logits"],
        *["inference", "inference_types", "inference_sizes"],
    ],
    "pointwise": ["forward", "backward"],
    "grad": ["sizes", "many", "extremes", "nonfinite", "limits", "health", "orders", "rewrites", "units", "penalties"],
    "bce": ["forward", "backward", "nothing"],
    "units": ["count", "wide"],
    "dropout": ["masks"],
}


def build(folder: Path, name: str, engine: Future, common: list[Future]) -> Path:
    parts = []
    if name in FAMILIES:
        for kernels in sorted((CSRC / name).glob("*_cuda.cu")):
            flags = [*FLAGS, *FASTER.get(name, ())]
            parts.append(compile_(folder / f"{kernels.stem}.o", *flags, "-c", "-x", "c++", kernels))
        # A library of its own: what is thread-local in the program is shared memory to cudasim.
        sources = [CSRC / name / f"{name}_cpu.cpp", *(part.result() for part in common)]
        parts.append(compile_(folder / f"lib{name}_cpu.so", *FLAGS, "-shared", "-fPIC", *sources))
    source = HERE / (f"{name}_test.cpp" if name in FAMILIES else f"{name}.cpp")
    return compile_(folder / name, *FLAGS, source, *parts, engine.result(), "-ldl", f"-Wl,-rpath,{folder}")


def start(items: list[pytest.Item], folder: Path, pool: Executor) -> dict[str, Future]:
    def program_of(item: pytest.Item) -> str:
        return item.callspec.params.get("family", SELFTEST)

    def compile_alone(source: Path, *flags: str) -> Future:
        return pool.submit(compile_, folder / f"{source.stem}.o", *FLAGS, *flags, "-c", source)

    # First come, first served: when the first case waits for its program, all programs are being built.
    engine = compile_alone(HERE / "engine.cpp", *ENGINE_FLAGS)
    shared = [CSRC / "common" / f"{part}_cpu.cpp" for part in ("rows", "half_tables", "narrow_gemm")]
    common = [compile_alone(source, "-fPIC") for source in [*shared, HERE / "parallel_serial.cpp"]]
    wanted = dict.fromkeys(map(program_of, items))
    programs = {name: pool.submit(build, folder, name, engine, common) for name in wanted}
    return {
        item.nodeid: pool.submit(run_when_built, programs[program_of(item)], item.callspec.params["case"])
        for item in items
    }


@pytest.mark.parametrize(("family", "case"), [(f, c) for f, cases in FAMILIES.items() for c in cases])
def test_kernels_agree_with_the_cpu(family, case, outcome):
    assert outcome.returncode == 0, outcome.stderr


@pytest.mark.parametrize("case", RIGHT)
def test_simulator_computes(case, outcome):
    assert outcome.returncode == 0, outcome.stderr


@pytest.mark.parametrize("case", WRONG)
def test_simulator_notices(case, outcome):
    assert outcome.returncode != 0
    assert WRONG[case] in outcome.stderr
