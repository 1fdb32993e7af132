"""The class under test beside its oracle: itself in float64, on contiguous tensors."""

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from gdbp.testing.compare import number, same_bits, ulps
from gdbp.testing.report import Failure, NotApplicable, one_line
from gdbp.testing.suite import Suite

_LIMIT_ULP = 16.0  # of the largest element of a tensor: some roundings


@dataclass
class Run:
    """What came of a forward and a backward pass, by name: output, gradients, buffers.

    Attributes:
        tensors: by name.
        upstream: the gradient of the output: what cancels is measured by what it was.
    """

    tensors: dict[str, torch.Tensor]
    upstream: torch.Tensor | None = None

    def distance(self, exact: "Run") -> dict[str, float]:
        """Largest distance of each tensor from the exact one, in ulp of the largest exact element."""
        found = {}
        for name, tensor in self.tensors.items():
            other = exact.tensors[name]
            if tensor.shape != other.shape:
                raise Failure(f"{name} has shape {tuple(tensor.shape)} instead of {tuple(other.shape)}")
            if not tensor.is_floating_point() or tensor.numel() == 0:
                continue
            finite = other[other.isfinite()]
            peak = finite.abs().max() if finite.numel() else other.new_zeros(())
            if exact.upstream is not None and exact.upstream.numel() and not name.startswith("buffer"):
                # Over all of it a parameter's gradient sums.
                order = 2 if name.startswith("gradient of") else math.inf
                peak = peak.clamp_min(torch.linalg.vector_norm(exact.upstream, order))
            found[name] = ulps(tensor, other, peak).max().item()
        return found

    def require_close(self, exact: "Run", what: str = "", usual: Iterable["Run"] = ()) -> str:
        """The largest distance as evidence. Failure where it is above the limit, and beyond that of usual runs."""
        distances = self.distance(exact)
        for name, distance in distances.items():
            limit = _LIMIT_ULP
            if exact.upstream is not None and name.startswith("gradient of"):
                # Added one after the other, in float32 or more, numbers err by the more the more there are.
                eps = torch.finfo(self.tensors[name].dtype).eps
                limit += exact.upstream.numel() ** 0.5 * min(1.0, torch.finfo(torch.float32).eps / eps)
            if not distance <= limit:
                usual = list(usual)
                limit = max([limit, *(2 * run.distance(exact).get(name, 0.0) for run in usual)])
            if not distance <= limit:
                raise Failure(f"{what}{name} is wrong by up to {number(distance)} ulp")
        return f"{what}{number(max(distances.values(), default=0.0))} ulp from float64"

    def require_same(self, other: "Run", what: str) -> None:
        for name, tensor in self.tensors.items():
            if not same_bits(tensor, other.tensors[name]):
                raise Failure(f"{what}: {name} differs")


class Subject:
    """A class of layers with the arguments to construct it, and the shape of an input."""

    def __init__(self, cls: type[torch.nn.Module], kwargs: dict, shape: tuple[int, ...]):
        self.cls, self.kwargs, self.shape = cls, kwargs, shape
        with torch.no_grad():
            layer, x, state = self.construct(), torch.randn(shape), torch.get_rng_state()
            entered = x.clone()
            output = layer(entered)
            drew = not torch.equal(state, torch.get_rng_state())  # though few elements may show nothing of it
            self.is_random = drew or not torch.equal(output, layer(x.clone()))
            self.works_in_place = not torch.equal(entered, x)

    def construct(self, seed: int = 1, **options) -> torch.nn.Module:
        torch.manual_seed(seed)
        return self.cls(**copy.deepcopy(self.kwargs), **options)

    def make(self, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        """A layer, the same each time, in training mode unless that is random."""
        layer = self.construct().to(dtype)
        return layer.eval() if self.is_random else layer

    def twin(self, layer: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
        """A layer of its own with the same values and mode, in another dtype."""
        other = self.make(dtype)
        other.load_state_dict(layer.state_dict())
        return other.train(layer.training)

    def input(self, rng: torch.Generator, dtype: torch.dtype = torch.float32, rows: int | None = None) -> torch.Tensor:
        shape = self.shape if rows is None else (rows, *self.shape[1:])
        return torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)

    def gradient(self, x: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        """An upstream gradient for this input's output."""
        with torch.no_grad():
            output = self.make(x.dtype)(x.detach().clone())
        return torch.randn(output.shape, generator=rng, dtype=torch.float64).to(output.dtype)

    def run(self, layer: torch.nn.Module, x: torch.Tensor, g: torch.Tensor, call=None, *, themselves=False) -> Run:
        """A forward and a backward pass with this upstream gradient.

        Args:
            call: instead of the layer itself.
            themselves: takes x and g, and not copies of them, which are contiguous and which no fault can reach.
        """
        if not themselves:
            x, g = (tensor.clone(memory_format=torch.contiguous_format) for tensor in (x, g))
        x = x.detach().requires_grad_()
        output = (layer if call is None else call)(self.entering(x))
        wanted = {f"gradient of {name}": p for name, p in trained(layer).items()}
        wanted = {"input gradient": x} | wanted
        gradients = torch.autograd.grad(output, list(wanted.values()), g, allow_unused=True)
        tensors = {"output": output.detach().clone()}
        for (name, tensor), gradient in zip(wanted.items(), gradients, strict=True):
            tensors[name] = torch.zeros_like(tensor) if gradient is None else gradient
        for name, buffer in layer.named_buffers():
            tensors[f"buffer {name}"] = buffer.detach().clone()
        return Run(tensors, g)

    def entering(self, x: torch.Tensor) -> torch.Tensor:
        """What a layer may work in place on, if it does, and else x itself."""
        return x * 1 if self.works_in_place else x

    def require_no_work_in_place(self) -> None:
        if self.works_in_place:
            raise NotApplicable("the layer works in place")

    def exact(self, layer: torch.nn.Module, x: torch.Tensor, g: torch.Tensor) -> Run:
        """The oracle's run for the same values; NotApplicable where the class can't do float64."""
        try:
            twin = self.twin(layer, torch.float64)
            return self.run(twin, contiguous64(x), contiguous64(g))
        except Exception as error:
            reason = one_line(f"{type(error).__name__}: {error}")
            raise NotApplicable(f"no oracle, as float64 does not work: {reason}") from None

    def nearby(self, layer: torch.nn.Module, x: torch.Tensor, g: torch.Tensor, rng: torch.Generator) -> Iterator[Run]:
        """The oracle's runs, once they are asked for, for values that are some roundings off: how far these can lead,
        beyond a kink, for one."""
        start = self.twin(layer, torch.float64)  # now, for a run of the layer may move its buffers

        def moved(tensor):
            signs = torch.randint(2, tensor.shape, generator=rng).mul_(2).sub_(1)
            return tensor.double() * (1 + 4 * torch.finfo(x.dtype).eps * signs)

        def run():
            twin = self.twin(start, torch.float64)
            with torch.no_grad():
                for p in trained(twin).values():
                    p.copy_(moved(p))
            found = self.run(twin, moved(x), moved(g)).tensors
            return Run({name: t.to(x.dtype) for name, t in found.items() if t.is_floating_point()})

        return (run() for _ in range(4))


SUITE = Suite("gdbp.testing.layers", Subject)


def trained(layer: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters by name; others are frozen, or whole numbers."""
    return {name: p for name, p in layer.named_parameters() if p.requires_grad}


def contiguous64(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(torch.float64, copy=True, memory_format=torch.contiguous_format)
