"""Loads the compiled part, gdbp._C, or explains in one warning why gdbp goes on without it.

Loading registers the operators with torch's dispatcher. Where `available` is False, every public name
works on plain PyTorch (gdbp/reference/), and `reason` says why.
"""

import importlib
import json
import platform
import warnings
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import torch

from gdbp._version import __version__

HOW_TO_BUILD = "in gdbp's source folder run: pip install --no-build-isolation ."


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _load() -> tuple[Any, str | None]:
    """The module and None, or None and the sentence that says what is wrong with it."""
    # Beside this file and nowhere else: an editable install would offer the binary of its own folder.
    spec = PathFinder.find_spec("gdbp._C", [str(Path(__file__).parent)])
    if spec is None or spec.origin is None:
        return None, "gdbp's compiled part is not there"
    # A binary of another torch can crash the process that opens it, so its version is read from a file.
    try:
        built = json.loads(Path(spec.origin).with_suffix(".json").read_text())["torch"]
    except (OSError, ValueError, KeyError):
        return None, f"{spec.origin} does not say which torch it was built with"
    if _minor(built) != _minor(torch.__version__):
        return None, f"gdbp was built with torch {built} and this is torch {torch.__version__}"
    try:
        return importlib.import_module("gdbp._C"), None
    except ImportError as error:
        return None, f"gdbp's compiled part could not be loaded ({error})"


_C, reason = _load()
available = _C is not None

if not available:
    warnings.warn(
        f"{reason}, so gdbp runs on plain PyTorch, which is slower; {HOW_TO_BUILD}",
        RuntimeWarning,
        stacklevel=2,
    )


def build_info() -> dict[str, Any]:
    """What was built, and what is running.

    Returns:
        A dict with the keys

        - ``version``: gdbp's version;
        - ``compiled``: whether the compiled part is in use; ``reason``: why not, else None;
        - ``torch_built``, ``torch_running``, ``python``: versions (``torch_built`` is None without the
          compiled part, as are the following, up to ``half_products``);
        - ``compiler``, ``cxx_flags``, ``openmp``: how the C++ was compiled;
        - ``cuda``: nvcc's version, None in a build without CUDA; ``cuda_archs``: list such as
          ``["80", "90+PTX"]``;
        - ``instruction_set``: what the CPU loops run with here: x86-64-v4, x86-64-v3 or default;
        - ``half_products``: the half types for whose matrix products torch's library has instructions on this CPU;
          those of others are formed in float32;
        - ``threads``: torch's number of CPU threads;
        - ``cuda_devices``: names of the GPUs that torch sees.
    """
    facts = ("torch_built", "compiler", "cxx_flags", "openmp", "cuda", "cuda_archs", "instruction_set", "half_products")
    built = dict.fromkeys(facts)
    if available:
        built |= _C.build_info()
        built["half_products"] = [name for name in ("bfloat16", "float16") if _C.has_products_of(name)]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        **built,
        "version": __version__,
        "compiled": available,
        "reason": reason,
        "torch_running": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cuda_devices": [torch.cuda.get_device_name(i) for i in devices],
    }


def _verdict(info: dict[str, Any]) -> str:
    """One line: what runs where."""
    if not info["compiled"]:
        return f"Everything runs on plain PyTorch: {info['reason']}; {HOW_TO_BUILD}"
    cpu = f"CPU tensors run on compiled kernels ({info['instruction_set']}, {info['threads']} threads)"
    if info["cuda"] is None:
        return f"{cpu}; this build has no CUDA kernels (build again where nvcc is, with GDBP_CUDA=1)."
    if torch.version.cuda is None:
        return f"{cpu}; CUDA kernels are built, but torch {info['torch_running']} has no CUDA."
    if not info["cuda_devices"]:
        return f"{cpu}; CUDA kernels are built, but torch sees no GPU."
    return f"{cpu}, CUDA tensors on compiled kernels."


def format_build_info() -> str:
    """`build_info()` as an aligned table, with a last line that says what runs where."""
    info = build_info()
    rows = {
        "gdbp": info["version"],
        "python": info["python"],
        "torch": info["torch_running"],
        "built with torch": info["torch_built"] or "-",
        "compiler": info["compiler"] or "-",
        "flags": info["cxx_flags"] or "-",
        "OpenMP": {True: "yes", False: "no", None: "-"}[info["openmp"]],
        "CUDA compiler": f"nvcc {info['cuda']}" if info["cuda"] else "-",
        "CUDA architectures": ", ".join(f"sm_{arch}" for arch in info["cuda_archs"] or ()) or "-",
        "GPUs": ", ".join(info["cuda_devices"]) or "none visible",
        "CPU instructions": info["instruction_set"] or "-",
        "CPU half products": ", ".join(info["half_products"] or ()) or "in float32",
        "CPU threads": info["threads"],
    }
    width = max(map(len, rows))
    return "\n".join([*(f"{name:<{width}}  {value}" for name, value in rows.items()), "", _verdict(info)])
