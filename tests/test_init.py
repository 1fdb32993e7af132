"""gdbp.nn.init: the distributions have the spread that theory gives them, and zeros are refused."""

import math

import pytest
import torch

from gdbp import nn
from gdbp.nn import init

FAN_IN, FAN_OUT = 300, 500


def variance(scheme: str, gain: float) -> float:
    return gain**2 * (1 / FAN_IN if scheme.startswith("he") else 2 / (FAN_IN + FAN_OUT))


@pytest.mark.parametrize("nonlinearity", [None, "relu", "tanh", "gelu"])
@pytest.mark.parametrize("scheme", init.SCHEMES)
def test_mean_and_variance(scheme, nonlinearity):
    generator = torch.Generator().manual_seed(1)
    layer = init.init_(nn.Linear(FAN_IN, FAN_OUT), scheme, nonlinearity=nonlinearity, generator=generator)
    weight, expected = layer.weight.detach().double(), variance(scheme, init.gain(nonlinearity))
    n = weight.numel()
    # Five standard errors; the fourth moment is 3 variance**2 for the normal, 9/5 for the uniform.
    normal = scheme in ("he", "he_normal", "xavier_normal")
    assert abs(weight.mean()) < 5 * math.sqrt(expected / n)
    assert abs(weight.square().mean() - expected) < 5 * expected * math.sqrt((2 if normal else 0.8) / n)
    if normal:
        assert weight.abs().max() > 3.5 * math.sqrt(expected)
    else:
        assert weight.abs().max() <= math.sqrt(3 * expected) * (1 + 1e-6)
        assert weight.abs().max() > 0.99 * math.sqrt(3 * expected)
    assert (layer.bias == 0).all()


@pytest.mark.parametrize("short, long", [("xavier", "xavier_uniform"), ("he", "he_normal")])
def test_short_names(short, long):
    def drawn(scheme):
        return init.init_(nn.Linear(7, 5), scheme, generator=torch.Generator().manual_seed(3)).weight

    assert torch.equal(drawn(short), drawn(long))


@pytest.mark.parametrize("name", ["relu", "gelu", "gelu_tanh", "silu", "elu", "softplus"])
def test_gain_restores_the_second_moment(name):
    functions = {
        "gelu_tanh": lambda z: torch.nn.functional.gelu(z, approximate="tanh"),
        "relu": torch.relu,
        "elu": torch.nn.functional.elu,
        "gelu": torch.nn.functional.gelu,
        "silu": torch.nn.functional.silu,
        "softplus": torch.nn.functional.softplus,
    }
    z = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    moment = torch.trapezoid(functions[name](z).square() * density, z).item()
    assert init.gain(name) == pytest.approx(moment**-0.5, rel=1e-4)


def test_torch_gains():
    assert init.gain(None) == init.gain("linear") == 1.0
    assert init.gain("tanh") == pytest.approx(5 / 3)
    assert init.gain("sigmoid") == 1.0


def test_signal_survives_a_deep_network():
    generator = torch.Generator().manual_seed(0)
    layers = [nn.Linear(256, 256, activation="relu") for _ in range(20)]
    model = init.init_(torch.nn.Sequential(*layers), "he", generator=generator)
    with torch.no_grad():
        output = model(torch.randn(512, 256, generator=generator))
    # torch's default initialisation leaves about 6**-20 of the signal's power.
    assert 0.05 < output.square().mean() < 20


def test_other_layers():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(16, 32, 3), torch.nn.BatchNorm2d(32), torch.nn.LSTM(8, 64), torch.nn.Embedding(4, 8)
    )
    convolution, norm, lstm, embedding = model
    looked_up = embedding.weight.clone()
    assert init.init_(model, "he", nonlinearity=None) is model
    assert convolution.weight.var().item() == pytest.approx(1 / (16 * 9), rel=0.1)
    assert (convolution.bias == 0).all() and (lstm.bias_ih_l0 == 0).all()
    assert lstm.weight_hh_l0.var().item() == pytest.approx(1 / 64, rel=0.1)
    assert (norm.weight == 1).all()
    assert torch.equal(embedding.weight, looked_up)


def test_generator_and_global_state():
    before = torch.get_rng_state()
    first, second = nn.Linear(4, 3), nn.Linear(4, 3)
    torch.set_rng_state(before)
    for layer in (first, second):
        init.init_(layer, generator=torch.Generator().manual_seed(5))
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.weight.requires_grad and first.weight.is_leaf


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: init.init_(nn.Linear(2, 2), "zeros"), "symmetry is never broken"),
        (lambda: init.init_(nn.Linear(2, 2), "lecun"), "scheme 'lecun' is unknown; expected one of xavier"),
        (lambda: init.init_(nn.Linear(2, 2), nonlinearity="rleu"), "nonlinearity 'rleu' is unknown"),
        (lambda: init.init_(nn.Linear(2, 2), ["he"]), r"scheme \['he'\] is unknown"),
        (lambda: init.init_(nn.Linear(2, 2), nonlinearity=["relu"]), r"nonlinearity is \['relu'\]; expected None or"),
        (lambda: init.init_(torch.nn.ReLU()), "ReLU has no weight of two or more dimensions"),
    ],
)
def test_refusals(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


class Integers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((2, 2), 7, dtype=torch.int8), requires_grad=False)


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm.:FutureWarning")
def test_what_has_no_fan_stays():
    embedding, tied = torch.nn.Embedding(3, 4), nn.Linear(4, 3)
    tied.weight = embedding.weight
    magnitudes = torch.nn.utils.weight_norm(torch.nn.Linear(4, 4))
    stay = [embedding.weight, magnitudes.weight_g, *(torch.nn.LayerNorm([3, 4]).parameters())]
    before = [p.detach().clone() for p in stay]
    norm = torch.nn.LayerNorm([3, 4])
    init.init_(torch.nn.Sequential(embedding, tied, magnitudes, norm, nn.Linear(4, 4)))
    assert all(map(torch.equal, stay, before)) and (norm.weight == 1).all()


@pytest.mark.parametrize(
    "module, error, sentence",
    [
        (lambda: torch.nn.LayerNorm(3), ValueError, "LayerNorm has no weight of two"),
        (lambda: torch.nn.Sequential(nn.Linear(2, 2), torch.nn.LazyLinear(3)), ValueError, "has no shape yet"),
        (lambda: torch.nn.Sequential(nn.Linear(2, 2), Integers()), ValueError, "is torch.int8; expected floating"),
        (lambda: torch.ones(3), TypeError, "module is of type Tensor; expected a torch.nn.Module"),
    ],
)
def test_a_refusal_changes_nothing(module, error, sentence):
    module = module()
    parameters = [p for p in module.parameters() if type(p) is torch.nn.Parameter] if hasattr(module, "modules") else []
    for p in parameters:
        p.data.fill_(7)
    with pytest.raises(error, match=sentence):
        init.init_(module)
    assert all((p == 7).all() for p in parameters)


def test_torch_initialisers_are_here():
    for name in ("kaiming_normal_", "xavier_uniform_", "orthogonal_", "zeros_", "calculate_gain"):
        assert getattr(init, name) is getattr(torch.nn.init, name)
