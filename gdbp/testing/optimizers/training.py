"""Checks in company: schedulers, a learning rate in a tensor, GradScaler, torch.compile."""

import torch

from gdbp.testing.compare import require, same_bits
from gdbp.testing.optimizers.subject import SUITE, Pair, Subject, randn, snapshot
from gdbp.testing.report import NotApplicable


def _require_obeyed(subject: Subject, rng: torch.Generator, group: dict) -> None:
    """What a scheduler left in the group counts as if it were the constructor's. A comparison with the oracle does not
    show that: it is of the same class, and would ignore the same."""
    value, grads = torch.randn(5, generator=rng).double(), torch.randn(2, 5, generator=rng).double()
    for name in subject.scheduled:
        if name not in group:
            continue
        results = []
        for given in ({}, {name: group[name]}):
            p = value.clone().requires_grad_()
            optimizer = subject.oracle([p], **given)
            optimizer.param_groups[0][name] = group[name]
            for g in grads:
                p.grad = g.clone()
                optimizer.step()
            results.append(p)
        require(same_bits(*results), f"steps do not use the {name} that the scheduler puts into the group")


def _scheduled(subject: Subject, rng: torch.Generator, make_scheduler, **options) -> str:
    pair = Pair(subject, [torch.randn(5, generator=rng)], **options)
    schedulers = [make_scheduler(optimizer) for optimizer, _ in pair.both]
    for _ in range(6):
        pair.run(1, rng)
        for scheduler in schedulers:
            scheduler.step()
    _require_obeyed(subject, rng, pair.oracle.param_groups[0])
    return pair.require_close("6 steps: ")


@SUITE.check("OneCycleLR")
def one_cycle(subject: Subject, rng: torch.Generator) -> str:
    if not {"momentum", "betas"} & {*subject.scheduled}:
        raise NotApplicable("neither momentum nor betas to cycle")
    return _scheduled(subject, rng, lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.01, total_steps=8))


@SUITE.check("CyclicLR")
def cyclic(subject: Subject, rng: torch.Generator) -> str:
    """Turns on the momentum of an SGD that had none: its buffer must appear then."""
    if not {"momentum", "betas"} & {*subject.scheduled}:
        raise NotApplicable("neither momentum nor betas to cycle")
    return _scheduled(subject, rng, lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.001, 0.01, step_size_up=2))


@SUITE.check("LambdaLR")
def lambda_lr(subject: Subject, rng: torch.Generator) -> str:
    return _scheduled(subject, rng, lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 0.5**epoch))


@SUITE.check("tensor lr")
def tensor_lr(subject: Subject, rng: torch.Generator) -> str:
    """A tensor is changed in place by schedulers, and the next step must see it."""
    pair = Pair(subject, [torch.randn(6, generator=rng)])
    tensor = torch.tensor(0.01)
    pair.optimizer = subject.make(pair.params, lr=tensor)
    for rate in (0.01, 0.002, 0.02):
        tensor.fill_(rate)
        # The oracle's rate is the number that the float32 tensor holds.
        pair.oracle.param_groups[0]["lr"] = tensor.item()
        pair.run(1, rng)
    return pair.require_close("changed in place: ")


def _overflow(subject: Subject, rng: torch.Generator, bad: int) -> str:
    """Six steps of which one overflows; the oracle takes the other five without a scaler."""
    pair = Pair(subject, [torch.randn(20, generator=rng), torch.randn(3, generator=rng)])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))  # makes the scale
    # Memory that nobody initialised then holds NaN, so that its use shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    for step in range(6):
        grads = [randn(p, rng) for p in pair.params]
        pair.give(grads)
        for p in pair.params:
            p.grad = p.grad * scaler.get_scale()
        if step == bad:
            pair.params[0].grad[7] = float("inf")
            before = snapshot(pair.optimizer, pair.params)
        scaler.step(pair.optimizer)
        scaler.update()
        if step == bad:
            _require_untouched(before, snapshot(pair.optimizer, pair.params))
        else:
            pair.oracle.step()
            pair.track()
    return pair.require_close("the steps around it: ")


def _require_untouched(before: list, after: list) -> None:
    for (p, state), (q, new) in zip(before, after, strict=True):
        require(torch.equal(p, q), "the overflow changes parameters")
        for key, value in new.items():
            if isinstance(value, torch.Tensor):
                require(not bool(value.isnan().any()), f"the overflow leaves state {key!r} uninitialised")
                old = state.get(key, torch.zeros_like(value) if key == "step" else value)
                require(torch.equal(value, old), f"the overflow changes state {key!r}")


@SUITE.check("GradScaler, first step overflows")
def overflow_first(subject: Subject, rng: torch.Generator) -> str:
    return _overflow(subject, rng, 0)


@SUITE.check("GradScaler, later overflow")
def overflow_later(subject: Subject, rng: torch.Generator) -> str:
    return _overflow(subject, rng, 3)


@SUITE.check("GradScaler, skip visible")
def skip_visible(subject: Subject, rng: torch.Generator) -> str:
    """Trainers learn of a skipped step from the call that did not come, and hold back the schedule."""
    p = torch.nn.Parameter(torch.randn(6, generator=rng))
    p.grad = torch.full((6,), float("inf"))
    optimizer = subject.make([p])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    scaler.step(optimizer)
    require(not calls, "the scaler calls step on an overflow, and so accelerate takes it for a step")
    return "the scaler does not call step"


@SUITE.check("compiled step")
def compiled(subject: Subject, rng: torch.Generator) -> str:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    params = [torch.randn(5, generator=rng).requires_grad_() for _ in range(2)]
    twins = [p.detach().clone().requires_grad_() for p in params]
    optimizer, twin = (subject.make(each, lr=torch.tensor(0.01)) for each in (params, twins))
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    graphs = []
    for k in range(8):
        for p, q in zip(params, twins, strict=True):
            p.grad = randn(p, rng)
            q.grad = p.grad.clone()
        for o in (optimizer, twin):
            o.param_groups[0]["lr"].fill_(0.01 / (k + 1))
        step()
        twin.step()
        graphs.append(counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    require(graphs[-1] <= graphs[2], f"recompiles at later steps: {graphs} graphs after each of 8 steps")
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q)
    breaks = sum(counters["graph_break"].values())
    return f"{graphs[-1]} graphs, {breaks} graph breaks in 8 steps with a changing lr"
