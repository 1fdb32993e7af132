"""The multilayer perceptron: its layers, its weights, its derivatives, and what it refuses."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

import gdbp
from gdbp.nn import MLP
from gdbp.reference import ACTIVATIONS as TORCHS
from tests.oracle import FULL_DTYPES, compare

ACTIVATIONS = [None if name == "none" else name for name in TORCHS]


class Activation(torch.nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, x):
        return TORCHS[self.name or "none"][0](x)


def torchs(model: MLP, activation, dtype) -> torch.nn.Sequential:
    """The same network of torch's layers, with copies of its values."""
    layers = []
    for layer in list(model)[:-1]:
        if isinstance(layer, torch.nn.Linear):
            layers.append(torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None))
        elif isinstance(layer, torch.nn.BatchNorm1d):
            layers.append(torch.nn.BatchNorm1d(layer.num_features))
        else:
            layers.append(copy.deepcopy(layer))
        layers[-1].load_state_dict(layer.state_dict())
        if getattr(layer, "activation", None) is not None:
            layers.append(Activation(activation))
    layers.append(torch.nn.Linear(model[-1].in_features, model[-1].out_features))
    layers[-1].load_state_dict(model[-1].state_dict())
    return torch.nn.Sequential(*layers).to(dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("dtype", FULL_DTYPES)
def test_values_and_gradients(activation, batch_norm, dtype):
    model = MLP([7, 16, 9, 3], activation, batch_norm=batch_norm, dtype=dtype)
    other = {kind: torchs(model, activation, kind) for kind in (dtype, torch.float64)}

    def mine(x, *parameters):
        return torch.func.functional_call(model, dict(zip(dict(model.named_parameters()), parameters)), x)

    def theirs(x, *parameters):
        names = [name for name, _ in other[x.dtype].named_parameters()]
        return torch.func.functional_call(other[x.dtype], dict(zip(names, parameters)), x)

    for mode in (True, False):
        for module in (model, *other.values()):
            module.train(mode)
        x = torch.randn(33, 7, dtype=dtype, requires_grad=True)
        compare(mine, theirs, [x, *(p.detach().clone().requires_grad_() for p in model.parameters())])
        for module in other.values():
            module.load_state_dict(dict(zip(module.state_dict(), model.state_dict().values())))


def test_layers():
    assert [repr(layer) for layer in MLP([4, 8, 3])] == [
        "Linear(in_features=4, out_features=8, bias=True, activation='relu')",
        "Linear(in_features=8, out_features=3, bias=True)",
    ]
    assert repr(MLP(np.array([4, 8, 3]))) == repr(MLP([4, np.int64(8), 3])) == repr(MLP([4, 8, 3]))
    layers = list(MLP([4, 8, 8, 3], "gelu", batch_norm=True, dropout=0.2, dtype=torch.float64))
    assert [type(layer).__name__ for layer in layers] == ["Linear", "BatchNorm1d", "Dropout"] * 2 + ["Linear"]
    # The normalisation takes a bias out again.
    assert layers[0].bias is None and layers[-1].bias is not None and layers[-1].activation is None
    assert layers[1].activation == "gelu" and layers[0].activation is None and layers[2].p == 0.2
    assert all(p.dtype is torch.float64 for layer in layers for p in layer.parameters())
    (only,) = MLP([4, 3])
    assert isinstance(only, gdbp.nn.Linear) and only.activation is None
    assert MLP((4, 3), device="meta")[0].weight.is_meta


def test_is_a_sequential():
    model = MLP([4, 8, 8, 3], batch_norm=True)
    assert isinstance(model, torch.nn.Sequential) and len(model) == 5
    assert list(model.state_dict())[:3] == ["0.weight", "1.weight", "1.bias"]
    head = model[:2]
    assert type(head) is torch.nn.Sequential and head[1] is model[1] and "2.weight" in model[2:].state_dict()
    x = torch.randn(5, 4)
    model.eval()
    torch.testing.assert_close(model[2:](model[:2](x)), model(x))
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(clone(x), model(x)) and type(clone) is MLP
    converted = gdbp.nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    torch.testing.assert_close(converted(x), model(x))


@pytest.mark.parametrize("scheme", gdbp.nn.init.SCHEMES)
def test_initial_weights(scheme):
    """Hidden layers with the gain of their activation, the last with 1, all biases 0."""
    torch.manual_seed(5)
    model = MLP([400, 300, 500], "relu", init=scheme)
    hidden, last = 2**0.5, 1.0
    for layer, gain in zip(model, (hidden, last)):
        fan_in, fan_out = layer.in_features, layer.out_features
        variance = 2 / (fan_in + fan_out) if scheme.startswith("xavier") else 1 / fan_in
        assert abs(layer.weight.std().item() / (gain * variance**0.5) - 1) < 0.02
        assert not layer.bias.any()
    torch.manual_seed(5)
    assert all(map(torch.equal, MLP([400, 300, 500], "relu", init=scheme).parameters(), model.parameters()))


def test_signal_keeps_its_size():
    torch.manual_seed(1)
    x = torch.randn(256, 200)
    for activation in ("relu", "gelu", "tanh"):
        size = MLP([200] * 11, activation)(x).pow(2).mean().item()
        assert 0.05 < size < 5, activation


@pytest.mark.parametrize("activation", ["gelu", "tanh"])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_derivatives(activation, batch_norm):
    model = MLP([3, 4, 2], activation, batch_norm=batch_norm, dtype=torch.float64)
    for layer in model:
        layer.track_running_stats = False
    names = [name for name, _ in model.named_parameters()]

    def f(x, *parameters):
        return torch.func.functional_call(model, dict(zip(names, parameters)), x)

    tensors = [torch.randn(5, 3, dtype=torch.float64, requires_grad=True)]
    tensors += [p.detach().clone().requires_grad_() for p in model.parameters()]
    assert gradcheck(f, tensors, check_forward_ad=True)
    assert gradgradcheck(f, tensors)


def test_per_sample_gradients():
    model, loss = MLP([3, 8, 2], "silu"), torch.nn.functional.mse_loss
    x, y, parameters = torch.randn(6, 3), torch.randn(6, 2), dict(model.named_parameters())

    def one(parameters, x, y):
        return loss(torch.func.functional_call(model, parameters, x), y)

    each = torch.vmap(torch.func.grad(one), in_dims=(None, 0, 0))(parameters, x, y)
    for i in range(6):
        own = torch.autograd.grad(loss(model(x[i]), y[i]), list(parameters.values()))
        torch.testing.assert_close([g[i] for g in each.values()], list(own))


@pytest.mark.parametrize("batch_norm", [False, True])
def test_compile(batch_norm):
    torch._dynamo.reset()
    model = MLP([4, 8, 3], batch_norm=batch_norm)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 4)
    # The compiled one is made of layers, whose sums are in another order than those of the network in one call.
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward(), model(x).sum().backward()
    for mine, other in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(mine.grad, other.grad)
    assert all(map(torch.equal, model.buffers(), twin.buffers()))


def test_who_watches_all_modules_sees_the_layers():
    model, seen = MLP([3, 4, 2]), []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        model(torch.randn(5, 3))
    finally:
        handle.remove()
    assert seen == ["Linear", "Linear", "MLP"]


def test_without_layers():
    model, x = MLP([3, 2]), torch.randn(5, 3)
    del model[0]
    assert model(x) is x


@pytest.mark.parametrize("x_grad", [False, True])
def test_flops_are_those_of_torchs_layers(x_grad):
    def count(model):
        x = torch.randn(6, 4, requires_grad=x_grad)
        with FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        return counter.get_total_flops()

    torchs = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    assert count(MLP([4, 8, 3])) == count(gdbp.fuse(copy.deepcopy(torchs))) == count(torchs) > 0
    assert count(gdbp.nn.Linear(4, 8, activation="gelu")) == count(torch.nn.Linear(4, 8))
    ours, plain, labels = gdbp.nn.LinearCrossEntropyLoss(4, 5), torch.nn.Linear(4, 5), torch.arange(6) % 5
    assert count(lambda x: ours(x, labels)) == count(lambda x: torch.nn.functional.cross_entropy(plain(x), labels))


def test_learns_exclusive_or():
    torch.manual_seed(0)
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    y = torch.tensor([0, 1, 1, 0])
    for options in ({}, {"batch_norm": True}, {"activation": "tanh"}):
        model = MLP([2, 16, 2], **options)
        optimizer = gdbp.optim.Adam(model.parameters(), lr=0.05)
        for _ in range(200):
            optimizer.zero_grad()
            gdbp.nn.CrossEntropyLoss()(model(x), y).backward()
            optimizer.step()
        assert torch.equal(model.eval()(x).argmax(1), y), options


REFUSED = {
    "one size": (([4],), {}, r"sizes is \[4\]; expected two or more whole numbers above 0"),
    "no list": ((5,), {}, "sizes is 5; expected two or more whole numbers above 0"),
    "no units": (([4, 0, 2],), {}, r"sizes is \[4, 0, 2\]; expected"),
    "half a unit": (([4, 2.5, 2],), {}, r"sizes is \[4, 2.5, 2\]; expected"),
    "truth": (([4, True, 2],), {}, r"sizes is \[4, True, 2\]; expected"),
    "dropout": (([4, 2],), {"dropout": 1.0}, r"dropout is 1.0; expected a probability from 0"),
    "activation": (([4, 3, 2], "swish"), {}, "activation is 'swish'; expected None or one of relu"),
    "zeros": (([4, 3, 2],), {"init": "zeros"}, "'zeros' is refused: .*the symmetry is never broken"),
    "zeros of one layer": (([4, 2],), {"init": "zeros"}, "'zeros' is refused"),
    "scheme": (([4, 3, 2],), {"init": "best"}, "scheme 'best' is unknown; expected one of xavier"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    args, options, sentence = REFUSED[case]
    with pytest.raises(ValueError, match=sentence):
        MLP(*args, **options)
