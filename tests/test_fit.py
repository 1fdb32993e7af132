"""gdbp.train from Python: splitting, the training loop, schedules, History."""

import math
import sys

import numpy as np
import pytest
import torch

from gdbp import nn, optim
from gdbp.train import Data, History, InputError, evaluate, fit, load_data, make_schedule
from gdbp.train.data import split
from gdbp.train.schedule import SCHEDULES

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


def test_split_is_stratified():
    strata = np.repeat([0, 1, 2], [100, 40, 20])
    parts = split(strata, seed=3)
    assert sorted(np.concatenate(parts)) == list(range(160))
    assert [np.bincount(strata[part]).tolist() for part in parts] == [[65, 26, 13], [15, 6, 3], [20, 8, 4]]
    assert all(np.array_equal(a, b) for a, b in zip(parts, split(strata, seed=3)))
    assert not np.array_equal(parts[0], split(strata, seed=4)[0])


@pytest.mark.parametrize("source", ["digits", "breast-cancer", "diabetes"])
def test_standardised_by_the_training_set(source):
    data = load_data(source)
    x, y = data.train
    assert x.dtype == torch.float32 and x.mean(0).abs().max() < 1e-5
    spread = x.var(0, correction=0)
    assert (spread.mean() if source == "digits" else spread).sub(1).abs().max() < 1e-4
    if source == "diabetes":
        assert y.shape == (len(x), 1) and abs(y.mean()) < 1e-6
    else:
        assert y.dtype == torch.int64 and y.shape == (len(x),)


def test_constant_input_and_header(tmp_path):
    path = tmp_path / "plain.csv"
    path.write_text("".join(f"{i};5;0.1;{i % 2}\n" for i in range(60)))  # the mean of 39 times 0.1 is not 0.1
    data = load_data(str(path))
    assert data.feature_names == ["column_1", "column_2", "column_3"] and data.class_names == ["0", "1"]
    assert (data.x_std[1:] == 1).all() and data.train[0][:, 1:].abs().max() < 1e-16


@pytest.mark.parametrize(
    "values, task",
    [(range(10), "classification"), (range(150), "regression"), ([i / 7 for i in range(30)], "regression"),
     ([0.5, 1.5], "classification"), (["a", "b"], "classification")],
)  # fmt: skip
def test_task_is_inferred(tmp_path, values, task):
    values = list(values)
    path = tmp_path / "table.csv"
    path.write_text("x,y\n" + "".join(f"{i},{values[i % len(values)]}\n" for i in range(5 * len(values) + 20)))
    assert load_data(str(path)).task == task


def linear_problem() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    return x, x @ torch.tensor([[1.0], [-2.0], [0.5]])


def test_fit_is_the_plain_loop():
    """One step of method batch is gradient descent as written by hand."""
    x, y = linear_problem()
    model, by_hand = nn.Linear(3, 1), nn.Linear(3, 1)
    by_hand.load_state_dict(model.state_dict())
    history = fit(model, nn.MSELoss(), optim.SGD(model.parameters(), lr=0.1), (x, y), epochs=5, method="batch")
    for _ in range(5):
        by_hand.zero_grad()
        torch.nn.functional.mse_loss(by_hand(x), y).backward()
        with torch.no_grad():
            for p in by_hand.parameters():
                p -= 0.1 * p.grad
    torch.testing.assert_close(model.weight, by_hand.weight)
    assert "val_loss" not in history.columns and history[-1]["train_r2"] > 0


def test_fit_visits_every_sample_once():
    x, y = linear_problem()
    seen = []

    def loss(outputs, targets):
        if outputs.requires_grad:
            seen.append(targets)
        return (outputs - targets).square().mean()

    model = nn.Linear(3, 1)
    optimizer = optim.SGD(model.parameters(), lr=0.0)
    fit(model, loss, optimizer, (x, y), epochs=2, batch_size=8)
    assert [len(batch) for batch in seen] == [8] * 6 + [2] + [8] * 6 + [2]
    first, second = torch.cat(seen[:7]), torch.cat(seen[7:])
    assert torch.equal(first.sort(0).values, y.sort(0).values)
    assert not torch.equal(first, second)


def test_fit_clips_and_calls_back():
    x, y = linear_problem()
    model = nn.Linear(3, 1)
    before = model.weight.detach().clone()
    rows = []
    fit(
        model, nn.MSELoss(), optim.SGD(model.parameters(), lr=1.0), (x, 1000 * y),
        epochs=1, method="batch", clip=0.01, callbacks=[rows.append],
    )  # fmt: skip
    assert (model.weight - before).norm() < 0.0101
    assert rows[0]["grad_norm"] > 100  # as it was before clipping


def test_fit_leaves_the_random_state():
    before = torch.get_rng_state()
    model = nn.Linear(3, 1)
    torch.set_rng_state(before)
    fit(model, nn.MSELoss(), optim.Adam(model.parameters()), linear_problem(), epochs=1, noise=0.1)
    assert torch.equal(torch.get_rng_state(), before)


def test_fit_keeps_the_best():
    data = load_data("diabetes")
    model = torch.nn.Sequential(nn.Linear(10, 64, activation="relu"), nn.Linear(64, 1))
    optimizer = optim.Adam(model.parameters(), lr=0.02)
    history = fit(model, nn.MSELoss(), optimizer, data, epochs=15, keep="best")
    with torch.no_grad():
        kept = nn.MSELoss()(model(data.validation[0]), data.validation[1]).item()
    assert kept == pytest.approx(min(history["val_loss"])) and kept < history[-1]["val_loss"]


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"epochs": 0}, "epochs is 0; expected a whole number of at least 1"),
        ({"epochs": 1.5}, "epochs is 1.5; expected a whole number of at least 1"),
        ({"noise": -1.0}, "noise is -1.0; expected a finite number of at least 0"),
        ({"noise": "a"}, "noise is 'a'; expected a finite number of at least 0"),
        ({"clip": "a"}, "clip is 'a'; expected a number above 0"),
        ({"seed": "a"}, "seed is 'a'; expected a whole number"),
        ({"seed": 2**64}, "expected a whole number of 64 bits"),
        ({"callbacks": 3}, "callbacks is 3; expected a list of functions"),
        ({"callbacks": [3]}, r"callbacks is \(3,\); expected a list of functions"),
        ({"data": 3}, r"data is of type int; expected a Data, or a pair of two tensors \(x, y\)"),
        ({"data": torch.zeros(2, 3)}, "data is of type Tensor; expected a Data"),
        ({"data": (torch.zeros(2, 3), [0, 1])}, "data is of type tuple; expected a Data"),
        ({"batch_size": 2.0}, "batch size 2.0 is out of range"),
        ({"clip": 0.0}, "clip is 0.0; expected a number above 0"),
        ({"batch_size": 51}, "batch size 51 is out of range"),
        ({"method": "newton"}, "method 'newton' is unknown"),
        ({"schedule": "linear"}, "schedule 'linear' is unknown"),
        ({"keep": "best"}, "'best' for data with a validation set"),
    ],
)
def test_fit_refuses(options, expected):
    model = nn.Linear(3, 1)
    optimizer = optim.SGD(model.parameters())
    with pytest.raises(InputError, match=expected):
        fit(model, nn.MSELoss(), optimizer, **{"data": linear_problem(), "epochs": 1, **options})


@pytest.mark.parametrize("inputs, targets", [(0, 0), (4, 5)])
def test_fit_wants_a_target_for_each_input(inputs, targets):
    model = nn.Linear(3, 1)
    pair = torch.zeros(inputs, 3), torch.zeros(targets, 1)
    with pytest.raises(ValueError, match=f"{inputs} inputs and {targets} targets; expected as many, and at least one"):
        fit(model, nn.MSELoss(), optim.SGD(model.parameters()), pair, epochs=1, noise=0.1)


@pytest.mark.parametrize("off, expected", [(0.0, 1.0), (0.5, 0.0)])
def test_r2_of_a_constant_is_finite(off, expected):
    """As scikit-learn's."""
    from sklearn.metrics import r2_score

    x, y = torch.randn(6, 1), torch.full((6, 1), 2.0)
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.fill_(2.0 + off)
    found = evaluate(model, nn.MSELoss(), x, y)
    assert found["r2"] == expected == r2_score(y, torch.full_like(y, 2.0 + off))


def test_schedules():
    def rates(name, steps=30, **options):
        optimizer = optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3, **options)
        scheduler, seen = make_schedule(name, optimizer, steps), []
        for _ in range(steps):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return seen, optimizer

    assert rates("constant")[0] == [0.3] * 30
    assert rates("step")[0] == pytest.approx([0.3] * 10 + [0.03] * 10 + [0.003] * 10)
    cosine = rates("cosine")[0]
    assert cosine == pytest.approx([0.15 * (1 + math.cos(math.pi * i / 30)) for i in range(30)])
    onecycle, optimizer = rates("onecycle")
    assert max(onecycle) == pytest.approx(0.3) and onecycle.index(max(onecycle)) == 8
    assert onecycle[0] == pytest.approx(0.3 / 25) and onecycle[-1] < 1e-5
    assert optimizer.param_groups[0]["momentum"] == 0  # plain SGD stays plain
    for name in SCHEDULES:
        assert len(rates(name, steps=1)[0]) == 1


def test_history(tmp_path):
    history = History()
    for epoch in (1, 2):
        history.append(epoch=epoch, train_loss=1 / epoch, val_loss=0.1 + 2 / epoch)
    assert history["val_loss"] == [2.1, 1.1] and len(history) == 2 and history[-1]["epoch"] == 2
    with pytest.raises(ValueError, match="row has columns epoch; expected epoch, train_loss, val_loss"):
        history.append(epoch=3)
    history.to_csv(tmp_path / "h.csv")
    assert (tmp_path / "h.csv").read_text() == "epoch,train_loss,val_loss\n1,1.0,2.1\n2,0.5,1.1\n"
    history.plot(tmp_path / "h.svg", title="two epochs")
    assert "<svg" in (tmp_path / "h.svg").read_text()


def test_tensorboard(tmp_path, monkeypatch):
    history = History()
    history.append(epoch=1, train_loss=1.0)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        history.to_tensorboard(tmp_path)
    written = []

    class Writer:
        def __init__(self, folder):
            self.folder = folder

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def add_scalar(self, *scalar):
            written.append(scalar)

    fake = type(sys)("torch.utils.tensorboard")
    fake.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    history.to_tensorboard(tmp_path)
    assert written == [("train/loss", 1.0, 1)]


def test_data_moves():
    data = load_data("diabetes")
    assert isinstance(data.to("cpu"), Data) and data.to("meta").test[0].device.type == "meta"
