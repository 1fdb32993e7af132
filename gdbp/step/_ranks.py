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
    dist.all_reduce(tensor, group=group)
    tensor.div_(dist.get_world_size(group))


@torch.no_grad()
def average_all(group, optimizer: torch.optim.Optimizer) -> None:
    """Of an optimizer's gradients, in one piece. A parameter without one on any rank has none on the others."""
    grads = [p.grad for params in optimizer.param_groups for p in params["params"] if p.grad is not None]
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    average(group, flat)
    for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(mean.view_as(grad))
