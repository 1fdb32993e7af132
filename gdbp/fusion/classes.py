"""Classes of fused modules: those that they had before, with another forward.

A module is fused by giving it such a class, and nothing else of it changes; it is unfused by giving it its own back.
"""

import copyreg
import functools
import importlib
import inspect
import re
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._subclasses import FakeTensor

from gdbp.fusion.reads import Read, hold
from gdbp.fusion.run import match, run


class Code(NamedTuple):
    """A forward as source, with the names it uses: pairs of name and object, or name and module's name."""

    source: str
    objects: tuple[tuple[str, Any], ...]
    modules: tuple[tuple[str, str], ...]
    runs: tuple[str, ...]  # for people
    reads: tuple[Read, ...]  # of attributes, which are constants of it

    @classmethod
    def of(cls, graph: fx.Graph, runs: tuple[str, ...], reads: tuple[Read, ...]) -> "Code":
        code = graph.python_code("self")
        # Of the names that fx provides, a NaN among them, only those in use: equal forwards are to be equal.
        words = set(re.findall(r"\w+", code.src))
        named = [(name, value) for name, value in code.globals.items() if name in words]
        modules = tuple((name, value.__name__) for name, value in named if isinstance(value, types.ModuleType))
        objects = tuple((name, value) for name, value in named if not isinstance(value, types.ModuleType))
        return cls(code.src, objects, modules, runs, reads)

    def compile(self, before: Callable) -> Callable:
        """The forward, in the place of the one ``before``, for tensors: to all else that one may answer in another way,
        and its tracing took tensors for granted."""
        names = dict(self.objects)
        names.update((name, importlib.import_module(module)) for name, module in self.modules)
        exec(compile(self.source, "<gdbp.fuse>", "exec"), names)
        fused, reads = names["forward"], self.reads

        @functools.wraps(fused)
        def forward(self, *args, **kwargs):
            for given in (*args, *kwargs.values()):
                if type(given) is not torch.Tensor and type(given) is not FakeTensor:
                    return before(self, *args, **kwargs)
            if not hold(self, reads):
                return before(self, *args, **kwargs)
            return fused(self, *args, **kwargs)

        return forward


def _forward_of_sequential(self, input):
    return run(input, *self._modules.values())


def _runs_of_sequential(self) -> list[str]:
    layers = list(self._modules.values())
    names, runs, i = list(self._modules), [], 0
    while i < len(layers):
        found = match(layers, i)
        if found is not None:
            runs.append(" + ".join(names[i : i + found.length]))
        i += 1 if found is None else found.length
    return runs


def _new(base, code, *args):
    return copyreg.__newobj__(fused_class(base, code), *args)


@functools.cache
def fused_class(base: type[torch.nn.Module], code: Code | None) -> type[torch.nn.Module]:
    """``base`` with the forward ``code``; None for ``torch.nn.Sequential``'s, which is looked at when it is called."""
    sequential = code is None

    def extra_repr(self):
        runs = _runs_of_sequential(self) if sequential else code.runs
        return "\n".join(filter(None, (base.extra_repr(self), f"fused: {', '.join(runs)}" if runs else "")))

    def reduce_ex(self, protocol):
        # The class is made here, so what goes into a file is what it was made of.
        how, args, *state = base.__reduce_ex__(self, protocol)
        if how is not copyreg.__newobj__ or args[0] is not made:
            return (how, args, *state)
        return (_new, (base, code, *args[1:]), *state)

    body = {
        "forward": _forward_of_sequential if sequential else code.compile(base.forward),
        "extra_repr": extra_repr,
        "__reduce_ex__": reduce_ex,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        "_unfused_class": base,
    }
    made = type(f"Fused{base.__name__}", (base,), body)
    return made


def unfused_class(module: torch.nn.Module) -> type[torch.nn.Module] | None:
    """The class that a fused module had before; None for one that is not fused."""
    return getattr(type(module), "_unfused_class", None)


def class_of(module: torch.nn.Module) -> type[torch.nn.Module]:
    """The class of a module as if it were not fused."""
    return unfused_class(module) or type(module)


def forward_of(module: torch.nn.Module) -> Callable | None:
    """The forward of its class, as that has it: those of scripted modules do not like to be asked."""
    return inspect.getattr_static(class_of(module), "forward", None)
