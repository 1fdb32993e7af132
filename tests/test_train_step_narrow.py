"""Networks of narrow layers, which TrainStep on the CPU takes block of rows by block of rows: sizes at the ends of a
vector, rows at the ends of blocks and groups, frozen layers, and the same bits for any number of threads."""

import copy
import random
from functools import partial
from itertools import pairwise

import pytest
import torch

import gdbp
from gdbp import nn, ops, optim
from tests.training import close, eager, same_training

ACTIVATIONS = [None, "relu", "leaky_relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "elu", "softplus"]
WIDTHS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 128, 129]
ROWS = [0, 1, 2, 3, 4, 5, 127, 128, 129, 255, 256, 300, 1025]


def sgd(model, **options):
    return optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01, momentum=0.9, **options)


def draw(seed):
    """A network of mixed layers, one wide one now and then, some of it frozen, and its batches."""
    pick = random.Random(seed)
    torch.manual_seed(seed)
    sizes = [pick.choice(WIDTHS) for _ in range(pick.randint(2, 6))]
    dtype = pick.choice([torch.float64, torch.float32])
    layers = []
    for inputs, outputs in pairwise(sizes):
        layers.append(
            nn.Linear(inputs, outputs, bias=pick.random() < 0.8, activation=pick.choice(ACTIVATIONS), dtype=dtype)
        )
        if pick.random() < 0.15:
            layers.append(torch.nn.Tanh())
    model = torch.nn.Sequential(*layers)
    for p in model.parameters():
        p.requires_grad_(pick.random() < 0.8)
    if not any(p.requires_grad for p in model.parameters()):
        model.requires_grad_()
    rows = pick.choice(ROWS)
    batches = [(torch.randn(rows, sizes[0], dtype=dtype), torch.randn(rows, sizes[-1], dtype=dtype)) for _ in range(2)]
    return model, batches, pick


@pytest.mark.parametrize("seed", range(150))
def test_random_networks(seed):
    model, batches, pick = draw(seed)
    loss = nn.MSELoss(reduction="mean" if len(batches[0][0]) else "sum")
    clips = {"max_grad_norm": 0.5} if pick.random() < 0.3 else {}
    same_training(model, loss, partial(sgd, **clips), batches, 4, keep_grads=pick.random() < 0.5)


class Dropped(torch.nn.Module):
    """What TrainStep's step drops, from the operator of its own."""

    def __init__(self, p, seed, layer):
        super().__init__()
        self.p, self.seed, self.layer = p, seed, layer

    def forward(self, x):
        return ops.dropout(x, self.p, self.seed, self.layer)


@pytest.mark.parametrize("seed", range(60))
def test_dropout(seed):
    """In front, between and behind narrow layers, now and then two in a row."""
    pick = random.Random(seed)
    torch.manual_seed(seed)
    sizes = [pick.choice(WIDTHS) for _ in range(pick.randint(2, 6))]
    dtype = pick.choice([torch.float64, torch.float32])
    layers, drawn = [], torch.zeros(1, dtype=torch.int64)
    for pair in pairwise(sizes):
        while pick.random() < 0.5:
            layers.append(torch.nn.Dropout(pick.choice([0.1, 0.5, 0.9, 1.0])))
        layers.append(nn.Linear(*pair, activation=pick.choice(ACTIVATIONS[1:]), dtype=dtype))
    layers.append(torch.nn.Dropout(0.2))
    model = torch.nn.Sequential(*layers)
    twin = copy.deepcopy(model)
    for i, layer in enumerate(twin):
        if isinstance(layer, torch.nn.Dropout):
            twin[i] = Dropped(layer.p, drawn, i)
    optimizer, other = sgd(model), sgd(twin)
    step = gdbp.TrainStep(model, nn.MSELoss(), optimizer, seed=seed)
    for _ in range(3):
        rows = pick.choice(ROWS[1:])
        x, y = torch.randn(rows, sizes[0], dtype=dtype), torch.randn(rows, sizes[-1], dtype=dtype)
        drawn.fill_(gdbp._C.step_seed(step.seed, step.steps))
        close(step(x, y), eager(twin, nn.MSELoss(), other, x, y))
    assert step.explain().startswith("fused")
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        close(p, q)


@pytest.mark.parametrize("rows", [1, 130, 4000, 20000])
@pytest.mark.parametrize("sizes", [(13, 33, 33, 3), (64, 64, 64, 10), (128, 128, 1)])
def test_any_number_of_threads(rows, sizes):
    torch.manual_seed(0)
    model = nn.MLP(sizes, "gelu")
    x, y = torch.randn(rows, sizes[0]), torch.randn(rows, sizes[-1])
    found = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            twin = copy.deepcopy(model)
            step = gdbp.TrainStep(twin, nn.MSELoss(), optim.AdamW(twin.parameters()))
            found.append([step(x, y), step(x, y), *twin.parameters()])
    finally:
        torch.set_num_threads(2)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def test_infinities_and_nan_reach_what_they_touch_and_nothing_else():
    """The lanes of a vector that have no column are computed with what lies beside it in memory."""
    torch.manual_seed(0)
    for bad in (float("inf"), float("nan")):
        model = nn.MLP([13, 19, 5], dtype=torch.float64)
        twin = copy.deepcopy(model)
        x, y = torch.randn(70, 13, dtype=torch.float64), torch.randn(70, 5, dtype=torch.float64)
        with torch.no_grad():
            model[1].weight[4, 18] = twin[1].weight[4, 18] = bad
        step = gdbp.TrainStep(model, nn.MSELoss(), optim.SGD(model.parameters(), lr=0.1), keep_grads=True)
        step(x, y)
        torch.nn.functional.mse_loss(twin(x), y).backward()
        for p, q in zip(model.parameters(), twin.parameters()):
            torch.testing.assert_close(p.grad, q.grad, equal_nan=True)


def test_input_at_the_end_of_its_memory():
    """A batch of 3 columns that is the last of a larger tensor, and one of a single element."""
    everything = torch.randn(1000, 3, dtype=torch.float64)
    model = nn.MLP([3, 5, 1], "tanh", dtype=torch.float64)
    twin = copy.deepcopy(model)
    step = gdbp.TrainStep(model, nn.MSELoss(), sgd(model))
    other = sgd(twin)
    for x in (everything[-7:], everything[-1:]):
        y = x.sum(1, keepdim=True)
        other.zero_grad()
        loss = torch.nn.functional.mse_loss(twin(x), y)
        loss.backward()
        other.step()
        close(step(x, y), loss.detach())
    for p, q in zip(model.parameters(), twin.parameters()):
        close(p, q)


def test_explain_tells_them_from_wide_ones():
    model = nn.MLP([128, 129, 128, 4])
    step = gdbp.TrainStep(model, nn.MSELoss(), sgd(model))
    lines = step.explain().splitlines()[1:4]
    assert ["narrow" in line for line in lines] == [False, False, True]
