"""``gdbp.TrainStep`` and ``gdbp.nn.MLP`` on CUDA: whole networks of narrow layers in one kernel, others as a graph.

The oracle is the eager loop in float64; ours may err no more than some times as much as torch's eager loop in the same
dtype, for both round activations and gradients at about the same places."""

import copy

import pytest
import torch

import gdbp
from gdbp import nn, optim
from gdbp.ops.linear import ACTIVATIONS as NAMES
from tests.training import data, eager, network

pytestmark = pytest.mark.cuda
BF16, FP16 = torch.bfloat16, torch.float16
ACTIVATIONS = [name for name in NAMES if name != "none"]


def autocast(dtype):
    return torch.autocast("cuda", dtype, enabled=dtype is not torch.float32)


def on_cuda(x, y):
    return x.cuda(), y.cuda()


def distance(model, exact):
    """The largest error of a parameter, over all of them."""
    pairs = zip(model.parameters(), exact.parameters(), strict=True)
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)


def trained(model, make, loss, batches, half=BF16, **options):
    """The model trained in three ways: ours, torch's eager loop in the same dtype, and that in float64. The losses of
    ours and of the last."""
    model = model.cuda()
    rounded, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    step = gdbp.TrainStep(model, loss, make(model), **options)
    other, oracle = make(rounded), make(exact)
    losses = []
    for x, y in batches:
        wide = y.double() if y.is_floating_point() else y
        with autocast(half):
            value = step(x, y)
            assert step.explain().startswith("fused"), step.explain()
            eager(rounded, loss, other, x, y)
        losses.append((value.double().item(), eager(exact, loss, oracle, x.double(), wide).item()))
    return model, rounded, exact, losses, step


def check(model, make, loss, batches, half=BF16, slack=2e-4, **options):
    start = copy.deepcopy(model).cuda().double()
    ours, rounded, exact, losses, step = trained(model, make, loss, batches, half, **options)
    assert distance(ours, exact) <= 3 * distance(rounded, exact) + slack
    # It went where the oracle went, and not a step aside.
    assert distance(ours, exact) < 0.2 * distance(start, exact)
    for value, wanted in losses:
        assert value == pytest.approx(wanted, rel=0.03, abs=0.01)
    return step


def sgd(model):
    return optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def batches(rows=200, count=5, **options):
    return [on_cuda(*data(rows, seed=i, **options)) for i in range(count)]


OPTIMIZERS = {
    "sgd": sgd,
    "weight_decay": lambda model: optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1, l1=1e-3),
    "torch sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    "ema": lambda model: optim.SGD(model.parameters(), lr=0.1, ema_decay=0.9),
    "max_grad_norm": lambda model: optim.SGD(model.parameters(), lr=0.1, max_grad_norm=0.05),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name):
    check(network(16, 7), OPTIMIZERS[name], nn.CrossEntropyLoss(), batches())


@pytest.mark.parametrize("make", [optim.Adam, optim.AdamW, optim.RMSprop, torch.optim.Adam])
def test_normalised_updates(make):
    """These make a step of the same size of any gradient, so rounded ones are compared by what they reach."""
    x, y = on_cuda(*data(512, inputs=64, outputs=10))
    finals = []
    for way in ("fused", "eager"):
        torch.manual_seed(1)
        model = network(64, 64, inputs=64, outputs=10).cuda()
        optimizer = make(model.parameters(), lr=3e-3)
        step = gdbp.TrainStep(model, nn.CrossEntropyLoss(), optimizer)
        for _ in range(100):
            with autocast(BF16):
                value = step(x, y) if way == "fused" else eager(model, nn.CrossEntropyLoss(), optimizer, x, y)
        finals.append(value.item())
    assert finals[0] < 1.0 and finals[0] == pytest.approx(finals[1], rel=0.2, abs=0.03)


@pytest.mark.parametrize("half", [BF16, FP16])
@pytest.mark.parametrize("activation", [*ACTIVATIONS, None])
def test_activations(activation, half):
    check(network(24, 17, activation=activation), sgd, nn.CrossEntropyLoss(), batches(), half)


@pytest.mark.parametrize("rows", [1, 15, 128, 129, 20000])
def test_rows(rows):
    check(network(33), sgd, nn.CrossEntropyLoss(), batches(rows, 3), slack=2e-3)


@pytest.mark.parametrize("widths", [(64,) * 4, (128,) * 2, (128,) * 4, (1,), (100, 3, 128)])
def test_widths(widths):
    sizes = {"inputs": 64, "outputs": 10}
    check(network(*widths, **sizes), sgd, nn.CrossEntropyLoss(), batches(1000, 3, **sizes), slack=2e-3)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("outputs", [1, 5])
def test_mean_square(reduction, outputs):
    rate = 0.1 if reduction == "mean" else 1e-4
    inputs = [on_cuda(*data(100, outputs=outputs, target="values", seed=i)) for i in range(3)]
    inputs = [(x, y - x[:, :1]) for x, y in inputs]
    loss = nn.MSELoss(reduction=reduction)
    check(network(20, outputs=outputs), lambda model: optim.SGD(model.parameters(), lr=rate), loss, inputs)


@pytest.mark.parametrize("half", [BF16, FP16])
def test_parameters_of_half_types(half):
    model = network(32, 32).cuda().to(half)
    start, optimizer = copy.deepcopy(model), optim.SGD(model.parameters(), lr=0.5)
    step, (x, y) = gdbp.TrainStep(model, nn.CrossEntropyLoss(), optimizer), on_cuda(*data(256))
    first, *_, last = (step(x, y) for _ in range(100))
    assert step.explain().startswith("fused") and last < 0.8 * first
    assert all(p.dtype is half and p.isfinite().all() for p in model.parameters())
    twin = copy.deepcopy(start).double()
    eager(twin, nn.CrossEntropyLoss(), optim.SGD(twin.parameters(), lr=0.5), x.double(), y)
    gdbp.TrainStep(start, nn.CrossEntropyLoss(), optim.SGD(start.parameters(), lr=0.5))(x, y)
    assert distance(start, twin) < 4 * torch.finfo(half).eps


def test_ignored_labels():
    x, y = on_cuda(*data(100))
    y[::3] = -100
    check(network(9), sgd, nn.CrossEntropyLoss(), [(x, y)] * 2)


@pytest.mark.parametrize("width", [16, 200])
def test_gradient_of_no_label_is_zero(width):
    """In one kernel and in a graph."""
    model, (x, y) = network(width).cuda(), on_cuda(*data(64))
    before = [p.detach().clone() for p in model.parameters()]
    step = gdbp.TrainStep(model, nn.CrossEntropyLoss(), sgd(model))
    with autocast(BF16):
        assert all(step(x, torch.full_like(y, -100)).isnan() for _ in range(3))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_gradients_are_kept_where_asked_for():
    model, (x, y) = network(16).cuda(), on_cuda(*data(64))
    twin = copy.deepcopy(model).double()
    step = gdbp.TrainStep(model, nn.CrossEntropyLoss(), sgd(model), keep_grads=True)
    with autocast(BF16):
        step(x, y)
    eager(twin, nn.CrossEntropyLoss(), sgd(twin), x.double(), y)
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=0.05, atol=2e-3)
    step.keep_grads = False
    with autocast(BF16):
        step(x, y)
    assert all(p.grad is None for p in model.parameters())


def test_norm():
    model, (x, y) = network(16).cuda(), on_cuda(*data(64))
    twin = copy.deepcopy(model).double()
    step = gdbp.TrainStep(model, nn.CrossEntropyLoss(), sgd(model), max_grad_norm=float("inf"))
    with autocast(BF16):
        step(x, y)
    eager(twin, nn.CrossEntropyLoss(), sgd(twin), x.double(), y)
    wanted = torch.nn.utils.get_total_norm([p.grad for p in twin.parameters()])
    assert step.grad_norms.item() == pytest.approx(wanted.item(), rel=0.02)


def test_runs_are_equal_bit_by_bit():
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        model = network(64, 64, inputs=64, outputs=10).cuda()
        step = gdbp.TrainStep(model, nn.CrossEntropyLoss(), optim.AdamW(model.parameters()))
        with autocast(BF16):
            losses = step.many(on_cuda(*data(5000, inputs=64, outputs=10)), 700, 20, shuffle=False)
        runs.append([losses, *model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_frozen_layer_and_eager_steps_between():
    model, (x, y) = network(16, 16).cuda(), on_cuda(*data(64))
    optimizer = sgd(model)
    step = gdbp.TrainStep(model, nn.CrossEntropyLoss(), optimizer)
    model[1].requires_grad_(False)
    before = [p.detach().clone() for p in model.parameters()]
    with autocast(BF16):
        step(x, y)
        assert [torch.equal(a, b) for a, b in zip(before, model.parameters())] == [False] * 2 + [True] * 2 + [False] * 2
        model[1].requires_grad_(True)
        eager(model, nn.CrossEntropyLoss(), optimizer, x, y)
        step(x, y)
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_versions_are_bumped():
    model, (x, y) = network(16).cuda(), on_cuda(*data(64))
    step = gdbp.TrainStep(model, nn.CrossEntropyLoss(), sgd(model))
    value = torch.nn.functional.cross_entropy(model(x), y)
    with autocast(BF16):
        step(x, y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("width", [16, 200])
def test_label_out_of_range_changes_nothing_and_is_told_later(width):
    """In one kernel and in a graph."""
    model, (x, y) = network(width).cuda(), on_cuda(*data(64))
    step = gdbp.TrainStep(model, nn.CrossEntropyLoss(), sgd(model))
    wrong = y.clone()
    wrong[17] = 5
    with autocast(BF16):
        for _ in range(3):
            step(x, y)
        before = [p.detach().clone() for p in model.parameters()]
        assert step(x, wrong).isnan()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
        with pytest.raises(IndexError, match=r"Target 5 is out of bounds.*row 17"):
            step(x, y)
        assert step(x, y).isfinite()


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("activation", [*ACTIVATIONS, None])
def test_float32(activation, precision, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", precision)
    # torch's float32 errs by some 2^-24 of the sums, three products of tf32 by some 2^-21.
    slack = 2e-4 if precision == "tf32" else 2e-5
    model = network(24, 17, activation=activation)
    step = check(model, sgd, nn.CrossEntropyLoss(), batches(), torch.float32, slack=slack)
    assert ("tf32" if precision == "tf32" else "float32") in step.explain()


# ---- one graph ----

GRAPHS = {
    "wide": (lambda: network(200, 300), nn.CrossEntropyLoss(), "labels", "weight of [200, 12]"),
    "deep": (lambda: network(*[8] * 17), nn.CrossEntropyLoss(), "labels", "at most 16"),
    "big": (lambda: network(*[128] * 12), nn.CrossEntropyLoss(), "labels", "bytes of shared memory"),
    "batch_norm": (lambda: nn.MLP([12, 40, 30, 5], batch_norm=True), nn.CrossEntropyLoss(), "labels", "BatchNorm1d"),
    "cumulative": (
        lambda: torch.nn.Sequential(nn.BatchNorm1d(12, momentum=None), nn.Linear(12, 5)),
        nn.CrossEntropyLoss(), "labels", "BatchNorm1d",
    ),
    "head": (lambda: torch.nn.Sequential(nn.Linear(12, 5, activation="tanh")), nn.MSELoss(), "values", "ends with an"),
    "smoothing": (lambda: network(16), nn.CrossEntropyLoss(label_smoothing=0.1), "labels", "is neither mse_loss"),
    "huber": (lambda: network(16), nn.HuberLoss(), "values", "huber"),
    "bce": (lambda: network(16), nn.BCEWithLogitsLoss(), "values", "bce"),
}  # fmt: skip


@pytest.mark.parametrize("half", [torch.float32, BF16])
@pytest.mark.parametrize("name", GRAPHS)
def test_graphs(name, half):
    make, loss, target, why = GRAPHS[name]
    torch.manual_seed(0)
    model = make()
    step = check(model, sgd, loss, batches(target=target), half, slack=2e-3)
    assert "as a CUDA graph" in step.explain() and why in step.explain()
    assert step.memory()["bytes"] > 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_of_graphs(name):
    check(network(200), OPTIMIZERS[name], nn.CrossEntropyLoss(), batches(), slack=2e-3)


def test_probabilities():
    """The kernel takes labels, and the same step takes these, too."""
    model = network(16)
    inputs = batches(target="probabilities") + batches()
    step = check(model, sgd, nn.CrossEntropyLoss(), inputs, torch.float32, slack=2e-3)
    assert len(step._plan._graphs._kinds) == 1


def test_float64_is_exact():
    model = network(16, dtype=torch.float64).cuda()
    twin = copy.deepcopy(model)
    optimizer, other = sgd(model), sgd(twin)
    step = gdbp.TrainStep(model, nn.CrossEntropyLoss(), optimizer)
    for x, y in batches(dtype=torch.float64):
        torch.testing.assert_close(step(x, y), eager(twin, nn.CrossEntropyLoss(), other, x, y))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_dropout_of_graphs():
    """A replay draws anew, and what the CPU draws."""
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), nn.Linear(1000, 1))
    with torch.no_grad():
        model[1].weight.fill_(1)
        model[1].bias.fill_(0)
    x, y = torch.ones(1, 1000), torch.zeros(1, 1)
    runs = []
    for device in ("cpu", "cuda"):
        model.to(device)
        step = gdbp.TrainStep(model, nn.MSELoss(), optim.SGD(model.parameters(), lr=0.0), seed=7)
        runs.append([step(x.to(device), y.to(device)).item() for _ in range(6)])
    assert "as a CUDA graph" in step.explain()
    assert runs[0] == runs[1] and len(set(runs[0])) > 1


def test_schedules_and_sizes_of_graphs():
    """The rate may change at every step, and the last batch of an epoch is smaller, without a new graph."""
    model = network(200).cuda()
    twin = copy.deepcopy(model).double()
    optimizer, other = sgd(model), sgd(twin)
    step = gdbp.TrainStep(model, nn.CrossEntropyLoss(), optimizer)
    for i in range(12):
        for o in (optimizer, other):
            o.param_groups[0]["lr"] = 0.1 / (i + 1)
        x, y = on_cuda(*data(60 if i % 3 else 17, seed=i))
        value = step(x, y)
        wanted = eager(twin, nn.CrossEntropyLoss(), other, x.double(), y)
        assert value.item() == pytest.approx(wanted.item(), rel=1e-4)
    assert len(step._plan._graphs._kinds) == 2
    assert distance(model, twin) < 1e-4


@pytest.mark.parametrize("width", [16, 200])
def test_every_device(width):
    """Whichever is the current one; in one kernel and in a graph."""
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        model = network(width).to(device)
        twin = copy.deepcopy(model).double()
        optimizer, other = sgd(model), sgd(twin)
        step = gdbp.TrainStep(model, nn.CrossEntropyLoss(), optimizer)
        for i in range(5):
            x, y = (t.to(device) for t in data(60, seed=i))
            value = step(x, y)
            wanted = eager(twin, nn.CrossEntropyLoss(), other, x.double(), y)
            assert value.item() == pytest.approx(wanted.item(), rel=1e-4)
        assert distance(model, twin) < 1e-4


def test_refused_at_the_step():
    model, (x, y) = network(16).cuda(), on_cuda(*data(8))
    step = gdbp.TrainStep(model, nn.CrossEntropyLoss(), sgd(model))
    before = [p.detach().clone() for p in model.parameters()]
    with autocast(BF16):
        for inputs, sentence in (
            ((x.cpu(), y), "input is on cpu"),
            ((x[:, :5], y), "expected \\(rows, 12\\)"),
            ((x[:0], y[:0]), "at least one row"),
            ((x, y.int()), "int64 labels"),
            ((x.double(), y), "input has dtype Double"),
        ):
            with pytest.raises(ValueError, match=sentence):
                step(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


# ---- inference ----


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh", None])
@pytest.mark.parametrize("sizes", [(3, 2), (64, 64, 64, 10), (128, 128, 128, 128), (5, 100, 1)])
@pytest.mark.parametrize("half", [BF16, FP16, torch.float32])
def test_inference(sizes, activation, half):
    model = nn.MLP(sizes, activation).cuda()
    exact = copy.deepcopy(model).double()
    for rows in ((), (1,), (3, 50), (40000,), (0,)):
        x = torch.randn(*rows, sizes[0], device="cuda")
        with torch.no_grad(), autocast(half):
            assert nn.mlp._is_plain(list(model))
            ours, layers = model(x), torch.nn.Sequential.forward(model, x)
        wanted = exact(x.double())
        assert ours.dtype is layers.dtype and ours.shape == layers.shape
        if x.numel():
            errors = [(got.double() - wanted).abs().max() for got in (ours, layers)]
            rounding, scale = 2 * torch.finfo(half).eps, wanted.abs().max()
            if half is torch.float32:
                # Of the terms of a sum: where these cancel, as in a single output, little of it is left.
                last = exact[-1]
                terms = torch.nn.functional.linear(exact[:-1](x.double()).abs(), last.weight.abs(), last.bias.abs())
                rounding, scale = 2**-19, terms.max()
            assert errors[0] <= 2 * errors[1] + rounding * scale


@pytest.mark.parametrize("half", [BF16, FP16, torch.float32])
@pytest.mark.parametrize("activation", ["relu", "gelu", None])
@pytest.mark.parametrize("rows", [(), (1,), (3, 50), (3000,), (0,)])
def test_gradients_of_an_mlp(rows, activation, half):
    torch.manual_seed(0)
    model = nn.MLP((33, 64, 40, 5), activation).cuda()
    exact = copy.deepcopy(model).double()
    x = torch.randn(*rows, 33, device="cuda", requires_grad=True)
    wide = x.detach().double().requires_grad_()
    with autocast(half):
        y, layers = model(x), torch.nn.Sequential.forward(model, x)
        assert "MLP" in type(y.grad_fn).__name__
    weights = torch.randn_like(y)
    tensors, wanted = [x, *model.parameters()], [wide, *exact.parameters()]
    ours = torch.autograd.grad(y, tensors, weights)
    others = torch.autograd.grad(layers, tensors, weights)
    true = torch.autograd.grad(exact(wide), wanted, weights.double())
    for mine, other, right in zip(ours, others, true, strict=True):
        assert mine.dtype is other.dtype and mine.shape == other.shape
        if right.numel():
            errors = [(got.double() - right).abs().max() for got in (mine, other)]
            rounding = 2**-18 if half is torch.float32 else 8 * torch.finfo(half).eps
            assert errors[0] <= 3 * errors[1] + rounding * right.abs().max()
