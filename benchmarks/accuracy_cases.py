"""Losses and norms where digits are at stake, gdbp's and torch's against the exact result."""

import decimal
import math
from collections.abc import Callable, Iterator
from decimal import Decimal
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

import gdbp.nn.functional as ours
from gdbp.nn import utils

FULL, HALF = (torch.float64, torch.float32), (torch.bfloat16, torch.float16)
# Of the label's logit over the others'.
GAPS = (2, 8, 16, 24)


class Entry(NamedTuple):
    """Something to compute in a dtype: `run` with gdbp's function and with torch's, each a tensor or several, named in
    `results`; `exact` the same in float64."""

    case: str
    dtype: torch.dtype
    results: tuple[str, ...]
    run: tuple[Callable[[], tuple], Callable[[], tuple]]
    exact: Callable[[], tuple]


def entries() -> Iterator[Entry]:
    yield from _confident_rows()
    yield from _confident_elements()
    yield from _half_types()
    yield from _many_rows()
    yield from _norms()


def error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative, of the whole by its 2-norm; NaN or infinite where the result is and the exact one is not."""
    exact = torch.as_tensor(exact, dtype=torch.float64)
    difference = torch.linalg.vector_norm(result.double() - exact)
    return (difference / torch.linalg.vector_norm(exact)).item()


def value_and_grads(loss: Callable, inputs: list[torch.Tensor], *others) -> tuple[torch.Tensor, ...]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    value = loss(*leaves, *others)
    return value.detach(), *torch.autograd.grad(value, leaves)


def _pair(name: str, inputs: list[torch.Tensor], *others, **options) -> tuple[Callable, Callable]:
    return tuple(
        partial(value_and_grads, partial(getattr(module, name), **options), inputs, *others) for module in (ours, F)
    )


def _in_float64(name: str, inputs: list[torch.Tensor], *others, **options) -> Callable[[], tuple]:
    loss = partial(getattr(F, name), **options)
    wide = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in others]
    return partial(value_and_grads, loss, [t.double() for t in inputs], *wide)


# ---- confident rows: the loss and the label's gradient are small numbers beside 1 ----


def _exact_row(row: list[float], label: int) -> tuple[float, float]:
    """-log softmax at the label, and its derivative there, in 60 digits."""
    with decimal.localcontext(decimal.Context(prec=60)):
        z = [Decimal(v) for v in row]
        others = sum((v - z[label]).exp() for j, v in enumerate(z) if j != label)
        return float((1 + others).ln()), float(-others / (1 + others))


def _confident_rows() -> Iterator[Entry]:
    for dtype in (*FULL, *HALF):
        for gap in GAPS:
            x = torch.tensor([[-0.25, gap, -0.5, 0.0]], dtype=dtype)
            label = torch.tensor([1])

            def first_two(run: Callable) -> Callable[[], tuple]:
                def values() -> tuple:
                    loss, grad = run()
                    return loss, grad[0, 1]

                return values

            run = tuple(first_two(f) for f in _pair("cross_entropy", [x], label))
            case = f"cross_entropy, label {gap} above the others"
            yield Entry(case, dtype, ("loss", "label's gradient"), run, partial(_exact_row, x[0].tolist(), 1))


def _confident_elements() -> Iterator[Entry]:
    name = "binary_cross_entropy_with_logits"
    for dtype in (*FULL, *HALF):
        for gap in (8, 24):
            x, t = torch.tensor([-float(gap)], dtype=dtype), torch.zeros(1, dtype=dtype)
            tail = math.exp(-gap)
            exact = partial(tuple, (math.log1p(tail), torch.tensor([tail / (1 + tail)], dtype=torch.float64)))
            yield Entry(f"{name}, a negative at -{gap}", dtype, ("loss", "gradient"), _pair(name, [x], t), exact)


# ---- half types ----


def _half_types() -> Iterator[Entry]:
    generator = torch.Generator().manual_seed(0)
    for dtype in HALF:
        x = (3 * torch.randn(256, 1000, generator=generator)).to(dtype)
        labels = torch.randint(1000, (256,), generator=generator)
        soft = torch.rand(256, 1000, generator=generator)
        soft = (soft / soft.sum(1, keepdim=True)).to(dtype)
        both = ("loss", "gradient")
        for case, target, options in (
            ("256 x 1000", labels, {}),
            ("256 x 1000, label_smoothing 0.1", labels, {"label_smoothing": 0.1}),
            ("256 x 1000, probabilities", soft, {}),
        ):
            run = _pair("cross_entropy", [x], target, **options)
            exact = _in_float64("cross_entropy", [x], target, **options)
            yield Entry(f"cross_entropy, {case}", dtype, both, run, exact)
        prediction, truth = (150 * torch.randn(4096, generator=generator).to(dtype) for _ in range(2))
        for name in ("mse_loss", "l1_loss", "huber_loss", "smooth_l1_loss"):
            run, exact = _pair(name, [prediction], truth), _in_float64(name, [prediction], truth)
            yield Entry(f"{name}, 4096 errors around 200", dtype, both, run, exact)
        hidden, weight = (torch.randn(n, 64, generator=generator).to(dtype) for n in (256, 1000))
        run = tuple(partial(value_and_grads, f, [hidden, weight], labels) for f in (ours.linear_cross_entropy, _plain))
        exact = partial(value_and_grads, _plain, [hidden.double(), weight.double()], labels)
        results = ("loss", "gradient of input", "gradient of weight")
        yield Entry("linear_cross_entropy, 256 x 64 x 1000", dtype, results, run, exact)


def _plain(x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(x, weight), labels)


def _many_rows() -> Iterator[Entry]:
    generator = torch.Generator().manual_seed(0)
    for dtype in HALF:
        x = torch.randn(70_000, 3, generator=generator).to(dtype)
        labels = torch.randint(3, (70_000,), generator=generator)
        run, exact = _pair("cross_entropy", [x], labels), _in_float64("cross_entropy", [x], labels)
        yield Entry("cross_entropy, 70 000 rows", dtype, ("loss", "gradient"), run, exact)


def _norms() -> Iterator[Entry]:
    for value, count, dtype in (
        (6e4, 4, torch.float16),
        (1.0, 3, torch.bfloat16),
        (3e20, 4, torch.float32),
        (1e-30, 4, torch.float32),
    ):
        grad = torch.full((count,), value, dtype=dtype)
        run = tuple(partial(_norm, module, grad) for module in (utils, torch.nn.utils))
        exact = partial(tuple, (grad[0].double() * math.sqrt(count),))
        yield Entry(f"get_total_norm of {count} times {value:g}", dtype, ("norm",), run, exact)


def _norm(module, grad: torch.Tensor) -> tuple[torch.Tensor]:
    return (module.get_total_norm([grad]),)
