"""Checks of memory layouts: every kind of parameter and gradient, with guards around their storage."""

from collections.abc import Callable

import torch

from gdbp.testing.registry import check
from gdbp.testing.report import Failure, NotApplicable
from gdbp.testing.subject import Pair, Subject, randn, require

_GUARD = 4096  # elements before and after; more than any parameter here has, so that a wrong kernel stays inside
_MARK = 12345.0


class Guarded:
    """A tensor of any strides inside a larger buffer of marks."""

    def __init__(self, values: torch.Tensor, strides: tuple[int, ...], offset: int = 0):
        extent = sum((n - 1) * s for n, s in zip(values.shape, strides, strict=True)) + 1
        self._buffer = torch.full((2 * _GUARD + offset + extent,), _MARK, dtype=values.dtype)
        self._layout = (values.shape, strides, _GUARD + offset)
        self.view = self._buffer.as_strided(*self._layout)
        if any(strides):
            self.view.copy_(values)
        else:  # an expanded tensor holds one number, and torch refuses to copy into it
            self._buffer[_GUARD + offset] = values.view(-1)[0]

    def overwritten(self) -> int:
        """How many elements around the tensor were written."""
        outside = torch.ones(self._buffer.shape, dtype=torch.bool)
        outside.as_strided(*self._layout).fill_(False)
        return int((self._buffer[outside] != _MARK).sum())


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def _transposed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return _contiguous(shape[::-1])[::-1]


def _channels_last(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").to(memory_format=torch.channels_last).stride()


def _every_second(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(2 * s for s in _contiguous(shape))


def _expanded(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (0,) * len(shape)


Strides = Callable[[tuple[int, ...]], tuple[int, ...]]
_CASES: dict[str, tuple[tuple[int, ...], Strides, Strides]] = {
    "strided parameter": ((12, 7), _every_second, _contiguous),
    "transposed parameter": ((9, 11), _transposed, _contiguous),
    "channels_last parameter": ((2, 3, 5, 4), _channels_last, _contiguous),
    "strided gradient": ((12, 7), _contiguous, _every_second),
    "transposed gradient": ((9, 11), _contiguous, _transposed),
    "channels_last gradient": ((2, 3, 5, 4), _contiguous, _channels_last),
    "expanded gradient": ((8, 8), _contiguous, _expanded),
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
    @check(name)
    def layout(subject: Subject, rng: torch.Generator) -> str:
        return _guarded_run(subject, rng, [(shape, p(shape), 0, g(shape), 0)])


for _name, _case in _CASES.items():
    _add(_name, *_case)


@check("misaligned storage")
def misaligned(subject: Subject, rng: torch.Generator) -> str:
    return _guarded_run(subject, rng, [((37,), (1,), at, (1,), (at + 3) % 8) for at in range(8)])


@check("layout changed in training")
def layout_changed(subject: Subject, rng: torch.Generator) -> str:
    """As ``model.to(memory_format=torch.channels_last)`` between two steps: states keep their old strides."""
    pair = Pair(subject, [torch.randn(2, 3, 5, 4, generator=rng)]).run(2, rng)
    (p,) = pair.params
    p.data = p.data.contiguous(memory_format=torch.channels_last)
    for _ in range(2):
        pair.step([randn(p, rng).contiguous(memory_format=torch.channels_last)])
    return pair.require_close()


@check("checkpoint of another layout")
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
