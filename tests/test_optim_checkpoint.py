"""Saving and going on: nothing about a state changes on its way through a file, and hooks are torch's."""

import copy
import io
import itertools

import pytest
import torch

import gdbp
from gdbp.optim._precision import decode

CONFIGS = [
    ("SGD", dict(lr=0.1)),
    ("SGD", dict(lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.01)),
    ("RMSprop", dict(lr=0.01, momentum=0.9, centered=True)),
    ("Adam", dict(lr=0.01, amsgrad=True)),
    ("AdamW", dict(lr=0.01)),
    ("Adagrad", dict(lr=0.1, lr_decay=0.1)),
    ("Adadelta", dict(lr=1.0)),
    ("Adamax", dict(lr=0.01)),
    ("NAdam", dict(lr=0.01)),
    ("RAdam", dict(lr=0.01)),
    ("Lion", dict(lr=0.01, weight_decay=0.1)),
]
EACH = pytest.mark.parametrize("name,options", CONFIGS, ids=lambda v: v if isinstance(v, str) else "")
SHAPES = [(0,), (), (3, 5), (17,), (1025,)]


def make(name, values, options):
    params = [v.clone().requires_grad_() for v in values]
    return params, getattr(gdbp.optim, name)(params, **options)


def train(params, optimizer, steps, seed=0):
    for n in steps:
        generator = torch.Generator().manual_seed(1000 * seed + n)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        optimizer.step()


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def adam(dtype=torch.bfloat16, shape=(4, 6), **options):
    p = torch.randn(shape).to(dtype).requires_grad_()
    optimizer = gdbp.optim.AdamW([p], **options)
    train([p], optimizer, range(1))
    return p, optimizer


@EACH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_resume_is_bitwise(name, options, dtype):
    """Three steps, a file, and three steps are six steps."""
    values = [torch.randn(shape).to(dtype) for shape in SHAPES]
    whole, optimizer = make(name, values, options)
    train(whole, optimizer, range(6))
    first, optimizer = make(name, values, options)
    train(first, optimizer, range(3))
    saved = through_a_file(optimizer.state_dict())
    second, resumed = make(name, [p.detach() for p in first], options)
    resumed.load_state_dict(saved)
    train(second, resumed, range(3, 6))
    assert all(map(torch.equal, whole, second))


@pytest.mark.parametrize(
    "options",
    [
        dict(master_weights=True),
        dict(stochastic_rounding=7),
        dict(ema_decay=0.9),
        dict(state_dtype=torch.float32),
        dict(state_dtype="8bit", stochastic_rounding=True, ema_decay=0.5),
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("name", ["SGD", "AdamW", "NAdam", "Lion"])
def test_resume_with_precision_options(name, options):
    options = dict(options, lr=0.01, **({"momentum": 0.9} if name == "SGD" else {}))
    values = [torch.randn(shape).bfloat16() for shape in ((3,), (70, 65))]
    whole, optimizer = make(name, values, options)
    train(whole, optimizer, range(6))
    first, saved = make(name, values, options)
    train(first, saved, range(3))
    second, resumed = make(name, [p.detach() for p in first], options)
    resumed.load_state_dict(through_a_file(saved.state_dict()))
    train(second, resumed, range(3, 6))
    assert all(map(torch.equal, whole, second))
    states = [o.state_dict()["state"] for o in (optimizer, resumed)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


class TestStates:
    def test_keep_their_dtypes(self):
        """torch makes bfloat16 of all of these."""
        p, optimizer = adam()
        state = optimizer.state[p]
        state["exp_avg"] = torch.randn(4, 6)
        state["exp_avg_sq"] = torch.rand(4, 6)
        state["codes"] = torch.randint(256, (24,), dtype=torch.uint8)
        state["long"] = torch.tensor([2**40 + 1])
        state["nested"] = {"scales": torch.rand(3), "numbers": [1, torch.rand(2)]}
        other = adam()[1]
        other.load_state_dict(through_a_file(optimizer.state_dict()))
        torch.testing.assert_close(other.state_dict()["state"], optimizer.state_dict()["state"], rtol=0, atol=0)

    def test_nadam_product_stays_float32(self):
        p = torch.randn(3, dtype=torch.bfloat16, requires_grad=True)
        optimizer = gdbp.optim.NAdam([p])
        train([p], optimizer, range(2))
        optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.state[p]["mu_product"].dtype == torch.float32

    def test_counts_of_other_types(self):
        """A product that torch's load made bfloat16, a float of an old checkpoint, an int64, one of one dimension."""
        for step in (3.0, 3, torch.tensor(3), torch.tensor([3.0]), torch.tensor(3.0, dtype=torch.bfloat16)):
            p, optimizer = adam(torch.float32)
            q = p.detach().clone().requires_grad_()
            expected = torch.optim.AdamW([q], foreach=False)
            state_dict = optimizer.state_dict()
            state_dict["state"][0]["step"] = step
            optimizer.load_state_dict(state_dict)
            expected.load_state_dict(copy.deepcopy(state_dict))
            expected.state[q]["step"] = torch.tensor(3.0)
            train([p], optimizer, range(2))
            train([q], expected, range(2))
            assert optimizer.state[p]["step"] == 5
            torch.testing.assert_close(p, q)

    def test_are_copied(self):
        _, optimizer = adam(torch.float32)
        source = optimizer.state_dict()
        twin = adam(torch.float32)[1]
        twin.load_state_dict(source)
        kept = copy.deepcopy(twin.state_dict()["state"])
        for tensor in source["state"][0].values():
            tensor.fill_(9.0)
        source["param_groups"][0]["lr"] = 9.0
        assert twin.param_groups[0]["lr"] == 1e-3
        torch.testing.assert_close(twin.state_dict()["state"], kept, rtol=0, atol=0)

    def test_take_the_layout_of_their_parameter(self):
        values = torch.randn(2, 3, 5, 4)
        for source, target in itertools.permutations((torch.channels_last, torch.contiguous_format)):
            p, q = (values.clone(memory_format=f).requires_grad_() for f in (source, target))
            saved = gdbp.optim.AdamW([p])
            train([p], saved, range(2))
            with torch.no_grad():
                q.copy_(p)
            loaded = gdbp.optim.AdamW([q])
            loaded.load_state_dict(saved.state_dict())
            assert loaded.state[q]["exp_avg"].stride() == q.stride()
            train([p], saved, range(2, 4))
            train([q], loaded, range(2, 4))
            assert torch.equal(p, q)

    def test_of_8_bits_take_the_layout_of_their_parameter(self):
        """Blocks are counted in memory order, so that other strides have other blocks."""
        p = torch.randn(80, 70).t().requires_grad_()
        q = p.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        saved = gdbp.optim.Lion([p], state_dtype="8bit")
        train([p], saved, range(1))
        loaded = gdbp.optim.Lion([q], state_dtype="8bit")
        loaded.load_state_dict(through_a_file(saved.state_dict()))
        momenta = [decode(o.state[t]["exp_avg"], o.state[t]["exp_avg_scale"]) for o, t in ((saved, p), (loaded, q))]
        assert loaded.state[q]["exp_avg"].stride() == q.stride()
        torch.testing.assert_close(*momenta, rtol=0.05, atol=1e-3)

    def test_start_where_adagrads_start(self):
        """Also those of parameters that came after the constructor, which torch before 2.13 does not step."""
        options = {"lr": 1.0, "initial_accumulator_value": 4.0}
        for dtype in (torch.float32, torch.complex64):
            late, at_once = (torch.ones(2, dtype=dtype, requires_grad=True) for _ in range(2))
            ours = gdbp.optim.Adagrad([torch.ones(2, requires_grad=True)], **options)
            ours.add_param_group({"params": [late]})
            for p, optimizer in ((late, ours), (at_once, torch.optim.Adagrad([at_once], **options))):
                p.grad = torch.ones_like(p)
                optimizer.step()
            torch.testing.assert_close(late, at_once)

    def test_are_made_on_the_cpu_whatever_the_default_device(self):
        p = torch.randn(5, requires_grad=True)
        p.grad = torch.randn(5)
        with torch.device("meta"):
            gdbp.optim.Adam([p]).step()
        assert p.isfinite().all()

    def test_without_an_owner_may_be_tensors(self):
        p = torch.randn(5, requires_grad=True)
        optimizer = gdbp.optim.Adam([p])
        optimizer.state["history"] = torch.zeros(3)
        train([p], optimizer, range(2))
        assert optimizer.state[p]["step"] == 2

    def test_without_an_owner_stay(self):
        _, optimizer = adam(torch.float32)
        optimizer.state["note"] = "kept"
        twin = adam(torch.float32)[1]
        twin.load_state_dict(optimizer.state_dict())
        assert twin.state["note"] == "kept"

    def test_share_memory(self):
        p = torch.randn(5).requires_grad_()
        q = p.detach().clone().requires_grad_()
        shared, plain = gdbp.optim.Adagrad([p]), gdbp.optim.Adagrad([q])
        p.detach().share_memory_()
        shared.share_memory()
        train([p], shared, range(2))
        train([q], plain, range(2))
        assert shared.state[p]["sum"].is_shared() and torch.equal(p, q)


class TestHooks:
    def test_order_and_results(self):
        _, optimizer = adam(torch.float32)
        p, twin = adam(torch.float32)
        seen = []

        def replace(o, state_dict):
            seen.append("second pre")
            state_dict["param_groups"][0]["lr"] = 0.5
            return state_dict

        twin.register_load_state_dict_pre_hook(replace)
        twin.register_load_state_dict_pre_hook(lambda o, s: seen.append("first pre"), prepend=True)
        twin.register_load_state_dict_post_hook(lambda o: seen.append(("second post", "exp_avg" in o.state[p])))
        twin.register_load_state_dict_post_hook(lambda o: seen.append(("first post", len(o.state))), prepend=True)
        for _ in range(2):
            twin.load_state_dict(state_dict=copy.deepcopy(optimizer.state_dict()))
            assert seen == ["first pre", "second pre", ("first post", 1), ("second post", True)]
            seen.clear()
        assert twin.param_groups[0]["lr"] == 0.5

    def test_none_is_left_behind_by_a_failure(self):
        _, optimizer = adam(torch.float32)
        two = gdbp.optim.AdamW([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(2)]}])
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(ValueError, match="different number of parameter groups"):
            optimizer.load_state_dict(two.state_dict())
        torch.testing.assert_close(optimizer.state_dict()["state"], before["state"], rtol=0, atol=0)
        assert not optimizer._optimizer_load_state_dict_pre_hooks
        assert not optimizer._optimizer_load_state_dict_post_hooks


class TestCheckpointsOfTorch:
    @pytest.mark.parametrize("flag", ["fused", "foreach", "capturable"])
    def test_with_flags(self, flag):
        """Flags of another implementation, or another device, change nothing."""
        q = torch.randn(7, requires_grad=True)
        p = q.detach().clone().requires_grad_()
        theirs = torch.optim.AdamW([q], foreach=False)
        train([q], theirs, range(2))
        with torch.no_grad():
            p.copy_(q)
        state_dict = through_a_file(theirs.state_dict())
        state_dict["param_groups"][0][flag] = True
        ours = gdbp.optim.AdamW([p])
        ours.load_state_dict(state_dict)
        train([p], ours, range(2, 4))
        train([q], theirs, range(2, 4))
        torch.testing.assert_close(p, q)
        assert ours.state[p]["step"].device.type == "cpu"

    def test_groups_keep_options_that_torch_does_not_have(self):
        w, b = (torch.zeros(4, requires_grad=True) for _ in range(2))
        ours = gdbp.optim.AdamW([{"params": [w], "clip_value": 1.0}, {"params": [b], "l1": 0.0}], l1=0.1)
        theirs = torch.optim.AdamW([{"params": [w]}, {"params": [b], "lr": 0.5}])
        ours.load_state_dict(theirs.state_dict())
        assert [(g["l1"], g["clip_value"], g["lr"]) for g in ours.param_groups] == [(0.1, 1.0, 1e-3), (0.0, None, 0.5)]
        other = gdbp.optim.AdamW([{"params": [w], "l1": 0.7}, {"params": [b], "l1_mode": "prox"}])
        ours.load_state_dict(other.state_dict())
        assert [(g["l1"], g["l1_mode"]) for g in ours.param_groups] == [(0.7, "subgradient"), (0.0, "prox")]

    def test_older_than_our_options(self):
        p, optimizer = adam(torch.float32, l1=0.5)
        state_dict = torch.optim.AdamW([torch.zeros(4, 6)]).state_dict()
        for key in ("maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"):
            state_dict["param_groups"][0].pop(key, None)
        optimizer.load_state_dict(state_dict)
        assert optimizer.param_groups[0]["l1"] == 0.5 and optimizer.param_groups[0]["decoupled_weight_decay"]
        train([p], optimizer, range(1))


class TestAround:
    """Other parts of torch that hold an optimizer."""

    def model(self):
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))

    def learn(self, model, step, zero, turns=3):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
        for _ in range(turns):
            model(x).square().sum().backward()
            step()
            zero()

    def plain(self):
        model = self.model()
        optimizer = gdbp.optim.AdamW(model.parameters(), lr=0.1)
        self.learn(model, optimizer.step, optimizer.zero_grad)
        return list(model.parameters())

    def test_post_accumulate_grad_hook(self):
        model = self.model()
        optimizers = {p: gdbp.optim.AdamW([p], lr=0.1) for p in model.parameters()}

        def update(p):
            optimizers[p].step()
            optimizers[p].zero_grad()

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(update)
        self.learn(model, lambda: None, lambda: None)
        assert all(p.grad is None for p in model.parameters())
        assert all(map(torch.equal, model.parameters(), self.plain()))

    def test_apply_optimizer_in_backward(self):
        from torch.distributed.optim import _apply_optimizer_in_backward

        model = self.model()
        _apply_optimizer_in_backward(gdbp.optim.AdamW, model.parameters(), {"lr": 0.1})
        self.learn(model, lambda: None, lambda: None)
        assert all(map(torch.equal, model.parameters(), self.plain()))

    def test_averaged_model(self):
        averages = []
        for module in (gdbp.optim, torch.optim):
            model = self.model()
            average = torch.optim.swa_utils.AveragedModel(
                model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
            )
            optimizer = module.AdamW(model.parameters(), lr=0.1)

            def step(optimizer=optimizer, average=average, model=model):
                optimizer.step()
                average.update_parameters(model)

            self.learn(model, step, optimizer.zero_grad)
            averages.append(list(average.parameters()))
        torch.testing.assert_close(*averages)

    def test_named_parameters(self):
        model = self.model()
        optimizer = gdbp.optim.AdamW(model.named_parameters(), lr=0.1)
        self.learn(model, optimizer.step, optimizer.zero_grad)
        names = [name for name, _ in model.named_parameters()]
        assert optimizer.param_groups[0]["param_names"] == names
        other = gdbp.optim.AdamW(model.parameters())
        other.load_state_dict(through_a_file(optimizer.state_dict()))
        assert other.param_groups[0]["param_names"] == names

    def test_zero_grad(self):
        model = self.model()
        optimizer = gdbp.optim.AdamW(model.parameters())
        self.learn(model, optimizer.step, lambda: optimizer.zero_grad(set_to_none=False), turns=1)
        assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())
        optimizer.zero_grad()
        assert all(p.grad is None for p in model.parameters())

    def test_group_added_after_steps(self):
        results = []
        for module in (gdbp.optim, torch.optim):
            first, second = torch.ones(3, requires_grad=True), torch.ones(4, requires_grad=True)
            optimizer = module.NAdam([first], lr=0.1)
            train([first], optimizer, range(2))
            optimizer.add_param_group({"params": [second], "lr": 0.5})
            train([first, second], optimizer, range(2, 4))
            state_dict = through_a_file(optimizer.state_dict())
            optimizer.load_state_dict(state_dict)
            train([first, second], optimizer, range(4, 6))
            results.append([first, second, optimizer.state[second]["step"]])
        torch.testing.assert_close(*results)


class TestTrialStep:
    """What torch.distributed.checkpoint does to an optimizer without state."""

    @EACH
    def test_changes_nothing(self, name, options):
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        model = torch.nn.Linear(5, 3)
        asked, plain = (copy.deepcopy(model) for _ in range(2))
        optimizers = [getattr(gdbp.optim, name)(m.parameters(), **options) for m in (asked, plain)]
        for turn in range(2):
            state_dict = get_optimizer_state_dict(asked, optimizers[0])
            assert all(map(torch.equal, asked.parameters(), model.parameters()))
            for state in state_dict["state"].values():
                assert state.get("step", torch.tensor(0.0)) == 0
                assert turn or set(state) >= set(optimizers[0]._update(optimizers[0].param_groups[0]).states)
        for m, o in zip((asked, plain), optimizers):
            train(list(m.parameters()), o, range(3))
        assert all(map(torch.equal, asked.parameters(), plain.parameters()))
        for p, q in zip(asked.parameters(), plain.parameters()):
            torch.testing.assert_close(optimizers[0].state[p], optimizers[1].state[q], rtol=0, atol=0)

    def test_is_not_a_warm_up(self):
        """lr = 0 with gradients counts, and so do zero gradients with lr > 0."""
        for lr, value in ((0.0, 1.0), (0.1, 0.0), (torch.tensor(0.0), float("nan"))):
            p = torch.ones(3, requires_grad=True)
            p.grad = torch.full((3,), value)
            optimizer = gdbp.optim.AdamW([p], lr=lr)
            optimizer.step()
            assert optimizer.state[p]["step"] == 1
