"""Random losses, options, shapes, layouts, dtypes and upstream gradients against float64: 2,000 cases of each loss.

The oracle is :mod:`tests.exact_losses`. Distances are in ulp of the type that is computed in, float64 or float32, at
the size of the terms that a result is a sum of; half types have half an ulp of their own besides.
"""

import math
import random

import pytest
import torch

from gdbp.nn import functional as F
from tests import exact_losses
from tests.exact_losses import Exact, reduced

CHUNKS, CASES = 20, 100

# The most ulp that the worst element of a case may be off: its value, its gradients.
LIMITS = {
    "mse_loss": 8,
    "l1_loss": 8,
    "huber_loss": 8,
    "smooth_l1_loss": 8,
    "binary_cross_entropy_with_logits": 8,
    "cross_entropy": 12,
    "linear_cross_entropy": 12,
}
DTYPES = [torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 40]


class Case:
    """What every case has, drawn from its seed, in words for the failure's message."""

    def __init__(self, seed: int):
        self.rng, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.dtype = self.rng.choice(DTYPES)
        self.reduction = self.rng.choice(["none", "mean", "sum"])
        self.threads = self.rng.choice([1, 2, 3])

    def __str__(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in vars(self).items() if not isinstance(v, torch.Tensor | random.Random))

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def normal(self, shape, scale: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        drawn = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale
        return self.lay_out(drawn.to(dtype or self.dtype))

    def uniform(self, shape, low: float = 0.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        drawn = torch.rand(shape, generator=self.generator, dtype=torch.float64) + low
        return self.lay_out(drawn.to(dtype or self.dtype))

    def below(self, bound: int, shape) -> torch.Tensor:
        return self.lay_out(torch.randint(bound, shape, generator=self.generator))

    def lay_out(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same numbers in a memory layout by chance."""
        kind = self.rng.choice(["as it is", "as it is", "transposed", "classes last", "strided", "offset"])
        if kind == "transposed" and tensor.dim() > 1:
            return tensor.transpose(0, -1).contiguous().transpose(0, -1)
        if kind == "classes last" and tensor.dim() > 2:
            return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
        if kind == "strided" and tensor.dim():
            return torch.stack([tensor, tensor], dim=-1)[..., 1]
        if kind == "offset":
            buffer = tensor.new_zeros(tensor.numel() + 8)[self.rng.randint(1, 7) :]
            return buffer[: tensor.numel()].view(tensor.shape).copy_(tensor)
        return tensor

    def upstream(self, shape) -> torch.Tensor:
        if self.chance(0.3):
            return torch.ones((), dtype=self.dtype).expand(shape)
        return self.normal(shape, self.rng.choice([1.0, 0.01, 100.0]))

    def worst(self, loss, inputs: list[torch.Tensor], exact) -> float:
        """The largest distance of the loss and of the gradients of ``inputs``; ``exact(upstream)`` are the same."""
        value = loss()
        upstream = self.upstream(value.shape).to(value.dtype)
        grads = torch.autograd.grad(value, inputs, upstream)
        return max(e.distance(got) for e, got in zip(exact(upstream.double()), (value.detach(), *grads), strict=True))


# ---- losses of single elements ----


class PointwiseCase(Case):
    def __init__(self, seed: int, name: str):
        super().__init__(seed)
        self.name = name
        self.shape = self.elements()
        self.scale = self.rng.choice([0.0, 1e-3, 1.0, 1.0, 30.0])
        # With scale 0 all elements are equal, and round to the same side.
        self.offset = self.rng.choice([0.0, 0.0, 0.1])
        parameters = {"huber_loss": "delta", "smooth_l1_loss": "beta"}
        self.options = {}
        if name in parameters and self.chance(0.7):
            self.options[parameters[name]] = self.rng.choice([0.25, 0.5, 1.0, 3.0])
        self.parameter = next(iter(self.options.values()), 1.0)
        self.target_dtype = self.rng.choice(DTYPES) if self.chance(0.1) else self.dtype

    def elements(self) -> tuple[int, ...]:
        if self.chance(0.1):
            return (self.rng.choice([255, 511, 513, 1023, 1025, 2049, 4097]),)
        return tuple(self.rng.choice([0, *SIZES]) for _ in range(self.rng.randint(0, 3)))

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        drawn = self.normal(self.shape, self.scale, dtype).add_(self.offset if dtype is self.dtype else 0.0)
        if drawn.numel() and self.chance(0.1):
            drawn[tuple(self.rng.randrange(n) for n in self.shape)] = self.rng.choice([math.nan, math.inf, -math.inf])
        return drawn.requires_grad_()

    def run(self) -> float:
        x, t = self.values(self.dtype), self.values(self.target_dtype)
        count = torch.tensor(float(x.numel()), dtype=torch.float64)

        def exact(upstream: torch.Tensor) -> list[Exact]:
            value, slope = exact_losses.pointwise(self.name, self.parameter, x.detach().double(), t.detach().double())
            slope = slope * (upstream / count if self.reduction == "mean" else upstream)
            return [reduced(value, self.reduction, count), slope, slope * -1.0]

        loss = getattr(F, self.name)
        return self.worst(lambda: loss(x, t, reduction=self.reduction, **self.options), [x, t], exact)


class BceCase(PointwiseCase):
    def __init__(self, seed: int, name: str):
        super().__init__(seed, name)
        self.factors = {key: self.factor() for key in ("weight", "pos_weight")}
        self.of_labels = self.chance(0.5)

    def factor(self) -> torch.Tensor | None:
        """Of a shape that broadcasts to the elements', or None."""
        if self.chance(0.5):
            return None
        shape = [1 if self.chance(0.3) else n for n in self.shape]
        return self.uniform(shape[self.rng.randint(0, len(shape)) :], 0.1)

    def run(self) -> float:
        x, t = self.values(self.dtype), self.uniform(self.shape)
        t = (t.round() if self.of_labels else t).requires_grad_()
        count = torch.tensor(float(x.numel()), dtype=torch.float64)

        def exact(upstream: torch.Tensor) -> list[Exact]:
            ones, compute = torch.ones(self.shape, dtype=torch.float64), torch.promote_types(self.dtype, torch.float32)
            factors = (ones if f is None else f.double() * ones for f in self.factors.values())
            wide = (x.detach().double(), t.detach().double(), *factors)
            value, of_x, of_t = exact_losses.bce_with_logits(*wide, compute)
            scale = upstream / count if self.reduction == "mean" else upstream
            return [reduced(value, self.reduction, count), of_x * scale, of_t * scale]

        loss = F.binary_cross_entropy_with_logits
        return self.worst(lambda: loss(x, t, reduction=self.reduction, **self.factors), [x, t], exact)


# ---- losses of rows ----


class RowsCase(Case):
    """Targets, class weights and options of cross-entropy."""

    def __init__(self, seed: int, name: str):
        super().__init__(seed)
        rng = self.rng
        self.rows, self.classes = rng.choice([0, 1, 2, 3, 5, 8]), rng.choice(SIZES)
        self.kind = rng.choice(["labels", "labels", "labels", "mixture", "probabilities"])
        self.smoothing = rng.choice([0.0, 0.0, 0.1, 0.5, 1.0])
        self.z_loss = rng.choice([0.0, 0.0, 1e-4, 0.1])
        self.softcap = rng.choice([None, None, None, 2.0, 30.0])
        self.ignore_index = rng.choice([-100, -1, 0, self.classes - 1, 255]) if self.kind != "probabilities" else -100
        self.normalizer = rng.choice([None, 7, 0.5, "tensor"]) if self.reduction == "mean" else None
        self.empty = rng.choice(["nan", "nan", "zero"])

    def draw_targets(self, shape: tuple[int, ...], probabilities_shape: tuple[int, ...]) -> None:
        self.weight = self.uniform((self.classes,), 0.1) if self.chance(0.4) else None
        if self.weight is not None and self.chance(0.2):
            self.weight[self.rng.randrange(self.classes)] = 0
        if self.kind == "probabilities":
            self.target = self.uniform(probabilities_shape)
            self.target = (self.target / self.target.sum(-1, keepdim=True)).to(self.dtype)
            return
        ignored = self.rng.choice([0.0, 0.3, 1.0])
        labels = [self.below(self.classes, shape) for _ in range(2 if self.kind == "mixture" else 1)]
        for t in labels:
            t[torch.rand(shape, generator=self.generator) < ignored] = self.ignore_index
        if self.kind == "mixture":
            share = self.rng.choice([0.0, 0.25, 1.0, "tensor"])
            self.share = self.uniform(shape, dtype=torch.float64) if share == "tensor" else share
            self.target = (*labels, self.share)
        else:
            byte = self.ignore_index in (0, self.classes - 1, 255) and self.chance(0.3)
            self.target = labels[0].to(torch.uint8) if byte else labels[0]

    def options(self) -> dict:
        normalizer = torch.tensor(3.5) if self.normalizer == "tensor" else self.normalizer
        return {
            "weight": self.weight, "reduction": self.reduction, "ignore_index": self.ignore_index,
            "label_smoothing": self.smoothing, "z_loss": self.z_loss, "softcap": self.softcap,
            "normalizer": normalizer, "empty": self.empty,
        }  # fmt: skip

    def exact_rows(self) -> exact_losses.Rows:
        weight = torch.ones(self.classes, dtype=torch.float64) if self.weight is None else self.weight.double()
        if self.kind == "probabilities":
            target = self.target.detach().double()
            target = target.unsqueeze(0) if target.dim() == 1 else target.movedim(1, -1).reshape(-1, self.classes)
            return exact_losses.rows_of_probabilities(target, weight, self.smoothing)
        one = torch.ones((), dtype=torch.float64)
        pairs = [(self.target, one)]
        if self.kind == "mixture":
            share = torch.as_tensor(self.share, dtype=torch.float64)
            # Shares are rounded to the type that is computed in.
            compute = torch.promote_types(self.dtype, torch.float32)
            share = share.to(compute).double()
            pairs = [(self.target[0], share), (self.target[1], (1 - share).to(compute).double())]
        labels = [(t.long().reshape(-1), s.expand(t.shape).reshape(-1)) for t, s in pairs]
        return exact_losses.rows_of_labels(labels, self.ignore_index, weight, self.smoothing)

    def exact(self, x: torch.Tensor, rows: exact_losses.Rows, upstream: torch.Tensor, blur=0.0):
        """The loss, the gradient of the (rows, classes) logits x, and the softmax."""
        compute = torch.promote_types(self.dtype, torch.float32)
        each, gradient, softmax = exact_losses.cross_entropy(x, rows, self.z_loss, self.softcap or 0.0, compute, blur)
        given = {None: rows.weight.sum(), "tensor": torch.tensor(3.5, dtype=torch.float64)}
        divisor = torch.as_tensor(given.get(self.normalizer, self.normalizer), dtype=torch.float64)
        scale = upstream.reshape(-1, 1) if self.reduction == "none" else upstream
        if self.reduction == "mean":
            scale = scale / divisor if divisor else torch.zeros_like(scale)
        loss = reduced(each, self.reduction, divisor)
        if self.reduction == "mean" and not divisor and self.empty == "zero":
            loss = Exact(torch.zeros_like(loss.value), loss.reach)
        return loss, gradient * scale, softmax, scale


class CrossEntropyCase(RowsCase):
    def __init__(self, seed: int, name: str):
        super().__init__(seed, name)
        more = self.rng.choice([(), (), (), (1,), (3,), (2, 3), (65,), (130,)])
        self.shape = (self.rows, self.classes, *more) if self.chance(0.9) else (self.classes,)
        if self.chance(0.05):
            self.shape = (2, 257)
        self.classes = self.shape[0] if len(self.shape) == 1 else self.shape[1]
        self.scale = self.rng.choice([0.0, 1.0, 3.0, 30.0])
        self.inplace = self.chance(0.2)

    def logits(self) -> torch.Tensor:
        x = self.normal(self.shape, self.scale)
        if x.numel() and self.chance(0.1):
            place = tuple(self.rng.randrange(n) for n in self.shape)
            x[place] = self.rng.choice([-math.inf, -math.inf, math.inf, math.nan])
        return x.requires_grad_()

    def run(self) -> float:
        shape = (*self.shape[:1], *self.shape[2:]) if len(self.shape) > 1 else ()
        self.draw_targets(shape, self.shape)
        x, soft = self.logits(), self.kind == "probabilities"
        inputs = [x, self.target.requires_grad_()] if soft and self.chance(0.5) else [x]
        flat = x.detach().double()
        flat = flat.unsqueeze(0) if x.dim() == 1 else flat.movedim(1, -1).reshape(-1, self.classes)
        rows = self.exact_rows()

        def unflatten(t: torch.Tensor) -> torch.Tensor:
            return t[0] if x.dim() == 1 else t.reshape(*shape, self.classes).movedim(-1, 1)

        def exact(upstream: torch.Tensor) -> list[Exact]:
            loss, gradient, softmax, scale = self.exact(flat, rows, upstream)
            of_loss = shape if self.reduction == "none" else ()
            results = [loss.map(lambda t: t.reshape(of_loss)), gradient.map(unflatten)]
            if len(inputs) > 1:
                weight = 1.0 if self.weight is None else self.weight.double()
                results.append((softmax.nll * weight * ((1 - self.smoothing) * scale)).map(unflatten))
            return results

        def loss() -> torch.Tensor:
            given = x * 1 if self.inplace and len(inputs) == 1 else x
            return F.cross_entropy(given, self.target, inplace_backward=given is not x, **self.options())

        return self.worst(loss, inputs, exact)


class LinearCase(RowsCase):
    """Logits of half types are rounded to them, so there they are small integers, which are not."""

    def __init__(self, seed: int, name: str):
        super().__init__(seed, name)
        self.features = self.rng.choice([1, 2, 3, 8, 17])
        self.biased = self.chance(0.5)
        self.budget = self.rng.choice([None, 1, 4 * self.classes, 12 * self.classes])

    def values(self, *shape: int) -> torch.Tensor:
        if self.dtype.itemsize == 2:
            return self.lay_out((self.below(5, shape) - 2).to(self.dtype)).requires_grad_()
        return self.normal(shape).requires_grad_()

    def run(self) -> float:
        self.draw_targets((self.rows,), (self.rows, self.classes))
        x, w = self.values(self.rows, self.features), self.values(self.classes, self.features)
        b = self.values(self.classes) if self.biased else None
        tensors = [x, w] if b is None else [x, w, b]
        rows = self.exact_rows()
        half = self.dtype.itemsize == 2

        def exact(upstream: torch.Tensor) -> list[Exact]:
            x64, w64, *rest = (t.detach().double() for t in tensors)
            bias = rest[0] if rest else torch.zeros((), dtype=torch.float64)
            logits = Exact(x64 @ w64.t() + bias, x64.abs() @ w64.abs().t() + bias.abs())
            loss, g, _, _ = self.exact(logits.value, rows, upstream, 0.0 if half else logits.reach)
            # The gradient of the logits is rounded to half types before it meets the weight.
            info, rounded = torch.finfo(self.dtype), 0.0
            if half:
                rounded = (g.value.abs() + info.smallest_normal) * (info.eps / torch.finfo(torch.float32).eps)
            reach = g.reach + rounded
            grads = [Exact(g.value @ w64, reach @ w64.abs()), Exact(g.value.t() @ x64, g.reach.t() @ x64.abs())]
            return [loss, *grads, g.map(lambda t: t.sum(0))][: len(tensors) + 1]

        def loss() -> torch.Tensor:
            options = self.options()
            if self.kind == "probabilities":
                options["ignore_index"] = None
            return F.linear_cross_entropy(x, w, self.target, linear_bias=b, memory_budget=self.budget, **options)

        return self.worst(loss, tensors, exact)


CLASSES = {
    **dict.fromkeys(("mse_loss", "l1_loss", "huber_loss", "smooth_l1_loss"), PointwiseCase),
    "binary_cross_entropy_with_logits": BceCase,
    "cross_entropy": CrossEntropyCase,
    "linear_cross_entropy": LinearCase,
}


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random(name, chunk):
    threads = torch.get_num_threads()
    try:
        for seed in range(chunk * CASES, (chunk + 1) * CASES):
            case = CLASSES[name](seed, name)
            torch.set_num_threads(case.threads)
            worst = case.run()
            how = f"{CLASSES[name].__name__}({seed}, {name!r}).run()"
            assert worst <= LIMITS[name], f"{worst:.3g} ulp; repeat with: {how}; {case}"
    finally:
        torch.set_num_threads(threads)


def test_the_bound_is_not_blind():
    # torch's loss of a confident row has no digits left, and ours has them.
    x, label, one = torch.tensor([[0.5, 16.0, -1.0]]), torch.tensor([1]), torch.ones(3, dtype=torch.float64)
    rows = exact_losses.rows_of_labels([(label, one[0])], -100, one, 0.0)
    loss, gradient, _ = exact_losses.cross_entropy(x.double(), rows, 0.0, 0.0, torch.float32)
    limit = LIMITS["cross_entropy"]
    for function, good in ((F.cross_entropy, True), (torch.nn.functional.cross_entropy, False)):
        leaf = x.clone().requires_grad_()
        value = function(leaf, label, reduction="none")
        (grad,) = torch.autograd.grad(value.sum(), leaf)
        assert (loss.distance(value.detach()) <= limit) is good
        assert (gradient.distance(grad) <= limit) is good
    assert not loss.distance(torch.tensor([math.nan])) <= limit and not loss.distance(torch.zeros(1)) <= limit
