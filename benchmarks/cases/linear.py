"""Linear layers with their activation, forward and backward, gradients for input, weight and bias."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

import gdbp
import gdbp.nn.functional as ours
from benchmarks.work import COMPILED, OURS, Case, Contender, Goal, Limit, Series, Setup, Tensors, Work, powers

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


class Layer(NamedTuple):
    """A case: its rows, input and output features, and the only dtype and device to measure, if any.

    Without input features a layer is its bias and activation alone.
    """

    activation: str
    size: tuple[int, int, int]
    goal: Goal | None = None
    dtype: torch.dtype | None = None
    device: str | None = None

    @property
    def name(self) -> str:
        return self.activation if self.size[1] else f"bias_{self.activation}"


LAYERS = [
    Layer("relu", (1, 16, 16)),
    Layer("gelu", (8, 32, 32)),
    Layer("relu", (32, 64, 64), Goal(1.5)),
    Layer("gelu", (32, 64, 64), Goal(2.5)),
    Layer("relu", (128, 1024, 4096)),
    Layer("gelu", (128, 1024, 4096), Goal(limit=1 / 1.05)),
    Layer("gelu", (1024, 1024, 4096), Goal(limit=1 / 1.05)),
    Layer("gelu", (1024, 1024, 4096), Goal(limit=1 / 1.1), torch.bfloat16),
    *(Layer(activation, (4096, 0, 4096), Goal(2.0)) for activation in ("gelu", "silu", "tanh")),
    Layer("gelu", (8192, 4096, 16384), Goal(1.0, limit=0.95), torch.bfloat16, "cuda"),
    Layer("gelu", (8192, 0, 16384), Goal(limit=0.9), torch.bfloat16, "cuda"),
]


def cases(smoke: bool) -> Iterator[Case]:
    yield Case("linear", "call", "4x4", partial(_build, 4, 4, 4, "relu", True), Goal(1 / 1.3))
    layers = LAYERS
    if smoke:  # one layer of each kind
        kinds = {(layer.name, layer.dtype): layer for layer in LAYERS if layer.device is None}.values()
        layers = [layer._replace(size=(3, min(layer.size[1], 5), 7), goal=None) for layer in kinds]
    for layer in layers:
        build = partial(_build, *layer.size, layer.activation, False)
        yield Case("linear", layer.name, "x".join(map(str, layer.size)), build, layer.goal, layer.dtype, layer.device)


def series(smoke: bool) -> Iterator[Series]:
    def build(rows: int, setup: Setup) -> Work:
        return _build(rows, 64, 64, "relu", False, setup)

    yield Series("linear", "relu", "batch", build, powers(1, 16 if smoke else 4**6, 4))


def _build(rows: int, inputs: int, outputs: int, activation: str, call: bool, setup: Setup) -> Work:
    x, weight = setup.normal(rows, inputs), setup.normal(outputs, inputs, std=max(inputs, 1) ** -0.5)
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
        **({} if call else _gemms(x, weight, grad) if inputs else _activation(grad, setup)),
        hot=call,
    )


def _run(layer, grad, x, weight, bias) -> Tensors:
    output = layer(x, weight, bias)
    output.backward(grad)
    results = (output, x.grad, weight.grad, bias.grad)
    x.grad = weight.grad = bias.grad = None
    return results


def _gemms(x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> dict[str, Any]:
    """The three products of a layer, into memory that is there; in float32 where the CPU has none for x's dtype."""
    name = "the 3 GEMMs"
    native = ("float32", "float64", *gdbp.build_info()["half_products"])
    if x.is_cpu and str(x.dtype).removeprefix("torch.") not in native:
        name, x, weight, grad = f"{name} in float32", x.float(), weight.float(), grad.float()
    output, grad_x, grad_weight = torch.empty_like(grad), torch.empty_like(x), torch.empty_like(weight)

    def run():
        torch.mm(x, weight.t(), out=output)
        torch.mm(grad, weight, out=grad_x)
        torch.mm(grad.t(), x, out=grad_weight)

    return {"limit": Limit(name, run), "flops": 2 * 3 * x.numel() * weight.shape[0]}


def _activation(grad: torch.Tensor, setup: Setup) -> dict[str, Any]:
    """Pre-activation read and output written; gradient and saved tensor read, gradient written."""
    traffic = 5 * grad.nbytes
    return {"limit": setup.copy_limit(traffic, f"{5 * grad.itemsize} B an element"), "bytes": traffic}
