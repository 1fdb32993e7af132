"""Forward, loss and backward of any network that TrainStep reads, as CUDA graphs of kernels and products."""

import functools
from collections import OrderedDict
from collections.abc import Callable

import torch

from gdbp import _load
from gdbp.step._model import Layers
from gdbp.step._program import forward_of, loss_of

if _load.available:
    from gdbp import _C

# Kinds of batches whose graphs are kept: full ones, the last one of an epoch, and some more.
MOST_KINDS = 8


class Graphs:
    """TrainPlan's counterpart for networks on CUDA that are more than one kernel.

    The first batch of a kind (shapes, dtypes, autocast, what is trained) is run as autograd runs it, which also has the
    libraries make what they need; at the second a graph is recorded, and it and those after it are copied into its
    input. The update is not part of it, so that its numbers may change from step to step.

    Attributes:
        factor: the first two numbers of ``grad::Norm`` where nothing is clipped.
        failure: why a graph could not be recorded, if so: then all is run as the first batch is.
    """

    def __init__(self, layers: Layers, objective: tuple):
        self._watched = _C.Watched(layers.watch.values, layers.watch.lengths)
        self._tensors = [t for t in _flat([*layers.found, objective]) if isinstance(t, torch.Tensor)]
        self._parameters = [t for t in self._tensors if isinstance(t, torch.nn.Parameter)]
        self._statistics = [t for kind, *options in layers.found if kind == "batch_norm" for t in _written(*options)]
        self._device = self._parameters[0].device
        self._drops = any(kind == "dropout" for kind, *_ in layers.found)
        self._seed = torch.zeros((), dtype=torch.int64, device=self._device)
        self._forward, self._loss = forward_of(layers, self._seed), loss_of(objective)
        self.factor = torch.tensor([0.0, 1.0], dtype=torch.float64, device=self._device)
        self._kinds: OrderedDict[tuple, _Graph | None] = OrderedDict()
        self.failure: str | None = None
        self._completed = 0
        self._memory = (0, 0)  # rows of the last step, and bytes of its graph

    def unchanged(self) -> bool:
        return self._watched.unchanged()

    def gradients(
        self, input: torch.Tensor, target: torch.Tensor, seed: int, number: int
    ) -> tuple[torch.Tensor, torch.Tensor | None, list[tuple[torch.Tensor, torch.Tensor]]]:
        """The loss; where labels were looked at, the numbers of ``grad::Norm``, the last of which skips the step if one
        is out of range; parameters with their gradients, which the next call overwrites. seed: of the run; number: of
        the step, for dropout."""
        if not input.device == target.device == self._device:
            raise ValueError(
                f"TrainStep: input is on {input.device} and target on {target.device}; expected {self._device}, as "
                "the parameters"
            )
        if self._drops:
            self._seed.fill_(_C.step_seed(seed, number))
        kind = self._kind(input, target)
        graph = self._kinds.get(kind)
        if graph is None and kind in self._kinds and self.failure is None:
            graph = self._recorded(input, target)
        value, gradients, bad, decided = (graph or self._run)(input.detach(), target.detach())
        if graph:
            torch.autograd.graph.increment_version(self._statistics)
        self._kinds[kind] = graph
        self._kinds.move_to_end(kind)
        if len(self._kinds) > MOST_KINDS:
            self._kinds.popitem(last=False)
        self._memory = len(input), graph.bytes if graph else 0
        if bad is not None:
            _C.follow_labels(bad)
        self._completed += 1
        return value.clone(), decided, list(zip(self._trained(), gradients, strict=True))

    def raise_labels(self) -> None:
        """For a label out of range of which an earlier step has told by now."""
        _C.raise_labels()

    def completed(self) -> int:
        completed, self._completed = self._completed, 0
        return completed

    def memory(self) -> tuple[int, int, int]:
        rows, used = self._memory
        return rows, used, used

    def _trained(self) -> list[torch.Tensor]:
        return [p for p in self._parameters if p.requires_grad]

    def _kind(self, input, target) -> tuple:
        """All that a graph holds on to, or that decides what is launched."""
        device = self._device.type
        return (
            *(input.shape, input.dtype, target.shape, target.dtype),
            torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
            torch.backends.cuda.matmul.fp32_precision,
            # Two streams may run at once, and a graph has one memory.
            torch.cuda.current_stream(self._device).cuda_stream if device == "cuda" else 0,
            *((t.data_ptr(), t.requires_grad) for t in self._tensors),
        )

    def _recorded(self, input, target) -> "_Graph | None":
        try:
            return _Graph(self._run, input, target)
        except RuntimeError as error:
            self.failure = str(error).split("\n")[0]
            # Their generator may no longer be torch's: see record().
            self._kinds.clear()
            return None

    def _run(self, input, target) -> tuple:
        device, bad, decided = self._device.type, None, None
        # Casts that autocast keeps for later would be those of the recording.
        mixed = torch.autocast(
            device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), cache_enabled=False
        )
        with torch.enable_grad():
            _C.hold_labels()
            try:
                with mixed:
                    value = self._loss(self._forward(input), target)
            finally:
                bad = _C.release_labels()
            trained = self._trained()
            gradients = torch.autograd.grad(value, trained) if trained else ()
        if bad is not None:
            decided = torch.cat([self.factor, (bad[:1] >= 0).double()])
        return value.detach(), gradients, bad, decided


class _Graph:
    """A function of input and target as a graph."""

    def __init__(self, run: Callable[..., tuple], input: torch.Tensor, target: torch.Tensor):
        self._input, self._target = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (input, target))
        self._replay, self.bytes = record(lambda: run(self._input, self._target), input.device)

    def __call__(self, input, target) -> tuple:
        self._input.copy_(input)
        self._target.copy_(target)
        return self._replay()


@functools.cache
def _recorder(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings on a device, as products keep a workspace for each stream. torch's own is one of the
    device that recorded first; what runs on another would not be recorded."""
    return torch.cuda.Stream(device)


def record(run: Callable[[], tuple], device: torch.device) -> tuple[Callable[[], tuple], int]:
    """A function that does what ``run`` does, in one launch and to the same memory, and the bytes that it keeps."""
    graph = torch.cuda.CUDAGraph()
    stream, generator = torch.cuda.current_stream(device), torch.cuda.default_generators[device.index]
    kept, numbers = generator.clone_state(), generator.get_state()
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        # Other threads, which pin batches or ask for events, are not to spoil it.
        try:
            with torch.cuda.graph(graph, stream=_recorder(device), capture_error_mode="thread_local"):
                outputs = run()
        except BaseException:
            # Up to torch 2.14 a recording that fails is not left behind: its stream stays the current one ...
            torch.cuda.set_stream(stream)
            try:
                torch.empty(1, device=device).uniform_()
            except RuntimeError:
                # ... and up to 2.12 nothing random can be drawn any more, but from another state.
                generator.graphsafe_set_state(kept)
            generator.set_state(numbers)
            raise
        used = torch.cuda.memory_reserved() - before

    def replay() -> tuple:
        with torch.cuda.device(device):
            graph.replay()
        return outputs

    return replay, used


def _flat(descriptions: list[tuple]) -> list:
    return [option for description in descriptions for option in description]


def _written(label, features, weight, bias, mean, variance, batches, eps, momentum, of_batch, activation) -> list:
    """What a batch norm writes to: see ``_model._batch_norm``."""
    return [t for t in (mean, variance, batches) if of_batch and t is not None]
