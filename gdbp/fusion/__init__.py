"""``fuse``: runs of Linear, BatchNorm1d and activation layers in one pass, in any model, and back."""

from collections.abc import Callable

import torch

from gdbp.fusion.classes import fused_class, unfused_class
from gdbp.fusion.report import Fused, FuseReport, Left, describe, is_candidate
from gdbp.fusion.trace import Untraceable, rewrite

__all__ = ["FuseReport", "Fused", "Left", "fuse", "unfuse"]

_CONTAINERS = (torch.nn.ModuleList, torch.nn.ModuleDict)


def fuse(
    model: torch.nn.Module, *, trace: bool = True, report: Callable[[FuseReport], object] | None = None
) -> torch.nn.Module:
    """Have the runs of ``Linear``, ``BatchNorm1d`` and activation in a model computed in one pass each.

    No layer is replaced, and none changes: parameters, buffers, hooks, names, ``state_dict`` and optimizers are
    those from before. What changes is how layers are called, by the modules around them:

    - a ``torch.nn.Sequential`` looks at its layers when it is called, and computes runs among them at once;
    - any other module whose forward torch.fx can trace gets one in which its runs are one call each. Activations may be
      modules, functions (``F.relu(self.fc(x))``) or methods.

    Both become instances of a subclass of their class. At every call a run is looked at again: with hooks on one of
    its layers, a parametrization, another class, or parameters of an activation that the kernels don't have, its
    layers are called one by one, as they were. ``deepcopy``, pickle, ``torch.compile`` and ``torch.export`` work.

    Activations are those of :func:`gdbp.nn.functional.linear`. With a batch's own statistics the bias of a linear
    layer in front of them has the gradient 0, where torch's is rounding noise.

    Args:
        model: changed in place.
        trace: whether to trace forwards. As always with torch.fx, what a forward decides in Python is decided once,
            now. Those that depend on ``self.training``, have arguments that may be left out, change attributes, or
            make tensors are left alone; those that depend on random numbers or on the world outside can't be told.
        report: called with a :class:`FuseReport`, for example ``print``.

    Returns:
        ``model``.

    Raises:
        TypeError: model is no module.
        ValueError: as in :func:`unfuse`, for a model that is fused already.
    """
    unfuse(model)
    # A module that has several names goes by the first.
    names = {module: name for name, module in reversed(list(model.named_modules(remove_duplicate=False)))}
    changes, fused, reasons = [], [], {}
    for module in model.modules():
        if _is_sequential(module):
            layers = list(module._modules.values())
            found, left = describe(layers, [names[layer] for layer in layers], "nothing follows")
            if found:
                changes.append((module, None))
        elif trace and _is_users(module) and any(map(is_candidate, _called_by(module))):
            try:
                code, seen = rewrite(module, names)
            except Untraceable as error:
                reasons.update({names[layer]: str(error) for layer in _called_by(module) if is_candidate(layer)})
                continue
            found, left = seen.fused, seen.left
            if code is not None:
                changes.append((module, code))
        else:
            if not isinstance(module, _CONTAINERS):
                why = _why_unseen(module)
                reasons |= {names[layer]: why for layer in _called_by(module) if is_candidate(layer)} | reasons
            continue
        fused += found
        reasons.update({each.layer: each.reason for each in left})
    for module, code in changes:
        module.__class__ = fused_class(type(module), code)
    if report is not None:
        done = {layer for run in fused for layer in run.layers}
        rest = [(name, is_candidate(module)) for name, module in model.named_modules() if name not in done]
        unseen = "no forward of the model calls it"
        left = (Left(name, reasons.get(name, unseen)) for name, expected in rest if expected or name in reasons)
        report(FuseReport(tuple(fused), tuple(left)))
    return model


def unfuse(model: torch.nn.Module) -> torch.nn.Module:
    """Give every module that :func:`fuse` changed its own class back; the model is then what it was.

    Returns:
        ``model``, changed in place.

    Raises:
        TypeError: model is no module.
        ValueError: a fused module has got another class since, by a parametrization or ``fully_shard``, say.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    fused = [(name, module) for name, module in model.named_modules() if unfused_class(module) is not None]
    for name, module in fused:
        if "_unfused_class" not in vars(type(module)):
            raise ValueError(
                f"{name or 'the model'} was fused and has become a {type(module).__name__} since; "
                "undo that before unfuse"
            )
    for _, module in fused:
        module.__class__ = unfused_class(module)
    return model


def _is_sequential(module: torch.nn.Module) -> bool:
    return type(module).forward is torch.nn.Sequential.forward and "forward" not in vars(module)


def _is_users(module: torch.nn.Module) -> bool:
    """Whether this is not one of torch's or our own modules, whose forwards are no composition of layers."""
    return type(module).__module__.partition(".")[0] not in ("torch", "gdbp")


def _why_unseen(module: torch.nn.Module) -> str:
    if "forward" in vars(module):
        return f"the forward of {type(module).__name__} was replaced"
    if _is_users(module):
        return f"it is called by a {type(module).__name__}, which is no Sequential, and trace is False"
    return f"it is called by a {type(module).__name__}, which has a forward of its own"


def _called_by(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules that its forward would call: its children, and those of its lists and dicts of modules."""
    layers = []
    for child in module.children():
        layers += _called_by(child) if isinstance(child, _CONTAINERS) else [child]
    return layers
