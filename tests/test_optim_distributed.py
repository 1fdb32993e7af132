"""Optimizers of sharded and replicated models: two processes, and the bits of one."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import gdbp
from tests.processes import spawn

CONFIGS = [
    ("SGD", dict(lr=0.1)),
    ("SGD", dict(lr=0.1, momentum=0.9, dampening=0.3)),
    ("RMSprop", dict(lr=0.01, momentum=0.9, centered=True)),
    ("AdamW", dict(lr=0.01, l1=0.01)),
    ("NAdam", dict(lr=0.01)),
    ("Lion", dict(lr=0.01, weight_decay=0.1)),
]


def network():
    """Linear(5, 1) over two ranks leaves the second with no element of weight and bias."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))


def sharded(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model, mesh=mesh)
    return model


def mixed(model):
    """The first layer in shards, the last plain."""
    sharded(model[0])
    return model


def learn(model, optimizer, turns):
    """The same batch on every rank, so that the mean of the gradients is each of them, bit by bit."""
    for turn in turns:
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(turn))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def whole(tensor):
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_equal(model, optimizer, plain, plain_optimizer, **tolerance):
    tolerance = tolerance or dict(rtol=0, atol=0)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(whole(p), q.detach(), **tolerance)
        ours, theirs = optimizer.state[p], plain_optimizer.state[q]
        assert list(ours) == list(theirs)
        for key, state in ours.items():
            assert isinstance(state, DTensor) == (isinstance(p, DTensor) and state.dim() > 0)
            torch.testing.assert_close(whole(state), whole(theirs[key]), **tolerance)


def check_fsdp(folder):
    for name, options in CONFIGS:
        for prepare in (sharded, mixed):
            model, plain = prepare(network()), network()
            optimizers = [getattr(gdbp.optim, name)(m.parameters(), **options) for m in (model, plain)]
            learn(model, optimizers[0], range(3))
            learn(plain, optimizers[1], range(3))
            assert_equal(model, optimizers[0], plain, optimizers[1])
    assert model[2].weight.numel() == 5


def check_norm(folder):
    for prepare in (sharded, mixed):
        for max_norm in (0.1, 1e9):
            model, plain = prepare(network()), network()
            optimizers = [gdbp.optim.AdamW(m.parameters(), lr=0.1, max_grad_norm=max_norm) for m in (model, plain)]
            learn(model, optimizers[0], range(3))
            learn(plain, optimizers[1], range(3))
            torch.testing.assert_close(optimizers[0].grad_norm, optimizers[1].grad_norm, rtol=1e-12, atol=0)
            assert_equal(model, optimizers[0], plain, optimizers[1], rtol=1e-6, atol=1e-7)


def check_skip(folder):
    """One rank alone holds the element that is not finite."""
    model = sharded(network())
    optimizer = gdbp.optim.AdamW(model.parameters(), lr=0.1, skip_nonfinite=True)
    learn(model, optimizer, range(2))
    before = [whole(p).clone() for p in model.parameters()]
    if dist.get_rank() == 1:
        model[0].weight.grad.to_local()[-1, -1] = float("nan")
    optimizer.step()
    assert all(map(torch.equal, before, map(whole, model.parameters())))
    assert all(optimizer.state[p]["step"] == 2 for p in model.parameters())
    learn(model, optimizer, range(2, 3))
    assert all(optimizer.state[p]["step"] == 3 for p in model.parameters())


def check_placements(folder):
    """Rows, columns, copies, both at once over two dimensions of ranks; and gradients spread otherwise."""
    mesh = init_device_mesh("cpu", (2,))
    square = init_device_mesh("cpu", (1, 2))
    spreads = [(mesh, [Shard(0)]), (mesh, [Shard(1)]), (mesh, [Replicate()]), (square, [Shard(0), Shard(1)])]
    values = torch.randn(5, 3)
    grads = [torch.randn(5, 3) for _ in range(3)]
    params = [torch.nn.Parameter(distribute_tensor(values, *spread)) for spread in spreads]
    plain = [torch.nn.Parameter(values.clone()) for _ in spreads]
    optimizers = [gdbp.optim.NAdam(tensors, lr=0.1, max_grad_norm=1.0) for tensors in (params, plain)]
    for turn, grad in enumerate(grads):
        for p, q, (at, placements) in zip(params, plain, spreads):
            others = [Replicate()] * at.ndim
            p.grad = distribute_tensor(grad, at, others if turn == 1 else placements)
            q.grad = grad.clone()
        versions = [p._version for p in params]
        for optimizer in optimizers:
            optimizer.step()
        assert all(p._version > version for p, version in zip(params, versions))
    torch.testing.assert_close([whole(p) for p in params], [q.detach() for q in plain])
    torch.testing.assert_close(optimizers[0].grad_norm, optimizers[1].grad_norm, rtol=1e-12, atol=0)


def check_ddp(folder):
    model = DistributedDataParallel(network(), gradient_as_bucket_view=True)
    plain = network()
    optimizers = [gdbp.optim.AdamW(m.parameters(), lr=0.1, max_grad_norm=1.0) for m in (model, plain)]
    for turn in range(3):
        x = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(turn))
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(x[dist.get_rank()]).square().sum().backward()
        (plain(x).square().sum() / 2).backward()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
        first = p.detach().clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, p)


def check_zero(folder):
    for bucket_view in (False, True):
        model, plain = network(), network()
        optimizer = ZeroRedundancyOptimizer(
            model.parameters(), gdbp.optim.AdamW, lr=0.1, parameters_as_bucket_view=bucket_view, weight_decay=0.1
        )
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        twin = gdbp.optim.AdamW(plain.parameters(), lr=0.1, weight_decay=0.1)
        twin_scheduler = torch.optim.lr_scheduler.StepLR(twin, 2)
        for turn in range(4):
            learn(model, optimizer, [turn])
            learn(plain, twin, [turn])
            scheduler.step()
            twin_scheduler.step()
        assert all(map(torch.equal, model.parameters(), plain.parameters()))
        optimizer.consolidate_state_dict(to=0)
        if dist.get_rank() == 0:
            torch.testing.assert_close(optimizer.state_dict()["state"], twin.state_dict()["state"], rtol=0, atol=0)


def check_trial_step(folder):
    """Asking for the state before the training changes no bit of it, on any rank."""
    for name, options in CONFIGS:
        asked, plain = sharded(network()), sharded(network())
        optimizers = [getattr(gdbp.optim, name)(m.parameters(), **options) for m in (asked, plain)]
        for flat in (False, True):
            get_optimizer_state_dict(asked, optimizers[0], options=StateDictOptions(flatten_optimizer_state_dict=flat))
        assert all(state.get("step", torch.tensor(0.0)) == 0 for state in optimizers[0].state.values())
        learn(asked, optimizers[0], range(3))
        learn(plain, optimizers[1], range(3))
        for p, q in zip(asked.parameters(), plain.parameters(), strict=True):
            assert torch.equal(whole(p), whole(q))
    # A warm-up from lr = 0, which the rank without elements has to take for one, too.
    model = sharded(torch.nn.Linear(3, 1))
    optimizer = gdbp.optim.AdamW(model.parameters(), lr=0.0)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert all(state["step"] == 1 for state in optimizer.state.values())


def check_round_trips(folder):
    """Through torch.distributed.checkpoint's state dicts, and on as if nothing had been."""
    variants = [
        StateDictOptions(),
        StateDictOptions(flatten_optimizer_state_dict=True),
        StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
    ]
    for name, options in CONFIGS[1:]:
        for variant in variants:
            model, other = sharded(network()), sharded(network())
            optimizers = [getattr(gdbp.optim, name)(m.parameters(), **options) for m in (model, other)]
            learn(model, optimizers[0], range(2))
            weights = get_model_state_dict(model, options=variant)
            state = get_optimizer_state_dict(model, optimizers[0], options=variant)
            if variant.broadcast_from_rank0 and dist.get_rank():
                weights, state = {}, {}
            set_model_state_dict(other, copy.deepcopy(weights), options=variant)
            set_optimizer_state_dict(other, optimizers[1], copy.deepcopy(state), options=variant)
            learn(model, optimizers[0], range(2, 4))
            learn(other, optimizers[1], range(2, 4))
            for p, q in zip(model.parameters(), other.parameters(), strict=True):
                assert torch.equal(whole(p), whole(q)), (name, variant)
                for key, value in optimizers[0].state[p].items():
                    assert torch.equal(whole(value), whole(optimizers[1].state[q][key]))


def check_whole_state_into_shards(folder):
    """A checkpoint of an unsharded run, loaded by every rank without further ado."""
    plain, model = network(), sharded(network())
    optimizers = [gdbp.optim.NAdam(m.parameters(), lr=0.1) for m in (plain, model)]
    learn(plain, optimizers[0], range(2))
    learn(model, optimizers[1], range(2))
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    learn(plain, optimizers[0], range(2, 4))
    learn(model, optimizers[1], range(2, 4))
    assert_equal(model, optimizers[1], plain, optimizers[0])


def _trained(prepare):
    model = prepare(network())
    return model, gdbp.optim.AdamW(model.parameters(), lr=0.1)


def _state(model, optimizer):
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}


def _save(prepare, folder):
    model, optimizer = _trained(prepare)
    learn(model, optimizer, range(2))
    dcp.save(_state(model, optimizer), checkpoint_id=folder / "saved")


def check_save_on_two(folder):
    _save(sharded, folder)


def check_save_on_one(folder):
    _save(lambda model: model, folder)


def check_go_on(folder):
    model, optimizer = _trained(sharded if dist.get_world_size() > 1 else lambda model: model)
    state = _state(model, optimizer)
    dcp.load(state, checkpoint_id=folder / "saved")
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    learn(model, optimizer, range(2, 4))
    plain, plain_optimizer = _trained(lambda model: model)
    learn(plain, plain_optimizer, range(4))
    assert_equal(model, optimizer, plain, plain_optimizer)


CHECKS = [
    check_fsdp,
    check_norm,
    check_skip,
    check_placements,
    check_ddp,
    check_zero,
    check_trial_step,
    check_round_trips,
    check_whole_state_into_shards,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_two_ranks(check, tmp_path):
    spawn(check, tmp_path)


@pytest.mark.parametrize("first", [check_save_on_two, check_save_on_one], ids=["two to one", "one to two"])
def test_files_for_another_number_of_ranks(first, tmp_path):
    worlds = (2, 1) if first is check_save_on_two else (1, 2)
    for check, world in zip((first, check_go_on), worlds):
        spawn(check, tmp_path, world)
