"""What an optimizer does to the gradients on the way: L1, clipping by value and by norm, skipping."""

import copy

import pytest
import torch

import gdbp
from tests.optimizers import NAMES, SIZES, error, give, torch_optimizer


@pytest.mark.parametrize("name", NAMES)
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


class TestNorm:
    """Clipping by the global norm and skipping, decided by one read of the gradients."""

    def groups(self, dtype=torch.float32):
        values = [torch.randn(size).to(dtype) for size in SIZES]
        params = [v.clone().requires_grad_() for v in values]
        give(params, [torch.randn_like(v) for v in values])
        return params, [{"params": params[::2]}, {"params": params[1::2], "weight_decay": 0.1}]

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e9])
    def test_is_clip_grad_norm_and_step(self, name, max_norm):
        params, groups = self.groups(torch.float64)
        twins = [p.detach().clone().requires_grad_() for p in params]
        give(twins, [p.grad for p in params])
        kept = [p.grad.clone() for p in params]
        optimizer = getattr(gdbp.optim, name)(groups, lr=0.1, max_grad_norm=max_norm)
        twin_groups = [{"params": twins[::2]}, {"params": twins[1::2], "weight_decay": 0.1}]
        twin = torch_optimizer(name, twin_groups, lr=0.1)
        for _ in range(3):
            optimizer.step()
            give(twins, kept)
            norm = torch.nn.utils.clip_grad_norm_(twins, max_norm)
            twin.step()
            torch.testing.assert_close(optimizer.grad_norm, norm, rtol=1e-13, atol=0)
        assert all(map(torch.equal, kept, [p.grad for p in params])), "gradients stay"
        assert error(params, twins) <= 1e-12

    def test_norm_of_half_types(self):
        """Neither overflow nor lost digits: torch's norms of these are infinity and 1.734."""
        for dtype, value, count, norm in ((torch.float16, 6e4, 4, 1.2e5), (torch.bfloat16, 1.0, 3, 3**0.5)):
            p = torch.zeros(count, dtype=dtype, requires_grad=True)
            p.grad = torch.full((count,), value, dtype=dtype)
            optimizer = gdbp.optim.SGD([p], lr=0.0, max_grad_norm=1.0)
            optimizer.step()
            expected = p.grad.double().norm()
            torch.testing.assert_close(optimizer.grad_norm, expected, rtol=1e-15, atol=0)
            assert abs(expected - norm) < 0.01 * norm

    def test_huge_and_tiny(self):
        for value in (3e38, 1e-45):
            p = torch.zeros(3, requires_grad=True)
            p.grad = torch.full((3,), value)
            optimizer = gdbp.optim.SGD([p], lr=1.0, max_grad_norm=1.0)
            optimizer.step()
            torch.testing.assert_close(optimizer.grad_norm.item(), p.grad.double().norm().item(), rtol=1e-14, atol=0)
        assert optimizer.grad_norm > 0

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("name", NAMES)
    def test_skip_nonfinite(self, name, bad):
        params, groups = self.groups()
        optimizer = getattr(gdbp.optim, name)(groups, lr=0.1, skip_nonfinite=True)
        good = [p.grad for p in params]
        for turn in range(3):
            give(params, good)
            if turn != 1:
                params[5].grad.view(-1)[0] = bad
            before = copy.deepcopy((params, optimizer.state_dict()["state"]))
            optimizer.step()
            if turn == 1:
                assert not torch.equal(params[5], before[0][5])
                continue
            assert all(map(torch.equal, params, before[0]))
            for index, state in before[1].items():
                for key, value in state.items():
                    assert torch.equal(optimizer.state_dict()["state"][index][key], value)
            assert not torch.isfinite(optimizer.grad_norm)

    def test_skipped_first_step_leaves_momentum_fresh(self):
        p = torch.zeros(4, requires_grad=True)
        optimizer = gdbp.optim.SGD([p], lr=1.0, momentum=0.9, dampening=0.5, skip_nonfinite=True)
        for grad in (float("inf"), 1.0):
            p.grad = torch.full((4,), grad)
            optimizer.step()
        assert torch.equal(p.detach(), -torch.ones(4)), "the first gradient that counts is not dampened"

    def test_nothing_to_measure(self):
        p = torch.zeros(4, requires_grad=True)
        optimizer = gdbp.optim.SGD([p], max_grad_norm=1.0)
        assert optimizer.grad_norm is None
        optimizer.step()
        assert optimizer.grad_norm == 0
        optimizer.max_grad_norm = None
        optimizer.step()
        assert optimizer.grad_norm is None

    def test_bitwise_for_any_thread_count(self):
        p = torch.zeros(1_000_003, requires_grad=True)
        p.grad = torch.randn(1_000_003)
        optimizer = gdbp.optim.SGD([p], lr=0.0, max_grad_norm=1.0)
        threads, norms = torch.get_num_threads(), []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                optimizer.step()
                norms.append(optimizer.grad_norm.item())
        finally:
            torch.set_num_threads(threads)
        assert len(set(norms)) == 1

    def test_survives_copies_and_is_no_group_option(self):
        optimizer = gdbp.optim.SGD([torch.nn.Parameter(torch.zeros(1))], max_grad_norm=2.0, skip_nonfinite=True)
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
        twin = copy.deepcopy(optimizer)
        assert twin.max_grad_norm == 2.0 and twin.skip_nonfinite
        assert all("max_grad_norm" not in group for group in optimizer.param_groups)

    def test_refuses(self):
        for value in (0.0, -1.0, float("nan")):
            with pytest.raises(ValueError, match="Invalid max_grad_norm"):
                gdbp.optim.SGD([torch.nn.Parameter(torch.zeros(1))], max_grad_norm=value)
