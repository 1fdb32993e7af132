"""``gdbp.TrainStep``: forward, loss, backward, clipping and update in one call."""

from collections.abc import Callable

import torch

from gdbp import _load
from gdbp.nn._arguments import check_module, number, whole
from gdbp.nn._observe import is_observed, observers
from gdbp.optim._options import check_switches
from gdbp.step import _loss, _optimizer, _ranks
from gdbp.step._device import DevicePlan
from gdbp.step._model import Layers
from gdbp.step._watch import CannotFuse

if _load.available:
    from gdbp import _C

# Of all modules.
_GLOBAL_HOOKS = (
    *("_global_forward_hooks", "_global_forward_pre_hooks"),
    *("_global_backward_hooks", "_global_backward_pre_hooks"),
)


class TrainStep:
    """One training step of a dense network as one call, without autograd, dispatcher or allocations in between.

    ``value = step(input, target)`` does what ::

        optimizer.zero_grad()
        value = loss(model(input), target)
        value.backward()
        optimizer.step()

    does, to the same tensors: parameters, buffers and optimizer state stay the model's and the optimizer's own, so
    that saving, loading, schedulers, freezing layers, ``model.eval()`` and going on in an eager loop work at any time.
    Where no norm of all gradients is asked for, the gradient of a layer is used while it is in cache and never stored.

    Args:
        model: ``Sequential`` or :class:`gdbp.nn.MLP` (nested, too) of ``Linear`` and ``BatchNorm1d`` (ours or torch's),
            the activations of :func:`gdbp.nn.functional.linear` as modules, ``Dropout``, ``Flatten``, ``Identity``.
        loss: a loss module of :mod:`gdbp.nn` or torch's counterpart, with reduction "mean" or "sum"; or a loss function
            of :mod:`gdbp.nn.functional`.
        optimizer: of :mod:`gdbp.optim`, or torch's SGD, RMSprop, Adam or AdamW, whose state is used and kept.
        strict: whether what has no fused form raises an error; else it runs eagerly, see :meth:`explain`.
        keep_grads: leave the gradients in ``.grad``, which is None after a step otherwise.
        max_grad_norm: largest 2-norm of all gradients together, beyond which they are scaled down; beside the
            optimizer's own, where it has one. ``inf`` only measures, see :attr:`grad_norms`.
        process_group: a ``torch.distributed`` group (``dist.group.WORLD``, say) over which the gradients are averaged,
            in one ``all_reduce`` of one buffer between backward and update. Every rank makes as many steps, each with
            rows of its own. Parameters and buffers are those of the group's first rank from the start; the loss
            that is returned, dropout and the statistics of a batch norm are each rank's own. As with
            ``DistributedDataParallel``, of which ``model.module`` is what to pass.
        seed: of the dropout masks, which are a function of it, the layer, :attr:`steps` and the element. Default:
            ``torch.initial_seed()``. The masks are others than torch's, and the same on every device.

    float32 and float64 on the CPU; input (rows, features), or (rows, ...) where the model begins with ``Flatten``.
    No gradients of input and target, which may require none.
    On CUDA any of these networks in any dtype, also under ``torch.autocast``, and nothing waits for the device: a label
    out of range leaves the parameters as they are and raises at a later call, ``skip_nonfinite`` counts the steps that
    it skips. Networks of ``Linear`` and activations, up to 128 wide, with cross-entropy of labels or MSE take two
    launches a step. Their products are of bfloat16 or float16, or of float32: as tf32's where
    ``torch.backends.cuda.matmul.fp32_precision`` is "tf32", and else three of these, exact to some 2^-21. Sums are
    float32, and so are the loss and the gradients that the update sees. Of other networks, and of all with a
    ``process_group``, forward, loss and backward are a CUDA graph, recorded at the second batch of a shape, and what
    the modules' functions compute. Gradients that are kept are overwritten by the next step.
    Results do not depend on the number of threads. Hooks of the optimizer's steps, of modules and of parameters are
    refused.

    Attributes:
        steps: how many steps were made, which may be set: with ``seed`` it makes a continued run draw as an
            unbroken one would.
        grad_norms: 2-norms of all gradients, before clipping, at the last step or the steps of the last
            :meth:`many`: (steps,), float64; None where nobody asked for them.

    Raises:
        ValueError, TypeError: a model, loss, optimizer or input without a fused form, in one sentence; not with
            ``strict=False``.
        IndexError: a label out of range, in :meth:`many` on the CPU of any row that the fused steps would take. Nothing
            has been changed then.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        loss: torch.nn.Module | Callable,
        optimizer: torch.optim.Optimizer,
        *,
        strict: bool = True,
        keep_grads: bool = False,
        max_grad_norm: float | None = None,
        process_group=None,
        seed: int | None = None,
    ):
        _check_arguments(model, loss, optimizer, seed)
        check_switches(strict=strict, keep_grads=keep_grads)
        _check_norm(max_grad_norm)
        self.model, self.loss, self.optimizer = model, loss, optimizer
        self.strict, self.keep_grads, self.max_grad_norm = strict, keep_grads, max_grad_norm
        self.process_group = process_group
        self.grad_norms: torch.Tensor | None = None
        self.seed = (torch.initial_seed() if seed is None else whole(seed)) % 2**64
        self.steps = 0
        self._plan = self._rules = self._layers = None
        self._on_device = False
        self._waits = False  # whether the updates of this step wait for the norm of all gradients
        self._reason: str | None = None  # why the last step, or the next, is not fused
        self._refused: str | None = None  # the same of the last step's input alone
        if not self._make_plan() and strict:
            raise ValueError(self._reason)
        own = set(model.parameters())
        if own and not any(p in own for group in optimizer.param_groups for p in group["params"]):
            raise ValueError("optimizer has none of the model's parameters; pass it model.parameters()")
        if process_group is not None:
            _ranks.share(process_group, [*model.parameters(), *model.buffers()])

    def __call__(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """One step; returns the loss as a detached 0-dim tensor."""
        self._refused = None
        if not self._is_fused():
            return self._eager(input, target)
        try:
            _check_batch(input=input, target=target)
            if self._on_device:
                groups, draw = self.optimizer.param_groups, (self.seed, self.steps)
                return self._plan.step(self._run, groups, self.keep_grads, draw, input, target)
            return self._run(self._plan.step if self.process_group is None else self._reduced, input, target)
        except (ValueError, TypeError) as error:
            if self.strict:
                raise
            self._refused = str(error)
            return self._eager(input, target)

    def many(
        self,
        tensors: tuple[torch.Tensor, torch.Tensor],
        batch_size: int | None = None,
        steps: int | None = None,
        *,
        shuffle: bool = True,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Many steps over a data set in one call.

        Args:
            tensors: inputs (n, ...) and targets (n, ...).
            batch_size: rows of a step: None for all of them (batch gradient descent), 1 for stochastic, anything else
                for mini-batch gradient descent. The last step of an epoch takes what is left.
            steps: how many; default one epoch. Where they are more than an epoch has, the next one begins.
            shuffle: whether each epoch takes the rows in a new order, ``torch.randperm(n, generator=generator)``;
                else they are taken as they lie. Without effect where a step takes all rows.
            generator: default torch's.

        Returns the losses, (steps,).
        """
        check_switches(shuffle=shuffle)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator is {generator!r}; expected a torch.Generator, or None")
        if not isinstance(tensors, (tuple, list)) or len(tensors) != 2:
            found = f" and length {len(tensors)}" if isinstance(tensors, (tuple, list)) else ""
            raise TypeError(f"tensors is of type {type(tensors).__name__}{found}; expected a tuple (inputs, targets)")
        inputs, targets = tensors
        for name, tensor in (("inputs", inputs), ("targets", targets)):
            if not isinstance(tensor, torch.Tensor) or not tensor.dim():
                kind = type(tensor).__name__
                raise TypeError(f"{name} is of type {kind}; expected a tensor of one row for each sample")
            if tensor.layout is not torch.strided:
                raise TypeError(f"{name} is {tensor.layout}; expected a dense tensor; use .to_dense()")
        rows = len(inputs)
        if len(targets) != rows:
            raise ValueError(f"tensors have {rows} and {len(targets)} rows; expected as many targets as inputs")
        if not rows:
            raise ValueError("tensors have no rows; expected at least one sample")
        size = rows if batch_size is None else whole(batch_size)
        if size is None or not 1 <= size <= rows:
            raise ValueError(f"batch_size is {batch_size!r}; expected None, or 1 to the {rows} rows there are")
        asked, steps = steps, None if steps is None else whole(steps)
        if asked is not None and (steps is None or steps < 0):
            raise ValueError(f"steps is {asked!r}; expected None, or a whole number of at least 0")
        epoch = -(-rows // size)
        left = epoch if steps is None else steps
        losses, norms = [], []
        while left > 0:
            index = torch.randperm(rows, generator=generator, device="cpu") if shuffle and size < rows else None
            taken = min(left, epoch)
            losses.append(self._epoch(inputs, targets, index, size, taken))
            norms.append(self.grad_norms)
            left -= taken
        self.grad_norms = torch.cat(norms) if norms and norms[-1] is not None else None
        return torch.cat(losses) if losses else inputs.new_empty(0)

    def explain(self) -> str:
        """What runs, and why: a line for each layer, the loss and the optimizer."""
        if not self._is_fused():
            return f"eager: {self._reason}"
        if self._refused is not None:
            return f"eager, for the last step's batch: {self._refused}"
        waits = bool(self._limit())
        if self._on_device:
            lines, updates = self._plan.explain(waits or self.keep_grads)
        else:
            lines = [f"fused: one call a step, products by {_C.gemm_name()}"]
            updates = "after the norm of all gradients" if waits else "right after its gradient"
        for kind, label, *options in self._layers.found:
            suffix = f" + {options[-1]}" if isinstance(options[-1], str) and options[-1] != "none" else ""
            # Those run by csrc/mlp/mlp_cpu.cpp.
            narrow = kind == "linear" and not self._on_device and max(options[0].shape) <= _C.MOST_NARROW
            suffix += ", narrow: a block of rows at a time" if narrow else ""
            lines.append(f"  {label}: {kind if kind != 'activation' else 'on its own'}{suffix}")
        lines.append(f"  {type(self.loss).__name__ if isinstance(self.loss, torch.nn.Module) else self.loss.__name__}")
        lines.append(f"  {type(self.optimizer).__name__}: each parameter {updates}")
        return "\n".join(lines)

    def memory(self) -> dict[str, int]:
        """Of the last step: its ``rows``, the ``bytes`` of its workspace (activations, gradients, sums), and the
        ``unshared_bytes`` that these would take one beside the other. Zeros before the first."""
        rows, used, unshared = self._plan.memory() if self._plan else (0, 0, 0)
        return {"rows": rows, "bytes": used, "unshared_bytes": unshared}

    def __reduce__(self):
        raise TypeError(
            "a TrainStep has nothing of its own: copy or save its model, loss and optimizer, and make another of these"
        )

    # ---- inside ----

    def _make_plan(self) -> bool:
        """Reads the model anew; False, and the reason noted, where it has no fused form."""
        self._plan = self._layers = None
        layers = Layers()
        try:
            layers.watch.no_hooks(torch.nn.modules.module, _GLOBAL_HOOKS, "torch.nn.Module")
            if not _load.available:
                raise CannotFuse("TrainStep needs the compiled part, which is missing; build it, or use strict=False")
            self._rules = _optimizer.fused_form(self.optimizer)
            _optimizer.check_parameters(self.optimizer)
            layers.add(self.model, "")
            objective = _loss.describe(self.loss, layers)
            _check_layers(layers)
            self._on_device = _is_on_device(self.model)
        except CannotFuse as error:
            self._reason = str(error)
            return False
        self._layers, self._reason = layers, None
        if self._on_device:
            dtype = next(self.model.parameters()).dtype
            self._plan = DevicePlan(layers, objective, dtype, self.process_group)
        else:
            watch = layers.watch
            self._plan = _C.TrainPlan(
                layers.found, objective, watch.values, watch.lengths, layers.flattens, layers.output_dims
            )
        return True

    def _is_fused(self) -> bool:
        """Whether this step is; raises the reason where not and ``strict``."""
        if (self._plan is not None and self._plan.unchanged()) or self._make_plan():
            try:
                _optimizer.check(self.optimizer)
                if observers and any(map(is_observed, self.model.modules())):
                    raise CannotFuse(
                        "collect_activation_stats watches the model, and a fused step does not call its layers; "
                        "remove() the collector, or use strict=False"
                    )
                if self._on_device:
                    self._plan.choose()
                elif torch.is_autocast_enabled("cpu"):
                    raise CannotFuse(
                        "autocast is on, and a fused step computes in the parameters' dtype; switch it off, or use "
                        "strict=False"
                    )
                return True
            except CannotFuse as error:
                self._reason = str(error)
        if self.strict:
            raise ValueError(self._reason)
        return False

    def _limit(self) -> tuple[float, bool] | None:
        """What the norm of all gradients decides, if anything asks for it."""
        defaults = self._rules.defaults  # of torch's own, too, which have none of ours
        own, skip = defaults.get("max_grad_norm"), defaults.get("skip_nonfinite", False)
        _check_norm(self.max_grad_norm)
        if own is None and self.max_grad_norm is None and not skip:
            return None
        return min(float("inf") if limit is None else float(limit) for limit in (own, self.max_grad_norm)), skip

    def _collect(self, plan, groups, state) -> bool:
        if self._on_device:
            return self._plan.collect(plan, groups, state, self.keep_grads)
        distributed = self.process_group is not None
        waits = distributed or self._waits
        return self._plan.collect(plan, groups, state, self.keep_grads, waits, distributed)

    def _reduced(self, plan, input, target, limit, seed, number) -> tuple:
        value, gradients = self._plan.backward(input, target, seed, number)
        _ranks.average(self.process_group, gradients)
        return value, *self._plan.update(plan, limit)

    def _run(self, run, *arguments) -> torch.Tensor:
        """One of the plan's methods, with the optimizer readied before and settled after it."""
        rules, created, updated = self._rules, [], None
        limit = self._limit()
        self._waits = limit is not None
        try:
            plan = rules._collect(self._collect, created, self._is_trained)
            value, norms, updated = run(plan, *arguments, limit, self.seed, self.steps)
        finally:
            # Of many steps some may have come before an error.
            completed = self._plan.completed()
            self.steps += completed
            if not (completed if updated is None else updated):
                rules._undo(created)
        self.grad_norms = None if norms is None else norms[:, 0]
        rules._last["grad_norm"] = None if norms is None else norms[-1, 0]
        # What a scheduler asks an optimizer before its own first step.
        self.optimizer._opt_called = True
        return value

    def _is_trained(self, p: torch.Tensor) -> bool:
        return p.requires_grad and any(p is own for own in self._parameters())

    def _parameters(self):
        return (option for _, _, *options in self._layers.found for option in options if option is not None)

    def _epoch(self, inputs, targets, index, size: int, steps: int) -> torch.Tensor:
        rows = min(len(inputs), steps * size)
        self._refused = None
        if self._is_fused() and self.process_group is None and not self._on_device:
            x, y = inputs[:rows].contiguous(), targets[:rows].contiguous()
            if index is not None:
                x, y, index = inputs.contiguous(), targets.contiguous(), index[:rows]
            try:
                _check_batch(inputs=inputs, targets=targets)
                return self._run(self._plan.many, x, y, index, size)
            except (ValueError, TypeError):
                if self.strict:
                    raise
        parts = [slice(at, at + size) for at in range(0, rows, size)]
        if index is not None:
            parts = index[:rows].to(inputs.device).split(size)
        losses, norms = [], []
        for part in parts:
            losses.append(self(inputs[part], targets[part]))
            norms.append(self.grad_norms)
        self.grad_norms = None if norms[-1] is None else torch.cat(norms)
        return torch.stack(losses)

    def _eager(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        self.optimizer.zero_grad()
        value = self.loss(self.model(input), target)
        value.backward()
        if self.process_group is not None:
            _ranks.average_all(self.process_group, self.optimizer)
        if self.max_grad_norm is not None:
            params = [p for group in self.optimizer.param_groups for p in group["params"]]
            norm = torch.nn.utils.clip_grad_norm_(params, self.max_grad_norm)
        self.optimizer.step()
        if self.max_grad_norm is None:
            norm = getattr(self.optimizer, "grad_norm", None)
        self.grad_norms = None if norm is None else norm.detach().double().reshape(1)
        self.steps += 1
        return value.detach()


def _check_arguments(model, loss, optimizer, seed) -> None:
    check_module("model", model)
    if not callable(loss):
        raise TypeError(f"loss is of type {type(loss).__name__}; expected a loss module, or a function")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer is of type {type(optimizer).__name__}; expected a torch.optim.Optimizer")
    if seed is not None and whole(seed) is None:
        raise TypeError(f"seed is {seed!r}; expected a whole number, or None")


def _check_batch(**tensors: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        if getattr(tensor, "layout", torch.strided) is not torch.strided:
            raise TypeError(f"the {name} is {tensor.layout}; expected a dense tensor; use .to_dense()")
        if getattr(tensor, "requires_grad", False):
            raise ValueError(
                f"a gradient of the {name} is required, which a fused step does not compute; put the layers before it "
                "into the model, pass it with .detach(), or use strict=False"
            )


def _check_norm(limit: float | None) -> None:
    if limit is not None and not number("max_grad_norm", limit) > 0:
        raise ValueError(f"max_grad_norm is {limit}; expected a number above 0, or None")


def _is_on_device(model: torch.nn.Module) -> bool:
    return next(model.parameters()).is_cuda


def _check_layers(layers: Layers) -> None:
    if not any(kind in ("linear", "batch_norm") for kind, *_ in layers.found):
        raise CannotFuse("the model has no layers with parameters; expected at least one Linear")
    seen: dict[int, str] = {}
    for _, label, *options in layers.found:
        for option in options:
            if isinstance(option, torch.nn.Parameter) and seen.setdefault(id(option), label) is not label:
                raise CannotFuse(
                    f"{label} shares a parameter with {seen[id(option)]}; expected parameters of its own; use "
                    "strict=False"
                )
