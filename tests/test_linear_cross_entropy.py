"""linear_cross_entropy against the layer and the loss one after the other, in float64 and by torch's samples."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import gdbp
from gdbp.nn.functional import linear_cross_entropy
from tests.oracle import FLOAT_DTYPES, FULL_DTYPES, REDUCTIONS, compare, values_and_grads
from tests.test_cross_entropy_extras import draw_target, oracle

reductions = pytest.mark.parametrize("reduction", REDUCTIONS)


def plain(x, w, target, *, linear_bias=None, ignore_index=None, memory_budget=None, weight=None, **options):
    logits = F.linear(x, w, linear_bias)
    weight = None if weight is None else weight.to(x.dtype)
    return oracle(logits, target, weight, ignore_index=-100 if ignore_index is None else ignore_index, **options)


def layer(rows, features, classes, dtype=torch.float64, device="cpu"):
    drawn = torch.randn(rows, features), torch.randn(classes, features) / features**0.5, torch.randn(classes)
    return [t.to(device, dtype).requires_grad_() for t in drawn]


def both(target, weight=None, **options):
    def of(f):
        def call(x, w, b=None):
            factor = None if weight is None else weight.to(x.device, x.dtype)
            return f(x, w, target, linear_bias=b, weight=factor, **options)

        return call

    return of(linear_cross_entropy), of(plain)


@reductions
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("kind", ["labels", "mixture", "probabilities"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0}])
def test_options(reduction, dtype, kind, options, device):
    for rows, features, classes in ((7, 5, 9), (1, 1, 1), (0, 3, 4), (33, 16, 40)):
        target = draw_target(kind, (rows, classes), classes, dtype, device)
        for budget in (None, 4 * classes * 5):  # all at once, and five rows at a time
            for weight in (None, torch.rand(classes) + 0.5):
                mine, other = both(target, weight, reduction=reduction, memory_budget=budget, **options)
                compare(mine, other, layer(rows, features, classes, dtype, device))


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any(data):
    rows, features, classes = data.draw(st.integers(0, 20)), data.draw(st.integers(1, 9)), data.draw(st.integers(1, 30))
    dtype, reduction = data.draw(st.sampled_from(FULL_DTYPES)), data.draw(st.sampled_from(REDUCTIONS))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    kind = data.draw(st.sampled_from(("labels", "mixture", "probabilities")))
    target = draw_target(kind, (rows, classes), classes, dtype)
    options = {"reduction": reduction, "label_smoothing": data.draw(st.sampled_from((0.0, 0.2)))}
    if kind != "probabilities":
        options["ignore_index"] = data.draw(st.integers(-2, classes))
        for part in target[:2] if kind == "mixture" else (target,):
            part[torch.rand(part.shape) < 0.2] = options["ignore_index"]
    options["memory_budget"] = data.draw(st.integers(1, 3000))
    options["z_loss"] = data.draw(st.sampled_from((0.0, 0.1)))
    if reduction == "mean":
        options["normalizer"] = data.draw(st.sampled_from((None, 3.5)))
        options["empty"] = "zero"
    weight = torch.rand(classes) + 0.1 if data.draw(st.booleans()) else None
    tensors = [t.detach().requires_grad_(data.draw(st.booleans())) for t in layer(rows, features, classes, dtype)]
    compare(*both(target, weight, **options), tensors[: data.draw(st.sampled_from((2, 3)))])


@pytest.mark.parametrize("variant", ["", "chunked", "chunked_none"])
def test_torchs_samples(variant):
    from torch.testing._internal.common_methods_invocations import op_db

    name = "nn.functional.linear_cross_entropy"
    ops = [op for op in op_db if op.name == name and op.variant_test_name == variant]
    assert len(ops) == hasattr(F, "linear_cross_entropy")  # torch 2.13 is the first to have it
    for op in ops:
        count = 0
        for sample in op.sample_inputs("cpu", torch.float64, requires_grad=True):
            wanted = [sample.input, sample.args[0], sample.kwargs.get("linear_bias")]
            wanted = [t for t in wanted if t is not None and t.requires_grad]
            exact_kwargs = {name: value for name, value in sample.kwargs.items() if name != "options"}
            exact = F.linear_cross_entropy(sample.input, *sample.args, **exact_kwargs)
            mine = linear_cross_entropy(sample.input, *sample.args, **sample.kwargs)
            torch.testing.assert_close(mine, exact, equal_nan=True)
            upstream = torch.randn_like(exact)
            grads = [torch.autograd.grad(f, wanted, upstream) for f in (mine, exact)]
            torch.testing.assert_close(*grads, equal_nan=True)
            count += 1
        assert count > 50
        for case in op.error_inputs("cpu"):
            sample = case.sample_input
            with pytest.raises(case.error_type, match=case.error_regex):
                linear_cross_entropy(sample.input, *sample.args, **sample.kwargs)


# ---- numbers ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_accumulate_in_float32(dtype):
    tensors = layer(4096, 8, 5, dtype)
    target, one = torch.randint(5, (4096,)), torch.tensor(1.0)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    exact = values_and_grads(lambda x, w, b: plain(x, w, target, linear_bias=b), wide, one)
    for budget in (160, None):  # 8 rows at a time, and all
        mine = values_and_grads(
            lambda x, w, b, n=budget: linear_cross_entropy(x, w, target, linear_bias=b, memory_budget=n), tensors, one
        )
        for got, wanted in zip(mine, exact):
            assert (got.double() - wanted).abs().max() <= 2 * wanted.abs().max() * torch.finfo(dtype).eps


def test_float16_under_a_loss_scale():
    # Formed for an upstream gradient of 1 / rows, these would be below float16 before the scale is applied.
    x, w, _ = layer(3000, 8, 500, torch.float16)
    target = torch.randint(500, (3000,))
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    for scale in (32768.0, 1024.0):
        mine = torch.autograd.grad(scale * linear_cross_entropy(x, w, target).float(), (x, w))
        exact = torch.autograd.grad(scale * plain(*wide, target), wide)
        for got, wanted in zip(mine, exact):
            assert (got.double() - wanted).abs().max() <= 0.004 * wanted.abs().max()


def test_float16_is_formed_for_the_upstream_gradient(device):
    """For a gradient of 1 the first would be 0, the second infinite."""
    confident = torch.ones(1, 4), torch.tensor([[3.0] * 4, [-2.0] * 4]), torch.tensor([0]), {}, 2.0**15
    heavy = torch.randn(3, 4), torch.randn(5, 4) * 10, torch.tensor([0, 1, 2]), {"weight": torch.full((5,), 2e4)}, 1.0
    for x, w, target, options, scale in (confident, heavy):
        half = [t.to(device, torch.float16).requires_grad_() for t in (x, w)]
        wide = [t.detach().double().requires_grad_() for t in half]
        for reduction in ("mean", "sum") if scale > 1 else ("mean",):
            mine, exact = (
                torch.autograd.grad(
                    scale * f(*tensors, target.to(device), reduction=reduction,
                              **{name: t.to(tensors[0]) for name, t in options.items()}).to(dtype),
                    tensors,
                )
                for f, tensors, dtype in ((linear_cross_entropy, half, torch.float32), (plain, wide, torch.float64))
            )  # fmt: skip
            for got, wanted in zip(mine, exact):
                assert (got.double() - wanted).abs().max() <= 0.004 * wanted.abs().max()


@pytest.mark.parametrize("of_weight", [None, *FLOAT_DTYPES])
@pytest.mark.parametrize("of_target", FLOAT_DTYPES)
@pytest.mark.parametrize("of_input", FLOAT_DTYPES)
def test_probabilities_of_another_dtype(of_input, of_target, of_weight):
    x, w = torch.randn(3, 4).to(of_input), torch.randn(5, 4).to(of_input)
    p = torch.rand(3, 5).to(of_target)
    weight = None if of_weight is None else torch.rand(5).to(of_weight)
    for amp in (False, True):
        with torch.autocast("cpu", enabled=amp):
            wanted = gdbp.nn.functional.cross_entropy(F.linear(x, w), p, weight, reduction="none")
            each = [
                linear_cross_entropy(x, w, p, weight=weight, reduction="none"),
                linear_cross_entropy(x, w, p.clone().requires_grad_(), weight=weight, reduction="none").detach(),
                torch.stack([linear_cross_entropy(*row, weight=weight) for row in zip(x, (w,) * 3, p)]),
                torch.vmap(lambda x, p: linear_cross_entropy(x, w, p, weight=weight))(x[:, None], p[:, None]),
            ]
        for mine in each:
            torch.testing.assert_close(mine, wanted, rtol=0.03, atol=0.03)  # of the dtype, first


def test_nothing_to_count():
    x, w, b = layer(6, 3, 4)
    ignored = torch.full((6,), -100)
    for empty, value in (("nan", torch.nan), ("zero", 0.0)):
        loss = linear_cross_entropy(x, w, ignored, linear_bias=b, empty=empty)
        torch.testing.assert_close(loss, torch.tensor(value).double(), equal_nan=True)
        assert all((g == 0).all() for g in torch.autograd.grad(loss, (x, w, b)))


def test_label_out_of_range():
    x, w, _ = layer(6, 3, 4)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    for budget in (None, 1):
        with pytest.raises(
            IndexError, match="Target 4 is out of bounds: linear_cross_entropy got it for row 4; expected"
        ):
            linear_cross_entropy(x, w, labels, memory_budget=budget)


def test_budget_of_numpys():
    x, w, _ = layer(6, 3, 4)
    labels = torch.tensor([0, 1, 2, 3, 1, 0])
    wanted = linear_cross_entropy(x, w, labels, memory_budget=32)
    assert torch.equal(linear_cross_entropy(x, w, labels, memory_budget=np.int64(32)), wanted)


# ---- derivatives ----

TARGET = torch.tensor([2, 0, -100, 1])
CASES = {
    **{reduction: both(TARGET, reduction=reduction, memory_budget=40) for reduction in REDUCTIONS},
    "more": both(TARGET, torch.rand(3) + 0.5, label_smoothing=0.1, z_loss=0.1, softcap=4.0, normalizer=2.0),
}
cases = pytest.mark.parametrize("case", CASES)


@cases
def test_gradcheck(case):
    mine, _ = CASES[case]
    assert gradcheck(mine, layer(4, 2, 3), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(mine, layer(4, 2, 3), check_fwd_over_rev=True)


@cases
def test_backward_twice(case):
    mine, _ = CASES[case]
    tensors = layer(4, 2, 3)
    loss = mine(*tensors).sum()
    once = torch.autograd.grad(3 * loss, tensors, retain_graph=True)
    for a, b in zip(once, torch.autograd.grad(loss, tensors)):
        torch.testing.assert_close(a, 3 * b)


@cases
def test_torch_func(case):
    mine, other = CASES[case]
    tensors = tuple(t.detach() for t in layer(4, 2, 3))
    batch = tuple(torch.stack((t, 2 * t)) for t in tensors)

    def results(f):
        def loss(*tensors):
            return f(*tensors).pow(2).sum()

        every = torch.func.grad(loss, argnums=(0, 1, 2))
        return (
            every(*tensors), torch.vmap(f)(*batch), torch.func.hessian(loss)(*tensors), torch.vmap(every)(*batch),
            torch.func.jvp(f, tensors, tensors),
        )  # fmt: skip

    torch.testing.assert_close(results(mine), results(other))


@cases
def test_compile(case):
    torch._dynamo.reset()
    mine, _ = CASES[case]
    compiled = torch.compile(mine, fullgraph=True, backend="aot_eager")
    tensors = layer(4, 2, 3)
    for eager, traced in zip(values_and_grads(mine, tensors), values_and_grads(compiled, tensors)):
        torch.testing.assert_close(eager, traced)


@cases
def test_compile_takes_any_number_of_rows(case):
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    def loss(x, w, b, target):
        options = {"reduction": "none" if case == "none" else "mean", "memory_budget": 40}
        return linear_cross_entropy(x, w, target, linear_bias=b, **options)

    compiled = torch.compile(loss, fullgraph=True, backend=count)
    for rows in (4, 7, 9, 33):
        tensors, target = layer(rows, 2, 3), torch.randint(3, (rows,))
        eager, traced = (values_and_grads(lambda *t, f=f: f(*t, target), tensors) for f in (loss, compiled))  # noqa: B023
        torch.testing.assert_close(eager, traced)
    assert len(graphs) == 2  # for the first number of rows, and for any


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_export_takes_any_number_of_rows(strict, training):
    module = gdbp.nn.LinearCrossEntropyLoss(4, 5, bias=True, memory_budget=40)
    rows = torch.export.Dim("rows", min=2, max=100)
    with torch.set_grad_enabled(training):
        example = (torch.randn(6, 4), torch.randint(5, (6,)))
        exported = torch.export.export(module, example, dynamic_shapes=({0: rows}, {0: rows}), strict=strict).module()
        for count in (2, 33):
            x, target = torch.randn(count, 4), torch.randint(5, (count,))
            torch.testing.assert_close(exported(x, target), module(x, target))


def test_operator():
    x, w, b = (t.detach() for t in layer(7, 3, 5, torch.float32))
    target = torch.randint(5, (7,))
    for upstream in (None, torch.ones(()), torch.randn(7)):
        mask = [upstream is not None] * 3
        arguments = (upstream, x, w, b, target, None, None, None, 2, mask, -100, 0.1, 0.0, 0.0)
        torch.library.opcheck(torch.ops.gdbp.linear_cross_entropy, arguments)


def test_gradients_that_are_asked_for():
    tensors = layer(4, 2, 3)
    for wanted in ((0,), (1,), (2,), (0, 2)):
        compare(*CASES["mean"], [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)])
    with torch.no_grad():
        assert CASES["mean"][0](*tensors).grad_fn is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["labels", "probabilities", "weighted", "autocast"])
def test_half_types_are_differentiated_twice(kind, dtype):
    full = dtype if kind != "autocast" else torch.float32
    x, w = (torch.randn(n, 4).to(full).requires_grad_() for n in (3, 5))
    target = torch.randn(3, 5).softmax(1).to(full) if kind == "probabilities" else torch.tensor([0, 4, 2])
    options = {"weight": torch.rand(5).to(full)} if kind == "weighted" else {}
    with torch.autocast("cpu", dtype, enabled=kind == "autocast"):
        value = linear_cross_entropy(x, w, target, **options)
    plain = torch.autograd.grad(value, (x, w), retain_graph=True)
    again = torch.autograd.grad(value, (x, w), create_graph=True)
    for a, b in zip(plain, again, strict=True):
        assert a.dtype is b.dtype is full
        torch.testing.assert_close(a, b, rtol=0, atol=4 * torch.finfo(dtype).eps)
    (second,) = torch.autograd.grad(again[0].square().sum(), w)
    assert second.dtype is full and second.isfinite().all() and second.any()


def test_probabilities_that_require_gradients():
    x, w, _ = layer(4, 2, 3)
    p = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    mine, other = (torch.autograd.grad(f(x, w, p), (x, w, p)) for f in (linear_cross_entropy, plain))
    torch.testing.assert_close(mine, other)


def test_autocast():
    x, w, b = layer(6, 3, 4, torch.float32)
    target, weight = torch.randint(4, (6,)), torch.ones(4)
    with torch.autocast("cpu"):
        mine = values_and_grads(
            lambda x, w, b: linear_cross_entropy(x, w, target, linear_bias=b, weight=weight),
            [x, w, b],
            torch.tensor(1.0),
        )
        other = values_and_grads(
            lambda x, w, b: F.cross_entropy(F.linear(x, w, b), target, weight), [x, w, b], torch.tensor(1.0)
        )
    for a, b in zip(mine, other):
        assert a.dtype is b.dtype is torch.float32
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.01)


# ---- memory, the module, refusals ----


def test_logits_are_never_whole():
    from torch.profiler import ProfilerActivity, profile

    x, w, _ = layer(256, 4, 1000, torch.float32)
    target = torch.randint(1000, (256,))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        linear_cross_entropy(x, w, target, memory_budget=4 * 1000 * 16).backward()
    assert max(event.self_cpu_memory_usage for event in recorded.events()) < 256 * 1000 * 4 / 4


def test_module():
    torch.manual_seed(1)
    mine = gdbp.nn.LinearCrossEntropyLoss(5, 4, bias=True, weight=torch.rand(4), label_smoothing=0.1)
    x, target = torch.randn(6, 5), torch.randint(4, (6,))
    logits = F.linear(x, mine.linear.weight, mine.linear.bias)
    expected = F.cross_entropy(logits, target, mine.weight, label_smoothing=0.1)
    torch.testing.assert_close(copy.deepcopy(mine)(x, target), expected)
    assert list(mine.state_dict()) == ["weight", "linear.weight", "linear.bias"]
    images = gdbp.nn.LinearCrossEntropyLoss(5, 4, out_features=(3, 2))
    assert images(x, torch.randint(4, (6, 3, 2))).shape == ()
    if hasattr(torch.nn, "LinearCrossEntropyLoss"):
        torch.manual_seed(1)
        torchs = torch.nn.LinearCrossEntropyLoss(5, 4, bias=True, weight=torch.rand(4), label_smoothing=0.1)
        torch.testing.assert_close(mine(x, target), torchs(x, target))
        torchs.load_state_dict(mine.state_dict())
    assert "(\n  in_features=5, num_classes=4, label_smoothing=0.1\n  (linear)" in repr(mine)
    shown = repr(gdbp.nn.LinearCrossEntropyLoss(5, 4, out_features=(3,), z_loss=0.1, empty="zero"))
    assert "num_classes=4, out_features=(3,), z_loss=0.1, empty='zero'\n" in shown
    for options, error, sentence in (
        ({"weight": torch.ones(3)}, RuntimeError, r"weight shape to be \(4,\)"),
        ({"weight": [1.0] * 4}, TypeError, "weight is of type list; expected a tensor"),
        ({"label_smoothing": -0.1}, RuntimeError, "in range"),
        ({"label_smoothing": "a"}, TypeError, "label_smoothing is 'a'; expected a number"),
        ({"num_classes": 0}, ValueError, "num_classes is 0; expected a whole number, 1 or more"),
    ):
        with pytest.raises(error, match=sentence):
            gdbp.nn.LinearCrossEntropyLoss(5, **{"num_classes": 4, **options})


X, W, Y = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.int64)
REFUSED = {
    "budget": (lambda: linear_cross_entropy(X, W, Y, memory_budget=0), ValueError, "memory_budget is 0; expected"),
    "fraction": (lambda: linear_cross_entropy(X, W, Y, memory_budget=1e6), ValueError, "is 1000000.0; expected"),
    "truth": (lambda: linear_cross_entropy(X, W, Y, memory_budget=True), ValueError, "is True; expected a whole"),
    "no z_loss": (lambda: linear_cross_entropy(X, W, Y, z_loss=None), TypeError, "z_loss is None; expected a number"),
    "no tensor": (lambda: linear_cross_entropy(X, W.numpy(), Y), TypeError, "linear_weight is of type ndarray"),
    "no bias": (lambda: linear_cross_entropy(X, W, Y, linear_bias=[0] * 5), TypeError, "linear_bias is of type list"),
    "list": (lambda: linear_cross_entropy(X, W, [0, 1, 2]), TypeError, "target is or holds a list; expected"),
    "dtype": (lambda: linear_cross_entropy(X, W.double(), Y), RuntimeError, "linear_weight is torch.float64 on cpu"),
    "weight": (lambda: linear_cross_entropy(X, W, Y, weight=torch.ones(4)), RuntimeError, "all 5 classes or no"),
    "weight dtype": (lambda: linear_cross_entropy(X, W, Y, weight=torch.ones(5).double()), RuntimeError, "convert it"),
    "batch": (lambda: linear_cross_entropy(X, W, Y[:2]), ValueError, r"batch_size \(3\) to match"),
    "probabilities": (lambda: linear_cross_entropy(X, W, X), RuntimeError, r"Expected target size \(3, 5\)"),
    "reduction": (lambda: linear_cross_entropy(X, W, Y, reduction="avg"), ValueError, "avg is not a valid value"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    call, error, sentence = REFUSED[case]
    with pytest.raises(error, match=sentence):
        call()


# ---- logits by panels of classes, on the CPU ----


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 5, 63), (4, 512, 64), (7, 513, 65), (129, 1030, 130), (0, 4, 70)])
def test_product_by_panels(sizes, bias, dtype):
    rows, inputs, outputs = sizes
    wide = torch.promote_types(dtype, torch.float32)
    # Memory that ends with the tensors, and rows that lie apart.
    x = torch.randn(rows, 2 * inputs, dtype=wide).to(dtype)[:, ::2]
    weight = torch.randn(outputs, inputs, dtype=wide).to(dtype)
    b = torch.randn(outputs, dtype=wide).to(dtype) if bias else None
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            output = torch.full((rows, outputs), float("nan"), dtype=wide)
            torch.ops.gdbp.linear_wide_(output, x, weight, b)
            found.append(output)
    finally:
        torch.set_num_threads(2)
    assert all(torch.equal(found[0], other) for other in found)
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
    scale = (x.double().abs() @ weight.double().abs().t() + 1).max().item() if rows else 1.0
    tolerance = 64 * torch.finfo(wide).eps * scale
    torch.testing.assert_close(found[0].double(), exact, rtol=0, atol=tolerance)


def test_product_by_panels_is_an_operator():
    output, x, weight = torch.empty(3, 70), torch.randn(3, 5), torch.randn(70, 5)
    torch.library.opcheck(torch.ops.gdbp.linear_wide_, (output, x, weight, torch.randn(70)))
    before = output._version
    torch.ops.gdbp.linear_wide_(output, x, weight, None)
    assert output._version == before + 1
    for arguments, error, match in (
        ((output.half(), x.half(), weight.half(), None), TypeError, "output has dtype Half; expected Float"),
        ((output, x.double(), weight, None), RuntimeError, "input has dtype Double"),
        ((output, x[:, :4], weight, None), ValueError, r"input has shape \[3, 4\]"),
        ((output.t().contiguous().t(), x, weight, None), ValueError, "contiguous"),
        ((output, x, weight, torch.randn(69)), ValueError, "expected"),
    ):
        with pytest.raises(error, match=match):
            torch.ops.gdbp.linear_wide_(*arguments)


@pytest.mark.parametrize("bias", [True, False])
def test_many_classes(bias, monkeypatch):
    """The loss and its gradients where logits come by panels, against those where torch makes them."""
    from gdbp.ops import linear_loss

    classes = linear_loss._MANY_CLASSES + 5
    x = torch.randn(37, 24, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(classes, 24, dtype=torch.float64, requires_grad=True)
    b = torch.randn(classes, dtype=torch.float64, requires_grad=True) if bias else None
    labels = torch.randint(classes, (37,))
    results = []
    for least in (linear_loss._MANY_CLASSES, 10**9):
        monkeypatch.setattr(linear_loss, "_MANY_CLASSES", least)
        loss = gdbp.nn.functional.linear_cross_entropy(x, weight, labels, linear_bias=b, memory_budget=10 * classes * 8)
        results.append([loss, *torch.autograd.grad(loss, [t for t in (x, weight, b) if t is not None])])
    for ours, other in zip(*results, strict=True):
        torch.testing.assert_close(ours, other)
