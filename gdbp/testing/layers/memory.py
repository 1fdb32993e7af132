"""Checks of memory: every layout of inputs, gradients and parameters, and what must not be written."""

from itertools import chain

import torch

from gdbp.testing.compare import require, same_bits
from gdbp.testing.layers.subject import SUITE, Subject, trained
from gdbp.testing.layouts import Guarded, contiguous, every_second, expanded, transposed
from gdbp.testing.report import NotApplicable

_LAYOUTS = {"strided": every_second, "transposed": transposed, "expanded": expanded, "misaligned": contiguous}


def _laid_out(values: torch.Tensor, kind: str) -> Guarded:
    return Guarded(values, _LAYOUTS[kind](tuple(values.shape)), offset=1 if kind == "misaligned" else 0)


def _require_unwritten(guarded: Guarded, values: torch.Tensor, what: str) -> None:
    count = guarded.overwritten()
    require(count == 0, f"{count} elements around the {what} are overwritten")
    require(same_bits(guarded.view, values), f"the {what} is changed")


def _add(kind: str) -> None:
    @SUITE.check(f"{kind} input")
    def of_input(subject: Subject, rng: torch.Generator) -> str:
        subject.require_no_work_in_place()
        layer = subject.make()
        guarded = _laid_out(subject.input(rng), kind)
        before = guarded.view.clone(memory_format=torch.contiguous_format)
        g = subject.gradient(before, rng)
        exact = subject.exact(layer, before, g)
        # Nearby, for a norm of a constant input, which has no variance, is what rounding makes of it.
        usual = chain([subject.run(subject.make(), before, g)], subject.nearby(layer, before, g, rng))
        evidence = subject.run(layer, guarded.view, g, themselves=True).require_close(exact, usual=usual)
        _require_unwritten(guarded, before, "input")
        return evidence

    @SUITE.check(f"{kind} gradient")
    def of_gradient(subject: Subject, rng: torch.Generator) -> str:
        layer, x = subject.make(), subject.input(rng)
        guarded = _laid_out(subject.gradient(x, rng), kind)
        before = guarded.view.clone(memory_format=torch.contiguous_format)
        exact, plain = subject.exact(layer, x, before), subject.run(subject.make(), x, before)
        evidence = subject.run(layer, x, guarded.view, themselves=True).require_close(exact, usual=[plain])
        _require_unwritten(guarded, before, "upstream gradient")
        return evidence

    if kind == "expanded":
        return

    @SUITE.check(f"{kind} parameters")
    def of_parameters(subject: Subject, rng: torch.Generator) -> str:
        layer, x = subject.make(), subject.input(rng)
        if not trained(layer):
            raise NotApplicable("no parameters")
        g = subject.gradient(x, rng)
        exact, plain = subject.exact(layer, x, g), subject.run(subject.make(), x, g)
        kept = []
        for p in trained(layer).values():
            guarded, values = _laid_out(p.detach(), kind), p.detach().clone()
            p.data = guarded.view
            kept.append((guarded, values))
        evidence = subject.run(layer, x, g).require_close(exact, usual=[plain])
        for guarded, values in kept:
            _require_unwritten(guarded, values, "parameter")
        return evidence


for _kind in _LAYOUTS:
    _add(_kind)


@SUITE.check("input left as it is")
def input_untouched(subject: Subject, rng: torch.Generator) -> str:
    subject.require_no_work_in_place()
    layer, x = subject.make().train(), subject.input(rng)
    g = subject.gradient(x, rng)
    tensors = {"input": x, "upstream gradient": g, **dict(layer.named_parameters())}
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    subject.run(layer, x, g, themselves=True)
    for name, tensor in tensors.items():
        require(same_bits(tensor.detach(), before[name]), f"the {name} is changed")
    return "so are the upstream gradient and the parameters"
