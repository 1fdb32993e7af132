"""Builds gdbp._C: C++ with torch's BuildExtension and ninja, and nvcc beside it.

The .cu files include no torch header, so they need a CUDA toolkit but neither a GPU nor a CUDA build
of torch. What the environment may set:

    GDBP_CUDA        0, 1 or auto (default): without CUDA, with it, or with it where nvcc is found
    CUDA_HOME        the toolkit to use; else CUDA_PATH, the nvcc on PATH, /usr/local/cuda
    GDBP_CUDA_ARCHS  such as "80;90+PTX"; else TORCH_CUDA_ARCH_LIST; else those of the GPUs in this machine;
                     else "80+PTX", which the driver translates for a later GPU when it first meets it
    MAX_JOBS         parallel compiler processes; default: one per core
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools
from setuptools.command.build_ext import build_ext

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    TORCH_MISSING = None
except ImportError as error:
    torch, BuildExtension, CppExtension, TORCH_MISSING = None, build_ext, setuptools.Extension, error

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'"(.+)"', (ROOT / "gdbp" / "_version.py").read_text())[1]
OLDEST_TORCH, NEWEST_TORCH = (2, 11), (2, 15)

# Without -fno-math-errno no loop with a square root is vectorised; without -fopenmp at::parallel_for
# silently runs on one thread. No -march=native: GDBP_CLONES picks the instruction set at run time.
CXX_FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-std=c++20", "-fvisibility=hidden"]
# -Wall comes with Python's own flags; torch's headers repeat "#pragma unroll", which g++ does not know.
QUIET_FLAGS = ["-g0", "-Wno-unknown-pragmas"]
# What includes torch spends its time outside of loops, and takes g++ three times as long with -O3.
BINDING_FLAGS = ["-O2"]
# Reading torch's headers takes g++ several times as long as what a binding adds, so bindings are compiled
# together: in two units, of which only one needs Python's headers as well.
WITH_PYTHON = ("grad", "memory", "module.cpp", "nodes", "step")
# -O1 is for the host's side; the kernels are always optimised in full.
NVCC_FLAGS = ["-O1", "-std=c++17", "--expt-relaxed-constexpr", "--extended-lambda"]
NVCC_FLAGS += ["-Xcompiler=-fPIC,-fvisibility=hidden"]
DEFAULT_ARCH = "80+PTX"
# bfloat16 and tf32 on tensor cores.
OLDEST_ARCH = 80


def fail(sentence):
    raise SystemExit(f"gdbp: {sentence}")


def find_sources(pattern):
    return sorted(path.relative_to(ROOT) for path in (ROOT / "csrc").rglob(pattern))


def check_torch():
    if torch is None:
        if TORCH_MISSING.name not in (None, "torch"):
            fail(f"torch is installed but does not import ({TORCH_MISSING}); reinstall torch.")
        fail("there is no torch to build with; run: pip install torch && pip install --no-build-isolation .")
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    span = "torch {}.{} to {}.{}".format(*OLDEST_TORCH, *NEWEST_TORCH)
    if found < OLDEST_TORCH:
        fail(f"torch {torch.__version__} is too old, gdbp needs {span}; run: pip install --upgrade torch")
    if found > NEWEST_TORCH:
        print(f"gdbp: torch {torch.__version__} is newer than those it was tested with, {span}.", flush=True)


def check_compiler():
    os.environ["CXX"] = compiler = os.environ.get("CXX") or "g++"
    if shutil.which(shlex.split(compiler)[0]) is None:
        fail(f"no C++ compiler found (looked for {compiler}); install g++ 12 or newer, or set CXX.")


def find_nvcc():
    """Path of nvcc, or None for a CPU build. A toolkit named outright is never replaced by another."""
    choice = os.environ.get("GDBP_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        fail(f"GDBP_CUDA is {choice!r}; expected 0, 1 or auto.")
    if choice == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [f"{home}/bin"] if home else [os.environ.get("PATH"), "/usr/local/cuda/bin"]
    nvcc = next(filter(None, (shutil.which("nvcc", path=place) for place in places)), None)
    looked = places[0] if home else "PATH and /usr/local/cuda/bin"
    if nvcc is None and choice == "1":
        fail(f"GDBP_CUDA=1 but there is no nvcc in {looked}; install the CUDA toolkit or set CUDA_HOME.")
    if nvcc is None:
        print(f"gdbp: no nvcc in {looked}, so this build has no CUDA kernels.", flush=True)
    return nvcc


def gpus():
    """Architectures of this machine's GPUs: ["80", "90"]."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True).stdout
    except OSError:
        return []
    return sorted({major + minor for major, minor in re.findall(r"^(\d+)\.(\d)$", said, re.MULTILINE)}, key=int)


def cuda_archs(nvcc):
    """Architectures as GDBP_CUDA_ARCHS writes them: ["80", "90+PTX"]."""
    wanted = os.environ.get("GDBP_CUDA_ARCHS") or os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not wanted:
        if nvcc.version < (11, 0):
            fail("nvcc {}.{} is too old; install CUDA 11.0 or newer.".format(*nvcc.version))
        here = gpus()
        known = [arch for arch in here if f"sm_{arch}" in nvcc.say("--help") and int(arch) >= OLDEST_ARCH]
        if here and known == here:
            return known
        return [*(arch for arch in known if arch != "80"), DEFAULT_ARCH]
    archs = [re.sub(r"^(sm_|compute_)|\.", "", arch) for arch in re.split(r"[;,\s]+", wanted.strip())]
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?(\+PTX)?", arch):
            fail(f'{arch!r} in {wanted!r} is no CUDA architecture; expected a list such as "80;90+PTX".')
        if int(re.match(r"\d+", arch)[0]) < OLDEST_ARCH:
            fail(f"{arch!r} in {wanted!r} is too old; the kernels need compute capability 8.0, expected 80 or newer.")
    return archs


def gencode(arch):
    number = arch.removesuffix("+PTX")
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}"]
    return flags if number == arch else [*flags, f"-gencode=arch=compute_{number},code=compute_{number}"]


class Nvcc:
    """One CUDA toolkit: its version, its libraries, and how it compiles a file."""

    def __init__(self, path):
        self.path = path
        version = re.search(r"release (\d+)\.(\d+)", self.say("--version"))
        self.version = (int(version[1]), int(version[2]))
        self.archs = cuda_archs(self)
        # nvcc may be a wrapper script far from its toolkit, so it is asked where its libraries are.
        libraries = re.search(r"LIBRARIES=(.*)", self.say("--dryrun", "-x", "cu", os.devnull))
        folders = [word[2:] for word in shlex.split(libraries[1]) if word.startswith("-L")]
        self.library_dirs = [folder for folder in folders if not folder.endswith("stubs")]

    def say(self, *arguments):
        done = subprocess.run([self.path, *arguments], capture_output=True, text=True)
        if done.returncode:
            fail(f"{self.path} does not work: {done.stderr.strip()}")
        return done.stdout + done.stderr

    def compile(self, source, out):
        """Compiles source into out, unless out is newer than all it is made of and from the same command."""
        archs = [flag for arch in self.archs for flag in gencode(arch)]
        command = [self.path, *NVCC_FLAGS, *archs, "-I", "csrc", "-MMD", "-MF", str(out.with_suffix(".d"))]
        command += ["-c", str(source), "-o", str(out)]
        record = out.with_suffix(".command")
        try:
            built = out.stat().st_mtime
            same = record.read_text() == shlex.join(command)
            if same and all(os.stat(path).st_mtime < built for path in made_of(out)):
                return
        except OSError:  # something is not there yet, or no more
            pass
        print(shlex.join(command), flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        if subprocess.run(command).returncode:
            fail(f"nvcc could not compile {source}; its message is above.")
        record.write_text(shlex.join(command))


def made_of(out):
    """The files that the compiler read for out, which it wrote beside it."""
    names = out.with_suffix(".d").read_text().replace("\\\n", " ").split(": ", 1)[1]
    return [name.replace("\\ ", " ") for name in re.findall(r"(?:\\ |\S)+", names)]


def write_units(folder, facts):
    """The bindings as two C++ files, which begin with what they are to know of this build. A file that says the same
    already stays as old as it is."""
    bindings = [source.relative_to("csrc") for source in find_sources("*.cpp") if not source.stem.endswith("_cpu")]
    with_python = [binding for binding in bindings if binding.parts[0] in WITH_PYTHON]
    units = {"objects": with_python, "operators": [binding for binding in bindings if binding not in with_python]}
    folder.mkdir(parents=True, exist_ok=True)
    for name, parts in units.items():
        unit = folder / f"{name}.cpp"
        lines = [f"#define GDBP_{fact}" for fact in facts] + [f'#include "{part}"' for part in parts]
        text = "".join(f"{line}\n" for line in lines)
        if not unit.exists() or unit.read_text() != text:
            unit.write_text(text)
        yield str(unit.relative_to(ROOT))


class Build(BuildExtension):
    def finalize_options(self):
        super().finalize_options()
        # A folder for each torch, also where pip would use one that it deletes: rebuilds stay short.
        version = torch.__version__ if torch else "none"
        self.build_temp = str(ROOT / "build" / f"{sys.implementation.cache_tag}-torch-{version}")
        # Always link: by its date alone, the binary of another torch is up to date. Ninja still decides
        # what to compile.
        self.force = True

    def run(self):
        check_torch()
        check_compiler()
        facts = {"VERSION": VERSION, "TORCH_VERSION": torch.__version__, "CXX_FLAGS": " ".join(CXX_FLAGS)}
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
        if not jobs.isdecimal() or int(jobs) < 1:
            fail(f"MAX_JOBS is {jobs!r}; expected a whole number of at least 1.")
        self.kernels = []
        # As many as ninja has: the two take turns, and neither leaves a core idle when the other is done.
        with ThreadPoolExecutor(int(jobs)) as pool:
            if path := find_nvcc():
                nvcc = Nvcc(path)
                facts |= {"CUDA_VERSION": "{}.{}".format(*nvcc.version), "CUDA_ARCHS": " ".join(nvcc.archs)}
                self.add_cuda(self.extensions[0], nvcc, pool)
            facts = [f'{name} "{fact}"' for name, fact in facts.items()] + ["WITH_CUDA 1"] * bool(path)
            self.extensions[0].sources = [str(source) for source in find_sources("*_cpu.cpp")]
            self.extensions[0].sources += write_units(Path(self.build_temp), facts)
            try:
                super().run()
            except RuntimeError as error:  # what torch makes of a failed compiler
                fail(f"the C++ sources could not be compiled ({error}); the compiler's message is above.")
        # Importing a binary of another torch can crash, so its torch is also written beside it.
        binary = Path(self.get_ext_fullpath("gdbp._C"))
        binary.with_suffix(".json").write_text(json.dumps({"torch": torch.__version__}) + "\n")

    def add_cuda(self, extension, nvcc, pool):
        # What is long is not left for last.
        for source in sorted(find_sources("*_cuda.cu"), key=lambda path: -path.stat().st_size):
            out = Path(self.build_temp, "cuda", f"{source.stem}.o")
            self.kernels.append(pool.submit(nvcc.compile, source, out))
            extension.extra_objects.append(str(out))
        extension.library_dirs += nvcc.library_dirs
        extension.libraries += ["cudart_static", "rt", "dl", "pthread"]

    def build_extension(self, extension):
        compile_, link = self.compiler.compile, self.compiler.link_shared_object

        def compile_in_two(sources, *, extra_postargs, **options):
            loops = [source for source in sources if source.endswith("_cpu.cpp")]
            bindings = [source for source in sources if source not in loops]
            objects = compile_(bindings, extra_postargs=[*extra_postargs, *BINDING_FLAGS], **options)
            return objects + compile_(loops, extra_postargs=extra_postargs, **options)

        def link_when_all_is_there(*arguments, **options):
            for kernel in self.kernels:
                kernel.result()
            return link(*arguments, **options)

        self.compiler.compile, self.compiler.link_shared_object = compile_in_two, link_when_all_is_there
        super().build_extension(extension)


if __name__ == "__main__":
    os.chdir(ROOT)
    if int(setuptools.__version__.split(".")[0]) < 77:
        fail(f"setuptools {setuptools.__version__} is too old; run: pip install 'setuptools>=77,<82'")
    extension = CppExtension(
        "gdbp._C",
        [str(path) for path in find_sources("*.cpp")],
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args=[*CXX_FLAGS, *QUIET_FLAGS],
        extra_link_args=["-fopenmp"],
    )
    setuptools.setup(ext_modules=[extension], cmdclass={"build_ext": Build})
