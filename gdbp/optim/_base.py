"""What every fused optimizer shares: its extra arguments, its state, and the plan that steps a group.

An optimizer here is torch's own class (constructor, error texts, param_groups, state_dict) with one other
``step``. It says which update rule a group takes; csrc/optim does the rest.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch.optim import optimizer as of_all

from gdbp import _load
from gdbp.ops._function import is_fused
from gdbp.optim import _amp, _checkpoint, _compile
from gdbp.optim._list_plan import ListPlan
from gdbp.optim._options import (
    EXTRAS,
    STEP_EXTRAS,
    check_extras,
    check_max_grad_norm,
    check_switches,
    set_extras,
)
from gdbp.optim._precision import Precision

if _load.available:
    from gdbp import _C


# Which others may have replaced, to be called by all optimizers.
_TORCHS_ZERO_GRAD = torch.optim.Optimizer.zero_grad


# Significant bits of states: of 255 codes, those around which the gaps are a fortieth.
_BITS = {"8bit": 6, torch.bfloat16: 8, torch.float16: 11}
# Keys of states that are squares.
_SQUARES = frozenset(("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "acc_delta"))


class Update(NamedTuple):
    """An update rule as a group's options choose it."""

    rule: str  # a name of GDBP_OPTIM_RULES in csrc/optim/optim_math.h
    states: tuple[str, ...] = ()  # keys of the state tensors, in the rule's order
    hyper: tuple[float, ...] = ()  # the rule's own hyper-parameters, in its order
    # Numbers that torch keeps for each parameter as 0-dim tensors on the CPU, with their first values.
    counts: tuple[tuple[str, float], ...] = (("step", 0.0),)
    decoupled: bool = False  # whether weight_decay shrinks the parameter itself
    initial: float = 0.0  # what every element of a state starts at
    bits: int = 0  # how many significant ones its states need
    too_fine: str = ""  # why so many


class Fused(torch.optim.Optimizer):
    """Base of the fused optimizers; stands before torch's class in the list of bases.

    Keyword-only arguments beyond torch's, all off by default, each also an option of a param group:

    Args:
        l1: strength of L1 regularisation (L2 is ``weight_decay``).
        l1_mode: "subgradient" adds ``l1 * sign(p)`` to the gradient; "prox" moves every parameter by ``lr * l1``
            towards 0 after the update and stops there, which gives exact zeros (Beck and Teboulle, 2009).
        clip_value: largest absolute value of an element of a gradient; ``.grad`` itself is untouched.

        max_grad_norm: largest 2-norm of all gradients together: one more read of them, and the factor is applied
            in the update, so ``.grad`` is untouched. ``grad_norm`` then holds the norm.
        skip_nonfinite: leave parameters and states as they are when a gradient is not finite.
        amp_fused: have ``torch.amp.GradScaler`` leave unscaling and skipping to the step, which does both in its pass
            (with torch's classes ``fused=True`` implies it). Code that asks the scaler's ``unscale_`` for clipping, or
            looks for skipped steps in another way than ``found_inf``, does not expect that: off by default.

        master_weights: keep a float32 original of every bfloat16 or float16 parameter, and float32 states: the
            parameter is its rounded copy, written in the same pass.
        stochastic_rounding: round bfloat16 parameters and 8-bit states up or down at random, in proportion, so that
            small updates are not lost; True, or a seed > 0. A function of the seed, the parameter's position, the step
            and the element: reproducible for any number of threads.
        state_dtype: dtype of the states, None for the parameter's; "8bit" for blocks of 8-bit numbers with a common
            scale (states of fewer than 4096 elements stay float32), which torch's classes cannot read. They are
            rounded to the nearest of 255, and what changes by less than half the way to the next one stays: a second
            moment, of which a step moves a thousandth, follows gradients only where they grow several times larger,
            or fall together with those of its 127 neighbours. With ``stochastic_rounding`` it follows them on average,
            and a step takes 1.5 to 1.8 times as long on the CPU.
            A state that is not finite takes its neighbours along. Adadelta needs more digits and refuses them, centered
            RMSprop all but float32 and float64; float16, in which squares of small gradients are 0, is refused where
            squares are kept. None is torch's choice, and so is what a checkpoint has.
        ema_decay: keep an exponential moving average of the parameters, ``ema = decay * ema + (1 - decay) * p``,
            started at the parameters as first stepped; see :meth:`ema_parameters`.
        copy_dtype: write every new parameter also into a copy of this dtype, for a forward pass in low precision;
            see :meth:`copied_parameters`.

    From max_grad_norm on these are the optimizer's, and refused in a group. ``max_grad_norm`` and ``skip_nonfinite``
    can be changed later through the attributes of their names. A master follows what is written into its parameter,
    but for what is written through ``.data``, of which nobody is told.

    ``foreach`` and ``fused`` are accepted for torch's sake and change nothing: there is one implementation.
    Groups with ``capturable`` (on the CPU it changes nothing) or ``differentiable`` are stepped by torch's own class.
    """

    _step_supports_amp_scaling = False
    _torch_class: ClassVar[type]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            return
        cls._torch_class = next(base for base in cls.__mro__ if base.__module__.startswith("torch.optim."))
        signature = inspect.signature(cls._torch_class)
        cls.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *EXTRAS, *STEP_EXTRAS])

    def __init__(
        self,
        params,
        *args,
        l1: float = 0.0,
        l1_mode: str = "subgradient",
        clip_value: float | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        amp_fused: bool = False,
        master_weights: bool = False,
        stochastic_rounding: bool | int = False,
        state_dtype: torch.dtype | str | None = None,
        ema_decay: float | None = None,
        copy_dtype: torch.dtype | None = None,
        **kwargs,
    ):
        extras = {"l1": l1, "l1_mode": l1_mode, "clip_value": clip_value}
        check_extras(extras)
        check_max_grad_norm(max_grad_norm)
        check_switches(skip_nonfinite=skip_nonfinite, amp_fused=amp_fused, master_weights=master_weights)
        precision = Precision(master_weights, stochastic_rounding, state_dtype, ema_decay, copy_dtype)
        precision.check()
        super().__init__(params, *args, **kwargs)
        # This tells GradScaler that the step unscales, which torch's fused=True promises without being asked.
        self._step_supports_amp_scaling = bool(amp_fused)
        # In a dict, as Dynamo drops what a traced step assigns to an optimizer's attributes.
        self._last: dict[str, Any] = {"grad_norm": None}
        self.defaults.update(extras)
        self.max_grad_norm = max_grad_norm
        self.skip_nonfinite = skip_nonfinite
        self.defaults["amp_fused"] = bool(amp_fused)
        self.defaults.update(precision._asdict())
        for group in self.param_groups:
            set_extras(group, extras)
            self._check_digits(self._update(group))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        for option in STEP_EXTRAS:
            if isinstance(param_group, dict) and option.name in param_group:
                raise ValueError(
                    f"{option.name} is in a param group, with {param_group[option.name]!r}; expected it as an argument "
                    f"of {type(self).__name__}, for all groups"
                )
        super().add_param_group(param_group)
        for option in STEP_EXTRAS:
            self.param_groups[-1].pop(option.name, None)
        # While torch's constructor runs, the defaults of ours are not there yet.
        if "l1" in self.defaults:
            try:
                set_extras(self.param_groups[-1], self.defaults)
                self._check_digits(self._update(self.param_groups[-1]))
            except (ValueError, TypeError):
                del self.param_groups[-1]
                raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_last", {"grad_norm": None})
        self._step_supports_amp_scaling = self.defaults.get("amp_fused", False)
        for group in self.param_groups:
            set_extras(group, self.defaults)

    # Kept in `defaults`, which copies and pickles of an optimizer carry.
    @property
    def max_grad_norm(self) -> float | None:
        """Largest 2-norm of all gradients together, or None for no clipping."""
        return self.defaults.get("max_grad_norm")

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        check_max_grad_norm(value)
        self.defaults["max_grad_norm"] = value

    @property
    def skip_nonfinite(self) -> bool:
        """Whether a gradient that is not finite makes the step do nothing."""
        return self.defaults.get("skip_nonfinite", False)

    @skip_nonfinite.setter
    def skip_nonfinite(self, value: bool) -> None:
        self.defaults["skip_nonfinite"] = bool(value)

    @property
    def grad_norm(self) -> torch.Tensor | None:
        """2-norm of all gradients at the last step, before clipping: a 0-dim float64 tensor on their device, or
        None where neither max_grad_norm nor skip_nonfinite asked for it."""
        return self._last["grad_norm"]

    def _check_digits(self, update: Update) -> None:
        dtype, why = self._precision.state_dtype, ""
        if update.bits > _BITS.get(dtype, 53):
            why = update.too_fine
        elif dtype is torch.float16 and not _SQUARES.isdisjoint(update.states):
            why = "whose squares of gradients below 2e-4 would be 0"
        if why:
            raise ValueError(f"Invalid state_dtype: {dtype!r} for {type(self).__name__}, {why}; expected torch.float32")

    @property
    def _precision(self) -> Precision:
        return Precision(*(self.defaults.get(name, default) for name, default in Precision._field_defaults.items()))

    def ema_parameters(self) -> Iterator[torch.Tensor]:
        """The moving averages, in the order of the parameters; a parameter that was never stepped stands for itself.

        Raises:
            ValueError: without ``ema_decay``.
        """
        if self._precision.ema_decay is None:
            raise ValueError(f"there are no averages: make the {type(self).__name__} with ema_decay=0.999, say")
        return self._kept("ema_param")

    def copied_parameters(self) -> Iterator[torch.Tensor]:
        """The copies of ``copy_dtype``, as of the last step, in the order of the parameters; a parameter that was
        never stepped stands for itself.

        Raises:
            ValueError: without ``copy_dtype``.
        """
        if self._precision.copy_dtype is None:
            raise ValueError(f"there are no copies: make the {type(self).__name__} with copy_dtype=torch.bfloat16, say")
        return self._kept("param_copy")

    def _kept(self, key: str) -> Iterator[torch.Tensor]:
        for group in self.param_groups:
            for p in group["params"]:
                yield self.state[p][key] if key in self.state.get(p, ()) else p.detach()

    def _update(self, group: dict[str, Any]) -> Update:
        """The rule for a group; every optimizer has its own."""
        raise NotImplementedError

    @staticmethod
    def profile_hook_step(func: Callable) -> Callable:
        """What torch puts around every class's step: a range with its name, for profilers, and the hooks. Here only
        where there is a profiler or a hook: the range alone takes 6 us, half of a small step."""
        announced = torch.optim.Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def step(self, *args, **kwargs):
            if has_step_hooks(self) or _is_observed():
                return announced(self, *args, **kwargs)
            out = func(self, *args, **kwargs)
            self._optimizer_step_code()
            # Those that came in the meantime, from a closure.
            for hooks in (self._optimizer_step_post_hooks, of_all._global_optimizer_post_hooks):
                for hook in tuple(hooks.values()) if hooks else ():
                    hook(self, (self, *args), kwargs)
            return out

        return step

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of all parameters, or with ``set_to_none=False`` make them zeros."""
        if not set_to_none or torch.optim.Optimizer.zero_grad is not _TORCHS_ZERO_GRAD or _is_observed():
            return super().zero_grad(set_to_none)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad = None

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
        if torch.compiler.is_compiling():
            _compile.step(self, _hyper)
        else:
            self._step_now()
        return loss

    def _step_now(self) -> None:
        if any(map(is_torchs, self.param_groups)):
            return self._step_torch()
        created: list[tuple[torch.Tensor, dict[str, Any]]] = []
        try:
            took_place = self._step_groups(created)
        except BaseException:
            self._undo(created)
            raise
        if not took_place:
            self._undo(created)

    def _step_groups(self, created: list[tuple[torch.Tensor, dict[str, Any]]]) -> bool:
        """Whether the step took place; created: see :meth:`_make_plan`."""
        if _checkpoint.is_trial(self):
            self._plan = self._make_plan(*self._groups(), created)
            return True
        if not (self.max_grad_norm is not None or self._may_skip() or getattr(self, "grad_scale", None) is not None):
            self._last["grad_norm"] = None
            self._collect(lambda plan, *arguments: plan.step(*arguments), created)
            return True
        plan = self._collect(lambda plan, *arguments: plan.collect(*arguments), created)
        return plan.run(self._norm(plan.norm), self._may_skip())

    def _groups(self) -> tuple[list[tuple[list, str, list[float]]], list[Update]]:
        """What the groups are to a plan, and their update rules."""
        updates = [self._update(group) for group in self.param_groups]
        groups = [
            (_listed(group["params"]), update.rule, _hyper(group, update))
            for group, update in zip(self.param_groups, updates, strict=True)
        ]
        return groups, updates

    def _collect(self, collect, created: list[tuple[torch.Tensor, dict[str, Any]]], takes_part=None):
        """A plan that has taken this step's tensors in. ``collect(plan, groups, state)`` has it do so, and says whether
        the plan still fits; created, takes_part: see :meth:`_make_plan`."""
        groups, updates = self._groups()
        # A mode that wants to see every operator is shown one: fake tensors, make_fx.
        shown = torch._C._len_torch_dispatch_stack() > 0 and takes_part is None and self._precision.is_default()
        plan = None if shown else self.__dict__.get("_plan")
        # A plan that no longer fits says so, and another is made; then it fits.
        if plan is None or not collect(plan, groups, self.state):
            plan = self._make_plan(groups, updates, created, takes_part, shown)
            self._plan = None if shown else plan
            if not collect(plan, groups, self.state):
                raise RuntimeError(
                    f"{type(self).__name__}: a state is not the tensor it should be; expected what state_dict() "
                    "returned; clear optimizer.state or load a checkpoint"
                )
        return plan

    def _undo(self, created: list[tuple[torch.Tensor, dict[str, Any]]]) -> None:
        """The step did not take place, so that nothing has begun: a first step is still to come."""
        for p, before in created:
            if before:
                self.state[p] = before
            else:
                del self.state[p]

    def _norm(self, norm_of) -> torch.Tensor | None:
        """What the gradients decide, as one read of them says; None where nothing depends on it."""
        scale, found_inf = _amp.scaler_of(self)
        is_scaled = scale is not None or found_inf is not None
        limit = float("inf") if self.max_grad_norm is None else float(self.max_grad_norm)
        norm = None
        if self.max_grad_norm is not None or self.skip_nonfinite:
            norm = norm_of(float("inf") if is_scaled else limit, 1.0, self.skip_nonfinite)
        decided = _amp.scaled(norm, limit, scale, found_inf) if is_scaled else norm
        self._last["grad_norm"] = None if norm is None else decided[0]
        return decided

    def _may_skip(self) -> bool:
        return self.skip_nonfinite or getattr(self, "found_inf", None) is not None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` returned, of this class or of torch's.

        As in torch, except that every state keeps its dtype (torch casts it to its parameter's) and is copied
        (torch shares it with ``state_dict``), into the parameter's memory layout and its placement over ranks.
        """
        options = [option.name for option in EXTRAS]
        _checkpoint.load_state_dict(self, super().load_state_dict, state_dict, options)

    def _init_group(self, group: dict[str, Any], *lists, fused: bool = False):
        # By this name torch's step and Dynamo know it; fused: ours asks, and not torch's.
        return _compile.init_group(self, group, *lists) if fused else super()._init_group(group, *lists)

    @torch.no_grad()
    def _make_plan(
        self,
        groups: list,
        updates: list[Update],
        created: list[tuple[torch.Tensor, dict[str, Any]]],
        takes_part=None,
        shown: bool = False,
    ):
        """Creates the states that are missing and returns what will step the groups from now on.

        Args:
            created: takes in the parameters whose states were made or replaced, and what these were before.
            takes_part: says of a parameter whether it will be stepped; default: whether it has a gradient.
            shown: whether the step has to go through operators.
        """
        for update in updates:
            self._check_digits(update)
        takes_part = takes_part or (lambda p: p.grad is not None)
        precision = self._precision
        roles, fresh, waiting = [], [], []
        for (params, _, _), update in zip(groups, updates, strict=True):
            # Stochastic rounding needs the step's number, so that a resumed run draws what an unbroken one would.
            counts = update.counts or ((("step", 0.0),) if precision.seed else ())
            kept = precision.roles(update.states) + [("count", key) for key, _ in counts]
            roles.append(kept if update.states or not precision.is_default() else [])
            fresh.append([])
            waiting.append([])
            for i, p in enumerate(params):
                if not roles[-1]:
                    continue
                if not takes_part(p):
                    # It gets its state when its first gradient comes.
                    if not precision.is_prepared(p, self.state.get(p, {}), update.states):
                        waiting[-1].append(i)
                    continue
                before = dict(self.state.get(p, {}))
                state = self.state[p]
                created.append((p, before))
                for key, first in counts:
                    state[key] = _checkpoint.count_tensor(state.get(key, first))
                if precision.prepare(p, state, update.states, update.initial):
                    fresh[-1].append(i)
                if len(state) == len(before) and all(state[key] is value for key, value in before.items()):
                    created.pop()
        params = [p for params, _, _ in groups for p in params]
        compiled = _load.available and not shown and all(is_fused(p) and not p.is_meta for p in params)
        if compiled and len(set(map(id, params))) == len(params):
            plan = _C.StepPlan(groups, self.state, roles, fresh, waiting)
            plan.configure(precision.average_weight, precision.seed)
            return plan
        if not precision.is_default():
            raise RuntimeError(
                f"{type(self).__name__}: master_weights, stochastic_rounding, state_dtype, ema_decay and copy_dtype "
                "need the compiled part, plain tensors on CPU or CUDA, and no parameter twice; switch them off"
            )
        return ListPlan(groups, self.state, roles, fresh)

    def _step_torch(self) -> None:
        extras = any(group["l1"] or group["clip_value"] is not None for group in self.param_groups)
        extras = extras or self.max_grad_norm is not None or self.skip_nonfinite or self.defaults["amp_fused"]
        if extras or not self._precision.is_default():
            raise RuntimeError(
                f"{type(self).__name__}: arguments beyond torch's do not go with capturable or differentiable, which "
                "torch's own step computes; switch one of them off"
            )
        # Without the wrapper that fires hooks: ours has fired them.
        step = self._torch_class.step
        step = step.__wrapped__ if getattr(step, "hooked", False) else step
        step(self)


def _is_observed() -> bool:
    """Whether a profiler wants to know what is called, or a compiler."""
    return torch.compiler.is_compiling() or not _load.available or _C.is_observed()


def _listed(params) -> list[torch.Tensor]:
    return params if type(params) is list else list(params)


def _hyper(group: dict[str, Any], update: Update) -> list[float]:
    """The group's hyper-parameters in the order of struct Hyper in csrc/optim/optim_math.h."""
    # torch's own groups, which TrainStep steps as well, have none of our extras.
    clip = group.get("clip_value")
    return [
        float(group["lr"]),
        float(group["weight_decay"]),
        float(update.decoupled),
        float(group["maximize"]),
        float(group.get("l1", 0.0)),
        float(group.get("l1_mode") == "prox"),
        float("inf") if clip is None else float(clip),
        1.0,
        *map(float, update.hyper),
    ]


def has_step_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Its own, or those of all optimizers."""
    own = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return bool(own or of_all._global_optimizer_pre_hooks or of_all._global_optimizer_post_hooks)


def is_torchs(group: dict[str, Any]) -> bool:
    """Whether torch's own class steps this group. On the CPU, where nothing can be captured, ``capturable`` is
    what a checkpoint of another device brought along."""
    captured = group.get("capturable") and any(p.device.type != "cpu" for p in group["params"])
    return bool(captured or group.get("differentiable"))
