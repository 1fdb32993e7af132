"""A whole training step of a 64-64-64-10 network: zero_grad, forward, loss, backward, update."""

from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import torch
from torch import nn

import gdbp
from benchmarks.work import COMPILED, OURS, Case, Contender, Series, Setup, Tensors, Work, powers

SIZES = (64, 64, 64, 10)
CHECK_STEPS = 3
OPTIMIZERS = {"sgd": ("SGD", {"lr": 0.1, "momentum": 0.9}), "adamw": ("AdamW", {"lr": 1e-3})}


def cases(smoke: bool) -> Iterator[Case]:
    batch = 4 if smoke else 32
    for name in OPTIMIZERS:
        yield Case("step", name, f"batch {batch}", partial(_build, name, batch))


def series(smoke: bool) -> Iterator[Series]:
    def build(batch: int, setup: Setup) -> Work:
        return _build("adamw", batch, setup)

    yield Series("step", "adamw", "batch", build, powers(1, 16 if smoke else 4**6, 4))


def _build(name: str, batch: int, setup: Setup) -> Work:
    x, labels = setup.normal(batch, SIZES[0]), setup.labels(batch, SIZES[-1])
    weights = [
        value
        for inputs, outputs in pairwise(SIZES)
        for value in (setup.normal(outputs, inputs, std=(2 / inputs) ** 0.5), setup.normal(outputs, std=0.1))
    ]
    optimizer_name, options = OPTIMIZERS[name]

    def training(network, loss, optim, x, compiled: bool = False, **implementation) -> Contender:
        with torch.no_grad():
            for p, value in zip(network.parameters(), weights):
                p.copy_(value)
        optimizer = getattr(optim, optimizer_name)(network.parameters(), **options, **implementation)
        forward = torch.compile(network) if compiled else network

        def run() -> torch.Tensor:
            optimizer.zero_grad()
            value = loss(forward(x), labels)
            value.backward()
            optimizer.step()
            return value

        def results() -> Tensors:
            losses = [run() for _ in range(CHECK_STEPS)]
            return [*losses, *(p.grad for p in network.parameters())]

        return Contender(run, results)

    def torchs(x: torch.Tensor, **how) -> Contender:
        return training(_torch_network().to(x), nn.CrossEntropyLoss(), torch.optim, x, **how)

    our_network = _our_network().to(x)
    contenders = {
        OURS: training(our_network, gdbp.nn.CrossEntropyLoss(), gdbp.optim, x),
        "torch": torchs(x),
        "torch foreach": torchs(x, foreach=True),
        "torch fused": torchs(x, fused=True),
    }
    if setup.compile:
        contenders[COMPILED] = torchs(x, compiled=True, fused=True)
    return Work(contenders, lambda: torchs(x.double()).results(), tolerance=1024, floor="rms", hot=True)


def _torch_network() -> nn.Module:
    layers = [layer for sizes in pairwise(SIZES) for layer in (nn.Linear(*sizes), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def _our_network() -> nn.Module:
    activations = [*["relu"] * (len(SIZES) - 2), None]
    layers = zip(pairwise(SIZES), activations)
    return nn.Sequential(*(gdbp.nn.Linear(*sizes, activation=name) for sizes, name in layers))
