"""Activation statistics: what is counted, of which layers, and that nobody pays who does not ask."""

import math

import pytest
import torch
from torch import nn

import gdbp
from gdbp import reference
from gdbp.nn._observe import observers
from gdbp.nn.utils import collect_activation_stats
from tests.fuse_models import Attributes, Functional
from tests.oracle import FLOAT_DTYPES, laid_out, on_one_and_two_threads

SHAPES = [(0, 3), (3, 0), (1, 1), (7, 8), (255, 17), (256, 16), (257, 255), (3, 257), (1000, 5), (5, 600)]


@pytest.fixture(autouse=True)
def _nobody_watches():
    yield
    assert observers == []


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided", "misaligned"])
def test_operator(dtype, layout, device):
    for shape in SHAPES:
        y = laid_out(torch.randn(shape, dtype=torch.float64).to(device, dtype), layout)
        result = torch.ops.gdbp.unit_stats(y, -0.5, 0.75)
        assert result.shape == (3, shape[1]) and result.dtype is torch.float64
        torch.testing.assert_close(result, reference.unit_stats(y, -0.5, 0.75), rtol=1e-12, atol=1e-12)
    torch.library.opcheck(torch.ops.gdbp.unit_stats, (y, -0.5, 0.75))


def test_operator_with_what_is_not_finite():
    y = torch.tensor([[math.nan, math.inf, -math.inf, 1.0]] * 5)
    result = torch.ops.gdbp.unit_stats(y, 0.0, 2.0)
    assert result[0].tolist() == [0, 5, 5, 0] and result[1, 3] == 5
    assert result[1:, 0].isnan().all() and result[2, 1:3].isinf().all()


def test_threads_do_not_change_bits():
    y = torch.randn(5000, 130)
    for one, two in on_one_and_two_threads(lambda: [torch.ops.gdbp.unit_stats(y, 0.0, math.inf)]):
        assert torch.equal(one, two)


def test_operator_checks_its_arguments():
    with pytest.raises(RuntimeError, match=r"output has shape \[3\]; expected \(rows, units\)"):
        torch.ops.gdbp.unit_stats(torch.zeros(3), 0.0, 1.0)
    with pytest.raises(TypeError, match="output has dtype Long; expected float64"):
        torch.ops.gdbp.unit_stats(torch.zeros(3, 2, dtype=torch.long), 0.0, 1.0)


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "sigmoid", "tanh", "elu", "softplus"])
def test_counts(activation):
    layer = gdbp.nn.Linear(6, 5, activation=activation)
    with torch.no_grad():
        layer.weight.mul_(8)
        layer.bias[0] = -1e3
    outputs = []
    with collect_activation_stats(layer) as activity:
        for lead in ((7,), (), (2, 3), (0,)):
            outputs.append(layer(torch.randn(*lead, 6)).detach().reshape(-1, 5))
    layer(torch.randn(2, 6))
    y = torch.cat(outputs).double()
    seen = activity.stats()["(itself)"]
    assert seen.rows == len(y) == 14 and seen.activation == activation
    torch.testing.assert_close(seen.mean, y.mean(0))
    torch.testing.assert_close(seen.variance, y.var(0, correction=0), rtol=1e-9, atol=1e-12)
    flat = {
        "relu": y == 0,
        "sigmoid": (y <= 0.01) | (y >= 0.99),
        "tanh": y.abs() >= 0.98,
        "elu": y <= -0.99,
        "softplus": y <= 0.01,
    }.get(activation, torch.zeros_like(y, dtype=torch.bool))
    torch.testing.assert_close(seen.flat, flat.double().mean(0))
    assert torch.equal(seen.dead, flat.all(0)) and seen.dead[0] == (activation not in (None, "gelu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_norm_counts_channels(dtype):
    layer = gdbp.nn.BatchNorm1d(4, activation="relu").to(dtype)
    with collect_activation_stats(layer) as activity:
        y = torch.cat([layer(torch.randn(5, 4, 3, dtype=dtype)).detach() for _ in range(2)]).double()
    seen = activity.stats()["(itself)"]
    assert seen.rows == 30
    torch.testing.assert_close(seen.mean, y.mean((0, 2)))
    torch.testing.assert_close(seen.flat, (y == 0).double().mean((0, 2)))


def test_fused_models_stay_fused():
    for build in (Attributes, Functional):
        model, x = gdbp.fuse(build()), torch.randn(9, 8)
        with collect_activation_stats(model) as activity:
            explained = gdbp.explain(model, x)
            activity.clear()
            y = model(x)
        names = [layer.name for layer in activity.stats().layers]
        runs = [" + ".join(c.layers) for c in explained.calls if len(c.layers) > 1]
        assert names == runs and len(runs) >= 2
        assert y.requires_grad and not any(layer.mean.requires_grad for layer in activity.stats().layers)
    last = activity.stats()["fc4 + sigmoid()"]
    torch.testing.assert_close(last.mean, y.detach().double().mean(0))


def test_only_layers_of_the_model():
    mine, other = (gdbp.nn.MLP([3, 8, 2]) for _ in range(2))
    with collect_activation_stats(mine) as first, collect_activation_stats(other) as second:
        mine(torch.randn(4, 3))
        torch.vmap(mine)(torch.randn(4, 3))
    assert [layer.name for layer in first.stats().layers] == ["0", "1"] and second.stats().layers == ()
    assert first.stats()["0"].rows == 4 and first.stats()["1"].activation is None
    first.remove()
    with pytest.raises(KeyError, match="'7'; there are 0, 1"):
        first.stats()["7"]


def test_verdicts():
    model = nn.Sequential(
        gdbp.nn.Linear(4, 4, activation="relu"),
        gdbp.nn.Linear(4, 4, activation="tanh"),
        gdbp.nn.Linear(4, 4),
        gdbp.nn.Linear(4, 4, activation="gelu"),
        gdbp.nn.Linear(4, 1, activation="sigmoid"),
    )
    with torch.no_grad():
        model[0].bias[:2] = -100
        model[1].bias.fill_(100)
        for p in model[2].parameters():
            p.zero_()
        model[3].bias[0] = math.nan
    with collect_activation_stats(model) as activity:
        model(torch.randn(16, 4))
    verdicts = activity.stats().verdicts()
    assert {name: text.split(":")[0] for name, text in verdicts.items()} == {
        "0": "dead units", "1": "saturated", "2": "constant", "3": "not finite", "4": "not finite",
    }  # fmt: skip
    lines = str(activity).splitlines()
    assert lines[0].split() == ["layer", "activation", "units", "rows", "mean", "variance", "dead", "flat", "verdict"]
    assert lines[1].split()[:4] == ["0", "relu", "4", "16"] and lines[1].split()[6] in ("2", "3", "4")
    assert lines[3].split()[6:8] == ["-", "-"] and len(lines) == 6


def test_healthy_and_empty():
    torch.manual_seed(1)
    model = gdbp.nn.MLP([16, 64, 64, 4], batch_norm=True)
    with collect_activation_stats(model) as activity:
        model(torch.randn(256, 16))
    assert activity.stats().verdicts() == {} and str(activity).count(" ok") == 5
    with collect_activation_stats(model) as activity:
        model.eval()(torch.randn(0, 16))
    assert activity.stats().verdicts() == {}
    activity = collect_activation_stats(model)
    activity.remove(), activity.remove()
    assert "gdbp.fuse(model)" in str(activity) and activity.stats().verdicts() == {}


def test_train_step_says_that_it_calls_no_layers():
    model = gdbp.nn.MLP([4, 8, 2])
    optimizer = gdbp.optim.SGD(model.parameters(), lr=0.1)
    batch = torch.randn(3, 4), torch.randn(3, 2)
    step, loose = (gdbp.TrainStep(model, gdbp.nn.MSELoss(), optimizer, strict=strict) for strict in (True, False))
    with collect_activation_stats(gdbp.nn.Linear(2, 2)):
        step(*batch)
    with collect_activation_stats(model) as activity:
        with pytest.raises(ValueError, match="collect_activation_stats watches the model"):
            step(*batch)
        loose(*batch)
    assert [layer.rows for layer in activity.stats().layers] == [3, 3]
    step(*batch)


def test_training_is_not_changed():
    model = gdbp.fuse(Attributes())
    twin = gdbp.fuse(Attributes())
    twin.load_state_dict(model.state_dict())
    x = torch.randn(6, 8)
    with collect_activation_stats(model):
        model(x).sum().backward()
    twin(x).sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters()))


def test_compiled():
    torch._dynamo.reset()
    model = gdbp.fuse(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)))
    compiled, x = torch.compile(model, backend="aot_eager", fullgraph=True), torch.randn(32, 4)
    compiled(x)
    with collect_activation_stats(model) as activity:
        for _ in range(3):
            compiled(x).sum().backward()
    compiled(x)
    (layer,) = activity.stats().layers
    assert layer.name == "0 + 1 + 2" and layer.rows == 96 and layer.mean.isfinite().all()


def test_refusal():
    with pytest.raises(TypeError, match=r"model is of type list; expected a torch\.nn\.Module"):
        collect_activation_stats([])
