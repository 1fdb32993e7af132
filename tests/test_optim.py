"""Optimizers against torch's for-loop in float64: trajectories, states, layouts."""

import copy
import itertools
import random

import pytest
import torch

import gdbp
from gdbp.optim import _base
from tests.optimizers import CONFIGS, EACH, SIZES, assert_no_worse, error, give, largest, make, torch_optimizer


@EACH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_trajectory(name, options, dtype):
    """Ten steps: no further from the float64 for-loop than torch's own for-loop in the same dtype."""
    values = [torch.randn(size, dtype=torch.float64).to(dtype) for size in SIZES]
    ours, our_optimizer = make(name, values, options)
    theirs, their_optimizer = make(name, values, options, torch_class=True)
    exact, exact_optimizer = make(name, [v.double() for v in values], options, torch_class=True)
    for _ in range(10):
        grads = [torch.randn_like(v) for v in values]
        for params, optimizer in ((ours, our_optimizer), (theirs, their_optimizer), (exact, exact_optimizer)):
            give(params, grads)
            optimizer.step()
    assert_no_worse(ours, theirs, exact, dtype)
    for key in exact_optimizer.state_dict()["state"].get(0, {}):
        kinds = [
            [optimizer.state[p][key] for p in params]
            for params, optimizer in ((ours, our_optimizer), (theirs, their_optimizer), (exact, exact_optimizer))
        ]
        assert_no_worse(*kinds, dtype)


@EACH
def test_state_dict_both_ways(name, options):
    """Three steps here, three there, and back: as nine steps of torch's class."""
    values = [torch.randn(size, dtype=torch.float64) for size in SIZES]
    exact, exact_optimizer = make(name, values, options, torch_class=True)
    params, optimizer = make(name, values, options)
    for turn, torch_class in enumerate((False, True, False)):
        if turn:
            following, other = make(name, [p.detach() for p in params], options, torch_class=torch_class)
            before = optimizer.state_dict()
            other.load_state_dict(before)
            assert list(before["state"]) == list(other.state_dict()["state"])
            for index, state in before["state"].items():
                assert list(state) == list(other.state_dict()["state"][index])
            params, optimizer = following, other
            # Loading turns NAdam's product into the parameter's dtype, here as there.
            exact_optimizer.load_state_dict(copy.deepcopy(exact_optimizer.state_dict()))
        for _ in range(3):
            grads = [torch.randn_like(v) for v in values]
            give(params, grads)
            give(exact, grads)
            optimizer.step()
            exact_optimizer.step()
    assert error(params, exact) <= 1e-13
    theirs = {k for group in exact_optimizer.param_groups for k in group}
    assert theirs <= {k for group in make(name, values, options)[1].param_groups for k in group}


@EACH
def test_late_and_missing_gradients(name, options):
    values = [torch.randn(5, dtype=torch.float64) for _ in range(4)]
    ours, our_optimizer = make(name, values, options)
    exact, exact_optimizer = make(name, values, options, torch_class=True)
    presence = [(1, 0, 0, 0), (1, 1, 0, 0), (0, 0, 0, 0), (1, 0, 1, 0), (0, 1, 1, 0), (1, 1, 1, 0)]
    for present in presence:
        grads = [torch.randn_like(v) if here else None for v, here in zip(values, present, strict=True)]
        for params, optimizer in ((ours, our_optimizer), (exact, exact_optimizer)):
            give(params, grads)
            optimizer.step()
    assert error(ours, exact) <= 1e-14
    assert "exp_avg" not in our_optimizer.state.get(ours[3], {})
    steps = [our_optimizer.state[p].get("step") for p in ours[:3] if p in our_optimizer.state]
    theirs = [exact_optimizer.state[p].get("step") for p in exact[:3] if p in exact_optimizer.state]
    assert steps == theirs


def layouts(rng):
    """Pairs of a parameter and a gradient of every kind of memory layout, with the whole base buffer."""
    base = torch.randn(40, 24, dtype=torch.float64, generator=rng)
    yield base, base[::2, 3:10], torch.randn(20, 7, dtype=torch.float64, generator=rng)
    base = torch.randn(12, 30, dtype=torch.float64, generator=rng)
    yield base, base.t(), torch.randn(30, 12, dtype=torch.float64, generator=rng)
    base = torch.randn(9, 11, dtype=torch.float64, generator=rng)
    yield base, base, torch.randn(11, 9, dtype=torch.float64, generator=rng).t()
    base = torch.randn(2, 3, 5, 4, dtype=torch.float64, generator=rng).to(memory_format=torch.channels_last)
    yield base, base, torch.randn(2, 3, 5, 4, dtype=torch.float64, generator=rng)
    base = torch.randn(2, 3, 5, 4, dtype=torch.float64, generator=rng)
    channels_last = torch.randn(2, 3, 5, 4, dtype=torch.float64, generator=rng)
    yield base, base, channels_last.to(memory_format=torch.channels_last)
    base = torch.randn(66, dtype=torch.float64, generator=rng)
    yield base, base[1:-1], torch.randn(1, dtype=torch.float64, generator=rng).expand(64)
    base = torch.randn(7, 1, 3, dtype=torch.float64, generator=rng)
    yield base, base, torch.randn(7, 3, 1, dtype=torch.float64, generator=rng).transpose(1, 2)


@EACH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_layouts(name, options, dtype):
    """Any strides, equal results; and not one element next to the parameter is touched."""
    rng = torch.Generator().manual_seed(3)
    for base, view, grad in layouts(rng):
        base_ours = base.to(dtype, copy=True, memory_format=torch.preserve_format)
        ours = base_ours.as_strided(view.shape, view.stride(), view.storage_offset()).requires_grad_()
        exact = ours.detach().clone(memory_format=torch.contiguous_format).double().requires_grad_()
        optimizer = getattr(gdbp.optim, name)([ours], **options)
        reference = torch_optimizer(name, [exact], **options)
        for _ in range(3):
            ours.grad = grad.to(dtype, memory_format=torch.preserve_format)
            exact.grad = grad.to(dtype).double().contiguous()
            optimizer.step()
            reference.step()
        outside = torch.ones_like(base_ours, dtype=torch.bool)
        outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
        assert torch.equal(base_ours[outside], base.to(dtype)[outside])
        tolerance = 1e-13 if dtype is torch.float64 else 40 * torch.finfo(dtype).eps
        torch.testing.assert_close(ours.detach().double(), exact.detach(), rtol=tolerance, atol=tolerance)


def test_gradient_of_another_dtype():
    """bfloat16 parameters with float32 gradients, which torch's Adam refuses."""
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.fail("torch of the supported range has Tensor.grad_dtype")
    for dtype, grad_dtype in itertools.permutations((torch.float32, torch.bfloat16, torch.float16), 2):
        p = torch.randn(100).to(dtype).requires_grad_()
        q = p.detach().double().requires_grad_()
        p.grad_dtype = None
        p.grad = torch.randn(100).to(grad_dtype)
        q.grad = p.grad.double()
        gdbp.optim.AdamW([p], lr=0.1).step()
        torch.optim.AdamW([q], lr=0.1, foreach=False).step()
        torch.testing.assert_close(p.detach().double(), q.detach(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@EACH
def test_bitwise_for_any_thread_count_and_company(name, options):
    """Threads and the other tensors of the group change no bit."""
    values = [torch.randn(n) for n in (100_003, 7, 8193, 65_537, 1)]
    grads = [[torch.randn_like(v) for v in values] for _ in range(3)]
    results = []
    threads = torch.get_num_threads()
    try:
        for count, alone in ((1, False), (2, False), (3, False), (2, True)):
            torch.set_num_threads(count)
            params = [v.clone().requires_grad_() for v in values]
            groups = [[p] for p in params] if alone else [params]
            optimizers = [getattr(gdbp.optim, name)(group, **options) for group in groups]
            for step in grads:
                give(params, step)
                for optimizer in optimizers:
                    optimizer.step()
            results.append([p.detach() for p in params])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@EACH
def test_version_counters(name, options):
    (p,), optimizer = make(name, [torch.randn(5)], options)
    loss = (p * p * p).sum()
    give([p], [torch.randn(5)])
    optimizer.step()
    versions = [t._version for t in optimizer.state[p].values()] if optimizer.state else []
    give([p], [torch.randn(5)])
    optimizer.step()
    assert all(t._version > v for t, v in zip(optimizer.state[p].values(), versions, strict=True)) if versions else True
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@EACH
def test_nonfinite_gradients_stay_visible(name, options):
    """NaN and infinity end where torch's for-loop puts them; centered RMSprop alone is better than torch."""
    values = [torch.randn(40, dtype=torch.float64)]
    ours, our_optimizer = make(name, values, options)
    theirs, their_optimizer = make(name, values, options, torch_class=True)
    for step in range(3):
        grad = torch.randn(40, dtype=torch.float64)
        grad[3], grad[17], grad[18] = (float("nan"), float("inf"), -float("inf")) if step == 1 else (0.0, 0.0, 0.0)
        for params, optimizer in ((ours, our_optimizer), (theirs, their_optimizer)):
            give(params, [grad])
            optimizer.step()
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-12, atol=1e-12, equal_nan=True)


def test_centered_rmsprop_has_no_nan():
    """A constant gradient: the variance is 0, and rounding must not make its root a NaN."""
    p = torch.zeros(20_000, requires_grad=True)
    optimizer = gdbp.optim.RMSprop([p], centered=True)
    grad = torch.randn(20_000)
    for _ in range(100):
        p.grad = grad.clone()
        optimizer.step()
    assert torch.isfinite(p).all()


@EACH
def test_reference_matches_kernel(name, options, monkeypatch):
    """The plain-torch path, for devices and builds without kernels."""
    values = [torch.randn(size, dtype=torch.float64) for size in SIZES]
    options = dict(options, l1=0.1, clip_value=0.7)
    ours, our_optimizer = make(name, values, options)
    plain, plain_optimizer = make(name, values, options)
    for step in range(5):
        grads = [torch.randn_like(v) if step or i % 2 else None for i, v in enumerate(values)]
        give(ours, grads)
        our_optimizer.step()
        with monkeypatch.context() as patch:
            patch.setattr(_base._load, "available", False)
            give(plain, grads)
            plain_optimizer.step()
    assert isinstance(plain_optimizer._plan, _base.ListPlan)
    assert error(ours, plain) <= 1e-14
    for p, q in zip(ours, plain, strict=True):
        assert list(our_optimizer.state[p]) == list(plain_optimizer.state[q])


class TestUnusualTensors:
    @EACH
    def test_complex(self, name, options):
        if name == "Lion":
            return  # the sign of a complex number is no Lion's
        values = [torch.randn(5, 3, dtype=torch.complex128), torch.randn(4, dtype=torch.complex128)]
        ours, our_optimizer = make(name, values, options)
        exact, exact_optimizer = make(name, values, options, torch_class=True)
        for _ in range(3):
            grads = [torch.randn_like(v) for v in values]
            for params, optimizer in ((ours, our_optimizer), (exact, exact_optimizer)):
                give(params, grads)
                optimizer.step()
        for a, b in zip(ours, exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("shape", [(), (1, 1), (3,)])
    @pytest.mark.parametrize("norm", [None, 100.0])
    def test_gradients_that_are_yet_to_be_negated(self, shape, norm):
        """As autograd makes them of the parts of complex numbers."""
        p = torch.ones(shape, requires_grad=True)
        p.grad = torch._neg_view(torch.full(shape, -3.0))
        gdbp.optim.SGD([p], lr=1.0, max_grad_norm=norm).step()
        torch.testing.assert_close(p.detach(), torch.full(shape, -2.0))

    @pytest.mark.parametrize("compiled", [True, False])
    def test_gradients_that_are_yet_to_be_conjugated(self, compiled, monkeypatch):
        monkeypatch.setattr(_base._load, "available", compiled)
        p = torch.ones(3, dtype=torch.complex64, requires_grad=True)
        p.grad = torch.full((3,), 1 + 2j).conj()
        gdbp.optim.SGD([p], lr=1.0).step()
        torch.testing.assert_close(p.detach(), torch.full((3,), 2j))

    def test_meta_parameters(self):
        p = torch.ones(3, device="meta", requires_grad=True)
        p.grad = torch.ones_like(p)
        optimizer = gdbp.optim.Adam([p])
        optimizer.step()
        assert optimizer.state[p]["exp_avg"].is_meta and optimizer.state[p]["step"].device.type == "cpu"

    def test_parameters_in_a_tuple(self):
        p, q = (torch.ones(3, requires_grad=True) for _ in range(2))
        optimizers = gdbp.optim.Adam([p]), torch.optim.Adam([q])
        for optimizer, own in zip(optimizers, (p, q), strict=True):
            optimizer.param_groups[0]["params"] = (own,)
            for _ in range(2):
                own.grad = torch.ones(3)
                optimizer.step()
        torch.testing.assert_close(p, q)

    @pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
    def test_duplicates_are_stepped_twice(self):
        (p,), (q,) = ([torch.ones(3, requires_grad=True)] for _ in range(2))
        p.grad, q.grad = torch.ones(3), torch.ones(3)
        ours, exact = gdbp.optim.Adam([p, p], lr=0.1), torch.optim.Adam([q, q], lr=0.1, foreach=False)
        for _ in range(2):
            ours.step()
            exact.step()
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("seed", range(20))
def test_random_histories(seed):
    """Random optimizers, options, shapes, dtypes, strides and gradients that come and go."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(25):
        name, options = rng.choice(CONFIGS)
        dtype = rng.choice([torch.float64, torch.float32])
        lengths = [0, 1, 2, 3, 7, 16, 33]
        shapes = [tuple(rng.choices(lengths, k=rng.randint(0, 3))) for _ in range(rng.randint(1, 6))]
        values = [torch.randn(shape, dtype=dtype) for shape in shapes]
        values = [v.transpose(0, -1) if v.dim() > 1 and rng.random() < 0.3 else v for v in values]
        ours, our_optimizer = make(name, values, options)
        exact, exact_optimizer = make(name, [v.double() for v in values], options, torch_class=True)
        for _ in range(rng.randint(1, 6)):
            grads = [None if rng.random() < 0.2 else torch.randn(v.shape, dtype=dtype) for v in values]
            for params, optimizer in ((ours, our_optimizer), (exact, exact_optimizer)):
                give(params, grads)
                optimizer.step()
        unit = torch.finfo(dtype).eps * max(1.0, largest(exact))
        assert error(ours, exact) <= 64 * unit, (name, options, dtype, shapes)
