"""``gdbp.TrainStep`` against the eager loop of the same modules, loss and optimizer."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gdbp
from gdbp import nn, optim
from tests.training import CLASSES, FEATURES, close, data, eager, network, same_state, same_training

OPTIMIZERS = {
    "sgd": (optim.SGD, {"lr": 0.1}),
    "momentum": (optim.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}),
    "nesterov": (optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "maximize": True}),
    "rmsprop": (optim.RMSprop, {"lr": 1e-3, "momentum": 0.5, "centered": True}),
    "adam": (optim.Adam, {"amsgrad": True, "weight_decay": 0.1}),
    "adamw": (optim.AdamW, {"lr": 1e-2}),
    "adamax": (optim.Adamax, {}),
    "nadam": (optim.NAdam, {}),
    "radam": (optim.RAdam, {}),
    "adagrad": (optim.Adagrad, {"lr_decay": 0.1}),
    "adadelta": (optim.Adadelta, {}),
    "lion": (optim.Lion, {"lr": 1e-3, "weight_decay": 0.1}),
    "l1": (optim.SGD, {"lr": 0.1, "l1": 0.01, "l1_mode": "prox"}),
    "clip_value": (optim.SGD, {"lr": 0.1, "clip_value": 0.01}),
    "max_grad_norm": (optim.AdamW, {"max_grad_norm": 0.1}),
    "skip_nonfinite": (optim.AdamW, {"skip_nonfinite": True}),
    "ema": (optim.AdamW, {"ema_decay": 0.9}),
    "copy": (optim.AdamW, {"copy_dtype": torch.bfloat16}),
    "8bit": (optim.AdamW, {"state_dtype": "8bit"}),
    "bfloat16 states": (optim.AdamW, {"state_dtype": torch.bfloat16}),
    "torch sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "torch rmsprop": (torch.optim.RMSprop, {"lr": 1e-3}),
    "torch adam": (torch.optim.Adam, {"amsgrad": True}),
    "torch adamw": (torch.optim.AdamW, {"fused": True}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name):
    cls, options = OPTIMIZERS[name]
    # 8-bit states have steps of their own, and a small difference may cross one; Lion takes signs.
    factor = {"8bit": 200, "lion": 200, "bfloat16 states": 400}.get(name, 1)
    hidden = (80, 70) if name == "8bit" else (16, 7)
    same_training(
        network(*hidden),
        nn.CrossEntropyLoss(),
        lambda model: cls(model.parameters(), **options),
        [data(seed=i) for i in range(6)],
        factor,
    )


LOSSES = {
    "cross_entropy": (nn.CrossEntropyLoss(), "labels"),
    "cross_entropy sum": (nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.1, z_loss=1e-3), "labels"),
    "cross_entropy weights": (nn.CrossEntropyLoss(torch.rand(CLASSES), ignore_index=2, softcap=5.0), "labels"),
    "cross_entropy probabilities": (nn.CrossEntropyLoss(), "probabilities"),
    "torch cross_entropy": (torch.nn.CrossEntropyLoss(label_smoothing=0.1), "labels"),
    "function": (nn.functional.cross_entropy, "labels"),
    "mse": (nn.MSELoss(), "values"),
    "l1": (nn.L1Loss(reduction="sum"), "values"),
    "huber": (nn.HuberLoss(delta=0.3), "values"),
    "smooth_l1": (nn.SmoothL1Loss(beta=0.3), "values"),
    "smooth_l1 at 0": (nn.SmoothL1Loss(beta=0.0), "values"),
    "bce": (nn.BCEWithLogitsLoss(), "values"),
    "bce factors": (nn.BCEWithLogitsLoss(torch.rand(CLASSES), pos_weight=torch.rand(CLASSES)), "values"),
    "torch mse": (torch.nn.functional.mse_loss, "values"),
}


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, rows):
    loss, target = LOSSES[name]
    batches = [data(rows, target=target, seed=i) for i in range(3)]
    same_training(network(9), loss, lambda model: optim.SGD(model.parameters(), lr=0.05), batches)


def modules(activation):
    names = ("relu", "leaky_relu", "gelu", "silu", "sigmoid", "tanh", "elu", "softplus")
    classes = ("ReLU", "LeakyReLU", "GELU", "SiLU", "Sigmoid", "Tanh", "ELU", "Softplus")
    if activation == "gelu_tanh":
        return torch.nn.GELU(approximate="tanh")
    return getattr(torch.nn, dict(zip(names, classes))[activation])()


ACTIVATIONS = ["relu", "leaky_relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "elu", "softplus"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    """Fused with a layer, as modules of torch behind one, after a batch norm, on their own, and at the end."""
    model = torch.nn.Sequential(
        modules(activation),
        nn.Linear(FEATURES, 9, activation=activation),
        torch.nn.Linear(9, 8),
        modules(activation),
        modules(activation),
        nn.BatchNorm1d(8, activation=activation),
        torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(8, 7, bias=False), torch.nn.BatchNorm1d(7)),
        modules(activation),
        nn.Linear(7, CLASSES, activation=activation),
    )
    batches = [data(17, target="values", seed=i) for i in range(4)]
    same_training(model, nn.MSELoss(), lambda model: optim.SGD(model.parameters(), lr=0.1), batches, factor=5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"eps": 0.1, "momentum": 0.5}],
)
def test_batch_norm(options, training):
    model = torch.nn.Sequential(
        nn.Linear(FEATURES, 8), nn.BatchNorm1d(8, activation="tanh", **options), nn.Linear(8, CLASSES)
    )
    model.train(training)
    batches = [data(seed=i) for i in range(4)]
    same_training(model, nn.CrossEntropyLoss(), lambda m: optim.SGD(m.parameters(), lr=0.1), batches, factor=5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mlp_and_flatten(dtype):
    model = torch.nn.Sequential(
        torch.nn.Flatten(), nn.MLP([12, 8, 6, 1], "gelu", batch_norm=True, dtype=dtype), torch.nn.Flatten(0)
    )
    batches = [(torch.randn(9, 3, 4, dtype=dtype), torch.randn(9, dtype=dtype)) for _ in range(4)]
    same_training(model, nn.HuberLoss(), lambda m: optim.AdamW(m.parameters()), batches, factor=20)


def test_linear_cross_entropy_brings_its_own_layer():
    model, loss = network(9, outputs=7), nn.LinearCrossEntropyLoss(7, CLASSES, bias=True, label_smoothing=0.1)
    twin, other_loss = copy.deepcopy(model), copy.deepcopy(loss)
    make = lambda m, loss: optim.SGD([*m.parameters(), *loss.parameters()], lr=0.1)  # noqa: E731
    optimizer, other = make(model, loss), make(twin, other_loss)
    step = gdbp.TrainStep(model, loss, optimizer)
    for i in range(4):
        x, y = data(seed=i)
        close(step(x, y), eager(twin, other_loss, other, x, y))
    same_state(model, optimizer, twin, other)
    close(loss.linear.weight, other_loss.linear.weight)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.integers(1, 70),
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=5),
    activation=st.sampled_from([None, *ACTIVATIONS]),
    wide=st.booleans(),
    clip=st.booleans(),
    keep=st.booleans(),
    seed=st.integers(0, 100),
)
def test_random_networks(rows, sizes, activation, wide, clip, keep, seed):
    dtype = torch.float64 if wide else torch.float32
    torch.manual_seed(seed)
    model = nn.MLP(sizes, activation, dtype=dtype)
    batches = [data(rows, sizes[0], sizes[-1], dtype, "values", seed + i) for i in range(3)]
    make = lambda m: optim.SGD(m.parameters(), lr=0.01, momentum=0.5, max_grad_norm=1.0 if clip else None)  # noqa: E731
    same_training(model, nn.MSELoss(), make, batches, factor=5, keep_grads=keep)
