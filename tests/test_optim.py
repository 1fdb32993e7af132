"""Optimizers against torch's for-loop in float64: trajectories, states, layouts, protocols, errors."""

import copy
import itertools
import pickle
import random

import pytest
import torch

import gdbp
from gdbp.optim import _base

CONFIGS = [
    ("SGD", dict(lr=0.1)),
    ("SGD", dict(lr=0.1, weight_decay=0.1, maximize=True)),
    ("SGD", dict(lr=0.1, momentum=0.9)),
    ("SGD", dict(lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.01)),
    ("SGD", dict(lr=0.1, momentum=0.9, nesterov=True)),
    ("SGD", dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, maximize=True)),
    *(
        ("RMSprop", dict(lr=0.01, momentum=momentum, centered=centered, weight_decay=decay))
        for momentum, centered, decay in itertools.product((0, 0.9), (False, True), (0, 0.1))
    ),
    ("RMSprop", dict(lr=0.01, alpha=0.5, eps=1e-3, maximize=True)),
    ("Adam", dict(lr=0.01)),
    ("Adam", dict(lr=0.01, weight_decay=0.1, betas=(0.3, 0.99))),
    ("Adam", dict(lr=0.01, amsgrad=True, maximize=True, eps=1e-3)),
    ("Adam", dict(lr=0.01, weight_decay=0.1, decoupled_weight_decay=True)),
    ("AdamW", dict(lr=0.01)),
    ("AdamW", dict(lr=0.01, amsgrad=True, weight_decay=0.1)),
]
IDS = [f"{name}-{'-'.join(f'{k}={v}' for k, v in options.items())}" for name, options in CONFIGS]
EACH = pytest.mark.parametrize("name,options", CONFIGS, ids=IDS)
# Around the vector widths, the piece that is staged through buffers and the chunk that threads share.
SIZES = [(0,), (), (1,), (3, 5), (7,), (8,), (15,), (16, 1), (17,), (63,), (65,), (1023,), (1025,), (8191,), (8193,)]


def make(name, values, options, torch_class=False):
    params = [v.clone().requires_grad_() for v in values]
    if torch_class:
        return params, getattr(torch.optim, name)(params, **options, foreach=False)
    return params, getattr(gdbp.optim, name)(params, **options)


def give(params, grads):
    for p, g in zip(params, grads, strict=True):
        p.grad = None if g is None else g.to(p.dtype).clone()


def largest(tensors):
    return max((t.abs().max().item() for t in tensors if t.numel()), default=0.0)


def error(found, exact):
    return largest([f.detach().double() - e.detach().double() for f, e in zip(found, exact, strict=True)])


def assert_no_worse(ours, theirs, exact, dtype):
    unit = torch.finfo(dtype).eps * largest(exact)
    assert error(ours, exact) <= max(2 * error(theirs, exact), 4 * unit)


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
    assert ours[3] not in our_optimizer.state
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
        reference = getattr(torch.optim, name)([exact], **options, foreach=False)
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


@pytest.mark.parametrize("name", ["SGD", "RMSprop", "Adam", "AdamW"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
class TestExtras:
    def step(self, name, dtype, p, g, **options):
        p = p.to(dtype, copy=True).requires_grad_()
        p.grad = g.to(dtype, copy=True)
        getattr(gdbp.optim, name)([p], lr=0.1, **options).step()
        torch.testing.assert_close(p.grad, g.to(dtype), rtol=0, atol=0, equal_nan=True)
        return p.detach()

    def data(self):
        p = torch.cat([torch.randn(100), torch.tensor([0.0, -0.0, 1e-3, -1e-3])])
        return p, torch.randn_like(p) * 3

    def test_l1_subgradient(self, name, dtype):
        p, g = self.data()
        found = self.step(name, dtype, p, g, l1=0.2)
        torch.testing.assert_close(found, self.step(name, dtype, p, g + 0.2 * p.sign()))

    def test_l1_prox(self, name, dtype):
        p, g = self.data()
        plain = self.step(name, dtype, p, g)
        expected = plain.sign() * (plain.abs() - 0.1 * 0.2).clamp_min(0)
        found = self.step(name, dtype, p, g, l1=0.2, l1_mode="prox")
        torch.testing.assert_close(found, expected)
        assert torch.equal(found == 0, expected == 0)

    def test_prox_reaches_exact_zeros(self, name, dtype):
        p = torch.full((10,), 0.01, dtype=dtype, requires_grad=True)
        optimizer = getattr(gdbp.optim, name)([p], lr=0.1, l1=0.5, l1_mode="prox")
        for _ in range(3):
            p.grad = torch.zeros_like(p)
            optimizer.step()
        assert torch.equal(p, torch.zeros_like(p))

    def test_clip_value(self, name, dtype):
        p, g = self.data()
        g[5], g[6], g[7] = float("nan"), float("inf"), -float("inf")
        found = self.step(name, dtype, p, g, clip_value=0.5)
        torch.testing.assert_close(found, self.step(name, dtype, p, g.clamp(-0.5, 0.5)), equal_nan=True)

    def test_in_a_group(self, name, dtype):
        p, g = self.data()
        a, b = (p.to(dtype, copy=True).requires_grad_() for _ in range(2))
        a.grad, b.grad = g.to(dtype, copy=True), g.to(dtype, copy=True)
        getattr(gdbp.optim, name)([{"params": [a], "l1": 0.2}, {"params": [b]}], lr=0.1).step()
        assert torch.equal(a.detach(), self.step(name, dtype, p, g, l1=0.2))
        assert torch.equal(b.detach(), self.step(name, dtype, p, g))


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
    assert isinstance(plain_optimizer._plans[0], _base._ReferencePlan)
    assert error(ours, plain) <= 1e-14
    for p, q in zip(ours, plain, strict=True):
        assert list(our_optimizer.state[p]) == list(plain_optimizer.state[q])


class TestProtocols:
    def optimizer(self, **options):
        p = torch.nn.Parameter(torch.randn(6))
        p.grad = torch.randn(6)
        return p, gdbp.optim.AdamW([p], **options)

    def test_is_torchs_class(self):
        assert isinstance(self.optimizer()[1], torch.optim.AdamW)

    def test_closure(self):
        p, optimizer = self.optimizer()
        calls = []

        def closure():
            calls.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            loss = (p**2).sum()
            loss.backward()
            return loss

        before = p.detach().clone()
        with torch.no_grad():
            loss = optimizer.step(closure)
        assert calls == [True] and torch.equal(loss, (before**2).sum())
        assert not torch.equal(before, p)
        assert optimizer.step() is None and optimizer.step(closure=None) is None

    def test_hooks_fire_once(self):
        torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # torch wraps its own class's step here
        _, optimizer = self.optimizer()
        fired = []
        optimizer.register_step_pre_hook(lambda *_: fired.append("pre"))
        optimizer.register_step_post_hook(lambda *_: fired.append("post"))
        optimizer.step()
        assert fired == ["pre", "post"]
        optimizer.param_groups[0]["differentiable"] = True
        optimizer.step()
        assert fired == ["pre", "post"] * 2

    def test_profiler_name(self):
        _, optimizer = self.optimizer()
        with torch.profiler.profile() as profile:
            optimizer.step()
        assert "Optimizer.step#AdamW.step" in {event.key for event in profile.key_averages()}

    @pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
    def test_copies_go_on_alike(self, how):
        p, optimizer = self.optimizer(l1=0.1, amsgrad=True)
        optimizer.step()
        twin = how(optimizer)
        (q,) = twin.param_groups[0]["params"]
        for _ in range(2):
            p.grad = torch.randn(6)
            q.grad = p.grad.clone()
            optimizer.step()
            twin.step()
        assert q is not p and torch.equal(p, q)
        assert repr(twin) == repr(optimizer)

    def test_state_is_looked_at_again(self):
        """Everything a user may replace between steps."""
        p, optimizer = self.optimizer()
        q = p.detach().clone().requires_grad_()
        q.grad = p.grad.clone()
        exact = torch.optim.AdamW([q], foreach=False)
        optimizer.step()
        exact.step()

        def replace_state_tensor(o, x):
            o.state[x]["exp_avg"] = torch.full_like(x, 0.5)

        def write_state(o, x):
            o.state[x]["exp_avg_sq"].fill_(0.25)

        def replace_state_dict(o, x):
            o.state[x] = {k: v.clone() for k, v in o.state[x].items()}

        def load(o, x):
            o.load_state_dict(copy.deepcopy(o.state_dict()))

        def move_data(o, x):
            x.data = x.data.clone() + 1

        def new_grad_storage(o, x):
            x.grad = x.grad.clone()

        def change_options(o, x):
            o.param_groups[0].update(lr=0.3, betas=(0.5, 0.5), weight_decay=0.3)

        def float_step(o, x):
            o.state[x]["step"] = torch.tensor(7.0)

        def forget(o, x):
            o.state.clear()

        changes = [replace_state_tensor, write_state, replace_state_dict, load, move_data, new_grad_storage]
        for change in [*changes, change_options, float_step, forget]:
            for x, o in ((p, optimizer), (q, exact)):
                change(o, x)
            grad = torch.randn(6)
            p.grad, q.grad = grad.clone(), grad.clone()
            optimizer.step()
            exact.step()
            torch.testing.assert_close(p, q)

    def test_new_group_and_unfrozen_parameter(self):
        p, optimizer = self.optimizer()
        frozen = torch.nn.Parameter(torch.randn(3), requires_grad=False)
        optimizer.add_param_group({"params": [frozen], "lr": 0.5})
        optimizer.step()
        before = frozen.detach().clone()
        frozen.requires_grad_(True)
        frozen.grad = torch.ones(3)
        optimizer.step()
        torch.testing.assert_close(frozen.detach(), before * (1 - 0.5 * 0.01) - 0.5)
        optimizer.param_groups[1]["params"][0] = replacement = torch.nn.Parameter(torch.zeros(2))
        replacement.grad = torch.ones(2)
        optimizer.step()
        torch.testing.assert_close(replacement.detach(), torch.full((2,), -0.5))

    def test_tensor_learning_rate(self):
        lr = torch.tensor(0.1)
        p, optimizer = self.optimizer(lr=lr)
        q = p.detach().clone().requires_grad_()
        exact = torch.optim.AdamW([q], lr=0.1, foreach=False)
        for rate in (0.1, 0.02):
            lr.fill_(rate)
            exact.param_groups[0]["lr"] = rate
            q.grad = p.grad.clone()
            optimizer.step()
            exact.step()
        torch.testing.assert_close(p, q)

    @pytest.mark.parametrize("name", ["SGD", "RMSprop", "AdamW"])
    def test_schedulers(self, name):
        schedulers = [
            lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
            lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
            lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=8),
            lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.001, 0.1, step_size_up=2),
            lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
        ]
        for make_scheduler in schedulers:
            options = dict(lr=0.01, momentum=0.5) if name == "RMSprop" else dict(lr=0.01)
            if name == "SGD" and make_scheduler is schedulers[2]:
                options["momentum"] = 0.9
            (p,), ours = make(name, [torch.randn(5, dtype=torch.float64)], options)
            (q,), exact = make(name, [p.detach()], options, torch_class=True)
            scheduled = [(ours, make_scheduler(ours)), (exact, make_scheduler(exact))]
            for _ in range(6):
                p.grad = torch.randn(5, dtype=torch.float64)
                q.grad = p.grad.clone()
                for optimizer, scheduler in scheduled:
                    optimizer.step()
                    scheduler.step()
            torch.testing.assert_close(p, q)

    def test_grad_scaler(self):
        p, optimizer = self.optimizer(lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale((p * 2).sum()).backward()
        assert not optimizer._step_supports_amp_scaling
        before = p.detach().clone()
        p.grad[0] = float("inf")
        scaler.step(optimizer)
        assert torch.equal(p, before) and not optimizer.state
        scaler.update()

    def test_amp_flag_survives_a_fused_checkpoint(self):
        p, optimizer = self.optimizer(fused=True)
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        assert not optimizer._step_supports_amp_scaling

    def test_differentiable_is_torchs(self):
        start, grad = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64, requires_grad=True)
        found = []
        for module in (gdbp.optim, torch.optim):
            p = start.clone().requires_grad_().clone()
            p.retain_grad()
            p.grad = grad * 1
            module.AdamW([p], lr=0.1, differentiable=True).step()
            found += [p, *torch.autograd.grad(p.sum(), grad)]
        torch.testing.assert_close(found[:2], found[2:])

    def test_opcheck(self):
        p, g, m, v = (torch.rand(9) for _ in range(4))
        hyper = [0.1, 0.0, 0.0, 0.0, 0.0, 0.0, float("inf"), 1.0, 0.9, 0.999, 1e-8]
        torch.library.opcheck(torch.ops.gdbp.optim_step_.default, ([p], [g], [m, v], "adam", hyper, [1]))


class TestErrors:
    """One sentence, and nothing changed."""

    @pytest.mark.parametrize(
        "options,sentence",
        [
            (dict(lr=-1.0), "Invalid learning rate"),
            (dict(betas=(1.0, 0.9)), "Invalid beta parameter"),
            (dict(l1=-0.1), "Invalid l1 value"),
            (dict(l1=float("nan")), "Invalid l1 value"),
            (dict(l1_mode="soft"), "Invalid l1_mode"),
            (dict(clip_value=0.0), "Invalid clip_value"),
        ],
    )
    def test_options(self, options, sentence):
        with pytest.raises(ValueError, match=sentence):
            gdbp.optim.Adam([torch.nn.Parameter(torch.zeros(1))], **options)

    def test_options_of_a_group(self):
        with pytest.raises(ValueError, match="Invalid l1 value"):
            gdbp.optim.Adam([{"params": [torch.nn.Parameter(torch.zeros(1))], "l1": -1.0}])

    def test_empty_list(self):
        with pytest.raises(ValueError, match="empty parameter list"):
            gdbp.optim.SGD([])

    def two(self):
        params = [torch.nn.Parameter(torch.randn(4)) for _ in range(2)]
        optimizer = gdbp.optim.Adam(params)
        give(params, [torch.ones(4)] * 2)
        optimizer.step()
        return params, optimizer

    def refuses(self, params, optimizer, match):
        def everything():
            return [p.detach() for p in params], optimizer.state_dict()["state"]

        before = copy.deepcopy(everything())
        with pytest.raises((RuntimeError, TypeError), match=match):
            optimizer.step()
        torch.testing.assert_close(everything(), before, rtol=0, atol=0)

    def test_sparse_gradient(self):
        params, optimizer = self.two()
        params[1].grad = torch.ones(4).to_sparse()
        self.refuses(params, optimizer, "sparse")

    def test_state_of_another_shape(self):
        params, optimizer = self.two()
        optimizer.state[params[1]]["exp_avg"] = torch.zeros(5)
        self.refuses(params, optimizer, "state tensor has shape")

    def test_integer_state(self):
        params, optimizer = self.two()
        for key in ("exp_avg", "exp_avg_sq"):
            optimizer.state[params[1]][key] = torch.zeros(4, dtype=torch.int32)
        self.refuses(params, optimizer, "dtype")

    def test_extras_do_not_go_with_torchs_step(self):
        params, optimizer = self.two()
        optimizer.param_groups[0].update(differentiable=True, l1=0.1)
        self.refuses(params, optimizer, "l1 and clip_value do not go with")


@pytest.mark.parametrize("seed", range(20))
def test_random_histories(seed):
    """Random optimizers, options, shapes, dtypes, strides and gradients that come and go."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(25):
        name, options = rng.choice(CONFIGS)
        dtype = rng.choice([torch.float64, torch.float32])
        shapes = [
            tuple(rng.choice([0, 1, 2, 3, 7, 16, 33]) for _ in range(rng.randint(0, 3))) for _ in range(rng.randint(1, 6))
        ]
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
