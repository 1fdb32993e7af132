"""Losses of single elements against float64, and all losses under everything that torch does to a function."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import gdbp
from gdbp import reference
from gdbp.nn.functional import cross_entropy, huber_loss, l1_loss, mse_loss, smooth_l1_loss
from tests.oracle import (
    FLOAT_DTYPES,
    FULL_DTYPES,
    LAYOUTS,
    POINTWISE,
    REDUCTIONS,
    both_ce,
    both_pointwise,
    compare,
    compare_samples,
    laid_out,
    logits,
    no_worse,
    on_one_and_two_threads,
    pair,
    values_and_grads,
)

reductions = pytest.mark.parametrize("reduction", REDUCTIONS)
losses = pytest.mark.parametrize("loss", POINTWISE)
# around the widths of vectors, of the runs (512) and tiles (16384) of a sum, and of a thread's share
SIZES = (0, 1, 7, 8, 15, 16, 17, 511, 513, 4097, 16385, 40001)


# ---- losses of single elements: values ----


@losses
@reductions
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_sizes(loss, reduction, dtype, device):
    for shape in (*((n,) for n in SIZES), (), (3, 5), (2, 3, 4), (0, 3), (2, 1, 3, 2)):
        compare(*both_pointwise(loss, reduction=reduction), pair(shape, dtype, device))


@losses
@reductions
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", range(3))
def test_layouts(loss, reduction, layout, which):
    if which == 2 and reduction != "none":
        layout = "misaligned"
    tensors = [
        *(t.detach() for t in pair((9, 7))),
        torch.randn((9, 7) if reduction == "none" else (), dtype=torch.float64),
    ]
    tensors[which] = laid_out(tensors[which], layout)
    x, y, upstream = tensors
    both = both_pointwise(loss, reduction=reduction)
    compare(*both, [x.requires_grad_(), y.requires_grad_()], upstream)


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any_pair(data):
    shape = data.draw(st.lists(st.integers(0, 6), max_size=4) | st.tuples(st.sampled_from(SIZES[:-2])))
    dtype, reduction = data.draw(st.sampled_from(FULL_DTYPES)), data.draw(st.sampled_from(REDUCTIONS))
    loss = data.draw(st.sampled_from(list(POINTWISE)))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    tensors = [
        laid_out(t.detach(), data.draw(st.sampled_from(LAYOUTS))).requires_grad_(data.draw(st.booleans()))
        for t in pair(shape, dtype)
    ]
    upstream = torch.randn(shape if reduction == "none" else (), dtype=dtype)
    upstream = laid_out(upstream, data.draw(st.sampled_from(LAYOUTS)))
    compare(*both_pointwise(loss, reduction=reduction), tensors, upstream)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("mine", [mse_loss, l1_loss, huber_loss, smooth_l1_loss])
def test_torchs_samples(mine, dtype):
    name = mine.__name__
    assert compare_samples(f"nn.functional.{name}", mine, getattr(F, name), dtype) >= 6


def test_integers():
    x, y = torch.randn(5, requires_grad=True), torch.arange(5)
    # torch 2.11 itself cannot differentiate an integer input's loss.
    other = F.mse_loss(x, y.float())
    (gradient,) = torch.autograd.grad(other, x)
    for mine in (mse_loss(x, y), mse_loss(y, x)):
        torch.testing.assert_close(mine, other)
        assert torch.equal(torch.autograd.grad(mine, x)[0], gradient)
    half = mse_loss(x.detach().half(), x.detach(), reduction="none")
    assert half.dtype is torch.float32
    with pytest.raises(TypeError, match=r"input has dtype Long; expected float64, .*convert it"):
        mse_loss(y, y)


@losses
def test_broadcasts_with_a_warning(loss):
    f, other = both_pointwise(loss)
    x, y = torch.randn(4, 1, requires_grad=True), torch.randn(3, requires_grad=True)
    with pytest.warns(UserWarning, match=r"target size \(torch.Size\(\[3\]\)\) that is different") as raised:
        mine = torch.autograd.grad(f(x, y), (x, y))
    assert raised[0].filename.endswith("oracle.py")  # where it was called
    with pytest.warns(UserWarning):
        torch.testing.assert_close(mine, torch.autograd.grad(other(x, y), (x, y)))
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match=r"size of tensor a \(4\) must match"):
        f(torch.zeros(4), y)


@losses
def test_upstream_of_a_sum(loss):
    x, y = pair((4, 5))
    for keep in (lambda loss: loss.sum(), lambda loss: loss.sum(0)[2]):
        both = both_pointwise(loss, reduction="none")
        torch.testing.assert_close(*(torch.autograd.grad(keep(f(x, y)), (x, y)) for f in both))


@losses
def test_special_values(loss):
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 3e38, 1e-30], requires_grad=True)
    for y in (torch.zeros(7), x.detach().clone()):
        mine, other = (values_and_grads(f, [x, y], torch.ones(7)) for f in both_pointwise(loss, reduction="none"))
        # torch's l1_loss alone gives NaN the gradient 0.
        other[1] = torch.where(mine[0].isnan(), math.nan, other[1])
        torch.testing.assert_close(mine, other, equal_nan=True, rtol=1e-6, atol=0)


@losses
def test_at_the_knee(loss):
    points = torch.tensor([0.0, -0.0, 0.3, -0.3, 1.0, -1.0, 2.5, -2.5], dtype=torch.float64)
    points = torch.cat((points, points.nextafter(points + 1), points.nextafter(points - 1)))
    compare(*both_pointwise(loss, reduction="none"), [points.requires_grad_(), torch.zeros_like(points)])


@pytest.mark.parametrize("loss", POINTWISE)
def test_no_loss_is_minus_zero(loss):
    x, t = torch.tensor([-0.0, 0.0, -0.0]), torch.tensor([0.0, -0.0, -0.0])
    assert not torch.signbit(both_pointwise(loss, reduction="none")[0](x, t)).any()


def test_limits_at_the_end_of_the_numbers():
    x, t = torch.randn(2, 5, 4)
    for beta in (1e-50, 1e-40):
        assert torch.equal(smooth_l1_loss(x, t, beta=beta), l1_loss(x, t))
    torch.testing.assert_close(smooth_l1_loss(x.double(), t.double(), beta=1e-50), l1_loss(x.double(), t.double()))
    for dtype in (torch.float16, torch.float32):
        leaf = x.to(dtype).requires_grad_()
        value = huber_loss(leaf, t.to(dtype), delta=1e39)
        (grad,) = torch.autograd.grad(value, leaf, retain_graph=True)
        (again,) = torch.autograd.grad(value, leaf, create_graph=True)
        torch.testing.assert_close(again, grad)
        torch.testing.assert_close(value, mse_loss(leaf, t.to(dtype)) / 2)


def test_float16_and_bfloat16():
    assert mse_loss(torch.full((3,), 300.0).half(), torch.zeros(3).half()).isinf()  # 90000 has no float16
    many = torch.full((100_000,), 4.0).bfloat16()
    assert mse_loss(many, torch.zeros_like(many)) == 16 and mse_loss(many, many * 0, reduction="sum") == 1_597_440


@losses
@reductions
def test_threads_do_not_change_bits(loss, reduction):
    x, y = pair((300_001,), torch.float32)
    both = both_pointwise(loss, reduction=reduction)
    for one, two in on_one_and_two_threads(lambda: values_and_grads(both[0], (x, y))):
        assert torch.equal(one, two)


def test_what_torch_computes():
    x, y, weight = (t.detach() for t in (*pair((4, 3)), pair((4, 3))[0]))
    for mine, other in ((mse_loss, F.mse_loss), (l1_loss, F.l1_loss), (huber_loss, F.huber_loss)):
        assert torch.equal(mine(x, y, weight=weight), other(x, y, weight=weight))
    assert torch.equal(l1_loss(x + 1j, y - 1j), F.l1_loss(x + 1j, y - 1j))


def test_tables_agree():
    with pytest.raises(ValueError, match="kind is 'hinge'; expected one of ") as error:
        torch.ops.gdbp.pointwise_loss(X, X, "hinge", 0, "mean")
    names = str(error.value).split("expected one of ")[1].splitlines()[0].split(", ")
    assert set(names) == set(reference.POINTWISE_LOSSES) == {name for name, _ in POINTWISE.values()}


# ---- autograd, torch.func, torch.compile, the dispatcher ----

TARGET = torch.tensor([2, 0, -100, 1])
SMOOTH = {"label_smoothing": 0.2}
FUNCTIONS = {
    **{f"mse-{r}": (*both_pointwise("mse", reduction=r), lambda: pair((4, 3))) for r in REDUCTIONS},
    **{loss: (*both_pointwise(loss), lambda: pair((4, 3))) for loss in POINTWISE if loss != "mse"},
    **{f"ce-{r}": (*both_ce(TARGET, reduction=r), lambda: [logits((4, 3))]) for r in REDUCTIONS},
    "ce-weighted": (*both_ce(TARGET, torch.tensor([0.5, 1, 2]), **SMOOTH), lambda: [logits((4, 3))]),
    "ce-images": (*both_ce(torch.tensor([[0, 1], [2, -100]]), **SMOOTH), lambda: [logits((2, 3, 2))]),
    "ce-vector": (*both_ce(torch.tensor(1)), lambda: [logits((3,))]),
}
functions = pytest.mark.parametrize("case", FUNCTIONS)


@functions
def test_gradcheck(case):
    mine, _, make = FUNCTIONS[case]
    assert gradcheck(mine, make(), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(mine, make(), check_fwd_over_rev=True)


@functions
def test_retain_graph(case):
    mine, _, make = FUNCTIONS[case]
    tensors = make()
    loss = mine(*tensors).sum()
    once = torch.autograd.grad(loss, tensors, retain_graph=True)
    assert all(map(torch.equal, once, torch.autograd.grad(loss, tensors)))


@functions
def test_torch_func(case):
    mine, other, make = FUNCTIONS[case]
    tensors = tuple(t.detach() for t in make())
    batch = tuple(torch.stack((t, 2 * t)) for t in tensors)
    every = tuple(range(len(tensors)))

    def results(f):
        def loss(*tensors):
            return f(*tensors).pow(2).sum()

        return (
            torch.func.grad(loss, argnums=every)(*tensors),
            torch.vmap(f)(*batch),
            torch.vmap(torch.func.grad(loss, argnums=every))(*batch),
            torch.func.grad(lambda *b: torch.vmap(f)(*b).sum())(*batch),
            torch.func.jacrev(f, argnums=every)(*tensors),
            torch.func.hessian(loss)(*tensors),
            torch.func.jvp(f, tensors, tensors),
            torch.autograd.functional.jacobian(f, tensors, vectorize=True),
        )

    torch.testing.assert_close(results(mine), results(other))


def test_per_sample_gradients():
    weight, x = torch.randn(3, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    label = torch.tensor([0, 1, 2, 0, 1, -100])

    def per_sample(layer, loss):
        one = torch.func.grad(lambda w, x, y: loss(layer(x, w), y, reduction="sum"))
        return torch.vmap(one, in_dims=(None, 0, 0))(weight, x, label)

    torch.testing.assert_close(
        per_sample(gdbp.nn.functional.linear, cross_entropy), per_sample(F.linear, F.cross_entropy)
    )


@functions
def test_no_graph_where_none_is_needed(case):
    mine, other, make = FUNCTIONS[case]
    tensors = [t.detach() for t in make()]
    assert mine(*tensors).grad_fn is None
    with torch.inference_mode():
        torch.testing.assert_close(mine(*tensors), other(*tensors))


@functions
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(case, dynamic):
    torch._dynamo.reset()
    mine, _, make = FUNCTIONS[case]
    compiled = torch.compile(mine, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    tensors = make()
    for eager, traced in zip(values_and_grads(mine, tensors), values_and_grads(compiled, tensors)):
        assert torch.equal(eager, traced)


@pytest.mark.parametrize(
    ("reduction", "dtype"), [*((reduction, torch.float32) for reduction in REDUCTIONS), ("mean", torch.bfloat16)]
)
def test_opcheck(reduction, dtype):
    ops, check = torch.ops.gdbp, torch.library.opcheck
    # opcheck takes no NaN for the same, so not the mean of nothing.
    nothing = [0] if reduction != "mean" else []
    for shape in ((4, 3), (), *((n, 3) for n in nothing)):
        x, y = (t.detach() for t in pair(shape, dtype))
        for loss in (("mse_loss", 0.0, reduction), ("huber_loss", 0.5, reduction)):
            check(ops.pointwise_loss, (x, y, *loss))
            upstream = torch.ones_like(ops.pointwise_loss(x, y, *loss))
            for mask in ((True, True), (True, False), (False, True)):
                check(ops.pointwise_loss_backward, (upstream, x, y, *loss, mask))
    for rows, weight in ((4, None), (4, torch.rand(3, dtype=dtype)), *((n, None) for n in nothing)):
        for kind, channels_last in (("labels", False), ("mixture", False), ("probabilities", True)):
            x = logits((rows, 3, 2), dtype).detach()
            if channels_last:
                x = x.movedim(1, -1).contiguous().movedim(-1, 1)
            target, second, share = torch.randint(3, (rows, 2)), None, None
            if kind == "mixture":
                second, share = target.flip(0), torch.rand(rows, 2, dtype=torch.float64)
            if kind == "probabilities":
                target = torch.rand(x.shape, dtype=dtype)
            tensors = (x, target, second, share, weight)
            options = (reduction, -100, 0.1, 0.01, 5.0)
            normalizer = torch.tensor(3.0, dtype=torch.float64) if kind == "mixture" else None
            check(ops.cross_entropy, (*tensors, normalizer, *options, False))
            loss, stats, divisor = ops.cross_entropy(*tensors, normalizer, *options, False)
            arguments = (torch.ones_like(loss), *tensors, stats, divisor, *options)
            for mask in ((True, True), (True, False)):
                check(ops.cross_entropy_backward, (*arguments, mask))
            check(ops.cross_entropy_backward_, arguments)


@pytest.mark.parametrize("mask", [(True, False), (False, True)])
def test_gradients_that_are_asked_for(mask):
    x, y = (t.detach() for t in pair((3,)))
    one = torch.ones((), dtype=x.dtype)
    grads = torch.ops.gdbp.pointwise_loss_backward(one, x, y, "l1_loss", 0, "mean", mask)
    assert [g is not None for g in grads] == list(mask)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_autocast(dtype):
    x, y = pair((4, 3), dtype)
    results = []
    for module in (gdbp.nn.functional, F):
        ce = module.cross_entropy
        with torch.autocast("cpu"):
            values = [getattr(module, name)(x, y, **options) for name, options in POINTWISE.values()]
            values += [ce(x, TARGET), ce(x, TARGET, torch.ones(3, dtype=dtype))]
        results.append([*values, *torch.autograd.grad(sum(values), (x, y))])
    torch.testing.assert_close(*results)


# ---- the modules and torch's older arguments ----


MODULES = (
    ("MSELoss", {}),
    ("L1Loss", {}),
    ("HuberLoss", {"delta": 0.3}),
    ("SmoothL1Loss", {"beta": 0.0}),
    ("SmoothL1Loss", {"beta": 0.3}),
)


def test_modules_are_torchs():
    x, y, weight = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0.5, 1.0, 2.0])
    for options in ({}, {"reduction": "sum"}, {"reduction": "none"}):
        for name, own in MODULES:
            mine, other = (getattr(m, name)(**own, **options) for m in (gdbp.nn, torch.nn))
            torch.testing.assert_close(mine(x, y), other(x, y))
            assert repr(mine) == repr(other) and isinstance(mine, getattr(torch.nn, name))
        for more in ({}, {"weight": weight, "ignore_index": 1, "label_smoothing": 0.1}):
            mine, other = (m.CrossEntropyLoss(**more, **options) for m in (gdbp.nn, torch.nn))
            for module in (mine, copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
                torch.testing.assert_close(
                    module(x, TARGET.clamp_min(1)), other(x, TARGET.clamp_min(1)), equal_nan=True
                )
            assert repr(mine) == repr(other) and isinstance(mine, torch.nn.CrossEntropyLoss)
            assert mine.state_dict().keys() == other.state_dict().keys()
            assert [name for name, _ in mine.named_buffers()] == [name for name, _ in other.named_buffers()]
            assert mine.double().weight is None or mine.weight.dtype is torch.float64
    mine.load_state_dict(other.state_dict())


@pytest.mark.filterwarnings("ignore:size_average and reduce args")
@pytest.mark.parametrize("size_average", [None, True, False])
@pytest.mark.parametrize("reduce", [None, True, False])
def test_legacy_arguments(size_average, reduce):
    x, y = (t.detach() for t in pair((4, 3)))
    old = {"size_average": size_average, "reduce": reduce}
    for name in ("mse_loss", "l1_loss", "smooth_l1_loss"):
        mine, other = getattr(gdbp.nn.functional, name), getattr(F, name)
        torch.testing.assert_close(mine(x, y, **old), other(x, y, **old))
        torch.testing.assert_close(mine(x, y, size_average, reduce), other(x, y, size_average, reduce))
    torch.testing.assert_close(cross_entropy(x, TARGET, **old), F.cross_entropy(x, TARGET, **old))
    for name in ("MSELoss", "L1Loss", "SmoothL1Loss", "CrossEntropyLoss"):
        assert getattr(gdbp.nn, name)(**old).reduction == getattr(torch.nn, name)(**old).reduction


def test_negative_smoothing_is_none():
    x = logits((4, 3))
    assert torch.equal(cross_entropy(x, TARGET, label_smoothing=-0.5), cross_entropy(x, TARGET))


# ---- refusals ----

X, Y = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
META = torch.zeros(3, 4, device="meta")
CPU_META = r"on cpu and {} on meta; expected the same device; move one"
REFUSED = {
    "mse reduction": (
        lambda: mse_loss(X, X, reduction="avg"),
        ValueError,
        "avg is not a valid value for reduction",
    ),
    "mse complex": (
        lambda: mse_loss(X + 1j, X + 1j),
        TypeError,
        "input has dtype ComplexFloat; expected float64",
    ),
    "mse devices": (lambda: mse_loss(META, X), RuntimeError, CPU_META.format("input")),
    "mse operator": (
        lambda: torch.ops.gdbp.pointwise_loss(X, X[0], "mse_loss", 0, "mean"),
        RuntimeError,
        r"target has shape \[4\].*the same",
    ),
    "huber delta": (
        lambda: huber_loss(X, X, delta=0),
        RuntimeError,
        "does not support non-positive values for delta. Got: 0; expected",
    ),
    "huber text": (lambda: huber_loss(X, X, delta="1"), TypeError, "delta is '1'; expected a number"),
    "huber operator": (
        lambda: torch.ops.gdbp.pointwise_loss(X, X, "huber_loss", -1, "mean"),
        ValueError,
        "huber_loss: parameter is -1; expected a number above 0",
    ),
    "smooth_l1 beta": (
        lambda: smooth_l1_loss(X, X, beta=-0.5),
        RuntimeError,
        "does not support negative values for beta. Got: -0.5; expected",
    ),
    "smooth_l1 nothing": (lambda: smooth_l1_loss(X, X, beta=None), TypeError, "beta is None; expected a number"),
    "smooth_l1 reduction": (
        lambda: smooth_l1_loss(X, X, reduction="avg"),
        ValueError,
        "avg is not a valid value for reduction",
    ),
    "l1 devices": (lambda: l1_loss(META, X), RuntimeError, CPU_META.format("input")),
    "ce reduction": (
        lambda: cross_entropy(X, Y, reduction="avg"),
        ValueError,
        "avg is not a valid value for reduction",
    ),
    "ce batch": (
        lambda: cross_entropy(X, Y[:2]),
        ValueError,
        r"batch_size \(3\) to match target batch_size \(2\)",
    ),
    "ce shape": (
        lambda: cross_entropy(X, Y[:, None]),
        RuntimeError,
        r"Expected target size \(3,\), got \(3, 1\); give one",
    ),
    "ce images": (
        lambda: cross_entropy(torch.zeros(3, 4, 5), Y[:, None]),
        RuntimeError,
        r"Expected target size \(3, 5\), got \(3, 1\)",
    ),
    "ce scalar": (lambda: cross_entropy(X, Y[0]), RuntimeError, r"Expected target size \(3,\), got \(\)"),
    "ce labels": (
        lambda: cross_entropy(X, Y.int()),
        RuntimeError,
        r"torch.int32; expected .* Long or Byte; .*long\(\)",
    ),
    "ce booleans": (
        lambda: cross_entropy(X, Y.bool()),
        RuntimeError,
        r"torch.bool; expected .* Long or Byte",
    ),
    "ce integers": (lambda: cross_entropy(X.long(), Y), TypeError, "logits has dtype Long; expected float64"),
    "ce weight size": (
        lambda: cross_entropy(X, Y, torch.ones(3)),
        RuntimeError,
        r"weight has shape \[3\]; .* all 4 classes or no classes; expected \(4,\)",
    ),
    "ce weight dtype": (
        lambda: cross_entropy(X, Y, torch.ones(4).double()),
        RuntimeError,
        "weight has dtype Double and",
    ),
    "ce weight graph": (
        lambda: cross_entropy(X, Y, torch.ones(4, requires_grad=True)),
        RuntimeError,
        r"weight requires grad.*detach\(\)",
    ),
    "ce smoothing": (
        lambda: cross_entropy(X, Y, label_smoothing=1.5),
        RuntimeError,
        "between 0.0 and 1.0. Got: 1.5",
    ),
    "ce devices": (lambda: cross_entropy(META, Y), RuntimeError, "target is " + CPU_META.format("logits")),
    "ce weight device": (
        lambda: cross_entropy(X, Y, META[0]),
        RuntimeError,
        "weight is on meta and logits on cpu",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    call, error, sentence = REFUSED[case]
    with pytest.raises(error, match=sentence):
        call()


def test_meta():
    assert mse_loss(META, META).device.type == "meta"
    loss = cross_entropy(META.clone().requires_grad_(), Y.to("meta"), reduction="none")
    assert loss.shape == (3,) and loss.requires_grad


def test_no_worse_is_not_blind():
    one = torch.ones(3)
    with pytest.raises(AssertionError):
        no_worse(one + 1e-4, one, one.double())
