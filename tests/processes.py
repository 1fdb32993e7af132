"""Tests that need several processes, connected through gloo.

The processes are copies of one that has imported torch already, which takes longer than most checks.
"""

import gc
import multiprocessing
import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["gdbp", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp", "torch.distributed.optim"]
)


def spawn(check: Callable[[Path], None], folder: Path, world: int = 2) -> None:
    """Runs ``check(folder)``, a function that can be imported, in ``world`` processes."""
    (folder / "store").unlink(missing_ok=True)
    for rank in range(world):
        _said(folder, rank).touch()  # to be read even where a process does not come far enough to write
    ranks = [FORKS.Process(target=_run, args=(check, folder, rank, world)) for rank in range(world)]
    try:
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(120)
        codes = [rank.exitcode for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0] * world, "\n".join(_said(folder, rank).read_text() for rank in range(world))


def _said(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.txt"


def _run(check: Callable[[Path], None], folder: Path, rank: int, world: int) -> None:
    with _said(folder, rank).open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    torch.manual_seed(0)
    check(folder)
    # Whoever still holds the group would take its threads along to the process' end.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
