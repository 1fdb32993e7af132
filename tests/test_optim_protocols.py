"""Optimizers in their surroundings: hooks, schedulers, copies, AMP, and what they refuse."""

import copy
import pickle

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

import gdbp
from gdbp.optim import _base
from tests.optimizers import give, make


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


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
        optimizer.step()
        optimizer.register_step_pre_hook(lambda *_: fired.append("pre"))
        optimizer.register_step_post_hook(lambda *_: fired.append("post"))
        optimizer.step()
        assert fired == ["pre", "post"]
        optimizer.param_groups[0]["differentiable"] = True
        optimizer.step()
        assert fired == ["pre", "post"] * 2

    @pytest.mark.parametrize("register", [register_optimizer_step_pre_hook, register_optimizer_step_post_hook])
    def test_hooks_of_all_optimizers(self, register):
        _, optimizer = self.optimizer()
        fired = []
        handle = register(lambda *arguments: fired.append(arguments))
        try:
            optimizer.step(closure=None)
        finally:
            handle.remove()
        optimizer.step()
        assert fired == [(optimizer, (optimizer,), {"closure": None})]

    def test_a_hook_that_a_closure_registers(self):
        _, optimizer = self.optimizer()
        fired = []
        optimizer.step(lambda: optimizer.register_step_post_hook(lambda *_: fired.append("post")) and 1)
        assert fired == ["post"]

    def test_dispatch_modes_see_the_step(self):
        with FakeTensorMode():
            p = torch.nn.Parameter(torch.ones(3))
            optimizer = gdbp.optim.AdamW([p])
            p.grad = torch.ones(3)
            optimizer.step()
        p = torch.ones(3, requires_grad=True)
        p.grad = torch.ones(3)
        optimizer = gdbp.optim.SGD([p], lr=0.5)
        with Operators() as seen:
            optimizer.step()
        optimizer.step()
        assert "gdbp.optim_step_.default" in seen.names and torch.equal(p, torch.zeros(3))

    def test_a_hook_changes_the_arguments(self):
        _, optimizer = self.optimizer()
        optimizer.register_step_pre_hook(lambda self, args, kwargs: ((self, lambda: 5), {}))
        assert optimizer.step() == 5

    def test_profiler_names(self):
        _, optimizer = self.optimizer()
        with torch.profiler.profile() as profile:
            optimizer.step()
            optimizer.zero_grad()
        names = {event.key for event in profile.key_averages()}
        assert {"Optimizer.step#AdamW.step", "Optimizer.zero_grad#AdamW.zero_grad"} <= names

    def test_a_subclass_has_its_own_step(self):
        class Counted(gdbp.optim.SGD):
            steps = 0

            def step(self, closure=None):
                self.steps += 1
                return super().step(closure)

        p = torch.ones(3, requires_grad=True)
        optimizer = Counted([p], lr=1.0)
        p.grad = torch.ones(3)
        with torch.profiler.profile() as profile:
            optimizer.step()
        optimizer.step()
        assert optimizer.steps == 2 and torch.equal(p, torch.full((3,), -1.0))
        assert "Optimizer.step#Counted.step" in {event.key for event in profile.key_averages()}

    def test_zero_grad(self):
        p, optimizer = self.optimizer()
        optimizer.zero_grad(set_to_none=False)
        assert p.grad.count_nonzero() == 0
        optimizer.zero_grad()
        assert p.grad is None
        optimizer.zero_grad()

    @pytest.mark.parametrize(
        "how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
    )
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
        _, optimizer = self.optimizer()
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

    @pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}, {"skip_nonfinite": True}], ids=str)
    def test_grad_scaler_inside_the_step(self, options):
        """Scaled, unscaled and skipped as by hand, with the overflow first, in the middle, and after unscale_."""
        start = torch.randn(7)
        p, q = start.clone().requires_grad_(), start.clone().requires_grad_()
        ours = gdbp.optim.SGD([p], lr=0.1, momentum=0.9, dampening=0.5, amp_fused=True, **options)
        theirs = torch.optim.SGD([q], lr=0.1, momentum=0.9, dampening=0.5, foreach=False)
        ours = pickle.loads(pickle.dumps(ours))
        p = ours.param_groups[0]["params"][0]
        assert ours._step_supports_amp_scaling
        scaler, other = (torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3) for _ in range(2))
        for i, overflows in enumerate([True, False, True, False, False, False]):
            weight = torch.randn(7)
            weight[2] = float("inf") if overflows else 3.0
            for parameter, optimizer, s in ((p, ours, scaler), (q, theirs, other)):
                optimizer.zero_grad()
                s.scale((parameter * weight).sum()).backward()
                if i == 4 or optimizer is theirs:
                    s.unscale_(optimizer)
                if optimizer is theirs and "max_grad_norm" in options:
                    norm = torch.nn.utils.clip_grad_norm_([q], 0.5)
                if optimizer is ours:
                    before = p.grad.clone()
                s.step(optimizer)
                s.update()
            assert torch.equal(p.grad.nan_to_num(), before.nan_to_num()), "the gradient is untouched"
            if "max_grad_norm" in options:
                torch.testing.assert_close(ours.grad_norm.float(), norm)
            torch.testing.assert_close(p, q)
            assert scaler.get_scale() == other.get_scale()
            assert not hasattr(ours, "found_inf")
        assert len(ours.state[p]) == 1

    def test_amp_flag_survives_a_fused_checkpoint(self):
        _, optimizer = self.optimizer(fused=True)
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
        step, norm = torch.tensor(3.0), torch.tensor([2.0, 0.5, 0.0], dtype=torch.float64)
        args = ([p], [g], [m, v], [step], "adam", hyper, torch.tensor(0.1), [], norm)
        torch.library.opcheck(torch.ops.gdbp.optim_step_.default, args)


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

    @pytest.mark.parametrize(
        "options,sentence",
        [
            (dict(l1="a"), "l1 is 'a'"),
            (dict(clip_value="1"), "clip_value '1'"),
            (dict(max_grad_norm="1"), "max_grad_norm is '1'"),
            (dict(skip_nonfinite="no"), "skip_nonfinite is 'no'; expected True or False"),
        ],
    )
    def test_options_of_another_type(self, options, sentence):
        with pytest.raises(TypeError, match=sentence):
            gdbp.optim.Adam([torch.nn.Parameter(torch.zeros(1))], **options)

    def test_a_refused_group_is_not_added(self):
        optimizer = gdbp.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
        with pytest.raises(ValueError, match="Invalid l1 value"):
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "l1": -1.0})
        assert len(optimizer.param_groups) == 1

    def test_options_of_a_group(self):
        with pytest.raises(ValueError, match="Invalid l1 value"):
            gdbp.optim.Adam([{"params": [torch.nn.Parameter(torch.zeros(1))], "l1": -1.0}])

    @pytest.mark.parametrize("option", [{"max_grad_norm": 0.1}, {"master_weights": True}, {"state_dtype": "8bit"}])
    def test_options_of_the_optimizer_in_a_group(self, option):
        group, (name,) = {"params": [torch.nn.Parameter(torch.zeros(1))], **option}, option
        with pytest.raises(ValueError, match=f"{name} is in a param group, .* an argument of Adam, for all groups"):
            gdbp.optim.Adam([group])
        optimizer = gdbp.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
        with pytest.raises(ValueError, match=f"{name} is in a param group"):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1

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

    @pytest.mark.parametrize("compiled", [True, False])
    def test_sparse_gradient(self, compiled, monkeypatch):
        monkeypatch.setattr(_base._load, "available", compiled)
        params, optimizer = self.two()
        params[1].grad = torch.ones(4).to_sparse()
        self.refuses(params, optimizer, "a gradient is sparse; .*use torch.optim.SparseAdam or SGD")

    def test_gradient_of_another_class(self):
        params, optimizer = self.two()
        params[1].grad = TwoTensor(torch.ones(4), torch.ones(4))
        self.refuses(params, optimizer, "a gradient is of a class of its own")

    @pytest.mark.parametrize("compiled", [True, False])
    @pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}])
    def test_a_refused_first_step_leaves_no_state(self, options, compiled, monkeypatch):
        monkeypatch.setattr(_base._load, "available", compiled)
        params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
        optimizer = gdbp.optim.SGD(params, lr=1.0, momentum=0.9, dampening=0.5, **options)
        params[0].grad, params[1].grad = torch.ones(3) / 2, torch.ones(3).to_sparse()
        self.refuses(params, optimizer, "sparse")
        assert not optimizer.state
        params[1].grad = None
        optimizer.step()
        assert torch.equal(params[0], torch.full((3,), 0.5))  # of a first gradient nothing is damped

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
        self.refuses(params, optimizer, "do not go with capturable")
