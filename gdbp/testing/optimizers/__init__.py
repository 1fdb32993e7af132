"""check_optimizer: every check on one class, each where it can do no harm."""

import copy
import inspect

import torch

from gdbp.testing.isolate import run_all
from gdbp.testing.optimizers import memory, numerics, protocol, state, training  # noqa: F401  (they fill the suite)
from gdbp.testing.optimizers.subject import SUITE
from gdbp.testing.report import Report

__all__ = ["SUITE", "check_optimizer"]


def check_optimizer(cls: type[torch.optim.Optimizer], /, **kwargs) -> Report:
    """Checks whether a class of optimizers does what PyTorch, its trainers and its users expect of one.

    The class may be any: gdbp's, torch's, your own. What is right is what the class itself does on contiguous float64
    parameters, with ``foreach=False, fused=False`` where it has these arguments; an update rule that is wrong there too
    is not seen. The checks, on the CPU: accuracy in units in the last place (float32, bfloat16), every memory layout of
    parameters and gradients with guards around them, gradients that come and go, values that are not finite, threads;
    autograd's version counters, closures, hooks, schedulers, GradScaler, torch.compile; checkpoints, copies.

    Checks run in another process, so that a crash is one failed check, unless that process could not import the class
    (one made in a function, in ``__main__`` or a notebook): then they run in this one.

    Args:
        cls: the class, called as ``cls(params, **kwargs)``.
        **kwargs: its arguments beside the parameters. A learning rate above 0 is needed where it has no default.

    Returns:
        A :class:`Report`: ``report.passed``, ``report.failed`` (names), ``report.checks``; ``print(report)`` shows the
        table.

    Raises:
        TypeError: cls is no class of optimizers, or its ``step`` needs a closure, as ``torch.optim.LBFGS``'s does.
        Exception: what the constructor raises for a float32 parameter and the arguments.
    """
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise TypeError(f"check_optimizer: cls is {cls!r}; expected a subclass of torch.optim.Optimizer itself")
    closure = inspect.signature(cls.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise TypeError(f"check_optimizer: {cls.__name__}.step needs a closure; expected one that does without it")
    cls([torch.nn.Parameter(torch.zeros(1))], **copy.deepcopy(kwargs))  # wrong arguments are the caller's to mend
    arguments = "".join(f", {name}={value!r}" for name, value in kwargs.items())
    checks = run_all(SUITE, cls, (kwargs,))
    return Report(f"{cls.__module__}.{cls.__qualname__}(params{arguments})", tuple(checks))
