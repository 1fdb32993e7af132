"""Dense layers and fused models in two processes: replicated, sharded, and with each weight split over the ranks."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import gdbp
from tests.fuse_models import Attributes, Functional, nested
from tests.processes import spawn


def sizes_that_do_not_divide():
    """Linear(7, 1) over two ranks leaves the second with no element."""
    return gdbp.nn.MLP([8, 7, 1], "gelu")


def ours_with_norm():
    return gdbp.nn.MLP([8, 6, 3], "silu", batch_norm=True)


# torch's or our layers, and torch's fused.
BUILDS = [sizes_that_do_not_divide, ours_with_norm, Attributes, Functional, nested]


def built(build, fuse=False):
    torch.manual_seed(0)
    model = build().double()
    return gdbp.fuse(model) if fuse else model


def batch(turn, rows=8):
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(turn), dtype=torch.float64)


def whole(tensor):
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def learn(model, inputs, parts=1):
    """A few steps; the loss is the mean over ``parts``, as that of data-parallel training."""
    optimizer = gdbp.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x in inputs:
        optimizer.zero_grad()
        (model(x).square().sum() / parts).backward()
        optimizer.step()


def assert_same(model, plain):
    pairs = zip(model.state_dict().values(), plain.state_dict().values(), strict=True)
    for mine, other in pairs:
        torch.testing.assert_close(whole(mine), other, rtol=1e-9, atol=1e-9)


def check_ddp(folder):
    for build in BUILDS:
        model = DistributedDataParallel(built(build, fuse=True))
        plain = built(build)
        # Every rank's statistics are its own batch's, so all get the same one.
        inputs = [batch(turn) for turn in range(3)]
        learn(model, inputs)
        learn(plain, inputs)
        assert_same(model.module, plain)
    for build in (sizes_that_do_not_divide, Functional):
        model, plain = DistributedDataParallel(built(build, fuse=True)), built(build)
        learn(model, [batch(turn).chunk(2)[dist.get_rank()] for turn in range(3)])
        learn(plain, [batch(turn) for turn in range(3)], parts=2)
        assert_same(model.module, plain)


def check_fsdp(folder):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    inputs = [batch(turn) for turn in range(3)]
    for build in BUILDS:
        plain = built(build)
        learn(plain, inputs)
        for fuse in (False, True):
            for each in (False, True):
                model = built(build, fuse)
                if each:
                    # Layers with hooks of their own leave their runs, and shard all the same.
                    for layer in [m for m in model.modules() if isinstance(m, nn.Linear)]:
                        fully_shard(layer, mesh=mesh)
                fully_shard(model, mesh=mesh)
                assert all(isinstance(p, DTensor) for p in model.parameters())
                learn(model, inputs)
                assert_same(model, plain)


def check_fuse_after_sharding(folder):
    """Too late for the layers that have hooks then, but nothing is wrong."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plain, model, reports = built(Attributes), built(Attributes), []
    fully_shard(model.fc1, mesh=mesh)
    gdbp.fuse(model, report=reports.append)
    assert [run.layers for run in reports[0].fused] == [("bn", "act"), ("fc2", "gelu")]
    inputs = [batch(turn) for turn in range(3)]
    learn(model, inputs)
    learn(plain, inputs)
    assert_same(model, plain)


def check_fuse_after_wrapping(folder):
    """FullyShardedDataParallel leaves layers tensors without memory, which nobody may read."""
    inputs = [batch(turn) for turn in range(3)]
    for build in (Attributes, nested):
        plain = built(build)
        learn(plain, inputs)
        for original in (False, True):
            model = FullyShardedDataParallel(built(build), device_id=torch.device("cpu"), use_orig_params=original)
            learn(gdbp.fuse(model), inputs)
            assert_same(model, plain)


def check_tensor_parallel(folder):
    """DTensor weights, by columns and by rows: torch computes, with our layer's activation."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for activation in ("relu", "gelu", "softplus"):
        plain = built(lambda activation=activation: gdbp.nn.MLP([8, 6, 4], activation))
        model = copy.deepcopy(plain)
        # The first layer's outputs stay where they are, the second takes them there.
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})
        assert model[0].weight.placements == (Shard(0),) and model[1].weight.placements == (Shard(1),)
        why = gdbp.explain(model, batch(0)).calls
        assert any("no kernels for a DTensor" in call.why for call in why), why
        inputs = [batch(turn) for turn in range(3)]
        learn(model, inputs)
        learn(plain, inputs)
        assert_same(model, plain)


def check_fused_tensor_parallel(folder):
    """A fused model whose weights become DTensors: outputs are DTensors, as those of torch's layers."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for placement in (Shard(0), Shard(1), Replicate()):

        def spread(name, module, mesh, placement=placement):
            for key, p in list(module.named_parameters(recurse=False)):
                at = placement if p.dim() > 1 else Replicate()
                module.register_parameter(key, nn.Parameter(distribute_tensor(p.detach(), mesh, [at])))

        plain = built(Functional)
        model = distribute_module(gdbp.fuse(copy.deepcopy(plain)), mesh, spread)
        for turn in range(2):
            x = batch(turn)
            mine, other = model(distribute_tensor(x, mesh, [Replicate()])), plain(x)
            torch.testing.assert_close(whole(mine), other.detach(), rtol=1e-9, atol=1e-9)
            mine.sum().backward(), other.sum().backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(whole(p.grad), q.grad, rtol=1e-9, atol=1e-9)


def check_statistics_of_all_ranks(folder):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layer = gdbp.nn.Linear(8, 4, activation="relu").double()
    x = batch(0)
    plain = layer(x).detach()
    with gdbp.nn.utils.collect_activation_stats(layer) as activity:
        parts = {name: distribute_tensor(p.detach(), mesh, [Shard(0)]) for name, p in layer.named_parameters()}
        torch.func.functional_call(layer, parts, (distribute_tensor(x, mesh, [Replicate()]),))
    torch.testing.assert_close(activity.stats()["(itself)"].mean, plain.mean(0))


# Starting two processes takes longer than most checks, so several go together.
def check_shards(folder):
    check_fsdp(folder)
    check_fuse_after_sharding(folder)
    check_fuse_after_wrapping(folder)


def check_split_weights(folder):
    check_tensor_parallel(folder)
    check_fused_tensor_parallel(folder)
    check_statistics_of_all_ranks(folder)


@pytest.mark.parametrize("check", [check_ddp, check_shards, check_split_weights], ids=lambda f: f.__name__[6:])
def test_two_ranks(check, tmp_path):
    spawn(check, tmp_path)
