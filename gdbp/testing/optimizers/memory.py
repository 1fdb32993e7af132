"""Checks of memory layouts: every kind of parameter and gradient, with guards around their storage."""

from collections.abc import Callable

import torch

from gdbp.testing.compare import require
from gdbp.testing.layouts import Guarded, channels_last, contiguous, every_second, expanded, transposed
from gdbp.testing.optimizers.subject import SUITE, Pair, Subject, randn
from gdbp.testing.report import Failure, NotApplicable

Strides = Callable[[tuple[int, ...]], tuple[int, ...]]
_CASES: dict[str, tuple[tuple[int, ...], Strides, Strides]] = {
    "strided parameter": ((12, 7), every_second, contiguous),
    "transposed parameter": ((9, 11), transposed, contiguous),
    "channels_last parameter": ((2, 3, 5, 4), channels_last, contiguous),
    "strided gradient": ((12, 7), contiguous, every_second),
    "transposed gradient": ((9, 11), contiguous, transposed),
    "channels_last gradient": ((2, 3, 5, 4), contiguous, channels_last),
    "expanded gradient": ((8, 8), contiguous, expanded),
}


def _guarded_run(subject: Subject, rng: torch.Generator, layouts: list[tuple]) -> str:
    """Three steps; layouts hold shapes, strides and offsets of parameters and gradients."""
    params = [Guarded(torch.randn(shape, generator=rng), p, at) for shape, p, at, _, _ in layouts]
    pair = Pair(subject, [p.view for p in params])
    for _ in range(3):
        pair.step([Guarded(torch.randn(shape, generator=rng), g, at).view for shape, _, _, g, at in layouts])
    overwritten = sum(p.overwritten() for p in params)
    try:
        evidence = pair.require_close()
    except Failure as failure:
        raise Failure(f"{failure}; {overwritten} neighbours overwritten" if overwritten else str(failure)) from None
    require(overwritten == 0, f"{overwritten} elements next to the parameter overwritten")
    return f"{evidence}, neighbours untouched"


def _add(name: str, shape: tuple[int, ...], p: Strides, g: Strides) -> None:
    @SUITE.check(name)
    def layout(subject: Subject, rng: torch.Generator) -> str:
        return _guarded_run(subject, rng, [(shape, p(shape), 0, g(shape), 0)])


for _name, _case in _CASES.items():
    _add(_name, *_case)


@SUITE.check("misaligned storage")
def misaligned(subject: Subject, rng: torch.Generator) -> str:
    return _guarded_run(subject, rng, [((37,), (1,), at, (1,), (at + 3) % 8) for at in range(8)])


@SUITE.check("layout changed in training")
def layout_changed(subject: Subject, rng: torch.Generator) -> str:
    """As ``model.to(memory_format=torch.channels_last)`` between two steps: states keep their old strides."""
    pair = Pair(subject, [torch.randn(2, 3, 5, 4, generator=rng)]).run(2, rng)
    (p,) = pair.params
    p.data = p.data.contiguous(memory_format=torch.channels_last)
    for _ in range(2):
        pair.step([randn(p, rng).contiguous(memory_format=torch.channels_last)])
    return pair.require_close()


@SUITE.check("checkpoint of another layout")
def layout_loaded(subject: Subject, rng: torch.Generator) -> str:
    """A channels_last model's checkpoint in a contiguous model."""
    value = torch.randn(2, 3, 5, 4, generator=rng)
    pair = Pair(subject, [value.contiguous(memory_format=torch.channels_last)])
    for _ in range(2):
        pair.step([randn(value, rng).contiguous(memory_format=torch.channels_last)])
    states = pair.optimizer.state.get(pair.params[0], {}).values()
    if not any(isinstance(s, torch.Tensor) and s.dim() == 4 for s in states):
        raise NotApplicable("no state of the parameter's shape")
    state = pair.optimizer.state_dict()
    pair.params = [pair.params[0].detach().contiguous().requires_grad_()]
    pair.optimizer = subject.make(pair.params)
    pair.optimizer.load_state_dict(state)
    return pair.run(2, rng).require_close()
