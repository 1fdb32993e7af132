"""The dense layer against float64, and under everything that torch does to a function."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import gdbp
from gdbp.nn.functional import linear
from gdbp.ops.linear import NEED_PRE
from tests.oracle import (
    FLOAT_DTYPES,
    FULL_DTYPES,
    KINDS_OF_ACTIVATION,
    LAYOUTS,
    compare,
    compare_samples,
    laid_out,
    leaf,
    on_one_and_two_threads,
    ulps,
    values_and_grads,
)

ACTIVATIONS = {
    None: lambda z: z,
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "elu": F.elu,
    "softplus": F.softplus,
}
# rows, in, out: empty, single, and around the widths of vectors, of tiles (64) and of column blocks (1024)
SIZES = [
    (0, 4, 3), (3, 0, 5), (4, 3, 0), (0, 0, 0), (1, 1, 1), (1, 7, 8), (7, 8, 15), (8, 15, 16), (15, 16, 17),
    (16, 17, 63), (17, 63, 64), (63, 64, 65), (64, 65, 7), (65, 1, 64), (129, 33, 1), (1, 64, 1025),
    (3, 5, 1024), (1023, 8, 17), (2, 1025, 3),
]  # fmt: skip
activations = pytest.mark.parametrize("activation", ACTIVATIONS)


def ours(activation):
    return lambda x, w, b=None: linear(x, w, b, activation=activation)


def torchs(activation):
    return lambda x, w, b=None: ACTIVATIONS[activation](F.linear(x, w, b))


def layer(lead, n_in, n_out, *, dtype=torch.float64, device="cpu", bias=True, grad=(True, True, True)):
    """Input, weight and bias of a layer."""
    shapes = ((*lead, n_in), (n_out, n_in), (n_out,))
    tensors = [torch.randn(shape, dtype=torch.float64).to(device, dtype) for shape in shapes]
    tensors = [t.requires_grad_(wanted) for t, wanted in zip(tensors, grad)]
    return tensors if bias else [*tensors[:2], None]


# ---- values ----


@activations
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_sizes(activation, dtype, device):
    for rows, n_in, n_out in SIZES:
        compare(ours(activation), torchs(activation), layer((rows,), n_in, n_out, dtype=dtype, device=device))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_results(dtype, activation, bias):
    """Those of 4 MB and more are allocated by us, here each of output and gradients."""
    for lead, n_in, n_out in (((1100, 2), 2, 1003), ((3,), 1501, 1499)):
        compare(ours(activation), torchs(activation), layer(lead, n_in, n_out, dtype=dtype, bias=bias))


def test_no_subnormal_gradients():
    """Far to the left gelu's slope vanishes through numbers with which matrix products are slow."""
    bias = torch.linspace(-120, -5, 40001).requires_grad_()
    for activation in ("gelu", "gelu_tanh", "silu", "elu"):
        output = linear(torch.ones(1, 0), torch.ones(len(bias), 0), bias, activation=activation)
        (slope,) = torch.autograd.grad(output.sum(), bias)
        assert ((slope == 0) | (slope.abs() >= torch.finfo(torch.float32).tiny)).all()
        assert slope[0] == 0 and slope[-1] != 0


@activations
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 3, 4), (2, 0, 3), (1, 1, 1, 2)])
@pytest.mark.parametrize("sizes", [(4, 6), (0, 3), (3, 0), (1, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_leading_dimensions(activation, lead, sizes, bias):
    compare(ours(activation), torchs(activation), layer(lead, *sizes, bias=bias))


@activations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", range(4))
def test_layouts(activation, dtype, layout, which, device):
    for lead in ((9,), (2, 3), ()):
        *tensors, upstream = (t.detach() for t in (*layer(lead, 17, 5), torch.randn(*lead, 5)))
        tensors = [t.to(device, dtype) for t in (*tensors, upstream)]
        tensors[which] = laid_out(tensors[which], layout)
        *tensors, upstream = tensors
        compare(ours(activation), torchs(activation), [t.requires_grad_() for t in tensors], upstream)


def test_upstream_gradient_of_a_sum(device):
    x, w, b = layer((6,), 3, 4, device=device)
    for activation in ACTIVATIONS:
        mine, other = (torch.autograd.grad(f(x, w, b).sum(), (x, w, b)) for f in (ours(activation), torchs(activation)))
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES[1:])
def test_activations_in_ulp(dtype, device):
    # Below -12 (gelu_tanh: -9.9) the tail leaves the normal numbers, and libraries flush what is smaller.
    z = torch.linspace(-12, 40, 20001, device=device).to(dtype)
    exact = z.double()
    cdf, pdf = (
        torch.special.erfc(-exact / math.sqrt(2)) / 2,
        torch.exp(-exact * exact / 2) / math.sqrt(2 * math.pi),
    )
    sigmoid, rest = torch.sigmoid(exact), torch.sigmoid(-exact)
    c = 2 * math.sqrt(2 / math.pi)
    u2 = c * (exact + 0.044715 * exact**3)
    logistic, bend = torch.sigmoid(u2), exact * torch.sigmoid(u2) * torch.sigmoid(-u2)
    bend *= c * (1 + 3 * 0.044715 * exact**2)
    # value; derivative; size of the derivative's terms
    expected = {
        None: (exact, exact**0, None),
        "relu": (exact.clamp_min(0), (exact > 0).double(), None),
        "leaky_relu": (exact.clamp(min=0) + 0.01 * exact.clamp(max=0), (exact > 0) * 0.99 + 0.01, None),
        "gelu": (exact * cdf, cdf + exact * pdf, cdf + (exact * pdf).abs()),
        "gelu_tanh": (exact * logistic, logistic + bend, logistic + bend.abs()),
        "silu": (exact * sigmoid, sigmoid + exact * sigmoid * rest, sigmoid + (exact * sigmoid * rest).abs()),
        "elu": (torch.where(exact > 0, exact, exact.expm1()), exact.clamp(max=0).exp(), None),
    }
    # What rounds once errs half an ulp; float32 errs by the function's own few.
    bound = 6 if dtype is torch.float32 else 0.51 if device == "cpu" else 0.53
    x, one = z.unsqueeze(1).requires_grad_(), torch.ones(1, 1, dtype=dtype, device=device)
    for activation, (value, derivative, scale) in expected.items():
        y, grad = values_and_grads(ours(activation), [x, one], torch.ones_like(x))
        normal = exact >= (-9.9 if activation == "gelu_tanh" else -12)
        assert ulps(y.flatten()[normal], value[normal]) <= bound, activation
        scale = None if scale is None else scale[normal]
        assert ulps(grad.flatten()[normal], derivative[normal], scale) <= bound, activation
    for activation in ("sigmoid", "tanh", "softplus"):
        y = linear(x, one, activation=activation)
        assert ulps(y.flatten(), ACTIVATIONS[activation](exact)) <= min(bound, 3), activation
        # From the rounded output, as torch's of sigmoid and tanh: one ulp of y is one ulp of 1.
        (grad,) = torch.autograd.grad(y.sum(), x)
        s = y.detach().double().flatten()
        derivative = {
            "sigmoid": s * (1 - s),
            "tanh": 1 - s * s,
            "softplus": -torch.expm1(-s),
        }[activation]
        assert ulps(grad.flatten(), derivative, torch.ones_like(s)) <= 1, activation


def test_not_finite():
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 1e38, -1e38])
    one = torch.ones(1, 1)
    for dtype in (torch.float32, torch.float64):
        x, w = special.to(dtype).unsqueeze(1).requires_grad_(), one.to(dtype)
        for activation in ACTIVATIONS:
            for g in (1.0, math.nan, math.inf, 0.0):
                upstream = torch.full_like(x, g)
                mine = values_and_grads(ours(activation), [x, w], upstream)
                # In float64, as torch's vectorised float32 makes NaN of gelu(inf).
                exact = [leaf(x, torch.float64), leaf(w, torch.float64)]
                other = values_and_grads(torchs(activation), exact, upstream)
                if activation == "elu":
                    other[1][0] = math.nan  # torch's slope at NaN is 1 with AVX-512, NaN without
                torch.testing.assert_close(mine, [t.to(dtype) for t in other], equal_nan=True)


def test_nan_survives_relu():
    x = torch.tensor([[math.nan], [0.0], [-1.0], [2.0]], requires_grad=True)
    y = linear(x, torch.ones(1, 1), activation="relu")
    assert y[0].isnan() and y[1:].flatten().tolist() == [0, 0, 2]
    assert torch.autograd.grad(y.sum(), x)[0].flatten().tolist() == [1, 0, 0, 1]


def test_half_types_sum_in_float32(device):
    ones = torch.ones(4096, 1, dtype=torch.bfloat16, device=device)
    b = ones[0].clone().requires_grad_()
    assert torch.autograd.grad(linear(ones, ones[:1], b).sum(), b)[0].item() == 4096


@activations
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number(activation, dtype):
    """Large arrays are looked up in tables, small ones computed: with the same bits, for all numbers there are."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)[:, None]
    # The library's large products drop subnormal numbers of bfloat16.
    least = torch.finfo(dtype).tiny if dtype is torch.bfloat16 else 0.0
    x = torch.where(x.abs() < least, 0, x)
    one, name = torch.ones(1, 1, dtype=dtype), activation or "none"
    for g in (torch.ones_like(x), torch.full_like(x, -3.0)):

        def values_and_slopes(x, g):
            y, pre = torch.ops.gdbp.linear_with_pre(x, one, None, name)
            saved = pre if activation in NEED_PRE else y
            return y, torch.ops.gdbp.linear_backward(g, x, one, saved, name, (True, False, False))[0]

        looked_up = values_and_slopes(x, g)
        computed = zip(*map(values_and_slopes, x.split(2**12), g.split(2**12)), strict=True)
        for a, b in zip(looked_up, map(torch.cat, computed), strict=True):
            same = (a.view(torch.int16) == b.view(torch.int16)) | (a.isnan() & b.isnan())
            same |= (a.abs() < least) & (b.abs() < least)
            assert same.all(), (x[~same][:5], a[~same][:5], b[~same][:5])


@activations
def test_threads_do_not_change_bits(activation):
    # A product with the identity is exact in any order, so what remains are our own passes.
    x, b = torch.randn(3000, 130, requires_grad=True), torch.randn(130, requires_grad=True)
    upstream = torch.randn(3000, 130)
    call = lambda x, b: linear(x, torch.eye(130), b, activation=activation)  # noqa: E731
    for one, two in on_one_and_two_threads(lambda: values_and_grads(call, (x, b), upstream)):
        assert torch.equal(one, two)


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any_layer(data):
    size = st.integers(0, 20) | st.sampled_from((63, 64, 65, 127, 130))
    lead = data.draw(st.lists(st.integers(0, 5), max_size=3) | st.tuples(size))
    n_in, n_out = data.draw(size), data.draw(size)
    activation = data.draw(st.sampled_from(list(ACTIVATIONS)))
    dtype = data.draw(st.sampled_from(FULL_DTYPES))
    grad = data.draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    layouts = [data.draw(st.sampled_from(LAYOUTS)) for _ in range(4)]
    x, w, b = layer(lead, n_in, n_out, dtype=dtype)
    tensors = [laid_out(t.detach(), how).requires_grad_(g) for t, how, g in zip((x, w, b), layouts, grad)]
    if data.draw(st.booleans()):
        tensors[2] = None
    upstream = laid_out(torch.randn(*lead, n_out, dtype=dtype), layouts[3])
    compare(ours(activation), torchs(activation), tensors, upstream)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_torchs_samples(dtype):
    matrix = lambda input, args, kwargs: args[0].dim() == 2  # noqa: E731
    assert compare_samples("nn.functional.linear", linear, F.linear, dtype, matrix) >= 8


# ---- autograd ----


@activations
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(3,), (), (2, 2)])
def test_gradcheck(activation, bias, lead):
    tensors = [t for t in layer(lead, 3, 2, bias=bias) if t is not None]
    assert gradcheck(ours(activation), tensors, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(ours(activation), tensors, check_fwd_over_rev=True)


class Masks(TorchDispatchMode):
    """Records which gradients the backward operator is asked for."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.gdbp.linear_backward.default:
            self.seen.append(tuple(args[-1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mask", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1) if a or b or c])
def test_only_what_is_asked_for(mask):
    x, w, b = tensors = layer((5,), 3, 4, grad=[bool(m) for m in mask])
    with Masks() as masks:
        linear(x, w, b, activation="relu").sum().backward()
    assert masks.seen == [tuple(bool(m) for m in mask)]
    assert [t.grad is not None for t in tensors] == [bool(m) for m in mask]
    x, w, b = (t.detach() for t in tensors)
    y = torch.ops.gdbp.linear(x, w, b, "relu")
    grads = torch.ops.gdbp.linear_backward(torch.ones_like(y), x, w, y, "relu", mask)
    assert [g is not None for g in grads] == [bool(m) for m in mask]


@activations
def test_no_graph_where_none_is_needed(activation):
    x, w, b = layer((2,), 3, 4, grad=(False, False, False))
    assert linear(x, w, b, activation=activation).grad_fn is None
    with torch.no_grad():
        assert not linear(x, w.clone().requires_grad_(), b, activation=activation).requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(linear(x, w, b, activation=activation), torchs(activation)(x, w, b))


@activations
def test_used_twice_and_kept(activation):
    x, w, b = layer((5,), 4, 4)
    results = []
    for f in (ours(activation), torchs(activation)):
        tensors = [leaf(t) for t in (x, w, b)]
        loss = f(f(*tensors), *tensors[1:]).pow(2).sum()
        once = torch.autograd.grad(loss, tensors, retain_graph=True)
        twice = torch.autograd.grad(loss, tensors)
        assert all(map(torch.equal, once, twice))
        results.append(once)
    torch.testing.assert_close(*results)


def test_changing_in_place_afterwards():
    x, w, b = layer((5,), 4, 4)
    # Without an activation the output is not needed again ...
    model = torch.nn.Sequential(gdbp.nn.Linear(4, 4), torch.nn.ReLU(inplace=True)).double()
    model(x).sum().backward()
    assert model[0].weight.grad is not None
    # ... with one it is, or its argument, and always input and weight: never a wrong gradient.
    for activation in filter(None, ACTIVATIONS.keys() - NEED_PRE):
        y = linear(x, w, b, activation=activation)
        y.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    for activation in NEED_PRE:
        linear(x, w, b, activation=activation).mul_(2).sum().backward()
    y = linear(x, w, b)
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ---- torch.func, torch.compile, the dispatcher ----


@activations
def test_torch_func(activation):
    x, w, b = (t.detach() for t in layer((5,), 3, 4))

    def results(f):
        def loss(x, w, b):
            return f(x, w, b).pow(2).sum()

        return (
            torch.func.grad(loss, argnums=(0, 1, 2))(x, w, b),
            torch.vmap(f, in_dims=(0, None, None))(x, w, b),
            torch.vmap(f, in_dims=(None, 1, None), out_dims=1)(x[0], w.unsqueeze(1).repeat(1, 2, 1), b),
            torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)), in_dims=(0, None, None))(x, w, b),
            torch.func.grad(lambda w: torch.vmap(f, in_dims=(0, None, None))(x, w, b).pow(2).sum())(w),
            torch.vmap(torch.vmap(f, in_dims=(0, None, None)), in_dims=(None, 0, 0))(
                x, torch.stack((w, 2 * w)), torch.stack((b, b))
            ),
            torch.func.jacrev(f, argnums=1)(x, w, b),
            torch.func.jacfwd(f, argnums=(0, 2))(x, w, b),
            torch.func.hessian(loss, argnums=1)(x, w, b),
            torch.func.jvp(f, (x, w, b), (x, w, b)),
            torch.autograd.functional.jacobian(f, (x, w, b), vectorize=True),
        )

    torch.testing.assert_close(results(ours(activation)), results(torchs(activation)))


@activations
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(activation, dynamic):
    torch._dynamo.reset()
    module = gdbp.nn.Linear(6, 4, activation=activation)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (5, 8) if dynamic else (5,):
        x = torch.randn(rows, 6, requires_grad=True)
        tensors = (x, module.weight, module.bias)
        eager, traced = (values_and_grads(lambda *_, f=f, x=x: f(x), tensors) for f in (module, compiled))
        assert all(map(torch.equal, eager, traced))


@pytest.mark.parametrize("activation", KINDS_OF_ACTIVATION)
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,)])
def test_opcheck(activation, lead):
    x, w, b = (t.detach() for t in layer(lead, 5, 4))
    name = activation or "none"
    for bias in (b, None):
        torch.library.opcheck(torch.ops.gdbp.linear, (x, w, bias, name))
        torch.library.opcheck(torch.ops.gdbp.linear_with_pre, (x, w, bias, name))
    y, pre = torch.ops.gdbp.linear_with_pre(x, w, b, name)
    saved = pre if activation in NEED_PRE else y
    for mask in ((True, True, True), (False, True, False)):
        torch.library.opcheck(torch.ops.gdbp.linear_backward, (torch.randn_like(y), x, w, saved, name, mask))
        over = torch.ops.gdbp.linear_backward_over_saved
        torch.library.opcheck(over, (torch.randn_like(y), x, w, saved.clone(), name, mask))


# ---- the module ----


@activations
def test_module_is_torchs(activation):
    torch.manual_seed(3)
    mine = gdbp.nn.Linear(6, 4, activation=activation)
    torch.manual_seed(3)
    other = torch.nn.Linear(6, 4)
    assert list(mine.state_dict()) == list(other.state_dict())
    assert all(map(torch.equal, mine.state_dict().values(), other.state_dict().values()))
    other.load_state_dict(mine.state_dict())
    assert isinstance(mine, torch.nn.Linear)
    assert repr(mine) == repr(other) if activation is None else f"activation={activation!r}" in repr(mine)
    x = torch.randn(3, 6)
    torch.testing.assert_close(mine(x), ACTIVATIONS[activation](other(x)))
    buffer = io.BytesIO()
    torch.save(mine, buffer)
    buffer.seek(0)
    for clone in (
        copy.deepcopy(mine),
        pickle.loads(pickle.dumps(mine)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(clone(x), mine(x)) and clone.activation == activation
    without = gdbp.nn.Linear(6, 4, bias=False, dtype=torch.float64, activation=activation)
    assert without.bias is None and without.weight.dtype is torch.float64
    with torch.device("meta"):
        assert gdbp.nn.Linear(6, 4, activation=activation)(torch.randn(2, 6)).shape == (2, 4)


@activations
def test_autocast(activation):
    x, w, b = layer((5,), 8, 4, dtype=torch.float32)
    results = []
    for f in (ours(activation), torchs(activation)):
        with torch.autocast("cpu"):
            y = f(x, w, b)
        results.append((y, *torch.autograd.grad(y.float().sum(), (x, w, b))))
    assert results[0][0].dtype is torch.bfloat16 and results[0][1].dtype is torch.float32
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)
    with torch.autocast("cpu"):
        # The operator itself takes what it is given.
        name = activation or "none"
        y = torch.ops.gdbp.linear(x.detach(), w.detach(), b.detach(), name)
        torch.testing.assert_close(y, torchs(activation)(*(t.detach().double() for t in (x, w, b))).float())


def test_tables_agree():
    saves = torch.ops.gdbp.activations_that_save
    assert saves("nothing") == ["none"] and set(saves("pre")) == {"gelu", "gelu_tanh", "silu", "elu"}
    assert {*saves("nothing"), *saves("output"), *saves("pre")} == {name or "none" for name in ACTIVATIONS}
