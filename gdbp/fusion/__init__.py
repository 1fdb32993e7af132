"""``fuse``: runs of Linear, BatchNorm1d and activation layers in one pass, in any model, and back."""

from collections.abc import Callable

import torch

from gdbp.fusion.classes import fused_class, unfused_class
from gdbp.fusion.explain import Explained, Explanation, explain
from gdbp.fusion.plan import plan
from gdbp.fusion.report import Fused, FuseReport, Left
from gdbp.nn._arguments import check_module

__all__ = ["Explained", "Explanation", "FuseReport", "Fused", "Left", "explain", "fuse", "unfuse"]


def fuse(
    model: torch.nn.Module, *, trace: bool = True, report: Callable[[FuseReport], object] | None = None
) -> torch.nn.Module:
    """Have the runs of ``Linear``, ``BatchNorm1d`` and activation in a model computed in one pass each.

    No layer is replaced, and none changes: parameters, buffers, hooks, names, ``state_dict`` and optimizers are
    those from before. What changes is how layers are called, by the modules around them:

    - a ``torch.nn.Sequential`` looks at its layers when it is called, and computes runs among them at once;
    - any other module whose forward torch.fx can trace gets one in which its runs are one call each. Activations may be
      modules, functions (``F.relu(self.fc(x))``) or methods.

    On the CPU in float32 or float64 linear layers up to 128 wide, with activations or without, that follow one another
    are one node of the graph, as in :class:`gdbp.nn.MLP`; not under ``torch.compile``.

    Both become instances of a subclass of their class. At every call a run is looked at again: with hooks on one of
    its layers, a parametrization, another class, or parameters of an activation that the kernels don't have, its
    layers are called one by one, as they were. ``deepcopy``, pickle, ``torch.compile`` and ``torch.export`` work.

    Activations are those of :func:`gdbp.nn.functional.linear`. Behind leaky_relu and softplus, whose output is
    kept for the backward pass, nothing may write in place, as with torch behind relu: where the module itself does, it
    is left alone; where one around it does, backward raises. With a batch's own statistics the bias of a linear layer
    in front of them has the gradient 0, where torch's is rounding noise.

    Args:
        model: changed in place.
        trace: whether to trace forwards. As always with torch.fx, what a forward decides in Python is decided once,
            now. Where an attribute that it read (a number, a function, how many layers a list has) is another at a
            later call, that call takes the forward from before, unfused; ``fuse`` again for one with the new value.
            What it reads of objects that are no modules can't be told. Those that depend on ``training``, have
            arguments that may be left out, change attributes of modules, make tensors, ask what kind of thing a result
            is, switch gradients or autocast, are checkpointed, have hooks on saved tensors, or call an
            ``autograd.Function`` are left alone; those that depend on random numbers or on the world outside, or
            change it (attributes of what is no module, too), can't be told, and run twice here.
        report: called with a :class:`FuseReport`, for example ``print``.

    Returns:
        ``model``.

    Raises:
        TypeError: model is no module, report no function.
        ValueError: as in :func:`unfuse`, for a model that is fused already.
    """
    if report is not None and not callable(report):
        raise TypeError(f"report is {report!r}; expected a function, such as print")
    unfuse(model)
    changes, found = plan(model, trace)
    # All classes are made before any is given: what goes wrong leaves the model as it is.
    for module, cls in [(module, fused_class(type(module), code)) for module, code in changes]:
        module.__class__ = cls
    if report is not None:
        try:
            report(found)
        except BaseException:
            unfuse(model)
            raise
    return model


def unfuse(model: torch.nn.Module) -> torch.nn.Module:
    """Give every module that :func:`fuse` changed its own class back; the model is then what it was.

    Returns:
        ``model``, changed in place.

    Raises:
        TypeError: model is no module.
        ValueError: a fused module has got another class since, by a parametrization or ``fully_shard``, say.
    """
    check_module("model", model)
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
