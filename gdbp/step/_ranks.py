"""Gradients over the ranks of a process group."""

from collections.abc import Iterable

import torch
import torch.distributed as dist


@torch.no_grad()
def share(group, tensors: Iterable[torch.Tensor]) -> None:
    """Gives every rank the values of the group's first."""
    for tensor in tensors:
        dist.broadcast(tensor, dist.get_global_rank(group, 0), group)


def average(group, tensor: torch.Tensor) -> None:
    """The mean over the ranks, in place; one conversation for all that lies in the tensor."""
    # Divided first: the sum of float16 might be more than there is.
    tensor.div_(dist.get_world_size(group))
    dist.all_reduce(tensor, group=group)


def averages(group, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Of each tensor, all in one piece."""
    flat = torch.cat([t.reshape(-1) for t in tensors])
    average(group, flat)
    means = flat.split([t.numel() for t in tensors])
    return [mean.view_as(t).to(t.dtype) for mean, t in zip(means, tensors, strict=True)]


@torch.no_grad()
def average_all(group, optimizer: torch.optim.Optimizer) -> None:
    """Of an optimizer's gradients. A parameter without one on any rank has none on the others."""
    grads = [p.grad for params in optimizer.param_groups for p in params["params"] if p.grad is not None]
    for grad, mean in zip(grads, averages(group, grads), strict=True):
        grad.copy_(mean)
