"""The class under test beside its oracle: itself in float64, on contiguous tensors."""

import copy
from dataclasses import dataclass

import torch

from gdbp.testing.compare import number, same_bits, ulps
from gdbp.testing.report import Failure, NotApplicable, one_line
from gdbp.testing.suite import Suite

# In units in the last place of the largest element of a tensor: some roundings, and those of intermediate results in
# layers built from several operations, which in half types are rounded each.
_LIMIT_ULP, _LIMIT_HALF = 16.0, 64.0


@dataclass
class Run:
    """What came of a forward and a backward pass, by name: output, gradients, buffers.

    Attributes:
        tensors: by name.
        scale: largest element of the upstream gradient, of input's kind: what cancels is measured by what it was.
    """

    tensors: dict[str, torch.Tensor]
    scale: float = 0.0

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
            if not name.startswith("buffer"):
                peak = peak.clamp_min(exact.scale)
            found[name] = ulps(tensor, other, peak).max().item()
        return found

    def require_close(self, exact: "Run", what: str = "", plain: "Run | None" = None) -> str:
        """The largest distance as evidence. Failure where it is above the limit, and beyond that of a plain run."""
        distances = self.distance(exact)
        usual = plain.distance(exact) if plain else {}
        half = any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in self.tensors.values())
        for name, distance in distances.items():
            limit = max(_LIMIT_HALF if half else _LIMIT_ULP, 4 * usual.get(name, 0.0))
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
            layer, x = self.construct(), torch.randn(max(256, shape[0]), *shape[1:])
            entered = x.clone()
            output = layer(entered)
            self.is_random = not torch.equal(output, layer(x.clone()))
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

    def gradient(self, layer: torch.nn.Module, x: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        """An upstream gradient for this input's output."""
        with torch.no_grad():
            output = copy.deepcopy(layer)(x.detach().clone())
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
        wanted = {f"gradient of {name}": p for name, p in layer.named_parameters() if p.requires_grad}
        wanted = {"input gradient": x} | wanted
        gradients = torch.autograd.grad(output, list(wanted.values()), g, allow_unused=True)
        tensors = {"output": output.detach()}
        for (name, tensor), gradient in zip(wanted.items(), gradients, strict=True):
            tensors[name] = torch.zeros_like(tensor) if gradient is None else gradient
        for name, buffer in layer.named_buffers():
            tensors[f"buffer {name}"] = buffer.detach().clone()
        return Run(tensors, g.abs().max().item() if g.numel() else 0.0)

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


SUITE = Suite("gdbp.testing.layers", Subject)


def contiguous64(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(torch.float64, copy=True, memory_format=torch.contiguous_format)
