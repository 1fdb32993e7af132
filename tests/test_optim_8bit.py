"""States of 8 bits: their codes, what they cost, and what they change."""

import pytest
import torch

import gdbp
from gdbp.optim import _precision
from tests.test_optim_precision import COARSE, SIZES, give, make


class TestEightBits:
    def test_codes_are_those_of_the_formula(self):
        """Kernel and Python agree, but for numbers between two codes; and every code stands for itself."""
        x = torch.randn(10_000) * torch.logspace(-6, 3, 10_000)
        (p,), optimizer = make("SGD", [torch.zeros(10_000)], state_dtype="8bit")
        give([p], [x])
        optimizer.step()
        codes, scale = _precision.encode(x)
        state = optimizer.state[p]
        assert state["momentum_buffer"].dtype is torch.int8
        torch.testing.assert_close(state["momentum_buffer_scale"], scale)
        difference = (state["momentum_buffer"].int() - codes.int()).abs()
        assert difference.max() <= 1 and difference.count_nonzero() < 0.05 * len(x)
        again, same = _precision.encode(_precision.decode(codes, scale))
        assert torch.equal(codes, again) and torch.equal(scale, same)

    @pytest.mark.parametrize("largest", [2.0**-149, 1e-42, 2.0**-126, 2.0**-105, 1.0, 1.2e38, 1.8e38, 3.4e38])
    def test_codes_of_any_scale(self, largest):
        """Numbers keep their digits also where a scale's inverse is beyond float32, or subnormal; and what has no
        gradient keeps its codes."""
        x = (torch.linspace(-1, 1, 5001).double().pow(3) * largest).float()
        (p,), optimizer = make("SGD", [torch.zeros(5001)], state_dtype="8bit")
        optimizer.param_groups[0].update(momentum=1.0, lr=0.0)
        give([p], [x])
        optimizer.step()
        state = optimizer.state[p]
        codes, scale = state["momentum_buffer"].clone(), state["momentum_buffer_scale"].clone()
        scales = scale.double().repeat_interleave(_precision.BLOCK)[: len(x)]
        root = (x.double().abs() / scales.clamp_min(1e-300)).pow(1 / 3)
        off = 0.6 / 127  # half a code, and a tenth for the roots of the kernel
        bound = 1.00001 * (3 * root**2 * off + 3 * root * off**2 + 127**-3) * scales
        assert ((_precision.decode(codes, scale).double() - x.double()).abs() <= bound).all()
        give([p], [torch.zeros(5001)])
        optimizer.step()
        assert torch.equal(state["momentum_buffer"], codes)
        torch.testing.assert_close(state["momentum_buffer_scale"], scale, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("name", COARSE)
    def test_one_step_is_exact(self, name):
        """The first update uses the states before they are rounded."""
        values = [torch.randn(size) for size in SIZES]
        params, optimizer = make(name, values, state_dtype="8bit")
        floats, exact = make(name, values, **({"centered": False} if name == "RMSprop" else {}))
        grads = [torch.randn_like(v) for v in values]
        for group, o in ((params, optimizer), (floats, exact)):
            give(group, grads)
            o.step()
        assert all(map(torch.equal, params, floats))
        small, large = params[4], params[5]
        kinds = {key: value.dtype for key, value in optimizer.state[large].items()}
        assert torch.int8 in kinds.values()
        assert torch.int8 not in {value.dtype for value in optimizer.state[small].values()}

    @pytest.mark.parametrize(("name", "options"), [("Adadelta", {}), ("RMSprop", {"centered": True})])
    def test_too_coarse(self, name, options):
        """Both leave the way of float32 by powers of ten within a few hundred steps."""
        p = torch.zeros(5000, requires_grad=True)
        with pytest.raises(ValueError, match=f"Invalid state_dtype: '8bit' for {name}, whose"):
            getattr(gdbp.optim, name)([p], state_dtype="8bit", **options)
        if not options:
            return
        optimizer = gdbp.optim.RMSprop([p], state_dtype="8bit")
        with pytest.raises(ValueError, match="Invalid state_dtype"):
            optimizer.add_param_group({"params": [torch.zeros(3, requires_grad=True)], **options})
        assert len(optimizer.param_groups) == 1
        optimizer.param_groups[0].update(options)
        p.grad = torch.ones(5000)
        with pytest.raises(ValueError, match="Invalid state_dtype"):
            optimizer.step()
        assert not optimizer.state and p.count_nonzero() == 0

    def test_a_quarter_of_the_memory(self):
        def size(optimizer, p):
            return sum(t.numel() * t.element_size() for t in optimizer.state[p].values())

        (p,), eight = make("AdamW", [torch.randn(1 << 16)], state_dtype="8bit")
        (q,), full = make("AdamW", [torch.randn(1 << 16)])
        for x, optimizer in ((p, eight), (q, full)):
            give([x], [torch.randn(1 << 16)])
            optimizer.step()
        assert size(eight, p) <= 0.26 * size(full, q)

    def test_training_curve(self):
        """A network trained with 8-bit states ends where one with float32 states does."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(512, 64, generator=generator)
        teacher = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10))
        y = teacher(x).argmax(1)

        def train(state_dtype):
            torch.manual_seed(1)
            model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
            optimizer = gdbp.optim.AdamW(model.parameters(), lr=3e-3, state_dtype=state_dtype)
            losses = []
            for _ in range(120):
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            return losses

        full, eight = train(None), train("8bit")
        assert eight[-1] < 0.2 * eight[0]
        assert abs(sum(eight) / sum(full) - 1) < 0.05

    @pytest.mark.parametrize("stochastic", [False, True])
    def test_nonfinite_stays_visible(self, stochastic):
        (p,), optimizer = make("AdamW", [torch.randn(5000)], state_dtype="8bit", stochastic_rounding=stochastic)
        grad = torch.randn(5000)
        grad[300] = float("nan")
        for g in (grad, torch.zeros(5000)):
            give([p], [g])
            optimizer.step()
        assert p[256:384].isnan().all() and p[:256].isfinite().all() and p[384:].isfinite().all()

    def test_any_layout(self):
        base = torch.randn(100, 120)
        (p,), optimizer = make("AdamW", [base], state_dtype="8bit")
        strided = torch.empty(120, 200)[:, ::2].t().copy_(base).requires_grad_()
        other = gdbp.optim.AdamW([strided], lr=0.01, state_dtype="8bit")
        grad = torch.randn(100, 120)
        p.grad, strided.grad = grad.clone(), grad.clone()
        optimizer.step()
        other.step()
        torch.testing.assert_close(strided, p)

    def test_checkpoint_of_float32_states(self):
        """A torch checkpoint goes on in 8 bits."""
        p = torch.randn(5000, requires_grad=True)
        p.grad = torch.randn(5000)
        theirs = torch.optim.AdamW([p], lr=0.01)
        theirs.step()
        ours = gdbp.optim.AdamW([p], lr=0.01, state_dtype="8bit")
        ours.load_state_dict(theirs.state_dict())
        ours.step()
        assert ours.state[p]["exp_avg"].dtype is torch.int8
        assert ours.state[p]["step"] == 2

    def test_checkpoint_of_8_bits(self):
        """It stays in 8 bits where nobody asks for another dtype."""
        (p,), eight = make("AdamW", [torch.randn(5000)], state_dtype="8bit")
        give([p], [torch.randn(5000)])
        eight.step()
        wide = _precision.decode(*(eight.state[p][key] for key in ("exp_avg", "exp_avg_scale")))
        for wanted, found in ((None, torch.int8), (torch.float32, torch.float32), (torch.float64, torch.float64)):
            (q,), optimizer = make("AdamW", [p.detach()], state_dtype=wanted)
            optimizer.load_state_dict(eight.state_dict())
            optimizer.param_groups[0]["betas"] = (1 - 2**-20, 0.999)
            give([q], [torch.zeros(5000)])
            optimizer.step()
            state = optimizer.state[q]
            assert state["exp_avg"].dtype is found and ("exp_avg_scale" in state) == (found is torch.int8)
            if found is not torch.int8:
                torch.testing.assert_close(state["exp_avg"], wide.to(found), rtol=2e-6, atol=0)

    @pytest.mark.parametrize("kind", ["Adagrad", "a checkpoint"])
    def test_a_skipped_step_leaves_float32_states(self, kind):
        (p,), optimizer = make("Adagrad", [torch.randn(5000)], state_dtype="8bit", skip_nonfinite=True)
        if kind == "a checkpoint":
            (q,), theirs = make("AdamW", [torch.randn(5000)])
            give([q], [torch.randn(5000)])
            theirs.step()
            (p,), optimizer = make("AdamW", [torch.randn(5000)], state_dtype="8bit", skip_nonfinite=True)
            optimizer.load_state_dict(theirs.state_dict())
        before = dict(optimizer.state[p])
        give([p], [torch.full((5000,), float("inf"))])
        optimizer.step()
        assert optimizer.state[p] == before
        give([p], [torch.randn(5000)])
        optimizer.step()
        assert any(value.dtype is torch.int8 for value in optimizer.state[p].values())


class TestAtRandom:
    """`stochastic_rounding=True`: states are right on average, where the nearest code may never be left again."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_expectation(self, dtype):
        """Within 6 standard errors; each number becomes one of the two codes around it."""
        count = 300
        x = torch.randn(20_000, dtype=dtype) * torch.logspace(-5, 0, 20_000)[torch.randperm(20_000)]
        x[5000:5128] = 0
        sums, before = torch.zeros(20_000, dtype=torch.float64), None
        codes_of_x, scale = _precision.encode(x)
        for seed in range(1, count + 1):
            (p,), optimizer = make("SGD", [torch.zeros_like(x)], state_dtype="8bit", stochastic_rounding=seed)
            give([p], [x])
            optimizer.step()
            codes, scales = (optimizer.state[p]["momentum_buffer" + end] for end in ("", "_scale"))
            torch.testing.assert_close(scales, scale)
            assert (codes.int() - codes_of_x.int()).abs().max() <= 1
            assert before is None or not torch.equal(codes, before)
            before = codes
            sums += _precision.decode(codes, scales).double()
        scales = scale.double().repeat_interleave(_precision.BLOCK)[: len(x)]
        share = (x.double() / scales.clamp_min(1e-300)).abs()
        root = 127 * share.pow(1 / 3)
        low = root.floor()
        part = (share * 127**3 - low**3) / (3 * low**2 + 3 * low + 1)  # of the way to the next code
        gap = (3 * low**2 + 3 * low + 1) / 127**3 * scales
        error = (part * (1 - part) / count).clamp_min(0).sqrt() * gap
        counts = (root >= 1) & (part * (1 - part) * count > 9)  # where a mean of counts is near to a normal one
        assert counts.sum() > 5000
        deviation = ((sums / count - x.double()) / error)[counts]
        assert deviation.abs().max() < 6 and abs(deviation.mean()) < 5 / counts.sum() ** 0.5
        assert 0.95 < deviation.square().mean() < 1.05
        exact = (sums / count - x.double()).abs() <= 6 * error + (9 / count) * gap + 127**-3 * scales
        assert exact.all()

    def test_moments_follow(self):
        """Gradients that fall to a tenth beside others that stay or rise: second moments rounded to nearest stay where
        they were, rounded at random they are those of float32 on average."""
        n = 128 * 100
        kinds = torch.arange(n) % 3
        base = torch.rand(n) + 0.1
        eight = {"state_dtype": "8bit"}
        kept = ({}, eight, eight | {"stochastic_rounding": True})
        ((p,), full), ((q,), near), ((r,), random) = (make("Adam", [torch.zeros(n)], **options) for options in kept)
        for step in range(2500):
            factors = torch.tensor([1.0, max(0.1, 1 - step / 500), min(1.0, 0.1 + step / 500)])
            give([p, q, r], [torch.randn(n) * base * factors[kinds]] * 3)
            for optimizer in (full, near, random):
                optimizer.step()

        def ratios(optimizer, x):
            state = optimizer.state[x]
            ratio = _precision.decode(state["exp_avg_sq"], state["exp_avg_sq_scale"]) / full.state[p]["exp_avg_sq"]
            return [ratio[kinds == kind].mean().item() for kind in range(3)]

        assert ratios(near, q)[1] > 3 and ratios(near, q)[2] < 0.7
        assert all(abs(ratio - 1) < 0.03 for ratio in ratios(random, r))
        apart = [((x - p).norm() / p.norm()).item() for x in (q, r)]
        assert apart[1] < 0.5 * apart[0]

    @pytest.mark.parametrize("name", COARSE)
    def test_reproducible(self, name):
        """For any number of threads; and another seed is another stream."""
        values = [torch.randn(n) for n in (4096, 9001, 128 * 2000)]
        grads = [[torch.randn_like(v) for v in values] for _ in range(4)]

        def run(seed, threads):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                params, optimizer = make(name, values, state_dtype="8bit", stochastic_rounding=seed)
                for of_step in grads:
                    give(params, of_step)
                    optimizer.step()
            finally:
                torch.set_num_threads(before)
            return [p.detach() for p in params]

        one = run(1, 1)
        assert all(map(torch.equal, one, run(True, 2)))
        assert not any(map(torch.equal, one, run(2, 2)))
