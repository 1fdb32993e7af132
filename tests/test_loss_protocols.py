"""The losses under everything that torch does to a function, their modules, and what they refuse."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import gdbp
from gdbp.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    huber_loss,
    l1_loss,
    mse_loss,
    smooth_l1_loss,
)
from tests.oracle import FLOAT_DTYPES, POINTWISE, REDUCTIONS, both_ce, both_pointwise, logits, pair, values_and_grads

losses = pytest.mark.parametrize("loss", POINTWISE)

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", [*POINTWISE, "bce"])
def test_half_types_are_differentiated_again_in_float32(loss, dtype):
    """The upstream gradient times a difference is beyond float16, their mean is not."""
    f = {"bce": binary_cross_entropy_with_logits}.get(loss) or both_pointwise(loss)[0]
    x, y = (torch.randn(1000) * 3).to(dtype), torch.rand(1000).to(dtype)

    def scaled(x, y):
        return 30000 * f(x, y)

    leaves = [t.clone().requires_grad_() for t in (x, y)]
    wanted = torch.autograd.grad(scaled(*leaves), leaves)
    assert all(g.isfinite().all() for g in wanted)
    again = torch.autograd.grad(scaled(*leaves), leaves, create_graph=True)
    for found in (again, torch.func.grad(scaled, argnums=(0, 1))(x, y)):
        torch.testing.assert_close(found, wanted, rtol=torch.finfo(dtype).eps, atol=0)


def test_l1_at_nan_is_differentiated_twice():
    x = torch.tensor([1.0, float("nan")], requires_grad=True)
    (grad,) = torch.autograd.grad(l1_loss(x, torch.zeros(2), reduction="sum"), x, create_graph=True)
    assert torch.equal(torch.autograd.grad(grad.sum(), x)[0], torch.zeros(2))


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
    "huber nan": (
        lambda: huber_loss(X, X, delta=float("nan")),
        RuntimeError,
        "non-positive values .* Got: nan; expected",
    ),
    "huber huge": (lambda: huber_loss(X, X, delta=10**400), ValueError, "delta is larger than any float; expected"),
    "huber gradient": (
        lambda: huber_loss(X, X, delta=torch.ones((), requires_grad=True)),
        RuntimeError,
        r"delta requires grad, .*pass delta.detach\(\)",
    ),
    "smooth_l1 nan": (
        lambda: smooth_l1_loss(X, X, beta=float("nan")),
        RuntimeError,
        "negative values for beta. Got: nan; expected",
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


@pytest.mark.parametrize("f", [mse_loss, l1_loss, huber_loss, smooth_l1_loss, binary_cross_entropy_with_logits])
def test_what_is_no_tensor(f):
    for input, target, name in ((None, X, "input"), (X, X.numpy(), "target"), ([1.0], X, "input")):
        with pytest.raises(TypeError, match=f"{name} is of type .*; expected a tensor; convert it with torch"):
            f(input, target)
    for name in {"weight", "pos_weight"} & set(inspect.signature(f).parameters):
        with pytest.raises(TypeError, match=f"{name} is of type list; expected a tensor"):
            f(X, X, **{name: [1.0]})


def test_compile_of_a_number_that_changes():
    torch._dynamo.reset()
    compiled = torch.compile(lambda delta: huber_loss(X + 3, X, delta=delta), fullgraph=True, backend="aot_eager")
    for delta in (1, 2, 3, 1.5):
        torch.testing.assert_close(compiled(delta), huber_loss(X + 3, X, delta=delta))


def test_elementwise_mean():
    with pytest.warns(UserWarning, match="'elementwise_mean' is deprecated"):
        assert torch.equal(mse_loss(X + 1, X, reduction="elementwise_mean"), torch.tensor(1.0))


def test_meta():
    assert mse_loss(META, META).device.type == "meta"
    loss = cross_entropy(META.clone().requires_grad_(), Y.to("meta"), reduction="none")
    assert loss.shape == (3,) and loss.requires_grad
