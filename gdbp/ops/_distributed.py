"""What DTensors need here, without importing torch.distributed where nobody uses it."""

from torch import Tensor


def is_distributed(tensor: Tensor) -> bool:
    """Whether this is a DTensor."""
    return hasattr(tensor, "placements") and hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, which shares its memory (under ``no_grad``); any other tensor as it is."""
    return tensor.to_local() if is_distributed(tensor) else tensor


def spread_like(gradient: Tensor, p: Tensor) -> Tensor:
    """The gradient laid out over the ranks as its parameter is."""
    if is_distributed(p) and gradient.placements != p.placements:
        return gradient.redistribute(p.device_mesh, p.placements)
    return gradient


def sum_over_ranks(part: Tensor, like: Tensor) -> Tensor:
    """The sum of every rank's ``part`` of the DTensor ``like``; copies of one shard count once."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    placements = [Replicate() if placement.is_replicate() else Partial() for placement in like.placements]
    return DTensor.from_local(part, like.device_mesh, placements, run_check=False).full_tensor()
