"""What the tests of TrainStep share: networks, data, the eager loop, and comparisons of whole trainings."""

import copy
from itertools import pairwise

import torch

import gdbp
from gdbp import nn, optim

FEATURES, CLASSES = 12, 5


def network(*hidden, inputs=FEATURES, outputs=CLASSES, activation="relu", dtype=torch.float32):
    sizes = [inputs, *hidden]
    layers = [nn.Linear(a, b, activation=activation, dtype=dtype) for a, b in pairwise(sizes)]
    return torch.nn.Sequential(*layers, nn.Linear(sizes[-1], outputs, dtype=dtype))


def data(rows=16, inputs=FEATURES, outputs=CLASSES, dtype=torch.float32, target="labels", seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=generator, dtype=dtype)
    if target == "labels":
        return x, torch.randint(outputs, (rows,), generator=generator)
    y = torch.rand(rows, outputs, generator=generator, dtype=dtype)
    return x, y / y.sum(1, keepdim=True) if target == "probabilities" else y


def eager(model, loss, optimizer, x, y):
    optimizer.zero_grad()
    value = loss(model(x), y)
    value.backward()
    optimizer.step()
    return value.detach()


def close(ours, other, factor=1.0):
    """Steps of both kinds do the same sums, some in another order: after a few of them float32 may differ by some
    roundings of the largest value, and by more where a small gradient is normalised."""
    scale = max(1.0, other.abs().max().item()) if other.numel() else 1.0
    tolerance = factor * (2e-5 if other.dtype is torch.float32 else 1e-12)
    torch.testing.assert_close(ours, other, rtol=0, atol=tolerance * scale, equal_nan=True)


def same_training(model, loss, make, batches, factor=1.0, strict=True, **options):
    """Trains two copies of the model, one in each way, and compares losses, parameters, buffers and states."""
    twin = copy.deepcopy(model)
    optimizer, other = make(model), make(twin)
    step = gdbp.TrainStep(model, loss, optimizer, **options)
    for x, y in batches:
        close(step(x, y), eager(twin, loss, other, x, y), factor)
    assert step.explain().startswith("fused")
    same_state(model, optimizer, twin, other, factor)
    return step


def same_state(model, optimizer, twin, other, factor=1.0):
    for (name, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert a.dtype is b.dtype, name
        close(a, b, factor) if a.is_floating_point() else torch.testing.assert_close(a, b)
    ours, theirs = optimizer.state_dict(), other.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for index, state in theirs["state"].items():
        assert ours["state"][index].keys() == state.keys()
        for key, value in state.items():
            close(ours["state"][index][key], value, factor)


class Pair:
    """A model that TrainStep trains, and its twin that the eager loop does."""

    def __init__(self, model=None, loss=None, make=None, **options):
        self.model = network(16, 8) if model is None else model
        self.twin = copy.deepcopy(self.model)
        self.loss = nn.CrossEntropyLoss() if loss is None else loss
        make = make or (lambda model: optim.AdamW(model.parameters(), lr=1e-2))
        self.optimizer, self.other = make(self.model), make(self.twin)
        self.step = gdbp.TrainStep(self.model, self.loss, self.optimizer, **options)

    def both(self, change):
        change(self.model, self.optimizer)
        change(self.twin, self.other)

    def train(self, steps=2, rows=16):
        for i in range(steps):
            batch = data(rows, seed=i)
            close(self.step(*batch), eager(self.twin, self.loss, self.other, *batch))
        same_state(self.model, self.optimizer, self.twin, self.other)


class LabelsOfADevice:
    """gdbp._C where labels are found out of range by a device, which here is told what it finds: the loss is then not a
    number, and the finding is raised by a later call."""

    def __init__(self):
        self.bad, self.followed = torch.tensor([-1, 0]), []

    def hold_labels(self):
        pass

    def release_labels(self):
        return self.bad.clone()

    def follow_labels(self, bad):
        self.followed.append(bad.tolist())

    def raise_labels(self):
        if self.followed and self.followed[-1][0] >= 0:
            row, label = self.followed.pop()
            raise IndexError(f"Target {label} is out of bounds: row {row}")

    def __getattr__(self, name):
        return getattr(gdbp._C, name)
