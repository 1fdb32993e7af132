"""Building and loading: what was built is said, and what cannot be is said in one sentence."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gdbp
from gdbp import _load

ROOT = Path(__file__).resolve().parent.parent


def run(*command, cwd, **environment):
    # Whoever runs the tests may have said how to build.
    env = {name: value for name, value in os.environ.items() if name != "GDBP_CUDA"} | environment
    return subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture
def sources(tmp_path):
    """A copy of what setup.py reads, with a C++ file that takes no time to compile."""
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "README.md").touch()
    (tmp_path / "gdbp").mkdir()
    shutil.copy(ROOT / "gdbp" / "_version.py", tmp_path / "gdbp")
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "module.cpp").write_text('extern "C" void* PyInit__C() { return nullptr; }\n')
    return tmp_path


def build(sources, **environment):
    return run("setup.py", "-q", "build_ext", "--inplace", cwd=sources, **environment)


def assert_one_sentence(done, *words):
    """The build stopped with one line, without a traceback, that says all of `words`."""
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("gdbp: ")]
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in line


def stub_torch(folder, version, error=None):
    """A package named torch that is only a version, or that cannot be imported."""
    package = folder / "stub" / "torch"
    (package / "utils").mkdir(parents=True)
    package.joinpath("__init__.py").write_text(f"raise {error}" if error else f"__version__ = {version!r}")
    package.joinpath("utils", "__init__.py").touch()
    package.joinpath("utils", "cpp_extension.py").write_text(
        "from setuptools import Extension as CppExtension\n"
        "from setuptools.command.build_ext import build_ext as BuildExtension\n"
    )
    return str(folder / "stub")


def test_cuda_wanted_without_nvcc(sources):
    done = build(sources, GDBP_CUDA="1", CUDA_HOME=str(sources / "nowhere"))
    assert_one_sentence(done, "GDBP_CUDA=1", "no nvcc", "nowhere", "CUDA_HOME")


def test_cuda_choice_unknown(sources):
    assert_one_sentence(build(sources, GDBP_CUDA="maybe"), "GDBP_CUDA", "'maybe'", "0, 1 or auto")


@pytest.mark.parametrize("jobs", ["0", "all", "-1"])
def test_number_of_jobs_refused(sources, jobs):
    assert_one_sentence(build(sources, GDBP_CUDA="0", MAX_JOBS=jobs), f"MAX_JOBS is '{jobs}'", "at least 1")


def test_a_source_distribution_has_all_sources(tmp_path):
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "gdbp"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
    done = run("setup.py", "-q", "sdist", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (archive,) = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as opened:
        packed = {Path(*Path(name).parts[1:]) for name in opened.getnames()}
    wanted = {path.relative_to(tmp_path) for name in ("csrc", "gdbp") for path in (tmp_path / name).rglob("*.*")}
    assert wanted <= packed


def stub_nvcc(folder, release):
    """A CUDA toolkit that can only say its version."""
    nvcc = folder / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho release {release},\n")
    nvcc.chmod(0o755)
    return str(folder / "cuda")


@pytest.mark.parametrize(
    "archs, said", [("80;fermi", ("'fermi'", "80;90+PTX")), ("7.5;90", ("'75'", "too old", "80 or newer"))]
)
def test_cuda_architecture_refused(sources, archs, said):
    done = build(sources, CUDA_HOME=stub_nvcc(sources, "13.0"), GDBP_CUDA_ARCHS=archs)
    assert_one_sentence(done, *said)


@pytest.mark.parametrize(
    "gpus, archs",
    [
        ([], ["80+PTX"]),
        (["90"], ["90"]),
        (["80", "90"], ["80", "90"]),
        (["90", "210"], ["90", "80+PTX"]),  # one that this nvcc does not know
        (["75"], ["80+PTX"]),
        (["75", "90"], ["90", "80+PTX"]),
    ],
)
def test_cuda_architectures_are_those_of_the_gpus(monkeypatch, gpus, archs):
    spec = importlib.util.spec_from_file_location("setup_of_gdbp", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    monkeypatch.delenv("GDBP_CUDA_ARCHS", raising=False)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(setup, "gpus", lambda: gpus)
    nvcc = SimpleNamespace(version=(13, 0), say=lambda *arguments: "'sm_75','sm_80','sm_90','sm_100'")
    assert setup.cuda_archs(nvcc) == archs


def test_only_what_changed_is_compiled_again(sources):
    def compiled():
        done = build(sources, GDBP_CUDA="0")
        assert done.returncode == 0, done.stderr
        return re.findall(r" -c \S+ -o (\S+)", done.stdout)

    (sources / "csrc" / "bce").mkdir()
    header, loops = sources / "csrc" / "bce" / "bce.h", sources / "csrc" / "bce" / "bce_cpu.cpp"
    header.touch()
    loops.write_text('#include "bce/bce.h"\n')
    assert len(compiled()) == 3
    assert compiled() == []
    header.write_text("int x;\n")
    (again,) = compiled()
    assert again.endswith("bce_cpu.o")


def test_nvcc_too_old(sources):
    done = build(sources, CUDA_HOME=stub_nvcc(sources, "10.2"), GDBP_CUDA_ARCHS="", TORCH_CUDA_ARCH_LIST="")
    assert_one_sentence(done, "nvcc 10.2 is too old", "11.0")


def test_no_compiler(sources):
    assert_one_sentence(build(sources, CXX="no-such-compiler"), "no-such-compiler", "install g++")


def test_broken_source(sources):
    (sources / "csrc" / "module.cpp").write_text("#error broken\n")
    assert_one_sentence(build(sources, GDBP_CUDA="0"), "could not be compiled")


@pytest.mark.parametrize(
    "error, words",
    [
        ("ModuleNotFoundError('No module named torch', name='torch')", ["pip install torch &&", "isolation"]),
        ("ImportError('libgone.so: no such file', name='torch._C')", ["libgone.so", "reinstall torch"]),
    ],
)
def test_no_torch(sources, error, words):
    assert_one_sentence(build(sources, PYTHONPATH=stub_torch(sources, "", error)), *words)


def test_torch_too_old(sources):
    done = build(sources, PYTHONPATH=stub_torch(sources, "2.10.1"))
    assert_one_sentence(done, "torch 2.10.1 is too old", "2.11", "pip install --upgrade torch")


def test_torch_newer_than_known_and_no_nvcc_are_said_and_built(sources):
    done = build(sources, PYTHONPATH=stub_torch(sources, "2.99.0+cpu"), CUDA_HOME=str(sources / "nowhere"))
    assert done.returncode == 0, done.stderr
    assert "torch 2.99.0+cpu is newer" in done.stdout
    assert "no CUDA kernels" in done.stdout
    (record,) = (sources / "gdbp").glob("_C.*.json")
    assert json.loads(record.read_text()) == {"torch": "2.99.0+cpu"}


def test_build_info():
    info = gdbp.build_info()
    assert info["version"] == gdbp.__version__
    assert info["compiled"] and info["reason"] is None
    assert info["torch_built"].split(".")[:2] == torch.__version__.split(".")[:2]
    assert info["torch_running"] == torch.__version__
    assert info["openmp"] is True
    assert "-fno-math-errno" in info["cxx_flags"]
    assert info["instruction_set"] in ("x86-64-v4", "x86-64-v3", "default")
    assert (info["cuda"] is None) == (info["cuda_archs"] == [])
    assert info["threads"] == torch.get_num_threads()
    assert set(info["half_products"]) <= {"bfloat16", "float16"}
    assert len(info["cuda_devices"]) == torch.cuda.device_count()


def test_build_info_as_a_table():
    *rows, _, verdict = _load.format_build_info().splitlines()
    assert len({row.index(row.split("  ")[-1].lstrip()) for row in rows}) == 1
    assert verdict.startswith("CPU tensors run on compiled kernels")


@pytest.fixture
def package(tmp_path):
    """A copy of the package alone, without its compiled part."""
    shutil.copytree(ROOT / "gdbp", tmp_path / "gdbp", ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
    return tmp_path


USE = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import gdbp, torch
    from gdbp import _load
    layer = gdbp.nn.Linear(3, 2, activation="relu")
    layer(torch.ones(4, 3)).sum().backward()
    gdbp.optim.AdamW(layer.parameters()).step()
ours = [str(w.message) for w in caught if "gdbp" in str(w.message)]
assert len(ours) == 1, ours
assert not _load.available and not gdbp.build_info()["compiled"]
assert _load.format_build_info().splitlines()[-1].startswith("Everything runs on plain PyTorch")
print(ours[0])
"""


def warning_of(package):
    done = run("-c", USE, cwd=package, PYTHONPATH=str(package))
    assert done.returncode == 0, done.stderr
    return done.stdout


def compiled_part(package):
    binary = Path(_load._C.__file__)
    os.symlink(binary, package / "gdbp" / binary.name)
    return package / "gdbp" / binary.with_suffix(".json").name


def test_without_compiled_part(package):
    assert "not there" in (said := warning_of(package)) and "pip install --no-build-isolation" in said


def test_compiled_for_another_torch(package):
    compiled_part(package).write_text('{"torch": "2.7.1+cu126"}')
    said = warning_of(package)
    assert "torch 2.7.1+cu126" in said and f"torch {torch.__version__}" in said and "pip install" in said


def test_compiled_for_nobody_knows_which_torch(package):
    compiled_part(package)
    assert "does not say which torch" in warning_of(package)


def test_compiled_part_damaged(package):
    record = compiled_part(package)
    record.write_text(json.dumps({"torch": torch.__version__}))
    binary = record.with_suffix(".so")
    binary.unlink()
    binary.write_bytes(b"not a library")
    assert "could not be loaded" in warning_of(package)
