"""Batch normalisation with ReLU in training, alone and behind a linear layer, forward and backward."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

import gdbp.nn.functional as ours
from benchmarks.work import COMPILED, OURS, Case, Contender, Goal, Limit, Setup, Tensors, Work


def cases(smoke: bool) -> Iterator[Case]:
    rows, inputs, channels = (5, 3, 7) if smoke else (4096, 256, 256)
    goal = None if smoke else Goal(1.5)
    yield Case("norm", "bn_relu", f"{rows}x{channels}", partial(_build, rows, None, channels), goal)
    size = f"{rows}x{inputs}x{channels}"
    yield Case("norm", "linear_bn_relu", size, partial(_build, rows, inputs, channels), goal)


def _build(rows: int, inputs: int | None, channels: int, setup: Setup) -> Work:
    norm = setup.away_from_zero(channels), setup.normal(channels)
    if inputs is None:
        tensors = setup.normal(rows, channels), *norm
        torchs, mine = _torch_norm, partial(ours.batch_norm, training=True, activation="relu")
    else:
        weight, bias = setup.normal(channels, inputs, std=inputs**-0.5), setup.normal(channels)
        tensors = setup.normal(rows, inputs), *norm, weight, bias
        torchs, mine = _torch_linear_norm, _our_linear_norm
    # Elements so close to ReLU's corner that rounding takes them across it must not count.
    exact = [t.double() for t in tensors]
    stats = [torch.zeros(channels).to(exact[0]) for _ in range(2)]
    z = torchs(exact[0], *stats, *exact[1:], activate=False)
    grad = setup.normal(rows, channels).masked_fill_(z.abs() < 2e-3, 0)

    def contender(layer) -> Contender:
        running = [torch.zeros(channels, device=grad.device, dtype=grad.dtype) for _ in range(2)]
        run = partial(_run, layer, grad, running, *(t.clone().requires_grad_() for t in tensors))
        return Contender(run, run)

    def reference() -> Tensors:
        return _run(torchs, grad.double(), stats, *(t.requires_grad_() for t in exact))

    contenders = {OURS: contender(mine), "torch": contender(torchs)}
    if setup.compile:
        contenders[COMPILED] = contender(torch.compile(torchs))
    # Forward reads the input for its statistics and again to write the output; backward reads input and gradient
    # for their sums and again to write the input's gradient.
    traffic = 8 * grad.nbytes
    copy = setup.copy_limit(traffic, f"{8 * grad.itemsize} B an element")
    limit = copy if inputs is None else _gemms(tensors[0], tensors[3], grad)
    flops = 0 if inputs is None else 6 * rows * inputs * channels
    return Work(contenders, reference, tolerance=256, floor="rms", limit=limit, bytes=traffic, flops=flops)


def _torch_norm(x, mean, var, weight, bias, activate=True):
    z = F.batch_norm(x, mean, var, weight, bias, training=True)
    return F.relu(z) if activate else z


def _torch_linear_norm(x, mean, var, norm_weight, norm_bias, weight, bias, activate=True):
    return _torch_norm(F.linear(x, weight, bias), mean, var, norm_weight, norm_bias, activate)


def _our_linear_norm(x, mean, var, norm_weight, norm_bias, weight, bias):
    args = x, weight, bias, mean, var, norm_weight, norm_bias
    return ours.linear_batch_norm(*args, training=True, activation="relu")


def _run(layer, grad, running, x, *parameters) -> Tensors:
    output = layer(x, *running, *parameters)
    output.backward(grad)
    # The gradient of a linear layer's bias is 0 here, and torch's is rounding noise: there is nothing to compare.
    results = (output, x.grad, *(p.grad for p in parameters[:3]))
    for t in (x, *parameters):
        t.grad = None
    return results


def _gemms(x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> Limit:
    """The three products of a linear layer, into memory that is there."""
    output, grad_x, grad_weight = torch.empty_like(grad), torch.empty_like(x), torch.empty_like(weight)

    def run():
        torch.mm(x, weight.t(), out=output)
        torch.mm(grad, weight, out=grad_x)
        torch.mm(grad.t(), x, out=grad_weight)

    return Limit("GEMMs", run)
