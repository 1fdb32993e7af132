"""TrainStep in two processes does the training of one that sees all rows."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import gdbp
from gdbp import nn, optim
from gdbp.step import _graphs, train_step
from tests.processes import spawn
from tests.training import LabelsOfADevice, close, data, eager, network, same_state

WORLD = 2


def halves(x, y):
    rank, rows = dist.get_rank(), len(x) // WORLD
    return x[rank * rows : (rank + 1) * rows], y[rank * rows : (rank + 1) * rows]


def train_in_two(**options):
    """Each rank with a half of the rows, beside an eager loop over all of them."""
    torch.manual_seed(dist.get_rank())  # other parameters, until TrainStep shares those of rank 0
    model = network(16, 8)
    make = lambda model: optim.AdamW(model.parameters(), lr=1e-2, max_grad_norm=0.5)  # noqa: E731
    optimizer = make(model)
    step = gdbp.TrainStep(model, nn.CrossEntropyLoss(), optimizer, process_group=dist.group.WORLD, **options)
    torch.manual_seed(0)
    twin = network(16, 8)
    other = make(twin)
    for i in range(4):
        batch = data(seed=i)
        losses = [torch.zeros(()) for _ in range(WORLD)]
        dist.all_gather(losses, step(*halves(*batch)))
        close(sum(losses) / WORLD, eager(twin, nn.CrossEntropyLoss(), other, *batch))
        close(optimizer.grad_norm, other.grad_norm, 1e6)
    same_state(model, optimizer, twin, other)
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    others = [torch.empty_like(flat) for _ in range(WORLD)]
    dist.all_gather(others, flat)
    assert all(torch.equal(flat, each) for each in others)
    return step, model


def fused(_folder):
    step, model = train_in_two(keep_grads=True)
    assert step.explain().startswith("fused")
    gradients = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    close(gradients.norm().double(), step.grad_norms[0], 1e6)
    x, y = halves(*data(32))
    assert step.many((x, y), 4, 6).shape == (6,) and step.steps == 10


def as_graphs(_folder):
    """What runs on CUDA, where a replay computes anew what would have been recorded."""
    device = LabelsOfADevice()
    _graphs.record, _graphs._C = lambda run, device: (run, 0), device
    train_step._is_on_device = lambda model: True
    step, model = train_in_two(keep_grads=True)
    text = step.explain()
    assert "as a CUDA graph" in text and "averaged over processes" in text
    gradients = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    close(gradients.norm().double(), step.grad_norms[0], 1e6)
    # A label out of range is raised by the rank that has it, and behind the step, so that nobody waits for it.
    before = [p.detach().clone() for p in model.parameters()]
    device.bad = torch.tensor([3 if dist.get_rank() else -1, 9])
    with pytest.raises(IndexError, match="Target 9") if dist.get_rank() else contextlib.nullcontext():
        step(*halves(*data(5)))
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    device.bad = torch.tensor([-1, 0])
    step(*halves(*data(6)))
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def not_fused(_folder):
    train_in_two(strict=False)
    model = torch.nn.Sequential(network(4), torch.nn.LogSoftmax(1))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    step = gdbp.TrainStep(model, torch.nn.NLLLoss(), optimizer, strict=False, process_group=dist.group.WORLD)
    assert step.explain().startswith("eager: LogSoftmax '1' has no fused form")
    before = [p.detach().clone() for p in model.parameters()]
    step(*halves(*data()))
    gathered = [torch.empty_like(model[0][0].weight) for _ in range(WORLD)]
    dist.all_gather(gathered, model[0][0].weight.detach())
    assert torch.equal(*gathered) and not torch.equal(before[0], gathered[0])


def wrapped(_folder):
    model = DistributedDataParallel(network(4))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"pass its \.module, and process_group="):
        gdbp.TrainStep(model, nn.CrossEntropyLoss(), optimizer)
    step = gdbp.TrainStep(model, nn.CrossEntropyLoss(), optimizer, strict=False)
    step(*halves(*data()))


@pytest.mark.parametrize("check", [fused, as_graphs, not_fused, wrapped])
def test_two_processes(check, tmp_path):
    spawn(check, tmp_path, WORLD)
