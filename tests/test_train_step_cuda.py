"""``gdbp.TrainStep`` and ``gdbp.nn.MLP`` on CUDA: whole networks of narrow layers in one kernel.

The oracle is the eager loop in float64; ours may err no more than some times as much as torch's eager loop in the same
16-bit dtype, for both round activations and gradients at about the same places."""

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
    return torch.autocast("cuda", dtype)


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


def test_label_out_of_range_changes_nothing_and_is_told_later():
    model, (x, y) = network(16).cuda(), on_cuda(*data(64))
    step = gdbp.TrainStep(model, nn.CrossEntropyLoss(), sgd(model))
    before = [p.detach().clone() for p in model.parameters()]
    wrong = y.clone()
    wrong[17] = 5
    with autocast(BF16):
        assert step(x, wrong).isnan()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
        with pytest.raises(IndexError, match=r"Target 5 is out of bounds.*row 17"):
            step(x, y)
        assert step(x, y).isfinite()


REFUSED = {
    "wide": (lambda: network(200), "expected 1 to 128 features"),
    "deep": (lambda: network(*[8] * 17), "expected at most 16"),
    "big": (lambda: network(*[128] * 12), "bytes of shared memory"),
    "batch_norm": (lambda: torch.nn.Sequential(nn.BatchNorm1d(12), nn.Linear(12, 5)), "no fused form on CUDA"),
    "head": (lambda: torch.nn.Sequential(nn.Linear(12, 5, activation="relu")), "ends with an activation"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    make, sentence = REFUSED[name]
    model = make().cuda()
    with pytest.raises(ValueError, match=sentence):
        gdbp.TrainStep(model, nn.CrossEntropyLoss(), sgd(model))
    step = gdbp.TrainStep(model, nn.CrossEntropyLoss(), sgd(model), strict=False)
    assert step(*on_cuda(*data(8))).isfinite() and step.explain().startswith("eager")


def test_refused_at_the_step():
    model, (x, y) = network(16).cuda(), on_cuda(*data(8))
    step = gdbp.TrainStep(model, nn.CrossEntropyLoss(), sgd(model))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"under torch\.autocast"):
        step(x, y)
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
@pytest.mark.parametrize("half", [BF16, FP16])
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
            assert errors[0] <= 2 * errors[1] + 2 * torch.finfo(half).eps * wanted.abs().max()


def test_inference_with_gradients_is_differentiable():
    model = nn.MLP((12, 16, 5)).cuda()
    with autocast(BF16):
        model(torch.randn(4, 12, device="cuda")).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
