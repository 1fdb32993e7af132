"""Binary cross-entropy with logits, against float64 and torch's samples, and under everything torch does."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import gdbp
from gdbp.nn.functional import binary_cross_entropy_with_logits as bce
from tests.oracle import (
    FLOAT_DTYPES,
    FULL_DTYPES,
    LAYOUTS,
    REDUCTIONS,
    compare,
    compare_samples,
    laid_out,
    on_one_and_two_threads,
    ulps,
    values_and_grads,
)

torchs = F.binary_cross_entropy_with_logits
reductions = pytest.mark.parametrize("reduction", REDUCTIONS)
SIZES = (0, 1, 7, 8, 17, 511, 513, 4097, 16385, 40001)


def pair(shape, dtype=torch.float64, device="cpu"):
    x = 3 * torch.randn(shape, dtype=torch.float64)
    return [t.to(device, dtype).requires_grad_() for t in (x, torch.rand(shape, dtype=torch.float64))]


def both(weight=None, pos_weight=None, **options):
    """Ours and torch's; the factors follow the input's dtype."""

    def of(f):
        def call(x, t):
            w, q = (None if v is None else v.to(x.device, x.dtype) for v in (weight, pos_weight))
            return f(x, t, w, pos_weight=q, **options)

        return call

    return of(bce), of(torchs)


@reductions
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_sizes(reduction, dtype, device):
    for shape in (*((n,) for n in SIZES), (), (3, 5), (2, 3, 4), (0, 3)):
        compare(*both(reduction=reduction), pair(shape, dtype, device))


@reductions
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_factors(reduction, dtype, device):
    for shape in ((6,), (3, 5), (41, 33), (2, 3, 4), (700, 3)):
        scalar, last, all_, first = (
            torch.rand(s) + 0.5 for s in ((), shape[-1:], shape, (*shape[:1], *[1] * (len(shape) - 1)))
        )
        for weight, pos_weight in ((all_, None), (None, last), (first, last), (scalar, first), (last, all_)):
            compare(*both(weight, pos_weight, reduction=reduction), pair(shape, dtype, device))  # fmt: skip


@settings(max_examples=700, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any(data):
    shape = data.draw(st.lists(st.integers(0, 6), max_size=4) | st.tuples(st.sampled_from(SIZES[:-2])))
    dtype, reduction = data.draw(st.sampled_from(FULL_DTYPES)), data.draw(st.sampled_from(REDUCTIONS))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    tensors = [
        laid_out(t.detach(), data.draw(st.sampled_from(LAYOUTS))).requires_grad_(data.draw(st.booleans()))
        for t in pair(shape, dtype)
    ]
    factors = []
    for _ in range(2):
        sizes = [n if data.draw(st.booleans()) else 1 for n in shape][data.draw(st.integers(0, len(shape))) :]
        factor = laid_out(torch.rand(sizes) + 0.1, data.draw(st.sampled_from(LAYOUTS)))
        factors.append(factor if data.draw(st.booleans()) else None)
    upstream = torch.randn(shape if reduction == "none" else (), dtype=dtype)
    compare(*both(*factors, reduction=reduction), tensors, laid_out(upstream, data.draw(st.sampled_from(LAYOUTS))))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_torchs_samples(dtype):
    assert compare_samples("nn.functional.binary_cross_entropy_with_logits", bce, torchs, dtype) >= 18


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_confident(dtype):
    # torch's loss of a confident negative is 0 from a logit of -17 in float32, its gradient loses as much.
    x = torch.arange(-80, 80.5, 0.5).to(dtype).requires_grad_()
    for label in (0.0, 1.0):
        mine = values_and_grads(
            lambda v, y=label: bce(v, torch.full_like(v, y), reduction="none"), [x], torch.ones(1).expand(321)
        )
        z = x.detach().double() * (1 - 2 * label)  # in favour of the wrong class
        exact = torch.where(z > 0, z, 0) + torch.log1p(torch.exp(-z.abs()))
        slope = torch.where(z > 0, 1 / (1 + torch.exp(-z.abs())), torch.exp(-z.abs()) / (1 + torch.exp(-z.abs())))
        for got, wanted in zip(mine, (exact, slope * (1 - 2 * label))):
            assert ulps(got, wanted) <= (8 if dtype in FULL_DTYPES else 0.51)


def test_special_values():
    x = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 3e38, -3e38, 1e-30], requires_grad=True)
    for label in (0.0, 1.0, 0.5, math.nan):
        y = torch.full((8,), label)
        mine = values_and_grads(lambda v, y=y: bce(v, y, reduction="none"), [x], torch.ones(8))
        wide = x.detach().double().requires_grad_()
        exact = values_and_grads(lambda v, y=y: torchs(v, y.double(), reduction="none"), [wide], torch.ones(8))
        # At infinity torch's is inf - inf, where one of the two terms is the answer.
        finite = x.detach().isfinite()
        for got, wanted in zip(mine, exact):
            torch.testing.assert_close(got[finite], wanted[finite].float(), equal_nan=True, rtol=1e-6, atol=1e-38)
    assert bce(torch.tensor([-math.inf]), torch.ones(1)).isinf()


def test_gradient_of_a_target_whose_logit_is_infinite():
    x, t = torch.tensor([-math.inf, math.inf]), torch.tensor([0.0, 1.0], requires_grad=True)
    for pos_weight in (None, torch.tensor(0.5)):
        loss = bce(x, t, pos_weight=pos_weight, reduction="sum")
        assert torch.autograd.grad(loss, t)[0].tolist() == [math.inf, -math.inf]


@reductions
def test_threads_do_not_change_bits(reduction):
    tensors = pair((30_001, 10), torch.float32)
    mine, _ = both(None, torch.rand(10), reduction=reduction)
    for one, two in on_one_and_two_threads(lambda: values_and_grads(mine, tensors)):
        assert torch.equal(one, two)


CASES = {
    **{reduction: both(reduction=reduction) for reduction in REDUCTIONS},
    "weighted": both(torch.rand(4, 1), torch.rand(3) + 0.5),
}
cases = pytest.mark.parametrize("case", CASES)


@cases
def test_gradcheck(case):
    mine, _ = CASES[case]
    assert gradcheck(mine, pair((4, 3)), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(mine, pair((4, 3)), check_fwd_over_rev=True)


@cases
def test_torch_func(case):
    mine, other = CASES[case]
    tensors = tuple(t.detach() for t in pair((4, 3)))
    batch = tuple(torch.stack((t, t / 2)) for t in tensors)

    def results(f):
        def loss(*tensors):
            return f(*tensors).pow(2).sum()

        return (
            torch.func.grad(loss, argnums=(0, 1))(*tensors), torch.vmap(f)(*batch), torch.func.hessian(loss)(*tensors),
            torch.vmap(torch.func.grad(loss, argnums=(0, 1)))(*batch), torch.func.jvp(f, tensors, tensors),
        )  # fmt: skip

    torch.testing.assert_close(results(mine), results(other))


@cases
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(case, dynamic):
    torch._dynamo.reset()
    mine, _ = CASES[case]
    compiled = torch.compile(mine, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    tensors = pair((4, 3))
    for eager, traced in zip(values_and_grads(mine, tensors), values_and_grads(compiled, tensors)):
        torch.testing.assert_close(eager, traced, rtol=0, atol=0)


@reductions
def test_opcheck(reduction):
    ops, check = torch.ops.gdbp, torch.library.opcheck
    for shape in ((4, 3), (), *([(0, 3)] if reduction != "mean" else [])):
        tensors = [*(t.detach() for t in pair(shape)), None, torch.rand(shape[-1:], dtype=torch.float64)]
        check(ops.bce_with_logits, (*tensors, reduction))
        upstream = torch.ones_like(ops.bce_with_logits(*tensors, reduction))
        for mask in ((True, True), (True, False), (False, True)):
            check(ops.bce_with_logits_backward, (upstream, *tensors, reduction, mask))


def test_promotion_autocast_and_what_torch_computes():
    x, y = pair((4, 3), torch.float32)
    half, factor = x.detach().half(), torch.tensor(2.0, dtype=torch.float64)
    torch.testing.assert_close(bce(half, y), torchs(half.float(), y))  # torch itself goes on in half
    torch.testing.assert_close(bce(x, y, factor), torchs(x, y, factor))
    torch.testing.assert_close(bce(x, (y > 0.5).long()), torchs(x, (y > 0.5).float()))  # which torch does not take
    with torch.autocast("cpu"):
        assert bce(x.bfloat16(), y.bfloat16()).dtype is torch.float32
    for name in ("weight", "pos_weight"):
        for f in (bce, torchs):
            with pytest.raises(RuntimeError, match=f"not differentiable with respect to argument '{name}'"):
                f(x, y, **{name: torch.rand(3, requires_grad=True)})


X = torch.zeros(3, 4)
REFUSED = {
    "shape": (lambda: bce(X, X[0]), ValueError, r"Target size \(torch.Size\(\[4\]\)\) must be the same as input size"),
    "reduction": (lambda: bce(X, X, reduction="avg"), ValueError, "avg is not a valid value for reduction"),
    "weight": (lambda: bce(X, X, torch.ones(3)), RuntimeError, "broadcast"),
    "wide weight": (lambda: bce(X, X, torch.ones(2, 3, 4)), RuntimeError, "doesn't match the broadcast shape"),
    "devices": (lambda: bce(X, X.to("meta")), RuntimeError, "on meta and input on cpu|on cpu and input"),
    "operator": (lambda: torch.ops.gdbp.bce_with_logits(X, X[0], None, None, "sum"), RuntimeError, "expected the same"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    call, error, sentence = REFUSED[case]
    with pytest.raises(error, match=sentence):
        call()


def test_module():
    x, y = pair((4, 3), torch.float32)
    for options in ({}, {"reduction": "sum"}, {"pos_weight": torch.rand(3), "weight": torch.rand(4, 1)}):
        mine, other = (m.BCEWithLogitsLoss(**options) for m in (gdbp.nn, torch.nn))
        torch.testing.assert_close(copy.deepcopy(mine)(x, y), other(x, y))
        assert repr(mine) == repr(other) and isinstance(mine, torch.nn.BCEWithLogitsLoss)
        assert mine.state_dict().keys() == other.state_dict().keys()
