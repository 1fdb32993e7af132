"""What a forward reads of modules besides layers and tensors. A graph has it as it was when it was traced."""

import enum
import functools
import inspect
import types
from typing import Any, NamedTuple

import torch
from torch.nn import Module

# What every module has. Of this only ``training`` decides anything, and that is traced both ways.
_OF_ALL = frozenset(vars(Module()))
_LISTS = (torch.nn.ModuleList, torch.nn.ModuleDict)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, type)
_PLAIN = (int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device, *_FUNCTIONS)
_MOST = 100
_NOTES = "_gdbp_notes"
_COMPUTED = property()  # as which counts what only the class's own __getattribute__ knows


class Read(NamedTuple):
    """An attribute: the module that has it, as seen from the one whose forward reads it, and :func:`meaning`."""

    owner: str
    name: str
    value: Any


def meaning(value: Any) -> Any:
    """A value as something to compare: equal where a forward would decide the same. Objects of which a copy of the
    module has others are alike if of one class, containers too long to be compared at every call if of one length."""
    kind = str(type(value))  # pickle cannot name every type, nor Dynamo of torch 2.11 every module
    if isinstance(value, _LISTS):
        return (kind, *((key, meaning(child)) for key, child in value._modules.items()))
    if isinstance(value, (list, tuple, set, frozenset, dict)) and len(value) > _MOST:
        return (kind, len(value))
    if isinstance(value, (list, tuple)):
        return (kind, *map(meaning, value))
    if isinstance(value, (set, frozenset)):
        return (kind, frozenset(map(meaning, value)))
    if isinstance(value, dict):
        return (kind, *((meaning(key), meaning(item)) for key, item in value.items()))
    if isinstance(value, _PLAIN):
        return (kind, value)
    return "a module" if isinstance(value, Module) else kind


def hold(module: Module, reads: tuple[Read, ...]) -> bool:
    """Whether all that a forward read is what it was."""
    for owner, name, value in reads:
        try:
            found = getattr(module.get_submodule(owner) if owner else module, name)
        except AttributeError:
            return False
        if meaning(found) != value:
            return False
    return True


class Notes:
    """What the forwards of some modules, which are no others' than :func:`noting` made, have read."""

    def __init__(self):
        self._read: dict[tuple[Module, str], Any] = {}

    def take(self, module: Module, name: str, value: Any) -> None:
        self._read.setdefault((module, name), meaning(value))

    def reads(self, module: Module) -> tuple[Read, ...]:
        """As seen from this module."""
        paths = {each: path for path, each in module.named_modules()}
        found = list(self._read.items())
        return tuple(Read(paths[owner], name, value) for (owner, name), value in found if owner in paths)


def noting(cls: type[Module], notes: Notes) -> Module:
    """An empty module of the class, which notes what is read of it."""
    if issubclass(cls, torch.jit.ScriptModule):
        return object.__new__(cls)
    module = object.__new__(_noting_class(cls))
    module.__dict__[_NOTES] = notes
    return module


@functools.cache
def _noting_class(cls: type[Module]) -> type[Module]:
    def read(self, name):
        own = object.__getattribute__(self, "__dict__")
        try:
            value = super(made, self).__getattribute__(name)
        except AttributeError:
            _note_registered(self, own, name)
            raise
        if name not in _OF_ALL and name != _NOTES and not name.startswith("__"):
            # Layers and tensors are looked up at every call, and what is computed comes from what is noted.
            is_looked_up = isinstance(value, (torch.Tensor, Module)) and not isinstance(value, _LISTS)
            is_computed = name not in own and hasattr(type(inspect.getattr_static(cls, name, _COMPUTED)), "__get__")
            if not (is_looked_up or is_computed):
                own[_NOTES].take(self, name, value)
        return value

    made = type(cls.__name__, (cls,), {"__getattribute__": read, "__module__": cls.__module__})
    return made


def _note_registered(module: Module, own: dict[str, Any], name: str) -> None:
    """What nn.Module looks up itself: layers that are left out, and lists of them."""
    for kind in ("_parameters", "_buffers", "_modules"):
        if name in own.get(kind, ()):
            value = own[kind][name]
            if value is None or isinstance(value, _LISTS):
                own[_NOTES].take(module, name, value)
