"""What a user may do between two calls of ``gdbp.TrainStep``."""

import copy
import warnings

import pytest
import torch

import gdbp
from gdbp import nn, optim
from tests.training import CLASSES, FEATURES, Pair, close, data, eager, network, same_state


def freeze(model, optimizer):
    model[0].requires_grad_(False)


def freeze_one(model, optimizer):
    model[1].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)


def thaw(model, optimizer):
    model.requires_grad_(True)


def new_rate(model, optimizer):
    optimizer.param_groups[0].update(lr=0.05, weight_decay=0.1, betas=(0.5, 0.9))


def reload(model, optimizer):
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    model.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])


def new_weights(model, optimizer):
    with torch.no_grad():
        model[0].weight.mul_(0.5)
        model[1].weight.data = torch.ones_like(model[1].weight) * 0.1


def new_layer(model, optimizer):
    torch.manual_seed(3)
    model[1] = nn.Linear(16, 8, activation="tanh")
    optimizer.add_param_group({"params": model[1].parameters(), "lr": 0.1})


def new_activation(model, optimizer):
    model[0].activation = "gelu"


def without_state(model, optimizer):
    optimizer.state.clear()


def rebuilt_groups(model, optimizer):
    params = list(model.parameters())
    optimizer.param_groups[0]["params"] = params[:2]
    optimizer.add_param_group({"params": params[2:], "lr": 0.1, "eps": 1e-6})


CHANGES = [
    freeze,
    freeze_one,
    thaw,
    new_rate,
    reload,
    new_weights,
    new_layer,
    new_activation,
    without_state,
    rebuilt_groups,
]


@pytest.mark.parametrize("change", CHANGES)
def test_changes_between_steps(change):
    pair = Pair()
    pair.train()
    pair.both(change)
    pair.train(3)
    pair.both(thaw)
    pair.train(rows=5)


def test_eager_steps_between():
    for make in (
        lambda m: optim.SGD(m.parameters(), lr=0.1, momentum=0.9, dampening=0.5),
        lambda m: optim.NAdam(m.parameters()),
        lambda m: torch.optim.AdamW(m.parameters(), foreach=True),
    ):
        pair = Pair(make=make)
        for _ in range(2):
            pair.train(1)
            batch = data(7)
            close(eager(pair.model, pair.loss, pair.optimizer, *batch), eager(pair.twin, pair.loss, pair.other, *batch))
            pair.train(2)


@pytest.mark.parametrize("name", ["StepLR", "OneCycleLR", "CosineAnnealingLR"])
def test_schedulers(name):
    options = {
        "StepLR": {"step_size": 2},
        "OneCycleLR": {"max_lr": 0.1, "total_steps": 20},
        "CosineAnnealingLR": {"T_max": 9},
    }
    pair = Pair()
    schedulers = [getattr(torch.optim.lr_scheduler, name)(o, **options[name]) for o in (pair.optimizer, pair.other)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the scheduler's, that no optimizer step came before its own
        for _ in range(6):
            pair.train(1)
            for scheduler in schedulers:
                scheduler.step()


def test_torchs_optimizer_goes_on_alone():
    """The state that TrainStep leaves is one that torch's own step, and its pickles, take."""
    pair = Pair(make=lambda m: torch.optim.Adam(m.parameters()))
    pair.train()
    assert set(pair.optimizer.state[pair.model[0].weight]) == {"step", "exp_avg", "exp_avg_sq"}
    loaded = torch.optim.Adam(pair.twin.parameters())
    loaded.load_state_dict(copy.deepcopy(pair.optimizer).state_dict())
    pair.other = loaded
    pair.train()


def test_states_are_the_optimizers_own():
    pair = Pair()
    params = [p.data_ptr() for p in pair.model.parameters()]
    pair.train()
    kept = [t.data_ptr() for s in pair.optimizer.state.values() for t in s.values()]
    pair.train()
    assert params == [p.data_ptr() for p in pair.model.parameters()]
    assert kept == [t.data_ptr() for s in pair.optimizer.state.values() for t in s.values()]


def test_versions_are_bumped():
    # Without a bias before the norm: its gradient is nothing but rounding, and Adam would make steps of it.
    pair = Pair(torch.nn.Sequential(nn.Linear(FEATURES, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, CLASSES)))
    pair.train(1)
    tensors = [*pair.model.parameters(), *pair.model.buffers()]
    before = [t._version for t in tensors]
    stale = pair.model[2](torch.randn(3, 8, requires_grad=True)).sum()
    pair.train(1)
    assert all(t._version > version for t, version in zip(tensors, before))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


@pytest.mark.parametrize("norm", [None, 0.1])
def test_gradients(norm):
    pair = Pair(keep_grads=True, max_grad_norm=norm)
    batch = data()
    for _ in range(2):
        pair.step(*batch)
        pointers = [p.grad.data_ptr() for p in pair.model.parameters()]
        pair.other.zero_grad()
        pair.loss(pair.twin(batch[0]), batch[1]).backward()
        for p, q in zip(pair.model.parameters(), pair.twin.parameters()):
            close(p.grad, q.grad)
        if norm:
            close(pair.step.grad_norms[0].float(), torch.nn.utils.clip_grad_norm_(pair.twin.parameters(), norm))
        pair.other.step()
        same_state(pair.model, pair.optimizer, pair.twin, pair.other)
    pair.step(*batch)
    assert pointers == [p.grad.data_ptr() for p in pair.model.parameters()]
    pair.step.keep_grads = False
    pair.step(*batch)
    assert all(p.grad is None for p in pair.model.parameters())


def test_skipped_steps():
    pair = Pair(make=lambda m: optim.AdamW(m.parameters(), skip_nonfinite=True))
    before = copy.deepcopy(pair.model.state_dict())
    x, y = data()
    assert torch.isnan(pair.step(x * float("nan"), y))
    assert not pair.optimizer.state and torch.isnan(pair.optimizer.grad_norm)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), pair.model.state_dict().values()))
    pair.train()
    torch.testing.assert_close(pair.optimizer.grad_norm, pair.other.grad_norm, rtol=1e-5, atol=0)


def wide(**options):
    torch.manual_seed(0)
    return nn.MLP([300, 520, 410, 9], "gelu", **options)


@pytest.mark.parametrize("norm", [None, 0.5])
@pytest.mark.parametrize("options", [{}, {"batch_norm": True}, {"dropout": 0.3}])
def test_bits_do_not_depend_on_threads(options, norm):
    """Sizes that are cut into many pieces, one after the other and side by side."""

    def train(threads):
        torch.set_num_threads(threads)
        model = wide(**options)
        optimizer = optim.AdamW(model.parameters(), max_grad_norm=norm)
        step = gdbp.TrainStep(model, nn.CrossEntropyLoss(), optimizer, seed=1)
        losses = [step(*data(190, 300, 9, seed=i)) for i in range(2)]
        return [*losses, *model.state_dict().values(), *(t for s in optimizer.state.values() for t in s.values())]

    try:
        first = train(1)
        for threads in (2, 3, 5):
            assert all(torch.equal(a, b) for a, b in zip(first, train(threads)))
    finally:
        torch.set_num_threads(2)


@pytest.mark.parametrize("norm", [None, 0.5])
def test_large_layers(norm):
    torch.manual_seed(0)
    model = nn.MLP([200, 1100, 900, 4])
    pair = Pair(model, make=lambda m: optim.AdamW(m.parameters(), max_grad_norm=norm))
    batches = [data(150, 200, 4, seed=i) for i in range(2)]
    for batch in batches:
        close(pair.step(*batch), eager(pair.twin, pair.loss, pair.other, *batch))
    same_state(pair.model, pair.optimizer, pair.twin, pair.other, 5)
    memory = pair.step.memory()
    weights = sum(p.numel() for p in model.parameters()) * 4
    assert memory["rows"] == 150 and memory["bytes"] < memory["unshared_bytes"]
    # Without a norm no place is as large as all gradients.
    assert (memory["bytes"] < weights) == (norm is None)


def test_without_the_blas_of_torchs_library():
    """As on builds of torch that export none: products by ``at::mm``, in pieces and whole."""
    gdbp._C.allow_blas(False)
    try:
        for model, batch in ((wide(), data(190, 300, 9)), (network(8), data(3))):
            pair = Pair(model)
            assert "at::mm" in pair.step.explain()
            for _ in range(2):
                close(pair.step(*batch), eager(pair.twin, pair.loss, pair.other, *batch))
            same_state(pair.model, pair.optimizer, pair.twin, pair.other, 5)
    finally:
        gdbp._C.allow_blas(True)


def test_dropout():
    """Kept elements are scaled, as many are dropped as should be, the gradient sees the same mask, and a run can be
    continued."""
    model = torch.nn.Sequential(torch.nn.Dropout(0.3), nn.Linear(400, 1, bias=False))
    with torch.no_grad():
        model[1].weight.fill_(1.0)
    optimizer = optim.SGD(model.parameters(), lr=1.0)
    step = gdbp.TrainStep(model, nn.MSELoss(reduction="sum"), optimizer, keep_grads=True, seed=5)
    x = torch.ones(1, 400)
    value = step(x, torch.zeros(1, 1))
    kept = (model[1].weight.grad != 0).sum().item()
    assert 230 < kept < 330
    close(value, torch.tensor((kept / 0.7) ** 2))
    masks = [model[1].weight.grad != 0]
    for _ in range(3):
        step(x, torch.zeros(1, 1))
        masks.append(model[1].weight.grad != 0)
    assert all(not torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])
    again = gdbp.TrainStep(model, step.loss, optimizer, keep_grads=True, seed=5)
    again.steps = 2
    again(x, torch.zeros(1, 1))
    assert torch.equal(masks[2], model[1].weight.grad != 0)
    model.eval()
    again(x, torch.zeros(1, 1))
    assert (model[1].weight.grad != 0).all()


def test_a_refused_step_makes_no_gradients():
    x, y = data()
    for batch in ((x, y + CLASSES), (x[:, 1:], y)):
        pair = Pair(keep_grads=True)
        with pytest.raises((IndexError, ValueError)):
            pair.step(*batch)
        assert all(p.grad is None for p in pair.model.parameters()) and not pair.optimizer.state
        with pytest.raises((IndexError, ValueError)):
            pair.step.many(batch, 8)
        assert all(p.grad is None for p in pair.model.parameters())
        pair.train()
        kept = [p.grad.clone() for p in pair.model.parameters()]
        with pytest.raises((IndexError, ValueError)):
            pair.step(*batch)
        assert all(torch.equal(p.grad, g) for p, g in zip(pair.model.parameters(), kept, strict=True))


def test_inputs_that_are_yet_to_be_negated():
    pair = Pair(loss=nn.MSELoss())
    x, y = data(target="values")
    close(pair.step(torch._neg_view(-x), torch._neg_view(-y)), eager(pair.twin, pair.loss, pair.other, x, y))
    same_state(pair.model, pair.optimizer, pair.twin, pair.other)


@pytest.mark.parametrize("batch_size, steps", [(None, 3), (1, 40), (7, None), (7, 10), (20, 2)])
def test_many(batch_size, steps):
    x, y = data(20)
    pair = Pair(make=lambda m: optim.AdamW(m.parameters(), max_grad_norm=1.0))
    losses = pair.step.many((x, y), batch_size, steps, generator=torch.Generator().manual_seed(4))
    generator = torch.Generator().manual_seed(4)
    expected = []
    while len(expected) < len(losses):
        order = [torch.arange(20)]
        if batch_size not in (None, 20):
            order = torch.randperm(20, generator=generator).split(batch_size)
        for index in order[: len(losses) - len(expected)]:
            expected.append(eager(pair.twin, pair.loss, pair.other, x[index], y[index]))
    assert len(losses) == (steps or 3) and pair.step.steps == len(losses) == len(pair.step.grad_norms)
    close(losses, torch.stack(expected), 5)
    same_state(pair.model, pair.optimizer, pair.twin, pair.other, 5)


def test_many_under_another_default_device():
    pair = Pair()
    x, y = data()
    with torch.device("meta"):
        pair.step.many((x, y), 4)
    assert pair.step.steps == 4


def test_many_without_shuffling():
    x, y = data(20, target="values")
    pair = Pair(loss=nn.MSELoss(), make=lambda m: optim.SGD(m.parameters(), lr=0.1, momentum=0.5, dampening=0.1))
    losses = pair.step.many((x, y), 8, 7, shuffle=False)
    slices = [slice(0, 8), slice(8, 16), slice(16, 20)] * 3
    close(losses, torch.stack([eager(pair.twin, pair.loss, pair.other, x[i], y[i]) for i in slices[:7]]))
    same_state(pair.model, pair.optimizer, pair.twin, pair.other)
    x2 = x[:, None, :].expand(20, 3, FEATURES)[:, 1]  # not contiguous
    close(pair.step.many((x2, y), 8, 2, shuffle=False), pair.step.many((x, y), 8, 2, shuffle=False), 1e5)


def test_inputs_of_any_layout():
    pair = Pair()
    x, y = data(30)
    x, y = torch.stack([x, x], 2)[..., 1], torch.stack([y, y], 1)[:, 0]
    assert not x.is_contiguous() and not y.is_contiguous()
    close(pair.step(x, y), eager(pair.twin, pair.loss, pair.other, x, y))
    same_state(pair.model, pair.optimizer, pair.twin, pair.other)
    assert x._version == 0


def test_an_attribute_of_torchs_layer_is_no_activation():
    model = network(8)
    model[1] = torch.nn.Linear(8, CLASSES)
    model[1].activation = "tanh"
    Pair(model).train()


def test_fused_models():
    """What gdbp.fuse changes is how layers are called; a fused step calls none."""
    layers = (torch.nn.Linear(FEATURES, 16), torch.nn.ReLU(), torch.nn.Linear(16, CLASSES))
    pair = Pair(gdbp.fuse(torch.nn.Sequential(*layers)))
    assert type(pair.model).__name__ == "FusedSequential"
    pair.train()
    assert "Linear '0': linear + relu" in pair.step.explain()
    for change in (gdbp.unfuse, gdbp.fuse):
        change(pair.model)
        pair.train()


def test_no_rows():
    pair = Pair(network(4), nn.CrossEntropyLoss(reduction="sum"))
    pair.train(2)
    pair.train(1, rows=0)
    pair.train(1)
