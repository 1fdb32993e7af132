"""Batch normalisation against float64, and under everything that torch does to a function."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import gdbp
from gdbp.nn.functional import batch_norm, linear_batch_norm
from gdbp.reference import ACTIVATIONS as TORCHS
from tests.oracle import (
    FLOAT_DTYPES,
    FULL_DTYPES,
    KINDS_OF_ACTIVATION,
    LAYOUTS,
    compare,
    compare_samples,
    laid_out,
    leaf,
    no_worse,
    on_one_and_two_threads,
    values_and_grads,
)

ACTIVATIONS = [None if name == "none" else name for name in TORCHS]
# Empty, and around the widths of vectors, tiles (64 rows) and column tiles (256), with and without a length.
SIZES = [
    (0, 4), (3, 1), (4, 7), (7, 8), (63, 15), (64, 16), (65, 17), (130, 1), (9, 255), (8, 256), (5, 257),
    (1000, 3), (2, 3, 0), (0, 3, 2), (1, 1, 5), (1, 4, 255), (2, 3, 256), (3, 2, 257), (65, 2, 5), (64, 3, 1),
    (130, 1, 2), (2, 33, 7), (3, 2, 2, 5),
]  # fmt: skip
activations = pytest.mark.parametrize("activation", ACTIVATIONS)
training_or_not = pytest.mark.parametrize("training", [True, False])


def norms(activation=None, training=True, running=True, eps=1e-5):
    """Ours and torch's as functions of input, weight and bias, each with running statistics of its own."""

    def of(f):
        def call(x, w=None, b=None):
            stats = (None, None)
            if running or not training:
                stats = torch.linspace(-1, 1, x.shape[1]), torch.linspace(0.5, 2, x.shape[1])
                stats = [s.to(x.device, x.dtype) for s in stats]
            return f(x, *stats, w, b, training, 0.1, eps)

        return call

    activate = TORCHS[activation or "none"][0]

    def torchs(x, mean, var, w, b, *args):
        # torch's backward on the CPU reads a strided weight as if it were contiguous.
        return activate(F.batch_norm(x, mean, var, *(t if t is None else t.contiguous() for t in (w, b)), *args))

    return of(lambda *args: batch_norm(*args, activation=activation)), of(torchs)


def values(shape, dtype=torch.float64, device="cpu", grad=True):
    """Input, weight and bias."""
    tensors = [torch.randn(s, dtype=torch.float64) for s in (shape, shape[1:2], shape[1:2])]
    return [t.to(device, dtype).requires_grad_(grad) for t in tensors]


# ---- values ----


@activations
@training_or_not
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_sizes(activation, training, dtype, device):
    for shape in SIZES:
        compare(*norms(activation, training), values(shape, dtype, device))


@training_or_not
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_larger_sizes(training, dtype, device):
    """Around what a block of CUDA takes at once (512 or 1024 rows), of several tiles for a thread, and of so many tiles
    that another launch adds them up."""
    for shape in ((512, 9), (513, 20), (1024, 9), (1025, 70), (4200, 40), (140000, 2), (2, 3, 33000)):
        compare(*norms("relu", training), values(shape, dtype, device))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("shape", [(9, 17), (3, 4, 5)])
def test_layouts(layout, dtype, which, shape, device):
    tensors = [t.detach() for t in (*values(shape, dtype, device), torch.randn(shape).to(device, dtype))]
    if layout == "expanded" and which == 0:
        return  # all rows equal: their deviation is 0, and what is compared is noise
    tensors[which] = laid_out(tensors[which], layout)
    *tensors, upstream = tensors
    for training in (True, False):
        compare(*norms("relu", training), [t.requires_grad_() for t in tensors], upstream)


@pytest.mark.parametrize("affine", [(True, False), (False, True), (False, False)])
@training_or_not
def test_without_weight_or_bias(affine, training):
    for shape in ((20, 5), (4, 5, 6)):
        x, *parameters = values(shape)
        parameters = [t if there else None for t, there in zip(parameters, affine)]
        for activation in (None, "relu", "gelu"):
            compare(*norms(activation, training), [x, *parameters])
            if any(affine):
                compare(*norms(activation, training), [x.detach(), *parameters])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@training_or_not
def test_half_input_with_full_parameters(dtype, training, device):
    """What a layer gets under autocast."""
    x = torch.randn(33, 9).to(device, dtype)
    results = []
    for f, kind in ((batch_norm, torch.float32), (F.batch_norm, torch.float32), (F.batch_norm, torch.float64)):
        a = x.to(torch.float64 if kind is torch.float64 else dtype).requires_grad_()
        w, b = (torch.full((9,), v, dtype=kind, device=device, requires_grad=True) for v in (1.5, -0.5))
        running = [torch.ones(9, dtype=kind, device=device) for _ in range(2)]
        y = f(a, *running, w, b, training)
        results.append([y, *torch.autograd.grad(y, (a, w, b), torch.cos(x).to(y.dtype)), *running])
    for triple in zip(*results):
        no_worse(*triple)


@pytest.mark.parametrize("shape", [(300, 5), (20, 5, 30)])
def test_mean_far_from_zero(shape):
    """Values, statistics and gradients keep their digits where all numbers share their leading ones."""
    x, w, b = values(shape, torch.float32)
    with torch.no_grad():
        x += 10000
    for activation in (None, "tanh"):
        mine, torchs = norms(activation)
        exact = values_and_grads(torchs, [leaf(t, torch.float64) for t in (x, w, b)])
        for create_graph in (False, True):
            for ours, right in zip(values_and_grads(mine, (x, w, b), create_graph=create_graph), exact):
                assert (ours - right).abs().max() <= 2e-6 * right.abs().max().clamp_min(1)


@pytest.mark.parametrize("scale", [1e30, 1e15, 1e-15, 1e-30])
def test_huge_and_tiny(scale):
    for shape in ((50, 3), (5, 3, 20)):
        x, w, b = values(shape, torch.float32)
        x = (x.detach() * scale).requires_grad_()
        compare(*norms(running=False), (x, w, b))


def test_an_outlier_first():
    """The first element is what sums are taken about: it may be anything."""
    for shape in ((200, 3), (3, 3, 300)):
        for dtype in FULL_DTYPES:
            x, w, b = values(shape, dtype)
            with torch.no_grad():
                x[0] = 1e6
            compare(*norms(), (x, w, b))


def test_no_channels():
    """torch fails with an IndexError where there are running statistics."""
    for shape in ((4, 0), (4, 0, 3)):
        for training in (True, False):
            x, w, b = values(shape)
            assert [t.shape for t in values_and_grads(norms("relu", training)[0], (x, w, b))] == [
                shape,
                shape,
                (0,),
                (0,),
            ]


def test_equal_values():
    """A channel without variance gives its bias, exactly."""
    x = torch.full((70, 3), 0.1)
    b = torch.tensor([0.0, -1.0, 2.5])
    assert torch.equal(batch_norm(x, None, None, None, b, True), b.expand(70, 3))


def test_not_finite(device):
    for bad in (math.nan, math.inf, -math.inf):
        for position in (0, 5):
            x = torch.randn(20, 3, device=device)
            x[position, 1] = bad
            for training in (True, False):
                mine, torchs = norms("relu", training, running=False)
                y, expected = mine(x), torchs(x)
                torch.testing.assert_close(y, expected, equal_nan=True)
    x = torch.randn(20, 3, device=device, requires_grad=True)
    upstream = torch.ones(20, 3, device=device)
    upstream[3, 1] = math.nan
    mine, other = (values_and_grads(f, [x], upstream) for f in norms())
    torch.testing.assert_close(mine, other, equal_nan=True)
    with torch.no_grad():
        x[0, 0] = math.inf
    mine, other = (values_and_grads(f, [x]) for f in norms(training=False))
    torch.testing.assert_close(mine, other)


@activations
def test_threads_do_not_change_bits(activation):
    for shape in ((3000, 130), (70, 33, 60)):
        tensors = values(shape, torch.float32)
        mine, _ = norms(activation)
        for one, two in on_one_and_two_threads(lambda m=mine, t=tensors: values_and_grads(m, t)):
            assert torch.equal(one, two)


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any_batch(data):
    size = st.integers(2, 20) | st.sampled_from((63, 64, 65, 127, 130))
    shape = [data.draw(size), data.draw(st.integers(1, 20) | st.sampled_from((64, 255, 257)))]
    if data.draw(st.booleans()):
        many = shape[0] * shape[1] > 2000
        shape.append(data.draw(st.integers(0, 9) if many else st.integers(0, 9) | st.sampled_from((63, 64, 256, 260))))
    activation, dtype = data.draw(st.sampled_from(ACTIVATIONS)), data.draw(st.sampled_from(FULL_DTYPES))
    grad = data.draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    layouts = [data.draw(st.sampled_from([how for how in LAYOUTS if how != "expanded"])) for _ in range(4)]
    tensors = [laid_out(t.detach(), how).requires_grad_(g) for t, how, g in zip(values(shape, dtype), layouts, grad)]
    for i in (1, 2):
        if data.draw(st.booleans()):
            tensors[i] = None
    upstream = laid_out(torch.randn(*shape, dtype=dtype), layouts[3])
    options = {"training": data.draw(st.booleans()), "running": data.draw(st.booleans()), "eps": 1e-2}
    compare(*norms(activation, **options), tensors, upstream)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_torchs_samples(dtype):
    def of(f):
        def call(x, mean, var, *args, **kwargs):
            return f(x, *(None if s is None else s.detach().clone() for s in (mean, var)), *args, **kwargs)

        return call

    assert compare_samples("nn.functional.batch_norm", of(batch_norm), of(F.batch_norm), dtype) >= 8


# ---- running statistics ----


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", [(7, 4), (5, 4, 6), (0, 4)])
def test_running_statistics(momentum, dtype, shape, device):
    mine = gdbp.nn.BatchNorm1d(4, momentum=momentum, activation="relu", device=device, dtype=dtype)
    other = torch.nn.BatchNorm1d(4, momentum=momentum, device=device, dtype=dtype)
    exact = torch.nn.BatchNorm1d(4, momentum=momentum, device=device, dtype=torch.float64)
    for step in range(5):
        x = (torch.randn(shape, dtype=torch.float64) * (step + 1) + 3).to(device, dtype)
        for module in (mine, other, exact):
            module(x.to(module.running_mean.dtype))
        for name in ("running_mean", "running_var"):
            no_worse(*(getattr(module, name) for module in (mine, other, exact)))
        assert mine.num_batches_tracked.item() == step + 1 and mine.num_batches_tracked.dtype is torch.int64
    for module in (mine, other, exact):
        module.eval()
    x = torch.randn(6, 4).to(device, dtype)
    no_worse(*(m(x.to(m.running_mean.dtype)).relu() for m in (mine, other, exact)))
    assert mine.num_batches_tracked.item() == 5


def test_strided_running_statistics():
    buffers = torch.zeros(3, 4)
    batch_norm(x := torch.randn(8, 3), buffers[:, 1], buffers[:, 2], training=True, momentum=1.0)
    torch.testing.assert_close(buffers[:, 1], x.mean(0))
    torch.testing.assert_close(buffers[:, 2], x.var(0))
    assert not buffers[:, ::3].any()


def test_changes_are_seen_by_autograd():
    mean, var = torch.zeros(3), torch.ones(3)
    batch_norm(torch.randn(8, 3), mean, var, training=True)
    assert mean._version and var._version


def test_running_statistics_may_change_before_backward():
    """torch's gradient would be that of the new ones."""
    x, other = (torch.randn(6, 3, dtype=torch.float64) for _ in range(2))
    module = gdbp.nn.BatchNorm1d(3, dtype=torch.float64)
    grads = []
    for change in (False, True):
        leaf_x = x.clone().requires_grad_()
        y = module.eval()(leaf_x)
        if change:
            module.train()(other)
        grads.append(torch.autograd.grad(y.pow(2).sum(), leaf_x)[0])
    assert torch.equal(*grads)


# ---- autograd ----


@activations
@training_or_not
@pytest.mark.parametrize("shape", [(4, 2), (2, 2, 2)])
def test_gradcheck(activation, training, shape):
    mine, _ = norms(activation, training, running=not training, eps=0.1)
    tensors = values(shape)
    assert gradcheck(mine, tensors, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(mine, tensors, check_fwd_over_rev=True)
    assert gradgradcheck(mine, tensors[:1])


@pytest.mark.parametrize("mask", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1) if a or b or c])
@training_or_not
def test_only_what_is_asked_for(mask, training):
    tensors = values((5, 3), torch.float32)
    for t, wanted in zip(tensors, mask):
        t.requires_grad_(bool(wanted))
    compare(*norms("relu", training), tensors)
    x, w, b = (t.detach() for t in tensors)
    fixed = (torch.zeros(3), torch.ones(3)) if not training else (None, None)
    y, stats = torch.ops.gdbp.batch_norm(x, None, w, b, *fixed, 1e-5, "relu")
    grads = torch.ops.gdbp.batch_norm_backward(y, x, w, b, stats, training, 1e-5, "relu", mask)
    assert [g is not None for g in grads] == [bool(m) for m in mask]


@activations
def test_output_may_be_changed_in_place(activation):
    x, w, b = values((5, 3))
    mine, torchs = norms(activation)
    expected = torch.autograd.grad((2 * torchs(x, w, b)).sum(), (x, w, b))
    torch.testing.assert_close(torch.autograd.grad(mine(x, w, b).mul_(2).sum(), (x, w, b)), expected)
    y = mine(x, w, b)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_no_graph_where_none_is_needed():
    x, w, b = values((5, 3), grad=False)
    mine, torchs = norms("relu")
    assert mine(x, w, b).grad_fn is None
    with torch.inference_mode():
        torch.testing.assert_close(mine(x, w, b), torchs(x, w, b))


# ---- torch.func, torch.compile, the dispatcher ----


@activations
@training_or_not
def test_torch_func(activation, training):
    x, w, b = values((5, 3), grad=False)
    xs = torch.randn(4, 5, 3, dtype=torch.float64)

    def results(f):
        def loss(x, w, b):
            return f(x, w, b).pow(2).sum()

        return (
            torch.func.grad(loss, argnums=(0, 1, 2))(x, w, b),
            torch.vmap(f, in_dims=(0, None, None))(xs, w, b),
            torch.vmap(f, in_dims=(1, 0, None), out_dims=1)(
                xs.transpose(0, 1), w.repeat(4, 1) * torch.arange(4.0).unsqueeze(1), b
            ),
            torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)), in_dims=(0, None, None))(xs, w, b),
            torch.func.jacrev(f, argnums=1)(x, w, b),
            torch.func.jacfwd(f, argnums=(0, 2))(x, w, b),
            torch.func.hessian(loss, argnums=0)(x, w, b),
            torch.func.jvp(f, (x, w, b), (x, w, b)),
        )

    mine, torchs = norms(activation, training, running=not training, eps=0.1)
    torch.testing.assert_close(results(mine), results(torchs))


def test_torch_func_and_running_statistics():
    """As torch's: updated under grad and jvp and, where they are batched, under vmap; else an error."""
    x = torch.randn(5, 3, dtype=torch.float64)
    found = []
    for f in (batch_norm, F.batch_norm):
        mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)

        def loss(x, f=f, mean=mean, var=var):
            return f(x, mean, var, training=True).pow(3).sum()

        found.append([torch.func.grad(loss)(x), torch.func.jvp(loss, (x,), (x,)), mean, var])
        with pytest.raises(RuntimeError):
            torch.vmap(loss)(x.expand(2, 5, 3))
        means, variances = mean.repeat(2, 1), var.repeat(2, 1)
        y = torch.vmap(lambda x, m, v, f=f: f(x, m, v, training=True))(torch.stack((x, 2 * x)), means, variances)
        found[-1] += [y, means, variances]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("activation", KINDS_OF_ACTIVATION)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_compile(activation, momentum):
    torch._dynamo.reset()
    module = gdbp.nn.BatchNorm1d(4, momentum=momentum, activation=activation)
    twin = copy.deepcopy(module)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (5, 8):
        x = torch.randn(rows, 4, requires_grad=True)
        eager = values_and_grads(lambda *_, x=x: module(x), (x, module.weight, module.bias))
        traced = values_and_grads(lambda *_, x=x: compiled(x), (x, twin.weight, twin.bias))
        assert all(map(torch.equal, eager, traced))
        assert all(map(torch.equal, module.buffers(), twin.buffers()))
    module.eval(), twin.eval()
    assert torch.equal(module(x), compiled(x))


@pytest.mark.parametrize("activation", KINDS_OF_ACTIVATION)
@pytest.mark.parametrize("shape", [(5, 4), (3, 4, 2), (0, 4)])
def test_opcheck(activation, shape):
    x, w, b = values(shape, grad=False)
    ops, name = torch.ops.gdbp, activation or "none"
    mean, var, count = torch.zeros(4), torch.ones(4), torch.tensor(0)
    for fixed in ((None, None), (mean.double(), var.double())):
        torch.library.opcheck(ops.batch_norm, (x, None, w, b, *fixed, 1e-5, name))
        y, stats = ops.batch_norm(x, b, w, None, *fixed, 1e-5, name)
        for mask in ((True, True, True), (False, True, False)):
            torch.library.opcheck(
                ops.batch_norm_backward, (torch.randn_like(y), x, w, b, stats, fixed[0] is None, 1e-5, name, mask)
            )
    torch.library.opcheck(ops.batch_norm_update_, (mean, var, count, stats, None, 7, None))
    torch.library.opcheck(ops.batch_norm_update_, (mean, var, None, stats, mean.clone(), 7, 0.1))


# ---- linear and normalisation in one ----


@activations
@training_or_not
@pytest.mark.parametrize("dtype", FULL_DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_batch_norm(activation, training, dtype, bias):
    x, weight, offset = torch.randn(70, 6), torch.randn(5, 6), torch.randn(5)
    _, w, b = values((70, 5), dtype)
    tensors = [t.to(dtype).requires_grad_() for t in (x, weight)] + [w, b]
    tensors.append(offset.to(dtype).requires_grad_() if bias else None)
    activate = TORCHS[activation or "none"][0]
    running = []

    def of(f):
        def call(x, weight, w, b, offset):
            stats = [torch.ones(5, dtype=x.dtype) for _ in range(2)]
            running.append(stats)
            return f(x, weight, offset, *stats, w, b, training)

        return call

    def separate(x, weight, offset, *args):
        return activate(F.batch_norm(F.linear(x, weight, offset), *args))

    compare(of(lambda *args: linear_batch_norm(*args, activation=activation)), of(separate), tensors)
    for triple in zip(*running):
        no_worse(*triple)


@training_or_not
def test_linear_batch_norm_derivatives(training):
    x, weight, offset = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 3), (2, 3), (2,)))
    _, w, b = values((4, 2))

    def f(x, weight, offset, w, b):
        stats = (None, None) if training else (torch.tensor([0.5, -1]).to(w), torch.ones_like(w))
        return linear_batch_norm(x, weight, offset, *stats, w, b, training, eps=0.1, activation="gelu")

    assert gradcheck(f, (x, weight, offset, w, b), check_forward_ad=True)
    assert gradgradcheck(f, (x, weight, offset, w, b))
    if training:
        assert not torch.autograd.grad(f(x, weight, offset, w, b).pow(2).sum(), offset)[0].any()


def test_bias_that_is_not_finite_is_seen():
    x, weight = torch.randn(6, 3), torch.randn(2, 3)
    for bad in (math.nan, math.inf):
        y = linear_batch_norm(x, weight, torch.tensor([0.5, bad]), None, None, training=True)
        assert y[:, 0].isfinite().all() and y[:, 1].isnan().all()
