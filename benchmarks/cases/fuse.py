"""A model of torch's layers before and after ``gdbp.fuse``: forward, and backward to all parameters."""

import copy
from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import torch
from torch import nn

import gdbp
from benchmarks.work import COMPILED, OURS, Case, Contender, Setup, Tensors, Work

SMALL, LARGE = (32, (64, 64, 64, 10)), (1024, (256, 1024, 1024, 256))


def cases(smoke: bool) -> Iterator[Case]:
    for name, batch_norm in (("gelu_net", False), ("bn_silu_net", True)):
        for batch, sizes in [(4, (5, 7, 3))] if smoke else [SMALL, LARGE]:
            build = partial(_build, batch, sizes, batch_norm)
            yield Case("fuse", name, f"{batch}x{'-'.join(map(str, sizes))}", build)


def _build(batch: int, sizes: tuple[int, ...], batch_norm: bool, setup: Setup) -> Work:
    x, grad = setup.normal(batch, sizes[0]), setup.normal(batch, sizes[-1])
    model = _network(sizes, batch_norm).to(x)
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.Linear):
                layer.weight.copy_(setup.normal(*layer.weight.shape, std=layer.in_features**-0.5))

    def contender(model: nn.Module, x: torch.Tensor, grad: torch.Tensor, compiled: bool = False) -> Contender:
        forward = torch.compile(model) if compiled else model
        # The gradient of a bias in front of batch norm is 0, and torch's is rounding noise: nothing to compare.
        parameters = [p for name, p in model.named_parameters() if not (batch_norm and name.endswith("bias"))]

        def run() -> Tensors:
            output = forward(x)
            output.backward(grad)
            results = (output, *(p.grad for p in parameters))
            model.zero_grad()
            return results

        return Contender(run, run)

    contenders = {
        OURS: contender(gdbp.fuse(copy.deepcopy(model)), x, grad),
        "torch": contender(copy.deepcopy(model), x, grad),
    }
    if setup.compile:
        contenders[COMPILED] = contender(copy.deepcopy(model), x, grad, compiled=True)
    # Nobody asks for the gradient of the input.
    flops = 6 * batch * sum(a * b for a, b in pairwise(sizes)) - 2 * batch * sizes[0] * sizes[1]
    exact = copy.deepcopy(model).double()
    return Work(
        contenders,
        lambda: contender(exact, x.double(), grad.double()).results(),
        tolerance=1024,
        floor="rms",
        flops=flops,
        hot=batch == SMALL[0],
    )


def _network(sizes: tuple[int, ...], batch_norm: bool) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes[:-1]):
        layers.append(nn.Linear(inputs, outputs))
        layers += [nn.BatchNorm1d(outputs), nn.SiLU()] if batch_norm else [nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(*sizes[-2:]))
