"""Derivatives of cross-entropy with its options, in every way that torch forms them, and over the logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from gdbp.nn.functional import cross_entropy
from tests.oracle import FLOAT_DTYPES, REDUCTIONS, laid_out, logits, values_and_grads
from tests.test_cross_entropy_extras import both, draw_target, oracle

reductions = pytest.mark.parametrize("reduction", REDUCTIONS)

# ---- derivatives of every order, torch.func, torch.compile ----

MIX = (torch.tensor([2, 0, -100, 1]), torch.tensor([1, 0, -100, -100]), torch.tensor([0.3, 0.6, 0.5, 0.9]).double())
CASES = {
    "mixture": (lambda x: cross_entropy(x, MIX, z_loss=0.1), lambda x: oracle(x, MIX, z_loss=0.1)),
    "capped": both(MIX[0], torch.tensor([0.5, 1, 2]).double(), softcap=2.0, label_smoothing=0.1, reduction="none"),
    "normalized": both(MIX[0], normalizer=2.5, z_loss=0.3, empty="zero"),
}
P = torch.rand(4, 3, dtype=torch.float64)


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case):
    mine, _ = CASES[case]
    assert gradcheck(mine, [logits((4, 3))], check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(mine, [logits((4, 3))], check_fwd_over_rev=True)


@reductions
def test_gradcheck_of_probabilities(reduction):
    def mine(x, p):
        return cross_entropy(x, p, label_smoothing=0.1, z_loss=0.1, softcap=3.0, reduction=reduction)

    tensors = [logits((4, 3)), P.clone().requires_grad_()]
    assert gradcheck(mine, tensors, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(mine, tensors, check_fwd_over_rev=True)


@pytest.mark.parametrize("case", CASES)
def test_torch_func(case):
    mine, other = CASES[case]
    x = logits((4, 3)).detach()

    def results(f):
        def loss(x):
            return f(x).pow(2).sum()

        return (
            torch.func.grad(loss)(x), torch.vmap(f)(torch.stack((x, 2 * x))), torch.func.hessian(loss)(x),
            torch.vmap(torch.func.grad(loss))(torch.stack((x, 2 * x))), torch.func.jvp(f, (x,), (x,)),
        )  # fmt: skip

    torch.testing.assert_close(results(mine), results(other))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    torch._dynamo.reset()
    for call in (
        *(mine for mine, _ in CASES.values()),
        lambda x: cross_entropy(x, P),
        lambda x: cross_entropy(1 * x, MIX[0], inplace_backward=True),
    ):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for eager, traced in zip(
            values_and_grads(call, [logits((4, 3))]), values_and_grads(compiled, [logits((4, 3))])
        ):
            assert eager.shape == traced.shape
        x = logits((4, 3))
        for eager, traced in zip(values_and_grads(call, [x]), values_and_grads(compiled, [x])):
            torch.testing.assert_close(eager, traced, rtol=0, atol=0)


def test_autocast():
    x = logits((4, 3), torch.float32)
    with torch.autocast("cpu"):
        assert cross_entropy(x.bfloat16(), P.bfloat16()).dtype is torch.float32
        assert cross_entropy(x.bfloat16(), MIX, z_loss=0.1).dtype is torch.float32


DIFFERENTIATED = {
    "labels": ("labels", {}), "smooth": ("labels", {"label_smoothing": 0.1}), "z": ("labels", {"z_loss": 0.01}),
    "capped": ("labels", {"softcap": 3.0}), "mixture": ("mixture", {}), "zero": ("labels", {"empty": "zero"}),
    "normalizer": ("labels", {"normalizer": torch.tensor([3.0])}), "probabilities": ("probabilities", {"z_loss": 0.1}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("case", DIFFERENTIATED)
def test_every_way_to_differentiate_gives_the_same(case, dtype):
    """In value, gradient, dtype and shape."""
    kind, options = DIFFERENTIATED[case]
    x = logits((6, 4)).detach().to(dtype)
    target = draw_target(kind, (6, 4), 4, dtype)

    def loss(x):
        return cross_entropy(x, target, **options)

    leaf = x.clone().requires_grad_()
    value = loss(leaf)
    (grad,) = torch.autograd.grad(value, leaf)
    (again,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    tangent = torch.rand(6, 4).to(dtype)
    other, slope = torch.func.jvp(loss, (x,), (tangent,))
    (batched,) = torch.vmap(loss)(x.unsqueeze(0))
    eps = torch.finfo(dtype).eps
    for found, wanted in ((again, grad), (other, value), (batched, value), (slope, (grad.double() * tangent).sum())):
        assert found.dtype is dtype and found.shape == wanted.shape
        scale = max(1.0, wanted.abs().max().item())
        torch.testing.assert_close(found.double(), wanted.double(), rtol=0, atol=8 * eps * scale)


def test_z_loss_of_float16_does_not_overflow():
    x = torch.full((3, 4), 60.0, dtype=torch.float16)
    x[:, 0] = 1000.0

    def loss(x):
        return cross_entropy(x, torch.zeros(3, dtype=torch.int64), z_loss=0.01)

    value, _ = torch.func.jvp(loss, (x,), (x,))
    assert value == loss(x) and value.isfinite()


def test_class_weights_beside_probabilities_of_another_dtype():
    x, p, w = torch.randn(3, 4), torch.rand(3, 4, dtype=torch.float64).softmax(1), torch.rand(4)
    torch.testing.assert_close(cross_entropy(x, p, w), F.cross_entropy(x.double(), p, w.double()))
    assert cross_entropy(x.bfloat16(), p.float(), w.bfloat16()).dtype is torch.float32
    torch.testing.assert_close(cross_entropy(x, p.float(), w.double()), F.cross_entropy(x, p.float(), w.double()))
    assert cross_entropy(x.bfloat16(), p.bfloat16(), w).dtype is torch.float32


def test_no_cap_at_infinity():
    x, y = torch.randn(3, 4), torch.tensor([0, 3, 1])
    assert torch.equal(cross_entropy(x, y, softcap=math.inf), cross_entropy(x, y))


# ---- inplace_backward ----


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided", "images", "channels_last"])
@pytest.mark.parametrize("kind", ["labels", "mixture", "probabilities"])
def test_inplace(layout, kind):
    shape = (2, 4, 3, 5) if layout in ("images", "channels_last") else (6, 4)
    base = logits(shape)
    target = draw_target(kind, shape, 4)

    def lay(x):
        if layout == "channels_last":
            return (1 * x).contiguous(memory_format=torch.channels_last)
        return laid_out(1 * x, layout)

    options = {"label_smoothing": 0.1, "softcap": 5.0}
    x = lay(base)
    (grad,) = torch.autograd.grad(cross_entropy(x, target, inplace_backward=True, **options), base)
    (wanted,) = torch.autograd.grad(cross_entropy(lay(base), target, **options), base)
    torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-15)
    assert x._version == 1


def test_inplace_where_others_need_the_logits():
    x, y = logits((6, 4)), torch.randint(4, (6,))
    inplace = {"inplace_backward": True}
    with pytest.raises(RuntimeError, match=r"these are a leaf.*leave it out"):
        cross_entropy(x, y, **inplace)
    for view in (x[:3], x.view(6, 4)[:3].t().t()):
        with pytest.raises(RuntimeError, match="these are a leaf or a view of one"):
            cross_entropy(view, y[:3], **inplace)
    row = x.flatten() * 1
    for overlapping in (row[:4].expand(3, 4), row.unfold(0, 4, 1)[:3], row.as_strided((3, 4), (3, 1))):
        with pytest.raises(RuntimeError, match=r"these are expanded or overlap \(strides \(.*pass logits.contiguous"):
            cross_entropy(overlapping, y[:3], **inplace)
    soft = torch.rand(6, 4, dtype=x.dtype).softmax(1).requires_grad_()
    with pytest.raises(RuntimeError, match=r"target requires grad, which needs them.*pass target.detach"):
        cross_entropy(2 * x, soft, **inplace)
    with torch.no_grad():
        cross_entropy(x, y, **inplace)
    assert x._version == 0
    modified = pytest.raises(RuntimeError, match="modified by an inplace operation")
    with modified:  # the layer before keeps its output
        cross_entropy(x.exp(), y, **inplace).backward()
    out = 2 * x
    with modified:  # another loss of the same logits
        (2 * cross_entropy(out, y) + cross_entropy(out, y, **inplace)).backward()
    # But not one that made its gradient along with its value.
    out = 2 * x
    (both,) = torch.autograd.grad(cross_entropy(out, y) + cross_entropy(out, y, **inplace), x)
    torch.testing.assert_close(both, 2 * torch.autograd.grad(cross_entropy(2 * x, y), x)[0])
    loss = cross_entropy(2 * x, y, **inplace)
    loss.backward(retain_graph=True)
    with modified:
        loss.backward()
    with pytest.raises(RuntimeError, match="cannot be differentiated again; leave out"):
        torch.autograd.grad(cross_entropy(2 * x, y, **inplace), x, create_graph=True)


def test_inplace_of_many_gradients_at_once():
    x, y = logits((6, 4)), torch.randint(4, (6,))
    loss = cross_entropy(2 * x, y, inplace_backward=True, reduction="none")
    with pytest.raises(RuntimeError, match=r"inplace_backward=True writes one gradient .* leave out one of them"):
        torch.autograd.grad(loss, x, torch.eye(6, dtype=x.dtype), is_grads_batched=True)


def test_inplace_changes_nothing_under_torch_func():
    x, y = logits((6, 4)).detach(), torch.randint(4, (6,))
    plain, inplace = (lambda x, i=i: cross_entropy(2 * x, y, inplace_backward=i) for i in (False, True))
    torch.testing.assert_close(torch.func.grad(inplace)(x), torch.func.grad(plain)(x))
    torch.testing.assert_close(torch.vmap(torch.func.grad(inplace))(x[None]), torch.func.grad(plain)(x)[None])
