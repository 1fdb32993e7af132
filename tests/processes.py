"""Tests that need several processes: each runs one function of the test's own file, connected through gloo."""

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import gdbp


def spawn(check: Callable[[Path], None], folder: Path, world: int = 2) -> None:
    """Runs ``check(folder)`` in ``world`` processes. Its file must end in a call of :func:`main`."""
    (folder / "store").unlink(missing_ok=True)
    path = os.pathsep.join([str(Path(gdbp.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    file = check.__code__.co_filename
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", file, check.__name__, str(folder), str(rank), str(world)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(outputs)


def main(names: dict, check: str, folder: str, rank: str, world: str) -> None:
    """One rank's process: ``names`` are those of the test's file."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group(
        "gloo", init_method=store, rank=int(rank), world_size=int(world), timeout=timedelta(seconds=60)
    )
    torch.manual_seed(0)
    names[check](Path(folder))
    # Whoever still holds the group would take its threads along to the interpreter's end.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
