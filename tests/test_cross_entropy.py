"""Cross-entropy against float64 and against exact decimals."""

import decimal
import itertools
import math
from decimal import Decimal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gdbp.nn import CrossEntropyLoss
from gdbp.nn.functional import cross_entropy
from tests.oracle import (
    FLOAT_DTYPES,
    FULL_DTYPES,
    LAYOUTS,
    REDUCTIONS,
    both_ce,
    compare,
    compare_samples,
    laid_out,
    leaf,
    logits,
    on_one_and_two_threads,
    samples,
    spacing,
    values_and_grads,
)

reductions = pytest.mark.parametrize("reduction", REDUCTIONS)


@reductions
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("ignore", [-100, 1, 1000, -1])
def test_ce_options(reduction, dtype, weighted, smoothing, ignore, device):
    for shape in ((7,), (6, 5), (3, 4, 2), (2, 3, 4, 3), (0, 3), (2, 3, 0)):
        classes = shape[0] if len(shape) == 1 else shape[1]
        target = torch.randint(classes, (*shape[:1], *shape[2:]) if len(shape) > 1 else (), device=device)
        if target.numel() > 2:
            target.view(-1)[::3] = ignore
        weight = torch.rand(classes, device=device, dtype=dtype) + 0.5 if weighted else None
        options = {"reduction": reduction, "ignore_index": ignore, "label_smoothing": smoothing}
        compare(*both_ce(target, weight, **options), [logits(shape, dtype, device)])


@reductions
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_ce_classes(reduction, dtype, device):
    for rows, classes in (
        (3, 1),
        (1, 2),
        (5, 7),
        (9, 8),
        (17, 15),
        (16, 17),
        (255, 10),
        (257, 10),
        (4, 1000),
        (3, 32000),
    ):
        target = torch.randint(classes, (rows,), device=device)
        compare(*both_ce(target, reduction=reduction), [logits((rows, classes), dtype, device)])


@pytest.mark.parametrize("layout", LAYOUTS)
@reductions
def test_ce_layouts(layout, reduction):
    for shape in ((9, 7), (3, 4, 5)):
        x = laid_out(logits(shape).detach(), layout).requires_grad_()
        target = torch.randint(shape[1], (shape[0], *shape[2:]))
        upstream = torch.randn(target.shape if reduction == "none" else (), dtype=torch.float64)
        weight = laid_out(torch.rand(shape[1], dtype=torch.float64), layout if layout != "expanded" else "strided")
        arguments = both_ce(laid_out(target, layout), weight, reduction=reduction)
        compare(*arguments, [x], laid_out(upstream, layout))


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any_ce(data):
    rows, classes = data.draw(st.integers(0, 20)), data.draw(st.integers(1, 40))
    more = data.draw(st.just(()) | st.lists(st.integers(1, 3), max_size=2))
    dtype, reduction = data.draw(st.sampled_from(FULL_DTYPES)), data.draw(st.sampled_from(REDUCTIONS))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    batched = data.draw(st.booleans())
    shape = (rows, classes, *more) if batched else (classes,)
    scale = data.draw(st.sampled_from((0.0, 1.0, 30.0)))
    x = laid_out(logits(shape, dtype, scale=scale).detach(), data.draw(st.sampled_from(LAYOUTS))).requires_grad_()
    target = torch.randint(classes, (rows, *more) if batched else ())
    ignore = data.draw(st.integers(-3, classes + 2))
    target[torch.rand(target.shape) < data.draw(st.sampled_from((0.0, 0.3, 1.0)))] = ignore
    weight = torch.rand(classes, dtype=dtype) + 0.1 if data.draw(st.booleans()) else None
    options = {
        "reduction": reduction, "ignore_index": ignore,
        "label_smoothing": data.draw(st.sampled_from((0.0, 0.1, 1.0)) | st.floats(0, 1)),
    }  # fmt: skip
    upstream = torch.randn(target.shape if reduction == "none" else (), dtype=dtype)
    compare(*both_ce(target, weight, **options), [x], laid_out(upstream, data.draw(st.sampled_from(LAYOUTS))))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_ce_on_torchs_samples(dtype):
    assert compare_samples("nn.functional.cross_entropy", cross_entropy, F.cross_entropy, dtype) >= 15
    assert any(args[0].is_floating_point() for _, args, _ in samples("nn.functional.cross_entropy", dtype))


def exact_row(row, label):
    """-log softmax at the label, and its gradient, in 60 digits from the logits as they are stored."""
    with decimal.localcontext(decimal.Context(prec=60)):
        z = [Decimal(v) for v in row]
        terms = [(v - z[label]).exp() for v in z]
        others = sum(t for j, t in enumerate(terms) if j != label)
        total = 1 + others
        gradient = [t / total for t in terms]
        gradient[label] = -others / total
        return float(total.ln()), [float(g) for g in gradient]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("classes", [2, 5])
def test_ce_of_confident_rows(dtype, classes):
    # torch forms the label's gradient as softmax - 1: no digits are left from a gap of 17 in float32, of 8 in
    # bfloat16, of 9 in float16, of 37 in float64. Its loss, log(1 + others), goes the same way.
    gaps = torch.arange(0, 80.5, 0.5)
    x = torch.linspace(-2, 0, classes).repeat(len(gaps), 1)
    label = 1
    x[:, label] = gaps
    x = x.to(dtype).requires_grad_()
    loss = cross_entropy(x, torch.full((len(gaps),), label), reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), x)
    graph = cross_entropy(x, torch.full((len(gaps),), label), reduction="sum")
    (differentiable,) = torch.autograd.grad(graph, x, create_graph=True)
    exact = [exact_row(row, label) for row in x.tolist()]
    losses, grads = (torch.tensor(e, dtype=torch.float64) for e in zip(*exact))
    bound = 8 if dtype in FULL_DTYPES else 0.51
    assert ((loss.double() - losses).abs() <= bound * spacing(losses, dtype)).all()
    assert ((grad.double() - grads).abs() <= bound * spacing(grads, dtype)).all()
    # Through operators in dtype itself, for whoever differentiates again.
    assert ((differentiable.double() - grads).abs() <= 64 * spacing(grads, dtype)).all()


@reductions
def test_ce_infinite_logits(reduction):
    inf = math.inf
    x = torch.tensor([[-inf, 0, 1], [0, -inf, 1], [-inf, -inf, -inf], [0, inf, 1], [inf, inf, 0], [-inf, 2, -inf]])
    for label, smoothing in itertools.product(range(3), (0.0, 0.1)):
        for row in x.double():
            row = row.unsqueeze(0).requires_grad_()
            options = {"reduction": reduction, "label_smoothing": smoothing}
            mine, other = (values_and_grads(f, [row]) for f in both_ce(torch.tensor([label]), **options))
            torch.testing.assert_close(mine, other, equal_nan=True)


@reductions
@pytest.mark.parametrize("create_graph", [False, True])
def test_ce_ignored_rows_hold_anything(reduction, create_graph):
    # torch's gradient of such a row is 0 * NaN = NaN.
    x = torch.randn(4, 3, dtype=torch.float64)
    clean = x[[0, 3]].clone().requires_grad_()
    x[1], x[2] = math.nan, math.inf
    x.requires_grad_()
    loss = cross_entropy(x, torch.tensor([0, -100, -100, 2]), reduction=reduction)
    expected = F.cross_entropy(clean, torch.tensor([0, 2]), reduction=reduction)
    torch.testing.assert_close(loss.sum(), expected.sum())
    (grad,) = torch.autograd.grad(loss.sum(), x, create_graph=create_graph)
    (wanted,) = torch.autograd.grad(expected.sum(), clean, create_graph=create_graph)
    torch.testing.assert_close(grad[[0, 3]], wanted)
    assert (grad[1:3] == 0).all()
    if create_graph:
        (second,) = torch.autograd.grad(grad.pow(2).sum(), x)
        torch.testing.assert_close(second[[0, 3]], torch.autograd.grad(wanted.pow(2).sum(), clean)[0])
        assert (second[1:3] == 0).all()


@reductions
@pytest.mark.parametrize("create_graph", [False, True])
def test_ce_with_nothing_to_count(reduction, create_graph):
    x = torch.randn(3, 4, requires_grad=True)
    all_ignored, no_weight = torch.full((3,), -100), torch.zeros(4)
    for target, weight in (
        (all_ignored, None),
        (all_ignored, torch.rand(4)),
        (torch.tensor([0, 1, 2]), no_weight),
    ):
        mine, other = (f(x) for f in both_ce(target, weight, reduction=reduction))
        torch.testing.assert_close(mine, other, equal_nan=True)
        (grad,) = torch.autograd.grad(mine.sum(), x, create_graph=create_graph)
        assert torch.equal(grad, torch.zeros_like(x))
    empty = torch.zeros(0, 4, requires_grad=True)
    loss = cross_entropy(empty, torch.zeros(0, dtype=torch.int64), reduction=reduction)
    assert loss.isnan() if reduction == "mean" else loss.sum() == 0
    assert torch.autograd.grad(loss.sum(), empty)[0].shape == (0, 4)
    none = torch.full((2,), -100)
    assert cross_entropy(torch.zeros(2, 0), none, reduction="sum") == 0


def test_ce_uint8_targets():
    x = logits((6, 4))
    target = torch.tensor([0, 1, 2, 3, 255, 1], dtype=torch.uint8)
    compare(*both_ce(target, ignore_index=255), [x])
    high = logits((2, 4, 3, 2))
    target = torch.ones(2, 3, 2, dtype=torch.uint8)  # which torch does not take
    torch.testing.assert_close(cross_entropy(high, target), F.cross_entropy(high, target.long()))


@pytest.mark.parametrize("target", ([0, 3, 1], [0, 1, -1], [0, 1, 2**40], [0, -(2**63), 0]))
def test_ce_label_out_of_range(target):
    x = torch.randn(3, 3, requires_grad=True)
    before = x.detach().clone()
    row = next(i for i, y in enumerate(target) if not 0 <= y < 3)
    with pytest.raises(IndexError, match=f"Target {target[row]} is out of bounds: .* row {row}; expected .* 0 to 2"):
        cross_entropy(x, torch.tensor(target))
    assert torch.equal(x.detach(), before) and x._version == 0 and x.grad is None


def test_ce_many_rows_of_float16():
    # 70,000 rows: the number itself, and the sum, are beyond float16.
    x, target = logits((70_000, 3), torch.float16), torch.randint(3, (70_000,))
    results = [values_and_grads(f, [v]) for f, v in zip(both_ce(target) + both_ce(target)[1:],
                                                       (x, leaf(x), leaf(x, torch.float64)))]  # fmt: skip
    for mine, _, exact in zip(*results):
        # Rounded once; torch's own mean is off by more.
        assert ((mine.double() - exact).abs() <= 0.51 * spacing(exact, torch.float16)).all()
    assert results[0][0].isfinite()


@pytest.mark.parametrize("classes", [2, 40])
def test_ce_huge_upstream(classes, device):
    """Also where upstream gradient and class weight together are beyond float32, if the gradient is not."""
    x = torch.full((1, classes), -30.0, device=device)
    x[0, 0] = 0
    weight = torch.full((classes,), 8.0, device=device)

    def gradient(dtype):
        logits = x.to(dtype).requires_grad_()
        loss = cross_entropy(logits, torch.tensor([0], device=device), weight.to(dtype), reduction="sum")
        return torch.autograd.grad(loss, logits, torch.tensor(1e38, dtype=dtype, device=device))[0]

    torch.testing.assert_close(gradient(torch.float32).double(), gradient(torch.float64), rtol=1e-5, atol=0)


def test_ce_of_no_classes(device):
    x = torch.empty(3, 0, device=device, requires_grad=True)
    loss = cross_entropy(x, torch.empty(3, 0, device=device))
    loss.backward()
    assert loss.isnan() and x.grad.shape == (3, 0)


@reductions
def test_ce_threads_do_not_change_bits(reduction):
    x, target = logits((3001, 33), torch.float32), torch.randint(33, (3001,))
    call = both_ce(target, torch.rand(33), reduction=reduction, label_smoothing=0.1)[0]
    for one, two in on_one_and_two_threads(lambda: values_and_grads(call, [x])):
        assert torch.equal(one, two)


def test_ce_refuses_what_torch_refuses():
    from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

    (info,) = (info for info in module_db if info.module_cls is torch.nn.CrossEntropyLoss)
    if info.module_error_inputs_func is None:
        pytest.skip("this torch lists no error inputs for CrossEntropyLoss")
    options = {"device": "cpu", "dtype": torch.float64, "requires_grad": False, "training": True}
    cases = info.module_error_inputs_func(info, **options)
    assert cases
    for case in cases:
        assert case.error_on is ModuleErrorEnum.FORWARD_ERROR
        given = case.module_error_input
        module = CrossEntropyLoss(*given.constructor_input.args, **given.constructor_input.kwargs)
        with pytest.raises(case.error_type, match=case.error_regex):
            module(*given.forward_input.args, **given.forward_input.kwargs)
