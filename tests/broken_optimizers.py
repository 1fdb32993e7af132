"""A small optimizer that passes every conformance check, and faults planted in it one at a time."""

import copy
import ctypes

import torch


class Plain(torch.optim.Optimizer):
    """Momentum SGD as a for-loop."""

    def __init__(self, params, lr=0.1, momentum=0.9):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update()
        return loss

    @torch.no_grad()
    def update(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update_one(group, p, p.grad)

    def update_one(self, group, p, g):
        buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
        buffer.mul_(group["momentum"]).add_(g.to(p.dtype))
        self.move(group, p, buffer)

    def move(self, group, p, direction):
        p.sub_(direction * group["lr"])

    def load_state_dict(self, state_dict):
        super().load_state_dict(copy.deepcopy(state_dict))


class HidesFromAutograd(Plain):
    def move(self, group, p, direction):
        p.data.sub_(direction * group["lr"])


class TakesStridesForContiguous(Plain):
    def move(self, group, p, direction):
        if p.dtype == torch.float32 and not p.is_contiguous():
            p, direction = (t.as_strided((t.numel(),), (1,), t.storage_offset()) for t in (p, direction))
        super().move(group, p, direction)


class HidesNaN(Plain):
    def update_one(self, group, p, g):
        super().update_one(group, p, g.nan_to_num(nan=0.0))


class WarmsUpAllTogether(Plain):
    """The step's size follows one count for all parameters."""

    def update_one(self, group, p, g):
        group["k"] = group.get("k", 0) + 1
        super().update_one({**group, "lr": group["lr"] / group["k"]}, p, g)


class IgnoresTheClosure(Plain):
    def step(self, closure=None):
        self.update()


class CallsTheClosureTwice(Plain):
    def step(self, closure=None):
        loss = None
        for _ in range(2 if closure is not None else 0):
            with torch.enable_grad():
                loss = closure()
        self.update()
        return loss


class FiresHooksTwice(Plain):
    def step(self, closure=None):
        return super().step(closure)


class KeepsStateElsewhere(Plain):
    """In an attribute by position, which copies and checkpoints leave behind."""

    def update_one(self, group, p, g):
        position = [id(q) for other in self.param_groups for q in other["params"]].index(id(p))
        buffer = self.__dict__.setdefault("_buffers", {}).setdefault(position, torch.zeros_like(p))
        buffer.mul_(group["momentum"]).add_(g.to(p.dtype))
        self.move(group, p, buffer)


class SharesLoadedStates(Plain):
    def load_state_dict(self, state_dict):
        torch.optim.Optimizer.load_state_dict(self, state_dict)


class LeavesBfloat16(Plain):
    def move(self, group, p, direction):
        if p.dtype != torch.bfloat16:
            super().move(group, p, direction)


class CountsThreads(Plain):
    def move(self, group, p, direction):
        super().move(group, p, direction * (1 + 1e-3 * torch.get_num_threads()))


class CompilesEveryStepAnew(Plain):
    def move(self, group, p, direction):
        group["k"] = group.get("k", 0) + 1
        for _ in range(group["k"]):
            direction = direction + 0.0
        super().move(group, p, direction)


class WritesTheGradient(Plain):
    def update_one(self, group, p, g):
        super().update_one(group, p, g.mul_(2.0))


class RoundsCoarsely(Plain):
    def move(self, group, p, direction):
        super().move(group, p, direction * (1 - 1e-4 * (p.dtype == torch.float32)))


class TakesStepsThatOverflow(Plain):
    _step_supports_amp_scaling = True


class KnowsTheFirstGroupAlone(Plain):
    @torch.no_grad()
    def update(self):
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                self.update_one(self.param_groups[0], p, p.grad)


class ListsWhatRequiresGradients(Plain):
    """Once, at its first step."""

    @torch.no_grad()
    def update(self):
        listed = self.__dict__.setdefault("_listed", {})
        for i, group in enumerate(self.param_groups):
            for j, p in enumerate(group["params"]):
                if listed.setdefault((i, j), p.requires_grad) and p.grad is not None:
                    self.update_one(group, p, p.grad)


class TakesNoGradientForZeros(Plain):
    @torch.no_grad()
    def update(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.update_one(group, p, torch.zeros_like(p) if p.grad is None else p.grad)


class KeepsItsFirstRate(Plain):
    def move(self, group, p, direction):
        super().move({"lr": self.defaults["lr"]}, p, direction)


class KeepsItsFirstMomentum(Plain):
    def update_one(self, group, p, g):
        super().update_one({**group, "momentum": self.defaults["momentum"]}, p, g)


class LoadsStatesAlone(Plain):
    def load_state_dict(self, state_dict):
        groups = [{key: value for key, value in g.items() if key != "params"} for g in self.param_groups]
        super().load_state_dict(state_dict)
        for group, own in zip(self.param_groups, groups):
            group.update(own)


class Exits(Plain):
    def step(self, closure=None):
        raise SystemExit(3)


class NeedsAClosure(Plain):
    def step(self, closure):
        return super().step(closure)


class Crashes(Plain):
    """Reads address 0 where a tensor is empty."""

    def update_one(self, group, p, g):
        if p.numel() == 0:
            ctypes.string_at(0)
        super().update_one(group, p, g)
