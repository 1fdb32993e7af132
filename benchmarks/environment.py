"""What was measured on: everything that a figure depends on and that can be read here."""

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import gdbp
from benchmarks import optional

ROOT = Path(__file__).resolve().parents[1]

# glibc returns large blocks to the system at once, and the next use pays for every page again. With these it
# keeps them. MMAP_MAX is for the versions of glibc that ignore a threshold beyond 32 MB.
KEPT_HEAP = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(2**26),
}


def heap() -> str:
    """ "kept" or "default", or what else decides how this process gets its memory."""
    if all(os.environ.get(name) == value for name, value in KEPT_HEAP.items()):
        return "kept"
    custom = [name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]
    if os.environ.get("LD_PRELOAD"):
        custom.append("LD_PRELOAD")
    return f"custom ({', '.join(sorted(custom))})" if custom else "default"


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    model = fields.get("model name", platform.machine())
    if "cpu family" in fields:  # hypervisors hide the name, but seldom these
        model += f" (family {fields['cpu family']}, model {fields.get('model')})"
    return model


def git_commit() -> str | None:
    """The commit of the sources, with "+" where they were changed since; None where there is none.

    Of a copy of a checkout git knows nothing, or something else: what the variable GDBP_COMMIT says counts first.
    """
    if said := os.environ.get("GDBP_COMMIT"):
        return said

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def describe(device: str) -> dict[str, Any]:
    """Machine, versions, settings and date; JSON-ready."""
    info = gdbp.build_info()
    gpu = None
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        gpu = {
            "name": properties.name,
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return {
        "device": device,
        "cpu": cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load": os.getloadavg()[0],
        "system": platform.platform(),
        "gpu": gpu,
        "instruction_set": info["instruction_set"],
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "heap": heap(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "gdbp": info,
        "peers": optional.versions(),
        "commit": git_commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
