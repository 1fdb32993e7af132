"""Loading a state, and the trial step by which torch.distributed.checkpoint asks for an empty one."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from gdbp.ops import grad
from gdbp.ops._distributed import is_distributed
from gdbp.optim._precision import decode, encode


def count_tensor(count: Tensor | float) -> Tensor:
    """A step count as torch keeps it where nothing is captured: a 0-dim float tensor on the CPU."""
    if not isinstance(count, Tensor):
        wide = torch.get_default_dtype() is torch.float64
        return torch.tensor(float(count), dtype=torch.float64 if wide else torch.float32, device="cpu")
    return count.to("cpu", count.dtype if count.dtype in (torch.float32, torch.float64) else torch.float32)


def load_state_dict(optimizer: torch.optim.Optimizer, load, state_dict: dict[str, Any], options: Sequence[str]) -> None:
    """What ``load``, torch's own, does, except that states keep their dtypes and are copied.

    torch casts every state to its parameter's dtype and shares the tensors that fit. So it gets to see no
    state: a last hook before it takes the states away, and a first hook after it puts copies back. The hooks
    that users registered run where they always do. options: of a group, that torch's classes do not have.
    """
    taken: dict[str, Any] = {}

    def take(_, seen):
        taken.update(seen)
        # torch's own groups have none of our options: a group keeps those that it had.
        groups = [
            {**{name: own[name] for name in options if name in own}, **saved}
            for own, saved in zip(optimizer.param_groups, seen["param_groups"], strict=False)
        ]
        return {**seen, "state": {}, "param_groups": groups + seen["param_groups"][len(groups) :]}

    def put(_):
        _put_states(optimizer, taken)

    before = optimizer.register_load_state_dict_pre_hook(take)
    after = optimizer.register_load_state_dict_post_hook(put, prepend=True)
    try:
        load(state_dict)
    finally:
        before.remove()
        after.remove()


@torch.no_grad()
def _put_states(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    owners = {}
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        counts = {"step", *(key for key, _ in optimizer._update(group).counts)}
        for index, p in zip(saved["params"], group["params"], strict=True):
            owners[index] = p, counts, group.get("capturable", False) and p.device.type != "cpu"
    for index, state in state_dict["state"].items():
        # What belongs to no parameter is torch's users' own, and stays what it is.
        if index not in owners or not isinstance(state, dict):
            optimizer.state[index] = state
            continue
        p, counts, captured = owners[index]
        own = {key: _copied(key, value, p, counts, captured) for key, value in state.items()}
        for key in [key for key, value in state.items() if f"{key}_scale" in state and isinstance(value, Tensor)]:
            # Blocks of 8-bit numbers follow one another in memory, so that another layout has other blocks.
            if own[key].stride() != state[key].stride():
                wide = decode(state[key], state[f"{key}_scale"])
                own[key], own[f"{key}_scale"] = encode(like_param(wide, p))
        optimizer.state[p] = own


def _copied(key: str, value: Any, p: Tensor, counts: set[str], captured: bool) -> Any:
    if key in counts:
        count = count_tensor(value)
        return count.to(p.device, torch.float32) if captured else count.clone()
    if isinstance(value, Tensor):
        return like_param(value, p)
    if isinstance(value, dict):
        return {k: _copied(k, v, p, set(), captured) for k, v in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return type(value)(_copied("", v, p, set(), captured) for v in value)
    return value


def like_param(value: Tensor, p: Tensor) -> Tensor:
    """A copy of ``value``, in its own dtype, that lies in memory and over the ranks as the parameter does."""
    if value.shape != p.shape:
        return value.detach().to(p.device, copy=True)
    if is_distributed(p):
        if is_distributed(value):
            value = value.redistribute(p.device_mesh, p.placements)
        else:
            from torch.distributed.tensor import distribute_tensor

            # Every rank holds the whole of it, so that none has to send.
            value = distribute_tensor(value.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
    elif is_distributed(value):
        value = value.full_tensor()
    return torch.empty_like(p, dtype=value.dtype, requires_grad=False).copy_(value)


def is_trial(optimizer: torch.optim.Optimizer) -> bool:
    """Whether this step is torch.distributed.checkpoint's, which wants states and no update: it sets lr to 0
    and all gradients to zero, and there is no state yet. A warm-up from lr = 0 has gradients."""
    if any(optimizer.state.get(p) for group in optimizer.param_groups for p in group["params"]):
        return False
    for group in optimizer.param_groups:
        lr = group["lr"]
        # One that is elsewhere is the user's: the trial's is on the CPU, and reading others would wait for them.
        if (isinstance(lr, Tensor) and not lr.is_cpu) or lr != 0:
            return False
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not all(g.layout is torch.strided for g in grads):
        return False
    # Over all ranks, each of which may hold nothing but zeros.
    return bool(grad.norm(grads, float("inf"))[0] == 0)
