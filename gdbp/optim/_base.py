"""What every fused optimizer shares: its extra arguments, its state, and the plan that steps a group.

An optimizer here is torch's own class (constructor, error texts, param_groups, state_dict) with one other
``step``. It says which update rule a group takes; csrc/optim does the rest.
"""

import inspect
from typing import Any, ClassVar, NamedTuple

import torch

from gdbp import _load, reference
from gdbp.ops._function import is_fused

if _load.available:
    from gdbp import _C


class Update(NamedTuple):
    """An update rule as a group's options choose it."""

    rule: str  # a name of GDBP_OPTIM_RULES in csrc/optim/optim_math.h
    states: tuple[str, ...]  # keys of the state tensors, in the rule's order
    hyper: tuple[float, ...]  # the rule's own hyper-parameters, in its order
    counts_steps: bool = True  # whether torch keeps a "step" for this optimizer
    decoupled: bool = False  # whether weight_decay shrinks the parameter itself


_EXTRAS = (
    inspect.Parameter("l1", inspect.Parameter.KEYWORD_ONLY, default=0.0, annotation=float),
    inspect.Parameter("l1_mode", inspect.Parameter.KEYWORD_ONLY, default="subgradient", annotation=str),
    inspect.Parameter("clip_value", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=float | None),
)


class Fused(torch.optim.Optimizer):
    """Base of the fused optimizers; stands before torch's class in the list of bases.

    Keyword-only arguments beyond torch's, all off by default, each also an option of a param group:

    Args:
        l1: strength of L1 regularisation (L2 is ``weight_decay``).
        l1_mode: "subgradient" adds ``l1 * sign(p)`` to the gradient; "prox" moves every parameter by ``lr * l1``
            towards 0 after the update and stops there, which gives exact zeros (Beck and Teboulle, 2009).
        clip_value: largest absolute value of an element of a gradient; ``.grad`` itself is untouched.

    ``foreach`` and ``fused`` are accepted for torch's sake and change nothing: there is one implementation.
    Groups with ``capturable`` or ``differentiable`` are stepped by torch's own class.
    """

    _step_supports_amp_scaling = False
    _torch_class: ClassVar[type]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls._torch_class = next(base for base in cls.__mro__ if base.__module__.startswith("torch.optim."))
        signature = inspect.signature(cls._torch_class)
        cls.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *_EXTRAS])

    def __init__(
        self,
        params,
        *args,
        l1: float = 0.0,
        l1_mode: str = "subgradient",
        clip_value: float | None = None,
        **kwargs,
    ):
        extras = {"l1": l1, "l1_mode": l1_mode, "clip_value": clip_value}
        _check_extras(extras)
        super().__init__(params, *args, **kwargs)
        # torch's fused=True promises GradScaler that the step unscales; ours leaves that to the scaler.
        self._step_supports_amp_scaling = False
        self.defaults.update(extras)
        for group in self.param_groups:
            _set_extras(group, extras)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        # While torch's constructor runs, the defaults of ours are not there yet.
        if "l1" in self.defaults:
            _set_extras(self.param_groups[-1], self.defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._step_supports_amp_scaling = False
        for group in self.param_groups:
            _set_extras(group, self.defaults)

    def _update(self, group: dict[str, Any]) -> Update:
        raise NotImplementedError

    def step(self, closure=None):
        """Update every parameter that has a gradient.

        Args:
            closure: optional; recomputes the loss and the gradients, is called once before the update, and
                its result is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if any(group.get("capturable") or group.get("differentiable") for group in self.param_groups):
            self._step_torch()
            return loss
        plans = self.__dict__.setdefault("_plans", {})
        for index, group in enumerate(self.param_groups):
            update = self._update(group)
            hyper = _hyper(group, update)
            plan = plans.get(index)
            # A plan that no longer fits says so, and another is made; then it fits.
            if plan is None or not plan.step(group["params"], self.state, update.rule, hyper):
                plans[index] = plan = self._plan(group, update)
                plan.step(group["params"], self.state, update.rule, hyper)
        return loss

    @torch.no_grad()
    def _plan(self, group: dict[str, Any], update: Update):
        """Creates the states that are missing and returns what will step the group from now on."""
        fresh = []
        for i, p in enumerate(group["params"]):
            if p.grad is None or not update.states:
                continue
            state = self.state[p]
            if update.counts_steps:
                state["step"] = _count(state.get("step", 0.0))
            for key in update.states:
                if state.get(key) is None:
                    state[key] = torch.zeros_like(p, memory_format=torch.preserve_format)
                    fresh.append(i)
        args = (update.rule, group["params"], self.state, update.states, update.counts_steps and bool(update.states))
        if _load.available and all(map(is_fused, group["params"])):
            return _C.StepPlan(*args, fresh)
        return _ReferencePlan(*args, fresh)

    def _step_torch(self) -> None:
        if any(group["l1"] or group["clip_value"] is not None for group in self.param_groups):
            raise RuntimeError(
                f"{type(self).__name__}: l1 and clip_value do not go with capturable or differentiable, which "
                "torch's own step computes; switch one of them off"
            )
        # Without the wrapper that fires hooks: ours has fired them.
        step = self._torch_class.step
        step = step.__wrapped__ if getattr(step, "hooked", False) else step
        step(self)


class _ReferencePlan:
    """Steps a group in plain torch, where our kernels cannot; the interface of StepPlan."""

    def __init__(self, rule, params, state, keys, counts_steps, fresh):
        self.known = (rule, list(map(id, params)), id(state))
        self.keys, self.counts_steps, self.fresh = keys, counts_steps, set(fresh)

    def step(self, params, state, rule, hyper) -> bool:
        if self.known != (rule, list(map(id, params)), id(state)):
            return False
        stepped = [i for i, p in enumerate(params) if p.grad is not None]
        if any(state.get(params[i], {}).get(key) is None for i in stepped for key in self.keys):
            return False
        counts = [2 - (i in self.fresh) for i in stepped]
        if self.counts_steps:
            counts = [int(state[params[i]]["step"].item()) + 1 for i in stepped]
        reference.optim_step_(
            [params[i] for i in stepped],
            [params[i].grad for i in stepped],
            [[state[params[i]][key] for i in stepped] for key in self.keys],
            rule,
            hyper,
            counts,
        )
        for i in stepped if self.counts_steps else ():
            state[params[i]]["step"] += 1
        self.fresh.difference_update(stepped)
        return True


def _check_extras(extras: dict[str, Any]) -> None:
    l1, mode, clip = extras["l1"], extras["l1_mode"], extras["clip_value"]
    if not l1 >= 0.0:
        raise ValueError(f"Invalid l1 value: {l1}; expected a number >= 0")
    if mode not in ("subgradient", "prox"):
        raise ValueError(f"Invalid l1_mode: {mode!r}; expected 'subgradient' or 'prox'")
    if clip is not None and not clip > 0.0:
        raise ValueError(f"Invalid clip_value: {clip}; expected a number > 0, or None for no clipping")


def _set_extras(group: dict[str, Any], defaults: dict[str, Any]) -> None:
    for parameter in _EXTRAS:
        group.setdefault(parameter.name, defaults.get(parameter.name, parameter.default))
    _check_extras(group)


def _hyper(group: dict[str, Any], update: Update) -> list[float]:
    """The group's hyper-parameters in the order of struct Hyper in csrc/optim/optim_math.h."""
    clip = group["clip_value"]
    return [
        float(group["lr"]),
        float(group["weight_decay"]),
        float(update.decoupled),
        float(group["maximize"]),
        float(group["l1"]),
        float(group["l1_mode"] == "prox"),
        float("inf") if clip is None else float(clip),
        1.0,
        *map(float, update.hyper),
    ]


def _count(step: torch.Tensor | float) -> torch.Tensor:
    """A step count as torch keeps it where nothing is captured: a 0-dim tensor on the CPU."""
    if isinstance(step, torch.Tensor):
        return step.cpu()
    return torch.tensor(float(step), dtype=torch.float64 if torch.get_default_dtype() is torch.float64 else torch.float32)
