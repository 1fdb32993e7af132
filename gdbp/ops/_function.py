"""The base of our autograd Functions."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad

from gdbp import _load

if _load.available:
    from gdbp import _C

_functorch_active = getattr(torch._C, "_are_functorch_transforms_active", None)


class Function(torch.autograd.Function):
    """``torch.autograd.Function`` in ``setup_context`` form, without the cost of binding a signature.

    ``Function.apply`` inspects the signature of ``forward`` at every call, some 10 us, which only torch.func
    needs. Outside its transforms this goes straight to the C++ apply. Arguments must be positional.
    """

    @classmethod
    def apply(cls, *args):
        if _functorch_active is None or _functorch_active():
            return super().apply(*args)
        return super(torch.autograd.Function, cls).apply(*args)


def differentiate(name: str, apply: Callable) -> None:
    """Gives an operator, which programs of torch.export call by itself, the derivatives of a Function; ``apply`` takes
    its arguments. Calls from within a Function, or for no gradients, go on to its kernel."""
    operator = getattr(torch.ops.gdbp, name).default

    @torch.library.impl(operator.name(), "Autograd")
    def _(*arguments):
        tensors = [t for t in arguments if isinstance(t, torch.Tensor)]
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)


def needs_autograd(*tensors: torch.Tensor | None) -> bool:
    """Whether a graph must be recorded; where not, the operator is called directly, which is cheaper."""
    if is_transformed():
        return True
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def is_differentiated() -> bool:
    """Whether what a backward pass computes will itself be differentiated: backward, by a graph that is recorded, or
    forward, by tangents."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def is_transformed() -> bool:
    """Whether torch.func is at work; what it wraps is no tensor that a kernel could read."""
    return _functorch_active is None or _functorch_active()


def is_batched(tensor: torch.Tensor) -> bool:
    """Whether this stands for many gradients at once (``is_grads_batched``), which no in-place operator takes."""
    wrapped = torch._C._functorch
    return not torch.compiler.is_compiling() and (
        wrapped.is_legacy_batchedtensor(tensor) or wrapped.is_batchedtensor(tensor)
    )


def is_dense(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested


def is_fused(*tensors: torch.Tensor | None) -> bool:
    """Whether our kernels take these tensors: dense, on CPU or CUDA, of no class that dispatches in Python
    (DTensor, say), outside forward-mode differentiation, not for ``torch.jit.trace`` or ``torch.onnx.export``, whose
    files are to be read without us. Where not, plain torch computes."""
    if forward_ad._current_level >= 0 or torch.jit.is_tracing():
        return False
    for t in tensors:
        # The usual case first: this runs at every call of every layer.
        if t is None or (type(t) in _PLAIN and (t.is_cpu or t.is_cuda) and is_dense(t)):
            continue
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"got a {type(t).__name__}; expected a tensor; convert it with torch.as_tensor()")
        if t.device.type not in _DEVICES or not is_dense(t):
            return False
        if isinstance(t, FakeTensor):
            if torch.onnx.is_in_onnx_export():
                return False
        elif type(t).__torch_dispatch__ is not _NO_DISPATCH:
            return False
    return True


_recorders = 0


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """For a mode that takes down operators and lets them through: calls go to C++ as if there were none."""
    global _recorders
    _recorders += 1
    try:
        yield
    finally:
        _recorders -= 1


def is_direct(*tensors: torch.Tensor | None) -> bool:
    """Whether a call may go from here straight to C++, graph and all: plain tensors that our kernels take, and nobody
    who traces, transforms or intercepts what happens on the way. Where not, it goes through a Function."""
    if torch.compiler.is_compiling() or not _load.available or forward_ad._current_level >= 0:
        return False
    return _C.is_direct(_recorders > 0, *tensors)


def why_not_fused(*tensors: torch.Tensor) -> str:
    """Where :func:`is_fused` says no, the reason; empty where it says yes."""
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    for t in tensors:
        if is_fused(t):
            continue
        if t.device.type not in _DEVICES:
            return f"no kernels for {t.device.type} tensors"
        if t.is_nested:
            return "no kernels for nested tensors"
        if t.layout is not torch.strided:
            return f"no kernels for {t.layout} tensors"
        return f"no kernels for a {type(t).__name__}"
    return ""


_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
# meta: shapes without data, which the fake kernels know.
_DEVICES = frozenset(("cpu", "cuda", "meta"))
_NO_DISPATCH = torch.Tensor.__torch_dispatch__
