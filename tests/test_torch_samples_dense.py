"""torch's own test data for the dense layer and the activations (``op_db``, ``module_db``), on ours."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gdbp
from gdbp.fusion import activations
from gdbp.nn.functional import batch_norm, linear
from tests.oracle import FLOAT_DTYPES, FULL_DTYPES, compare_samples, leaf, torchs_tables

# torch's function, and its name in op_db; and how many samples there are at least that kernels can do.
FUNCTIONS = {
    "relu": (F.relu, "nn.functional.relu", 3),
    "leaky_relu": (F.leaky_relu, "nn.functional.leaky_relu", 3),
    "gelu": (F.gelu, "nn.functional.gelu", 6),
    "silu": (F.silu, "nn.functional.silu", 3),
    "sigmoid": (torch.sigmoid, "sigmoid", 1),
    "tanh": (torch.tanh, "tanh", 1),
    "elu": (F.elu, "nn.functional.elu", 1),  # softplus: all of torch's samples have a beta or a threshold of their own
}
ACTIVATIONS = [None, "relu", "leaky_relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "elu", "softplus"]


def alone(z, activation):
    """An activation by itself: of one feature, times 1."""
    return linear(z.reshape(-1, 1), torch.ones(1, 1, dtype=z.dtype), activation=activation).reshape(z.shape)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_activation_functions(name, dtype):
    function, in_table, least = FUNCTIONS[name]

    def kernel(args, kwargs):
        return activations.of_call(function, args, kwargs)[0]

    def mine(z, *args, **kwargs):
        return alone(z, kernel(args, kwargs))

    takes = lambda input, args, kwargs: kernel(args, kwargs) is not None  # noqa: E731
    assert compare_samples(in_table, mine, function, dtype, takes) >= least


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_with_activations(activation, dtype):
    matrix = lambda input, args, kwargs: args[0].dim() == 2  # noqa: E731
    act = gdbp.reference.ACTIVATIONS[activation or "none"][0]
    count = compare_samples(
        "nn.functional.linear",
        lambda *args: linear(*args, activation=activation),
        lambda *args: act(F.linear(*args)),
        dtype,
        matrix,
    )
    assert count >= 8


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
def test_batch_norm_with_activations(activation):
    act = gdbp.reference.ACTIVATIONS[activation][0]

    def of(f):
        def call(x, mean, var, *args, **kwargs):
            return f(x, *(None if s is None else s.detach().clone() for s in (mean, var)), *args, **kwargs)

        return call

    count = compare_samples(
        "nn.functional.batch_norm",
        of(lambda *args, **kwargs: batch_norm(*args, **kwargs, activation=activation)),
        of(lambda *args, **kwargs: act(F.batch_norm(*args, **kwargs))),
        torch.float64,
    )
    assert count >= 8


def module_samples(cls, dtype, training=True):
    (info,) = (info for info in torchs_tables("common_modules").module_db if info.module_cls is cls)
    for sample in info.module_inputs_func(info, "cpu", dtype, requires_grad=True, training=training):
        made, given = sample.constructor_input, sample.forward_input
        x = given.args[0] if given.args else given.kwargs["input"]
        yield made.args, made.kwargs, leaf(x)


@pytest.mark.parametrize("dtype", FULL_DTYPES)
def test_linear_module(dtype):
    count = 0
    for args, kwargs, x in module_samples(nn.Linear, dtype):
        torch.manual_seed(count)
        mine = gdbp.nn.Linear(*args, **kwargs, dtype=dtype)
        torch.manual_seed(count)
        other = nn.Linear(*args, **kwargs, dtype=dtype)
        results = []
        for module in (mine, other):
            y = module(x)
            results.append([y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])])
        torch.testing.assert_close(*results)
        count += 1
    assert count >= 3


@pytest.mark.parametrize("cls", activations.MODULES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("dtype", FULL_DTYPES)
def test_activation_modules(cls, dtype):
    """Behind a linear layer that changes nothing, fused where there is a kernel, and the same where there is none."""
    count = 0
    for args, kwargs, x in module_samples(cls, dtype):
        module = cls(*args, **kwargs)
        layer = nn.Linear(1, 1, dtype=dtype)
        nn.init.ones_(layer.weight), nn.init.zeros_(layer.bias)
        plain, reports = nn.Sequential(layer, module), []
        model = gdbp.fuse(copy.deepcopy(plain), report=reports.append)
        assert bool(reports[0].fused) == (activations.of_module(module)[0] is not None)
        results = []
        for each in (model, plain):
            y = each(x.unsqueeze(-1)).squeeze(-1)
            results.append([y, *torch.autograd.grad(y.square().sum(), [x, *each.parameters()])])
        torch.testing.assert_close(*results)
        count += 1
    assert count >= 1
