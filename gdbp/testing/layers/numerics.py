"""Checks of the numbers: accuracy, numbers of rows, values that are not finite."""

import math

import torch

from gdbp.testing.compare import number, require, same_bits
from gdbp.testing.layers.subject import SUITE, Subject
from gdbp.testing.report import Failure, NotApplicable, one_line

_MOST = 1 << 16  # elements of inputs of other sizes than asked for


def _accuracy(subject: Subject, rng: torch.Generator, dtype: torch.dtype) -> str:
    """Around the vector widths of kernels, with a full vector and a tail; a large row has both."""
    most = max(subject.shape[0], _MOST // math.prod(subject.shape[1:]))
    worst, sizes = 0.0, [rows for rows in (subject.shape[0], 3, 7, 16, 17, 65) if rows <= most]
    for rows in sizes:
        layer = subject.make(dtype)
        x = subject.input(rng, dtype, rows)
        g = subject.gradient(x, rng)
        exact, nearby = subject.exact(layer, x, g), subject.nearby(layer, x, g, rng)
        found = subject.run(layer, x, g)
        found.require_close(exact, f"{rows} rows: ", nearby)
        worst = max(worst, *found.distance(exact).values())
    return f"{number(worst)} ulp from float64, {min(sizes)} to {max(sizes)} rows"


@SUITE.check("accuracy float32")
def accuracy_float32(subject: Subject, rng: torch.Generator) -> str:
    return _accuracy(subject, rng, torch.float32)


def _half(subject: Subject, rng: torch.Generator, dtype: torch.dtype) -> str:
    try:
        return _accuracy(subject, rng, dtype)
    except RuntimeError as error:
        if "not implemented" in str(error).lower() or isinstance(error, NotImplementedError):
            raise NotApplicable(f"does not work: {one_line(str(error))}") from None
        raise


@SUITE.check("accuracy bfloat16")
def accuracy_bfloat16(subject: Subject, rng: torch.Generator) -> str:
    return _half(subject, rng, torch.bfloat16)


@SUITE.check("accuracy float16")
def accuracy_float16(subject: Subject, rng: torch.Generator) -> str:
    return _half(subject, rng, torch.float16)


@SUITE.check("accuracy in evaluation")
def in_evaluation(subject: Subject, rng: torch.Generator) -> str:
    """With statistics that a training step has moved."""
    layer, x = subject.make(), subject.input(rng)
    g = subject.gradient(x, rng)
    subject.run(layer, x, g)
    layer.eval()
    exact, nearby = subject.exact(layer, x, g), subject.nearby(layer, x, g, rng)
    return subject.run(layer, x, g).require_close(exact, usual=nearby)


@SUITE.check("no rows")
def no_rows(subject: Subject, rng: torch.Generator) -> str:
    """An empty batch has gradients of 0, or is refused in words."""
    layer = subject.make()
    x = subject.input(rng, rows=0)
    try:
        with torch.no_grad():
            output = layer(x.clone())
    except (ValueError, RuntimeError) as error:
        raise NotApplicable(f"refused: {one_line(str(error))}") from None
    found = subject.run(layer, x, torch.ones_like(output))
    for name, tensor in found.tensors.items():
        if name.startswith("gradient of"):
            require(not tensor.any(), f"{name} is not 0")
    return "gradients of 0"


@SUITE.check("NaN and infinity visible")
def nonfinite(subject: Subject, rng: torch.Generator) -> str:
    layer = subject.make()
    x = subject.input(rng)
    x.view(-1)[x.numel() // 2] = float("nan")
    with torch.no_grad():
        require(bool(layer(x.clone()).isnan().any()), "a NaN in the input is not in the output")
    x.view(-1)[x.numel() // 2] = float("inf")
    layer = subject.make()
    g = subject.gradient(x, rng)
    exact = subject.exact(layer, x, g)
    found = subject.run(layer, x, g)
    for name, tensor in found.tensors.items():
        other = exact.tensors[name]
        if not same_bits(tensor.isfinite(), other.isfinite()):
            count = int((tensor.isfinite() != other.isfinite()).sum())
            raise Failure(f"an infinity in the input: {count} elements of {name} are finite unlike in float64")
    return "NaN in the output; infinity as in float64"


@SUITE.check("same bits again")
def repeatable(subject: Subject, rng: torch.Generator) -> str:
    x = subject.input(rng)
    g = subject.gradient(x, rng)
    subject.run(subject.make(), x, g).require_same(subject.run(subject.make(), x, g), "the same run again")
    return "output, gradients and buffers"
