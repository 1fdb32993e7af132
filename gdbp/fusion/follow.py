"""torch.fx's tracing, made to notice what it would not record."""

import contextlib
import importlib
import math
import operator
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils.checkpoint
from torch import fx

from gdbp.fusion.run import is_inplace, makes_new

# `x += y` of a proxy without these is another tensor, and x stays what it was.
_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor")


class _Proxy(fx.Proxy):
    @property
    def __class__(self) -> type:
        """What isinstance goes by: a forward that asks is to hear that tensors are tensors. That its arguments are is
        taken for granted here, and looked at when it is called."""
        asker = sys._getframe(1).f_globals.get("__name__", "")
        if asker.startswith(("torch.", "gdbp.")):  # but not torch.is_tensor, which asks for somebody else
            return type(self)
        if self.node.op not in ("placeholder", "call_module"):
            raise NotImplementedError("it asks what kind of thing a result is, which is not known yet")
        return torch.Tensor

    def __getattr__(self, name: str):
        if self.node.op == "placeholder" and not hasattr(torch.Tensor, name):
            raise NotImplementedError(f"it asks its argument for {name}, which tensors don't have")
        return super().__getattr__(name)


def _in_place(name: str):
    def method(self, other):
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return method


for _name in _IN_PLACE:
    setattr(_Proxy, f"__{_name}__", _in_place(_name))


class Tracer(fx.Tracer):
    """Traces in the thread that made it; while it does, torch.fx shows it the calls of all threads."""

    # Statistics that forward changes must be changed by the graph, not by the tracing.
    proxy_buffer_attributes = True

    def __init__(self, autowrap_modules: tuple = ()):
        super().__init__(autowrap_modules)
        self._thread = threading.get_ident()

    def call_module(self, m, forward, args, kwargs):
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr, attr_val, parameter_proxy_cache):
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

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
        # What is put in the place of torch's functions must come out again in order.
        with _ONE_AT_A_TIME, contextlib.ExitStack() as stack:
            for owner, name, what in _NOT_RECORDED:
                if name in vars(owner):
                    stack.enter_context(_refused(owner, name, what))
            return super().trace(*args, **kwargs)


def trace(module: torch.nn.Module) -> fx.Graph:
    """Of its forward.

    Raises:
        Whatever keeps torch.fx, or this, from following it.
    """
    try:
        return Tracer().trace(module)
    except TypeError:
        # Numbers that are not known yet are no numbers for Python's math, unless torch.fx puts its own in the place of
        # that module's functions: for all, so only then, and not while Dynamo takes down whose they are.
        importlib.import_module("torch._dynamo")
        return Tracer((math,)).trace(module)


_ONE_AT_A_TIME = threading.RLock()
_SWITCHES = "switches gradients or autocast"
_CHECKPOINT = "_checkpoint_without_reentrant_generator"
if hasattr(torch.utils.checkpoint, f"{_CHECKPOINT}_impl"):  # from torch 2.15 on
    _CHECKPOINT += "_impl"
_NOT_RECORDED = (
    (torch.autograd.Function, "apply", "calls an autograd.Function"),
    (torch._C, "_set_grad_enabled", _SWITCHES),
    (torch.inference_mode, "__enter__", _SWITCHES),
    (torch.autocast, "__enter__", _SWITCHES),
    (torch.autograd.graph.saved_tensors_hooks, "__enter__", "has hooks on saved tensors"),
    (torch.utils.checkpoint, _CHECKPOINT, "is checkpointed"),
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

# Whose results are new tensors, whatever they are given; all others may return a view of it, or itself.
_COPYING = frozenset(
    ("add", "sub", "mul", "div", "truediv", "neg", "pow", "square", "sqrt", "exp", "log", "abs", "matmul", "mm", "bmm",
     "addmm", "linear", "conv1d", "conv2d", "cat", "concat", "stack", "clone", "sum", "mean", "amax", "argmax", "norm",
     "softmax", "log_softmax", "logsumexp", "layer_norm", "batch_norm", "cross_entropy", "mse_loss", "relu", "gelu",
     "silu", "sigmoid", "tanh", "elu", "leaky_relu", "softplus", "run")
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
        if called is not None and is_inplace(called):
            return True
        copies = _name(user) in _COPYING if called is None else makes_new(called)
        if not copies and is_written_over(user, module):
            return True
    return False


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
