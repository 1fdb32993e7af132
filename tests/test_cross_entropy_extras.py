"""What cross-entropy takes besides labels: probabilities, mixtures, z_loss, softcap, a divisor of one's own."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import gdbp
from gdbp.nn import CrossEntropyLoss
from gdbp.nn.functional import cross_entropy, linear_cross_entropy
from tests.oracle import (
    FLOAT_DTYPES,
    FULL_DTYPES,
    LAYOUTS,
    REDUCTIONS,
    compare,
    laid_out,
    logits,
    on_one_and_two_threads,
    spacing,
    values_and_grads,
)
from tests.test_cross_entropy import exact_row

reductions = pytest.mark.parametrize("reduction", REDUCTIONS)


def oracle(
    x, target, weight=None, *, reduction="mean", ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=None,
    normalizer=None, empty="nan",
):  # fmt: skip
    """In operators of torch, term for term; also the peer whose errors ours may not exceed."""
    x = x.movedim(1, -1) if x.dim() > 1 else x
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    w = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device) if weight is None else weight.to(x.dtype)
    if isinstance(target, torch.Tensor) and target.is_floating_point():
        parts = [(target.to(x.dtype).movedim(1, -1) if target.dim() > 1 else target.to(x.dtype), 1)]
        divisors = torch.ones(x.shape[:-1], dtype=x.dtype, device=x.device)
    else:
        given = target if isinstance(target, tuple) else (target, target, 1.0)
        parts, divisors, classes = [], 0, x.shape[-1]
        for labels, share in zip(given[:2], (given[2], 1 - given[2])):
            kept = labels != ignore_index
            part = torch.as_tensor(share, dtype=x.dtype, device=x.device) * kept
            parts.append((F.one_hot(torch.where(kept, labels.long(), 0), classes).to(x.dtype), part))
            divisors = divisors + part * w[torch.where(kept, labels.long(), 0)]
    log_p = x.log_softmax(-1)
    loss = z_loss * divisors * x.logsumexp(-1) ** 2
    for one_hot, part in parts:
        part = part.unsqueeze(-1) if isinstance(part, torch.Tensor) else part
        smooth = (1 - label_smoothing) * one_hot + label_smoothing / x.shape[-1]
        loss = loss - (part * w * smooth * log_p).sum(-1)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    divisor = divisors.sum() if normalizer is None else normalizer
    return loss.sum() * 0 if empty == "zero" and divisor == 0 else loss.sum() / divisor


def both(*arguments, **options):
    return tuple(lambda x, *rest, f=f: f(x, *arguments, *rest, **options) for f in (cross_entropy, oracle))


def draw_target(kind, shape, classes, dtype=torch.float64, device="cpu"):
    rows = (shape[0], *shape[2:]) if len(shape) > 1 else ()
    if kind == "probabilities":
        p = torch.rand(shape, dtype=torch.float64).softmax(min(1, len(shape) - 1))
        return p.to(device, dtype)
    if kind == "labels":
        return torch.randint(classes, rows, device=device)
    return torch.randint(classes, rows, device=device), torch.randint(classes, rows, device=device), 0.3


# ---- values and gradients ----


@reductions
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("kind", ["labels", "mixture", "probabilities"])
@pytest.mark.parametrize("options", [{}, {"z_loss": 0.01}, {"softcap": 4.0}, {"z_loss": 0.1, "softcap": 3.0}])
def test_options(reduction, dtype, kind, options, device):
    for shape in ((7,), (6, 5), (3, 1), (3, 4, 2), (2, 3, 17), (2, 3, 4, 3), (2, 40, 33), (0, 3), (2, 3, 0)):
        classes = shape[min(1, len(shape) - 1)]
        for smoothing, weighted in ((0.0, False), (0.1, True)):
            target = draw_target(kind, shape, classes, dtype, device)
            weight = torch.rand(classes, device=device).add(0.5).to(dtype) if weighted else None
            mine, other = both(target, weight, reduction=reduction, label_smoothing=smoothing, **options)
            compare(mine, other, [logits(shape, dtype, device)])


@reductions
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_probabilities_against_torch(reduction, dtype, smoothing, device):
    for shape in ((7,), (6, 5), (3, 1), (5, 1031), (2, 3, 17), (2, 3, 4, 3), (0, 3)):
        x, p = logits(shape, dtype, device), draw_target("probabilities", shape, 0, dtype, device)
        for weight in (None, torch.rand(shape[min(1, len(shape) - 1)], device=device)):

            def call(f, x, p, weight=weight):
                w = None if weight is None else weight.to(x.dtype)
                return f(x, p, w, reduction=reduction, label_smoothing=smoothing)

            for wanted in ((True, True), (True, False), (False, True)):
                tensors = [t.detach().requires_grad_(on) for t, on in zip((x, p), wanted)]
                compare(lambda *t: call(cross_entropy, *t), lambda *t: call(F.cross_entropy, *t), tensors)


@settings(max_examples=1000, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any(data):
    rows, classes = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 40))
    more = data.draw(st.just(()) | st.lists(st.integers(1, 20), max_size=2))
    dtype, reduction = data.draw(st.sampled_from(FULL_DTYPES)), data.draw(st.sampled_from(REDUCTIONS))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    shape = (rows, classes, *more) if data.draw(st.booleans()) else (classes,)
    labels = (rows, *more) if len(shape) > 1 else ()
    x = laid_out(logits(shape, dtype, scale=data.draw(st.sampled_from((0.0, 1.0, 20.0)))).detach(),
                 data.draw(st.sampled_from(LAYOUTS))).requires_grad_()  # fmt: skip
    if data.draw(st.booleans()) and x.dim() > 2:
        x = x.detach().movedim(1, -1).contiguous().movedim(-1, 1).requires_grad_()
    kind = data.draw(st.sampled_from(("labels", "mixture", "probabilities")))
    target = draw_target(kind, shape, classes, dtype)
    options = {"reduction": reduction, "label_smoothing": data.draw(st.sampled_from((0.0, 0.1, 1.0)))}
    tensors = [x]
    if kind == "probabilities":
        target = laid_out(target, data.draw(st.sampled_from(LAYOUTS))).requires_grad_(data.draw(st.booleans()))
        tensors.append(target)
    else:
        options["ignore_index"] = data.draw(st.integers(-3, classes + 2))
        first, *second = target if kind == "mixture" else (target,)
        for part in (first, *second[:1]):
            part[torch.rand(part.shape) < data.draw(st.sampled_from((0.0, 0.3, 1.0)))] = options["ignore_index"]
        if kind == "mixture" and data.draw(st.booleans()):
            target = (first, second[0], torch.rand(labels, dtype=torch.float64))
    options["z_loss"] = data.draw(st.sampled_from((0.0, 1e-3, 0.5)))
    options["softcap"] = data.draw(st.sampled_from((None, 1.0, 30.0)))
    if reduction == "mean":
        options["normalizer"] = data.draw(st.sampled_from((None, 3.5)))
        options["empty"] = data.draw(st.sampled_from(("nan", "zero")))
    weight = torch.rand(classes, dtype=dtype) + 0.1 if data.draw(st.booleans()) else None

    def of(f):
        return lambda x, *p: f(x, *(p or (target,)), None if weight is None else weight.to(x.dtype), **options)

    upstream = torch.randn(labels if reduction == "none" else (), dtype=dtype)
    if torch.isfinite(of(oracle)(*(t.double() for t in tensors))).all():
        compare(of(cross_entropy), of(oracle), tensors, laid_out(upstream, data.draw(st.sampled_from(LAYOUTS))))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("kind", ["probabilities", "mixture"])
def test_confident_rows(kind, dtype):
    gaps = torch.arange(0, 80.5, 0.5)
    x = torch.linspace(-2, 0, 5).repeat(len(gaps), 1)
    x[:, 1] = gaps
    x = x.to(dtype).requires_grad_()
    labels = torch.ones(len(gaps), dtype=torch.int64)
    target = F.one_hot(labels, 5).to(dtype) if kind == "probabilities" else (labels, labels, 0.25)
    for create_graph in (False, True):
        loss = cross_entropy(x, target, reduction="none")
        (grad,) = torch.autograd.grad(loss.sum(), x, create_graph=create_graph)
        losses, grads = (torch.tensor(e, dtype=torch.float64) for e in zip(*(exact_row(r, 1) for r in x.tolist())))
        bound = 64 if create_graph else 8 if dtype in FULL_DTYPES else 0.51
        assert ((loss.double() - losses).abs() <= 8 * spacing(losses, dtype)).all()
        assert ((grad.double() - grads).abs() <= bound * spacing(grads, dtype)).all()


def test_impossible_classes():
    # 0 * log(0) is 0, where torch says NaN.
    x = torch.tensor([[0.0, 1.0, -math.inf]], dtype=torch.float64, requires_grad=True)
    p = torch.tensor([[0.25, 0.75, 0.0]], dtype=torch.float64)
    loss, grad = values_and_grads(lambda x: cross_entropy(x, p), [x], torch.tensor(1.0))
    short, short_grad = values_and_grads(lambda x: F.cross_entropy(x, p[:, :2]), [x.detach()[:, :2].requires_grad_()],
                                         torch.tensor(1.0))  # fmt: skip
    torch.testing.assert_close(loss, short)
    torch.testing.assert_close(grad, torch.cat((short_grad, torch.zeros(1, 1, dtype=torch.float64)), 1))
    assert cross_entropy(x, p.flip(1)).isinf()
    for bad in (math.nan, math.inf):
        assert cross_entropy(torch.tensor([[0.0, bad]]), torch.tensor([[1.0, 0.0]])).isnan()
    assert cross_entropy(torch.full((1, 3), -math.inf), p.float()).isnan()


def test_softcap_of_huge_logits():
    x = torch.tensor([[1e30, -1e30, 90.0, 0.0]], requires_grad=True)
    (grad,) = torch.autograd.grad(cross_entropy(x, torch.tensor([3]), softcap=30.0), x)
    assert grad.isfinite().all() and grad[0, 0] == 0
    # 1 - tanh^2 has two digits left here; the derivative itself has all.
    exact = x.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(oracle(exact, torch.tensor([3]), softcap=30.0), exact)
    torch.testing.assert_close(grad[0, 2].double(), wanted[0, 2], rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 4), (5,)])
@pytest.mark.parametrize("inplace", [False, True])
def test_softcap_of_ignored_rows_that_hold_anything(shape, inplace):
    x = torch.randn(shape, dtype=torch.float64)
    label = torch.full((*shape[:1], *shape[2:]) if len(shape) > 1 else (), -100)
    x.view(-1)[::2] = math.nan
    x.requires_grad_()
    loss = cross_entropy(x * 1, label, softcap=2.0, reduction="sum", inplace_backward=inplace)
    assert (torch.autograd.grad(loss, x)[0] == 0).all()


def test_a_sum_of_equal_losses():
    # Added one after the other, all of them round to the same side.
    rows = 4001
    x, y = torch.zeros(rows, 3, dtype=torch.float64), torch.zeros(rows, dtype=torch.int64)
    assert abs(cross_entropy(x, y).item() - math.log(3)) <= 4 * math.ulp(math.log(3))


def test_normalizer_adds_up():
    x, y = logits((12, 5)), torch.randint(5, (12,))
    whole = torch.autograd.grad(cross_entropy(x, y), x)[0]
    parts = sum(
        torch.autograd.grad(cross_entropy(x[i:i + 4], y[i:i + 4], normalizer=n), x)[0]
        for i, n in ((0, 12), (4, torch.tensor(12)), (8, torch.tensor([12.0])))
    )  # fmt: skip
    torch.testing.assert_close(whole, parts)
    y[:] = -100
    for normalizer, empty, value in ((None, "nan", math.nan), (None, "zero", 0), (0, "zero", 0), (3, "nan", 0)):
        loss = cross_entropy(x, y, normalizer=normalizer, empty=empty)
        torch.testing.assert_close(loss, torch.tensor(value).double(), equal_nan=True)
        assert (torch.autograd.grad(loss, x)[0] == 0).all()
    assert cross_entropy(x[:0], y[:0], empty="zero") == 0


def test_no_transposing_copies():
    x = logits((2, 5, 3, 4))
    y = torch.randint(5, (2, 3, 4))
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    p = torch.rand(2, 5, 3, 4, dtype=torch.float64)
    for target in (y, p):
        a, b = (torch.autograd.grad(cross_entropy(t, target), t)[0] for t in (x, last))
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
        assert a.is_contiguous() and b.is_contiguous(memory_format=torch.channels_last)


def test_many_positions_of_float16():
    # One map of 256 x 256: torch's mean is NaN and its gradient 0.
    x = logits((1, 3, 256, 257), torch.float16)
    y = torch.randint(3, (1, 256, 257))
    for target in (y, F.one_hot(y, 3).movedim(-1, 1).half(), (y, y.flip(1), 0.5)):
        exact = x.detach().double().requires_grad_()
        wide = target.double() if isinstance(target, torch.Tensor) and target.is_floating_point() else target
        mine = values_and_grads(lambda v, t=target: cross_entropy(v, t), [x], torch.tensor(1.0))
        wanted = values_and_grads(lambda v, t=wide: oracle(v, t), [exact], torch.tensor(1.0))
        for got, value in zip(mine, wanted):
            assert ((got.double() - value).abs() <= 0.52 * spacing(value, torch.float16)).all()


@pytest.mark.parametrize("kind", ["labels", "mixture", "probabilities"])
def test_threads_do_not_change_bits(kind):
    for shape in ((3001, 33), (3, 33, 1001)):
        x, target = logits(shape, torch.float32), draw_target(kind, shape, 33, torch.float32)
        call = both(target, torch.rand(33), label_smoothing=0.1, z_loss=0.01, softcap=20.0)[0]
        for one, two in on_one_and_two_threads(lambda x=x, call=call: values_and_grads(call, [x])):
            assert torch.equal(one, two)


# ---- what is refused, and the module ----

X, Y = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
REFUSED = {
    "smoothing": (lambda: cross_entropy(X, X, label_smoothing=1.5), RuntimeError, "between 0.0 and 1.0. Got: 1.5"),
    "z_loss": (lambda: cross_entropy(X, Y, z_loss=-1), ValueError, "z_loss is -1; expected a number of at least 0"),
    "softcap": (lambda: cross_entropy(X, Y, softcap=0), ValueError, "softcap is 0; expected a number above 0, or None"),
    "tiny softcap": (lambda: cross_entropy(X, Y, softcap=1e-60), ValueError, "is 1e-60; expected .* tells from 0"),
    "no number": (lambda: cross_entropy(X, Y, ignore_index=1.5), TypeError, "ignore_index is 1.5; expected a whole"),
    "no z_loss": (lambda: cross_entropy(X, Y, z_loss=None), TypeError, "z_loss is None; expected a number"),
    "text": (lambda: cross_entropy(X, Y, softcap="1"), TypeError, "softcap is '1'; expected a number"),
    "no smoothing": (lambda: cross_entropy(X, Y, label_smoothing=None), TypeError, "label_smoothing is None; expected"),
    "share of text": (lambda: cross_entropy(X, (Y, Y, "a")), TypeError, "share of a mixture is 'a'; expected a num"),
    "list": (lambda: cross_entropy(X, [0, 1, 2]), TypeError, "target is or holds a list; expected a tensor of labels"),
    "nothing": (lambda: cross_entropy(X, None), TypeError, "target is or holds a NoneType; expected a tensor"),
    "lists": (lambda: cross_entropy(X, ([0], [1], 0.5)), TypeError, "target is or holds a list; expected a tensor"),
    "normalizer's gradient": (
        lambda: cross_entropy(X, Y, normalizer=torch.ones((), requires_grad=True)), RuntimeError, "pass normalizer.det"
    ),
    "empty": (lambda: cross_entropy(X, Y, empty="one"), ValueError, "empty is 'one'; expected 'nan' or 'zero'"),
    "normalizer": (lambda: cross_entropy(X, Y, normalizer=3, reduction="sum"), ValueError, "reduction is 'sum'; leave"),
    "normalizers": (lambda: cross_entropy(X, Y, normalizer=X), ValueError, r"shape \(3, 4\); expected one number"),
    "tuple": (lambda: cross_entropy(X, (Y, Y)), ValueError, r"tuple of 2; expected .labels, labels, share"),
    "share": (lambda: cross_entropy(X, (Y, Y, 1.5)), ValueError, "share of a mixture is 1.5; expected .* 0 to 1"),
    "soft mixture": (lambda: cross_entropy(X, (X, X, 0.5)), ValueError, "mix probabilities yourself"),
    "mixture shapes": (lambda: cross_entropy(X, (Y, Y[:2], 0.5)), ValueError, r"shapes \(3,\) and \(2,\)"),
    "ignored probabilities": (lambda: cross_entropy(X, X, ignore_index=1), RuntimeError, "ignore_index is not"),
    "integers": (lambda: cross_entropy(X, X.long()), RuntimeError, "Expected floating point type for target"),
    "shape": (lambda: cross_entropy(X, X[:, :2]), RuntimeError, "multi-target not supported"),
    "out of range": (lambda: cross_entropy(X, (Y, Y + 9, 0.5)), IndexError, "Target 9 is out of bounds: .* row 0; exp"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    call, error, sentence = REFUSED[case]
    with pytest.raises(error, match=sentence):
        call()


DERIVED, HUGE = torch.tensor(0.1, requires_grad=True), 10**400
REFUSED_BY_BOTH = {
    "z_loss's gradient": ({"z_loss": DERIVED}, RuntimeError, r"z_loss requires grad, .*pass z_loss.detach\(\)"),
    "softcap's gradient": ({"softcap": DERIVED}, RuntimeError, "softcap requires grad"),
    "smoothing's gradient": ({"label_smoothing": DERIVED}, RuntimeError, "label_smoothing requires grad"),
    "several": ({"z_loss": X}, ValueError, r"z_loss has shape \(3, 4\); expected one number"),
    "complex": ({"z_loss": 1j}, TypeError, "z_loss is 1j; expected a number"),
    "huge": ({"z_loss": HUGE}, ValueError, "z_loss is larger than any float; expected"),
    "smoothing": ({"label_smoothing": math.nan}, RuntimeError, "between 0.0 and 1.0. Got: nan"),
    "truth": ({"ignore_index": True}, TypeError, "ignore_index is True; expected a whole number"),
    "fraction": ({"ignore_index": torch.tensor(0.9)}, TypeError, "ignore_index is .*; expected a whole number"),
    "label of text": ({"ignore_index": "a"}, TypeError, "ignore_index is 'a'; expected a whole number"),
    "huge label": ({"ignore_index": 2**70}, ValueError, "ignore_index is beyond int64; expected a smaller number"),
    "normalizer of text": ({"normalizer": "a"}, TypeError, "normalizer is 'a'; expected a number"),
    "complex normalizer": ({"normalizer": 1j}, TypeError, "normalizer is 1j; expected a number"),
    "complex normalizers": ({"normalizer": torch.tensor(1j)}, TypeError, "normalizer has dtype torch.complex64; exp"),
    "huge normalizer": ({"normalizer": HUGE}, ValueError, "normalizer is larger than any float; expected"),
    "meta normalizer": ({"normalizer": torch.ones((), device="meta")}, ValueError, "normalizer is on meta, without"),
    "share": ({"target": (Y, Y, torch.tensor(5.0))}, ValueError, "share of a mixture is 5.0; expected numbers from 0"),
    "shares": ({"target": (Y, Y, torch.tensor([0, math.nan, 1]))}, ValueError, "mixture is nan; expected numbers"),
    "complex share": ({"target": (Y, Y, torch.tensor(1j))}, TypeError, "mixture has dtype torch.complex64; expected"),
    "shape of shares": ({"target": (Y, Y, torch.ones(2))}, ValueError, r"shape \(2,\); .* broadcasts .*\(3,\)"),
    "meta share": ({"target": (Y, Y, torch.ones(3, device="meta"))}, ValueError, "share of a mixture is on meta, wit"),
    "weight": ({"weight": [1.0] * 4}, TypeError, "weight is of type list; expected a tensor; convert it with"),
    "input": ({"input": None}, TypeError, "input is of type NoneType; expected a tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_BY_BOTH)
def test_refusals_of_both(case):
    options, error, sentence = REFUSED_BY_BOTH[case]
    for f, layer in ((cross_entropy, {}), (linear_cross_entropy, {"linear_weight": torch.zeros(4, 4)})):
        with pytest.raises(error, match=sentence):
            f(**{"input": X, "target": Y, **layer, **options})


def test_module():
    x, y = logits((6, 4), torch.float32), torch.randint(4, (6,))
    loss = CrossEntropyLoss(torch.rand(4), label_smoothing=0.1, z_loss=0.1, softcap=5.0, empty="zero")
    options = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 5.0, "normalizer": 2.0}
    torch.testing.assert_close(loss(x, y, normalizer=2.0), oracle(x, y, loss.weight, **options))
    torch.testing.assert_close(loss((1 * x), (y, y.flip(0), 0.2)).shape, torch.Size([]))
    inplace = CrossEntropyLoss(inplace_backward=True)
    (grad,) = torch.autograd.grad(inplace(1 * x, y), x)
    torch.testing.assert_close(grad, torch.autograd.grad(F.cross_entropy(x, y), x)[0])
    assert isinstance(gdbp.nn.CrossEntropyLoss(), torch.nn.CrossEntropyLoss)
    assert repr(gdbp.nn.CrossEntropyLoss()) == "CrossEntropyLoss()"
    assert repr(inplace) == "CrossEntropyLoss(inplace_backward=True)"


@pytest.mark.parametrize("name", ["CrossEntropyLoss", "BCEWithLogitsLoss", "LinearCrossEntropyLoss"])
def test_torchs_module_samples(name):
    from torch.testing._internal.common_modules import module_db

    infos = [info for info in module_db if info.module_cls is getattr(torch.nn, name, None)]
    assert infos or name == "LinearCrossEntropyLoss"  # which older torch does not have
    for info in infos:
        options = {"device": "cpu", "dtype": torch.float64, "requires_grad": True, "training": True}
        for sample in info.module_inputs_func(info, **options):
            made, given = sample.constructor_input, sample.forward_input
            torchs = info.module_cls(*made.args, **made.kwargs).double()
            mine = getattr(gdbp.nn, name)(*made.args, **made.kwargs).double()
            mine.load_state_dict(torchs.state_dict())
            wanted, got = (module(*given.args, **given.kwargs) for module in (torchs, mine))
            torch.testing.assert_close(got, wanted, equal_nan=True, rtol=1e-10, atol=1e-12)
