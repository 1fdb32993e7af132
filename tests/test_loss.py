"""Losses of single elements against float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gdbp import reference
from gdbp.nn.functional import huber_loss, l1_loss, mse_loss, smooth_l1_loss
from tests.oracle import (
    FLOAT_DTYPES,
    FULL_DTYPES,
    LAYOUTS,
    POINTWISE,
    REDUCTIONS,
    both_pointwise,
    compare,
    compare_samples,
    laid_out,
    no_worse,
    on_one_and_two_threads,
    pair,
    values_and_grads,
)

reductions = pytest.mark.parametrize("reduction", REDUCTIONS)
losses = pytest.mark.parametrize("loss", POINTWISE)
# around the widths of vectors, of the runs (512) and tiles (16384) of a sum, and of a thread's share
SIZES = (0, 1, 7, 8, 15, 16, 17, 511, 513, 4097, 16385, 40001)


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
        in_torch = torch.vmap(both_pointwise(loss, reduction="none")[0])(x, y)
        torch.testing.assert_close(in_torch, other[0], equal_nan=True, rtol=1e-6, atol=0)


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
        torch.ops.gdbp.pointwise_loss(torch.zeros(3), torch.zeros(3), "hinge", 0, "mean")
    names = str(error.value).split("expected one of ")[1].splitlines()[0].split(", ")
    assert set(names) == set(reference.POINTWISE_LOSSES) == {name for name, _ in POINTWISE.values()}


def test_no_worse_is_not_blind():
    one = torch.ones(3)
    with pytest.raises(AssertionError):
        no_worse(one + 1e-4, one, one.double())
