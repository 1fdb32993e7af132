"""Optimizer steps: one large tensor, many small ones, a small network."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

import gdbp
from benchmarks import peers
from benchmarks.rules import GPT, LARGE, MANY, RESNET, RULES, SMALL, Rule
from benchmarks.work import COMPILED, OURS, Case, Contender, Series, Setup, Tensors, Work, powers

# Of a large tensor so many elements, evenly spread, are checked; the rules act on each element alone.
CHECK_ELEMENTS = 2**16
# Relative error of the first steps of Adam and its kin where 1 - beta**t is formed in float32.
FLOAT_CLOCK_LOSS = 2**-15
FLOAT_CLOCKS = (COMPILED, "deepspeed")


def _resnet50() -> Iterator[tuple[int, ...]]:
    """Parameters of He et al., 2016, table 1: convolutions, and a scale and an offset for each channel."""

    def convolution(outputs: int, inputs: int, side: int) -> Iterator[tuple[int, ...]]:
        yield from ((outputs, inputs, side, side), (outputs,), (outputs,))

    yield from convolution(64, 3, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield from convolution(width, inputs, 1)
            yield from convolution(width, width, 3)
            yield from convolution(4 * width, width, 1)
            if block == 0:
                yield from convolution(4 * width, inputs, 1)
            inputs = 4 * width
    yield from ((1000, inputs), (1000,))


def _gpt2() -> Iterator[tuple[int, ...]]:
    """Those of the smallest GPT-2 (Radford et al., 2019), its head tied."""
    width = 768
    yield from ((50257, width), (1024, width))
    for _ in range(12):
        for outputs, inputs in ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width)):
            yield from ((outputs, inputs), (outputs,))
        yield from [(width,)] * 4
    yield from [(width,)] * 2


SIZES = {
    LARGE: [(2**26,)],
    MANY: [(64,)] * 1000,
    SMALL: [(128, 784), (128,), (10, 128), (10,)],
    RESNET: list(_resnet50()),
    GPT: list(_gpt2()),
}
SMOKE_SIZES = {"256 K": [(2**18,)], "3 x 17": [(17,)] * 3}


def cases(smoke: bool) -> Iterator[Case]:
    for size, shapes in (SMOKE_SIZES if smoke else SIZES).items():
        for name, rule in RULES.items():
            if smoke or size in rule.sizes:
                build = partial(_build, rule, shapes)
                device = "cuda" if size in (RESNET, GPT) else None
                yield Case("optim", name, size, build, rule.goals.get(size), rule.dtype, device)


def series(smoke: bool) -> Iterator[Series]:
    def large(count: int, setup: Setup) -> Work:
        return _build(RULES["adamw"], [(count,)], setup)

    def many(count: int, setup: Setup) -> Work:
        return _build(RULES["adamw"], [(64,)] * count, setup)

    def threads(_: int, setup: Setup) -> Work:
        return large(2**10 if smoke else 2**24, setup)

    yield Series("optim", "adamw", "params", large, powers(4**5, 4**7 if smoke else 4**13, 4))
    yield Series("optim", "adamw", "tensors", many, powers(1, 4 if smoke else 4**6, 2 if smoke else 4))
    yield Series("optim", "adamw", "threads", threads, powers(1, torch.get_num_threads(), 2))


def _build(rule: Rule, shapes: list[tuple[int, ...]], setup: Setup) -> Work:
    start = [setup.away_from_zero(*shape) for shape in shapes]
    grads = [setup.away_from_zero(*shape) for shape in shapes]
    count = sum(p.numel() for p in start)
    stride = max(1, count // CHECK_ELEMENTS)

    def sample(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().reshape(-1)[::stride].clone()

    sampled_start, sampled_grads = list(map(sample, start)), list(map(sample, grads))

    def contender(peer: peers.Peer, params: peers.Parameters, compiled: bool = False) -> Contender:
        if compiled:
            peer = peer._replace(step=torch.compile(peer.step))
        return Contender(peer.step, partial(_after_steps, rule, peer, params, grads, sample))

    def ours() -> Contender:
        params = _parameters([p.clone() for p in start], grads)
        return contender(peers.plain(partial(rule.make, gdbp.optim, **rule.extras), params), params)

    def torchs(compiled: bool = False, **implementation) -> Contender:
        params = _parameters([p.clone() for p in start], grads)
        return contender(rule.peer(partial(rule.make, torch.optim, **implementation), params), params, compiled)

    def another(name: str, options: dict[str, Any], module) -> Contender:
        params = _parameters([p.clone() for p in start], grads)
        return contender(peers.plain(partial(getattr(module, name), **rule.options, **options), params), params)

    def reference() -> Tensors:
        # A sample's norm is not that of the whole.
        clips = rule.peer is peers.clipped
        factor = peers.clip_factor(grads) if clips else 1.0
        exact = [g.double() * factor for g in sampled_grads]
        params = _parameters([p.double() for p in sampled_start], exact)
        peer = (peers.plain if clips else rule.peer)(partial(rule.make, torch.optim, foreach=False), params)
        return _after_steps(rule, peer, params, exact, torch.Tensor.clone)

    contenders = {
        OURS: ours(),
        "torch for-loop": torchs(foreach=False),
        "torch foreach": torchs(foreach=True),
    }
    if torch.device(setup.device).type in rule.fused:
        contenders["torch fused"] = torchs(fused=True)
    if setup.compile:
        contenders[COMPILED] = torchs(compiled=True, foreach=True)
    for package, (name, options) in rule.others.items():
        setup.add(contenders, package, partial(another, name, options))
    loss = max(rule.loss, FLOAT_CLOCK_LOSS) if contenders.keys() & FLOAT_CLOCKS else rule.loss
    per_parameter = rule.bytes_per_parameter(setup.dtype.itemsize)
    traffic = round(per_parameter * count)
    return Work(
        contenders,
        reference,
        tolerance=16 + loss / torch.finfo(torch.float32 if rule.peer is peers.mastered else setup.dtype).eps,
        limit=setup.copy_limit(traffic, f"{per_parameter:.4g} B a parameter"),
        bytes=traffic,
    )


def _parameters(values: list[torch.Tensor], grads: list[torch.Tensor]) -> peers.Parameters:
    params = list(map(torch.nn.Parameter, values))
    for p, grad in zip(params, grads):
        p.grad = grad
    return params


def _after_steps(rule: Rule, peer: peers.Peer, params: peers.Parameters, grads: list[torch.Tensor], sample) -> Tensors:
    """Parameters and states after the first steps, each with these gradients."""
    for _ in range(rule.steps):
        for p, grad in zip(params, grads):
            if p.grad is not grad:
                p.grad.copy_(grad)
        peer.step()
    return [sample(tensor) for tensor in (peer.tensors() if rule.compare_states else params)]
