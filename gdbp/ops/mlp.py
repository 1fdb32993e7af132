"""A whole network of narrow layers in one kernel, forward only."""

from collections.abc import Sequence

import torch

from gdbp import _load
from gdbp.ops._function import is_fused

# Up to here a call for every layer costs more than its work. With a million rows torch's layers were 1.2 times as fast
# (64 wide) to 2.6 times (128 wide) on an H200; see step.infer in benchmarks/results.
MOST_ROWS = 2**16
_FACTORS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def forward(
    input: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None], activation: str
) -> torch.Tensor | None:
    """``Linear`` layers with the activation, by name, behind each but the last; None where there is no kernel for them.

    It takes up to MOST_ROWS rows on CUDA in float32, bfloat16 or float16, or under autocast to one of these, and layers
    up to 128 wide whose weights fit into a block's shared memory. The caller has seen that nothing is to be
    differentiated.
    """
    if not input.is_cuda or not _load.available:
        return None
    if not torch.is_autocast_enabled("cuda") and input.dtype is not weights[0].dtype:
        return None
    factors = factors_of(weights[0].dtype)
    given = [t for t in (input, *weights, *biases) if t is not None]
    if input.numel() > MOST_ROWS * input.shape[-1] or factors is None or not all(map(is_fused, given)):
        return None
    if torch.compiler.is_compiling() or not torch.ops.gdbp.mlp_fits(input, weights, biases, activation, factors):
        return None
    return torch.ops.gdbp.mlp(input, weights, biases, activation, factors)


def factors_of(own: torch.dtype) -> str | None:
    """What products with parameters of this dtype are formed of on CUDA at present: "bfloat16", "float16", "tf32" or
    "float32", as autocast and ``torch.backends.cuda.matmul`` say; None for what the kernels don't take."""
    if torch.is_autocast_enabled("cuda") and own is not torch.float64:
        own = torch.get_autocast_dtype("cuda")
    if own is torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return _FACTORS.get(own)
