"""gdbp.train.lr_find and python -m gdbp lr-find: the learning-rate range test."""

import copy
import math

import pytest
import torch

from gdbp import nn, optim
from gdbp.__main__ import main
from gdbp.train import InputError, RangeTest, build_network, fit, load_data, lr_find
from gdbp.train.range_test import _smooth
from gdbp.train.rules import RULES

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


def problem(classes=4, rows=400):
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(classes, (rows,), generator=generator)
    x = 2 * torch.eye(classes, 8)[y] + torch.randn(rows, 8, generator=generator)
    return x, y


def network(seed=0):
    return build_network([8, 16, 4], generator=torch.Generator().manual_seed(seed))


def test_is_the_plain_loop():
    """Each rate is used once, on the batches that fit would take, and losses are those before the steps."""
    x, y = problem()
    model = network()
    found = lr_find(
        model, nn.CrossEntropyLoss(), optim.SGD(model.parameters(), lr=1.0), (x, y),
        method="batch", lowest=1e-3, highest=1e-1, steps=21,
    )  # fmt: skip
    assert found.lr == pytest.approx([10 ** (-3 + k / 10) for k in range(21)])
    by_hand, losses = copy.deepcopy(model), []
    for rate in found.lr:
        by_hand.zero_grad()
        loss = torch.nn.functional.cross_entropy(by_hand(x), y)
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for p in by_hand.parameters():
                p -= rate * p.grad
    assert found.loss == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("make", [torch.optim.AdamW, optim.AdamW, optim.Lion], ids=["torch", "AdamW", "Lion"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_changes_nothing(make, wrapped):
    """Not the parameters, buffers, modes, states, rates, gradients, nor torch's random state."""
    model = torch.nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16, activation="relu"), torch.nn.Dropout(0.5), nn.Linear(16, 4)
    )
    if wrapped:  # what has no fused form runs eagerly, with torch's random numbers
        model.append(torch.nn.RReLU())
    optimizer = make(model.parameters(), lr=1e-3)
    x, y = problem()
    fit(model, nn.CrossEntropyLoss(), optimizer, (x, y), epochs=1)
    model.eval()
    model[0].weight.grad = torch.ones(16, 8)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    versions, random = [p._version for p in model.parameters()], torch.get_rng_state()
    lr_find(model, nn.CrossEntropyLoss(), optimizer, (x, y))
    assert not any(module.training for module in model.modules())
    assert versions == [p._version for p in model.parameters()] and torch.equal(random, torch.get_rng_state())
    assert torch.equal(model[0].weight.grad, torch.ones(16, 8))
    (weights, state), (old_weights, old_state) = (model.state_dict(), optimizer.state_dict()), before
    torch.testing.assert_close(weights, old_weights, rtol=0, atol=0)
    torch.testing.assert_close(state["state"], old_state["state"], rtol=0, atol=0)
    assert state["param_groups"] == old_state["param_groups"]


def test_same_seed_same_rates():
    model = network()
    optimizer = optim.Adam(model.parameters())

    def run(seed):
        return lr_find(model, nn.CrossEntropyLoss(), optimizer, problem(), seed=seed, noise=0.1)

    assert run(0) == run(0) and run(0) != run(1)


@pytest.mark.parametrize("tensor", [False, True])
def test_groups_keep_their_ratios(tensor):
    model = network()
    seen = []

    class Watched(optim.SGD):
        def step(self, closure=None):
            seen.append([float(group["lr"]) for group in self.param_groups])
            return super().step(closure)

    rates = [0.2, 0.05]
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == dim], "lr": torch.tensor(rate) if tensor else rate}
        for dim, rate in zip((2, 1), rates)
    ]
    optimizer = Watched(groups)
    found = lr_find(model, nn.CrossEntropyLoss(), optimizer, problem(), steps=20)
    assert seen and all(bias == pytest.approx(weight / 4) for weight, bias in seen)
    assert [weight for weight, _ in seen] == pytest.approx(found.lr)
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx(rates)


def test_rates_of_nothing():
    """A first group at rate 0 has no ratio to keep."""
    model = network()
    found = lr_find(model, nn.CrossEntropyLoss(), optim.SGD(model.parameters(), lr=0.0), problem())
    assert found.suggestion is not None


@pytest.mark.parametrize("rule", ["sgd", "momentum", "rmsprop", "adamw"])
@pytest.mark.parametrize("source", ["digits", "breast-cancer", "diabetes"])
def test_suggestion_learns(source, rule):
    """Trained at the suggestion, a network's loss falls by nine tenths of what it does at the best rate of a grid."""
    data = load_data(source)
    loss = nn.CrossEntropyLoss() if data.class_names else nn.MSELoss()

    def train(rate):
        model = build_network([data.features, 32, data.outputs], generator=torch.Generator().manual_seed(0))
        optimizer = RULES[rule].make(model.parameters(), lr=rate or 1.0, **RULES[rule].extra)
        if rate is None:
            rate = lr_find(model, loss, optimizer, data).suggestion
            optimizer.param_groups[0]["lr"] = rate
        try:
            return rate, fit(model, loss, optimizer, data, epochs=8)[-1]["val_loss"]
        except FloatingPointError:
            return rate, math.inf

    _, start = train(1e-12)
    _, best = min((train(10 ** (k / 2)) for k in range(-7, 2)), key=lambda pair: pair[1])
    rate, ours = train(None)
    assert start - ours >= 0.9 * (start - best), (rate, ours, best, start)


def test_ends_where_the_loss_grows():
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    found = lr_find(model, nn.MSELoss(), optimizer, (problem()[0], torch.randn(400, 4)), highest=1e6)
    assert len(found.lr) < 100 and found.lr[-1] < 1e4 and all(map(math.isfinite, found.loss))


def test_a_loss_that_is_not_finite():
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    x, y = problem()
    with pytest.raises(FloatingPointError, match="the loss is nan before the first step; look at the data"):
        lr_find(model, nn.CrossEntropyLoss(), optimizer, (x * math.nan, y))


@pytest.mark.parametrize("highest", [1e-5, 1e-9])
def test_no_rate_where_nothing_is_learned(highest):
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    found = lr_find(model, nn.CrossEntropyLoss(), optimizer, problem(), lowest=1e-10, highest=highest)
    assert found.suggestion is None and "never fell beyond its noise" in str(found)


@pytest.mark.parametrize("value", [3.0, -0.1, 0.0])
def test_no_rate_where_the_loss_is_constant(value):
    """Smoothing rounds, which is no fall."""
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    found = lr_find(model, lambda outputs, y: 0 * outputs.sum() + value, optimizer, problem())
    assert found.suggestion is None


class Embeds(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(10, 4, sparse=True)

    def forward(self, x):
        return self.table(x).mean(1)


def words():
    x = torch.randint(10, (400, 3))
    return x, x[:, 0] % 4


def test_sparse_gradients_need_no_norm():
    model = Embeds()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = lr_find(model, nn.CrossEntropyLoss(), optimizer, words(), highest=1e3)
    assert found.suggestion is not None


def test_gradients_whose_norm_overflows():
    """Without a clip nothing is scaled, where infinity over infinity would make NaN of all."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    found = lr_find(
        model, lambda outputs, y: 1e25 * torch.nn.functional.cross_entropy(outputs, y), optimizer, problem()
    )
    assert len(found.lr) > 50


@pytest.mark.parametrize("learn", [lr_find, fit])
def test_noise_on_whole_numbers(learn):
    model = Embeds()
    options = {"epochs": 1} if learn is fit else {}
    with pytest.raises(InputError, match=r"noise is 0\.1, and the inputs are torch\.int64; expected floating ones"):
        learn(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters()), words(), noise=0.1, **options)


def test_smoothing():
    assert torch.allclose(_smooth([3.0] * 40), torch.full((40,), 3.0, dtype=torch.float64))
    straight = _smooth([float(k) for k in range(1000)])
    inside = slice(100, 900)
    assert torch.allclose(straight[inside], torch.arange(1000.0, dtype=torch.float64)[inside])
    assert _smooth([1.0]).tolist() == [1.0]


def test_says_and_draws(tmp_path):
    rates = [10 ** (k / 20 - 4) for k in range(100)]
    found = RangeTest(rates, [1.0] * 40 + [1 - k / 40 for k in range(40)] + [float(k) for k in range(20)], 0.1)
    assert str(found).startswith("100 rates from 0.0001 to 8.9: the loss was lowest at 0.")
    assert str(found).endswith("train with a learning rate of 0.1")
    found.plot(tmp_path / "r.svg")
    RangeTest([1.0], [2.0], None).plot(tmp_path / "one.png")
    assert "<!-- suggested, 0.1 -->" in (tmp_path / "r.svg").read_text()


@pytest.mark.parametrize(
    "losses",
    [
        [-5.0 - k / 20 for k in range(100)],
        [2.0] * 30 + [2 - k / 50 for k in range(69)] + [1e8],
        [0.0] * 100,
        [3.0] * 100,
        [-3.0],
    ],
    ids=["negative", "diverged", "zero", "constant", "one"],
)
def test_draws_what_was_before_the_loss_grew(losses, monkeypatch, recwarn):
    from matplotlib.figure import Figure

    limits = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: limits.append(figure.axes[0].get_ylim()))
    RangeTest([10 ** (k / 20 - 6) for k in range(len(losses))], losses, None).plot("")
    ((low, high),) = limits
    first = losses[:50]
    assert low < min(losses) and max(first) < high and not recwarn
    assert high - low <= 2 * (max(first) - min(losses)) or len(set(losses)) == 1


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"lowest": 0.0}, "lowest is 0.0; expected a finite number above 0"),
        ({"highest": math.inf}, "highest is inf; expected a finite number above 0"),
        ({"lowest": "a"}, "lowest is 'a'; expected a finite number above 0"),
        ({"lowest": 1.0, "highest": 1.0}, "lowest is 1 and highest 1; expected the lower one first"),
        ({"steps": 19}, "steps is 19; expected a whole number of at least 20"),
        ({"steps": 30.0}, "steps is 30.0; expected a whole number"),
        ({"clip": -1}, "clip is -1; expected a number above 0"),
        ({"noise": -1.0}, "noise is -1.0"),
        ({"method": "newton"}, "method 'newton' is unknown"),
        ({"batch_size": 500}, "batch size 500 is out of range"),
        ({"data": (torch.tensor(1.0), torch.tensor(2))}, "data has a tensor without dimensions"),
        ({"data": 3}, "data is of type int; expected a Data"),
    ],
)
def test_refuses(options, expected):
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match=expected):
        lr_find(model, nn.CrossEntropyLoss(), optimizer, **{"data": problem(), **options})


def test_what_cannot_be_copied():
    model = network()
    model.history = model[0].weight * 2
    with pytest.raises(InputError, match=r"can't be copied \(RuntimeError: .*; expected what copy.deepcopy takes"):
        lr_find(model, nn.CrossEntropyLoss(), optim.SGD(model.parameters(), lr=0.1), problem())


class TestCommandLine:
    def test_says(self, capsys):
        assert main(["lr-find", "--data", "breast-cancer"]) == 0
        data, network, found = capsys.readouterr().out.splitlines()
        assert data.startswith("data      breast-cancer: 2 classes") and network.startswith("network   30-32-2 relu")
        assert found.startswith("found     ") and "train with a learning rate of 0.0" in found

    def test_quiet_for_scripts(self, tmp_path, capsys):
        picture = tmp_path / "new" / "rates.png"
        assert main(["lr-find", "--data", "diabetes", "--quiet", "--out", str(picture)]) == 2
        assert "can't be written to" in capsys.readouterr().err and not picture.parent.exists()
        picture.parent.mkdir()
        assert main(["lr-find", "--data", "diabetes", "--quiet", "--out", str(picture)]) == 0
        rate = capsys.readouterr().out.strip()
        assert picture.stat().st_size > 10_000
        options = ["--data", "diabetes", "--epochs", "2", "--quiet", "--out", str(tmp_path / "run")]
        assert main(["train", "--lr", rate, *options]) == 0

    @pytest.mark.parametrize(
        "options, expected",
        [
            (["--lowest", "1", "--highest", "0.1"], "lowest is 1 and highest 0.1; expected the lower one first"),
            (["--highest", "1e-7"], "lowest is 1e-06 and highest 1e-07"),
            (["--steps", "5"], "expected a whole number from 20"),
            (["--epochs", "5"], "unrecognized arguments: --epochs 5; see python -m gdbp lr-find --help"),
            (["--highest", "1e-5"], "the loss never fell beyond its noise; try other rates"),
            (["--out", "picture.doc"], "can't be drawn"),
            (["--data", "nothing"], "data 'nothing' is unknown"),
        ],
    )
    def test_refuses(self, options, expected, capsys, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert main(["lr-find", "--data", "breast-cancer", *options]) == 2
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1 and not list(tmp_path.iterdir())
