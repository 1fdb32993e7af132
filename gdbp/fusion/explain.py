"""``explain``: which kernel computed each layer, and why another did not."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gdbp import _load
from gdbp._table import format_table
from gdbp.fusion.classes import unfused_class
from gdbp.fusion.plan import names_of, plan
from gdbp.fusion.report import FuseReport
from gdbp.fusion.run import run
from gdbp.nn._arguments import check_module
from gdbp.nn._observe import is_watched
from gdbp.ops import _function
from gdbp.ops._function import why_not_fused

_SHOWN = 4  # operators in a cell


@dataclass(frozen=True)
class Explained:
    """One call of a layer, or of a run of them.

    Attributes:
        layers: their names in the module.
        kind: the layers' classes.
        kernel: what computed: the names of our operators, or "ATen" and torch's; with the device.
        why: why none of our kernels did; empty where one did, or where there is none for this kind of layer.
    """

    layers: tuple[str, ...]
    kind: str
    kernel: str
    why: str


@dataclass(frozen=True)
class Explanation:
    """What :func:`gdbp.explain` saw, in the order of the calls. ``str()`` is a table."""

    calls: tuple[Explained, ...]

    def __str__(self) -> str:
        rows = [["layers", "kind", "kernel", "why not ours"]]
        return format_table(rows + [[", ".join(c.layers), c.kind, c.kernel, c.why] for c in self.calls])


def explain(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Explanation:
    """Call a module once, and tell which kernel computed each of its layers, and why none of ours where none did.

    Nothing is trained or changed: buffers (running statistics) are copies during the call, and random numbers
    are drawn again. Only what the module's own code does beside that is done. ::

        print(gdbp.explain(model, input))

    Matrix products inside our operators are torch's, and count as ours.

    Args:
        module: any module, fused or not, in training or evaluation mode.
        args, kwargs: what it is called with.

    Raises:
        TypeError: module is no module. What the call itself raises.
    """
    check_module("module", module)
    recorder = _Recorder(sys._getframe().f_code)
    own = [(each, dict(each._buffers)) for each in module.modules() if isinstance(each._buffers, dict)]
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    devices = {t.get_device() for t in tree_leaves((list(module.parameters()), args, kwargs)) if _on_cuda(t)}
    try:
        with torch.random.fork_rng(devices=sorted(devices)), recorder, _function.recorded():
            torch.func.functional_call(module, buffers, args, kwargs)
    finally:
        # functional_call leaves copies in a module that has two names.
        for each, kept in own:
            each._buffers.update(kept)
    names, report = names_of(module), plan(module)[1]
    return Explanation(tuple(_row(call, module, names, report) for call in recorder.calls))


@dataclass
class _Call:
    layers: Sequence[torch.nn.Module | str]
    operators: list[torch._ops.OpOverload] = field(default_factory=list)
    device: str = "cpu"
    why: str = ""  # what keeps our kernels from its tensors, which are not kept themselves


class _Recorder(TorchDispatchMode):
    """Takes down every operator and the layer on whose behalf it runs. A hook would do, if hooks did not keep
    layers out of runs; so this looks at who is calling."""

    def __init__(self, until: CodeType):
        super().__init__()
        self.until = until
        self.calls: list[_Call] = []
        # Of the last call, with its first layer where it is one of several: a frame keeps what is in it, so no others.
        self.place: list[FrameType | int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        found = None if func.is_view else next(self._callers(sys._getframe(1)), None)
        if found is not None:
            *place, layers = found
            if place != self.place:
                self.place = place
                self.calls.append(_Call(layers))
            call, tensors = self.calls[-1], [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            call.device = tensors[0].device.type if tensors else call.device
            call.why = call.why or why_not_fused(*tensors)
            call.operators.append(func)
        return result

    def _callers(self, frame: FrameType | None) -> Iterator[tuple[FrameType, int, Sequence[torch.nn.Module | str]]]:
        while frame is not None and frame.f_code is not self.until:
            if frame.f_code is run.__code__:
                i, found, layers = (frame.f_locals.get(name) for name in ("i", "found", "layers"))
                if found is not None:
                    yield frame, i, layers[i : i + found.length]
            elif isinstance(layer := frame.f_locals.get("self"), torch.nn.Module):
                yield frame, 0, (layer,)
            frame = frame.f_back


def _row(call: _Call, module: torch.nn.Module, names: dict[torch.nn.Module, str], report: FuseReport) -> Explained:
    layers = tuple(f"{each}()" if isinstance(each, str) else names.get(each, "?") or "(itself)" for each in call.layers)
    kind = " + ".join(each if isinstance(each, str) else type(each).__name__ for each in call.layers)
    ours = [str(op).removesuffix(".default") for op in call.operators if op.namespace == "gdbp"]
    used = list(dict.fromkeys(ours or [op.__name__.partition(".")[0] for op in call.operators]))
    shown = ", ".join(used[:_SHOWN]) + (", ..." if len(used) > _SHOWN else "")
    kernel = f"{shown} ({call.device})" if ours else f"ATen {shown} ({call.device})"
    return Explained(layers, kind, kernel, "" if ours else _why(call, module, layers[0], report))


def _why(call: _Call, module: torch.nn.Module, name: str, report: FuseReport) -> str:
    layer = call.layers[0]
    if len(call.layers) > 1 or type(layer).__module__.startswith("gdbp."):
        return call.why or ("no kernel for these arguments" if _load.available else str(_load.reason))
    for left in report.left:
        if left.layer == name:
            return left.reason
    for fused in report.fused:
        if name in fused.layers:
            if all(unfused_class(each) is None for each in module.modules()):
                return f"gdbp.fuse makes it {fused.kind}"
            return "hooks on all modules" if is_watched() else "no run at this place"
    return ""


def _on_cuda(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_cuda
