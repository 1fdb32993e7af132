"""What TrainStep runs on CUDA: one kernel for narrow networks, and graphs for others."""

from collections.abc import Callable

import torch

from gdbp import _load
from gdbp.ops.mlp import factors_of
from gdbp.step import _ranks
from gdbp.step._graphs import Graphs
from gdbp.step._model import Layers

if _load.available:
    from gdbp import _C


class DevicePlan:
    """TrainPlan's counterpart on CUDA. Nothing in it waits for the device: whether that skips a step is not asked."""

    def __init__(self, layers: Layers, objective: tuple, dtype: torch.dtype, process_group):
        self._dtype = dtype  # of the parameters
        self._process_group = process_group
        self._factors: str | None = None
        self._takes_labels = objective[0] == "cross_entropy"
        self._kernel, self._graphs = None, Graphs(layers, objective)
        self._used = self._graphs
        self._why = "it ends with a Flatten that joins rows"  # why there is no kernel
        if process_group is not None:
            self._why = "its gradients are averaged over processes before the update"
        elif layers.output_dims == 2:
            try:
                watch = layers.watch
                self._kernel = _C.DeviceTrainPlan(layers.found, objective, watch.values, watch.lengths, layers.flattens)
            except ValueError as error:
                self._why = str(error)

    def unchanged(self) -> bool:
        return self._graphs.unchanged()

    def choose(self) -> None:
        """Kernel or graphs, as autocast and torch's flags are now."""
        self._used = self._graphs
        if self._kernel is None:
            return
        self._factors = factors_of(self._dtype)
        if self._factors is not None and self._kernel.fits(self._factors):
            self._used = self._kernel
        else:
            self._why = f"it does not fit into a block's memory in {self._factors or 'this dtype'}"

    def step(
        self, run: Callable, groups: list[dict], keep_grads: bool, draw: tuple[int, int], input, target
    ) -> torch.Tensor:
        """One step by ``TrainStep._run``, which ``run`` is; draw: the run's seed and the step's number."""
        if self._is_kernel() and not (self._takes_labels and target.is_floating_point()):
            return run(self._launch, input, target)
        self._used = self._graphs
        if self._process_group is None:
            self._graphs.raise_labels()
        value, decided, gradients = self._graphs.gradients(input, target, *draw)
        if self._process_group is not None and gradients:
            decided, gradients = self._averaged(decided, gradients)
        # Others have none in this step.
        for group in groups:
            for p in group["params"]:
                p.grad = None
        for p, gradient in gradients:
            p.grad = gradient
        try:
            value = run(self._update, value, decided)
        finally:
            if not keep_grads:
                for p, _ in gradients:
                    p.grad = None
        if self._process_group is not None:
            # Behind the step that the other ranks make, or they would wait for this one.
            self._graphs.raise_labels()
        return value

    def _averaged(self, decided, gradients: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple:
        """Over the ranks. Where one of them skips the step, all do."""
        parameters, own = zip(*gradients, strict=True)
        skip = torch.zeros(1, device=own[0].device) if decided is None else decided[2:]
        *means, skips = _ranks.averages(self._process_group, [*own, skip.to(own[0].dtype)])
        decided = torch.cat([self._graphs.factor, (skips > 0).double()])
        return decided, list(zip(parameters, means, strict=True))

    def collect(self, plan, groups, state, keep_grads: bool) -> bool:
        """See ``TrainPlan.collect``."""
        return self._used.collect(plan, groups, state, keep_grads) if self._is_kernel() else plan.collect(groups, state)

    def completed(self) -> int:
        return self._used.completed()

    def memory(self) -> tuple[int, int, int]:
        return self._used.memory()

    def explain(self, waits: bool) -> tuple[list[str], str]:
        """What runs, and when each parameter is updated; waits: whether for all gradients."""
        if self._is_kernel():
            lines = [f"fused: one call a step, products in two launches on tensor cores, in {self._factors}"]
            return lines, "after the sum of all gradients" if waits else "as its gradient is summed"
        ways, failure = "as a CUDA graph", self._graphs.failure
        if failure is not None:
            ways = f"as autograd runs them, since no CUDA graph could be recorded ({failure})"
        lines = [f"fused: one call a step, forward, loss and backward {ways}", f"  not as one kernel: {self._why}"]
        return lines, "after all gradients"

    def _is_kernel(self) -> bool:
        return self._used is self._kernel

    def _launch(self, plan, input, target, limit, seed, number) -> tuple:
        return *self._kernel.step(plan, input, target, self._factors, limit), True

    def _update(self, plan, value, decided, limit, seed, number) -> tuple:
        if limit is None:
            plan.run(decided, False)
            return value, None, True
        norm = plan.norm(limit[0], 1.0, limit[1])
        if decided is not None:
            norm[2] = torch.maximum(norm[2], decided[2])
        plan.run(norm, False)
        return value, norm.unsqueeze(0), True
