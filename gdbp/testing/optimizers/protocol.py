"""Checks of what trainers and autograd expect of an optimizer: how it is called, and with which parameters."""

import warnings

import torch

from gdbp.testing.compare import require
from gdbp.testing.optimizers.subject import SUITE, Pair, Subject, randn
from gdbp.testing.report import Failure


def _one(subject: Subject, rng: torch.Generator) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
    p = torch.nn.Parameter(torch.randn(6, generator=rng))
    p.grad = torch.randn(6, generator=rng)
    return p, subject.make([p])


@SUITE.check("version counter")
def version_counter(subject: Subject, rng: torch.Generator) -> str:
    """Forward, step, backward must raise: the saved values are gone, and the gradient would be wrong."""
    p, optimizer = _one(subject, rng)
    before = p.detach().clone()
    loss = p.pow(3).sum()
    optimizer.step()
    require(not torch.equal(p.detach(), before), "the step changes nothing")
    try:
        loss.backward()
    except RuntimeError as error:
        if "modified by an inplace operation" in str(error):
            return "backward after a step raises"
        raise
    raise Failure(f"forward, step, backward gives a wrong gradient silently; _version is {p._version}")


@SUITE.check("closure")
def closure(subject: Subject, rng: torch.Generator) -> str:
    for how in ("step(closure)", "step(closure=closure)"):
        p, optimizer = _one(subject, rng)
        calls = []

        def compute(p=p, optimizer=optimizer, calls=calls):
            calls.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            loss = p.square().sum()
            loss.backward()
            return loss

        q = p.detach().clone().requires_grad_()
        twin = subject.make([q])
        q.grad = 2 * q.detach()
        expected = p.detach().square().sum()
        with torch.no_grad():
            loss = optimizer.step(compute) if how == "step(closure)" else optimizer.step(closure=compute)
        twin.step()
        require(len(calls) == 1, f"{how} calls the closure {len(calls)} times")
        require(calls[0], f"{how} calls the closure with gradients switched off")
        require(isinstance(loss, torch.Tensor) and torch.equal(loss.detach(), expected), f"{how} returns {loss!r}")
        require(torch.equal(p, q), f"{how} does not use the gradients that the closure computes")
    require(optimizer.step(closure=None) is None, "step(closure=None) returns something")
    return "called once, with gradients on; its loss is returned"


@SUITE.check("hooks and profiler")
def hooks(subject: Subject, rng: torch.Generator) -> str:
    # torch wraps the step of a class when an object is made; a step that calls its parent's fires twice after this.
    for parent in subject.cls.__mro__[1:]:
        if parent is not torch.optim.Optimizer and issubclass(parent, torch.optim.Optimizer):
            try:
                parent([torch.nn.Parameter(torch.zeros(1))])
            except Exception:
                continue
    _, optimizer = _one(subject, rng)
    fired = []
    optimizer.register_step_pre_hook(lambda *_: fired.append("pre"))
    optimizer.register_step_post_hook(lambda *_: fired.append("post"))
    with torch.profiler.profile() as profile:
        optimizer.step()
    require(fired == ["pre", "post"], f"one step fires {fired} instead of one pre and one post hook")
    name = f"Optimizer.step#{subject.cls.__name__}.step"
    times = sum(event.count for event in profile.key_averages() if event.key == name)
    require(times == 1, f"the profiler sees {name} {times} times in one step")
    return "each fires once"


@SUITE.check("gradients that come and go")
def missing_gradients(subject: Subject, rng: torch.Generator) -> str:
    """A parameter's first gradient is its first step, whatever the others did before."""
    pair = Pair(subject, [torch.randn(5, generator=rng) for _ in range(4)])
    for present in ((1, 0, 0, 0), (1, 1, 0, 0), (0, 0, 0, 0), (1, 0, 1, 0), (0, 1, 1, 0), (1, 1, 1, 0)):
        grads = [randn(p, rng) if here else None for p, here in zip(pair.params, present, strict=True)]
        before = [q.detach().clone() for q in pair.exact]
        pair.step(grads)
        moved = [i for i, q in enumerate(pair.exact) if grads[i] is None and not torch.equal(q, before[i])]
        require(not moved, f"a step moves parameters that have no gradient: {moved}")
    evidence = pair.require_close()
    # An oracle that counts for all parameters together would agree; so a late first step is compared with an early one.
    values, grads = ([torch.randn(5, generator=rng) for _ in range(2)] for _ in range(2))
    early, late = Pair(subject, [v.clone() for v in values]), Pair(subject, values)
    for _ in range(2):
        late.step([torch.randn(5, generator=rng), None])
    for run in (early, late):
        run.step([g.clone() for g in grads])
    same = torch.equal(early.exact[1], late.exact[1])
    require(same, "the first step of a parameter depends on the steps before: counters are not its own")
    return evidence


@SUITE.check("unfrozen later")
def unfrozen(subject: Subject, rng: torch.Generator) -> str:
    pair = Pair(subject, [torch.randn(5, generator=rng) for _ in range(2)])
    for p in (pair.params[1], pair.exact[1]):
        p.requires_grad_(False)
    pair.step([torch.randn(5, generator=rng), None])
    for p in (pair.params[1], pair.exact[1]):
        p.requires_grad_(True)
    before = pair.exact[1].detach().clone()
    pair.run(2, rng)
    require(not torch.equal(pair.exact[1], before), "a parameter that is unfrozen does not move")
    return pair.require_close()


@SUITE.check("add_param_group")
def add_param_group(subject: Subject, rng: torch.Generator) -> str:
    values = [torch.randn(n, generator=rng) for n in (5, 3)]
    pair = Pair(subject, values)
    for optimizer, params in pair.both:
        groups = optimizer.param_groups
        groups[0]["params"] = params[:1]
        optimizer.add_param_group({"params": params[1:], "lr": 0.25 * float(groups[0]["lr"])})
        missing = groups[0].keys() - groups[1].keys()
        require(not missing, f"the new group lacks {sorted(missing)}")
    before = pair.exact[1].detach().clone()
    pair.run(3, rng)
    require(not torch.equal(pair.exact[1], before), "the parameters of a group that was added do not move")
    return pair.require_close()


@SUITE.check("named parameters")
def named_parameters(subject: Subject, rng: torch.Generator) -> str:
    p, optimizer = _one(subject, rng)
    q = p.detach().clone().requires_grad_()
    named = subject.make([("weight", q)])
    q.grad = p.grad.clone()
    optimizer.step()
    named.step()
    require(torch.equal(p, q), "named parameters step differently")
    kept = named.state_dict()["param_groups"][0].get("param_names")
    require(kept == ["weight"], f"param_names in the state_dict are {kept}")
    return "param_names kept"


@SUITE.check("duplicates")
def duplicates(subject: Subject, rng: torch.Generator) -> str:
    p, _ = _one(subject, rng)
    try:
        subject.make([{"params": [p]}, {"params": [p]}])
        raise Failure("the same parameter in two groups is accepted")
    except ValueError:
        pass
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        subject.make([p, p])
    require(any("duplicate" in str(w.message) for w in caught), "the same parameter twice in a group: no warning")
    return "refused in two groups, warned of in one"
