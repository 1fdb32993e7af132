"""Linear layers with their activation, forward and backward, gradients for input, weight and bias."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

import gdbp.nn.functional as ours
from benchmarks.work import COMPILED, OURS, Case, Contender, Goal, Limit, Setup, Tensors, Work

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}


def cases(smoke: bool) -> Iterator[Case]:
    # (rows, in, out, goal for relu, goal for gelu)
    sizes = [(32, 64, 64, Goal(1.5), Goal(2.5)), (128, 1024, 4096, None, Goal(limit=1 / 1.05))]
    if smoke:
        sizes = [(3, 5, 7, None, None)]
    yield Case("linear", "call", "4x4", partial(_build, 4, 4, 4, "relu", True), Goal(1 / 1.3))
    for rows, inputs, outputs, *goals in sizes:
        for activation, goal in zip(ACTIVATIONS, goals):
            build = partial(_build, rows, inputs, outputs, activation, False)
            yield Case("linear", activation, f"{rows}x{inputs}x{outputs}", build, goal)


def _build(rows: int, inputs: int, outputs: int, activation: str, call: bool, setup: Setup) -> Work:
    x, weight = setup.normal(rows, inputs), setup.normal(outputs, inputs, std=inputs**-0.5)
    bias, grad = setup.normal(outputs), setup.normal(rows, outputs)

    def torch_layer(x, weight, bias):
        return ACTIVATIONS[activation](F.linear(x, weight, bias))

    def our_layer(x, weight, bias):
        return ours.linear(x, weight, bias, activation=activation)

    def contender(layer) -> Contender:
        run = partial(_run, layer, grad, *(t.clone().requires_grad_() for t in (x, weight, bias)))
        return Contender(run, run)

    def reference() -> Tensors:
        return _run(torch_layer, grad.double(), *(t.double().requires_grad_() for t in (x, weight, bias)))

    contenders = {OURS: contender(our_layer), "torch": contender(torch_layer)}
    if setup.compile:
        contenders[COMPILED] = contender(torch.compile(torch_layer))
    return Work(
        contenders,
        reference,
        tolerance=256,
        floor="rms",
        limit=None if call else _gemms(x, weight, grad),
        flops=0 if call else 6 * rows * inputs * outputs,
        hot=call,
    )


def _run(layer, grad, x, weight, bias) -> Tensors:
    output = layer(x, weight, bias)
    output.backward(grad)
    results = (output, x.grad, weight.grad, bias.grad)
    x.grad = weight.grad = bias.grad = None
    return results


def _gemms(x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> Limit:
    """The three products of a layer, into memory that is there."""
    output, grad_x, grad_weight = torch.empty_like(grad), torch.empty_like(x), torch.empty_like(weight)

    def run():
        torch.mm(x, weight.t(), out=output)
        torch.mm(grad, weight, out=grad_x)
        torch.mm(grad.t(), x, out=grad_weight)

    return Limit("GEMMs", run)
