"""torch.fx's tracing, made to notice what it would not record."""

import contextlib
import operator
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils.checkpoint
from torch import fx

from gdbp.fusion.run import VIEWS

# `x += y` of a proxy without these is another tensor, and x stays what it was.
_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor")


class _Proxy(fx.Proxy):
    @property
    def __class__(self) -> type:
        """What isinstance goes by: a forward that asks is to hear that tensors are tensors."""
        asker = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0]
        is_tensor = self.node.op in ("placeholder", "call_module")
        return torch.Tensor if is_tensor and asker not in ("torch", "gdbp") else type(self)


def _in_place(name: str):
    def method(self, other):
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return method


for _name in _IN_PLACE:
    setattr(_Proxy, f"__{_name}__", _in_place(_name))


class Tracer(fx.Tracer):
    # Statistics that forward changes must be changed by the graph, not by the tracing.
    proxy_buffer_attributes = True

    def is_leaf_module(self, module, name) -> bool:
        return True  # each module's own forward is looked at by itself

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_arg(self, a: Any):
        # A graph has plain ones.
        known = (dict, list, tuple, torch.Size)
        if isinstance(a, (dict, list, tuple)) and type(a) not in known and not hasattr(a, "_fields"):
            raise NotImplementedError(
                f"it makes a container of class {type(a).__name__}, which would become a plain one"
            )
        return super().create_arg(a)

    def trace(self, *args, **kwargs) -> fx.Graph:
        with contextlib.ExitStack() as stack:
            for owner, name, what in _NOT_RECORDED:
                if name in vars(owner):
                    stack.enter_context(_refused(owner, name, what))
            return super().trace(*args, **kwargs)


_SWITCHES = "switches gradients or autocast"
_NOT_RECORDED = (
    (torch.autograd.Function, "apply", "calls an autograd.Function"),
    (torch._C, "_set_grad_enabled", _SWITCHES),
    (torch.inference_mode, "__enter__", _SWITCHES),
    (torch.autocast, "__enter__", _SWITCHES),
    (torch.utils.checkpoint, "_checkpoint_without_reentrant_generator", "is checkpointed"),
)


@contextlib.contextmanager
def _refused(owner: Any, name: str, what: str) -> Iterator[None]:
    """Has this thread raise where it calls what no graph has; others go on as they are."""
    original = vars(owner)[name]
    function = original.__func__ if isinstance(original, classmethod) else original
    here = threading.get_ident()

    def call(*args, **kwargs):
        if threading.get_ident() == here:
            raise NotImplementedError(f"it {what}, which would not be recorded")
        return function(*args, **kwargs)

    setattr(owner, name, classmethod(call) if isinstance(original, classmethod) else call)
    try:
        yield
    finally:
        setattr(owner, name, original)


# ---- what a graph's nodes write to ----

_VIEW_CALLS = frozenset(
    ("view", "reshape", "flatten", "squeeze", "unsqueeze", "transpose", "t", "permute", "movedim", "chunk", "split",
     "unbind", "expand", "narrow", "select", "getitem", "identity", "dropout")
)  # fmt: skip


def writes(node: fx.Node, module: torch.nn.Module) -> bool:
    """Whether a node may write to what it is given; module: whose graph it is in."""
    if node.op == "call_module":
        called = module.get_submodule(node.target)
        return bool(getattr(called, "inplace", False)) or not type(called).__module__.startswith(("torch.", "gdbp."))
    if node.op not in ("call_function", "call_method"):
        return False
    name = _name(node)
    last = node.args[-1] if len(node.args) > 1 else None
    is_inplace = node.kwargs.get("inplace") is True or (last is True and "dropout" in name)
    is_inplace |= name in _IN_PLACE or name == "setitem" or (name.endswith("_") and not name.endswith("__"))
    return is_inplace or "out" in node.kwargs


def is_written_over(node: fx.Node, module: torch.nn.Module) -> bool:
    """Whether some node writes to the result of this one, or to a view of it."""
    for user in node.users:
        if user.op != "call_module" and writes(user, module):
            return True
        called = module.get_submodule(user.target) if user.op == "call_module" else None
        if called is not None and getattr(called, "inplace", False):
            return True
        if (isinstance(called, VIEWS) or _name(user) in _VIEW_CALLS) and is_written_over(user, module):
            return True
    return False


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
