"""Clipping by group, by layer and by row, and the penalty of a model, against their definitions in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from gdbp import _load
from gdbp.nn import utils
from tests.oracle import FLOAT_DTYPES, LAYOUTS, laid_out, on_one_and_two_threads, ulps
from tests.test_grad_utils import ORDERS, copies, params

SHAPES = [(3, 5), (), (7,), (4, 2, 3), (0, 3), (8193,), (3, 0), (2, 8193), (33, 1), (1, 1)]
# Beyond the last rounding: of coefficients and sums, in float64.
LIMITS = {torch.float64: 12, torch.float32: 1.5, torch.bfloat16: 0.51, torch.float16: 0.51}


# In float64 torch's own sums, which there is without kernels, are off by more.
WAYS = [(dtype, True) for dtype in FLOAT_DTYPES] + [(torch.float32, False), (torch.bfloat16, False)]


def norm_of(tensors, order):
    flat = torch.cat([t.double().flatten() for t in tensors] or [torch.zeros(1, dtype=torch.float64)]).abs()
    if order == math.inf:
        return max([0.0, *flat.tolist()])
    return math.fsum((flat**order).tolist()) ** (1 / order)


def near(got, wanted):
    """`wanted` in float64, rounded once."""
    if got.numel():
        assert ulps(got, wanted) <= LIMITS[got.dtype]


def without_kernels(monkeypatch):
    monkeypatch.setattr(_load, "available", False)


# ---- groups and layers ----


def check_groups(groups, maximum, order):
    flat = [p for group in groups for p in group]
    before = [None if p.grad is None else p.grad.double().clone() for p in flat]
    limits = maximum if isinstance(maximum, list) else [maximum] * len(groups)
    norms = utils.clip_grad_norm_by_group_(groups, maximum, order)
    assert norms.shape == (len(groups),) and norms.dtype is torch.float64
    grads = iter(before)
    for group, limit, got in zip(groups, limits, norms.tolist(), strict=True):
        old = [next(grads) for _ in group]
        wanted = norm_of([g for g in old if g is not None], order)
        assert got == pytest.approx(wanted, rel=1e-13, abs=0)
        coefficient = 1.0 if limit == math.inf else min(1.0, limit / (wanted + 1e-6))
        for p, g in zip(group, old):
            assert (p.grad is None) == (g is None)
            if g is not None:
                near(p.grad, g * coefficient)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype, kernels", WAYS)
def test_groups(dtype, order, kernels, device, monkeypatch):
    if not kernels:
        without_kernels(monkeypatch)
    for layout in LAYOUTS if dtype is torch.float32 else LAYOUTS[:1]:
        if layout == "expanded":
            continue
        one, two, none = (params(SHAPES, dtype, scale, layout, device) for scale in (0.1, 10.0, 1.0))
        one[2].grad = None
        for p in none:
            p.grad = None
        check_groups([one, two, none, []], 3.0, order)
        check_groups([two, one], [math.inf, 0.01], order)
        check_groups([one, two], [0.0, math.inf], order)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any_groups(data):
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    shape = st.lists(st.integers(0, 5), max_size=3) | st.tuples(st.integers(0, 70))
    layout = data.draw(st.sampled_from([name for name in LAYOUTS if name != "expanded"]))
    dtype = data.draw(st.sampled_from(FLOAT_DTYPES))
    groups = [
        params(data.draw(st.lists(shape, max_size=4)), dtype, data.draw(st.sampled_from((1e-3, 1.0, 100.0))), layout)
        for _ in range(data.draw(st.integers(0, 4)))
    ]
    for group in groups:
        for p in group:
            if data.draw(st.integers(0, 4)) == 0:
                p.grad = None
    maximum = data.draw(st.floats(0, 100) | st.just(math.inf))
    if data.draw(st.booleans()):
        maximum = [data.draw(st.floats(0, 100) | st.just(math.inf)) for _ in groups]
    check_groups(groups, maximum, data.draw(st.sampled_from(ORDERS) | st.floats(0.5, 4)))


def test_groups_are_what_an_optimizer_has():
    mine = params([(3,), (4, 2), ()])
    other = copies(mine)
    optimizer = torch.optim.SGD([{"params": mine[:1]}, {"params": mine[1:]}], lr=0.1)
    norms = utils.clip_grad_norm_by_group_(optimizer.param_groups, 0.5)
    wanted = [torch.nn.utils.clip_grad_norm_(group, 0.5) for group in (other[:1], other[1:])]
    torch.testing.assert_close(norms.float(), torch.stack(wanted))
    for a, b in zip(mine, other):
        torch.testing.assert_close(a.grad, b.grad)
    norms = utils.clip_grad_norm_by_group_(mine, 1e-3)  # each by itself
    assert norms.shape == (3,) and all(p.grad.norm() <= 1e-3 for p in mine)


@pytest.mark.parametrize("kind", [list, torch.tensor, np.array])
def test_a_limit_for_each_group(kind):
    mine = params([(3,), (2,)])
    other = copies(mine)
    utils.clip_grad_norm_by_group_(mine, kind([0.1, 0.2]))
    for p, q, limit in zip(mine, other, (0.1, 0.2)):
        utils.clip_grad_norm_(q, limit)
        torch.testing.assert_close(p.grad, q.grad)


def test_layers():
    shared = torch.nn.Linear(3, 3)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU(), shared, torch.nn.Sequential(shared))
    model.register_parameter("scale", torch.nn.Parameter(torch.ones(())))
    (model(torch.randn(4, 3)) * model.scale).pow(2).sum().backward()
    model[0].bias.grad = None
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    norms = utils.clip_grad_norm_by_layer_(model, 0.25)
    assert list(norms) == ["", "0", "2"]
    for name, names in {"": ["scale"], "0": ["0.weight"], "2": ["2.weight", "2.bias"]}.items():
        own = [before[n] for n in names]
        assert norms[name].item() == pytest.approx(norm_of(own, 2), rel=1e-13)
        for n, g in zip(names, own):
            torch.testing.assert_close(model.get_parameter(n).grad, g * min(1, 0.25 / (norms[name].item() + 1e-6)))
    assert utils.clip_grad_norm_by_layer_(torch.nn.ReLU(), 1.0) == {}


def test_only_what_is_too_long_is_written():
    mine = params([(5,), (6,)])
    mine[0].grad.mul_(1e-6)
    short, versions = mine[0].grad.clone(), [p.grad._version for p in mine]
    utils.clip_grad_norm_by_group_(mine, 100.0)
    utils.adaptive_clip_grad_(mine, 1e9)
    assert [p.grad._version for p in mine] == versions
    utils.clip_grad_norm_by_group_(mine, 0.1)
    assert torch.equal(mine[0].grad, short) and mine[1].grad.norm() <= 0.1
    assert mine[1].grad._version == versions[1] + 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_groups_that_are_not_finite(bad):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, bias=False))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model[1].weight.grad[0, 1] = bad
    before = [p.grad.clone() for p in model.parameters()]
    what = "1 NaN, 0 inf" if math.isnan(bad) else "0 NaN, 1 inf"
    with pytest.raises(RuntimeError, match=rf"1 has the norm {bad} \(number 0 of shape \(2, 2\): {what}\)"):
        utils.clip_grad_norm_by_layer_(model, 1.0, error_if_nonfinite=True)
    with pytest.raises(RuntimeError, match=r"group 1 has the norm"):
        utils.clip_grad_norm_by_group_([layer.parameters() for layer in model], 1.0, error_if_nonfinite=True)
    for p, g in zip(model.parameters(), before):
        torch.testing.assert_close(p.grad, g, equal_nan=True, rtol=0, atol=0)
    utils.clip_grad_norm_by_layer_(model, 1.0)
    assert model[0].weight.grad.norm() <= 1  # one layer's infinity is not another's
    assert model[1].weight.grad[0, 1].isnan()


# ---- rows ----


def check_rows(parameters, factor, eps, order):
    before = [None if p.grad is None else p.grad.double().clone() for p in parameters]
    assert utils.adaptive_clip_grad_(parameters, factor, eps, order) is None
    for p, g in zip(parameters, before):
        assert (p.grad is None) == (g is None)
        if g is None:
            continue
        wanted = g.clone()
        rows = zip(p.detach().double(), g, wanted) if g.dim() > 1 else [(p.detach().double(), g, wanted)]
        for weight, gradient, to in rows:
            norm, limit = norm_of([gradient], order), factor * max(eps, norm_of([weight], order))
            to.copy_(gradient * (limit / norm if norm > limit else 1.0))
        near(p.grad, wanted)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "expanded"])
@pytest.mark.parametrize("dtype, kernels", WAYS)
def test_rows(dtype, layout, kernels, device, monkeypatch):
    if not kernels:
        without_kernels(monkeypatch)
    for order in (2.0, 1.0, math.inf):
        mine = params(SHAPES, dtype, layout=layout, device=device)
        for i, p in enumerate(mine):
            p.data = laid_out(torch.randn(p.shape, dtype=torch.float64).to(device, dtype), LAYOUTS[i % 2])
        mine[0].data[1:] = 0  # of which eps is the norm
        mine[0].grad[0] = 0
        mine[3].grad = None
        check_rows(mine, 0.3, 1e-3, order)
        check_rows(mine, 0.0, 0.0, order)


def test_rows_of_a_convolution_are_filters():
    conv = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    conv(torch.randn(2, 3, 5, 5).to(memory_format=torch.channels_last)).pow(2).sum().backward()
    check_rows(list(conv.parameters()), 0.01, 1e-3, 2.0)
    ratio = conv.weight.grad.flatten(1).norm(dim=1) / conv.weight.flatten(1).norm(dim=1)
    assert (ratio <= 0.01001).all()


def test_rows_that_are_not_finite_keep_to_themselves():
    p = torch.nn.Parameter(torch.ones(4, 2))
    p.grad = torch.tensor([[math.nan, 1.0], [math.inf, 1.0], [0.0, 0.0], [3.0, 4.0]])
    utils.adaptive_clip_grad_(p, 0.5)
    assert p.grad[0].isnan().all() and p.grad[1, 0].isnan() and p.grad[1, 1] == 0 and (p.grad[2] == 0).all()
    torch.testing.assert_close(p.grad[3].norm(), torch.tensor(0.5 * 2**0.5))


def test_shared_and_expanded_gradients():
    p, q = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2, 2))
    p.grad = q.grad = torch.full((2, 2), 4.0)
    utils.clip_grad_norm_by_group_([[p, q]], 1.0)  # counts and shrinks twice
    torch.testing.assert_close(p.grad, torch.full((2, 2), 4.0 / 128))
    mine = params([(2,)])
    q.grad = torch.ones(2).expand(2, 2)
    before = mine[0].grad.clone()
    for clip in (utils.clip_grad_norm_by_group_, utils.adaptive_clip_grad_):
        with pytest.raises(RuntimeError, match="single memory location"):
            clip([*mine, q], 0.1)
        assert torch.equal(mine[0].grad, before)


def test_without_gradients():
    p = torch.nn.Parameter(torch.ones(2))
    for groups in ([], [[]], [[p], []]):
        assert torch.equal(utils.clip_grad_norm_by_group_(groups, 1.0), torch.zeros(len(groups), dtype=torch.float64))
    assert utils.adaptive_clip_grad_([]) is None and utils.adaptive_clip_grad_(p) is None


def test_refusals():
    mine = params([(3,), (2,)])
    before = [p.grad.clone() for p in mine]
    for call, sentence in (
        (lambda: utils.clip_grad_norm_by_group_(mine, -1.0), "max_norm is -1.0; expected a number of at least 0"),
        (lambda: utils.clip_grad_norm_by_group_(mine, [1.0]), "max_norm has 1 numbers for 2 groups; expected one"),
        (lambda: utils.clip_grad_norm_by_group_(mine, 1.0, 0), "norm_type is 0; expected a number above 0, or inf"),
        (lambda: utils.adaptive_clip_grad_(mine, -0.1), "clip_factor is -0.1; expected"),
        (lambda: utils.adaptive_clip_grad_(mine, eps=math.nan), "eps is nan; expected"),
        (lambda: utils.adaptive_clip_grad_(mine, norm_type=-2.0), "norm_type is -2.0; expected"),
        (lambda: utils.penalty(mine, l1=-1.0), "l1 is -1.0; expected"),
        (lambda: utils.penalty(mine, l2=math.nan), "l2 is nan; expected"),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()
        assert all(torch.equal(p.grad, g) for p, g in zip(mine, before))
    sparse = torch.nn.Parameter(torch.zeros(4, 2))
    sparse.grad = torch.eye(4, 2).to_sparse()
    embedding = torch.nn.Embedding(4, 2)
    embedding.weight.grad = sparse.grad
    several = torch.ones(2)
    for call, sentence in (
        (lambda: utils.adaptive_clip_grad_(mine, several), r"clip_factor has shape \(2,\); expected one number"),
        (lambda: utils.adaptive_clip_grad_(mine, eps=several), r"eps has shape \(2,\); expected one number"),
        (lambda: utils.adaptive_clip_grad_(mine, norm_type="a"), "norm_type is 'a'; expected a number"),
        (lambda: utils.penalty(mine, l1=several), r"l1 has shape \(2,\); expected one number"),
        (lambda: utils.penalty(mine, l2=10**400), "l2 is larger than any float"),
        (lambda: utils.penalty(None), "model is of type NoneType; expected a tensor, or tensors"),
        (
            lambda: utils.clip_grad_norm_by_group_([{"p": mine}], 1.0),
            r"group 0 is a dict of \['p'\]; expected its param",
        ),
        (lambda: utils.clip_grad_norm_by_group_({"params": mine}, 1.0), "groups is of type dict; expected groups; put"),
        (lambda: utils.clip_grad_norm_by_group_(mine[0], 1.0), "groups is of type Parameter; expected groups"),
        (lambda: utils.clip_grad_norm_by_group_([mine, 1], 1.0), "group 1 is of type int; expected a tensor, or"),
        (lambda: utils.clip_grad_norm_by_group_(mine, torch.ones(3)), "max_norm has 3 numbers for 2 groups"),
        (lambda: utils.clip_grad_norm_by_layer_(torch.nn.Linear(1, 1), several), "max_norm has 2 numbers for 1 groups"),
        (lambda: utils.clip_grad_norm_by_group_([mine, sparse], 0.1), r"shape \(4, 2\) is torch.sparse_coo; expected"),
        (
            lambda: utils.clip_grad_norm_by_layer_(embedding, 0.1),
            "is torch.sparse_coo; expected dense gradients; leave",
        ),
        (lambda: utils.adaptive_clip_grad_([*mine, sparse]), "is torch.sparse_coo; expected dense gradients; leave it"),
    ):
        with pytest.raises((TypeError, ValueError), match=sentence):
            call()
        assert all(torch.equal(p.grad, g) for p, g in zip(mine, before))
    with pytest.raises(RuntimeError, match=r"l1 requires grad, .*pass l1.detach\(\)"):
        utils.penalty(mine, l1=torch.tensor(0.1, requires_grad=True))
    with pytest.raises(TypeError, match=r"penalty: tensor 1 has dtype torch.int64; expected floating point"):
        utils.penalty([torch.ones(2), torch.ones(2, dtype=torch.int64)], l1=1.0)


def test_complex():
    p = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    p.grad = torch.full((2, 2), 3 + 4j)
    torch.testing.assert_close(utils.clip_grad_norm_by_group_([p], 5.0), torch.tensor([10.0], dtype=torch.float64))
    torch.testing.assert_close(p.grad, torch.full((2, 2), 1.5 + 2j))
    utils.adaptive_clip_grad_(p, 0.5)
    torch.testing.assert_close(p.grad, torch.full((2, 2), 0.3 + 0.4j))


def test_dtensors(tmp_path):
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        whole = torch.nn.Parameter(torch.full((4, 2), 0.5))
        p = torch.nn.Parameter(distribute_tensor(whole.detach().clone(), mesh, [Shard(0)]))
        for clip in (
            lambda q: utils.clip_grad_norm_by_group_([[q]], 1.0),
            lambda q: utils.adaptive_clip_grad_([q], 0.1),
        ):
            whole.grad = torch.arange(8.0).view(4, 2)
            p.grad = distribute_tensor(whole.grad.clone(), mesh, [Shard(0)])
            clip(whole), clip(p)
            torch.testing.assert_close(p.grad.full_tensor(), whole.grad)
        torch.testing.assert_close(utils.penalty([p], l1=0.3).full_tensor(), utils.penalty([whole], l1=0.3))
    finally:
        dist.destroy_process_group()


# ---- the penalty ----


def by_hand(tensors, l1, l2):
    return sum(l1 * t.abs().sum() + l2 / 2 * t.square().sum() for t in tensors)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_penalty(dtype, layout, device):
    for l1, l2 in ((0.3, 0.0), (0.0, 0.3), (0.1, 0.7), (0.0, 0.0)):
        drawn = [torch.randn(shape, dtype=torch.float64).to(device, dtype) for shape in SHAPES]
        drawn[2][1], drawn[2][2] = 0.0, -0.0
        mine = [laid_out(t, layout).requires_grad_() for t in drawn]
        exact = [t.detach().double().requires_grad_() for t in mine]
        value, wanted = utils.penalty(mine, l1=l1, l2=l2), by_hand(exact, l1, l2)
        assert value.dtype is (torch.float64 if dtype is torch.float64 else torch.float32) and value.shape == ()
        assert ulps(value, wanted) <= (8 if dtype is torch.float64 else 0.51)
        upstream = torch.tensor(-1.7, dtype=value.dtype, device=device)
        grads = torch.autograd.grad(value, mine, upstream)
        for g, t, e in zip(grads, mine, torch.autograd.grad(wanted, exact, upstream.double())):
            assert g.shape == t.shape and g.dtype is dtype and g.device == t.device
            if g.numel():
                assert ulps(g, e, e.abs() + 1.7 * l1) <= (3 if dtype in FLOAT_DTYPES[:2] else 0.52)


def test_penalty_of_nothing():
    torch.set_default_dtype(torch.float64)
    try:
        assert utils.penalty([]).dtype is torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_penalty_of_a_model():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    model[0].bias.requires_grad_(False)
    value = utils.penalty(model, l1=0.2, l2=0.1)
    torch.testing.assert_close(value, by_hand(model.parameters(), 0.2, 0.1))
    value.backward()
    assert model[0].bias.grad is None
    torch.testing.assert_close(model[0].weight.grad, 0.2 * model[0].weight.sign() + 0.1 * model[0].weight)
    with torch.no_grad():
        assert torch.equal(utils.penalty(model, l1=0.2, l2=0.1), value) and not utils.penalty(model).requires_grad
    assert torch.equal(utils.penalty([], l1=1.0), torch.zeros(())) and utils.penalty(torch.ones(3), l1=1.0) == 3


def test_penalty_of_mixed_dtypes_and_special_values():
    tensors = [torch.full((3,), 1.0, dtype=dtype, requires_grad=True) for dtype in FLOAT_DTYPES]
    assert utils.penalty(tensors, l1=1.0).dtype is torch.float64
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 1e-45], requires_grad=True)
    (grad,) = torch.autograd.grad(utils.penalty([x], l1=2.0), x)
    assert grad[0].isnan() and grad[3:].tolist() == [0.0, 2.0]
    huge = torch.full((4,), 3e38, requires_grad=True)  # squares beyond float32
    torch.testing.assert_close(utils.penalty([huge], l2=1e-40), torch.tensor(4 * 0.5e-40 * 3e38**2))


@pytest.mark.parametrize("l1, l2", [(0.3, 0.0), (0.2, 0.7)])
def test_penalty_derivatives(l1, l2):
    tensors = [torch.randn(s, dtype=torch.float64).requires_grad_() for s in ((3,), (2, 2))]
    f = lambda *t: utils.penalty(t, l1=l1, l2=l2)  # noqa: E731
    assert gradcheck(f, tensors, check_batched_grad=True) and gradgradcheck(f, tensors)
    assert gradcheck(f, tensors, check_forward_ad=True, check_backward_ad=False)
    x = tensors[0].detach()
    torch.testing.assert_close(torch.func.grad(lambda v: f(v, v * v))(x), torch.autograd.functional.jacobian(
        lambda v: by_hand([v, v * v], l1, l2), x))  # fmt: skip
    torch.testing.assert_close(torch.func.hessian(f)(x), l2 * torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(torch.vmap(f)(x[:, None]), l1 * x.abs() + l2 / 2 * x * x)


def test_penalty_retain_graph_and_stale_values():
    x = torch.randn(5, requires_grad=True)
    value = utils.penalty([x, x], l2=1.0)
    first, second = (torch.autograd.grad(value, x, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, 2 * x.detach())
    assert torch.equal(first, second)
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_penalty_compiles():
    torch._dynamo.reset()
    model = torch.nn.Linear(3, 2)
    f = torch.compile(lambda: utils.penalty(model, l1=0.1, l2=0.2), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(f(), utils.penalty(model, l1=0.1, l2=0.2))
    compiled = torch.autograd.grad(f(), list(model.parameters()))
    for a, b in zip(compiled, torch.autograd.grad(utils.penalty(model, l1=0.1, l2=0.2), list(model.parameters()))):
        torch.testing.assert_close(a, b)


def test_threads_do_not_change_bits():
    mine = params([(300_001,), (7,), (400, 50), (3, 9000)])
    for p in mine:
        p.data.normal_()

    def clipped(clip):
        made = copies(mine)
        result = clip(made)
        return [*([] if result is None else [result]), *(p.grad for p in made)]

    for f in (
        lambda: clipped(lambda made: utils.clip_grad_norm_by_group_([made[:2], made[2:]], 0.1)),
        lambda: clipped(lambda made: utils.adaptive_clip_grad_(made, 0.01)),
        lambda: [utils.penalty(mine, l1=0.1, l2=0.3)],
    ):
        for one, two in on_one_and_two_threads(f):
            assert torch.equal(one, two)
