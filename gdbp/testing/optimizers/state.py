"""Checks of what is kept: checkpoints, copies, distributed checkpoints."""

import copy
import io
import pickle

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from gdbp.testing.compare import require
from gdbp.testing.optimizers.subject import SUITE, Subject, randn, require_equal, snapshot
from gdbp.testing.report import NotApplicable

_SIZES = [(5, 3), (17,), ()]


class _Training:
    """Parameters and an optimizer that take one step after another of a fixed history of gradients."""

    def __init__(self, subject: Subject, rng: torch.Generator, dtype: torch.dtype = torch.float32):
        self.params = [torch.randn(size, generator=rng).to(dtype).requires_grad_() for size in _SIZES]
        self.optimizer = subject.make(self.params)
        self.grads = [[randn(p, rng) for p in self.params] for _ in range(6)]

    def run(self, first: int, last: int) -> list:
        for grads in self.grads[first:last]:
            for p, g in zip(self.params, grads, strict=True):
                p.grad = g.clone()
            self.optimizer.step()
        return snapshot(self.optimizer, self.params)

    def restart(self, subject: Subject) -> "_Training":
        """The same parameters with an optimizer that knows nothing yet."""
        twin = copy.copy(self)
        twin.params = [p.detach().clone().requires_grad_() for p in self.params]
        twin.optimizer = subject.make(twin.params)
        return twin


def _resume(subject: Subject, rng: torch.Generator, dtype: torch.dtype) -> str:
    training = _Training(subject, rng, dtype)
    interrupted = training.restart(subject)
    for each in (training, interrupted):
        each.run(0, 3)
        for group in each.optimizer.param_groups:  # as a scheduler does; the checkpoint keeps it
            if "lr" in group:
                group["lr"] = 0.5 * group["lr"]
    expected = training.run(3, 6)
    resumed = interrupted.restart(subject)
    resumed.optimizer.load_state_dict(copy.deepcopy(interrupted.optimizer.state_dict()))
    require_equal(resumed.run(3, 6), expected, "3 steps, load_state_dict, 3 steps")
    return "3 steps, load_state_dict, 3 steps == 6 steps, bit for bit"


@SUITE.check("checkpoint float32")
def resume_float32(subject: Subject, rng: torch.Generator) -> str:
    return _resume(subject, rng, torch.float32)


@SUITE.check("checkpoint bfloat16")
def resume_bfloat16(subject: Subject, rng: torch.Generator) -> str:
    return _resume(subject, rng, torch.bfloat16)


def _tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    states = optimizer.state_dict()["state"]
    named = {f"{key} of {i}": value for i, state in states.items() for key, value in state.items()}
    return {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}


@SUITE.check("load keeps state dtypes")
def state_dtypes(subject: Subject, rng: torch.Generator) -> str:
    training = _Training(subject, rng, torch.bfloat16)
    training.run(0, 1)
    before = {key: value.dtype for key, value in _tensors(training.optimizer).items()}
    if not before:
        raise NotApplicable("no state")
    loaded = training.restart(subject).optimizer
    loaded.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))
    after = {key: value.dtype for key, value in _tensors(loaded).items()}
    changed = [f"{key}: {dtype} becomes {after.get(key)}" for key, dtype in before.items() if after.get(key) != dtype]
    require(not changed, lambda: f"bfloat16 parameters, {changed[0]}")
    return f"bfloat16 parameters, states {', '.join(sorted({str(dtype) for dtype in before.values()}))}"


@SUITE.check("load copies")
def load_copies(subject: Subject, rng: torch.Generator) -> str:
    training = _Training(subject, rng)
    training.run(0, 1)
    source = copy.deepcopy(training.optimizer.state_dict())
    if not _tensors(training.optimizer):
        raise NotApplicable("no state")
    loaded = training.restart(subject).optimizer
    loaded.load_state_dict(source)
    held = {value.data_ptr(): key for key, value in _tensors(loaded).items() if value.numel()}
    own = [v for state in source["state"].values() for v in state.values() if isinstance(v, torch.Tensor)]
    shared = sorted({held[v.data_ptr()].split(" of ")[0] for v in own if v.data_ptr() in held})
    require(not shared, f"loaded states share memory with the state_dict: {', '.join(shared)}")
    return "loaded states have memory of their own"


@SUITE.check("weights_only")
def weights_only(subject: Subject, rng: torch.Generator) -> str:
    training = _Training(subject, rng)
    training.run(0, 1)
    for state in training.optimizer.state.values():
        for key, value in state.items():
            plain = isinstance(value, torch.Tensor | int | float | dict)
            require(
                plain, f"state {key!r} is of type {type(value).__name__}; flat checkpoints take tensors and numbers"
            )
            scalar = not (key == "step" and isinstance(value, torch.Tensor)) or value.dim() == 0
            require(scalar, "state 'step' is no 0-dim tensor, and so would be moved to the parameter's device")
    buffer = io.BytesIO()
    torch.save(training.optimizer.state_dict(), buffer)
    buffer.seek(0)
    expected = training.restart(subject)
    expected.optimizer.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))
    loaded = training.restart(subject)
    loaded.optimizer.load_state_dict(torch.load(buffer, weights_only=True))
    require_equal(loaded.run(1, 3), expected.run(1, 3), "after torch.load(weights_only=True)")
    return "torch.save, torch.load(weights_only=True)"


def _copied(subject: Subject, rng: torch.Generator, duplicate) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    training = _Training(subject, rng)
    training.run(0, 2)
    twin = copy.copy(training)
    twin.optimizer = duplicate(training.optimizer)
    twin.params = [p for group in twin.optimizer.param_groups for p in group["params"]]
    mine = {id(p) for p in training.params}
    require(not any(id(p) in mine for p in twin.params), "the copy holds the parameters of the original")
    require_equal(twin.run(2, 5), training.run(2, 5), "3 more steps of the copy")
    return training.optimizer, twin.optimizer


@SUITE.check("deepcopy")
def deepcopy(subject: Subject, rng: torch.Generator) -> str:
    original, twin = _copied(subject, rng, copy.deepcopy)
    lost = sorted(name for name in vars(original) if not name.startswith("_") and not hasattr(twin, name))
    require(not lost, f"attributes lost: {', '.join(lost)}")
    return "goes on bit for bit"


@SUITE.check("pickle")
def pickles(subject: Subject, rng: torch.Generator) -> str:
    _copied(subject, rng, lambda optimizer: pickle.loads(pickle.dumps(optimizer)))
    return "goes on bit for bit"


def _train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, data: torch.Tensor) -> list:
    for batch in data:
        optimizer.zero_grad()
        model(batch).square().sum().backward()
        optimizer.step()
    return snapshot(optimizer, list(model.parameters()))


@SUITE.check("distributed state_dict changes nothing")
def dcp_changes_nothing(subject: Subject, rng: torch.Generator) -> str:
    model = torch.nn.Linear(4, 3)
    twin = copy.deepcopy(model)
    optimizer, other = subject.make(model.parameters()), subject.make(twin.parameters())
    get_optimizer_state_dict(model, optimizer)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        require(torch.equal(p, q), "get_optimizer_state_dict before the first step moves the parameters")
    data = torch.randn(3, 2, 4, generator=rng)
    require_equal(_train(model, optimizer, data), _train(twin, other, data), "3 steps after get_optimizer_state_dict")
    return "get_optimizer_state_dict, 3 steps == 3 steps"


@SUITE.check("flat distributed state_dict")
def dcp_flat(subject: Subject, rng: torch.Generator) -> str:
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model = torch.nn.Linear(4, 3)
    optimizer = subject.make(model.parameters())
    data = torch.randn(5, 2, 4, generator=rng)
    _train(model, optimizer, data[:2])
    twin = copy.deepcopy(model)
    other = subject.make(twin.parameters())
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    set_optimizer_state_dict(twin, other, saved, options=options)
    require_equal(_train(twin, other, data[2:]), _train(model, optimizer, data[2:]), "3 steps after loading")
    return "saved, loaded, 3 steps bit for bit"
