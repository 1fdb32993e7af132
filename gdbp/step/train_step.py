"""``gdbp.TrainStep``: forward, loss, backward, clipping and update in one call."""

from collections.abc import Callable

import torch

from gdbp import _load
from gdbp.step import _loss, _optimizer
from gdbp.step._model import Layers
from gdbp.step._watch import CannotFuse

if _load.available:
    from gdbp import _C


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
        seed: of the dropout masks, which are a function of it, the layer, :attr:`steps` and the element. Default:
            ``torch.initial_seed()``. The masks are others than torch's.

    float32 and float64 on the CPU; input (rows, features), or (rows, ...) where the model begins with ``Flatten``.
    Results do not depend on the number of threads. Step hooks of the optimizer and hooks of modules are refused.

    Attributes:
        steps: how many steps were made, which may be set: with ``seed`` it makes a continued run draw as an
            unbroken one would.

    Raises:
        ValueError, TypeError: a model, loss, optimizer or input without a fused form, in one sentence; not with
            ``strict=False``.
        IndexError: a label out of range. Nothing has been changed then.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        loss: torch.nn.Module | Callable,
        optimizer: torch.optim.Optimizer,
        *,
        strict: bool = True,
        keep_grads: bool = False,
        seed: int | None = None,
    ):
        self.model, self.loss, self.optimizer = model, loss, optimizer
        self.strict, self.keep_grads = strict, keep_grads
        self.seed = (torch.initial_seed() if seed is None else seed) % 2**64
        self.steps = 0
        self._plan = self._rules = self._layers = None
        self._reason: str | None = None  # why the last step, or the next, is not fused
        if not self._make_plan() and strict:
            raise ValueError(self._reason)

    def __call__(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """One step; returns the loss as a detached 0-dim tensor."""
        if not self._is_fused():
            return self._eager(input, target)
        try:
            value, _ = self._run(lambda limit: self._plan.step(self._rules._plan, input, target, limit, *self._draw()))
        except (ValueError, TypeError) as error:
            if self.strict:
                raise
            self._reason = str(error)
            return self._eager(input, target)
        self.steps += 1
        return value

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
        inputs, targets = tensors
        rows = len(inputs)
        if len(targets) != rows:
            raise ValueError(f"tensors have {rows} and {len(targets)} rows; expected as many targets as inputs")
        size = rows if batch_size is None else batch_size
        if not 1 <= size <= max(rows, 1) or not rows:
            raise ValueError(f"batch_size is {batch_size}; expected None, or 1 to the {rows} rows there are")
        epoch = -(-rows // size)
        left = epoch if steps is None else steps
        losses = []
        while left > 0:
            index = torch.randperm(rows, generator=generator) if shuffle and size < rows else None
            taken = min(left, epoch)
            losses.append(self._epoch(inputs, targets, index, size, taken))
            left -= taken
        return torch.cat(losses) if losses else inputs.new_empty(0)

    def explain(self) -> str:
        """What runs, and why: a line for each layer, the loss and the optimizer."""
        if not self._is_fused():
            return f"eager: {self._reason}"
        updates = "after the norm of all gradients" if self._waits() else "right after its gradient"
        lines = [f"fused: one call a step, products by {_C.gemm_name()}"]
        for kind, label, *options in self._layers.found:
            suffix = f" + {options[-1]}" if isinstance(options[-1], str) and options[-1] != "none" else ""
            lines.append(f"  {label}: {kind if kind != 'activation' else 'on its own'}{suffix}")
        lines.append(f"  {type(self.loss).__name__ if isinstance(self.loss, torch.nn.Module) else self.loss.__name__}")
        lines.append(f"  {type(self.optimizer).__name__}: each parameter {updates}")
        return "\n".join(lines)

    def memory(self) -> dict[str, int]:
        """Of the last step: its ``rows``, the ``bytes`` of its workspace (activations, gradients, sums), and the
        ``unshared_bytes`` that these would take one beside the other. Zeros before the first."""
        rows, used, unshared = self._plan.memory() if self._plan else (0, 0, 0)
        return {"rows": rows, "bytes": used, "unshared_bytes": unshared}

    # ---- inside ----

    def _make_plan(self) -> bool:
        """Reads the model anew; False, and the reason noted, where it has no fused form."""
        self._plan = self._layers = None
        layers = Layers()
        try:
            if not _load.available:
                raise CannotFuse("TrainStep needs the compiled part, which is missing; build it, or use strict=False")
            self._rules = _optimizer.fused_form(self.optimizer)
            _optimizer.check_parameters(self.optimizer)
            layers.add(self.model, "")
            objective = _loss.describe(self.loss, layers)
            _check_layers(layers)
        except CannotFuse as error:
            self._reason = str(error)
            return False
        watch = layers.watch
        self._layers, self._reason = layers, None
        self._plan = _C.TrainPlan(
            layers.found, objective, watch.values, watch.lengths, layers.flattens, layers.output_dims
        )
        return True

    def _is_fused(self) -> bool:
        """Whether this step is; raises the reason where not and ``strict``."""
        if self._plan is not None and self._plan.unchanged() or self._make_plan():
            try:
                _optimizer.check(self.optimizer)
                if torch.is_autocast_enabled("cpu"):
                    raise CannotFuse("autocast is on, and a fused step computes in the parameters' dtype; switch it off")
                return True
            except CannotFuse as error:
                self._reason = str(error)
        if self.strict:
            raise ValueError(self._reason)
        return False

    def _waits(self) -> bool:
        return self._rules.max_grad_norm is not None or self._rules.skip_nonfinite

    def _draw(self) -> tuple[int, int]:
        return self.seed, self.steps

    @torch.no_grad()
    def _run(self, run) -> tuple[torch.Tensor, torch.Tensor | None]:
        rules, waits = self._rules, self._waits()
        limit = None
        if waits:
            largest = rules.max_grad_norm
            limit = (float("inf") if largest is None else float(largest), rules.skip_nonfinite)
        created: list = []
        updated = False
        try:
            rules._collect(
                lambda plan, groups, state: self._plan.collect(plan, groups, state, self.keep_grads, waits),
                created,
                self._is_trained,
            )
            value, norm, updated = run(limit)
        finally:
            if not updated:
                rules._undo(created)
        rules._last["grad_norm"] = None if norm is None else norm[-1, 0]
        # What a scheduler asks an optimizer before its own first step.
        self.optimizer._opt_called = True
        return value, norm

    def _is_trained(self, p: torch.Tensor) -> bool:
        return p.requires_grad and any(p is own for own in self._parameters())

    def _parameters(self):
        return (option for _, _, *options in self._layers.found for option in options if option is not None)

    def _epoch(self, inputs, targets, index, size: int, steps: int) -> torch.Tensor:
        rows = min(len(inputs), steps * size)
        if self._is_fused():
            x, y = inputs[:rows].contiguous(), targets[:rows].contiguous()
            if index is not None:
                x, y, index = inputs.contiguous(), targets.contiguous(), index[:rows]
            try:
                losses, _ = self._run(
                    lambda limit: self._plan.many(self._rules._plan, x, y, index, size, limit, *self._draw())
                )
                self.steps += steps
                return losses
            except (ValueError, TypeError) as error:
                if self.strict:
                    raise
                self._reason = str(error)
        order = torch.arange(rows) if index is None else index[:rows]
        return torch.stack([self._eager(inputs[i], targets[i]) for i in order.to(inputs.device).split(size)])

    def _eager(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        self.optimizer.zero_grad()
        value = self.loss(self.model(input), target)
        value.backward()
        self.optimizer.step()
        self.steps += 1
        return value.detach()


def _check_layers(layers: Layers) -> None:
    if not layers.found:
        raise CannotFuse("the model has no layers; expected at least one Linear")
    seen: dict[int, str] = {}
    for _, label, *options in layers.found:
        for option in options:
            if isinstance(option, torch.nn.Parameter) and seen.setdefault(id(option), label) is not label:
                raise CannotFuse(f"{label} shares a parameter with {seen[id(option)]}; expected parameters of its own")
