"""Clipping and inspecting gradients, against torch's functions and against float64."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import utils as torchs

from gdbp.nn import utils
from tests.oracle import FLOAT_DTYPES, LAYOUTS, laid_out, on_one_and_two_threads, ulps

ORDERS = (2.0, 1.0, math.inf, 3.0, 0.5)
SIZES = (0, 1, 7, 31, 33, 8191, 8193, 40001)


def params(shapes, dtype=torch.float32, scale=1.0, layout="contiguous", device="cpu"):
    made = []
    for shape in shapes:
        p = torch.nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))
        p.grad = laid_out((scale * torch.randn(shape, dtype=torch.float64)).to(device, dtype), layout)
        made.append(p)
    return made


def copies(parameters, dtype=None):
    made = [torch.nn.Parameter(p.detach().to(dtype or p.dtype).clone()) for p in parameters]
    for p, original in zip(made, parameters):
        p.grad = None if original.grad is None else original.grad.to(dtype or p.dtype).clone()
    return made


def exact_norm(tensors, order):
    """Summed exactly: a sum of many float64 numbers is no oracle for another one."""
    sizes = torch.cat([t.double().flatten() for t in tensors]).abs()
    if order == math.inf:
        return sizes.max()
    return torch.tensor(math.fsum((sizes**order).tolist()) ** (1 / order), dtype=torch.float64)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_norm_and_clipping(order, dtype, device):
    for shapes in ([(n,) for n in SIZES], [()], [(3, 5), (), (2, 0)], [(1,)] * 40):
        ours = params(shapes, dtype, device=device)
        norm = exact_norm([p.grad for p in ours], order)
        for factor in (0.5, 1.5):
            mine, before = copies(ours), [p.grad.clone() for p in ours]
            got = utils.clip_grad_norm_(mine, factor * norm.item(), order)
            wide = torch.float64 if dtype is torch.float64 else torch.float32
            assert got.dtype is wide and got.shape == () and ulps(got, norm) <= (8 if dtype is torch.float64 else 0.51)
            coefficient = min(1.0, factor * norm.item() / (norm.item() + 1e-6))
            for p, g in zip(mine, before):
                assert p.grad.numel() == 0 or ulps(p.grad, g.double() * coefficient) <= (
                    12 if dtype is torch.float64 else 1.5 if dtype is torch.float32 else 0.51
                )


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any_gradients(data):
    shape = st.lists(st.integers(0, 5), max_size=3) | st.tuples(st.integers(0, 70))
    shapes = data.draw(st.lists(shape, max_size=5))
    order = data.draw(st.sampled_from(ORDERS) | st.floats(0.3, 6))
    layout = data.draw(st.sampled_from([name for name in LAYOUTS if name != "expanded"]))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    if order == math.inf:  # where torch refuses empty tensors
        shapes = [shape for shape in shapes if 0 not in shape]
    mine = params(shapes, torch.float64, data.draw(st.sampled_from((1e-9, 1.0, 1e9))), layout)
    for p in mine:
        if data.draw(st.integers(0, 4)) == 0:
            p.grad = None
    other, maximum = copies(mine), data.draw(st.floats(0, 1e10))
    got, wanted = utils.clip_grad_norm_(mine, maximum, order), torchs.clip_grad_norm_(other, maximum, order)
    torch.testing.assert_close(got, wanted, check_dtype=any(p.grad is not None for p in mine))
    value = data.draw(st.floats(0, 1e9))
    for clips in (False, any(p.grad is not None for p in mine)):
        if clips:  # torch's raises where there is nothing to clip
            utils.clip_grad_value_(mine, value), torchs.clip_grad_value_(other, value)
        for a, b in zip(mine, other):
            assert (a.grad is None) == (b.grad is None)
            if a.grad is not None:
                torch.testing.assert_close(a.grad, b.grad, atol=0, rtol=1e-12)
                assert a.grad.stride() == a.grad.clone(memory_format=torch.preserve_format).stride() or layout


def test_norms_beyond_the_dtype():
    # torch: infinity, 1.734, infinity and 0.
    for dtype, value, count in (
        (torch.float16, 6e4, 4),
        (torch.bfloat16, 1.0, 3),
        (torch.float32, 3e20, 4),
        (torch.float32, 1e-30, 4),
    ):
        grad = torch.full((count,), value, dtype=dtype)
        torch.testing.assert_close(utils.get_total_norm([grad]), exact_norm([grad], 2).float())
        p = torch.nn.Parameter(grad.clone())
        p.grad = grad.clone()
        utils.clip_grad_norm_(p, value / 2)
        exact = grad.double() * min(1, value / 2 / (exact_norm([grad], 2).item() + 1e-6))
        assert ulps(p.grad, exact) <= 1


def test_nothing_is_written_where_nothing_is_clipped():
    (p,) = params([(5,)])
    version = p.grad._version
    utils.clip_grad_norm_([p], 100.0)
    assert p.grad._version == version
    utils.clip_grad_norm_([p], 0.1)
    assert p.grad._version == version + 1
    saved = p.detach().requires_grad_()
    loss = (saved * p.grad).sum()
    utils.clip_grad_value_([p], 0.01)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_without_gradients():
    for none in ([], [torch.nn.Parameter(torch.ones(2))]):
        assert torch.equal(utils.clip_grad_norm_(none, 1.0), torch.tensor(0.0))
        assert utils.clip_grad_value_(none, 1.0) is None
        assert utils.clip_grads_with_norm_(none, 1.0, torch.tensor(3.0)) is None
    assert torch.equal(utils.get_total_norm([]), torch.tensor(0.0))
    with pytest.warns(UserWarning, match="`parameters` is an empty generator") as raised:
        utils.clip_grad_norm_((p for p in []), 1.0)
    assert raised[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        utils.clip_grad_norm_((p for p in params([(2,)])), 1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite(bad):
    mine = params([(3,), (2, 2), (4,)])
    mine[1].grad[1, 0] = bad
    other, before = copies(mine), [p.grad.clone() for p in mine]
    for call in (
        lambda: utils.clip_grad_norm_(mine, 1.0, error_if_nonfinite=True),
        lambda: utils.get_total_norm([p.grad for p in mine], error_if_nonfinite=True),
    ):
        what = "1 NaN, 0 inf" if math.isnan(bad) else "0 NaN, 1 inf"
        with pytest.raises(RuntimeError, match=rf"order 2.0 for gradients from .*number 1 of shape \(2, 2\): {what}$"):
            call()
    for p, g in zip(mine, before):
        torch.testing.assert_close(p.grad, g, equal_nan=True, rtol=0, atol=0)
    for f in ("clip_grad_norm_", "clip_grad_value_"):
        got, wanted = getattr(utils, f)(mine, 0.5), getattr(torchs, f)(other, 0.5)
        torch.testing.assert_close([got] if got is not None else [], [wanted] if wanted is not None else [],
                                   equal_nan=True)  # fmt: skip
        for a, b in zip(mine, other):
            torch.testing.assert_close(a.grad, b.grad, equal_nan=True)


def test_refusals():
    (p,) = params([(3,)])
    for call, sentence in (
        (lambda: utils.clip_grad_norm_([p], -1.0), "max_norm is -1.0; expected a number of at least 0"),
        (lambda: utils.clip_grad_norm_([p], math.nan), "max_norm is nan; expected"),
        (lambda: utils.clip_grads_with_norm_([p], -1.0, torch.tensor(1.0)), "max_norm is -1.0; expected"),
        (lambda: utils.clip_grads_with_norm_([p], 1.0, torch.ones(2)), r"total_norm has shape \(2,\); expected one"),
        (lambda: utils.clip_grad_value_([p], -1.0), "clip_value is -1.0; expected"),
    ):
        before = p.grad.clone()
        with pytest.raises(ValueError, match=sentence):
            call()
        assert torch.equal(p.grad, before)
    several, huge = torch.ones(2), 10**400
    for call, sentence in (
        (lambda: utils.clip_grad_norm_([p], "1"), "max_norm is '1'; expected a number"),
        (lambda: utils.clip_grad_norm_([p], several), r"max_norm has shape \(2,\); expected one number"),
        (lambda: utils.clip_grad_norm_([p], huge), "max_norm is larger than any float; expected a smaller number"),
        (lambda: utils.clip_grad_value_([p], several.numpy()), r"clip_value has shape \(2,\); expected one number"),
        *(
            (lambda n=n: utils.clip_grad_norm_([p], 0.1, n), "norm_type is .*; expected a number")
            for n in ("a", None, [1])
        ),
        *((lambda n=n: utils.get_total_norm([p], n), "norm_type is .*; expected a number") for n in ("a", None, [1])),
        *(
            (lambda f=f, x=x: f(x, 0.1), "(parameters|tensors) (is of type|holds a) .*; expected .*tensors")
            for x in ("a", None, 1, [1, 2], [p, 1], {"params": [p]})
            for f in (utils.clip_grad_norm_, utils.clip_grad_value_, utils.get_total_norm, utils.adaptive_clip_grad_)
        ),
        (lambda: utils.gradient_health([("a", "b")]), r"model holds \['str', 'str'\]; expected .* pairs of name and"),
        (lambda: utils.gradient_health([("a", p, 1)]), r"model holds \['str', 'Parameter', 'int'\]; expected"),
        (lambda: utils.gradient_health(None), "model is of type NoneType; expected a module, or pairs"),
        *((lambda lr=lr: utils.gradient_health([("a", p)], lr=lr), "lr is") for lr in ("a", math.nan, -1, 1j)),
    ):
        before = p.grad.clone()
        with pytest.raises((TypeError, ValueError), match=sentence):
            call()
        assert torch.equal(p.grad, before)


def test_inference_tensors_are_changed_in_inference_mode_only():
    mine = params([(3,), (2, 2)])
    with torch.inference_mode():
        mine[1].grad = torch.ones(2, 2)
    before = [p.grad.clone() for p in mine]
    calls = (
        lambda: utils.clip_grad_norm_(mine, 0.1),
        lambda: utils.clip_grads_with_norm_(mine, 0.1, torch.tensor(3.0)),
        lambda: utils.clip_grad_value_(mine, 0.01),
        lambda: utils.clip_grad_norm_by_group_(mine, 0.1),
        lambda: utils.adaptive_clip_grad_(mine, 1e-3),
    )
    for call in calls:
        with pytest.raises(RuntimeError, match=r"gradient 1 is an inference tensor, .*; clip there, or clone"):
            call()
        assert all(torch.equal(p.grad, g) for p, g in zip(mine, before))
    with torch.inference_mode():
        for call in calls:
            call()
    assert not any(torch.equal(p.grad, g) for p, g in zip(mine, before))


def test_infinity_is_no_limit():
    for call in (
        lambda p: utils.clip_grad_norm_(p, math.inf),
        lambda p: utils.clip_grads_with_norm_(p, math.inf, torch.tensor(math.inf)),
        lambda p: utils.adaptive_clip_grad_(p, clip_factor=math.inf),
        lambda p: utils.adaptive_clip_grad_(p, clip_factor=math.inf, eps=0.0),
        lambda p: utils.adaptive_clip_grad_(p, clip_factor=0.0, eps=math.inf),
        lambda p: utils.clip_grad_norm_by_group_([p], torch.tensor([math.inf])),
    ):
        p = torch.nn.Parameter(torch.zeros(2, 2))
        p.grad = torch.tensor([[1.0, math.inf], [2.0, -3.0]])
        before = p.grad.clone()
        call(p)
        assert torch.equal(p.grad, before)


def test_what_torch_computes():
    sparse = torch.nn.Parameter(torch.zeros(4, 2))
    sparse.grad = torch.eye(4, 2).to_sparse()
    try:
        wanted = torchs.clip_grad_norm_(copies([sparse]), 1.0)
    except NotImplementedError:  # before torch 2.15
        with pytest.raises(NotImplementedError):
            utils.clip_grad_norm_([sparse], 1.0)
    else:
        torch.testing.assert_close(utils.clip_grad_norm_([sparse], 1.0), wanted)
    complex_ = torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    complex_.grad = torch.full((3,), 3 + 4j)
    torch.testing.assert_close(utils.clip_grad_norm_([complex_], 1.0), torch.tensor(5 * 3**0.5))
    for order in (0.0, -1.0, -math.inf):
        mine = params([(3,), (2,)])
        torch.testing.assert_close(*(u.clip_grad_norm_(copies(mine), 1.0, order) for u in (utils, torchs)))
    # A gradient that is passed twice counts and shrinks twice.
    mine = params([(3,)]) * 2
    other = copies(mine[:1]) * 2
    torch.testing.assert_close(utils.clip_grad_norm_(mine, 0.1), torchs.clip_grad_norm_(other, 0.1))
    torch.testing.assert_close(mine[0].grad, other[0].grad)
    expanded = torch.nn.Parameter(torch.zeros(3, 2))
    expanded.grad = torch.ones(2).expand(3, 2)
    mine = params([(2,)])
    before = mine[0].grad.clone()
    with pytest.raises(RuntimeError, match="single memory location"):
        utils.clip_grad_norm_([*mine, expanded], 0.1)
    assert torch.equal(mine[0].grad, before)


def test_mixed_dtypes_and_a_given_norm():
    mine = [p for dtype in FLOAT_DTYPES for p in params([(5,), (3, 2)], dtype)]
    norm = utils.get_total_norm([p.grad for p in mine], foreach=True)
    torch.testing.assert_close(norm, exact_norm([p.grad for p in mine], 2))
    other = copies(mine)
    utils.clip_grads_with_norm_(mine, 0.5, norm)
    utils.clip_grad_norm_(other, 0.5, foreach=False)
    for a, b in zip(mine, other):
        assert torch.equal(a.grad, b.grad)


def test_threads_do_not_change_bits():
    mine = params([(300_001,), (7,), (20_000,)])
    clip = lambda: [utils.clip_grad_norm_(c := copies(mine), 0.1), *(p.grad for p in c)]  # noqa: E731
    health = lambda: [utils.gradient_health((str(i), p) for i, p in enumerate(mine)).mean]  # noqa: E731
    for f in (clip, health):
        for one, two in on_one_and_two_threads(f):
            assert torch.equal(one, two)


def test_compile():
    torch._dynamo.reset()
    mine = params([(3,), (4, 2)])
    other = copies(mine)
    torch.compile(lambda: utils.clip_grad_norm_(mine, 0.1), backend="aot_eager")()
    utils.clip_grad_norm_(other, 0.1)
    for a, b in zip(mine, other):
        torch.testing.assert_close(a.grad, b.grad)


# ---- gradient_health ----


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_health(dtype, device):
    mine = params([(n,) for n in (*SIZES, 100)] + [(3, 4)], dtype, layout="misaligned", device=device)
    mine[3].grad[::5], mine[4].grad[::7] = 0, -0.0
    mine[5].grad[100], mine[6].grad[5000], mine[6].grad[-1], mine[7].grad[3] = math.nan, math.inf, -math.inf, math.nan
    health = utils.gradient_health(((str(i), p) for i, p in enumerate(mine)), lr=0.1)
    assert health.names == tuple(map(str, range(len(mine)))) and health.numels == tuple(p.numel() for p in mine)
    for i, p in enumerate(mine):
        g = p.grad.double().cpu().flatten()
        sizes = g[~g.isnan()].abs()
        expected = {
            "norm": torch.linalg.vector_norm(g), "largest": sizes.max() if len(sizes) else torch.tensor(0.0),
            "mean": g.mean() if len(g) else torch.tensor(0.0), "nans": g.isnan().sum(), "infinities": g.isinf().sum(),
            "zeros": (g == 0).sum(),
        }  # fmt: skip
        for name, value in expected.items():
            got = getattr(health, name)[i].cpu()
            torch.testing.assert_close(got, value.double(), equal_nan=True, rtol=1e-12, atol=1e-14)
    assert health.update_ratio.shape == (len(mine),)


def test_health_in_words():
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4, bias=False) for _ in range(7)))
    for layer, value in zip(model, (0.01, 0.0, 1e-12, 1e5, math.nan, math.inf)):
        layer.weight.grad = torch.full((4, 4), value)
    health = utils.gradient_health(model)
    words = {name: verdict.split(":")[0] for name, verdict in health.verdicts().items()}
    finite = {"1.weight": "dead", "2.weight": "vanishes", "3.weight": "explodes"}
    assert words == {**finite, "4.weight": "not finite", "5.weight": "not finite"}
    table = str(health).splitlines()
    assert len(table) == 7 and table[0].split()[:3] == ["parameter", "elements", "norm"]
    assert table[1].endswith("  ok") and "100%" in table[2] and len({line.find("  ok") for line in table}) == 2
    fast = utils.gradient_health(model, lr=1e3)
    assert fast.verdicts()["0.weight"].startswith("explodes") and "update/weight" in str(fast)
    assert str(utils.gradient_health([])).startswith("parameter")


def test_health_and_penalty_say_what_they_want():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match="model holds a Parameter; expected a module, or pairs of name and parameter"):
        utils.gradient_health(model.parameters())
    with pytest.raises(TypeError, match="model holds a tuple; expected tensors"):
        utils.penalty(model.named_parameters(), l1=1.0)


def test_health_without_kernels():
    p, q = torch.nn.Parameter(torch.zeros(4, 2)), torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    p.grad, q.grad = torch.eye(4, 2).to_sparse(), torch.tensor([3 + 4j, 0, math.nan])
    health = utils.gradient_health([("p", p), ("q", q)])
    torch.testing.assert_close(health.norm[0], torch.tensor(2**0.5).double(), rtol=1e-6, atol=0)
    assert health.zeros.tolist() == [6, 1] and health.largest.tolist() == [1, 5] and health.nans.tolist() == [0, 1]


def test_dtensors_are_left_to_torch(tmp_path):
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        p = torch.nn.Parameter(distribute_tensor(torch.zeros(4, 2), mesh, [Shard(0)]))
        p.grad = distribute_tensor(torch.full((4, 2), 3.0), mesh, [Shard(0)])
        norm = utils.clip_grad_norm_([p], 1.0)
        torch.testing.assert_close(norm.full_tensor(), torch.tensor(72.0).sqrt())
        torch.testing.assert_close(p.grad.full_tensor().norm(), torch.tensor(1.0))
        assert utils.gradient_health([("p", p)]).largest.tolist() == [p.grad.full_tensor().max().item()]
    finally:
        dist.destroy_process_group()
