"""A whole network of narrow layers in one kernel, forward only."""

from collections.abc import Sequence

import torch

from gdbp import _load
from gdbp.ops._function import is_fused

HALVES = (torch.bfloat16, torch.float16)
# Up to here a call for every layer costs more than its work. With a million rows torch's layers were 1.2 times as fast
# (64 wide) to 2.6 times (128 wide) on an H200; see step.infer in benchmarks/results.
MOST_ROWS = 2**16


def forward(
    input: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None], activation: str
) -> torch.Tensor | None:
    """``Linear`` layers with the activation, by name, behind each but the last; None where there is no kernel for them.

    It takes up to MOST_ROWS rows on CUDA in bfloat16 or float16, or under autocast to one of these, and layers up to
    128 wide whose weights fit into a block's shared memory. The caller has seen that nothing is to be differentiated.
    """
    if not input.is_cuda or not _load.available:
        return None
    compute = weights[0].dtype
    if torch.is_autocast_enabled("cuda"):
        compute = torch.get_autocast_dtype("cuda")
    elif input.dtype is not compute:
        return None
    given = [t for t in (input, *weights, *biases) if t is not None]
    if input.numel() > MOST_ROWS * input.shape[-1] or compute not in HALVES or not all(map(is_fused, given)):
        return None
    if torch.compiler.is_compiling() or not torch.ops.gdbp.mlp_fits(input, weights, biases, activation):
        return None
    return torch.ops.gdbp.mlp(input, weights, biases, activation, compute)
