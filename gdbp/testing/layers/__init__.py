"""check_layer: every check on one class of layers."""

import copy
from itertools import chain

import torch
from torch.nn.parameter import is_lazy

from gdbp.testing.isolate import run_all
from gdbp.testing.layers import derivatives, memory, numerics, protocol, state  # noqa: F401  (they fill the suite)
from gdbp.testing.layers.subject import SUITE
from gdbp.testing.report import Report

__all__ = ["SUITE", "check_layer"]


def check_layer(cls: type[torch.nn.Module], /, *, input_shape: tuple[int, ...], **kwargs) -> Report:
    """Checks whether a class of layers does what PyTorch and its users expect of one.

    The class may be any of which an object maps one floating tensor to one floating tensor: gdbp's, torch's, your own.
    What is right is what the class itself does on contiguous float64 tensors, and finite differences of that; a formula
    that is wrong there too is not seen. The checks, on the CPU: accuracy in units in the last place (float32 and half
    types), every memory layout of inputs, gradients and parameters, no rows, values that are not finite; first and
    second derivatives, forward mode, torch.func; values changed between forward and backward; hooks, checkpointing,
    autocast, torch.compile and torch.export; checkpoints, copies, the meta device, parametrizations.

    A layer that draws random numbers in training, such as dropout, is checked in evaluation mode. One that draws them
    there as well, has complex or lazy parameters, or takes no batches is refused.

    Checks run in another process, as those of :func:`gdbp.testing.check_optimizer` do.

    Args:
        cls: the class, called as ``cls(**kwargs)``.
        input_shape: of an input, with the batch first: at least one dimension.
        **kwargs: arguments of the class.

    Returns:
        A :class:`Report`: ``report.passed``, ``report.failed`` (names), ``report.checks``; ``print(report)`` shows the
        table.

    Raises:
        TypeError: cls is no class of modules, or an object of it does not map a tensor to a tensor, or can't be
            compared with itself in float64.
        ValueError: input_shape is no shape, or has no batch first.
        Exception: what the constructor raises for the arguments, or the layer for a float32 input of that shape.
    """
    if not (isinstance(cls, type) and issubclass(cls, torch.nn.Module)):
        raise TypeError(f"check_layer: cls is {cls!r}; expected a subclass of torch.nn.Module itself")
    try:
        shape = tuple(input_shape)
    except TypeError:
        shape = ()
    if not shape or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(f"check_layer: input_shape is {input_shape!r}; expected sizes above 0, such as (8, 5)")
    with torch.random.fork_rng(devices=[]):  # wrong arguments are the caller's to mend
        layer = cls(**copy.deepcopy(kwargs))
        for name, tensor in chain(layer.named_parameters(), layer.named_buffers()):
            if is_lazy(tensor) or tensor.is_complex():
                kind = "lazy" if is_lazy(tensor) else "complex"
                raise TypeError(f"check_layer: {name} of {cls.__name__} is {kind}; expected a layer of real tensors")
        output = layer(torch.randn(shape))
        try:
            layer(torch.randn(2 * shape[0], *shape[1:]))
        except Exception as error:
            raise ValueError(
                f"check_layer: input_shape is {shape}, and of twice as many rows {cls.__name__} raises "
                f"{type(error).__name__}: {error}; expected the batch first, of any size"
            ) from error
        state = torch.get_rng_state()
        layer.eval()(torch.randn(shape, generator=torch.Generator()))
        if not torch.equal(state, torch.get_rng_state()):
            raise TypeError(
                f"check_layer: {cls.__name__} draws random numbers in evaluation, too; expected a layer with an output "
                "that can be compared"
            )
    if not (isinstance(output, torch.Tensor) and output.is_floating_point()):
        found = output.dtype if isinstance(output, torch.Tensor) else type(output).__name__
        raise TypeError(f"check_layer: {cls.__name__} returns {found}; expected a layer that returns a floating tensor")
    arguments = ", ".join(f"{name}={value!r}" for name, value in kwargs.items())
    subject = f"{cls.__module__}.{cls.__qualname__}({arguments}) of {shape}"
    return Report(subject, tuple(run_all(SUITE, cls, (kwargs, shape))))
