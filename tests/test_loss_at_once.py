"""Losses that compute their gradient along with their value: the same numbers as in two passes, and no other."""

import pytest
import torch

from gdbp.nn.functional import binary_cross_entropy_with_logits as bce
from gdbp.nn.functional import cross_entropy, huber_loss, l1_loss, mse_loss, smooth_l1_loss

POINTWISE = {"mse_loss": mse_loss, "l1_loss": l1_loss, "huber_loss": huber_loss, "smooth_l1_loss": smooth_l1_loss}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OPTIONS = {
    "labels": {},
    "ignored": {"ignore_index": 1},
    "smooth": {"label_smoothing": 0.1},
    "weighted": {"weight": True, "label_smoothing": 0.2},
    "capped": {"softcap": 3.0, "z_loss": 0.01},
    "normalizer": {"normalizer": 7.0},
    "mixture": {"mixture": True},
    "probabilities": {"soft": True},
}
SHAPES = [(1, 1), (3, 5), (300, 17), (0, 4), (2, 5, 3), (3, 7, 130), (2, 3, 0)]


def problem(option, shape, dtype, reduction):
    """A function of the logits, and logits."""
    options = dict(OPTIONS[option])
    if reduction == "sum":
        options.pop("normalizer", None)
    rows = (shape[0], *shape[2:])
    labels = torch.randint(shape[1], rows)
    if options.pop("weight", False):
        options["weight"] = torch.rand(shape[1]).to(dtype)
    if options.pop("mixture", False):
        target = (labels, torch.randint(shape[1], rows), 0.3)
    elif options.pop("soft", False):
        target = torch.rand(shape).softmax(1).to(dtype)
    else:
        target = labels
    return lambda x: cross_entropy(x, target, reduction=reduction, **options), torch.randn(shape).mul(3).to(dtype)


def in_two_passes(loss, x):
    """The gradient as the backward kernel computes it, which serves every reduction to more than a number."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(loss(x) * 2, x)[0] / 2


def at_once(loss, x):
    x = x.clone().requires_grad_()
    loss(x).backward()
    return x.grad


def assert_gradients_are_equal(loss, x):
    # Twice and halved is exact, but for what float16 rounds below its normal numbers.
    # On CUDA they come out of two kernels, whose last bits may differ.
    rtol = 0 if x.is_cpu else 2 * torch.finfo(x.dtype).eps
    torch.testing.assert_close(at_once(loss, x), in_two_passes(loss, x), rtol=rtol, atol=1.3e-7, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("option", OPTIONS)
def test_cross_entropy_gradients_are_equal(option, reduction, dtype, device):
    for shape in SHAPES:
        with torch.device(device):
            loss, x = problem(option, shape, dtype, reduction)
        assert_gradients_are_equal(loss, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise_gradients_are_equal(name, reduction, dtype, device):
    for size in (0, 1, 15, 17, 16383, 16384, 16385, 50001):
        x, target = torch.randn(2, size, device=device).to(dtype)

        def loss(x, target=target):
            return POINTWISE[name](x, target, reduction=reduction)

        assert_gradients_are_equal(loss, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("factors", [{}, {"weight": (3, 1)}, {"weight": (7,), "pos_weight": (7,)}])
def test_bce_gradients_are_equal(factors, reduction, dtype, device):
    factors = {name: torch.rand(shape, device=device).to(dtype) for name, shape in factors.items()}
    for rows in (0, 3, 2049):
        x, target = torch.randn(2, rows, 3, 7, device=device).to(dtype)
        target = target.sigmoid()

        def loss(x, target=target):
            return bce(x, target, reduction=reduction, **factors)

        assert_gradients_are_equal(loss, x)


def functions(device="cpu"):
    target, labels = torch.randn(6, 5, device=device), torch.randint(5, (6,), device=device)
    return [lambda x: mse_loss(x, target), lambda x: cross_entropy(x, labels), lambda x: bce(x, target.sigmoid())]


@pytest.mark.parametrize("which", range(3))
def test_backward_again(which, device):
    loss = functions(device)[which]
    x = torch.randn(6, 5, device=device, requires_grad=True)
    value = loss(x)
    (first,) = torch.autograd.grad(value, x, retain_graph=True)
    kept = first.clone()
    value.backward(retain_graph=True)
    value.backward(torch.tensor(3.0, device=device))
    assert torch.equal(first, kept)  # and was not written into by the sum
    torch.testing.assert_close(x.grad, 4 * kept)


@pytest.mark.parametrize("which", range(3))
def test_every_upstream_gradient(which, device):
    loss = functions(device)[which]
    x = torch.randn(6, 5, device=device, requires_grad=True)
    (unit,) = torch.autograd.grad(loss(x), x)
    for upstream in (0.0, -1.0, 2.0, float("inf"), float("nan")):
        (grad,) = torch.autograd.grad(loss(x), x, torch.tensor(upstream, device=device))
        torch.testing.assert_close(grad, unit * upstream, equal_nan=True)
    (many,) = torch.autograd.grad(loss(x), x, torch.tensor([1.0, 1.0, 3.0], device=device), is_grads_batched=True)
    torch.testing.assert_close(many, torch.stack([unit, unit, 3 * unit]))


@pytest.mark.parametrize("which", range(3))
def test_gradients_are_their_readers_own(which, device):
    """Whoever keeps the graph may write to what came out of it."""
    loss = functions(device)[which]
    p = torch.randn(30, device=device, requires_grad=True)
    value = loss(p.view(6, 5))  # behind a view .grad takes over what comes
    value.backward(retain_graph=True)
    unit = p.grad.clone()
    for _ in range(3):
        value.backward(retain_graph=True)
    torch.testing.assert_close(p.grad, 4 * unit)
    p.grad.data.zero_()
    value.backward()
    torch.testing.assert_close(p.grad, unit)
    x = p.detach().view(6, 5).requires_grad_()
    value = loss(x)
    (first,) = torch.autograd.grad(value, x, retain_graph=True)
    first.mul_(2)
    (second,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(second, unit.view(6, 5))


def operators(call):
    """Names of the operators that a call runs."""
    with torch.autograd.profiler.profile() as profile:
        call()
    return {event.name for event in profile.function_events if event.name.startswith("gdbp::")}


@pytest.mark.parametrize("which", range(3))
def test_nothing_is_computed_ahead_without_need(which):
    loss = functions()[which]
    name = ("gdbp::pointwise_loss", "gdbp::cross_entropy", "gdbp::bce_with_logits")[which]
    wanted = torch.randn(6, 5, requires_grad=True)
    assert operators(lambda: loss(torch.randn(6, 5))) == {name}
    with torch.no_grad():
        assert operators(lambda: loss(wanted)) == {name}
    assert operators(lambda: loss(wanted)) == {f"{name}_with_gradient"}
    assert operators(lambda: loss(wanted).backward()) == {f"{name}_with_gradient"}
    other = f"{name}_backward_from_one_"
    assert operators(lambda: loss(wanted).backward(torch.tensor(2.0))) == {f"{name}_with_gradient", other}
    two = torch.tensor(2.0)
    other = f"{name}_backward"
    assert operators(lambda: loss(wanted).backward(two, retain_graph=True)) == {f"{name}_with_gradient", other}


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("keeps", ["the graph", "the gradient", "nothing"])
def test_gradients_that_somebody_holds_stay(keeps, which, device):
    x = torch.randn(6, 5, device=device, requires_grad=True)
    value = functions(device)[which](x)
    (first,) = torch.autograd.grad(value, x, retain_graph=True)
    unit = first.clone()
    if keeps != "the gradient":
        del first
    (second,) = torch.autograd.grad(value, x, torch.tensor(2.0, device=device), retain_graph=keeps == "the graph")
    torch.testing.assert_close(second, 2 * unit)
    if keeps == "the gradient":
        assert torch.equal(first, unit)
    if keeps == "the graph":
        (third,) = torch.autograd.grad(value, x)
        assert torch.equal(third, unit)


X, TARGET = torch.randn(6, 5), torch.rand(6, 5)
# Operators, with what they take before and behind the reduction.
OPERATORS = {
    "pointwise_loss": ((X, TARGET, "huber_loss", 0.5), ()),
    "bce_with_logits": ((X, TARGET, None, torch.rand(5)), ()),
    "cross_entropy": ((X, torch.randint(5, (6,)), None, None, None), (-100, 0.1, 0.01, 3.0)),
}


def from_one(name, upstream):
    """The operator that goes on from the gradient for 1, and its arguments with one for the reduction."""
    first, last = OPERATORS[name]
    if name == "cross_entropy":
        _, stats, divisor, grad = torch.ops.gdbp.cross_entropy_with_gradient(*first, None, "mean", *last, False)
        first = (*first, stats, divisor)
    else:
        _, grad = getattr(torch.ops.gdbp, f"{name}_with_gradient")(*first, "mean")
    operator = getattr(torch.ops.gdbp, f"{name}_backward_from_one_")
    return operator, lambda grad=grad, reduction="mean": (torch.tensor(upstream), *first, reduction, *last, grad)


@pytest.mark.parametrize("upstream", [1.0, -2.0, float("nan")])
@pytest.mark.parametrize("name", OPERATORS)
def test_from_the_gradient_for_one(name, upstream):
    operator, arguments = from_one(name, upstream)
    *others, grad = arguments()
    version = grad._version
    wanted, _ = getattr(torch.ops.gdbp, f"{name}_backward")(*others, (True, False))
    operator(*arguments())
    assert torch.equal(grad.nan_to_num(7.0), wanted.nan_to_num(7.0))
    assert grad._version > version
    torch.library.opcheck(operator, arguments())


@pytest.mark.parametrize("name", OPERATORS)
def test_from_the_gradient_for_one_refuses(name):
    operator, arguments = from_one(name, 2.0)
    grad = arguments()[-1]
    before, version = grad.clone(), grad._version
    with pytest.raises(ValueError, match="reduction is 'none'; expected mean or sum"):
        operator(*arguments(reduction="none"))
    with pytest.raises(RuntimeError, match=r"grad_.* is not what .* returned"):
        operator(*arguments(grad.T))
    with pytest.raises(RuntimeError, match="grad_output has shape"):
        operator(torch.ones(3), *arguments()[1:])
    assert torch.equal(grad, before) and grad._version == version


def test_opcheck():
    x, labels = torch.randn(6, 5), torch.randint(5, (6,))
    ops = torch.ops.gdbp
    torch.library.opcheck(ops.pointwise_loss_with_gradient, (x, torch.randn(6, 5), "huber_loss", 0.5, "mean"))
    torch.library.opcheck(ops.bce_with_logits_with_gradient, (x, torch.rand(6, 5), None, torch.rand(5), "sum"))
    for logits in (x, torch.randn(2, 3, 4).movedim(-1, 1)):
        target = labels if logits is x else torch.randint(4, (2, 3))
        options = (None, None, None, None, "mean", -100, 0.1, 0.0, 0.0, False)
        torch.library.opcheck(ops.cross_entropy_with_gradient, (logits, target, *options))


def test_refuses_a_loss_for_each_element():
    x = torch.randn(6, 5)
    with pytest.raises(ValueError, match="reduction is 'none'; expected mean or sum"):
        torch.ops.gdbp.pointwise_loss_with_gradient(x, x, "mse_loss", 1.0, "none")
    with pytest.raises(ValueError, match="reduction is 'none'; expected mean or sum"):
        torch.ops.gdbp.bce_with_logits_with_gradient(x, x, None, None, "none")
    with pytest.raises(ValueError, match="reduction is 'none'; expected mean or sum"):
        torch.ops.gdbp.cross_entropy_with_gradient(
            x, torch.zeros(6, dtype=torch.long), None, None, None, None, "none", -100, 0.0, 0.0, 0.0, False
        )
