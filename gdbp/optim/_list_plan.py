"""The step where C++ cannot hold the tensors: tensor subclasses, devices without kernels, no compiled part."""

from collections import defaultdict

import torch

from gdbp.ops import grad, optim
from gdbp.ops._distributed import is_distributed, local, spread_like

# As csrc/optim/optim.cpp has it.
_SPARSE = (
    "optimizer step: a gradient is sparse; expected a dense one; "
    "use torch.optim.SparseAdam or SGD, or set sparse=False in the embedding"
)


class ListPlan:
    """The interface of the compiled StepPlan, over lists that are gathered anew at every step."""

    def __init__(self, groups, state, roles, fresh):
        # References and not ids, which other objects could come to have.
        self._state = state
        self._groups = [(rule, list(params)) for params, rule, _ in groups]
        self._keys = [[key for role, key in kept if role == "state"] for kept in roles]
        self._counts = [[key for role, key in kept if role == "count"] for kept in roles]
        self._fresh = [set(positions) for positions in fresh]
        self._work = []

    def _is_for(self, groups, state) -> bool:
        return (
            state is self._state
            and [rule for _, rule, _ in groups] == [rule for rule, _ in self._groups]
            and all(
                len(params) == len(known) and all(p is q for p, q in zip(params, known))
                for (params, _, _), (_, known) in zip(groups, self._groups)
            )
        )

    @torch.no_grad()
    def collect(self, groups, state) -> bool:
        self._work = []
        if not self._is_for(groups, state):
            return False
        for g, (params, rule, hyper) in enumerate(groups):
            names = (*self._keys[g], *self._counts[g])
            for i, p in enumerate(params):
                if p.grad is None:
                    continue
                if p.grad.layout is not torch.strided:  # now, while no other parameter has been stepped
                    raise RuntimeError(_SPARSE)
                own = [state[p].get(name) for name in names] if names else []
                if any(value is None for value in own):
                    return False
                self._work.append((g, i, rule, hyper, p, spread_like(p.grad, p), own))
        return True

    def step(self, groups, state) -> bool:
        return self.collect(groups, state) and self.run(None, False)

    def norm(self, max_norm: float, scale: float, skip_nonfinite: bool) -> torch.Tensor:
        return grad.norm([gradient for *_, gradient, _ in self._work], max_norm, scale, skip_nonfinite)

    @torch.no_grad()
    def run(self, norm: torch.Tensor | None, may_skip: bool) -> bool:
        if norm is not None and may_skip and norm[2]:
            self._work = []
            return False
        # One call for as many as go together; a parameter that stands twice in a group is stepped twice, as in torch.
        batches = defaultdict(list)
        seen: dict[tuple[int, int], int] = defaultdict(int)
        for item in self._work:
            g, p = item[0], item[4]
            seen[g, id(p)] += 1
            batches[g, p.device, seen[g, id(p)]].append(item)
        for (g, device, _), items in batches.items():
            indices, params, grads, owns = ([item[k] for item in items] for k in (1, 4, 5, 6))
            states = len(self._keys[g])
            kinds = list(zip(*owns))
            optim.step_(
                list(map(local, params)),
                list(map(local, grads)),
                [local(t) for kind in kinds[:states] for t in kind],
                [t for kind in kinds[states:] for t in kind],
                *items[0][2:4],
                fresh=[i in self._fresh[g] for i in indices],
                norm=None if norm is None else norm.to(device),
            )
            # The kernel bumped the versions of the parts; a graph may have saved the whole.
            torch.autograd.graph.increment_version([t for own in (params, *owns) for t in own if is_distributed(t)])
            self._fresh[g].difference_update(indices)
        self._work = []
        return True
