"""Which modules of a model can be fused, and how."""

import torch

from gdbp.fusion.classes import Code, class_of, forward_of
from gdbp.fusion.report import Fused, FuseReport, Left, describe, is_candidate
from gdbp.fusion.trace import Untraceable, rewrite
from gdbp.nn.mlp import MLP

_CONTAINERS = (torch.nn.ModuleList, torch.nn.ModuleDict)


def plan(model: torch.nn.Module, trace: bool = True) -> tuple[list[tuple[torch.nn.Module, Code | None]], FuseReport]:
    """The modules that call runs, each with its new forward (None: a Sequential's), and a report. Nothing is changed;
    a model that is fused already is looked at as if it were not."""
    names = names_of(model)
    changes: list[tuple[torch.nn.Module, Code | None]] = []
    fused: list[Fused] = []
    reasons: dict[str, str] = {}
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
    done = {layer for run in fused for layer in run.layers}
    rest = [(name, is_candidate(module)) for name, module in model.named_modules() if name not in done]
    unseen = "no forward of the model calls it"
    left = (Left(name, reasons.get(name, unseen)) for name, expected in rest if expected or name in reasons)
    return changes, FuseReport(tuple(fused), tuple(left))


def names_of(model: torch.nn.Module) -> dict[torch.nn.Module, str]:
    """What each module is called in the model, the first of its names where it has several."""
    return {module: name for name, module in reversed(list(model.named_modules(remove_duplicate=False)))}


def _is_sequential(module: torch.nn.Module) -> bool:
    return forward_of(module) in (torch.nn.Sequential.forward, MLP.forward) and "forward" not in vars(module)


def _is_users(module: torch.nn.Module) -> bool:
    """Whether this is not one of torch's or our own modules, whose forwards are no composition of layers."""
    return class_of(module).__module__.partition(".")[0] not in ("torch", "gdbp")


def _why_unseen(module: torch.nn.Module) -> str:
    if "forward" in vars(module):
        return f"the forward of {class_of(module).__name__} was replaced"
    if _is_users(module):
        return f"it is called by a {class_of(module).__name__}, which is no Sequential, and trace is False"
    return f"it is called by a {class_of(module).__name__}, which has a forward of its own"


def _called_by(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules that its forward would call: its children, and those of its lists and dicts of modules."""
    layers = []
    for child in module.children():
        layers += _called_by(child) if isinstance(child, _CONTAINERS) else [child]
    return layers
