"""What the tests of layers and losses share: a float64 oracle, distances in ulp, cases, torch's samples."""

import importlib
import importlib.util
import sys
import types
import unittest
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from gdbp.nn import functional as ours
from gdbp.nn.functional import cross_entropy

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FULL_DTYPES = FLOAT_DTYPES[:2]
REDUCTIONS = ("none", "mean", "sum")
# One activation of each kind: the backward pass needs nothing, the output, what comes before it.
KINDS_OF_ACTIVATION = (None, "relu", "gelu")
LAYOUTS = ("contiguous", "transposed", "strided", "expanded", "misaligned")


# ---- distances ----


def spacing(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance from each |exact| to the next number of ``dtype``, as float64: one ulp."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(exact.double().abs().clamp_min(info.smallest_normal))
    return info.eps / 2 * torch.exp2(exponent.double())


def ulps(actual: Tensor, exact: Tensor, scale: Tensor | None = None) -> float:
    """The largest error of ``actual`` in units of the last place of ``exact`` (or of ``scale``, where terms
    that cancel set the digits that can be had)."""
    error = (actual.double() - exact.double()).abs()
    return (error / spacing(exact if scale is None else scale, actual.dtype)).max().item()


# What an error may be more than twice torch's, in ulp of the largest element, and for full precision in ulp
# of the terms, which are of order 1: torch's is sometimes lucky, and float64 is its own oracle.
SLACK = {torch.float64: 64, torch.float32: 16, torch.bfloat16: 1, torch.float16: 1}


def no_worse(mine: Tensor, torchs: Tensor, exact: Tensor) -> None:
    """Mine has torch's shape and dtype, is NaN or infinite just where the exact result is, and errs at most
    twice as much as torch's (both against float64) and ``SLACK``."""
    assert mine.shape == torchs.shape and mine.dtype == torchs.dtype
    rounded = exact.to(mine.dtype)
    torch.testing.assert_close(mine.isnan(), rounded.isnan())
    infinite = rounded.isinf()
    torch.testing.assert_close(mine[infinite], rounded[infinite])
    finite = rounded.isfinite() & torchs.isfinite()
    if not finite.any():
        return
    info = torch.finfo(mine.dtype)
    slack = SLACK[mine.dtype] * info.eps
    mine, torchs, exact = (t.detach().double().where(finite, 0) for t in (mine, torchs, exact))
    largest = exact.abs().max().clamp_min(1 if info.bits >= 32 else info.smallest_normal)
    assert (mine - exact).abs().max() <= 2 * (torchs - exact).abs().max() + slack * largest


# ---- running ----


def leaf(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """A copy of the same strides that starts a graph of its own."""
    if tensor is None or not tensor.is_floating_point():
        return tensor
    return tensor.detach().to(dtype or tensor.dtype).requires_grad_(tensor.requires_grad)


def values_and_grads(
    f: Callable[..., Tensor],
    tensors: Sequence[Tensor | None],
    upstream: Tensor | None = None,
    create_graph: bool = False,
) -> list[Tensor]:
    """The result of ``f``, and the gradients of the tensors that require them, for upstream gradients that
    are given, or drawn with a fixed seed."""
    output = f(*tensors)
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    if upstream is None:
        generator = torch.Generator().manual_seed(7)
        upstream = torch.randn(output.shape, dtype=torch.float64, generator=generator).bfloat16()
    upstream = upstream.to(output.device, output.dtype)
    grads = torch.autograd.grad(output, wanted, upstream, create_graph=create_graph) if wanted else ()
    return [output.detach(), *grads]


def compare(
    mine: Callable[..., Tensor],
    torchs: Callable[..., Tensor],
    tensors: Sequence[Tensor | None],
    upstream: Tensor | None = None,
) -> None:
    """Values and gradients against torch's and float64's, and nothing written where it should not be."""
    before = [None if t is None else (t.detach().clone(), t._version) for t in (*tensors, upstream)]
    results = (
        values_and_grads(mine, tensors, upstream),
        values_and_grads(torchs, [leaf(t) for t in tensors], upstream),
        values_and_grads(torchs, [leaf(t, torch.float64) for t in tensors], upstream),
    )
    for triple in zip(*results, strict=True):
        no_worse(*triple)
    for tensor, kept in zip((*tensors, upstream), before):
        if tensor is not None:
            assert tensor._version == kept[1]
            torch.testing.assert_close(tensor.detach(), kept[0], rtol=0, atol=0, equal_nan=True)


def on_one_and_two_threads(f: Callable[[], list[Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each result of ``f`` on one thread, beside that on two."""
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(f())
    finally:
        torch.set_num_threads(threads)
    return zip(*results)


# ---- cases ----


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The values of ``tensor`` (for "expanded", of its first row) in memory that is laid out otherwise."""
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "strided" and tensor.dim():
        return tensor.repeat_interleave(2, dim=-1)[..., ::2]
    if layout == "expanded" and tensor.dim() and tensor.shape[0]:
        return tensor[:1].expand(tensor.shape)
    if layout == "misaligned":
        return torch.cat((tensor.new_zeros(1), tensor.reshape(-1)))[1:].view(tensor.shape)
    return tensor.contiguous()


def samples(name: str, dtype: torch.dtype) -> Iterator[tuple[Tensor, tuple, dict]]:
    """torch's own sample inputs for an operator, each with requires_grad where it makes sense."""
    for sample in _op(name).sample_inputs("cpu", dtype, requires_grad=True):
        yield sample.input, sample.args, sample.kwargs


def compare_samples(name: str, mine: Callable, torchs: Callable, dtype: torch.dtype, takes=lambda *_: True) -> int:
    """``compare`` over torch's own samples that ``takes`` accepts; returns their number."""
    count = 0
    for sample in filter(lambda s: takes(*s), samples(name, dtype)):
        flat = [t for t in tree_leaves(sample) if isinstance(t, Tensor)]

        def call(f, *tensors, sample=sample):
            given = iter(tensors)
            input, args, kwargs = tree_map(lambda v: next(given) if isinstance(v, Tensor) else v, sample)
            return f(input, *args, **kwargs)

        compare(lambda *t, call=call: call(mine, *t), lambda *t, call=call: call(torchs, *t), flat)
        count += 1
    return count


def torchs_tables(module: str):
    """A module of torch's own test data. It imports a package of torch's test suite that users don't have, and that
    nothing here calls."""
    if "expecttest" not in sys.modules and importlib.util.find_spec("expecttest") is None:
        sys.modules["expecttest"] = stub = types.ModuleType("expecttest")
        stub.TestCase = unittest.TestCase
    return importlib.import_module(f"torch.testing._internal.{module}")


def _op(name: str):
    op_db = torchs_tables("common_methods_invocations").op_db
    (op,) = (op for op in op_db if op.name == name and not op.variant_test_name)
    return op


# Losses of single elements: torch's name and arguments.
POINTWISE = {
    "mse": ("mse_loss", {}),
    "l1": ("l1_loss", {}),
    "huber": ("huber_loss", {}),
    "huber-0.3": ("huber_loss", {"delta": 0.3}),
    "smooth_l1": ("smooth_l1_loss", {}),
    "smooth_l1-2.5": ("smooth_l1_loss", {"beta": 2.5}),
    "smooth_l1-0": ("smooth_l1_loss", {"beta": 0.0}),
}


def both_pointwise(loss: str, **options) -> tuple[Callable, Callable]:
    """Ours and torch's, of a row of POINTWISE."""
    name, arguments = POINTWISE[loss]

    def of(module):
        return lambda x, y: getattr(module, name)(x, y, **arguments, **options)

    return of(ours), of(F)


def pair(shape, dtype=torch.float64, device="cpu"):
    return [torch.randn(shape, dtype=torch.float64).to(device, dtype).requires_grad_() for _ in range(2)]


def both_ce(target: Tensor, weight: Tensor | None = None, **options) -> tuple[Callable, Callable]:
    """Our cross-entropy and torch's, as functions of the logits."""

    def of(f):
        return lambda x: f(x, target, None if weight is None else weight.to(x.dtype), **options)

    return of(cross_entropy), of(F.cross_entropy)


def logits(shape, dtype=torch.float64, device="cpu", scale=3.0):
    return (scale * torch.randn(shape, dtype=torch.float64)).to(device, dtype).requires_grad_()
