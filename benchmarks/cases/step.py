"""A whole training step: zero_grad, forward, loss, backward, update. ``train``: in one call of TrainStep; ``modules``:
of our layers and optimizers in the usual loop; ``mlp``: of ``gdbp.nn.MLP`` there."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from torch import nn

import gdbp
from benchmarks import peers_jax
from benchmarks.work import (
    COMPILED,
    COPY_MINIMUM,
    OURS,
    Case,
    Contender,
    Goal,
    Limit,
    Series,
    Setup,
    Tensors,
    Work,
    powers,
)
from gdbp.ops.mlp import factors_of

SMALL = (64, 64, 64, 10)
DEEP = (64,) * 8 + (10,)
OPTIMIZERS = {"sgd": ("SGD", {"lr": 0.1, "momentum": 0.9}), "adam": ("Adam", {}), "adamw": ("AdamW", {"lr": 1e-3})}
# What Adam moves for a parameter: gradient read, parameter and states read and written.
ADAM_BYTES = 28


class Row(NamedTuple):
    """Steps of a network. `steps`: in one repetition, over as many batches; more than one is TrainStep.many.
    `narrow`: in one kernel on CUDA, where there is no bare product to compare with."""

    sizes: tuple[int, ...]
    batch: int
    goal: Goal
    steps: int = 1
    narrow: bool = False
    dtype: torch.dtype = torch.float32


# Peers are torch's eager loop (its fused optimizer among them) and torch.compile; the limit is the bare products, and
# the update's traffic where that is not in cache.
ROWS = (
    Row(SMALL, 32, Goal(ratio=10, limit=0.5)),
    Row((784, 128, 10), 64, Goal(ratio=2.5)),
    Row((784, 512, 512, 10), 128, Goal(ratio=1.3)),
    Row((1024, 1024, 1024, 1024, 10), 256, Goal(ratio=1.05, limit=0.9)),
    Row(DEEP, 4096, Goal(ratio=1.7)),
    Row((16, 16, 1), 1, Goal(ratio=50), steps=32),
)


# On CUDA, in one kernel; there torch.compile captures CUDA graphs.
NARROW_ROWS = (
    Row((64,) * 5 + (10,), 2**16, Goal(ratio=4, peer=COMPILED), narrow=True, dtype=torch.bfloat16),
    Row((128,) * 4 + (10,), 2**16, Goal(ratio=2.5, peer=COMPILED), narrow=True, dtype=torch.bfloat16),
    Row((64,) * 5 + (10,), 256, Goal(ratio=4, peer=COMPILED), narrow=True, dtype=torch.bfloat16),
    # Of float32 gradients over more rows torch's own digits are too few to compare with.
    Row((64,) * 5 + (10,), 2**13, None, narrow=True),
)
INFERENCE_ROWS = (
    Row((64,) * 5 + (64,), 2**20, Goal(limit=0.5)),
    Row((128,) * 3 + (128,), 2**20, Goal(limit=0.5)),
)


def cases(smoke: bool) -> Iterator[Case]:
    for row in ROWS:
        row = _smoke(row) if smoke else row
        name = "train" if row.steps == 1 else "train_many"
        yield Case("step", name, _title(row), partial(_build, row, "adam", True), row.goal)
    for row in NARROW_ROWS[:1] if smoke else NARROW_ROWS:
        row = _smoke(row) if smoke else row
        build = partial(_build, row, "sgd" if smoke else "adam", True)
        yield Case("step", "train_narrow", _title(row), build, row.goal, row.dtype, "cuda")
    for row in INFERENCE_ROWS[:1] if smoke else INFERENCE_ROWS:
        row = _smoke(row) if smoke else row
        yield Case("step", "infer", _title(row), partial(_infer, row), row.goal, torch.bfloat16, "cuda")
    for name in ("sgd", "adamw"):
        row = Row(SMALL, 4 if smoke else 32, Goal())
        yield Case("step", f"modules_{name}", _title(row), partial(_build, row, name, False))
    for sizes, batch in ((SMALL, 32),) if smoke else ((SMALL, 32), (DEEP, 4096)):
        row = Row(sizes, batch, Goal())
        row = _smoke(row) if smoke else row
        yield Case("step", "mlp_adamw", _title(row), partial(_build, row, "adamw", False, own=gdbp.nn.MLP))


def series(smoke: bool) -> Iterator[Series]:
    def build(batch: int, setup: Setup) -> Work:
        return _build(Row(SMALL, batch, Goal()), "adamw", False, setup)

    yield Series("step", "modules_adamw", "batch", build, powers(1, 16 if smoke else 4**6, 4))


def _smoke(row: Row) -> Row:
    sizes = tuple(min(size, 12) for size in row.sizes[-4:])
    return row._replace(sizes=sizes, batch=min(row.batch, 4), steps=min(row.steps, 4))


def _compile(network: nn.Module, device: str) -> Callable:
    return torch.compile(network, mode="reduce-overhead" if device == "cuda" else None)


def _title(row: Row) -> str:
    """Such as ``64x3-10/32``: three widths of 64, then 10, at batch 32."""
    runs = [(width, len(list(same))) for width, same in groupby(row.sizes)]
    return "-".join(f"{width}x{count}" if count > 1 else f"{width}" for width, count in runs) + f"/{row.batch}"


def _build(row: Row, optimizer_name: str, in_one_call: bool, setup: Setup, own: Callable | None = None) -> Work:
    sizes, batch, steps = row.sizes, row.batch, row.steps
    x = setup.normal(batch * steps, sizes[0])
    classes = sizes[-1] > 1
    target = setup.labels(batch * steps, sizes[-1]) if classes else setup.normal(batch * steps, 1)
    weights = [
        value
        for inputs, outputs in pairwise(sizes)
        for value in (setup.normal(outputs, inputs, std=(2 / inputs) ** 0.5), setup.normal(outputs, std=0.1))
    ]
    class_name, options = OPTIMIZERS[optimizer_name]

    def training(network, library, optim, x, target, make_loop, compiled=False, **implementation) -> Contender:
        network = network.to(x)
        with torch.no_grad():
            for p, value in zip(network.parameters(), weights):
                p.copy_(value)
        optimizer = getattr(optim, class_name)(network.parameters(), **options, **implementation)
        loss = library.CrossEntropyLoss() if classes else library.MSELoss()
        run, keep_grads = make_loop(
            _compile(network, setup.device) if compiled else network, loss, optimizer, x, target
        )

        def results() -> Tensors:
            # The gradients of the first step, and two losses, for Adam makes a gradient of nothing but rounding a step
            # like any other, of either sign.
            keep_grads(True)
            first = run()
            gradients = [p.grad.clone() for p in network.parameters()]
            keep_grads(False)
            return [first.to(x.dtype), *gradients, run().to(x.dtype)]

        return Contender(run, results)

    def loop(network, loss, optimizer, x, target) -> tuple[Callable, Callable]:
        batches = list(zip(x.split(batch), target.split(batch)))

        def run() -> torch.Tensor:
            for inputs, targets in batches:
                optimizer.zero_grad()
                value = loss(network(inputs), targets)
                value.backward()
                optimizer.step()
            return value

        return run, lambda keep: None

    def one_call(network, loss, optimizer, x, target) -> tuple[Callable, Callable]:
        # Half types have no fused form on the CPU.
        step = gdbp.TrainStep(network, loss, optimizer, strict=not x.is_cpu or x.element_size() > 2)
        if steps == 1:
            return lambda: step(x, target), partial(setattr, step, "keep_grads")
        return lambda: step.many((x, target), batch, shuffle=False)[-1], partial(setattr, step, "keep_grads")

    def torchs(x, target, **how) -> Contender:
        return training(_torch_network(sizes), nn, torch.optim, x, target, loop, **how)

    ours = training((own or _our_network)(sizes), gdbp.nn, gdbp.optim, x, target, one_call if in_one_call else loop)
    contenders = {OURS: ours, "torch": torchs(x, target), "torch fused": torchs(x, target, fused=True)}
    # Where it is the peer that the goal names, unasked.
    if setup.compile or row.narrow:
        contenders[COMPILED] = torchs(x, target, compiled=True, fused=True)
    if optimizer_name == "adam":
        setup.add(contenders, "jax", lambda optax: peers_jax.training(optax, weights, x, target, batch))
    # Nobody asks for the gradient of the input.
    flops = 6 * sum(inputs * outputs for inputs, outputs in pairwise(sizes)) - 2 * sizes[0] * sizes[1]
    wide = (t.double() if t.is_floating_point() else t for t in (x, target))
    return Work(
        contenders,
        torchs(*wide).results,
        tolerance=4096,
        floor="rms",
        limit=_products(row, setup) if in_one_call and not row.narrow else None,
        flops=batch * steps * flops if row.narrow else 0,
        hot=True,
    )


def _infer(row: Row, setup: Setup) -> Work:
    """A forward pass without gradients, of gdbp.nn.MLP and of torch's layers; the limit copies what goes in and out."""
    x = setup.normal(row.batch, row.sizes[0])

    def network(of: Callable, dtype: torch.dtype) -> nn.Module:
        torch.manual_seed(0)
        values = gdbp.nn.MLP(row.sizes).parameters()
        made = of(row.sizes).to(setup.device, dtype)
        with torch.no_grad():
            for p, value in zip(made.parameters(), values):
                p.copy_(value.to(setup.dtype))
        return made.requires_grad_(False)

    def contender(net: Callable, x: torch.Tensor) -> Contender:
        return Contender(lambda: net(x), lambda: [net(x).clone()])

    def in_one_kernel(net: nn.Module) -> Callable:
        # Also beyond the rows where it is of use.
        layers = [(layer.weight, layer.bias) for layer in net]
        return lambda x: torch.ops.gdbp.mlp(x, *map(list, zip(*layers)), "relu", factors_of(x.dtype))

    contenders = {
        OURS: contender(in_one_kernel(network(gdbp.nn.MLP, setup.dtype)), x),
        "torch": contender(network(_torch_network, setup.dtype), x),
    }
    if setup.compile or setup.device == "cuda":
        contenders[COMPILED] = contender(_compile(network(_torch_network, setup.dtype), setup.device), x)
    traffic = row.batch * (row.sizes[0] + row.sizes[-1]) * x.element_size()
    per_row = traffic // row.batch
    return Work(
        contenders,
        contender(network(_torch_network, torch.float64), x.double()).results,
        tolerance=256,
        floor="rms",
        limit=setup.copy_limit(traffic, f"{per_row} B a row"),
        bytes=traffic,
        flops=2 * row.batch * sum(inputs * outputs for inputs, outputs in pairwise(row.sizes)),
    )


def _products(row: Row, setup: Setup) -> Limit:
    """The matrix products of the steps, bare, into memory that is there; and a copy that moves what the update does."""
    products = []
    for layer, (inputs, outputs) in enumerate(pairwise(row.sizes)):
        x, weight = setup.normal(row.batch, inputs), setup.normal(outputs, inputs)
        z, grad_x, grad_weight = setup.normal(row.batch, outputs), torch.empty_like(x), torch.empty_like(weight)
        products += [(x, weight.t(), z), (z.t(), x, grad_weight)]
        if layer:
            products.append((z, weight, grad_x))
    traffic = ADAM_BYTES * sum(inputs * outputs for inputs, outputs in pairwise(row.sizes))
    traffic = traffic if traffic > 16 * COPY_MINIMUM else 0
    source = torch.ones(traffic // 8, device=setup.device)
    copy = torch.zeros_like(source)

    def run() -> None:
        for _ in range(row.steps):
            for a, b, out in products:
                torch.mm(a, b, out=out)
            if traffic:
                copy.copy_(source)

    return Limit("bare products" + (f" and a copy, {ADAM_BYTES} B a weight" if traffic else ""), run)


def _torch_network(sizes: tuple[int, ...]) -> nn.Module:
    layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def _our_network(sizes: tuple[int, ...]) -> nn.Module:
    activations = [*["relu"] * (len(sizes) - 2), None]
    layers = zip(pairwise(sizes), activations)
    return nn.Sequential(*(gdbp.nn.Linear(*pair, activation=name) for pair, name in layers))
