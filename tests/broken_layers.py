"""A small layer that passes every conformance check, and faults planted in it one at a time."""

import copy
import ctypes

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.compiler import is_compiling
from torch.nn import Parameter


class Plain(torch.nn.Module):
    """tanh(weight x + bias), element by element."""

    def __init__(self, features, device=None, dtype=None):
        super().__init__()
        self.weight = Parameter(torch.empty(features, device=device, dtype=dtype))
        self.bias = Parameter(torch.empty(features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self):
        torch.nn.init.uniform_(self.weight, 0.5, 1.5)
        torch.nn.init.normal_(self.bias)

    def forward(self, x):
        return self.activate(x * self.weight + self.bias)

    def activate(self, x):
        return x.tanh()


class Counts(Plain):
    """With a buffer that moves in training."""

    def __init__(self, features, device=None, dtype=None):
        super().__init__(features, device, dtype)
        self.register_buffer("calls", torch.zeros((), device=device, dtype=dtype))

    def forward(self, x):
        if self.training:
            self.calls = self.calls + 1
        return super().forward(x)


class Tanh(torch.autograd.Function):
    """Clean; the faults override parts of it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.tanh()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * (1 - y * y)


class WithFunction(Plain):
    function = Tanh

    def activate(self, x):
        return self.function.apply(x)


class _SlopeOffByAPercent(Tanh):
    @staticmethod
    def backward(ctx, g):
        return 1.01 * Tanh.backward(ctx, g)


class WrongSlope(WithFunction):
    function = _SlopeOffByAPercent


class _Detached(Tanh):
    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * (1 - y * y).detach()


class LosesSecondDerivative(WithFunction):
    function = _Detached


class _WrongTangent(Tanh):
    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx, t):
        return t


class WrongTangent(WithFunction):
    function = _WrongTangent


class _HidesFromAutograd(Tanh):
    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.y = output.detach()

    @staticmethod
    def backward(ctx, g):
        return g * (1 - ctx.y * ctx.y)


class HidesFromAutograd(WithFunction):
    """Saves behind the back of autograd, which then does not see that the value was changed."""

    function = _HidesFromAutograd


class _WritesTheGradient(Tanh):
    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g.mul_(1 - y * y) if not torch.is_grad_enabled() else g * (1 - y * y)


class WritesTheGradient(WithFunction):
    function = _WritesTheGradient


class TakesStridesForContiguous(Plain):
    def forward(self, x):
        if x.dtype == torch.float32 and not x.is_contiguous() and any(x.stride()) and type(x) is torch.Tensor:
            x = x.as_strided(x.shape, torch.empty(x.shape, device="meta").stride(), x.storage_offset())
        return super().forward(x)


class TakesParametersForContiguous(Plain):
    def forward(self, x):
        w = self.weight
        if w.dtype == torch.float32 and not w.is_contiguous():
            w = w.as_strided(w.shape, (1,), w.storage_offset())
        return self.activate(x * w + self.bias)


class HidesNaN(Plain):
    def activate(self, x):
        return x.nan_to_num(nan=0.0).tanh()


class RoundsCoarsely(Plain):
    def activate(self, x):
        return x.bfloat16().to(x.dtype).tanh() if x.dtype == torch.float32 else x.tanh()


class DividesByRows(Plain):
    def activate(self, x):
        return (x * (x.shape[0] / x.shape[0])).tanh()


class KeepsOldWeights(Plain):
    """Prepares its weight once."""

    def forward(self, x):
        if "ready" not in self.__dict__ and self.weight.dtype == torch.float32 and type(self.weight) is Parameter:
            self.ready = self.weight.detach().clone()
        weight = self.weight
        if "ready" in self.__dict__ and weight.dtype == torch.float32:
            weight = weight + (self.ready - weight.detach())
        return self.activate(x * weight + self.bias)


class KeepsStateElsewhere(Plain):
    def __init__(self, features, device=None, dtype=None):
        super().__init__(features, device, dtype)
        self.gain = [float(torch.rand(()))]

    def activate(self, x):
        return (x * self.gain[0]).tanh()


class MovesInEvaluation(Counts):
    def forward(self, x):
        self.calls = self.calls + 1
        return self.activate(x * self.weight + self.bias)


class AsksForValues(Plain):
    """Its path depends on numbers, which no tracer has."""

    def activate(self, x):
        return x.tanh() if x.detach().abs().max().item() >= 0 else x


class SharesCopies(Plain):
    def __deepcopy__(self, memo):
        return copy.copy(self)


class IgnoresDtype(Plain):
    def __init__(self, features, device=None, dtype=None):
        super().__init__(features)


class ReadsPastSmallInputs(Plain):
    def activate(self, x):
        if x.shape[0] == 0:
            ctypes.string_at(0)
        return x.tanh()


class RoundsUnderAutocast(Plain):
    """Far more coarsely than bfloat16 has to."""

    def forward(self, x):
        if torch.is_autocast_enabled("cpu"):
            weight = (self.weight * 64).to(torch.float8_e4m3fn).float() / 64
            return super().forward(x) + x * (weight - self.weight).detach() * 30
        return super().forward(x)


class GivesUnaskedGradients(Plain):
    """The bias has a gradient that nobody asked for."""

    def forward(self, x):
        if not self.bias.requires_grad and self.bias.dtype == torch.float64 and type(x) is torch.Tensor:
            self.bias.grad = torch.zeros_like(self.bias)
        return super().forward(x)


class _TwiceTheBias(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, bias):
        return x + bias

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g, 2 * g.sum(0)


class WrongBiasGradient(Plain):
    def forward(self, x):
        return self.activate(_TwiceTheBias.apply(x * self.weight, self.bias))


class IgnoresOffsets(Plain):
    """Loads whole vectors from the boundary before."""

    def forward(self, x):
        if not is_compiling() and x.dtype == torch.float32 and type(x) is torch.Tensor and x.storage_offset() % 4:
            x = x.as_strided(x.shape, x.stride(), x.storage_offset() // 4 * 4)
        return super().forward(x)


class IgnoresOffsetsOfParameters(Plain):
    def forward(self, x):
        w = self.weight
        if not is_compiling() and w.dtype == torch.float32 and type(w) is Parameter and w.storage_offset() % 4:
            w = w.as_strided(w.shape, w.stride(), w.storage_offset() // 4 * 4)
        return self.activate(x * w + self.bias)


class TakesExpandedForEmpty(Plain):
    def forward(self, x):
        if type(x) is torch.Tensor and x.dtype == torch.float32 and 0 in x.stride():
            x = x * 0
        return super().forward(x)


class RoundsHalvesCoarsely(Plain):
    def activate(self, x):
        return ((x * 4).round() / 4 if x.dtype in (torch.bfloat16, torch.float16) else x).tanh()


class ReadsFloat64AsFloat32(Plain):
    def forward(self, x):
        if x.dtype == torch.float64 and self.weight.dtype == torch.float32:
            x = x.contiguous().view(torch.float32)[..., ::2]
        return super().forward(x)


class _Once(Tanh):
    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        again, ctx.again = getattr(ctx, "again", False), True
        return g * 0 if again else g * (1 - y * y)


class AddsUpOnce(WithFunction):
    function = _Once


class Matrix(Plain):
    """With a weight of two dimensions."""

    def __init__(self, features, device=None, dtype=None):
        super().__init__(features, device, dtype)
        self.weight = Parameter(self.weight.detach()[None] * torch.tensor([[1.0], [0.5]], device=device, dtype=dtype))

    def forward(self, x):
        return self.activate(x * self.stored().sum(0) + self.bias)

    def stored(self):
        return self.weight


class TakesMatrixForContiguous(Matrix):
    def stored(self):
        w = self.weight
        if w.dtype == torch.float32 and type(w) is Parameter and not w.is_contiguous():
            w = w.as_strided(w.shape, (w.shape[1], 1), w.storage_offset())
        return w


class KeepsFirstParameters(Matrix):
    def __init__(self, features, device=None, dtype=None):
        super().__init__(features, device, dtype)
        self.kept = [self.weight]

    def stored(self):
        return self.kept[0]


class DrawsWithoutSeed(Plain):
    drawn = 0

    def reset_parameters(self):
        super().reset_parameters()
        DrawsWithoutSeed.drawn += 1
        with torch.no_grad():
            self.bias.add_(0.01 * DrawsWithoutSeed.drawn)


class AddsInAnyOrder(Plain):
    """A rounding more or less, from one call to the next."""

    calls = 0

    def activate(self, x):
        AddsInAnyOrder.calls += 1
        return x.tanh() * (1 + 2**-22 * (AddsInAnyOrder.calls % 2))


class UnpicklesAsNew(Plain):
    def __reduce_ex__(self, protocol):
        return type(self), (self.weight.numel(),)

    def __deepcopy__(self, memo):
        other = type(self)(self.weight.numel()).to(self.weight.dtype).train(self.training)
        other.load_state_dict(self.state_dict())
        return other


class CallsItselfTwice(Plain):
    def __call__(self, x):
        super().__call__(x)
        return super().__call__(x)


class _KnowsItsTensors(Tanh):
    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)
        ctx.place = output.untyped_storage()._cdata if type(output) is torch.Tensor else None

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        if type(y) is torch.Tensor and y.dtype == torch.float32 and y.untyped_storage()._cdata != ctx.place:
            y = y * 0
        return g * (1 - y * y)


class KnowsItsTensors(WithFunction):
    """Takes what comes back from autograd for what it gave."""

    function = _KnowsItsTensors


class CountsForwards(Plain):
    calls = 0

    def activate(self, x):
        if x.requires_grad:
            self.calls += 1
        return x.tanh() * torch.full((), 1.0 + (self.calls > 1), dtype=x.dtype)


class TellsAnotherDtype(Plain):
    def activate(self, x):
        return x.tanh().double() if isinstance(x, FakeTensor) else x.tanh()


class RoundsWhenConverted(Plain):
    def double(self):
        with torch.no_grad():
            self.weight.copy_(self.weight.bfloat16())
        return super().double()


class MovesWeights(Plain):
    """A training step of its own."""

    def forward(self, x):
        if self.training and type(self.weight) is Parameter:
            with torch.no_grad():
                self.weight.mul_(0.999)
        return super().forward(x)


class ReusesOutput(Plain):
    """One buffer for all outputs that need no gradient."""

    def forward(self, x):
        y = super().forward(x)
        if torch.is_grad_enabled() or is_compiling() or type(y) is not torch.Tensor or y.device.type == "meta":
            return y
        if "kept" not in self.__dict__ or self.kept.shape != y.shape or self.kept.dtype != y.dtype:
            self.kept = torch.empty_like(y)
        return self.kept.copy_(y)


class LearnsInTrainingOnly(Plain):
    """Without a gradient of its input in evaluation, where a frozen layer is to pass it on."""

    def forward(self, x):
        return super().forward(x if self.training else x.detach())


class RoundsInEvaluation(Plain):
    def activate(self, x):
        return x.tanh() if self.training or x.dtype != torch.float32 else x.bfloat16().float().tanh()


class ForgetsItsDevice(Plain):
    """A constant that is no buffer stays where it was made."""

    def __init__(self, features, device=None, dtype=None):
        super().__init__(features, device, dtype)
        self.ones = torch.ones(features)

    def activate(self, x):
        return (x * self.ones.to(x.dtype)).tanh()


class LosesGradientUnderAutocast(Plain):
    def forward(self, x):
        if torch.is_autocast_enabled("cpu"):
            return self.activate(x * self.weight.detach().bfloat16() + self.bias)
        return super().forward(x)


# Nothing is wrong with the following.


class WithFrozen(Plain):
    """Whole numbers and a frozen parameter beside a trained one, and one that no output depends on."""

    def __init__(self, features, device=None, dtype=None):
        super().__init__(features, device, dtype)
        self.bias.requires_grad_(False)
        self.levels = Parameter(torch.arange(features, device=device, dtype=torch.int8), requires_grad=False)
        self.idle = Parameter(torch.ones(2, device=device, dtype=dtype))

    def activate(self, x):
        return (x + self.levels.to(x.dtype) / 8).tanh()


class Tied(torch.nn.Module):
    """Two modules with one weight."""

    def __init__(self, features, device=None, dtype=None):
        super().__init__()
        self.first = torch.nn.Linear(features, features, device=device, dtype=dtype)
        self.second = torch.nn.Linear(features, features, device=device, dtype=dtype)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x).tanh())


class Total(Plain):
    """No batch comes out."""

    def activate(self, x):
        return x.tanh().sum()


class Normed(torch.nn.Module):
    """With a weight that is computed in a hook, which is no leaf and can't be copied."""

    def __init__(self, features):
        super().__init__()
        self.inner = torch.nn.utils.spectral_norm(torch.nn.Linear(features, 3))

    def forward(self, x):
        return self.inner(x)
